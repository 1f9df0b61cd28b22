"""The invariants of an extended tokenizer, proven on the files that were written.

Each invariant is one function of a `Case`, which holds everything that was read back from disk. The
function counts its checks and lists the failures. All of them together prove the project's
invariant "old ids fixed".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, zip_longest
from pathlib import Path

import regex
from tokenizers import Tokenizer

from cpt_merge.checkpoint.sentencepiece_model import NORMAL, Proto
from cpt_merge.checkpoint.tokenizer_files import SPECIAL_ROLES, TokenizerFiles, token_text
from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import script_pattern
from cpt_merge.core.progress import Meter
from cpt_merge.tokenizer_ext.base_tokenizer import FAST_FILE, Base, disagreements, read_tokenizer
from cpt_merge.tokenizer_ext.families.sentencepiece import processor
from cpt_merge.tokenizer_ext.families.tokenizer_json import (
    Content,
    add_tokens,
    added_tokens_of,
    build,
    build_model,
    ids_of,
    merges_of,
)
from cpt_merge.tokenizer_ext.verify.samples import Samples

CONVERSATION = [
    {"role": "user", "content": "Hello! What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Thank you."},
]
_WORD = regex.compile(r"[\p{L}\p{M}]+")
SHOWN = 5  # examples in a message


@dataclass(frozen=True)
class Proof:
    """The result for one invariant: the number of checks, and a line for each failure."""

    invariant: str
    checked: int
    failures: list[str]


@dataclass(frozen=True)
class Case:
    """An extended tokenizer as read from disk, and what it is compared with."""

    base: Base
    directory: Path
    content: Content
    proto: Proto | None
    pieces: dict[str, int]  # pieces of the model that the base lacks
    map: VocabularyMap | None  # None for a tokenizer that another tool made
    chat: Path | None
    samples: Samples

    @cached_property
    def names(self) -> dict[int, str]:
        """Id -> token, of the extended tokenizer."""
        return {id_: token for token, id_ in ids_of(self.content).items()}

    def name_of(self, id_: int | None) -> str:
        """A token for a message: how it reads, and its id."""
        if id_ is None:
            return "nothing"
        return (
            f"{self.base.family.readable(self.names[id_])!r} ({id_})"
            if id_ in self.names
            else f"id {id_}"
        )

    @cached_property
    def before(self) -> Tokenizer:
        """The base's tokenizer."""
        return build(self.base.content)

    @cached_property
    def after(self) -> Tokenizer:
        """The extended tokenizer."""
        fast = self.directory / FAST_FILE
        return Tokenizer.from_file(str(fast)) if fast.is_file() else build(self.content)


def read_case(base: Base, directory: Path, chat: Path | None, samples: Samples) -> Case:
    """Read an extended tokenizer back from its directory."""
    content, proto = read_tokenizer(directory)
    map_ = VocabularyMap.load(directory)
    return Case(
        base,
        directory,
        content,
        proto,
        {piece.piece: piece.id for piece in map_.new},
        map_,
        chat,
        samples,
    )


def prove(case: Case) -> list[Proof]:
    """Check every invariant."""
    proofs = []
    with Meter("proving the tokenizer", len(INVARIANTS), "invariants") as meter:
        for invariant in INVARIANTS:
            proofs.append(invariant(case))
            meter.advance()
    return proofs


def require(proofs: Sequence[Proof]) -> None:
    """Raise a `UserError` that names the tokens or texts that break the first broken invariant."""
    for proof in proofs:
        if proof.failures:
            raise UserError(
                f"the extended tokenizer breaks the invariant that {proof.invariant}: "
                f"{len(proof.failures)} times in "
                f"{proof.checked} checks ({'; '.join(proof.failures[:SHOWN])}); "
                "nothing was kept; choose another base, or report this."
            )


