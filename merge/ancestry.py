"""Is `base` really the ancestor of both, and does CPT hold the chat vector already? Told from the changes' lengths."""

from __future__ import annotations

from checkpoint.dtypes import widen
from merge import kernel
from merge.plan import MergePlan
from merge.rules import kind_of
from merge.statistics import Statistics, Sums, total

SAMPLE = 1 << 16  # elements of each tensor, from its middle

UNRELATED = 1.0  # |model - base| / |base|; about 1.4 for models that have nothing in common, below 0.3 for siblings
BODY = ("attention", "mlp", "other")
CONTAINED = 0.5  # times the vector; about 1 if CPT started from the chat model, about 0 if it started from base


def sample(plan: MergePlan) -> Statistics:
    """Statistics of a small part of every tensor, read in a moment."""
    statistics: Statistics = {}
    for tensor in plan.tensors:
        if tensor.by_token or tensor.treatment is None:
            continue
        size = plan.cpt.tensors[tensor.name].size
        start = max((size - SAMPLE) // 2, 0)
        cpt, base, chat = (
            widen(model.read_flat(tensor.name, start, min(start + SAMPLE, size)), model.tensors[tensor.name].dtype)
            for model in (plan.cpt, plan.base, plan.chat)
        )
        statistics[tensor.name] = Sums()
        statistics[tensor.name].count(cpt, base, kernel.vector(chat, base))
    return statistics


def warnings(statistics: Statistics) -> list[str]:
    """One sentence for each thing that is probably wrong with the choice of models.

    Only the matrices of the layers count: any training moves the vocabulary's rows and the norms in like ways, so these
    lie along the vector even in a model that never saw it.
    """
    sums = total(sums for name, sums in statistics.items() if kind_of(name) in BODY)
    found = []
    if total(statistics.values()).vector == 0:
        found.append("chat equals base: there is no vector to add; check the two models.")
    if sums.vector_share > UNRELATED:
        found.append(f"|chat - base| is {sums.vector_share:.2f} of |base|: base is probably not chat's ancestor.")
    if sums.change_share > UNRELATED:
        found.append(
            f"|cpt - base| is {sums.change_share:.2f} of |base|: base is probably not the CPT model's ancestor."
        )
    elif sums.contained > CONTAINED:
        found.append(
            f"cpt holds {sums.contained:.2f} times the chat vector already (cosine {sums.cosine:.2f}): "
            "it was probably trained from the chat model, and would get the vector twice."
        )
    return found
