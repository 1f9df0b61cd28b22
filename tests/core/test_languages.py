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