def old_ids_stay(case: Case) -> Proof:
    """Every token of the base keeps its id, and the old merges keep their order.

    SentencePiece's scores leave the order of some merges open (LLaMA-2's runs of spaces have one
    score), so files that are made from them may differ there.
    """
    ids = ids_of(case.content)
    old = case.base.ids
    failures = [
        f"{token!r} moved from {id_} to {ids.get(token)}"
        for token, id_ in old.items()
        if ids.get(token) != id_
    ]
    open_ = _pieces_of_equal_score(case.proto if case.proto is not None else case.base.proto)
    old_merges, all_new = merges_of(case.base.content), merges_of(case.content)
    known, new_merges = set(all_new), iter(all_new)
    lost = next(
        (
            merge
            for merge in old_merges
            if merge not in (known if "".join(merge) in open_ else new_merges)
        ),
        None,
    )
    if lost:
        failures.append(f"the merge {lost} is missing or out of order")
    return Proof("old tokens keep their ids and merges", len(old) + len(old_merges), failures)


def _pieces_of_equal_score(proto: Proto | None) -> set[str]:
    pieces = [] if proto is None else [piece for piece in proto.pieces if piece.type == NORMAL]
    scores = Counter(piece.score for piece in pieces)
    return {piece.piece for piece in pieces if scores[piece.score] > 1}


def old_pieces_stay(case: Case) -> Proof:
    """The old pieces of `tokenizer.model` and its normalizer are equal byte for byte."""
    invariant = "old pieces of tokenizer.model are untouched"
    old, new = case.base.proto, case.proto
    if old is None:
        return Proof(invariant, 0, [])
    if new is None:
        return Proof(invariant, len(old.pieces), ["tokenizer.model is missing"])
    failures = [
        f"piece {id_} {before.piece!r} changed"
        for id_, (before, after) in enumerate(zip(old.pieces, new.pieces, strict=False))
        if before.SerializeToString() != after.SerializeToString()
    ]
    if len(new.pieces) < len(old.pieces):
        failures.append(
            f"tokenizer.model has {len(new.pieces)} pieces instead of {len(old.pieces)}"
        )
    if case.map and len(new.pieces) != case.map.rows:
        failures.append(f"tokenizer.model has {len(new.pieces)} pieces for {case.map.rows} rows")
    if old.normalizer_spec != new.normalizer_spec:
        failures.append("the normalizer changed")
    return Proof(invariant, len(old.pieces), failures)


def rows_are_named(case: Case) -> Proof:
    """Every row has one token and every token one row: the ids are 0 .. rows - 1, without gaps."""
    tokens = ids_of(case.content)
    ids = sorted(tokens.values())
    names = case.names
    rows = case.map.rows if case.map else ids[-1] + 1
    failures = [f"row {row} has no token" for row in range(rows) if row not in names]
    failures += [f"{names[id_]!r} has id {id_} of {rows} rows" for id_ in ids if id_ >= rows]
    failures += [f"id {id_} has two tokens" for id_, after in pairwise(ids) if id_ == after]
    if case.map:
        named = [*case.pieces.items(), *((token.token, token.id) for token in case.map.chat)]
        added = {token.content for token in added_tokens_of(case.content)}
        outside = {*case.base.ids, *added, *case.pieces}
        failures += [
            f"{token!r} is a piece that is missing in the map"
            for token in tokens
            if token not in outside
        ]
        unnamed = [row for row in case.map.padding if names.get(row) not in added]
        failures += [
            f"row {row} is padding in the map, but {names.get(row)!r} is a piece" for row in unnamed
        ]
        failures += [
            f"row {id_} is {names.get(id_)!r}, not {token!r}"
            for token, id_ in named
            if names.get(id_) != token
        ]
    return Proof("every row has exactly one token", rows, failures)


def constituents_spell_their_piece(case: Case) -> Proof:
    """The base tokens that the map lists for a new piece spell exactly its bytes."""
    names = {id_: token for token, id_ in case.base.ids.items()}
    spelt, new = case.base.family.spelt, case.map.new if case.map else []
    failures = [
        f"{piece.piece!r} is not {[names.get(id_) for id_ in piece.constituents]}"
        for piece in new
        if b"".join(spelt(names.get(id_, "")) for id_ in piece.constituents) != spelt(piece.piece)
    ]
    return Proof("a new piece's constituents spell it", len(new), failures)


