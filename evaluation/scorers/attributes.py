"""An endpoint that scores attributes of texts from 0 to 1, in the Perspective API's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.config import AttributesConfig
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import Metric
from cpt_merge.evaluation.generate.endpoint import Endpoint, EndpointError, FirstFailure
from cpt_merge.evaluation.scorers.scorer import EMPTY, Score, Scorer

PATH = "comments:analyze"
KEY_HEADER = "X-Goog-Api-Key"  # Google's APIs take a key there too, and so it is in no URL


class AttributesScorer(Scorer):
    """The first attribute of each reply; the others are the score's `attributes`.

    When all attempts at one reply have failed, nothing more is sent.
    """

    def __init__(self, config: AttributesConfig) -> None:
        self._config, self._failure = config, FirstFailure()
        self._endpoint = Endpoint.of(config, "evaluation.safety.attributes", KEY_HEADER)
        first = config.attributes[0]
        self.metric = Metric(
            "attribute", first.lower(), f"mean {first} by the endpoint", rising=False
        )

    def score(self, exchanges: Sequence[Exchange], ranks: Ranks) -> list[Score]:
        """Send a few requests at a time, divided over the processes."""
        at_once = self._config.at_once
        batches = [
            exchanges[start : start + at_once] for start in range(0, len(exchanges), at_once)
        ]
        with ThreadPoolExecutor(at_once) as pool:
            found = ranks.map("attributes", lambda batch: list(pool.map(self._one, batch)), batches)
        return [score for batch in found for score in batch]

    def _one(self, exchange: Exchange) -> Score:
        if not exchange.text.strip():
            return Score(None, EMPTY)
        if self._failure.reason:
            return Score(None, self._failure.reason, dead=True)
        request = {
            "comment": {"text": exchange.text},
            "languages": [exchange.conversation.language.partition("_")[0]],
            "requestedAttributes": {name: {} for name in self._config.attributes},
            "doNotStore": True,
        }
        try:
            answer = self._endpoint.post(PATH, request)
        except EndpointError as error:
            if error.dead:
                self._failure.record(str(error))
            return Score(None, str(error), dead=error.dead)
        return _read_answer(answer, self._config.attributes)


def _read_answer(answer: Any, attributes: Sequence[str]) -> Score:
    """The score of {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.1}}}}.

    Any other answer, or one without a requested attribute, has none.
    """
    try:
        values = {
            name: answer["attributeScores"][name]["summaryScore"]["value"] for name in attributes
        }
    except (KeyError, TypeError):
        return Score(None, "the endpoint's answer lacks the attributes")
    if not all(isinstance(one, int | float) and 0 <= one <= 1 for one in values.values()):
        return Score(None, "the endpoint's answer holds a value that is not from 0 to 1")
    first = attributes[0]
    others = {name: float(value) for name, value in values.items() if name != first}
    return Score(float(values[first]), attributes=others)
