"""`cpt-merge merge-models` and `extract-vector`, which need no recipe; the plan of a merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.checkpoint.token_ids import has_tokenizer, refuse_unread
from cpt_merge.core.config import apply_override, parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
from cpt_merge.core.progress import counted, say
from cpt_merge.launcher.recipe import read_yaml
from cpt_merge.launcher.whole_check import checking_whole
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.finish import loading_tokenizer
from cpt_merge.merge.fit import RefusedError
from cpt_merge.merge.plan import MergeInputs, MergePlan, bytes_read, describe_rule, plan
from cpt_merge.merge.rows import describe

if TYPE_CHECKING:
    from cpt_merge.launcher.run import Run


def config_of(
    settings: Sequence[str], ratio: str | None = None, file: Path | None = None
) -> MergeConfig:
    """The merge's configuration from a file of its keys and `key=value` words.

    Raises `UserError`.
    """
    values = read_yaml(file, "the file of settings") if file else {}
    if ratio is not None:
        values["ratio"] = ratio
    for setting in settings:
        if ratio is not None and setting.removeprefix("merge.").startswith("ratio="):
            raise UserError(f"--ratio {ratio} and {setting} both set the ratio; leave out one.")
        apply_override(values, setting.removeprefix("merge."))
    return parse_section(MergeConfig, values, "the merge's settings")


def inputs_of(
    config: MergeConfig,
    cpt: str,
    base: str | None,
    chat: str | None,
    vector: Path | None,
    tokenizer: Path | None,
) -> MergeInputs:
    """What a merge of directories reads. Raises `UserError`."""
    if config.interpolates:
        if chat is None or vector is not None:
            raise UserError(f"{config.method} leads to the chat model: give --chat DIR alone.")
        if base is not None:
            say(f"merge: {config.method} needs no base; {base} is not read")
            base = None
    elif vector is None and (base is None or chat is None):
        raise UserError(
            "give the pair, --base DIR and --chat DIR, or a vector's directory, --vector DIR."
        )
    if vector is not None and chat is not None:
        raise UserError("--vector and --chat are two sources of one vector; leave out one.")
    trained = model_directory(cpt)
    if tokenizer is not None and not has_tokenizer(tokenizer):
        refuse_unread(tokenizer)
        raise UserError(
            f"--tokenizer {tokenizer} holds no tokenizer.json or tokenizer.model; correct it."
        )
    base_directory = model_directory(base) if base else None
    chat_directory = model_directory(chat) if chat else None
    return MergeInputs(trained, base_directory, chat_directory, tokenizer or trained, vector)


def merge(config: MergeConfig, inputs: MergeInputs, out: Path) -> None:
    """Merge directories into `out`. Raises `UserError`."""
    from cpt_merge.merge.files import keep_freed_memory, merge_directories

    with _file_errors(out), checking_whole(config, inputs) as check:
        keep_freed_memory()
        merge_directories(config, inputs, out, check=check)
    say(f"merge: done -> {out}; talk to it with `cpt-merge chat {out}`")


def extract(base: str, chat: str, out: Path, settings: Sequence[str]) -> None:
    """Write the chat vector of a pair to `out`. Raises `UserError`."""
    from cpt_merge.merge.extract import extract as extract_vector
    from cpt_merge.merge.files import keep_freed_memory

    config = config_of(settings)
    shown = config.model_dump(exclude_defaults=True, exclude={"dtype", "shard_size"})
    if shown:
        raise UserError(
            f"extract-vector takes dtype and shard_size only; leave out {', '.join(shown)}."
        )
    pair = model_directory(base), model_directory(chat)
    with _file_errors(out):
        keep_freed_memory()
        extract_vector(*pair, out, config.dtype or "float32", config.shard_bytes)


@contextmanager
def _file_errors(out: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{error.filename or out}: {reason}; fix that and run the same command again."
        ) from None


def show_stage_plan(run: Run) -> None:
    """Print the plan of a recipe's merge; before training, with the model that it starts from."""
    trained = (run.cpt / "config.json").is_file()
    if not trained:
        say(
            f"merge: {run.cpt} does not exist yet; planned with the model that training starts "
            f"from, {run.resized}"
        )
    inputs = MergeInputs(run.cpt if trained else run.resized, run.base, run.chat, run.tokenizer)
    show_plan(run.recipe.merge, inputs, None if run.merged.exists() else run.merged)


def show_plan(config: MergeConfig, inputs: MergeInputs, out: Path | None) -> None:
    """Print what would be done with every tensor, or raise `UserError` after a list of problems."""
    with checking_whole(config, inputs) as check:
        _show_plan(config, inputs, out, check)


def _show_plan(
    config: MergeConfig, inputs: MergeInputs, out: Path | None, check_whole: Callable[[], None]
) -> None:
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    try:
        the_plan = plan(config, inputs, out)
    except RefusedError as refused:
        count = len(refused.problems)
        verb = "prevents" if count == 1 else "prevent"
        console.print(f"{counted(count, 'problem')} {verb} this merge:")
        for problem in refused.problems:
            console.print(f"  - {escape(problem)}")
        raise UserError("nothing would be merged; fix what is listed above.") from None
    check_whole()
    with loading_tokenizer(the_plan) as check:
        check()
    for row in _table(the_plan):
        console.print(escape(row))
    for line in describe(the_plan.changes, the_plan.cpt_rows, the_plan.rows):
        console.print(escape(line))
    for vector in the_plan.vectors:
        counts = ", ".join(
            f"{count:,} {role}" for role, count in vector.rows.counts().items() if count
        )
        console.print(escape(f"rows of the {vector.label}: {counts}"))
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
            (tensor.name, kind_of(tensor.name), describe_rule(the_plan, tensor), tensor.spec.dtype,
             shape, f"{of_tensor:,}", f"{tensor.spec.nbytes:,}")
        )  # fmt: skip
    files = counted(len(the_plan.layout().headers), "file")
    total = f"{counted(len(the_plan.tensors), 'tensor')} in {files}"
    rows.append((total, "", "", "", "", f"{read:,}", f"{written:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    form = "  ".join(
        f"{{:{'>' if column >= 5 else '<'}{width}}}" for column, width in enumerate(widths)
    )
    return [form.format(*row).rstrip() for row in rows]
