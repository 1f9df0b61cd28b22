"""Everything that only a GPU can show, in one command.

    python -m benchmarks.one_gpu OUT [--minutes 12] [--parts resume,save]
    python -m benchmarks.one_gpu OUT --small              # the same in small, on a CPU too

Each part runs in a process of its own, so that a part that fails, hangs or needs too much memory
takes nothing from the others. Its results are in OUT/PART.json as soon as it ends, its output in
OUT/PART.log; a part that takes longer than it may writes the stacks of its threads there and is
ended. No part starts that would end after `--minutes`. OUT/results.md has the table.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import typer

from benchmarks.training_inputs import SIZES, Inputs, Size, prepare
from cpt_merge.core.errors import UserError

Rows = dict[str, dict[str, Any]]  # name of a measurement -> its values
SIZES |= {
    "mixture": Size(32_000, 2048, 768, 12, 16, 4, experts=64, taken=8),  # 3.7 B, 0.75 B active
}
WHOLE = 10**6  # median length of documents that fill their sequence


@dataclass(frozen=True)
class Scale:
    """How large the parts are."""

    one: str  # sizes of training_inputs.SIZES
    three: str
    mixture: str
    length: int
    batch: int  # sequences of a step
    steps: int
    compile: bool

    def case(self, folder: Path, size: str, micro: int, document: int = 300) -> Any:
        """A case of training, whose inputs are made if they do not exist."""
        from benchmarks.training_contenders import TrainingCase

        place = folder / f"inputs-{document}"
        if place.name != "inputs-300" and not (place / size / "model").exists():
            prepare(folder / "inputs-300", size, 50_000)
            (place / size).mkdir(parents=True, exist_ok=True)
            (place / size / "model").symlink_to(folder / "inputs-300" / size / "model")
        prepare(place, size, 40 * self.length * self.batch, document)
        micro = min(micro, self.batch)
        return TrainingCase(
            Inputs.of(place, size), "bf16", 1, self.length, self.batch, micro, 10**4, 1
        )

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of the recipe."""
        return {"compile": self.compile, "loss_chunk": 4096}


LARGE = Scale("1b", "3b", "mixture", 4096, 8, 8, compile=True)
SMALL = Scale("small", "small", "experts", 128, 2, 1, compile=False)


def speed(scale: Scale, folder: Path, size: str, micro: int, document: int) -> Rows:
    """MFU with documents of 300 tokens, or with sequences of one document."""
    from benchmarks.step_speed import measure_steps

    case = scale.case(folder, getattr(scale, size), micro, document)
    return {f"documents of {document}": asdict(measure_steps(case, scale.steps, scale.changes))}


RUNGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "8-bit moments": {"optimizer": {"moments": "8bit"}},
    "pure bf16": {"precision": "pure-bf16"},
    "LoRA": {"lora": {}},
    "recomputed": {"activation_checkpointing": "full"},
    "offloaded": {"offload": "all"},
    "fp8": {"fp8": True},
}


def rung(scale: Scale, folder: Path, name: str) -> Rows:
    """A rung of the memory ladder on the 1B model."""
    from benchmarks.step_speed import measure_steps

    changes, case = {**scale.changes, **RUNGS[name]}, scale.case(folder, scale.one, 2)
    return {name: asdict(measure_steps(case, scale.steps, changes, fsdp=name == "offloaded"))}


def mixture(scale: Scale, folder: Path) -> Rows:
    """Experts, by grouped matmuls where transformers has them."""
    from benchmarks.step_speed import measure_steps

    case = scale.case(folder, scale.mixture, 2)
    return {"experts": asdict(measure_steps(case, scale.steps, {"loss_chunk": 4096}))}


