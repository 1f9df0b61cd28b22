"""Quality filters: for every one, text that it leaves out and text that it keeps, by language."""

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cpt_merge.data.preparation.filters import Filtering, QualityFilter
from cpt_merge.data.preparation.notes import Notes, read_notes
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.tokenise import write_store
from tests.data.test_tokenise import jsonl

LETTERS = {
    "en": "abcdefghijklmnopqrstuvwxyz",
    "ko": "".join(map(chr, range(0xAC00, 0xAC00 + 500))),
    "zh_tw": "".join(map(chr, range(0x4E00, 0x4E00 + 500))),
    "ja": "".join(map(chr, range(0x3041, 0x3090))),
}
OTHER = {
    "en": "강가를 따라",
    "ko": "along the river",
    "zh_tw": "along the river",
    "ja": "강가를 따라",
}


def good(language: str) -> str:
    """Twelve lines of random words that end like sentences."""
    generator, lines = random.Random(0), []
    for _ in range(12):
        words = ["".join(generator.choices(LETTERS[language], k=4)) for _ in range(12)]
        lines.append(" ".join(words) + "." if language in ("en", "ko") else "".join(words) + "。")
    return "\n".join(lines)


def reason(text: str, language: str, **thresholds: Any) -> str:
    """Why a text is left out; "" if it is kept."""
    notes = Notes()
    settings = QualityFilter(language=language, **thresholds)
    if Filtering(settings.thresholds())(text, notes):
        assert not notes.left_out
        return ""
    ((name, count),) = notes.left_out.items()
    assert count == 1
    assert [example.step for example in notes.examples] == [name]
    return name


SPOILT = {
    "too_short": lambda text, language: text[:20],
    "too_long": lambda text, language: "\n".join([text] * 2000),
    "few_letters": lambda text, language: text + " 12 30 : / " * 300,
    "other_script": lambda text, language: text + OTHER[language] * 300,
    "symbols": lambda text, language: text + " # … a…" * 300,
    "repeated_lines": lambda text, language: "\n".join([text, text.split("\n")[0], text]),
    "unended_lines": lambda text, language: text.replace(".\n", "\n").replace("。\n", "\n")[:-1],
    "repeated_runs": lambda text, language: text + "\n" + text.replace("\n", " "),
}


@pytest.mark.parametrize("language", LETTERS)
def test_good_text_is_kept_unchanged(language: str) -> None:
    text, notes = good(language), Notes()
    settings = QualityFilter(language=language)
    assert Filtering(settings.thresholds())(text, notes) == text
    assert not notes.changed


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("language", LETTERS)
def test_poor_text_is_left_out_and_kept_with_the_filter_off(language: str, name: str) -> None:
    text = SPOILT[name](good(language), language)
    off: dict[str, dict[str, Any]] = {
        "too_short": {"min_length": 0},
        "too_long": {"max_length": 10**9, "repeated_lines": 1, "repeated_runs": 1},
        "few_letters": {"letters": 0, "repeated_runs": 1},
        "other_script": {"script": 0, "repeated_runs": 1},
        "symbols": {"symbols": 1e9, "letters": 0, "repeated_runs": 1, "script": 0},
        "repeated_lines": {"repeated_lines": 1, "repeated_runs": 1},
        "unended_lines": {"ended_lines": 0},
        "repeated_runs": {"repeated_runs": 1},
    }
    only = {"symbols": {"letters": 0, "script": 0}}.get(name, {})
    assert reason(text, language, **only) == name
    assert reason(text, language, **off[name]) == ""


def test_chinese_is_measured_in_letters_and_korean_in_words() -> None:
    assert reason("春天河水漲了" * 13, "zh_tw", repeated_runs=1) == "too_short", "78 letters"
    assert reason("春天河水漲了" * 14, "zh_tw", repeated_runs=1) == ""
    assert reason("강물이 " * 49, "ko", repeated_runs=1) == "too_short"
    assert reason("강물이 " * 50, "ko", repeated_runs=1) == ""


def test_defaults_are_those_that_were_published() -> None:
    """huggingface/fineweb-2, configs/{cmn_Hani,kor_Hang,jpn_Jpan}.yml: dup_line_frac, line_punct_thr."""
    found = {
        language: QualityFilter(language=language).thresholds()
        for language in ("zh_tw", "zh_cn", "ko", "ja", "en", "th_Thai", "zho_Hant", "kok_Deva")
    }
    assert [found[one].repeated_lines for one in found] == [
        0.287, 0.287, 0.374, 0.375, 0.3, 0.3, 0.287, 0.3
    ]  # fmt: skip
    assert [found[one].ended_lines for one in found] == [
        0.106, 0.106, 0.062, 0.167, 0.12, 0.12, 0.106, 0.12
    ]  # fmt: skip
    assert [found[one].min_length for one in found] == [80, 80, 50, 80, 50, 80, 80, 50]


