"""What W&B's graph calls the text, and where it says that the text is."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from cpt_merge.data.sources import Corpus
from cpt_merge.launcher.lineage import used
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import Stage, StageContext
from cpt_merge.launcher.stages import DATA, EVALUATION
from cpt_merge.tracking import Artifact


def artifacts(recipe: Recipe, *sources: dict[str, str]) -> list[Artifact]:
    """What the data stage uses of a corpus of these sources."""
    run = Run(
        recipe.model_copy(update={"corpus": Corpus.model_validate({"sources": list(sources)})})
    )
    return of_inputs(run, DATA, run.corpus_inputs())


def of_inputs(run: Run, stage: Stage, inputs: dict[str, str]) -> list[Artifact]:
    return used(StageContext(run, stage, {}, inputs, "0123"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "a"}\n')


def test_every_source_has_a_name_of_its_own_that_wandb_takes(recipe: Recipe, here: Path) -> None:
    languages = {
        "ko/train.jsonl": "ko", "zh_tw/train.jsonl": "zh_tw", "en/train.jsonl": "en", "more/en/train.jsonl": "en",
        "corpus/繁體.jsonl": "zh_tw", "corpus/正體.jsonl": "zh_tw", "corpus/한국어.jsonl": "ko", f"{'x' * 200}.jsonl": "en",
    }  # fmt: skip
    for path in languages:
        write(here / path)
    found = artifacts(
        recipe,
        *({"path": path, "language": language} for path, language in languages.items()),
        {"path": "corpus/*.jsonl", "language": "ko"},
    )
    names = [one.name for one in found]
    assert len(set(names)) == len(names) == len(languages) + 1
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name) for name in names)
    assert [re.sub("-[0-9a-f]{6}$", "", name) for name in names[:7]] == [
        "text-ko-train", "text-zh_tw-train", "text-en-train", "text-en-train", "text-zh_tw", "text-zh_tw", "text-ko",
    ]  # fmt: skip


def test_a_source_keeps_its_name_whatever_stands_beside_it(recipe: Recipe, here: Path) -> None:
    write(here / "ko/train.jsonl")
    write(here / "en/train.jsonl")
    korean, english = (
        {"path": "ko/train.jsonl", "language": "ko"},
        {"path": "en/train.jsonl", "language": "en"},
    )
    alone = artifacts(recipe, korean)
    assert artifacts(recipe, english, korean)[1:] == alone
    write(here / "ko/train.jsonl")
    (here / "ko/train.jsonl").write_text('{"text": "b"}\n')
    changed = artifacts(recipe, korean)
    assert changed[0].name == alone[0].name
    assert changed[0].digest != alone[0].digest, "another version"


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("ko.jsonl", "ko.jsonl"), ("*.jsonl", "."), ("**/*.jsonl", "."), ("corpus/*.jsonl", "corpus"), ("corpus", "corpus"),
        ("corpus/한국어.jsonl", "corpus/한국어.jsonl"),
    ],
)  # fmt: skip
def test_local_text_has_a_local_address(
    path: str, address: str, recipe: Recipe, here: Path
) -> None:
    write(here / "ko.jsonl")
    write(here / "corpus/한국어.jsonl")
    (found,) = artifacts(recipe, {"path": path, "language": "ko"})
    assert found.uri.startswith("file://")
    assert Path(unquote(found.uri.removeprefix("file://"))) == here / address


def test_text_of_the_hub_is_its_commit(recipe: Recipe, here: Path) -> None:
    sources = [
        {"path": path, "subset": subset, "language": "ko"}
        for path in ("wikimedia/wikipedia", "wikimedia/wikipedia@refs/pr/1")
        for subset in ("20231101.ko", "20231101.zh")
    ]
    corpus = Corpus.model_validate({"sources": sources})
    run = Run(recipe.model_copy(update={"corpus": corpus}))
    commits = {"text wikimedia/wikipedia": "1" * 40, "text wikimedia/wikipedia@refs/pr/1": "2" * 40}
    inputs = {name: f"hub:wikimedia/wikipedia@{commit}" for name, commit in commits.items()}
    found = of_inputs(run, DATA, inputs)
    assert len({one.name for one in found}) == 4
    assert all(re.fullmatch("text-ko-wikipedia-[0-9a-f]{6}", one.name) for one in found)
    assert [one.uri[-63:] for one in found] == [
        f"wikimedia/wikipedia/tree/{commit}"[-63:] for commit in commits.values() for _ in range(2)
    ]
    assert found[0].uri.startswith("https://huggingface.co/datasets/wikimedia")
    assert found[0].digest != found[2].digest


def test_text_whose_folder_is_gone_since_is_not_taken_for_the_hub(
    recipe: Recipe, here: Path
) -> None:
    corpus = Corpus.model_validate({"sources": [{"path": "gone/ko.jsonl", "language": "ko"}]})
    run = Run(recipe.model_copy(update={"corpus": corpus}))
    (found,) = of_inputs(run, DATA, {"text gone/ko.jsonl": "0123456789abcdef"})
    assert found.uri == here.as_uri()


def test_further_models_of_an_evaluation_are_used_too(recipe: Recipe, pair: Path) -> None:
    further = recipe.evaluation.model_copy(update={"models": {"sft": str(pair / "chat")}})
    run = Run(recipe.model_copy(update={"evaluation": further}))
    (found,) = of_inputs(run, EVALUATION, {"model sft": "0123"})
    assert re.fullmatch(r"model-sft-[0-9a-f]{6}", found.name)
    assert (found.kind, found.digest, found.used) == ("model", "0123", True)
    assert found.uri == (pair / "chat").as_uri()
