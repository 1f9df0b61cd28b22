"""SentencePiece's `tokenizer.model`: its pieces and their types."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError

MODEL_FILE = "tokenizer.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type

Proto = Any  # sentencepiece.ModelProto; protobuf generates the class at import

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def parse_proto(path: Path) -> Proto:
    """Parse a SentencePiece model of any kind. Raises `UserError` if it is missing or damaged."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path.") from None
    except DecodeError:
        raise UserError(
            f"{path} is not a SentencePiece model, or is damaged; download it again."
        ) from None
    if not proto.pieces:
        raise UserError(f"{path} holds no pieces; download it again.")
    return proto


def is_tiktoken(path: Path) -> bool:
    """Whether the file is in tiktoken's format: a line for each token, base64 and rank.

    Meta and Moonshot publish such files under SentencePiece's name, next to a tokenizer.json.
    """
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.match(file.read(1 << 10)) is not None
