"""Which files a configuration and split of a hub's dataset have: those that `datasets` itself finds there."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer, hub
from tests.processes import Process, Processes

OURS = """
import json, sys
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub_repository import Repository
from cpt_merge.data.hub_datasets import hub_dataset_files
for name, subset, split, revision in json.loads(sys.argv[1]):
    try:
        files = hub_dataset_files(Repository("dataset", name, revision), subset, split)
        print(json.dumps([file.name for file in files]), *{file.revision for file in files})
    except UserError as error:
        print(error)
print("datasets" in sys.modules, file=sys.stderr)
"""
THEIRS = """
import json, sys
import datasets
for name, subset, split, revision in json.loads(sys.argv[1]):
    builder = datasets.load_dataset_builder(name, subset, revision=revision)
    files = builder.config.data_files[split]
    commit = builder.base_path.partition("@")[2]
    print(json.dumps([file.partition(f"@{commit}/")[2] for file in files]), commit)
"""
DOWNLOAD = """
import json, sys
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub_repository import Repository
from cpt_merge.data.hub_datasets import hub_dataset_files
name, subset, split, revision = json.loads(sys.argv[1])[0]
for file in hub_dataset_files(Repository("dataset", name, revision), subset, split):
    try:
        print(file.path is not None, file.download().read_bytes().decode())
    except UserError as error:
        print(error)
"""
CONFIGURATIONS = b"""---
configs:
- config_name: news
  data_files:
  - {split: train, path: [news/b.jsonl, "news/a*.jsonl"]}
  - {split: validation, path: news/held.jsonl}
- config_name: web
  data_files: "web/**"
- config_name: 'no'
  data_dir: web/no
