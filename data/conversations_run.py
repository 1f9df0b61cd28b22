"""The conversations stage: from conversations and a chat model's tokenizer to a token store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import Staging, stage_key, write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import Meter, counted, say, timed
from cpt_merge.core.world import World
from cpt_merge.data.conversations_blocks import (
    BLOCK_BYTES,
    BLOCK_RECORDS,
    Blocks,
    ChatBlock,
)
from cpt_merge.data.conversations_check import checked
from cpt_merge.data.conversations_config import ConversationsConfig
from cpt_merge.data.conversations_source import (
    AnyRecord,
    ChatSource,
    read_records,
    rendered,
)
from cpt_merge.data.conversations_store import ChatNotes, Group, write_groups
from cpt_merge.data.conversations_template import ConversationTemplate
from cpt_merge.data.division import Interval, Line, Reading
from cpt_merge.data.encoding import DocumentEncoder
from cpt_merge.data.hub_datasets import text_fingerprint
from cpt_merge.data.sources import Piece, source_pieces
from cpt_merge.data.store import (
    STORE_FILE,
    MaskedCounts,
    SourceInfo,
    Store,
    StoreInfo,
    StoreSplit,
    TokenizerInfo,
    describe_left_out,
    source_folder,
)
from cpt_merge.data.workers import Progress, Report, processes_for, run_in_processes, start_server
from cpt_merge.tracking import Cell, Tracker

BLOCKS = "blocks"  # in the unfinished store
NOTES_FILE = "notes.json"  # in the store: what became of the records of each source
_SPLITS: tuple[StoreSplit, ...] = ("train", "heldout")
_PROCESS_BYTES = 1_000_000  # least text per process, since starting one takes a few seconds


@dataclass(frozen=True)
class Plan:
    """The conversations to render, and their layout on the line from 0 to 1."""

    config: ConversationsConfig
    length: int  # of a sequence
    template: ConversationTemplate
    tokenizer: TokenizerInfo
    filler: int  # the token of what is left of a sequence
    pieces: list[tuple[ChatSource, Piece]]
    of_source: list[list[int]]  # the numbers of the pieces of each source
    line: Line

    @staticmethod
    def make(
        config: ConversationsConfig,
        length: int,
        template: ConversationTemplate,
        encoder: DocumentEncoder,
    ) -> Plan:
        """The plan for sources. Raises `UserError` for missing files."""
        pieces, of_source = list[tuple[ChatSource, Piece]](), list[list[int]]()
        for source in config.sources:
            found = source_pieces(source)
            of_source.append(list(range(len(pieces), len(pieces) + len(found))))
            pieces += [(source, piece) for piece in found]
        if not pieces:
            raise UserError(
                f"the files of {config.section}.sources are empty; give them conversations."
            )
        line = Line.of([piece.size for _, piece in pieces])
        eos = encoder.tokenizer.eos
        return Plan(config, length, template, encoder.info, eos, pieces, of_source, line)

    def digest(self) -> str:
        """A digest of everything that the store depends on."""
        settings = {
            **self.config.identity(),
            "sequence_length": self.length,
            "template": self.template.text,
            "special_tokens": self.template.tokenizer.special_tokens_map,
            "end_ids": sorted(self.template.end_ids),
            "block": [BLOCK_RECORDS, BLOCK_BYTES],
            "rendered as": type(self.config.sources[0]).__name__,
        }
        files = [file for _, piece in self.pieces for file in piece.files]
        inputs = {str(file): text_fingerprint(file) for file in files}
        return stage_key(
            "conversations", settings, {"tokenizer": self.tokenizer.fingerprint, **inputs}
        )


def run(
    config: ConversationsConfig, sequence_length: int, tokenizer: Path, out: Path, tracker: Tracker
) -> dict[str, Any]:
    """Lay the conversations of every source into the store `out` and return the totals.

    `tokenizer` is a directory with the tokenizer, chat template and generation_config.json of the
    model that is trained.
    """
    template = ConversationTemplate.read(tokenizer, config.thinking, config.chat_template_kwargs)
    found = checked(template, tokenizer)
    for remark in found.remarks:
        say(f"  {remark}")
    plan = Plan.make(config, sequence_length, found.template, DocumentEncoder.read(tokenizer))
    staging = Staging(out, plan.digest(), scratch=[BLOCKS], replace=True)
    staging.finish_commit()
    if not _is_finished(staging):
        blocks = Blocks(staging.directory / BLOCKS)
        if staging.begin(blocks.directory.mkdir):
            say(f"  {counted(blocks.finished(), 'block')} of conversations were rendered before")
        _make_blocks(plan, blocks)
        with timed("  lay into sequences"):
            _join(plan, blocks, staging)
        staging.commit()
    return _summary(out, sequence_length, tracker)


def _is_finished(staging: Staging) -> bool:
    store = staging.target
    return (store / STORE_FILE).is_file() and Store.open(store).info.digest == staging.key


def _make_blocks(plan: Plan, blocks: Blocks) -> None:
    """Render and tokenise all conversations, in several processes, with progress."""
    size = sum(plan.line.sizes)
    processes = plan.config.processes or processes_for(size, _PROCESS_BYTES)
    say(f"  rendering in {counted(processes, 'process')}")
    if processes > 1:
        start_server([__name__, "transformers.models.auto.tokenization_auto"])
    with Meter("  render", size / 1e6, "MB") as meter:
        conversations = tokens = 0

        def report(more: Progress) -> None:
            nonlocal conversations, tokens
            conversations, tokens = conversations + more.documents, tokens + more.tokens
            meter.note = f"{counted(conversations, 'conversation')}, {counted(tokens, 'token')}"
            meter.advance(more.bytes / 1e6)

        task = partial(make_share, plan, blocks, processes)
        run_in_processes(task, processes, report, f"{plan.config.section}.processes")


def make_share(plan: Plan, blocks: Blocks, processes: int, process: int, report: Report) -> None:
    """Make the missing blocks of one process."""
    mine = Interval.of(World(), process, processes)
    for number, (source, piece) in enumerate(plan.pieces):
        share, count = plan.line.bytes_in(mine, number), blocks.count(number)
        if not share:
            continue
        if count is not None and all(
            blocks.has(number, block)
            for block in range(count)
            if plan.line.position(number, block) in mine
        ):
            report(Progress(0, 0, share))
            continue
        reading, block = Reading(share, piece.text_bytes_at_most()), -1
        for block, records in enumerate(_divided(piece)):
            read = reading.advance(sum(size for *_, size in records))
            progress = Progress(0, 0, read)
            if plan.line.position(number, block) in mine and not blocks.has(number, block):
                made = _made(plan, source, records)
                blocks.write(number, block, made)
                progress = Progress(made.notes.conversations, made.notes.tokens, read)
            report(progress)
        if plan.line.starts[number] in mine:
            blocks.end(number, block + 1)
        report(Progress(0, 0, reading.finish()))


SizedRecord = tuple[str, AnyRecord, int]  # (file and row, what is there, its bytes of text)


def _divided(piece: Piece) -> Iterator[list[SizedRecord]]:
    """The records of a piece in blocks."""
    block, size = list[SizedRecord](), 0
    for where, record in read_records(piece):
        block.append((where, record, _text_bytes(record)))
        size += block[-1][-1]
        if len(block) == BLOCK_RECORDS or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _text_bytes(value: Any) -> int:
    """The UTF-8 bytes of the texts in a record."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0


