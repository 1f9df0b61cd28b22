"""`cpt-merge submit`: the calls of sbatch that it prints; tests/slurm has those that it makes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.submit import SCRIPTS, Submission, submit
from tests.processes import ROOT, Processes

RECIPE = Path("recipes/my model.yaml")


@pytest.fixture(autouse=True)
def _anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command works in any directory, also in one with a folder `slurm`."""
    (tmp_path / "slurm").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CPT_MERGE_PYTHON", raising=False)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of commands; it has bash."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_sbatch(folder: Path, body: str) -> None:
    (folder / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "sbatch").chmod(0o755)


def printed(submission: Submission, capsys: pytest.CaptureFixture[str]) -> list[str]:
    submit(submission, dry_run=True)
    said = capsys.readouterr()
    assert said.out == ""  # nothing was submitted, so no job has a number
    return said.err.replace("cpt-merge: ", "").splitlines()


def test_a_dry_run_prints_a_call_that_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--qos=long"]
    asked = Submission(RECIPE, ["training.tokens=1e9"], 2, 8, time="24:00:00", options=options)
    (call,) = printed(asked, capsys)
    assert shlex.split(call) == [
        f"CPT_MERGE_SLURM={ROOT / 'slurm'}",
        f"CPT_MERGE_PYTHON={sys.executable}",
        *"sbatch --parsable --nodes=2 --gpus-per-node=8 --time=24:00:00 --qos=long".split(),
        str(ROOT / "slurm" / "cpt_merge.sh"),
        "recipes/my model.yaml",
        "training.tokens=1e9",
    ]


def test_every_job_of_a_chain_waits_for_all_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = printed(Submission(RECIPE, [], tasks_per_node=4, chain=3), capsys)
    assert "--dependency" not in first
    assert "--ntasks-per-node=4 --dependency=afternotok:JOB1 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afternotok:JOB1,afternotok:JOB2" in third


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (None, "sbatch is not available; submit on a login node"),
        ("echo 'sbatch: error: invalid partition: gpu' >&2; exit 1", "sbatch refused the job"),
    ],
)
def test_the_message_of_sbatch_is_passed_on(
    body: str | None, sentence: str, bin_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if body:
        write_sbatch(bin_folder, body)
    with pytest.raises(UserError, match=sentence):
        submit(Submission(RECIPE, []), dry_run=False)
    assert not body or "invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chain", "option", "sentence"),
    [
        (1, "qos=long", "--sbatch=qos=long is not an option of sbatch"),
        (2, "--dependency=after:3", "--chain sets sbatch's --dependency itself"),
        (2, "-dafter:3", "--chain sets sbatch's --dependency itself"),
    ],
)
def test_options_that_make_no_sense(chain: int, option: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        submit(Submission(RECIPE, [], chain=chain, options=[option]), dry_run=True)


@pytest.mark.parametrize("settings", ["if then (", "set -u; echo $NOT_SET", "exit 3", None])
def test_a_broken_site_file_is_named_by_the_command_and_by_the_job(
    settings: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: Processes,
) -> None:
    site = tmp_path / "site.sh"
    if settings:
        site.write_text(f"{settings}\n")
    monkeypatch.setenv("CPT_MERGE_SITE", str(site))
    with pytest.raises(UserError, match="the site's settings cannot be used"):
        submit(Submission(RECIPE, []), dry_run=False)
    advice = "fix it" if settings else "correct it or leave it out"
    said = capsys.readouterr().err
    assert f"{site} " in said
    assert advice in said
    job = processes.run("bash", SCRIPTS / "cpt_merge.sh", "recipe.yaml", cwd=ROOT)
    assert job.returncode == 2
    assert advice in job.stderr


def test_the_job_says_where_its_scripts_are_missing(tmp_path: Path, processes: Processes) -> None:
    job = processes.run("bash", SCRIPTS / "cpt_merge.sh", "recipe.yaml", cwd=tmp_path)
    assert job.returncode == 2
    assert "call sbatch in the root of a checkout, or use cpt-merge submit" in job.stderr


def test_the_site_may_set_options_of_sbatch_and_the_python(
    tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "export SBATCH_ACCOUNT=us CPT_MERGE_PYTHON='apptainer python'"
    (tmp_path / "site.sh").write_text(settings)
    monkeypatch.setenv("CPT_MERGE_SITE", str(tmp_path / "site.sh"))
    write_sbatch(bin_folder, f'echo "$SBATCH_ACCOUNT: $CPT_MERGE_PYTHON" >{tmp_path}/seen; echo 7')
    submit(Submission(RECIPE, []), dry_run=False)
    assert (tmp_path / "seen").read_text() == "us: apptainer python\n"


def test_the_command_that_it_names_at_the_end_can_be_typed(
    bin_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sbatch(bin_folder, "echo '12;cluster'")
    submit(Submission(RECIPE, ["name=a b"]), dry_run=False)
    said = capsys.readouterr()
    assert said.out == "12\n"
    status = "`cpt-merge status 'recipes/my model.yaml' 'name=a b'`"
    assert f"its log is cpt-merge-12.log; {status} shows its progress" in said.err
    submit(Submission(RECIPE, [], options=["--output=x.log"]), dry_run=False)
    assert "its log is" not in capsys.readouterr().err
