"""The chunked loss equals the plain one, value and gradients, with the memory of a chunk."""

import resource

import pytest
import torch
import torch.nn.functional as F

from cpt_merge.data.packing import IGNORED
from cpt_merge.training.model.loss import Head, cross_entropy_sum
from tests.distributed import run_ranks

TOKENS, WIDTH, VOCABULARY = 33, 8, 50


def inputs(
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, weight, bias, labels), some labels ignored."""
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[[0, 7, 32]] = IGNORED
    shapes = (TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return hidden, weight, bias, labels


def plain(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """The formula, all at once."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize(
    ("chunk", "compiled"),
    [
        (1, False),
        (5, False),
        (16, False),
        (100, False),
        pytest.param(16, True, marks=pytest.mark.slow),  # torch.compile calls a C++ compiler
    ],
)
@pytest.mark.parametrize(
    ("scale", "softcap", "biased"), [(1.0, None, False), (0.25, None, True), (3.0, 2.0, True)]
)
def test_equals_plain_cross_entropy(
    chunk: int, compiled: bool, scale: float, softcap: float | None, biased: bool
) -> None:
    hidden, weight, bias, labels = inputs()
    head = Head(weight, bias if biased else None, scale, softcap)
    wanted = (hidden, weight, bias) if biased else (hidden, weight)
    expected = plain(hidden, head, labels)
    loss = cross_entropy_sum(hidden, head, labels, chunk, compiled)
    assert loss.double().item() == pytest.approx(expected.item(), rel=1e-6)
    for found, gradient in zip(
        torch.autograd.grad(loss / 30, wanted),
        torch.autograd.grad(expected / 30, wanted),
        strict=True,
    ):
        assert torch.allclose(found, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("frozen", [1, 20, VOCABULARY])
def test_frozen_rows_get_no_gradient_and_the_others_the_same(frozen: int) -> None:
    hidden, weight, bias, labels = inputs()
    free = torch.autograd.grad(
        cross_entropy_sum(hidden, Head(weight, bias), labels, 16), (hidden, weight, bias)
    )
    head = Head(weight, bias, frozen_rows=frozen)
    found = torch.autograd.grad(cross_entropy_sum(hidden, head, labels, 16), (hidden, weight, bias))
    assert torch.equal(found[0], free[0]), "the hidden states' gradient is that of the whole head"
    for gradient, unmasked in zip(found[1:], free[1:], strict=True):
        assert not gradient[:frozen].any()
        assert torch.allclose(gradient[frozen:], unmasked[frozen:], rtol=1e-9, atol=1e-12)


def test_in_bfloat16_the_loss_is_float32_and_gradients_are_summed_in_float32() -> None:
    """In bfloat16, a sum of equal chunks would stop at 256 times a chunk's gradient."""
    torch.manual_seed(0)
    hidden = torch.randn(1, WIDTH).bfloat16().repeat(1024, 1).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).bfloat16().requires_grad_()
    labels = torch.full((1024,), 3)
    loss = cross_entropy_sum(hidden, Head(weight), labels, 1)
    one = cross_entropy_sum(hidden[:1], Head(weight), labels[:1], 1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1024 * one.item(), rel=1e-5)
    (many,), (single,) = torch.autograd.grad(loss, weight), torch.autograd.grad(one, weight)
    assert torch.allclose(many.float(), 1024 * single.float(), rtol=0.01)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    head = Head(weight, bias, 2.0, 3.0)
    with torch.no_grad():
        value = cross_entropy_sum(hidden, head, labels, 3)
    assert torch.allclose(value, cross_entropy_sum(hidden, head, labels, 3).detach())


def test_logits_are_those_of_the_formula() -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    head = Head(weight, bias, 2.0, 3.0)
    kept = labels != IGNORED
    logits = head.logits(hidden.detach())[kept]
    assert F.cross_entropy(logits, labels[kept], reduction="sum").item() == pytest.approx(
        plain(hidden, head, labels).item(), rel=1e-6
    )


def test_a_row_without_targets_has_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    loss = cross_entropy_sum(hidden, Head(torch.randn(5, 3)), torch.full((4,), IGNORED), 2)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, _, labels = inputs()
    loss = cross_entropy_sum(hidden, Head(weight), labels, 16)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def peak_of_a_step(tokens: int) -> int:
    """Bytes by which the loss of so many tokens raises the peak of this process's memory."""
    hidden, weight = (torch.randn(size, 16, requires_grad=True) for size in (tokens, 10_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels = torch.zeros(tokens, dtype=torch.long)
    cross_entropy_sum(hidden, Head(weight), labels, 128).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_vocabulary_times_tokens() -> None:
    """8 times the tokens have 143 MB more of logits; the peak grows by less than a tenth of that."""
    few, many = (run_ranks(peak_of_a_step, 1, tokens)[0] for tokens in (512, 4096))
    assert few > 128 * 10_000 * 4, "a chunk's logits are seen"
    assert many - few < 0.1 * (4096 - 512) * 10_000 * 4
