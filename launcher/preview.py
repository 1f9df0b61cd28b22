"""What training needs for its preview of the chat model: the merge's plan, prompts and scores."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.chat_template import ChatTemplate, check_prompts, read_chat_template
from cpt_merge.evaluation.config import MERGED
from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.evaluators.form import METRICS, forms_of, mean_values
from cpt_merge.evaluation.evaluators.instructions import CHECKS_STRICT, check_reply
from cpt_merge.evaluation.generate.conversations import reader_for
from cpt_merge.evaluation.generate.reader import ReplyLimits
from cpt_merge.evaluation.models import load_tokenizer
from cpt_merge.evaluation.prompt_files import parse_instruction, parse_prompt, read_conversations
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.merge.finish import write_all_but_weights
from cpt_merge.merge.hook import plan_for_shards
from cpt_merge.merge.memory import check_ties
from cpt_merge.merge.plan import MergeInputs, MergePlan
from cpt_merge.tracking import Cell
from cpt_merge.training.callbacks.preview import Interview

SCORES = (*(metric.name for metric in METRICS), CHECKS_STRICT.name)
COLUMNS = ("step", "language", "prompt", "reply", *SCORES)


def preview_of(
    recipe: Recipe, models: MergeInputs, adds_vector: bool = True
) -> tuple[MergePlan | None, Interview] | None:
    """The plan and the interview of the recipe's preview; None if it has none.

    `models` are those of the post-training hook. Without `adds_vector`, what is trained is asked.
    Raises `UserError` for a pair that cannot be merged, a chat model without a template, or
    unusable prompts.
    """
    settings = recipe.training.preview
    if settings.every is None:
        return None
    conversations = read_prompts(recipe)
    the_plan = plan_for_shards(recipe.merge, models)
    check_ties(the_plan)
    check_previewed(the_plan.chat.source.chat_directory, the_plan.format.template)
    with tempfile.TemporaryDirectory() as name:  # the tokenizer as the merged model will have it
        write_all_but_weights(the_plan, Path(name))
        tokenizer = load_tokenizer(Path(name))
        template = read_chat_template(Path(name), recipe.evaluation, MERGED)
        check_prompts({MERGED: Path(name)}, template, conversations, recipe.evaluation)
    most = settings.max_new_tokens
    interview = make_interview(conversations, tokenizer, template, most)
    return the_plan if adds_vector else None, interview


def check_previewed(chat: Path, template: str | None) -> None:
    """Raise `UserError` for a chat model that a preview cannot ask."""
    if template is None:
        raise UserError(
            f"{chat} has no chat template, which training.preview needs; add a chat_template to "
            "its tokenizer, or leave training.preview.every out."
        )


def read_prompts(recipe: Recipe) -> list[Conversation]:
    """The first prompts of each language of the corpus."""
    asked, count = recipe.evaluation, recipe.training.preview.prompts
    languages = asked.languages or recipe.corpus.languages()
    if asked.prompts is not None:
        place = "evaluation.prompts"
        return read_conversations(asked.prompts, place, parse_prompt, languages, count)
    place = "evaluation.instructions"
    return read_conversations(
        asked.instructions, place, parse_instruction, languages, count, "instructions"
    )


def make_interview(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    template: ChatTemplate,
    new_tokens: int,
) -> Interview:
    """The prompts in the merged model's ids, and a function that scores the replies by language."""
    texts = [template.render(tokenizer, one.turns[0].messages) for one in conversations]
    prompts = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    reader = reader_for(tokenizer, template, ReplyLimits(sys.maxsize, new_tokens, new_tokens))
    thinks = template.thoughts is not None

    def score(replies: list[list[int]]) -> tuple[dict[str, float], list[list[Cell]]]:
        exchanges = [
            Exchange(conversation, (reader.read(ids, template.begins_thought(text)),))
            for conversation, text, ids in zip(conversations, texts, replies, strict=True)
        ]
        scores = [_scores(exchange, template.marks) for exchange in exchanges]
        rows: list[list[Cell]] = [
            [exchange.conversation.language, exchange.conversation.questions,
             *([exchange.replies[0].thought] if thinks else []), exchange.text,
             *(values.get(name) for name in SCORES)]
            for exchange, values in zip(exchanges, scores, strict=True)
        ]  # fmt: skip
        return _means(exchanges, scores), rows

    columns = [*COLUMNS[:3], *(["thought"] if thinks else []), *COLUMNS[3:]]
    return Interview(prompts, frozenset(reader.stop_ids), columns, score)


def _scores(exchange: Exchange, marks: Sequence[str]) -> dict[str, float]:
    values = mean_values(forms_of(exchange, marks))
    if exchange.conversation.turns[0].checks:
        passed = check_reply(exchange).strict
        values[CHECKS_STRICT.name] = sum(passed) / len(passed)
    return values


def _means(exchanges: Sequence[Exchange], scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """`language/metric`: the mean over the language's prompts."""
    found: dict[str, list[float]] = {}
    for exchange, values in zip(exchanges, scores, strict=True):
        for name, value in values.items():
            found.setdefault(f"{exchange.conversation.language}/{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
