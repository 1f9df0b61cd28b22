"""Text sources: formats, the held-out part, and an error for everything that can be wrong."""

import gzip
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.check import check_text
from cpt_merge.data.sources import Corpus, Source, read_piece, read_source, source_pieces


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )
    return path


TEXTS = ["天地玄黃", "가나다라 마바사", "plain English", "두 번째 문장"]


def test_reads_jsonl_text_gzip_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(jsonl(tmp_path / "c.jsonl", TEXTS).read_text(encoding="utf-8"))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    for name in ("a.txt", "b.jsonl.gz", "c.jsonl", "d.parquet"):
        assert list(read_source(Source(path=str(tmp_path / name), language="ko"))) == TEXTS, name


def test_the_heldout_part_is_a_function_of_the_text(tmp_path: Path) -> None:
    texts = [f"문서 {number}" for number in range(2000)]
    source = Source(path=str(jsonl(tmp_path / "a.jsonl", texts)), language="ko")
    corpus = Corpus(sources=[source], heldout=0.1)
    train, heldout = (
        list(corpus.documents(source, "train")),
        list(corpus.documents(source, "heldout")),
    )
    assert set(train) | set(heldout) == set(texts)
    assert not set(train) & set(heldout)
    assert 150 < len(heldout) < 250
    jsonl(tmp_path / "a.jsonl", texts[::-1])
    assert set(corpus.documents(source, "heldout")) == set(heldout)


def test_documents_are_normalised(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "한국어")
    source = Source(path=str(jsonl(tmp_path / "a.jsonl", [decomposed])), language="ko")
    documents = {
        form: list(
            Corpus(sources=[source], normalization=form, heldout=0.01).documents(source, "train")
        )
        for form in ("NFC", "none")
    }
    assert documents == {"NFC": ["한국어"], "none": [decomposed]}


def test_a_directory_and_a_glob_are_all_their_files_in_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "2.jsonl", ["b"])
    jsonl(tmp_path / "1.jsonl", ["a"])
    (tmp_path / "README.md").write_text("no text source")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        assert list(read_source(Source(path=str(path), language="en"))) == ["a", "b"]


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "한국어".encode("euc-kr")),
        ("b.jsonl", b'{"text": "\xb0\xa1"}\n'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            list(read_source(Source(path=str(tmp_path / name), language="ko")))
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_source(Source(path=str(tmp_path / "a.txt"), language="ko")))


def test_a_missing_file_and_a_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        list(read_source(Source(path=str(tmp_path / "nowhere.jsonl"), language="ko")))
    with pytest.raises(UserError, match="line 1 has no field 'text' but content"):
        list(
            read_source(
                Source(path=str(jsonl(tmp_path / "a.jsonl", ["x"], "content")), language="ko")
            )
        )
    with pytest.raises(UserError, match="no file matches"):
        list(read_source(Source(path=str(tmp_path / "*.parquet"), language="ko")))


def test_an_unknown_language_is_refused() -> None:
    assert Source(path="x.txt", language="zh-TW").language == "zh_tw"
    with pytest.raises(ValueError, match="language 'zh' is not known; use zh_tw or zh_cn"):
        Source(path="x.txt", language="zh")


def test_an_empty_file_is_said_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").touch()
    jsonl(tmp_path / "b.jsonl", ["x"])
    assert list(read_source(Source(path=str(tmp_path), language="en"))) == ["x"]
    assert "a.jsonl is empty" in capsys.readouterr().err


