"""How rows meet by token: the merged model's tokens, and the rows of base and chat for each.

Rows meet by token string, never by position. For each vector, every row of the output is treated in
one of these ways:

    shared       the token is in CPT, base and chat: the tensor's rule applies
    new          only CPT has it: kept as trained, or given the mean vector of its constituents
                 (`new_rows`)
    chat         part of the chat format: taken from the chat model, whatever the rule and the ratio
    unmatched    base has it and chat does not, an added token that nobody uses: kept
    padding      no token: kept; rows beyond CPT's hold the mean of CPT's rows

Part of the chat format are the tokens that the chat tokenizer adds to the base's, and the added
tokens that its template or its stop ids name, unless they are the base's own bos, eos, unk or pad.
The base may have them too (<|eot_id|> of Llama 3) but has not trained them: their difference is no
vector, and CPT's row is no place to start from. (The authors' code pastes the base's rows there and
scales them.) The format is that of the first vector's chat model: a further vector leaves these
rows as they are.

A token of the chat format that CPT's tokenizer lacks gets its place in this order:

    token_map    what the recipe says: it becomes that token of CPT
    reserved     the chat model gave a reserved token of the base this name (same id, the old name
                 is gone): CPT's reserved token gets it too
    appended     after all of CPT's tokens, in rows that no token uses or in new ones

Ids that CPT has never change. Anything else that cannot be aligned is an error that names the
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import vocabulary_rows
from cpt_merge.checkpoint.token_changes import TokenChanges
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE, VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.merge.chat_format import ChatFormat, read_format
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.fit import RefusedError, collected
from cpt_merge.merge.vectors import RowPairs, Rows, Vector

# New rows come in multiples of this if CPT's rows do, so that tensor cores and shards divide them
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class OutputTokens:
    """The tokens of the output: their rows, the number of rows, and the tokenizer's changes."""

    ids: dict[str, int]
    rows: int
    changes: TokenChanges
    gone: frozenset[str] = frozenset()  # reserved tokens that CPT renamed

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Row -> token."""
        return {number: token for token, number in self.ids.items()}


def output_tokens(
    cpt: TokenizerFiles,
    base: TokenizerFiles,
    chat: TokenizerFiles,
    cpt_rows: int,
    token_map: Mapping[str, str],
) -> OutputTokens:
    """The merged model's tokens. Raises `UserError` for a map that does not fit."""
    _check_token_map(token_map, cpt, chat)
    gone = frozenset(_renamed_by_cpt(cpt, base) - chat.format_tokens())
    lacking = sorted(
        (token for token in chat.added if token not in cpt.ids and token not in gone),
        key=lambda token: chat.ids[token],
    )
    renamed = dict(token_map)
    for token in lacking:
        reserved = base.tokens.get(chat.ids[token])
        free = (
            reserved in base.added - chat.ids.keys()
            and reserved in cpt.added
            and reserved not in renamed.values()
        )
        if token not in renamed and reserved is not None and free:
            renamed[token] = reserved
    following = range(max(cpt.ids.values(), default=-1) + 1, 1 << 31)
    appended = dict(
        zip((token for token in lacking if token not in renamed), following, strict=False)
    )
    ids = {
        **cpt.ids,
        **{token: cpt.ids[reserved] for token, reserved in renamed.items()},
        **appended,
    }
    for reserved in renamed.values():
        del ids[reserved]
    rows = _rows(cpt_rows, max(ids.values(), default=-1) + 1)
    return OutputTokens(ids, rows, TokenChanges(appended, renamed), gone)


def _renamed_by_cpt(cpt: TokenizerFiles, base: TokenizerFiles) -> set[str]:
    """The base's added tokens that have another name in CPT, at the same id."""
    return {
        token
        for token in base.added - cpt.ids.keys()
        if (name := cpt.tokens.get(base.ids[token])) in cpt.added and name not in base.ids
    }


