"""A name is a directory here or a hub id; what prevents a download is one sentence in our own words."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import hub_errors, is_local, model_directory


@pytest.fixture(autouse=True)
def _a_folder_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    "name",
    ["models/bose", "./models/bose", "../bose", "models/bose/", "a/b/c", "/nowhere", "~/nowhere", "bose"],
)  # fmt: skip
def test_a_misspelt_directory_does_not_exist_here(name: str) -> None:
    with pytest.raises(UserError, match=f"model {name} does not exist here"):
        model_directory(name)


def test_a_directory_here_comes_before_a_hub_id_of_the_same_name() -> None:
    assert model_directory("models/base") == Path("models/base")


def test_a_name_whose_first_part_is_no_folder_here_is_a_hub_id() -> None:
    assert not is_local("org/model")
    with pytest.raises(
        UserError, match="org/model is not a local directory, and the hub cannot be"
    ):
        model_directory("org/model")


def answer(code: int) -> Any:
    """The part of an HTTP response that the errors read."""
    return SimpleNamespace(status_code=code, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            errors.RepositoryNotFoundError("x", response=answer(404)),
            "neither a local directory nor",
        ),
        (
            errors.GatedRepoError("x", response=answer(403)),
            "is gated; accept its terms at https://",
        ),
        (
            errors.HfHubHTTPError("x", response=answer(500)),
            r"refuses to send model org/m \(HTTP 500",
        ),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached; correct the path"),
        (errors.OfflineModeIsEnabled("x"), "the hub cannot be reached; correct the path"),
        (errors.HTTPError("x"), "the hub cannot be reached; correct the path"),
        (errors.NotASafetensorsRepoError("x"), "has no safetensors files on the hub"),
        (
            OSError(28, "No space left on device"),
            "could not be downloaded: No space left on device",
        ),
    ],
)
def test_an_error_of_the_hub_is_our_own_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence), hub_errors("org/m"):
        raise error


def test_a_name_that_the_hub_cannot_have_is_no_model() -> None:
    with pytest.raises(UserError, match="neither a local directory nor on the hub"):
        model_directory("my models/base")
