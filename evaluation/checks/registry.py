"""The registry of checks: a name, a function, and its arguments.

    @check("contains")
    def contains(reply: str, *, words: list[str]) -> bool: ...

    @count("sentences")                       # takes at_least, at_most and exactly
    def count_sentences(reply: str) -> int: ...

Arguments are validated by the function's own types when prompts are read, before a model is loaded.
An empty reply passes no check.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from cpt_merge.core.errors import UserError
from cpt_merge.core.spelling import nearest

LIMITS = ("at_least", "at_most", "exactly")


@dataclass(frozen=True)
class CheckKind:
    """A registered check: its function, its arguments and, if it counts, what counts."""

    name: str
    passes: Callable[..., bool]
    arguments: type[BaseModel]
    counts: Callable[..., int] | None = None
    validate: Callable[..., None] | None = None  # raises ValueError beyond what types exclude

    @property
    def usage(self) -> str:
        """The arguments, optional ones in brackets."""
        fields = self.arguments.model_fields.items()
        names = [name if field.is_required() else f"[{name}]" for name, field in fields]
        return ", ".join(names) or "no arguments"


CHECKS: dict[str, CheckKind] = {}


@dataclass(frozen=True)
class Check:
    """One check of one prompt: a kind with its arguments."""

    name: str
    arguments: Mapping[str, Any]

    def passes(self, reply: str) -> bool:
        """Whether a reply passes; an empty one never does."""
        return bool(reply.strip()) and CHECKS[self.name].passes(reply, **self.arguments)

    def passes_loosely(self, reply: str) -> bool:
        """Whether any of the reply's loose variants passes."""
        return any(self.passes(variant) for variant in loose_variants(reply))

    def failure(self, reply: str) -> str:
        """The check that a reply does not pass, and for counts the number that was found."""
        given = ", ".join(f"{name} {value}" for name, value in self.arguments.items())
        asked = f"{self.name} ({given})" if given else self.name
        counts = CHECKS[self.name].counts
        if not reply.strip():
            return f"{asked}: the reply is empty"
        if counts is None:
            return asked
        others = {name: value for name, value in self.arguments.items() if name not in LIMITS}
        return f"{asked}: {counts(reply, **others)} found"


def loose_variants(reply: str) -> list[str]:
    """IFEval's eight readings of a reply, which forgive an introduction, a last line and emphasis.

    They leave out the first line, the last one, both or none, and Markdown's asterisks.
    """
    lines = reply.split("\n")
    cuts = [reply, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cuts, *(cut.replace("*", "") for cut in cuts)]))


def check(
    name: str, validate: Callable[..., None] | None = None
) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a function of a reply and keyword arguments that tells whether the reply passes."""

    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = CheckKind(name, function, _arguments(name, function), validate=validate)
        return function

    return register


def count(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function that counts; the check also takes `at_least`, `at_most` and `exactly`."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        def passes(reply: str, **arguments: Any) -> bool:
            limits = {name: arguments.pop(name, None) for name in LIMITS}
            found = function(reply, **arguments)
            at_least, at_most, exactly = (
                found if limits[name] is None else limits[name] for name in LIMITS
            )
            return bool(at_least <= found <= at_most and found == exactly)

        limits: Any = dict.fromkeys(LIMITS, (int | None, None))
        CHECKS[name] = CheckKind(
            name, passes, _arguments(name, function, limits), function, _limits_make_sense
        )
        return function

    return register


def _arguments(
    name: str, function: Callable[..., Any], further: Mapping[str, Any] = {}
) -> type[BaseModel]:
    """The model of a function's keyword arguments; it forbids others."""
    signature = inspect.signature(function, eval_str=True)
    fields: dict[str, Any] = {
        parameter.name: (
            parameter.annotation,
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in list(signature.parameters.values())[1:]
    }
    return create_model(
        name, __config__=ConfigDict(extra="forbid", strict=True), **fields, **further
    )


def _limits_make_sense(**arguments: Any) -> None:
    limits = {name: arguments[name] for name in LIMITS if arguments.get(name) is not None}
    if not limits or ("exactly" in limits and len(limits) > 1):
        raise ValueError("it needs at_least, at_most, both of them, or exactly")
    if any(value < 0 for value in limits.values()) or limits.get("at_least", 0) > limits.get(
        "at_most", 10**9
    ):
        raise ValueError("its limits admit no number")


def parse_check(row: Any, where: str) -> Check:
    """A check of a row like {"name": "sentences", "exactly": 3}.

    Raises `UserError` that says what exists.
    """
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UserError(
            f'{where}: each of "checks" is {{"name": ..., arguments}}, not {str(row)[:80]}.'
        )
    kind = CHECKS.get(row["name"])
    if kind is None:
        raise UserError(
            f"{where}: there is no check {row['name']!r}{nearest(row['name'], CHECKS)}; there are "
            f"{', '.join(sorted(CHECKS))}."
        )
    arguments = {name: value for name, value in row.items() if name != "name"}
    try:
        kind.arguments.model_validate(arguments)
        if kind.validate is not None:
            kind.validate(**arguments)
    except ValidationError as error:
        errors = error.errors()
        unknown = [one for one in errors if one["type"] == "extra_forbidden"]
        first = (unknown or errors)[0]
        place = ".".join(map(str, first["loc"]))
        near = nearest(place, [*kind.arguments.model_fields]) if unknown else ""
        reason = f"is not one of its arguments{near}" if unknown else first["msg"].lower()
        raise UserError(
            f"{where}: check {kind.name!r}, {place}: {reason}; it takes {kind.usage}."
        ) from None
    except ValueError as error:
        raise UserError(f"{where}: check {kind.name!r}: {error}.") from None
    return Check(kind.name, arguments)
