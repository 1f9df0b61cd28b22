"""The GGUF column: llama.cpp's own converter and tools, where `CPT_MERGE_LLAMA_CPP` names them.

The variable names a checkout of llama.cpp that is built in `build` (docs/families.md has the
commands). Merged models become GGUF by recipes/convert_to_gguf.py, with float32 weights.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from cpt_merge.checkpoint.text_models import auto_class

VARIABLE = "CPT_MERGE_LLAMA_CPP"
RECIPE = Path(__file__).parents[2] / "recipes" / "convert_to_gguf.py"
TEXTS = (
    "go home and eat",
    "나는 집에 go home",
    "今天天氣很好，나는 우리 집에 가서 다시 밥을 먹고 eat and go home 나는 집에",
)
SPECIAL = "<s>나는 집에</s><|user|>go home"
TOLERANCE = 1e-3  # of the largest logit; llama.cpp's GELU is a table of float16 values


class OtherLogitsError(Exception):
    """llama.cpp computes something else than transformers, for this reason."""


@dataclass(frozen=True)
class Difference:
    """What llama.cpp computes differently, and the config.json with which transformers does so too."""

    reason: str
    settings: dict[str, Any]


def llama_cpp() -> Path | None:
    """The checkout of llama.cpp, if there is one."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def convert(base: Path, model: Path, out: Path) -> None:
    """Convert a model as users do. Small bases split text as GPT-2 does, which their hashes do not
    say."""
    command = [
        sys.executable, RECIPE, llama_cpp(), base, model, "--pre", "gpt-2", "--outtype", "f32", "--outfile", out,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the converter: {last_line(done.stderr)}"


def last_line(text: str) -> str:
    """The last line of a program that failed."""
    return (text.strip().splitlines() or ["no message"])[-1]


def tool(name: str, model: Path, *options: object) -> str:
    """What a tool of llama.cpp prints for a model."""
    folder = llama_cpp()
    assert folder
    command = [folder / "build" / "bin" / name, "-m", model, *options]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, errors="replace"
    )
    failed = [line for line in done.stderr.splitlines() if "error" in line or "ASSERT" in line]
    assert done.returncode == 0, f"{name}: {(failed or [last_line(done.stderr)])[0]}"
    return done.stdout


def ids_with_special_tokens(model: Path, text: str) -> list[int]:
    """The ids of a text in which special tokens are recognised."""
    printed = tool("llama-tokenize", model, "--ids", "--log-disable", "-p", text)
    return list(ast.literal_eval(printed.strip()))


def ids_and_logits(model: Path, text: str, folder: Path) -> tuple[list[int], np.ndarray]:
    """The ids of a text, and the logits after the last one."""
    tool(
        "llama-debug", model, "-p", text, "--save-logits", "--logits-output-dir", folder, "-ctk", "f32",
        "-ctv", "f32", "-fa", "off", "-t", 1, "-c", 128, "--no-warmup",
    )  # fmt: skip
    ids = np.fromfile(folder / f"llamacpp-{model.stem}-tokens.bin", np.int32)
    return ids.tolist(), np.fromfile(folder / f"llamacpp-{model.stem}.bin", np.float32)


def compare(model: Path, gguf: Path, difference: Difference | None) -> None:
    """Raise `AssertionError` unless llama.cpp has the tokens and logits of transformers, or those
    with a known difference; then raise `OtherLogitsError`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    special = ids_with_special_tokens(gguf, SPECIAL)
    assert special == tokenizer(SPECIAL).input_ids, f"{SPECIAL!r} becomes {special}"
    found = [ids_and_logits(gguf, text, gguf.parent / "logits") for text in TEXTS]
    for text, (ids, _) in zip(TEXTS, found, strict=True):
        assert ids == tokenizer(text).input_ids, f"{text!r} becomes {ids}"
    apart = largest_difference(model, {}, found)
    if difference is None:
        assert apart < TOLERANCE, f"logits differ by {apart:.0e} of the largest"
        return
    assert apart > TOLERANCE, f"it is no longer true that {difference.reason}"
    apart = largest_difference(model, difference.settings, found)
    assert apart < TOLERANCE, f"logits differ by {apart:.0e}, not only because {difference.reason}"
    raise OtherLogitsError(difference.reason)


@torch.inference_mode()
def largest_difference(
    model: Path, settings: dict[str, Any], found: list[tuple[list[int], np.ndarray]]
) -> float:
    """From the logits of transformers, as a part of the largest; with changes of its config.json."""
    config = AutoConfig.from_pretrained(model)
    for name, value in settings.items():
        old = getattr(config, name, None)
        setattr(config, name, old | value if isinstance(value, dict) else value)
    network = auto_class(config).from_pretrained(model, config=config, dtype=torch.float32).eval()
    largest = 0.0
    for ids, logits in found:
        expected = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        rows = min(len(expected), len(logits))  # llama.cpp leaves out rows without a token
        apart = (expected[:rows] - torch.from_numpy(logits)[:rows]).abs().max()
        largest = max(largest, float(apart / expected.abs().max()))
    return largest
