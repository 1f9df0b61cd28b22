"""A name is a directory here or a hub id. The real client downloads from a hub on this machine; what the cache has is used
without a request, and what prevents a download is one sentence.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_local, model_directory, needed_files
from cpt_merge.core.hub_repository import identity
from tests.hub_server import HubServer, Request, hub
from tests.processes import Process, Processes

CHUNK = 10 * 2**20  # what the client keeps of a broken download is a multiple of it
FIND = """
import sys
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
try:
    print(model_directory(sys.argv[1]))
except UserError as error:
    sys.exit(str(error))
"""
SMALL = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": b"weights"}
LARGE = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4 * 1024 * 12}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": b"{ }",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
}


@pytest.fixture(autouse=True)
def _a_folder_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A hub with two commits of one model."""
    with hub() as started:
        started.push("model", "org/base", SMALL, tags=["v1"])
        started.push("model", "org/base", {**SMALL, "tokenizer.json": b"{}"})
        yield started


Find = Callable[..., Process]


@pytest.fixture
def find(server: HubServer, processes: Processes, tmp_path: Path) -> Find:
    """Finds a model in a process of its own, whose cache is in `tmp_path`."""

    def found(name: str, wait: bool = True, **variables: str) -> Process:
        environment = {**server.environment(tmp_path / "home"), **variables}
        start = processes.run_python if wait else processes.python
        return start("-c", FIND, name, env=environment)

    return found


@pytest.mark.parametrize(
    "name",
    ["models/bose", "./models/bose", "../bose", "models/bose/", "a/b/c", "/nowhere", "~/nowhere", "bose", "models/bose@v1"],
)  # fmt: skip
def test_a_misspelt_directory_does_not_exist_here(name: str) -> None:
    with pytest.raises(UserError, match=f"model {name} does not exist here"):
        model_directory(name)


def test_a_directory_here_comes_before_a_hub_id_of_the_same_name(tmp_path: Path) -> None:
    assert model_directory("models/base") == Path("models/base")
    (tmp_path / "odd").mkdir()
    (tmp_path / "models" / "base").rename(tmp_path / "odd" / "base@v1")
    assert model_directory("odd/base@v1") == Path("odd/base@v1")


def test_a_name_whose_first_part_is_no_folder_here_is_a_hub_id() -> None:
    assert not is_local("org/model")
    assert not is_local("org/model@refs/pr/1")


def test_only_one_copy_of_the_weights_is_needed() -> None:
    tokenizer = ["config.json", "tokenizer.json", "spiece.model", "chat_template.jinja"]
    others = ["consolidated.safetensors", "original/params.json", "onnx/model.onnx", "optimizer.pt"]
    pickled = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert set(needed_files([*tokenizer, *others, *pickled[:1], "model.safetensors"])) == {
        *tokenizer, "model.safetensors"
    }  # fmt: skip
    assert set(needed_files([*tokenizer, *others, *pickled])) == {*tokenizer, *pickled}


def test_a_model_is_downloaded_once_and_then_found_without_a_request(
    server: HubServer, find: Find, tmp_path: Path
) -> None:
    server.push("model", "org/sharded", SHARDED)
    for name, files in (("org/base", SMALL), ("org/sharded", SHARDED)):
        first = Path(find(name).stdout.strip())
        assert {path.name for path in first.iterdir()} == set(files)
        asked = server.asked
        again = find(name)
        assert Path(again.stdout.strip()) == first
        assert f"commit {first.name}, from the hub's cache" in again.stderr
        assert server.asked == asked, "the cache comes first"
    server.shutdown()
    server.server_close()
    assert Path(find("org/sharded").stdout.strip()) == first


def test_a_revision_is_a_commit_of_its_own(server: HubServer, find: Find) -> None:
    newest, tagged = (Path(find(name).stdout.strip()) for name in ("org/base", "org/base@v1"))
    assert (newest / "tokenizer.json").read_bytes() == b"{}"
    assert (tagged / "tokenizer.json").read_bytes() == b"{ }"
    commits = list(server.repositories["model", "org/base"].commits)
    assert [identity(path) for path in (tagged, newest)] == [f"org/base@{one}" for one in commits]
    assert identity(Path("models/base").absolute()) is None
    by_commit = find(f"org/base@{commits[0]}")
    assert Path(by_commit.stdout.strip()) == tagged


def test_a_renamed_model_is_found_with_a_line(server: HubServer, find: Find) -> None:
    server.renamed["old/base"] = "org/base"
    done = find("old/base")
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == b"weights"
    assert "model old/base is called org/base on the hub now" in done.stderr


