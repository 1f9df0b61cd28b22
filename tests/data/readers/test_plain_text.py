"""Plain text: lines and whole files."""

from pathlib import Path

from cpt_merge.data.readers.plain_text import read_lines, read_whole
from cpt_merge.data.readers.rows import BadRow


def test_lines_end_with_lf_crlf_or_cr_and_nothing_else(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.txt").write_bytes(f"\ufeffx{end}{end}y\u2028z\x0b\x85 {end}w".encode())
        texts = ["x", "", "y\u2028z\x0b\x85 ", "w"]
        assert list(read_lines(tmp_path / "a.txt")) == list(enumerate(texts, start=1)), repr(end)


def test_a_whole_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("\ufeff# 제목\r\n\r\n본문\r\n".encode())
    assert list(read_whole(tmp_path / "a.md")) == [(1, "# 제목\n\n본문\n")]


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x\nab\xb0\xa1\ny\n")
    reason = "is not UTF-8 (byte 3: invalid start byte)"
    assert list(read_lines(tmp_path / "a.txt")) == [(1, "x"), (2, BadRow(reason)), (3, "y")]
    (tmp_path / "a.txt").write_bytes("x\n".encode("utf-16"))
    assert [row for _, row in read_whole(tmp_path / "a.txt")] == [BadRow("is UTF-16 and not UTF-8")]