def _rows(cpt_rows: int, needed: int) -> int:
    if needed <= cpt_rows:
        return cpt_rows
    multiple = ROW_MULTIPLE if cpt_rows % ROW_MULTIPLE == 0 else 1
    return -(-needed // multiple) * multiple


def _check_token_map(
    token_map: Mapping[str, str], cpt: TokenizerFiles, chat: TokenizerFiles
) -> None:
    for token, reserved in token_map.items():
        where = f"merge.token_map: {token!r}: {reserved!r}"
        if token not in chat.added:
            raise UserError(f"{where}: {chat.directory} has no such special token; correct it.")
        if token in cpt.ids:
            raise UserError(f"{where}: {cpt.directory} has {token!r} already; leave it out.")
        if reserved not in cpt.added:
            raise UserError(
                f"{where}: {cpt.directory} has no special token {reserved!r} to become it; correct "
                "it."
            )
    if len(set(token_map.values())) < len(token_map):
        raise UserError("merge.token_map gives one token of CPT to two of chat; correct it.")


def describe(changes: TokenChanges, cpt_rows: int, rows: int) -> list[str]:
    """A line for each kind of change."""
    lines = []
    if rows > cpt_rows and not changes.appended:
        lines.append("the tokenizer has added tokens beyond CPT's rows; they get the mean row")
    if changes.renamed:
        pairs = ", ".join(f"{reserved} -> {token}" for token, reserved in changes.renamed.items())
        lines.append(f"reserved tokens take the chat model's names: {pairs}")
    if changes.appended:
        tokens = ", ".join(f"{token} at {number}" for token, number in changes.appended.items())
        lines.append(f"tokens of the chat format that CPT lacks: {tokens}")
    if rows > cpt_rows:
        lines.append(f"the matrices grow from {cpt_rows:,} to {rows:,} rows")
    return lines


class Role(IntEnum):
    """How a row of the output is treated."""

    PADDING = 0
    SHARED = 1
    NEW = 2
    CHAT = 3
    UNMATCHED = 4


@dataclass(frozen=True)
class RowAlignment:
    """For every output row its role and its rows in base and chat (-1: none).

    `constituents` holds, for those new rows that get a vector, the rows whose mean vector it is.
    """

    role: NDArray[np.uint8]
    base: Rows
    chat: Rows
    constituents: dict[int, RowPairs] = field(default_factory=dict)
    chat_tokens: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @cached_property
    def has_vector(self) -> NDArray[np.bool_]:
        """The rows that get something from the vector."""
        found: NDArray[np.bool_] = self.role == Role.SHARED
        found[list(self.constituents)] = True
        return found

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return len(self.role)

    def counts(self) -> dict[str, int]:
        """Role -> number of rows."""
        return {role.name.lower(): int((self.role == role).sum()) for role in Role}


def align_by_position(rows: int) -> RowAlignment:
    """All rows shared by position, for models without tokenizers and with equally many rows."""
    everything = np.arange(rows)
    return RowAlignment(np.full(rows, Role.SHARED, np.uint8), everything, everything)


def align_rows(
    output: OutputTokens,
    base: TokenizerFiles,
    chat: TokenizerFiles,
    map: VocabularyMap | None,
    gives_format: bool = True,
) -> RowAlignment:
    """Align one vector by token string. `gives_format`: rows of the format come from its chat."""
    of_format = format_tokens(base, chat)
    if gives_format and map:
        of_format |= {token.token for token in map.chat}
    rows = np.fromiter(output.ids.values(), np.int64, len(output.ids))
    in_base, in_chat = _rows_of(output, base), _rows_of(output, chat)
    role = np.where(in_base < 0, Role.NEW, np.where(in_chat < 0, Role.UNMATCHED, Role.SHARED))
    nowhere = np.full(output.rows, -1)
    padding = np.full(output.rows, Role.PADDING, np.uint8)
    alignment = RowAlignment(padding, nowhere, nowhere.copy())
    alignment.role[rows], alignment.base[rows], alignment.chat[rows] = role, in_base, in_chat
    format_rows = sorted(output.ids[token] for token in of_format if token in output.ids)
    alignment.role[format_rows] = Role.CHAT if gives_format else Role.UNMATCHED
    if gives_format:
        alignment.chat_tokens.extend(output.tokens[row] for row in format_rows)
    alignment.unmatched.extend(
        output.tokens[row] for row in np.flatnonzero(alignment.role == Role.UNMATCHED).tolist()
    )
    return alignment


def _rows_of(output: OutputTokens, tokenizer: TokenizerFiles) -> Rows:
    """For each token of the output, in its order, the tokenizer's id, or -1."""
    return np.fromiter(
        (tokenizer.ids.get(token, -1) for token in output.ids), np.int64, len(output.ids)
    )


def format_tokens(base: TokenizerFiles, chat: TokenizerFiles) -> set[str]:
    """The tokens whose rows come from the chat model."""
    beyond_base = {token for token in chat.added if token not in base.ids}
    untrained = {token for token in chat.format_tokens() if token not in base.roles.values()}
    return beyond_base | untrained


def check_rows(tokenizer: TokenizerFiles, rows: int) -> None:
    """Raise `UserError` for a tokenizer with pieces beyond its model's rows.

    An added token there is no sign of another tokenizer (Gemma-3 1B's `<image_soft_token>`).
    """
    beyond = [
        token
        for token, number in tokenizer.ids.items()
        if number >= rows and token not in tokenizer.added
    ]
    if beyond:
        raise UserError(
            f"{tokenizer.directory} has {rows} embedding rows but {_named(beyond)} beyond them; "
            "use the tokenizer that belongs to the weights."
        )


def with_rows(tokenizer: TokenizerFiles, rows: int | None) -> TokenizerFiles:
    """Without the added tokens beyond the model's rows, with a message."""
    if rows is None or max(tokenizer.ids.values(), default=-1) < rows:
        return tokenizer
    beyond = {token for token in tokenizer.added if tokenizer.ids[token] >= rows}
    if beyond:
        say(
            f"merge: {_named(sorted(beyond))} of {tokenizer.directory} beyond the model's {rows} "
            "rows; left out"
        )
    ids = {token: number for token, number in tokenizer.ids.items() if token not in beyond}
    return replace(tokenizer, ids=ids, added=tokenizer.added - beyond)


def lost_tokens(
    cpt: Path, output: OutputTokens, base: TokenizerFiles, chat: TokenizerFiles, first: bool = True
) -> list[str]:
    """A sentence for each kind of token without counterpart.

    `cpt`: the directory of CPT's tokenizer.

    The special tokens of a further vector's models are not needed, because the format is that of
    the first vector: they only cause a message.
    """
    gone = output.gone.union(output.changes.renamed.values())
    if output.gone and first:
        say(f"merge: {cpt} renamed {_named(sorted(output.gone))}; their rows stay as trained")
    problems = []
    for tokenizer, advice in (
        (base, "extend the base's own tokenizer"),
        (chat, "make it with this chat model"),
    ):
        lost = _missing(tokenizer, output.ids.keys() | gone)
        if not first:
            lost = _without_added(lost, tokenizer)
        if lost:
            problems.append(f"{cpt} lacks {_named(lost)} of {tokenizer.directory}; {advice}")
    return problems + unshared_tokens(base, chat)


def unshared_tokens(base: TokenizerFiles, chat: TokenizerFiles) -> list[str]:
    """A sentence if the two vocabularies differ in more than added tokens."""
    lost = _missing(base, chat.ids.keys() | base.added) + _missing(
        chat, base.ids.keys() | chat.added
    )
    if not lost:
        return []
    return [
        f"{chat.directory} and {base.directory} do not share {_named(lost)}; give this chat "
        "model's own base"
    ]


def _missing(tokenizer: TokenizerFiles, known: Set[str]) -> list[str]:
    """The tokens that are not known, by their ids."""
    return sorted(tokenizer.ids.keys() - known, key=lambda token: tokenizer.ids[token])


def _without_added(tokens: list[str], tokenizer: TokenizerFiles) -> list[str]:
    special = [token for token in tokens if token in tokenizer.added]
    if special:
        say(
            f"merge: {_named(special)} of {tokenizer.directory} are not in the output, which has "
            "another chat format"
        )
    return [token for token in tokens if token not in tokenizer.added]


def check_map(map: VocabularyMap | None, output: OutputTokens, chat: TokenizerFiles) -> None:
    """Raise `UserError` if the map of the extended tokenizer was made with another chat model."""
    if map is None:
        return
    for token in map.chat:
        if chat.ids.get(token.token) != token.chat_id or output.ids.get(token.token) != token.id:
            raise UserError(
                f"the vocabulary map has {token.token!r} at {token.chat_id}, {chat.directory} has "
                "it at another id; make the tokenizer again with this chat model."
            )
    if map.rows > output.rows:
        raise UserError(
            f"the vocabulary map has {map.rows} rows, the model {output.rows}; use the map of this "
            "model."
        )
    for piece in map.new:
        if not all(number in output.tokens for number in piece.constituents):
            raise UserError(
                f"the vocabulary map spells {piece.piece!r} with ids {piece.constituents}, which "
                "have no tokens; use the map that was written with this tokenizer."
            )
        if output.ids.get(piece.piece) != piece.id:
            raise UserError(
                f"the vocabulary map has {piece.piece!r} at {piece.id}, its tokenizer has it at "
                "another id; use the map that was written with this tokenizer."
            )


def add_constituents(
    alignment: RowAlignment,
    map: VocabularyMap,
    output: OutputTokens,
    base: TokenizerFiles,
    chat: TokenizerFiles,
) -> None:
    """Find for each new row the rows of its constituents in base and chat."""
    left_out = 0
    for piece in map.new:
        tokens = [output.tokens[row] for row in piece.constituents]
        pairs = [(base.ids.get(token, -1), chat.ids.get(token, -1)) for token in tokens]
        if alignment.role[piece.id] == Role.NEW and pairs and min(min(pair) for pair in pairs) >= 0:
            rows = np.array(pairs, dtype=np.int64)
            alignment.constituents[piece.id] = RowPairs(rows[:, 0], rows[:, 1])
        elif alignment.role[piece.id] == Role.NEW:
            left_out += 1
    if left_out:
        say(
            f"merge: {left_out} new pieces keep their trained rows, because {chat.directory} lacks "
            "some of their constituents"
        )


def _named(tokens: Iterable[str]) -> str:
    """`3 tokens ('a', 'b', 'c')`, at most five of them named."""
    tokens = list(tokens)
    shown = ", ".join(repr(token) for token in tokens[:5]) + (", ..." if len(tokens) > 5 else "")
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown})"


