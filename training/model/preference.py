"""Direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290).

    loss of a pair = -ln sigmoid(margin)
    margin = beta * [(ln p(chosen) - ln p_ref(chosen)) - (ln p(rejected) - ln p_ref(rejected))]

ln p sums over the tokens of a reply that count, and p_ref is the model that training started from.

The derivative of the loss by ln p(chosen) is -beta * sigmoid(-margin), and by ln p(rejected) the
opposite. So with these as constant weights of the tokens the weighted cross-entropy has the
gradient of the loss. It is computed in chunks as usual, after a pass that finds the margins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_merge.data.pairs import Pairs
from cpt_merge.training.model.loss import Head, cross_entropies, cross_entropy_sum


@torch.no_grad()
def log_probabilities(
    hidden: Tensor, head: Head, labels: Tensor, pairs: Pairs, chunk: int
) -> Tensor:
    """ln p of both replies of each pair [pairs, 2], in nats, float32.

    `hidden` is [tokens, width], `labels` [tokens].
    """
    losses = cross_entropies(hidden, head, labels, chunk)
    sums = losses.new_zeros(2 * pairs.count + 1)
    return -sums.index_add_(0, pairs.reply, losses)[:-1].view(-1, 2)


def margins(found: Tensor, pairs: Pairs) -> Tensor:
    """The margin of each pair [pairs] whose replies have the log probabilities `found`."""
    assert pairs.reference is not None
    gained = found - pairs.reference
    return pairs.beta * (gained[:, 0] - gained[:, 1])


def preference_loss(
    hidden: Tensor, head: Head, labels: Tensor, pairs: Pairs, chunk: int, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """(the sum of the losses of the pairs, their margins). The sum can be differentiated once."""
    margin = margins(log_probabilities(hidden, head, labels, pairs, chunk), pairs)
    loss = -F.logsigmoid(margin).sum()
    if not torch.is_grad_enabled():
        return loss, margin
    weight = pairs.beta * torch.sigmoid(-margin)
    of_replies = torch.stack([weight, -weight], 1).flatten()
    weights = torch.cat([of_replies, of_replies.new_zeros(1)])[pairs.reply]
    weighted = cross_entropy_sum(hidden, head, labels, chunk, compiled, weights)
    return loss + (weighted - weighted.detach()), margin
