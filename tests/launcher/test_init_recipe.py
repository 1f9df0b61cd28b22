"""What the recipe of `cpt-merge init` contains for models and machines that are not here."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.choosing import LanguageFacts, defaults_for
from cpt_merge.launcher.init_recipe import Chosen, recipe_text
from cpt_merge.launcher.inspection import BaseFacts, TextFacts, parse_machine
from cpt_merge.launcher.recipe import Recipe, load_recipe
from cpt_merge.training.memory import ModelShape

LLAMA = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "intermediate_size": 11008, "num_key_value_heads": 32, "model_type": "llama",
}  # fmt: skip
USEFUL = ((0, 2.0), (8000, 0.8), (16000, 0.7), (24000, 0.69))
USELESS = ((0, 0.7), (24000, 0.68))


def chosen(machine: str, curve: tuple[tuple[int, float], ...] = USEFUL, size: float = 1) -> Chosen:
    """A Llama of 7B parameters (or `size` times as many layers) and 2 G characters of Korean."""
    values = {**LLAMA, "num_hidden_layers": int(32 * size)}
    parameters = int(0.26e9 + 6.48e9 * size)
    shape = ModelShape.from_config(values, parameters, "llama")
    shape = replace(shape, adapters=160_000_000)
    texts = [
        TextFacts(f"{tag}.jsonl", tag, 2e9, Counter({"가": 100}), 1000, "가")
        for tag in ("ko", "en")
    ]
    languages = {"ko": LanguageFacts(2e9, curve)}
    facts = BaseFacts(shape, 4096, [])
    row = defaults_for(parameters)
    return Chosen("x", "base", "chat", parse_machine(machine), facts, row, texts, languages, 0.01)


def written(tmp_path: Path, given: Chosen) -> tuple[str, Recipe]:
    text = recipe_text(given)
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    return text, load_recipe(tmp_path / "x.yaml", [])


def test_one_gpu_of_24_gb_gets_adapters_and_their_rate(tmp_path: Path) -> None:
    text, recipe = written(tmp_path, chosen("1xrtx4090"))
    assert recipe.training.lora is not None
    assert recipe.training.optimizer.learning_rate == 2e-4
    assert recipe.launch.accelerate_config == "fsdp2"
    assert "# Without this it does not fit on 1 x rtx4090 (24 GB)" in text


def test_many_large_gpus_need_no_settings_for_memory(tmp_path: Path) -> None:
    text, recipe = written(tmp_path, chosen("slurm:2x8xh100"))
    assert "Without this" not in text
    assert recipe.training.lora is None
    assert recipe.training.optimizer.learning_rate == 5e-5
    assert recipe.training.tokens == 3_000_000_000
    assert recipe.training.tokens_per_step == 1 << 20
    assert recipe.training.phases[0].tokens == 300_000_000
    assert recipe.tokenizer.new_pieces == {"ko": 16000}


def test_a_base_that_knows_the_language_is_not_extended(tmp_path: Path) -> None:
    text, recipe = written(tmp_path, chosen("8xh100", USELESS))
    assert recipe.tokenizer.languages() == []
    assert recipe.training.phases == []
    assert "24,000 new pieces would save 3%, so none are worth it" in text


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="nothing makes base fit on 1 x rtx4090"):
        recipe_text(chosen("1xrtx4090", size=40))
