"""CSV: every cell is the text that it contains."""

from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.readers.csv_rows import read_csv, read_tsv
from cpt_merge.data.readers.rows import BadRow


def test_no_cell_is_taken_for_something_else_than_text(tmp_path: Path) -> None:
    cells = ["NA", "null", "None", "nan", "1,5", "007", "2024-01-01", "true", "", "가\n나", 'a "b"']
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    (tmp_path / "a.csv").write_bytes(("\ufeff" + "\r\n".join(["text", *quoted]) + "\r\n").encode())
    assert [
        row["text"] for _, row in read_csv(tmp_path / "a.csv") if isinstance(row, dict)
    ] == cells


def test_rows_have_the_numbers_of_their_first_lines(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"x\ny"\n2\tz\n3\n\n4\tw\n')
    assert list(read_tsv(tmp_path / "a.tsv")) == [
        (2, {"id": "1", "text": "x\ny"}),
        (4, {"id": "2", "text": "z"}),
        (5, BadRow("has 1 cells, but the header has 2")),
        (7, {"id": "4", "text": "w"}),
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('text\nx\n"y\nz\n', "line 3 is not CSV"),  # a quotation mark without its partner
        ('text\n"x" y\n', "line 2 is not CSV"),
        ("text,id,text\nx,1,y\n", "more than one column 'text'"),
        ("id;text\n1;x, y\n", "its cells are separated by ';' and not by ','; convert it"),
        ("id\ttext\n1\tx\n", "separated by '\\\\t' .* name it .tsv"),
        ("text\rx\r", r"line 1 is not CSV \(a CR without LF outside quotation marks\)"),
        ("text\n\udcb0\n", "line 2 is not UTF-8"),
    ],
)
def test_what_is_no_csv_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"a\.csv.* {sentence}"):
        list(read_csv(tmp_path / "a.csv", ["text"]))
