"""Tokenizers that transformers saved again: the same tokens in another pipeline (Metaspace)."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from tests.tokenizer_ext.small_tokenizers import CHAT_TEMPLATE, CONFIG

TEXTS = [
    "Read the question.",
    "def f(x):\n    return x  # two",
    "Größe and light",
    " a leading space",
]


@pytest.fixture
def saved_again(sp_base, tmp_path) -> Path:
    """The base's `tokenizer.model` next to the tokenizer.json that transformers makes of it."""
    folder = tmp_path / "base"
    AutoTokenizer.from_pretrained(sp_base).save_pretrained(folder)
    for file in ("config.json", "tokenizer.model"):
        shutil.copy(sp_base / file, folder / file)
    return folder


@pytest.fixture
def chat_saved_again(sp_base, tmp_path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(sp_base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = json.loads((sp_base / "config.json").read_text())["vocab_size"] + 2
    (tmp_path / "chat" / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return tmp_path / "chat"


def is_metaspace(folder: Path) -> bool:
    content = json.loads((folder / "tokenizer.json").read_text())
    return content["normalizer"] is None and content["pre_tokenizer"]["prepend_scheme"] == "first"


def test_a_chat_model_s_tokenizer(sp_base, chat_saved_again, corpus, tmp_path, capsys) -> None:
    assert is_metaspace(chat_saved_again)
    extend_tokenizer(CONFIG, sp_base, corpus, tmp_path / "out", chat_saved_again)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the base's way is kept") == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = json.loads((sp_base / "config.json").read_text())["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == rows + 1


def test_the_base_s_own_tokenizer_json(
    saved_again, chat_saved_again, corpus, tmp_path, capsys
) -> None:
    """Both files are extended: each splits English as before."""
    assert is_metaspace(saved_again)
    extend_tokenizer(CONFIG, saved_again, corpus, tmp_path / "out", chat_saved_again)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("tokenizer.model and tokenizer.json of") == 1
    before, after = map(AutoTokenizer.from_pretrained, (saved_again, tmp_path / "out"))
    assert after(TEXTS)["input_ids"] == before(TEXTS)["input_ids"]
    from sentencepiece import SentencePieceProcessor

    models = (saved_again / "tokenizer.model", tmp_path / "out" / "tokenizer.model")
    old, new = (SentencePieceProcessor(model_file=str(model)).encode(TEXTS) for model in models)
    assert old == new


def test_a_tiktoken_file_next_to_the_base_s_tokenizer_json_is_ignored(bl_base, tmp_path) -> None:
    """As Meta publishes LLaMA-3."""
    shutil.copytree(bl_base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    base = read_base(tmp_path / "base")
    assert base.proto is None
    assert base.ids == read_base(bl_base).ids
