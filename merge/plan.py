"""What a merge does with every tensor, and what prevents it. Reads only headers and tokenizers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import FLOATS, TORCH_NAMES
from cpt_merge.checkpoint.loaded import open_model, with_head
from cpt_merge.checkpoint.positions import Extend
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import (
    OTHER_MODALITIES,
    count_layers,
    embedding_of,
    heads_of,
    is_by_token,
    kind_of,
    vocabulary_rows,
)
from cpt_merge.checkpoint.text_only import text_only
from cpt_merge.checkpoint.token_changes import TokenChanges
from cpt_merge.checkpoint.tokenizer_files import tokenizer_directory
from cpt_merge.checkpoint.writer import CheckpointLayout, TensorSpec, check_room, natural
from cpt_merge.core.artifact import Staging
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
from cpt_merge.core.progress import say
from cpt_merge.merge.chat_format import ChatFormat
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.fit import (
    RefusedError,
    collected,
    fit_problems,
    missing_head,
    stored_like,
)
from cpt_merge.merge.rows import Role, RowAlignment, meet
from cpt_merge.merge.rules import (
    Treatment,
    action_of,
    rule_problems,
    skipped_by_default,
    treatment_of,
)
from cpt_merge.merge.vectors import Extracted, Pair, Rows, Towards, Vector


@dataclass(frozen=True)
class MergeInputs:
    """The directories of a merge.

    The first vector is the pair `base` and `chat`, or `vector` without `chat`. `tokenizer` holds
    CPT's tokenizer, with its vocabulary map if it has one; None: they are in `cpt`.
    """

    cpt: Path
    base: Path | None = None
    chat: Path | None = None
    tokenizer: Path | None = None
    vector: Path | None = None
    text_only: bool = False  # CPT is the text decoder of the wrapper in `cpt`
    has_format: bool = False  # CPT has the chat format's rows, trained further: they are kept
    notes: tuple[str, ...] = ()  # sentences for the model card: how CPT came about
    extend: Extend | None = None  # for a CPT whose config.json has not yet the positions of the end

    @property
    def tokenizer_directory(self) -> Path:
        """Where CPT's tokenizer is."""
        return self.tokenizer or self.cpt


@dataclass(frozen=True)
class PlannedVector:
    """A vector, and how its rows are aligned with the output's."""

    label: str
    source: Vector
    rows: RowAlignment


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output. `treatment` is None for integers, which are copied from CPT."""

    spec: TensorSpec
    treatment: Treatment | None
    by_token: bool  # its rows are those of the vocabulary

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.spec.name

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.spec.shape)

    @property
    def gated(self) -> bool:
        """Whether the gate lowers the vector here."""
        return self.treatment is not None and self.treatment.gate

    @property
    def gets_vector(self) -> bool:
        """Whether the vectors are added to it."""
        return self.treatment is not None and self.treatment.action == "add"


@dataclass(frozen=True)
class MergePlan:
    """The whole merge. `cpt` gives names and shapes; its values may come from elsewhere.

    The plan holds what follows from the tokenizers, not their vocabularies, which need more memory
    than the merge.
    """

    config: MergeConfig
    cpt: Checkpoint
    vectors: list[PlannedVector]
    tokenizer: Path
    changes: TokenChanges
    format: ChatFormat
    tensors: list[PlannedTensor]
    notes: tuple[str, ...] = ()  # as in `MergeInputs`

    @property
    def rows(self) -> int:
        """Rows of the output's matrices."""
        return self.chat.rows.rows

    @property
    def chat(self) -> PlannedVector:
        """The first vector: its chat model's format becomes the output's."""
        return self.vectors[0]

    @property
    def tied_head(self) -> str | None:
        """The head of the output if CPT has none of its own: there, the embedding is the head."""
        embedding = self.cpt.tensors[embedding_of(self.cpt) or ""]
        places = {name: self.cpt.tensors[name] for name in heads_of(self.cpt)}
        alike = [
            name for name, info in places.items() if replace(info, name=embedding.name) == embedding
        ]
        return alike[0] if alike else None

    @property
    def cpt_rows(self) -> int:
        """Rows of CPT's matrices; the output's may be more."""
        return vocabulary_rows(self.cpt)

    @cached_property
    def by_name(self) -> dict[str, PlannedTensor]:
        """Name -> tensor."""
        return {tensor.name: tensor for tensor in self.tensors}

    def seen_whole(self) -> list[PlannedTensor]:
        """The tensors that must be looked at as a whole before their first element is merged."""
        whole = self.config.method in ("ties", "slerp")
        return [tensor for tensor in self.tensors if tensor.gated or (whole and tensor.gets_vector)]

    def models(self) -> dict[str, Checkpoint]:
        """Every checkpoint that is read."""
        return _labelled(self.cpt, [vector.source for vector in self.vectors])

    def layout(self) -> CheckpointLayout:
        """The files of the output."""
        return CheckpointLayout.by_size(
            [tensor.spec for tensor in self.tensors], self.config.shard_bytes
        )


