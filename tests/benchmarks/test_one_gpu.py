"""`python -m benchmarks.one_gpu` runs in small on a CPU, and keeps what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.one_gpu import PARTS
from benchmarks.step_speed import kind_of_kernel

ROOT = Path(__file__).parents[2]


def measured(out: Path, *options: str) -> str:
    command = [sys.executable, "-m", "benchmarks.one_gpu", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the small sizes are for a CPU")
def test_every_part_measures_something(tmp_path: Path) -> None:
    words = measured(tmp_path, "--small", "--minutes", "60")
    assert "failed" not in words
    assert "did not end" not in words
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(found) == len(PARTS)
    assert found["resume"]["losses"]["equal"]
    assert "needs a GPU of capability 8.9" in found["rung-fp8"]["rung: fp8"]["refused"]
    speeds = [row for rows in found.values() for row in rows.values() if "seconds" in row]
    assert len(speeds) == 4 + 6 + 1
    assert all(row["tokens_per_second"] > 0 for row in speeds)
    assert not list(tmp_path.rglob("step-0*"))


def test_no_part_starts_that_would_not_end_in_time(tmp_path: Path) -> None:
    words = measured(tmp_path, "--small", "--minutes", "0.5", "--parts", "save,resume")
    assert "save: not started, 30 of 120 s are left" in words
    assert "resume: not started" in words
    assert "no such part: sav; they are resume," in measured(tmp_path, "--parts", "sav")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        ("triton_poi_fused_mul_silu_3", "elementwise"),
        ("Memcpy DtoH (Device -> Pageable)", "copies"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ],
)
def test_kernels_have_a_kind(name: str, kind: str) -> None:
    assert kind_of_kernel(name) == kind
