"""A name is a directory here or a hub id; a misspelt directory is never looked up on the hub."""

from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_local, model_directory


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
    with pytest.raises(UserError, match="org/model is not a local directory and could not be down"):
        model_directory("org/model")
