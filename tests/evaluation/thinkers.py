"""Reasoning models that always say the same, and chat templates of the usual kinds."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# thoughts of earlier turns are cut out of their content, or left to `reasoning_content`
HYBRID = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}</s>"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[/INST]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
OPENS_THOUGHT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}[/INST]<think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[/INST]{% endif %}"
)


def byte_tokenizer(template: str | None, added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, and the added ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def write_thinker(
    directory: Path,
    says: Sequence[str],
    template: str | None = HYBRID,
    after: Sequence[str] = ("[/INST]",),
    positions: int = 4096,
) -> Path:
    """A model that says these texts after one of `after`, each of which is a token of its own.

    What follows a text depends on nothing else: one that occurs twice is repeated for ever.
    """
    added = dict.fromkeys([*after, *says])
    tokenizer = byte_tokenizer(template, [one for one in added if one != "</s>"])
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=positions, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    follows = [*((one, says[0]) for one in after), *pairwise(says)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()  # what is left is the embedding of the last token
        model.lm_head.weight.zero_()
        for one, following in follows:
            number, next_number = tokenizer.convert_tokens_to_ids([one, following])
            model.lm_head.weight[next_number] += model.model.embed_tokens.weight[number]
    model.generation_config = GenerationConfig(eos_token_id=1, bos_token_id=0)
    model.save_pretrained(directory)
    return directory
