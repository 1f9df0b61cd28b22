"""The command line: `cpt-merge COMMAND`, which is also `python -m cpt_merge COMMAND`.

Each command imports what it needs when it is called, so `--help` is fast.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cpt_merge import __version__
from cpt_merge.core.deadline import STOP_AT, parse_stop_at
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.parent import end_with_parent
from cpt_merge.core.progress import console, silence_bars
from cpt_merge.core.world import find_world, started_by_accelerate
from cpt_merge.launcher import stages

if TYPE_CHECKING:
    from cpt_merge.launcher.stage import Stage

USAGE_ERROR, INTERRUPTED = 2, 75
FIRST = ("init", "doctor", "plan", "run", "status", "submit", "chat", "report")  # in --help
EVERYTHING = "cpt_merge.help_all"
WITHOUT_RECIPE = {"merge": "merge-models", "evaluate": "evaluate-models"}
_SAID: list[socket.socket] = []  # names that this process has taken until its end


class _Commands(TyperGroup):
    """`--help` lists the commands of a first run, and `--help-all` every one."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands that the help shows, in its order."""
        listed = super().list_commands(ctx)
        return listed if ctx.meta.get(EVERYTHING) else [one for one in FIRST if one in listed]


app = typer.Typer(
    name="cpt-merge", cls=_Commands, no_args_is_help=True, add_completion=False,
    rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip

PLAN_HELP = (
    "write nothing: list every tensor with its rule and bytes, or all that prevents the merge"
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="the recipe, a YAML file")]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="a run's recipe, or its folder, such as runs/demo")
]
StopAt = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="save and stop before then: 2026-11-24T18:00, 18:00, +8h"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value ...]", help="overrides of its keys"),
]
MergeSettings = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="settings of the merge")
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"cpt-merge {__version__}")
        raise typer.Exit


def _show_everything(context: typer.Context, asked: bool) -> None:
    if asked:
        from cpt_merge.launcher.recipe import Recipe
        from cpt_merge.launcher.reference import as_text

        context.meta[EVERYTHING] = True
        print(f"{context.get_help()}\n\nKeys of a recipe:\n\n{as_text(Recipe)}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 done; 2 an error to fix; 75 stopped, with everything saved.")
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="the version")
    ] = False,
    help_all: Annotated[
        bool,
        typer.Option(
            "--help-all",
            is_eager=True,
            callback=_show_everything,
            help="all commands, and all keys of a recipe",
        ),
    ] = False,
) -> None:
    """Turn a base and chat pair and text in a new language into a chat model in that language."""


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, stop_at: StopAt = None) -> None:
    """Run all stages; finished ones are skipped, an interrupted one continues."""
    _remember_deadline(stop_at)
    from cpt_merge.launcher.pipeline import run_pipeline
    from cpt_merge.launcher.run import Run
    from cpt_merge.report import report as write_report

    loaded = Run.load(recipe, overrides or [])
    run_pipeline(loaded)
    write_report(loaded.recipe.directory)


def _remember_deadline(stop_at: str | None) -> None:
    """Set the deadline of this process and of those that it starts."""
    if stop_at:
        os.environ[STOP_AT] = str(parse_stop_at(stop_at, datetime.now()))


def _run_stage(stage: Stage, recipe: Path, overrides: list[str] | None) -> None:
    from cpt_merge.launcher.execute import run_stage
    from cpt_merge.launcher.run import Run

    run = Run.load(recipe, overrides or [])
    run_stage(run, stages.find_stage(run.recipe, stage.name))


def _add_stage(stage: Stage) -> None:
    @app.command(stage.command, help=stage.help)
    def command(recipe: RecipePath, overrides: Overrides = None) -> None:
        _run_stage(stage, recipe, overrides)


def _add_training(stage: Stage) -> None:
    @app.command(stage.command, help=stage.help)
    def command(recipe: RecipePath, overrides: Overrides = None, stop_at: StopAt = None) -> None:
        _remember_deadline(stop_at)
        _run_stage(stage, recipe, overrides)


