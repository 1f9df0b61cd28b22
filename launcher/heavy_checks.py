"""The checks of `inputs.py` that need torch and transformers, in a process of their own.

Importing the two takes longer than all other checks, so they run next to those:

    with heavy_checks(run):     starts this module in a process, with the recipe on stdin
        ...                     the other checks
                                waits; what the process refuses is raised as a `UserError` here
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import console, say
from cpt_merge.core.world import find_world
from cpt_merge.launcher.growth import find_continued, what_training_does
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import is_up_to_date, prepare
from cpt_merge.launcher.stages import DATA, TRAINING, find_stage, stages_of
from cpt_merge.launcher.start import backend_asked, local_processes

if TYPE_CHECKING:
    from cpt_merge.launcher.stage import Stage
    from cpt_merge.training.config import TrainingConfig
    from cpt_merge.training.distributed.settings import BackendSettings

REFUSED = 2
ELSEWHERE = "--elsewhere"  # without a GPU here, training may be planned for another machine


@contextmanager
def heavy_checks(run: Run, here: bool) -> Iterator[None]:
    """Run the checks while the block runs. Raises `UserError` after it for what they refuse.

    Nothing is started if training and evaluation are done. `here`: they run on this machine.
    """
    if all(is_up_to_date(run, stage) for stage in stages_of(run.recipe) if stage.distributed):
        yield
        return
    command = [sys.executable, "-m", __name__, *([] if here else [ELSEWHERE])]
    with tempfile.TemporaryFile("w+") as recipe, tempfile.TemporaryFile("w+") as errors:
        recipe.write(run.recipe.model_dump_json())
        recipe.seek(0)
        process = subprocess.Popen(
            command, stdin=recipe, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield
            answer, _ = process.communicate()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        _judge(process.returncode, answer.splitlines(), errors.read().strip())


def _judge(code: int, answer: list[str], errors: str) -> None:
    refusal = answer.pop() if code == REFUSED and answer else ""
    for line in dict.fromkeys(answer):  # base and chat model give the same ones
        say(line)
    if refusal:
        raise UserError(refusal)
    if code < 0:
        say(f"the check of the models was ended by signal {-code}; the stages check them again")
    elif code:
        last = errors.splitlines()[-1] if errors else f"exit code {code}"
        raise UserError(
            f"the models cannot be used with the installed torch and transformers ({last[:300]}); "
            "`cpt-merge doctor` shows the versions."
        )


def check(run: Run, here: bool) -> None:
    """Raise `UserError` for what the late stages would refuse."""
    _check_whole(run)
    training = run.recipe.training
    if not is_up_to_date(run, TRAINING):
        _check_training(run, TRAINING, training, here)
    for name, section in run.recipe.further.items():
        stage = find_stage(run.recipe, name)
        if not is_up_to_date(run, stage):
            _check_training(run, stage, section.training_config(training, 1), here)
    _check_chat(run)
    _check_prompts(run)
    _check_conversations(run, here)


def _check_training(run: Run, stage: Stage, config: TrainingConfig, here: bool) -> None:
    """Check that a model like the one to start from trains as `config` says."""
    import torch

    from cpt_merge.training.trainable import check_trainable

    asked = backend_asked(run.recipe, _processes(run.recipe, here), config)
    device = torch.device("cuda" if torch.cuda.is_available() and not asked.use_cpu else "cpu")
    known, alone = here or asked.use_cpu or device.type == "cuda", run.recipe.models.text_only
    _check_continues(run, stage, config, asked)
    last = config.within(config.contexts[-1])
    choice = check_trainable(run.start, last, asked, device if known else None, alone)
    if choice.separation.one_by_one:
        say(f"packed documents: {_cost_of_padding(run)}")


def _check_continues(
    run: Run, stage: Stage, config: TrainingConfig, asked: BackendSettings
) -> None:
    """Check that training can continue with this backend, and say what it continues or leaves.

    What it continues is an interrupted one, or one of another length.
    """
    from cpt_merge.training.distributed.backend import layout_of
    from cpt_merge.training.distributed.checkpoint import check_continues, check_layout

    try:
        context = prepare(run, stage)
    except UserError:
        return  # what it builds on is not finished, so it starts again
    layout = layout_of(asked, config)
    check_continues(context.folder / "checkpoints", context.key, layout)
    if not stage.grows:
        return
    if continued := find_continued(context):
        check_layout(continued.branch.checkpoint, continued.branch.state, layout)
    if sentence := what_training_does(context):
        say(sentence)


def _processes(recipe: Recipe, here: bool) -> int:
    """How many processes train: on Slurm its tasks, which need not fit this machine.

    If nothing says it of another machine: several, if the recipe offloads.
    """
    world, tasks = find_world(), os.environ.get("SLURM_NTASKS")
    if world.launcher != "alone":
        return world.size
    if tasks:
        return int(tasks)
    if here and "SLURM_JOB_ID" not in os.environ:
        return local_processes(recipe)
    return recipe.launch.processes or max(
        local_processes(recipe), 2 if recipe.training.offload else 1
    )


def _cost_of_padding(run: Run) -> str:
    """What documents one by one cost, if their lengths are known."""
    from cpt_merge.data.packing import TrainingSequences
    from cpt_merge.data.store import Store
    from cpt_merge.training.summary import padding_line

    if not is_up_to_date(run, DATA):
        return "how much padding that takes is known when the text is tokenised"
    config = run.recipe.training
    sequences = TrainingSequences(Store.open(run.store), config.sequence_length, config.seed)
    return padding_line(sequences, config)


def _check_chat(run: Run) -> None:
    """Check that transformers loads the chat model, and the tokenizers of the pair."""
    from cpt_merge.checkpoint.loaded_tokenizer import check_loads
    from cpt_merge.checkpoint.reader import read_json
    from cpt_merge.training.trainable import check_model

    kinds = {read_json(model / "config.json").get("model_type") for model in (run.base, run.chat)}
    if len(kinds) == 1:  # the evaluation builds the class that training builds
        check_model(run.chat, run.recipe.training)
    for model in (run.base, run.chat):
        check_loads(model)


def _check_conversations(run: Run, here: bool) -> None:
    """Check that the chat model's template renders the conversations.

    Of those that are rendered, check that there are enough.
    """
    from cpt_merge.data.conversations_inputs import check_conversations
    from cpt_merge.data.store import Store

    for name, section in run.recipe.further.items():
        data = find_stage(run.recipe, name).inputs["data"]
        if is_up_to_date(run, data):
            sources = Store.open(run.folder(data.name) / "store").info.sources
            section.check_batch(run.recipe.training, sources)
        else:
            length = section.length(run.recipe.training)
            if run.recipe.tokenizer.languages():
                length = sys.maxsize  # the extended tokenizer makes fewer tokens than the chat's
            check_conversations(section, length, run.chat, download=here)


def _check_whole(run: Run) -> None:
    """Check that the files of all models hold what transformers would fill at random."""
    from cpt_merge.checkpoint.loaded import open_model
    from cpt_merge.checkpoint.text_only import has_towers, text_only
    from cpt_merge.checkpoint.whole_models import check_whole
    from cpt_merge.core.hub import model_directory

    for name in run.recipe.named_models.values():
        directory = model_directory(name)
        checkpoint = open_model(directory, run.base if directory != run.base else None)
        if run.recipe.models.text_only and has_towers(checkpoint):
            checkpoint = text_only(checkpoint)
        check_whole(checkpoint)


def _check_prompts(run: Run) -> None:
    """Read the prompts of evaluation and preview, and render those for base and chat model."""
    from cpt_merge.evaluation.chat_template import check_prompts, read_chat_template
    from cpt_merge.evaluation.models import shared_context
    from cpt_merge.evaluation.suites import Setup, conversations_of
    from cpt_merge.launcher.preview import read_prompts

    recipe = run.recipe
    if recipe.training.preview.every is not None:
        read_prompts(recipe)
    asked = conversations_of(Setup(recipe.evaluation, recipe.corpus))
    models = {"base": run.base, "chat": run.chat, **run.further_models()}
    shared_context(models, recipe.evaluation.context, recipe.training.sequence_length)
    if asked or _asks_lm_eval_in_template(recipe):
        if recipe.evaluation.chat_template_kwargs:  # the models to come are prompted like these
            models |= {name: run.base if name == "cpt" else run.chat for name in run.made_models()}
        chat = read_chat_template(run.chat, recipe.evaluation)
        check_prompts(models, chat, asked, recipe.evaluation)


def _asks_lm_eval_in_template(recipe: Recipe) -> bool:
    return bool(recipe.evaluation.lm_eval_tasks) and recipe.evaluation.knowledge.needs_template


def main() -> int:
    """Check the recipe on stdin; messages go to stdout, and last of all what is refused."""
    console.file = sys.stdout
    try:
        check(Run(Recipe.model_validate_json(sys.stdin.read())), ELSEWHERE not in sys.argv)
    except UserError as error:
        print(error)
        return REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
