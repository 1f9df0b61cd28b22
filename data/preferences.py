"""Preference pairs for DPO: both rows of a pair are in one sequence, the chosen one first.

So a loss that compares the two needs no other sequence, and any division of the sequences over
processes keeps pairs together. The stage of conversations makes the store.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import model_validator

from cpt_merge.data.conversations_messages import first_prompt
from cpt_merge.data.conversations_rows import ChatRow, chat_rows
from cpt_merge.data.conversations_source import AnyRecord, ChatSource, Rendered
from cpt_merge.data.conversations_store import ChatNotes
from cpt_merge.data.conversations_template import ConversationError, ConversationTemplate
from cpt_merge.data.documents import Layout
from cpt_merge.data.preferences_messages import PAIR_FIELDS, PairRecord, read_pair
from cpt_merge.data.readers.rows import BadRow
from cpt_merge.data.records import ConversationText


class PairSource(ChatSource):
    """One source of preference pairs in one language."""

    @model_validator(mode="after")
    def _has_one_format(self) -> PairSource:
        if self.format != "auto":
            raise ValueError(f"source {self.path} has pairs and 'format'; leave it out")
        return self

    @property
    def layout(self) -> Layout:
        """The fields that are read."""
        return Layout(ConversationText(PAIR_FIELDS), skip_bad_rows=self.bad_rows == "skip")

    def render(
        self, record: AnyRecord, where: str, template: ConversationTemplate, length: int,
        notes: ChatNotes,
    ) -> Rendered | BadRow:  # fmt: skip
        """See `ChatSource.render`: one group, of two rows."""
        if isinstance(record, BadRow) or not isinstance(record, dict):
            return record if isinstance(record, BadRow) else BadRow("is not a record")
        pair = read_pair(record)
        if isinstance(pair, BadRow):
            return pair
        rows, borders = _rows(template, pair)
        notes.conversations += 1
        notes.note("borders", borders, where)
        fitted = fitting_pair(where, rows, length, notes)
        return Rendered(first_prompt(pair.chosen.messages), [fitted] if fitted else [])


def _rows(template: ConversationTemplate, pair: PairRecord) -> tuple[list[ChatRow], int]:
    """The two rows, and how many replies were tokenised apart from the prompt."""
    made = [chat_rows(template, side) for side in (pair.chosen, pair.rejected)]
    (chosen,), (rejected,) = (one.rows for one in made)
    first, other = chosen.trained.index(True), rejected.trained.index(True)
    if first != other or chosen.ids[:first] != rejected.ids[:first]:
        raise ConversationError(
            "has a 'chosen' and a 'rejected' for which the chat template writes different prompts, "
            "since one of them has a thought"
        )
    return [chosen, rejected], sum(one.borders for one in made)


def fitting_pair(
    where: str, rows: Sequence[ChatRow], length: int, notes: ChatNotes
) -> list[ChatRow]:
    """The rows of a pair, cut so that both are in a sequence of `length` tokens.

    The longer one is cut first. A pair of which no token of a row would count is left out.
    """
    sizes = [len(row.ids) for row in rows]
    most = [max(length // 2, length - other) for other in reversed(sizes)]
    kept = [
        ChatRow(row.ids[:size], row.trained[:size], row.replies)
        for row, size in zip(rows, most, strict=True)
    ]
    if not all(any(row.trained) for row in kept):
        notes.note("too_long", len(rows), where)
        return []
    cut = sum(size > longest for size, longest in zip(sizes, most, strict=True))
    notes.note("cut", cut, where)
    notes.rows += len(kept)
    notes.replies += len(kept)
    notes.tokens += sum(len(row.ids) for row in kept)
    return kept
