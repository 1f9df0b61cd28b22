"""What an engine is: it answers prompts for one model.

`transformers.py` generates in this process, `server.py` asks a server that speaks OpenAI's
protocol, and `vllm.py` starts such a server for the model. Prompts go in as token ids and token ids
come out, so templates, limits, thoughts and end tokens are the same whoever generates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Reply
from cpt_merge.evaluation.generate.reader import ReplyReader
from cpt_merge.evaluation.models import LanguageModel

TURN_SEEDS = 10_007  # more than there are batches, so that two turns share no seed


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and in token ids."""

    text: str
    ids: list[int]
    room: int  # the most tokens of its reply
    begun: bool  # whether it opens a thought, which the reply continues


class Engine(ABC):
    """Generates the replies of one model, on every process of a job."""

    def __init__(self, model: LanguageModel, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks

    @property
    def positions(self) -> int:
        """The most tokens of prompt and reply together."""
        return self.model.positions

    @abstractmethod
    def start(self) -> None:
        """Get ready, unless it is, on every process. Raises `UserError` if the model is not there.

        Call it before `positions` and `reply`.
        """

    @abstractmethod
    def reply(
        self,
        prompts: Sequence[Prompt],
        reader: ReplyReader,
        config: EvaluationConfig,
        turn: int,
        label: str,
    ) -> list[Reply]:
        """A reply to each prompt, in order, on every process.

        Replies that are sampled depend on the seed of `config` and on `turn`. `label` is shown
        with the progress.
        """

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Release memory that others need. The engine may be started again."""
