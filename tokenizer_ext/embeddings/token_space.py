"""An auxiliary space in which tokens with similar contexts in the new text are close; `focus` uses
it.

FOCUS (Dobler and de Melo, EMNLP 2023, https://aclanthology.org/2023.emnlp-main.829) gives a new
piece the weighted mean of old tokens' rows. The weights are the sparsemax of the cosines between
the piece and old tokens in an auxiliary space that is trained on the new text, as the extended
tokenizer splits it. FOCUS trains the space with fastText. Here, the matrix that word2vec's
skip-gram factorises implicitly is factorised explicitly (Levy and Goldberg, NeurIPS 2014): the
positive pointwise mutual information of tokens within a window, truncated to its largest singular
values. This needs numpy only, and a seed decides the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.core.progress import Meter
from cpt_merge.data.sources import Corpus

Ids = NDArray[np.int64]

WINDOW = 5  # tokens to either side; a pair at distance d counts 1/d, like word2vec's random windows
MINIMUM = 5  # occurrences; rarer tokens get no vector
DIMENSIONS = 100
OVERSAMPLING, POWERS = 10, 3  # of the randomised factorisation
_DOCUMENTS = 1000  # tokenised at once
_CHUNK = 1 << 20  # tokens counted at once
_LARGEST = 1024  # scores of a row that are sorted first
_ENTRIES = 1 << 16  # matrix entries multiplied at once


@dataclass(frozen=True)
class TokenSpace:
    """Unit vectors of the tokens, shape (rows, dimensions); zeros for tokens that are too rare in
    the text.
    """

    vectors: Float32

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which tokens have a vector, shape (rows,)."""
        return np.array(self.vectors.any(axis=1))

    def weights(self, tokens: Sequence[int], others: Sequence[int]) -> Float32:
        """The similarity of the others to each token, shape (tokens, others): the sparsemax of
        their cosines.

        A token has weight 0 for itself.
        """
        cosines = self.vectors[list(tokens)] @ self.vectors[list(others)].T
        same = np.equal.outer(np.array(tokens, np.int64), np.array(others, np.int64))
        cosines[same] = -2  # below all cosines
        return sparsemax(cosines)


def train_space(
    corpus: Corpus, tokenizer: Path, rows: int, characters: int, seed: int
) -> TokenSpace:
    """Train the space of the `rows` tokens of a tokenizer on up to `characters` of text per
    language.
    """
    documents = list(read_tokens(corpus, tokenizer, characters))
    occurrences = np.bincount(np.concatenate([*documents, np.empty(0, np.int32)]), minlength=rows)
    frequent = np.flatnonzero(occurrences >= MINIMUM)
    vectors = np.zeros((rows, DIMENSIONS), np.float32)
    if len(frequent) > 1:
        number = np.full(rows, -1)
        number[frequent] = np.arange(len(frequent))
        pmi = positive_pmi(count_pairs((number[document] for document in documents), len(frequent)))
        found = factorise(pmi, DIMENSIONS, np.random.default_rng(seed))
        vectors[frequent, : found.shape[1]] = found
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(norms > 0, norms, 1)
    return TokenSpace(vectors)


