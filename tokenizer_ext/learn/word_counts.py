"""Count the words of a text, in several processes once it is long, and hold the counts compactly."""

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

SEPARATOR = "\n"  # in no word: runs of a script have no line break, and in the byte alphabet it is another letter
WORDS_IN_A_BLOCK = 1_024
BLOCK = 1_000_000  # characters that are counted at once
BLOCKS_ALONE = 4  # so many are counted in this process, before others are worth starting
MAX_PROCESSES = 32  # one process reads the text for all

_splitter: Splitter  # of a counting process


@dataclass(frozen=True)
class Words:
    """Distinct words and how often each occurs, in blocks: the words joined by SEPARATOR, and their frequencies."""

    blocks: list[tuple[str, NDArray[np.int32]]]

    @staticmethod
    def of(counts: Counter[str]) -> Words:
        """Take over `counts`, which is empty afterwards."""
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
        """How many different words there are."""
        return sum(len(frequencies) for _, frequencies in self.blocks)

    def characters(self) -> Counter[str]:
        """How often each character occurs in the text's words."""
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
    """Documents in one language, from the start of each source in turn, until `max_characters` have been given.

    Raises `UserError` for a document that is no Unicode text.
    """
    left = max_characters
    for source in corpus.of_language(language):
        for number, text in enumerate(corpus.documents(source, split), start=1):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{source.path}: {split} document {number} holds a lone surrogate, so it is no Unicode text; "
                    "repair or remove it."
                ) from None
            yield text
            left -= len(text)
            if left <= 0:
                return


def count_words(texts: Iterable[str], splitter: Splitter, label: str) -> Words:
    """How often each word occurs."""
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
    """(characters, counts) of every block, in order, from as many processes as there are cores for."""
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
            "a process that counts words was ended from outside, most likely for lack of memory; give the job more, "
            "lower tokenizer.max_characters, or see that a script that calls tokenizer_ext has a __main__ guard."
        ) from None


def _start(splitter: Splitter) -> None:
    global _splitter
    _splitter = splitter


def _count_block(block: list[str]) -> dict[str, int]:
    return dict(Counter(word for text in block for word in _splitter(text)))