@dataclass(frozen=True)
class Meeting:
    """What follows from the tokenizers: their changes, the chat format, and each vector's rows."""

    changes: TokenChanges
    format: ChatFormat
    rows: list[RowAlignment]


@dataclass(frozen=True)
class Tokenizers:
    """A vector's two tokenizers."""

    base: TokenizerFiles
    chat: TokenizerFiles


def meet(
    config: MergeConfig,
    models: Mapping[str, Checkpoint],
    tokenizer: Path,
    sources: Sequence[Vector],
    has_format: bool = False,
) -> Meeting:
    """Align every vector with CPT by their tokenizers. `models` are all models, `cpt` among them.

    With `has_format`, CPT keeps its own rows of the chat format.

    Raises `RefusedError` with everything that cannot be aligned.
    """
    all_rows = {label: vocabulary_rows(model) for label, model in models.items()}
    directories = [tokenizer]
    for source in sources:
        directories += [source.base_directory, source.chat_directory]
    files = [TokenizerFiles.read(directory) for directory in directories]
    whole = _all_or_none(files, directories, all_rows)
    if whole is None:
        return _by_position(config, all_rows["cpt"], sources)
    extended, *others = whole
    all_of_pairs = [_rows_of_pair(source) for source in sources]
    others = [
        with_rows(tokenizer, rows)
        for tokenizer, rows in zip(others, (n for pair in all_of_pairs for n in pair), strict=True)
    ]
    if config.interpolates:
        others[0] = _known_to(others[1], extended)
    pairs = [Tokenizers(base, chat) for base, chat in zip(others[::2], others[1::2], strict=True)]
    map_of_rows = VocabularyMap.load(tokenizer) if (tokenizer / MAP_FILE).is_file() else None
    problems = _file_problems(whole, sources, pairs, all_rows["cpt"])
    tokens = output_tokens(
        extended, pairs[0].base, pairs[0].chat, all_rows["cpt"], config.token_map
    )
    with collected(problems):
        check_map(map_of_rows, tokens, pairs[0].chat)
    if config.new_rows == "constituents" and map_of_rows is None:
        problems.append(
            f"{tokenizer} holds no {MAP_FILE}, which new_rows: constituents needs; set new_rows: "
            "keep"
        )
    for number, pair in enumerate(pairs):
        problems += lost_tokens(extended.directory, tokens, pair.base, pair.chat, number == 0)
    if problems:
        raise RefusedError(problems)
    rows = [
        align_rows(tokens, pair.base, pair.chat, map_of_rows, pair is pairs[0] and not has_format)
        for pair in pairs
    ]
    if config.new_rows == "constituents" and map_of_rows is not None:
        for alignment, pair in zip(rows, pairs, strict=True):
            add_constituents(alignment, map_of_rows, tokens, pair.base, pair.chat)
    return Meeting(tokens.changes, read_format(pairs[0].base, pairs[0].chat, tokens.ids), rows)


