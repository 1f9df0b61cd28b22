"""A merge that is killed, continued, shared by processes: always the bytes of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.artifact import Staging
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import digest as digest_of_plan
from cpt_merge.merge.files import divide, on_threads
from cpt_merge.merge.journal import read_blocks, trusted
from cpt_merge.merge.norms import Sums
from cpt_merge.merge.plan import plan
from cpt_merge.merge.work import Work
from tests.merge.conftest import save_weights
from tests.merge.test_merge_run import digest, inputs_of, load, merge

# A merge as users run it, but in small blocks and slow enough to be killed in between.
SLOW = """
import sys, time
from pathlib import Path
from cpt_merge.launcher.cli import main
from cpt_merge.merge import files, journal
files.BLOCK = 128
note = journal.Journal.note
def slow(self, *arguments):
    note(self, *arguments)
    time.sleep({pause})
journal.Journal.note = slow
sys.exit(main(sys.argv[1:]))
"""


def start(family, out, *settings, pause=0.004, **environment):
    models = [
        "--cpt",
        family.cpt,
        "--base",
        family.base,
        "--chat",
        family.chat,
        "--tokenizer",
        family.tokenizer,
    ]
    command = [
        sys.executable,
        "-c",
        SLOW.format(pause=pause),
        "merge-models",
        *models,
        "--out",
        out,
        *settings,
    ]
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def blocks_written(out):
    return sum(
        path.read_text().count('"block"')
        for path in out.with_name(out.name + ".tmp").glob("written-*.jsonl")
    )


def wait_for(condition, process):
    """Until it holds. Fails if the process ends before, or after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    "settings", [["ratio=0.7"], ["method=ties", "density=0.5", "gate=true"]], ids=["add", "ties"]
)
def test_killed_again_and_again_it_ends_in_the_same_bytes(untied, tmp_path, settings):
    undisturbed = start(untied, tmp_path / "whole", *settings, pause=0)
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    out, moments = tmp_path / "out", random.Random(0)
    for kill in range(4):
        process, wanted = (
            start(untied, out, *settings),
            blocks_written(out) + moments.randint(5, 25),
        )
        wait_for(lambda wanted=wanted: blocks_written(out) >= wanted, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"kill {kill} came too late"
        assert not out.exists()
    last = start(untied, out, *settings, pause=0)
    assert last.wait() == 0
    assert "continuing what was cut short" in last.stderr.read()
    assert digest(out) == digest(tmp_path / "whole")
    assert (out / "merge_report.json").read_text() == (
        tmp_path / "whole" / "merge_report.json"
    ).read_text()
    assert not out.with_name("out.tmp").exists()


def test_what_was_written_is_not_written_again(untied, tmp_path):
    out = tmp_path / "out"
    process = start(untied, out)
    wait_for(lambda: blocks_written(out) >= 40, process)
    process.kill()
    process.wait()
    before, (first,) = blocks_written(out), out.with_name("out.tmp").glob("written-*.jsonl")
    again = start(untied, out)
    wait_for(lambda: blocks_written(out) > before, again)
    again.kill()
    again.wait()
    done = dict(trusted(first.read_bytes())).keys()
    (second,) = set(out.with_name("out.tmp").glob("written-*.jsonl")) - {first}
    assert done.isdisjoint(dict(trusted(second.read_bytes())))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "settings", [["ratio=0.7"], ["method=ties", "density=0.5", "gate=true"]], ids=["add", "ties"]
)
def test_processes_share_the_work_and_give_the_same_bytes(family, tmp_path, size, settings):
    assert start(family, tmp_path / "one", *settings, pause=0).wait() == 0
    out = tmp_path / "several"
    processes = [
        start(
            family,
            out,
            *settings,
            pause=0,
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
        )
        for rank in range(size)
    ]
    for process in processes:
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert digest(out) == digest(tmp_path / "one")
    assert (out / "merge_report.json").read_bytes() == (
        tmp_path / "one" / "merge_report.json"
    ).read_bytes()


