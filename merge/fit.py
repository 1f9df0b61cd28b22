"""Whether checkpoints fit together, tensor by tensor. All problems are collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cpt_merge.checkpoint.dtypes import FLOATS
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import is_by_token, is_tied, model_tensors
from cpt_merge.checkpoint.writer import natural
from cpt_merge.core.errors import UserError

_SHOWN_PROBLEMS = 5


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
    models = {label: Checkpoint.open(directory) for label, directory in directories.items()}
    problems = fit_problems(
        models, {label: model_tensors(model) for label, model in models.items()}
    )
    if problems:
        raise RefusedError(problems)
    return models


def fit_problems(
    models: Mapping[str, Checkpoint], tensors: Mapping[str, Mapping[str, TensorInfo]]
) -> list[str]:
    """Why the tensors of these models cannot be combined."""
    problems = [
        *_architecture_problems(models),
        *_row_problems(tensors),
        *_name_problems(tensors),
        *_shape_problems(tensors),
    ]
    if problems:
        places = " and ".join(f"{model.directory} ({label})" for label, model in models.items())
        problems[0] = f"{places} do not fit together: {problems[0]}"
    return problems


def _architecture_problems(models: Mapping[str, Checkpoint]) -> list[str]:
    problems = []
    types = {label: model.config.get("model_type") for label, model in models.items()}
    if len(set(types.values())) > 1:
        problems.append("architectures " + _listed(types))
    tied = {label: is_tied(model) for label, model in models.items()}
    if len(set(tied.values())) > 1:
        problems.append("tied head " + _listed(tied))
    return problems


def _row_problems(tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Embedding and head of one model must have the same number of rows."""
    problems = []
    for label, of_model in tensors.items():
        rows = {
            name: info.shape[0]
            for name, info in of_model.items()
            if is_by_token(name) and info.shape
        }
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{count} in {name}" for name, count in rows.items())
            problems.append(
                f"{label} has different numbers of rows in its vocabulary's matrices: {listed}"
            )
    return problems


def _name_problems(tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    everything = sorted(set().union(*tensors.values()), key=natural)
    return [
        f"{name} is missing in {' and '.join(without)}"
        for name in everything
        if (without := [label for label, of_model in tensors.items() if name not in of_model])
    ]


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
        floats = {info.dtype in FLOATS for info in infos.values()}
        if floats == {True, False} or any(
            info.dtype.startswith(("F8", "F64")) for info in infos.values()
        ):
            problems.append(
                f"{name} has types " + _listed({label: info.dtype for label, info in infos.items()})
            )
    return problems


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{value} in {label}" for label, value in values.items())
