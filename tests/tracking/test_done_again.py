"""A repeated stage: in the same run if it was cut short, in a new run if it was finished."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb

from cpt_merge.launcher.stage_folder import Begun, stage_folder
from cpt_merge.launcher.stages import MERGE, TOKENIZER
from cpt_merge.tracking.unsent import holds_unsent
from cpt_merge.tracking.upload import upload
from tests.launcher.test_identity import log


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_result_that_is_made_once_more_has_a_run_of_its_own(
    mode: str, tmp_path: Path, server
) -> None:
    """Merged at ratio 1, 0.8, and 1 again: W&B would append the last rows to those of the first."""
    ids = []
    for number, ratio in enumerate(("11111111", "88888888", "11111111")):
        with stage_folder(tmp_path / "merge", MERGE, Begun(ratio)):
            ids.append(log(tmp_path, "merge", ratio, mode, value=10.0 * number))
            if mode == "offline":
                wandb.teardown()  # waits until the service has closed the transaction log
                assert upload(tmp_path / "merge" / "log")
            (tmp_path / "merge" / "stage.json").write_text("{}")
    assert ids[2] == f"{ids[0]}-2"
    for number, name in enumerate(ids):
        rows = [(layer, 10.0 * number + layer) for layer in range(3)]
        assert server.runs[name].rows("merge/norm", by="merge/layer") == rows
        assert len(server.runs[name].history) == 3


def test_a_stage_that_was_killed_and_starts_over_goes_on_in_its_run(tmp_path: Path, server) -> None:
    """Its rows are made once more, and W&B has them already."""
    ids = []
    for _ in range(2):
        try:
            with stage_folder(tmp_path / "tokenizer", TOKENIZER, Begun("11111111")):
                (tmp_path / "tokenizer" / "half-written").mkdir()
                ids.append(log(tmp_path, "tokenizer", "11111111", "online"))
                raise SystemExit  # a kill leaves the same
        except SystemExit:
            pass
    assert ids[0] == ids[1]
    assert len(server.runs[ids[0]].history) == 3


def test_a_folder_that_holds_the_logs_of_two_runs_is_uploaded_whole(tmp_path: Path, server) -> None:
    """A sweep stays in its folder, also with other settings."""
    ids = [
        log(tmp_path, "sweep", key, "offline", value=value)
        for key, value in (("11111111", 0.0), ("22222222", 5.0))
    ]
    wandb.teardown()
    assert holds_unsent(tmp_path / "sweep" / "log")
    assert upload(tmp_path / "sweep" / "log")
    for name, value in zip(ids, (0.0, 5.0), strict=True):
        assert server.runs[name].rows("merge/norm", by="merge/layer") == [
            (layer, value + layer) for layer in range(3)
        ]
    assert not holds_unsent(tmp_path / "sweep" / "log")
    assert not upload(tmp_path / "sweep" / "log")
