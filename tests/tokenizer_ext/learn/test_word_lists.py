"""Pieces from a word list or another SentencePiece model, instead of or before what is learnt."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.tokenizer_ext import TokenizerConfig
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.tokenizer_json import build_model, extend_model, merges_of
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.learn.word_lists import Speller, read_given, replay
from tests.tokenizer_ext.small_tokenizers import (
    CHINESE,
    train_sentencepiece,
    write_base,
)

HAN, HANGUL = Scripts(find_language("zh_tw")), Scripts(find_language("ko"))


def write_list(folder: Path, lines: list[str]) -> Path:
    path = folder / "words.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def new_pieces(out: Path, base: Path) -> list[str]:
    family = read_base(base).family
    return [family.readable(piece.piece) for piece in VocabularyMap.load(out).new]


@pytest.fixture(params=["sp_base", "bl_base"])
def base(request) -> Path:
    return request.getfixturevalue(request.param)


def test_all_words_of_a_list_become_pieces(base, corpus, tmp_path) -> None:
    """Nothing is learnt where only a list is given; the proofs of the stage hold for what it makes."""
    words = ["圖書館", "哪裡", "繁體", "電腦系統", "哈哈哈哈"]
    config = TokenizerConfig(
        pieces_from={"zh_tw": str(write_list(tmp_path, words))}, character_coverage=0.001
    )
    extend_tokenizer(config, base, corpus, tmp_path / "out")
    made = new_pieces(tmp_path / "out", base)
    assert set(words) <= set(made)
    assert all(
        any(piece in word for word in words) or not piece.isalpha()
        for piece in made
        if len(piece) > 1
    )


def test_learning_fills_up_what_a_list_leaves(base, corpus, tmp_path) -> None:
    words = [" 질문과", "대답은"]
    config = TokenizerConfig(
        new_pieces={"ko": 150}, pieces_from={"ko": str(write_list(tmp_path, words))}, min_frequency=2
    )  # fmt: skip
    extend_tokenizer(config, base, corpus, tmp_path / "out")
    made = new_pieces(tmp_path / "out", base)
    assert len(made) == 150
    assert set(words) <= set(made)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 2 <= report["usefulness"][0]["given"] < 150


def test_a_list_that_is_longer_than_the_room_is_taken_from_its_start(
    sp_base, corpus, tmp_path, capsys
) -> None:
    words = sorted({word for word in CHINESE if len(word) == 2})
    config = TokenizerConfig(
        new_pieces={"zh_tw": 12},
        pieces_from={"zh_tw": str(write_list(tmp_path, words))},
        character_coverage=0.01,
    )
    extend_tokenizer(config, sp_base, corpus, tmp_path / "out")
    made = new_pieces(tmp_path / "out", sp_base)
    assert words[0] in made
    assert words[-1] not in made
    assert "no room for" in capsys.readouterr().err


def test_a_sentencepiece_model_of_any_kind_gives_its_pieces(sp_base, corpus, tmp_path) -> None:
    """Unigram pieces have no merges of their own: steps are made for them, so all of them are
    reachable.
    """
    lines = ["我們今天學習繁體中文", "圖書館在哪裡", "老師的問題和學生的回答"] * 30
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, model_type="unigram", vocab_size=60, minloglevel=2,
        hard_vocab_limit=False, num_threads=1,
    )  # fmt: skip
    model = tmp_path / "unigram.model"
    model.write_bytes(stream.getvalue())
    entries = read_given(model, HAN)
    assert len(entries) > 20
    config = TokenizerConfig(pieces_from={"zh_tw": str(model)}, character_coverage=0.01)
    extend_tokenizer(config, sp_base, corpus, tmp_path / "out")
    known = read_base(sp_base).ids
    assert set(entries) <= {*new_pieces(tmp_path / "out", sp_base), *known}


def test_entries_of_other_scripts_are_left_out_and_said(tmp_path, capsys) -> None:
    path = write_list(tmp_path, ["圖書館\t120", "PC", "電腦 ", "３C", "", "圖書館", "\ufeff"])
    assert read_given(path, HAN) == ["圖書館", "電腦"]
    assert "3 of 7 entries are not of Han alone and left out ('PC'" in capsys.readouterr().err


def test_a_space_belongs_to_a_word_where_words_are_set_apart(tmp_path) -> None:
    path = write_list(tmp_path, [" 한국", "한국", " 中文"])
    assert read_given(path, HANGUL) == [" 한국", "한국"]
    assert read_given(path, HAN) == ["中文"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"only English\n", "has no entry of Han letters alone"),
        (b"", "has no entry of Han letters alone"),
        ("中文".encode("big5"), "is not UTF-8"),
    ],
)
def test_a_bad_list(content, message, tmp_path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_given(path, HAN)


def test_a_list_that_is_not_there(tmp_path) -> None:
    for name in ("words.txt", "words.model"):
        with pytest.raises(UserError, match="cannot be read"):
            read_given(tmp_path / name, HAN)


def test_an_entry_that_the_base_cuts_or_changes_is_left_out(
    bl_base, corpus, tmp_path, capsys
) -> None:
    """LLaMA-3's pattern cuts at 〇, which is a number to Unicode, and at marks;

    NFC puts jamo together.
    """
    content = json.loads(json.dumps(read_base(bl_base).content))
    content["normalizer"] = {"type": "NFC"}
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\p{L}+|\P{L}"},
        "behavior": "Isolated",
        "invert": False,
    }
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, letters]}
    base = write_base(tmp_path / "base", read_base(bl_base).rows, content=content)
    words = ["圖書館", "二〇二三年"]
    config = TokenizerConfig(pieces_from={"zh_tw": str(write_list(tmp_path, words))})
    extend_tokenizer(config, base, corpus, tmp_path / "out")
    made = new_pieces(tmp_path / "out", base)
    assert "圖書館" in made
    assert "二〇二三年" not in made
    assert "cuts or changes 1 entries (二〇二三年)" in capsys.readouterr().err


def test_a_bad_model(tmp_path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        read_given(tmp_path / "x.model", HAN)
    (tmp_path / "x.model").write_bytes(train_sentencepiece())
    with pytest.raises(UserError, match="has no entry of Thai"):
        read_given(tmp_path / "x.model", Scripts(find_language("th_Thai")))


LISTS = st.lists(
    st.text("中文字典國人的", min_size=1, max_size=6), min_size=1, max_size=12, unique=True
)


@settings(max_examples=100, deadline=None)
@given(entries=LISTS, size=st.integers(1, 40))
def test_what_a_list_makes_is_reachable(sp, entries, size) -> None:
    content = sp.case.base.content
    known = content["model"]["vocab"]
    made = replay(entries, size, merges_of(content), known.keys(), lambda text: True)
    assert len(made.pieces) <= size
    assert not made.unreachable
    assert (
        len([entry for entry in entries if entry not in made.pieces and entry not in known])
        == made.left
    )
    start = max(known.values()) + 1
    extended = extend_model(
        content, {piece: start + n for n, piece in enumerate(made.pieces)}, len(merges_of(content))
    )
    tokenizer = build_model(extended)
    assert [tokenizer.encode(piece).tokens for piece in made.pieces] == [
        [piece] for piece in made.pieces
    ]
    for number, (piece, halves) in enumerate(made.pieces.items()):
        if halves:
            before = dict(
                list({piece: start + n for n, piece in enumerate(made.pieces)}.items())[:number]
            )
            split = (
                build_model(extend_model(content, before, len(merges_of(content))))
                .encode(piece)
                .tokens
            )
            assert tuple(split) == halves


@settings(max_examples=100, deadline=None)
@given(
    word=st.text("中文的人 河水", min_size=1, max_size=8).map(lambda text: text.replace(" ", "▁"))
)
def test_a_speller_splits_as_the_tokenizer_does(sp, word) -> None:
    content = sp.case.content
    speller = Speller(merges_of(content))
    known = content["model"]["vocab"]
    if all(letter in known for letter in word):
        assert speller.split(word) == build_model(content).encode(word).tokens


def test_an_entry_that_only_parts_of_characters_lead_to_is_left_out(bl_base) -> None:
    """々 begins like CJK punctuation, so a piece of its first bytes would change text without Han."""
    base = read_base(bl_base)
    content = base.content
    family = base.family
    made = replay(
        [family.written("々")],
        10,
        merges_of(content),
        content["model"]["vocab"].keys(),
        family.admits(HAN, 9),
    )
    assert made.unreachable == [family.written("々")]
    assert made.pieces == {}
