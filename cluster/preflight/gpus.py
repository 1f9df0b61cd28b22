"""Are the node's GPUs all present, healthy and unused by others, and do they compute correctly?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpt_merge.cluster.preflight.reports import NodeReport
from cpt_merge.core.progress import counted
from cpt_merge.launcher.accelerate_file import accelerate_config, backend_environment
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.training.distributed.settings import backend_settings

if TYPE_CHECKING:
    import torch

FIELDS = "index uuid name driver_version memory.used ecc.errors.uncorrected.volatile.total".split()
USED_BY_OTHERS = 2048  # MiB; the driver itself takes a few hundred
SIDE, REPEATS = 1024, 10  # of the test's matrix product
TOLERANCE = 0.01  # of the largest element; bf16 rounds to 1/256


@dataclass(frozen=True)
class GpuStatus:
    """One line of nvidia-smi's answer; None where it has no number."""

    index: str
    uuid: str
    driver: str
    used: int | None  # MiB
    uncorrected: int | None  # ECC errors since the driver was loaded

    def is_called(self, name: str) -> bool:
        """Whether CUDA_VISIBLE_DEVICES means it by `name`: its number, or a prefix of its UUID."""
        return name == self.index or (not name.isdigit() and self.uuid.startswith(name))


def check_gpus(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Check the GPUs; without torch where the job asked for none and the node has none."""
    asked = gpus_asked()
    if backend_settings(backend_environment(accelerate_config(recipe))).use_cpu:
        report.facts.append("GPUs not used (use_cpu)")
        return
    if not asked and not shutil.which("nvidia-smi"):
        report.facts.append("no GPU asked for")
        return
    if shutil.which("nvidia-smi"):  # before torch itself uses memory of a GPU
        command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        gpus, strange = parse(answer.stdout + answer.stderr, os.environ.get("CUDA_VISIBLE_DEVICES"))
        report.problems.extend(faults(gpus, strange))
        drivers = ", ".join(sorted({gpu.driver for gpu in gpus})) or "none"
        report.same["driver"] = {"driver": drivers}
    _check_with_torch(report, asked)


def gpus_asked(environment: Mapping[str, str] = os.environ) -> int:
    """The number of GPUs that Slurm gave the job on this node; 0 if none."""
    found = re.search(r"\d+$", environment.get("SLURM_GPUS_ON_NODE", ""))
    return int(found[0]) if found else 0


def parse(text: str, visible: str | None) -> tuple[list[GpuStatus], list[str]]:
    """(the job's GPUs in nvidia-smi's answer, lines that describe no GPU).

    `visible` is CUDA_VISIBLE_DEVICES: numbers or UUIDs. A field such as [N/A] or [Unknown Error]
    has no number.
    """
    gpus, strange = [], []
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = [part.strip() for part in line.split(",")]
        if len(fields) != len(FIELDS) or not fields[0].isdigit():
            strange.append(line)
            continue
        index, uuid, _, driver, *numbers = fields
        used, uncorrected = (int(field) if field.isdigit() else None for field in numbers)
        gpus.append(GpuStatus(index, uuid, driver, used, uncorrected))
    if visible is None:
        return gpus, strange
    wanted = [part.strip() for part in visible.split(",") if part.strip()]
    return [gpu for gpu in gpus if any(gpu.is_called(name) for name in wanted)], strange


def faults(gpus: list[GpuStatus], strange: list[str]) -> list[str]:
    """The faults that nvidia-smi shows, one sentence each."""
    found = [
        f"nvidia-smi reports {line[:200]!r}; drain the node and have its GPUs checked."
        for line in strange
    ]
    for gpu in gpus:
        if gpu.uncorrected:
            found.append(
                f"GPU {gpu.index} counts {counted(gpu.uncorrected, 'uncorrected ECC error')}; "
                "have it reset or replaced."
            )
        if gpu.used is not None and gpu.used > USED_BY_OTHERS:
            found.append(
                f"{gpu.used:,} MiB of GPU {gpu.index} are in use before the run starts; "
                "end what uses it (nvidia-smi)."
            )
    return found


def _check_with_torch(report: NodeReport, asked: int) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked and count != asked:
        report.problems.append(
            f"Slurm gave {counted(asked, 'GPU')} and torch ({torch.version.cuda or 'CPU'} build) "
            f"sees {count}; look at nvidia-smi there, install a CUDA build of torch, or set "
            "use_cpu in the accelerate config."
        )
    names = Counter(torch.cuda.get_device_name(number) for number in range(count))
    kinds = ", ".join(f"{times} x {name}" for name, times in sorted(names.items())) or "no GPU"
    report.same["GPUs"] = {"GPUs": kinds}
    report.facts.append(kinds)
    for number in range(count):
        if fault := fault_of(torch.device("cuda", number)):
            report.problems.append(f"GPU {number} {fault}; have it checked.")


def fault_of(device: torch.device) -> str | None:
    """What is wrong with a device's bf16 product, against fp32 on the CPU and against itself."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator).bfloat16() for _ in range(2))
    expected = left.float() @ right.float()
    left, right = left.to(device), right.to(device)
    first = left @ right
    error = float((first.float().cpu() - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:  # NaN included
        return f"multiplies matrices wrongly (off by {error:.2g} of the largest element)"
    if not all(torch.equal(left @ right, first) for _ in range(REPEATS)):
        return "gives different results for the same multiplication"
    return None