_add_stage(stages.TOKENIZER)
_add_stage(stages.EMBEDDINGS)
_add_stage(stages.DATA)
_add_stage(stages.CONVERSATIONS)
_add_stage(stages.PAIRS)
_add_training(stages.TRAINING)


@app.command(stages.MERGE.command, help=stages.MERGE.help)
def merge(
    recipe: RecipePath,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help=PLAN_HELP)] = False,
) -> None:
    """The merge stage, or its plan."""
    _one_thread_for_numpy()
    if not plan:
        _run_stage(stages.MERGE, recipe, overrides)
        return
    from cpt_merge.launcher.merge_models import show_stage_plan
    from cpt_merge.launcher.run import Run

    show_stage_plan(Run.load(recipe, overrides or []))


_add_stage(stages.FORMAT)
_add_training(stages.FINETUNE)
_add_stage(stages.FINETUNE_MERGE)
_add_training(stages.DPO)
_add_stage(stages.EVALUATION)


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST:STEP", help="ratios of the chat vector, or A,B,C  [sweep.ratios]"
        ),
    ] = None,
    per_layer: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION", help="of the layer, times each ratio  [sweep.per_layer]"
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(
            metavar="TRIALS", min=0, help="then ratios per kind of module  [sweep.search.trials]"
        ),
    ] = None,
) -> None:
    """Measure the chat model at several ratios, in memory, and recommend one.

    Results are kept: the same command continues, another one adds to them.
    """
    given = {
        "ratios": ratios and f'"{ratios}"',  # YAML 1.1 would read 0:1:0.5 as a time
        "per_layer": per_layer and f'"{per_layer}"',
        "search.trials": search,
    }
    options = [f"sweep.{name}={value}" for name, value in given.items() if value is not None]
    _run_stage(stages.SWEEP, recipe, [*(overrides or []), *options])


@app.command()
def export(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="the model; missing or empty")],
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(metavar="N", help="the checkpoint's step; the newest if not set")
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(metavar="N..M", help="the average of all checkpoints of steps N to M"),
    ] = None,
) -> None:
    """Make a model of a training checkpoint, or of the average of several. Needs no GPU.

    The training may go on meanwhile. The model is a directory that merge-models, evaluate-models
    and transformers take.
    """
    from cpt_merge.launcher.run import Run
    from cpt_merge.launcher.stage import prepare
    from cpt_merge.training.saved import check_origin, choose_steps, export_checkpoints

    chosen = Run.load(recipe, overrides or [])
    training = chosen.folder("training")
    checkpoints = choose_steps(training / "checkpoints", step, average)
    check_origin(checkpoints, prepare(chosen, stages.TRAINING).key)
    export_checkpoints(
        chosen.recipe.training, chosen.resized, chosen.tokenizer, checkpoints, out.absolute()
    )


