"""The GPUs of a node: nvidia-smi's answers, Slurm's number of them, a product that is right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cpt_merge.cluster.preflight import gpus
from cpt_merge.cluster.preflight.reports import NodeReport
from cpt_merge.launcher.recipe import Recipe

NVIDIA_SMI = """0, GPU-aa11, NVIDIA H100 80GB HBM3, 580.95.05, 4, 0
1, GPU-bb22, NVIDIA H100 80GB HBM3, 580.95.05, 71234, 2
2, GPU-cc33, NVIDIA H100 80GB HBM3, 580.95.05, [N/A], [N/A]
3, GPU-dd44, NVIDIA H100 80GB HBM3, 580.95.05, [Unknown Error], ERR!
Unable to determine the device handle for GPU0000:8A:00.0: Unknown Error
"""


def test_nvidia_smis_answer_is_read_line_by_line() -> None:
    found, strange = gpus.parse(NVIDIA_SMI, None)
    numbers = [(gpu.used, gpu.uncorrected) for gpu in found]
    assert numbers == [(4, 0), (71234, 2), (None, None), (None, None)]
    faults = gpus.faults(found, strange)
    assert len(faults) == 3
    assert "Unable to determine the device handle" in faults[0]
    assert "GPU 1 counts 2 uncorrected ECC errors" in faults[1]
    assert "71,234 MiB of GPU 1 are in use" in faults[2]


def test_one_error_is_not_several() -> None:
    found, _ = gpus.parse("0, GPU-aa11, NVIDIA H100 80GB HBM3, 580.95.05, 4, 1", None)
    assert "counts 1 uncorrected ECC error;" in gpus.faults(found, [])[0]


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [("0,2", ["0", "2"]), ("GPU-bb22", ["1"]), ("GPU-c", ["2"]), ("", []), ("NoDevFiles", [])],
)
def test_gpus_of_other_jobs_do_not_count(visible: str, wanted: list[str]) -> None:
    assert [gpu.index for gpu in gpus.parse(NVIDIA_SMI, visible)[0]] == wanted


@pytest.mark.parametrize(("given", "asked"), [(None, 0), ("8", 8), ("gpu:h100:4", 4)])
def test_slurm_tells_the_number_of_gpus(given: str | None, asked: int) -> None:
    assert gpus.gpus_asked({"SLURM_GPUS_ON_NODE": given} if given else {}) == asked


def test_a_missing_gpu_and_a_sick_one_are_found(
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


def test_a_device_that_multiplies_correctly_has_no_fault() -> None:
    assert gpus.fault_of(torch.device("cpu")) is None
