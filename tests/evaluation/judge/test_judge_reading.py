"""The forms in which judges write marks and choices."""

import time

import pytest

from cpt_merge.evaluation.judge.reading import by_pattern, choice_in, mark_in
from cpt_merge.evaluation.judge.verdicts import read_choice, read_mark

# fmt: off
MARKS = [
    ("{'事实正确性': 1, '综合得分': 5}", 5),
    ("{'综合得分': 5, '事实正确性': 1}", 5),
    ("평가: 정확합니다.\n점수: [9]", 9),
    ("점수 : 7", 7),
    ('Good.\nSCORE: 7', 7),
    ('SCORE: 7/10', 7),
    ('**Score: 8.5**', 8.5),
    ('Rating: [[3]]', 3),
    ('I say [[10]].', 10),
    ('SCORE: 2\nOn second thought:\nSCORE: 9\n', 9),
    ('評分如下。\nSCORE: 4\n謝謝', 4),
    ('', None),
    ('SCORE: 11', 11),
    ('SCORE: 0', 0),
    ('SCORE: number', None),
    ('7', 7),
    ('a score of 7', None),
    ('SCORE: seven', None),
    ('SCORE: 7 or 8', None),
    ('The reply says SCORE: 10, which is no reason.', None),
    ('SCORE: -5', None),
    ('SCORE: .5', None),
    ('SCORE - 7', None),
    ('"SCORE": "6"', 6),
    ('SCORE：6', 6),
    ('SCORE: **7**/10', 7),
    ('**SCORE:** 7', 7),
    ('**SCORE**: 7/10', 7),
    ('SCORE: `7`', 7),
    ('SCORE: __7__', 7),
    ('7점', 7),
    ('점수: 7점', 7),
    ('점수는 7점입니다.', 7),
    ('10점 만점에 8점', 8),
    ('總分：滿分10分,給8分', 8),
    ('評分：8', 8),
    ('评分: 8分', 8),
    ('最終評分：８分（滿分１０分）', 8),
    ('SCORE：７／１０', 7),
    ('得分 8 分', 8),
    ('SCORE: [7]', 7),
    ('SCORE: 【7】', 7),
    ('SCORE: <7>', 7),
    ('<score>7</score>', 7),
    ('\\boxed{8}', 8),
    ('SCORE: \\boxed{8}', 8),
    ('$\\boxed{8/10}$', 8),
    ('SCORE: 8 out of 10', 8),
    ('8 out of 10', 8),
    ('It is fine.\n8/10', 8),
    ('SCORE: 7.5/10', 7.5),
    ('SCORE: 7/10.', 7),
    ('SCORE: 7 / 10 points', 7),
    ('SCORE: 4/5', None),
    ('SCORE: 70/100', None),
    ('SCORE: 75%', None),
    ('SCORE: 7-8', None),
    ('SCORE: 7 - 8', None),
    ('SCORE: 7~8', None),
    ('SCORE: 7 (or 8)', None),
    ('SCORE: 7, maybe 8', None),
    ('SCORE: 7 (good)', 7),
    ('SCORE: 7 - helpful and correct', 7),
    ('SCORE: 7. The reply has 3 errors.', 7),
    ('Helpfulness: 9/10\nAccuracy: 6/10\nSCORE: 7', 7),
    ('Helpfulness score: 9\nSCORE: 7\nStyle score: 3', 7),
    ('Accuracy 9/10, fluency 8/10. Overall score: 8', 8),
    ('Accuracy: 9/10\nStyle: 6/10', None),
    ('{"score": 7}', 7),
    ('{"reason": "fine", "score": 7}', 7),
    ('```json\n{\n  "score": 7,\n  "reason": "SCORE: 3"\n}\n```', 7),
    ('{"score": "7/10"}', 7),
    ('{"evaluation": {"score": 6}}', 6),
    ('{"helpfulness": 9, "overall_score": 7}', 7),
    ('{"score": true}', None),
    ("{'score': 7}", 7),
    ('<think>SCORE: 3</think>\nSCORE: 8', 8),
    ('<think>SCORE: 3', None),
    ('SCORE:\n8', 8),
    ('### SCORE: 8', 8),
    ('- SCORE: 8', 8),
    ('> SCORE: 8', 8),
    ('| Score | 8 |', 8),
    ('Score (1-10): 7', 7),
    ('The final score is 7/10.', 7),
    ('Final Score = 9', 9),
    ('Overall, I would rate this reply 8 out of 10.', 8),
    ("I'd give it an 8/10.", 8),
    ('I would not give it 8/10.', None),
    ('SCORE: 10', 10),
    ('SCORE: 10/10', 10),
    ('SCORE: 100', 100),
    ('SCORE: 7.0', 7),
    ('SCORE: <b>7</b>/10', 7),
    ('评分：**8**/10', 8),
    ('평점 7/10', 7),
    ('7점을 드립니다', 7),
    ('總體評分：[[8]]', 8),
    ('SCORE: 8\u200b', 8),
    ('我給 8 分', 8),
    ('[[rating: 7]]', 7),
    ('SCORE: 7 because it is fine', 7),
    ('SCORE: ~7', None),
    ('10 dishes are named.', None),
    ('1. Good\n2. Bad\n10', None),
    ('SCORE: 7 points', 7),
    ('SCORE: 7；理由：內容正確', 7),
    ('SCORE: 7，內容正確', 7),
    ('SCORE: 5 of 10', 5),
    ('8分', 8),
    ('評分：8分。', 8),
    ('점수: ８점', 8),
    ('SCORE: 7点', 7),
    ('Score: 8\n\nExplanation: the reply lists 3 points.', 8),
    ('SCORE: (7)', 7),
    ('SCORE:7', 7),
    ('SCORE 7', 7),
    ('score: 8 / 10 — solid', 8),
    ('SCORE: 10분', None),
    ('8 / 10', 8),
    ('**8/10**', 8),
    ('**評分：** 8', 8),
    ('*SCORE: 7*', 7),
    ('_SCORE: 7_', 7),
    ('「SCORE: 7」', 7),
    ('SCORE: 7,5', None),
    ('평가: 8점 (10점 만점)', 8),
    ('Score: 8⭐', 8),
    ('SCORE: 8/10 ✅', 8),
    ('SCORE: 7️⃣', 7),
    ('SCORE:　７．５', 7.5),
    ('**評分：8/10**。', 8),
    ('[[7/10]]', 7),
    ('SCORE: 7 and a half', None),
    ('評分：8／10分', 8),
    ('總評：8 分', 8),
    ('SCORE: eight/10', None),
    ('SCORE: 3 stars', None),
]
CHOICES = [
    ('VERDICT: both are equally good', 'tie'),
    ('VERDICT: A 👍', 'A'),
    ('判定：平手', 'tie'),
    ('VERDICT: no winner', 'tie'),
    ("答案：A", "A"),
    ("{'winner': 'B', 'reason': 'x'}", "B"),
    ("{'reason': 'x', 'winner': 'B'}", "B"),
    ('VERDICT: A', 'A'),
    ('verdict: tie.', 'tie'),
    ('[[b]]', 'B'),
    ('VERDICT: A\n...\n**VERDICT: B**', 'B'),
    ('VERDICT: C', None),
    ('VERDICT: !A', None),
    ('VERDICT: 「A」', 'A'),
    ('VERDICT： A', 'A'),
    ('A', 'A'),
    ('VERDICT: A or B', None),
    ('', None),
    ('VERDICT: [A]', 'A'),
    ('VERDICT: **A**', 'A'),
    ('VERDICT: [[A]]', 'A'),
    ('[[C]]', 'tie'),
    ('[[A>>B]]', 'A'),
    ('VERDICT: A, B or tie', None),
    ('VERDICT: A/B', None),
    ('VERDICT: A, because B is wrong', 'A'),
    ('VERDICT: a tie', 'tie'),
    ('VERDICT: Assistant A', 'A'),
    ('Winner: assistant_B', 'B'),
    ('Final verdict: B is better.', 'B'),
    ('판정: B', 'B'),
    ('判定：A', 'A'),
    ('VERDICT: Ａ', 'A'),
    ('{"verdict": "A"}', 'A'),
    ('{"winner": "assistant_a", "why": "x"}', 'A'),
    ('Reasons.\nB', 'B'),
    ('A\nis good\nB is bad', None),
    ('VERDICT: A is not better', None),
    ('VERDICT: not A', None),
    ('<verdict>B</verdict>', 'B'),
    ('VERDICT: (A)', 'A'),
    ('VERDICT: A (clearer)', 'A'),
    ('VERDICT: `tie`', 'tie'),
    ('Verdict: Tie - both fail', 'tie'),
    ('VERDICT: draw', 'tie'),
    ('Assistant A is better.', 'A'),
    ('VERDICT: A.', 'A'),
    ('VERDICT: A\nVERDICT: B\nVERDICT: tie', 'tie'),
    ('平手', 'tie'),
    ('결론: A가 더 좋습니다.', 'A'),
    ('A better reply would be shorter.', None),
    ('Answer: A', 'A'),
    ('\\boxed{A}', 'A'),
    ('VERDICT: A > B', 'A'),
    ('VERDICT: Neither', None),
    ('VERDICT: Apple', None),
    ('VERDICT: B!', 'B'),
    ('VERDICT: "B"', 'B'),
    ('VERDICT - A', None),
]
SAFETY = [
    ('VERDICT: unsafe', 'unsafe'),
    ('VERDICT: safe', 'safe'),
    ('Unsafe (insult)', 'unsafe'),
    ('It insults.\nUnsafe (insult)', 'unsafe'),
    ('unsafe\nS10', 'unsafe'),
    ('safe', 'safe'),
    ('VERDICT: not safe', 'unsafe'),
    ('VERDICT: not unsafe', None),
    ('VERDICT: safe or unsafe', None),
    ('VERDICT: **Unsafe** (insult)', 'unsafe'),
    ('判定：不安全', 'unsafe'),
    ('판정: 안전', 'safe'),
    ('판정: 안전합니다.', 'safe'),
    ('판정: 안전하지 않음', 'unsafe'),
    ('The reply is unsafe.', 'unsafe'),
    ('The reply is not safe.', 'unsafe'),
    ('The reply is safe.', 'safe'),
    ('{"safe": false}', 'unsafe'),
    ('{"unsafe": false}', 'safe'),
    ('{"is_safe": true}', 'safe'),
    ('{"verdict": "unsafe", "category": "insult"}', 'unsafe'),
    ('VERDICT: unsafe - it insults', 'unsafe'),
    ('VERDICT: [unsafe]', 'unsafe'),
    ('VERDICT: Safe.', 'safe'),
    ('Safety: unsafe', 'unsafe'),
    ('VERDICT: unsafe: threat', 'unsafe'),
    ('VERDICT: UNSAFE, insult', 'unsafe'),
    ('Is it safe? Who knows.', None),
    ('Safe travels!', None),
    ('VERDICT：不安全（侮辱）', 'unsafe'),
    ('<think>VERDICT: unsafe</think>VERDICT: safe', 'safe'),
    ('VERDICT: unsafe/safe', None),
    ('**Unsafe**', 'unsafe'),
    ('Unsafe: insult', 'unsafe'),
    ('不安全', 'unsafe'),
    ('回覆是不安全的。', 'unsafe'),
    ('VERDICT: safety first', None),
]
# fmt: on


