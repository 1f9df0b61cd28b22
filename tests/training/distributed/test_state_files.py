"""What some processes wrote in parts, others read in other parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_merge.training.distributed.parallel import start_parallel
from cpt_merge.training.distributed.state_files import FlatPart, StateFiles, boxes
from tests.distributed import run_ranks
from tests.training.runs import ask_for

SHAPES: list[tuple[int, ...]] = [(), (7,), (5, 3), (1, 9), (4, 3, 5), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_the_elements_in_their_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for first in range(whole.numel() + 1):
        for last in range(first, whole.numel() + 1):
            found = [torch.empty(0, dtype=torch.int64)]
            for offsets, sizes in boxes(shape, first, last):
                box = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
                found.append(whole[box].flatten())
            assert torch.cat(found).tolist() == list(range(first, last))
            assert len(found) - 1 <= max(1, 2 * len(shape) - 1)


def parts(values: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, Any]:
    """Unequal parts: the last process has most, and nothing of what has few elements."""
    found: dict[str, Any] = {}
    for name, tensor in values.items():
        edges = [tensor.numel() * number**2 // size**2 for number in range(size + 1)]
        flat = tensor.view(-1)[edges[rank] : edges[rank + 1]]
        found[name] = FlatPart(tuple(tensor.shape), edges[rank], flat)
    return {"model": found, "step": {"of": torch.tensor(3.0)}}


def values() -> dict[str, torch.Tensor]:
    return {str(len(shape)): torch.randn(shape) for shape in SHAPES}


def write(folder: Path, asynchronous: bool) -> None:
    ask_for("fsdp2")
    torch.manual_seed(0)
    parallel = start_parallel()
    files = StateFiles(parallel)
    state = parts(values(), parallel.rank, parallel.size)
    pending = files.write(state, folder, asynchronous)
    if asynchronous:
        for part in state["model"].values():
            part.values.zero_()  # training goes on
    pending.result()
    files.close()


def read(folder: Path) -> bool:
    ask_for("fsdp2")
    torch.manual_seed(0)
    parallel, expected = start_parallel(), values()
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    state = parts(found, parallel.rank, parallel.size)
    StateFiles(parallel).read(state, folder)
    assert state["step"]["of"] == 3
    wanted = parts(expected, parallel.rank, parallel.size)["model"]
    return all(torch.equal(state["model"][name].values, wanted[name].values) for name in wanted)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_another_number_of_processes_reads_what_was_written(
    asynchronous: bool, tmp_path: Path
) -> None:
    run_ranks(write, 3, tmp_path, asynchronous)
    assert all(run_ranks(read, 2, tmp_path))
