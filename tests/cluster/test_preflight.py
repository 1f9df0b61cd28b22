"""The preflight: real processes that take themselves for nodes, and reports of what cannot be had here, by hand."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cpt_merge.cluster.preflight import gpus, room
from cpt_merge.cluster.preflight.begin import NONCE_FILE
from cpt_merge.cluster.preflight.network import check_network, ring
from cpt_merge.cluster.preflight.report import (
    STEPS,
    NodeReport,
    ProcessReport,
    folder_of,
    read_nodes,
    read_processes,
)
from cpt_merge.cluster.preflight.software import PACKAGES, code_digest
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.cli import main
from cpt_merge.launcher.recipe import Recipe, load_recipe
from tests.distributed import run_ranks
from tests.launcher.conftest import ROOT

JOB = {"SLURM_JOB_ID": "17"}


class Job:
    """A Slurm job as the first node sees it: its recipe, its folder of reports, and the calls of the batch script."""

    def __init__(
        self, recipe_path: Path, runs: Path, capsys: pytest.CaptureFixture[str], *overrides: str
    ) -> None:
        self.arguments = [str(recipe_path), f"runs={runs}", *overrides]
        self.recipe = load_recipe(recipe_path, self.arguments[1:])
        self.folder = folder_of(self.recipe)
        self.capsys = capsys

    def call(self, *options: str, overrides: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self.capsys.readouterr()
        code = main(["preflight", *self.arguments, *overrides, *options])
        return code, *self.capsys.readouterr()

    def start(
        self, node: str, *overrides: str, source: Path = ROOT, wait: float = 60
    ) -> subprocess.Popen[str]:
        """The node's task."""
        command = [
            sys.executable,
            "-m",
            "cpt_merge.launcher.cli",
            "preflight",
            *self.arguments,
            *overrides,
            "--wait",
            f"{wait}",
        ]
        environment = {**os.environ, **JOB, "SLURMD_NODENAME": node}
        return subprocess.Popen(
            command, cwd=source, env=environment, stderr=subprocess.PIPE, text=True
        )

    def report(self, node: str, **changes: object) -> NodeReport:
        """A report by hand: of a node without a fault, but for `changes`."""
        nonce = json.loads((self.folder / NONCE_FILE).read_text())["nonce"]
        same = {"code": {"digest": "aa"}, "packages": {"torch": "2.13.0", "numpy": "2.4"}}
        values = {"node": node, "nonce": nonce, "doing": "", "same": same} | changes
        report = NodeReport(**values)
        report.write(self.folder)
        return report

    def process(
        self, node: str, rank: int, size: int, step: str = "done", **changes: object
    ) -> None:
        """The same for a process of the network test."""
        values = {
            "node": node,
            "rank": rank,
            "size": size,
            "step": STEPS.index(step),
            "clock": 1e9,
        } | changes
        ProcessReport(**values).write(self.folder)


@pytest.fixture
def job(
    recipe_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Job]:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)

    def begun(*overrides: str) -> Job:
        new = Job(recipe_path, tmp_path / "runs", capsys, *overrides)
        assert new.call("--begin")[0] == 0
        return new

    return begun


