"""Whether base, chat and CPT descend from one another as their places say.

Two trainings that start from the same weights move in nearly orthogonal directions. So in the
triangle of base, chat and CPT the right angle is at the common ancestor, which should be the base.
Unrelated models are farther apart than they are long: |chat - base| / |base| is about 1.4 for them
and below 0.3 for siblings. Everything here is likely and nothing certain, so it warns.
"""

from __future__ import annotations

from pathlib import Path

from cpt_merge.checkpoint.dtypes import FLOATS, widen
from cpt_merge.checkpoint.loaded import open_model
from cpt_merge.checkpoint.reader import Checkpoint, read_json
from cpt_merge.checkpoint.tensor_kinds import is_by_token, kind_of
from cpt_merge.merge.fit import stored_like
from cpt_merge.merge.norms import Statistics, Sums, total
from cpt_merge.merge.plan import MergePlan
from cpt_merge.merge.vectors import Difference, Pair, Vector

SAMPLE = 1 << 16  # elements of each tensor, from its middle
_BLOCK = 1 << 22  # elements compared at a time
UNRELATED = 1.0  # |model - base| / |base|
# From which share of one change in the other the two do not start at the base: about 1 if the
# other end of the change is the ancestor, about 0 if the base is
CONTAINED = 0.5
ALIGNED = 0.2  # the cosine below which a long change "contains" a short one by chance
LARGEST_RATIO = 2.0  # published merges use 0.3 to 1.2
# Any training changes the vocabulary's rows and the norms in similar ways, so their change points
# along the vector even in a model that never saw it: only the matrices of the layers count
BODY = ("attention", "linear_attn", "mamba", "mixer", "mlp", "experts", "router", "other")


def sample(plan: MergePlan) -> list[Statistics]:
    """Statistics of a small part of every tensor, for each vector; this takes a moment."""
    statistics: list[Statistics] = [{} for _ in plan.vectors]
    if plan.config.interpolates:
        return statistics  # there is no base
    for tensor in plan.tensors:
        if tensor.by_token or tensor.treatment is None or tensor.treatment.action == "skip":
            continue
        for vector, of_vector in zip(plan.vectors, statistics, strict=True):
            of_vector[tensor.name] = _sample(plan.cpt, vector.source, tensor.name)
    return statistics