---
text
"""
LAYOUTS = {
    "org/yaml": ["news/a1.jsonl", "news/a2.jsonl", "news/b.jsonl", "news/held.jsonl", "web/ko/1.parquet", "web/no/train.parquet",
                 "web/.hidden/3.parquet", "notes.txt"],
    "org/sharded": [f"data/{split}-0000{n}-of-00003.parquet" for split in ("train", "test") for n in (2, 0, 1)],
    "org/folders": ["train/x.csv", "validation/x.csv", "dev/z.csv", "README.txt"],
    "org/names": ["my-train-1.jsonl.gz", "my-test-1.jsonl.gz", "sub/other_train.jsonl.gz"],
    "org/plain": ["b.txt", "a.txt", "deep/er/c.txt", "__pycache__/d.txt", "zh/繁 體.txt"],
}  # fmt: skip
ASKED = [
    ("org/yaml", "news", "train", None), ("org/yaml", "news", "validation", None), ("org/yaml", "web", "train", None),
    ("org/yaml", "no", "train", None), ("org/sharded", None, "train", None), ("org/sharded", None, "test", "main"),
    ("org/folders", None, "train", None), ("org/folders", None, "validation", None), ("org/names", None, "train", None),
    ("org/names", None, "test", None), ("org/plain", None, "train", None), ("org/plain", None, "train", "v1"),
]  # fmt: skip

Ask = Callable[..., Process]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub() as started:
        started.push("dataset", "org/plain", {"only.txt": b"old"}, tags=["v1"])
        for name, files in LAYOUTS.items():
            about = {"README.md": CONFIGURATIONS} if name == "org/yaml" else {}
            started.push("dataset", name, {**dict.fromkeys(files, b"{}"), **about})
        yield started


@pytest.fixture
def ask(server: HubServer, processes: Processes, tmp_path: Path) -> Ask:
    def run(code: str, *asked: tuple[str | None, ...], home: str = "home") -> Process:
        environment = server.environment(tmp_path / home)
        return processes.run_python("-c", code, json.dumps(asked), env=environment)

    return run


def test_the_files_are_those_that_datasets_finds(ask: Ask) -> None:
    theirs, ours = ask(THEIRS, *ASKED, home="theirs"), ask(OURS, *ASKED)
    assert theirs.returncode == 0, theirs.stderr
    assert len(ours.stdout.splitlines()) == len(ASKED), ours.stderr
    assert ours.stdout == theirs.stdout


def test_the_list_needs_no_network_and_a_file_that_is_missing_is_an_error(
    server: HubServer, ask: Ask, tmp_path: Path
) -> None:
    before = ask(OURS, ("org/yaml", "news", "train", None))
    assert before.stderr.splitlines()[-1] == "True"
    assert "news/b.jsonl" not in server.downloads()
    (tmp_path / "home" / "datasets").mkdir(exist_ok=True)
    first = ask(DOWNLOAD, ("org/yaml", "news", "train", None))
    assert first.stdout == "False {}\n" * 3
    (cached,) = (tmp_path / "home").rglob("news/a1.jsonl")
    cached.unlink()
    server.shutdown()
    server.server_close()
    known = ask(OURS, ("org/yaml", "news", "train", None))
    assert known.stdout == before.stdout
    assert known.stderr.splitlines()[-1] == "False", "the splits of a commit are found once"
    again = ask(DOWNLOAD, ("org/yaml", "news", "train", None)).stdout.splitlines()
    assert again[0] == again[2] == "True {}"
    assert "the hub cannot be reached (Connection refused)" in again[1]


def test_a_folder_may_stand_for_a_configuration(ask: Ask) -> None:
    done = ask(OURS, ("org/plain", "deep/er", "train", None))
    assert done.stdout.startswith('["deep/er/c.txt"]'), done.stderr


def test_what_is_no_dataset_is_one_sentence(server: HubServer, ask: Ask) -> None:
    server.push("dataset", "org/script", {"script.py": b"", "data.jsonl": b""})
    server.push("dataset", "org/empty", {"README.md": b"# Nothing"})
    server.push("dataset", "org/broken", {"README.md": b"---\nconfigs: [{]\n---", "a.txt": b""})
    server.push("dataset", "org/pictures", {"train/cat.png": b"", "train/dog.png": b""})
    server.push("dataset", "org/outside", {"../a.jsonl": b""})
    for name, path in (("absolute", "/etc/host*"), ("above", "../../*/*.txt")):
        card = f"---\nconfigs:\n- config_name: x\n  data_files: {path!r}\n---\n".encode()
        server.push("dataset", f"org/{name}", {"README.md": card, "a.txt": b""})
    server.push("dataset", "org/gated", {"a.txt": b"", "README.md": b""})
    server.gated["org/gated"] = 401
    expected = {
        ("org/script", None, "train", None): "dataset org/script is a Python script (script.py), which is not executed",
        ("org/empty", None, "train", None): "dataset org/empty contains no data files that `datasets` finds",
        ("org/broken", None, "train", None): "dataset org/broken contains no data files that `datasets` finds (",
        ("org/pictures", None, "train", None): "dataset org/pictures is no text that is read here: train/cat.png is none of .jsonl, ",
        ("org/outside", None, "train", None): "dataset org/outside@",
        ("org/absolute", None, "train", None): "dataset org/absolute ",
        ("org/above", None, "train", None): "dataset org/above ",
        ("org/plain", "../org", "train", None): "dataset org/plain has no configuration '../org' but default",
        ("org/gated", None, "train", None): f"dataset org/gated is gated; accept its terms at {server.address}/datasets/org/gated, then",
        ("org/none", None, "train", None): "dataset org/none is neither here nor on the hub",
        ("org/yaml", None, "train", None): "dataset org/yaml has the configurations news, web, no; set",
        ("org/yaml", "old", "train", None): "dataset org/yaml has no configuration 'old' but news, web, no; set",
        ("org/yaml", "news", "test", None): "dataset org/yaml has no split 'test' but train, validation; set",
        ("org/yaml", "news", "train", "v9"): "dataset org/yaml@v9 does not exist: the dataset has no such branch",
    }  # fmt: skip
    done = ask(OURS, *expected)
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stdout + done.stderr
    for line, sentence in zip(lines, expected.values(), strict=True):
        assert line.startswith(sentence)
        assert line.endswith(".")
