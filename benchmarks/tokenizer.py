"""Tokenizer extension, measured.

    python -m benchmarks.tokenizer corpora DIR   real text: time, fertility, invariants, speed
    python -m benchmarks.tokenizer growth DIR    time and memory of learning, 10 MB to 1 GB
    python -m benchmarks.tokenizer others DIR    invariants on two other ways to extend Mistral's

DIR holds `zh_tw.txt`, `zh_cn.txt`, `ko.txt` and `en.txt`, a document a line. Bases are real
tokenizers from packages (tests/real_tokenizers.py). Results are printed and written to
DIR/tokenizer-*.json.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import sentencepiece
import typer
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from benchmarks.text import write_like
from cpt_merge.checkpoint.sentencepiece_model import NORMAL
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.tokenizer_ext import TokenizerConfig
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.learn import grow
from cpt_merge.tokenizer_ext.verify.invariants import INVARIANTS, read_case
from cpt_merge.tokenizer_ext.verify.samples import heldout_texts, scripts_of, take_samples
from cpt_merge.tokenizer_ext.writing import lay_out, write_tokenizer
from tests.real_tokenizers import BASES

NEW_PIECES = {"zh_tw": 8_000, "ko": 8_000}
HELDOUT = 0.1  # every tenth line, by hash
ROUNDS = 7  # of encoding; the base and the extended tokenizer take turns
MEGABYTES = (10, 100, 1_000)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def corpus_of(folder: Path, languages: tuple[str, ...]) -> Corpus:
    """The corpus in a folder."""
    sources = [
        Source(path=str(folder / f"{language}.txt"), language=language) for language in languages
    ]
    return Corpus(sources=sources, heldout=HELDOUT)


@app.command()
def corpora(folder: Path, bases: str = "mistral,qwen") -> None:
    """Extend real bases by 8,000 pieces of Traditional Chinese and 8,000 of Korean, and measure the
    result.
    """
    import datasets  # noqa: F401 - imported before the clock starts

    results = {}
    for name in bases.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            results[name] = _measure(
                name, corpus_of(folder, ("zh_tw", "ko", "en")), Path(temporary)
            )
        print(name, json.dumps(results[name], indent=2))
    (folder / "tokenizer-corpora.json").write_text(json.dumps(results, indent=2))


def _measure(name: str, corpus: Corpus, folder: Path) -> dict[str, Any]:
    BASES[name](folder / "base")
    base = read_base(folder / "base")
    config = TokenizerConfig(new_pieces=NEW_PIECES)
    start = time.perf_counter()
    learned = grow.learn_languages(base, corpus, config)
    seconds = time.perf_counter() - start
    pieces = [piece for one in learned for piece in one.pieces]
    (folder / "out").mkdir()
    write_tokenizer(base, lay_out(base, [], pieces, config.pad_to_multiple), folder / "out")
    every_line = {
        language: [*corpus.documents(source, "train"), *corpus.documents(source, "heldout")]
        for language in corpus.languages()
        for source in corpus.of_language(language)
    }
    readable = [base.family.readable(piece) for piece in pieces]
    case = read_case(
        base, folder / "out", None, take_samples(every_line, scripts_of(NEW_PIECES), readable)
    )
    proofs = [invariant(case) for invariant in INVARIANTS]
    heldout = heldout_texts(corpus)
    fertility = {
        language: _fertility(case.before, case.after, texts) for language, texts in heldout.items()
    }
    return {
        "learning_seconds": round(seconds, 1),
        "invariants": {proof.invariant: [proof.checked, len(proof.failures)] for proof in proofs},
        "tokens_per_character": fertility,
        "english_lines_changed": _changed(case.before, case.after, every_line["en"]),
        "speed": {
            language: _speed(case.before, case.after, texts) for language, texts in heldout.items()
        },
    }


def _changed(before: Tokenizer, after: Tokenizer, texts: list[str]) -> int:
    pairs = zip(before.encode_batch_fast(texts), after.encode_batch_fast(texts), strict=True)
    return sum(one.ids != other.ids for one, other in pairs)


def _fertility(before: Tokenizer, after: Tokenizer, texts: list[str]) -> list[float]:
    characters = sum(map(len, texts))
    tokenizers = (before, after)
    return [
        round(
            sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            / characters,
            4,
        )
        for tokenizer in tokenizers
    ]


def _speed(before: Tokenizer, after: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Characters per second of both, one text at a time in one thread, and their ratio (median over
    rounds).
    """
    characters = sum(map(len, texts))
    rates: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        seconds = []
        for tokenizer in (before, after):
            start = time.perf_counter()
            for text in texts:
                tokenizer.encode(text, add_special_tokens=False)
            seconds.append(time.perf_counter() - start)
        rates.append((characters / seconds[0], characters / seconds[1]))
    return {
        "base": round(median(rate for rate, _ in rates)),
        "extended": round(median(rate for _, rate in rates)),
        "ratio": round(median(after / before for before, after in rates), 3),
    }


