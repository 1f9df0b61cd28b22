"""The first call, on one node: what would stop the run on any node; the nonce."""

from __future__ import annotations

import secrets
import shutil

from cpt_merge.cluster.preflight.reports import NONCE_FILE, folder_of, node_name
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.inputs import check_inputs
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.sizes import disk_needed, extended_rows, shape_of
from cpt_merge.launcher.stages import STAGES

GB = 1e9


def begin(recipe: Recipe) -> None:
    """Check the inputs and the disk, and open an empty folder of reports. Raises `UserError`."""
    check_inputs(recipe)
    _check_disk(Run(recipe))
    folder = folder_of(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / NONCE_FILE, {"nonce": secrets.token_hex(8), "node": node_name()})


def _check_disk(run: Run) -> None:
    """Raises `UserError` if the run's disk has no room for what the run has still to write."""
    recipe = run.recipe
    base = shape_of(run.base, recipe.models.base)
    needed = disk_needed(base.resized(extended_rows(recipe, base)), recipe.training)
    written = sum(
        path.stat().st_size
        for stage in STAGES
        for path in run.folder(stage.name).rglob("*")
        if path.is_file()
    )
    places = (recipe.directory, *recipe.directory.absolute().parents)
    free = shutil.disk_usage(next(place for place in places if place.is_dir())).free
    if free < needed.total - written:
        raise UserError(
            f"{recipe.directory} has {free / GB:,.2f} GB left and the run takes {needed}, of which "
            f"{written / GB:,.2f} GB are already written; free disk space, lower "
            "training.checkpoints.keep, or move `runs`."
        )
