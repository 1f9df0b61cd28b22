"""The network test of one process: join as training does, and measure what an all-reduce moves.

All nodes at once, and every node with its two neighbours in a ring: there each node has a link that does not lead to
a given slow one, so the slow one is known, also if it is the first. A link's all-reduce is among all processes of two
nodes, so that all their network cards are used.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from cpt_merge.cluster.preflight.report import ProcessReport, folder_of, node_name, wait_until
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World, find_rendezvous, find_world
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.start import use_backend

if TYPE_CHECKING:
    import torch.distributed as dist

    from cpt_merge.training.distributed.parallel import Parallel

BYTES = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}  # of the tensor that is reduced
REPEATS = 5


def check_network(recipe: Recipe, wait: float) -> None:
    """Write how far this process comes, step by step; each step has `wait` seconds. Raises `UserError` if it fails."""
    world, folder = find_world(), folder_of(recipe)
    report = ProcessReport(node_name(), world.rank, world.size)
    report.write(folder)
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # else a page of frames on each node when one is missing
    try:
        recipe.training.check_processes(world.size)
        use_backend(recipe)
        _reach_first(world, wait)
        report.reach("reached the first process", folder)
        _measure(report, recipe, wait)
    except (
        UserError,
        RuntimeError,
        OSError,
    ) as error:  # torch.distributed's errors are RuntimeErrors
        report.error = (
            str(error) if isinstance(error, UserError) else " ".join(str(error).split())[:300]
        )
        report.write(folder)
        raise UserError(report.error) from error
    report.reach("done", folder)


def _reach_first(world: World, wait: float) -> None:
    """Connect to the process where all meet: unlike joining, this fails on the node alone that cannot."""
    if world.is_main:
        return
    meeting = find_rendezvous(world)

    def answers() -> bool:
        try:
            socket.create_connection((meeting.address, meeting.port), timeout=5).close()
        except OSError:
            return False
        return True

    if not wait_until(answers, wait):
        raise UserError(
            f"the first process does not answer at {meeting.address}:{meeting.port} within {wait:g} s."
        )


def _measure(report: ProcessReport, recipe: Recipe, wait: float) -> None:
    import torch.distributed as dist

    from cpt_merge.core.distributed import stop_process_group
    from cpt_merge.training.distributed.parallel import start_parallel

    folder, timeout = folder_of(recipe), timedelta(seconds=wait)
    parallel = start_parallel(timeout)
    report.reach("joined", folder)
    names = parallel.gather(report.node)
    parallel.barrier()
    report.clock = time.time()
    ranks = {
        node: [rank for rank, name in enumerate(names) if name == node]
        for node in dict.fromkeys(names)
    }
    nodes = list(ranks)
    mine = nodes.index(report.node)
    for together in ring(len(nodes)):
        pair = next((pair for pair in together if mine in pair), (mine,))
        # torch names a group by its ranks and by how many groups there are: a node without a neighbour makes one too
        members = sorted(rank for number in pair for rank in ranks[nodes[number]])
        group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        for neighbour in set(pair) - {mine}:
            report.links[nodes[neighbour]] = bus_bandwidth(parallel, group, len(members))
    report.reach("measured its links", folder)
    if parallel.world.size > 1:
        report.bandwidth = bus_bandwidth(parallel, dist.group.WORLD, parallel.world.size)
    stop_process_group()  # not after an error: to leave a group whose members hang may hang too


def ring(count: int) -> list[list[tuple[int, int]]]:
    """The neighbours in a ring of nodes, in rounds in which no node occurs twice: two, or three if the count is odd."""
    if count < 3:
        return [[(0, 1)]] if count == 2 else []
    edges = [(number, (number + 1) % count) for number in range(count)]
    last = [edges.pop()] if count % 2 else []
    return [edges[::2], edges[1::2]] + ([last] if last else [])


def bus_bandwidth(parallel: Parallel, group: dist.ProcessGroup | None, size: int) -> float:
    """2 (n - 1) / n * bytes / seconds of an all-reduce among n processes, as NCCL's tests define it, in bytes/s.

    Raises `UserError` if the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    bytes_moved = BYTES[parallel.device.type]
    tensor = torch.ones(bytes_moved // 4, dtype=torch.float32, device=parallel.device)
    dist.all_reduce(tensor, group=group)  # also makes the connections
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
