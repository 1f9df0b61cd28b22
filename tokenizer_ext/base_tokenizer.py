"""Read the tokenizers of the base and of the chat model, and check that they can be extended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.loaded import has_weights, open_model, text_section
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.checkpoint.sentencepiece_model import MODEL_FILE, NORMAL, Proto, is_tiktoken
from cpt_merge.checkpoint.tensor_kinds import vocabulary_rows
from cpt_merge.checkpoint.token_ids import SPECIALS_FILE, read_tokens, unlisted
from cpt_merge.checkpoint.tokenizer_files import read_settings, token_text
from cpt_merge.core.byte_alphabet import LETTERS
from cpt_merge.core.errors import UserError
from cpt_merge.tokenizer_ext.families.byte_level import ByteLevelBpe
from cpt_merge.tokenizer_ext.families.family import Family
from cpt_merge.tokenizer_ext.families.sentencepiece import (
    SentencePieceBpe,
    fast_content,
    merges_by_score,
    read_proto,
    role_tokens,
)
from cpt_merge.tokenizer_ext.families.tokenizer_json import (
    AddedToken,
    Content,
    added_tokens_of,
    build,
    ids_of,
    merges_of,
)

FAST_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class Base:
    """A tokenizer and the number of rows that its model's matrices have."""

    directory: Path
    rows: int  # of the embedding matrix; may be more than the tokenizer has ids
    content: Content  # tokenizer.json, or its equivalent made from tokenizer.model
    proto: Proto | None  # tokenizer.model, of SentencePiece bases
    settings: dict[str, Any]  # tokenizer_config.json, with the special tokens of other files
    family: Family

    @property
    def ids(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return ids_of(self.content)

    @property
    def rowless(self) -> dict[str, int]:
        """The added tokens without a row (Gemma-3 1B's `<image_soft_token>`): they get one."""
        return {token: id_ for token, id_ in self.ids.items() if id_ >= self.rows}


def read_base(directory: Path, rows: int | None = None) -> Base:
    """Read a base; `rows` defaults to the number in its config.json.

    Raises `UserError` if it cannot be extended, or if its files contradict each other.
    """
    content, proto = read_tokenizer(directory)
    read_tokens(directory)  # raises if two files disagree on a token or its id
    if disagreements(content, proto):
        content = _with_merges_of(proto, content)
    settings = _read_settings(directory, content, proto)
    _require_listed(directory, ids_of(content))
    content = {**content, "post_processor": _post_processor(content, settings)}
    rows = read_rows(directory) if rows is None else rows
    loaded = build(content)
    moved = [
        token for token in added_tokens_of(content) if loaded.token_to_id(token.content) != token.id
    ]
    if moved:
        raise UserError(
            f"{directory / FAST_FILE} lists {moved[0].content!r} at id {moved[0].id}, but it loads "
            f"as id {loaded.token_to_id(moved[0].content)}; add it to the model's vocab at its id."
        )
    _check_distinct(directory, content)
    added = {token.content for token in added_tokens_of(content)}
    ids = ids_of(content)
    beyond = [token for token, id_ in ids.items() if id_ >= rows and token not in added]
    if beyond:
        raise UserError(
            f"{directory}: the tokenizer has {', '.join(map(repr, beyond[:5]))} at ids beyond the "
            f"{rows} rows of "
            "config.json's vocab_size; use the tokenizer that belongs to these weights."
        )
    return Base(directory, rows, content, proto, settings, _family(directory, content, proto))


def check_pair(base: Path, chat: Path) -> None:
    """Raise `UserError` if the base's tokenizer cannot be extended together with the chat model's.

    Reads the files only, so that it is known before any text is counted.
    """
    read_chat_tokens(chat, read_base(base))


def read_chat_tokens(directory: Path, base: Base) -> list[AddedToken]:
    """The tokens that only the chat model's tokenizer has, with the chat model's ids.

    Raises `UserError` unless all of them are added tokens: otherwise the chat model was not tuned
    from this base.
    """
    content, _ = read_tokenizer(directory)
    _require_listed(directory, read_tokens(directory).ids)  # raises if two files disagree
    _check_distinct(directory, content)
    known = base.ids
    added = {token.content: token for token in added_tokens_of(content)}
    own = {token: id_ for token, id_ in ids_of(content).items() if token not in known}
    pieces = [token for token in own if token not in added]
    special = {token.content for token in added_tokens_of(base.content)}
    lost = known.keys() - ids_of(content).keys() - special
    for some, what in ((pieces, "that the base's lacks"), (sorted(lost), "of the base's less")):
        if some:
            raise UserError(
                f"the chat tokenizer in {directory} has {len(some)} pieces {what} "
                f"({', '.join(map(repr, some[:5]))}); use the base that the chat model was tuned "
                "from."
            )
    return sorted((added[token] for token in own), key=lambda token: token.id)


def _require_listed(directory: Path, known: Collection[str]) -> None:
    """Raise `UserError` if only the settings name a special token: loaders choose its id."""
    problem = unlisted(directory, known)
    if problem:
        raise UserError(f"{problem}.")


def _check_shape(fast: Path, content: Content) -> None:
    """Raise `UserError` for an incomplete `tokenizer.json`, or one that `tokenizers` refuses."""
    model = content["model"]
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise UserError(f"{fast} has no vocab or no merges in its model; download it again.")
    if not isinstance(content.get("added_tokens"), list):
        raise UserError(f"{fast} has no list of added_tokens; download it again.")
    try:
        build(content)
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{fast} is damaged ({error}); download it again.") from None


def _check_distinct(directory: Path, content: Content) -> None:
    """Raise `UserError` if two tokens have the same id: they would share a row."""
    names: dict[int, str] = {}
    for token, id_ in ids_of(content).items():
        if id_ in names:
            raise UserError(
                f"{directory}: the tokens {names[id_]!r} and {token!r} have the same id {id_}; "
                "correct one."
            )
        names[id_] = token


def read_rows(directory: Path) -> int:
    """The rows of a model, from its config.json, or from its weights if that leaves them out.

    Raises `UserError` if neither says it.
    """
    rows = text_section(read_json(directory / "config.json")).get("vocab_size")
    if rows is None and has_weights(directory):
        rows = vocabulary_rows(open_model(directory))
    if not isinstance(rows, int) or rows < 1:
        raise UserError(
            f"{directory / 'config.json'} has no vocab_size that is a number; give the directory "
            "of a Hugging Face model."
        )
    return rows


def _read_settings(directory: Path, content: Content, proto: Proto | None) -> dict[str, Any]:
    """The settings, completed from `tokenizer.model`.

    With `tokenizer.model` only, a text begins with `<s>` by default, as in LlamaTokenizer.
    """
    settings = role_tokens(proto) if proto is not None else {}
    if not (directory / FAST_FILE).is_file():
        settings["add_bos_token"] = True
    settings |= read_settings(directory)
    ids = ids_of(content)
    for role in (f"{name}_token" for name in ROLES):
        token = token_text(settings.get(role))
        if token is not None and token not in ids:
            raise UserError(
                f"{directory / SETTINGS_FILE} or {SPECIALS_FILE} names the {role} {token!r}, which "
                "the tokenizer does not have; correct it there."
            )
    return settings


def read_tokenizer(directory: Path) -> tuple[Content, Proto | None]:
    """The content of `tokenizer.json`, or its equivalent made from `tokenizer.model`, and the
    parsed `tokenizer.model`.

    Raises `UserError` if both are missing, or if one is damaged or not BPE.
    """
    fast, model = directory / FAST_FILE, directory / MODEL_FILE
    if not fast.is_file() and not model.is_file():
        raise UserError(
            f"{directory} holds neither {FAST_FILE} nor {MODEL_FILE}; download the model's "
            "tokenizer."
        )
    ignored = fast.is_file() and model.is_file() and is_tiktoken(model)  # loaders ignore it, too
    proto = read_proto(model) if model.is_file() and not ignored else None
    if not fast.is_file():
        return _with_added_tokens(fast_content(proto, model), directory), proto
    # Truncation and padding are settings of one use, not of the vocabulary.
    content = {**read_json(fast), "truncation": None, "padding": None}
    parts = content.get("model") or {}
    kind = parts.get("type", "BPE" if "merges" in parts else "unknown")  # old files omit the type
    if kind != "BPE":
        raise UserError(
            f"{fast} is a {kind} tokenizer; only BPE can be extended, so choose a base with one."
        )
    _check_shape(fast, content)
    return content, proto


def _with_added_tokens(content: Content, directory: Path) -> Content:
    """`content` with the added tokens that a directory without `tokenizer.json` lists in other
    files.
    """
    settings, listed = directory / SETTINGS_FILE, directory / "added_tokens.json"
    described = read_json(settings).get("added_tokens_decoder", {}) if settings.is_file() else {}
    tokens = {token["content"]: AddedToken(int(id_), **token) for id_, token in described.items()}
    ids = read_json(listed) if listed.is_file() else {}
    tokens |= {token: AddedToken(id_, token) for token, id_ in ids.items() if token not in tokens}
    known = ids_of(content)
    new = [asdict(token) for name, token in tokens.items() if name not in known]
    return {**content, "added_tokens": [*content["added_tokens"], *new]}


def disagreements(content: Content, proto: Proto | None) -> list[str]:
    """Differences in ids or merges between `tokenizer.json` and `tokenizer.model`, whose scores
    give the order.
    """
    if proto is None:
        return []
    ids = ids_of(content)
    moved = [
        f"{piece.piece!r} (id {id_} and {ids.get(piece.piece)})"
        for id_, piece in enumerate(proto.pieces)
        if ids.get(piece.piece) != id_
    ]
    if moved:
        return moved
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    products = [left + right for left, right in merges_of(content) if left + right in scores]
    missing = {left + right for left, right in merges_by_score(proto)} - set(products)
    early = [after for before, after in pairwise(products) if scores[before] < scores[after]]
    return [f"the merges of {piece!r}" for piece in [*sorted(missing), *early]]


def _with_merges_of(proto: Proto, content: Content) -> Content:
    """`content` with the merges in the order of SentencePiece's scores.

    transformers 5 orders the merges of a LLaMA-2 that it saves again by id, so that runs of spaces
    merge before all words. The base was trained with the order of its scores.
    """
    ordered = merges_by_score(proto)
    known = set(ordered)
    others = [merge for merge in merges_of(content) if merge not in known]
    merges = [list(merge) for merge in [*ordered, *others]]
    return {**content, "model": {**content["model"], "merges": merges}}


def _family(directory: Path, content: Content, proto: Proto | None) -> Family:
    model = content["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            f"{directory} holds a BPE tokenizer that marks parts of words; choose a base without "
            "such marks."
        )
    if model.get("byte_fallback"):
        return SentencePieceBpe(content, proto)
    if proto is None and has_byte_level(content.get("pre_tokenizer")):
        missing = [
            byte
            for byte, letter in LETTERS.items()
            if byte not in NEVER_IN_UTF8 and letter not in model["vocab"]
        ]
        if missing:
            raise UserError(
                f"{directory} holds a byte-level tokenizer without {len(missing)} of the bytes of "
                "UTF-8, so it cannot spell every text; choose a base that has them all."
            )
        return ByteLevelBpe(content)
    raise UserError(
        f"{directory} holds a BPE tokenizer that is neither byte-level nor has byte fallback; "
        "choose a base that is."
    )


def has_byte_level(part: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer of `tokenizer.json`, or a part of it, writes bytes as letters."""
    if part is None:
        return False
    return part["type"] == "ByteLevel" or any(map(has_byte_level, part.get("pretokenizers", ())))


def _post_processor(content: Content, settings: dict[str, Any]) -> Any:
    """A post-processor that adds what `add_bos_token` and `add_eos_token` ask for.

    `PreTrainedTokenizerFast` reads these two keys in transformers 5 but not in 4; both read a
    post-processor in tokenizer.json.
    """
    roles = [role for role in ("bos", "eos") if settings.get(f"add_{role}_token") is not None]
    if not roles:
        return content.get("post_processor")
    tokens = {
        role: token_text(settings.get(f"{role}_token"))
        for role in roles
        if settings[f"add_{role}_token"]
    }
    wanted = {role: token for role, token in tokens.items() if token is not None}
    ids = ids_of(content)
    if build(content).encode("").ids == [ids[token] for token in wanted.values()]:
        return content.get("post_processor")
    return _template(wanted, ids)


def _template(wanted: dict[str, str], ids: dict[str, int]) -> dict[str, Any]:
    """A TemplateProcessing that puts the wanted tokens (`bos`, `eos` -> token) around a text."""

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        def special(name: str) -> list[dict[str, Any]]:
            return (
                [{"SpecialToken": {"id": wanted[name], "type_id": type_id}}]
                if name in wanted
                else []
            )

        return [
            *special("bos"),
            {"Sequence": {"id": sequence, "type_id": type_id}},
            *special("eos"),
        ]

    described = {
        token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in wanted.values()
    }
    single = around("A", 0)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + around("B", 1),
        "special_tokens": described,
    }
