"""Templates prove themselves before data is read."""

from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_check import checked
from cpt_merge.data.conversations_messages import ChatRecord
from cpt_merge.data.conversations_rows import chat_rows
from tests.data import chat_templates as styles
from tests.data.chat_templates import STYLES, of, shown

SOURCE = Path("models/chat")


@pytest.mark.parametrize("name", STYLES)
def test_templates_in_the_usual_styles_are_right(name: str) -> None:
    style = STYLES[name]
    found = checked(of(style.template, style.end), SOURCE)
    system = [line for line in found.remarks if "system prompts" in line]
    assert bool(system) != style.system


def test_an_end_at_which_generation_does_not_end_is_learned_and_told() -> None:
    found = checked(of(styles.PHI_3, "</s>"), SOURCE)
    ends = found.template.tokenizer.convert_ids_to_tokens(sorted(found.template.end_ids))
    assert set(ends) == {"</s>", "<|end|>"}
    assert "ends a reply with <|end|>, at which generation does not end" in found.remarks[0]


def test_two_tokens_after_every_reply_are_both_learned() -> None:
    """Command R: the second one ends replies."""
    template = of(styles.CHATML.replace("<|im_end|>", "<|end|><|im_end|>"), "<|im_end|>")
    found = checked(template, SOURCE)
    assert found.remarks == []
    assert found.template.end_ids == template.end_ids
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    (row,) = chat_rows(found.template, ChatRecord(said)).rows
    assert shown(found.template, row).endswith("assistant\n⟦Me.<|end|><|im_end|>⟧")


def test_a_template_that_writes_thoughts_always_is_checked_with_one() -> None:
    assert checked(of(styles.R1, "</s>"), SOURCE)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (styles.ENDLESS, "would not learn to stop"),
        (styles.CHATML.replace("assistant\n{% endif", "bot\n{% endif"), "not render after its own"),
        (styles.CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "changes"),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}</s>{% endfor %}",
            "whose content the chat template leaves out or changes",
        ),
    ],
)
def test_a_template_with_which_replies_cannot_be_trained_is_refused(
    template: str, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        checked(of(template, "</s>" if "### " in template else "<|im_end|>"), SOURCE)
    assert reason in str(caught.value)
    assert str(SOURCE) in str(caught.value)
