"""A Slurm job as its first node sees it, with reports by hand where no real node can give them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_merge.cluster.preflight.reports import (
    NONCE_FILE,
    STEPS,
    NodeReport,
    ProcessReport,
    folder_of,
    open_reports,
)
from cpt_merge.launcher.cli import main
from cpt_merge.launcher.recipe import load_recipe

JOB = {"SLURM_JOB_ID": "17"}


class PreflightJob:
    """A job's recipe, its folder of reports, and the calls of the batch script."""

    def __init__(
        self, recipe_path: Path, runs: Path, capsys: pytest.CaptureFixture[str], *overrides: str
    ) -> None:
        self.arguments = [str(recipe_path), f"runs={runs}", *overrides]
        self.recipe = load_recipe(recipe_path, self.arguments[1:])
        self.folder = folder_of(self.recipe)
        self.capsys = capsys

    def call(self, *options: str, overrides: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self.capsys.readouterr()
        code = main(["preflight", *self.arguments, *overrides, *options])
        return code, *self.capsys.readouterr()

    def report(self, node: str, **changes: object) -> None:
        """Write the report of a node without a fault, but for `changes`."""
        nonce = json.loads((self.folder / NONCE_FILE).read_text())["nonce"]
        same = {"code": {"digest": "aa"}, "packages": {"torch": "2.13.0", "numpy": "2.4"}}
        values = {"node": node, "nonce": nonce, "doing": "", "same": same} | changes
        NodeReport(**values).write(self.folder)

    def process(
        self, node: str, rank: int, size: int, step: str = "done", **changes: object
    ) -> None:
        """Write the report of a process of the network test."""
        number = STEPS.index(step)
        values = {"node": node, "rank": rank, "size": size, "step": number, "clock": 1e9} | changes
        ProcessReport(**values).write(self.folder)


@pytest.fixture
def job(
    recipe_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., PreflightJob]:
    """Makes a job with some overrides, as `--begin` leaves it once it has checked the inputs."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)

    def begun(*overrides: str) -> PreflightJob:
        new = PreflightJob(recipe_path, tmp_path / "runs", capsys, *overrides)
        open_reports(new.recipe)
        return new

    return begun
