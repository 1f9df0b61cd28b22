"""Text to token store, divided over processes and nodes; the bytes do not depend on the division.

`data/division.py` says which process tokenises which blocks of text. Tokenised blocks go into parts
(`data/parts.py`), which rank 0 joins and which stay for the next store: of a corpus that has grown,
only the new blocks are tokenised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.core.artifact import Staging, stage_key, write_json
from cpt_merge.core.distributed import wait_for
from cpt_merge.core.progress import Meter, counted, say, timed
from cpt_merge.core.world import World
from cpt_merge.data.division import Interval, Line, Reading
from cpt_merge.data.documents import SKIPPED
from cpt_merge.data.encoding import DocumentEncoder
from cpt_merge.data.hub_datasets import text_fingerprint
from cpt_merge.data.join import join
from cpt_merge.data.minhash import ALGORITHM, PERMUTATIONS, SHINGLE, signatures
from cpt_merge.data.parts import Digest, Encoded, Parts, PartWriter, TokenBlock
from cpt_merge.data.preparation.notes import Example, Notes, where_different, write_notes
from cpt_merge.data.preparation.steps import BAD_ROWS
from cpt_merge.data.readers import endings
from cpt_merge.data.selection import Pair, select
from cpt_merge.data.sources import (
    Corpus,
    Piece,
    Source,
    read_piece,
    source_pieces,
)  # fmt: skip
from cpt_merge.data.store import (  # fmt: skip
    STORE_FILE,
    Store,
    StoreInfo,
    StoreSplit,
    TokenizerInfo,
)
from cpt_merge.data.workers import Progress, Report, run_in_processes, start_server

# a block ends with the document that reaches one of these
BLOCK_DOCUMENTS, BLOCK_CHARACTERS = 1000, 2**20
EXAMPLE_TOKENS = 4000  # of a document, in which a difference is looked for

_MINHASH = {"minhash": [ALGORITHM, PERMUTATIONS, SHINGLE]}


@dataclass(frozen=True)
class Plan:
    """The text to tokenise, and its layout on the line from 0 to 1."""

    corpus: Corpus
    pieces: list[Piece]
    keys: list[str]  # of the pieces: digests of their files and of how they are read
    line: Line  # on which the pieces are
    of_source: list[list[str]]  # the keys of the pieces of each source
    encoders: dict[StoreSplit, DocumentEncoder]  # `train` also encodes the held-out text
    deduplicate: bool
    near_duplicates: float | None  # the least similarity of those that are left out

    @staticmethod
    def make(
        corpus: Corpus,
        tokenizer: Path,
        base: Path | None = None,
        deduplicate: bool = False,
        near_duplicates: float | None = None,
    ) -> Plan:
        """The plan for a corpus. Raises `UserError` for missing text."""
        by_source = [source_pieces(source) for source in corpus.sources]
        pieces = [piece for pieces in by_source for piece in pieces]
        line = Line.of([piece.size for piece in pieces])
        of_source = [[_key(corpus, piece) for piece in of] for of in by_source]
        keys = [key for of in of_source for key in of]
        encoders: dict[StoreSplit, DocumentEncoder] = {"train": DocumentEncoder.read(tokenizer)}
        if base:
            encoders["reference"] = DocumentEncoder.read(base)
        duplicates = (deduplicate, near_duplicates)
        return Plan(corpus, pieces, keys, line, of_source, encoders, *duplicates)


def tokenise_share(
    plan: Plan,
    unread: Sequence[int],
    parts: Path,
    world: World,
    workers: int,
    worker: int,
    report: Report,
) -> None:
    """Tokenise the missing blocks of one process in the pieces `unread`."""
    mine, done = Interval.of(world, worker, workers), Parts(parts).update()
    writer = PartWriter(parts)
    for number in unread:
        piece, share = plan.pieces[number], plan.line.bytes_in(mine, number)
        if not share:
            continue
        if _is_done(plan, number, done, mine):
            report(Progress(0, 0, share))
            continue
        digests, treatment = list[Digest](), _treatment(plan.corpus, piece.source)
        reading = Reading(share, piece.text_bytes_at_most())
        for block, texts in enumerate(blocks(read_piece(piece))):
            digests.append(digest_of(texts, treatment))
            read = reading.advance(sum(len(text.encode()) for text in texts if text))
            progress = Progress(0, 0, read)
            if plan.line.position(number, block) in mine and digests[-1] not in done.rows:
                made = encode_block(digests[-1], texts, plan, piece.source)
                writer.add(made)
                tokens = sum(len(made.splits[split].tokens) for split in made.splits)
                progress = Progress(len(texts), tokens, read)
            report(progress)
        writer.end(plan.keys[number], digests)
        report(Progress(0, 0, reading.finish()))
    writer.flush()


def _is_done(plan: Plan, piece: int, done: Parts, mine: Interval) -> bool:
    """Whether the piece was read to its end, and its blocks in the interval were tokenised."""
    digests = done.pieces.get(plan.keys[piece])
    return digests is not None and all(
        digest in done.rows
        for block, digest in enumerate(digests)
        if plan.line.position(piece, block) in mine
    )


def _unread(plan: Plan, parts: Path, node: Interval) -> list[int]:
    """The numbers of the pieces that a node has to read."""
    done, numbers = Parts(parts).update(), range(len(plan.pieces))
    return [
        number
        for number in numbers
        if plan.line.bytes_in(node, number) and not _is_done(plan, number, done, node)
    ]


def _key(corpus: Corpus, piece: Piece) -> str:
    """A digest of what is read, and how."""
    inputs = {str(number): text_fingerprint(file) for number, file in enumerate(piece.files)}
    reading = {"field", "conversations", "whole_files", "bad_rows"}
    settings = {
        "source": piece.source.model_dump(include=reading) | _treatment(corpus, piece.source),
        "rows": piece.rows,
        "endings": [endings(Path(str(file))) for file in piece.files],
        "block": [BLOCK_DOCUMENTS, BLOCK_CHARACTERS],
    }
    return stage_key("piece", settings, inputs)


def _treatment(corpus: Corpus, source: Source) -> dict[str, Any]:
    """The settings that decide what becomes of a text of a source, wherever it was read."""
    steps = [repr(step) for step in corpus.steps(source)]
    return {"language": source.language} | ({"steps": steps} if steps else {})


def digest_of(texts: Iterable[str | None], treatment: Mapping[str, Any]) -> Digest:
    """The digest of a block's texts and of what becomes of them."""
    digest = hashlib.blake2b(json.dumps(treatment).encode(), digest_size=16)
    for text in texts:
        content = b"" if text is SKIPPED else text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % (-1 if text is SKIPPED else len(content)))
        digest.update(content)
    return digest.digest()


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


