"""Continued BPE against its definition: what it counts is what a tokenizer with the new merges does."""

from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer_ext.fast import build_model, extend_model, merges_of
from tokenizer_ext.learn import ContinuedBpe

LETTERS = "abc"


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
    """Merges such as a trained tokenizer has: each of a pair that the earlier ones can make."""
    pieces, merges = list(LETTERS), []
    while len(merges) < number:
        merge = random.choice(pieces), random.choice(pieces)
        if merge not in merges and len("".join(merge)) <= 4:
            merges.append(merge)
            pieces.append("".join(merge))
    return merges


def learn(content: dict, words: dict[str, int], size: int, min_frequency: int = 1):
    tokenizer = build_model(content)
    bpe = ContinuedBpe(merges_of(content), content["model"]["vocab"], lambda piece: len(piece) <= 6)
    for word, count in words.items():
        bpe.add(tokenizer.encode(word).tokens, count)
    return bpe.learn(size, min_frequency)


def count_tokens(content: dict, words: dict[str, int]) -> int:
    tokenizer = build_model(content)
    return sum(len(tokenizer.encode(word).tokens) * count for word, count in words.items())


def with_pieces(content: dict, pieces: list[str]) -> dict:
    start = len(content["model"]["vocab"])
    ids = {piece: start + rank for rank, piece in enumerate(pieces)}
    return extend_model(content, ids, settled=len(merges_of(content)))


@settings(max_examples=150, deadline=None)
@given(
    words=st.dictionaries(st.text(LETTERS, min_size=2, max_size=12), st.integers(1, 5), min_size=1, max_size=12),
    seed=st.integers(0, 50),
    old=st.integers(0, 6),
    size=st.integers(1, 12),
)
def test_every_piece_is_reachable_and_saves_what_was_counted(words, seed, old, size) -> None:
    content = content_of(some_merges(Random(seed), old))
    growth = learn(content, words, size)
    assert len(set(growth.pieces)) == len(growth.pieces)
    assert not set(growth.pieces) & set(content["model"]["vocab"])
    extended = with_pieces(content, growth.pieces)
    tokenizer = build_model(extended)
    assert [tokenizer.encode(piece).tokens for piece in growth.pieces] == [[piece] for piece in growth.pieces]
    assert count_tokens(content, words) - count_tokens(extended, words) == sum(growth.saved)
    used = {token for word in words for token in tokenizer.encode(word).tokens}
    assert len(used & set(growth.pieces)) == growth.used


@settings(max_examples=60, deadline=None)
@given(
    words=st.dictionaries(st.text(LETTERS, min_size=2, max_size=10), st.integers(1, 5), min_size=1, max_size=8),
    size=st.integers(1, 6),
)
def test_each_step_takes_the_most_frequent_string_of_two_neighbours(words, size) -> None:
    """The plain algorithm, that counts everything anew at each step, finds the same pieces."""
    content = content_of([("a", "b")])
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
        if not counts:
            break
        pieces.append(min(counts, key=lambda text: (-counts[text], text)))
    assert learn(content, words, size).pieces == pieces


def test_rare_pairs_are_left_alone() -> None:
    assert learn(content_of([]), {"ab": 3, "bc": 2}, 10, min_frequency=3).pieces == ["ab"]


def test_no_piece_reaches_across_a_break() -> None:
    bpe = ContinuedBpe([], LETTERS, lambda piece: True)
    bpe.add(["a", "", "b"], 5)
    bpe.add(["a"], 5)
    bpe.add(["b"], 5)
    assert bpe.learn(10, 1).pieces == []


def test_an_old_piece_takes_part_in_what_new_pieces_make_possible() -> None:
    """`abc` is old and made of `a bc`; with the new `ab` it can also come from `ab c`, as in SentencePiece."""
    content = content_of([("b", "c"), ("a", "bc")])
    extended = with_pieces(content, ["ab"])
    assert ["ab", "c"] in extended["model"]["merges"]
    assert [merge for merge in extended["model"]["merges"] if "ab" not in merge][:2] == [["b", "c"], ["a", "bc"]]
