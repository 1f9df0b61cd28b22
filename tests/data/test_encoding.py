"""The choice of an encoder for a tokenizer, and the comparison with the library."""

from __future__ import annotations

import re
from functools import partial

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from cpt_merge.core.errors import UserError
from cpt_merge.data import encoding
from cpt_merge.data.byte_level_encoder import ByteLevelEncoder
from cpt_merge.data.encoders import LibraryEncoder
from cpt_merge.data.encoding import VerifiedEncoder, text_encoder
from cpt_merge.data.long_texts import cut
from tests.data.test_byte_level_encoder import trained


def test_byte_level_bpe_goes_by_tiktoken_and_others_by_the_library() -> None:
    shortcut = text_encoder(trained(), "uint16")
    assert isinstance(shortcut, VerifiedEncoder)
    assert isinstance(shortcut.shortcut, ByteLevelEncoder)
    words = Tokenizer(models.WordLevel({"we": 0, "go": 1}, unk_token="go"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.normalizer = normalizers.Lowercase()
    encoder = text_encoder(words, "uint16")
    assert isinstance(encoder, LibraryEncoder)
    assert encoder.encode(["We go"]) == [b"\0\0\1\0"]


def test_a_shortcut_that_is_wrong_after_all_ends_the_stage() -> None:
    library = LibraryEncoder(trained(), "uint16")

    class Wrong:
        border = re.compile("(?= )")

        def encode_parts(self, parts: list[str]) -> bytes:
            return b""

        def encode(self, texts: list[str]) -> list[bytes]:
            return [b"" for _ in texts]

    with pytest.raises(
        UserError, match="the shortcut to the tokens of 'we go' is wrong; report this bug"
    ):
        VerifiedEncoder(Wrong(), library).encode(["we go", "a longer text"])


def test_no_part_of_a_long_text_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    library = LibraryEncoder(trained(), "uint16")
    long, short = 3000 * "we go, and see。天地 ", "we go"
    expected = library.encode([long, short, ""])
    monkeypatch.setattr(encoding, "LONGEST", 1000)
    monkeypatch.setattr(encoding, "cut", partial(cut, longest=1000))
    encoder = text_encoder(library.backend, "uint16")
    longest, encode = 0, LibraryEncoder.encode

    def watched(self: LibraryEncoder, texts: list[str]) -> list[bytes]:
        nonlocal longest
        longest = max([longest, *map(len, texts)])
        return encode(self, texts)

    monkeypatch.setattr(LibraryEncoder, "encode", watched)
    assert encoder.encode([long, short, ""]) == expected
    assert encoder.encode([long]) == expected[:1]
    assert longest < 1100
