"""Continued BPE against its definition: what it counts is what a tokenizer with the new merges
does.
"""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_merge.tokenizer_ext.families.tokenizer_json import build_model, extend_model, merges_of
from cpt_merge.tokenizer_ext.learn.bpe import ContinuedBpe, Growth
from cpt_merge.tokenizer_ext.learn.symbols import BREAK, Symbols, WordArrays, pair_keys

LETTERS = "abc"
WORDS = st.dictionaries(
    st.text(LETTERS, min_size=1, max_size=12), st.integers(1, 5), min_size=1, max_size=12
)


def content_of(merges: list[tuple[str, str]]) -> dict:
    vocabulary = dict.fromkeys([*LETTERS, *(left + right for left, right in merges)])
    return {
        "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {
            "type": "BPE", "vocab": {piece: id_ for id_, piece in enumerate(vocabulary)},
            "merges": [list(merge) for merge in merges],
        },
    }  # fmt: skip


def some_merges(random: Random, number: int) -> list[tuple[str, str]]:
    """Merges such as a trained tokenizer has: each of a pair that the earlier ones can make.

    Some lead nowhere.
    """
    pieces, merges = list(LETTERS), []
    while len(merges) < number:
        merge = random.choice(pieces), random.choice(pieces)
        if merge not in merges and len("".join(merge)) <= 4:
            merges.append(merge)
            pieces.append("".join(merge))
    return merges


def learn(content: dict, words: dict[str, int], size: int, min_frequency: int = 1) -> Growth:
    tokenizer = build_model(content)
    arrays = WordArrays()
    for word, count in words.items():
        ids = tokenizer.encode(word).ids
        arrays.add(np.array(ids, np.int32), np.array([len(ids)]), np.array([count]))
    return ContinuedBpe(
        list(content["model"]["vocab"]), arrays, lambda piece: len(piece) <= 6, min_frequency
    ).learn(size)


def with_pieces(content: dict, pieces: list[str]) -> dict:
    start = len(content["model"]["vocab"])
    ids = {piece: start + rank for rank, piece in enumerate(pieces)}
    return extend_model(content, ids, settled=len(merges_of(content)))


def count_tokens(content: dict, words: dict[str, int]) -> dict[str, int]:
    tokenizer, counts = build_model(content), {}
    for word, count in words.items():
        for token in tokenizer.encode(word).tokens:
            counts[token] = counts.get(token, 0) + count
    return counts


@settings(max_examples=300, deadline=None)
@given(
    words=WORDS,
    seed=st.integers(0, 50),
    old=st.integers(0, 6),
    size=st.integers(1, 12),
    min_frequency=st.integers(1, 4),
)
def test_every_piece_is_reachable_and_the_words_are_split_as_was_counted(
    words, seed, old, size, min_frequency
) -> None:
    content = content_of(some_merges(Random(seed), old))
    growth = learn(content, words, size, min_frequency)
    pieces = list(growth.pieces)
    assert not set(pieces) & set(content["model"]["vocab"])
    extended = with_pieces(content, pieces)
    tokenizer = build_model(extended)
    assert [tokenizer.encode(piece).tokens for piece in pieces] == [[piece] for piece in pieces]
    assert growth.usage == count_tokens(extended, words)


@settings(max_examples=200, deadline=None)
@given(
    words=WORDS,
    seed=st.integers(0, 50),
    old=st.integers(0, 4),
    size=st.integers(1, 6),
    least=st.integers(1, 3),
)
def test_each_step_takes_the_most_frequent_string_of_two_neighbours(
    words, seed, old, size, least
) -> None:
    """The plain algorithm, that counts everything anew at each step by what two neighbours spell,
    finds the same.
    """
    content = content_of(some_merges(Random(seed), old))
    pieces: list[str] = []
    while len(pieces) < size:
        extended = with_pieces(content, pieces)
        tokenizer = build_model(extended)
        counts: dict[str, int] = {}
        for word, count in words.items():
            tokens = tokenizer.encode(word).tokens
            for left, right in pairwise(tokens):
                if left + right not in extended["model"]["vocab"] and len(left + right) <= 6:
                    counts[left + right] = counts.get(left + right, 0) + count
        counts = {text: count for text, count in counts.items() if count >= least}
        if not counts:
            break
        pieces.append(min(counts, key=lambda text: (-counts[text], text)))
    assert list(learn(content, words, size, least).pieces) == pieces


@settings(max_examples=100, deadline=None)
@given(words=WORDS, size=st.integers(1, 12))
def test_a_piece_is_merged_from_the_same_two_wherever_it_stands(words, size) -> None:
    growth = learn(content_of([]), words, size)
    for number, (piece, halves) in enumerate(growth.pieces.items()):
        before = build_model(with_pieces(content_of([]), list(growth.pieces)[:number]))
        assert tuple(before.encode(piece).tokens) == halves


def test_rare_pairs_are_left_alone() -> None:
    assert list(learn(content_of([]), {"ab": 3, "bc": 2}, 10, min_frequency=3).pieces) == ["ab"]


def test_no_piece_reaches_across_a_break() -> None:
    arrays = WordArrays()
    arrays.add(np.array([0, BREAK, 1, 0, 1], np.int32), np.array([3, 1, 1]), np.array([5, 5, 5]))
    assert not ContinuedBpe(list(LETTERS), arrays, lambda piece: True, 1).learn(10).pieces


@pytest.fixture
def symbols() -> Symbols:
    """The words `0 1 0` (twice) and `1 0` (three times)."""
    arrays = WordArrays()
    arrays.add(np.array([0, 1, 0, 1, 0], np.int32), np.array([3, 2]), np.array([2, 3]))
    return Symbols(arrays)


def test_pairs_are_counted_within_words(symbols) -> None:
    keys, counts = symbols.count_pairs()
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == {
        0 << 32 | 1: 2,
        1 << 32 | 0: 5,
    }


def test_merging_joins_slots_and_neighbours_are_still_found(symbols) -> None:
    symbols.index(2)
    places = symbols.places(1, 0)
    assert places.tolist() == [2, 5]
    symbols.merge(places, 2)
    assert symbols.symbol.tolist() == [BREAK, 0, 2, -2, BREAK, 2, -2, BREAK]
    assert symbols.places(0, 2).tolist() == [1]
    assert symbols.preceding(np.array([4])).tolist() == [2]
    assert symbols.usage(3).tolist() == [2, 0, 5]


def test_a_break_is_put_into_all_other_pairs(symbols) -> None:
    symbols.keep_together(pair_keys(np.array([1]), np.array([0])))
    assert symbols.symbol.tolist() == [BREAK, 0, BREAK, 1, 0, BREAK, 1, 0, BREAK]
    assert symbols.weight[symbols.symbol >= 0].tolist() == [2, 2, 2, 3, 3]
