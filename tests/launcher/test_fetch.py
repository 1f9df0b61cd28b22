"""`cpt-merge fetch` from a hub on this machine, and everything after it without a network; all in processes of their own."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cpt_merge.launcher.recipe import Recipe
from tests.hub_server import HubServer, hub
from tests.launcher.conftest import sentences
from tests.processes import Process, Processes

MODELS = ["models.base=org/base", "models.chat=org/chat@v1"]
KEY = """
import sys
from pathlib import Path
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import TOKENIZER
for base in sys.argv[2:]:
    run = Run.load(Path(sys.argv[1]), [f"models.base={base}", "models.chat=org/chat"])
    print(prepare(run, TOKENIZER).key)
"""

CARD = b"""---
configs:
- config_name: ko
  data_files:
  - {split: train, path: ko/train-*.parquet}
  - {split: test, path: ko/test.parquet}
- config_name: more
  data_files: more/*.jsonl
---
"""
TEXT = """corpus.sources=[
    {path: org/text, subset: ko, language: ko, weight: 0.4},
    {path: org/text@v1, subset: more, language: zh_tw, limit: 150}]"""

Command = Callable[..., Process]


@pytest.fixture
def server(pair: Path) -> Iterator[HubServer]:
    """A hub with the pair, the chat model also as the tag v1."""
    with hub() as started:
        started.push_folder("model", "org/base", pair / "base")
        started.push_folder("model", "org/chat", pair / "chat", tags=["v1"])
        yield started


@pytest.fixture
def text(server: HubServer, tmp_path: Path) -> dict[str, list[str]]:
    """A dataset on the hub: Korean in three parquet files, Chinese in three files of JSON lines."""
    korean, chinese = sentences("ko", 300), sentences("zh_tw", 300)
    files = {"README.md": CARD}
    for number in range(3):
        part = slice(number * 100, number * 100 + 100)
        table = pyarrow.table({"id": range(100), "text": korean[part]})
        pyarrow.parquet.write_table(table, tmp_path / "part.parquet")
        files[f"ko/train-{number}.parquet"] = (tmp_path / "part.parquet").read_bytes()
        lines = [json.dumps({"text": one}) for one in chinese[part]]
        files[f"more/{number}.jsonl"] = "\n".join(lines).encode()
    files["ko/test.parquet"] = files["ko/train-0.parquet"]
    server.push("dataset", "org/text", files, tags=["v1"])
    return {"ko": korean, "zh_tw": chinese[:150]}


@pytest.fixture
def command(server: HubServer, processes: Processes, recipe_path: Path, tmp_path: Path) -> Command:
    """Runs `cpt-merge COMMAND RECIPE OVERRIDES` with the models of the hub and an empty cache."""

    def run(name: str, *overrides: str, wait: bool = True) -> Process:
        start = processes.run_python if wait else processes.python
        return start(
            "-m", "cpt_merge", name, recipe_path, *MODELS, f"runs={tmp_path / 'runs'}",
            "tracking.mode=disabled", *overrides, env=server.environment(tmp_path / "home"),
        )  # fmt: skip

    return run


def close(server: HubServer) -> None:
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_after_a_fetch_everything_works_without_a_network(
    server: HubServer, command: Command, tmp_path: Path
) -> None:
    (files,) = server.repositories["model", "org/base"].commits.values()
    files["onnx/model.onnx"] = b"the same weights once more"
    done = command("fetch", "evaluation.models={other: org/chat}")
    assert done.returncode == 0, done.stderr
    commits = [next(iter(one.commits)) for one in server.repositories.values()]
    assert f"model org/base: commit {commits[0]}, " in done.stdout
    assert f"model org/chat@v1: commit {commits[1]}, " in done.stdout
    assert "they need no network" in done.stderr
    assert "onnx/model.onnx" not in server.downloads()
    asked = len(server.downloads())
    assert "(0 downloaded)" in command("fetch").stdout
    assert len(server.downloads()) == asked
    close(server)
    for name in ("plan", "tokenizer", "fetch"):
        done = command(name)
        assert done.returncode == 0, done.stderr
        assert "hub cannot be reached" in done.stderr if name == "fetch" else f"commit {commits[0]}, from the hub's cache" in done.stderr  # fmt: skip
    record = json.loads((tmp_path / "runs" / "tiny" / "tokenizer" / "stage.json").read_text())
    assert record["inputs"]["base"] == f"hub:org/base@{commits[0]}"
    assert record["inputs"]["chat"] == f"hub:org/chat@{commits[1]}"
    log = tmp_path / "runs" / "tiny" / "tokenizer" / "log"
    lineage = "".join(path.read_text() for path in log.rglob("*.json*"))
    assert f"https://huggingface.co/org/chat/tree/{commits[1]}" in lineage


def test_a_killed_fetch_continues(
    server: HubServer, command: Command, pair: Path, tmp_path: Path
) -> None:
    server.holds["model.safetensors"] = 100
    killed = command("fetch", wait=False)
    finished = len(list((pair / "base").iterdir())) - 1
    cache = tmp_path / "home" / "hub" / "models--org--base"
    killed.wait_until(
        lambda: server.held.is_set() and len(list(cache.glob("snapshots/*/*"))) == finished,
        "everything but the weights",
    )
    killed.signal(signal.SIGKILL)
    killed.finish()
    (part,) = cache.rglob("*.incomplete")
    os.utime(part, (0, 0))
    before = server.downloads()
    server.holds.clear()
    server.release.set()
    done = command("fetch")
    assert done.returncode == 0, done.stderr
    again = server.downloads()[len(before) :]
    assert again.count("model.safetensors") == 2
    assert again.count("tokenizer.model") <= 1, "that of the chat model; the base's was complete"
    assert f"removing {part.name}, which a killed download left" in done.stderr
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_a_fetch_that_is_stopped_says_so(server: HubServer, command: Command) -> None:
    server.holds["model.safetensors"] = 100
    stopped = command("fetch", wait=False)
    stopped.wait_until(server.held.is_set, "the middle of the weights")
    stopped.signal(signal.SIGTERM)
    server.release.set()
    assert stopped.finish() == 75
    assert "stopped by SIGTERM; the same command continues" in stopped.stderr


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["plan", *(pytest.param(name, marks=SLOW) for name in ("run", "preflight"))]
)
def test_what_the_cache_lacks_is_reported_before_the_first_stage(
    server: HubServer, command: Command, name: str, tmp_path: Path
) -> None:
    fetched = command(
        "fetch", "models.chat=org/base", "merge.method=interpolate", "merge.ratio=0.5"
    )
    assert fetched.returncode == 0, fetched.stderr
    close(server)
    done = command(name, "evaluation.models={other: org/other}")
    assert done.returncode == 2
    assert (
        f"the hub cannot be reached (Connection refused), and its cache {tmp_path / 'home' / 'hub'} lacks "
        "models.chat (model org/chat@v1), evaluation.models.other (model org/other); run `cpt-merge fetch RECIPE`"
    ) in done.stderr
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_plan_finds_what_the_hub_lacks_and_downloads_no_weights(
    server: HubServer, command: Command, tmp_path: Path
) -> None:
    planned = command("plan")
    assert planned.returncode == 0, planned.stderr
    assert "M parameters" in planned.stdout
    assert not list((tmp_path / "home").rglob("model.safetensors"))
    missing = command("plan", "evaluation.models={other: org/other}")
    assert missing.returncode == 2
    assert "model org/other is neither here nor on the hub" in missing.stderr


