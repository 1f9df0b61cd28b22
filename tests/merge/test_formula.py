import hashlib
from copy import deepcopy

import numpy as np
import pytest
import torch

from cpt_merge.checkpoint.dtypes import narrow
from cpt_merge.merge import formula as kernel


def drawn(count=100_000):
    """bfloat16 values of about 0.004 to 0.06, from integer arithmetic alone.

    The same everywhere.
    """

    def values(seed):
        bits = (np.arange(count, dtype=np.uint32) + np.uint32(seed)) * np.uint32(2654435761)
        bits ^= bits >> 15
        bits *= np.uint32(2246822519)
        bits ^= bits >> 13
        exponent = np.uint32(119) + (bits >> 8 & 3)
        return ((bits & 0x80000000) | exponent << 23 | (bits & 0x7F) << 16).view(np.float32)

    return values(0), values(1_000_000), values(2_000_000)


def merged(cpt, base, chat, ratio):
    return kernel.add(cpt, kernel.vector(deepcopy(chat), base), ratio)  # it is overwritten


@pytest.mark.parametrize(
    ("ratio", "digest"),
    [(1.0, "0f57ed5e75433a87"), (0.7, "63c826f61353c2e2"), (-0.3, "426445275a4535fd")],
)
def test_golden_bytes(ratio, digest):
    """Invariant "one rounding": these digests never change, on any machine."""
    result = narrow(merged(*drawn(), ratio), "BF16")
    assert hashlib.sha256(result.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("ratio", [1.0, 0.7, -0.3, 1e-30])
def test_torch_gives_the_bits_of_numpy(ratio):
    cpt, base, chat = drawn()
    by_torch = merged(*(torch.from_numpy(values) for values in (cpt, base, chat)), ratio)
    assert (
        by_torch.numpy().view(np.uint32) == merged(cpt, base, chat, ratio).view(np.uint32)
    ).all()


def test_every_step_is_rounded_to_float32_and_none_is_fused():
    cpt, base, chat = drawn()
    ratio = np.float32(0.7)

    def exact(a, b, op):
        """One rounding from float64."""
        return op(a.astype("f8"), b.astype("f8")).astype("f4")

    d = exact(chat, base, np.subtract)
    expected = exact(cpt, exact(d, np.full_like(d, ratio), np.multiply), np.add)
    result = merged(cpt, base, chat, 0.7)
    assert (result == expected).all()
    fused = (cpt.astype("f8") + d.astype("f8") * np.float64(ratio)).astype("f4")
    assert (result != fused).any()  # else this test could not tell them apart


def test_inputs_are_not_changed():
    cpt, base, chat = drawn(100)
    copies = [values.copy() for values in (cpt, base, chat)]
    merged(cpt, base, chat, 0.7)
    assert all(
        (values == copy).all() for values, copy in zip((cpt, base, chat), copies, strict=True)
    )
