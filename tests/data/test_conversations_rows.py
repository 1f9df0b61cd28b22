"""Rows have the tokens that a model reads and writes, and the loss counts what it writes."""

from typing import Any

import pytest
from tokenizers import AddedToken

from cpt_merge.data.conversations_messages import ChatRecord
from cpt_merge.data.conversations_rows import ChatRows, chat_rows, encode
from cpt_merge.data.conversations_template import ConversationError, ConversationTemplate
from tests.data import chat_templates as styles
from tests.data.chat_templates import STYLES, of, shown
from tests.evaluation.thinkers import byte_tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TWO = [user("Who?"), assistant("Me: 我。"), user("Where?"), assistant("There.\nOr here.")]


def rows_of(template: ConversationTemplate, *messages: dict[str, Any]) -> list[str]:
    return [shown(template, row) for row in chat_rows(template, ChatRecord([*messages])).rows]


def at_inference(template: ConversationTemplate, messages: list[Any], **variables: Any) -> Any:
    text = template.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **variables
    )
    return encode(template, [text])[0]


@pytest.mark.parametrize("name", [name for name in STYLES if name != "qwen_3"])
def test_each_reply_and_its_end_count_in_one_row(name: str) -> None:
    style = STYLES[name]
    template = of(style.template, style.end)
    (row,) = chat_rows(template, ChatRecord(TWO)).rows
    text = shown(template, row)
    replies = [part.partition("⟧")[0] for part in text.split("⟦")[1:]]
    space = {"llama_2": (" ", " "), "mistral": (" ", "")}.get(name, ("", ""))
    assert replies == [
        f"{space[0]}{turn['content']}{space[1]}{style.end}" for turn in (TWO[1], TWO[3])
    ]
    assert text.endswith(f"{style.end}⟧")
    assert row.replies == 2
    whole = template.tokenizer.apply_chat_template(TWO, tokenize=True, return_dict=False)
    assert row.ids[: len(whole)] == whole[: len(row.ids)]
    for turn in (1, 3):
        prompt = at_inference(template, TWO[:turn])
        assert row.ids[: len(prompt)] == prompt
        assert row.trained[len(prompt)]
        assert not row.trained[len(prompt) - 1]