@app.command("merge-models")
def merge_models(
    cpt: Annotated[str, typer.Option(metavar="DIR", help="the trained model")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the merged model; missing or empty")],
    settings: MergeSettings = None,
    base: Annotated[str | None, typer.Option(metavar="DIR", help="the pair's base")] = None,
    chat: Annotated[str | None, typer.Option(metavar="DIR", help="the pair's chat model")] = None,
    vector: Annotated[
        Path | None, typer.Option(metavar="DIR", help="an extracted vector instead of the pair")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CPT's tokenizer, if not in --cpt")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="how much of the vector, 1.0 if not set")
    ] = None,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", metavar="FILE", help="YAML with settings")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help=PLAN_HELP)] = False,
) -> None:
    """Add the chat vector to any trained checkpoint, from files; needs no recipe.

    Give --base and --chat, or --vector; --chat alone for method=interpolate and method=slerp.
    Settings are the keys of a recipe's `merge` section
    (`cpt-merge keys merge`), as key=value or in a file: recipes/merge/ has published cases.
    """
    _one_thread_for_numpy()
    from cpt_merge.launcher import merge_models as command

    config = command.config_of(settings or [], ratio, settings_file)
    asked = command.inputs_of(config, cpt, base, chat, vector, tokenizer)
    command.show_plan(config, asked, out) if plan else command.merge(config, asked, out)


@app.command("extract-vector")
def extract_vector(
    base: Annotated[str, typer.Option(metavar="DIR", help="the pair's base")],
    chat: Annotated[str, typer.Option(metavar="DIR", help="the pair's chat model")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the vector; missing or empty")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="dtype and shard_size")
    ] = None,
) -> None:
    """Write the chat vector, chat - base, itself: to keep, to share, or to merge several times."""
    _one_thread_for_numpy()
    from cpt_merge.launcher.merge_models import extract

    extract(base, chat, out, settings or [])


def _one_thread_for_numpy() -> None:
    """The merge has its own threads. numpy reads the variable when it is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@app.command("evaluate-models")
def evaluate_models(
    model: Annotated[
        list[str],
        typer.Option(metavar="NAME=DIR", help="a model and the name to show; give one or more"),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="for results.json, samples, pictures, log")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[evaluation.key=value ...]", help="settings")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="language, form, chat, safety, knowledge-ko, ..."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG=FILE", help="held-out text of a language, for bits per byte"),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="a model whose chat template the ones without use"),
    ] = None,
) -> None:
    """Evaluate any models; needs no recipe. `cpt-merge keys evaluation` lists the settings."""
    from cpt_merge.launcher.evaluate_models import evaluate

    evaluate(model, out, settings or [], suite, text or [], template)


@app.command("check-tokenizer")
def check_tokenizer(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="an extended tokenizer")],
    against: Annotated[Path, typer.Option(metavar="BASE", help="the base's directory")],
    chat: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the chat model's directory")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text to read as well")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="what it was extended for")
    ] = None,
) -> None:
    """Prove an extended tokenizer, whoever made it. Exit code 1 if it breaks an invariant."""

    from cpt_merge.tokenizer_ext.verify import check_tokenizer as checks

    checked = checks.check_tokenizer(directory, against, chat, text or [], language or [])
    raise typer.Exit(0 if checked.whole else 1)


@app.command()
def init(
    out: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="the file to write")] = Path(
        "my-model.yaml"
    ),
    base: Annotated[
        str | None, typer.Option(metavar="DIR", help="the base model: a directory or a hub id")
    ] = None,
    chat: Annotated[str | None, typer.Option(metavar="DIR", help="its chat sibling")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG=PATH", help="text of a language, such as ko=ko.jsonl; several"),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="h100, rtx4090, ... as in plan; or none")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many in all, 1 if not set")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="over how many nodes")] = 1,
) -> None:
    """Look at a pair and its text, and write a recipe with a reason for every choice, and its plan.

    On a terminal it asks for what is not given.
    """
    from cpt_merge.launcher import init as about
    from cpt_merge.launcher.init import Asked, next_commands, write_recipe
    from cpt_merge.launcher.plan import show_plan
    from cpt_merge.launcher.recipe import load_recipe

    about.check_out(out)  # before anything is asked
    pair = base or _ask("base", "Base model (a directory or a hub id)", about.inspect_base)
    chat = chat or _ask("chat", "Its chat sibling", lambda given: about.check_pair(pair, given))
    pairs = [_language_and_path(one) for one in text or _ask_text()]
    here = about.gpus_here() if gpu is None else None
    if gpu is None:
        gpu = here[0] if here else "none"
        if sys.stdin.isatty():
            question = "GPU (h100, a100, rtx4090, ...; none: this CPU)"
            gpu = str(typer.prompt(question, default=gpu, value_proc=_good(_check_gpu)))
    if gpu != "none" and gpus is None:
        gpus = here[1] if here and here[0] == gpu else 1
        if sys.stdin.isatty():
            gpus = typer.prompt("How many of them", default=gpus, type=int)
    gpu = None if gpu == "none" else gpu
    asked = Asked(pair, chat, pairs, out, gpu, gpus or 1, nodes)
    write_recipe(asked)
    try:
        show_plan(load_recipe(out, []), asked.cluster)
    except UserError as error:
        raise UserError(
            f"{error} ({out} is written; `cpt-merge plan {out}` checks it again.)"
        ) from None
    print(next_commands(out))


def _ask(option: str, question: str, check: Callable[[str], object]) -> str:
    if not sys.stdin.isatty():
        raise UserError(f"--{option} is missing, and there is no terminal to ask on; give it.")
    return str(typer.prompt(question, value_proc=_good(check)))


def _good(check: Callable[[str], object]) -> Callable[[str], str]:
    """Makes a prompt ask again for an answer of which `check` raises `UserError`."""

    def checked(answer: str) -> str:
        answer = answer.strip()
        try:
            check(answer)
        except UserError as error:
            raise typer.BadParameter(str(error)) from None
        return answer

    return checked


def _check_gpu(name: str) -> None:
    from cpt_merge.cluster.scaling import gpu_named

    if name != "none":
        gpu_named(name)


def _check_text(word: str) -> None:
    from cpt_merge.core.languages import find_language
    from cpt_merge.launcher.init import read_sample

    tag, path = _language_and_path(word)
    read_sample(find_language(tag).tag, [path])


def _check_more(word: str) -> None:
    if word:
        _check_text(word)


def _ask_text() -> list[str]:
    """TAG=PATH words; an empty answer ends them."""
    found = [_ask("text", "Text in the new language, as TAG=PATH (ko=ko.jsonl)", _check_text)]
    more = "More text, such as en=en.jsonl (nothing: no more)"
    check = _good(_check_more)
    while word := str(typer.prompt(more, default="", show_default=False, value_proc=check)):
        found.append(word)
    return found


def _language_and_path(word: str) -> tuple[str, str]:
    tag, separator, path = word.partition("=")
    if not (separator and tag and path):
        raise UserError(f"--text {word} is not of the form TAG=PATH, such as ko=ko.jsonl.")
    return tag.strip(), path.strip()


@app.command()
def keys(
    section: Annotated[
        str,
        typer.Argument(metavar="[SECTION]", help="such as training or merge.rules; all if not set"),
    ] = "",
) -> None:
    """List the keys of a recipe, with type, unit, default and meaning."""
    from cpt_merge.launcher.recipe import Recipe
    from cpt_merge.launcher.reference import as_text

    print(as_text(Recipe, section))


@app.command()
def example(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="demo if not set")] = "demo",
) -> None:
    """Print a recipe of the package, to start from: cpt-merge example NAME > my.yaml."""
    from cpt_merge.launcher.recipe import example_recipes

    found = example_recipes()
    if name not in found:
        raise UserError(f"there is no example {name}; there are {', '.join(found)}.")
    print(found[name].read_text(encoding="utf-8"), end="")


@app.command()
def fetch(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Download a recipe's models and data from the hub, for compute nodes without internet.

    All stages read the hub's cache (in HF_HOME), which has to be on a file system that the nodes
    see. What is complete there is not downloaded again; the same command continues.
    """
    from cpt_merge.launcher.fetch import fetch as fetch_all
    from cpt_merge.launcher.recipe import load_recipe

    fetch_all(load_recipe(recipe, overrides or []))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="estimate speed on a cluster of h100, rtx4090, ..., or memory=48,tflops=181,"
            "bandwidth=864",
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="--gpu: how many in all, up to 8 in a node")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="--gpu: how many nodes, 1 if not set")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="--gpu: GPUs of a node, 8 if not set")
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(min=1, metavar="GBIT", help="--gpu: Gbit/s of a node, 400 per GPU if not set"),
    ] = None,
    storage: Annotated[
        float | None,
        typer.Option(
            min=0.01, metavar="GB", help="--gpu: GB/s that checkpoints are written with, or 5"
        ),
    ] = None,
    node_memory: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="GB",
            help="--gpu: memory of a node itself, for what is offloaded; 3 times that of its GPUs, "
            "at least 128, if not set",
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="--gpu: the fewest overrides with which the run fits")
    ] = False,
) -> None:
    """Show stages, sizes, memory per rank and tokens per step. No model is loaded.

    With --gpu, estimate for another cluster: tokens per second, days and GPU-hours, memory and
    checkpoints, under FSDP and HSDP, on that many nodes and on 1, 2, 4, ...
    """
    from cpt_merge.cluster.plan import ClusterOptions
    from cpt_merge.launcher.plan import show_plan
    from cpt_merge.launcher.recipe import load_recipe

    numbers = _nodes_of(gpus, nodes, gpus_per_node)
    options = {**numbers, "network": network, "storage": storage, "node_memory": node_memory}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if value == math.inf:
            raise UserError(f"--{name} is infinite; leave it out, or give a number.")
    if (given or fit) and gpu is None:
        raise UserError(
            "--gpus, --nodes, --gpus-per-node, --network, --storage, --node-memory and --fit "
            "belong to --gpu NAME; add it."
        )
    cluster = ClusterOptions(gpu, **given) if gpu else None
    show_plan(load_recipe(recipe, overrides or []), cluster, fit)


