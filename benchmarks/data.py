"""Measures the data side of training.

    python -m benchmarks.data text DIR    write text like that of the demo (`make demo`)
    python -m benchmarks.data speed DIR   tokenise and pack, compared with `datasets.map` and
                                          `group_texts`, with datatrove (--datatrove: a virtual
                                          environment with it), and with the tokenizers alone
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
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import typer
from tokenizers import Tokenizer

from benchmarks.text import write_like
from cpt_merge.core.artifact import write_json
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.store import (
    STORE_FILE,
    SourceInfo,
    SplitCounts,
    SplitWriter,
    Store,
    StoreInfo,
    TokenizerInfo,
)
from cpt_merge.data.tokenise import write_store
from tests.real_tokenizers import BASES

LANGUAGES = ("en", "ko", "zh_tw")
LINES = 20  # per document
ROUNDS = 3  # of both ways, alternating
LENGTH = 1024  # of a packed sequence
STORE_TOKENS = 5_000_000_000  # two bytes each
BATCH = 256  # sequences

DATATROVE = """
import sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
def main():
    texts, tokenizer, eos, out, processes = sys.argv[1:]
    reader = JsonlReader(texts, glob_pattern="*.jsonl", shuffle_files=False)
    tokens = DocumentTokenizer(
        out, tokenizer_name_or_path=tokenizer, eos_token=eos, shuffle_documents=False
    )
    number = int(processes)
    LocalPipelineExecutor([reader, tokens], number, number, logging_dir=out + "/logs").run()
if __name__ == "__main__":
    main()
"""

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

Way = Callable[[list[Path], Path, Path, int], int]  # (files, tokenizer, folder, processes)

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
) -> None:
    """Tokens per second of all ways, by the clock."""
    files = _documents(folder)
    results: dict[str, Any] = {
        "processes": processes,
        "megabytes": round(sum(f.stat().st_size for f in files) / 1e6),
    }
    for name in tokenizers.split(","):
        tokenizer = _tokenizer(folder, name)
        ways: dict[str, Way] = {"store": store_way, "run_clm": run_clm_way}
        if datatrove:
            ways["datatrove"] = partial(datatrove_way, datatrove)
        rounds = [
            {way: _rate(ways[way], files, tokenizer, folder / "data", processes) for way in ways}
            | {"tokenizers, one core": library_rate(files, tokenizer)}
            for _ in range(ROUNDS)
        ]
        rates = {way: round(median(one[way] for one in rounds)) for way in rounds[0]}
        ratios = {
            way: round(median(one["store"] / one[way] for one in rounds), 2) for way in rounds[0]
        }
        results[name] = {"tokens_per_second": rates, "store / way": ratios, "rounds": rounds}
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


def _rate(way: Way, files: list[Path], tokenizer: Path, folder: Path, processes: int) -> float:
    """Tokens per second."""
    start = time.perf_counter()
    tokens = way(files, tokenizer, folder, processes)
    return tokens / (time.perf_counter() - start)


def store_way(files: list[Path], tokenizer: Path, folder: Path, processes: int) -> int:
    """From text files to the finished store; returns the number of tokens."""
    corpus = Corpus(
        sources=[Source(path=str(file), language=file.stem) for file in files], heldout=0.001
    )
    out = folder / "store"
    shutil.rmtree(out, ignore_errors=True)
    info = write_store(corpus, tokenizer, out, processes=processes, keep_blocks=False)
    return sum(source.train.tokens + source.heldout.tokens for source in info.sources)


def run_clm_way(files: list[Path], tokenizer: Path, folder: Path, processes: int) -> int:
    """As in transformers' run_clm example, from text files to Arrow files; returns the tokens."""
    import datasets
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    datasets.disable_progress_bars()
    text = datasets.load_dataset(
        "json",
        data_files=[str(file) for file in files],
        split="train",
        cache_dir=str(cache),
        num_proc=processes,
    )
    tokenised = text.map(
        lambda examples: loaded(examples["text"]),
        batched=True,
        num_proc=processes,
        remove_columns=text.column_names,
    )
    rows = tokenised.map(group_texts, batched=True, num_proc=processes)
    return len(rows) * LENGTH


def datatrove_way(
    venv: Path, files: list[Path], tokenizer: Path, folder: Path, processes: int
) -> int:
    """datatrove's DocumentTokenizer without shuffling; its processes divide whole files."""
    out = folder / "datatrove"
    shutil.rmtree(out, ignore_errors=True)
    (folder / "tokenise_by_datatrove.py").write_text(DATATROVE)
    eos = json.loads((tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    command = [venv / "bin" / "python", folder / "tokenise_by_datatrove.py", files[0].parent,
               tokenizer / "tokenizer.json", eos, out, processes]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    rows = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    width = 2 if rows <= 2**16 else 4
    return sum(file.stat().st_size for file in out.glob("*.ds")) // width


def library_rate(files: list[Path], tokenizer: Path) -> float:
    """Tokens per second of the tokenizers library alone, on one core and texts in memory."""
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(texts), 100):
        encodings = loaded.encode_batch_fast(texts[first : first + 100], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    return tokens / (time.perf_counter() - start)


def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Concatenate documents and cut them into LENGTH; the rest of every 1,000 is dropped."""
    joined = {name: list(chain(*values)) for name, values in examples.items()}
    total = len(joined["input_ids"]) // LENGTH * LENGTH
    rows = {
        name: [values[i : i + LENGTH] for i in range(0, total, LENGTH)]
        for name, values in joined.items()
    }
    return {**rows, "labels": rows["input_ids"].copy()}


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


def _documents(folder: Path) -> list[Path]:
    (folder / "data").mkdir(exist_ok=True)
    files = []
    for language in LANGUAGES:
        lines = (folder / f"{language}.txt").read_text(encoding="utf-8").split("\n")
        texts = ["\n".join(lines[first : first + LINES]) for first in range(0, len(lines), LINES)]
        files.append(folder / "data" / f"{language}.jsonl")
        rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        files[-1].write_text("".join(rows), encoding="utf-8")
    return files


def _tokenizer(folder: Path, name: str) -> Path:
    from transformers import AutoTokenizer

    directory = folder / "data" / name
    directory.mkdir(exist_ok=True)
    BASES[name](directory)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)  # with a tokenizer.json
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
