"""The space that `focus` goes by, against the definitions."""

import json

import numpy as np
import pytest

from cpt_merge.data.sources import Corpus, Source
from cpt_merge.tokenizer_ext.embeddings.token_space import (
    SymmetricMatrix,
    count_pairs,
    factorise,
    positive_pmi,
    read_tokens,
    sparsemax,
    train_space,
)
from tests.merge.conftest import NEW, write_tokenizer


def dense(matrix):
    found = np.zeros((matrix.size, matrix.size))
    np.add.at(found, (matrix.rows, matrix.columns), matrix.values)
    return found


def random_matrix(size, rank):
    """A symmetric matrix of full storage and low rank, with negative eigenvalues too."""
    vectors, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((size, rank)))
    values = np.linspace(9, 5, rank) * (-1) ** np.arange(rank)
    whole = vectors * values @ vectors.T
    rows, columns = np.divmod(np.arange(size * size), size)
    return SymmetricMatrix(size, rows, columns, whole.ravel().astype(np.float32)), whole


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    random = np.random.default_rng(0)
    scores = random.standard_normal((20, 6)).astype(np.float32)
    found = sparsemax(scores)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert (found >= 0).all()
    assert (found == 0).any()
    others = random.dirichlet(np.full(6, 0.3), 20_000)
    for row, nearest in zip(scores, found, strict=True):
        assert ((row - nearest) ** 2).sum() <= ((row - others) ** 2).sum(1).min() + 1e-6


def test_sparsemax_by_hand():
    scores = np.array([[1.0, 1.0, -1.0], [0.6, 0.2, 0.0], [3.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(
        sparsemax(scores), [[0.5, 0.5, 0], [0.66667, 0.26667, 0.06667], [1, 0, 0]], atol=1e-4
    )


def test_pairs_are_counted_within_the_window_and_within_documents():
    """0 1 0 2 and 2 0: a pair d apart counts 1/d, in both directions, and a token beside itself
    twice.
    """
    counts = count_pairs([np.array([0, 1, 0, 2]), np.array([2, 0])], 3, window=2)
    np.testing.assert_allclose(dense(counts), [[2 * 0.5, 2, 2], [2, 0, 0.5], [2, 0.5, 0]])


def test_tokens_without_a_number_keep_their_place():
    np.testing.assert_allclose(
        dense(count_pairs([np.array([0, -1, 1])], 2, window=2)), [[0, 0.5], [0.5, 0]]
    )


def test_counting_in_parts_gives_the_same(monkeypatch):
    documents = [np.random.default_rng(number).integers(0, 9, 30) for number in range(20)]
    whole = count_pairs(documents, 9)
    monkeypatch.setattr("cpt_merge.tokenizer_ext.embeddings.token_space._CHUNK", 50)
    np.testing.assert_allclose(dense(count_pairs(documents, 9)), dense(whole), rtol=1e-6)


def test_positive_pmi_is_the_formula():
    counts = count_pairs([np.random.default_rng(0).integers(0, 5, 200)], 5)
    n = dense(counts)
    expected = np.log(n * n.sum() / np.outer(n.sum(0), n.sum(1)))
    np.testing.assert_allclose(dense(positive_pmi(counts)), np.maximum(expected, 0), atol=1e-5)


def test_the_product_with_a_dense_matrix(monkeypatch):
    matrix, whole = random_matrix(12, 4)
    right = np.random.default_rng(1).standard_normal((12, 3)).astype(np.float32)
    np.testing.assert_allclose(matrix @ right, whole @ right, atol=1e-4)
    monkeypatch.setattr(
        "cpt_merge.tokenizer_ext.embeddings.token_space._ENTRIES", 7
    )  # parts that end within a row
    np.testing.assert_allclose(matrix @ right, whole @ right, atol=1e-4)


def test_the_factors_are_those_of_the_exact_decomposition():
    matrix, whole = random_matrix(60, 8)
    found = factorise(matrix, 5, np.random.default_rng(0))
    vectors, values, _ = np.linalg.svd(whole)
    exact = vectors[:, :5] * np.sqrt(values[:5])
    np.testing.assert_allclose(found @ found.T, exact @ exact.T, atol=1e-3)


@pytest.fixture
def corpus(tmp_path):
    """`ing` and `ly` stand in like company, `ed` in another; `all` and `de` nowhere."""
    generator = np.random.default_rng(0)
    alike = ["the", "an", "in"]
    lines = [
        f"{generator.choice(alike)} {word} {generator.choice(alike)}" for word in ["ing", "ly"] * 40
    ]
    lines += [f"x {generator.choice(['y', 'z'])} ed q w ed" for _ in range(40)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    return Corpus(sources=[Source(path=str(path), language="en")], heldout=0.01)


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", "cpt")
    return tmp_path / "tokenizer"


def ids_of(tokenizer):
    return json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]


def test_tokens_in_like_company_lie_close(corpus, tokenizer):
    space, ids = train_space(corpus, tokenizer, 48, 10**6, seed=0), ids_of(tokenizer)
    assert space.vectors.shape[0] == 48
    ing, ly, ed = (space.vectors[ids[piece]] for piece in ("ing", "ly", "ed"))
    assert ing @ ly > 0.7 > ing @ ed
    np.testing.assert_allclose(np.linalg.norm(space.vectors[space.known], axis=1), 1, rtol=1e-5)
    assert [piece for piece in NEW if not space.known[ids[piece]]] == ["de", "all"]


def test_the_same_seed_gives_the_same_space(corpus, tokenizer):
    a, b = (train_space(corpus, tokenizer, 48, 10**6, seed=3).vectors for _ in range(2))
    assert a.tobytes() == b.tobytes()


def test_no_more_text_is_read_than_asked_for(corpus, tokenizer):
    whole, part = (list(read_tokens(corpus, tokenizer, characters)) for characters in (10**6, 25))
    assert len(whole) > 100
    assert len(part) == 3
    assert [document.tolist() for document in part[:2]] == [
        document.tolist() for document in whole[:2]
    ]


def test_text_of_rare_tokens_only_gives_an_empty_space(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("the ing\n")
    corpus = Corpus(sources=[Source(path=str(tmp_path / "short.txt"), language="en")])
    assert not train_space(corpus, tokenizer, 48, 100, seed=0).known.any()
