"""What a published model may have wrong is found by `plan`, before any text is counted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.inputs import check_inputs
from cpt_merge.launcher.plan import show_plan
from cpt_merge.launcher.recipe import Recipe, load_recipe


def set_json(file: str, **fields: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def cut_json(file: str) -> Callable[[Path], None]:
    return lambda model: (model / file).write_text("{") and None


ROPE = {"rope_type": "unheard_of", "factor": 2.0}
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "rows as text": ("base", set_json("config.json", vocab_size="320"), "has no vocab_size that is a number"),
    "no rows": ("base", set_json("config.json", vocab_size=None), "has no vocab_size"),
    "other rows": ("base", set_json("config.json", vocab_size=999), "but the model needs (999, 32)"),
    "an odd type": ("base", set_json("config.json", dtype="auto"), "cannot read the config.json of"),
    "an odd rope": ("base", set_json("config.json", rope_parameters=ROPE), "'unheard_of'"),
    "another family": ("base", set_json("config.json", model_type="own"), "architectures own in base, llama in chat"),
    "another width": ("chat", set_json("config.json", hidden_size=64), "but the model needs ("),
    "half a file": ("chat", cut_json("generation_config.json"), "generation_config.json cannot be read"),
    "half a template": ("chat", set_json("tokenizer_config.json", chat_template="{% for %}"), "correct its chat template"),
}  # fmt: skip


@pytest.fixture
def damaged(
    recipe_path: Path, pair: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Recipe:
    name, damage, _ = DAMAGES[request.param]
    shutil.copytree(pair / name, tmp_path / name)
    damage(tmp_path / name)
    return load_recipe(recipe_path, [f"models.{name}={tmp_path / name}", f"runs={tmp_path}"])


@pytest.mark.parametrize(
    ("damaged", "sentence"),
    [
        pytest.param(name, sentence, id=name, marks=pytest.mark.slow if number > 1 else [])
        for number, (name, (_, _, sentence)) in enumerate(DAMAGES.items())
    ],
    indirect=["damaged"],
)
def test_a_damaged_model_is_one_sentence(damaged: Recipe, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        show_plan(damaged)
    assert sentence in str(error.value)


@pytest.mark.slow
def test_a_base_of_another_kind_is_accepted_on_its_own_vocabulary(
    recipe_path: Path, pair: Path, tmp_path: Path
) -> None:
    """Unigram cannot be extended, but it can be trained on."""
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((chr(n), -1.0) for n in range(97, 123))], 0)
    )
    for name in ("base", "chat"):
        shutil.copytree(pair / name, tmp_path / name)
        (tmp_path / name / "tokenizer.model").unlink()
        unigram.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
        )
    recipe = load_recipe(
        recipe_path,
        [f"models.{name}={tmp_path / name}" for name in ("base", "chat")]
        + ["evaluation.suites=[language]"],  # the chat model has no template
    )
    with pytest.raises(UserError, match="is a Unigram tokenizer"):
        check_inputs(recipe)
    own = recipe.tokenizer.model_copy(update={"new_pieces": {}})
    check_inputs(recipe.model_copy(update={"tokenizer": own}))


def test_a_key_that_cannot_be_sent_is_refused(recipe: Recipe, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abc…")
    asked = recipe.evaluation.model_copy(update={"engine": "http://127.0.0.1:9/v1"})
    with pytest.raises(UserError, match=r"evaluation\.server\.key_variable.* character 4 is not"):
        check_inputs(recipe.model_copy(update={"evaluation": asked}))


def test_the_pair_itself_is_accepted(recipe: Recipe) -> None:
    check_inputs(recipe)
