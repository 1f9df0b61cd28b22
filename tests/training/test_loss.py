"""The chunked loss equals the plain one, value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from training.loss import cross_entropy_sum
from training.packing import IGNORED


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_equals_plain_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (33,))
    labels[[0, 7, 32]] = IGNORED
    plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum")
    expected = torch.autograd.grad(plain / 30, (hidden, weight))
    loss = cross_entropy_sum(hidden, weight, labels, chunk)
    found = torch.autograd.grad(loss / 30, (hidden, weight))
    assert torch.allclose(loss.double(), plain, rtol=1e-6)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, labels = torch.randn(10, 4), torch.randn(20, 4), torch.randint(0, 20, (10,))
    with torch.no_grad():
        value = cross_entropy_sum(hidden, weight, labels, 3)
    assert torch.allclose(value, cross_entropy_sum(hidden.requires_grad_(), weight, labels, 3).detach())


def test_a_row_without_targets_has_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.randn(5, 3), torch.full((4,), IGNORED), 2)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
