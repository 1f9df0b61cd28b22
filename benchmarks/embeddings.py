"""Initialisation of new rows, measured: bits per byte of held-out text at the start and along a short training.

    python -m benchmarks.embeddings DIR                      two bases, the pairs of methods in `PAIRS`, 100 steps
    python -m benchmarks.embeddings DIR --rate 0.2           the same with a fifth of the demo's learning rates
    python -m benchmarks.embeddings DIR --steps 342 --every 38 --pairs constituents/constituents,ends/ends

A pair is `embeddings.input/embeddings.head`. Recipe and text are the demo's (`recipes/demo.yaml`); the bases are

- `english`: the demo's base. It has never seen a letter of Chinese or Korean, so its byte tokens are untrained;
- `some`: the same shape, pretrained on the English text and a third of the Chinese and Korean training documents, with
  the 350 most frequent Han characters and 120 Hangul syllables in its vocabulary, as LLaMA-2 has some hundred of each.

One process and one thread. Results are printed, and kept in DIR/embeddings.json.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import PreTrainedTokenizerFast

from cpt_merge.core.config import parse_section
from cpt_merge.core.languages import find_language
from cpt_merge.launcher.execute import run_stage
from cpt_merge.launcher.recipe import Recipe, read_yaml
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stages import DATA, EMBEDDINGS, TOKENIZER, TRAINING
from cpt_merge.recipes.demo.pair import (
    ModelSettings,
    PairSettings,
    TrainSettings,
    pack_documents,
    save_model,
    text_batches,
    train,
)
from cpt_merge.recipes.demo.prepare import prepare
from cpt_merge.recipes.demo.tokenizer import train_sentencepiece, write_tokenizer
from cpt_merge.tracking import read_log

RECIPE = Path("recipes/demo.yaml")
PAIRS = (
    "constituents/constituents,ends/ends,focus/focus,mean/mean,gaussian/gaussian,constituents/ends"
)
LANGUAGES = ("zh_tw", "ko", "en")
SHARE = 3  # one in so many Chinese and Korean documents is in the text of the base `some`
LETTERS = {"zh_tw": 350, "ko": 120}  # in its vocabulary
PIECES = 2560
PRETRAINING_STEPS = 1000

Curve = dict[int, dict[str, float]]  # step -> language -> bits per byte
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Path,
    pairs: str = PAIRS,
    bases: str = "english,some",
    steps: int = 100,
    every: int = 20,
    seeds: int = 1,
    rate: float = 1.0,
) -> None:
    """Measure pairs of methods. `every`: steps between two evaluations; `rate`: a factor on the learning rates."""
    prepare(folder / "inputs", threads=1)
    torch.set_num_threads(1)
    if "some" in bases and not (folder / "some").exists():
        make_base(recipe_for(folder, "english", {}), folder / "some")
    results: dict[str, Curve] = {}
    for base in bases.split(","):
        for pair in pairs.split(","):
            for seed in range(seeds):
                curve = measure(folder, base, pair, steps, every, seed, rate)
                results[f"{base} {pair} seed {seed} rate {rate}"] = curve
                print(f"{base:8} {pair:26} seed {seed}  {shown(curve)}", flush=True)
                (folder / "embeddings.json").write_text(json.dumps(results, indent=1))


def measure(
    folder: Path, base: str, pair: str, steps: int, every: int, seed: int, rate: float
) -> Curve:
    """Run the stages up to training with one pair of methods. What is finished already is not done again."""
    input_method, head_method = pair.split("/")
    sections: dict[str, dict[str, Any]] = {
        "embeddings": {"input": input_method, "head": head_method},
        "training": {
            "tokens": steps * 256 * 8, "evaluate_every": every, "checkpoints": {"every": steps}, "log_every": steps,
            "seed": seed, "post_train_merge": False,
            "optimizer": {"learning_rate": 1e-3 * rate, "embedding_learning_rate": 3e-3 * rate},
        },
    }  # fmt: skip
    run = Run(recipe_for(folder, base, sections))
    for stage in (TOKENIZER, EMBEDDINGS, DATA, TRAINING):
        run_stage(run, stage)
    log = read_log(run.folder("training") / "log")
    curve: Curve = {}
    for language in LANGUAGES:
        for step, value in log.series(f"valid/{language}/bits_per_byte"):
            curve.setdefault(int(step), {})[language] = round(value, 4)
    return curve


def recipe_for(folder: Path, base: str, sections: dict[str, dict[str, Any]]) -> Recipe:
    """The demo's recipe in one process, with another base and other settings in some sections."""
    values, models = read_yaml(RECIPE), folder / ("inputs" if base == "english" else base)
    for source in values["corpus"]["sources"]:
        source["path"] = str(folder / "inputs" / "text" / Path(source["path"]).name)
    for section, settings in sections.items():
        values[section] = {**values.get(section, {}), **settings}
    values |= {
        "name": base,
        "runs": str(folder / "runs"),
        "models": {"base": str(models / "base"), "chat": str(models / "chat")},
        "launch": {"processes": 1},
        "tracking": {"mode": "disabled"},
    }
    return parse_section(Recipe, values, str(RECIPE))


def make_base(recipe: Recipe, out: Path) -> None:
    """Write the base `some` to OUT/base and, since a recipe names one, the same again to OUT/chat."""
    settings = PairSettings()
    torch.manual_seed(settings.seed)
    corpus = recipe.corpus
    texts = {source.language: list(corpus.documents(source, "train")) for source in corpus.sources}
    documents = [*texts["en"], *texts["zh_tw"][::SHARE], *texts["ko"][::SHARE]]
    model = train_sentencepiece([*_lines(texts["en"]), *_letters(texts)], PIECES)
    for name in ("base", "chat"):
        (out / name).mkdir(parents=True)
        write_tokenizer(model, out / name, context=settings.model.context, chat=name == "chat")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "chat")
    base = ModelSettings(vocab_size=PIECES).build()
    training = TrainSettings(learning_rate=2e-3, steps=PRETRAINING_STEPS, rows=8, tokens=128)
    rows = pack_documents(documents, tokenizer, training.tokens)
    train(
        base,
        text_batches(rows, training, torch.Generator().manual_seed(settings.seed)),
        training,
        "pretraining",
    )
    for name in ("base", "chat"):
        save_model(base, out / name)


def _lines(documents: list[str]) -> list[str]:
    return [line for document in documents for line in document.split("\n") if line]


def _letters(texts: dict[str, list[str]]) -> list[str]:
    """Every occurrence of the most frequent letters of the new scripts, each alone, so that none joins another."""
    found: list[str] = []
    for language, number in LETTERS.items():
        letters = find_language(language).letters.findall("".join(texts[language][::SHARE]))
        frequent = {letter for letter, _ in Counter(letters).most_common(number)}
        found += [letter for letter in letters if letter in frequent]
    return found


def shown(curve: Curve) -> str:
    """`step: zh_tw ko en` for each evaluation."""
    return "  ".join(
        f"{step}: " + " ".join(f"{bits[language]:.3f}" for language in LANGUAGES)
        for step, bits in curve.items()
    )


if __name__ == "__main__":
    app()
