"""A merge that is killed, continued, shared by processes.

Always the bytes of an undisturbed one.
"""

import json
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.artifact import Staging
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World
from cpt_merge.merge import MergeConfig, files
from cpt_merge.merge.files import digest as digest_of_plan
from cpt_merge.merge.files import divide, on_threads
from cpt_merge.merge.norms import Sums
from cpt_merge.merge.plan import plan
from cpt_merge.merge.work import Work, read_blocks, written_blocks
from tests.merge.conftest import save_weights
from tests.merge.test_merge_files import digest, inputs_of, load, merge

ADD = {"ratio": 0.7}
TIES = {"method": "ties", "density": 0.5, "gate": True}
BLOCK = 64  # elements, so that the small models have several hundred blocks

# The command as users run it, but with small blocks, and held for ever after so many of them
MERGE = """
import sys, time
from cpt_merge.launcher.cli import main
from cpt_merge.merge import files, work
files.BLOCK = {block}
note = work.Journal.note
def note_and_hold(self, *arguments):
    note(self, *arguments)
    if self._noted >= {hold}:
        time.sleep(3600)
work.Journal.note = note_and_hold
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def command(processes):
    """Starts `cpt-merge merge-models`; the process never writes more than `hold` blocks."""

    def start(family, out, hold=10**9, **settings):
        environment = {name: settings.pop(name) for name in list(settings) if name.isupper()}
        models = ["--cpt", family.cpt, "--base", family.base, "--chat", family.chat]
        overrides = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        return processes.python(
            "-c", MERGE.format(block=BLOCK, hold=hold), "merge-models", *models,
            "--tokenizer", family.tokenizer, "--out", out, *overrides, env=environment,
        )  # fmt: skip

    return start


def environment_of(rank, size):
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}


def blocks_written(out):
    journals = out.with_name(out.name + ".tmp").glob("written-*.jsonl")
    return sum(path.read_text().count('"block"') for path in journals)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(ADD, id="add"), pytest.param(TIES, id="ties", marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_bytes(
    untied, tmp_path, tracker, command, settings
):
    merge(untied, tmp_path / "whole", tracker, **settings)
    out, moments = tmp_path / "out", random.Random(0)
    for _ in range(2):
        drawn = moments.randint(3, 25)
        wanted = blocks_written(out) + drawn
        process = command(untied, out, hold=drawn + 20, **settings)
        process.wait_until(lambda wanted=wanted: blocks_written(out) >= wanted, f"{wanted} blocks")
        process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
    last = command(untied, out, **settings)
    assert last.finish() == 0, last.stderr
    assert "continuing the unfinished merge" in last.stderr
    assert digest(out) == digest(tmp_path / "whole")
    assert not out.with_name("out.tmp").exists()


@pytest.mark.slow
def test_what_was_written_is_not_written_again(untied, tmp_path, command):
    out = tmp_path / "out"
    process = command(untied, out, hold=40)
    process.wait_until(lambda: blocks_written(out) >= 40)
    process.kill()
    (first,) = out.with_name("out.tmp").glob("written-*.jsonl")
    again = command(untied, out, hold=5)
    again.wait_until(lambda: blocks_written(out) >= 45)
    again.kill()
    done = dict(written_blocks(first.read_bytes())).keys()
    (second,) = set(out.with_name("out.tmp").glob("written-*.jsonl")) - {first}
    assert done.isdisjoint(dict(written_blocks(second.read_bytes())))


@pytest.fixture
def threads_as_ranks(monkeypatch):
    """Runs `work()` in threads, each of which finds itself to be one process of several."""
    here = threading.local()
    monkeypatch.setattr(files, "find_world", lambda: here.world)

    def run(size, work):
        def of_rank(rank):
            here.world = World(rank, size, rank, "torchrun")
            return work()

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(of_rank, range(size)))

    return run


@pytest.mark.parametrize("size", [3])
@pytest.mark.parametrize("settings", [ADD, TIES], ids=["add", "ties"])
def test_any_number_of_processes_gives_the_same_bytes(
    family, tmp_path, tracker, monkeypatch, threads_as_ranks, size, settings
):
    monkeypatch.setattr(files, "BLOCK", BLOCK)
    threads_as_ranks(1, lambda: merge(family, tmp_path / "one", tracker, **settings))
    out = tmp_path / "several"
    results = threads_as_ranks(size, lambda: merge(family, out, tracker, **settings))
    assert results[1:] == [{}] * (size - 1)
    assert digest(out) == digest(tmp_path / "one")
    report = (out / "merge_report.json").read_bytes()
    assert report == (tmp_path / "one" / "merge_report.json").read_bytes()


def test_killed_with_two_processes_it_continues_with_one(untied, tmp_path, tracker, command):
    out = tmp_path / "out"
    both = [command(untied, out, hold=30, **ADD, **environment_of(rank, 2)) for rank in (0, 1)]
    both[0].wait_until(lambda: blocks_written(out) >= 60)
    for process in both:
        process.kill()
    again = command(untied, out, **ADD)
    assert again.finish() == 0, again.stderr
    merge(untied, tmp_path / "whole", tracker, **ADD)
    assert digest(out) == digest(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_done(untied, tmp_path, command):
    out = tmp_path / "out"
    process = command(untied, out, hold=20)
    process.wait_until(lambda: blocks_written(out) >= 20)
    process.signal(signal.SIGINT)
    assert process.finish() == 75
    assert "the same command continues it" in process.stderr
    assert blocks_written(out) == 20


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
    assert [block for block, _ in written_blocks(b"\n".join(lines))] == [0, 1, 2]
    assert dict(written_blocks(journal.read_bytes()))[3] == [Sums(3.5)]
    work.close()


def test_a_line_that_was_cut_off_does_not_count(work):
    work.open()
    work.journal.note(0, [Sums()], 1)
    (journal,) = work.directory.glob("written-*.jsonl")
    assert dict(written_blocks(journal.read_bytes() + b'{"block": 1, "su')) == {0: [Sums()]}
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


# --- cut short while publishing, and after crashes of the machine ---


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
    """A rank continues on its machine; ranks on others then see its blocks as finished."""
    work.open()
    work.journal.note(0, [Sums(1)], 1)
    work.close()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("cpt_merge.merge.work.boot", lambda: "another machine")
        assert read_blocks(work.directory) == {}
    work.open()  # on the same machine again
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("cpt_merge.merge.work.boot", lambda: "another machine")
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


# --- one process fails ---


def test_when_one_process_fails_the_others_stop(untied, tmp_path, command):
    """NaN in a block of one process: all end with the same sentence, and nothing is left."""
    weights = {name: values.clone() for name, values in untied.weights["chat"].items()}
    weights["model.norm.weight"][0] = float("nan")  # the last blocks
    save_weights(weights, untied.chat)
    several = [command(untied, tmp_path / "out", **environment_of(rank, 2)) for rank in range(2)]
    assert [process.finish() for process in several] == [2, 2]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("taken", ["out", "out.tmp"])
def test_an_output_that_is_in_use_ends_all_processes(
    untied, tmp_path, tracker, threads_as_ranks, taken
):
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "mine").touch()

    def refused():
        with pytest.raises(UserError, match=r"is in the way|is not empty"):
            merge(untied, tmp_path / "out", tracker)

    threads_as_ranks(2, refused)
    assert (tmp_path / taken / "mine").exists()


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


def test_few_blocks_are_under_way_at_once():
    """Invariant "flat memory": what is submitted does not grow with the model."""
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
