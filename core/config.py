"""Typed sections of a recipe, from which the configuration of every stage is built."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from decimal import Decimal
from itertools import takewhile
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language

S = TypeVar("S", bound="Section")
V = TypeVar("V")
MOST_SHOWN = 80  # characters of a wrong value


class Section(BaseModel):
    """A section of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _counts_of_tokens(cls, given: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        return as_count(given) if unit_of(field) == "tokens" else given


def _is_json(values: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError(f"{error}; put such a value in quotes") from None
    return values


JsonFields = Annotated[dict[str, Any], AfterValidator(_is_json)]
"""Values that are sent as JSON; YAML reads 2020-01-01 as a date, which JSON has not."""


def _by_tag(given: Any) -> Any:
    """A mapping by language, by the known tags. Raises `ValueError` for one that is there twice."""
    if not isinstance(given, dict):
        return given
    found: dict[Any, Any] = {}
    for spelt, value in given.items():
        tag = _tag(spelt) if isinstance(spelt, str) else spelt
        if tag in found:
            raise ValueError(f"{spelt} is {tag}, which occurs twice; remove one of them")
        found[tag] = value
    return found


def _tag(spelt: str) -> str:
    try:
        return find_language(spelt).tag
    except UserError as error:
        raise ValueError(str(error)) from None


LanguageTag = Annotated[str, AfterValidator(_tag)]
"""A language, in any spelling of its tag."""

ByLanguage = Annotated[dict[str, V], BeforeValidator(_by_tag)]
"""Values by language."""

_COUNT = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[+]?[0-9]+)?) *([kmbt]?)", re.IGNORECASE)
_TIMES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def as_count(given: Any) -> Any:
    """A whole number from a text such as `1B`, `500M` or `1e9`; anything else as it is."""
    found = _COUNT.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is None:
        return given
    number = Decimal(re.sub("[_,]", "", found[1])) * _TIMES[found[2].casefold()]
    return int(number) if number == int(number) else given


def key(default: Any, doc: str, *, unit: str | None = None, **constraints: Any) -> Any:
    """One key of a section: its default (`...` if it is required), its description, its unit.

    `constraints` are pydantic's (`ge=0`, `gt=0`, ...). docs/recipe.md is generated from these.
    """
    extra = {"unit": unit} if unit else None
    options: Any = {"description": doc, "json_schema_extra": extra, **constraints}
    if isinstance(default, (list, dict)):
        return Field(default_factory=default.copy, **options)
    return Field(default, **options)


def unit_of(field: FieldInfo) -> str | None:
    """The unit given to `key`, or None."""
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) and "unit" in extra else None


def parse_section(section: type[S], values: dict[str, Any], where: str) -> S:
    """Build a section from plain values. Raises `UserError` that names what is wrong."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(section, error.errors())}") from None


def _sentence(section: type[Section], errors: list[ErrorDetails]) -> str:
    """What is wrong: the first unknown key, or else all missing keys, or else the first value."""
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    missing = [_dotted(error["loc"]) for error in errors if _is_missing_key(error)]
    told = 1
    if unknown:
        text, near = _unknown_key(section, unknown[0], missing)
        told += near in missing
    elif missing:
        told = len(missing)
        names = _listed([f"`{name}`" for name in missing], "and")
        text = f"{names} is missing; set it" if told == 1 else f"{names} are missing; set them"
    else:
        text = _wrong_value(section, errors[0])
    more = f" (and {len(errors) - told} more)" if len(errors) > told else ""
    return f"{text}{more}."


def _is_missing_key(error: ErrorDetails) -> bool:
    """Not a missing item of a list that has a fixed length."""
    return error["type"] == "missing" and isinstance(error["loc"][-1], str)


def _unknown_key(
    section: type[Section], location: Sequence[int | str], missing: Sequence[str]
) -> tuple[str, str]:
    """The sentence about an unknown key, and the known key that it resembles most.

    Missing keys next to it are tried first, then keys of this very name elsewhere, the nearest
    one before others, then all keys next to it, and then similar ones elsewhere.
    """
    known = _known_keys(section)
    wanted = ".".join(part for part in location if isinstance(part, str))
    parent, _, last = wanted.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    same = [name for name in known if name.rpartition(".")[2] == last]
    same.sort(key=lambda name: (-_common_sections(name, wanted), name.count(".")))
    close = (
        difflib.get_close_matches(wanted, [name for name in siblings if name in missing], 1, 0.6)
        or same[:1]
        or difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.5)
        or [by_last[name] for name in difflib.get_close_matches(last, list(by_last), n=1)]
    )
    text = f"unknown key `{_dotted(location)}`"
    if len(same) > 1 and close[0] == same[0] and not _common_sections(same[0], wanted):
        return f"{text}; keys of this name: {_listed([f'`{one}`' for one in same], 'and')}", ""
    if close:
        absent = ", which is missing" if close[0] in missing else ""
        return f"{text}; the nearest known key is `{close[0]}`{absent}", close[0]
    names = ", ".join(name.rpartition(".")[2] for name in siblings)
    return text + (f"; known keys there: {names}" if siblings else ""), ""


def _common_sections(one: str, other: str) -> int:
    """How many sections two dotted keys have in common, from the outermost one on."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _wrong_value(section: type[Section], error: ErrorDetails) -> str:
    """The key, its value, and what is allowed. What our own validators say is kept."""
    location, value = error["loc"], error["input"]
    if error["type"] == "invalid_key" or location[-1:] == ("[key]",):
        place = location[: -2 if location[-1] == "[key]" else -1]
        inside = f" in `{_dotted(place)}`" if place else ""
        return f"the key {_yaml(value)}{inside} is not text; put it in quotes"
    if error["type"] == "missing":
        location = location[:-1]
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ").rstrip(".")
        shown = "" if isinstance(value, (dict, Section)) else f" = {_yaml(value)}"
        return f"`{_dotted(location)}`{shown}: {message}" if location else message
    return f"`{_dotted(location)}` = {_yaml(value)}, but it must be {_allowed(section, location)}"


