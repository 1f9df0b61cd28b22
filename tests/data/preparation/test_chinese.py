"""Conversion of Chinese text: what is converted, what stays, and that every stage reads the same."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cpt_merge.data.preparation import chinese
from cpt_merge.data.preparation.chinese import convert
from cpt_merge.data.preparation.notes import Example, read_notes
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.tokenise import write_store
from tests.data.test_tokenise import ids_of, jsonl


def test_words_and_characters_are_converted() -> None:
    assert convert("鼠标里面的软件和信息,头发发展。", "s2twp") == "滑鼠裡面的軟體和資訊,頭髮發展。"
    assert convert("滑鼠裡面的軟體", "tw2sp") == "鼠标里面的软件"


def test_everything_else_stays() -> None:
    for text in ("한국어 <b>\r\n\t", "plain English", "e\u0301 👩‍👩‍👧 \u3000", "a\0b", "\0"):
        assert convert(text, "s2twp") == text


def test_text_after_a_nul_is_not_lost() -> None:
    """OpenCC itself gives "a" for the first."""
    assert convert("a\0后面", "s2t") == "a\0後面"
    assert convert("后\0\0后\0", "s2t") == "後\0\0後\0"


def test_a_long_text_is_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "鼠标里面的软件\n\n头发发展\n" * 50 + "后面"
    whole = convert(text, "s2twp")
    for length in (15, 100, 499):
        monkeypatch.setattr(chinese, "_STRETCH", length)
        assert convert(text, "s2twp") == whole
    assert convert("后" * 1000, "s2t") == "後" * 1000, "a line that is longer"
    assert convert("后\0" * 1000, "s2t") == "後\0" * 1000


def source(path: Path, texts: list[str | None], **keys: Any) -> Source:
    jsonl(path, texts)
    return Source(path=str(path), **keys)


def test_all_stages_read_the_converted_text(tmp_path: Path, model: Path) -> None:
    texts = [f"鼠标里面的软件 {number}" for number in range(50)]
    expected = [f"滑鼠裡面的軟體 {number}" for number in range(50)]
    converted = source(tmp_path / "a.jsonl", [*texts], language="zh_tw", convert="s2twp")
    corpus = Corpus(sources=[converted], heldout=0.2)
    ready = source(tmp_path / "b.jsonl", [*expected], language="zh_tw")
    same = Corpus(sources=[ready], heldout=0.2)
    for split in ("train", "heldout"):
        texts = list(corpus.documents(converted, split))
        assert texts == list(same.documents(ready, split))
        assert set(texts) <= set(expected)
    for each, out in ((corpus, "store"), (same, "expected")):
        write_store(each, model, tmp_path / out)
    assert ids_of(tmp_path / "store") == ids_of(tmp_path / "expected")
    assert ids_of(tmp_path / "store", "heldout") == ids_of(tmp_path / "expected", "heldout")


def test_what_was_converted_is_counted_with_examples(tmp_path: Path, model: Path) -> None:
    texts = ["我的头发", "plain English", None, *(f"后面 {number}" for number in range(9))]
    corpus = Corpus(
        sources=[
            source(tmp_path / "a.jsonl", texts, language="zh_tw", convert="s2tw"),
            source(tmp_path / "b.jsonl", ["后面", "hello"], language="zh_cn"),
        ],
        heldout=1e-6,
    )
    info = write_store(corpus, model, tmp_path / "store")
    first, second = read_notes(tmp_path / "store")
    assert first.changed == {"converted": 10}
    assert info.sources[0].left_out == {"bad_rows": 0, "empty": 1, "duplicates": 0}
    assert first.examples[0] == Example("converted", "我的头发", "我的頭髮")
    assert len(first.examples) == 3
    assert not second.changed
    assert not second.examples


def test_blocks_of_another_conversion_are_not_used(tmp_path: Path, model: Path) -> None:
    texts = [f"鼠标里面的软件 {number}" for number in range(50)]
    for conversion in ("s2t", "s2twp"):
        one = source(tmp_path / "a.jsonl", [*texts], language="zh_tw", convert=conversion)
        write_store(Corpus(sources=[one], heldout=1e-6), model, tmp_path / "store")
        assert read_notes(tmp_path / "store")[0].examples[0].instead == convert(
            texts[0], conversion
        )


def test_a_conversion_to_another_language_is_refused() -> None:
    wrong = (("s2t", "ko"), ("t2s", "zh_tw"), ("s2tw", "zh_cn"), ("t2jp", "zh_tw"))
    for conversion, language in wrong:
        with pytest.raises(ValidationError, match=f"`convert: {conversion}` does not give text in"):
            Source(path="a.txt", language=language, convert=conversion)
    right = (("t2s", "zh_cn"), ("s2hk", "zh_hk"), ("s2t", "zho_Hant"), ("t2s", "zho_Hans"))
    for conversion, language in right:
        Source(path="a.txt", language=language, convert=conversion)


def test_without_any_step_the_keys_of_stages_stay() -> None:
    corpus = Corpus(sources=[Source(path="a.txt", language="ko")])
    assert "convert" not in corpus.text()["sources"][0]
    assert set(corpus.text()) == {"sources", "heldout", "normalization"}
    converted = Source(path="a.txt", language="zh_tw", convert="s2t")
    assert Corpus(sources=[converted]).text()["sources"][0]["convert"] == "s2t"
