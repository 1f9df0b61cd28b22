"""Bytes and lines of files, decompressed; damage and absurd lengths are errors."""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from cpt_merge.core.errors import UserError

# pyarrow reads several frames in a file and notices a missing end, unlike the zstandard package
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
LONGEST_LINE = 1 << 30  # bytes
_BUFFER = 1 << 18
_SAMPLE = 1 << 22
_MAGIC = {  # how files of other kinds begin
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip data (.gz)",
    b"\x28\xb5\x2f\xfd": "zstd data (.zst)", b"BZh": "bzip2 data (.bz2)",
    b"\xfd7zXZ": "xz data (.xz)", b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet",
}  # fmt: skip
_CUT_OFF = ("Truncated compressed stream", "Compressed file ended before")  # pyarrow, lzma


def open_plain(file: Path) -> BinaryIO:
    """The decompressed bytes of a file."""
    raw = open(file, "rb", buffering=_BUFFER)  # noqa: SIM115 - closed with what is returned
    compression = COMPRESSIONS.get(file.suffix.lower())
    return _decompressed(raw, compression) if compression else raw


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == "xz":
        return cast(BinaryIO, io.BufferedReader(_XzStream(raw), _BUFFER))
    import pyarrow  # type: ignore[import-untyped]

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression)
    return cast(BinaryIO, io.BufferedReader(stream, _BUFFER))


class _XzStream(io.RawIOBase):
    """The decompressed bytes of xz streams; `lzma.open` ends without error where one is damaged."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._decoder = raw, lzma.LZMADecompressor()
        self._left = b""  # after the last stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder.eof and not self._begin_next():
                return 0
            compressed = b""
            if self._decoder.needs_input:
                compressed = self._left or self._raw.read(_BUFFER)
                self._left = b""
                if not compressed:
                    raise EOFError("Compressed file ended before its end")
            if content := self._decoder.decompress(compressed, len(buffer)):
                buffer[: len(content)] = content
                return len(content)

    def _begin_next(self) -> bool:
        """Whether another stream follows; zeros may be between them."""
        self._left = self._decoder.unused_data.lstrip(b"\0")
        while not self._left and (more := self._raw.read(_BUFFER)):
            self._left = more.lstrip(b"\0")
        self._decoder = lzma.LZMADecompressor() if self._left else self._decoder
        return bool(self._left)

    def close(self) -> None:
        self._raw.close()
        super().close()


def expansion(file: Path) -> float:
    """About how many times larger a file is when it is decompressed, by its first megabytes."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return 1.0
    with file_errors(file), open(file, "rb", buffering=0) as raw:
        stream = _decompressed(raw, compression)
        return len(stream.read(_SAMPLE)) / max(raw.tell(), 1)


@contextmanager
def file_errors(file: Path) -> Iterator[None]:
    """Turn the errors of decompression and of the disk into a `UserError` that names the file."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if reason.startswith(_CUT_OFF):
            raise UserError(
                f"{file} is cut off: its compressed data has no end; get it again."
            ) from error
        if "too much memory" in reason:
            raise UserError(
                f"{file} was compressed with a window that is too long; compress it again without "
                "--long or --ultra."
            ) from error
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from error
        raise UserError(f"{file} cannot be decompressed ({reason}); get it again.") from error


def lines(file: Path) -> Iterator[bytes]:
    """The lines of a file with their ends. Raises `UserError` for damage and endless lines."""
    with file_errors(file), open_plain(file) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"{file}: line {number} is longer than {LONGEST_LINE >> 20:,} MB; divide it."
                )
            yield line


def read_bytes(file: Path) -> bytes:
    """All bytes of a file. Raises `UserError` if it is damaged or longer than a line may be."""
    with file_errors(file), open_plain(file) as stream:
        content = stream.read(LONGEST_LINE + 1)
    if len(content) > LONGEST_LINE:
        raise UserError(f"{file} is one value of more than {LONGEST_LINE >> 20:,} MB; divide it.")
    return content


def not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    """The end of a sentence about bytes that are no UTF-8 text."""
    for magic, kind in _MAGIC.items():
        if content.startswith(magic):
            return f"is {kind} and not UTF-8"
    return f"is not UTF-8 (byte {error.start + 1}: {error.reason})"
