"""Every check on replies that pass and replies that do not, in each language."""

import pytest

from cpt_merge.evaluation.checks import CHECKS, loose_variants, parse_check

# name, arguments, a reply that passes, one that does not
CASES = [
    ("characters", {"at_most": 6}, "今天，很好。", "今天，很好嗎？"),
    ("characters", {"exactly": 5}, "안녕 하세요", "안녕하세요."),
    ("words", {"at_least": 4}, "오늘은 날씨가 참 좋다.", "날씨가 참 좋다 !"),
    ("sentences", {"exactly": 2}, "台北很大。人也很多。", "台北很大，人也很多。"),
    ("sentences", {"at_least": 1, "at_most": 2}, "네. 좋아요.", "네. 좋아요. 가요."),
    ("paragraphs", {"exactly": 2}, "첫째 문단이에요.\n\n둘째 문단이에요.", "문단 하나예요."),
    ("lines", {"exactly": 2}, "蘋果\n\n香蕉", "蘋果"),
    ("bullets", {"exactly": 2}, "• 蚵仔煎\n• 臭豆腐", "蚵仔煎\n臭豆腐"),
    ("numbered_items", {"exactly": 2}, "1. 물을 끓여요\n2. 면을 넣어요", "1. 물을 끓여요\n3. 면을 넣어요"),
    ("numbered_items", {"exactly": 0}, "• 버스", "1. 버스"),
    ("sections", {"heading": "第一部分", "exactly": 1}, "## 第一部分：捷運\n很快。", "捷運\n很快。"),
    ("sections", {"heading": "Section", "exactly": 2}, "Section 1\na\n**SECTION 2**\nb", "Section 1\na"),
    ("sections", {"heading": "#", "exactly": 2}, "# 一\n甲\n## 二\n乙", "一\n二"),
    ("occurrences", {"word": "香", "at_least": 2}, "好香，真的很香。", "好香。"),
    ("letters", {"letter": "A", "exactly": 4}, "A banana", "an apple"),
    ("capital_words", {"at_least": 2}, "I like NASA", "Nasa IS it"),
    ("paragraph_starts_with", {"paragraph": 2, "text": "둘"}, "하나\n\n**둘**이에요", "둘\n\n하나"),
    ("contains", {"words": ["浪花", "月光"]}, "月光下的浪花", "月光下的海"),
    ("contains", {"words": ["7"]}, "７ 시예요", "17시예요"),  # digits and Latin words as a whole, of any width
    ("contains", {"words": ["cat"]}, "A CAT!", "a category"),
    ("contains_any", {"words": ["七", "7"]}, "你有7顆蘋果。", "你有17顆蘋果。"),
    ("contains", {"words": ["7"]}, "It is 7, not 6.", "It is 3.7, or 7,000."),
    ("contains", {"words": ["7", "8"]}, "7,8", "17,800"),
    ("contains", {"words": ["700"]}, "選３，700，9", "1,700"),
    ("avoids", {"words": ["可愛"]}, "貓很聰明。", "貓很可愛。"),
    ("avoids", {"words": ["hot"]}, "One shot of espresso", "A HOT latte"),
    ("starts_with", {"text": "親愛的老師"}, "  親愛的老師：您好", "您好，親愛的老師"),
    ("starts_with", {"text": "好的，"}, "好的,北京。", "北京，好的，"),
    ("ends_with", {"text": "喵"}, "玉山喵～！", "喵，是玉山。"),
    ("ends_with", {"text": "祝你閱讀愉快"}, "推薦《小王子》。「祝你閱讀愉快」。", "祝你閱讀愉快，再見"),
    ("ends_with", {"text": "Enjoy the book"}, "It is short.\n**enjoy the book!**", "Enjoy the books"),
    ("repeats_first", {"text": "為什麼天空是藍色的？"}, "為什麼天空是藍色的？因為散射。", "因為散射。為什麼天空是藍色的？"),
    ("repeats_first", {"text": "왜 그래요?"}, '"왜 그래요?" 몰라요.', "왜 그래요?"),  # and nothing after it
    ("one_of", {"words": ["是", "不是"]}, "「是」。", "是的"),
    ("one_of", {"words": ["B", "(C)"]}, "(B)", "(D)"),
    ("one_of", {"words": ["yes", "no"]}, "Yes.", "Yes, it is."),
    ("says", {"answer": "yes"}, "是的，會。", "不是，不會。"),
    ("says", {"answer": "no"}, "아니요, 물고기가 아니에요.", "네, 물고기예요."),
    ("matches", {"pattern": r"\d{4}년"}, "2024년이에요", "24년이에요"),
    ("sentences_end_with", {"words": ["요"]}, "한글날은 10월 9일이에요. 쉬는 날이에요!", "한글날이에요. 쉬는 날입니다."),
    ("sentences_end_with", {"words": ["니다", "까"]}, "어디입니까? 서울입니다.", "서울이다."),
    ("json_only", {}, '[1, "二"]', '答案是 {"a": 1}'),
    ("json_only", {"keys": ["name"]}, '```json\n{"name": "日本", "capital": "東京"}\n```', '{"capital": "東京"}'),
    ("json_only", {}, '{"a": 1}', '"只是文字"'),
    ("json_only", {}, "[[]]", "[" * 100_000),
    ("no_commas", {}, "今天很熱。我想游泳。", "今天很熱，我想游泳。"),
    ("no_commas", {}, "apples and pears", "apples､pears"),
    ("no_commas", {}, "사과 그리고 배", "蘋果、香蕉"),
    ("quoted", {}, "「加油！」", "「加油！"),
    ("quoted", {}, "“가자, 할 수 있어!”", '"가자” 그래'),
    ("quoted", {}, '"You can do it."', "You can do it."),
    ("quoted", {}, '"It\'s you."', '"a" and "b"'),
    ("quoted", {}, "‘It’s you.’", "「好」和「壞」"),
    ("quoted", {}, "「他說「好」。」", "『一』『二』"),
    ("title", {}, "《颱風夜》\n風很大。", "颱風夜\n《風很大》"),
    ("title", {}, "\n<<The storm>>\nIt blew.", "<The storm>\nIt blew."),
    ("title", {}, "【눈 오는 날】 이야기", "눈 오는 날"),
    ("no_digits", {}, "玉山很高。", "玉山高３９５２公尺。"),
    ("no_lists", {}, "먼저 창문을 열어요. 그다음에 쓸어요.", "1. 창문을 열어요"),
    ("no_lists", {}, "先開窗 - 再掃地。", "• 開窗"),
    ("no_lists", {}, "三、四天後見。", "一、開窗\n二、掃地"),
    ("no_lists", {}, "I said **no**.", "**1. Windows**\nOpen them."),
    ("uppercase", {}, "TAKE A TOWEL, 2 BOTTLES.", "TAKE a towel"),
    ("uppercase", {}, "OK 好", "好"),  # a text without cases has no capitals
    ("lowercase", {}, "roots take water up.", "Roots take water up."),
    ("placeholders", {"count": 2}, "[姓名]：\n［日期］：", "[姓名]："),
    ("highlights", {"count": 2}, "**健康** 和 *開心*", "**健康**"),
    ("language", {"language": "ko"}, "대한민국의 수도 서울(Seoul)은 큰 도시예요.", "Seoul is the capital (서울)."),
    ("language", {"language": "zh_tw"}, "這是臺灣。", "这是台湾。"),
    ("script", {"language": "zh_tw"}, "這是一臺電腦，用來學習語言。", "這是一臺電腦，用來学習語言。"),
    ("script", {"language": "zh_cn"}, "这是电脑，用来学习。", "这是电腦，用来学习。"),
]  # fmt: skip


