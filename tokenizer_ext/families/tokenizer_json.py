"""`tokenizer.json`: read the parts of a BPE tokenizer, and extend them without moving existing
entries.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

Content = dict[str, Any]  # of a tokenizer.json
Merge = tuple[str, str]


@dataclass(frozen=True)
class AddedToken:
    """An entry of `added_tokens`: a token that is cut out of the text before the model sees it."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


def build(content: Content) -> Tokenizer:
    """The tokenizer that a `tokenizer.json` describes."""
    return Tokenizer.from_str(json.dumps(content))


def build_model(content: Content) -> Tokenizer:
    """Only the merges: no normalizer (so no dummy prefix), no pre-tokenizer, no added tokens, no
    `ignore_merges`.
    """
    bare: Content = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
    }
    return build({**content, **bare, "model": {**content["model"], "ignore_merges": False}})


def merges_of(content: Content) -> list[Merge]:
    """The merges in order, from the old (`"a b"`) or the new format (`["a", "b"]`)."""
    pairs = (
        merge.split(" ") if isinstance(merge, str) else merge
        for merge in content["model"]["merges"]
    )
    return [(left, right) for left, right in pairs]


def added_tokens_of(content: Content) -> list[AddedToken]:
    """The added tokens, by id."""
    return sorted(
        (AddedToken(**token) for token in content["added_tokens"]), key=lambda token: token.id
    )


def ids_of(content: Content) -> dict[str, int]:
    """Token -> id, added tokens included."""
    return {
        **content["model"]["vocab"],
        **{token["content"]: token["id"] for token in content["added_tokens"]},
    }


def splits(piece: str, vocabulary: Collection[str]) -> Iterator[Merge]:
    """Every way to spell `piece` as two pieces."""
    for cut in range(1, len(piece)):
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary:
            yield piece[:cut], piece[cut:]


def extend_model(content: Content, pieces: Mapping[str, int], settled: int) -> Content:
    """`content` with new pieces (piece -> id, in the order of their merges).

    Every split of a new piece is a merge, after the first `settled` old merges. With all splits,
    merging by rank equals merging by concatenated string, as SentencePiece does. Old merges do not
    change.
    """
    vocabulary = {**content["model"]["vocab"], **pieces}
    old = [list(merge) for merge in merges_of(content)]
    new = [
        list(merge)
        for piece in pieces
        for merge in sorted(splits(piece, vocabulary), key=lambda two: [vocabulary[x] for x in two])
    ]
    return {
        **content,
        "model": {
            **content["model"],
            "vocab": vocabulary,
            "merges": old[:settled] + new + old[settled:],
        },
    }


def add_tokens(content: Content, tokens: Sequence[AddedToken]) -> Content:
    """`content` with more added tokens, and with every added token in the model's vocabulary as
    well.

    Otherwise `tokenizers` numbers added tokens from the size of the vocabulary on, and a larger
    vocabulary moves all of them (256 of LLaMA-3's 256).
    """
    added = [*added_tokens_of(content), *tokens]
    vocabulary = {**content["model"]["vocab"], **{token.content: token.id for token in added}}
    by_id = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    tokens_by_id = [asdict(token) for token in sorted(added, key=lambda token: token.id)]
    return {**content, "added_tokens": tokens_by_id, "model": {**content["model"], "vocab": by_id}}


def look_up_whole_words(content: Content) -> Content:
    """`content` with `ignore_merges`, if this changes no ids: pre-tokens that are pieces are looked
    up, not merged.

    It changes none if all pieces merge to themselves and no added token can be a pre-token. English
    is then encoded a third faster (benchmarks/tokenizer.py).
    """
    if content.get("pre_tokenizer") is None or content["model"].get("ignore_merges"):
        return content
    added = [token["content"] for token in content["added_tokens"]]
    pieces = list(content["model"]["vocab"].keys() - set(added))
    tokenizer = build(content)
    merged = build_model(content).encode_batch_fast(pieces, add_special_tokens=False)
    whole = all(len(encoding.ids) == 1 for encoding in merged)
    apart = all(len(tokenizer.pre_tokenizer.pre_tokenize_str(token)) > 1 for token in added)
    return (
        {**content, "model": {**content["model"], "ignore_merges": True}}
        if whole and apart
        else content
    )