def files_agree(case: Case) -> Proof:
    """`tokenizer.json` has the pieces of `tokenizer.model` at the same ids, and its merges follow
    the scores, except where the base's do not.
    """
    checked = len(case.proto.pieces) if case.proto is not None else 0
    of_base = set(disagreements(case.base.content, case.base.proto))
    return Proof(
        "tokenizer.model and tokenizer.json have equal ids and merges",
        checked,
        [found for found in disagreements(case.content, case.proto) if found not in of_base],
    )


def merges_alone_give_the_same(case: Case) -> Proof:
    """Looking up whole words (`ignore_merges`) changes no ids where only the extension does it."""
    invariant = "looking up whole words gives what merging gives"
    model = case.content["model"]
    if not model.get("ignore_merges") or case.base.content["model"].get("ignore_merges"):
        return Proof(invariant, 0, [])
    merging = build({**case.content, "model": {**model, "ignore_merges": False}})
    texts = case.samples.everything
    return Proof(
        invariant,
        len(texts),
        _differences(case, texts, _encode(merging, texts), _encode(case.after, texts)),
    )


def no_word_is_an_added_token(case: Case) -> Proof:
    """New words are in the model.

    Added tokens are cut out of the text before any merge, even out of longer words.
    """
    chat = TokenizerFiles.read(case.chat) if case.chat else None
    known = {**case.base.ids, **(chat.ids if chat else {})}
    added = [token for token in added_tokens_of(case.content) if token.content not in known]
    words = [
        token.content
        for token in added
        if not token.special and _WORD.fullmatch(token.content.strip(" ▁"))
    ]
    invariant = "new words are pieces of the model, not added tokens"
    return Proof(invariant, len(added) + len(case.pieces), list(map(repr, words)))


def new_pieces_are_of_the_scripts(case: Case) -> Proof:
    """A new piece holds a letter of the learnt scripts or is part of a character; others would
    change other text.
    """
    letters = script_pattern(case.samples.scripts)
    failures = []
    for piece in case.pieces:
        try:
            text = case.base.family.spelt(piece).decode()
        except UnicodeDecodeError:
            continue
        if not letters.search(text):
            failures.append(repr(case.base.family.readable(piece)))
    return Proof("every new piece holds a letter of the new scripts", len(case.pieces), failures)


