"""The merge, measured.

    python -m benchmarks.merge prepare DIR          models of 1.1 B parameters in bf16: about 9 GB
        --shape llama2-7b --layers 4                1.07 B parameters in LLaMA-2-7B's matrices: 9 GB
        --shape llama2-7b --no-extended             LLaMA-2-7B: 41 GB, and 14 GB for the output
    python -m benchmarks.merge speed DIR            against disk and (--venv V, --scripts S) peers
    python -m benchmarks.merge cold DIR             inputs outside the page cache
    python -m benchmarks.merge memory DIR           peak memory, also with three times the layers
    python -m benchmarks.merge processes DIR        one and two processes, one core each
    python -m benchmarks.merge kill DIR             killed ten times, compared with undisturbed
    python -m benchmarks.merge methods DIR          TIES, DARE, the gate, two vectors
    python -m benchmarks.merge compare DIR V S      results compared with the peers' by element

Peers: V is a virtual environment with mergekit (pip install mergekit==0.1.5), S a clone of
aqweteddy/ChatVector. Results are printed and written to DIR/merge-*.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import peers
from benchmarks.checkpoints import LLAMA2_7B, TINYLLAMA, Shape
from benchmarks.checkpoints import prepare as prepare_models
from benchmarks.processor import processor
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.progress import counted
from cpt_merge.merge.methods.ties import magnitude_threshold

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
READ_BLOCK = 1 << 22
SHAPES = {"tinyllama": TINYLLAMA, "llama2-7b": LLAMA2_7B}


@dataclass
class Cost:
    """Seconds of wall and CPU of one command, its peak resident and anonymous memory in MB."""

    wall: float
    cpu: float
    rss: float
    anonymous: float


def measure(command: list[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command. Raises `SystemExit` with its output if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    peak = _Sampler(process.pid)
    output = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    peak.stop()
    if status != 0:
        raise SystemExit(f"{' '.join(command)}\n{output.decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, peak.megabytes)


class _Sampler:
    """Peak anonymous memory of a process, sampled every 20 ms."""

    def __init__(self, pid: int) -> None:
        self.pid, self.megabytes, self._running = pid, 0.0, True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._running:
            try:
                lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            except OSError:
                return
            anonymous = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            self.megabytes = max(
                [self.megabytes, *(kilobytes * 1.024e-3 for kilobytes in anonymous)]
            )
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop looking."""
        self._running = False
        self._thread.join()


def merge_command(folder: Path, cpt: str, out: Path, *settings: str) -> list[str]:
    """Our command as a user types it."""
    base, chat = folder / "base", folder / "chat"
    models = [
        "--cpt",
        str(folder / cpt),
        "--base",
        str(base),
        "--chat",
        str(chat),
        "--out",
        str(out),
    ]
    return [str(Path(sys.executable).with_name("cpt-merge")), "merge-models", *models, *settings]


def input_files(folder: Path, cpt: str = "cpt") -> list[Path]:
    """The weights that a merge reads."""
    return sorted(
        file for model in ("base", "chat", cpt) for file in (folder / model).glob("*.safetensors")
    )


def read_all(files: list[Path]) -> float:
    """Seconds to read files once."""
    started, buffer = time.perf_counter(), bytearray(READ_BLOCK)
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - started


def write_durably(path: Path, nbytes: int) -> float:
    """Seconds to write so many bytes durably, as a merge does."""
    started, block = time.perf_counter(), os.urandom(READ_BLOCK)
    with open(path, "wb", buffering=0) as handle:
        for _ in range(nbytes // READ_BLOCK):
            handle.write(block)
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def digest(directory: Path) -> str:
    """sha256 of all weights."""
    found = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "rb") as handle:
            while part := handle.read(READ_BLOCK):
                found.update(part)
    return found.hexdigest()


