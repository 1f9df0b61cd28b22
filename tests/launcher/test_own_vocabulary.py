"""A whole run on the base's own vocabulary: a recipe without `tokenizer`."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from tests.command_line import cpt_merge


@pytest.fixture(scope="module")
def own_recipe(recipe_path: Path) -> Path:
    values = yaml.safe_load(recipe_path.read_text(encoding="utf-8"))
    del values["tokenizer"]
    values["evaluation"]["suites"] = ["language"]
    path = recipe_path.with_name("own.yaml")
    path.write_text(yaml.safe_dump({**values, "name": "own"}, allow_unicode=True), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_run_without_new_pieces_ends_in_a_chat_model(own_recipe: Path) -> None:
    values = yaml.safe_load(own_recipe.read_text(encoding="utf-8"))
    done = cpt_merge("plan", own_recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    done = cpt_merge("run", own_recipe, "launch.processes=1")
    assert done.returncode == 0, done.stdout + done.stderr
    folder, base = Path(values["runs"]) / "own", Path(values["models"]["base"])
    vocabulary = VocabularyMap.load(folder / "tokenizer" / "tokenizer")
    assert vocabulary.new == []
    old, resized = Checkpoint.open(base), Checkpoint.open(folder / "embeddings" / "model")
    name = "model.embed_tokens.weight"
    assert (resized.read(name)[: vocabulary.base_rows] == old.read(name)).all()
    merged = folder / "merge" / "chat"
    before, after = map(AutoTokenizer.from_pretrained, (base, merged))
    assert before.get_vocab().items() <= after.get_vocab().items()
    chat = AutoTokenizer.from_pretrained(values["models"]["chat"])
    assert chat.get_vocab().keys() <= after.get_vocab().keys()
    assert after.chat_template == chat.chat_template
    rows = json.loads((merged / "config.json").read_text())["vocab_size"]
    assert rows == vocabulary.rows == len(Checkpoint.open(merged).read(name))
    assert cpt_merge("report", own_recipe).returncode == 0
