"""Spherical interpolation: from CPT to the chat model on the arc between them, tensor by tensor.

    cos a = <cpt, chat> / (|cpt| |chat|)
    merged = sin((1 - t) a) / sin a * cpt + sin(t a) / sin a * chat

Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985. The angle is that of the whole
tensor; for a matrix of the vocabulary, of the rows that both models have. Where the two are nearly
parallel, the arc is a straight line. Neither length is changed first, so at t = 0 and t = 1 the
result is the one model or the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32

PARALLEL = 0.9995  # cosine above which the arc is taken as a line, because sin a is too small


@dataclass
class Products:
    """|cpt|^2, |chat|^2 and <cpt, chat>, summed in double precision."""

    cpt: float = 0.0
    chat: float = 0.0
    both: float = 0.0

    def count(self, cpt: Float32, chat: Float32) -> None:
        """Add some elements. Products of float32 are exact in double precision."""
        one, other = cpt.astype(np.float64).reshape(-1), chat.astype(np.float64).reshape(-1)
        self.cpt += float((one * one).sum())
        self.chat += float((other * other).sum())
        self.both += float((one * other).sum())


def slerp(cpt: Float32, chat: Float32, ratio: float, products: Products) -> Float32:
    """Elements of the arc at `ratio`, not yet rounded."""
    of_cpt, of_chat = factors(ratio, products)
    merged: Float32 = cpt * np.float32(of_cpt) + chat * np.float32(of_chat)
    return merged


def factors(ratio: float, products: Products) -> tuple[float, float]:
    """What cpt and chat are multiplied by."""
    length = math.sqrt(products.cpt * products.chat)
    cosine = max(-1.0, min(1.0, products.both / length)) if length else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - ratio, ratio
    angle = math.acos(cosine)
    return (
        math.sin((1 - ratio) * angle) / math.sin(angle),
        math.sin(ratio * angle) / math.sin(angle),
    )
