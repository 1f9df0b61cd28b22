"""Other values in some tensors for a while, and then their own again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def replaced(replacements: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """`replacements` gives a tensor and its values one after the other. What fails on the way undoes what was done."""
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for tensor, values in replacements:
                kept.append((tensor, tensor.detach().to("cpu", copy=True)))
                tensor.copy_(values)
            yield
        finally:
            for tensor, before in kept:
                tensor.copy_(before)
