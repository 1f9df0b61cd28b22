"""Answers of a reasoning model to lm-eval's requests for text.

lm-eval ends a generation at the first stop string, which is often a line break within a thought,
and takes the thought for the answer. Here thoughts are left out first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cpt_merge.core.progress import say
from cpt_merge.evaluation.chat_template import ChatTemplate
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.generate.conversations import generate, remarks
from cpt_merge.evaluation.generate.engine import Engine

MOST_TOKENS = 256  # lm-eval's default


def answer_requests(
    engine: Engine,
    template: ChatTemplate,
    requests: Sequence[Any],
    config: EvaluationConfig,
) -> list[str]:
    """The answer to each of lm-eval's requests (`generate_until`), on every process."""
    alike: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
    answers = [""] * len(requests)
    for text, places in alike.items():
        settings = json.loads(text)
        asked = _with(config, settings)
        prompts = [requests[place].args[0] for place in places]
        replies = generate(engine, template, prompts, asked)
        for line in remarks(replies, template, config):
            say(f"{engine.model.name}: {line}")
        for place, reply in zip(places, replies, strict=True):
            answers[place] = _up_to(reply.text, settings.get("until") or [])
    return answers


def _with(config: EvaluationConfig, settings: Mapping[str, Any]) -> EvaluationConfig:
    """The evaluation's settings with those of a task: no characters are counted there."""
    sampled = settings.get("do_sample", False)
    changes = {
        "max_characters": sys.maxsize,
        "max_new_tokens": int(settings.get("max_gen_toks", MOST_TOKENS)),
        "temperature": float(settings.get("temperature", 1.0)) if sampled else 0.0,
        "top_p": float(settings.get("top_p", 1.0)),
        "repetition_penalty": 1.0,
    }
    return config.model_copy(update=changes)


def _up_to(answer: str, until: str | list[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        answer = answer.split(stop)[0] if stop else answer
    return answer