def test_two_commits_of_a_model_are_two_keys(
    server: HubServer, processes: Processes, recipe: Recipe, recipe_path: Path, pair: Path, tmp_path: Path
) -> None:  # fmt: skip
    server.push_folder("model", "org/base", pair / "base", tags=["v2"])
    first = next(iter(server.repositories["model", "org/base"].commits))
    environment = server.environment(tmp_path / "home")
    names = ["org/base@v2", f"org/base@{first}", "org/base@v2"]
    done = processes.run_python("-c", KEY, recipe_path, *names, env=environment)
    assert done.returncode == 0, done.stderr
    newer, older, again = done.stdout.split()
    assert newer == again != older


@pytest.mark.slow
def test_text_of_the_hub_is_fetched_and_tokenised_without_a_network(
    server: HubServer, command: Command, text: dict[str, list[str]], tmp_path: Path
) -> None:
    done = command("fetch", TEXT)
    assert done.returncode == 0, done.stderr
    commit = next(iter(server.repositories["dataset", "org/text"].commits))
    assert f"dataset org/text: commit {commit}, 3 files, 0.02 MB (3 downloaded)" in done.stdout
    read = f"dataset org/text@v1: commit {commit}, 2 files of 3, as far as it is read, 0.06 MB (2 downloaded)"
    assert read in done.stdout
    data = [name for name in server.downloads() if name.startswith(("ko/", "more/"))]
    assert sorted(data) == [*(f"ko/train-{n}.parquet" for n in range(3)), "more/0.jsonl", "more/1.jsonl"]  # fmt: skip
    close(server)
    planned = command("plan", TEXT)
    assert planned.returncode == 0, planned.stderr
    assert "in 3 files on the hub, 2 of them in its cache" in " ".join(planned.stdout.split())
    for name in ("tokenizer", "data"):
        done = command(name, TEXT)
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / "tiny" / "data" / "stage.json").read_text())
    assert record["inputs"]["text org/text"] == f"hub:org/text@{commit}"
    assert record["inputs"]["text org/text@v1"] == f"hub:org/text@{commit}"
    documents = record["results"]["documents"] + record["results"]["heldout_documents"]
    assert documents == sum(map(len, text.values()))


