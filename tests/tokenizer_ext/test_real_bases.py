"""Tokenizers of real models (tests/real_tokenizers.py):

LLaMA-2's kind with 32,000 pieces, Qwen's with 151,643 ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.core.languages import script_pattern
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.tokenizer_json import build
from cpt_merge.tokenizer_ext.verify import samples
from tests.real_tokenizers import BASES, QWEN_ROWS
from tests.tokenizer_ext.small_tokenizers import CHINESE, CONFIG, KOREAN

SCRIPTS = script_pattern(("Han", "Hangul"))


SLOW_TO_BUILD = ["qwen", "mistral_v3", "tekken"]
MIXED_TEXTS = (2_000, samples.MIXED_TEXTS)  # in the quick suite, and in the slow one


@dataclass(frozen=True)
class Real:
    """A real base, extended."""

    out: Path
    before: Tokenizer
    after: Tokenizer
    processor: SentencePieceProcessor | None


@pytest.fixture(scope="session")
def extended_real(corpus, tmp_path_factory):
    """Name -> the base of that name, extended once in the session.

    The stage proves its invariants itself.
    """
    made: dict[str, Real] = {}

    def extend(name: str) -> Real:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            BASES[name](folder / "base")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(samples, "MIXED_TEXTS", MIXED_TEXTS[name in SLOW_TO_BUILD])
                extend_tokenizer(CONFIG, folder / "base", corpus, folder / "out")
            model = folder / "out" / "tokenizer.model"
            processor = SentencePieceProcessor(model_file=str(model)) if model.is_file() else None
            after = Tokenizer.from_file(str(folder / "out" / "tokenizer.json"))
            made[name] = Real(
                folder / "out", build(read_base(folder / "base").content), after, processor
            )
        return made[name]

    return extend


NAMES = ["mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TO_BUILD)]


@pytest.fixture(params=NAMES)
def real(request, extended_real) -> Real:
    return extended_real(request.param)


def test_a_real_base_keeps_every_law(real) -> None:
    report = json.loads((real.out / "report.json").read_text())
    assert all(not proof["failures"] for proof in report["proofs"])
    checked = {proof["invariant"]: proof["checked"] for proof in report["proofs"]}
    assert checked["every new piece can be produced"] >= 100
    assert checked["text comes back when it is decoded"] > 2_000
    if real.processor:
        assert checked["SentencePiece and the fast tokenizer agree"] > 2_000
    assert VocabularyMap.load(real.out).rows % 64 == 0


@pytest.mark.slow
def test_rows_without_a_token_are_not_given_away(extended_real) -> None:
    """Qwen's matrix has 290 rows more than its tokenizer has ids; new pieces begin behind them."""
    real = extended_real("qwen")
    map_ = VocabularyMap.load(real.out)
    assert map_.base_rows == QWEN_ROWS
    assert min(piece.id for piece in map_.new) == QWEN_ROWS
    assert real.after.token_to_id("<|im_end|>") == real.before.token_to_id("<|im_end|>") == 151_645


ANYTHING = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
        st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3),
        st.characters(min_codepoint=0x1100, max_codepoint=0x11FF),  # jamo: Hangul taken apart (NFD)
        st.characters(min_codepoint=0x20000, max_codepoint=0x2FA1F),
        st.characters(categories=["Mn", "Cc", "Zs", "Cf"]),
        st.sampled_from(
            list("  \n\r\t▁ĠĊ的人中學生한국어ㅋ哈々〇aeE.,，。「」🙂👩‍👧🏳️‍🌈\u200d\ufeff\x00")
        ),
    ),
    max_size=60,
)
MIXED = st.lists(
    st.one_of(ANYTHING, st.sampled_from([*CHINESE, *KOREAN, " the", "water", "=\n"])), max_size=8
).map("".join)


def names_a_special_token(real, text) -> bool:
    """Hypothesis tries strings of our sources, too; the base puts a space behind `<s>`."""
    added = real.before.get_added_tokens_decoder().values()
    return any(token.content in text for token in added)


@settings(max_examples=1_000, deadline=None)
@given(text=MIXED)
def test_sentencepiece_and_the_fast_tokenizer_agree(extended_real, text) -> None:
    real = extended_real("mistral")
    assume(not names_a_special_token(real, text))
    ids = real.after.encode(text, add_special_tokens=False).ids
    assert real.processor.encode(text) == ids


@pytest.mark.parametrize("name", ["mistral", pytest.param("qwen", marks=pytest.mark.slow)])
@settings(max_examples=500, deadline=None)
@given(text=MIXED)
def test_text_comes_back_as_with_the_base(extended_real, name, text) -> None:
    """Exactly, but for what the base itself changes: a literal `▁` there, NFC here."""
    real = extended_real(name)
    assume(not names_a_special_token(real, text))
    expected = (
        real.before.normalizer.normalize_str(text) if name == "qwen" else text.replace("▁", " ")
    )
    ids = real.after.encode(text, add_special_tokens=False).ids
    assert real.after.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("name", ["mistral", pytest.param("qwen", marks=pytest.mark.slow)])
@settings(max_examples=500, deadline=None)
@given(text=MIXED)
def test_text_without_the_scripts_is_tokenized_as_before(extended_real, name, text) -> None:
    real = extended_real(name)
    normal = (
        real.before.normalizer.normalize_str(text) if name == "qwen" else text
    )  # NFC puts jamo together
    plain = SCRIPTS.sub("", normal)
    assert real.after.encode(plain).ids == real.before.encode(plain).ids


@pytest.mark.parametrize("name", ["mistral", pytest.param("qwen", marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", ["學", "한국어 ", "water ", "學生a", "哈", " ", "\n", "🙂"])
def test_very_long_lines(extended_real, name, unit) -> None:
    real = extended_real(name)
    text = unit * 20_000
    ids = real.after.encode(text, add_special_tokens=False).ids
    assert real.after.decode(ids, skip_special_tokens=False) == text
    if real.processor:
        assert real.processor.encode(text) == ids


def test_a_lone_surrogate_is_refused_and_nothing_else_happens(extended_real) -> None:
    with pytest.raises((TypeError, UnicodeEncodeError)):
        extended_real("mistral").after.encode("\ud800")
