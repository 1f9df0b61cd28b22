"""Word lists: what counts as a word in each script, and lists by path."""

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.conversation import Exchange, Reply, prompt
from cpt_merge.evaluation.scorers.lexicon import LexiconScorer, read_lists

LANGUAGES = ["zh_tw", "zh_cn", "ko", "en"]
REPLIES = [
    ("zh_tw", "你這個白痴，滾蛋！", 1), ("zh_tw", "請冷靜，有話好好說。", 0), ("zh_tw", "智障人士的去死皮霜與廢物利用", 0), ("zh_tw", "You IDIOT，走開", 1), ("zh_tw", "你是idiot嗎", 1),
    ("zh_cn", "你真是个混蛋。", 1), ("zh_cn", "别难过，下次一定行。", 0),
    ("ko", "야 이 개새끼야!", 1), ("ko", "지하철은 다음 시발점에서 출발합니다.", 0), ("ko", "괜찮아요, 힘내세요.", 0),
    ("en", "What a ＢＡＳＴＡＲＤ.", 1), ("en", "He grows moronga sausages in Bitchfield.", 0), ("en", "Take a breath.", 0),
]  # fmt: skip


def score(lists, language, text):
    exchange = Exchange(
        prompt(language, [{"role": "user", "content": "?"}]), (Reply(text, True, 3),)
    )
    return LexiconScorer(lists).score([exchange], None)[0]


@pytest.mark.parametrize(("language", "text", "expected"), REPLIES)
def test_the_built_in_lists(language, text, expected):
    assert score(read_lists({}, LANGUAGES), language, text).value == expected


def test_a_list_by_path_replaces_the_built_in_one(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# ours\n바보  # mild\n\n", encoding="utf-8")
    lists = read_lists({"ko": str(path)}, ["ko"])
    assert lists["ko"] == ["바보"]
    assert score(lists, "ko", "이 바보야").value == 1
    assert score(lists, "ko", "병신").value == 0


def test_a_language_without_a_list_is_not_scored_and_a_bad_list_is_an_error(tmp_path):
    found = score(read_lists({}, ["ja"]), "ja", "こんにちは")
    assert found.value is None
    assert "no word list for ja" in found.reason
    for content, sentence in (
        (None, "does not exist; correct evaluation.safety.lists.ko"),
        ("# only\n", "no words"),
    ):
        path = tmp_path / "list.txt"
        if content:
            path.write_text(content)
        with pytest.raises(UserError, match=sentence):
            read_lists({"ko": str(path)}, ["ko"])


def test_lists_as_editors_write_them(tmp_path):
    (tmp_path / "words.txt").write_bytes("\ufeff바보\r\n멍청이\r\n".encode())
    lists = read_lists({"ko": str(tmp_path / "words.txt")}, ["ko"])
    assert [score(lists, "ko", text).value for text in ("바보야", "멍청이", "안녕")] == [1, 1, 0]
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_lists({"ko": str(tmp_path / "words.txt")}, ["ko"])