def _sample(cpt: Checkpoint, source: Vector, name: str) -> Sums:
    info = cpt.tensors[name]
    start = max((info.size - SAMPLE) // 2, 0)
    stop = min(start + SAMPLE, info.size)
    difference: Difference = source.elements(name, start, stop)
    sums = Sums(elements=info.size)
    values = widen(cpt.read_flat(name, start, stop), info.dtype)
    sums.count(values, difference.base, difference.values)
    return sums


def warnings(plan: MergePlan, statistics: list[Statistics]) -> list[str]:
    """One sentence for each thing that is probably wrong with the choice of models or ratios."""
    if plan.config.interpolates:
        return _distance_warnings(statistics[0])
    found = _ratio_warnings(plan)
    gets_vector = any(tensor.gets_vector for tensor in plan.tensors)
    for vector, of_vector in zip(plan.vectors, statistics, strict=True):
        prefix = "" if vector is plan.chat else f"{vector.label}: "
        if of_vector and gets_vector:
            found += [prefix + warning for warning in _warnings(of_vector)]
    if _equals_base(plan, statistics[0]):
        found.append(
            "cpt equals base: the output is the base with the chat vector, and at ratio 1 just the "
            "chat model; check the two models."
        )
    source = plan.chat.source
    if not has_chat_template(source.chat_directory):
        for label, directory in (("base", source.base_directory), ("cpt", plan.tokenizer)):
            if has_chat_template(directory):
                found.append(
                    f"{label} has a chat template and chat has none: {label} and chat are probably "
                    "swapped."
                )
    return found


def _equals_base(plan: MergePlan, statistics: Statistics) -> bool:
    """Whether CPT never changed: neither the sampled elements nor a row of the vocabulary."""
    base, sums = plan.chat.source.models.get("base"), total(statistics.values())
    if base is None or not sums.base or sums.change:
        return False
    names = [tensor.name for tensor in plan.tensors if tensor.by_token]
    return all(_same(plan.cpt, base, name) for name in names if name in base.tensors)


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether two models have the same matrix."""
    info, found = one.tensors[name], other.tensors[name]
    if (info.shape, info.dtype) != (found.shape, found.dtype):
        return False
    return all(
        one.read_flat(name, start, min(start + _BLOCK, info.size)).tobytes()
        == other.read_flat(name, start, min(start + _BLOCK, info.size)).tobytes()
        for start in range(0, info.size, _BLOCK)
    )


def pair_warnings(base: Path, chat: Path) -> list[str]:
    """What is probably wrong with a base and its chat model, before there is a CPT model."""
    of_base = open_model(base)
    pair = Pair(of_base, stored_like(open_model(chat, base), of_base))
    statistics: Statistics = {
        name: _sample(pair.base, pair, name)
        for name, info in pair.base.tensors.items()
        if name in pair.tensors and info.dtype in FLOATS and not is_by_token(name)
    }
    found = _warnings(statistics)
    if has_chat_template(base) and not has_chat_template(pair.chat_directory):
        found.append(
            f"{base} has a chat template and {chat} has none: models.base and models.chat are "
            "probably swapped."
        )
    return found


def contained_vector(base: Path, chat: Path, model: Checkpoint) -> float:
    """How many times a model of the same shapes contains chat - base already; 0 if it does not."""
    of_base = stored_like(open_model(base), model)
    pair = Pair(of_base, stored_like(open_model(chat, base), model))
    sums = total(
        _sample(model, pair, name)
        for name, info in model.tensors.items()
        if name in pair.tensors and info.dtype in FLOATS and kind_of(name) in BODY
    )
    return sums.contained if sums.contained > CONTAINED else 0.0


def has_chat_template(directory: Path) -> bool:
    """Whether one of the tokenizer's files holds a chat template."""
    if any((directory / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json")):
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def _distance_warnings(statistics: Statistics) -> list[str]:
    """Whether CPT and the chat model are too far apart for a way between them."""
    sums = total(sums for name, sums in statistics.items() if kind_of(name) in BODY)
    if sums.vector_share <= UNRELATED:
        return []
    return [
        f"|chat - cpt| is {sums.vector_share:.2f} of |cpt|: the two models are probably not "
        "related, and what lies between them is of no use."
    ]


def _ratio_warnings(plan: MergePlan) -> list[str]:
    """Ratios of the chat vector that nobody would choose on purpose."""
    ratios = [tensor.treatment.ratios[0] for tensor in plan.tensors if tensor.treatment]
    found = []
    if max(ratios, default=0.0) > LARGEST_RATIO:
        found.append(
            f"a ratio of {max(ratios):g} is far beyond what published merges use (0.3 to 1.2): the "
            "chat vector will drown the model; check merge.ratio."
        )
    if min(ratios, default=0.0) < 0:
        found.append(
            f"a ratio of {min(ratios):g} takes the chat vector away, so the model unlearns to "
            "chat; check merge.ratio (a vector to forget belongs into merge.vectors)."
        )
    return found


def _warnings(statistics: Statistics) -> list[str]:
    """The warnings of one vector, from the angles at base, chat and CPT."""
    sums = total(sums for name, sums in statistics.items() if kind_of(name) in BODY)
    found = []
    if total(statistics.values()).vector == 0:
        found.append("chat equals base: there is no vector to add; check the two models.")
    if sums.vector_share > UNRELATED:
        found.append(
            f"|chat - base| is {sums.vector_share:.2f} of |base|: base is probably not chat's "
            "ancestor; give the base that this chat model was trained from."
        )
    if sums.change_share > UNRELATED:
        found.append(
            f"|cpt - base| is {sums.change_share:.2f} of |base|: base is probably not the CPT "
            "model's ancestor."
        )
    elif sums.contained > CONTAINED:
        found.append(
            f"cpt contains {sums.contained:.2f} times the chat vector already (cosine "
            f"{sums.cosine:.2f}): either base and chat are swapped, or cpt was trained from the "
            "chat model and would get the vector twice."
        )
    elif sums.change and sums.dot / sums.change > CONTAINED and sums.cosine > ALIGNED:
        found.append(
            f"chat contains {sums.dot / sums.change:.2f} times the change of cpt already (cosine "
            f"{sums.cosine:.2f}): either base and cpt are swapped, or chat was trained from cpt."
        )
    return found