def test_boilerplate_lines_are_removed_and_the_rest_stays() -> None:
    text, notes = good("ko"), Notes()
    lines = text.split("\n")
    with_boilerplate = "\n".join(
        [
            lines[0],
            "이용약관 | 개인정보처리방침",
            *lines[1:],
            "Copyright 2026. All Rights Reserved.",
        ]
    )
    mentions = "개인정보처리방침은 " + "긴 글에서 다루는 주제이기도 하다. " * 20
    filtering = Filtering(QualityFilter(language="ko", repeated_runs=1).thresholds())
    assert filtering(f"{with_boilerplate}\n{mentions}", notes) == f"{text}\n{mentions}"
    assert (notes.changed, notes.places) == ({"boilerplate_lines": 1}, {"boilerplate_lines": 2})
    off = Filtering(QualityFilter(language="ko", boilerplate=False).thresholds())
    assert off(with_boilerplate, Notes()) == with_boilerplate
    only_boilerplate = "이용약관\n개인정보처리방침"
    assert filtering(only_boilerplate, notes) == ""
    assert notes.left_out == {"too_short": 1}


def test_a_long_text_is_judged_by_its_beginning() -> None:
    assert reason("word " * 300_000, "en", repeated_runs=1, max_length=299_000) == "too_long"
    assert reason("word " * 300_000, "en", repeated_runs=1, max_length=301_000) == ""


def test_documents_are_filtered_for_every_stage_by_language(tmp_path: Path, model: Path) -> None:
    poor = SPOILT["symbols"](good("ko"), "ko")
    texts = [good("ko"), poor, "짧다", good("ko") + "\n끝났다.", None]
    korean = jsonl(tmp_path / "ko.jsonl", texts)
    english = jsonl(tmp_path / "en.jsonl", ["short", good("en")]).model_copy(
        update={"language": "en"}
    )
    corpus = Corpus(
        sources=[korean, english], heldout=1e-6, filters=[{"language": "ko", "letters": 0}]
    )
    assert list(corpus.documents(korean, "train")) == [texts[0], texts[3]]
    assert len(list(corpus.documents(english, "train"))) == 2
    info = write_store(corpus, model, tmp_path / "store")
    left_out = info.sources[0].left_out
    assert (left_out["too_short"], left_out["symbols"], left_out["empty"]) == (1, 1, 1)
    assert left_out["repeated_lines"] == 0, "filters that found nothing are reported too"
    assert info.sources[1].left_out == {"bad_rows": 0, "empty": 0, "duplicates": 0}
    examples = [(one.step, one.text) for one in read_notes(tmp_path / "store")[0].examples]
    assert ("too_short", "짧다") in examples


def test_a_filter_is_part_of_the_keys_and_of_the_blocks(tmp_path: Path, model: Path) -> None:
    source = jsonl(tmp_path / "ko.jsonl", [good("ko"), "짧다", "짧은 글"])
    documents = []
    for filters in (
        [],
        [{"language": "ko", "min_length": 2}],
        [{"language": "ko", "min_length": 1}],
    ):
        filters = [{**one, "ended_lines": 0} for one in filters]
        corpus = Corpus(sources=[source], heldout=1e-6, filters=filters)
        documents.append(write_store(corpus, model, tmp_path / "store").sources[0].train.documents)
    assert documents == [3, 2, 3]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([{"language": "ja"}], "names ja, but the sources are in ko"),
        ([{"language": "ko"}, {"language": "ko"}], "has ko twice"),
        ([{"language": "kr"}], "language 'kr' is not known"),
        ([{"language": "ko", "script": 2}], "less than or equal to 1"),
    ],
)
def test_filters_that_do_not_fit_are_refused(filters: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Corpus(sources=[Source(path="a.txt", language="ko")], filters=filters)


def test_without_filters_the_keys_of_stages_stay() -> None:
    source = Source(path="a.txt", language="ko")
    assert "filters" not in Corpus(sources=[source]).text()
    filtered = Corpus(sources=[source], filters=[{"language": "ko"}]).text()
    assert filtered["filters"][0]["repeated_lines"] == 0.374, "the defaults are part of the key"
