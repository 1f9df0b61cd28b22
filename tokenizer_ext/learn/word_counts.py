"""Count the words of a text, in several processes if it is long, in a compact form."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import Meter
from cpt_merge.data.sources import Corpus, Split

Splitter = Callable[[str], list[str]]
"""Finds a document's words, in the alphabet of the vocabulary; can be sent to a process."""

SEPARATOR = "\n"  # not in words: runs have no line breaks, the byte alphabet writes them as letters
WORDS_IN_A_BLOCK = 1_024
BLOCK = 1_000_000  # characters that are counted at once
BLOCKS_ALONE = 4  # counted in this process before others are started
MAX_PROCESSES = 32  # one process reads the text for all

_splitter: Splitter  # in a counting process


@dataclass(frozen=True)
class Words:
    """Distinct words and their frequencies, in blocks: the words joined by SEPARATOR, and an array.

    A Counter of them takes five times the memory.
    """

    blocks: list[tuple[str, NDArray[np.int32]]]

    @staticmethod
    def of(counts: Counter[str]) -> Words:
        """Take over `counts`, and leave it empty."""
        blocks = []
        while counts:
            taken = [counts.popitem() for _ in range(min(WORDS_IN_A_BLOCK, len(counts)))]
            blocks.append(
                (
                    SEPARATOR.join(word for word, _ in taken),
                    np.array([count for _, count in taken], np.int32),
                )
            )
        return Words(blocks)

    def distinct(self) -> int:
        """The number of distinct words."""
        return sum(len(frequencies) for _, frequencies in self.blocks)

    def characters(self) -> Counter[str]:
        """The frequency of each character in all words of the text."""
        counts: Counter[str] = Counter()
        for text, frequencies in self.blocks:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            found, which = np.unique(codes, return_inverse=True)
            sums = np.bincount(which, frequencies[np.cumsum(codes == ord(SEPARATOR))])
            counts.update(
                {
                    chr(code): int(total)
                    for code, total in zip(found.tolist(), sums.tolist(), strict=True)
                }
            )
        del counts[SEPARATOR]
        return counts


def read_documents(
    corpus: Corpus, language: str, split: Split, max_characters: int
) -> Iterator[str]:
    """Yield documents in one language, source by source, until they have `max_characters`.

    Raises `UserError` for a document that is not valid Unicode text.
    """
    left = max_characters
    for source in corpus.of_language(language):
        for number, text in enumerate(corpus.documents(source, split), start=1):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{source.path}: {split} document {number} holds a lone surrogate, so it is "
                    "not valid Unicode; repair or remove it."
                ) from None
            yield text
            left -= len(text)
            if left <= 0:
                return


def count_words(texts: Iterable[str], splitter: Splitter, label: str) -> Words:
    """Count the words of all texts; `label` names the progress display."""
    words: Counter[str] = Counter()
    blocks = _blocks(texts)
    with Meter(label, None, "characters") as meter:
        for block in islice(blocks, BLOCKS_ALONE):
            words.update(word for text in block for word in splitter(text))
            meter.advance(sum(map(len, block)))
        for size, counts in _count_elsewhere(blocks, splitter):
            for word, count in counts.items():
                words[word] += count
            meter.advance(size)
    return Words.of(words)


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _count_elsewhere(
    blocks: Iterator[list[str]], splitter: Splitter
) -> Iterator[tuple[int, dict[str, int]]]:
    """(characters, counts) of every block, in order, from one process per core."""
    first = next(blocks, None)
    if first is None:
        return
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    waiting: deque[tuple[int, Future[dict[str, int]]]] = deque()
    context = get_context("spawn")  # a forked child would inherit the locks of other threads
    try:
        with ProcessPoolExecutor(
            processes, context, initializer=_start, initargs=(splitter,)
        ) as pool:
            for block in chain([first], blocks):
                waiting.append((sum(map(len, block)), pool.submit(_count_block, block)))
                if len(waiting) > 2 * processes:
                    size, counts = waiting.popleft()
                    yield size, counts.result()
            for size, counts in waiting:
                yield size, counts.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that counts words was killed, most likely for lack of memory; give the job "
            "more memory, lower tokenizer.max_characters, or add a __main__ guard to a script that "
            "calls extend_tokenizer."
        ) from None


def _start(splitter: Splitter) -> None:
    global _splitter
    _splitter = splitter


def _count_block(block: list[str]) -> dict[str, int]:
    return dict(Counter(word for text in block for word in _splitter(text)))
