"""Chat templates in the styles of published models, and tokenizers for them."""

from collections.abc import Mapping
from dataclasses import dataclass

from cpt_merge.data.conversations_rows import ChatRow, decode
from cpt_merge.data.conversations_template import ConversationTemplate, Thinking
from tests.evaluation.thinkers import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA_2 = (  # joins system and user, strips
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}<s>[INST] {{ (sys if loop.first else '') + m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} </s>{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<s>{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (  # a system prompt in front of the last message, if it is the user's
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "<s>{% for m in rest %}{% if m['role'] == 'user' %}[INST]{{ sys if loop.last else '' }}{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
PHI_3 = (  # ends a conversation, and no turn, with the tokenizer's eos
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN_3 = (  # keeps the thoughts of the last reply only, and writes an empty one there
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<r>{{ m.content }}</r>"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (  # begins every reply with a thought, and keeps none
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{{ m['content'].split('</think>')[-1] }}</s>{% else %}<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
APERTUS = (  # ends a reply with the next turn
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}"
    "{% else %}{% if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' %}<|end|>{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GLM = (  # the mark of the next turn ends a reply
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDLESS = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"

MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """A template, the token that ends its replies, and whether it takes a system prompt."""

    template: str
    end: str
    system: bool = True


STYLES: Mapping[str, Style] = {
    "chatml": Style(CHATML, "<|im_end|>"),
    "chatml_marked": Style(CHATML_MARKED, "<|im_end|>"),
    "default_system": Style(DEFAULT_SYSTEM, "<|im_end|>"),
    "llama_2": Style(LLAMA_2, "</s>"),
    "llama_3": Style(LLAMA_3, "<|eot_id|>"),
    "gemma": Style(GEMMA, "<end_of_turn>", system=False),
    "mistral": Style(MISTRAL, "</s>", system=False),
    "mistral_3": Style(MISTRAL_3, "</s>"),
    "phi_3": Style(PHI_3, "<|end|>"),
    "qwen_3": Style(QWEN_3, "<|im_end|>"),
    "apertus": Style(APERTUS, "<|end|>"),
    "glm": Style(GLM, "<|user|>"),
}


def of(
    text: str, end: str, thinking: Thinking = "keep", tokenizer: object = None, **variables: object
) -> ConversationTemplate:
    """A template with a tokenizer of bytes and marks."""
    made = tokenizer or byte_tokenizer(None)
    made.add_special_tokens({"additional_special_tokens": list(MARKS)})
    made.chat_template = text
    ends = frozenset({made.convert_tokens_to_ids(end)})
    return ConversationTemplate(made, ends, thinking, variables)


def shown(template: ConversationTemplate, row: ChatRow) -> str:
    """The row as text, with what the loss counts between brackets."""
    parts, start = [], 0
    for place in range(1, len(row.ids) + 1):
        if place == len(row.ids) or row.trained[place] != row.trained[start]:
            text = decode(template, row.ids[start:place])
            parts.append(f"⟦{text}⟧" if row.trained[start] else text)
            start = place
    return "".join(parts)
