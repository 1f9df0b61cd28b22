"""Every key of the recipe, from the types: for `cpt-merge keys` and docs/recipe.md."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cpt_merge.core.config import Section, inner_sections, type_name, unit_of
from cpt_merge.core.errors import UserError

HEADER = """# The recipe: every key

Generated from the types by `make docs`; `cpt-merge keys [SECTION]` shows the same. A recipe is one
YAML file with these sections. Any key can be overridden on the command line:
`cpt-merge run RECIPE training.tokens=1_000_000`. `N` is the place of an item in a list, counted
from 0, here, in messages and in overrides: `corpus.sources.0.weight=2`. Relative paths start at the
directory that the command is called in. Numbers of tokens may be written as `1B`, `500M` or `1e9`,
and languages as `zh-TW`, `zh_Hant`, `ko-KR` or `EN`.

"""


@dataclass(frozen=True)
class KeyInfo:
    """One key of the recipe."""

    path: str
    type: str
    default: str
    unit: str
    text: str


def recipe_keys(section: type[Section], prefix: str = "") -> Iterator[KeyInfo]:
    """The keys of a section and those within it, depth first; `N` is a place in a list."""
    for name, field in section.model_fields.items():
        path = prefix + name
        inner = inner_sections(field)
        yield KeyInfo(
            path,
            type_name(field.annotation),
            _default(field, bool(inner)),
            unit_of(field) or "",
            field.description or "",
        )
        many = typing.get_origin(field.annotation) is list
        for nested in inner:
            yield from recipe_keys(nested, path + (".N." if many else "."))


def _default(field: FieldInfo, has_sections: bool) -> str:
    if field.is_required():
        return "required"
    if has_sections:
        return ""
    value = field.get_default(call_default_factory=True)
    return "not set" if value is None or value is PydanticUndefined else str(value)


def as_text(section: type[Section], within: str = "") -> str:
    """The keys of all or one section, for a terminal. Raises `UserError` for an unknown section."""
    lines = []
    for item in recipe_keys(section):
        if within and not f"{item.path}.".replace(".N.", ".").startswith(f"{within}."):
            continue
        given = item.default in ("", "required")
        default = item.default if given else f"default {item.default}"
        detail = ", ".join(part for part in (item.type, item.unit, default) if part)
        lines.append(f"{item.path}\n    {item.text} ({detail})")
    if not lines:
        raise UserError(f"a recipe has no section {within}; `cpt-merge keys` lists all keys.")
    return "\n".join(lines)


def as_markdown(section: type[Section]) -> str:
    """The keys as Markdown, a table for each top-level section."""
    groups: dict[str, list[KeyInfo]] = {}
    for item in recipe_keys(section):
        name = item.path.partition(".")[0]
        group = name if inner_sections(section.model_fields[name]) else "the run"
        groups.setdefault(group, []).append(item)
    head = "| key | type | default | unit | meaning |\n|---|---|---|---|---|"
    parts = []
    for name, items in groups.items():
        rows = [
            f"| `{i.path}` | {i.type} | {i.default} | {i.unit} | {i.text.replace('|', '/')} |"
            for i in items
        ]
        parts.append("\n".join([f"## {name}\n", head, *rows]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print docs/recipe.md: `python -m cpt_merge.launcher.reference > docs/recipe.md`."""
    from cpt_merge.launcher.recipe import Recipe

    print(HEADER + as_markdown(Recipe), end="")


if __name__ == "__main__":
    main()
