"""Text to token store, divided over processes and nodes; the bytes do not depend on the division.

The text is laid out on the line from 0 to 1: each piece (a file) takes a length in proportion to
its size, and every process has an interval of that line. Block number b of a piece is at the start
of the piece plus frac(b * golden ratio) of its length, which spreads the blocks evenly. A process
reads the pieces that its interval meets and tokenises the blocks inside it. So a corpus of many
files is divided by files and a single file by blocks; the cost is that processes read blocks that
they do not tokenise. Tokenised blocks go into parts (`data/parts.py`), which rank 0 joins.
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
from cpt_merge.data.documents import SKIPPED
from cpt_merge.data.encoding import DocumentEncoder
from cpt_merge.data.join import join
from cpt_merge.data.parts import Encoded, Parts, PartWriter, Place, TokenBlock
from cpt_merge.data.sources import Corpus, Piece, read_piece, source_pieces
from cpt_merge.data.store import (  # fmt: skip
    STORE_FILE,
    Store,
    StoreInfo,
    StoreSplit,
    TokenizerInfo,
)
from cpt_merge.data.workers import Report, run_in_processes, start_server

# a block ends with the document that reaches one of these
BLOCK_DOCUMENTS, BLOCK_CHARACTERS = 1000, 2**20
HUB_PIECE = 256_000_000  # assumed size of a shard of a hub dataset, in bytes
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Plan:
    """The text to tokenise, and its layout on the line from 0 to 1."""

    corpus: Corpus
    pieces: list[Piece]
    starts: list[float]  # of each piece on the line; the last is 1
    of_source: list[list[int]]  # the numbers of the pieces of each source
    encoders: dict[StoreSplit, DocumentEncoder]  # `train` also encodes the held-out text

    @staticmethod
    def make(corpus: Corpus, tokenizer: Path, base: Path | None = None) -> Plan:
        """The plan for a corpus. Raises `UserError` for missing text."""
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
        """Where a block is. Shards of hub datasets are not divided: each is downloaded once."""
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
        """The interval of a worker; nodes may have different numbers of `workers`."""
        last = worker + 1 == workers and world.rank + 1 == world.size
        ends = [(world.rank + number / workers) / world.size for number in (worker, worker + 1)]
        return Interval(
            ends[0], 2.0 if last else ends[1]
        )  # positions that round to 1 are in the last

    def __contains__(self, position: float) -> bool:
        return self.start <= position < self.end

    def meets(self, start: float, end: float) -> bool:
        """Whether it overlaps [start, end)."""
        return start < self.end and end > self.start


def tokenise_share(
    plan: Plan, parts: Path, world: World, workers: int, worker: int, report: Report
) -> None:
    """Tokenise the missing blocks of one process."""
    mine, done = Interval.of(world, worker, workers), Parts(parts).update()
    writer = PartWriter(parts)
    for number, piece in enumerate(plan.pieces):
        if not mine.meets(plan.starts[number], plan.starts[number + 1]):
            continue
        if _is_done(plan, number, mine, done):
            continue
        block = -1
        for block, texts in enumerate(blocks(read_piece(piece))):
            place = (number, block)
            if plan.position(place) in mine and place not in done.rows:
                made = encode_block(place, texts, plan.corpus, plan.encoders)
                writer.add(made)
                report(len(texts), sum(len(made.splits[split].tokens) for split in made.splits))
        writer.end(number, block + 1)
    writer.flush()


def _is_done(plan: Plan, piece: int, mine: Interval, done: Parts) -> bool:
    """Whether an earlier attempt tokenised all blocks of the piece in the interval."""
    places = ((piece, block) for block in range(done.totals.get(piece, 0)))
    return piece in done.totals and all(
        place in done.rows for place in places if plan.position(place) in mine
    )


def blocks(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
    """The texts in blocks of up to BLOCK_DOCUMENTS texts or about BLOCK_CHARACTERS."""
    block: list[str | None] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text or "")
        if len(block) == BLOCK_DOCUMENTS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def encode_block(
    place: Place,
    texts: list[str | None],
    corpus: Corpus,
    encoders: dict[StoreSplit, DocumentEncoder],
) -> TokenBlock:
    """Normalise the texts of a block, divide them into splits, and tokenise them."""
    read = [text for text in texts if text is not SKIPPED]
    prepared = [text for text in map(corpus.prepare, read) if text]
    left_out = (len(texts) - len(read), len(read) - len(prepared))
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
    return TokenBlock(place, left_out, splits)


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
    """Tokenise the corpus into a store at `out`, together with all nodes of `world`.

    `base` is the directory of the original base model, for the `reference` split; `processes` are
    those on this node. An unfinished store with the same digest is continued. Raises `UserError`
    for a source without training text.
    """
    if processes > 1:
        start_server()
    plan = Plan.make(corpus, tokenizer, base)
    staging = staging_of(out, _digest(plan, deduplicate))
    if world.is_main:
        staging.finish_commit()
    if _is_finished(staging):
        return Store.open(out).info
    _open_parts(staging, world)
    if _is_finished(staging):  # by other nodes, before this process began
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
        wait_for(lambda: _is_finished(staging), "the other tasks of this job step")
        return Store.open(out).info
    parts = Parts(staging.directory)
    wait_for(
        lambda: parts.update().is_complete(len(plan.pieces)), "the other tasks of this job step"
    )
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
    """A digest of everything that the store depends on, and of how text is cut into blocks."""
    settings = {
        "text": plan.corpus.text(),
        "deduplicate": deduplicate,
        "block": [BLOCK_DOCUMENTS, BLOCK_CHARACTERS],
    }
    inputs = {str(split): encoder.info.fingerprint for split, encoder in plan.encoders.items()}
    inputs |= {str(file): fingerprint(file) for piece in plan.pieces for file in piece.files}
    return stage_key("store", settings, inputs)


def staging_of(out: Path, digest: str) -> Staging:
    """Where the parts of a store are collected and joined."""
    return Staging(out, digest, suffix=".parts", scratch=("part-*",), replace=True)


def _is_finished(staging: Staging) -> bool:
    store = staging.target
    return (store / STORE_FILE).is_file() and Store.open(store).info.digest == staging.key


def _open_parts(staging: Staging, world: World) -> None:
    """The first process makes the folder of the parts, or finds that of an earlier attempt."""
    if not world.is_main:
        wait_for(
            lambda: staging.is_begun or _is_finished(staging), "the other tasks of this job step"
        )
    elif staging.begin():
        done = len(Parts(staging.directory).update().rows)
        say(f"continuing an unfinished store: {done:,} blocks are tokenised")