def test_real_nodes_are_compared_and_the_bad_ones_are_named(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    shared = job()
    stale = tmp_path / "stale"
    for package in (*PACKAGES, "recipes"):
        shutil.copytree(
            ROOT / package, stale / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    source = stale / "training" / "loss.py"
    source.write_bytes(source.read_bytes().replace(b"The", b"the", 1))
    local_disk = f"runs={tmp_path / 'local'}"
    processes = {
        "node1": shared.start("node1"),
        "node2": shared.start("node2"),
        "node3": shared.start("node3", source=stale),
        "node4": shared.start("node4", local_disk, wait=0.5),
    }
    code, out, said = shared.call(
        "--judge", "--nodes", "node1,node2"
    )  # waits until both have written
    assert (code, out) == (0, "\n"), said
    ends = {node: (process.wait(60), process.stderr.read()) for node, process in processes.items()}
    assert [ends[node][0] for node in processes] == [0, 0, 0, 0], (
        f"the judge decides, not a task: {ends}"
    )
    assert f"{NONCE_FILE} is not there, which the first node wrote" in ends["node4"][1]
    assert abs(read_nodes(shared.folder)["node1"].clock) < 2

    code, out, said = shared.call(
        "--judge", "--nodes", "node1,node2,node3,node4,node5", "--wait", "0.2"
    )
    assert code == 2
    assert out == "node3,node4,node5\n"
    assert "ok    node1: clock" in said
    assert "BAD   node3: code: digest " in said
    assert "which 2 of 3 nodes have; copy the project there anew" in said
    assert "BAD   node4: no report within 0.2 s" in said
    assert "node3, node4, node5 cannot be used" in said
    assert "set launch.spare_nodes = 3" in said
    verdict = json.loads((shared.folder / "verdict.json").read_text())
    assert list(verdict["bad"]) == ["node3", "node4", "node5"]


def test_the_run_goes_on_without_as_many_nodes_as_it_may_spare(job: Callable[..., Job]) -> None:
    with_spare = job("launch.spare_nodes=1")
    with_spare.report("node1")
    with_spare.report("node2", problems=["GPU 3 is broken."])
    code, out, said = with_spare.call("--judge", "--nodes", "node1,node2")
    assert (code, out) == (0, "node2\n")
    assert "going on without node2 (launch.spare_nodes = 1)" in said
    with_spare.report("node1", problems=["GPU 0 is broken."])
    assert with_spare.call("--judge", "--nodes", "node1", "--wait", "0")[0] == 2, "none is left"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clock": 40.0}, "its clock is 40.0 s ahead of the others'"),
        ({"doing": "GPUs"}, "its check of GPUs did not end within 0 s"),
        ({"nonce": "of an earlier job"}, "it reads an old nonce"),
        ({"same": {"packages": {"torch": "2.12.0", "numpy": "2.4"}}}, "packages: torch 2.12.0 instead of 2.13.0, which 2 of 3 nodes have; install"),
        ({"same": {"packages": {"torch": "2.13.0"}}}, "numpy nothing instead of 2.4"),
    ],
)  # fmt: skip
def test_what_makes_a_node_bad(
    changes: dict[str, object], sentence: str, job: Callable[..., Job]
) -> None:
    begun = job()
    begun.report("node1")
    begun.report("node2", **changes)
    begun.report("node3")
    code, out, said = begun.call("--judge", "--nodes", "node1,node2,node3", "--wait", "0")
    assert (code, out) == (2, "node2\n")
    assert sentence in said


def test_without_a_majority_the_first_node_is_right(job: Callable[..., Job]) -> None:
    begun = job()
    begun.report("node2", same={"code": {"digest": "bb"}}, clock=-7.0)
    begun.report("node1")
    _, out, said = begun.call("--judge", "--nodes", "node1,node2")
    assert out == "node2\n"
    assert (
        "code: digest bb instead of aa, which as many nodes have (1 each; that of the first of them is taken as right)"
        in said
    )
    assert "its clock is 7.0 s behind" in said


def test_another_driver_is_said_but_no_reason_to_stop(job: Callable[..., Job]) -> None:
    begun = job()
    begun.report("node1", same={"driver": {"driver": "580.1"}})
    begun.report("node2", same={"driver": {"driver": "570.9"}})
    code, out, said = begun.call("--judge", "--nodes", "node1,node2")
    assert (code, out) == (0, "\n")
    assert "note  node2: driver" in said


def test_what_would_stop_any_node_is_said_before_the_others_are_asked(
    job: Callable[..., Job],
) -> None:
    begun = job()
    code, _, said = begun.call("--begin", overrides=("training.checkpoints.keep=1000000000",))
    assert code == 2
    assert "GB left and the run takes" in said
    assert begun.call("--begin", overrides=("models.chat=/none",))[0] == 2
    assert begun.call("--begin", overrides=("launch.processes=1000",))[0] == 0, (
        "on Slurm, srun decides"
    )
    assert begun.call("--judge")[0] == 2, "whom?"


