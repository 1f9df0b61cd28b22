"""Languages by tag, and the characters of their scripts."""

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language


def test_any_language_can_be_named_with_its_script() -> None:
    assert find_language("th_Thai").scripts == ("Thai",)
    assert find_language("kor_Hang").scripts == find_language("ko").scripts
    assert find_language("zho-Hant").scripts == ("Han",)
    assert find_language("jpn_Jpan").scripts == find_language("ja").scripts


@pytest.mark.parametrize(
    ("tag", "spellings"),
    [
        ("zh_tw", "zh_TW zh-tw zh_Hant zh-Hant-TW zho_Hant cmn-Hant"),
        ("zh_cn", "zh-CN zh_Hans zh_SG chi_Hans"),
        ("zh_hk", "yue zh-Hant-HK zh_MO"),
        ("ko", "KO ko-KR kor ko_Kore kor_Hang ko-Hang-KP"),
        ("en", "EN en-US eng_Latn en_GB en-001"),
        ("ja", "ja-JP jpn_Jpan"),
    ],
)
def test_a_known_language_in_any_spelling(tag: str, spellings: str) -> None:
    assert {find_language(spelling).tag for spelling in spellings.split()} == {tag}


@pytest.mark.parametrize(
    ("tag", "meant"),
    [
        ("zh", "zh_tw or zh_cn"), ("Chinese", "zh_tw or zh_cn"),
        ("kr", "ko"), ("KR", "ko"), ("korean", "ko"), ("jp", "ja"), ("zh_tww", "zh_tw"),
    ],
)  # fmt: skip
def test_what_was_meant(tag: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"language '{tag}' is not known; use {meant}\."):
        find_language(tag)


def test_the_script_of_another_writing_stays() -> None:
    assert find_language("zh_Latn").scripts == ("Latin",)


@pytest.mark.parametrize(
    "tag", ["xx", "th_Xxxx", "th_thai", "xx_Zyyy", "xx_Zinh", "TH_Thai", "", "th_"]
)
def test_an_unknown_tag_is_refused(tag) -> None:
    with pytest.raises(UserError, match="is not known; use one of zh_tw"):
        find_language(tag)


@pytest.mark.parametrize(
    ("tag", "inside", "outside"),
    [
        ("zh_tw", "中𠮷々〇〆", "。「」ー a１①ひ한"),
        ("ja", "中ひカー々ﾞ", "。・「」 a１한"),
        ("ko", "한ㅋ\u1112", "中。 a1"),
        ("ar_Arab", "عَـ", "، ؟a1"),
        ("hi_Deva", "नमस्ते", "। a"),
        ("ru_Cyrl", "Пй", "\u0301aé"),
        ("th_Thai", "สวัสดี", "๕๏"),
    ],
)
def test_letters_and_marks_belong_to_a_script_and_punctuation_does_not(
    tag, inside, outside
) -> None:
    letters = find_language(tag).letters
    assert [c for c in inside if not letters.match(c)] == []
    assert [c for c in outside if letters.match(c)] == []
