"""Counting in several processes, pruning, and what each further piece brings."""

import json
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.tokenizer_json import build, build_model, extend_model
from cpt_merge.tokenizer_ext.fertility import gain_curve, measure_fertility
from cpt_merge.tokenizer_ext.learn import word_counts
from cpt_merge.tokenizer_ext.learn.bpe import Growth
from cpt_merge.tokenizer_ext.learn.grow import idle_leaves, learn_languages
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.learn.word_counts import Words, count_words, read_documents
from tests.tokenizer_ext.small_tokenizers import CONFIG


def as_counter(words: Words) -> Counter[str]:
    found: Counter[str] = Counter()
    for text, frequencies in words.blocks:
        found.update(dict(zip(text.split("\n"), frequencies.tolist(), strict=True)))
    return found


@pytest.fixture
def splitter(extended, request):
    return read_base(extended.base).family.splitter(Scripts(find_language("ko")))


def test_several_processes_count_what_one_counts(splitter, monkeypatch) -> None:
    texts = [
        f"우리는 오늘 {'공원에 ' * (number % 7)}갔습니다\n도서관은 {number}"
        for number in range(3_000)
    ]
    alone = count_words(texts, splitter, "alone")
    monkeypatch.setattr(word_counts, "BLOCK", 2_000)
    monkeypatch.setattr(word_counts, "BLOCKS_ALONE", 1)
    together = count_words(iter(texts), splitter, "together")
    assert (
        as_counter(alone)
        == as_counter(together)
        == Counter(word for text in texts for word in splitter(text))
    )


@dataclass(frozen=True)
class Killed:
    """A splitter whose process is killed, as by a lack of memory."""

    parent: int

    def __call__(self, text: str) -> list[str]:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return [text]


def test_a_counting_process_that_is_killed_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr(word_counts, "BLOCK", 2)
    with pytest.raises(UserError, match="most likely for lack of memory"):
        count_words(["abc"] * 20, Killed(os.getpid()), "killed")


def test_words_hold_their_frequencies_and_characters() -> None:
    counts = Counter({"ab": 3, "b": 2, "cab": 1})
    words = Words.of(Counter(counts))
    assert as_counter(words) == counts
    assert words.distinct() == 3
    assert words.characters() == {"a": 4, "b": 6, "c": 1}


def test_a_leaf_that_the_text_hardly_uses_is_found() -> None:
    growth = Growth(
        {"ab": ("a", "b"), "abc": ("ab", "c"), "cd": ("c", "d")}, {"abc": 9, "cd": 2, "ab": 1}
    )
    assert idle_leaves(growth, 3) == {"cd"}
    assert idle_leaves(growth, 10) == {"abc", "cd"}


def test_idle_leaves_are_dropped_and_their_places_filled(sp_base, corpus, monkeypatch) -> None:
    """A piece that was taken for idle is not learnt again, and another takes its place."""
    from cpt_merge.tokenizer_ext.learn import grow

    base = read_base(sp_base)
    before = learn_languages(base, corpus, CONFIG)[0]
    leaf = next(
        iter(
            idle_leaves(
                Growth(
                    {p: h for p, h in before.pieces.items() if h}, dict.fromkeys(before.pieces, 0)
                ),
                1,
            )
        )
    )
    real = idle_leaves
    monkeypatch.setattr(
        grow,
        "idle_leaves",
        lambda growth, least: ({leaf} & growth.pieces.keys()) | real(growth, least),
    )
    after = learn_languages(base, corpus, CONFIG)[0]
    assert after.pruned == 1
    assert leaf not in after.pieces
    assert len(after.pieces) == len(before.pieces)
    assert set(before.pieces) - {leaf} <= set(after.pieces)


def test_the_gain_curve_is_what_fewer_pieces_would_give(extended, corpus) -> None:
    """At every point: the text split by a tokenizer with only the first so many pieces."""
    base = read_base(extended.base)
    learned = learn_languages(base, corpus, replace_languages(["ko"]))[0]
    case = extended.case
    texts = case.samples.texts["ko"]
    pieces = {piece: case.content["model"]["vocab"][piece] for piece in learned.pieces}
    whole = replace(case, content=extend_model(base.content, pieces, base.family.settled()))
    whole.__dict__["after"] = build(whole.content)
    text = measure_fertility(whole, "ko", texts)
    curve = gain_curve(learned.pieces, {}, text, learned.characters)
    assert len(curve) > 10
    assert curve[-1][1] == pytest.approx(text.tokens_per_character[1])
    for size, value in curve:
        fewer = build(
            extend_model(base.content, dict(list(pieces.items())[:size]), base.family.settled())
        )
        tokens = sum(
            len(encoding.ids)
            for encoding in fewer.encode_batch_fast(texts, add_special_tokens=False)
        )
        assert value == pytest.approx(tokens / text.characters)


def test_the_gain_curve_of_a_language_does_not_count_later_pieces(
    sp_base, corpus, tmp_path
) -> None:
    """Simplified Chinese, learnt after Traditional from the same text here, shares its script and
    builds on its pieces.
    """
    sources = [
        *corpus.sources,
        next(s for s in corpus.sources if s.language == "zh_tw").model_copy(
            update={"language": "zh_cn"}
        ),
    ]
    both = corpus.model_copy(update={"sources": sources})
    sizes = {"zh_tw": 80, "zh_cn": 60}
    curves = []
    for name, new_pieces in (("one", {"zh_tw": 80}), ("both", sizes)):
        config = CONFIG.model_copy(update={"new_pieces": new_pieces})
        extend_tokenizer(config, sp_base, both, tmp_path / name)
        curves.append(
            json.loads((tmp_path / name / "report.json").read_text())["usefulness"][0]["curve"]
        )
    assert curves[0] == curves[1]


def replace_languages(languages: list[str]):
    return CONFIG.model_copy(
        update={"new_pieces": {tag: CONFIG.new_pieces[tag] for tag in languages}}
    )


def test_usage_counts_the_words_as_the_tokenizer_splits_them(extended, corpus) -> None:
    base = read_base(extended.base)
    learned = learn_languages(base, corpus, replace_languages(["zh_tw"]))[0]
    words = as_counter(
        count_words(
            read_documents(corpus, "zh_tw", "train", 10**9),
            base.family.splitter(Scripts(find_language("zh_tw"))),
            "",
        )
    )
    start = max(base.ids.values()) + 1
    pieces = {piece: start + number for number, piece in enumerate(learned.pieces)}
    tokenizer = build_model(extend_model(base.content, pieces, base.family.settled()))
    usage: Counter[str] = Counter()
    for word, frequency in words.items():
        usage.update(
            {token: n * frequency for token, n in Counter(tokenizer.encode(word).tokens).items()}
        )
    assert sum(usage[piece] for piece in pieces) > 0
    assert {piece: usage[piece] for piece in pieces} == {
        piece: learned.usage[piece] for piece in pieces
    }
