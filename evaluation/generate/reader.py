"""From token ids to replies, within limits that are the same for all models.

An answer is limited in characters: a tokenizer that needs three times as many tokens for a text
must not get a third of the room. Tokens are a second limit, for text that never becomes characters.
Thoughts have a limit of their own in tokens; a reply that is still thinking there has no answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Reply
from cpt_merge.evaluation.thoughts import BLANK_ENDS, DividedReply, Thoughts

CHECKED_EVERY = 16  # tokens; what is generated beyond a limit until then is cut off


@dataclass(frozen=True)
class ReplyLimits:
    """The most that a reply may hold."""

    characters: int  # of the answer
    answer_tokens: int
    thought_tokens: int

    @staticmethod
    def of(config: EvaluationConfig) -> ReplyLimits:
        """Those of the recipe."""
        return ReplyLimits(config.max_characters, config.answer_tokens, config.max_thought_tokens)


@dataclass(frozen=True)
class ReplyReader:
    """Reads what a model generates. `begun` stands for a prompt that has opened a thought."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    thoughts: Thoughts | None
    limits: ReplyLimits

    @property
    def most_tokens(self) -> int:
        """Of a whole reply."""
        thinking = self.limits.thought_tokens if self.thoughts else 0
        return thinking + self.limits.answer_tokens

    def read(self, ids: Sequence[int], begun: bool) -> Reply:
        """The reply of generated ids; what is beyond a limit has no effect on it."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        ids, stopped = list(ids[:end]), end is not None
        if len(ids) > self.limits.thought_tokens:
            head = ids[: self.limits.thought_tokens]
            if self._divide(head, begun).thinking:
                ids, stopped = head, False
        divided = self._divide(ids, begun)
        if divided.thinking:
            return Reply("", stopped, len(ids) + stopped, divided.thought, len(ids), True)
        thinking = self._tokens_up_to(ids, divided.answer_from)
        kept = thinking + self.limits.answer_tokens
        if len(ids) > kept:
            ids, stopped = ids[:kept], False
            divided = self._divide(ids, begun)
        over = len(divided.answer) - self.limits.characters
        if over > 0:
            ids = ids[: self._tokens_up_to(ids, len(self._decode(ids)) - over)]
            stopped = False
        answer = BLANK_ENDS.sub("", divided.answer[: self.limits.characters])
        return Reply(answer, stopped, len(ids) + stopped, divided.thought, thinking)

    def is_over(self, ids: Sequence[int], begun: bool) -> bool:
        """Whether more tokens could not change the reply."""
        divided = self._divide(ids, begun)
        if divided.thinking:
            return len(ids) > self.limits.thought_tokens
        if len(divided.answer) > self.limits.characters:
            return True
        if len(ids) <= self.limits.answer_tokens:
            return False
        thinking = self._tokens_up_to(ids, divided.answer_from)
        return len(ids) > thinking + self.limits.answer_tokens

    def _divide(self, ids: Sequence[int], begun: bool) -> DividedReply:
        text = self._decode(ids)
        return self.thoughts.divide(text, begun) if self.thoughts else DividedReply("", text)

    def _tokens_up_to(self, ids: Sequence[int], place: int) -> int:
        """How many tokens the text up to `place` takes."""
        if place == 0:
            return 0
        return bisect_left(range(len(ids)), place, key=lambda count: len(self._decode(ids[:count])))

    def _decode(self, ids: Sequence[int]) -> str:
        """The text with its special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


class LimitsReached(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch at its limits. `begun` has an entry for each row."""

    def __init__(self, reader: ReplyReader, prompt_tokens: int, begun: Sequence[bool]) -> None:
        self._reader, self._prompt_tokens, self._begun = reader, prompt_tokens, begun
        self._over = [False] * len(begun)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Whether each row has ended, bool [rows]."""
        if (input_ids.shape[1] - self._prompt_tokens) % CHECKED_EVERY == 0:
            rows = input_ids[:, self._prompt_tokens :].tolist()
            self._over = [
                over or row[-1] in self._reader.stop_ids or self._reader.is_over(row, begun)
                for over, row, begun in zip(self._over, rows, self._begun, strict=True)
            ]
        return torch.tensor(self._over, device=input_ids.device)
