"""The whole pipeline: check what would stop a late stage, then run all stages in order."""

from __future__ import annotations

from pathlib import Path

from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.errors import UserError
from cpt_merge.data.mixture import mixture
from cpt_merge.launcher.execute import run_stage
from cpt_merge.launcher.preview import check_previewed
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stages import STAGES
from cpt_merge.launcher.start import accelerate_config, local_processes
from cpt_merge.merge import merge_report
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.fit import open_fitting


def run_pipeline(run: Run) -> None:
    """Run all stages in order. Errors that would stop a late stage are raised first."""
    check_inputs(run.recipe)
    processes = local_processes(run.recipe) if run.recipe.launch.processes else 1
    run.recipe.training.check_processes(processes, " (launch.processes)")
    with run.locked():
        for stage in STAGES:
            run_stage(run, stage)


def check_inputs(recipe: Recipe) -> None:
    """Raise `UserError` for a pair that does not fit, missing text, lists or prompts, or a mixture
    that is impossible.
    """
    run = Run(recipe)
    open_fitting({"base": run.base, "chat": run.chat})
    merge_report.warn(pair_warnings(run.base, run.chat))
    run.corpus_inputs()
    run.further_models()
    for name, path in recipe.evaluation.files().items():
        if not Path(path).expanduser().exists():
            raise UserError(
                f"evaluation.{name} = {path} does not exist; correct it or leave it out."
            )
    if "knowledge" in recipe.evaluation.suites:
        recipe.evaluation.knowledge.check_installed()
    for language, path in recipe.tokenizer.pieces_from.items():
        if not Path(path).is_file():
            raise UserError(
                f"tokenizer.pieces_from.{language} = {path} does not exist; "
                "correct it or leave it out."
            )
    if recipe.training.preview.every is not None:
        tokenizer = TokenizerFiles.read(run.chat)
        check_previewed(run.chat, tokenizer.chat_template if tokenizer else None)
    accelerate_config(recipe)
    sources = recipe.corpus.sources
    if all(source.epochs is None for source in sources):  # else known when the text is tokenised
        mixture(recipe.corpus, [None] * len(sources), recipe.training.tokens)
