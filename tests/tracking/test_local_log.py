"""The local log: what is written, what an interrupted stage keeps."""

import json
import math

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.tracking import TrackingConfig, read_log, start_tracker

LOCAL = TrackingConfig(mode="disabled")


def start(directory, run_id="run-1", config=LOCAL):
    return start_tracker(
        config, "training", "demo", "demo-abc", directory, {"training": {"seed": 0}}, run_id
    )


def steps(directory):
    return [row["train/step"] for row in read_log(directory).rows]


def test_everything_logged_is_read_back(tmp_path):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"\x89PNG")
    tracker = start(tmp_path / "log")
    tracker.log({"train/loss": 2.5, "train/tokens": 64}, step=1)
    tracker.log({"train/loss": math.nan}, step=2)
    tracker.table("samples/chat", ["prompt", "score"], [["안녕", 1.0], ["你好", None]])
    tracker.image("figures/loss", figure)
    tracker.summary({"loss": 2.5})
    tracker.summary({"tokens": 64})
    tracker.alert("non-finite", "step 2")
    tracker.finish()

    log = read_log(tmp_path / "log")
    assert log.series("train/loss")[0] == (1, 2.5)
    assert math.isnan(log.series("train/loss")[1][1])
    assert log.series("train/loss", by="train/tokens") == [(64, 2.5)]
    assert log.tables["samples/chat"].rows == [["안녕", 1.0], ["你好", None]]
    assert log.images["figures/loss"].read_bytes() == b"\x89PNG"
    assert log.summary == {"loss": 2.5, "tokens": 64}
    assert log.alerts[0]["title"] == "non-finite"
    assert log.run["settings"] == {"training": {"seed": 0}}
    assert tracker.record() == {"mode": "disabled", "run_id": "run-1", "group": "demo-abc"}


def test_resume_cuts_off_the_steps_that_are_done_again(tmp_path):
    first = start(tmp_path)
    for step in (10, 20, 30):
        first.log({"train/loss": float(step)}, step=step)
        first.log({"valid/ko/bits_per_byte": 1.0}, step=step)
    second = start(tmp_path)
    second.resume_from(20)
    second.log({"train/loss": 30.5}, step=30)
    assert steps(tmp_path) == [10, 10, 20, 20, 30]
    assert read_log(tmp_path).series("train/loss")[-1] == (30, 30.5)


@pytest.mark.parametrize("resume", [False, True])
def test_a_stage_without_a_checkpoint_starts_over(tmp_path, resume):
    first = start(tmp_path)
    first.log({"valid/loss": 1.0}, step=0)
    first.log({"train/loss": 1.0}, step=10)
    second = start(tmp_path)
    if resume:
        second.resume_from(0)
    else:
        assert steps(tmp_path) == [0, 10], "nothing is thrown away before there is something new"
    second.log({"valid/loss": 9.0}, step=0)
    assert steps(tmp_path) == [0]


def test_an_attempt_that_ends_before_it_logs_anything_loses_nothing(tmp_path):
    first = start(tmp_path)
    first.log({"train/loss": 1.0}, step=10)
    first.table("train/continuations", ["step"], [[10]])
    (tmp_path / "alerts.jsonl").write_text(
        '{"time": 1.0, "title": "loss spike", "text": "step 9"}\n{"time": 2'
    )
    second = start(tmp_path)
    second.alert("training stopped", "by SIGTERM")
    second.finish()
    log = read_log(tmp_path)
    assert steps(tmp_path) == [10]
    assert [alert["title"] for alert in log.alerts] == ["loss spike", "training stopped"]
    assert log.tables["train/continuations"].rows == [[10]]


def test_an_early_alert_stays_where_a_stage_starts_over(tmp_path):
    start(tmp_path).log({"train/loss": 1.0}, step=10)
    second = start(tmp_path)
    second.alert("no step ends", "rank 3 hangs")
    second.log({"train/loss": 2.0}, step=1)
    assert steps(tmp_path) == [1]
    assert read_log(tmp_path).alerts[0]["title"] == "no step ends"


def test_a_row_cut_off_by_a_kill_is_left_out(tmp_path):
    start(tmp_path).log({"train/loss": 1.0}, step=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"time": 1.0, "train/lo')
    assert steps(tmp_path) == [1]
    second = start(tmp_path)
    second.resume_from(1)
    second.log({"train/loss": 2.0}, step=2)
    assert [
        json.loads(line)["train/step"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    tracker = start(tmp_path / "log")
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.finish()
    assert tracker.record() == {}
    assert not (tmp_path / "log").exists()


def test_a_damaged_log_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"train/loss": 1.0}\n{"train/lo\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        read_log(tmp_path)
