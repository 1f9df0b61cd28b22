"""bfloat16 in numpy rounds as torch does, and widening is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpt_merge.checkpoint.dtypes import narrow, widen
from cpt_merge.core.errors import UserError

EDGES = [
    0x00000000, 0x80000000,  # zeros
    0x00000001, 0x80000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF,  # subnormals, around a tie
    0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001,  # ties to even, down and up, and their neighbours
    0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF,  # the largest: up to Inf or not
    0x7F800000, 0xFF800000,  # Inf
    0x477FF000, 0x477FEFFF, 0x33000000, 0x33000001,  # float16's overflow and smallest subnormal
]  # fmt: skip
NANS = [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F80FFFF, 0xFF800001, 0x7FFFFFFF]


def floats(bits: list[int]) -> np.ndarray:
    return np.array(bits, dtype=np.uint32).view(np.float32)


def by_torch(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values.copy()).to(dtype).view(torch.int16).numpy().view(np.uint16)


@given(
    st.lists(
        st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7FFFFFFF <= 0x7F800000), min_size=1
    )
)
def test_rounds_like_torch_bit_for_bit(bits):
    values = floats(bits + EDGES)
    assert (narrow(values, "BF16") == by_torch(values, torch.bfloat16)).all()
    assert (narrow(values, "F16").view(np.uint16) == by_torch(values, torch.float16)).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_nan_stays_nan_and_nothing_else_becomes_nan(bits):
    values = floats(bits + NANS)
    for dtype in ("BF16", "F16", "F32"):
        assert (np.isnan(widen(narrow(values, dtype), dtype)) == np.isnan(values)).all()


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)]
)
def test_widening_is_exact_for_every_value_there_is(dtype, torch_dtype):
    stored = np.arange(2**16, dtype=np.uint16)
    wide = widen(stored if dtype == "BF16" else stored.view(np.float16), dtype)
    expected = torch.from_numpy(stored.view(np.int16).copy()).view(torch_dtype).float().numpy()
    number = ~np.isnan(expected)
    assert (wide.view(np.uint32)[number] == expected.view(np.uint32)[number]).all()
    assert (narrow(wide, dtype).view(np.uint16)[number] == stored[number]).all()


def test_other_types_are_refused():
    with pytest.raises(UserError, match="F8_E4M3"):
        widen(np.zeros(1, np.uint8), "F8_E4M3")
    with pytest.raises(UserError, match="I32"):
        narrow(np.zeros(1, np.float32), "I32")