def attention(scale: Scale, folder: Path) -> Rows:
    """Attention kernels on sequences of one document: ours, cuDNN's and FlashAttention-3."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benchmarks.step_speed import synchronise

    size = SIZES[scale.three]
    width, heads, pairs = size.hidden // size.heads, size.heads, size.key_value_heads
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    query, key, value = (
        torch.randn(2, count, scale.length, width, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, pairs, pairs)
    )
    backends = (
        {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        if cuda
        else {"math": SDPBackend.MATH}
    )

    def by(backend: SDPBackend) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )

        return run

    ways = {name: by(backend) for name, backend in backends.items()}
    ways |= _flash_3(query, key, value)
    # forward 4 s^2 h, half of it causal; backward 2.5 times as much
    flops = 3.5 * 2 * 2 * heads * width * scale.length**2

    def timed(way: Callable[[], Any]) -> float:
        started = time.perf_counter()
        way().sum().backward()
        synchronise()
        return time.perf_counter() - started

    found: Rows = {}
    for name, way in ways.items():
        try:
            seconds = median([timed(way) for _ in range(scale.steps + 3)][3:])
        except RuntimeError as error:
            found[name] = {"refused": str(error).splitlines()[0][:200]}
        else:
            found[name] = {"ms": seconds * 1000, "tflops": flops / seconds / 1e12}
    return found


def _flash_3(query: Any, key: Any, value: Any) -> dict[str, Callable[[], Any]]:
    """FlashAttention-3, if its package is installed."""
    from importlib.util import find_spec

    if find_spec("flash_attn_interface") is None:
        return {}
    import importlib

    attend = importlib.import_module("flash_attn_interface").flash_attn_func

    def run() -> Any:
        turned = (one.transpose(1, 2) for one in (query, key, value))
        out = attend(*turned, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return {"FlashAttention-3": run}


def save_stall(scale: Scale, folder: Path) -> Rows:
    """Seconds that asynchronous saves of the 3B model hold up training."""
    from benchmarks.step_speed import Steps, synchronise
    from cpt_merge.training.config import CheckpointConfig
    from cpt_merge.training.distributed.checkpoint import Checkpoints, TrainState

    training = Steps(scale.case(folder, scale.three, 1), {"loss_chunk": 4096})
    found = {}
    for number in range(2):  # the first one allocates pinned memory
        with _empty(folder / "saves") as place:  # one checkpoint of the 3B model has 43 GB
            checkpoints = Checkpoints(place, CheckpointConfig(), training.parallel)
            checkpoints.start()
            training.step(number)
            synchronise()
            started = time.perf_counter()
            checkpoints.save(training.backend, TrainState("benchmark", number + 1))
            stall = time.perf_counter() - started
            during = training.timed(number)
            checkpoints.finish()
            found[f"save {number + 1}"] = {
                "stall": stall, "GB": training.backend.state_bytes() / 1e9,
                "step meanwhile": during, "on disk after": time.perf_counter() - started,
            }  # fmt: skip
    return found


@contextmanager
def _empty(folder: Path) -> Iterator[Path]:
    """A folder that is empty at the start, and gone at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder)


def resume(scale: Scale, folder: Path) -> Rows:
    """FSDP2 on one process: three steps, saved, and three more, against three after a load."""
    from benchmarks.step_speed import Steps
    from cpt_merge.training.config import CheckpointConfig
    from cpt_merge.training.distributed.checkpoint import Checkpoints, TrainState

    case, changes = scale.case(folder, "small", 1), {"attention": "sdpa"}
    before = Steps(case, changes, fsdp=True)
    with _empty(folder / "resume") as place:
        checkpoints = Checkpoints(place, CheckpointConfig(), before.parallel)
        checkpoints.start()
        for number in range(3):
            before.step(number)
        state = TrainState("benchmark", 3, layout=before.backend.layout)
        checkpoints.save(before.backend, state)
        whole = [before.step(number) for number in range(3, 6)]
        checkpoints.finish()
        after = Steps(case, changes, fsdp=True, parallel=before.parallel)
        saved = checkpoints.read_state("benchmark")
        assert saved, "no checkpoint was written"
        checkpoints.load(after.backend, saved)
        again = [after.step(number) for number in range(3, 6)]
    return {"losses": {"whole": whole, "resumed": again, "equal": whole == again}}