def passes(name, arguments, reply):
    return parse_check({"name": name, **arguments}, "test").passes(reply)


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_a_reply_that_passes_and_one_that_does_not(name, arguments, good, bad):
    assert passes(name, arguments, good)
    assert not passes(name, arguments, bad)


def test_every_check_is_among_them():
    assert {case[0] for case in CASES} == set(CHECKS)


@pytest.mark.parametrize("reply", ["", " \n　"])
def test_an_empty_reply_passes_nothing(reply):
    for name, arguments, _, _ in CASES:
        assert not passes(name, arguments, reply)
    assert not passes("numbered_items", {"exactly": 0}, reply)


def test_a_failed_check_is_reported_with_what_was_found():
    check = parse_check({"name": "sentences", "exactly": 3}, "test")
    assert check.failure("하나. 둘.") == "sentences (exactly 3): 2 found"
    assert check.failure(" ") == "sentences (exactly 3): the reply is empty"
    assert (
        parse_check({"name": "occurrences", "word": "香", "at_least": 3}, "test")
        .failure("香")
        .endswith(": 1 found")
    )
    assert parse_check({"name": "no_commas"}, "test").failure("，") == "no_commas"


def test_loose_variants_ignore_an_introduction_and_asterisks():
    assert (
        len(loose_variants("a *b*\nc\nd")) == 8 - 2
    )  # without the first line there are no stars to remove
    check = parse_check({"name": "starts_with", "text": "親愛的老師"}, "test")
    for reply in ("好的，以下是信：\n親愛的老師：您好", "好的：\n**親愛**的老師：您好"):
        assert not check.passes(reply)
        assert check.passes_loosely(reply)
    assert not parse_check({"name": "avoids", "words": ["x"]}, "test").passes_loosely("x")
