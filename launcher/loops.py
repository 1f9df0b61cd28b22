"""The training loops of a run, by the names of their stages, from what its folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt_merge.core.config import parse_section
from cpt_merge.data.store import STORE_FILE, Store
from cpt_merge.finetune import FinetuneConfig, FurtherTraining, PreferenceConfig
from cpt_merge.training import TrainingConfig

_FURTHER: dict[str, tuple[type[FurtherTraining], str]] = {  # stage -> section, stage of its store
    "finetune": (FinetuneConfig, "conversations"),
    "dpo": (PreferenceConfig, "pairs"),
}


def loops_of(run: Path, recipe: Mapping[str, Any]) -> dict[str, TrainingConfig]:
    """The settings of each loop of a run with this recipe, as its logs keep it.

    One is left out until it has a store, which decides its steps. Raises `UserError`.
    """
    where = f"the recipe in the logs of {run}"
    training = parse_section(TrainingConfig, recipe.get("training", {}), where)
    loops = {"training": training}
    for name, (section, data) in _FURTHER.items():
        store = run / data / "store"
        if recipe.get(name) and (store / STORE_FILE).is_file():
            config = parse_section(section, recipe[name], where)
            tokens, _ = config.reading(Store.open(store).info.sources)
            loops[name] = config.training_config(training, tokens)
    return loops