def test_a_download_continues_where_the_connection_was_cut(server: HubServer, find: Find) -> None:
    server.push("model", "org/large", LARGE)
    server.cuts["model.safetensors"] = [CHUNK + 1]
    done = find("org/large")
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == LARGE["model.safetensors"]  # fmt: skip
    weights = [one for one in server.requests if one.file == "model.safetensors"]
    assert weights[-2:] == [Request("GET", "model.safetensors", start) for start in (0, CHUNK)]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_what_a_killed_download_finished_is_not_downloaded_again(
    server: HubServer, find: Find, number: int
) -> None:
    server.push("model", "org/large", LARGE)
    server.holds["model.safetensors"] = CHUNK
    killed = find("org/large", wait=False)
    killed.wait_until(server.held.is_set, "the middle of the weights")
    killed.signal(number)
    killed.finish()
    server.holds.clear()
    server.release.set()
    done = find("org/large")
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == LARGE["model.safetensors"]  # fmt: skip
    assert server.downloads().count("config.json") == 1


def test_a_file_that_was_cut_short_in_the_cache_is_downloaded_again(
    server: HubServer, find: Find
) -> None:
    weights = Path(find("org/base").stdout.strip()) / "model.safetensors"
    weights.resolve().write_bytes(b"weig")
    assert find("org/base").returncode == 0
    assert weights.read_bytes() == b"weights"


def test_a_cache_of_an_older_client_is_used_with_a_line(
    server: HubServer, find: Find, tmp_path: Path
) -> None:
    first = find("org/base").stdout
    (listing,) = (tmp_path / "home").rglob("trees/*.json")
    listing.unlink()
    server.shutdown()
    server.server_close()
    done = find("org/base")
    assert done.stdout == first
    assert "which may be incomplete (an older client left no list of its files)" in done.stderr


def test_a_half_downloaded_model_is_not_taken_for_a_smaller_one(
    server: HubServer, find: Find
) -> None:
    server.push("model", "org/sharded", SHARDED)
    found = Path(find("org/sharded").stdout.strip())
    (found / "model-00002-of-00002.safetensors").unlink()
    server.shutdown()
    server.server_close()
    done = find("org/sharded")
    assert done.returncode == 1
    assert "org/sharded is not here, nor in full in the hub's cache" in done.stderr
    assert "cannot be reached (Connection refused)" in done.stderr


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("org/none", "model org/none is neither here nor on the hub; correct the name"),
        ("my models/base", "model my models/base is neither here nor on the hub"),
        ("org/base@v9", "model org/base@v9 does not exist: the model has no such branch, tag"),
        ("org/gated", "model org/gated is gated; accept its terms at http"),
        ("org/empty", "model org/empty contains no files of a model (it has data.bin)"),
        ("org/huge", r"no room for model org/huge, which takes 3,000,000.00 GB; free disk space"),
    ],
)
def test_what_prevents_a_download_is_one_sentence(
    server: HubServer, find: Find, name: str, sentence: str
) -> None:
    server.push("model", "org/gated", SMALL)
    server.push("model", "org/empty", {"data.bin": b""})
    server.push("model", "org/huge", SMALL)
    server.sizes["org/huge"] = 10**15
    server.gated["org/gated"] = 401
    done = find(name)
    assert (done.returncode, done.stdout) == (1, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert ("run `hf auth login`" in done.stderr) == (name in ("org/none", "my models/base", "org/gated"))  # fmt: skip


def test_a_gated_model_that_the_account_may_not_read(server: HubServer, find: Find) -> None:
    server.gated["org/base"] = 403
    done = find("org/base")
    assert f"is gated; accept its terms at {server.address}/org/base.\n" in done.stderr


def test_a_hub_that_fails_or_is_none(server: HubServer, find: Find) -> None:
    server.status = 500
    assert "refuses to send model org/base (HTTP 500); try again later" in find("org/base").stderr
    server.status = 403
    assert "(HTTP 403); run `hf auth login` with a token that may" in find("org/base").stderr
    server.status = 200
    assert f"what answers at {server.address} when asked for" in find("org/base").stderr
    server.status, server.silent = None, True
    assert "cannot be reached (it does not answer in time)" in find("org/base").stderr
    offline = find("org/base", HF_HUB_OFFLINE="1").stderr
    assert "cannot be reached (HF_HUB_OFFLINE is set)" in offline
