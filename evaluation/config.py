"""The recipe's `evaluation` section."""

from __future__ import annotations

from core.config import Section, key


class EvaluationConfig(Section):
    """What the models are asked, and how much text they are measured on."""

    prompts: str | None = key(
        None, 'jsonl file of prompts, {"language": "ko", "messages": [...]} a line; no replies are generated if not set'
    )
    max_prompts: int = key(50, "prompts per language, the first ones of the file", unit="prompts", gt=0)
    max_new_tokens: int = key(256, "longest reply", unit="tokens", gt=0)
    temperature: float = key(0.0, "0: greedy; else sampled at this temperature", ge=0)
    top_p: float = key(1.0, "sampling only: share of the probability that is kept (nucleus)", gt=0, le=1)
    repetition_penalty: float = key(1.0, "1: none; applies to greedy decoding too", gt=0)
    documents: int = key(200, "held-out documents per language for bits per byte", unit="documents", gt=0)
    max_bytes: int = key(200_000, "held-out text per language for bits per byte", unit="bytes of UTF-8", gt=0)
    context: int = key(
        1024, "window and stride of bits per byte; at most the positions of every model", unit="tokens", ge=2
    )
    batch_size: int = key(16, "prompts, or windows of text, that one process takes through the model at once", gt=0)
    samples_shown: int = key(2, "prompts per language whose replies are printed, evenly spread", unit="prompts", ge=0)
    seed: int = key(0, "seed of the bootstrap intervals and of sampling")
