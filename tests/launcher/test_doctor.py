"""`cpt-merge doctor`: what it says of processes and of Slurm."""

import os
from pathlib import Path

import pytest

from cpt_merge.launcher.doctor import _processes, _slurm


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert next(_processes()).found == "rank 0 of 1, started alone"


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that comes first; it has sbatch."""
    script(tmp_path, "sbatch", "")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_what_sinfo_says_is_not_cut_within_a_word(commands: Path) -> None:
    script(commands, "sinfo", f"echo 'sinfo: error: {'unreachable ' * 50}' >&2; exit 1")
    found = next(_slurm()).found
    assert found.endswith("unreachable ...")
    assert len(found) <= 300


def test_partitions_that_are_left_out_are_counted(commands: Path) -> None:
    script(commands, "sinfo", "for n in 1 2 3 4 5 6 7 8; do echo part$n 4 idle; done")
    found = next(_slurm()).found
    assert found.endswith("part6 4 idle; 2 more")
