"""Generation for the evaluation: batches by length against one prompt after the other.

    python -m benchmarks.evaluation MODEL [--template CHAT] [--prompts FILE] [--languages en,ko]
                                    [--out FILE]

MODEL is a model's directory (runs/demo-inputs/chat), prompted in CHAT's template if it has none.
Both ways answer the built-in instructions and dialogues, or the prompts of a file, greedily and
with the same end tokens. They take turns, and the ratio is that of each round. The loop is the
obvious one: `model.generate` for each prompt, a dialogue's turns in order. It has no padding, so
replies may differ if two tokens are nearly as likely; the share of equal replies is reported.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

from cpt_merge.core.artifact import write_json
from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.chat_template import (
    ChatTemplate,
    read_chat_template,
    template_for,
)
from cpt_merge.evaluation.config import BUILT_IN, EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Message
from cpt_merge.evaluation.generate.conversations import converse
from cpt_merge.evaluation.generate.transformers import TransformersEngine, generation_settings
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.evaluation.prompt_files import (
    parse_dialogue,
    parse_instruction,
    parse_prompt,
    read_conversations,
)

Texts = list[list[str]]  # the replies of each conversation


def one_by_one(
    model: LanguageModel,
    template: ChatTemplate,
    conversations: list[Conversation],
    config: EvaluationConfig,
) -> tuple[Texts, int]:
    """The replies, and the number of generated tokens."""
    stop_ids = model.tokenizer.convert_tokens_to_ids(template.end_tokens)
    settings = generation_settings(config, stop_ids, config.answer_tokens)
    texts: Texts = []
    tokens = 0
    for conversation in conversations:
        history: list[Message] = []
        for turn in conversation.turns:
            history += turn.messages
            ids = torch.tensor([model.encode(template.render(model.tokenizer, history))])
            with torch.inference_mode():
                output = model.loaded.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
                )
            reply = output[0, ids.shape[1] :].tolist()
            tokens += len(reply)
            kept = [token for token in reply if token not in stop_ids]
            text = model.tokenizer.decode(
                kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
            ).strip()
            history.append({"role": "assistant", "content": text})
        texts.append([message["content"] for message in history if message["role"] == "assistant"])
    return texts, tokens


def batched(
    model: LanguageModel,
    template: ChatTemplate,
    conversations: list[Conversation],
    config: EvaluationConfig,
) -> tuple[Texts, int]:
    """The evaluation's way."""
    engine = TransformersEngine(model, Ranks())
    exchanges = converse(engine, template, conversations, config).exchanges
    texts = [[reply.text for reply in exchange.replies] for exchange in exchanges]
    return texts, sum(reply.tokens for exchange in exchanges for reply in exchange.replies)


def main(
    directory: Path,
    template: Path | None = None,
    prompts: Path | None = None,
    languages: str = "zh_tw,ko,en",
    max_new_tokens: int = 48,
    batch_size: int = 16,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Print seconds and tokens per second of both ways and their ratios; write them to `out`."""
    asked = languages.split(",")
    config = EvaluationConfig(max_new_tokens=max_new_tokens, batch_size=batch_size)
    if prompts:
        conversations = read_conversations(
            str(prompts), "--prompts", parse_prompt, asked, config.max_prompts
        )
    else:
        conversations = [
            *read_conversations(
                BUILT_IN, "", parse_instruction, asked, config.max_prompts, "instructions"
            ),
            *read_conversations(
                BUILT_IN, "", parse_dialogue, asked, config.max_prompts, "dialogues"
            ),
        ]
    model = LanguageModel.open("model", directory)
    _ = model.loaded
    used = template_for(model, directory, read_chat_template(template or directory))
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(), "conversations": len(conversations),
        "turns": sum(len(one.turns) for one in conversations), "rounds": [],
    }  # fmt: skip
    for _ in range(rounds):
        texts: dict[Any, Texts] = {}
        measured: dict[str, Any] = {}
        for way in (one_by_one, batched):
            start = time.monotonic()
            texts[way], tokens = way(model, used, conversations, config)
            seconds = time.monotonic() - start
            measured[way.__name__] = {
                "seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds, 1),
            }
        pairs = zip(texts[one_by_one], texts[batched], strict=True)
        measured["equal"] = round(sum(a == b for a, b in pairs) / len(conversations), 3)
        measured["ratio"] = round(
            measured["one_by_one"]["seconds"] / measured["batched"]["seconds"], 2
        )
        found["rounds"].append(measured)
        print(json.dumps(measured), flush=True)
    found["ratio"] = median(one["ratio"] for one in found["rounds"])
    print(json.dumps({name: value for name, value in found.items() if name != "rounds"}))
    if out:
        write_json(out, found)


if __name__ == "__main__":
    typer.run(main)
