"""Differences in how files with the same tokens split text, found before any text is counted.

A tokenizer that transformers has saved again often differs from the original in its normalizer, its
pre-tokenizer or the order of its merges (LLaMA-2's and Mistral's become Metaspace with
`prepend_scheme: first`), although tokens and ids are the same. The extension follows the base: each
of its files is extended as it is, and the chat model's tokens are added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from cpt_merge.core.progress import say
from cpt_merge.tokenizer_ext.base_tokenizer import Base, read_tokenizer
from cpt_merge.tokenizer_ext.families.sentencepiece import processor
from cpt_merge.tokenizer_ext.families.tokenizer_json import build
from cpt_merge.tokenizer_ext.verify.samples import CODE, SENTENCES


def say_differences(base: Base, chat: Path | None) -> None:
    """Report, once, that the base's own two files or the chat model's tokenizer split text
    differently from what is extended.
    """
    texts = [*(line for lines in SENTENCES.values() for line in lines), *CODE]
    own = _tokens(build(base.content), texts)
    if base.proto is not None:
        content, _ = read_tokenizer(base.directory)
        fast, model = _tokens(build(content), texts), processor(base.proto)
        if found := _compare(texts, fast, model.encode(texts, out_type=str)):
            say(
                f"tokenizer: tokenizer.model and tokenizer.json of {base.directory} have the same "
                f"tokens, but split {found}; both are extended, with tokenizer.model's merges"
            )
    if chat is not None:
        content, _ = read_tokenizer(chat)
        if found := _compare(texts, own, _tokens(build(content), texts)):
            say(
                f"tokenizer: the tokenizer of the chat model {chat} has the base's tokens, but "
                f"splits {found}; the base's way is kept"
            )


def _tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[str]]:
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.tokens for encoding in encodings]


def _compare(
    texts: Sequence[str], some: Sequence[Sequence[str]], others: Sequence[Sequence[str]]
) -> str:
    """`3 of 51 sample texts differently (the first: '...')`, or nothing."""
    both = zip(texts, some, others, strict=True)
    differing = [text for text, one, other in both if list(one) != list(other)]
    if not differing:
        return ""
    share = f"{len(differing)} of {len(texts)} sample texts"
    return f"{share} differently (the first: {differing[0][:40]!r})"
