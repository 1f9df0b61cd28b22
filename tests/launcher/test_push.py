"""`cpt-merge push` to a hub on this machine, through the real client."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.push import push
from tests.hub_server import HubServer, hub
from tests.processes import Processes

CARD = "---\nlibrary_name: transformers\n---\n\n# A model\n"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub() as running:
        yield running


@pytest.fixture
def model(pair: Path, tmp_path: Path) -> Path:
    """A model with a card."""
    folder = tmp_path / "model"
    shutil.copytree(pair / "chat", folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def call(server: HubServer, processes: Processes, tmp_path: Path) -> Callable[..., Any]:
    def run(*words: str | Path, token: str = "hf_x") -> Any:
        environment = {**server.environment(tmp_path / "home"), "HF_TOKEN": token}
        return processes.run_python("-m", "cpt_merge", *words, env=environment)

    return run


def test_a_private_repository_with_all_files_in_one_commit(
    server: HubServer, model: Path, call: Callable[..., Any]
) -> None:
    done = call("push", model, "org/mine", "--license", "llama2")
    assert done.returncode == 0, done.stderr
    repository = server.repositories["model", "org/mine"]
    assert len(repository.commits) == 2, "the empty one, and the model's"
    files = repository.commits[repository.refs["main"]]
    assert files.keys() - {".gitattributes"} == {path.name for path in model.iterdir()}
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert "license: llama2\n---\n\n# A model" in files["README.md"].decode()
    assert "license" not in (model / "README.md").read_text(), "the card here stays as it is"
    assert server.private["org/mine"]
    assert "(private; make it public in its settings)" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_an_upload_that_broke_off_is_continued(
    server: HubServer, model: Path, call: Callable[..., Any]
) -> None:
    server.cuts["PUT"] = [100] * 50
    asked = ("push", model, "org/mine", "--license", "llama2")
    done = call(*asked)
    assert done.returncode == 2, done.stderr
    assert "the upload to org/mine broke off" in done.stderr
    assert len(server.repositories["model", "org/mine"].commits) == 1, "nobody sees a part"
    server.cuts.clear()
    done = call(*asked)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_is_there_is_replaced_only_if_asked(
    server: HubServer, model: Path, call: Callable[..., Any]
) -> None:
    server.push("model", "org/mine", {"config.json": b"{}", "old.safetensors": b"x"})
    asked = ("push", model, "org/mine", "--license", "llama2")
    done = call(*asked)
    assert done.returncode == 2, done.stderr
    assert "org/mine holds 2 files already; push to another name, or give --replace" in done.stderr
    done = call(*asked, "--replace")
    assert done.returncode == 0, done.stderr
    repository = server.repositories["model", "org/mine"]
    assert "old.safetensors" not in repository.commits[repository.refs["main"]]


@pytest.mark.slow
def test_who_may_not_write_is_told_so(model: Path, call: Callable[..., Any]) -> None:
    done = call("push", model, "org/mine", "--license", "llama2", token="")
    assert done.returncode == 2, done.stderr
    assert "run `hf auth login` with a token that may write" in done.stderr


def test_what_is_refused_before_anything_is_sent(model: Path, tmp_path: Path) -> None:
    broken, bare, stated = (tmp_path / name for name in ("broken", "bare", "stated"))
    for folder in (broken, bare, stated):
        shutil.copytree(model, folder)
    (broken / "model.safetensors").unlink()
    (bare / "README.md").unlink()
    (stated / "README.md").write_text(CARD.replace("library_name", "license: gemma\nlibrary_name"))
    for folder, name, options, sentence in (
        (model, "mine", {}, "write it as org/name"),
        (tmp_path / "no", "org/mine", {}, "does not exist"),
        (broken, "org/mine", {}, "model.safetensors"),
        (bare, "org/mine", {}, "has no README.md"),
        (model, "org/mine", {"public": True}, "states no licence.*nothing is made public"),
        (stated, "org/mine", {"licence": "mit"}, "states the licence gemma"),
    ):
        with pytest.raises(UserError, match=sentence):
            push(folder, name, **options)  # type: ignore[arg-type]
