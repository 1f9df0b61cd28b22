"""What a merge will do with every tensor, and what stands against it; only headers and tokenizers are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoint.dtypes import FLOATS, TORCH_NAMES
from checkpoint.reader import Checkpoint, TensorInfo
from checkpoint.tokenizer import TokenizerFiles
from checkpoint.vocabulary import MAP_FILE, VocabularyMap
from checkpoint.writer import Layout, TensorSpec, natural
from core.errors import UserError
from core.progress import say
from merge.align import RowAlignment, RowCounts, Vocabularies, align_by_position, align_rows
from merge.config import MergeConfig
from merge.rules import Treatment, check_rules, is_tied, kind_of, model_tensors, treatment_of, vocabulary_rows

_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output. `treatment` is None for what is no float: it is copied from CPT."""

    spec: TensorSpec
    treatment: Treatment | None
    by_token: bool  # its rows are those of the vocabulary

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.spec.name


@dataclass(frozen=True)
class MergePlan:
    """The whole merge. `cpt` gives names and shapes; its values may come from elsewhere (the hook)."""

    config: MergeConfig
    cpt: Checkpoint
    base: Checkpoint
    chat: Checkpoint
    tokenizer: Path
    vocabularies: Vocabularies | None
    rows: RowAlignment
    tensors: list[PlannedTensor]

    def layout(self) -> Layout:
        """The files of the output."""
        return Layout.by_size([tensor.spec for tensor in self.tensors], self.config.shard_bytes)


def plan(config: MergeConfig, cpt: Path, base: Path, chat: Path, tokenizer: Path) -> MergePlan:
    """Plan a merge. `base` has its own tokenizer, `tokenizer` the extended one and its vocabulary map, if it has one.

    Raises `UserError` with the first problems in one list: names, shapes, types, tokens, rules.
    """
    models = open_fitting({"cpt": cpt, "base": base, "chat": chat})
    tensors = {label: model_tensors(model) for label, model in models.items()}
    names = sorted(tensors["cpt"], key=natural)
    check_rules(names, config)
    vocabularies = _read_vocabularies(tokenizer, base, chat)
    rows = _align(vocabularies, RowCounts(*(vocabulary_rows(model) for model in models.values())), config)
    planned = [_planned(tensors["cpt"][name], tensors["base"][name], config) for name in names]
    return MergePlan(config, models["cpt"], models["base"], models["chat"], tokenizer, vocabularies, rows, planned)


def open_fitting(directories: Mapping[str, Path]) -> dict[str, Checkpoint]:
    """Open checkpoints that are to be computed with, tensor by tensor.

    Raises `UserError` with the first problems in one list: architectures, names, shapes, types.
    """
    models = {label: Checkpoint.open(directory) for label, directory in directories.items()}
    tensors = {label: model_tensors(model) for label, model in models.items()}
    problems = [*_architecture_problems(models), *_name_problems(tensors), *_shape_problems(tensors)]
    if problems:
        more = f" (and {len(problems) - _SHOWN_PROBLEMS} more)" if len(problems) > _SHOWN_PROBLEMS else ""
        places = " and ".join(f"{directory} ({label})" for label, directory in directories.items())
        raise UserError(f"{places} do not fit together: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}.")
    return models


def _planned(cpt: TensorInfo, base: TensorInfo, config: MergeConfig) -> PlannedTensor:
    by_token = kind_of(cpt.name) in ("embed", "head")
    if cpt.dtype not in FLOATS:
        return PlannedTensor(TensorSpec(cpt.name, cpt.dtype, cpt.shape), None, by_token)
    dtype = TORCH_NAMES[config.dtype] if config.dtype else base.dtype
    return PlannedTensor(TensorSpec(cpt.name, dtype, cpt.shape), treatment_of(cpt.name, config), by_token)


def _architecture_problems(models: Mapping[str, Checkpoint]) -> list[str]:
    problems = []
    types = {label: model.config.get("model_type") for label, model in models.items()}
    if len(set(types.values())) > 1:
        problems.append("architectures " + _listed(types))
    tied = {label: is_tied(model) for label, model in models.items()}
    if len(set(tied.values())) > 1:
        problems.append("tied head " + _listed(tied))
    return problems


def _name_problems(tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    everything = sorted(set().union(*tensors.values()), key=natural)
    return [
        f"{name} is missing in {' and '.join(label for label in tensors if name not in tensors[label])}"
        for name in everything
        if any(name not in of_model for of_model in tensors.values())
    ]


def _shape_problems(tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Shapes differ (but for the number of rows of a vocabulary matrix), or a type cannot be computed with."""
    problems = []
    for name in sorted(set.intersection(*(set(of_model) for of_model in tensors.values())), key=natural):
        infos = {label: of_model[name] for label, of_model in tensors.items()}
        by_token = kind_of(name) in ("embed", "head")
        if len({info.shape[1:] if by_token else info.shape for info in infos.values()}) > 1:
            problems.append(f"{name} has shapes " + _listed({label: info.shape for label, info in infos.items()}))
        floats = {info.dtype in FLOATS for info in infos.values()}
        if floats == {True, False} or any(info.dtype.startswith(("F8", "F64")) for info in infos.values()):
            problems.append(f"{name} has types " + _listed({label: info.dtype for label, info in infos.items()}))
    return problems


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{value} in {label}" for label, value in values.items())


def _read_vocabularies(tokenizer: Path, base: Path, chat: Path) -> Vocabularies | None:
    """None where one of the directories holds no tokenizer: then rows can only meet by position."""
    files = [TokenizerFiles.read(directory) for directory in (tokenizer, base, chat)]
    extended, of_base, of_chat = files
    if extended is None or of_base is None or of_chat is None:
        return None
    has_map = (tokenizer / MAP_FILE).is_file()
    return Vocabularies(extended, of_base, of_chat, VocabularyMap.load(tokenizer) if has_map else None)


def _align(vocabularies: Vocabularies | None, rows: RowCounts, config: MergeConfig) -> RowAlignment:
    if vocabularies is not None:
        return align_rows(vocabularies, rows, config.new_rows)
    if len({rows.cpt, rows.base, rows.chat}) > 1:
        raise UserError(
            f"the embeddings have {rows.cpt} (cpt), {rows.base} (base) and {rows.chat} (chat) rows, which only each "
            "model's tokenizer can match; put it beside the weights where it is missing."
        )
    say(f"merge: a directory has no tokenizer; the {rows.cpt} rows of the three models are taken as equal")
    return align_by_position(rows)


def describe(merge_plan: MergePlan) -> list[tuple[str, str, str, str, str]]:
    """The plan as rows of a table: rule, kind, output type, tensors, elements."""
    groups: Counter[tuple[str, str, str]] = Counter()
    elements: Counter[tuple[str, str, str]] = Counter()
    layout = merge_plan.layout()
    for tensor in merge_plan.tensors:
        rule = tensor.treatment
        action = "copy" if rule is None else f"add {rule.ratio:g} x vector" if rule.action == "add" else rule.action
        group = (action, kind_of(tensor.name), tensor.spec.dtype)
        groups[group] += 1
        elements[group] += layout.tensors[tensor.name].size
    return [(*group, f"{groups[group]:,}", f"{elements[group]:,}") for group in groups]
