"""torch.compile: each decoder layer, one graph for all of them, for the training step alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile when they first run."""
    for layer in layers:
        layer.compile(
            fullgraph=True
        )  # or torch would silently run what it cannot compile uncompiled


def uncompiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Within it compiled layers run as they were before compiling.

    For what is not training: its shapes are many, and torch.compile would answer them with code for any shape, which
    the training would then use too.
    """

    @wraps(function)
    def wrapped(*arguments: Any, **names: Any) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return function(*arguments, **names)

    return wrapped