def plan(config: MergeConfig, inputs: MergeInputs, out: Path | None = None) -> MergePlan:
    """Plan a merge; with `out`, the output is checked as well.

    Raises `RefusedError` with everything that prevents it: names, shapes, types, tokens, rules,
    output, disk.
    """
    cpt, sources = _with_heads(*_with_names(*_open(config, inputs)))
    models = _labelled(cpt, sources)
    tokenizer = inputs.tokenizer_directory
    if tokenizer == inputs.cpt:
        tokenizer = tokenizer_directory(cpt)
    names = sorted(cpt.tensors, key=natural)
    needed = {name for name in names if action_of(name, config) != "skip"}
    problems = fit_problems(models, lambda name: name in needed or _is_lost(name, cpt))
    problems += _lacking_problems(config, sources) + rule_problems(names, config)
    meeting = None
    with collected(problems):
        meeting = meet(config, models, tokenizer, sources, inputs.has_format)
    if meeting is not None and not problems:
        problems += [
            problem
            for source, rows in zip(sources, meeting.rows, strict=True)
            for problem in short_table_problems(cpt, source, rows)
        ]
    if out is not None:
        problems += _output_problems(models, out)
    if problems or meeting is None:
        raise RefusedError(problems)
    vectors = [
        PlannedVector("chat vector" if number == 0 else f"vector {number + 1}", source, rows)
        for number, (source, rows) in enumerate(zip(sources, meeting.rows, strict=True))
    ]
    rows, layers = meeting.rows[0].rows, count_layers(names)
    planned = [_planned(cpt, name, sources[0], rows, config, layers) for name in names]
    _say_skipped(names, config, models)
    the_plan = MergePlan(
        config, cpt, vectors, tokenizer, meeting.changes, meeting.format, planned, inputs.notes
    )
    if out is not None:
        check_output(the_plan, out)
    return the_plan


def plan_again(the_plan: MergePlan, config: MergeConfig) -> MergePlan:
    """The same models and rows with other ratios and rules.

    Raises `RefusedError` for rules without effect.
    """
    names = [tensor.name for tensor in the_plan.tensors]
    problems = rule_problems(names, config)
    if problems:
        raise RefusedError(problems)
    layers = count_layers(names)
    tensors = [
        replace(tensor, treatment=treatment_of(tensor.name, config, layers))
        if tensor.treatment
        else tensor
        for tensor in the_plan.tensors
    ]
    return replace(the_plan, config=config, tensors=tensors)


def _labelled(cpt: Checkpoint, sources: Sequence[Vector]) -> dict[str, Checkpoint]:
    """Every checkpoint that is read, by its name in messages."""
    found = {"cpt": cpt}
    for number, source in enumerate(sources):
        suffix = "" if number == 0 else f" of vector {number + 1}"
        found |= {label + suffix: model for label, model in source.models.items()}
    return found


def _open(config: MergeConfig, inputs: MergeInputs) -> tuple[Checkpoint, list[Vector]]:
    """Open all checkpoints. Raises `RefusedError` naming each that cannot be opened."""
    problems: list[str] = []
    cpt, sources = None, list[Vector]()
    with collected(problems):
        cpt = open_model(inputs.cpt, inputs.base)
        if inputs.text_only:
            cpt = text_only(cpt)
        if inputs.extend:
            cpt = replace(cpt, stated=inputs.extend(cpt.config))
    with collected(problems):
        sources.append(_open_first(config, inputs))
    for one in config.vectors:
        with collected(problems):
            vector = Path(one.vector).expanduser() if one.vector else None
            base, chat = (model_directory(name) if name else None for name in (one.base, one.chat))
            sources.append(_open_vector(vector, base, chat))
    if problems or cpt is None:
        raise RefusedError(problems)
    return cpt, sources