def generation(scale: Scale, folder: Path) -> Rows:
    """Replies, the merge of a point of the sweep in memory, and through files."""
    from benchmarks.sweep import make_models, measure

    counts = (4, 8) if scale is SMALL else (32, 128)
    return {"sweep": measure(make_models(folder, scale.one), folder, *counts)}


@dataclass(frozen=True)
class Part:
    """A measurement, and the seconds that it may take on a GPU."""

    limit: float
    run: Callable[[Scale, Path], Rows]


PARTS: dict[str, Part] = {  # what matters most comes first
    "resume": Part(40, resume),
    **{
        f"speed: {size}B {'short' if document == 300 else 'whole'}": Part(
            limit, partial(speed, size=name, micro=micro, document=document)
        )
        for size, name, micro, limit in ((3, "three", 2, 75), (1, "one", 4, 60))
        for document in (300, WHOLE)
    },
    "attention": Part(30, attention),
    **{f"rung: {name}": Part(60, partial(rung, name=name)) for name in RUNGS},
    "save": Part(120, save_stall),
    "mixture": Part(60, mixture),
    "generation": Part(90, generation),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Path, minutes: float = 12.0, parts: str = "", small: bool = False, part: str = ""
) -> None:
    """Measure all parts, or those of a comma-separated list, one after the other."""
    if part:  # in a process of its own
        faulthandler.enable()
        try:
            found = PARTS[part].run(SMALL if small else LARGE, out)
        except UserError as error:  # what this machine cannot do
            found = {part: {"refused": str(error)}}
        _write(out, part, found)
        return
    chosen = parts.split(",") if parts else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise SystemExit(f"no such part: {', '.join(unknown)}; they are {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for name in chosen:
        left = end - time.monotonic()
        if left < PARTS[name].limit:
            print(f"{name}: not started, {left:.0f} of {PARTS[name].limit:.0f} s are left")
            continue
        started = time.monotonic()
        outcome = _run(out, name, PARTS[name].limit, small)
        print(f"{name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
        (out / "results.md").write_text(_table(out), encoding="utf-8")
    print((out / "results.md").read_text(encoding="utf-8"))


def _run(out: Path, name: str, limit: float, small: bool) -> str:
    """Run a part in a process of its own; how it ended."""
    command = [sys.executable, "-m", "benchmarks.one_gpu", str(out), "--part", name]
    with open(_file(out, name, "log"), "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *(["--small"] if small else [])], stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(6)  # faulthandler writes the stacks of all threads
            time.sleep(2)
            os.killpg(process.pid, 9)
            process.wait()
            return f"did not end in {limit:.0f} s, stacks in {log.name}"
    return "done" if code == 0 else f"failed with {code}, see {log.name}"


def _file(out: Path, part: str, ending: str) -> Path:
    return out / f"{'-'.join(re.findall(r'[^ :,]+', part))}.{ending}"


def _write(out: Path, part: str, rows: Rows) -> None:
    place = _file(out, part, "json")
    place.with_suffix(".part").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    place.with_suffix(".part").replace(place)


def _table(out: Path) -> str:
    """Every number that was measured, as a table for docs/benchmarks.md."""
    lines = ["| part | | |", "|---|---|---|"]
    for name in PARTS:
        place = _file(out, name, "json")
        if place.is_file():
            for row, values in json.loads(place.read_text(encoding="utf-8")).items():
                known = {key: value for key, value in values.items() if value or value == 0}
                shown = ", ".join(f"{key} {_shown(known[key])}" for key in known)
                lines.append(f"| {name} | {row} | {shown} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items()) + ")"
    return str(value)


if __name__ == "__main__":
    app()
