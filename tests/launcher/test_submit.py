"""`cpt-merge submit`: the sbatch calls that it prints. Those that it makes are tested on Slurm, in tests/slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.submit import Submission, submit
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
    asked = Submission(
        RECIPE, ["training.tokens=1e9"], 2, gpus_per_node=8, time="24:00:00", options=["--qos=long"]
    )
    assert printed(asked, capsys) == [
        "sbatch --parsable --nodes=2 --gpus-per-node=8 --time=24:00:00 --qos=long slurm/cpt_merge.sh "
        "'recipes/my model.yaml' training.tokens=1e9"
    ]


def test_every_job_of_a_chain_waits_for_all_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = printed(Submission(RECIPE, [], tasks_per_node=4, chain=3), capsys)
    assert "--dependency" not in first
    assert "--ntasks-per-node=4 --dependency=afternotok:JOB1 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afternotok:JOB1,afternotok:JOB2" in third


def test_outside_the_repository_it_says_where_to_call_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="call `cpt-merge submit` in the repository's root"):
        submit(Submission(RECIPE, []), dry_run=True)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (None, "sbatch is not here; submit on a login node"),
        (
            "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1",
            "sbatch refused the job",
        ),
    ],
)
def test_what_sbatch_says_is_passed_on(
    body: str | None,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    if body:
        (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=sentence):
        submit(Submission(RECIPE, []), dry_run=False)
    assert not body or "invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Submission(RECIPE, [], options=["qos=long"]), "--sbatch=qos=long is no option of sbatch"),
        (
            Submission(RECIPE, [], chain=2, options=["--dependency=after:3"]),
            "--chain sets sbatch's --dependency itself",
        ),
        (
            Submission(RECIPE, [], chain=2, options=["-dafter:3"]),
            "--chain sets sbatch's --dependency itself",
        ),
    ],
)
def test_options_that_make_no_sense(asked: Submission, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        submit(asked, dry_run=True)


@pytest.mark.parametrize("site", ["if then (", "set -u; echo $NOT_SET", "exit 3"])
def test_a_broken_site_file_is_named(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slurm").mkdir()
    for name in ("cpt_merge.sh", "read_site.sh"):
        (tmp_path / "slurm" / name).write_text((ROOT / "slurm" / name).read_text())
    (tmp_path / "slurm" / "site.sh").write_text(f"{site}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"slurm/site.sh does not work"):
        submit(Submission(RECIPE, []), dry_run=False)
    assert "mend it" in capsys.readouterr().err
    script = ["bash", "slurm/cpt_merge.sh", "recipe.yaml"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "slurm/site.sh" in done.stderr


def test_what_it_says_at_the_end_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho '12;cluster'\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    submit(Submission(RECIPE, ["name=a b"]), dry_run=False)
    said = capsys.readouterr()
    assert said.out == "12\n"
    assert (
        "its log is cpt-merge-12.log; `cpt-merge status 'recipes/my model.yaml' 'name=a b'` shows"
        in said.err
    )
    submit(Submission(RECIPE, [], options=["--output=x.log"]), dry_run=False)
    assert "its log is" not in capsys.readouterr().err
