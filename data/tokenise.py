"""Text to token store, divided over processes and nodes that agree on nothing: the bytes are the same for any number.

The text is laid out on the line from 0 to 1, each piece (a file) as long as it is large, and every process has an
interval of that line. Block number b of a piece lies at the piece's start plus frac(b * golden ratio) of its length,
which spreads the blocks evenly; a process reads the pieces that its interval meets and tokenises the blocks that lie
in it. So a corpus of many files is divided by files, a single file by blocks, and reading a block without tokenising
it is what a division costs. Tokenised blocks go into parts (`training/parts.py`), which the first process joins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cpt_merge.core.artifact import Staging, fingerprint, stage_key, write_json
from cpt_merge.core.distributed import wait_for
from cpt_merge.core.progress import Meter, say, timed
from cpt_merge.core.world import World
from cpt_merge.data.encoding import DocumentEncoder
from cpt_merge.data.join import join
from cpt_merge.data.parts import Block, Encoded, Parts, PartWriter, Place
from cpt_merge.data.sources import Corpus, Piece, read_piece, source_pieces
from cpt_merge.data.store import (  # fmt: skip
    STORE_FILE,
    Store,
    StoreInfo,
    StoreSplit,
    TokenizerInfo,
)
from cpt_merge.data.workers import Report, run_in_processes

BLOCK_DOCUMENTS, BLOCK_CHARACTERS = (
    1000,
    2**20,
)  # a block ends with the document that reaches one of them
HUB_PIECE = 256_000_000  # bytes that a shard of a hub dataset counts as
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Plan:
    """What is to be tokenised, and how it is laid out on the line from 0 to 1."""

    corpus: Corpus
    pieces: list[Piece]
    starts: list[float]  # of each piece on the line; the last is 1
    of_source: list[list[int]]  # of each source, the numbers of its pieces
    encoders: dict[StoreSplit, DocumentEncoder]  # `train` is also the held-out text's

    @staticmethod
    def make(corpus: Corpus, tokenizer: Path, base: Path | None = None) -> Plan:
        """The plan for a corpus. Raises `UserError` for text that is not there."""
        by_source = [source_pieces(source) for source in corpus.sources]
        pieces = [piece for pieces in by_source for piece in pieces]
        ends = np.cumsum([piece.size or HUB_PIECE for piece in pieces], dtype=float)
        starts = [0.0, *(ends / ends[-1]).tolist()] if pieces else [0.0]
        numbers = iter(range(len(pieces)))
        of_source = [[next(numbers) for _ in of] for of in by_source]
        encoders: dict[StoreSplit, DocumentEncoder] = {"train": DocumentEncoder.read(tokenizer)}
        if base:
            encoders["reference"] = DocumentEncoder.read(base)
        return Plan(corpus, pieces, starts, of_source, encoders)

    def position(self, place: Place) -> float:
        """Where a block lies. The shards of hub datasets are not divided: each is downloaded once."""
        piece, block = place
        within = (block + 0.5) * GOLDEN % 1 if self.pieces[piece].files else 0.5
        return self.starts[piece] + within * (self.starts[piece + 1] - self.starts[piece])


@dataclass(frozen=True)
class Interval:
    """The part [start, end) of the line that belongs to one process."""

    start: float
    end: float

    @staticmethod
    def of(world: World, worker: int, workers: int) -> Interval:
        """Of one of a node's `workers` processes; nodes may have different numbers of them."""
        last = worker + 1 == workers and world.rank + 1 == world.size
        ends = [(world.rank + number / workers) / world.size for number in (worker, worker + 1)]
        return Interval(
            ends[0], 2.0 if last else ends[1]
        )  # a sum that rounds to 1 lies in the last one's

    def __contains__(self, position: float) -> bool:
        return self.start <= position < self.end

    def meets(self, start: float, end: float) -> bool:
        """Whether some of [start, end) lies within."""
        return start < self.end and end > self.start


def tokenise_share(
    plan: Plan, parts: Path, world: World, workers: int, worker: int, report: Report
) -> None:
    """Tokenise the blocks of one process that are not there yet."""
    mine, there = Interval.of(world, worker, workers), Parts(parts).look()
    writer = PartWriter(parts)
    for number, piece in enumerate(plan.pieces):
        if not mine.meets(plan.starts[number], plan.starts[number + 1]) or _is_there(
            plan, number, mine, there
        ):
            continue
        block = -1
        for block, texts in enumerate(blocks(read_piece(piece))):
            place = (number, block)
            if plan.position(place) in mine and place not in there.rows:
                made = encode_block(place, texts, plan.corpus, plan.encoders)
                writer.add(made)
                report(len(texts), sum(len(made.splits[split].tokens) for split in made.splits))
        writer.end(number, block + 1)
    writer.flush()


def _is_there(plan: Plan, piece: int, mine: Interval, there: Parts) -> bool:
    """Whether all blocks of the piece that lie in the interval were tokenised by an earlier attempt."""
    places = ((piece, block) for block in range(there.totals.get(piece, 0)))
    return piece in there.totals and all(
        place in there.rows for place in places if plan.position(place) in mine
    )


def blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in blocks, each up to BLOCK_DOCUMENTS of them or about BLOCK_CHARACTERS."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if len(block) == BLOCK_DOCUMENTS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def encode_block(
    place: Place, texts: list[str], corpus: Corpus, encoders: dict[StoreSplit, DocumentEncoder]
) -> Block:
    """Normalise, divide and tokenise the texts of a block."""
    prepared = [text for text in map(corpus.prepare, texts) if text]
    divided: dict[StoreSplit, list[str]] = {"train": [], "heldout": []}
    for text in prepared:
        divided["heldout" if corpus.is_heldout(text) else "train"].append(text)
    if "reference" in encoders:
        divided["reference"] = divided["heldout"]
    splits = {
        split: _encode(of_split, encoders["reference" if split == "reference" else "train"])
        for split, of_split in divided.items()
        if of_split
    }
    return Block(place, len(texts) - len(prepared), splits)


def _encode(texts: list[str], encoder: DocumentEncoder) -> Encoded:
    tokens, lengths = encoder(texts)
    raw = [text.encode() for text in texts]
    sizes = np.fromiter(map(len, raw), np.int64, len(raw))
    digests = b"".join(hashlib.blake2b(one, digest_size=16).digest() for one in raw)
    return Encoded(tokens, lengths, sizes, np.frombuffer(digests, np.uint64).reshape(-1, 2))


def write_store(
    corpus: Corpus,
    tokenizer: Path,
    out: Path,
    *,
    base: Path | None = None,
    processes: int = 1,
    deduplicate: bool = False,
    world: World = World(),  # noqa: B008 - immutable
) -> StoreInfo:
    """Tokenise the corpus into a store at `out`, in `processes` processes on this node and in all nodes of `world`.

    `base` is the original base model's directory, for the `reference` split. Where a store of the same digest was
    begun, it is continued. Raises `UserError` for a source without training text.
    """
    plan = Plan.make(corpus, tokenizer, base)
    staging = staging_of(out, _digest(plan, deduplicate))
    if world.is_main:
        staging.finish_commit()
    if _is_finished(staging):
        return Store.open(out).info
    _open_parts(staging, world)
    if _is_finished(staging):  # by the others, before this process began
        return Store.open(out).info
    with Meter("tokenise", None, "documents") as meter:
        tokens = 0

        def report(documents: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            meter.note = f"{tokens:,} tokens"
            meter.advance(documents)

        run_in_processes(
            partial(tokenise_share, plan, staging.directory, world, processes), processes, report
        )
    if not world.is_main:
        wait_for(lambda: _is_finished(staging), "the other tasks of this step")
        return Store.open(out).info
    parts = Parts(staging.directory)
    wait_for(lambda: parts.look().is_complete(len(plan.pieces)), "the other tasks of this step")
    with timed("join"):
        info = _join(parts, plan, staging, deduplicate)
        staging.commit()
    return info


def _join(parts: Parts, plan: Plan, staging: Staging, deduplicate: bool) -> StoreInfo:
    infos = {split: encoder.info for split, encoder in plan.encoders.items()}
    by_split: dict[StoreSplit, TokenizerInfo] = {
        "train": infos["train"],
        "heldout": infos["train"],
        **infos,
    }
    out, sources = staging.directory, plan.corpus.sources
    found = join(parts, plan.of_source, sources, by_split, out, deduplicate)
    info = StoreInfo(staging.key, infos["train"], infos.get("reference"), found)
    write_json(out / STORE_FILE, asdict(info))
    return info


def _digest(plan: Plan, deduplicate: bool) -> str:
    """Names what the store is made of, and how the text is cut into blocks."""
    settings = {
        "text": plan.corpus.text(),
        "deduplicate": deduplicate,
        "block": [BLOCK_DOCUMENTS, BLOCK_CHARACTERS],
    }
    inputs = {str(split): encoder.info.fingerprint for split, encoder in plan.encoders.items()}
    inputs |= {str(file): fingerprint(file) for piece in plan.pieces for file in piece.files}
    return stage_key("store", settings, inputs)


def staging_of(out: Path, digest: str) -> Staging:
    """Where the parts of a store are collected, and the store is joined from them."""
    return Staging(out, digest, suffix=".parts", scratch=("part-*",), replace=True)


def _is_finished(staging: Staging) -> bool:
    store = staging.target
    return (store / STORE_FILE).is_file() and Store.open(store).info.digest == staging.key


def _open_parts(staging: Staging, world: World) -> None:
    """Let the first process make the folder of the parts, or find it as an earlier attempt left it."""
    if not world.is_main:
        wait_for(lambda: staging.is_begun or _is_finished(staging), "the other tasks of this step")
    elif staging.begin():
        done = len(Parts(staging.directory).look().rows)
        say(f"continuing an unfinished store: {done:,} blocks are tokenised")
