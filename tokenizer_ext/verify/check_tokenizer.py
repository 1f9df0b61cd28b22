"""The proofs on any extended tokenizer, compared with its base."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_merge.checkpoint.vocabulary_map import MAP_FILE
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import SCRIPTS, script_pattern
from cpt_merge.core.progress import say
from cpt_merge.data.sources import Source, read_source
from cpt_merge.tokenizer_ext.base_tokenizer import read_base, read_tokenizer
from cpt_merge.tokenizer_ext.extension_report import (
    FERTILITY_COLUMNS,
    PROOF_COLUMNS,
    fertility_rows,
    proof_rows,
    show,
)
from cpt_merge.tokenizer_ext.families.tokenizer_json import added_tokens_of
from cpt_merge.tokenizer_ext.fertility import Fertility, measure_fertility
from cpt_merge.tokenizer_ext.verify.invariants import SHOWN, Case, Proof, prove, read_case
from cpt_merge.tokenizer_ext.verify.samples import HELDOUT_CHARACTERS, scripts_of, take_samples

TARGET_SHARE = 0.01  # of the new tokens have letters of a script that they were made for


@dataclass(frozen=True)
class TokenizerVerdict:
    """The proofs, and the fertility on each text."""

    proofs: list[Proof]
    fertility: list[Fertility]

    @property
    def whole(self) -> bool:
        """Whether every invariant holds."""
        return not any(proof.failures for proof in self.proofs)


def check_tokenizer(
    directory: Path,
    base: Path,
    chat: Path | None = None,
    texts: Sequence[Path] = (),
    languages: Sequence[str] = (),
) -> TokenizerVerdict:
    """Prove the invariants of the tokenizer in `directory`, as far as they apply, and print the
    result.

    `texts` are files that are read in addition to built-in sentences. `languages` are those the
    tokenizer was extended for; by default, all whose scripts occur in its new tokens (scripts in
    wide use, except Latin). Raises `UserError` for files that cannot be read.
    """
    if chat and not chat.is_dir():
        raise UserError(f"--chat {chat} is no directory; give the chat model's, or leave it out.")
    start = read_base(base, None if (base / "config.json").is_file() else sys.maxsize)
    content, proto = read_tokenizer(directory)
    added = [token for token in added_tokens_of(content) if token.content not in start.ids]
    others = {*start.ids, *(token.content for token in added)}
    pieces = {piece: id_ for piece, id_ in content["model"]["vocab"].items() if piece not in others}
    words = [token.content for token in added if not token.special] + list(
        map(start.family.readable, pieces)
    )
    scripts = scripts_of(languages) if languages else guess_scripts(words)
    say(
        f"{directory}: {len(pieces):,} new pieces and {len(added):,} new added tokens, "
        f"for {', '.join(scripts) or 'no script that is known here'}"
    )
    read = {path.stem: _read(path) for path in _checked(texts)}
    samples = take_samples(read, scripts, words)
    if (directory / MAP_FILE).is_file():
        case = read_case(start, directory, chat, samples)
    else:
        case = Case(start, directory, content, proto, pieces, None, chat, samples)
    proofs = prove(case)
    fertility = [measure_fertility(case, name, some) for name, some in read.items() if some]
    fertility += [
        measure_fertility(case, f"{name} (sentences)", some)
        for name, some in samples.sentences.items()
    ]
    _show(TokenizerVerdict(proofs, fertility))
    return TokenizerVerdict(proofs, fertility)


def guess_scripts(words: Sequence[str]) -> tuple[str, ...]:
    """The scripts in wide use, except Latin, whose letters occur in more than one word in a
    hundred.
    """
    return tuple(
        script
        for script in SCRIPTS
        if script != "Latin"
        and sum(script_pattern((script,)).search(word) is not None for word in words)
        > TARGET_SHARE * len(words)
    )


def _checked(paths: Sequence[Path]) -> Sequence[Path]:
    """Raise `UserError` unless all paths exist and have different names; return them."""
    for path in paths:
        if not path.exists():
            raise UserError(f"--text {path} does not exist; correct the path.")
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("two --text files have the same name, which the tables use; rename one.")
    return paths


def _read(path: Path) -> list[str]:
    texts: list[str] = []
    left = HELDOUT_CHARACTERS
    for text in read_source(Source(path=str(path), language="en")):
        texts.append(text)
        left -= len(text)
        if left <= 0:
            break
    return [text for text in texts if text]


def _show(checked: TokenizerVerdict) -> None:
    show("fertility", FERTILITY_COLUMNS, fertility_rows(checked.fertility))
    show("proofs", PROOF_COLUMNS, proof_rows(checked.proofs))
    for proof in checked.proofs:
        if proof.failures:
            more = len(proof.failures) - SHOWN
            say(f"broken: {proof.invariant}")
            for failure in proof.failures[:SHOWN]:
                say(f"  {failure}")
            if more > 0:
                say(f"  ... and {more:,} more")
    say("every invariant holds" if checked.whole else "not every invariant holds")
