"""The defaults of `cpt-merge init`, and the published runs that they rest on.

docs/choosing.md shows these tables (`tables`); a test holds that. The defaults are a judgement from
the published runs, whose rates alone differ by a factor of 100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EXTEND_ABOVE = 1.0  # tokens per character of the base's tokenizer
REPLAY = 0.15  # share of English text
ENOUGH, MOST = 2_000_000_000, 20_000_000_000  # tokens of a run
EPOCHS = 4.0  # of the text, if there is little
LEAST_STEPS = 1000  # fewer only if there is too little text
STEP_TOKENS = (2**13, 2**22)  # fewest and most of a step
SEQUENCE_LENGTH = 4096
LORA_RATE = 2e-4  # of adapters, embedding and head
GAIN_LEFT = 0.02  # pieces that save fewer tokens than this share are not added
NEW_ROWS_SHARE, VOCABULARY_SHARE = 0.02, 0.03  # of the tokens, before every weight is trained


@dataclass(frozen=True)
class SizeDefaults:
    """Peak learning rates of models of up to so many parameters."""

    parameters: float
    learning_rate: float
    vocabulary_learning_rate: float  # of embedding and head


BY_SIZE = (
    SizeDefaults(1e9, 2e-4, 4e-4),
    SizeDefaults(4e9, 1e-4, 2e-4),
    SizeDefaults(15e9, 5e-5, 1e-4),
    SizeDefaults(math.inf, 2e-5, 4e-5),
)
NEW_PIECES = {"zh_tw": 20_000, "zh_cn": 20_000, "zh_hk": 20_000, "ko": 12_000}
OTHER_PIECES = 12_000  # of another language


@dataclass(frozen=True)
class PublishedRun:
    """A published continual pretraining, as its paper or model card tells it; "" if it does not."""

    name: str
    base: str
    new_pieces: str
    text: str
    other: str
    source: str


PUBLISHED = (
    PublishedRun(
        "Chat Vector", "LLaMA-2 13B", "", "3.1B tokens (zh_tw)", "the vector is added at 1 or 0.5",
        "[2310.04799](https://arxiv.org/abs/2310.04799), by reviews of its first version",
    ),
    PublishedRun(
        "Chinese-LLaMA-2", "LLaMA-2 7B, 13B", "23,296 (zh_cn)", "120 GB",
        "LoRA of rank 64 at 2e-4, embedding and head in full", "[repository](https://github.com/ymcui/Chinese-LLaMA-Alpaca-2)",
    ),
    PublishedRun(
        "TAIDE-LX-7B", "LLaMA-2 7B", "24,720 (zh_tw)", "41.4B tokens", "",
        "[model card](https://huggingface.co/taide/TAIDE-LX-7B)",
    ),
    PublishedRun(
        "Breeze-7B", "Mistral 7B", "29,873 (zh_tw)", "650 GB", "rate 1e-6, flat; 4M tokens a step",
        "[2403.02712](https://arxiv.org/abs/2403.02712)",
    ),
    PublishedRun(
        "llama-2-ko-7b", "LLaMA-2 7B", "14,336 (ko)", "over 40B tokens", "rate 1e-5",
        "[model card](https://huggingface.co/beomi/llama-2-ko-7b)",
    ),
    PublishedRun(
        "EEVE-Korean", "SOLAR 10.7B, Phi-2", "8,960 (ko)", "2B tokens",
        "first new rows, then embedding and head, then all, in seven stages",
        "[2402.14714](https://arxiv.org/abs/2402.14714)",
    ),
    PublishedRun(
        "Swallow", "LLaMA-2 7B to 70B", "yes (ja)", "100B tokens, better up to the last",
        "10 % English; extension costs no quality except in summaries",
        "[2404.17790](https://arxiv.org/abs/2404.17790)",
    ),
    PublishedRun(
        "Llama 3.1 Swallow", "Llama 3.1 8B, 70B", "none", "200B tokens", "",
        "[model card](https://huggingface.co/tokyotech-llm/Llama-3.1-Swallow-8B-v0.2)",
    ),
    PublishedRun(
        "Llama-3-Taiwan", "Llama 3 8B, 70B", "none", "", "8K tokens of context",
        "[model card](https://huggingface.co/yentinglin/Llama-3-Taiwan-70B-Instruct)",
    ),
    PublishedRun(
        "Sailor2", "Qwen2.5", "none", "500B tokens", "100B of them are replay",
        "[2502.12982](https://arxiv.org/abs/2502.12982)",
    ),
    PublishedRun(
        "SEA-LION v3", "Llama 3.1", "none", "200B tokens", "25 % English, 20 % code",
        "[2504.05747](https://arxiv.org/abs/2504.05747)",
    ),
)  # fmt: skip


def of_size(parameters: float) -> SizeDefaults:
    """The learning rates of a model of this size."""
    return next(one for one in BY_SIZE if parameters <= one.parameters)


def pieces_for(language: str) -> int:
    """How many pieces a language gets at most."""
    return NEW_PIECES.get(language, OTHER_PIECES)


def step_tokens(tokens: int) -> int:
    """Tokens of a step: a power of two that leaves enough steps, within bounds."""
    most = 1 << int(math.log2(max(tokens / LEAST_STEPS, 1)))
    return min(max(most, STEP_TOKENS[0]), STEP_TOKENS[1])


def budget(text_tokens: float) -> int:
    """Tokens of a run over so much text: all of it, and up to four times if it is little."""
    epochs = min(EPOCHS, max(1.0, ENOUGH / max(text_tokens, 1)))
    return int(min(text_tokens * epochs, MOST))


def tables() -> str:
    """The tables of docs/choosing.md."""
    rows = ["| parameters | learning rate | of embedding and head |", "|---|---|---|"]
    least = ""
    for one in BY_SIZE:
        most = f"up to {one.parameters / 1e9:g}B" if math.isfinite(one.parameters) else least
        rates = f"{one.learning_rate:g} | {one.vocabulary_learning_rate:g}"
        rows.append(f"| {most} | {rates} |")
        least = f"above {one.parameters / 1e9:g}B"
    rows += ["", "| run | base | new pieces | text | other | source |", "|---|---|---|---|---|---|"]
    for run in PUBLISHED:
        rows.append(f"| {' | '.join(vars(run).values())} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
