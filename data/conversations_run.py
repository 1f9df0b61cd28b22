"""The conversations stage: from conversations and a chat model's tokenizer to a token store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import Staging, stage_key, write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.data.conversations_check import checked
from cpt_merge.data.conversations_config import ConversationsConfig
from cpt_merge.data.conversations_source import read_conversations
from cpt_merge.data.conversations_store import ChatNotes, Group, fitting, write_groups
from cpt_merge.data.conversations_template import ConversationTemplate
from cpt_merge.data.encoding import DocumentEncoder
from cpt_merge.data.hub_datasets import text_fingerprint
from cpt_merge.data.sources import source_files
from cpt_merge.data.store import (
    STORE_FILE,
    MaskedCounts,
    SourceInfo,
    StoreInfo,
    StoreSplit,
    describe_left_out,
    source_folder,
)
from cpt_merge.tracking import Cell, Tracker

_SPLITS: tuple[StoreSplit, ...] = ("train", "heldout")


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
    encoder = DocumentEncoder.read(tokenizer)
    staging = Staging(out, _digest(config, sequence_length, found.template, encoder), replace=True)
    sources, of_sources = list[SourceInfo](), list[ChatNotes]()
    with staging.filling() as store:
        for number, source in enumerate(config.sources):
            notes, groups = ChatNotes(), dict[StoreSplit, list[Group]]()
            for one in read_conversations(source, found.template, notes):
                held = config.is_heldout(one.prompt)
                notes.heldout += held
                rows = fitting(one.where, one.chat, sequence_length, notes)
                groups.setdefault("heldout" if held else "train", []).extend(
                    Group.of([row], encoder.info.dtype) for row in rows
                )
            folder = source_folder(number, source.name)
            counts = {
                split: write_groups(
                    groups.get(split, []), store / folder / split, encoder.info.dtype,
                    sequence_length, encoder.tokenizer.eos,
                )
                for split in _SPLITS
            }  # fmt: skip
            left_out = {"bad_rows": notes.bad_rows, "too_long": notes.too_long}
            made = SourceInfo(
                source.name, source.language, folder, left_out, **counts, reference=None
            )
            sources.append(made)
            of_sources.append(notes)
        _require_enough(config, sources)
        write_json(store / STORE_FILE, asdict(StoreInfo(staging.key, encoder.info, None, sources)))
    return _summary(sources, of_sources, sequence_length, tracker)


def _digest(
    config: ConversationsConfig,
    length: int,
    template: ConversationTemplate,
    encoder: DocumentEncoder,
) -> str:
    """A digest of everything that the store depends on."""
    settings = {
        **config.identity(),
        "sequence_length": length,
        "template": template.text,
        "special_tokens": template.tokenizer.special_tokens_map,
        "end_ids": sorted(template.end_ids),
    }
    files = [file for source in config.sources for file in source_files(source)]
    inputs = {str(file): text_fingerprint(file) for file in files}
    return stage_key("conversations", settings, {"tokenizer": encoder.info.fingerprint, **inputs})


def _require_enough(config: ConversationsConfig, sources: Sequence[SourceInfo]) -> None:
    """Raise `UserError` for a source without rows to train on, or if nothing is held out."""
    for source, info in zip(config.sources, sources, strict=True):
        if not info.train.documents:
            raise UserError(
                f"the source {source.path} yields no conversation to train on (left out: "
                f"{describe_left_out(info.left_out)}); give it conversations or remove it."
            )
    if not any(info.heldout.documents for info in sources):
        raise UserError(
            f"no conversation is held out of {counted(len(sources), 'source')} with heldout = "
            f"{config.heldout:g}; raise finetune.heldout, or give more conversations."
        )


def _summary(
    sources: Sequence[SourceInfo], of_sources: Sequence[ChatNotes], length: int, tracker: Tracker
) -> dict[str, Any]:
    """Say and log what became of each source; the totals."""
    columns = ["source", "conversations", "held out", "rows", "replies", "tokens", "trained tokens",
               "sequences", "cut", "left out"]  # fmt: skip
    table = list[list[Cell]]()
    for info, notes in zip(sources, of_sources, strict=True):
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
