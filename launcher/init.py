"""`cpt-merge init`: asks, looks at models, text and machine, and writes a recipe."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cpt_merge.cluster.plan import ClusterOptions
from cpt_merge.core.artifact import check_writable
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
from cpt_merge.core.progress import console, say
from cpt_merge.launcher.choosing import NO_REPLAY, defaults_for
from cpt_merge.launcher.init_recipe import Chosen, recipe_text
from cpt_merge.launcher.inspection import (
    LEARNT_FROM,
    BaseFacts,
    Machine,
    TextFacts,
    coverage_of,
    inspect_pair,
    inspect_text,
    measure_languages,
    parse_machine,
)
from cpt_merge.launcher.plan import show_plan
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.tokenizer_ext import TokenizerConfig

T = TypeVar("T")
ABORTED = 130
USUAL_HELD_OUT, MOST_HELD_OUT = 0.01, 0.1  # shares of the documents
HELD_OUT = 50  # documents of the shortest text to measure on


@dataclass(frozen=True)
class Options:
    """What the command line gave; the rest is asked for."""

    base: str | None
    chat: str | None
    texts: Sequence[str]
    machine: str | None
    out: Path | None
    overwrite: bool


def init(options: Options) -> None:
    """Write a recipe and show its plan. Raises `UserError`; then nothing is written."""
    try:
        _init(options)
    except (KeyboardInterrupt, EOFError):
        console.print("\ncpt-merge: stopped; no recipe is written.")
        raise SystemExit(ABORTED) from None


def _init(options: Options) -> None:
    ask = Asker(sys.stdin.isatty())
    _require(options, ask)
    if options.machine:
        parse_machine(options.machine)
    if options.out:
        _check_out(options.out, options.overwrite)
    base, chat, facts = _ask_pair(options, ask)
    texts = _ask_texts(options, ask)
    machine = ask.one(
        options.machine or (None if ask.terminal else "this"),
        "Machine: this, cpu, 8xh100, or slurm:2x8xh100 (nodes, GPUs of a node)",
        parse_machine,
        usual="this",
    )
    usual = _usual_name(base, texts)
    out = options.out or ask.one(
        None if ask.terminal else usual,
        "Recipe to write",
        lambda text: _check_out(Path(text).expanduser(), options.overwrite),
        usual=usual,
    )
    row = defaults_for(facts.shape.parameters)
    new = list(dict.fromkeys(one.language for one in texts if one.language != "en"))
    fewest = min(one.documents for one in texts if one.language != "en")
    heldout = min(MOST_HELD_OUT, max(USUAL_HELD_OUT, round(HELD_OUT / fewest, 3)))
    say("learning new pieces from the beginning of the text ...")
    coverage = {tag: coverage_of(texts, tag) for tag in new}
    config = TokenizerConfig(
        new_pieces={tag: max(row.new_pieces, coverage[tag][1] * 3 // 2) for tag in new},
        character_coverage=min(share for share, _ in coverage.values()),
        max_characters=LEARNT_FROM,
    )
    languages = measure_languages(base, chat, texts, config, heldout)
    chosen = Chosen(out.stem, base, chat, machine, facts, row, texts, languages, heldout)
    _write(out, recipe_text(chosen))
    _show(out, machine)


def _require(options: Options, ask: Asker) -> None:
    given = {"--base": options.base, "--chat": options.chat, "--text": options.texts}
    missing = [name for name, value in given.items() if not value]
    if missing and not ask.terminal:
        raise UserError(f"give {', '.join(missing)}; there is no terminal to ask on.")


def _ask_pair(options: Options, ask: Asker) -> tuple[str, str, BaseFacts]:
    base = ask.one(options.base, "Base model (a directory or a hub id)", _a_model)
    found = ask.one(
        options.chat,
        "Its chat model (trained from this very base)",
        lambda chat: (_a_model(chat), _a_pair(base, chat, ask)),
    )
    say(f"{base}: {found[1].shape.parameters / 1e6:,.0f} M parameters")
    return base, found[0], found[1]


def _a_pair(base: str, chat: str, ask: Asker) -> BaseFacts:
    facts = inspect_pair(base, chat)
    for doubt in facts.doubts:
        say(f"warning: {doubt}")
    if facts.doubts and ask.terminal:
        answer = ask.one(None, "Use this chat model all the same? y or n", str.lower, usual="n")
        if not answer.startswith("y"):
            raise UserError(f"{chat} is not used; name another chat model.")
    return facts


def _a_model(name: str) -> str:
    model_directory(name)
    return name


def _ask_texts(options: Options, ask: Asker) -> list[TextFacts]:
    """At least one text in a new language, and what English text there is."""
    texts = [ask.told(inspect_text(text)) for text in options.texts]
    while not options.texts:
        new = any(one.language != "en" for one in texts)
        question = "Text (a file, directory, glob or hub dataset; ko=PATH names its language)"
        if new:
            question = "More text, such as English against forgetting (nothing: no more)"
        text = ask.one(
            None,
            question,
            lambda given: inspect_text(given) if given else None,
            usual="" if new else None,
        )
        if text is None:
            break
        texts.append(ask.told(text))
    if all(one.language == "en" for one in texts):
        raise UserError("there is only English text; add --text with text in the new language.")
    if all(one.language != "en" for one in texts):
        say(f"warning: {NO_REPLAY}")
    return texts


class Asker:
    """Asks on a terminal until an answer is good; without one, takes only what was given."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal

    def one(
        self, given: str | None, question: str, read: Callable[[str], T], usual: str | None = None
    ) -> T:
        """What `read` makes of an answer. Raises its `UserError` for what the command line gave."""
        if given is not None:
            return read(given)
        while True:
            shown = f"{question} [{usual}]: " if usual else f"{question}: "
            answer = input(shown).strip() or usual
            try:
                if answer is not None:
                    return read(answer)
            except UserError as error:
                console.print(f"  {error}", markup=False)

    def told(self, facts: TextFacts) -> TextFacts:
        """The facts, which are printed."""
        say(str(facts))
        return facts


def _usual_name(base: str, texts: Sequence[TextFacts]) -> str:
    tags = dict.fromkeys(one.language for one in texts if one.language != "en")
    stem = re.sub(r"[^\w.-]+", "-", Path(base.partition("@")[0]).name.lower()).strip("-.")
    return "-".join([stem or "model", *tags]) + ".yaml"


def _check_out(out: Path, overwrite: bool) -> Path:
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out} is no name of a recipe; give one that ends in .yaml.")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another name by --out, or --overwrite.")
    check_writable(out.parent, "the recipe's folder")
    return out


def _write(out: Path, text: str) -> None:
    """Write a recipe that loads, as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / out.name
        draft.write_text(text, encoding="utf-8")
        load_recipe(draft, [])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    say(f"{out} is written")


def _show(out: Path, machine: Machine) -> None:
    """The plan of a recipe, and what to do next."""
    options = None
    if machine.gpu and not machine.here:
        options = ClusterOptions(machine.gpu, machine.nodes, machine.gpus)
    try:
        show_plan(load_recipe(out, []), options)
    except UserError as error:
        raise UserError(f"{out} is written, but its plan does not pass: {error}") from None
    start = f"cpt-merge run {out}"
    if machine.slurm:
        nodes = f"--nodes {machine.nodes} --gpus-per-node {machine.gpus}"
        start = f"cpt-merge submit {out} {nodes} --time 24:00:00"
    console.print(f"\nRead {out} and change what you like. Then:", markup=False, soft_wrap=True)
    console.print(f"    {start}", markup=False, soft_wrap=True)
