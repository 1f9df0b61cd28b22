"""A pair of hybrid decoders through the whole pipeline, and what `plan` says of it."""

import shutil
from pathlib import Path

import pytest
from transformers import GraniteMoeHybridConfig

from tests.command_line import cpt_merge
from tests.launcher.test_early_checks import of_family
from tests.training.families import HYBRIDS


@pytest.mark.slow
def test_plan_knows_the_padding_once_the_text_is_tokenised(
    recipe_path: Path, pair: Path, tmp_path: Path
) -> None:
    own_pair = shutil.copytree(pair, tmp_path / "pair")
    values = {**HYBRIDS["granite-4"][1], "max_position_embeddings": 256}
    of_family(GraniteMoeHybridConfig, **{**values, "bos_token_id": 1, "eos_token_id": 2})(own_pair)
    models = [f"models.{name}={own_pair / name}" for name in ("base", "chat")]
    command = (recipe_path, f"runs={own_pair.parent / 'runs'}", *models)
    before = " ".join(cpt_merge("plan", *command).stderr.split())
    assert "packed documents: one by one in GraniteMoeHybridMambaLayer" in before
    assert "padding that takes is known when the text is tokenised" in before
    for stage in ("tokenizer", "data"):
        done = cpt_merge(stage, *command)
        assert done.returncode == 0, done.stderr
    after = " ".join(cpt_merge("plan", *command).stderr.split())
    assert "similar length together; padding is " in after
    done = cpt_merge("run", *command)
    assert done.returncode == 0, done.stderr[-3000:]
