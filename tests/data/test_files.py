"""Which files a path names."""

import os
import tempfile
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.files import find_files


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "x"}\n')


def found(path: Path, root: Path, whole_files: bool = False) -> list[str]:
    return [str(file.relative_to(root)) for file in find_files(str(path), whole_files)]


def test_hidden_files_are_left_out_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = (".cache/b.jsonl", "._a.jsonl", "sub/.ipynb_checkpoints/a.jsonl", ".b.txt")
    make(tmp_path, "a.jsonl", "sub/c.jsonl.gz", "README.md", *hidden)
    assert found(tmp_path, tmp_path) == ["a.jsonl", "sub/c.jsonl.gz"]
    said = capsys.readouterr().err
    assert "leaving out 4 hidden files (" in said
    assert "leaving out 1 other file (README.md)" in said
    assert found(tmp_path / "**" / "*.jsonl", tmp_path) == ["a.jsonl"]
    assert found(tmp_path / ".cache" / "*", tmp_path) == [".cache/b.jsonl"]


def test_a_file_next_to_its_compressed_copy_is_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "a.jsonl", "a.jsonl.gz", "b/a.jsonl", "c.jsonl.zst", "c.jsonl.xz")
    for path in (tmp_path, tmp_path / "**" / "*"):
        assert len(found(path, tmp_path)) == 5
        said = " ".join(capsys.readouterr().err.split())
        assert "2 files will be read in more than one form, such as a.jsonl and a.jsonl.gz" in said
    assert len(found(tmp_path / "*.jsonl", tmp_path)) == 1
    assert capsys.readouterr().err == ""


def test_a_folder_is_hidden_only_below_the_path_itself(tmp_path: Path) -> None:
    root = tmp_path / ".data"
    make(root, "a.jsonl")
    assert found(root, root) == ["a.jsonl"]


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    make(tmp_path, "text/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "text" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "text")
    assert found(tmp_path / "text", tmp_path) == ["text/a.jsonl", "text/more/b.jsonl"]


def test_a_link_to_nothing_is_text_that_is_missing(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / ".#a.jsonl").symlink_to("of-an-editor")
    (tmp_path / "latest").symlink_to("nowhere")
    assert found(tmp_path, tmp_path) == ["a.jsonl"]
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"b\.jsonl is a link to nothing"):
            found(path, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_that_may_not_be_read_is_an_error() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        make(root, "a.jsonl", "secret/b.jsonl")
        (root / "secret").chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="secret cannot be read: Permission denied"):
                find_files(name)
        finally:
            os.seteuid(0)


def test_a_name_may_contain_the_signs_of_a_wildcard(tmp_path: Path) -> None:
    make(tmp_path, "[2024] news.jsonl", "2 news.jsonl")
    assert found(tmp_path / "[2024] news.jsonl", tmp_path) == ["[2024] news.jsonl"]
    assert found(tmp_path / "[2]*", tmp_path) == ["2 news.jsonl"]


def test_folders_that_match_are_read_if_they_are_named_like_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "a.jsonl", "b.jsonl/part-0.jsonl", "b.jsonl/_SUCCESS", "c/d.jsonl")
    assert found(tmp_path / "*", tmp_path) == ["a.jsonl", "b.jsonl/part-0.jsonl"]
    assert "leaving out 1 folder (c)" in capsys.readouterr().err
    assert found(tmp_path / "**" / "*.jsonl", tmp_path) == [
        "a.jsonl", "b.jsonl/part-0.jsonl", "c/d.jsonl"
    ]  # fmt: skip


def test_markdown_is_text_only_where_files_are_documents(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.md", "c.jsonl")
    assert found(tmp_path, tmp_path) == ["a.txt", "c.jsonl"]
    assert found(tmp_path, tmp_path, whole_files=True) == ["a.txt", "b.md"]


def test_what_datasets_saved_is_its_arrow_files_in_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": [str(number) for number in range(12)]})
    one.save_to_disk(str(tmp_path / "one"), num_shards=11)
    names = [file.name for file in find_files(str(tmp_path / "one"))]
    assert names == [f"data-{number:05d}-of-00011.arrow" for number in range(11)]
    datasets.DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / "both"))
    assert found(tmp_path / "both", tmp_path) == ["both/train/data-00000-of-00001.arrow"]
    with pytest.raises(UserError, match="has the splits train, test and no 'dev'"):
        find_files(str(tmp_path / "both"), split="dev")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("state.json", "{", r"state\.json cannot be read"),
        ("state.json", "{}", r"state\.json has no list '_data_files'"),
        ("state.json", '{"_data_files": ["a.arrow"]}', r"state\.json has no list '_data_files'"),
        ("state.json", '{"_data_files": [{"filename": "a.arrow"}]}', r"lists a\.arrow, which is"),
        ("dataset_dict.json", "{", r"dataset_dict\.json cannot be read"),
        ("dataset_dict.json", '{"splits": 3}', r"dataset_dict\.json has no list 'splits'"),
    ],
)
def test_damage_to_what_datasets_saved_is_one_sentence(
    tmp_path: Path, file: str, content: str, sentence: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        find_files(str(tmp_path))


def test_a_path_without_text_is_named(tmp_path: Path) -> None:
    make(tmp_path, "folder/a.pdf")
    for path, sentence in (
        (str(tmp_path / "folder"), "contains no .jsonl, "),
        (str(tmp_path / "nowhere.jsonl"), "does not exist"),
        (str(tmp_path / "*.jsonl"), "no file matches"),
        ("nowhere.md", "does not exist"),
        ("./nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            find_files(path)
    assert find_files("org/dataset") == []
