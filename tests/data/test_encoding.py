"""The choice of an encoder for a tokenizer, and the comparison with the library."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from cpt_merge.core.errors import UserError
from cpt_merge.data.byte_level_encoder import ByteLevelEncoder
from cpt_merge.data.encoders import LibraryEncoder
from cpt_merge.data.encoding import VerifiedEncoder, text_encoder
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
        def encode(self, texts: list[str]) -> list[bytes]:
            return [b"" for _ in texts]

    with pytest.raises(
        UserError, match="the shortcut to the tokens of 'we go' is wrong; report this bug"
    ):
        VerifiedEncoder(Wrong(), library).encode(["we go", "a longer text"])
