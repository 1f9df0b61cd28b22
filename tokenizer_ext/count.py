"""Count the words of a text, in several processes once it is long."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import Meter
from cpt_merge.tokenizer_ext.family import Splitter
from cpt_merge.tokenizer_ext.words import Words

BLOCK = 1_000_000  # characters that are counted at once
BLOCKS_ALONE = 4  # so many are counted in this process, before others are worth starting
MAX_PROCESSES = 32  # one process reads the text for all

_splitter: Splitter  # of a counting process


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
