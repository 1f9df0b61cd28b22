import hashlib

import numpy as np
import pytest
import torch

from checkpoint.dtypes import narrow
from merge import kernel


def drawn(count=100_000):
    """bfloat16-like values: sums of them meet rounding ties, where fused and unfused arithmetic differ."""
    random = np.random.default_rng(0)
    base = narrow(random.standard_normal(count).astype("f4") * np.float32(0.02), "BF16").astype(np.uint32) << 16
    base = base.view(np.float32)
    near = [base + (narrow(random.standard_normal(count).astype("f4") * np.float32(s), "BF16").astype("u4") << 16).view("f4")
            for s in (0.002, 0.004)]  # fmt: skip
    chat, cpt = ((narrow(values, "BF16").astype(np.uint32) << 16).view(np.float32) for values in near)
    return cpt, base, chat


def merged(cpt, base, chat, ratio):
    return kernel.add(cpt, kernel.vector(chat, base), ratio)


@pytest.mark.parametrize(
    ("ratio", "digest"),
    [(1.0, "GOLDEN_1"), (0.7, "GOLDEN_07"), (-0.3, "GOLDEN_M03")],
)
def test_golden_bytes(ratio, digest):
    """Law 3. These digests may never change: the same inputs give the same model, on any machine."""
    result = narrow(merged(*drawn(), ratio), "BF16")
    assert hashlib.sha256(result.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("ratio", [1.0, 0.7, -0.3, 1e-30])
def test_torch_gives_the_bits_of_numpy(ratio):
    cpt, base, chat = drawn()
    by_torch = merged(*(torch.from_numpy(values) for values in (cpt, base, chat)), ratio)
    assert (by_torch.numpy().view(np.uint32) == merged(cpt, base, chat, ratio).view(np.uint32)).all()


def test_every_step_is_rounded_to_float32_and_none_is_fused():
    cpt, base, chat = drawn()
    ratio = np.float32(0.7)
    exact = lambda a, b, op: op(a.astype("f8"), b.astype("f8")).astype("f4")  # noqa: E731 - one rounding from float64
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
    assert all((values == copy).all() for values, copy in zip((cpt, base, chat), copies, strict=True))