def encode_block(digest: Digest, texts: list[str | None], plan: Plan, source: Source) -> TokenBlock:
    """Normalise the texts of a block, divide them into splits, and tokenise them."""
    corpus, encoders = plan.corpus, plan.encoders
    notes, prepare = Notes(), corpus.preparation(source)
    divided: dict[StoreSplit, list[str]] = {"train": [], "heldout": []}
    for raw in texts:
        if raw is SKIPPED:
            notes.left_out[BAD_ROWS] += 1
        elif text := prepare(raw, notes):
            divided["heldout" if corpus.is_heldout(text) else "train"].append(text)
    compared = {}
    if plan.near_duplicates is not None:
        compared = {split: signatures(of, source.language) for split, of in divided.items() if of}
    if "reference" in encoders:
        divided["reference"] = divided["heldout"]
    splits = {
        split: _encode(of_split, encoders["reference" if split == "reference" else "train"])
        for split, of_split in divided.items()
        if of_split
    }
    return TokenBlock(digest, notes, splits, compared)


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
    near_duplicates: float | None = None,
    keep_blocks: bool = True,
    blocks_at: Path | None = None,
    world: World = World(),  # noqa: B008 - immutable
) -> StoreInfo:
    """Tokenise the corpus into a store at `out`, together with all nodes of `world`.

    `base` is the directory of the original base model, for the `reference` split; `processes` are
    those on this node. Blocks of text that were tokenised before are not tokenised again; with
    `keep_blocks` they are kept next to the store. Raises `UserError` for a source without training
    text.
    """
    if processes > 1:
        start_server([__name__])
    plan = Plan.make(corpus, tokenizer, base, deduplicate, near_duplicates)
    staging = Staging(out, _digest(plan), replace=True)
    blocks = blocks_of(blocks_at or out.with_name(f"{out.name}.blocks"), plan)
    if world.is_main:
        staging.finish_commit()
    if _is_finished(staging):
        return Store.open(out).info
    _open_parts(blocks, staging, plan, world)
    if _is_finished(staging):  # by other nodes, before this process began
        return Store.open(out).info
    _tokenise_unread(plan, blocks.directory, world, processes)
    if not world.is_main:
        wait_for(lambda: _is_finished(staging), "the other tasks of this job step")
        return Store.open(out).info
    parts = Parts(blocks.directory)
    wait_for(lambda: parts.update().is_complete(plan.keys), "the other tasks of this job step")
    with timed("join"), staging.filling() as store:
        info = _join(parts, plan, store, staging.key)
    if keep_blocks:
        parts.remove_unused(plan.keys)
    else:
        blocks.discard()
    return info


