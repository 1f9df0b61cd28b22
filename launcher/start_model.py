"""Checks of the model that training starts from in place of the base (`training.start`)."""

from __future__ import annotations

from cpt_merge.checkpoint.adapters import MERGE_IT
from cpt_merge.checkpoint.loaded import open_model
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import vocabulary_rows
from cpt_merge.checkpoint.text_only import has_towers, text_only
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import is_up_to_date
from cpt_merge.launcher.stages import TOKENIZER
from cpt_merge.merge.ancestry import contained_vector
from cpt_merge.merge.finish import differing_fields
from cpt_merge.merge.fit import fitting
from cpt_merge.tokenizer_ext.embeddings.start_rows import check_pieces, check_tokens, tokens_of

LABEL = "training.start"


def check_start(run: Run) -> None:
    """Raise `UserError` for a model to start from that does not fit the base.

    It has to have the base's family, shapes and tokens. Says what else differs, and what becomes of
    a chat vector that it contains.
    """
    if run.recipe.training.start is None:
        return
    folder = run.recipe.directory.absolute()
    if folder in run.start.absolute().parents:
        raise UserError(
            f"{LABEL} = {run.start} is in the folder of this run, whose stages make it again; give "
            "the run that starts from it another name."
        )
    base, start = open_model(run.base), open_model(run.start, run.base)
    if start.adapted is not None:
        raise UserError(
            f"{LABEL} = {run.start} is a LoRA adapter, and training starts from a whole model; "
            f"{MERGE_IT}."
        )
    if run.recipe.models.text_only:
        base, start = _decoder(base), _decoder(start)
    elif has_towers(base) != has_towers(start):
        raise UserError(
            f"{run.base if has_towers(base) else run.start} has towers of images or sound, and "
            f"{run.start if has_towers(base) else run.base} has none; set models.text_only: true, "
            f"or another {LABEL}."
        )
    fitting({"base": base, LABEL: start})
    for difference in differing_fields({"base": base.config, LABEL: start.config}):
        say(f"{LABEL}: {difference}; training takes that of {LABEL}")
    _check_vocabulary(run, vocabulary_rows(base))
    _say_what_is_contained(run, start)


def _decoder(model: Checkpoint) -> Checkpoint:
    return text_only(model) if has_towers(model) else model


def _check_vocabulary(run: Run, rows: int) -> None:
    """Compare it with the base's and, once it is made, with that of the extended tokenizer."""
    own, of_base = tokens_of(run.start), TokenizerFiles.read(run.base)
    assert of_base is not None
    check_tokens(own, of_base, range(rows))
    if is_up_to_date(run, TOKENIZER):
        extended = TokenizerFiles.read(run.tokenizer)
        assert extended is not None
        check_pieces(own, extended)
    elif not run.recipe.tokenizer.languages():
        check_pieces(own, of_base)


def _say_what_is_contained(run: Run, start: Checkpoint) -> None:
    merge = run.recipe.merge
    if merge.interpolates or merge.ratio == 0:
        return
    contained = contained_vector(run.base, run.chat, start)
    if contained:
        say(
            f"warning: {LABEL} = {run.start} contains {contained:.2f} times chat - base already, "
            f"and the merge adds {merge.ratio} times more; lower merge.ratio (0 gives CPT its chat "
            f"format and nothing more), or use {run.cpt} as the chat model."
        )
