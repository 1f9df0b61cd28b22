"""What a merge will do with every tensor, and what stands against it; only headers and tokenizers are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpoint.dtypes import FLOATS, TORCH_NAMES
from checkpoint.reader import Checkpoint, TensorInfo
from checkpoint.token_changes import TokenChanges
from checkpoint.tokenizer import TokenizerFiles
from checkpoint.vocabulary import MAP_FILE, VocabularyMap
from checkpoint.writer import Layout, TensorSpec, beside, check_free, check_room, natural
from core.errors import UserError
from core.models import model_directory
from core.progress import say
from merge.align import (
    RowAlignment,
    add_constituents,
    align_by_position,
    align_rows,
    check_map,
    check_nothing_is_lost,
    check_rows,
)
from merge.chat_format import ChatFormat, read_format
from merge.config import MergeConfig, VectorConfig
from merge.rules import Treatment, check_rules, count_layers, is_tied, kind_of, model_tensors, treatment_of
from merge.rules import vocabulary_rows as count_rows
from merge.tokens import output_tokens
from merge.vectors import Extracted, Pair, Vector, read_description

_SHOWN_PROBLEMS = 5


class RefusedError(UserError):
    """Everything that stands against a merge, as one sentence and as a list."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        shown = "; ".join(problem.rstrip(".") for problem in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        super().__init__(f"{shown} (and {more} more)." if more > 0 else f"{shown}.")


@dataclass(frozen=True)
class MergeInputs:
    """The directories of a merge. The first vector is the pair `base` and `chat`, or `vector` (then without `chat`).

    `tokenizer` holds CPT's tokenizer and its vocabulary map, if it has one.
    """

    cpt: Path
    base: Path | None
    chat: Path | None
    tokenizer: Path
    vector: Path | None = None


@dataclass(frozen=True)
class Tokenizers:
    """A vector's two tokenizers."""

    base: TokenizerFiles
    chat: TokenizerFiles


@dataclass(frozen=True)
class PlannedVector:
    """A vector, and how its rows meet the output's."""

    label: str
    source: Vector
    rows: RowAlignment


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
    """The whole merge. `cpt` gives names and shapes; its values may come from elsewhere (the hook).

    It holds what was decided by the tokenizers, not their vocabularies, which take more memory than the merge.
    """

    config: MergeConfig
    cpt: Checkpoint
    vectors: list[PlannedVector]
    tokenizer: Path
    changes: TokenChanges | None  # None where rows meet by position
    format: ChatFormat
    tensors: list[PlannedTensor]

    @property
    def rows(self) -> int:
        """Rows of the output's matrices."""
        return self.chat.rows.rows

    @property
    def chat(self) -> PlannedVector:
        """The first vector: its chat model's format becomes the output's."""
        return self.vectors[0]

    @property
    def cpt_rows(self) -> int:
        """Rows of CPT's matrices; the output's may be more."""
        return count_rows(self.cpt)

    def models(self) -> dict[str, Checkpoint]:
        """Every checkpoint that is read."""
        found = {"cpt": self.cpt}
        for number, vector in enumerate(self.vectors):
            suffix = "" if number == 0 else f" of vector {number + 1}"
            found |= {label + suffix: model for label, model in vector.source.models.items()}
        return found

    def layout(self) -> Layout:
        """The files of the output."""
        return Layout.by_size([tensor.spec for tensor in self.tensors], self.config.shard_bytes)


def plan(config: MergeConfig, inputs: MergeInputs, out: Path | None = None) -> MergePlan:
    """Plan a merge; with `out`, the output is looked at as well.

    Raises `RefusedError` with everything that stands against it: names, shapes, types, tokens, rules, output, disk.
    """
    cpt, sources = _open(config, inputs)
    models = {"cpt": cpt}
    for number, source in enumerate(sources):
        suffix = "" if number == 0 else f" of vector {number + 1}"
        models |= {label + suffix: model for label, model in source.models.items()}
    tensors = {label: _used_tensors(model) for label, model in models.items()}
    names = sorted(tensors["cpt"], key=natural)
    problems = fit_problems(models, tensors) + _lacking_problems(config, sources)
    with _collected(problems):
        check_rules(names, config)
    vectors: list[PlannedVector] = []
    with _collected(problems):
        changes, format, vectors = _align(config, cpt, inputs.tokenizer, sources)
    if out is not None:
        problems += _output_problems(models, out)
    if problems:
        raise RefusedError(problems)
    rows, layers = vectors[0].rows.rows, count_layers(names)
    planned = [_planned(tensors["cpt"][name], sources[0], rows, config, layers) for name in names]
    the_plan = MergePlan(config, cpt, vectors, inputs.tokenizer, changes, format, planned)
    if out is not None:
        check_output(the_plan, out)
    return the_plan


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def _open(config: MergeConfig, inputs: MergeInputs) -> tuple[Checkpoint, list[Vector]]:
    """All checkpoints. Raises `RefusedError` naming each that cannot be opened."""
    problems: list[str] = []
    cpt, sources = None, list[Vector]()
    with _collected(problems):
        cpt = Checkpoint.open(inputs.cpt)
        _ = cpt.config
    with _collected(problems):
        sources.append(_open_vector(inputs.vector, inputs.base, inputs.chat))
    for vector in config.vectors:
        with _collected(problems):
            sources.append(_open_vector(*_directories(vector)))
    if problems or cpt is None:
        raise RefusedError(problems)
    return cpt, sources


