"""What processes do together, in real processes; waiting for files; nothing depends on the number of processes."""

import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from cpt_merge.core import distributed
from cpt_merge.core.distributed import Ranks, collect, joined, publish, wait_for
from cpt_merge.core.world import World
from tests.distributed import run_ranks


def everything(items: list[int]) -> dict[str, object]:
    computed = []

    def square(item: int) -> int:
        computed.append(item)
        return item * item

    with joined() as ranks:
        found = {
            "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
            "broadcast": ranks.broadcast(lambda: f"by rank {ranks.rank}"),
            "gather": ranks.gather(ranks.rank * 10),
            "total": ranks.total(0.5 + ranks.rank),
            "map": ranks.map("squares", square, items),
            "computed": sorted(item for by_rank in ranks.gather(computed) for item in by_rank),
            "main": ranks.is_main,
        }
        with joined() as again:  # within a group that exists: nothing is closed too early
            again.barrier()
        ranks.barrier()
    assert not dist.is_initialized()
    return found


def test_all_processes_get_the_same() -> None:
    first, second = run_ranks(everything, 2, [1, 2, 3, 4, 5])
    assert (first.pop("main"), second.pop("main")) == (True, False)
    assert first == second
    assert first == {
        "any": [True, False],
        "broadcast": "by rank 0",
        "gather": [0, 10],
        "total": 2.0,
        "map": [1, 4, 9, 16, 25],
        "computed": [1, 2, 3, 4, 5],  # each by one process
    }


def test_one_process_alone_starts_no_group() -> None:
    with joined() as ranks:
        assert not dist.is_initialized()
        assert ranks == Ranks()
        assert ranks.map("squares", lambda item: item * item, [1, 2, 3]) == [1, 4, 9]
        assert ranks.gather("mine") == ["mine"]
        assert ranks.broadcast(lambda: "mine") == "mine"
        assert not ranks.any(False)
        ranks.barrier()


def test_published_values_come_by_rank(tmp_path: Path) -> None:
    publish(tmp_path, "found", World(1, 2), "of 1")
    with pytest.raises(TimeoutError):
        collect(tmp_path, "found", World(1, 2), check=give_up)
    waiting = threading.Thread(target=publish, args=(tmp_path, "found", World(0, 2), {"of": 0}))
    waiting.start()
    assert collect(tmp_path, "found", World(1, 2)) == [{"of": 0}, "of 1"]
    waiting.join()


def give_up() -> None:
    raise TimeoutError


def test_waiting_ends_with_its_time() -> None:
    assert not wait_for(lambda: False, "nothing", timeout=0.01)
    assert wait_for(lambda: True, "nothing", timeout=0)


def test_long_waiting_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "QUIET", 0)
    looks = iter([False, False, False, True])
    assert wait_for(lambda: next(looks), "the first process")
    assert capsys.readouterr().err == "waiting for the first process\n"
