"""Thoughts are found in tokenizers and templates, and divided from the answer."""

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_thoughts import reasoning_field
from cpt_merge.evaluation.config import ThoughtMarksConfig
from cpt_merge.evaluation.thoughts import BLANK_ENDS, find_thoughts
from tests.evaluation.thinkers import HYBRID, OPENS_THOUGHT, PLAIN, byte_tokenizer

HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
FAMILIES = [  # template, tokens, reply, thought, answer
    (PLAIN, ["<think>", "</think>"], "<think>\n음\n</think>\n\n서울.", "음", "서울."),
    (PLAIN.replace("[/INST]", "[|assistant|]<thought>\n"), [], "음\n</thought>\n\n서울.", "음", "서울."),
    (PLAIN, ["[THINK]", "[/THINK]"], "[THINK]음[/THINK]서울.", "음", "서울."),
    (PLAIN, ["◁think▷", "◁/think▷"], "◁think▷음◁/think▷서울.", "음", "서울."),
    (PLAIN, ["<seed:think>", "</seed:think>"], "<seed:think>음</seed:think>서울.", "음", "서울."),
    (
        PLAIN,
        ["<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
        "<|START_THINKING|>음<|END_THINKING|><|START_RESPONSE|>서울.<|END_RESPONSE|>",
        "음",
        "서울.",
    ),
    (PLAIN, ["<|channel>", "<channel|>", "<|channel>thought"], "<|channel>thought\n음<channel|>서울.", "음", "서울."),
    (
        HARMONY,
        ["<|channel|>", "<|message|>"],
        "<|channel|>analysis<|message|>음<|end|><|start|>assistant<|channel|>final<|message|>서울.",
        "음",
        "서울.",
    ),
    (
        HARMONY,
        ["<|channel|>", "<|message|>"],
        "<|channel|>analysis<|message|>음<|end|><|start|>assistant<|channel|>commentary<|message|>잠깐"
        "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
        "음\n잠깐",
        "{}",
    ),
    (HARMONY, ["<|channel|>", "<|message|>"], "<|channel|>final<|message|>서울.", "", "서울."),
    (
        PLAIN + "{# <response> #}",
        ["<think>", "</think>"],
        "<think>음</think>\n<response>서울.</response>",
        "음",
        "서울.",
    ),
]  # fmt: skip


def thoughts_of(template, tokens=(), further=()):
    return find_thoughts(byte_tokenizer(template, tokens), template, further)


def divided(thoughts, reply, begun=False):
    found = thoughts.divide(reply, begun)
    return found.thought, BLANK_ENDS.sub("", found.answer), found.thinking


@pytest.mark.parametrize(("template", "tokens", "reply", "thought", "answer"), FAMILIES)
def test_families(template, tokens, reply, thought, answer):
    thoughts = thoughts_of(template, tokens)
    prompt = byte_tokenizer(template).apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    assert divided(thoughts, reply, thoughts.begin_in(prompt)) == (thought, answer, False)


def test_a_model_without_thoughts_has_no_marks():
    assert thoughts_of(PLAIN) is None
    assert thoughts_of(None) is None


def test_where_a_reply_begins():
    thoughts = thoughts_of(OPENS_THOUGHT)
    assert thoughts.begin_in("[user]?[/INST]<think>\n")
    assert not thoughts.begin_in("[user]?[/INST]<think>\n\n</think>\n\n")
    assert not thoughts.begin_in("[user]<think>[/INST]")
    assert divided(thoughts, "음\n</think>\n\n서울.", begun=True) == ("음", "서울.", False)
    assert divided(thoughts, "서울.", begun=True) == ("서울.", "", True)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("서울.", ("", "서울.", False)),
        ("<think>\n\n</think>\n\n서울.", ("", "서울.", False)),
        ("<think>음, 음", ("음, 음", "", True)),
        ("음</think>서울.", ("음", "서울.", False)),  # without the first mark
        ("<think>a</think>b<think>c</think>d", ("a\nc", "bd", False)),
        ("<think>a</think><think>b</think>c", ("a\nb", "c", False)),
        ("`<think>`와 「</think>」는 표시입니다.", ("", "`<think>`와 「</think>」는 표시입니다.", False)),
        ("<think>`</think>`로 끝낸다</think>네.", ("`</think>`로 끝낸다", "네.", False)),
        ('<think>a</think>"네."', ("a", '"네."', False)),
        ("", ("", "", False)),
    ],
)  # fmt: skip
def test_a_reply_is_divided(reply, expected):
    assert divided(thoughts_of(HYBRID), reply) == expected


def test_marks_of_the_recipe():
    marks = [ThoughtMarksConfig(open="((", close="))"), ThoughtMarksConfig(close="=====")]
    thoughts = thoughts_of(PLAIN, further=marks[:1])
    assert divided(thoughts, "((음))서울.") == ("음", "서울.", False)
    assert not thoughts.begin_in("[/INST]")
    within = thoughts_of(PLAIN, further=marks[1:])
    assert within.begin_in("[/INST]")
    assert divided(within, "음=====서울.", begun=True) == ("음", "서울.", False)


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "[/INST]",
    "fields": {
        "reasoning_content": {"open": "<<", "close": ">>", "content": "text"},
        "content": {"close": "</s>", "content": "text"},
    },
}


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [("[/INST]", "<<음>>서울."), ("[/INST]", "서울."), ("[/INST]<<", "음>>서울."), ("[/INST]<<", "음")],
)  # fmt: skip
def test_a_response_template_of_transformers_means_the_same(prompt, reply):
    tokenizer = byte_tokenizer(PLAIN)
    tokenizer.response_template = RESPONSE_TEMPLATE
    thoughts = find_thoughts(tokenizer, PLAIN, [])
    expected = tokenizer.parse_response(reply, prefix=prompt)
    thought, answer, _ = divided(thoughts, reply, thoughts.begin_in(prompt))
    assert thought == expected.get("reasoning_content", "")
    assert answer == expected.get("content", "")


def test_a_broken_response_template_is_one_sentence():
    tokenizer = byte_tokenizer(PLAIN)
    tokenizer.response_template = {"fields": {}}
    with pytest.raises(UserError, match=r"response_template cannot be read \(.*\); correct"):
        find_thoughts(tokenizer, PLAIN, [])


def test_what_templates_take_thoughts_from():
    assert reasoning_field(HYBRID) == "reasoning_content"
    assert reasoning_field("{{ message['thinking'] }}") == "thinking"
    assert reasoning_field("{% if thinking %}{{ m.content }}{% endif %}") is None


def test_characters_of_no_width_are_not_text():
    assert BLANK_ENDS.sub("", "\u200b \ufeff\n") == ""
    assert BLANK_ENDS.sub("", " a\u200bb \u2060") == "a\u200bb"