def _file_problems(
    whole: Sequence[TokenizerFiles],
    sources: Sequence[Vector],
    pairs: Sequence[Tokenizers],
    cpt_rows: int,
) -> list[str]:
    """What is wrong with the tokenizers' files; `whole` are CPT's, then each pair's as stored."""
    extended = whole[0]
    problems = [
        f"{tokenizer.directory} has {tokenizer.odd}; load it with transformers, check its ids, and "
        "save it again"
        for tokenizer in whole
        if tokenizer.odd
    ]
    for source, pair in zip(sources, pairs, strict=True):
        _check_tokenizers(source, pair, problems)
    has_free_row = max(extended.ids.values(), default=-1) + 1 < cpt_rows
    for one in [*([extended] if has_free_row else []), *whole[2::2]]:
        with collected(problems):
            one.require_listed()  # without a row for it, CPT's token is unused and is left out
    with collected(problems):
        check_rows(extended, cpt_rows)
    return problems


def _known_to(chat: TokenizerFiles, extended: TokenizerFiles) -> TokenizerFiles:
    """CPT's tokenizer without the pieces that the chat model lacks, in place of a base's."""
    known = chat.ids.keys() | extended.added
    ids = {token: number for token, number in extended.ids.items() if token in known}
    return replace(extended, ids=ids)