def _directories(vector: VectorConfig) -> tuple[Path | None, Path | None, Path | None]:
    vector_directory = Path(vector.vector).expanduser() if vector.vector else None
    base = model_directory(vector.base) if vector.base else None
    return vector_directory, base, model_directory(vector.chat) if vector.chat else None


def _open_vector(vector: Path | None, base: Path | None, chat: Path | None) -> Vector:
    if vector is not None:
        return Extracted.open(vector, base)
    if base is None or chat is None:
        raise UserError("a chat vector needs both a base and a chat model, or a vector's directory; give them.")
    pair = Pair(Checkpoint.open(base), Checkpoint.open(chat))
    _ = pair.base.config, pair.chat.config
    return pair


def _used_tensors(model: Checkpoint) -> dict[str, TensorInfo]:
    found = model_tensors(model)
    unused = [name for name in model.tensors if name.endswith("rotary_emb.inv_freq")]
    if unused:
        say(f"merge: {model.directory} stores {len(unused)} rotary tables, which loaders compute anew; left out")
    return found


def open_fitting(directories: Mapping[str, Path]) -> dict[str, Checkpoint]:
    """Open checkpoints that are to be computed with, tensor by tensor.

    Raises `RefusedError` with all problems: architectures, names, shapes, types.
    """
    models = {label: Checkpoint.open(directory) for label, directory in directories.items()}
    problems = fit_problems(models, {label: model_tensors(model) for label, model in models.items()})
    if problems:
        raise RefusedError(problems)
    return models


