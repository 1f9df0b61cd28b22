"""The recipe's `tracking` section."""

from __future__ import annotations

from typing import Literal

from cpt_merge.core.config import Section, key


class TrackingConfig(Section):
    """Weights & Biases: the mode, and the names."""

    mode: Literal["auto", "online", "offline", "disabled"] = key(
        "auto",
        "auto: online if there is an API key and the server answers, else offline; online: like "
        "auto, but a missing key is an error, and WANDB_MODE is ignored; disabled: only the local "
        "log",
    )
    project: str = key("cpt-merge", "W&B project")
    entity: str | None = key(None, "W&B team or user; your default one if not set")
    tags: list[str] = key([], "W&B tags of every run of the pipeline")
    system_metrics: Literal["first", "nodes"] = key(
        "first",
        "where W&B measures the machine (GPU, memory, network) in training: first: on the node of "
        "rank 0; nodes: on every node, each in a separate run of type `system` in the group",
    )
