"""Measures the data side of training.

    python -m benchmarks.data text DIR    write text like that of the demo (`make demo`)
    python -m benchmarks.data speed DIR   tokenise and pack, compared with `datasets.map` and
                                          `group_texts`, with datatrove and litdata (--datatrove,
                                          --litdata: virtual environments with them), and with the
                                          tokenizers alone
    python -m benchmarks.data memory DIR  documents of 1 MB, few and many, and one of 50 MB
    python -m benchmarks.data open DIR    from process start to the first batch of a 10 GB store
    python -m benchmarks.data place DIR   the sequences of the first step and of step 1,000,000, in
                                          the store of `open`

DIR contains `zh_tw.txt`, `ko.txt` and `en.txt`; a document is 20 lines.
The tokenizers are real ones from packages (tests/real_tokenizers.py). Results are printed and
written to DIR/data-*.json; `speed` and `place` remove DIR/data at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import typer
from tokenizers import Tokenizer

from benchmarks.text import write_like
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.core.artifact import write_json
from cpt_merge.data.byte_level_encoder import ByteLevelEncoder
from cpt_merge.data.encoders import LibraryEncoder
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import (
    STORE_FILE,
    SourceInfo,
    SplitCounts,
    SplitWriter,
    Store,
    StoreInfo,
    TokenizerInfo,
)
from cpt_merge.data.workers import one_thread
from cpt_merge.tokenizer_ext.writing import DROPPED_SETTINGS
from tests.real_tokenizers import BASES

LANGUAGES = ("en", "ko", "zh_tw")
LINES = 20  # per document
ROUNDS = 3  # of both ways, alternating
STORE_TOKENS = 5_000_000_000  # two bytes each
BATCH = 256  # sequences

PEAK = """
import resource, sys, tempfile
from pathlib import Path
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.tokenise import write_store
corpus = Corpus(sources=[Source(path=sys.argv[1], language="ko")], heldout=0.01)
with tempfile.TemporaryDirectory() as folder:
    write_store(corpus, Path(sys.argv[2]), Path(folder) / "store")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""

FIRST_BATCH = """
import json, sys, time
started = time.time() - float(sys.argv[2])
import torch
torch_imported = time.time() - float(sys.argv[2])
from pathlib import Path
from cpt_merge.data.byte_level_encoder import ByteLevelEncoder
from cpt_merge.data.encoders import LibraryEncoder
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
imported = time.time() - float(sys.argv[2])
rows = TrainingSequences(Store.open(Path(sys.argv[1])), 4096, seed=0)
rows.targets(range(256))
rows.batch(range(8))
whole = time.time() - float(sys.argv[2])
print(json.dumps({"python": started, "import torch": torch_imported - started,
    "import cpt_merge.data": imported - torch_imported, "open and read": whole - imported,
    "first batch after": whole}))
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def text(folder: Path, megabytes: int = 20, like: Path = Path("runs/demo-inputs/text")) -> None:
    """Text in three languages that resembles the demo's in its runs of three characters."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        rows = (like / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        given = folder / f"{language}.given"
        given.write_text("\n".join(json.loads(row)["text"] for row in rows), encoding="utf-8")
        size = megabytes * 1_000_000 // len(LANGUAGES)
        write_like(given, size, folder / f"{language}.txt")


@app.command()
def speed(
    folder: Path,
    processes: int = os.cpu_count() or 1,
    tokenizers: str = "mistral,qwen",
    datatrove: Path | None = None,
    litdata: Path | None = None,
    rounds: int = 3,
) -> None:
    """Tokens per second of all ways, by the clock, from the start of a process to its end."""
    texts = _documents(folder)
    pythons = {"store": Path(sys.executable), "run_clm": Path(sys.executable)} | {
        way: venv / "bin" / "python"
        for way, venv in (("datatrove", datatrove), ("litdata", litdata))
        if venv
    }
    size = sum(file.stat().st_size for file in texts.iterdir())
    results: dict[str, Any] = {"processes": processes, "megabytes": round(size / 1e6)}
    for name in tokenizers.split(","):
        tokenizer = _tokenizer(folder, name)
        measured = [
            {way: _rate(way, pythons[way], texts, tokenizer, processes) for way in pythons}
            | library_rates(texts, tokenizer)
            for _ in range(rounds)
        ]
        rates = {way: round(median(one[way] for one in measured)) for way in measured[0]}
        ratios = {
            way: round(median(one["store"] / one[way] for one in measured), 2)
            for way in measured[0]
        }
        results[name] = {"tokens_per_second": rates, "store / way": ratios, "rounds": measured}
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    _finish(folder, "speed", results)


