"""SentencePiece BPE with byte fallback (LLaMA-2, Mistral, TinyLlama):

`tokenizer.model`, and its `tokenizer.json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.sentencepiece_model import (
    BYTE,
    CONTROL,
    MODEL_FILE,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Proto,
    parse_proto,
)
from cpt_merge.core.errors import UserError
from cpt_merge.tokenizer_ext.families.tokenizer_json import (
    AddedToken,
    Content,
    added_tokens_of,
    merges_of,
    splits,
)
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.learn.word_counts import Splitter, Words

SPACE = "▁"
BPE_MODEL = 2  # TrainerSpec.ModelType
EXACT = 2.0**24  # float32 has every integer up to here; LLaMA-2 scores whitespace runs -1e9

_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Runs:
    """The runs of the scripts in a text, each with a preceding space where the script separates
    words by spaces.

    A document begins with a space, like the dummy prefix.
    """

    scripts: Scripts

    def __call__(self, text: str) -> list[str]:
        """Those of one document."""
        runs: list[str] = self.scripts.word.findall(SPACE + text.replace(" ", SPACE))
        return runs


class SentencePieceBpe:
    """A base whose `tokenizer.json` has byte fallback;

    `proto` is its `tokenizer.model`, if there is one.
    """

    name = "SentencePiece BPE"

    def __init__(self, content: Content, proto: Proto | None) -> None:
        self._content = content
        self._proto = proto
        pieces = [] if proto is None else proto.pieces
        self._lowest = {
            piece.piece for piece in pieces if piece.type == NORMAL and piece.score < -EXACT
        }

    def splitter(self, scripts: Scripts) -> Splitter:
        """Runs of the scripts."""
        return Runs(scripts)

    def admits(self, scripts: Scripts, max_length: int) -> Callable[[str], bool]:
        """Any part of a run, up to the maximum length."""
        return lambda piece: len(piece.removeprefix(SPACE)) <= max_length

    def needed_characters(
        self, words: Words, coverage: float, vocabulary: Collection[str]
    ) -> dict[str, int]:
        """The most frequent characters that make up `coverage` of the text, without those in the
        vocabulary.

        Every character of a piece must be a piece: SentencePiece would merge other characters, but
        `tokenizers` turns them into bytes first.
        """
        counts = words.characters()
        needed: dict[str, int] = {}
        covered, total = 0, counts.total()
        for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            if covered >= coverage * total:
                break
            covered += count
            if character not in vocabulary:
                needed[character] = count
        return needed

    def is_one_word(self, text: str) -> bool:
        """Always true: nothing is cut, and only spaces change."""
        return True

    def spells(self, piece: str) -> bool:
        """Whether it is not a byte."""
        return not _BYTE.fullmatch(piece)

    def settled(self) -> int:
        """All merges except those of whitespace runs at the end, which LLaMA-2 scores far below
        every word.
        """
        merges = merges_of(self._content)
        while merges and self._ranks_last("".join(merges[-1])):
            merges.pop()
        return len(merges)

    def _ranks_last(self, piece: str) -> bool:
        """Whether it is scored below every word; without `tokenizer.model`, whether it is a
        whitespace run.
        """
        return piece in self._lowest if self._proto is not None else not piece.strip(SPACE)

    def written(self, text: str) -> str:
        """With `▁` for spaces."""
        return text.replace(" ", SPACE)

    def spelt(self, piece: str) -> bytes:
        """Its UTF-8, or its byte."""
        byte = _BYTE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.encode()

    def readable(self, piece: str) -> str:
        """`▁` as a space, `<0xE4>` as `<E4>`."""
        byte = _BYTE.fullmatch(piece)
        return f"<{byte[1]}>" if byte else piece.replace(SPACE, " ")

    def write_model(self, content: Content, pieces: dict[str, int], rows: int, out: Path) -> None:
        """Write `tokenizer.model` if the base has one."""
        if self._proto is not None:
            (out / MODEL_FILE).write_bytes(
                extend_proto(self._proto, content, pieces, rows).SerializeToString()
            )


def read_proto(path: Path) -> Proto:
    """Parse a base's `tokenizer.model`.

    Raises `UserError` if it is damaged or not BPE with byte fallback.
    """
    proto = parse_proto(path)
    if proto.trainer_spec.model_type != BPE_MODEL:
        kind = proto.trainer_spec.DESCRIPTOR.enum_types_by_name["ModelType"].values_by_number
        name = kind[proto.trainer_spec.model_type].name
        raise UserError(
            f"{path} is a {name} model; only BPE can be extended, so choose a base with a BPE "
            "tokenizer."
        )
    if not any(piece.type == BYTE for piece in proto.pieces):
        raise UserError(
            f"{path} has no byte fallback, so it cannot spell every text; choose a base that has "
            "it."
        )
    return proto


def processor(proto: Proto) -> Any:
    """SentencePiece's own tokenizer."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def extend_proto(proto: Proto, content: Content, pieces: dict[str, int], rows: int) -> Proto:
    """A copy of `proto` with a piece for every id below `rows`, named as in `content`. Old pieces
    do not change.

    Scores of new pieces are distinct integers below the lowest score of an old merge, so old merges
    come first and no two scores are equal in float32. Added tokens are CONTROL pieces if they are
    special, else USER_DEFINED.
    """
    extended = type(proto)()
    extended.CopyFrom(proto)
    score = _lowest_score(proto)
    if score - len(pieces) < -EXACT:
        raise UserError(
            f"the scores of {MODEL_FILE} go down to {score:g}; {len(pieces)} more are not exact in "
            "float32."
        )
    scores = {id_: score - number for number, id_ in enumerate(pieces.values(), start=1)}
    names = {id_: token for token, id_ in content["model"]["vocab"].items()}
    special = {token.id: token.special for token in added_tokens_of(content)}
    for id_ in range(len(proto.pieces), rows):
        piece = extended.pieces.add()
        piece.piece = names[id_]
        piece.score = scores.get(id_, 0.0)
        piece.type = NORMAL if id_ in scores else CONTROL if special[id_] else USER_DEFINED
    extended.trainer_spec.vocab_size = rows
    return extended


