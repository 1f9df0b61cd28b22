"""Dialogue: shares of turns and of whole dialogues, and the built-in set answered by a model that follows every turn."""

import pytest

from cpt_merge.evaluation.chinese import other_script_characters
from cpt_merge.evaluation.conversation import Exchange, Reply
from cpt_merge.evaluation.evaluators.dialogue import DialogueEvaluator
from cpt_merge.evaluation.prompt_files import parse_dialogue, read_conversations
from cpt_merge.evaluation.reply_language import is_in_language
from cpt_merge.evaluation.statistics import estimate

DIALOGUE = {
    "language": "ko",
    "turns": [
        {"user": "제 이름은 지훈이에요."},
        {"user": "안녕?", "checks": [{"name": "language", "language": "ko"}]},
        {
            "user": "제 이름은요?",
            "checks": [{"name": "contains", "words": ["지훈"]}, {"name": "no_digits"}],
        },
    ],
}


def answered(*replies):
    return Exchange(
        parse_dialogue(DIALOGUE, "test"), tuple(Reply(text, True, 3) for text in replies)
    )


def test_turns_whole_dialogues_and_turns_by_number():
    exchanges = [
        answered("네", "안녕하세요", "지훈이에요"),
        answered("네", "안녕하세요", "몰라요 7"),
        answered("", "", ""),
    ]
    findings = DialogueEvaluator([]).measure(None, exchanges)
    values = {(one.metric.name, one.group): estimate(one.parts) for one in findings.measurements}
    assert values["dialogue_turns", ""].value == 3 / 6
    assert values["dialogues", ""].value == pytest.approx(1 / 3)
    assert values["dialogue_turns", "turn 2"].value == pytest.approx(2 / 3)
    assert values["dialogue_turns", "turn 3"].value == pytest.approx(1 / 3)
    assert {estimate.n for estimate in values.values()} == {3}  # the dialogue is what is drawn
    assert findings.scores[1].why == ["turn 3: contains (words ['지훈'])", "turn 3: no_digits"]
    assert findings.scores[2].scores == {"dialogue_turns": 0, "dialogues": 0}


@pytest.mark.parametrize("language", ["zh_tw", "zh_cn", "ko", "en"])
def test_the_built_in_dialogues(language):
    found = read_conversations("built-in", "key", parse_dialogue, [language], 99, "dialogues")
    assert len({one.questions for one in found}) == len(found) >= 12
    assert all(one.turns[-1].checks for one in found), (
        "a last turn without a check would be asked for nothing"
    )
    for one in found:
        assert is_in_language(one.questions, language)
        assert not other_script_characters(one.questions, language), one.questions


RIGHT = {  # what one who listens would say to the last turn of some of them
    ("zh_tw", "那我呢？我叫什麼名字？"): ("你叫志明。", "你叫布丁。"),
    ("zh_tw", "那最後一樣呢？只說那一樣。"): ("電池", "洗髮精"),
    ("zh_tw", "我現在有幾顆蘋果？"): ("你現在有７顆蘋果。", "你有11顆蘋果。"),
    ("zh_tw", "請複述我點的飲料，一句話就好。"): ("您點的是一杯大杯的冰拿鐵。", "您點的是一杯中杯的冰拿鐵。"),
    ("zh_cn", "法国的首都呢？"): ("好的，法国的首都是巴黎。", "法国的首都是巴黎。"),
    ("zh_cn", "请用一句话确认我的要求。"): ("您要一张明天下午去苏州的火车票。", "您要一张明天上午去苏州的火车票。"),
    ("ko", "마지막 것은요? 그것만 말해 주세요."): ("건전지예요.", "샴푸예요."),
    ("ko", "그럼 얼음은 몇 도에서 녹아요?"): ("얼음은 0도에서 녹아요.", "얼음은 0도에서 녹습니다."),
    ("ko", "제 주문을 한 문장으로 다시 말해 주세요."): ("큰 사이즈의 아이스 라떼 한 잔이에요.", "따뜻한 라떼 큰 것 한 잔이에요."),
    ("en", "And of Japan?"): ("Tokyo, meow!", "Meow, it is Tokyo."),
    ("en", "Thanks. Back to normal writing now: what colour is snow?"): ("Snow is white.", "SNOW IS WHITE."),
    ("en", "And that times 2?"): ("That makes 34.", "That makes 24."),
}  # fmt: skip


@pytest.mark.parametrize(("language", "question"), list(RIGHT))
def test_a_right_answer_passes_and_a_wrong_one_does_not(language, question):
    found = read_conversations("built-in", "key", parse_dialogue, [language], 99, "dialogues")
    turn = next(
        turn for one in found for turn in one.turns if turn.messages[-1]["content"] == question
    )
    right, wrong = RIGHT[language, question]
    assert all(check.passes(right) for check in turn.checks), [
        c.failure(right) for c in turn.checks if not c.passes(right)
    ]
    assert not all(check.passes(wrong) for check in turn.checks)