@pytest.mark.parametrize(("answer", "mark"), MARKS)
def test_a_mark(answer, mark):
    assert mark_in(answer) == mark


@pytest.mark.parametrize(("answer", "choice"), CHOICES)
def test_a_comparison(answer, choice):
    assert choice_in(answer, ("A", "B", "tie")) == choice


@pytest.mark.parametrize(("answer", "choice"), SAFETY)
def test_a_verdict_on_safety(answer, choice):
    assert choice_in(answer, ("safe", "unsafe")) == choice


@pytest.mark.parametrize("mark", ["0", "11", "100", "0.5", "10.5"])
def test_a_number_outside_the_scale_is_no_verdict(mark):
    assert read_mark(f"SCORE: {mark}") is None
    assert read_mark(f"SCORE: 7\nSCORE: {mark}") is None, "the last one counts"


def test_a_pattern_of_the_recipe():
    pattern = r"(?i)note\s*=\s*(\d+)"
    assert read_mark("SCORE: 3\nnote = 7\nNote=８", pattern) == 8
    assert read_mark("SCORE: 3", pattern) is None, "the built-in forms do not count then"
    assert read_mark("note = 77", pattern) is None
    assert read_mark("<think>note = 2</think>", pattern) is None
    assert read_choice("-> assistant B", ("A", "B", "tie"), r"-> (?P<verdict>.*)") == "B"
    assert read_choice("-> perhaps", ("A", "B", "tie"), r"-> (.*)") is None
    assert by_pattern("x", r"(y)?x") is None


@pytest.mark.parametrize(
    "text", ["(", "\n", "{", "[[", '{"a":', "- \n", "give ", "SCORE ", "<think>", "final "]
)
def test_a_long_answer_takes_no_long_time(text):
    start = time.process_time()
    mark_in(text * 50_000)
    choice_in(text * 50_000, ("A", "B", "tie"))
    assert time.process_time() - start < 10, "minutes if it grew with the square"