def _made(plan: Plan, source: ChatSource, records: list[SizedRecord]) -> ChatBlock:
    """Render and tokenise the conversations of a block, and divide them into splits."""
    block = ChatBlock()
    for where, record, _ in records:
        found = rendered(source, record, where, plan.template, plan.length, block.notes)
        if found is None:
            continue
        held = plan.config.is_heldout(found.prompt)
        block.notes.heldout += held
        groups = [Group.of(rows, plan.tokenizer.dtype) for rows in found.groups]
        block.add("heldout" if held else "train", groups)
    return block


def _join(plan: Plan, blocks: Blocks, staging: Staging) -> None:
    """Write the splits of all sources, what became of their records, and `store.json`."""
    sources, of_sources = list[SourceInfo](), list[ChatNotes]()
    for number, (source, pieces) in enumerate(
        zip(plan.config.sources, plan.of_source, strict=True)
    ):
        folder = source_folder(number, source.name)
        train, heldout = (
            write_groups(
                blocks.groups(pieces, split), staging.directory / folder / split,
                plan.tokenizer.dtype, plan.length, plan.filler,
            )
            for split in _SPLITS
        )  # fmt: skip
        notes = blocks.notes(pieces)
        left_out = {"bad_rows": notes.bad_rows, "too_long": notes.too_long}
        sources.append(
            SourceInfo(source.name, source.language, folder, left_out, train, heldout, None)
        )
        of_sources.append(notes)
    _require_enough(plan.config, sources)
    write_json(staging.directory / NOTES_FILE, list(map(asdict, of_sources)))
    info = StoreInfo(staging.key, plan.tokenizer, None, sources)
    write_json(staging.directory / STORE_FILE, asdict(info))