def roles_stay(case: Case) -> Proof:
    """The tokens around a text and the roles (bos, eos, unk, pad) are those of the base."""
    invariant = "roles of special tokens are the base's"
    if not (case.directory / FAST_FILE).is_file():
        return Proof(invariant, 0, [])  # the code of LlamaTokenizer decides this, not the files
    texts = ["", "Hello world."]
    before, after = (
        [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        for tokenizer in (case.before, case.after)
    )
    failures = _differences(case, texts, before, after)
    roles = TokenizerFiles(case.directory, {}, frozenset()).roles
    wanted = {role: token_text(case.base.settings.get(role)) for role in SPECIAL_ROLES}
    failures += [
        f"the {role} is {roles.get(role)!r}, not {token!r}"
        for role, token in wanted.items()
        if token is not None and roles.get(role) != token
    ]
    return Proof(invariant, len(texts) + len(wanted), failures)


def new_pieces_are_reachable(case: Case) -> Proof:
    """A new piece that is encoded alone, without a dummy prefix, is one token.

    This is sufficient: surrounding text can only take characters from a piece's edges, so a piece
    that is not reached alone is never reached.
    """
    pieces, family = list(case.pieces), case.base.family
    expected = [[id_] for id_ in case.pieces.values()]
    encoded = {"": _encode(build_model(case.content), pieces)}
    broken = []
    if case.proto is not None:
        bare = type(case.proto)()
        bare.CopyFrom(case.proto)
        bare.normalizer_spec.add_dummy_prefix = False
        try:
            encoded[" in tokenizer.model"] = processor(bare).encode(pieces)
        except RuntimeError as error:
            broken.append(f"SentencePiece refuses tokenizer.model ({error})")
    failures: dict[str, str] = {}  # one for each piece
    for where, found in encoded.items():
        for piece, one, other in zip(pieces, expected, found, strict=True):
            if one != other:
                reason = f"{_short(piece)} {_first_difference(case, one, other)}{where}"
                failures.setdefault(piece, reason)
    for piece in pieces:
        text = family.spelt(piece).decode(errors="ignore")
        whole = text.encode() == family.spelt(piece)
        if whole and piece not in failures and not family.is_one_word(text):
            failures[piece] = f"{text!r} is cut or changed before merging"
    return Proof("every new piece can be produced", len(pieces), [*broken, *failures.values()])


def text_round_trips(case: Case) -> Proof:
    """Decoding returns the text, or what the base returns: it may turn a literal `▁` into a space,
    or apply NFC.
    """
    texts = case.samples.everything
    decoded = case.after.decode_batch(_encode(case.after, texts), skip_special_tokens=False)
    inexact = [
        (text, result) for text, result in zip(texts, decoded, strict=True) if text != result
    ]
    changed = [text for text, _ in inexact]
    by_base = case.before.decode_batch(_encode(case.before, changed), skip_special_tokens=False)
    failures = [
        f"{_short(text)} became {_short(result)}"
        for (text, result), expected in zip(inexact, by_base, strict=True)
        if result != expected
    ]
    return Proof("text comes back when it is decoded", len(texts), failures)


def plain_text_is_unchanged(case: Case) -> Proof:
    """Text without a character of the learnt scripts (English, code, ...) has the same ids as
    before.
    """
    texts = case.samples.plain
    failures = _differences(case, texts, _encode(case.before, texts), _encode(case.after, texts))
    return Proof("text without the new scripts is tokenized as before", len(texts), failures)


def sentencepiece_agrees(case: Case) -> Proof:
    """SentencePiece with `tokenizer.model` and tokenizers with `tokenizer.json` give the same ids,
    or the base's two files differ on the text as well.

    Texts that contain an added token are skipped, because SentencePiece does not look for those.
    """
    invariant = "SentencePiece and the fast tokenizer agree"
    if case.proto is None:
        return Proof(invariant, 0, [])
    added = {token.id for token in added_tokens_of(case.content)}
    everything = case.samples.everything
    both = zip(everything, _encode(case.after, everything), strict=True)
    fast = [(text, ids) for text, ids in both if added.isdisjoint(ids)]
    texts = [text for text, _ in fast]
    try:
        expected = processor(case.proto).encode(texts)
    except RuntimeError as error:
        return Proof(invariant, len(texts), [f"SentencePiece refuses tokenizer.model ({error})"])
    differing = [
        (text, one, other)
        for (text, one), other in zip(fast, expected, strict=True)
        if one != other
    ]
    old = _agreed_by_base(case, [text for text, *_ in differing])
    kept = [some for some in differing if some[0] in old]
    failures = [
        f"{_short(text)} {_first_difference(case, model, ids)}" for text, ids, model in kept
    ]
    return Proof(invariant, len(texts), failures)


def _agreed_by_base(case: Case, texts: Sequence[str]) -> set[str]:
    """The texts that the base's two files split alike."""
    if case.base.proto is None:
        return set(texts)
    fast, model = _encode(case.before, texts), processor(case.base.proto).encode(list(texts))
    return {text for text, *ids in zip(texts, fast, model, strict=True) if ids[0] == ids[1]}


def special_tokens_stay(case: Case) -> Proof:
    """Special tokens, and a conversation in either chat template, keep their ids."""
    tokens = [token.content for token in added_tokens_of(case.base.content)]
    texts = [*tokens, *(f"Hello{token}world" for token in tokens)]
    failures = _differences(case, texts, _encode(case.before, texts), _encode(case.after, texts))
    checked = len(texts)
    for directory in filter(None, (case.base.directory, case.chat)):
        files = TokenizerFiles.read(directory)
        if files and files.chat_template:
            text = _render(case.directory, files.chat_template, directory)
            ids = ids_of(case.content)
            expected = [ids.get(token, -1) for token in _base_tokens(case, directory, text)]
            found = _encode(case.after, [text])[0]
            if script_pattern(case.samples.scripts).search(
                text
            ):  # its text may change, its special tokens may not
                special = {ids.get(token, -1) for token in files.added}
                expected, found = (
                    [id_ for id_ in some if id_ in special] for some in (expected, found)
                )
            failures += _differences(case, [text], [expected], [found])
            checked += 1
    return Proof("special tokens and chat templates keep their ids", checked, failures)


def _base_tokens(case: Case, directory: Path, text: str) -> list[str]:
    """The tokens of a text, split as the base does, with the added tokens of a chat model."""
    content, _ = read_tokenizer(directory)
    known = case.base.ids
    own = [token for token in added_tokens_of(content) if token.content not in known]
    free = range(max(known.values()) + 1, sys.maxsize)
    placed = [replace(token, id=id_) for token, id_ in zip(own, free, strict=False)]
    tokenizer = build(add_tokens(case.base.content, placed))
    # `Encoding.tokens` would include the spaces that an added token strips (`rstrip` of Phi-3)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [str(tokenizer.id_to_token(id_)) for id_ in ids]


def transformers_agrees(case: Case) -> Proof:
    """`AutoTokenizer` gives every token its id and every role its token, and texts the ids of
    `tokenizer.json`, including special tokens.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        case.directory, model_max_length=sys.maxsize, trust_remote_code=False
    )  # no warning about long texts
    texts = case.samples.everything[:: max(1, len(case.samples.everything) // 2000)]
    special = case.map is not None  # another tool's special tokens around a text are unknown here
    expected = [
        encoding.ids for encoding in case.after.encode_batch_fast(texts, add_special_tokens=special)
    ]
    failures = _differences(
        case, texts, expected, loaded(texts, add_special_tokens=special)["input_ids"]
    )
    ids, vocabulary = ids_of(case.content), loaded.get_vocab()
    failures += [
        f"{token!r} has the id {vocabulary.get(token)}, not {id_}"
        for token, id_ in ids.items()
        if vocabulary.get(token) != id_
    ]
    failures += [
        f"the {role} is {getattr(loaded, role)!r}, not {token!r}"
        for role, token in TokenizerFiles(case.directory, {}, frozenset()).roles.items()
        if getattr(loaded, role) != token
    ]
    if case.map and len(loaded) != case.map.rows:
        failures.append(f"transformers counts {len(loaded)} tokens for {case.map.rows} rows")
    checked = len(texts) + len(ids)
    return Proof("transformers reads the tokenizer as it was written", checked, failures)


INVARIANTS: tuple[Callable[[Case], Proof], ...] = (
    old_ids_stay,
    old_pieces_stay,
    files_agree,
    rows_are_named,
    constituents_spell_their_piece,
    no_word_is_an_added_token,
    merges_alone_give_the_same,
    new_pieces_are_of_the_scripts,
    new_pieces_are_reachable,
    plain_text_is_unchanged,
    text_round_trips,
    sentencepiece_agrees,
    special_tokens_stay,
    roles_stay,
    transformers_agrees,
)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _differences(
    case: Case,
    texts: Iterable[str],
    expected: Iterable[Sequence[int]],
    found: Iterable[Sequence[int]],
) -> list[str]:
    return [
        f"{_short(text)} {_first_difference(case, before, after)}"
        for text, before, after in zip(texts, expected, found, strict=True)
        if before != after
    ]


def _first_difference(case: Case, expected: Sequence[int], found: Sequence[int]) -> str:
    pairs = zip_longest(expected, found, fillvalue=None)
    place, (before, after) = next(
        (place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1]
    )
    return f"has {case.name_of(after)} as token {place}, not {case.name_of(before)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _render(tokenizer: Path, template: str, owner: Path) -> str:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    try:
        rendered = loaded.apply_chat_template(
            CONVERSATION, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise UserError(f"the chat template in {owner} cannot be rendered: {error}") from None
    return str(rendered)