@pytest.mark.slow
def test_a_half_fetched_dataset_is_not_taken_for_a_smaller_one(
    server: HubServer, command: Command, text: dict[str, list[str]], tmp_path: Path
) -> None:
    assert command("fetch", TEXT).returncode == 0
    for name in ("ko/train-1.parquet", "more/1.jsonl"):
        (path,) = (tmp_path / "home").rglob(f"snapshots/*/{name}")
        path.unlink()
    close(server)
    for name in ("plan", "run"):
        done = command(name, TEXT)
        assert done.returncode == 2
        assert "lacks corpus.sources.0 (dataset org/text); run `cpt-merge fetch" in done.stderr
    done = command("tokenizer", "tokenizer.new_pieces={zh_tw: 40}", TEXT)
    assert done.returncode == 2
    assert "and the hub cannot be reached (Connection refused)" in done.stderr


@pytest.mark.slow
def test_the_text_of_the_hub_is_checked_before_the_first_stage(
    server: HubServer, command: Command, text: dict[str, list[str]]
) -> None:
    sources = "corpus.sources=[{path: org/text, subset: ko, field: texts, language: ko}, {path: org/text, subset: more, language: zh_tw}]"
    done = command("run", sources)
    assert done.returncode == 2
    assert "row 1 has no field 'texts' but " in done.stderr
    data = [name for name in server.downloads() if name.startswith(("ko/", "more/"))]
    assert data == ["ko/train-0.parquet"], "one file is enough"
    done = command("plan", sources.replace("subset: more", "subset: less"))
    assert done.returncode == 2
    assert "dataset org/text has no configuration 'less' but ko, more; set" in done.stderr


@pytest.mark.slow
def test_after_a_fetch_no_stage_asks_the_hub(
    server: HubServer, command: Command, text: dict[str, list[str]], tmp_path: Path
) -> None:
    """A firewall may swallow what is sent, so a request that nobody needs takes long."""
    settings = ["launch.processes=1", "evaluation.max_prompts=1", TEXT.replace(", limit: 150", "")]
    assert command("fetch", *settings).returncode == 0
    asked, server.silent = server.asked, True
    for name in ("plan", "run", "preflight"):
        done = command(name, *settings)
        assert done.returncode == 0, done.stderr
    assert server.asked == asked
    report = json.loads((tmp_path / "runs/tiny/merge/chat/merge_report.json").read_text())
    assert report["inputs"]["chat"]["name"] == "org/chat"
