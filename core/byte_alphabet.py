"""The alphabet in which byte-level BPE writes UTF-8: one printable letter per byte."""

from __future__ import annotations


def _byte_letters() -> dict[int, str]:
    """GPT-2's `bytes_to_unicode`: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + rank) for rank, byte in enumerate(others)
    }


LETTERS = _byte_letters()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def to_bytes(piece: str) -> bytes:
    """The bytes that a piece stands for. Raises `KeyError` for special tokens and the like."""
    return bytes(map(BYTES.__getitem__, piece))
