"""The loss of preference pairs, against the formula on the logits of whole rows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_merge.data.packing import IGNORED
from cpt_merge.data.pairs import Pairs, replies_of
from cpt_merge.training.model.loss import Head
from cpt_merge.training.model.preference import log_probabilities, preference_loss

LENGTHS, BETA = (6, 9, 4, 5, 3), 0.3  # two pairs, and what is left of the sequence
PROMPTS = (2, 3, 1, 1, 3)


def sequence() -> tuple[Tensor, Tensor, Tensor, Pairs]:
    """Hidden states, a head's matrix, labels, and the pairs with a reference."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), 8, generator=generator)
    weight = torch.randn(11, 8, generator=generator)
    labels = torch.randint(0, 11, (sum(LENGTHS),), generator=generator)
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    for begin, end, prompt in zip(bounds[:-1], bounds[1:], PROMPTS, strict=True):
        labels[begin : begin + prompt] = IGNORED
        labels[end - 1] = IGNORED
    reply, count = replies_of((labels != IGNORED).numpy(), bounds)
    reference = torch.randn(count, 2, generator=generator)
    return hidden, weight, labels, Pairs(torch.from_numpy(reply), count, BETA, reference)


def by_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ln p of each document's targets, from its logits."""
    parts = zip(torch.split(hidden, LENGTHS), torch.split(labels, LENGTHS), strict=True)
    return torch.stack([
        -F.cross_entropy(h @ weight.T, y, ignore_index=IGNORED, reduction="sum") for h, y in parts
    ])  # fmt: skip


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    gained = by_rows(hidden, weight, labels)[:4].view(2, 2) - reference
    return -F.logsigmoid(BETA * (gained[:, 0] - gained[:, 1])).sum()


def test_every_reply_has_the_log_probability_of_its_row() -> None:
    hidden, weight, labels, pairs = sequence()
    found = log_probabilities(hidden, Head(weight), labels, pairs, 4)
    assert found.shape == (2, 2)
    torch.testing.assert_close(found.flatten(), by_rows(hidden, weight, labels)[:4])


@pytest.mark.parametrize("chunk", [3, 64])
def test_loss_and_gradients_are_those_of_the_formula(chunk: int) -> None:
    hidden, weight, labels, pairs = sequence()
    assert pairs.reference is not None
    hidden.requires_grad_()
    weight.requires_grad_()
    loss, margin = preference_loss(hidden, Head(weight), labels, pairs, chunk)
    wanted = expected(hidden, weight, labels, pairs.reference)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(-F.logsigmoid(margin).sum(), wanted)
    found = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(found, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_reference_model_itself_has_no_margin() -> None:
    hidden, weight, labels, pairs = sequence()
    found = log_probabilities(hidden, Head(weight), labels, pairs, 5)
    own = Pairs(pairs.reply, pairs.count, BETA, found)
    loss, margin = preference_loss(hidden, Head(weight), labels, own, 5)
    assert margin.tolist() == [0.0, 0.0]
    assert float(loss) == pytest.approx(2 * math.log(2))
