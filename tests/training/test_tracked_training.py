"""Training that is killed and resumed while it logs online: the server has the rows that were logged."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from cpt_merge.data.sources import Corpus
from cpt_merge.tracking import TrackingConfig, read_log, start_tracker
from tests.tracking.conftest import KEY
from tests.tracking.server import WandbServer
from tests.training.conftest import CONFIG


def train_online(url: str, model: Path, store: Path, corpus: Corpus, out: Path) -> None:
    os.environ |= {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5",
    }
    os.environ |= {"OMP_NUM_THREADS": "1"}
    from cpt_merge.training.config import TrainingConfig
    from cpt_merge.training.inputs import TrainingInputs
    from cpt_merge.training.run import run

    config = TrainingConfig(
        **{**CONFIG, "tokens": 32 * 8 * 120, "evaluate_every": 20, "checkpoints": {"every": 10}}
    )
    tracker = start_tracker(
        TrackingConfig(mode="online"), "training", "tiny", "tiny-g", out / "log", {}, "tiny-1"
    )
    run(config, TrainingInputs(model, model, store, "key", model, corpus), out, tracker, None)
    tracker.finish()


def steps_logged(out: Path) -> int:
    return max((int(row.get("train/step", 0)) for row in read_log(out / "log").rows), default=0)


@pytest.mark.slow
def test_training_that_is_killed_and_resumed_is_whole_at_the_server(
    model: Path, store: Path, corpus: Corpus, tmp_path: Path
) -> None:
    start = multiprocessing.get_context("spawn")
    with WandbServer() as server:
        for kill_after in (25, 58, 93, None):
            process = start.Process(
                target=train_online, args=(server.url, model, store, corpus, tmp_path)
            )
            process.start()
            deadline = time.monotonic() + 120
            while kill_after and process.is_alive() and steps_logged(tmp_path) < kill_after:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if kill_after:
                process.kill()
            process.join(120)
            assert process.exitcode == (-9 if kill_after else 0)
        run = server.runs["tiny-1"]
    log = read_log(tmp_path / "log")
    assert [step for step, _ in log.series("train/loss")] == list(range(1, 121))
    assert [step for step, _ in log.series("valid/ko/loss")] == list(range(0, 121, 20))
    assert run.overwritten == 0
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for metric in (
        "train/loss",
        "train/tokens",
        "train/gradient_norm",
        "valid/ko/bits_per_byte",
        "valid/en/loss",
    ):
        assert run.rows(metric) == log.series(metric), metric
    assert run.rows("train/loss", by="train/tokens") == log.series("train/loss", by="train/tokens")
