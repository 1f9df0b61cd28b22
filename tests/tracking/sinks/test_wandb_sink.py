"""W&B offline: its log contains what was logged, once, also after a kill, and no key."""

import socket

import matplotlib.image
import pytest

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.tracking import Artifact, TrackingConfig, read_log, start_tracker
from tests.tracking.wandb_log import attempts, history, inspect, items, records

OFFLINE = TrackingConfig(mode="offline", tags=["test"])
KEY = "local" + "5ec4e7" * 7  # the form of a key; not one


def start(directory, config=OFFLINE, run_id="demo-training-1"):
    return start_tracker(
        config, "training", "demo", "demo-abc", directory, {"training": {"seed": 7}}, run_id
    )


def test_rows_in_the_wandb_log_equal_what_was_logged(tmp_path, capfd):
    tracker = start(tmp_path)
    for step in (5, 10, 15):
        tracker.log({"train/loss": step / 4, "train/tokens": step * 64}, step=step)
    tracker.table("samples", ["prompt", "reply"], [["你好", "안녕"]])
    tracker.alert("finished", "all is well")
    tracker.summary({"loss": 3.75})
    tracker.finish()

    assert (
        history(tmp_path, "train/loss")
        == read_log(tmp_path).series("train/loss")
        == [(5, 1.25), (10, 2.5), (15, 3.75)]
    )
    shown = inspect(attempts(tmp_path)[0].parent)
    assert [record["history"]["item"] for record in shown if record["type"] == "history"] == items(
        attempts(tmp_path)[0]
    )
    run = next(record["run"] for record in shown if record["type"] == "run")
    assert (run["run_id"], run["run_group"], run["job_type"]) == (
        "demo-training-1",
        "demo-abc",
        "training",
    )
    assert run["config"]["update"]["training"] == {"seed": 7}
    metrics = [record["metric"] for record in shown if record["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "train/step"}.items() <= metrics[-1].items()
    assert any(record["type"] == "alert" for record in shown)
    printed = capfd.readouterr().err
    assert f"W&B: logged offline; upload it later with: cpt-merge sync {tmp_path}\n" in printed
    assert len(printed.splitlines()) == 2, printed


def test_steps_done_again_are_in_neither_log_twice(tmp_path):
    first = start(tmp_path)
    first.log({"valid/ko/bits_per_byte": 4.0}, step=0)
    for step in (10, 20, 30):
        first.log({"train/loss": float(step)}, step=step)
    first.finish(failed=True)
    second = start(tmp_path)
    second.resume_from(20)
    for step in (30, 40):
        more = (
            {"train/checkpoint_seconds": 0.5} if step == 30 else {}
        )  # a step done again may have another metric
        second.log({"train/loss": float(step), **more}, step=step)
        second.log(
            {"valid/ko/bits_per_byte": 3.0}, step=step
        )  # at 30 this row is new: the kill came before it
    second.finish()
    expected = [(step, float(step)) for step in (10, 20, 30, 40)]
    assert read_log(tmp_path).series("train/loss") == history(tmp_path, "train/loss") == expected
    assert history(tmp_path, "train/checkpoint_seconds") == [(30, 0.5)]
    bits = [(0, 4.0), (30, 3.0), (40, 3.0)]
    assert (
        read_log(tmp_path).series("valid/ko/bits_per_byte")
        == history(tmp_path, "valid/ko/bits_per_byte")
        == bits
    )


def test_no_key_in_any_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = start(tmp_path)
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.table("samples", ["prompt"], [["hello"]])
    tracker.finish()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_auto_without_a_key_is_offline_and_says_so(tmp_path, capfd):
    tracker = start(tmp_path, TrackingConfig())
    tracker.finish()
    assert tracker.record()["mode"] == "offline"
    assert "W&B: offline (no API key)" in capfd.readouterr().err


def test_auto_with_a_dead_server_is_offline_and_says_so(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = start(tmp_path, TrackingConfig())
    tracker.finish()
    assert tracker.record()["mode"] == "offline"
    assert "http://127.0.0.1:9 does not answer" in capfd.readouterr().err


def test_a_server_that_answers_nonsense_is_no_reason_to_stop(
    tmp_path, capfd, monkeypatch, deaf_server
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", deaf_server)
    tracker = start(tmp_path, TrackingConfig(mode="online"))
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.finish()
    assert tracker.record()["mode"] == "offline"
    assert history(tmp_path, "train/loss") == [(1, 1.0)]
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 2, printed
    assert printed[0].startswith("W&B: offline (")


def test_a_second_run_that_cannot_be_opened_leaves_the_first_alone(
    tmp_path, monkeypatch, deaf_server
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", deaf_server)
    first = start(tmp_path / "training")
    second = start(tmp_path / "merge", TrackingConfig(mode="online"), run_id="demo-merge-1")
    assert second.record()["mode"] == "disabled"
    second.log({"merge/norm": 1.0})
    second.finish()
    first.log({"train/loss": 1.0}, step=1)
    first.finish()
    assert history(tmp_path / "training", "train/loss") == [(1, 1.0)]
    assert read_log(tmp_path / "merge").rows[0]["merge/norm"] == 1.0


def test_two_runs_may_be_open_at_once(tmp_path):
    outer, inner = start(tmp_path / "training"), start(tmp_path / "merge", run_id="demo-merge-1")
    outer.log({"train/loss": 1.0}, step=1)
    inner.log({"train/loss": 5.0}, step=7)
    inner.finish()
    outer.log({"train/loss": 2.0}, step=2)
    outer.finish()
    assert history(tmp_path / "training", "train/loss") == [(1, 1.0), (2, 2.0)]
    assert history(tmp_path / "merge", "train/loss") == [(7, 5.0)]


def test_settings_of_the_environment_that_wandb_refuses_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(
        UserError, match=r"WANDB_\* variables: mode .*'online', 'offline'.*fix or unset them"
    ):
        start(tmp_path)


def test_online_without_a_key_is_an_error(tmp_path):
    with pytest.raises(UserError, match="wandb login"):
        start(tmp_path, TrackingConfig(mode="online"))


END = """
import os, subprocess, time
from pathlib import Path

def find_service():
    own = ["pgrep", "-P", str(os.getpid()), "wandb-core"]
    (found,) = subprocess.run(own, capture_output=True, text=True).stdout.split()
    return int(found)

def wait_for_end(process):
    for _ in range(500):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    raise TimeoutError
"""


def test_slurms_signals_end_neither_the_service_nor_the_rows_after_them(tmp_path, processes):
    """Slurm signals all processes of a task, wandb's service too, before the last rows."""
    code = f"""{END}
import signal
from cpt_merge.tracking import TrackingConfig, start_tracker
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
config, out = TrackingConfig(mode="offline"), Path({str(tmp_path)!r})
tracker = start_tracker(config, "training", "demo", "g", out, {{}}, "id")
tracker.log({{"train/loss": 1.0}}, step=1)
time.sleep(1.5)  # rows younger than a second are lost with the service
service = find_service()
for pid in (service, os.getpid()):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
wait_for_end(service)
tracker.log({{"train/loss": 2.0}}, step=2)
tracker.finish()
"""
    done = processes.run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "only the local log" not in done.stderr
    assert history(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_a_service_that_cannot_be_started_again_is_reported_once(tmp_path, processes):
    code = f"""{END}
from cpt_merge.tracking import TrackingConfig, start_tracker
config, out = TrackingConfig(mode="offline"), Path({str(tmp_path)!r})
tracker = start_tracker(config, "training", "demo", "g", out, {{}}, "id")
service = find_service()
os.kill(service, 9)
wait_for_end(service)
from wandb.sdk.lib.service import service_process
service_process.get_core_path = lambda: "/nowhere"
for step in range(1, 4):
    tracker.log({{"train/loss": 1.0}}, step=step)
    tracker.alert("a", "b")
tracker.finish()
os._exit(0)  # wandb's own end would complain about its service
"""
    done = processes.run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("only the local log") == 1, done.stderr
    assert read_log(tmp_path).series("train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_on_request_each_node_is_measured_in_a_run_of_its_own(tmp_path, monkeypatch):
    world = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    start(tmp_path / "off").resume_from(0)
    assert not (tmp_path / "off").exists()
    tracker = start(tmp_path, TrackingConfig(mode="offline", system_metrics="nodes"))
    assert not (tmp_path / "nodes").exists(), "not before the first process has made room"
    write_json(
        tmp_path / "run.json", {"group": "demo-abc", "run_id": "demo-training-1-2"}
    )  # by the first process
    tracker.resume_from(0)
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.finish()
    node = f"demo-training-1-2-{socket.gethostname()}"
    (log,) = attempts(tmp_path / "nodes" / node)
    kinds = [record.WhichOneof("record_type") for record in records(log)]
    assert "stats" in kinds
    assert "history" not in kinds
    run = next(record.run for record in records(log) if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.job_type, run.run_group) == (node, "system", "demo-abc")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = start(tmp_path / "second", TrackingConfig(mode="offline", system_metrics="nodes"))
    second.resume_from(0)
    assert not (tmp_path / "second").exists(), "one process of a node is enough"


def test_all_that_a_stage_can_show_arrives(tmp_path, server):
    figure, results = tmp_path / "figure.png", tmp_path / "results.json"
    matplotlib.image.imsave(figure, [[0.0, 1.0]])
    results.write_text('{"a": 1}')
    tracker = start(tmp_path / "log", TrackingConfig())
    tracker.artifact(Artifact("text-ko", "text", results.as_uri(), "stage:0123", used=True))
    tracker.artifact(Artifact("demo-cpt", "model", tmp_path.as_uri(), "stage:4567", used=False))
    tracker.log({"train/loss": 1.0, "train/tokens": 64.0}, step=1)
    tracker.curves(
        "merge/length by layer",
        ["curve", "layer", "length"],
        [["vector", 0, 0.5], ["vector", 1, 0.25]],
    )
    tracker.curves("merge/nothing", ["curve", "layer", "length"], [])
    tracker.table("samples", ["reply"], [["안녕"]])
    tracker.image("figures/loss", figure)
    tracker.file("results.json", results)
    tracker.alert("loss spike", "step 1")
    tracker.summary({"steps": 1})
    tracker.finish()
    run = server.runs["demo-training-1"]
    assert run.files["results.json"] == results.read_bytes()
    assert any(name.startswith("media/images/figures/loss") for name in run.files)
    assert any(name.startswith("media/table/samples") for name in run.files)
    assert "merge/length by layer" in run.config["_wandb"]["visualize"]
    assert run.alerts == [{"title": "loss spike", "text": "step 1"}]
    assert run.summary["steps"] == 1
    assert (run.used, run.logged) == (
        ["text-ko:v0"],
        ["text-ko:v0", "demo-cpt:v0", *run.logged[2:]],
    )
    assert server.artifacts[0].manifest["contents"]["stage-0123"]["ref"] == results.as_uri()
    assert server.artifacts[0].files == {}
    assert server.unknown == []
    log = read_log(tmp_path / "log")
    assert log.tables["merge/length by layer"].rows == [["vector", 0, 0.5], ["vector", 1, 0.25]]
    assert log.files["results.json"].read_bytes() == results.read_bytes()
    assert [one.name for one in log.artifacts] == ["text-ko", "demo-cpt"]


def test_an_alert_names_the_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    tracker = start(tmp_path, TrackingConfig(mode="disabled"))
    tracker.resume_from(0)
    tracker.alert("no step ends", "rank 3 hangs")
    assert read_log(tmp_path).alerts[0]["text"] == "rank 3 hangs (Slurm job 4711)"