def test_killed_with_two_processes_it_continues_with_one(untied, tmp_path):
    out, ranks = (
        tmp_path / "out",
        [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"} for rank in (0, 1)],
    )
    processes = [start(untied, out, **environment) for environment in ranks]
    wait_for(lambda: blocks_written(out) >= 30, processes[0])
    for process in processes:
        process.kill()
        process.wait()
    assert start(untied, out, pause=0).wait() == 0
    assert start(untied, tmp_path / "whole", pause=0).wait() == 0
    assert digest(out) == digest(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_done(untied, tmp_path):
    out = tmp_path / "out"
    process = start(
        untied, out, pause=0.05
    )  # long enough for the signal to come before the end, also on a busy machine
    wait_for(lambda: blocks_written(out) >= 20, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 75
    assert "the same command continues it" in process.stderr.read()
    assert blocks_written(out) >= 20


def test_the_same_command_again_has_nothing_to_do(untied, tmp_path, tracker, capsys):
    first = merge(untied, tmp_path / "out", tracker)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert merge(untied, tmp_path / "out", tracker) == json.loads(json.dumps(first))
    assert "already" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


# --- what an earlier attempt left ---


@pytest.fixture
def work(untied, tmp_path):
    the_plan = plan(MergeConfig(), inputs_of(untied))
    return Work(tmp_path / "out", the_plan.layout(), digest_of_plan(the_plan), World())


def test_another_merge_s_leftovers_are_not_continued(untied, work, tmp_path, tracker, capsys):
    work.open()
    work.journal.note(0, [Sums()], 1)
    work.close()
    merge(untied, tmp_path / "out", tracker, ratio=0.3)
    assert "starting over" in capsys.readouterr().err
    merge(untied, tmp_path / "other", tracker, ratio=0.3)
    assert digest(tmp_path / "out") == digest(tmp_path / "other")


def test_two_commands_do_not_share_an_output_by_mistake(untied, work, tmp_path, tracker):
    work.open()
    with pytest.raises(UserError, match="in use by process"):
        merge(untied, tmp_path / "out", tracker)
    work.close()
    merge(untied, tmp_path / "out", tracker)
    assert load(tmp_path / "out")


def test_a_directory_that_is_no_leftover_is_not_touched(untied, tmp_path, tracker):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").touch()
    with pytest.raises(UserError, match="is in the way"):
        merge(untied, tmp_path / "out", tracker)
    assert (tmp_path / "out.tmp" / "mine").exists()


def test_after_a_crash_of_the_machine_only_synced_blocks_count(work):
    work.open()
    for block in range(3):
        work.journal.note(block, [Sums(block)], 1)
    work.journal.start_sync()
    work.journal.finish_sync()
    work.journal.note(3, [Sums(3.5)], 1)
    assert sorted(work.finished_blocks()) == [0, 1, 2, 3]
    (journal,) = work.directory.glob("written-*.jsonl")
    lines = journal.read_bytes().split(b"\n")
    lines[0] = json.dumps({"boot": "another start"}).encode()
    assert [block for block, _ in trusted(b"\n".join(lines))] == [0, 1, 2]
    assert dict(trusted(journal.read_bytes()))[3] == [Sums(3.5)]
    work.close()


def test_a_line_that_was_cut_off_does_not_count(work):
    work.open()
    work.journal.note(0, [Sums()], 1)
    (journal,) = work.directory.glob("written-*.jsonl")
    assert dict(trusted(journal.read_bytes() + b'{"block": 1, "su')) == {0: [Sums()]}
    work.close()


def test_blocks_hold_whole_rows_where_rows_matter(untied, monkeypatch):
    monkeypatch.setattr("cpt_merge.merge.files.BLOCK", 100)
    the_plan = plan(MergeConfig(), inputs_of(untied))
    blocks = divide(the_plan)
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert all(
        block.start % 32 == 0 and block.stop % 32 == 0 for block in blocks if block.tensor.by_token
    )
    assert sum(block.nbytes for block in blocks) == the_plan.layout().nbytes


# --- what the first version got wrong ---


@pytest.mark.parametrize("moment", ["before the name", "after the name"])
def test_killed_while_it_is_published_the_same_command_finishes(
    untied, tmp_path, monkeypatch, moment, tracker
):
    """The directory is known as unfinished until the very end, under either name."""
    merge(untied, tmp_path / "whole", tracker)

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before the name":
            patch.setattr("cpt_merge.core.artifact.os.replace", _only_for("out", killed))
        else:
            patch.setattr(Staging, "_remove_scratch", killed)
        with pytest.raises(Killed):
            merge(untied, tmp_path / "out", tracker)
    assert (tmp_path / "out").exists() == (moment == "after the name")
    if moment == "after the name":
        with pytest.raises(UserError, match="never finished"):
            Checkpoint.open(tmp_path / "out")
    merge(untied, tmp_path / "out", tracker)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out", "whole"}


def _only_for(name, instead):
    replace = os.replace
    return lambda source, target: (
        instead() if os.fspath(target).endswith(f"/{name}") else replace(source, target)
    )


def test_a_header_that_a_crash_of_the_machine_lost_is_written_again(
    untied, work, tmp_path, tracker
):
    merge(untied, tmp_path / "whole", tracker)
    work.open()
    work.close()
    (work.directory / "model.safetensors").write_bytes(b"")
    merge(untied, tmp_path / "out", tracker)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_blocks_of_a_killed_process_count_on_other_machines_once_they_were_synced(
    work, monkeypatch
):
    """Rank 1 takes up its own work on its machine; rank 0 on another sees the same blocks as finished."""
    work.open()
    work.journal.note(0, [Sums(1)], 1)
    work.close()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("cpt_merge.merge.journal.boot", lambda: "another machine")
        assert read_blocks(work.directory) == {}
    work.open()  # on the same machine again
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("cpt_merge.merge.journal.boot", lambda: "another machine")
        assert read_blocks(work.directory) == {0: [Sums(1)]}
    work.close()


def test_a_write_that_failed_in_the_background_is_not_forgotten(work, monkeypatch):
    work.open()

    def broken():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(work.journal, "_sync_files", broken)
    work.journal.start_sync()
    with pytest.raises(OSError, match="Input/output"):
        work.journal.start_sync()
    work.close()


def test_when_one_process_gives_up_the_others_do(untied, tmp_path):
    """NaN in a block of the second process: both end with the same sentence, and nothing is left."""
    weights = {name: values.clone() for name, values in untied.weights["chat"].items()}
    weights["model.norm.weight"][0] = float("nan")  # the last blocks
    save_weights(weights, untied.chat)
    processes = [
        start(untied, tmp_path / "out", pause=0, RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK="0")
        for rank in range(3)
    ]
    for process in processes:
        assert process.wait(timeout=60) == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_a_process_that_begins_when_all_is_over_learns_why(untied, tmp_path):
    the_plan = plan(MergeConfig(), inputs_of(untied))
    first, late = (
        Work(
            tmp_path / "out",
            the_plan.layout(),
            digest_of_plan(the_plan),
            World(rank, 2, rank, "torchrun"),
        )
        for rank in range(2)
    )
    first.open()
    first.abandon("NaN in the chat model.", useless=True)
    with pytest.raises(UserError, match="NaN in the chat model"):
        late.open()
    first.open()  # a new attempt begins without it
    late.open()
    late.close()
    first.abandon("", useless=True)


def test_what_stops_the_first_process_from_beginning_ends_all(untied, tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").touch()
    processes = [
        start(untied, tmp_path / "out", pause=0, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
        for rank in range(2)
    ]
    assert [process.wait(timeout=60) for process in processes] == [2, 2]
    assert (tmp_path / "out.tmp" / "mine").exists()


def test_a_refused_output_ends_all_processes(untied, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    processes = [
        start(untied, tmp_path / "out", pause=0, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
        for rank in range(2)
    ]
    assert [process.wait(timeout=60) for process in processes] == [2, 2]


def test_few_blocks_are_under_way_at_once():
    """Law 8: what is submitted does not grow with the model."""
    under_way, most = 0, 0
    lock = threading.Lock()

    def run(number):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        return number

    for number, expected in zip(on_threads(run, 5000), range(5000), strict=True):
        assert number == expected
        with lock:
            under_way -= 1
    assert most < 50