def _all_or_none(
    files: list[TokenizerFiles | None], directories: list[Path], rows: dict[str, int]
) -> list[TokenizerFiles] | None:
    """All tokenizers, or None if there are none and all models have equally many rows.

    Raises `UserError` if rows cannot be aligned.
    """
    present = [tokenizer for tokenizer in files if tokenizer is not None]
    if len(present) == len(files):
        return present
    missing = [
        directory for directory, found in zip(directories, files, strict=True) if found is None
    ]
    named = ", ".join(str(directory) for directory in missing)
    if present:
        raise UserError(
            f"no tokenizer.json or tokenizer.model in {named}, by which rows could be aligned; put "
            f"it there{_or_tokenizer(directories[0] in missing)}."
        )
    if len(set(rows.values())) > 1:
        *others, last = (f"{count} ({label})" for label, count in rows.items())
        raise UserError(
            f"the embeddings have {', '.join(others)} and {last} rows, which only each model's "
            f"tokenizer can align; put it next to the weights ({named})"
            f"{_or_tokenizer(directories[0] in missing)}."
        )
    say(
        f"merge: no tokenizer in {named}; the {rows['cpt']} rows of the models are treated as the "
        "same tokens"
    )
    return None


def _or_tokenizer(cpt_lacks_it: bool) -> str:
    return ", or name the directory of CPT's with --tokenizer" if cpt_lacks_it else ""


def _by_position(config: MergeConfig, count: int, sources: Sequence[Vector]) -> Meeting:
    """Align rows by position, because no directory has a tokenizer."""
    if config.token_map or config.new_rows == "constituents":
        raise UserError(
            "token_map and new_rows: constituents need tokenizers, and no model has one; leave "
            "them out."
        )
    rows = align_by_position(count)
    format = read_format(
        TokenizerFiles(sources[0].base_directory, {}, frozenset()),
        TokenizerFiles(sources[0].chat_directory, {}, frozenset()),
        None,
    )
    return Meeting(TokenChanges(), format, [rows for _ in sources])


def _rows_of_pair(source: Vector) -> tuple[int | None, int]:
    """The rows of base (None if only its tokenizer is here) and chat."""
    rows = {label: vocabulary_rows(model) for label, model in source.models.items()}
    return rows.get("base"), rows["chat"] if "chat" in rows else rows["vector"]


def _check_tokenizers(source: Vector, tokenizers: Tokenizers, problems: list[str]) -> None:
    base, chat = _rows_of_pair(source)
    if base is not None:
        with collected(problems):
            check_rows(tokenizers.base, base)
    with collected(problems):
        check_rows(tokenizers.chat, chat)
