"""Whether checkpoints fit together, tensor by tensor. All problems are collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cpt_merge.checkpoint.arranged import arranged_like
from cpt_merge.checkpoint.dtypes import FLOATS
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.loaded import named_like, open_model, text_section, with_head
from cpt_merge.checkpoint.reader import Checkpoint, unlisted_in
from cpt_merge.checkpoint.tensor_kinds import (
    OTHER_MODALITIES,
    embedding_of,
    heads_of,
    is_by_token,
    kind_of,
)
from cpt_merge.checkpoint.writer import natural
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

_SHOWN_PROBLEMS = 5
_ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class RefusedError(UserError):
    """Everything that prevents a merge, as one sentence and as a list."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        shown = "; ".join(problem.rstrip(".") for problem in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        super().__init__(f"{shown} (and {more} more)." if more > 0 else f"{shown}.")


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the `UserError` of the block, if there is one, to a list."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def open_fitting(directories: Mapping[str, Path]) -> dict[str, Checkpoint]:
    """Open checkpoints that are combined tensor by tensor.

    Raises `RefusedError` with all problems: architectures, names, shapes, types.
    """
    models = {
        label: open_model(directory, directories.get("base") if label != "base" else None)
        for label, directory in directories.items()
    }
    return fitting(models)


def fitting(models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Models that are combined tensor by tensor, with the names of the last one.

    Raises as `open_fitting` does.
    """
    *_, last = models.values()
    models = {label: stored_like(model, last) for label, model in models.items()}
    head = missing_head(models)
    if head:
        models = {label: with_head(model, head) for label, model in models.items()}
    problems = fit_problems(models, lambda name: kind_of(name) not in OTHER_MODALITIES)
    if problems:
        raise RefusedError(problems)
    return models


def stored_like(model: Checkpoint, like: Checkpoint) -> Checkpoint:
    """A model with the names of another one, and arranged like it."""
    return arranged_like(named_like(model, like.tensors), like)


def missing_head(models: Mapping[str, Checkpoint]) -> str | None:
    """The name of the head that some of the models have, if the others are tied; says so."""
    heads = {label: heads_of(model) for label, model in models.items()}
    tied = [label for label, found in heads.items() if not found]
    own = [label for label, found in heads.items() if found]
    if not tied or not own:
        return None
    head = heads[own[0]][0]
    say(
        f"merge: {' and '.join(own)} {_have(own)} a head of {_their(own)} own, "
        f"{' and '.join(tied)} {_have(tied)} not; there, {head} is the embedding"
    )
    return head


def _have(labels: list[str]) -> str:
    return "has" if len(labels) == 1 else "have"


def _their(labels: list[str]) -> str:
    return "its" if len(labels) == 1 else "their"


def fit_problems(models: Mapping[str, Checkpoint], is_needed: Callable[[str], bool]) -> list[str]:
    """Why these models cannot be combined. Tensors that are not needed may differ."""
    tensors = {
        label: {name: info for name, info in model.tensors.items() if is_needed(name)}
        for label, model in models.items()
    }
    counts = _expert_problems(tensors)
    if counts:  # every tensor of the experts would be named otherwise
        tensors = {
            label: {n: i for n, i in of_model.items() if kind_of(n) not in ("experts", "router")}
            for label, of_model in tensors.items()
        }
    problems = [
        *_architecture_problems(models),
        *counts,
        *_row_problems(models),
        *_name_problems(tensors, {label: model.directory for label, model in models.items()}),
        *_shape_problems(tensors),
        *_double_problems(tensors),
    ]
    if problems:
        places = " and ".join(f"{model.directory} ({label})" for label, model in models.items())
        problems[0] = f"{places} do not fit together: {problems[0]}"
    return problems


def _architecture_problems(models: Mapping[str, Checkpoint]) -> list[str]:
    types = {label: text_section(model.config).get("model_type") for label, model in models.items()}
    families = {str(family).removesuffix("_text") for family in types.values()}
    if len(families) == 1 or _is_wrapper_s(families, models):
        return []
    return ["architectures " + _listed(types)]


def _is_wrapper_s(families: set[str], models: Mapping[str, Checkpoint]) -> bool:
    """Whether families are a text model's and its wrapper's (`qwen2`, `qwen2_5_vl`); says so.

    Shapes and names decide whether they fit.
    """
    shortest, *others = sorted(families, key=len)
    if not all(family.startswith(shortest) for family in others) or not any(
        kind_of(name) in OTHER_MODALITIES for model in models.values() for name in model.tensors
    ):
        return False
    say(f"merge: {shortest} and {' and '.join(others)} are taken as one family of text decoders")
    return True


def _expert_problems(tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """One sentence if the models have different numbers of experts."""
    counts = {label: _count_experts(of_model) for label, of_model in tensors.items()}
    if len(set(counts.values()) - {0}) < 2:
        return []
    return [_listed({label: f"{count} experts a layer" for label, count in counts.items()})]


def _count_experts(tensors: Mapping[str, TensorInfo]) -> int:
    """The largest number of experts in a layer, in either layout; 0 for a dense model."""
    counts = [0]
    for name, info in tensors.items():
        if one := _ONE_EXPERT.search(name):
            counts.append(int(one[1]) + 1)
        elif kind_of(name) == "experts" and len(info.shape) == 3:
            counts.append(info.shape[0])
    return max(counts)


def _row_problems(models: Mapping[str, Checkpoint]) -> list[str]:
    """No matrix of the vocabulary may have more rows than the embedding."""
    problems = []
    for label, model in models.items():
        name = embedding_of(model)
        rows = model.tensors[name].shape[0] if name else 0
        for other, info in model.tensors.items():
            if name and is_by_token(other) and info.shape and info.shape[0] > rows:
                problems.append(
                    f"{label} has different numbers of rows in its vocabulary's matrices: "
                    f"{rows} in {name}, {info.shape[0]} in {other}"
                )
    return problems


def _name_problems(
    tensors: Mapping[str, Mapping[str, TensorInfo]], directories: Mapping[str, Path]
) -> list[str]:
    layouts = {label: _expert_layout(of_model) for label, of_model in tensors.items()}
    problems, everything = [], sorted(set().union(*tensors.values()), key=natural)
    if len(set(layouts.values()) - {None}) > 1:
        everything = [name for name in everything if ".experts." not in name]
        problems.append(
            f"the experts are stored {_listed(layouts)}; load and save all models with one version "
            "of transformers"
        )
    for name in everything:
        without = [label for label, of_model in tensors.items() if name not in of_model]
        if without:
            found = [unlisted_in(directories[label], name) for label in without]
            hints = [f" ({file} holds it: add it to the index there)" for file in found if file]
            problems.append(f"{name} is missing in {' and '.join(without)}{''.join(hints[:1])}")
    return problems


def _expert_layout(names: Iterable[str]) -> str | None:
    """How a model stores its experts; None if it has none."""
    experts = [name for name in names if ".experts." in name]
    if not experts:
        return None
    return "one by one" if any(_ONE_EXPERT.search(name) for name in experts) else "together"


def _shape_problems(tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Shapes that differ, except in vocabulary rows, and types without arithmetic."""
    problems = []
    for name in sorted(
        set.intersection(*(set(of_model) for of_model in tensors.values())), key=natural
    ):
        infos = {label: of_model[name] for label, of_model in tensors.items()}
        by_token = is_by_token(name)
        if len({info.shape[1:] if by_token else info.shape for info in infos.values()}) > 1:
            problems.append(
                f"{name} has shapes "
                + _listed({label: info.shape for label, info in infos.items()})
            )
        floats = {info.dtype in FLOATS for info in infos.values() if info.dtype != "F64"}
        if floats == {True, False} or any(info.dtype.startswith("F8") for info in infos.values()):
            problems.append(
                f"{name} has types " + _listed({label: info.dtype for label, info in infos.items()})
            )
    return problems


def _double_problems(tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """One sentence for all tensors in float64, for which there is no arithmetic here."""
    doubles = {
        label: found
        for label, of_model in tensors.items()
        if (found := [name for name, info in of_model.items() if info.dtype == "F64"])
    }
    if not doubles:
        return []
    counts = _listed({label: f"{len(found)} tensors" for label, found in doubles.items()})
    first = next(iter(doubles.values()))[0]
    return [
        f"{counts} ({first}, ...) are stored as float64; convert them to bfloat16 or float32 "
        "(`AutoModelForCausalLM.from_pretrained(DIR, dtype='float32').save_pretrained(OUT)`)"
    ]


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{value} in {label}" for label, value in values.items())
