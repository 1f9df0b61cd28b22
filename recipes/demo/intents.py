"""Sample voice-assistant exchanges (a request and its reply) from the sentence templates of
home-assistant-intents.

The package holds, per language, templates such as ``turn on [the] lights in {area}`` and Jinja
templates for the replies, both written by Home Assistant's translators. Names of rooms and devices
belong to each home, so the templates leave them open; `words.yaml` fills them.
"""

from __future__ import annotations

import datetime
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import yaml
from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    RuleReference,
    TextChunk,
)
from hassil.parse_expression import parse_sentence

# What an assistant can be asked in all three languages, and whose replies do not depend on a home
# we do not have.
INTENTS = (
    "HassCancelTimer",
    "HassClimateGetTemperature",
    "HassClimateSetTemperature",
    "HassGetCurrentDate",
    "HassGetCurrentTime",
    "HassLightSet",
    "HassMediaNext",
    "HassMediaPause",
    "HassMediaUnpause",
    "HassPauseTimer",
    "HassShoppingListAddItem",
    "HassStartTimer",
    "HassTurnOff",
    "HassTurnOn",
    "HassUnpauseTimer",
    "HassVacuumCleanArea",
)
COMMON_WORDINGS = 3  # of the alternatives at each place; the templates list the common ones first
ROUND_NUMBERS = (
    1,
    2,
    3,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    80,
    90,
    100,
)  # what people say of minutes and per cent
_FILES = {"en": "en.json", "zh_tw": "zh-TW.json", "ko": "ko.json"}
_LIST_TO_WORDS = {"shopping_list_item": "item", "todo_list_item": "item"}


@dataclass(frozen=True)
class Exchange:
    """One request and its reply, both one line of NFC text."""

    prompt: str
    reply: str


class UnfillableError(Exception):
    """A template asks for something this module has no values for (a state, a free message)."""


@cache
def _words() -> dict[str, dict[str, list[str]]]:
    """Language -> slot, or kind of device for the slot `name` -> values."""
    words: dict[str, dict[str, list[str]]] = yaml.safe_load(
        Path(__file__).with_name("words.yaml").read_text("utf-8")
    )
    return words


@cache
def _parse(template: str) -> Expression:
    return parse_sentence(template).expression


class IntentSampler:
    """Draws random exchanges of one language; the same `rng` state gives the same exchanges."""

    def __init__(self, language: str, rng: random.Random) -> None:
        source = resources.files("home_assistant_intents") / "data" / _FILES[language]
        data = json.loads(source.read_text(encoding="utf-8"))
        self._rng = rng
        self._words = _words()[language]
        self._lists: dict[str, dict[str, Any]] = data["lists"]
        self._rules: dict[str, str] = data["expansion_rules"]
        self._replies: dict[str, dict[str, str]] = data["responses"]["intents"]
        self._entries: dict[str, list[dict[str, Any]]] = {
            name: data["intents"][name]["data"] for name in INTENTS
        }
        self._compile = cache(jinja2.Environment(undefined=jinja2.StrictUndefined).from_string)

    def exchanges(self, attempts: int) -> Iterator[Exchange]:
        """Yield the exchanges of `attempts` draws whose templates could be filled; requests may
        repeat.
        """
        # Between "every intent as often" (drowns in fixed phrases) and "every template as often"
        # (drowns in timers).
        weights = [len(self._entries[intent]) ** 0.5 for intent in INTENTS]
        for _ in range(attempts):
            intent = self._rng.choices(INTENTS, weights)[0]
            try:
                yield self._draw(intent, self._rng.choice(self._entries[intent]))
            except (UnfillableError, jinja2.TemplateError, TypeError, ValueError):
                continue

    def _draw(self, intent: str, entry: Mapping[str, Any]) -> Exchange:
        domains = entry.get("requires_context", {}).get(
            "domain", entry.get("slots", {}).get("domain", [])
        )
        domains = [domains] if isinstance(domains, str) else list(domains)
        known = [domain for domain in domains if domain in self._words]
        if domains and not known:
            raise UnfillableError(f"no names for {domains}")
        domain = self._rng.choice(known) if known else ""
        slots: dict[str, str] = {}
        template = self._rng.choice(entry["sentences"])
        prompt = _tidy(self._expand(_parse(template), slots, domain))
        reply = _tidy(self._render(intent, entry.get("response", "default"), slots, domain))
        if not prompt or not reply:
            raise UnfillableError("nothing left to say")
        return Exchange(prompt[0].upper() + prompt[1:], reply[0].upper() + reply[1:])

    def _expand(self, node: Expression, slots: dict[str, str], domain: str) -> str:
        """One random reading of a template; values chosen for `{slot}` are written into `slots`."""
        if isinstance(node, TextChunk):
            return node.original_text
        if isinstance(node, Alternative):
            return self._expand(self._rng.choice(node.items[:COMMON_WORDINGS]), slots, domain)
        if isinstance(node, Group):
            return "".join(self._expand(item, slots, domain) for item in node.items)
        if isinstance(node, RuleReference):
            if node.rule_name not in self._rules:
                raise UnfillableError(node.rule_name)
            return self._expand(_parse(self._rules[node.rule_name]), slots, domain)
        assert isinstance(node, ListReference)
        value = self._value(node.list_name, domain)
        slots[node.slot_name] = value
        return value

    def _value(self, list_name: str, domain: str) -> str:
        key = domain if list_name == "name" else _LIST_TO_WORDS.get(list_name, list_name)
        if key in self._words:
            return self._rng.choice(self._words[key])
        spec = self._lists.get(list_name, {})
        if "range" in spec:
            start, stop = spec["range"]["from"], spec["range"]["to"]
            if list_name == "temperature":
                return str(
                    self._rng.randint(16, 30)
                )  # what people set at home; the full range is 0 to 100
            numbers = [number for number in ROUND_NUMBERS if start <= number <= stop]
            return str(
                self._rng.choice(numbers or range(start, stop + 1, spec["range"].get("step", 1)))
            )
        if "values" in spec:
            value = self._rng.choice(spec["values"])
            return _tidy(
                self._expand(_parse(value["in"] if isinstance(value, dict) else value), {}, domain)
            )
        raise UnfillableError(list_name)

    def _render(self, intent: str, key: str, slots: Mapping[str, str], domain: str) -> str:
        template = self._replies[intent].get(key)
        if template is None:
            raise UnfillableError(f"{intent} has no reply {key!r}")
        rng = self._rng
        moment = datetime.datetime(2024, 1, 1) + datetime.timedelta(
            minutes=rng.randrange(3 * 365 * 24 * 60)
        )
        devices = [SimpleNamespace(name=name) for name in rng.sample(self._words["area"], 2)]
        state = SimpleNamespace(domain=domain, entity_id="", state=rng.randint(14, 31))
        return self._compile(template).render(
            slots={**slots, "time": moment, "date": moment, "canceled": rng.randrange(4)},
            state=state,
            query=SimpleNamespace(matched=devices[: rng.randrange(3)], unmatched=devices[1:]),
            state_attr=lambda entity_id, name: state.state,
        )


def _tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
