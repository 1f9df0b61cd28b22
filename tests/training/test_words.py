"""Tokenising by words gives what tokenising whole texts gives, for every tokenizer for which it is done."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.real_tokenizers import BASES
from training import words as module
from training.words import WORD, Words

TEXT = [
    "We go home, and we'll eat rice.  Then we sleep! It's 1234 o'clock.\n  indented code\n\n\tx = [1, 2]\r\n \r\n y",
    "나는 집에 가서 밥을 먹고 잠을 잔다. 그리고 다시 간다", "天地玄黃 宇宙洪荒，日月盈昃 abc 宇 宙",
    " leading", "trailing   ", "a\u3000 b\u00a0 c\x1c d\u0301 e\n f", "é e\u0301 \u0301 x", "▁ under ▁score a▁b", "😀 🏳️‍🌈 x",
]  # fmt: skip


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["gpt2", "mistral", "mistral with a prefix", "qwen"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "gpt2":
        return gpt2()
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    BASES[request.param.split()[0]](folder)
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    if "prefix" in request.param:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def whole(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def by_words(words: Words, texts: list[str]) -> list[list[int]]:
    return [np.frombuffer(ids, words.dtype).tolist() for ids in words.encode(texts)]


@pytest.fixture
def every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEW_WORDS", 1.0)
    monkeypatch.setattr(module, "LONG_WORDS", 1e9)


def test_words_have_the_tokens_of_the_text(backend: Tokenizer, every_word: None) -> None:
    words = Words(backend, "uint32")
    assert words.is_exact
    assert by_words(words, TEXT) == whole(backend, TEXT)
    assert by_words(words, TEXT[::-1]) == whole(backend, TEXT[::-1]), "remembered ones too"


def test_whatever_the_text(backend: Tokenizer, every_word: None) -> None:
    words = Words(backend, "uint32")
    alphabet = st.one_of(
        st.sampled_from(list("  \n\r\t'sa가一.,1▁\u0301\u3000\u00a0\x1c\x85\u200b")), st.characters(codec="utf-8")
    )

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet, min_size=1, max_size=40))
    def check(text: str) -> None:
        assert "".join(WORD.findall(text)) == text
        assert by_words(words, [text]) == whole(backend, [text])

    check()


def test_what_is_remembered_is_limited(monkeypatch: pytest.MonkeyPatch, every_word: None) -> None:
    monkeypatch.setattr(module, "MEMO_WORDS", 50)
    words, generator = Words(gpt2(), "uint16"), random.Random(0)
    for _ in range(20):
        texts = [" ".join(str(generator.randint(0, 99)) for _ in range(20))]
        assert by_words(words, texts) == whole(words.backend, texts)
        assert len(words._memo) <= 50


def test_tokenizers_that_may_join_words_are_not_cut() -> None:
    assert Words(gpt2(), "uint16").is_exact
    added = gpt2()
    added.add_tokens([AddedToken("go home", special=False)])
    spaced = gpt2()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    prefixed = gpt2()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lower = gpt2()
    lower.normalizer = normalizers.Lowercase()
    joined = Tokenizer(models.BPE(vocab={"a": 0, "▁": 1, "a▁": 2}, merges=[("a", "▁")]))
    joined.normalizer = normalizers.Replace(" ", "▁")
    for tokenizer in (added, spaced, prefixed, lower, joined):
        words = Words(tokenizer, "uint16")
        assert not words.is_exact
        assert by_words(words, ["go home", "a a"]) == whole(tokenizer, ["go home", "a a"])
