"""Bases of both families, a chat model with tokens of its own, a corpus, and what the stage makes
of them.
"""

import os

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the tests share a small machine

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cpt_merge.data.sources import Corpus
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.sentencepiece import fast_content, read_proto
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken, add_tokens
from cpt_merge.tokenizer_ext.verify import samples
from cpt_merge.tokenizer_ext.verify.invariants import Case, read_case
from cpt_merge.tokenizer_ext.verify.samples import heldout_texts, scripts_of, take_samples
from cpt_merge.tracking import Tracker
from tests.recording import Recording
from tests.tokenizer_ext.small_tokenizers import (
    CHAT_TEMPLATE,
    CONFIG,
    byte_level_content,
    train_sentencepiece,
    write_base,
    write_corpus,
)


@pytest.fixture(scope="session", autouse=True)
def few_mixed_texts():
    """Prove on 500 random mixtures instead of 20,000; the slow tests of real bases take all of
    them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MIXED_TEXTS", 500)
        yield


@dataclass(frozen=True)
class Extended:
    """A finished stage and what went into it."""

    base: Path
    chat: Path
    out: Path
    results: dict
    recording: Recording
    case: Case


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def sp_model() -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="session")
def sp_base(sp_model, tmp_path_factory) -> Path:
    """LLaMA-2-like, `tokenizer.model` only."""
    settings = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "LlamaTokenizer",
    }
    return write_base(
        tmp_path_factory.mktemp("sp") / "base", pieces_of(sp_model), proto=sp_model, **settings
    )


@pytest.fixture(scope="session")
def sp_chat(sp_base, sp_model, tmp_path_factory) -> Path:
    """Its chat sibling: a pad right behind the base's rows, a turn's end a little further."""
    rows = pieces_of(sp_model)
    content = fast_content(read_proto(sp_base / "tokenizer.model"), sp_base)
    tokens = [
        AddedToken(rows, "<pad>"),
        AddedToken(rows + 1, "<|im_start|>"),
        AddedToken(rows + 5, "<|im_end|>"),
    ]
    folder = tmp_path_factory.mktemp("sp") / "chat"
    return write_base(
        folder,
        rows + 64,
        content=add_tokens(content, tokens),
        bos_token="<s>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def bl_base(tmp_path_factory) -> Path:
    """Qwen-like: more rows than ids."""
    content = byte_level_content()
    rows = len(content["model"]["vocab"]) + len(content["added_tokens"]) + 7
    settings = {
        "eos_token": "<|im_end|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": CHAT_TEMPLATE,
    }
    return write_base(tmp_path_factory.mktemp("bl") / "base", rows, content=content, **settings)


def pieces_of(model: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model).vocab_size()


def extend(base: Path, chat: Path, corpus: Corpus, out: Path) -> Extended:
    recording = Recording()
    results = extend_tokenizer(CONFIG, base, corpus, out, chat, Tracker([recording]))
    start = read_base(base)
    found = take_samples(
        heldout_texts(corpus), scripts_of(CONFIG.new_pieces), ["學生", "질문", " 질문"]
    )
    case = read_case(start, out, chat, replace(found, mixed=found.mixed[:300]))
    return Extended(base, chat, out, results, recording, case)


@pytest.fixture(scope="session")
def sp(sp_base, sp_chat, corpus, tmp_path_factory) -> Extended:
    return extend(sp_base, sp_chat, corpus, tmp_path_factory.mktemp("sp_out"))


@pytest.fixture(scope="session")
def bl(bl_base, corpus, tmp_path_factory) -> Extended:
    return extend(bl_base, bl_base, corpus, tmp_path_factory.mktemp("bl_out"))


@pytest.fixture(params=["sp", "bl"])
def extended(request) -> Extended:
    """The finished stage, for either family of base."""
    return request.getfixturevalue(request.param)
