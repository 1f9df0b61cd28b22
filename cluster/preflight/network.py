"""The network test of one process: join as training does, and measure the bandwidth of all-reduces.

The test measures all nodes together, and each node with its two neighbours in a ring. So each node
has a link that does not lead to a given slow node, and the slow one can be told even if it is the
first. A link's all-reduce is among all processes of two nodes, so that it uses all their network
cards.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from cpt_merge.cluster.preflight.reports import ProcessReport, folder_of, node_name
from cpt_merge.core.distributed import stop_process_group, wait_for
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World, find_rendezvous, find_world
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.start import use_backend

if TYPE_CHECKING:
    import torch.distributed as dist

    from cpt_merge.training.distributed.parallel import Parallel

BYTES = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}  # of the reduced tensor
REPEATS = 5


def check_network(recipe: Recipe, wait: float) -> None:
    """Run the test and report each step. Raises `UserError` if one fails or takes over `wait` s."""
    world, folder = find_world(), folder_of(recipe)
    report = ProcessReport(node_name(), world.rank, world.size)
    report.write(folder)
    # When a node is missing, torch would print a page of stack frames on each of the others
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        recipe.check_processes(world.size)
        use_backend(recipe)
        _reach_first(world, wait)
        report.reach("reached the first process", folder)
        _measure(report, recipe, wait)
    except UserError as error:
        report.error = str(error)
    except (RuntimeError, OSError) as error:  # torch.distributed raises RuntimeErrors
        report.error = " ".join(str(error).split())[:300]
    if report.error:
        report.write(folder)
        raise UserError(report.error)
    report.reach("done", folder)


def _reach_first(world: World, wait: float) -> None:
    """Connect to the first process: unlike joining, this fails only on the node that cannot."""
    if world.is_main:
        return
    rendezvous = find_rendezvous(world)

    def answers() -> bool:
        try:
            socket.create_connection((rendezvous.address, rendezvous.port), timeout=5).close()
        except OSError:
            return False
        return True

    address = f"{rendezvous.address}:{rendezvous.port}"
    if not wait_for(answers, f"the first process at {address}", timeout=wait):
        raise UserError(f"the first process does not answer at {address} within {wait:g} s.")


def _measure(report: ProcessReport, recipe: Recipe, wait: float) -> None:
    import torch.distributed as dist

    from cpt_merge.training.distributed.parallel import start_parallel

    folder, timeout = folder_of(recipe), timedelta(seconds=wait)
    parallel = start_parallel(timeout)
    report.reach("joined", folder)
    names = parallel.gather(report.node)
    parallel.barrier()
    report.clock = time.time()
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(names):
        ranks.setdefault(node, []).append(rank)
    nodes = list(ranks)
    mine = nodes.index(report.node)
    for together in ring(len(nodes)):
        pair = next((pair for pair in together if mine in pair), (mine,))
        # torch names a group by its ranks and by the number of groups so far, so a node without a
        # neighbour in this round makes one too
        members = sorted(rank for number in pair for rank in ranks[nodes[number]])
        group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        for neighbour in set(pair) - {mine}:
            report.links[nodes[neighbour]] = bus_bandwidth(parallel, group, len(members))
    report.reach("measured its links", folder)
    if parallel.world.size > 1:
        report.bandwidth = bus_bandwidth(parallel, dist.group.WORLD, parallel.world.size)
    stop_process_group()  # not after an error: leaving a group whose members hang may hang too


def ring(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours in a ring of nodes, in rounds in which no node occurs twice."""
    if count < 3:
        return [[(0, 1)]] if count == 2 else []
    edges = [(number, (number + 1) % count) for number in range(count)]
    last = [edges.pop()] if count % 2 else []
    return [edges[::2], edges[1::2]] + ([last] if last else [])


def bus_bandwidth(parallel: Parallel, group: dist.ProcessGroup | None, size: int) -> float:
    """Bus bandwidth of an all-reduce among n = `size` processes, in bytes per second.

        2 (n - 1) / n * bytes / seconds        (as NCCL's tests define it)

    Raises `UserError` if the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    bytes_moved = BYTES[parallel.device.type]
    tensor = torch.ones(bytes_moved // 4, dtype=torch.float32, device=parallel.device)
    dist.all_reduce(tensor, group=group)  # also opens the connections
    if not bool((tensor == size).all()):
        raise UserError(
            "an all-reduce of ones gives wrong sums; look at its GPUs and its network card."
        )
    tensor.zero_()
    _finish(parallel)
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(tensor, group=group)
    _finish(parallel)
    seconds = (time.perf_counter() - started) / REPEATS
    return 2 * (size - 1) / size * bytes_moved / seconds


def _finish(parallel: Parallel) -> None:
    """Wait for the GPU."""
    import torch

    if parallel.device.type == "cuda":
        torch.cuda.synchronize(parallel.device)