def read_tokens(corpus: Corpus, tokenizer: Path, characters: int) -> Iterator[NDArray[np.int32]]:
    """The training documents as token ids, up to `characters` of each language."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    with Meter("embeddings: text", None, "documents") as meter:
        for language in corpus.languages():
            texts = _texts(corpus, language, characters)
            while batch := list(islice(texts, _DOCUMENTS)):
                for encoding in encoder.encode_batch(batch, add_special_tokens=False):
                    yield np.array(encoding.ids, np.int32)
                meter.advance(len(batch))


def _texts(corpus: Corpus, language: str, characters: int) -> Iterator[str]:
    for source in corpus.of_language(language):
        for text in corpus.documents(source, "train"):
            yield text[:characters]
            characters -= len(text)
            if characters <= 0:
                return


@dataclass(frozen=True)
class SymmetricMatrix:
    """A sparse symmetric matrix of `size` rows: its entries by row, then column."""

    size: int
    rows: Ids
    columns: Ids
    values: Float32

    def __matmul__(self, dense: Float32) -> Float32:
        """The product with a dense matrix, shape (size, k)."""
        product = np.zeros_like(dense)
        for start in range(0, len(self.rows), _ENTRIES):
            part = slice(start, start + _ENTRIES)
            rows = self.rows[part]
            firsts = np.flatnonzero(np.diff(rows, prepend=-1))
            terms = self.values[part, None] * dense[self.columns[part]]
            product[rows[firsts]] += np.add.reduceat(terms, firsts, axis=0)
        return product


def count_pairs(documents: Iterable[Ids], size: int, window: int = WINDOW) -> SymmetricMatrix:
    """How often two of `size` tokens are within `window` of each other, each pair weighted by 1 /
    distance.
    """
    keys, counts = np.empty(0, np.int64), np.empty(0)
    for stream in _streams(documents, window):
        found, weights = [keys], [counts]
        for distance in range(1, window + 1):
            one, other = stream[:-distance], stream[distance:]
            both = (one >= 0) & (other >= 0)
            found.append(one[both] * size + other[both])
            weights.append(np.full(len(found[-1]), 1 / distance))
        keys, counts = _sum_equal(np.concatenate(found), np.concatenate(weights))
    rows, columns = np.divmod(keys, size)
    keys, counts = _sum_equal(
        np.concatenate([keys, columns * size + rows]), np.concatenate([counts, counts])
    )
    return SymmetricMatrix(size, keys // size, keys % size, counts.astype(np.float32))


def _streams(documents: Iterable[Ids], window: int) -> Iterator[Ids]:
    """Documents end to end, separated by a window of -1, in arrays of about `_CHUNK` tokens."""
    gap, parts, length = np.full(window, -1, np.int64), list[Ids](), 0
    for document in documents:
        parts += [document, gap]
        length += len(document)
        if length >= _CHUNK:
            yield np.concatenate(parts)
            parts, length = [], 0
    if parts:
        yield np.concatenate(parts)


def _sum_equal(keys: Ids, values: NDArray[np.float64]) -> tuple[Ids, NDArray[np.float64]]:
    """The distinct keys in order, each with the sum of its values."""
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[firsts], np.add.reduceat(values, firsts) if len(firsts) else values


def positive_pmi(counts: SymmetricMatrix, shift: float = 1.0) -> SymmetricMatrix:
    """max(0, log(n_ij n / (n_i n_j)) - log shift)."""
    totals = np.bincount(counts.rows, counts.values, counts.size)
    expected = totals[counts.rows] * totals[counts.columns] / totals.sum()
    pmi = np.log(counts.values / expected) - np.log(shift)
    kept = pmi > 0
    return SymmetricMatrix(
        counts.size, counts.rows[kept], counts.columns[kept], pmi[kept].astype(np.float32)
    )


def factorise(matrix: SymmetricMatrix, dimensions: int, random: np.random.Generator) -> Float32:
    """Rows U |S|^(1/2) of the largest singular values, shape (size, dimensions), by randomised
    subspace iteration.

    Halko, Martinsson and Tropp, SIAM Review 2011, algorithm 4.4. The root: Levy, Goldberg and
    Dagan, TACL 2015.
    """
    width = min(dimensions + OVERSAMPLING, matrix.size)
    basis, _ = np.linalg.qr(
        matrix @ random.standard_normal((matrix.size, width)).astype(np.float32)
    )
    for _ in range(2 * POWERS):
        basis, _ = np.linalg.qr(matrix @ basis)
    values, vectors = np.linalg.eigh(basis.T @ (matrix @ basis))
    largest = np.argsort(-np.abs(values), kind="stable")[:dimensions]
    found: Float32 = (basis @ vectors[:, largest] * np.sqrt(np.abs(values[largest]))).astype(
        np.float32
    )
    return found


def sparsemax(scores: Float32) -> Float32:
    """For each row, the nearest point of the simplex: most entries are 0, and they sum to 1.

    Martins and Astudillo, ICML 2016, algorithm 1.
    """
    largest = min(_LARGEST, scores.shape[1])  # they contain the support, nearly always
    for count in (largest, scores.shape[1]):
        ordered = -np.sort(np.partition(-scores, count - 1, axis=1)[:, :count], axis=1)
        sums = np.cumsum(ordered, axis=1) - 1
        ranks = np.arange(1, count + 1)
        support = (ranks * ordered > sums).sum(axis=1)
        if (support < count).all():
            break
    threshold = sums[np.arange(len(scores)), support - 1] / support
    weights: Float32 = np.maximum(scores - threshold[:, None], 0).astype(np.float32)
    return weights
