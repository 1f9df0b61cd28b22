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
    assert len({one.questions for one in found}) == len(found) >= 50
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
    ("zh_tw", "車牌的後四碼是什麼？"): ("後四碼是 3817。", "後四碼是 3871。"),
    ("zh_tw", "所以明天的會議在幾樓？"): ("在五樓，不是在二樓。", "會議在三樓。"),
    ("zh_tw", "時間有變嗎？請先回答有或沒有。"): ("沒有，還是下午兩點。", "有，改了。"),
    ("zh_tw", "我付三千元，要找我多少？"): ("要找您兩百元。", "要找您1,200元。"),
    ("zh_tw", "花生醬吐司適合我嗎？請先回答適合或不適合。"): ("不適合，因為你對花生過敏。", "適合，很營養。"),
    ("zh_tw", "夠不夠？請先回答夠或不夠。"): ("夠，還會剩三十元。", "不夠。"),
    ("zh_tw", "蝙蝠也是這一類嗎？請先回答是或不是。"): ("是的，蝙蝠也是哺乳類。", "不是，牠是鳥類。"),
    ("zh_tw", "剛剛的三個詞是什麼？"): ("鑰匙、雨傘和錢包。", "鑰匙、雨傘。"),
    ("zh_cn", "我应该去几号站台？"): ("您应该去8号站台。", "您应该去六号站台。"),
    ("zh_cn", "我今年多大？"): ("你今年十八岁。", "你今年28岁。"),
    ("zh_cn", "还剩多少？"): ("还剩30元。", "还剩130元。"),
    ("zh_cn", "海豚是鱼吗？先回答是或不是。"): ("不是，海豚是哺乳动物。", "是，海豚是鱼。"),
    ("zh_cn", "开饭"): ("洗手", "好的，洗手吃饭！"),
    ("ko", "그럼 회의는 몇 층에서 합니까?"): ("회의는 5층에서 합니다.", "회의는 3층에서 합니다."),
    ("ko", "삼만 원을 내면 거스름돈은 얼마입니까?"): ("이천 원입니다.", "만 이천 원입니다."),
    ("ko", "땅콩버터 토스트를 먹어도 됩니까? 네 또는 아니요로 먼저 답해 주십시오."): ("아니요, 위험합니다.", "네, 괜찮습니다."),
    ("ko", "케이크에 여덟 개를 썼으면 몇 개가 남았어요?"): ("쉰두 개가 남았어요.", "두 개가 남았어요."),
    ("ko", "가장 작은 사람은요? 이름만요."): ("하늘이예요.", "민호예요."),
    ("ko", "모레는 무슨 요일이에요?"): ("금요일이에요.", "금요일이 아니라 목요일이에요."),
    ("ko", "다섯 시에 일어나면 몇 시간입니까?"): ("열일곱 시간입니다.", "일곱 시간입니다."),
    ("en", "Which room should I go to?"): ("Go to room 5.", "Go to room 3."),
    ("en", "Can I eat peanut butter toast? Start with yes or no."): ("No, you are allergic.", "Yes, enjoy!"),
    ("en", "I used eight for a cake. How many are left?"): ("Twenty-two eggs are left.", "Two are left."),
    ("en", "And if I got up at five?"): ("Seventeen hours.", "Seven hours."),
    ("en", "Is a bat one too? Start with yes or no."): ("Yes, bats are mammals.", "No, bats are birds."),
    ("en", "Whose book is it? Only the name."): ("Tom's.", "It isn't Tom's."),
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
