"""Tokenising word by word gives the ids of whole texts, wherever it is used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from cpt_merge.data import encoders as module
from cpt_merge.data.encoders import WORD, LibraryEncoder, WordEncoder
from cpt_merge.data.long_texts import cut
from tests.real_tokenizers import BASES
from tests.training.texts import TEXTS


@pytest.fixture(scope="module", params=["mistral", "mistral with a prefix"])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LibraryEncoder:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    BASES["mistral"](folder)
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    if "prefix" in request.param:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return LibraryEncoder(backend, "uint16")


def of(library: LibraryEncoder) -> WordEncoder:
    found = WordEncoder.of(json.loads(library.backend.to_str()), library)
    assert found
    return found


@pytest.fixture
def every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEW_CHARACTERS", 1.0)
    monkeypatch.setattr(module, "LONG_WORDS", 1e9)


def test_words_have_the_tokens_of_the_text(library: LibraryEncoder, every_word: None) -> None:
    words = of(library)
    assert words.encode(TEXTS) == library.encode(TEXTS)
    assert words.encode(TEXTS[::-1]) == library.encode(TEXTS[::-1]), "remembered ones too"


def test_whatever_the_text(library: LibraryEncoder, every_word: None) -> None:
    words = of(library)
    alphabet = st.one_of(
        st.sampled_from(list("  \n\r\t'sa가一.,1▁\u0301\u3000\u00a0\x1c\x85\u200b")),
        st.characters(codec="utf-8"),
    )

    @settings(max_examples=150, deadline=None)
    @given(st.text(alphabet, min_size=1, max_size=40))
    def check(text: str) -> None:
        assert "".join(WORD.findall(text)) == text
        assert words.encode([text]) == library.encode([text])

    check()


def test_what_is_remembered_is_limited(
    library: LibraryEncoder, monkeypatch: pytest.MonkeyPatch, every_word: None
) -> None:
    monkeypatch.setattr(module, "MEMO_WORDS", 50)
    words, generator = of(library), random.Random(0)
    for _ in range(20):
        texts = [" ".join(str(generator.randint(0, 99)) for _ in range(20))]
        assert words.encode(texts) == library.encode(texts)
        assert len(words._memo) <= 50


def test_blocks_of_new_words_are_left_to_the_library_for_longer_and_longer(
    library: LibraryEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, tries = of(library), list[int]()
    learn = WordEncoder._learn
    monkeypatch.setattr(
        WordEncoder, "_learn", lambda self, new: (tries.append(block), learn(self, new))[1]
    )
    for block in range(100):
        texts = [f"{block}a {block}b {block}c"]
        assert words.encode(texts) == library.encode(texts)
    assert tries == [0, 2, 6, 14, 30, 62, 95]
    tries.clear()
    for block in range(100):  # noqa: B007 - the same words again and again
        assert words.encode(["we go home"]) == library.encode(["we go home"])
    assert tries[1:] == list(range(tries[0] + 33, 100)), "one more pause, then every block"


def test_tokenizers_that_may_join_words_are_not_cut(library: LibraryEncoder) -> None:
    joined = Tokenizer(models.BPE(vocab={"a": 0, "▁": 1, "a▁": 2}, merges=[("a", "▁")]))
    joined.normalizer = normalizers.Replace(" ", "▁")
    added = Tokenizer.from_str(library.backend.to_str())
    added.add_tokens([AddedToken("go home", special=False)])
    cut = Tokenizer.from_str(library.backend.to_str())
    cut.pre_tokenizer = pre_tokenizers.Whitespace()
    for backend in (joined, added, cut):
        assert (
            WordEncoder.of(json.loads(backend.to_str()), LibraryEncoder(backend, "uint16")) is None
        )


def test_long_texts_are_cut_without_a_trace(library: LibraryEncoder) -> None:
    words = of(library)
    alphabet = st.sampled_from(
        [*"Aa가一 。！？，、；：.,\n", "  ", "\u0301", "。▁", "’", "天地玄黃"]
    )

    @settings(max_examples=200, deadline=None)
    @given(st.lists(alphabet, min_size=1, max_size=30).map("".join))
    def check(text: str) -> None:
        parts = cut(text, words.border, 1)
        assert "".join(parts) == text
        assert words.encode_parts(parts) == library.encode([text])[0], parts

    check()
    assert cut("one two。三", words.border, 1) == ["one", " two。", "三"]


def test_marks_that_a_piece_joins_with_what_follows_are_no_borders(library: LibraryEncoder) -> None:
    definition = json.loads(library.backend.to_str())
    model = definition["model"]
    model["vocab"]["。一"] = len(model["vocab"])
    model["merges"].append(["。", "一"])
    joining = LibraryEncoder(Tokenizer.from_str(json.dumps(definition)), "uint16")
    words = of(joining)
    assert cut("天。一，二", words.border, 1) == ["天。一，", "二"]
    assert words.encode_parts(["天。一，", "二"]) == joining.encode(["天。一，二"])[0]
