"""`cpt-merge submit`: the sbatch calls that it prints. Those that it makes are tested on Slurm, in tests/slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import UserError
from launcher.submit import Submission, submit
from tests.launcher.conftest import ROOT

RECIPE = Path("recipes/my model.yaml")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def printed(submission: Submission, capsys: pytest.CaptureFixture[str]) -> list[str]:
    submit(submission, dry_run=True)
    said = capsys.readouterr()
    assert said.out == ""  # nothing was submitted, so there is no number of a job
    return said.err.replace("cpt-merge: ", "").splitlines()


def test_a_dry_run_prints_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Submission(RECIPE, ["training.tokens=1e9"], 2, gpus_per_node=8, time="24:00:00", options=["--qos=long"])
    assert printed(asked, capsys) == [
        "sbatch --parsable --nodes=2 --gpus-per-node=8 --time=24:00:00 --qos=long slurm/cpt_merge.sh "
        "'recipes/my model.yaml' training.tokens=1e9"
    ]


def test_every_job_of_a_chain_waits_for_all_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = printed(Submission(RECIPE, [], tasks_per_node=4, chain=3), capsys)
    assert "--dependency" not in first
    assert "--ntasks-per-node=4 --dependency=afternotok:JOB1 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afternotok:JOB1,afternotok:JOB2" in third


def test_outside_the_repository_it_says_where_to_call_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="call `cpt-merge submit` in the repository's root"):
        submit(Submission(RECIPE, []), dry_run=True)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (None, "sbatch is not here; submit on a login node"),
        ("echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1", "sbatch refused the job"),
    ],
)
def test_what_sbatch_says_is_passed_on(
    body: str | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    if body:
        (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=sentence):
        submit(Submission(RECIPE, []), dry_run=False)
    assert not body or "invalid partition" in capsys.readouterr().err
