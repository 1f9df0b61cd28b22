"""Personal data: what is replaced, and what only looks like it."""

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from cpt_merge.data.preparation.notes import Example, Notes, read_notes
from cpt_merge.data.preparation.personal_data import PATTERNS, PersonalData, Replacement
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.tokenise import write_store
from tests.data.test_tokenise import jsonl

ALL = Replacement(get_args(PersonalData))

FOUND = {
    "email": ["kim.min-su+news@mail.example.co.kr", "a_b@x.tw", "A1@EXAMPLE.COM"],
    "ip_address": ["8.8.8.8", "203.104.153.1", "2606:4700:4700::1111", "2001:4860:4860:0:0:0:0:8888"],
    "phone": [
        "010-1234-5678", "01012345678", "010 1234 5678", "02-123-4567", "(02) 1234-5678", "031-123-4567",
        "+82-10-1234-5678", "+82 2 1234 5678", "0912-345-678", "0912345678", "(02)2345-6789", "+886 912 345 678",
        "+886-2-2345-6789", "13812345678", "138-1234-5678", "+86 138 1234 5678", "010-12345678", "090-1234-5678",
        "03-1234-5678", "+81-90-1234-5678",
    ],
    "kr_resident_number": ["900101-1234567", "040229-3234567", "850412 - 2345678"],
    "tw_id_number": ["A123456789", "F131104093"],
    "cn_id_number": ["11010519491231002X", "11010519491231002x"],
}  # fmt: skip
KEPT = [
    "1.2.3", "1.2.3.4.5", "256.1.1.1", "192.168.0.1", "127.0.0.1", "12:30:45", "::1", "std::vector", "a::b",
    "user@localhost", "@handle", "a @ b.com",
    "2026-11-30", "2026.11.30", "10,000,000", "3.14159265", "123456789012", "0.0912345678", "1,301,234,5678",
    "901301-1234567", "900230-1234567", "900101-12345678", "1900101-1234567",
    "A123456788", "AB12345678", "XA123456789", "110105194912310021", "110105194913310025",
    "978-89-12345-67-8", "880-1234-5678-90",
]  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_personal_data_is_replaced_next_to_any_text(kind: PersonalData) -> None:
    for value in FOUND[kind]:
        placeholder = PATTERNS[kind].placeholder
        for before, after in (
            ("", ""),
            ("전화는 ", "입니다."),
            ("請聯絡", "。"),
            ("(", ")"),
            ("는", "으로"),
            ("x: ", ", y"),
        ):
            notes = Notes()
            assert ALL(before + value + after, notes) == before + placeholder + after, value
            assert (notes.changed, notes.places) == ({kind: 1}, {kind: 1})


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_it_stays(text: str) -> None:
    for before, after in (("", ""), ("값은 ", "이다."), ("約", "。")):
        notes = Notes()
        assert ALL(before + text + after, notes) == before + text + after
        assert not notes.changed


def test_only_the_kinds_that_are_asked_for_are_replaced() -> None:
    text, notes = "a@b.com 010-1234-5678 a@c.com", Notes()
    assert Replacement(("email",))(text, notes) == "<EMAIL> 010-1234-5678 <EMAIL>"
    assert (notes.changed, notes.places) == ({"email": 1}, {"email": 2})
    assert notes.examples == [Example("email", "", "<EMAIL> 010-1234-5678 <EMAIL>")]


def test_long_digits_and_dots_take_no_time() -> None:
    for text in (
        "1" * 200_000,
        "1." * 100_000,
        "a." * 100_000 + "@",
        "a@" + "a-." * 60_000,
        "1:" * 100_000,
    ):
        assert ALL(text, Notes()) == text


def test_every_stage_reads_placeholders_and_examples_show_no_data(
    tmp_path: Path, model: Path
) -> None:
    texts: list[str | None] = [
        f"전화 010-1234-{number:04} 메일 u{number}@example.com" for number in range(20)
    ]
    texts.append("아무것도 없다")
    source = jsonl(tmp_path / "a.jsonl", texts)
    corpus = Corpus(
        sources=[source],
        heldout=1e-6,
        personal_data=["email", "phone"],
        filters=[{"language": "ko", "script": 0, "min_length": 3}],
    )
    assert set(corpus.documents(source, "train")) == {"전화 <PHONE> 메일 <EMAIL>"}
    info = write_store(corpus, model, tmp_path / "store")
    (notes,) = read_notes(tmp_path / "store")
    assert notes.changed == {"email": 20, "phone": 20, "boilerplate_lines": 0}
    assert info.sources[0].left_out["too_short"] == 1
    content = (tmp_path / "store" / "preparation.json").read_text(encoding="utf-8")
    assert "example.com" not in content
    assert "1234" not in content


def test_an_unknown_kind_is_refused_and_without_any_the_keys_stay() -> None:
    source = Source(path="a.txt", language="ko")
    wrong: Any = ["names"]
    with pytest.raises(ValidationError, match="personal_data"):
        Corpus(sources=[source], personal_data=wrong)
    assert "personal_data" not in Corpus(sources=[source]).text()
