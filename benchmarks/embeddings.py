"""Compare initialisations of new rows: bits per byte along a training, and the chat behaviour after
the merge.

    python -m benchmarks.embeddings DIR      constituents, ends and auto; two bases; 3 seeds
    python -m benchmarks.embeddings DIR --methods ends,focus,mean --steps 100 --no-chat

A method is a value of `embeddings.input` and `embeddings.head`, or two of them as `input/head`.
Recipe and text are the demo's (`recipes/demo.yaml`) with half of its training (171 steps of 2,048
tokens); a seed decides the order of the training data. The bases are

- `english`: the demo's base. It has never seen a letter of Chinese or Korean, so its byte tokens
  are untrained.
- `some`: the same shape, pretrained on the English text and a third of the Chinese and Korean
  training documents, with the 350 most frequent Han characters and 120 Hangul syllables in its
  vocabulary; LLaMA-2 has a few hundred of each.

The chat measure is the demo's: the share of replies that stop, are in the language and keep the
format, for the demo's 24 requests in each language and for 72 further ones that are not in the
training text.

Everything runs in one process and on one thread: about 150 seconds of CPU time a run, and 7 minutes
once for the base `some`. Results are printed and kept in DIR/embeddings.json; the same command
continues where it was stopped.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cpt_merge.core.config import parse_section
from cpt_merge.core.languages import find_language
from cpt_merge.evaluation.run import evaluate
from cpt_merge.launcher.execute import run_stage
from cpt_merge.launcher.recipe import Recipe, read_yaml
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stages import DATA, EMBEDDINGS, MERGE, TOKENIZER, TRAINING
from cpt_merge.recipes.demo.corpus import LANGUAGES, build_corpus, intent_exchanges
from cpt_merge.recipes.demo.pair import (
    ModelSettings,
    PairSettings,
    TrainSettings,
    chat_batches,
    pack_documents,
    save_model,
    text_batches,
    train,
)
from cpt_merge.recipes.demo.prepare import prepare, write_json_lines
from cpt_merge.recipes.demo.tokenizer import train_sentencepiece, write_tokenizer
from cpt_merge.tracking import read_log

RECIPE = Path("recipes/demo.yaml")
SHARE = 3  # the base `some` is pretrained on every third Chinese and Korean document
LETTERS = {"zh_tw": 350, "ko": 120}  # in its vocabulary
PIECES = 2560
PRETRAINING_STEPS = 1000
FURTHER_PROMPTS = 72

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Path,
    methods: str = "constituents,ends,auto",
    bases: str = "english,some",
    seeds: str = "0,1,2",
    steps: int = 171,
    every: int = 57,
    rate: float = 1.0,
    chat: bool = True,
) -> None:
    """Measure methods.

    `every`: steps between two evaluations; `rate`: a factor on the learning rates.
    """
    prepare(folder / "inputs", threads=1)
    torch.set_num_threads(1)
    write_further_prompts(folder)
    if "some" in bases.split(",") and not (folder / "some" / "complete").exists():
        make_base(recipe_for(folder, "english", {}), folder / "some")
    path = folder / "embeddings.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for base in bases.split(","):
        for seed in seeds.split(","):
            for method in methods.split(","):
                key = f"{base} {method} seed {seed} rate {rate} steps {steps}"
                if key not in results:
                    begun = time.process_time()
                    sections = settings_of(method, int(seed), steps, every, rate, folder)
                    result = measure(folder, base, sections, chat)
                    results[key] = {**result, "cpu_seconds": round(time.process_time() - begun)}
                    path.write_text(json.dumps(results, indent=1))
                print(f"{key}  {shown(results[key])}", flush=True)


def settings_of(
    method: str, seed: int, steps: int, every: int, rate: float, folder: Path
) -> dict[str, dict[str, Any]]:
    """What differs from the demo's recipe."""
    input_method, _, head_method = method.partition("/")
    return {
        "embeddings": {"input": input_method, "head": head_method or input_method},
        "training": {
            "tokens": steps * 256 * 8, "seed": seed, "post_train_merge": False,
            "evaluate_every": every, "checkpoints": {"every": steps}, "log_every": steps,
            "optimizer": {"learning_rate": 1e-3 * rate, "embedding_learning_rate": 3e-3 * rate},
        },
        "evaluation": {"suites": ["form"], "prompts": str(folder / "inputs" / "prompts.jsonl")},
    }  # fmt: skip