def _require_enough(config: ConversationsConfig, sources: Sequence[SourceInfo]) -> None:
    """Raise `UserError` for a source without rows to train on, or if nothing is held out."""
    for source, info in zip(config.sources, sources, strict=True):
        if not info.train.documents and info.heldout.documents:
            raise UserError(
                f"every conversation of the source {source.path} is held out with heldout = "
                f"{config.heldout:g}; lower {config.section}.heldout, or give more conversations."
            )
        if not info.train.documents:
            raise UserError(
                f"the source {source.path} yields no conversation to train on (left out: "
                f"{describe_left_out(info.left_out)}); give it conversations or remove it."
            )
    if not any(info.heldout.documents for info in sources):
        raise UserError(
            f"no conversation is held out of {counted(len(sources), 'source')} with heldout = "
            f"{config.heldout:g}; raise {config.section}.heldout, or give more conversations."
        )


def _summary(store: Path, length: int, tracker: Tracker) -> dict[str, Any]:
    """Say and log what became of each source; the totals."""
    kept = json.loads((store / NOTES_FILE).read_text(encoding="utf-8"))
    columns = ["source", "conversations", "held out", "rows", "replies", "tokens", "trained tokens",
               "sequences", "cut", "left out"]  # fmt: skip
    table = list[list[Cell]]()
    for info, notes in zip(
        Store.open(store).info.sources, (ChatNotes(**one) for one in kept), strict=True
    ):
        assert isinstance(info.train, MaskedCounts)
        assert isinstance(info.heldout, MaskedCounts)
        trained = info.train.trained + info.heldout.trained
        sequences = info.train.tokens // length
        table.append(
            [info.name, notes.conversations, notes.heldout, notes.rows, notes.replies,
             notes.tokens, trained, sequences, notes.cut, sum(info.left_out.values())]
        )  # fmt: skip
        conversations = counted(notes.conversations, "conversation")
        rows, replies = counted(notes.rows, "row"), counted(notes.replies, "reply")
        say(
            f"  {info.name}: {conversations} ({notes.heldout:,} held out), {rows} with {replies}, "
            f"{notes.tokens:,} tokens, of which the loss counts {trained:,}, in "
            f"{counted(sequences, 'sequence')} for training"
        )
        for sentence in notes.describe():
            say(f"    {sentence}")
    tracker.table("conversations/sources", columns, table)
    places = range(1, len(columns))
    totals = {
        columns[place].replace(" ", "_"): sum(int(row[place] or 0) for row in table)
        for place in places
    }
    tracker.summary({f"conversations/{name}": value for name, value in totals.items()})
    return totals
