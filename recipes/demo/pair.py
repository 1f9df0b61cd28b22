"""The demo's pair: a small Llama pretrained on English, and the same model tuned on English
conversations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from cpt_merge.core.progress import Meter
from cpt_merge.recipes.demo.corpus import Conversation, CorpusSettings, LanguageCorpus
from cpt_merge.recipes.demo.tokenizer import train_sentencepiece, write_tokenizer

IGNORED = -100
Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, both [rows, tokens]; label IGNORED counts for nothing."""


@dataclass(frozen=True)
class ModelSettings:
    """The shape of the pair."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 3
    context: int = 1024  # tokens

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


@dataclass(frozen=True)
class PairSettings:
    """Everything that decides what the pair and the text are."""

    seed: int = 0
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    pretraining: TrainSettings = TrainSettings(learning_rate=2e-3, steps=600, rows=8, tokens=128)
    # A low rate: the shorter the chat vector, the better it fits a model that has moved away from
    # the base.
    chat_tuning: TrainSettings = TrainSettings(learning_rate=1e-4, steps=200, rows=32, tokens=128)


def make_pair(english: LanguageCorpus, settings: PairSettings, threads: int, out: Path) -> None:
    """Train the tokenizer, the base and its chat sibling on English, and write OUT/base and
    OUT/chat.
    """
    torch.set_num_threads(threads)
    disable_progress_bar()  # of reading and writing small files
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    lines = [line for document in english.documents for line in document.split("\n") if line]
    sentencepiece = train_sentencepiece(lines, settings.model.vocab_size)
    for name in ("base", "chat"):
        (out / name).mkdir()
        write_tokenizer(
            sentencepiece, out / name, context=settings.model.context, chat=name == "chat"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "chat")

    model = settings.model.build()
    rows = pack_documents(english.documents, tokenizer, settings.pretraining.tokens)
    texts = text_batches(rows, settings.pretraining, generator)
    train(model, texts, settings.pretraining, "pretraining")
    save_model(model, out / "base")
    # The chat model starts from what was saved, rounded weights and all, as a published one does.
    model = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    chats = chat_batches(english.conversations, tokenizer, settings.chat_tuning, generator)
    train(model, chats, settings.chat_tuning, "chat tuning")
    save_model(model, out / "chat")


def pack_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, tokens: int
) -> torch.Tensor:
    """Rows [rows, tokens] of all documents end to end, each between `<s>` and `</s>`; the
    incomplete last row goes.
    """
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
    rows = len(stream) // tokens
    return torch.tensor(stream[: rows * tokens]).view(rows, tokens)


def text_batches(
    rows: torch.Tensor, settings: TrainSettings, generator: torch.Generator
) -> Iterator[Batch]:
    """Endless batches of packed text; every epoch has its own order."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - settings.rows + 1, settings.rows):
            chosen = rows[order[start : start + settings.rows]]
            yield chosen, chosen


def encode_chat(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation; only the assistant's turns are learnt."""
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
    """Endless batches of conversations of similar length, padded to the longest."""
    encoded = [encode_chat(conversation, tokenizer) for conversation in conversations]
    encoded = [(ids, labels) for ids, labels in encoded if len(ids) <= settings.tokens]
    while True:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        order.sort(key=lambda index: len(encoded[index][0]) // 8)
        groups = [
            order[start : start + settings.rows] for start in range(0, len(order), settings.rows)
        ]
        for chosen in torch.randperm(len(groups), generator=generator).tolist():
            yield _pad([encoded[index] for index in groups[chosen]])


def _pad(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return ids, labels


def train(
    model: LlamaForCausalLM, batches: Iterator[Batch], settings: TrainSettings, label: str
) -> None:
    """Train `model` in place."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    model.train()
    with Meter(label, settings.steps, "steps") as meter:
        for ids, labels in itertools.islice(batches, settings.steps):
            # Padding is on the right, so causal attention needs no mask: no real token sees it.
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            meter.note = f"loss {loss.item():.2f}"
            meter.advance()
    model.eval()


def _rate(step: int, settings: TrainSettings) -> float:
    """The share of the peak learning rate at a step."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, the weights in bfloat16."""
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, do_sample=False, max_new_tokens=48
    )
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(folder)