def measure(
    folder: Path, base: str, sections: dict[str, dict[str, Any]], chat: bool
) -> dict[str, Any]:
    """Run the stages up to the merge. Tokenizer and token store are made once for each base."""
    run = Run(recipe_for(folder, base, sections))
    shutil.rmtree(run.folder("training"), ignore_errors=True)
    for stage in (TOKENIZER, EMBEDDINGS, DATA, TRAINING, *([MERGE] if chat else [])):
        run_stage(run, stage)
    log = read_log(run.folder("training") / "log")
    curve: dict[int, dict[str, float]] = {}
    for language in LANGUAGES:
        for step, value in log.series(f"valid/{language}/bits_per_byte"):
            curve.setdefault(int(step), {})[language] = round(value, 4)
    result: dict[str, Any] = {"bits_per_byte": curve}
    if chat:
        for name, prompts in (("demo", "inputs/prompts.jsonl"), ("further", "prompts.jsonl")):
            config = run.recipe.evaluation.model_copy(
                update={"prompts": str(folder / prompts), "max_prompts": 100, "batch_size": 36}
            )
            found = evaluate({"merged": run.merged}, config, chat_template_from=run.chat)
            result[name] = {language: found[f"merged/{language}/chat"] for language in LANGUAGES}
    return result


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


def write_further_prompts(folder: Path) -> None:
    """Write requests that are neither among the demo's prompts nor in the training text."""
    lines = []
    for language, text in build_corpus(PairSettings().corpus).items():
        everything = "\n".join(text.documents)
        seen = {turn for turns in text.conversations for turn in turns} | set(text.prompts)
        found = intent_exchanges(language, 16_000, random.Random(f"more-{language}"))
        new = [
            prompt
            for prompt in dict.fromkeys(turns[0] for turns in found)
            if prompt not in seen and f"{prompt}\n" not in everything
        ]
        random.Random(1).shuffle(new)
        lines += [
            {"language": language, "messages": [{"role": "user", "content": prompt}]}
            for prompt in new[:FURTHER_PROMPTS]
        ]
    write_json_lines(folder / "prompts.jsonl", lines)


def make_base(recipe: Recipe, out: Path) -> None:
    """Train the pair `some`: OUT/base on text, and OUT/chat from it on the demo's English
    conversations.
    """
    settings = PairSettings()
    torch.manual_seed(settings.seed)
    corpus = recipe.corpus
    texts = {source.language: list(corpus.documents(source, "train")) for source in corpus.sources}
    documents = [*texts["en"], *texts["zh_tw"][::SHARE], *texts["ko"][::SHARE]]
    lines = [line for document in texts["en"] for line in document.split("\n") if line]
    model = train_sentencepiece([*lines, *_letters(texts)], PIECES)
    for name in ("base", "chat"):
        (out / name).mkdir(parents=True, exist_ok=True)
        write_tokenizer(model, out / name, context=settings.model.context, chat=name == "chat")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "chat")
    base = ModelSettings(vocab_size=PIECES).build()
    training = TrainSettings(learning_rate=2e-3, steps=PRETRAINING_STEPS, rows=8, tokens=128)
    rows = pack_documents(documents, tokenizer, training.tokens)
    batches = text_batches(rows, training, torch.Generator().manual_seed(settings.seed))
    train(base, batches, training, "pretraining")
    save_model(base, out / "base")
    tuned = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    conversations = build_corpus(settings.corpus)["en"].conversations
    generator = torch.Generator().manual_seed(settings.seed)
    chats = chat_batches(conversations, tokenizer, settings.chat_tuning, generator)
    train(tuned, chats, settings.chat_tuning, "chat tuning")
    save_model(tuned, out / "chat")
    (out / "complete").touch()


def _letters(texts: dict[str, list[str]]) -> list[str]:
    """Every occurrence of the most frequent letters of the new scripts, each alone, so that none
    joins another.
    """
    found: list[str] = []
    for language, number in LETTERS.items():
        letters = find_language(language).letters.findall("".join(texts[language][::SHARE]))
        frequent = {letter for letter, _ in Counter(letters).most_common(number)}
        found += [letter for letter in letters if letter in frequent]
    return found


def shown(result: dict[str, Any]) -> str:
    """Bits per byte as `step: zh_tw ko en`, then the shares of replies."""
    parts = [
        f"{step}: " + " ".join(f"{bits[language]:.3f}" for language in LANGUAGES)
        for step, bits in result["bits_per_byte"].items()
    ]
    for name in ("demo", "further"):
        if name in result:
            parts.append(f"{name}: " + " ".join(f"{share:.1%}" for share in result[name].values()))
    return "  ".join(parts)


if __name__ == "__main__":
    app()
