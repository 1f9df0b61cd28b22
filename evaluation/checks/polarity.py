"""Whether a reply to a yes-or-no question says yes or no."""

from __future__ import annotations

from typing import Literal

import regex

from cpt_merge.evaluation.checks.numerals import plain

LEAD_IN = regex.compile(
    r"^(?:[^\p{L}\p{N}]|(?:正確)?(?:答案|回答|結論|结论|正解)(?:是|為|为|就是)?[：:，,\s]|(?:정답|답변|대답|답)(?:은|:)?\s|"
    r"(?:the )?(?:short )?answer(?: is)?[:,]?\s|嗯|恩|呃|啊|喔|哦|음|아(?=[,.\s])|글쎄요?|wel"
    r"l\b|hmm+|oh\b|ah\b)+"
)
NO = regex.compile(
    r"(?:並|并|當然|当然|其實|其实|恐怕|牠|它|他|她|這|这)?(?:不(?!錯|错|過|过|僅|仅|只|但|論|论|管|妨|禁|如)|沒有|没有|沒(?![錯错關关問问])|没(?![错关问])|否(?!則|则)|非也|錯(?!過)|错(?!过)|無法|无法|未必|絕不|绝不|絕非|绝非|並非|并非)"
    r"|맞지 않|아니(?!라면)|아뇨|아닙|아녜|틀(?:리|렸|린|려)|그렇지 않|안 (?:돼|됩|되)|불가능|못"
    r"|(?:no|nope|nah|not|never|incorrect|false|wrong|untrue|negative|cannot|can[’']t)(?![\p{L}\p{N}])(?!\s(?:doubt|problem|one|only|just))"
    r"|(?:it|that|this|he|she|they|there|i|you|we)(?:[’']s| is| was| are| does| do| did| can|"
    r" will)?(?: not|n[’']t)(?!\p{L})|(?:it|that|they|there|he|she) (?:is|was|are|does|do|did"
    r"|ca|wo)n[’']t"
)
YES = regex.compile(
    r"(?:是不是|對不對|对不对|會不會|会不会)(*FAIL)|(?:當然|当然|確實|确实|的確|的确|沒錯|没错|沒問題|没问题|正確|正确|"
    r"是(?!否|不是)|對(?![不於面方話話待])|对(?![不于面方话待])|會(?![不議計員])|会(?![不议计员])|可以(?!不)|"
    r"能(?![不力量])|有(?![沒没些時时])|要(?!不)|夠|够|好(?![像不])|行(?!不)|應該是|应该是|不錯|不错)"
    r"|(?:네(?=[,.!?~\s]|$)|넵|예(?=[,.!?~\s]|$)|응(?!\p{Hangul})|맞(?!지 않)(?:아|습|다|는|"
    r"지)|그렇(?:습|다|지(?! 않))|그래(?:요)?(?!\p{Hangul})|그럼요|물론|당연|옳|돼요|됩니다|"
    r"가능|있(?:어|습|다))"
    r"|(?:yes|yeah|yep|yup|correct|right|true|sure|certainly|indeed|absolutely|of course|defi"
    r"nitely|affirmative|no doubt|"
    r"(?:it|that|they|there|he|she|this) (?:is|was|are|does|do|did|can|will))(?![\p{L}\p{N}])"
    r"(?! not|n[’']t)"
)
QUESTIONS = regex.compile(r"是不是|對不對|对不对|會不會|会不会|有沒有|有没有|能不能|可不可以")


def polarity(reply: str) -> Literal["yes", "no"] | None:
    """What the first words of a reply say; None if they say neither."""
    text = LEAD_IN.sub("", plain(reply))
    if QUESTIONS.match(text):
        return None
    if NO.match(text):
        return "no"
    return "yes" if YES.match(text) else None
