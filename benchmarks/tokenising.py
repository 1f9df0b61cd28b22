"""The ways of `benchmarks.data speed` from JSON lines to tokens on disk, each a process of its own.

    python -m benchmarks.tokenising WAY FILES_FOLDER TOKENIZER OUT PROCESSES

prints the number of tokens. It imports only what the way needs: a peer's virtual environment has no
other packages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

LENGTH = 1024  # of a packed sequence


def store(texts: Path, tokenizer: Path, out: Path, processes: int) -> int:
    """From text files to the finished store."""
    from cpt_merge.data.sources import Corpus, Source
    from cpt_merge.data.tokenise import write_store

    files = sorted(texts.glob("*.jsonl"))
    corpus = Corpus(sources=[Source(path=str(f), language=f.stem) for f in files], heldout=0.001)
    info = write_store(corpus, tokenizer, out / "store", processes=processes, keep_blocks=False)
    return sum(source.train.tokens + source.heldout.tokens for source in info.sources)


def run_clm(texts: Path, tokenizer: Path, out: Path, processes: int) -> int:
    """As in transformers' run_clm example, from text files to Arrow files."""
    import datasets
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    datasets.disable_progress_bars()
    text = datasets.load_dataset(
        "json",
        data_files=[str(file) for file in sorted(texts.glob("*.jsonl"))],
        split="train",
        cache_dir=str(out / "cache"),
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


def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Concatenate documents and cut them into LENGTH; the rest of every 1,000 is dropped."""
    joined = {name: list(chain(*values)) for name, values in examples.items()}
    total = len(joined["input_ids"]) // LENGTH * LENGTH
    rows = {
        name: [values[i : i + LENGTH] for i in range(0, total, LENGTH)]
        for name, values in joined.items()
    }
    return {**rows, "labels": rows["input_ids"].copy()}


def datatrove(texts: Path, tokenizer: Path, out: Path, processes: int) -> int:
    """datatrove's DocumentTokenizer without shuffling; its processes divide whole files."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(str(texts), glob_pattern="*.jsonl", shuffle_files=False)
    writer = DocumentTokenizer(
        str(out / "tokens"),
        tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
        eos_token=_eos(tokenizer),
        shuffle_documents=False,
    )
    logs = str(out / "logs")
    LocalPipelineExecutor([reader, writer], processes, processes, logging_dir=logs).run()
    written = sum(file.stat().st_size for file in (out / "tokens").glob("*.ds"))
    return written // (2 if _loaded(tokenizer).get_vocab_size() <= 2**16 else 4)


def litdata(texts: Path, tokenizer: Path, out: Path, processes: int) -> int:
    """litdata's `optimize` with its loader for tokens; its processes divide whole files."""
    from functools import partial

    from litdata import TokensLoader, optimize

    optimize(
        fn=partial(_litdata_documents, tokenizer=tokenizer),
        inputs=[str(file) for file in sorted(texts.glob("*.jsonl"))],
        output_dir=str(out / "tokens"),
        chunk_bytes="64MB",
        item_loader=TokensLoader(),
        num_workers=processes,
    )
    index = json.loads((out / "tokens" / "index.json").read_text())
    return sum(chunk["dim"] for chunk in index["chunks"])


def _litdata_documents(path: str, tokenizer: Path) -> Any:
    import torch

    loaded = _loaded(tokenizer)
    eos = loaded.token_to_id(_eos(tokenizer))
    dtype = torch.uint16 if loaded.get_vocab_size() <= 2**16 else torch.int32
    batch: list[str] = []
    for line in open(path, encoding="utf-8"):  # noqa: SIM115 - a generator
        batch.append(json.loads(line)["text"])
        if len(batch) == 100:
            yield from _litdata_encoded(loaded, batch, eos, dtype)
            batch = []
    yield from _litdata_encoded(loaded, batch, eos, dtype)


def _litdata_encoded(loaded: Any, batch: list[str], eos: int, dtype: Any) -> Any:
    import torch

    for encoding in loaded.encode_batch_fast(batch, add_special_tokens=False):
        yield torch.tensor([*encoding.ids, eos], dtype=dtype)


def _loaded(tokenizer: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer / "tokenizer.json"))


def _eos(tokenizer: Path) -> str:
    eos = json.loads((tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    assert isinstance(eos, str)
    return eos


WAYS: dict[str, Callable[[Path, Path, Path, int], int]] = {
    "store": store, "run_clm": run_clm, "datatrove": datatrove, "litdata": litdata,
}  # fmt: skip


if __name__ == "__main__":
    way, texts, tokenizer, out, processes = sys.argv[1:]
    print(WAYS[way](Path(texts), Path(tokenizer), Path(out), int(processes)))