def test_generation_marks_are_used_and_the_end_is_added() -> None:
    ascii_ = [user("Who?"), assistant("Me."), user("Where?"), assistant("There.")]
    marked = of(styles.CHATML_MARKED, "<|im_end|>")
    (row,) = chat_rows(marked, ChatRecord(ascii_)).rows
    found = marked.tokenizer.apply_chat_template(
        ascii_, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(row.ids, row.trained, found["assistant_masks"], strict=False)
    assert [id_ for id_, one, mark in pairs if one != bool(mark)] == [*marked.end_ids] * 2
    content = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    partly = styles.CHATML_MARKED.replace(content, "No: " + content)
    (text,) = rows_of(of(partly, "<|im_end|>"), user("Who?"), assistant("It."))
    assert text.endswith("No: ⟦It.<|im_end|>⟧")


def test_a_call_of_a_tool_that_the_template_leaves_out_is_an_error() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    with pytest.raises(
        ConversationError, match="whose calls of tools the chat template leaves out"
    ):
        rows_of(of(styles.CHATML, "<|im_end|>"), user("?"), assistant("", tool_calls=[call]))


def test_a_turn_is_trained_in_the_form_in_which_it_is_generated() -> None:
    template = of(styles.QWEN_3, "<|im_end|>")
    thinking = [
        user("Who?"), assistant("Me.", reasoning_content="I see."),
        user("Where?"), assistant("<think>\nHm.\n</think>\n\nThere."),
        user("When?"), assistant("Now."),
    ]  # fmt: skip
    start = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    asked = f"{start}Me.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    last = f"{asked}There.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n"
    assert rows_of(template, *thinking) == [
        f"{start}⟦<think>\nI see.\n</think>\n\nMe.<|im_end|>⟧",
        f"{asked}⟦<think>\nHm.\n</think>\n\nThere.<|im_end|>⟧",
        f"{last}<think>\n\n</think>\n\n⟦Now.<|im_end|>⟧",
    ]
    removed = rows_of(of(styles.QWEN_3, "<|im_end|>", "remove"), *thinking)
    assert [text.partition("⟦")[2] for text in removed] == [
        "Me.<|im_end|>⟧", "There.<|im_end|>⟧", "Now.<|im_end|>⟧",
    ]  # fmt: skip
    assert not any("Hm." in text or "I see." in text for text in removed)


def test_a_variable_of_the_recipe_is_not_switched() -> None:
    template = of(styles.QWEN_3, "<|im_end|>", enable_thinking=True)
    (text,) = rows_of(template, user("Who?"), assistant("Me."))
    assert text.endswith("assistant\n⟦<think>\n\n</think>\n\nMe.<|im_end|>⟧")


def test_a_template_that_begins_every_reply_with_a_thought() -> None:
    template = of(styles.R1, "</s>")
    thinking = [user("Who?"), assistant("Me.", reasoning_content="I see.")]
    assert rows_of(template, *thinking, user("Where?"), assistant("<think>Hm.</think>There.")) == [
        "<s><|user|>Who?<|assistant|><think>\n⟦I see.\n</think>\n\nMe.</s>⟧",
        "<s><|user|>Who?<|assistant|>Me.</s><|user|>Where?<|assistant|><think>\n"
        "⟦Hm.\n</think>\n\nThere.</s>⟧",
    ]
    with pytest.raises(ConversationError, match="message 2 without a thought, but the chat templ"):
        rows_of(template, user("Who?"), assistant("Me."))


def test_a_system_prompt_that_moves_to_the_last_question() -> None:
    template = of(styles.MISTRAL_3, "</s>")
    system = {"role": "system", "content": "Hush."}
    assert rows_of(
        template, system, user("Who?"), assistant("Me."), user("Why?"), assistant("I")
    ) == [
        "<s>[INST]Hush.\n\nWho?[/INST]⟦Me.</s>⟧",
        "<s>[INST]Who?[/INST]Me.</s>[INST]Hush.\n\nWhy?[/INST]⟦I</s>⟧",
    ]


def test_thoughts_that_the_template_has_no_place_for_are_an_error_unless_removed() -> None:
    thinking = [user("Who?"), assistant("Me.", reasoning_content="I see.")]
    with pytest.raises(ConversationError, match="thought the chat template leaves out; set `think"):
        rows_of(of(styles.CHATML, "<|im_end|>"), *thinking)
    (text,) = rows_of(of(styles.CHATML, "<|im_end|>", "remove"), *thinking)
    assert text.endswith("⟦Me.<|im_end|>⟧")
    assert "see" not in text


def test_calls_of_tools_and_their_results() -> None:
    template = of(styles.QWEN_3, "<|im_end|>", "remove")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    (text,) = rows_of(
        template, user("?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "2"}, assistant("2")
    )[1:]  # fmt: skip
    assert "<r>2</r>" in text
    assert text.endswith("⟦2<|im_end|>⟧")


def test_a_message_of_weight_0_does_not_count() -> None:
    template = of(styles.CHATML, "<|im_end|>")
    (text,) = rows_of(template, TWO[0], assistant("Bad.", weight=0), *TWO[2:])
    assert "Bad.<|im_end|>\n" in text
    assert text.count("⟦") == 1


def test_messages_after_the_last_reply_are_dropped_and_counted() -> None:
    found = chat_rows(
        of(styles.CHATML, "<|im_end|>"), ChatRecord([*TWO, user("And?"), user("So?")])
    )
    assert found.dropped == 2
    assert len(found.rows) == 1
    assert found.rows == chat_rows(of(styles.CHATML, "<|im_end|>"), ChatRecord(TWO)).rows


def merging() -> Any:
    """A tokenizer that has a token for two line ends."""
    tokenizer = byte_tokenizer(None)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    return tokenizer


def rows_with_a_border() -> tuple[ConversationTemplate, ChatRows]:
    template = of(styles.CHATML, "<|im_end|>", tokenizer=merging())
    return template, chat_rows(template, ChatRecord([user("Who?"), assistant("\nMe.")]))


def test_a_token_across_the_border_is_written_as_a_model_would() -> None:
    template, found = rows_with_a_border()
    (row,) = found.rows
    prompt = at_inference(template, [user("Who?")])
    assert row.ids[: len(prompt)] == prompt
    assert found.borders == 1
    assert shown(template, row).endswith("assistant\n⟦\nMe.<|im_end|>⟧")
    whole = template.tokenizer.apply_chat_template(
        [user("Who?"), assistant("\nMe.")], tokenize=True, return_dict=False
    )
    assert whole[: len(prompt)] != prompt


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("chatml", [user("Who?")], "no message of an assistant to train on"),
        ("chatml", [user("Who?"), assistant(" \n")], "an empty message 2 of the assistant"),
        ("chatml", [user("Who?"), assistant("<think>\nI see.")], None),
        ("chatml", [user("?"), assistant("a<|im_end|>b")], "message 2 that contains '<|im_end|>'"),
        ("chatml", [{"role": "tool", "content": "x"}, assistant("a")], "the role 'tool', which"),
        (
            "gemma",
            [{"role": "system", "content": "x"}, *TWO],
            "refused by the chat template (no sy",
        ),
        ("llama_2", [user("a"), user("b"), assistant("c")], "(roles must take turns); its roles"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(
    name: str, messages: list[Any], reason: str | None
) -> None:
    template = of(STYLES[name].template, STYLES[name].end)
    if reason is None:
        assert rows_of(template, *messages)
        return
    with pytest.raises(ConversationError) as caught:
        rows_of(template, *messages)
    assert reason in str(caught.value)


def test_a_message_that_the_template_leaves_out_is_an_error() -> None:
    deaf = styles.CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    with pytest.raises(
        ConversationError, match="message 1 with the role 'system' that the chat te"
    ):
        rows_of(of(deaf, "<|im_end|>"), {"role": "system", "content": "Hush."}, *TWO)


def test_a_template_without_an_end_is_an_error() -> None:
    with pytest.raises(ConversationError, match="would not learn to stop"):
        rows_of(of(styles.ENDLESS, "</s>"), *TWO)


def test_the_date_is_the_same_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }} " + styles.CHATML
    (text,) = rows_of(of(dated, "<|im_end|>"), *TWO)
    assert text.startswith("26 Jul 2024 ")
