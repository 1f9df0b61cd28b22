"""The base's own tokenizer for training without new pieces, with the chat format's tokens."""

from __future__ import annotations

from pathlib import Path

from cpt_merge.checkpoint import token_changes
from cpt_merge.checkpoint.loaded_tokenizer import loading
from cpt_merge.checkpoint.model_files import copy_files
from cpt_merge.checkpoint.token_changes import TokenChanges
from cpt_merge.checkpoint.token_ids import FAST_FILE
from cpt_merge.checkpoint.tokenizer_files import TOKENIZER_FILES, TokenizerFiles
from cpt_merge.checkpoint.vocabulary_map import ChatToken, VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.tokenizer_ext.base_tokenizer import read_base, read_chat_tokens, read_rows
from cpt_merge.tokenizer_ext.writing import lay_out, write_tokenizer


def keep_tokenizer(base: Path, chat: Path | None, out: Path, multiple: int) -> VocabularyMap:
    """Write the tokenizer in `base` to `out`, with the tokens that only `chat` has, and its map.

    The files are the base's; a base with `tokenizer.model` alone gets a tokenizer.json. Raises
    `UserError` if the files disagree, or if transformers would read a token at another id.
    """
    if not (base / FAST_FILE).is_file():
        start = read_base(base)
        layout = lay_out(start, read_chat_tokens(chat, start) if chat else [], [], multiple)
        write_tokenizer(start, layout, out)
        vocabulary = VocabularyMap.load(out)
    else:
        vocabulary = _copy(base, chat, out, multiple)
    with loading(out) as check:
        check.require_none(str(base))
    say(
        f"tokenizer of {base}: kept as it is, {vocabulary.base_rows:,} rows; "
        f"{len(vocabulary.chat):,} rows for tokens of the chat model alone"
    )
    return vocabulary


def _copy(base: Path, chat: Path | None, out: Path, multiple: int) -> VocabularyMap:
    own, rows = TokenizerFiles.read(base), read_rows(base)
    assert own is not None
    own.require_listed()
    of_chat = TokenizerFiles.read(chat) if chat else None
    appended = _appended(own, of_chat) if of_chat else {}
    copy_files([base / name for name in TOKENIZER_FILES], out)
    token_changes.apply(TokenChanges(appended), out, chat or base)
    ids = {**own.ids, **appended}
    needed = max(ids.values()) + 1
    total = rows if needed <= rows else -(-needed // multiple) * multiple
    tokens = [
        ChatToken(number, token, of_chat.ids[token])
        for token, number in appended.items()
        if of_chat and number >= rows
    ]
    padding = sorted(set(range(rows, total)) - {token.id for token in tokens})
    beyond = [token for token, number in own.ids.items() if number >= rows]
    if set(beyond) - own.added:
        raise UserError(
            f"{base}: the tokenizer has {sorted(set(beyond) - own.added)[:5]} beyond the {rows} "
            "rows of config.json's vocab_size; use the tokenizer that belongs to these weights."
        )
    vocabulary = VocabularyMap(rows, total, [], tokens, padding)
    vocabulary.save(out)
    return vocabulary


def _appended(base: TokenizerFiles, chat: TokenizerFiles) -> dict[str, int]:
    """The chat model's own tokens behind all of the base's, except those that take the name of a
    reserved token: the merge renames it.
    """
    tokens = sorted(chat.added - base.ids.keys(), key=lambda token: chat.ids[token])
    renamed = {
        token
        for token in tokens
        if base.tokens.get(chat.ids[token]) in base.added - chat.ids.keys()
    }
    first = max(base.ids.values(), default=-1) + 1
    new = [token for token in tokens if token not in renamed]
    return {token: first + place for place, token in enumerate(new)}