def _lowest_score(proto: Proto) -> float:
    """The lowest score of a merge, rounded down.

    Lower scores than -EXACT are those of whitespace runs.
    """
    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    return float(math.floor(min(score for score in scores if score >= -EXACT)))


def fast_content(proto: Proto, path: Path) -> Content:
    """The `tokenizer.json` for a base that has only `tokenizer.model`.

    As in the original LLaMA conversion, the normalizer prepends and replaces, and there is no
    pre-tokenizer. (The `LlamaTokenizer` of transformers 5 uses Metaspace instead, which loses one
    leading space.)
    """
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise UserError(
            f"{path} normalizes text ({spec.name}), which has no exact counterpart in "
            "tokenizer.json; put the base's own tokenizer.json next to it."
        )
    vocabulary = {piece.piece: id_ for id_, piece in enumerate(proto.pieces)}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if spec.add_dummy_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = (
        [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spec.add_dummy_prefix else []
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [vars(token) for token in _added_tokens(proto)],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(merge) for merge in merges_by_score(proto)],
        },
    }


def role_tokens(proto: Proto) -> dict[str, Any]:
    """`bos_token`, `eos_token` and `unk_token`, as `tokenizer_config.json` names them."""
    spec = proto.trainer_spec
    tokens = {
        "bos_token": (spec.bos_id, spec.bos_piece),
        "eos_token": (spec.eos_id, spec.eos_piece),
        "unk_token": (spec.unk_id, spec.unk_piece),
    }
    return {role: piece for role, (id_, piece) in tokens.items() if id_ >= 0}


def _added_tokens(proto: Proto) -> list[AddedToken]:
    kinds = (UNKNOWN, CONTROL, USER_DEFINED)
    return [
        AddedToken(id_, piece.piece, special=piece.type != USER_DEFINED)
        for id_, piece in enumerate(proto.pieces)
        if piece.type in kinds
    ]


def merges_by_score(proto: Proto) -> list[tuple[str, str]]:
    """All splits of all pieces, by descending score of the piece, then by the ids of the halves.

    Pieces of equal score (LLaMA-2's whitespace runs) come longest first. SentencePiece merges the
    leftmost of equal candidates, so a run grows from its left end; merging by rank does the same
    only if growing a run ranks before starting another.
    """
    ids = {piece.piece: id_ for id_, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    merges = [
        (-proto.pieces[id_].score, -len(piece), ids[left], ids[right], left, right)
        for piece, id_ in ids.items()
        for left, right in splits(piece, ids)
    ]
    return [(left, right) for *_, left, right in sorted(merges)]