def _nodes_of(gpus: int | None, nodes: int | None, per_node: int | None) -> dict[str, int | None]:
    """Nodes and GPUs of a node. Raises `UserError` if `gpus`, all of them, do not divide evenly."""
    if gpus is None:
        return {"nodes": nodes, "gpus_per_node": per_node}
    if nodes is not None and per_node is not None and nodes * per_node != gpus:
        raise UserError(f"--gpus {gpus} is not {nodes} x {per_node}; leave out one of the three.")
    if nodes is not None:
        if gpus % nodes:
            raise UserError(
                f"--gpus {gpus} does not divide over --nodes {nodes}; set a multiple of {nodes}."
            )
        return {"nodes": nodes, "gpus_per_node": gpus // nodes}
    per_node = per_node or min(gpus, 8)
    if gpus % per_node:
        raise UserError(
            f"--gpus {gpus} does not fill nodes of {per_node}; set a multiple of {per_node}, or "
            "--gpus-per-node."
        )
    return {"nodes": gpus // per_node, "gpus_per_node": per_node}


@app.command()
def preflight(
    recipe: RecipePath,
    overrides: Overrides = None,
    begin: Annotated[
        bool, typer.Option("--begin", help="on the first node, once: what would stop any node")
    ] = False,
    network: Annotated[
        bool, typer.Option("--network", help="in training's task layout: the all-reduce test")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="compare the reports; bad nodes on stdout, A,B")
    ] = False,
    nodes: Annotated[
        str | None, typer.Option(metavar="A,B", help="--judge: the nodes that have to report")
    ] = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="how long to wait for the others")
    ] = 120,
) -> None:
    """Check that every node of a Slurm job, or this machine, is fit for the run.

    With --judge, the exit code is 2 if more than launch.spare_nodes are not.
    """
    from cpt_merge.cluster.preflight.command import PreflightOptions
    from cpt_merge.cluster.preflight.command import preflight as run_preflight
    from cpt_merge.launcher.recipe import load_recipe

    named = [node for node in (nodes or "").split(",") if node]
    options = PreflightOptions(begin, network, judge, named, wait)
    run_preflight(load_recipe(recipe, overrides or []), options)


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the job")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs on each: one task of training for each")
    ] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="tasks of training on each, if not as GPUs")
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="time limit of the job")
    ] = None,
    chain: Annotated[
        int, typer.Option(min=1, help="jobs in a row, for sites where a job may not requeue itself")
    ] = 1,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="a further option: --partition=gpu")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the call, submit nothing")
    ] = False,
) -> None:
    """Submit the whole pipeline to Slurm."""
    from cpt_merge.launcher.recipe import load_recipe
    from cpt_merge.launcher.submit import Submission
    from cpt_merge.launcher.submit import submit as submit_jobs

    loaded = load_recipe(recipe, overrides or [])
    if tasks := tasks_per_node or gpus_per_node:
        loaded.check_processes(nodes * tasks, " (--nodes x tasks on each)")
    asked = Submission(
        recipe, overrides or [], nodes, gpus_per_node, tasks_per_node, time, chain, sbatch or []
    )
    submit_jobs(asked, dry_run)