def _yaml(value: Any) -> str:
    """A value as a recipe writes it, shortened."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _allowed(section: type[Section], location: Sequence[int | str]) -> str:
    """What the value at a location may be, such as `a whole number above 0`."""
    annotation: Any = section
    limits: list[Any] = []
    unit = None
    for part in location:
        annotation = _without_none(annotation)
        if _is_section(annotation):
            field = annotation.model_fields[part]
            annotation, limits, unit = field.annotation, field.metadata, unit_of(field)
        else:
            annotation, limits = typing.get_args(annotation)[-1], []
    words = {
        "gt": "above", "ge": "at least", "lt": "below", "le": "at most",
        "min_length": "of length at least", "pattern": "that matches",
    }  # fmt: skip
    found = [
        f"{word} {getattr(limit, name):{',' if name in ('lt', 'le') else ''}}"
        for limit in limits
        for name, word in words.items()
        if getattr(limit, name, None) is not None
    ]
    kind = type_name(annotation)
    if typing.get_origin(_without_none(annotation)) is typing.Literal:
        kind = f"one of {kind.replace(' or ', ', ')}"
    elif " -> " in kind:
        kind = f"a mapping {kind}"
    elif kind not in ("text", "true or false"):
        kind = f"a {kind}"
    return f"{kind} {' and '.join(found)}".rstrip() + ", such as 500M" * (unit == "tokens")


def _without_none(annotation: Any) -> Any:
    """The type of an optional value; any other type as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(annotation) if one is not type(None))
    return annotation


def type_name(annotation: Any) -> str:
    """A type in words, for messages and the reference."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(one) for one in arguments if one is not type(None))
    if origin in (list, tuple):
        count, items = f"{len(arguments)} " * (origin is tuple), type_name(arguments[0])
        return f"list of {count}{items}{'s' * items.endswith(('number', 'section'))}"
    if origin is dict:
        return f"{type_name(arguments[0])} -> {type_name(arguments[1])}"
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if _is_section(annotation):
        return "section"
    name = getattr(annotation, "__name__", str(annotation))
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    return names.get(name, name)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(map(str, location))


def _listed(words: Sequence[str], conjunction: str) -> str:
    """`a, b and c`."""
    *others, last = words
    return f"{', '.join(others)} {conjunction} {last}" if others else last


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key. Numbers index a list: `corpus.sources.0.weight=2`.

    Raises `UserError` for anything that does not have the form `key=value`.
    """
    path, separator, text = override.partition("=")
    parts = path.split(".")
    if not separator or not all(parts):
        raise UserError(f"override {override!r} is not of the form section.key=value.")
    dotted = re.sub(r"\[(\d+)\]", r".\1", path)
    if dotted != path:
        raise UserError(f"override {override!r}: an item of a list is written {dotted}={text}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"the value in override {override!r} is not YAML; quote it.") from None
    here: Any = values
    for part in parts[:-1]:
        if isinstance(here, list):
            here = here[_place(here, part, override)]
        else:
            if not isinstance(here.get(part), (dict, list)):
                here[part] = {}
            here = here[part]
    if isinstance(here, list):
        here[_place(here, parts[-1], override)] = value
    else:
        here[parts[-1]] = value


def _place(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(
            f"override {override!r}: {part!r} is not an index into a list of {len(items)}."
        )
    return int(part)


def _known_keys(section: type[Section], prefix: str = "") -> list[str]:
    """All dotted keys of a section and of the sections inside it."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for inner in inner_sections(field):
            keys.extend(_known_keys(inner, prefix + name + "."))
    return keys


def inner_sections(field: FieldInfo) -> list[type[Section]]:
    """The sections in a field's annotation, also inside lists, mappings and optional values."""
    found: list[type[Section]] = []
    pending: list[Any] = [field.annotation]
    while pending:
        annotation = pending.pop()
        if _is_section(annotation):
            found.append(annotation)
        pending.extend(getattr(annotation, "__args__", ()))
    return found
