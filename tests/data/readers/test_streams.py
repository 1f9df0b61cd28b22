"""Compressed files: all of them, or an error."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.readers import streams
from cpt_merge.data.readers.streams import lines, read_bytes

LINES = [f"{number} {number * number}\n".encode() for number in range(20_000)]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_files_of_several_frames_are_read_to_their_end(tmp_path: Path, ending: str) -> None:
    compress, file = COMPRESS[ending], tmp_path / f"a.txt.{ending}"
    file.write_bytes(compress(b"".join(LINES[:9000])) + compress(b"".join(LINES[9000:])))
    assert list(lines(file)) == LINES
    assert read_bytes(file) == b"".join(LINES)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.txt.{ending}"
    content = COMPRESS[ending](b"".join(LINES))
    for length in (len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"a\.txt\.{ending} is cut off"):
            list(lines(file))
    file.write_bytes(b"not compressed")
    with pytest.raises(UserError, match=rf"a\.txt\.{ending} cannot be decompressed"):
        list(lines(file))


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_damaged_frame_after_a_whole_one_is_an_error(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.txt.{ending}"
    content = COMPRESS[ending](b"".join(LINES))
    file.write_bytes(content + b"damaged" + content[7:])
    with pytest.raises(UserError, match=rf"a\.txt\.{ending} cannot be decompressed"):
        list(lines(file))


def test_zeros_between_xz_streams_are_no_text(tmp_path: Path) -> None:
    halves = [lzma.compress(b"".join(half)) for half in (LINES[:9000], LINES[9000:])]
    (tmp_path / "a.txt.xz").write_bytes(bytes(4 << 20).join(halves) + bytes(4))
    assert list(lines(tmp_path / "a.txt.xz")) == LINES


def test_an_endless_line_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"x\n" + (1 << 20) * b"y" + b"\n")
    with pytest.raises(UserError, match=r"a\.txt: line 2 is longer than 1 MB"):
        list(lines(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"a\.txt is one value of more than 1 MB"):
        read_bytes(tmp_path / "a.txt")
