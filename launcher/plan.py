"""`cpt-merge plan`: what a run would do, its sizes and its memory. No model is loaded.

The sizes come from `launcher/sizes.py`. With `--gpu`, `cluster/plan.py` adds the speed on a cluster
that is not here.
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_merge.cluster.fit import show_fit
from cpt_merge.cluster.plan import ClusterOptions, show_cluster
from cpt_merge.cluster.scaling import flops_of
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.data.documents import known_rows
from cpt_merge.data.hub_datasets import HubFile, at_hand, is_at_hand, size_of
from cpt_merge.data.sources import source_files
from cpt_merge.finetune import FinetuneConfig
from cpt_merge.launcher.accelerate_file import accelerate_config, machines
from cpt_merge.launcher.inputs import check_inputs, check_numbers
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.sizes import (
    disk_needed,
    extended_rows,
    memory_setup,
    read_shape,
)
from cpt_merge.launcher.stage import is_up_to_date
from cpt_merge.launcher.stages import stages_of
from cpt_merge.launcher.start import backend_asked, check_local_batch
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.context import Context
from cpt_merge.training.memory import MemoryEstimate, ModelShape, estimate_memory
from cpt_merge.training.stretches import describe_stretches, stretches_of

GB = 1e9


def show_plan(recipe: Recipe, cluster: ClusterOptions | None = None, fit: bool = False) -> None:
    """Print the plan for the processes of this machine, or for a cluster that is not here.

    With `fit`, also the overrides with which the run fits its GPUs.
    """
    run, processes = Run(recipe), _checked(recipe, cluster)
    base = read_shape(recipe)
    shape = base.resized(extended_rows(recipe, base))
    console = Console(highlight=False, emoji=False)
    names = f"{recipe.training.start or recipe.models.base} -> {run.result}"
    console.print(f"[bold]{escape(recipe.name)}[/]: {escape(names)}", soft_wrap=True)
    states = [
        f"{stage.name} {'[green]done[/]' if is_up_to_date(run, stage) else '[yellow]to do[/]'}"
        for stage in stages_of(recipe)
    ]
    console.print("stages: " + ", ".join(states))
    _print_text(console, run)
    if "en" not in recipe.corpus.languages():
        console.print(
            "[yellow]warning[/]: there is no English text, so the model will forget some of what "
            "it knows; add a source with `language: en`.",
            soft_wrap=True,
        )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    _add_model(table, recipe, base, shape)
    if processes:
        _add_memory(table, recipe, shape, processes)
    for section in recipe.further:
        _add_further(table, recipe, section, processes)
    table.add_row("disk", str(disk_needed(shape, recipe)))
    console.print(table)
    if cluster:
        _print_reservations(console, recipe, shape, cluster.cluster.ranks)
        config, launched = _on_fsdp2(recipe, cluster.cluster.ranks)
        show_cluster(console, shape, config, cluster)
        if fit:
            show_fit(console, shape, config, cluster, launched)


def _on_fsdp2(recipe: Recipe, processes: int) -> tuple[TrainingConfig, list[str]]:
    """The training of a recipe under FSDP2 over all processes, and the overrides that it takes.

    What the accelerate configuration keeps in the CPU's memory is there, too.
    """
    config, asked = recipe.training, backend_asked(recipe, processes)
    if asked.offload != "none":
        config = config.model_copy(update={"offload": "all"})
    if asked.backend == "fsdp2" and asked.replicas == 1 and asked.shards in (None, processes):
        return config, []
    launched = ["launch.accelerate_config=fsdp2"]
    if config.offload != recipe.training.offload:
        launched.append(f"training.offload={config.offload}")
    return config, launched


def _checked(recipe: Recipe, cluster: ClusterOptions | None) -> int:
    """Check what a run would, before anything is printed. The processes of this machine, or 0."""
    if cluster:
        cluster.workload(recipe.training)
        backend_asked(recipe, cluster.cluster.ranks)  # raises for what cannot be offloaded
        check_numbers(recipe)
        return 0
    processes = check_local_batch(recipe)
    check_inputs(recipe, download=False)
    return processes


def _add_model(table: Table, recipe: Recipe, base: ModelShape, shape: ModelShape) -> None:
    """What the base and the extended model are, and what training does with it."""
    config = recipe.training
    table.add_row("base", f"{_parameters(base)}, {base.vocabulary:,} rows")
    if config.start:
        table.add_row("start", f"{config.start}, in place of the base")
    if base.towers:
        text = f"{base.towers / 1e6:,.1f} M parameters more, which training does not load"
        table.add_row("towers", text)
    if recipe.models.text_only:
        table.add_row("text only", "the base's towers are left out of CPT and of the merged model")
    table.add_row("extended", f"{_parameters(shape)}, at most {shape.vocabulary:,} rows")
    if shape.experts:
        taken = f"{shape.experts} in a layer, of which a token uses {shape.taken:g}"
        table.add_row("experts", taken)
    if config.lora:
        vocabulary = shape.vocabulary_parameters / 1e6
        text = f"rank {config.lora.rank}, {shape.adapters / 1e6:,.1f} M parameters"
        table.add_row("adapters", f"{text}; {vocabulary:,.1f} M of embedding and head are trained")
    computing = flops_of(shape, config.sequence_length) / 1e9
    table.add_row("computing", f"{computing:,.2f} GFLOP per token")
    steps = f"{counted(config.steps, 'step')} of {config.tokens_per_step:,} tokens"
    table.add_row("training", steps)
    for place, context in enumerate(config.contexts):
        if config.phases and context != Context(config.sequence_length):
            table.add_row(f"phase {place + 1}", str(context))


def _print_reservations(
    console: Console, recipe: Recipe, shape: ModelShape, processes: int
) -> None:
    """For what the estimate of a cluster does not hold."""
    config = recipe.training
    if config.longest.sequence_length != config.sequence_length:
        length = config.longest.sequence_length
        console.print(f"The estimate is for the phase with sequences of {length:,} tokens.")
    if backend_asked(recipe, processes).backend == "deepspeed":
        console.print(
            "launch.accelerate_config asks for DeepSpeed; the estimate is for FSDP2 and HSDP, "
            "which offload weights, gradients and optimizer together."
        )
    if shape.experts:
        console.print(
            "The model has experts: their matmuls are counted at the rate of dense ones, and "
            "nothing was measured, so take the speed as an upper bound.",
            soft_wrap=True,
        )


def _parameters(shape: ModelShape) -> str:
    """How many a model has, and how many of them a token uses."""
    active = f" ({shape.active / 1e6:,.1f} M active)" if shape.experts else ""
    return f"{shape.parameters / 1e6:,.1f} M parameters{active}"


def _add_memory(table: Table, recipe: Recipe, shape: ModelShape, processes: int) -> None:
    """What each process of this machine does and needs."""
    batches = counted(recipe.training.micro_batches(processes), "micro-batch")
    sequences = counted(recipe.training.micro_batch_size, "sequence")
    if (wanted := machines(accelerate_config(recipe))) > 1:
        text = f"launch.accelerate_config asks for {wanted}; what follows is for this one alone"
        table.add_row("machines", text)
    table.add_row("processes", f"{processes}, each {batches} of {sequences} a step")
    config = recipe.training
    trained = [phase.train for phase in config.phases] or ["all"]
    for train, context in dict.fromkeys(zip(trained, config.contexts, strict=True)):
        within = config.within(context)
        memory = estimate_memory(shape, memory_setup(recipe, within, processes, train))
        phase = f", {train}" if config.phases else ""
        if context.length != config.sequence_length:
            phase += f", {within.micro_batch_size} x {context.length:,}"
        table.add_row(
            f"memory per rank{phase}",
            f"{memory.total / GB:,.2f} GB at once, of: {_parts(memory)}",
        )


def _add_further(table: Table, recipe: Recipe, section: str, processes: int) -> None:
    """What a section trains further; how many steps it takes is known once there is a store."""
    config = recipe.further[section]
    length = config.length(recipe.training)
    text = f"{config.epochs:g} epochs in steps of {config.global_batch_size} x {length:,} tokens"
    if isinstance(config, FinetuneConfig):
        text = f"of {'CPT' if config.after == 'training' else 'the merged model'}, {text}"
    if config.lora:
        text += f", adapters of rank {config.lora.rank}"
    table.add_row(section, text)
    if processes:
        shape = read_shape(recipe, section)
        shape = shape.resized(extended_rows(recipe, shape))
        loop = config.training_config(recipe.training, 1)
        memory = estimate_memory(shape, memory_setup(recipe, loop, processes))
        text = f"{memory.total / GB:,.2f} GB at once, of: {_parts(memory)}"
        table.add_row(f"memory per rank, {section}", text)


def _parts(memory: MemoryEstimate) -> str:
    held = {name: value for name, value in vars(memory).items() if name != "on_host"}
    words = [f"{name.replace('_', ' ')} {value / GB:,.2f}" for name, value in held.items()]
    host = f"; {memory.on_host / GB:,.2f} GB of the CPU's memory" if memory.on_host else ""
    return ", ".join(words) + host


def _print_text(console: Console, run: Run) -> None:
    """The text's files and, as far as the number of their tokens is known, the mixture."""
    corpus = run.recipe.corpus
    for key, source in run.recipe.named_sources.items():
        files = source_files(source)
        size = f"{sum(map(size_of, files)) / 1e6:,.1f} MB"
        on_hub = [file for file in files if isinstance(file, HubFile)]
        if on_hub:
            cached = sum(file.path is not None for file in on_hub)
            size += f" in {counted(len(files), 'file')} on the hub, {cached} of them in its cache"
        rows = (
            known_rows([at_hand(file) for file in files]) if all(map(is_at_hand, files)) else None
        )
        size += f", {counted(rows, 'row')}" if rows is not None else ""
        section = key.partition(".")[0]
        kind = {"finetune": "conversations", "dpo": "pairs"}.get(section, "text")
        line = f"{kind}: {source.path} ({source.language}, {size})"
        console.print(line, markup=False, soft_wrap=True)
    available: list[int | None] = [None] * len(corpus.sources)
    store = run.store / "store.json"
    if store.is_file():
        known = [source["train"]["tokens"] for source in json.loads(store.read_text())["sources"]]
        available = known if len(known) == len(available) else available
    try:
        lines = describe_stretches(stretches_of(run.recipe.training, corpus, available))
    except UserError as error:
        lines = [str(error)]
    for line in lines:
        console.print(f"mixture: {line}", markup=False, soft_wrap=True)
