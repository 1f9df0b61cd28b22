"""A tiny model, its tokenizer, a token store and runs of training, made once per session."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.tokenise import write_store

CONFIG: dict[str, Any] = {
    "sequence_length": 32, "global_batch_size": 8, "micro_batch_size": 2, "tokens": 32 * 8 * 12, "precision": "fp32",
    "log_every": 1, "evaluate_every": 6, "evaluate_sequences": 6, "checkpoints": {"every": 4}, "loss_chunk": 20,
    "continuations": 0,
    # Adam's first steps are the signs of the gradients; a large epsilon keeps rounding noise from flipping them
    "optimizer": {"learning_rate": 0.01, "clip": 0.5, "epsilon": 1e-4},
}  # fmt: skip

WORDS = {
    "ko": [
        "나는",
        "너를",
        "우리",
        "집에",
        "가서",
        "밥을",
        "먹고",
        "잠을",
        "잔다",
        "그리고",
        "다시",
    ],
    "en": ["we", "go", "home", "and", "eat", "rice", "then", "sleep"],
}


def write_text(path: Path, language: str, documents: int) -> Path:
    generator = random.Random(language)
    lines = [
        " ".join(generator.choices(WORDS[language], k=generator.randint(3, 60)))
        for _ in range(documents)
    ]
    path.write_text(
        "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    sources = [
        Source(
            path=str(write_text(folder / f"{language}.jsonl", language, 400)),
            language=language,
            weight=weight,
        )
        for language, weight in (("ko", 0.8), ("en", 0.2))
    ]
    return Corpus(sources=sources, heldout=0.1)


def make_model(folder: Path, corpus: Corpus, tied: bool) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [text for source in corpus.sources for text in corpus.documents(source, "train")]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), corpus, tied=False)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    return make_model(tmp_path_factory.mktemp("tied"), corpus, tied=True)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A sibling of `model`."""
    folder = tmp_path_factory.mktemp("chat") / "chat"
    shutil.copytree(model, folder)
    chat = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in chat.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    chat.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("data") / "store"
    write_store(corpus, model, folder)
    return folder


@dataclass(frozen=True)
class FinishedRun:
    """A run of `tests.training.runs.Job` without changes, and what it logged by step."""

    out: Path
    steps: dict[int, tuple[float, float]]  # loss and gradient norm

    @property
    def losses(self) -> dict[int, float]:
        return {step: loss for step, (loss, _) in self.steps.items()}

    def copied_to(self, out: Path) -> Path:
        """A copy whose checkpoints a test may change, or continue from."""
        shutil.copytree(self.out, out)
        return out


@pytest.fixture(scope="session")
def finished(
    model: Path, tied_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., FinishedRun]:
    """`finished(backend, size, tied, stop_after)`: each run is made once; do not change its files."""
    from tests.distributed import run_ranks
    from tests.training.runs import Job, train_steps

    @cache
    def run(
        backend: str = "fsdp2", size: int = 1, tied: bool = False, stop_after: int = 0
    ) -> FinishedRun:
        out = tmp_path_factory.mktemp("run") / "out"
        chosen = tied_model if tied else model
        job = Job(chosen, store, out, backend=backend, stop_after=stop_after)
        return FinishedRun(out, run_ranks(train_steps, size, job)[0])

    return run
