"""Warnings that DeepSpeed calls torch by former names are left out, and no other ones."""

import warnings

import torch
import torch.distributed as dist

from cpt_merge.training.distributed.deepspeed import ignore_former_names
from cpt_merge.training.distributed.parallel import start_parallel
from tests.distributed import run_ranks
from tests.training.runs import ask_for


def seen_warnings() -> list[str]:
    ask_for("fsdp2")
    start_parallel()
    values = torch.ones(2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dist.all_gather_into_tensor(values, values.clone())
        ignore_former_names()
        dist.all_gather_into_tensor(values, values.clone())
        warnings.warn("an argument is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed.barrier` is slow", UserWarning, stacklevel=1)
    return [str(one.message).split(".", 2)[-1] for one in seen]


def test_only_torchs_warnings_about_former_names_are_left_out() -> None:
    [found] = run_ranks(seen_warnings, 1)
    assert [text.split("`")[0] for text in found] == [
        "all_gather_into_tensor", "an argument is deprecated", "barrier",
    ]  # fmt: skip
