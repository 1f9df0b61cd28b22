"""The form of replies written by hand, and the marks of templates that are in use."""

import pytest

from cpt_merge.evaluation.chat_template import read_chat_template, template_for, template_marks
from cpt_merge.evaluation.chinese import other_script_characters
from cpt_merge.evaluation.conversation import ANY_LANGUAGE, Reply
from cpt_merge.evaluation.evaluators.form import form_of
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.evaluation.reply_language import is_in_language
from tests.evaluation.conftest import TEMPLATE, make_tokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant, named X.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = (
    "{% for m in messages %}### {{ 'Instruction' if m.role == 'user' else 'Response' }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)

IN_LANGUAGE = [
    ("zh_tw", "臺灣的首都是臺北，人口約兩百五十萬。", True),
    ("zh_tw", "台湾的首都是台北，人口约两百五十万，这是简体。", False),
    ("zh_cn", "台湾的首都是台北，人口约两百五十万，这是简体。", True),
    ("zh_cn", "臺灣的首都是臺北，這是繁體字。", False),
    ("zh_hk", "我哋喺香港食嘢，佢嘅嘢好好味。", True),
    ("zh_tw", "我的天，好大的山。", True),  # written alike in both scripts
    ("zh_tw", "我用 Python 3 寫了一個很小的程式", True),
    ("zh_tw", "Sure! The answer is 台北.", False),
    ("ko", "대한민국의 수도는 서울입니다.", True),
    ("ko", "韓國的首都是首爾。", False),
    ("ko", "The capital of Korea is Seoul.", False),
    ("en", "The capital of Korea is Seoul (서울).", True),
    ("ko", "42.", True),  # a number is in every language
    ("en", "?!", False),
    ("ko", "", False),
]


@pytest.mark.parametrize(("language", "text", "expected"), IN_LANGUAGE)
def test_language_of_a_reply(language, text, expected):
    assert is_in_language(text, language) is expected


def test_one_character_of_the_other_script_is_found_but_not_punctuation():
    assert other_script_characters("我們在台灣。‧·℃", "zh_tw") == 0
    assert other_script_characters("我們在台湾。", "zh_tw") == 1
    assert other_script_characters("我们在臺灣。", "zh_cn") == 2
    assert other_script_characters("한국어", "ko") == 0


def test_chat_is_all_of_stopped_language_and_format():
    marks = ["[INST]", "[/INST]", "</s>"]
    good = form_of(Reply("서울입니다.", True, 5), "ko", marks)
    assert good == {
        "chat": 1, "stopped": 1, "in_language": 1, "keeps_format": 1, "repetition": 0, "empty": 0,
    }  # fmt: skip
    for reply, broken in [
        (Reply("서울입니다.", False, 5), "stopped"),
        (Reply("Seoul.", True, 5), "in_language"),
        (Reply("서울입니다. [INST] 그리고", True, 5), "keeps_format"),
        (Reply("  ", True, 1), "keeps_format"),
    ]:
        form = form_of(reply, "ko", marks)
        assert not form["chat"]
        assert not form[broken]


def test_an_empty_reply_is_counted_and_never_in_any_language():
    for language in ("ko", ANY_LANGUAGE):
        form = form_of(Reply("\n", True, 1), language, [])
        assert form["empty"]
        assert not form["in_language"]
    assert form_of(Reply('{"a": 1}', True, 5), ANY_LANGUAGE, [])["chat"]


@pytest.mark.parametrize(
    ("template", "added", "expected"),
    [
        (TEMPLATE, [], {"<s>", "</s>", "[INST]", "[/INST]"}),
        (
            CHATML,
            ["<|im_start|>", "<|im_end|>"],
            {"<|im_start|>", "<|im_end|>", "You are a helpful AI assistant, named X."},
        ),
        (ALPACA, [], {"### Instruction:", "### Response:"}),
    ],
)
def test_marks_come_from_the_template(template, added, expected):
    tokenizer = make_tokenizer(300, template)
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    marks = set(template_marks(tokenizer))
    assert marks == expected | {"<s>", "</s>"}
    assert not marks & {"user", "assistant", "system"}


def test_a_model_without_a_template_is_prompted_in_the_chat_models_with_a_message(
    models_of_two_vocabularies, capsys
):
    base, chat = (
        models_of_two_vocabularies["base"],
        read_chat_template(models_of_two_vocabularies["chat"]),
    )
    template = template_for(LanguageModel.open("base", base), base, chat)
    assert (template.template, template.end_tokens) == (TEMPLATE, ["</s>"])
    chat_directory = models_of_two_vocabularies["chat"]
    assert (
        f"base: has no chat template; it is prompted in that of {chat_directory}"
        in capsys.readouterr().err
    )