@app.command()
def memory(folder: Path, tokenizer: str = "mistral") -> None:
    """Peak memory of stores of large documents, each written by a process of its own, in MB."""
    (folder / "data").mkdir(exist_ok=True)
    text = (folder / "ko.txt").read_text(encoding="utf-8").replace("\n", " ")
    megabyte = len(text) * 1_000_000 // len(text.encode())
    results = {"tokenizer": tokenizer}
    for documents, size in ((30, 1), (120, 1), (1, 50)):
        whole = text * (size * megabyte // len(text) + 1)
        path = folder / "data" / "large.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for number in range(documents):
                start = number * 10_007 % (len(whole) - size * megabyte)
                content = f"{number} {whole[start : start + size * megabyte]}"
                file.write(json.dumps({"text": content}, ensure_ascii=False) + "\n")
            file.writelines(json.dumps({"text": f"{number}"}) + "\n" for number in range(100))
        command = [sys.executable, "-c", PEAK, str(path), str(_tokenizer(folder, tokenizer))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[f"{documents} documents of {size} MB"] = done.stdout.strip()
    _finish(folder, "memory", results)


def _rate(way: str, python: Path, texts: Path, tokenizer: Path, processes: int) -> float:
    """Tokens per second."""
    script = Path(__file__).with_name("tokenising.py")
    with tempfile.TemporaryDirectory(dir=texts.parent) as out:
        command = [python, "-P", script, way, texts, tokenizer, out, processes]
        environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
        start = time.perf_counter()
        done = subprocess.run(
            list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        seconds = time.perf_counter() - start
    return int(done.stdout.split()[-1]) / seconds


def library_rates(folder: Path, tokenizer: Path) -> dict[str, float]:
    """Tokens per second of the libraries alone, on one core and texts in memory."""
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [
        json.loads(line)["text"]
        for file in folder.iterdir()
        for line in file.open(encoding="utf-8")
    ]
    with one_thread():
        seconds, tokens = _timed(lambda: _encode_with(loaded, texts))
    rates = {"tokenizers, one core": tokens / seconds}
    library = LibraryEncoder(loaded, "uint32")
    shortcut = ByteLevelEncoder.of(json.loads(loaded.to_str()), library)
    if shortcut:
        encoding = shortcut.by_tiktoken
        seconds, tokens = _timed(lambda: sum(len(encoding.encode_to_numpy(one)) for one in texts))
        rates["tiktoken, one core"] = tokens / seconds
    return rates


def _encode_with(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The number of tokens."""
    return sum(
        len(encoding)
        for first in range(0, len(texts), 100)
        for encoding in tokenizer.encode_batch_fast(
            texts[first : first + 100], add_special_tokens=False
        )
    )


def _timed(call: Callable[[], int]) -> tuple[float, int]:
    """(seconds, result)"""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


@app.command("open")
def open_store(folder: Path) -> None:
    """Seconds from the start of a process to the first batch, with cold and with warm pages."""
    store = folder / "data" / "large"
    if not (store / STORE_FILE).is_file():
        _write_large(store)
    results: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for temperature, found in results.items():
        for _ in range(ROUNDS):
            if temperature == "cold":
                _forget(store)
            command = [sys.executable, "-c", FIRST_BATCH, str(store), repr(time.time())]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout))
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    summary: dict[str, Any] = {
        name: {part: round(median(one[part] for one in found), 3) for part in found[0]}
        for name, found in results.items()
    }
    summary = {"gigabytes": round(size / 1e9, 1), "median": summary, "rounds": results}
    _finish(folder, "open", summary, keep=True)


@app.command()
def place(folder: Path) -> None:
    """Milliseconds to find, count and read the sequences of a step, early and late in a run."""
    rows = TrainingSequences(Store.open(folder / "data" / "large"), 4096, seed=0)
    results: dict[str, Any] = {}
    for step in (0, 1_000_000):
        found: dict[str, list[float]] = {"places": [], "targets": [], "read": []}
        for number in range(7):
            first = (step + number * 5) * BATCH  # each in another block, so that nothing is cached
            indices = range(first, first + BATCH)
            found["places"].append(_milliseconds(lambda: rows.order.places(np.asarray(indices))))  # noqa: B023
            found["targets"].append(_milliseconds(lambda: rows.targets(indices)))  # noqa: B023
            found["read"].append(_milliseconds(lambda: rows.batch(indices)))  # noqa: B023
        results[f"step {step:,}"] = {
            name: round(median(values), 2) for name, values in found.items()
        }
    _finish(folder, "place", {"rows": BATCH, "length": 4096, "milliseconds": results})


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _documents(folder: Path) -> Path:
    """The folder of the texts as JSON lines."""
    out = folder / "data" / "texts"
    out.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        lines = (folder / f"{language}.txt").read_text(encoding="utf-8").split("\n")
        texts = ["\n".join(lines[first : first + LINES]) for first in range(0, len(lines), LINES)]
        rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (out / f"{language}.jsonl").write_text("".join(rows), encoding="utf-8")
    return out


def _tokenizer(folder: Path, name: str) -> Path:
    """A tokenizer in the files that the tokenizer stage writes."""
    from transformers import AutoTokenizer

    directory = folder / "data" / name
    directory.mkdir(exist_ok=True)
    BASES[name](directory)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)  # with a tokenizer.json
    (directory / "config.json").unlink()
    settings = read_json(directory / "tokenizer_config.json")
    settings = {name: settings[name] for name in settings if name not in DROPPED_SETTINGS}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(directory / "tokenizer_config.json", settings)
    return directory


def _write_large(store: Path) -> None:
    """Random tokens in documents of 20 to 2,000, in two sources."""
    generator, sources = np.random.default_rng(0), []
    for number in range(2):
        writers = {
            split: SplitWriter(store / str(number) / split, "uint16")
            for split in ("train", "heldout")
        }
        for _ in range(STORE_TOKENS // 2 // 50_000_000):
            lengths = generator.integers(20, 2000, 49_500)
            writers["train"].add(
                generator.integers(0, 32_000, lengths.sum(), np.uint16), lengths, 4 * lengths
            )
        counts: dict[str, SplitCounts] = {
            split: writer.close() for split, writer in writers.items()
        }
        sources.append(
            SourceInfo(str(number), "en", str(number), {}, counts["train"], counts["heldout"], None)
        )
    write_json(
        store / STORE_FILE,
        asdict(StoreInfo("", TokenizerInfo("", 32_000, "uint16"), None, sources)),
    )


def _forget(store: Path) -> None:
    """Ask the operating system to drop the pages of the files."""
    for file in store.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _finish(folder: Path, name: str, results: dict[str, Any], keep: bool = False) -> None:
    print(json.dumps(results, indent=2))
    write_json(folder / f"data-{name}.json", results)
    if not keep:
        shutil.rmtree(folder / "data", ignore_errors=True)


if __name__ == "__main__":
    app()
