"""How many GPUs hold a model, and which process has which. The numbers are checked without GPUs."""

import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.gpus import (
    CPU,
    Gpus,
    copies_apart,
    divide_gpus,
    gpus_needed,
    weights_bytes,
)
from tests.distributed import run_ranks

GB = 10**9


def test_weights_count_as_they_are_in_memory(tmp_path):
    tensors = {
        "float32": torch.zeros(10, 10),
        "bfloat16": torch.zeros(100, dtype=torch.bfloat16),
        "quantised": torch.zeros(100, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_bytes(tmp_path) == 200 + 200 + 100


@pytest.mark.parametrize(
    ("weights", "memory", "there", "count"),
    [
        (14 * GB, 80 * GB, 8, 1),
        (14 * GB, 24 * GB, 8, 1),
        (26 * GB, 24 * GB, 8, 2),
        (140 * GB, 80 * GB, 8, 4),  # three would hold it, and eight are not divided by three
        (140 * GB, 80 * GB, 3, 3),
        (140 * GB, 45 * GB, 6, 6),
    ],
)
def test_as_few_as_hold_the_weights_with_room_beside_them(weights, memory, there, count):
    assert gpus_needed(weights, memory, there) == count


def test_a_model_that_no_node_holds_is_refused():
    with pytest.raises(UserError, match=r"140 GB need 8 GPUs of 24 GB, and there are 4 here"):
        gpus_needed(140 * GB, 24 * GB, 4)


@pytest.mark.parametrize(
    ("count", "there", "on_node", "stride"),
    [
        (1, 8, 8, 1),
        (2, 8, 8, 2),
        (8, 8, 8, 8),
        (2, 8, 2, 1),  # each of two processes has four
        (4, 8, 1, 1),
        (3, 3, 1, 1),
    ],
)
def test_processes_lend_their_gpus_to_the_next_one(count, there, on_node, stride):
    assert copies_apart(count, there, on_node) == stride


@pytest.mark.parametrize(
    ("count", "there", "on_node", "said"),
    [
        (4, 2, 2, r"gpus_per_model = 4, and there are 2 GPUs here; lower it"),
        (3, 8, 8, r"gpus_per_model = 3 does not divide the 8 processes of a node"),
    ],
)
def test_what_cannot_be_divided_is_refused(count, there, on_node, said):
    with pytest.raises(UserError, match=said):
        copies_apart(count, there, on_node)


def test_without_gpus_every_process_has_a_copy_on_the_cpu(tmp_path, capsys):
    assert divide_gpus(tmp_path, None, Ranks()) == (CPU, Ranks())
    assert divide_gpus(tmp_path, 2, Ranks()) == (CPU, Ranks())
    assert "evaluation.gpus_per_model = 2 has no effect" in capsys.readouterr().err


def test_layers_go_to_the_gpus_of_the_process(monkeypatch):
    assert CPU.placement() == {}
    assert Gpus(3, 1).placement() == {"device_map": "cuda:3"}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (gpu * GB, 80 * GB))
    assert Gpus(2, 2).placement() == {
        "device_map": "balanced", "max_memory": {2: 2 * GB, 3: 3 * GB},
    }  # fmt: skip


def test_only_processes_with_a_copy_get_work():
    assert run_ranks(_squares, 3, 2) == [
        ([0, 1, 4, 9, 16], share) for share in ([0, 2, 4], [], [1, 3])
    ]


def _squares(stride):
    from dataclasses import replace

    from cpt_merge.core.distributed import joined

    mine = []
    with joined() as ranks:
        divided = replace(ranks, stride=stride)
        found = divided.map("squares", lambda one: mine.append(one) or one * one, list(range(5)))
    return found, mine
