"""Byte-level BPE with tiktoken gives the ids of the tokenizers library, wherever it is used."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from cpt_merge.data.byte_level_encoder import LLAMA_3, QWEN, TEKKEN, ByteLevelEncoder, is_settled
from cpt_merge.data.encoders import LibraryEncoder
from cpt_merge.data.long_texts import cut
from tests.real_tokenizers import BASES
from tests.training.texts import TEXTS

CLUSTERED = "  \n\r\t'sSaAé1²½가한字がǅʰ.,/_\u0301\u3000\u00a0\x1c\x85\u200b\u017f"


def trained(*steps: pre_tokenizers.PreTokenizer, use_regex: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, letters]) if steps else letters
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def bpe(
    pieces: list[str], merges: list[tuple[str, str]], ignore_merges: bool = False
) -> models.BPE:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate([*letters, *pieces])}
    return models.BPE(vocab, merges, ignore_merges=ignore_merges)


def smollm() -> Tokenizer:
    return trained(pre_tokenizers.Digits(individual_digits=True))


def with_pattern(pattern: str) -> Tokenizer:
    return trained(pre_tokenizers.Split(Regex(pattern), "isolated"), use_regex=False)


def qwen() -> Tokenizer:
    tokenizer = with_pattern(QWEN)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def llama_3() -> Tokenizer:
    """Every way to cut a token in two is one of its merges; whole words are looked up."""
    tokenizer = with_pattern(LLAMA_3)
    definition = json.loads(tokenizer.to_str())
    vocab = definition["model"]["vocab"]
    products = ["".join(pair) for pair in definition["model"]["merges"]]
    definition["model"]["merges"] = [
        [product[:cut], product[cut:]]
        for product in products
        for cut in range(1, len(product))
        if product[:cut] in vocab and product[cut:] in vocab
    ]
    definition["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(definition))


def real(name: str, folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    BASES[name](folder)
    backend: Tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    return backend


TRAINED = {
    "gpt2": trained,
    "smollm": smollm,
    "llama 3": llama_3,
    "qwen": qwen,
    "tekken": partial(with_pattern, TEKKEN),
}
REAL = [pytest.param(f"real {name}", marks=pytest.mark.slow) for name in ("qwen", "tekken")]


@pytest.fixture(scope="module", params=[*TRAINED, *REAL])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LibraryEncoder:
    made = TRAINED.get(request.param)
    if made:
        return LibraryEncoder(made(), "uint32")
    folder = tmp_path_factory.mktemp("tokenizer")
    return LibraryEncoder(real(request.param.removeprefix("real "), folder), "uint32")


@pytest.fixture(scope="module")
def by_tiktoken(library: LibraryEncoder) -> ByteLevelEncoder:
    return of(library)


def of(library: LibraryEncoder) -> ByteLevelEncoder:
    found = ByteLevelEncoder.of(json.loads(library.backend.to_str()), library)
    assert found
    return found


def test_the_ids_are_those_of_the_library(
    library: LibraryEncoder, by_tiktoken: ByteLevelEncoder
) -> None:
    assert by_tiktoken.encode(TEXTS) == library.encode(TEXTS)
    assert pickle.loads(pickle.dumps(by_tiktoken.by_tiktoken)).encode_ordinary(TEXTS[0])


def test_whatever_the_text(library: LibraryEncoder, by_tiktoken: ByteLevelEncoder) -> None:
    alphabet = st.one_of(st.sampled_from(list(CLUSTERED)), st.characters(codec="utf-8"))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.text(alphabet, min_size=1, max_size=40), min_size=1, max_size=3))
    def check(texts: list[str]) -> None:
        assert by_tiktoken.encode(texts) == library.encode(texts)

    check()


def test_the_same_character_again_and_again(
    library: LibraryEncoder, by_tiktoken: ByteLevelEncoder
) -> None:
    texts = [
        unit * count
        for unit in ("a", " ", "\n", "=", "한", "的", "aab", "1")
        for count in range(1, 40)
    ]
    assert by_tiktoken.encode(texts) == library.encode(texts)


def test_a_run_that_tiktoken_cannot_take_is_left_to_the_library() -> None:
    library = LibraryEncoder(trained(), "uint16")
    texts = ["a" + " " * 1_200_000 + "b", "short"]
    assert of(library).encode(texts) == library.encode(texts)


def test_what_the_two_may_see_differently_is_left_to_the_library() -> None:
    library = LibraryEncoder(trained(), "uint16")
    shortcut, texts = of(library), ["we go", "a\u31f0b \U00030000", "😀"]
    assert shortcut.encode(texts) == library.encode(texts)
    assert shortcut.unsettled == {"\U00030000"}  # a letter since Unicode 13


@pytest.mark.slow
def test_every_settled_character_wherever_it_stands(
    library: LibraryEncoder, by_tiktoken: ByteLevelEncoder
) -> None:
    places = "{0}|a{0}b|A{0}B| {0}|'{0}|1{0}1|{0}{0} {0}\n{0}.{0} . {0}"
    settled = [chr(code) for code in range(0x110000) if is_settled(chr(code))]
    assert len(settled) > 95_000
    for start in range(0, len(settled), 1000):
        texts = [places.format(character) for character in settled[start : start + 1000]]
        assert by_tiktoken.encode(texts) == library.encode(texts), start


def test_tokens_that_merges_do_not_lead_to_are_never_given() -> None:
    """`ab` and `bc` come before `abc`, whose bytes are merged to `ab`, `c`."""
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    backend = trained()
    backend.model = bpe(["ab", "bc", "abc"], merges)
    library = LibraryEncoder(backend, "uint16")
    assert of(library).encode(["abc abcabc xbc"]) == library.encode(["abc abcabc xbc"])
    # `abc` is found as a whole word, and only so
    backend.model = bpe(["ab", "bc", "abc"], merges, ignore_merges=True)
    assert ByteLevelEncoder.of(json.loads(backend.to_str()), library) is None


def test_tokenizers_that_are_not_known_to_be_the_same_are_left_alone() -> None:
    added, prefixed, lower, cut, twice = (trained() for _ in range(5))
    joined = trained(use_regex=False)
    added.add_tokens([AddedToken("go home", special=False)])
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lower.normalizer = normalizers.Lowercase()
    cut.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # `abc` has two ranks
    twice.model = bpe(["ab", "abc", "bc"], [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])
    for backend in (added, prefixed, lower, joined, cut, twice):
        library = LibraryEncoder(backend, "uint16")
        assert ByteLevelEncoder.of(json.loads(backend.to_str()), library) is None


def test_special_tokens_in_a_text_are_text() -> None:
    backend = trained()
    backend.add_special_tokens(["<|end|>"])
    library = LibraryEncoder(backend, "uint16")
    ids = np.frombuffer(of(library).encode(["we <|end|> go"])[0], "uint16")
    assert backend.token_to_id("<|end|>") not in ids


def test_long_texts_are_cut_without_a_trace(
    library: LibraryEncoder, by_tiktoken: ByteLevelEncoder
) -> None:
    alphabet = st.one_of(
        st.sampled_from(
            [*"Aa가一", *" \n,.;:!?。，、；：！", "one. two", "'s", "\u0301", "\u1161", "1"]
        ),
        st.sampled_from(CLUSTERED),
    )

    @settings(max_examples=200, deadline=None)
    @given(st.lists(alphabet, min_size=1, max_size=30).map("".join))
    def check(text: str) -> None:
        parts = cut(text, by_tiktoken.border, 1)
        assert "".join(parts) == text
        assert by_tiktoken.encode_parts(parts) == library.encode([text])[0], parts

    check()
    assert cut("one two。三 four", by_tiktoken.border, 1) == ["one", " two", "。三", " four"]
