"""`cpt-merge merge`: the stage of a recipe, or a merge of directories without one; its plan; extracting a vector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.checkpoint.vocabulary_map import has_tokenizer
from cpt_merge.core.config import apply_override, parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.models import model_directory
from cpt_merge.core.progress import say
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.fit import RefusedError
from cpt_merge.merge.plan import MergeInputs, MergePlan, bytes_read, describe_rule, plan
from cpt_merge.merge.rows import describe

PLAN_WORD = "plan"


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line. `words` are `[plan] [RECIPE] [key=value ...]`."""

    words: list[str]
    cpt: str | None = None
    base: str | None = None
    chat: str | None = None
    vector: Path | None = None
    tokenizer: Path | None = None
    ratio: str | None = None
    out: Path | None = None
    extract: bool = False

    @property
    def plan_only(self) -> bool:
        """Whether nothing is to be written."""
        return self.words[:1] == [PLAN_WORD]

    @property
    def recipe(self) -> Path | None:
        """The recipe, if one was given."""
        words = self.words[1:] if self.plan_only else self.words
        return Path(words[0]) if words and "=" not in words[0] else None

    @property
    def overrides(self) -> list[str]:
        """What is left of the words."""
        skipped = int(self.plan_only) + int(self.recipe is not None)
        return self.words[skipped:]


def merge(request: Request) -> None:
    """Do what was asked for. Raises `UserError`."""
    if request.recipe is not None:
        if not request.recipe.is_file():
            raise UserError(
                f"recipe {request.recipe} does not exist; settings are written key=value."
            )
        _check_recipe_stands_alone(request)
    if request.extract:
        _extract(request)
    elif request.plan_only:
        show_plan(*_planned(request))
    elif request.recipe is not None:
        _stage(request)
    else:
        _merge_directories(request)


def _check_recipe_stands_alone(request: Request) -> None:
    given = {
        name: getattr(request, name)
        for name in ("cpt", "base", "chat", "vector", "tokenizer", "ratio", "out")
    }
    extra = [f"--{name}" for name, value in given.items() if value is not None] + [
        "--extract"
    ] * request.extract
    if extra:
        raise UserError(
            f"{', '.join(extra)} and a recipe say the same; leave out one (overrides are section.key=value)."
        )


def _stage(request: Request) -> None:
    from cpt_merge.launcher.execute import run_stage
    from cpt_merge.launcher.run import Run
    from cpt_merge.launcher.stages import MERGE

    assert request.recipe is not None
    run_stage(Run.load(request.recipe, request.overrides), MERGE)


def _config(request: Request) -> MergeConfig:
    values: dict[str, Any] = {} if request.ratio is None else {"ratio": request.ratio}
    for override in request.overrides:
        if request.ratio is not None and override.removeprefix("merge.").startswith("ratio="):
            raise UserError(
                f"--ratio {request.ratio} and {override} both set the ratio; leave out one."
            )
        apply_override(values, override.removeprefix("merge."))
    return parse_section(MergeConfig, values, "the merge's settings")


def _inputs(request: Request) -> MergeInputs:
    if request.cpt is None:
        raise UserError(
            "give a RECIPE, or --cpt DIR with --base DIR and --chat DIR (or --vector DIR), and --out DIR."
        )
    if request.vector is None and (request.base is None or request.chat is None):
        raise UserError(
            "give the pair, --base DIR and --chat DIR, or a vector's directory, --vector DIR."
        )
    if request.vector is not None and request.chat is not None:
        raise UserError("--vector and --chat are two sources of one vector; leave out one.")
    cpt = model_directory(request.cpt)
    base = model_directory(request.base) if request.base else None
    chat = model_directory(request.chat) if request.chat else None
    if request.tokenizer is not None and not has_tokenizer(request.tokenizer):
        raise UserError(
            f"--tokenizer {request.tokenizer} holds no tokenizer.json or tokenizer.model; correct it."
        )
    return MergeInputs(cpt, base, chat, request.tokenizer or cpt, request.vector)


