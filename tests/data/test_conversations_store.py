"""Conversations in the store: none is divided, and the labels are what the loss counts."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_messages import ChatRecord
from cpt_merge.data.conversations_rows import ChatRow, ChatRows, chat_rows
from cpt_merge.data.conversations_source import ChatSource, Rendered, read_records, rendered
from cpt_merge.data.conversations_store import ChatNotes, Group, fitting, packed, write_groups
from cpt_merge.data.packing import IGNORED, PackedDocuments, TrainingSequences
from cpt_merge.data.sources import source_pieces
from cpt_merge.data.store import (
    STORE_FILE,
    Documents,
    MaskedCounts,
    SourceInfo,
    SplitCounts,
    Store,
    StoreInfo,
    TokenizerInfo,
)
from tests.data.chat_templates import CHATML, of

LENGTH, FILLER = 16, 1


def random_rows(number: int, longest: int = LENGTH) -> list[ChatRow]:
    generator = np.random.default_rng(0)
    rows = []
    for size in generator.integers(2, longest + 1, number).tolist():
        trained = [False, *(generator.random(size - 1) < 0.5).tolist()]
        trained[-1] = True
        rows.append(ChatRow(generator.integers(2, 999, size).tolist(), trained, 1))
    return rows


def groups(rows: list[ChatRow]) -> list[Group]:
    return [Group.of([row], np.uint16) for row in rows]


def test_rows_stay_whole_and_sequences_are_full() -> None:
    rows = random_rows(10_000)
    sequences = list(packed(groups(rows), LENGTH))
    assert all(sum(map(len, one)) <= LENGTH for one in sequences)
    found = sorted(tuple(row.ids.tolist()) for one in sequences for row in one)
    assert found == sorted(tuple(row.ids) for row in rows)
    assert len(sequences) * LENGTH < 1.02 * sum(len(row.ids) for row in rows)


def test_what_training_reads_are_the_rows(tmp_path: Path) -> None:
    rows = random_rows(500)
    counts = write_groups(groups(rows), tmp_path, "uint16", LENGTH, FILLER)
    documents = PackedDocuments(Documents(tmp_path, "uint16", counts), LENGTH)
    seen = []
    for number in range(documents.sequences):
        ids, labels, positions = documents.read(number)
        assert documents.targets(number) == (labels != IGNORED).sum()
        starts = [*np.flatnonzero(positions == 0).tolist(), LENGTH]
        for first, last in itertools.pairwise(starts):
            if set(ids[first:last].tolist()) == {FILLER}:
                assert (labels[first:last] == IGNORED).all()
                continue
            trained = [False, *(labels[first : last - 1] != IGNORED).tolist()]
            assert labels[last - 1] == IGNORED
            at = labels[first : last - 1] != IGNORED
            assert (labels[first : last - 1][at] == ids[first + 1 : last][at]).all()
            seen.append((tuple(ids[first:last].tolist()), tuple(trained)))
    assert sorted(seen) == sorted((tuple(row.ids), tuple(row.trained)) for row in rows)
    assert counts.trained == sum(sum(row.trained) for row in rows)
    assert documents.targets(np.arange(documents.sequences)) == counts.trained


def test_another_length_and_a_damaged_mask_are_refused(tmp_path: Path) -> None:
    counts = write_groups(groups(random_rows(20)), tmp_path, "uint16", LENGTH, FILLER)
    with pytest.raises(UserError, match="fill sequences of 16 tokens and not of 8"):
        PackedDocuments(Documents(tmp_path, "uint16", counts), 8)
    (tmp_path / "trained.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"trained.bin has 0 bytes, not"):
        Documents(tmp_path, "uint16", counts)


def test_a_store_of_conversations_opens_like_any_other(tmp_path: Path) -> None:
    counts = write_groups(
        groups(random_rows(200)), tmp_path / "00-chat" / "train", "uint16", LENGTH, FILLER
    )
    none = SplitCounts(0, 0, 0, -1)
    source = SourceInfo("en:chat", "en", "00-chat", {}, counts, none, None)
    info = StoreInfo("digest", TokenizerInfo("", 1000, "uint16"), None, [source])
    (tmp_path / STORE_FILE).write_text(json.dumps(asdict(info)))
    opened = Store.open(tmp_path)
    assert opened.info == info
    assert isinstance(opened.info.sources[0].train, MaskedCounts)
    sequences = TrainingSequences(opened, LENGTH, seed=1)
    batch = sequences.batch([0, 1, 2])
    assert int((batch.labels != IGNORED).sum()) == sequences.targets(range(3))


def test_long_rows_are_cut_and_counted() -> None:
    notes = ChatNotes()
    chat = ChatRows(
        [
            ChatRow(list(range(20)), [False] * 4 + [True] * 16, 1),
            ChatRow(list(range(20)), [False] * 16 + [True] * 4, 1),
            ChatRow(list(range(8)), [False] * 4 + [True] * 4, 1),
        ],
        dropped=1,
        borders=0,
    )
    kept = fitting("chat.jsonl: line 7", chat, LENGTH, notes)
    assert [len(row.ids) for row in kept] == [16, 8]
    assert notes.describe() == [
        "1 row cut at the end of the sequence, the first at chat.jsonl: line 7",
        "1 row left out: no reply begins within a sequence, the first at chat.jsonl: line 7",
        "1 message left out: no reply follows, the first at chat.jsonl: line 7",
    ]


def read(source: ChatSource, notes: ChatNotes | None = None, **of_template: str) -> list[Rendered]:
    template = of(**{"text": CHATML, "end": "<|im_end|>"} | of_template)
    pieces = [read_records(piece) for piece in source_pieces(source)]
    found = (
        rendered(source, record, where, template, 4096, notes or ChatNotes())
        for piece in pieces
        for where, record in piece
    )
    return [one for one in found if one]


ASKED = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_sources_are_read_as_those_of_text(tmp_path: Path) -> None:
    template = of(CHATML, "<|im_end|>")
    alpaca = {"instruction": "Who?", "output": "Me."}
    path = write(tmp_path / "chat.jsonl", {"messages": ASKED}, alpaca, {"messages": ASKED})
    source = ChatSource(path=str(path), language="en", limit=2)
    expected = chat_rows(template, ChatRecord(ASKED)).rows
    assert read(source) == [Rendered("Who?", [expected])] * 2
    with pytest.raises(ValueError, match="has conversations and 'field'; leave it out"):
        ChatSource(path=str(path), language="en", field="body")


def test_parquet_adds_nothing(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    records = [
        {"messages": ASKED},
        {"messages": [ASKED[0], {"role": "assistant", "tool_calls": [call]}]},
    ]
    path = tmp_path / "chat.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    called = "{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}<|im_end|>"
    text = CHATML.replace("<|im_end|>", called, 1)
    first, second = read(ChatSource(path=str(path), language="en"), text=text)
    template = of(text, "<|im_end|>")
    assert first.groups == [chat_rows(template, ChatRecord(ASKED)).rows]
    assert second.groups[0][0].replies == 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "Once."}, "is no conversation"),
        ({"messages": ASKED[:1]}, "has no message of an assistant to train on"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": ""}]}, "has an empty message 2"),
        (3, "is not a JSON object"),
    ],
)
def test_bad_rows_have_a_place_or_are_counted(tmp_path: Path, record: object, reason: str) -> None:
    path = write(tmp_path / "chat.jsonl", {"messages": ASKED}, record, {"messages": ASKED})
    with pytest.raises(UserError) as caught:
        read(ChatSource(path=str(path), language="en"))
    assert f"{path}: line 2 {reason}" in str(caught.value)
    assert str(caught.value).endswith("fix it, or set the source's `bad_rows: skip`.")
    notes = ChatNotes()
    skipping = ChatSource(path=str(path), language="en", bad_rows="skip")
    assert len(read(skipping, notes)) == 2
    assert notes.bad_rows == 1
    assert f"line 2, which {reason}" in notes.describe()[0]