@app.command()
def prepare(
    folder: Path,
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "tinyllama",
    layers: Annotated[int | None, typer.Option(help="instead of the model's own")] = None,
    extended: Annotated[bool, typer.Option(help="also a CPT model of 48,000 rows")] = True,
) -> None:
    """Make the models; existing ones are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = SHAPES[shape]
    prepare_models(folder, replace(chosen, layers=layers or chosen.layers), extended)


@app.command()
def speed(
    folder: Path,
    rounds: int = 5,
    venv: Annotated[Path | None, typer.Option(help="with mergekit")] = None,
    scripts: Annotated[Path | None, typer.Option(help="the authors'")] = None,
    peer_rounds: int = 3,
) -> None:
    """Wall, CPU and memory of whole commands with start-up, in turn; the page cache is warm."""
    out, nbytes = (
        folder / "out",
        sum(file.stat().st_size for file in (folder / "cpt").glob("*.safetensors")),
    )
    commands: dict[str, Callable[[], Cost]] = {
        "ours": lambda: measure(merge_command(folder, "cpt", out)),
        "ours, --help": lambda: measure([*merge_command(folder, "cpt", out)[:2], "--help"]),
        "ours, --plan": lambda: measure(merge_command(folder, "cpt", out, "--plan")),
    }
    if (folder / "cpt48k").exists():
        commands["ours, 48,000 rows"] = lambda: measure(merge_command(folder, "cpt48k", out))
    others = _peers(folder, out, venv, scripts)
    results: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        read, write = read_all(input_files(folder)), write_durably(folder / "raw", nbytes)
        results.setdefault("read 3, write 1", []).append(asdict(Cost(read + write, 0, 0, 0)))
        here = {**commands, **(others if number < peer_rounds else {})}
        for name, run in here.items():
            shutil.rmtree(out, ignore_errors=True)
            cost = run()
            results.setdefault(name, []).append(asdict(cost))
            print(f"round {number + 1}: {name}: {cost}", flush=True)
        print(f"round {number + 1}: read {read:.2f} s, write {write:.2f} s", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    _show(results)
    found = {"processor": processor(), "seconds": results}
    (folder / "merge-speed.json").write_text(json.dumps(found, indent=1))


def _peers(
    folder: Path, out: Path, venv: Path | None, scripts: Path | None
) -> dict[str, Callable[[], Cost]]:
    base, chat, cpt, long = (folder / name for name in ("base", "chat", "cpt", "cpt48k"))
    found: list[peers.Peer] = []
    if venv is not None:
        found += [
            peers.mergekit_linear(venv, cpt, base, chat, 1.0, out),
            peers.mergekit_task_arithmetic(venv, cpt, base, chat, 1.0, out),
        ]
        if long.exists():
            found.append(peers.mergekit_linear(venv, long, base, chat, 1.0, out, tokenizer=long))
        if scripts is not None:
            found.append(
                peers.chat_vector(venv, scripts, cpt, [(base, chat)], [1.0], out, skip_embed=False)
            )
    return {peer.name: lambda peer=peer: _peer_cost(peer) for peer in found}  # type: ignore[misc]


def _peer_cost(peer: peers.Peer) -> Cost:
    """The cost of all commands of a peer: the sum of the times and the largest memory."""
    costs = [measure(command, dict(peer.environment)) for command in peer.commands]
    return Cost(
        sum(cost.wall for cost in costs),
        sum(cost.cpu for cost in costs),
        max(cost.rss for cost in costs),
        max(cost.anonymous for cost in costs),
    )


def _show(results: dict[str, list[dict[str, float]]]) -> None:
    columns = "".join(f"{name:>10}" for name in ("wall s", "CPU s", "RSS MB", "anon MB"))
    print(f"\n{processor()}")
    print(f"{'median':40}{columns}{'wall / read+write':>20}")
    raw = results.get("read 3, write 1", [])
    for name, costs in results.items():
        medians = [
            median(cost[field] for cost in costs) for field in ("wall", "cpu", "rss", "anonymous")
        ]
        ratios = [cost["wall"] / bound["wall"] for cost, bound in zip(costs, raw, strict=False)]
        line = f"{name:40}{medians[0]:10.2f}{medians[1]:10.2f}{medians[2]:10.0f}{medians[3]:10.0f}"
        print(line + (f"{median(ratios):20.2f}" if ratios else ""))


@app.command()
def cold(folder: Path, rounds: int = 5) -> None:
    """A merge whose inputs are not in the page cache, against reading them."""
    out, ratios = folder / "out", []
    files = input_files(folder)
    for number in range(rounds):
        _evict(files)
        reading = read_all(files)
        _evict(files)
        shutil.rmtree(out, ignore_errors=True)
        cost = measure(merge_command(folder, "cpt", out))
        ratios.append(cost.wall / reading)
        print(f"round {number + 1}: reading {reading:.2f} s, merge {cost.wall:.2f} s", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print(f"median ratio {median(ratios):.2f}")
    (folder / "merge-cold.json").write_text(json.dumps(ratios))


def _evict(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@app.command()
def memory(folder: Path) -> None:
    """Peak memory at two sizes of a model: 22 layers and 66, of half the width."""
    results = {}
    for layers in (22, 66):
        models = folder / f"layers{layers}"
        models.mkdir(parents=True, exist_ok=True)
        prepare_models(models, Shape(layers, hidden=1024, intermediate=2816, key_value=128))
        out = models / "out"
        shutil.rmtree(out, ignore_errors=True)
        results[layers] = asdict(measure(merge_command(models, "cpt", out)))
        print(layers, "layers:", results[layers], flush=True)
        shutil.rmtree(out)
    (folder / "merge-memory.json").write_text(json.dumps(results))


@app.command()
def processes(folder: Path, rounds: int = 3) -> None:
    """One process on one core against two on two: TIES, where the arithmetic is the bottleneck."""
    out, results = folder / "out", dict[int, list[float]]()
    digests = set()
    for number in range(rounds):
        for count in (1, 2):
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            _run_processes(merge_command(folder, "cpt", out, "method=ties", "density=0.2"), count)
            results.setdefault(count, []).append(time.perf_counter() - started)
            digests.add(digest(out))
            print(f"round {number + 1}: {count} processes {results[count][-1]:.2f} s", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print(
        f"speed-up {median(results[1]) / median(results[2]):.2f}; {counted(len(digests), 'digest')}"
    )
    (folder / "merge-processes.json").write_text(
        json.dumps({"seconds": results, "digests": len(digests)})
    )


def _run_processes(command: list[str], count: int) -> None:
    running = []
    for rank in range(count):
        environment = (
            {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            if count > 1
            else {}
        )
        running.append(
            subprocess.Popen(
                ["taskset", "-c", str(rank), *command],
                env={**os.environ, **environment},
                stderr=subprocess.DEVNULL,
            )
        )
    if any(process.wait() for process in running):
        raise SystemExit("a process failed")


@app.command()
def kill(folder: Path, times: int = 10) -> None:
    """Kill merges at random moments and continue them; compare with an undisturbed run."""
    out, command = folder / "out", merge_command(folder, "cpt", folder / "out")
    shutil.rmtree(out, ignore_errors=True)
    undisturbed = measure(command).wall
    expected = digest(out)
    results: list[dict[str, Any]] = []
    for number in range(times):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name("out.tmp"), ignore_errors=True)
        moment = random.Random(number).uniform(0.3, undisturbed)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        written = _blocks(out.with_name("out.tmp"))
        measure(command)
        results.append(
            {"killed after s": moment, "blocks written": written, "same": digest(out) == expected}
        )
        print(results[-1], flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print(
        f"{sum(result['same'] for result in results)} of {times} end in the digest of the "
        "undisturbed run"
    )
    (folder / "merge-kill.json").write_text(json.dumps(results))


def _blocks(directory: Path) -> int:
    return sum(path.read_text().count('"block"') for path in directory.glob("written-*.jsonl"))


@app.command()
def methods(folder: Path) -> None:
    """What the other methods cost compared with plain addition."""
    out = folder / "out"
    second = f"vectors=[{{base: {folder / 'base'}, chat: {folder / 'chat'}, ratio: 0.5}}]"
    ties = ["method=ties", "density=0.2"]
    cases = {
        "add": [],
        "two vectors": [second],
        "gate": ["gate=true"],
        "ties": ties,
        "dare": ["method=dare", "density=0.2"],
        "ties, two vectors": [*ties, second],
    }
    results = {}
    for name, settings in cases.items():
        shutil.rmtree(out, ignore_errors=True)
        results[name] = asdict(measure(merge_command(folder, "cpt", out, *settings)))
        print(name, results[name], flush=True)
    shutil.rmtree(out, ignore_errors=True)
    (folder / "merge-methods.json").write_text(json.dumps(results, indent=1))


@app.command()
def compare(folder: Path, venv: Path, scripts: Path) -> None:
    """The same merge of small models by ours and by a peer: how many elements differ, and how far.

    Differences are in units of the last place of the largest operand, including the vector. For
    TIES base and CPT are one model, since mergekit adds the vectors to the base; elements whose
    magnitude equals the threshold are not compared, because mergekit keeps an arbitrary choice of
    them.
    """
    models = folder / "small"
    models.mkdir(parents=True, exist_ok=True)
    prepare_models(models, Shape(layers=2, hidden=256, intermediate=512, key_value=32))
    base, chat, cpt, long = (models / name for name in ("base", "chat", "cpt", "cpt48k"))
    out, results = models / "out", {}
    pair = [(base, chat)]
    skip = "rules=[{kinds: [embed, head], action: skip}]"
    other = f"vectors=[{{base: {base}, chat: {chat}, ratio: -0.3}}]"
    of_chat, second = [peers.PeerVector(chat, 1.0, 0.2)], [peers.PeerVector(cpt, 1.0, 0.2)]
    of_cpt = f"vectors=[{{base: {base}, chat: {cpt}, ratio: 0.7}}]"
    ties = ["ratio=0.7", "method=ties", "density=0.2"]
    theirs = (models / f"theirs{number}" for number in range(1, 10))
    task, linear = peers.mergekit_task_arithmetic, peers.mergekit_linear
    authors, trimmed = peers.chat_vector, peers.mergekit_ties
    both = [*of_chat, *second]
    cases: dict[str, tuple[peers.Peer, str, list[str]]] = {
        "task_arithmetic, 1.0": (
            task(venv, cpt, base, chat, 1.0, next(theirs)), "cpt", []),
        "task_arithmetic, 0.7": (
            task(venv, cpt, base, chat, 0.7, next(theirs)), "cpt", ["ratio=0.7"]),
        "task_arithmetic, 48,000 rows": (
            task(venv, long, base, chat, 1.0, next(theirs), long), "cpt48k", []),
        "linear, 0.7": (
            linear(venv, cpt, base, chat, 0.7, next(theirs)), "cpt", ["ratio=0.7"]),
        "authors, 1.0": (
            authors(venv, scripts, cpt, pair, [1.0], next(theirs), False), "cpt", []),
        "authors, 0.7, skip_embed": (
            authors(venv, scripts, cpt, pair, [0.7], next(theirs), True), "cpt", ["ratio=0.7",
            skip]),
        "authors, two vectors": (
            authors(venv, scripts, cpt, pair * 2, [1.0, -0.3], next(theirs), False), "cpt",
            [other]),
        "ties, one vector": (
            trimmed(venv, base, of_chat, next(theirs), 0.7, True, None), "base", ties),
        "ties, two vectors": (
            trimmed(venv, base, both, next(theirs), 0.7, True, None), "base", [*ties, of_cpt]),
    }  # fmt: skip
    for name, (peer, start, settings) in cases.items():
        shutil.rmtree(peer.out, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        _peer_cost(peer)
        measure(merge_command(models, start, out, *settings))
        vectors = [(chat, base), *([(cpt, base)] if of_cpt in settings else [])]
        results[name] = _difference(
            out, peer.out, models / start, vectors, 0.2 if "ties" in name else None
        )
        print(f"{name:32} {results[name]}", flush=True)
    (folder / "merge-compare.json").write_text(json.dumps(results, indent=1))


def _difference(
    out: Path, theirs: Path, start: Path, vectors: list[tuple[Path, Path]], density: float | None
) -> dict[str, float]:
    """Elements compared, percentage that differs, and the largest difference in units."""
    ours, peer, origin = (Checkpoint.open(path) for path in (out, theirs, start))
    compared = differing = 0
    largest = 0.0
    for name, info in ours.tensors.items():
        a, b, c = (
            model.read_float32(name).reshape(-1)[: info.size] for model in (ours, peer, origin)
        )
        operands, counted = [np.abs(a), np.abs(b), np.abs(c)], np.ones(info.size, np.bool_)
        for chat, base in vectors:
            d = Checkpoint.open(chat).read_float32(name).reshape(-1) - Checkpoint.open(
                base
            ).read_float32(name).reshape(-1)
            magnitude = np.pad(np.abs(d), (0, info.size - d.size))
            operands.append(magnitude)
            if density is not None:
                threshold = magnitude_threshold(lambda d=d: [d], density)  # type: ignore[misc]
                counted &= magnitude != threshold
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.max(operands, axis=0), 1e-30))) - 7)
        difference = (np.abs(a - b) / unit)[counted]
        compared, differing = compared + int(counted.sum()), differing + int((difference > 0).sum())
        largest = max(largest, float(difference.max(initial=0)))
    return {
        "compared": compared,
        "differing %": round(100 * differing / compared, 4),
        "largest, units": largest,
    }


if __name__ == "__main__":
    app()
