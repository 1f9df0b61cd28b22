"""The training loops of a run, by the names of their stages, from what its folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt_merge.core.config import parse_section
from cpt_merge.data.store import STORE_FILE, Store
from cpt_merge.finetune import FinetuneConfig
from cpt_merge.training import TrainingConfig


def loops_of(run: Path, recipe: Mapping[str, Any]) -> dict[str, TrainingConfig]:
    """The settings of each loop of a run with this recipe, as its logs keep it.

    The fine-tuning is left out until it has a store, which decides its steps. Raises `UserError`.
    """
    where = f"the recipe in the logs of {run}"
    training = parse_section(TrainingConfig, recipe.get("training", {}), where)
    store = run / "conversations" / "store"
    if not recipe.get("finetune") or not (store / STORE_FILE).is_file():
        return {"training": training}
    finetune = parse_section(FinetuneConfig, recipe["finetune"], where)
    tokens, _ = finetune.reading(Store.open(store).info.sources)
    return {"training": training, "finetune": finetune.training_config(training, tokens)}
