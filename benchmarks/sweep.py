"""The cost of a point of the ratio sweep: merging in memory, generating, and merging through files.

    python -m benchmarks.sweep DIR [--size 135m] [--prompts 32] [--new-tokens 128] [--out FILE]

Random Llamas (base, chat and CPT, made in DIR if they do not exist) are merged at three ratios. It
measures the seconds of the merge in memory, of replies to the built-in instructions (all of
`--new-tokens` tokens, since random models do not stop), and of merging to disk and loading instead.
The reference is one pass over the weights: reading the three checkpoints from the page cache and
converting them to float32.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer
from safetensors.torch import load_file, save_file

from benchmarks.training_inputs import SIZES, make_model
from cpt_merge.checkpoint.dtypes import widen
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.artifact import write_json
from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.config import BUILT_IN, EvaluationConfig
from cpt_merge.evaluation.generate.conversations import converse
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.evaluation.prompt_files import parse_instruction, read_conversations
from cpt_merge.evaluation.sweep.model import MergedModel
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories as merge
from cpt_merge.merge.plan import MergeInputs, plan
from cpt_merge.tracking import Tracker

RATIOS = (0.5, 0.8, 1.0)
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"


def make_models(folder: Path, size: str) -> MergeInputs:
    """The base, and two models that differ a little from it."""
    base, chat, cpt = (folder / size / name for name in ("base", "chat", "cpt"))
    if not (base / "config.json").is_file():
        make_model(base, SIZES[size])
        path = base / "model.safetensors"
        weights = {name: values.bfloat16() for name, values in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
    for seed, sibling in enumerate((chat, cpt), start=1):
        if not (sibling / "config.json").is_file():
            shutil.copytree(base, sibling)
            torch.manual_seed(seed)
            weights = load_file(base / "model.safetensors")
            moved = {
                name: values + 1e-3 * torch.randn_like(values) for name, values in weights.items()
            }
            save_file(moved, sibling / "model.safetensors", {"format": "pt"})
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    return MergeInputs(cpt, base, chat, cpt)


def one_pass(inputs: MergeInputs) -> float:
    """Seconds to read all three checkpoints and convert them to float32, with one thread."""
    started = time.monotonic()
    assert inputs.base is not None
    assert inputs.chat is not None
    for directory in (inputs.cpt, inputs.base, inputs.chat):
        checkpoint = Checkpoint.open(directory)
        for name, info in checkpoint.tensors.items():
            for first in range(0, info.size, 1 << 20):
                last = min(first + (1 << 20), info.size)
                widen(checkpoint.read_flat(name, first, last), info.dtype)
    return time.monotonic() - started


def through_files(inputs: MergeInputs, ratio: float, out: Path) -> float:
    """Seconds to merge to disk and load the result."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    merge(MergeConfig(ratio=ratio), inputs, out, Tracker())
    _ = LanguageModel.open("merged", out).loaded
    return time.monotonic() - started


def measure(inputs: MergeInputs, folder: Path, prompts: int, new_tokens: int) -> dict[str, Any]:
    """Medians over the ratios, in seconds."""
    config = EvaluationConfig(max_new_tokens=new_tokens, batch_size=prompts)
    asked = read_conversations(
        BUILT_IN, "evaluation.instructions", parse_instruction, ["en"], prompts, "instructions"
    )
    model, ranks = MergedModel(plan(MergeConfig(), inputs), 0), Ranks()
    rows = []
    for ratio in RATIOS:
        merging = model.merge(MergeConfig(ratio=ratio))
        generation = converse(TransformersEngine(model.model, ranks), model.template, asked, config)
        files = through_files(inputs, ratio, folder / "merged")
        seconds = {"pass": one_pass(inputs), "merge": merging, "files": files}
        rows.append({**seconds, "generation": generation.seconds})
    found = {name: round(median(row[name] for row in rows), 3) for name in rows[0]}
    parameters = sum(info.size for info in Checkpoint.open(inputs.cpt).tensors.values())
    return {
        "parameters": parameters,
        "prompts": len(asked),
        "device": str(model.model.device),
        **found,
    }


def main(
    folder: Path,
    size: str = "135m",
    prompts: int = 32,
    new_tokens: int = 128,
    out: Path | None = None,
) -> None:
    """Measure and print."""
    found = {
        "size": asdict(SIZES[size]),
        **measure(make_models(folder, size), folder, prompts, new_tokens),
    }
    print(json.dumps(found))
    if out:
        write_json(out, found)


if __name__ == "__main__":
    typer.run(main)