def _tokenise_unread(plan: Plan, parts: Path, world: World, processes: int) -> None:
    """Tokenise what this node has not read yet, in its processes, with progress."""
    node = Interval.of(world, 0, 1)
    unread = _unread(plan, parts, node)
    whole = sum(plan.line.bytes_in(node, number) for number in unread)
    with Meter("tokenise", whole / 1e6, "MB") as meter:
        documents = tokens = 0

        def report(more: Progress) -> None:
            nonlocal documents, tokens
            documents, tokens = documents + more.documents, tokens + more.tokens
            meter.note = f"{counted(documents, 'document')}, {counted(tokens, 'token')}"
            meter.advance(more.bytes / 1e6)

        run_in_processes(
            partial(tokenise_share, plan, unread, parts, world, processes),
            processes,
            report,
            "data.processes",
        )


def _join(parts: Parts, plan: Plan, out: Path, digest: str) -> StoreInfo:
    infos = {split: encoder.info for split, encoder in plan.encoders.items()}
    by_split: dict[StoreSplit, TokenizerInfo] = {
        "train": infos["train"],
        "heldout": infos["train"],
        **infos,
    }
    selection = select(parts, plan.of_source, plan.deduplicate, plan.near_duplicates)
    found, notes = join(parts, plan.of_source, plan.corpus, by_split, out, selection)
    if plan.near_duplicates is not None or any(map(plan.corpus.steps, plan.corpus.sources)):
        _add_pairs(notes, selection.pairs, plan.encoders["train"])
        write_notes(out, notes)
    info = StoreInfo(digest, infos["train"], infos.get("reference"), found)
    write_json(out / STORE_FILE, asdict(info))
    return info


def _add_pairs(of_sources: list[Notes], pairs: list[Pair], encoder: DocumentEncoder) -> None:
    for pair in pairs:
        both = [encoder.beginning(one, EXAMPLE_TOKENS) for one in (pair.left_out, pair.kept)]
        of_sources[pair.source].examples.append(Example("near_duplicates", *where_different(*both)))


def _digest(plan: Plan) -> str:
    """A digest of everything that the store depends on, and of how text is cut into blocks."""
    settings: dict[str, Any] = {
        "text": plan.corpus.text(),
        "deduplicate": plan.deduplicate,
        "block": [BLOCK_DOCUMENTS, BLOCK_CHARACTERS],
    }
    if plan.near_duplicates is not None:
        settings |= {"near_duplicates": plan.near_duplicates, **_MINHASH}
    inputs = {str(split): encoder.info.fingerprint for split, encoder in plan.encoders.items()}
    inputs |= {str(file): text_fingerprint(file) for piece in plan.pieces for file in piece.files}
    return stage_key("store", settings, inputs)


def blocks_of(directory: Path, plan: Plan) -> Staging:
    """Where the tokenised blocks of a store are, for one pair of tokenizers and one normalisation.

    The work is never finished: the next store of the run uses it again.
    """
    settings = plan.corpus.model_dump(include={"heldout", "normalization"})
    if plan.near_duplicates is not None:
        settings |= _MINHASH
    tokenizers = {str(split): encoder.info.fingerprint for split, encoder in plan.encoders.items()}
    key = stage_key("blocks", settings, tokenizers)
    return Staging(directory, key, suffix="")


def _is_finished(staging: Staging) -> bool:
    store = staging.target
    return (store / STORE_FILE).is_file() and Store.open(store).info.digest == staging.key


def _open_parts(blocks: Staging, staging: Staging, plan: Plan, world: World) -> None:
    """The first process makes the folder of the blocks, or finds an earlier one."""
    if not world.is_main:
        wait_for(
            lambda: blocks.is_begun or _is_finished(staging), "the other tasks of this job step"
        )
    elif blocks.begin():
        parts = Parts(blocks.directory).update()
        known = sum(key in parts.pieces for key in plan.keys)
        say(
            f"{counted(len(parts.rows), 'block')} of text were tokenised before; {known:,} of "
            f"{counted(len(plan.keys), 'file')} are unchanged"
        )
