"""The stage that makes a store of conversations."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data import conversations_blocks, conversations_run
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
    assert not (tmp_path / "store").exists()


def many(folder: Path, number: int = 1500) -> list[dict[str, Any]]:
    """Sources of several blocks and files, with rows that are left out and rows that are cut."""
    import pyarrow
    import pyarrow.parquet

    long = record(0)
    long["messages"][1]["content"] = "x" * 2000
    rows = [record(place, 1 + place % 3) for place in range(number)]
    rows[3:90:10] = [{"text": "?"}] * 9
    rows[7:90:20] = [long] * 5
    (folder / "a").mkdir()
    write(folder / "a" / "1.jsonl", rows[: number - 200])
    write(folder / "a" / "2.jsonl", rows[number - 200 :])
    first = {"path": str(folder / "a"), "language": "ko", "bad_rows": "skip"}
    table = pyarrow.Table.from_pylist([record(2000 + place) for place in range(number // 2)])
    pyarrow.parquet.write_table(table, folder / "b.parquet")
    return [first, {"path": str(folder / "b.parquet"), "language": "zh_tw"}]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def told_about(sources: str) -> list[str]:
    return [
        line for line in sources.splitlines() if "conversations (" in line or ", the first" in line
    ]


def test_bytes_do_not_depend_on_the_division(
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversations_run, "BLOCK_RECORDS", 20)
    sources = many(tmp_path, 300)
    made(sources, tokenizer, tmp_path / "one", processes=1)
    told = told_about(capsys.readouterr().err)
    assert any("9 records left out" in line for line in told), told
    assert any("5 rows cut" in line for line in told), told

    def one_by_one(task: Any, processes: int, *more: Any) -> None:
        for process in reversed(range(processes)):
            task(process, more[0])

    monkeypatch.setattr(conversations_run, "start_server", lambda modules: None)
    monkeypatch.setattr(conversations_run, "run_in_processes", one_by_one)
    made(sources, tokenizer, tmp_path / "three", processes=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert told_about(capsys.readouterr().err) == told
    assert not (tmp_path / "one" / "blocks").exists()


@pytest.mark.slow
def test_several_processes_write_the_bytes_of_one(tokenizer: Path, tmp_path: Path) -> None:
    sources = many(tmp_path)
    made(sources, tokenizer, tmp_path / "one", processes=1)
    made(sources, tokenizer, tmp_path / "three", processes=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


@pytest.mark.slow
def test_what_a_killed_process_left_is_used(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = many(tmp_path)
    made(sources, tokenizer, tmp_path / "whole", processes=1)
    script = (
        "import os, sys, json; from pathlib import Path\n"
        "from cpt_merge.data import conversations_blocks, conversations_run\n"
        "from cpt_merge.data.conversations_config import ConversationsConfig\n"
        "from cpt_merge.tracking import Tracker\n"
        "write = conversations_blocks.Blocks.write\n"
        "def killed(self, piece, block, content):\n"
        "    write(self, piece, block, content)\n"
        "    if block == 1: os.kill(os.getpid(), 9)\n"
        "conversations_blocks.Blocks.write = killed\n"
        "keys, tokenizer, out = sys.argv[1:]\n"
        "config = ConversationsConfig(**json.loads(keys))\n"
        f"conversations_run.run(config, {LENGTH}, Path(tokenizer), Path(out), Tracker())\n"
    )
    keys = json.dumps({"sources": sources, "heldout": 0.2, "processes": 1})
    out = tmp_path / "killed"
    command = [sys.executable, "-c", script, keys, str(tokenizer), str(out)]
    assert subprocess.run(command, check=False).returncode == -9
    left = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed.tmp/blocks").iterdir()
    }
    assert sorted(left) == ["0000-000000.npz", "0000-000001.npz"]
    again = list[str]()
    write = conversations_blocks.Blocks.write
    monkeypatch.setattr(
        conversations_blocks.Blocks, "write",
        lambda self, piece, block, content: (again.append(f"{piece}-{block}"), write(self, piece, block, content)),
    )  # fmt: skip
    made(sources, tokenizer, out, processes=1)
    assert again == ["0-2", "1-0", "2-0", "2-1"]
    assert contents(out) == contents(tmp_path / "whole")
    again.clear()
    made(sources, tokenizer, out, processes=1)
    assert not again


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