def _merge_directories(request: Request) -> None:
    from cpt_merge.merge.files import keep_freed_memory, merge_directories

    inputs = _inputs(request)
    if request.out is None:
        raise UserError("give the directory of the merged model, --out DIR.")
    with _file_errors(request.out):
        keep_freed_memory()
        merge_directories(_config(request), inputs, request.out)
    say(f"merge: done -> {request.out}; talk to it with `cpt-merge chat {request.out}`")


def _extract(request: Request) -> None:
    from cpt_merge.merge.extract import extract
    from cpt_merge.merge.files import keep_freed_memory

    if request.base is None or request.chat is None or request.out is None:
        raise UserError("--extract needs --base DIR, --chat DIR and --out DIR.")
    if request.cpt or request.vector or request.ratio or request.tokenizer or request.plan_only:
        raise UserError(
            "--extract writes chat - base alone; leave out plan, --cpt, --vector, --tokenizer and --ratio."
        )
    config = _config(request)
    shown = config.model_dump(exclude_defaults=True, exclude={"dtype", "shard_size"})
    if shown:
        raise UserError(f"--extract takes dtype and shard_size only; leave out {', '.join(shown)}.")
    base, chat = model_directory(request.base), model_directory(request.chat)
    with _file_errors(request.out):
        keep_freed_memory()
        extract(base, chat, request.out, config.dtype or "float32", config.shard_bytes)


@contextmanager
def _file_errors(out: Path) -> Iterator[None]:
    """What the file system refuses, in one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{error.filename or out}: {reason}; mend that and give the same command again."
        ) from None


def _planned(request: Request) -> tuple[MergeConfig, MergeInputs, Path | None]:
    if request.recipe is None:
        return _config(request), _inputs(request), request.out
    from cpt_merge.launcher.run import Run

    run = Run.load(request.recipe, request.overrides)
    trained = (run.cpt / "config.json").is_file()
    if not trained:
        say(
            f"merge: {run.cpt} is not there yet; planned with the model that training starts from, {run.resized}"
        )
    inputs = MergeInputs(run.cpt if trained else run.resized, run.base, run.chat, run.tokenizer)
    return run.recipe.merge, inputs, None if run.merged.exists() else run.merged


def show_plan(config: MergeConfig, inputs: MergeInputs, out: Path | None) -> None:
    """Print what would be done with every tensor. Raises `UserError` after a list of all that would be refused."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        the_plan = plan(config, inputs, out)
    except RefusedError as refused:
        console.print(f"{len(refused.problems)} thing(s) stand against this merge:")
        for problem in refused.problems:
            console.print(f"  - {escape(problem)}")
        raise UserError("nothing would be merged; mend what is listed above.") from None
    for row in _table(the_plan):
        console.print(escape(row))
    for line in describe(the_plan.changes, the_plan.cpt_rows, the_plan.rows):
        console.print(escape(line))
    for vector in the_plan.vectors:
        counts = ", ".join(
            f"{count:,} {role}" for role, count in vector.rows.counts().items() if count
        )
        console.print(f"rows of the {vector.label}: {counts}")
    if the_plan.chat.rows.chat_tokens:
        console.print(
            escape(f"rows from the chat model itself: {' '.join(the_plan.chat.rows.chat_tokens)}")
        )


def _table(the_plan: MergePlan) -> list[str]:
    """One line for each tensor, columns as wide as their widest cell, and the sums."""
    rows = [("tensor", "kind", "rule", "type", "shape", "read", "written")]
    read = written = 0
    for tensor in the_plan.tensors:
        of_tensor = bytes_read(the_plan, tensor)
        read, written = read + of_tensor, written + tensor.spec.nbytes
        shape = " x ".join(map(str, tensor.spec.shape))
        rows.append(
            (tensor.name, kind_of(tensor.name), describe_rule(the_plan, tensor), tensor.spec.dtype, shape,
             f"{of_tensor:,}", f"{tensor.spec.nbytes:,}")
        )  # fmt: skip
    files = len(the_plan.layout().headers)
    plural = "" if files == 1 else "s"
    rows.append(
        (
            f"{len(the_plan.tensors)} tensors in {files} file{plural}",
            "",
            "",
            "",
            "",
            f"{read:,}",
            f"{written:,}",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.rjust(width) if column >= 5 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
