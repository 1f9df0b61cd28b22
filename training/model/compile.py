"""torch.compile for the decoder layers, which share one graph, in the training step only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from cpt_merge.core.errors import UserError
from cpt_merge.core.torch_compat import compilers_missing
from cpt_merge.training.model.documents import runs_one_by_one

P = ParamSpec("P")
R = TypeVar("R")


def compilable(layers: nn.ModuleList) -> list[nn.Module]:
    """The layers in which no module takes documents one by one, whose sizes differ each time."""
    return [layer for layer in layers if not any(map(runs_one_by_one, layer.modules()))]


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile the layers that can be compiled, when they first run."""
    for layer in compilable(layers):
        layer.compile(fullgraph=True)  # otherwise torch silently skips what it cannot compile


def check_compiler(device: torch.device) -> None:
    """Raise `UserError` if torch.compile cannot make code for the device on this machine."""
    missing = compilers_missing(device)
    if missing:
        raise UserError(
            f"training.compile needs {missing}, which this machine lacks; install it or set "
            "compile to false."
        )


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with layers that are not compiled.

    Outside training there are many shapes, for which torch.compile would make code for any shape,
    and training would use that slower code too.
    """

    @wraps(function)
    def wrapped(*arguments: P.args, **names: P.kwargs) -> R:
        with torch.compiler.set_stance("force_eager"):
            return function(*arguments, **names)

    return wrapped
