"""Replies from a server with OpenAI's protocol: vLLM, SGLang, TGI, llama.cpp and others.

Prompts go to POST URL/completions as token ids, and what comes back is read by the same
`ReplyReader` as the ids of a model in this process. The server has to show that it serves this
model: it must list it, and count as many tokens in every prompt as the model's own tokenizer. A
server that takes no token ids gets text, under the same test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say, say_once
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Reply
from cpt_merge.evaluation.generate.config import ApiKey, ServerConfig
from cpt_merge.evaluation.generate.endpoint import (
    Endpoint,
    EndpointError,
    FirstFailure,
    shown_address,
)
from cpt_merge.evaluation.generate.engine import TURN_SEEDS, Engine, Prompt
from cpt_merge.evaluation.generate.reader import ReplyReader
from cpt_merge.evaluation.models import LanguageModel, batches_by_length

COMPLETIONS, MODELS = "completions", "models"
PROBE = "Hello"
BATCH = 4  # prompts per parallel request: a batch waits for its slowest reply once
MOST_STOPS = 4  # strings that the protocol takes
ENDED = {"stop", "eos_token", "stop_sequence"}  # why a reply ended, if not by a limit
LIMITED = {"length"}
UNKNOWN_FIELD = {400, 422}  # statuses of a request with one


@dataclass(frozen=True)
class Served:
    """A model at a server."""

    name: str
    positions: int | None = None  # None if the server does not tell
    takes_ids: bool = True


class ServerEngine(Engine):
    """Asks a server for the replies of the model in `directory`. `setting` is the recipe's key that
    names the server."""

    def __init__(
        self,
        model: LanguageModel,
        ranks: Ranks,
        config: ServerConfig,
        url: str,
        directory: Path,
        setting: str,
    ) -> None:
        super().__init__(model, ranks)
        self._config, self._directory = config, directory
        key = ApiKey(config.key_variable, "evaluation.server.key_variable")
        self._endpoint = Endpoint(url, key, config.timeout, config.attempts, setting)
        self._served: Served | None = None

    @property
    def positions(self) -> int:
        """See `Engine.positions`; a server may have been started with fewer."""
        allowed = self._served.positions if self._served else None
        return min(self.model.positions, allowed or self.model.positions)

    def start(self) -> None:
        """See `Engine.start`."""
        if self._served is not None:
            return
        served, failure = None, ""
        try:
            served = self._find() if self.ranks.works else None
        except EndpointError as error:
            failure = self._with_advice(error)
        except UserError as error:
            failure = str(error)
        if failure := next(filter(None, self.ranks.gather(failure)), ""):
            raise UserError(f"model {self.model.name}: {failure}")
        found = self.ranks.broadcast(lambda: served)
        assert found is not None, "rank 0 works"
        self._served = served or found
        say(
            f"{self.model.name}: {found.name} at {shown_address(self._endpoint.url)} generates its "
            f"replies{'' if found.takes_ids else '; it takes no token ids, so it gets text'}"
        )

    def reply(
        self,
        prompts: Sequence[Prompt],
        reader: ReplyReader,
        config: EvaluationConfig,
        turn: int,
        label: str,
    ) -> list[Reply]:
        """See `Engine.reply`. Raises `UserError` if a reply is missing in the end."""
        batches = batches_by_length([len(one.ids) for one in prompts], BATCH * self._config.at_once)
        failure = FirstFailure()

        def answer(place: int) -> Reply | str:
            if failure.reason:
                return failure.reason
            seed = config.seed * 1_000_003 + turn * TURN_SEEDS + place
            try:
                return self._one(prompts[place], reader, config, seed)
            except EndpointError as error:
                failure.record(self._with_advice(error))
                return failure.reason

        with ThreadPoolExecutor(self._config.at_once) as pool:
            found = self.ranks.map(label, lambda batch: list(pool.map(answer, batch)), batches)
        replies: dict[int, Reply] = {}
        for batch, of_batch in zip(batches, found, strict=True):
            for place, reply in zip(batch, of_batch, strict=True):
                if isinstance(reply, str):
                    raise UserError(f"model {self.model.name}: {reply}")
                replies[place] = reply
        return [replies[place] for place in range(len(prompts))]

    def _find(self) -> Served:
        """The model at the server. Raises `UserError` or `EndpointError` if it is not there."""
        served = self._listed()
        ids = self.model.encode(self.model.beginning + PROBE)
        prompt = Prompt(self.model.beginning + PROBE, ids, room=1, begun=False)
        try:
            self._ask(served, prompt, {})
        except EndpointError as error:
            if not error.refused:
                raise
            text = replace(served, takes_ids=False)
            try:
                self._ask(text, prompt, {})
            except EndpointError:
                raise error from None  # what it says of ids is nearer to what is wrong
            return text
        return served

    def _listed(self) -> Served:
        """The model as the server's list has it."""
        wanted = self._config.names.get(self.model.name)
        address = shown_address(self._endpoint.url)
        try:
            listed = [one for one in self._endpoint.get(MODELS)["data"] if one.get("id")]
        except EndpointError as error:
            if not error.refused:
                raise
            if wanted is None:
                raise UserError(f"{error}{self._advice_without_list(error)}.") from None
            say(
                f"{address} shows no list of its models, so whether it serves {wanted} is not "
                "checked"
            )
            return Served(wanted)
        except (TypeError, KeyError, AttributeError):
            raise UserError(
                f"{address}/{MODELS} answers no list of models; correct {self._endpoint.setting}."
            ) from None
        for one in listed:
            if one["id"] == wanted or (wanted is None and self._is_model(one)):
                length = one.get("max_model_len")
                return Served(one["id"], length if isinstance(length, int) else None)
        ids = ", ".join(str(one["id"]) for one in listed) or "nothing"
        raise UserError(
            f"{address} serves {ids}, and not {wanted or self._directory}; correct "
            f"{self._endpoint.setting}, or set {self._name_setting} to one of these."
        )

    @property
    def _name_setting(self) -> str:
        return f"evaluation.server.names.{self.model.name}"

    def _advice_without_list(self, error: EndpointError) -> str:
        """What to do about a server that refuses to list its models."""
        if error.key_refused:
            return f", or set {self._name_setting} if the key may only not see the list"
        if error.misconfigured:
            return ""
        return f"; if it has no list of its models, set {self._name_setting}"

    def _with_advice(self, error: EndpointError) -> str:
        """What an error says, and what to do about it unless it says so itself."""
        ours = error.status is None and not error.dead
        if ours or error.misconfigured:
            return f"{error}."
        if error.status in UNKNOWN_FIELD:
            return (
                f"{error}; a field that it does not know is left out by "
                "evaluation.server.request={FIELD: null}."
            )
        if not error.dead or error.refused:
            return f"{error}; correct {self._endpoint.setting} or {self._name_setting}."
        if error.sent:
            return f"{error}; wait until the server is ready, or look into its log."
        return f"{error}; start the server, or correct {self._endpoint.setting}."

    def _is_model(self, listed: Mapping[str, Any]) -> bool:
        """Whether an entry of a server's list is this model; vLLM names its directory as `root`."""
        names = {str(listed["id"]), str(listed.get("root"))}
        known = {self.model.name, str(self._directory)}
        if cached := regex.search(r"models--([^/]+)/snapshots/", str(self._directory)):
            known.add(cached[1].replace("--", "/"))
        here = self._directory.resolve()
        return bool(names & known) or any(Path(name).resolve() == here for name in names)

    def _one(
        self, prompt: Prompt, reader: ReplyReader, config: EvaluationConfig, seed: int
    ) -> Reply:
        assert self._served is not None, "started"
        fields = {**_sampling(config), "seed": seed, **self._ends(reader)}
        choice, usage = self._ask(self._served, prompt, fields)
        reason = choice.get("finish_reason")
        if reason not in ENDED | LIMITED:
            raise EndpointError(
                f"{self._address} ends a reply because of {reason!r}, which is neither its end nor "
                "a limit; look into the server's log",
                dead=False,
            )
        ids = self._ids(choice)
        generated = usage.get("completion_tokens")
        generated = generated if isinstance(generated, int) else len(ids)
        # servers leave the end token out; one that ignores max_tokens ends beyond the limit
        ended = reason in ENDED and generated <= prompt.room
        ids = ids[: prompt.room]
        if ended and not set(ids) & set(reader.stop_ids):
            ids = [*ids, *reader.stop_ids[:1]]
        return reader.read(ids, prompt.begun)

    @property
    def _address(self) -> str:
        return f"{shown_address(self._endpoint.url)}/{COMPLETIONS}"

    def _ids(self, choice: Mapping[str, Any]) -> list[int]:
        """The generated ids, as far as the server returns them; else those of its text."""
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            return self.model.encode(choice["text"])
        rows = max(len(self.model.tokenizer), self.model.rows)
        if not all(isinstance(one, int) and 0 <= one < rows for one in ids):
            raise EndpointError(
                f"{self._address} returns token ids that are not among the model's {rows}; "
                "set evaluation.server.request={return_token_ids: null}",
                dead=False,
            )
        return ids

    def _ends(self, reader: ReplyReader) -> dict[str, Any]:
        texts = [self.model.tokenizer.decode([one]) for one in reader.stop_ids]
        return {
            "stop": list(filter(None, texts))[:MOST_STOPS] or None,
            "stop_token_ids": list(reader.stop_ids),  # vLLM and SGLang
            "skip_special_tokens": False,  # vLLM and SGLang
            "return_token_ids": True,  # vLLM
        }

    def _ask(
        self, served: Served, prompt: Prompt, fields: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first choice of a completion, and its usage. Raises `EndpointError` if it is none."""
        text = prompt.text.removeprefix(self.model.beginning)  # the server adds it itself
        payload = {
            "model": served.name,
            "prompt": prompt.ids if served.takes_ids else text,
            "max_tokens": prompt.room,
            **fields,
            **self._config.request,
        }
        payload = {name: value for name, value in payload.items() if value is not None}
        content = self._endpoint.post(COMPLETIONS, payload)
        try:
            choice, usage = dict(content["choices"][0]), dict(content.get("usage") or {})
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            choice, usage = {}, {}
        if not isinstance(choice.get("text"), str):
            raise EndpointError(
                f"{self._address} answers no completion; correct {self._endpoint.setting}",
                dead=False,
            )
        counted = usage.get("prompt_tokens")
        if not isinstance(counted, int):
            say_once(
                f"{self._address} does not count the tokens of prompts, so whether it has the "
                f"tokenizer of {self.model.name} is not checked"
            )
        elif counted != len(prompt.ids):
            raise EndpointError(
                f"{self._address} counts {counted} tokens in a prompt of {len(prompt.ids)}, so it "
                "has another tokenizer or adds tokens; serve this model, without additions",
                dead=False,
                refused=served.takes_ids,
            )
        return choice, usage


def _sampling(config: EvaluationConfig) -> dict[str, Any]:
    """All of it, since servers take what is missing from the model's generation_config.json."""
    sampled = config.temperature > 0
    return {
        "temperature": config.temperature,
        "top_p": config.top_p,
        **({"top_k": -1} if sampled else {}),
        "repetition_penalty": config.repetition_penalty,
    }
