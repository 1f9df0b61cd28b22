"""The demo's pair: a small Llama pretrained on English, and the same model tuned on English conversations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.demo.corpus import Conversation

IGNORED = -100
Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, both [rows, tokens]; label IGNORED counts for nothing."""
Report = Callable[[str, int, int], None]
"""Called after each step with a line on how it goes, the steps done and the steps in all."""


@dataclass(frozen=True)
class ModelSettings:
    """The shape of the pair."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    context: int = 512  # tokens

    def build(self) -> LlamaForCausalLM:
        """A randomly initialised model in float32 with its own output head, as LLaMA-2 has."""
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class TrainSettings:
    """One training run: AdamW, linear warm-up, cosine decay to a tenth."""

    learning_rate: float
    steps: int
    rows: int  # per step
    tokens: int  # per row, at most
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.1
    clip: float = 1.0


PRETRAIN = TrainSettings(learning_rate=2e-3, steps=200, rows=16, tokens=256)
CHAT = TrainSettings(learning_rate=5e-4, steps=150, rows=32, tokens=128)


def pack_documents(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, tokens: int) -> torch.Tensor:
    """Rows [rows, tokens] of all documents end to end, each between `<s>` and `</s>`; the incomplete last row goes."""
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    rows = len(stream) // tokens
    return torch.tensor(stream[: rows * tokens]).view(rows, tokens)


def text_batches(rows: torch.Tensor, settings: TrainSettings, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches of packed text; every epoch has its own order."""
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(settings.rows):
            if len(chosen) == settings.rows:
                yield rows[chosen], rows[chosen]


def encode_chat(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation in the chat template; only the assistant's turns (and their `</s>`) are learnt."""
    ids: list[int] = []
    labels: list[int] = []
    messages: list[dict[str, str]] = []
    for index, turn in enumerate(conversation[: len(conversation) // 2 * 2]):
        user = index % 2 == 0
        messages.append({"role": "user" if user else "assistant", "content": turn})
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        labels += [IGNORED] * (len(whole) - len(ids)) if user else whole[len(ids) :]
        ids = whole
    return ids, labels


def chat_batches(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerFast,
    settings: TrainSettings,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """Endless batches of conversations, rows of similar length together and padded to the longest."""
    encoded = [encode_chat(conversation, tokenizer) for conversation in conversations]
    encoded = [(ids, labels) for ids, labels in encoded if len(ids) <= settings.tokens]
    while True:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        order.sort(key=lambda index: len(encoded[index][0]) // 8)
        groups = [order[start : start + settings.rows] for start in range(0, len(order), settings.rows)]
        for chosen in torch.randperm(len(groups), generator=generator).tolist():
            yield _pad([encoded[index] for index in groups[chosen]])


def _pad(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return ids, labels


def train(model: LlamaForCausalLM, batches: Iterator[Batch], settings: TrainSettings, name: str, report: Report) -> None:
    """Train `model` in place."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    model.train()
    started, seen = time.perf_counter(), 0
    for step in range(1, settings.steps + 1):
        ids, labels = next(batches)
        # Padding is on the right, so causal attention needs no mask: no real token sees it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seen += ids.numel()
        rate = seen / (time.perf_counter() - started)
        report(f"{name}: loss {loss.item():.2f}, {rate:,.0f} tokens/s", step, settings.steps)
    model.eval()


def _rate(step: int, settings: TrainSettings) -> float:
    """The share of the peak learning rate at a step."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, the weights in bfloat16 as published ones are."""
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, do_sample=False, max_new_tokens=48)
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(folder)
