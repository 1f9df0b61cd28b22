"""Extend a tokenizer: learn pieces, write, read back, prove, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.loaded import has_weights, open_model
from cpt_merge.core.artifact import Staging
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.data.sources import Corpus
from cpt_merge.tokenizer_ext.base_tokenizer import read_base, read_chat_tokens
from cpt_merge.tokenizer_ext.config import TokenizerConfig
from cpt_merge.tokenizer_ext.embeddings.resize import check_resizable
from cpt_merge.tokenizer_ext.extension_report import Report, make_report, publish
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken
from cpt_merge.tokenizer_ext.learn.grow import learn_languages
from cpt_merge.tokenizer_ext.pipelines import say_differences
from cpt_merge.tokenizer_ext.unextended import keep_tokenizer
from cpt_merge.tokenizer_ext.verify.invariants import prove, read_case, require
from cpt_merge.tokenizer_ext.verify.samples import heldout_texts, scripts_of, take_samples
from cpt_merge.tokenizer_ext.writing import RowLayout, lay_out, write_tokenizer
from cpt_merge.tracking import Tracker


def extend_tokenizer(
    config: TokenizerConfig,
    base: Path,
    corpus: Corpus,
    out: Path,
    chat: Path | None = None,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Extend the tokenizer in `base` with pieces learnt from `corpus`, and write it into the empty
    directory `out`.

    Tokens that only the tokenizer in `chat` has keep their ids. A configuration without languages
    keeps the base's own tokenizer. Returns the numbers of the summary.
    Raises `UserError` for unusable input, or if an invariant does not hold on the written files;
    `out` then stays empty. Long text is counted in several processes, so a script that calls this
    needs an `if __name__ == "__main__":` guard.
    """
    tracker = tracker or Tracker()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty; empty it, or give another directory.")
    if has_weights(base):
        check_resizable(open_model(base))
    if not config.languages():
        return _keep(config, base, out, chat, tracker)
    start = read_base(base)
    chat_tokens = read_chat_tokens(chat, start) if chat else []
    say_differences(start, chat)
    say(f"tokenizer of {base}: {start.family.name}, {len(start.ids):,} tokens, {start.rows:,} rows")
    learned = learn_languages(start, corpus, config)
    pieces = [piece for language in learned for piece in language.pieces]
    layout = lay_out(start, chat_tokens, pieces, config.pad_to_multiple)
    say(
        f"{layout.rows:,} rows: {start.rows:,} of the base, {len(layout.pieces):,} new pieces, "
        f"{len(layout.chat):,} tokens of the chat model alone, {len(layout.padding):,} reserved"
    )
    _say_moved(chat_tokens, layout)
    for token, id_ in start.rowless.items():
        say(f"{token!r} of the base has the id {id_}, beyond its rows; it gets the mean row")
    readable = [start.family.readable(piece) for piece in pieces]
    samples = take_samples(heldout_texts(corpus), scripts_of(config.languages()), readable)
    with Staging(out).filling() as folder:
        write_tokenizer(start, layout, folder)
        proofs = prove(read_case(start, folder, chat, samples))
        require(proofs)
    case = read_case(start, out, chat, samples)
    report = make_report(case, learned, config.new_pieces, proofs)
    publish(report, out, tracker)
    results = summarize(start.rows, layout, report)
    tracker.summary({f"tokenizer/{name}": value for name, value in results.items()})
    return results


def _keep(
    config: TokenizerConfig, base: Path, out: Path, chat: Path | None, tracker: Tracker
) -> dict[str, Any]:
    """No new pieces: the base's own tokenizer, with the chat format's tokens."""
    with Staging(out).filling() as folder:
        vocabulary = keep_tokenizer(base, chat, folder, config.pad_to_multiple)
    results: dict[str, Any] = {
        "base_rows": vocabulary.base_rows,
        "rows": vocabulary.rows,
        "new_pieces": 0,
        "chat_tokens": len(vocabulary.chat),
        "padding_rows": len(vocabulary.padding),
    }
    tracker.summary({f"tokenizer/{name}": value for name, value in results.items()})
    return results


def _say_moved(chat_tokens: Sequence[AddedToken], layout: RowLayout) -> None:
    """Report the chat model's tokens whose ids the base uses for others."""
    ids = {token.content: token.id for token in layout.added}
    for token in chat_tokens:
        if ids[token.content] != token.id:
            say(
                f"{token.content!r} of the chat model moves from id {token.id}, which the base "
                f"uses, to {ids[token.content]}"
            )


def summarize(base_rows: int, layout: RowLayout, report: Report) -> dict[str, Any]:
    """The numbers of the summary."""
    results: dict[str, Any] = {
        "base_rows": base_rows,
        "rows": layout.rows,
        "new_pieces": len(layout.pieces),
        "chat_tokens": len(layout.chat),
        "padding_rows": len(layout.padding),
    }
    for one in report.fertility:
        before, after = one.tokens_per_character
        results[f"{one.language}/tokens_per_character_before"] = round(before, 4)
        results[f"{one.language}/tokens_per_character"] = round(after, 4)
        results[f"{one.language}/changed_documents"] = round(one.changed, 4)
    return results
