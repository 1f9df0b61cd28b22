"""The stage that makes a store of conversations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_config import ConversationsConfig
from cpt_merge.data.conversations_run import run
from cpt_merge.data.packing import IGNORED, PackedDocuments, TrainingSequences
from cpt_merge.data.store import MaskedCounts, Store
from cpt_merge.tracking import Tracker
from tests.data.chat_templates import CHATML, QWEN_3, of

LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tokenizer"), CHATML)


def save(directory: Path, template: str) -> Path:
    made = of(template, "<|im_end|>")
    made.tokenizer.save_pretrained(directory)
    settings = {"eos_token_id": sorted(made.end_ids)}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


def record(number: int, turns: int = 1) -> dict[str, Any]:
    said = [
        {"role": role, "content": f"{text} {number}.{turn}"}
        for turn in range(turns)
        for role, text in (("user", "Who is"), ("assistant", "It is"))
    ]
    return {"messages": said}


def write(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return {"path": str(path), "language": "ko"}


def made(sources: list[dict[str, Any]], tokenizer: Path, out: Path, **keys: Any) -> Store:
    config = ConversationsConfig(**{"sources": sources, "heldout": 0.2} | keys)
    run(config, LENGTH, tokenizer, out, Tracker())
    return Store.open(out)


def replies(store: Store, split: Any, source: int = 0) -> list[str]:
    """What the loss counts, sequence by sequence."""
    packed = PackedDocuments(store.documents(store.info.sources[source], split), LENGTH)
    found = []
    template = of(CHATML, "<|im_end|>")
    for number in range(packed.sequences):
        labels = packed.read(number)[1]
        text = template.tokenizer.decode(labels[labels != IGNORED])
        found += [one.strip() for one in text.split("<|im_end|>")[:-1]]
    return found


def test_every_reply_is_in_one_split(tokenizer: Path, tmp_path: Path) -> None:
    turns = [1 + number % 3 for number in range(200)]
    source = write(tmp_path / "a.jsonl", [record(*one) for one in enumerate(turns)])
    store = made([source], tokenizer, tmp_path / "store")
    train, held = replies(store, "train"), replies(store, "heldout")
    assert sorted(train + held) == sorted(
        f"It is {number}.{turn}" for number, of in enumerate(turns) for turn in range(of)
    )
    numbers = [{one.split()[-1].split(".")[0] for one in split} for split in (train, held)]
    assert not numbers[0] & numbers[1]
    assert 20 < len(numbers[1]) < 60
    counts = store.info.sources[0].train
    assert isinstance(counts, MaskedCounts)
    assert counts.length == LENGTH
    store.check_tokenizer(tokenizer)
    assert TrainingSequences(store, LENGTH, seed=1).targets(range(2)) > 0


def test_rows_of_a_conversation_stay_in_its_split(tmp_path: Path) -> None:
    """This template gives a row per reply; a continued conversation begins like its beginning."""
    tokenizer = save(tmp_path / "tokenizer", QWEN_3)
    whole = [record(number, 2) for number in range(60)]
    source = write(tmp_path / "a.jsonl", [*whole, *map(record, range(60))])
    store = made([source], tokenizer, tmp_path / "store")
    held, train = (
        {one[6:].split(".")[0] for one in replies(store, split)} for split in ("heldout", "train")
    )
    assert held
    assert not held & train
    assert len(held | train) == 60


def test_what_was_made_is_said(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "?"}, *map(record, range(100))])
    store = made([source | {"bad_rows": "skip"}], tokenizer, tmp_path / "store")
    told = capsys.readouterr().err
    assert "ko:a: 100 conversations (" in told
    assert "100 rows with 100 replies" in told
    assert "1 record left out (`bad_rows: skip`), the first at" in told
    assert store.info.sources[0].left_out == {"bad_rows": 1, "too_long": 0}


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([{"messages": []}], "yields no conversation to train on (left out: 1 bad rows)"),
        ([record(0)], "no conversation is held out of 1 source with heldout = 0.2; raise"),
    ],
)
def test_too_little_is_one_sentence(
    records: list[dict[str, Any]], reason: str, tokenizer: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", records) | {"bad_rows": "skip"}
    with pytest.raises(UserError) as caught:
        made([source], tokenizer, tmp_path / "store")
    assert reason in str(caught.value)
    assert not list(tmp_path.glob("store*"))


def test_how_much_is_read_is_not_in_the_store() -> None:
    keys = {"path": "a.jsonl", "language": "ko"}
    config = ConversationsConfig(sources=[keys])
    for same in ({"sources": [keys | {"epochs": 3}]}, {"sources": [keys], "processes": 2}):
        assert ConversationsConfig(**same).identity() == config.identity()  # type: ignore[arg-type]
    for other in (
        {"heldout": 0.1}, {"thinking": "remove"}, {"chat_template_kwargs": {"a": 1}},
        {"sources": [keys | {"limit": 3}]}, {"sources": [keys | {"format": "alpaca"}]},
    ):  # fmt: skip
        assert ConversationsConfig(**{"sources": [keys]} | other).identity() != config.identity()


def test_no_document_is_longer_than_a_sequence(tokenizer: Path, tmp_path: Path) -> None:
    long = record(0)
    long["messages"][1]["content"] = "x" * 2000
    source = write(tmp_path / "a.jsonl", [*([long] * 3), *map(record, range(50))])
    store = made([source], tokenizer, tmp_path / "store")
    documents = store.documents(store.info.sources[0], "train")
    assert np.diff(documents.starts).max() <= LENGTH