def test_a_machine_without_slurm_is_checked_by_one_call(
    recipe_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    code, out, said = Job(recipe_path, tmp_path, capsys).call()
    assert (code, out) == (0, "\n"), said
    assert "ok    here: clock" in said


def test_the_digest_is_that_of_all_packages(tmp_path: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    assert set(PACKAGES) == {name.partition(".")[0] for name in declared}
    for name in ("core/a.py", "training/backends/b.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "training/backends/b.py").rename(tmp_path / "training/backends/c.py")
    assert code_digest(tmp_path) != before


def test_memory_is_measured_against_what_the_job_was_given() -> None:
    meminfo = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  1000 kB\n"
    assert room.memory(meminfo, {}) == (8000 * 1024, 1000 * 1024)
    assert room.memory(meminfo, {"SLURM_MEM_PER_NODE": "4"})[0] == 4 * 2**20
    assert room.memory(meminfo, {"SLURM_MEM_PER_NODE": "0"})[0] == 8000 * 1024, "0: all there is"


NVIDIA_SMI = """0, GPU-aa11, NVIDIA H100 80GB HBM3, 580.95.05, 4, 0
1, GPU-bb22, NVIDIA H100 80GB HBM3, 580.95.05, 71234, 2
2, GPU-cc33, NVIDIA H100 80GB HBM3, 580.95.05, [N/A], [N/A]
3, GPU-dd44, NVIDIA H100 80GB HBM3, 580.95.05, [Unknown Error], ERR!
Unable to determine the device handle for GPU0000:8A:00.0: Unknown Error
"""


def test_what_nvidia_smi_says_is_read_line_by_line() -> None:
    found, strange = gpus.parse(NVIDIA_SMI, None)
    assert [(gpu.used, gpu.uncorrected) for gpu in found] == [
        (4, 0),
        (71234, 2),
        (None, None),
        (None, None),
    ]
    faults = gpus.faults(found, strange)
    assert len(faults) == 3
    assert "Unable to determine the device handle" in faults[0]
    assert "GPU 1 counts 2 uncorrected ECC errors" in faults[1]
    assert "71,234 MiB of GPU 1 are in use" in faults[2]


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [("0,2", ["0", "2"]), ("GPU-bb22", ["1"]), ("GPU-c", ["2"]), ("", []), ("NoDevFiles", [])],
)
def test_gpus_of_other_jobs_do_not_count(visible: str, wanted: list[str]) -> None:
    assert [gpu.index for gpu in gpus.parse(NVIDIA_SMI, visible)[0]] == wanted


@pytest.mark.parametrize(("given", "asked"), [({}, 0), ({"SLURM_GPUS_ON_NODE": "8"}, 8), ({"SLURM_GPUS_ON_NODE": "gpu:h100:4"}, 4)])  # fmt: skip
def test_slurm_says_how_many_gpus_it_gave(given: dict[str, str], asked: int) -> None:
    assert gpus.gpus_asked(given) == asked


def test_a_gpu_too_few_and_a_sick_one_are_found(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\ncat <<END\n{NVIDIA_SMI}END\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(torch.cuda.device_count() + 1))
    report = NodeReport("node1")
    gpus.check_gpus(report, recipe, 0)
    assert "2 uncorrected" in " ".join(report.problems)
    assert f"sees {torch.cuda.device_count()}" in report.problems[-1]
    assert report.same["driver"] == {"driver": "580.95.05"}


def test_a_device_that_multiplies_rightly_has_no_fault() -> None:
    assert gpus.fault_of(torch.device("cpu")) is None


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_a_ring_has_all_neighbours_and_nobody_twice_at_once(count: int) -> None:
    rounds = ring(count)
    edges = {frozenset(pair) for together in rounds for pair in together}
    assert edges == {
        frozenset((number, (number + 1) % count)) for number in range(count) if count > 1
    }
    assert sum(map(len, rounds)) == len(edges)
    for together in rounds:
        assert len({node for pair in together for node in pair}) == 2 * len(together)


def network_test(arguments: list[str], size: int, wait: float) -> str:
    """One process, on a node of its own, of `size` that are expected. Returns what it says when it fails."""
    os.environ |= {
        **JOB,
        "WORLD_SIZE": str(size),
        "SLURMD_NODENAME": f"node{int(os.environ['RANK']) + 1}",
    }
    try:
        check_network(load_recipe(Path(arguments[0]), arguments[1:]), wait)
    except UserError as error:
        return str(error)
    return ""


def test_processes_join_and_measure_every_link(job: Callable[..., Job]) -> None:
    begun = job("training.global_batch_size=9")
    assert run_ranks(network_test, 3, begun.arguments, 3, 60.0) == ["", "", ""]
    reports = read_processes(begun.folder)
    assert {node: set(found[0].links) for node, found in reports.items()} == {
        "node1": {"node2", "node3"}, "node2": {"node1", "node3"}, "node3": {"node1", "node2"},
    }  # fmt: skip
    assert all(
        found[0].bandwidth > 0 and min(found[0].links.values()) > 0 for found in reports.values()
    )
    clocks = [found[0].clock for found in reports.values()]
    assert max(clocks) - min(clocks) < 2
    code, out, said = begun.call("--judge", "--network", "--nodes", "node1,node2,node3")
    assert code in (0, 2), out  # the links of one machine may differ
    assert "all-reduce of 3 processes" in said


def test_a_node_that_does_not_come_is_named_by_those_who_wait(job: Callable[..., Job]) -> None:
    begun = job("training.global_batch_size=9")
    said = run_ranks(network_test, 2, begun.arguments, 3, 1.0)
    assert "2/3 clients joined" in said[0]
    code, out, said = begun.call(
        "--judge", "--network", "--nodes", "node1,node2,node3", "--wait", "0"
    )
    assert (code, out) == (2, "node3\n")
    assert "a process of it did not start the network test" in said


def test_what_every_process_says_is_no_nodes_fault(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = job()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    for rank in range(3):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURMD_NODENAME", f"node{rank + 1}")
        with pytest.raises(UserError, match="does not divide over 3 processes"):
            check_network(begun.recipe, 60)
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_PROCID"):
        monkeypatch.delenv(name)
    code, out, sentence = begun.call("--judge", "--network", "--nodes", "node1,node2,node3")
    assert (code, out) == (2, "")
    assert (
        "training.global_batch_size = 8 does not divide over 3 processes; set a multiple."
        in sentence
    )


def ring_of(begun: Job, speeds: dict[tuple[str, str], float]) -> str:
    """Reports of nodes with one process each and these links. Returns the nodes, as an option."""
    nodes = sorted({node for pair in speeds for node in pair})
    for rank, node in enumerate(nodes):
        links = {
            other: speed
            for pair, speed in speeds.items()
            if node in pair
            for other in pair
            if other != node
        }
        begun.process(node, rank, len(nodes), bandwidth=1e9, links=links)
    return ",".join(nodes)


def test_the_node_both_of_whose_links_are_slow_is_named(job: Callable[..., Job]) -> None:
    begun = job("launch.spare_nodes=1")
    nodes = ring_of(
        begun, {("node1", "node2"): 1e9, ("node2", "node3"): 2e9, ("node1", "node3"): 20e9}
    )
    code, out, said = begun.call("--judge", "--network", "--nodes", nodes)
    assert (code, out) == (0, "node2\n")
    assert "BAD   node2: its network moves 2.00 GB/s where others move 20.00" in said
    nodes = ring_of(begun, {("node1", "node2"): 1e9})
    assert begun.call("--judge", "--network", "--nodes", nodes)[:2] == (0, "\n"), (
        "of two, none is the slow one"
    )


def test_fewer_processes_must_still_divide_the_batch(job: Callable[..., Job]) -> None:
    begun = job("launch.spare_nodes=1")
    for rank in range(4):
        begun.process(f"node{rank + 1}", rank, 4, clock=1e9 + 100 * (rank == 2))
    code, out, said = begun.call("--judge", "--network", "--nodes", "node1,node2,node3,node4")
    assert (code, out) == (2, "node3\n")
    assert "does not divide over 3 processes (without node3)" in said


def test_what_was_left_out_before_the_network_test_counts_too(job: Callable[..., Job]) -> None:
    begun = job("launch.spare_nodes=1")
    begun.report("node1")
    begun.report("node2")
    assert begun.call("--judge", "--nodes", "node1,node2,node3", "--wait", "0")[:2] == (
        0,
        "node3\n",
    )
    begun.process("node1", 0, 2)
    begun.process("node2", 1, 2, clock=2e9)
    assert begun.call("--judge", "--network", "--nodes", "node1,node2")[:2] == (2, "node3,node2\n")


@pytest.mark.parametrize(
    ("steps", "bad"),
    [
        (["joined", "joined", "reached the first process", "joined"], "node3"),
        (["reached the first process", "started", "started", "started"], "node1"),  # nobody reaches the first
        (["measured its links", "joined", "joined", "measured its links"], "node2,node3"),  # the link between them
        (["joined", None, "joined", "joined"], "node2"),
        (["reached the first process", None], "node2"),
        (["reached the first process", "started"], "node1,node2"),  # either may be the one
    ],
)  # fmt: skip
def test_who_came_least_far_held_up_the_others(
    steps: list[str | None], bad: str, job: Callable[..., Job]
) -> None:
    begun = job()
    for rank, step in enumerate(steps):
        if step:
            begun.process(
                f"node{rank + 1}",
                rank,
                len(steps),
                step,
                error="timed out" if step == "joined" else "",
            )
    nodes = ",".join(f"node{number + 1}" for number in range(len(steps)))
    out = begun.call("--judge", "--network", "--nodes", nodes, "--wait", "0")[1]
    assert out == f"{bad}\n"