@app.command()
def growth(
    folder: Path, base: str = "mistral", language: str = "zh_cn", pieces: int = 16_000
) -> None:
    """Learn from 10 MB, 100 MB and 1 GB of text like the given one, each in its own process."""
    results = []
    for megabytes in MEGABYTES:
        with tempfile.TemporaryDirectory() as temporary:
            text = Path(temporary) / f"{language}.txt"
            write_like(folder / f"{language}.txt", megabytes * 10**6, text)
            command = [
                sys.executable,
                "-m",
                "benchmarks.tokenizer",
                "learn",
                str(text),
                base,
                language,
                str(pieces),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append({"megabytes": megabytes, **json.loads(done.stdout)})
        print(json.dumps(results[-1]), flush=True)
    (folder / "tokenizer-growth.json").write_text(json.dumps(results, indent=2))


@app.command()
def others(folder: Path) -> None:
    """Words as added tokens, and a Unigram model appended with score 0 (as published ones are),
    under our invariants.
    """
    from cpt_merge.tokenizer_ext.verify.check_tokenizer import check_tokenizer

    text = folder / "zh_tw.txt"
    made = {"add_tokens": _with_added_tokens, "appended unigram": _with_appended_unigram}
    results = {}
    for name, make in made.items():
        with tempfile.TemporaryDirectory() as temporary:
            base, out = Path(temporary) / "base", Path(temporary) / "out"
            BASES["mistral"](base)
            out.mkdir()
            make(base, text, out)
            checked = check_tokenizer(out, base, None, [text, folder / "en.txt"], ["zh_tw"])
            results[name] = {
                proof.invariant: [proof.checked, len(proof.failures)] for proof in checked.proofs
            }
    print(json.dumps(results, indent=2))
    (folder / "tokenizer-others.json").write_text(json.dumps(results, indent=2))


def _unigram_pieces(text: Path) -> list[str]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_writer=model, model_type="unigram", vocab_size=8_000, minloglevel=2
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    return [piece.piece for piece in proto.pieces if piece.type == NORMAL]


def _with_added_tokens(base: Path, text: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([piece.replace("▁", " ") for piece in _unigram_pieces(text)])
    tokenizer.save_pretrained(out)


def _with_appended_unigram(base: Path, text: Path, out: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString((base / "tokenizer.model").read_bytes())
    known = {piece.piece for piece in proto.pieces}
    for piece in _unigram_pieces(text):
        if piece not in known:
            proto.pieces.add(piece=piece, score=0.0)
    (out / "tokenizer.model").write_bytes(proto.SerializeToString())
    (out / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"})
    )


@app.command(hidden=True)
def learn(text: Path, base: str, language: str, pieces: int) -> None:
    """One size of `growth`: memory is this process's, beyond what it had with a small text."""
    import datasets  # noqa: F401 - imported before the clock starts

    with tempfile.TemporaryDirectory() as temporary:
        BASES[base](Path(temporary))
        start = read_base(Path(temporary))
    small = text.with_name("small.txt")
    with open(text, encoding="utf-8") as lines:
        small.write_text(
            "".join(line for line, _ in zip(lines, range(2_000), strict=False)), encoding="utf-8"
        )
    config = TokenizerConfig(new_pieces={language: pieces}, max_characters=10**10)
    _learn_timed(start, small, language, config)
    warm = _peak()
    seconds, counted = _learn_timed(start, text, language, config)
    measured = {"seconds": seconds, "memory_mb": round(_peak() - warm), **counted}
    measured["memory_per_counter"] = round(measured["memory_mb"] / counted["counter_mb"], 2)
    print(json.dumps(measured))


def _learn_timed(
    start: Any, text: Path, language: str, config: TokenizerConfig
) -> tuple[float, dict[str, Any]]:
    """(seconds, what the Counter of distinct words took: their number, and megabytes by
    `sys.getsizeof`).
    """
    from cpt_merge.tokenizer_ext.learn import word_counts

    counted: dict[str, Any] = {}
    take_over = word_counts.Words.of

    def measured(counts: Any) -> word_counts.Words:
        size = sys.getsizeof(counts) + sum(map(sys.getsizeof, counts))
        counted.update(words=len(counts), counter_mb=round(size / 1e6))
        return take_over(counts)

    word_counts.Words.of = measured  # type: ignore[method-assign]
    begun = time.perf_counter()
    grow.learn_languages(
        start, Corpus(sources=[Source(path=str(text), language=language)], heldout=0.001), config
    )
    word_counts.Words.of = take_over  # type: ignore[method-assign]
    return round(time.perf_counter() - begun, 1), counted


def _peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    app()