def fit_problems(models: Mapping[str, Checkpoint], tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Why tensors of these models cannot be computed with one another."""
    problems = [*_architecture_problems(models), *_name_problems(tensors), *_shape_problems(tensors)]
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
        by_token = is_by_token(name)
        if len({info.shape[1:] if by_token else info.shape for info in infos.values()}) > 1:
            problems.append(f"{name} has shapes " + _listed({label: info.shape for label, info in infos.items()}))
        floats = {info.dtype in FLOATS for info in infos.values()}
        if floats == {True, False} or any(info.dtype.startswith(("F8", "F64")) for info in infos.values()):
            problems.append(f"{name} has types " + _listed({label: info.dtype for label, info in infos.items()}))
    return problems


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{value} in {label}" for label, value in values.items())


def _lacking_problems(config: MergeConfig, sources: list[Vector]) -> list[str]:
    """What an extracted vector cannot do, since it holds neither base nor chat."""
    first = sources[0]
    if not isinstance(first, Extracted):
        return []
    problems = []
    if any(rule.action == "replace" for rule in config.rules):
        problems.append(
            f"a rule replaces by the chat model, which {first.stored.directory} does not hold; use the pair"
        )
    if first.base is None and (config.gate or any(rule.gate for rule in config.rules)):
        problems.append("the gate compares CPT with the base; give the base beside the vector")
    return problems


def _align(
    config: MergeConfig, cpt: Checkpoint, tokenizer: Path, sources: list[Vector]
) -> tuple[TokenChanges | None, ChatFormat, list[PlannedVector]]:
    """How the tokenizer changes, the chat format, and each vector with its rows aligned to the output's."""
    extended = TokenizerFiles.read(tokenizer)
    pairs = [pair for pair in map(_tokenizers, sources) if pair is not None]
    if extended is None or len(pairs) < len(sources):
        format = read_format(sources[0].base_directory, sources[0].chat_directory, None, None, None)
        return None, format, _by_position(cpt, sources)
    map_of_rows = VocabularyMap.load(tokenizer) if (tokenizer / MAP_FILE).is_file() else None
    check_rows(extended, count_rows(cpt))
    tokens = output_tokens(extended, pairs[0].base, pairs[0].chat, count_rows(cpt), config.token_map)
    check_map(map_of_rows, tokens, pairs[0].chat)
    if config.new_rows == "constituents" and map_of_rows is None:
        raise UserError(
            f"{tokenizer} holds no vocabulary map, which merge.new_rows: constituents needs; set new_rows: keep."
        )
    vectors = []
    for number, (source, pair) in enumerate(zip(sources, pairs, strict=True)):
        _check_tokenizers(source, pair)
        check_nothing_is_lost(extended.directory, tokens, pair.base, pair.chat, number == 0)
        rows = align_rows(tokens, pair.base, pair.chat, map_of_rows, number == 0)
        if config.new_rows == "constituents" and map_of_rows is not None:
            add_constituents(rows, map_of_rows, tokens, pair.base, pair.chat)
        vectors.append(PlannedVector(_label(number), source, rows))
    format = read_format(sources[0].base_directory, sources[0].chat_directory, pairs[0].base, pairs[0].chat, tokens)
    return tokens.changes, format, vectors


def _label(number: int) -> str:
    return "chat vector" if number == 0 else f"vector {number + 1}"


def _tokenizers(source: Vector) -> Tokenizers | None:
    base, chat = TokenizerFiles.read(source.base_directory), TokenizerFiles.read(source.chat_directory)
    return Tokenizers(base, chat) if base and chat else None


def _check_tokenizers(source: Vector, tokenizers: Tokenizers) -> None:
    rows = {label: count_rows(model) for label, model in source.models.items()}
    if "base" in rows:
        check_rows(tokenizers.base, rows["base"])
    check_rows(tokenizers.chat, rows["chat"] if "chat" in rows else rows["vector"])


def _by_position(cpt: Checkpoint, sources: list[Vector]) -> list[PlannedVector]:
    """Raises `UserError` where the numbers of rows differ."""
    rows = {"cpt": count_rows(cpt)}
    for source in sources:
        rows |= {label: count_rows(model) for label, model in source.models.items()}
    if len(set(rows.values())) > 1:
        *others, last = (f"{count} ({label})" for label, count in rows.items())
        raise UserError(
            f"the embeddings have {', '.join(others)} and {last} rows, which only each model's tokenizer can match; "
            "put it beside the weights where it is missing."
        )
    say(f"merge: a directory has no tokenizer; the {rows['cpt']} rows of the models are taken as equal")
    aligned = align_by_position(rows["cpt"])
    return [PlannedVector(_label(number), source, aligned) for number, source in enumerate(sources)]


def is_by_token(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return kind_of(name) in ("embed", "head")


def _planned(cpt: TensorInfo, source: Vector, rows: int, config: MergeConfig, layers: int) -> PlannedTensor:
    by_token = is_by_token(cpt.name)
    shape = (rows, *cpt.shape[1:]) if by_token else cpt.shape
    if cpt.dtype not in FLOATS:
        return PlannedTensor(TensorSpec(cpt.name, cpt.dtype, cpt.shape), None, by_token)
    dtype = TORCH_NAMES[config.dtype] if config.dtype else _base_type(source, cpt.name)
    return PlannedTensor(TensorSpec(cpt.name, dtype, shape), treatment_of(cpt.name, config, layers), by_token)


def _base_type(source: Vector, name: str) -> str:
    if isinstance(source, Extracted):
        return str(read_description(source.stored.directory)["base_types"][name])
    return source.models["base"].tensors[name].dtype


def check_output(the_plan: MergePlan, out: Path) -> None:
    """Raise `RefusedError` for an output that is in use, or an input, or a disk without room for it."""
    problems = _output_problems(the_plan.models(), out)
    if not beside(out).exists():  # an unfinished merge has taken its room already
        with _collected(problems):
            check_room(out, the_plan.layout())
    if problems:
        raise RefusedError(problems)


def _output_problems(models: Mapping[str, Checkpoint], out: Path) -> list[str]:
    inputs = {model.directory.resolve(): label for label, model in models.items()}
    if out.resolve() in inputs:
        return [f"the output {out} is the {inputs[out.resolve()]} model itself; choose another directory"]
    problems: list[str] = []
    with _collected(problems):
        check_free(out)
    return problems


def describe_rule(the_plan: MergePlan, tensor: PlannedTensor) -> str:
    """`+ 0.7 vector`, `keep`, `chat's`, `copy`."""
    rule = tensor.treatment
    if rule is None:
        return "copy"
    if rule.action != "add":
        return {"skip": "keep", "replace": "chat's"}[rule.action]
    method = "" if the_plan.config.method == "add" else f"{the_plan.config.method} {the_plan.config.density:g}: "
    terms = " ".join(
        f"{ratio:+.4g} {vector.label}" for ratio, vector in zip(rule.ratios, the_plan.vectors, strict=True)
    )
    return method + terms + (" gated" if rule.gate else "")


def bytes_read(the_plan: MergePlan, tensor: PlannedTensor) -> int:
    """Bytes of the tensor in all inputs that its rule needs."""
    needed = [the_plan.cpt.tensors[tensor.name]]
    if tensor.treatment and tensor.treatment.action != "skip":
        for vector in the_plan.vectors:
            needed += [model.tensors[tensor.name] for model in vector.source.models.values()]
    return sum(info.nbytes for info in needed)


def elements(tensor: PlannedTensor) -> int:
    """Number of elements of the output's tensor."""
    return math.prod(tensor.spec.shape)