@app.command()
def sync(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="a run's folder, such as runs/demo")
    ],
) -> None:
    """Upload to W&B what a run could not upload.

    It was logged offline, lost its network, or was killed.
    """
    from cpt_merge.launcher.sync import sync as upload_run

    upload_run(folder)


@app.command()
def status(run: RunPath, overrides: Overrides = None) -> None:
    """Show a run's job, stage, step, rate, time left, newest checkpoint and W&B link."""
    from cpt_merge.launcher.status import show_status

    show_status(run, overrides or [])


job = typer.Typer(
    help="What slurm/cpt_merge.sh calls at its beginning and its end.", no_args_is_help=True
)
app.add_typer(job, name="job", hidden=True)


@job.command()
def begin(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Open the folder of this start of the job. Exit code 2 if the job should not start.

    Prints the folder, then a line "SPREAD COMMAND" for each step of the pipeline.
    """
    from cpt_merge.cluster.attempts import begin as begin_attempt
    from cpt_merge.launcher.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print(begin_attempt(loaded))
    for stage in stages.stages_of(loaded):
        print(stage.spread, stage.command)
    print("once report")


@job.command()
def end(
    recipe: RecipePath,
    attempt: Annotated[
        Path, typer.Option(metavar="DIR", help="the folder that `begin` has opened")
    ],
    code: Annotated[int, typer.Option(help="the exit code of the last step")],
    overrides: Overrides = None,
) -> None:
    """Say what became of this attempt, and print what follows: finished, requeue or given up."""
    from cpt_merge.cluster.attempts import end as end_attempt
    from cpt_merge.launcher.recipe import load_recipe

    print(end_attempt(load_recipe(recipe, overrides or []), attempt, code))


@app.command()
def doctor() -> None:
    """Show what this machine has, what is missing, and how to fix it."""
    from cpt_merge.launcher.doctor import show_doctor

    raise typer.Exit(0 if show_doctor() else 1)


@app.command()
def report(run: RunPath, overrides: Overrides = None) -> None:
    """Show a finished or running run: on the terminal, and as an HTML page in its folder."""
    from cpt_merge.launcher.recipe import load_recipe
    from cpt_merge.report import report as write_report

    write_report(
        load_recipe(run, overrides or []).directory if run.suffix in (".yaml", ".yml") else run
    )


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="recipes, or folders of evaluated runs")
    ],
    models: Annotated[
        str | None,
        typer.Option(
            metavar="ROW,NAME=ROW,...", help="the rows of the table in order; all if not set"
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="ROW", help="what differences are to; base if not set")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="for results.json, samples, pictures, page")
    ] = Path("runs/comparison"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="tracking.key=value", help="W&B")
    ] = None,
) -> None:
    """Put the evaluated models of several runs side by side; no model is asked again.

    Prompts are paired, so differences have p-values. Prints a table per language and writes a page.
    """
    from cpt_merge.launcher.compare_runs import compare as compare_runs

    chosen = [word.strip() for word in (models or "").split(",") if word.strip()]
    compare_runs(runs, chosen, baseline, out, settings or [])


@app.command()
def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a model: runs/NAME/merge/chat, ...")
    ],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="the repository on the hub")],
    public: Annotated[
        bool, typer.Option("--public", help="visible to everybody; private if not set")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="TAG", help="for a card that states none: llama2, ..."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="in place of a model that is there already")
    ] = False,
) -> None:
    """Upload a model with its card to the Hugging Face hub, in one commit.

    The same command continues an interrupted upload.
    """
    from cpt_merge.launcher.push import push as push_model

    push_model(directory, name, public, licence, replace)


@app.command()
def dashboard(
    recipe: RecipePath,
    overrides: Overrides = None,
    save_as: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="the workspace's name, cpt-merge NAME-OF-RUN if not set"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print it as JSON, save nothing")
    ] = False,
) -> None:
    """Save a W&B workspace of the run, with a section per stage.

    It replaces an earlier one that this command made under the same name.
    """
    from cpt_merge.launcher.dashboard import pipeline_of
    from cpt_merge.launcher.recipe import load_recipe
    from cpt_merge.tracking.workspace import dashboard as make_dashboard

    loaded = load_recipe(recipe, overrides or [])
    make_dashboard(
        loaded.tracking, pipeline_of(loaded), save_as or f"cpt-merge {loaded.name}", dry_run
    )


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="the directory of a chat model, or its hub id")
    ],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="the system message")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="the longest reply")] = 1024,
    max_thought_tokens: Annotated[
        int, typer.Option(min=1, help="a reasoning model's thoughts may take as many more")
    ] = 4096,
    chat_template_kwargs: Annotated[
        str,
        typer.Option(metavar="YAML", help="for the template, such as '{enable_thinking: false}'"),
    ] = "{}",
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0: the likeliest token  [default: as the model's generation_config]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="for the same replies again")] = None,
) -> None:
    """Talk to a model, on the GPU if there is one. Each line of stdin is a turn."""
    from cpt_merge.launcher.chat import ChatSettings, read_variables
    from cpt_merge.launcher.chat import chat as talk

    variables = read_variables(chat_template_kwargs)
    most = max_new_tokens, max_thought_tokens
    talk(model, ChatSettings(system, *most, temperature, seed, variables))


def stage_main(command: str) -> int:
    """The entry point of `python -m cpt_merge.STAGE`: `cpt-merge COMMAND`.

    Processes that a launcher started save and end when it is killed: another run may begin then.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or started_by_accelerate():
        end_with_parent()
    return main([command, *sys.argv[1:]])


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Exit code 0; 2 for what the user can fix; 75 if stopped and saved."""
    from cpt_merge.cluster.attempts import note_failure, note_stop

    silence_bars()
    _stop_on_signals()
    command, *words = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        _check_options(command, words)
        app(args=arguments)
    except UserError as error:
        note_failure(command, error)
        try:
            _print_once(str(error))
        except UserError:  # the launcher's variables are the error
            console.print(f"cpt-merge: {error}", markup=False)
        return USAGE_ERROR
    except Interrupted as stop:
        _print_once(str(stop))
        note_stop(stop)
        return _code_of_a_stop()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        note_failure(command, error)
        raise
    return 0


def _check_options(command: str, words: list[str]) -> None:
    """Raise `UserError` for options that a command has only in the form that needs no recipe."""
    option = next((word for word in words if word.startswith("--")), "--help").partition("=")[0]
    if command in WITHOUT_RECIPE and option not in ("--help", "--plan"):
        raise UserError(
            f"`cpt-merge {command}` takes a recipe and has no {option}; for models without a "
            f"recipe there is `cpt-merge {WITHOUT_RECIPE[command]}` (see its --help)."
        )


def _stop_on_signals() -> None:
    """Slurm's warnings raise `Interrupted`; the training loop has its own, gentler handlers.

    SIGINT counts even where a shell script's `command &` has it ignored, as it does in training.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Interrupted(f"stopped by {name}; the same command continues where it can.", name)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _code_of_a_stop() -> int:
    """75, or 0 where another code counts as a crash and gets the other processes killed too early.

    torchrun and accelerate take any code but 0 for a crash. So does `srun --kill-on-bad-exit`:
    there, only the first process ends with 75, since it has the most to do at the end.
    """
    world = find_world()
    if world.launcher == "torchrun" or started_by_accelerate() or not world.is_main:
        return 0
    return INTERRUPTED


def _print_once(sentence: str) -> None:
    """Print to stderr, once for all processes of a launcher that have the same message.

    The first one takes a name in Linux's abstract namespace of sockets, which is free again when
    that process ends: unlike a file, it cannot be left behind.
    """
    if not sentence:
        return
    if find_world().launcher != "alone":
        name = hashlib.sha256(f"{os.getppid()}{sentence}".encode()).hexdigest()
        taken = socket.socket(socket.AF_UNIX)
        try:
            taken.bind(f"\0cpt-merge-said-{name}")
        except OSError:
            taken.close()
            return
        _SAID.append(taken)
    console.print(f"cpt-merge: {sentence}", markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
