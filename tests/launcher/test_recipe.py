"""Recipes: every one that comes along is valid, and what is wrong with one is said in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe, load_recipe
from cpt_merge.launcher.reference import HEADER, as_markdown, recipe_keys

ROOT = Path(__file__).parents[2]

MINIMAL: dict[str, Any] = {
    "name": "test",
    "models": {"base": "a", "chat": "b"},
    "corpus": {
        "sources": [{"path": "x.txt", "language": "ko"}, {"path": "y.txt", "language": "en"}]
    },
    "tokenizer": {"new_pieces": {"ko": 100}},
    "training": {"tokens": 1000},
}


def write(folder: Path, values: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name
)
def test_the_recipes_that_come_along_are_valid(path: Path) -> None:
    assert load_recipe(path, []).name == path.stem


def test_overrides_are_yaml_and_reach_into_lists(tmp_path: Path) -> None:
    overrides = [
        "training.tokens=5_000",
        "corpus.sources.1.weight=0.5",
        "training.optimizer.clip=2",
        "tracking.tags=[a, b]",
    ]
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert recipe.training.tokens == 5000
    assert recipe.corpus.sources[1].weight == 0.5
    assert recipe.training.optimizer.clip == 2
    assert recipe.tracking.tags == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "training.token=5",
            "unknown key `training.token`; the nearest known key is `training.tokens`",
        ),
        ("training.optimiser.clip=1", "nearest known key is `training.optimizer`"),
        ("traning.tokens=5", "nearest known key is `training`"),
        (
            "training.tokens=many",
            "`training.tokens` = 'many', but it must be a whole number above 0, such as 500M.",
        ),
        (
            "training.tokens=-1",
            "`training.tokens` = -1, but it must be a whole number above 0, such as 500M.",
        ),
        (
            "training.tokens=",
            "`training.tokens` = null, but it must be a whole number above 0, such as 500M.",
        ),
        ("corpus.heldout=.nan", "= nan, but it must be a number above 0 and below 0.5."),
        (
            "training.schedule.shape=step",
            "`training.schedule.shape` = 'step', but it must be one of cosine, linear, wsd.",
        ),
        ("data.deduplicate=maybe", "`data.deduplicate` = 'maybe', but it must be true or false."),
        ("merge.rules=[{layers: [1]}]", "= [1], but it must be a list of 2 whole numbers."),
        ("merge.rules=[{kinds: [mpl]}]", "`merge.rules.0.kinds.0` = 'mpl', but it must be one of"),
        ("tokenizer.new_pieces=5", "= 5, but it must be a mapping text -> whole number."),
        ("tokenizer.new_pieces.ko=x", "`tokenizer.new_pieces.ko` = 'x', but it must be a whole"),
        ("tokenizer.new_pieces={no: 3}", "the key false in `tokenizer.new_pieces` is not text"),
        ("evaluation.safety.classifier=3", "= 3, but it must be a section."),
        ("evaluation.judge={url: x, model: m}", "= 'x', but it must be text that matches ^https?"),
        ("corpus.sources=[]", "= [], but it must be a list of sections of length at least 1."),
        (
            "training={token: 5}",
            "`training.token`; the nearest known key is `training.tokens`, which is missing.",
        ),
        (
            "models={bsae: a, chta: b}",
            "unknown key `models.bsae`; the nearest known key is "
            "`models.base`, which is missing (and 2 more).",
        ),
        ("corpus.sources.7.weight=1", "'7' is not an index into a list of 2"),
        ("corpus.sources[0].path=x", "an item of a list is written corpus.sources.0.path=x."),
        ("corpus.sources.0.language=kr", "language 'kr' is not known; use ko."),
        ("tokenizer.new_pieces={ko-KR: 3, ko: 4}", "ko is ko, which occurs twice; remove one"),
        (
            "training.tokens=1.5X",
            "`training.tokens` = '1.5X', but it must be a whole number above 0, such as 500M.",
        ),
        (
            "training.learning_rate=1",
            "the nearest known key is `training.optimizer.learning_rate`.",
        ),
        ("ratio=1", "unknown key `ratio`; keys of this name: `merge.ratio`, `merge.rules.ratio`,"),
        (
            "sequence_length=1",
            "keys of this name: `training.sequence_length`, `finetune.sequence_length`,",
        ),
        (
            "tokenizer.new_pieces.zh_tw=10",
            "`tokenizer` extends by zh_tw but corpus.sources has no such text",
        ),
        (
            "training.shield={language: ja}",
            "`training.shield.language` is ja, but corpus.sources has no text in it",
        ),
        ("name=a/b", "one folder name"),
        ("training.tokens", "not of the form section.key=value"),
        ("training.tokens=[", "is not YAML"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert "Input should" not in str(error.value)  # pydantic's words


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("1B", 10**9), ("1.5B", 15 * 10**8), ("500M", 5 * 10**8), ("64k", 64_000), ("1e9", 10**9),
        ("2.5e9", 25 * 10**8), ("1.0e+9", 10**9), ("1_000_000", 10**6), ("'10,000,000'", 10**7),
    ],
)  # fmt: skip
def test_token_counts_as_people_write_them(tmp_path: Path, written: str, tokens: int) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path, [f"training.tokens={written}"]) == load_recipe(
        path, [f"training.tokens={tokens}"]
    )
    phases = f"training.phases=[{{train: all, tokens: {written}}}]"
    found = load_recipe(path, [phases, f"training.tokens={written}"]).training
    assert found.phases[0].tokens == tokens


def test_languages_in_any_spelling(tmp_path: Path) -> None:
    spelt = ["corpus.sources.0.language=KO-kr", "tokenizer.new_pieces={ko_KR: 5}"]
    plain = ["corpus.sources.0.language=ko", "tokenizer.new_pieces={ko: 5}"]
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path, spelt) == load_recipe(path, plain)


def test_a_long_value_is_shortened_in_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, MINIMAL), [f"training.tokens={'x' * 5000}"])
    assert "x..., but it must be" in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [", "is not YAML"),
        ("- a", "not a mapping of sections"),
        ("name: x", "`models`, `corpus` and `training` are missing; set them."),
        ("training:\n  tokens: 1\n  tokens: 2", "lines 2 and 3: the key `tokens` occurs twice"),
        ("name: x\nmodels: {}\nname: y", "lines 1 and 3: the key `name` occurs twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(
    tmp_path: Path, content: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(write(tmp_path, content), [])


def test_a_missing_or_misencoded_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml", [])
    (tmp_path / "recipe.yaml").write_bytes("name: 한국어".encode("euc-kr"))
    with pytest.raises(UserError, match="is not UTF-8"):
        load_recipe(tmp_path / "recipe.yaml", [])


def test_every_key_has_a_meaning() -> None:
    keys = list(recipe_keys(Recipe))
    assert len(keys) > 60
    assert [item.path for item in keys if not item.text] == []


def test_the_reference_is_up_to_date() -> None:
    """docs/recipe.md is what `make docs` writes."""
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == HEADER + as_markdown(Recipe)


def test_a_phase_names_sources_that_exist(recipe_path: Path) -> None:
    phases = "training.phases=[{train: all, weights: {nobody: 1}}]"
    with pytest.raises(UserError, match="`weights` names nobody, but there are ko:ko, zh_tw:zh_tw"):
        load_recipe(recipe_path, [phases])
    load_recipe(recipe_path, [phases.replace("nobody", "'ko:ko'")])