def _open_first(config: MergeConfig, inputs: MergeInputs) -> Vector:
    """The first vector, or the chat model itself for a method without a base."""
    if not config.interpolates:
        return _open_vector(inputs.vector, inputs.base, inputs.chat)
    if inputs.chat is None:
        raise UserError(f"{config.method} leads to the chat model; give it.")
    return Towards(open_model(inputs.chat), inputs.tokenizer_directory)


def _open_vector(vector: Path | None, base: Path | None, chat: Path | None) -> Vector:
    if vector is not None:
        return Extracted.open(vector, base)
    if base is None or chat is None:
        raise UserError(
            "a chat vector needs both a base and a chat model, or a vector's directory; give them."
        )
    return Pair(open_model(base), open_model(chat, base))


def _with_heads(cpt: Checkpoint, sources: list[Vector]) -> tuple[Checkpoint, list[Vector]]:
    """All models with a head if one of them has one; the head of a tied model is its embedding."""
    head = missing_head(_labelled(cpt, sources))
    if head is None:
        return cpt, sources
    changed = [source.changed(lambda model: with_head(model, head)) for source in sources]
    return with_head(cpt, head), changed


def _with_names(cpt: Checkpoint, sources: list[Vector]) -> tuple[Checkpoint, list[Vector]]:
    """All models stored like CPT."""
    return cpt, [source.changed(lambda model: stored_like(model, cpt)) for source in sources]


def _is_lost(name: str, cpt: Checkpoint) -> bool:
    """Whether the output would lack a tensor of base or chat that belongs to the text decoder."""
    return name not in cpt.tensors and kind_of(name) not in OTHER_MODALITIES


def _say_skipped(names: list[str], config: MergeConfig, models: Mapping[str, Checkpoint]) -> None:
    """Say which towers and projectors get no vector, and which the output does not have."""
    skipped = skipped_by_default(names, config)
    if skipped:
        listed = " and ".join(f"{count} of {kind}" for kind, count in skipped.items())
        kinds = ", ".join(skipped)
        say(
            f"merge: {sum(skipped.values())} tensors outside the text decoder ({listed}) stay "
            f"CPT's; a rule with kinds: [{kinds}] and action: add gives them the vector"
        )
    for label, model in models.items():
        lost = [name for name in model.tensors if name not in models["cpt"].tensors]
        if lost:
            say(
                f"merge: {len(lost)} tensors of {label} that are no part of CPT are left out "
                f"({lost[0]}, ...)"
            )


def short_table_problems(cpt: Checkpoint, source: Vector, rows: RowAlignment) -> list[str]:
    """A sentence for each matrix of the vocabulary whose rows do not reach all of its tokens.

    Some have fewer rows than the embedding: the head of Mllama, the tables for the layers of
    Gemma 3n. They are merged as long as no token needs another row.
    """
    whole, problems = vocabulary_rows(cpt), []
    for name, info in cpt.tensors.items():
        if not is_by_token(name) or any(name not in m.tensors for m in source.models.values()):
            continue
        counts = {label: model.tensors[name].shape[0] for label, model in source.models.items()}
        others = {label: vocabulary_rows(model) for label, model in source.models.items()}
        if info.shape[0] == whole and counts == others:
            continue
        role = rows.role[: info.shape[0]]
        short = f"{name} has {info.shape[0]} rows where the embedding has {whole}"
        if rows.rows > whole:
            problems.append(f"{short}, and cannot get rows for further tokens; use a CPT model "
                            "whose tokenizer has the chat model's tokens")  # fmt: skip
        elif any(
            _needs_row(rows.base if label == "base" else rows.chat, role, label, count)
            for label, count in counts.items()
        ):
            problems.append(
                f"{short}, and base or chat have fewer than its tokens need; use models of the "
                "same vocabulary"
            )
    return problems


