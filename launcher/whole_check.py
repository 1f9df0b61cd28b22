"""Whether the models of a merge are whole (`checkpoint/whole_models.py`), found next to the merge.

A merge from files needs no torch, and importing it takes longer than to plan a merge. So this
module runs in a process of its own, unless transformers is imported already:

    with checking_whole(config, inputs) as check:
        ...             what the merge does meanwhile
        check()         waits; what is refused is raised as a `UserError` here
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cpt_merge.checkpoint.loaded_tokenizer import start_module
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
from cpt_merge.core.progress import console, say
from cpt_merge.core.world import find_world
from cpt_merge.launcher.heavy_checks import REFUSED
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.plan import MergeInputs


@contextmanager
def checking_whole(config: MergeConfig, inputs: MergeInputs) -> Iterator[Callable[[], None]]:
    """Check the models that a merge reads while the block runs; on the first process alone."""
    models = _models(config, inputs)
    if not find_world().is_main:
        yield lambda: None
    elif "transformers" in sys.modules:
        yield lambda: _check(models)
    else:
        process = start_module(__name__, *models)
        try:
            yield lambda: _wait_for(process)
        finally:
            process.kill()
            process.communicate()


def _models(config: MergeConfig, inputs: MergeInputs) -> list[Path]:
    """The directories of models; the first one is what an adapter without a base belongs to."""
    named = [name for one in config.vectors for name in (one.base, one.chat) if name]
    found = [inputs.base or inputs.cpt, inputs.cpt, inputs.chat, *map(model_directory, named)]
    return list(dict.fromkeys(path for path in found if path))


def _check(models: Sequence[Path]) -> None:
    """Raise `UserError` for a model that lacks a tensor."""
    from cpt_merge.checkpoint.loaded import open_model
    from cpt_merge.checkpoint.whole_models import check_whole

    for model in models:
        check_whole(open_model(model, models[0] if model != models[0] else None))


def _wait_for(process: subprocess.Popen[str]) -> None:
    answer, errors = process.communicate()
    lines = answer.splitlines()
    refusal = lines.pop() if process.returncode == REFUSED and lines else None
    for line in lines:
        say(line)
    if refusal:
        raise UserError(refusal)
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        say(f"merge: whether the files hold all tensors is not checked ({reason[:200]})")


def main() -> int:
    """Check the models of the command line; messages go to stdout, the refusal is the last one."""
    console.file = sys.stdout
    try:
        _check([Path(one) for one in sys.argv[1:]])
    except UserError as error:
        print(error)
        return REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
