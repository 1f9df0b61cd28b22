"""How much of each source a run reads: weights, epochs, token budgets, shares of languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cpt_merge.core.errors import UserError
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.store import Store

MANY_EPOCHS = 4  # up to here repeated text is worth about as much as new (arXiv 2305.16264)
MOST_EPOCHS = 8  # more have to be allowed
SLACK = 0.005  # budgets may miss the tokens by this share and are scaled: a run is whole steps


@dataclass(frozen=True)
class SourceShare:
    """What a run reads of one source. `share` is of all tokens of the run; all shares sum to 1."""

    name: str
    language: str
    share: float
    tokens: float
    epochs: float  # how many times it is read; 0 if its size is unknown


def mixture(corpus: Corpus, available: Sequence[int | None], tokens: int) -> list[SourceShare]:
    """The shares of the sources in a run of `tokens` tokens.

    `available` are the training tokens of each source (None: unknown). Within the share of each
    language (`corpus.shares`; without it, within all tokens) sources with `tokens` or `epochs` take
    that amount, and the others divide the rest by their weights. Languages that `corpus.shares`
    leaves out, and sources with weight 0, are not read. Raises `UserError` for amounts that do not
    fit.
    """
    groups = [(f"{tokens:,}", float(tokens), corpus.sources)]
    if corpus.shares:
        groups = []
        for language, share in corpus.shares.items():
            label = f"{share * tokens:,.0f} to {language} (corpus.shares)"
            groups.append((label, share * tokens, corpus.of_language(language)))
    sizes = dict(zip(map(id, corpus.sources), available, strict=True))
    taken: dict[int, float] = {}
    for label, total, sources in groups:
        taken |= _divide(label, total, [(source, sizes[id(source)]) for source in sources])
    return [
        SourceShare(
            source.name, source.language, taken.get(id(source), 0.0) / tokens,
            taken.get(id(source), 0.0), taken.get(id(source), 0.0) / size if size else 0.0,
        )
        for source, size in zip(corpus.sources, available, strict=True)
    ]  # fmt: skip


def mixed(corpus: Corpus, weights: Mapping[str, float], shares: Mapping[str, float]) -> Corpus:
    """The corpus with other weights of some sources, and other shares of languages.

    A weight is of one source, by its name, or of each source of a language. Raises `UserError` for
    names that the corpus does not have, and for sources with `tokens` or `epochs`, which are
    amounts of a whole run.
    """
    if not weights and not shares:
        return corpus
    names = [source.name for source in corpus.sources]
    known = {"weights": [*names, *corpus.languages()], "shares": corpus.languages()}
    for key, given in (("weights", weights), ("shares", shares)):
        if strange := [name for name in given if name not in known[key]]:
            raise UserError(
                f"`{key}` names {', '.join(strange)}, but there are "
                f"{', '.join(dict.fromkeys(known[key]))}"
            )
    budgets = [one.name for one in corpus.sources if one.tokens is not None or one.epochs]
    if budgets:
        raise UserError(
            f"{', '.join(budgets)} has `tokens` or `epochs`, which are amounts of the whole run; "
            "give it a weight, so that phases can have mixtures of their own"
        )
    sources = [
        one.model_copy(
            update={"weight": weights.get(one.name, weights.get(one.language, one.weight))}
        )
        for one in corpus.sources
    ]
    return corpus.model_copy(update={"sources": sources, "shares": shares or corpus.shares})


def total_shares(parts: Sequence[Sequence[SourceShare]]) -> list[SourceShare]:
    """What a run reads of each source, given that of its parts."""
    whole = sum(share.tokens for part in parts for share in part)
    return [
        replace(
            of_source[0],
            share=sum(one.tokens for one in of_source) / whole,
            tokens=sum(one.tokens for one in of_source),
            epochs=sum(one.epochs for one in of_source),
        )
        for of_source in zip(*parts, strict=True)
    ]


def _divide(label: str, total: float, sources: list[tuple[Source, int | None]]) -> dict[int, float]:
    """The tokens of each source (by its id) of a group that has `total` tokens."""
    wanted = {id(source): _budget(source, size) for source, size in sources}
    budgets = {source: budget for source, budget in wanted.items() if budget is not None}
    weights = {
        id(one): 1.0 if one.weight is None else one.weight
        for one, _ in sources
        if id(one) not in budgets
    }
    fixed = sum(budgets.values())
    names = ", ".join(source.name for source, _ in sources)
    if fixed > total * (1 + SLACK) or (weights and fixed >= total):
        raise UserError(
            f"`tokens` and `epochs` of {names} ask for {fixed:,.0f} tokens, but training.tokens is "
            f"{label}; {'they leave nothing for the sources with weights; ' if weights else ''}"
            "lower them or raise it."
        )
    if weights and not any(weights.values()):
        raise UserError(f"no source of {names} has a weight above 0; give one of them a weight.")
    if not weights and fixed < total * (1 - SLACK):
        raise UserError(
            f"`tokens` and `epochs` of {names} ask for {fixed:,.0f} tokens, but training.tokens is "
            f"{label} and no source takes the rest by weight; lower training.tokens or give one "
            "source a weight."
        )
    if not weights:
        return {source: budget * total / fixed for source, budget in budgets.items()}
    left, sum_of_weights = total - fixed, sum(weights.values())
    return budgets | {source: left * weight / sum_of_weights for source, weight in weights.items()}


def _budget(source: Source, size: int | None) -> float | None:
    if source.tokens is not None:
        return float(source.tokens)
    if source.epochs is None:
        return None
    if size is None:
        raise UserError(
            f"{source.name} has epochs = {source.epochs:g}, but its number of tokens is known only "
            "after `cpt-merge data RECIPE`; run it first."
        )
    return source.epochs * size


def check_repeats(corpus: Corpus, shares: Sequence[SourceShare], bound: str = "") -> None:
    """Raise `UserError` if a run reads a source very often without having been told to.

    `bound` stands before the number of epochs in the message: "at least ".
    """
    if corpus.allow_repeats:
        return
    for source, share in zip(corpus.sources, shares, strict=True):
        if source.epochs is None and share.epochs > MOST_EPOCHS:
            raise UserError(
                f"{share.name}: training.tokens would read this source {bound}{share.epochs:,.0f} "
                f"times ({share.tokens:,.0f} tokens of {share.tokens / share.epochs:,.0f}); lower "
                "training.tokens, add text, or set corpus.allow_repeats: true."
            )


def by_size(store: Store) -> list[SourceShare]:
    """The shares of a run that reads each source in proportion to its size."""
    total = sum(source.train.tokens for source in store.info.sources)
    return [
        SourceShare(
            source.name, source.language, source.train.tokens / total, source.train.tokens, 0.0
        )
        for source in store.info.sources
    ]


def bytes_per_token(store: Store, shares: Sequence[SourceShare]) -> float:
    """The mean number of UTF-8 bytes of text per token of the run."""
    return sum(
        share.share * source.train.bytes / source.train.tokens
        for share, source in zip(shares, store.info.sources, strict=True)
    )


def describe(shares: Sequence[SourceShare]) -> list[str]:
    """One line per source: share, tokens, epochs."""
    width = max(len(share.name) for share in shares)
    return [
        f"{share.name:{width}}  {share.share:7.2%}  {share.tokens:15,.0f} tokens"
        + (f"  {share.epochs:8.2f} epochs" if share.epochs else "")
        for share in shares
    ]