def _lacking_problems(config: MergeConfig, sources: list[Vector]) -> list[str]:
    """What an extracted vector cannot do, because it contains neither base nor chat."""
    first = sources[0]
    if not isinstance(first, Extracted):
        return []
    problems = []
    if any(rule.action == "replace" for rule in config.rules):
        problems.append(
            f"a rule replaces by the chat model, which {first.stored.directory} does not contain; "
            "use the pair"
        )
    if first.base is None and (config.gate or any(rule.gate for rule in config.rules)):
        problems.append(
            "the gate compares CPT with the base; give the base together with the vector"
        )
    return problems


def _needs_row(aligned: Rows, role: NDArray[np.uint8], label: str, count: int) -> bool:
    """Whether a row of the output is aligned with a row that the model's matrix does not have."""
    read = role == Role.SHARED
    if label != "base":
        read |= role == Role.CHAT
    return bool((aligned[: len(role)][read] >= count).any())


def _planned(
    cpt: Checkpoint, name: str, source: Vector, rows: int, config: MergeConfig, layers: int
) -> PlannedTensor:
    info, by_token = cpt.tensors[name], is_by_token(name)
    grows = by_token and info.shape[0] == vocabulary_rows(cpt)
    shape = (rows, *info.shape[1:]) if grows else info.shape
    if info.dtype not in FLOATS:
        return PlannedTensor(TensorSpec(name, info.dtype, info.shape), None, by_token)
    treatment = treatment_of(name, config, layers)
    dtype = TORCH_NAMES[config.dtype] if config.dtype else _base_type(cpt, name, source)
    return PlannedTensor(TensorSpec(name, dtype, shape), treatment, by_token)


def _base_type(cpt: Checkpoint, name: str, source: Vector) -> str:
    """The type of the base's tensor, or CPT's where the base has none."""
    if isinstance(source, Extracted):
        names = [name] if kind_of(name) != "head" else [name, embedding_of(cpt) or name]
        known = (source.base_type(one) for one in names)
        return next((dtype for dtype in known if dtype), cpt.tensors[name].copied_dtype)
    base = source.models.get("base")
    info = base.tensors.get(name) if base else None
    return (info if info and info.dtype in FLOATS else cpt.tensors[name]).copied_dtype


def check_output(the_plan: MergePlan, out: Path) -> None:
    """Raise `RefusedError` if the output is in use, is an input, or does not fit on the disk."""
    problems = _output_problems(the_plan.models(), out)
    if not Staging(out).directory.exists():  # an unfinished merge has its room already
        with collected(problems):
            check_room(out, the_plan.layout())
    if problems:
        raise RefusedError(problems)


def _output_problems(models: Mapping[str, Checkpoint], out: Path) -> list[str]:
    problems: list[str] = []
    for label, model in models.items():
        here, there = out.resolve(), model.directory.resolve()
        if here == there:
            return [f"the output {out} is the {label} model itself; choose another directory"]
        if here.is_relative_to(there) or there.is_relative_to(here):
            return [
                f"the output {out} and the {label} model {there} are inside each other; choose "
                "another directory"
            ]
    with collected(problems):
        Staging(out).check_target()
    return problems


def describe_rule(the_plan: MergePlan, tensor: PlannedTensor) -> str:
    """`+ 0.7 vector`, `keep`, `chat's`, `copy`."""
    rule = tensor.treatment
    if rule is None:
        return "copy"
    if rule.action != "add":
        return {"skip": "keep", "replace": "chat's"}[rule.action]
    config = the_plan.config
    if config.interpolates:
        return f"{config.method} {rule.ratios[0]:.4g} to chat"
    method = "" if config.density is None else f"{config.method} {config.density:g}: "
    terms = " ".join(
        f"{ratio:+.4g} {vector.label}"
        for ratio, vector in zip(rule.ratios, the_plan.vectors, strict=True)
    )
    return method + terms + (" gated" if rule.gate else "")


def bytes_read(the_plan: MergePlan, tensor: PlannedTensor) -> int:
    """Bytes of the tensor in all inputs that its rule needs."""
    needed = [the_plan.cpt.tensors[tensor.name]]
    if tensor.treatment and tensor.treatment.action != "skip":
        for vector in the_plan.vectors:
            needed += [model.tensors[tensor.name] for model in vector.source.models.values()]
    return sum(info.nbytes for info in needed)
