"""What DeepSpeed says about the place of its masters is proven before anything trusts it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import run_ranks
from tests.training.runs import Job, train


def train_unchecked(job: Job) -> dict[int, float]:
    """Train with whatever `zero_optimization` the file has."""
    import cpt_merge.training.distributed.deepspeed as backend

    backend._check_sections = lambda _: None  # type: ignore[assignment]
    return train(job)


def file_with(folder: Path, **zero: Any) -> str:
    """The name of an accelerate file without its ending, whose JSON has this section."""
    settings, path = folder / "zero.json", folder / "zero.yaml"
    settings.write_text(json.dumps({"zero_optimization": zero}))
    section = {"deepspeed_config_file": str(settings)}
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    return str(path.with_suffix(""))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_that_are_elsewhere_stop_the_run(
    precision: str, model: Path, store: Path, tmp_path: Path
) -> None:
    """With DeepSpeed 0.19, `round_robin_gradients` moves weights and not what it says of them."""
    pytest.importorskip("deepspeed")
    changes = {"precision": precision, "tokens": 32 * 8}
    backend = file_with(tmp_path, stage=2, round_robin_gradients=True)
    job = Job(model, store, tmp_path / "out", changes, backend)
    with pytest.raises(AssertionError, match="says wrongly where the fp32 master of"):
        run_ranks(train_unchecked, 2, job)
    job.backend = file_with(tmp_path, stage=2, reduce_bucket_size=2000)
    run_ranks(train_unchecked, 2, job)