LINES = {  # the lines of a file, and the sentence about it
    "text\n": "line 1 is not JSON (Expecting value: character 1)",
    '\n{"text": "x"}\n{"text":\n': "line 3 is not JSON (Expecting value: character 9)",
    '{"text": "fine"}\n"text"\n': "line 2 is not a JSON object",
    '{"text": "fine"}\n{"text": 3}\n': "line 2 has a field 'text' that is a number and not text",
    '\n{"content": "x", "id": 1}\n': "line 2 has no field 'text' but content, id",
    '{"text": "fine"}\n{"text": "not \\ud800 fine"}\n{"text": "\\ud83d\\ude42"}\n': "line 2 contains a lone surrogate",
    '{"text": "fine"}\n{"text": "\udcb0"}\n': "line 2 is not UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
@pytest.mark.parametrize(("lines", "sentence"), LINES.items())
def test_a_bad_line_is_named_before_and_while_the_text_is_read(
    tmp_path: Path, name: str, lines: str, sentence: str
) -> None:
    path = tmp_path / name
    content = lines.encode(errors="surrogateescape")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    source = Source(path=str(path), language="en")
    expected = re.escape(f"{path}: {sentence}")
    with pytest.raises(UserError, match=expected):
        check_text(Corpus(sources=[source]))
    with pytest.raises(UserError, match=expected):
        list(read_source(source))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("blank.jsonl", '{"text": "x"}\n\n{"text": "y"}\n'),
        ("array.json", '[{"text": "x"},\n{"text": "y"}]'),
        ("array.jsonl", '["x",\n"y"]'),
        ("some.jsonl", '{"id": 1}\n{"text": "x"}\n{"text": null}\n{"text": "y"}\n'),
        ("lines.txt", "x\ny\n"),
    ],
)
def test_what_can_be_read_passes_the_check(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    source = Source(path=str(tmp_path / name), language="en")
    check_text(Corpus(sources=[source]))
    assert [text for text in read_source(source) if text] == ["x", "y"]


def test_a_source_without_documents_is_refused(tmp_path: Path) -> None:
    for number, content in enumerate(("", "\n\n")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(content)
        with pytest.raises(UserError, match=rf"text source {path} is empty"):
            check_text(Corpus(sources=[Source(path=str(path), language="en")]))


def test_a_limit_and_rows_of_a_split_exclude_each_other() -> None:
    assert Source(path="a.jsonl", language="en", split="train+test", limit=5).limit == 5
    with pytest.raises(ValueError, match=r"has a limit and rows in its split 'train\[10:20\]'"):
        Source(path="a.jsonl", language="en", split="train[10:20]", limit=5)


def test_columns_of_other_formats_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("content\nx\n")
    with pytest.raises(UserError, match=r"a\.csv: line 2 has no field 'text' but content"):
        check_text(Corpus(sources=[Source(path=str(tmp_path), language="en")]))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path, name: str, bad_rows: Any) -> None:
    """A clone without git lfs has these three lines in place of the file."""
    lines = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(lines)
    source = Source(path=str(tmp_path / name), language="ko", bad_rows=bad_rows)
    with pytest.raises(UserError, match=rf"{name} is only a pointer of git LFS"):
        check_text(Corpus(sources=[source]))


def test_bad_rows_are_left_out_on_request_and_their_neighbours_stay(tmp_path: Path) -> None:
    lines = ['{"text": "가나"}', '{"text": 3}', '{"text": "x"}', "{", '{"text": null}', '"y"']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = Source(path=str(tmp_path / "a.jsonl"), language="ko", bad_rows="skip")
    assert list(read_source(source)) == ["가나", "x", ""]
    (piece,) = source_pieces(source)
    assert list(read_piece(piece)) == ["가나", None, "x", None, "", None]
    with pytest.raises(
        UserError, match=r"line 2 has a field 'text' that is a number and not text;"
    ):
        list(read_source(source.model_copy(update={"bad_rows": "error"})))


def test_a_field_may_be_nested_a_template_or_a_conversation(tmp_path: Path) -> None:
    record = {
        "doc": {"title": "제목", "text": "본문"},
        "messages": [{"role": "user", "content": "?"}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    path = str(tmp_path / "a.jsonl")
    for source, text in (
        (Source(path=path, language="ko", field="doc.text"), "본문"),
        (Source(path=path, language="ko", field="{doc.title}: {doc.text}"), "제목: 본문"),
        (Source(path=path, language="ko", conversations=True), "?"),
    ):
        assert list(read_source(source)) == [text]
    with pytest.raises(ValueError, match=r"field '\{doc\.title' of source"):
        Source(path=path, language="ko", field="{doc.title")
    with pytest.raises(ValueError, match="has conversations and a field"):
        Source(path=path, language="ko", field="messages", conversations=True)


def test_a_whole_file_is_a_document_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# 제목\n\n본문\n", encoding="utf-8")
    source = Source(path=str(tmp_path / "a.md"), language="ko", whole_files=True)
    assert list(read_source(source)) == ["# 제목\n\n본문\n"]
    with pytest.raises(UserError, match=r"a\.md: its ending is none of"):
        list(read_source(source.model_copy(update={"whole_files": False})))
