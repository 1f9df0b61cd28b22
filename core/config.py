"""Typed sections of a recipe, from which the configuration of every stage is built."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from cpt_merge.core.errors import UserError

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A section of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


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
    """Build a section from plain values. Raises `UserError` that names the first wrong one."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(section, error)}") from None


def _sentence(section: type[Section], error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key `{path}`{_nearest(section, first['loc'])}{more}."
    if first["type"] == "missing":
        return f"`{path}` is missing; set it{more}."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return f"`{path}` = {first['input']!r}: {message}{more}." if path else f"{message}{more}."


def _nearest(section: type[Section], location: tuple[int | str, ...]) -> str:
    """The known key that is most similar to the unknown one, or else all keys of that section."""
    known = known_keys(section)
    wanted = ".".join(str(part) for part in location if isinstance(part, str))
    parent, _, last = wanted.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.5)
    if not close:
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
        last_names = [name.rpartition(".")[2] for name in known]
        found = difflib.get_close_matches(last, last_names, n=1, cutoff=0.6)
        close = [by_last[name] for name in found]
    if close:
        return f"; the nearest known key is `{close[0]}`"
    names = ", ".join(name.rpartition(".")[2] for name in siblings)
    return f"; known keys there: {names}" if siblings else ""


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key. Numbers index a list: `corpus.sources.0.weight=2`.

    Raises `UserError` for anything that does not have the form `key=value`.
    """
    path, separator, text = override.partition("=")
    parts = path.split(".")
    if not separator or not all(parts):
        raise UserError(f"override {override!r} is not of the form section.key=value.")
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


def known_keys(section: type[Section], prefix: str = "") -> list[str]:
    """All dotted keys of a section and of the sections inside it."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for inner in inner_sections(field):
            keys.extend(known_keys(inner, prefix + name + "."))
    return keys


def inner_sections(field: FieldInfo) -> list[type[Section]]:
    """The sections in a field's annotation, also inside lists, mappings and optional values."""
    found: list[type[Section]] = []
    pending: list[Any] = [field.annotation]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found.append(annotation)
        pending.extend(getattr(annotation, "__args__", ()))
    return found
