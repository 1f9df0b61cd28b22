"""JSON records: what nobody reads never matters, and a bad line never changes its neighbours."""

import json
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.readers import streams
from cpt_merge.data.readers.json_records import read_json
from cpt_merge.data.readers.rows import BadRow


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def test_a_value_of_another_type_leaves_its_neighbours_as_they_are(tmp_path: Path) -> None:
    for value in (3, 0.5, ["x"], {"x": 1}, True, None):
        file = write(tmp_path / "a.jsonl", {"text": "가나"}, {"text": value}, {"text": '"天"'})
        assert [row for _, row in read_json(file)] == [
            {"text": "가나"}, {"text": value}, {"text": '"天"'},
        ]  # fmt: skip


def test_other_fields_may_change_their_types_and_appear_late(tmp_path: Path) -> None:
    others = [None, "2024-01-01", "unknown", 3, {"a": 1}, [1], float("nan"), 10**30]
    records = [{"text": str(number), "other": other} for number, other in enumerate(others)]
    records += [{"text": "late", "new": number} for number in range(3)]
    read = [row for _, row in read_json(write(tmp_path / "a.jsonl", *records))]
    assert [row["text"] for row in read if isinstance(row, dict)] == [
        row["text"] for row in records
    ]


def test_rows_have_the_numbers_of_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"text": "x"}\r\n\n  \n{"text": "y"}')
    rows = list(read_json(tmp_path / "a.jsonl"))
    assert rows == [(2, {"text": "x"}), (5, {"text": "y"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text":', "is not JSON (Expecting value: character 9)"),
        (b'{"text": "a"} {"text": "b"}', "is not JSON (Extra data: character 15)"),
        (b'"text"', "is not a JSON object"),
        (b'{"text": "\xb0\xa1"}', "is not UTF-8 (byte 11: invalid start byte)"),
        (b"\x1f\x8b\x08\x00", "is gzip data (.gz) and not UTF-8"),
        (b'{"text": ' + 100_000 * b"[", "is not JSON that can be read (too deeply nested)"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
    rows = [row for _, row in read_json(tmp_path / "a.jsonl")]
    assert rows == [{"text": "x"}, BadRow(reason), {"text": "y"}]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('[{"text": "x"},\n {"text": "y"}]', [{"text": "x"}, {"text": "y"}]),
        ('["x", "y", 3]', ["x", "y", BadRow("is neither an object nor text")]),
        ('{\n "text": "x"\n}', [{"text": "x"}]),
        ("[]", []),
    ],
)
def test_a_file_may_be_one_value(tmp_path: Path, content: str, rows: list[object]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [row for _, row in read_json(tmp_path / "a.json")] == rows


def test_a_broken_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "x"},\n')
    with pytest.raises(UserError, match=r"a\.json is not JSON .*; fix it, or write one record"):
        list(read_json(tmp_path / "a.json"))


def test_a_large_file_whose_first_line_is_broken_is_read_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LONGEST_LINE", 100)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "가\n' + '{"text": "나"}\n' * 20)
    rows = list(read_json(file))
    assert [number for number, row in rows if isinstance(row, BadRow)] == [1]
    assert rows[1:] == [(number, {"text": "나"}) for number in range(2, 22)]


def test_what_nobody_reads_may_be_cut_emoji_and_numbers_of_any_length(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ('{"text": "a\\ud83d"}', '{"text": "b", "title": "\\ud83d"}',
             '{"text": "c", "id": ' + 5000 * "9" + "}")  # fmt: skip
    surrogate = BadRow("contains a lone surrogate, which is not Unicode text")
    for content in ("\n".join(lines), f"[{','.join(lines)}]"):
        file.write_text(content)
        rows = [row for _, row in read_json(file)]
        assert [row["text"] for row in rows if isinstance(row, dict)] == [surrogate, "b", "c"]


def test_a_file_of_a_byte_order_mark_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert list(read_json(tmp_path / "a.jsonl")) == []
