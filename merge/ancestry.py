"""Is `base` really the ancestor of both, and does CPT hold the chat vector already? Told from the changes' lengths."""

from __future__ import annotations

from cpt_merge.checkpoint.dtypes import widen
from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.merge.plan import MergePlan
from cpt_merge.merge.statistics import Statistics, Sums, total

SAMPLE = 1 << 16  # elements of each tensor, from its middle

UNRELATED = 1.0  # |model - base| / |base|; about 1.4 for models that have nothing in common, below 0.3 for siblings
BODY = ("attention", "mlp", "other")
CONTAINED = 0.5  # times the vector; about 1 if CPT started from the chat model, about 0 if it started from base


def sample(plan: MergePlan) -> list[Statistics]:
    """Statistics of a small part of every tensor, for each vector, read in a moment."""
    statistics: list[Statistics] = [{} for _ in plan.vectors]
    for tensor in plan.tensors:
        if tensor.by_token or tensor.treatment is None:
            continue
        size = plan.cpt.tensors[tensor.name].size
        start = max((size - SAMPLE) // 2, 0)
        stop = min(start + SAMPLE, size)
        cpt = widen(
            plan.cpt.read_flat(tensor.name, start, stop), plan.cpt.tensors[tensor.name].dtype
        )
        for vector, of_vector in zip(plan.vectors, statistics, strict=True):
            difference = vector.source.elements(tensor.name, start, stop)
            of_vector[tensor.name] = Sums()
            of_vector[tensor.name].count(cpt, difference.base, difference.values)
    return statistics


def warnings(plan: MergePlan, statistics: list[Statistics]) -> list[str]:
    """One sentence for each thing that is probably wrong with the choice of models."""
    found = []
    for vector, of_vector in zip(plan.vectors, statistics, strict=True):
        prefix = "" if vector is plan.chat else f"{vector.label}: "
        found += [prefix + warning for warning in _warnings(of_vector)] if of_vector else []
    return found


def _warnings(statistics: Statistics) -> list[str]:
    """Of one vector. Only the matrices of the layers count: any training moves the vocabulary's rows and the norms in
    like ways, so these lie along the vector even in a model that never saw it.
    """
    sums = total(sums for name, sums in statistics.items() if kind_of(name) in BODY)
    found = []
    if total(statistics.values()).vector == 0:
        found.append("chat equals base: there is no vector to add; check the two models.")
    if sums.vector_share > UNRELATED:
        found.append(
            f"|chat - base| is {sums.vector_share:.2f} of |base|: base is probably not chat's ancestor."
        )
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
