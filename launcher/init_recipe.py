"""The recipe that `cpt-merge init` writes: each choice with its reason."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cpt_merge.cluster.fit import Fitting, fittings, shortest
from cpt_merge.cluster.scaling import Cluster
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.launcher.choosing import (
    FEWEST_STEPS,
    LORA_RATE,
    NEW_ROWS,
    NO_REPLAY,
    REPLAY,
    WARMUP,
    LanguageFacts,
    SizeDefaults,
    choose_batch,
    choose_shares,
    choose_tokens,
    short,
    two_digits,
)
from cpt_merge.launcher.inspection import BaseFacts, Machine, TextFacts, coverage_of
from cpt_merge.training import TrainingConfig

BUILT_IN_LANGUAGES = ("zh_tw", "zh_cn", "ko")  # that evaluation/prompts has prompts in
_LINE = 100  # columns of a comment


@dataclass(frozen=True)
class Chosen:
    """Everything that decides the recipe."""

    name: str
    base: str
    chat: str
    machine: Machine
    facts: BaseFacts
    row: SizeDefaults
    texts: Sequence[TextFacts]
    languages: Mapping[str, LanguageFacts]  # new ones
    heldout: float

    @property
    def replay(self) -> bool:
        """Whether there is English text."""
        return any(one.language == "en" for one in self.texts)


@dataclass(frozen=True)
class Part:
    """A part of the recipe: why, and its keys."""

    why: str
    keys: dict[str, Any]

    def lines(self, indent: str = "") -> list[str]:
        """As YAML, below its reason."""
        found = _comment(self.why, indent)
        text = yaml.safe_dump(self.keys, sort_keys=False, allow_unicode=True, width=1000)
        return found + [indent + line for line in text.splitlines()]


def recipe_text(chosen: Chosen) -> str:
    """The whole recipe. Raises `UserError` if nothing makes the run fit on the machine."""
    lines = [
        *_comment(
            f"Written by `cpt-merge init` for a model of {short(chosen.facts.shape.parameters)} "
            f"parameters and {chosen.machine}. docs/choosing.md has the defaults and their "
            "sources, docs/recipe.md has every key."
        ),
        f"name: {_quoted(chosen.name)}",
        "",
        "models:",
        f"  base: {_quoted(chosen.base)}",
        f"  chat: {_quoted(chosen.chat)}",
        "",
    ]
    pieces = {tag: _pieces(chosen, tag) for tag in chosen.languages}
    tokens_of = {
        tag: facts.characters * facts.fertility(pieces[tag])
        for tag, facts in chosen.languages.items()
    }
    sections = {
        "corpus": _corpus(chosen, tokens_of),
        "tokenizer": _tokenizer(chosen, pieces),
        "training": _training(chosen, pieces, sum(tokens_of.values())),
    }
    for section, parts in sections.items():
        if all(not part.keys for part in parts):  # a choice against a section
            lines += [line for part in parts for line in _comment(part.why)]
        else:
            lines.append(f"{section}:")
            lines += [line for part in parts for line in part.lines("  ")]
        lines.append("")
    if chosen.machine.gpu and chosen.machine.ranks == 1:
        lines += ["# The memory was estimated for FSDP2.", "launch: {accelerate_config: fsdp2}", ""]
    prompted = [tag for tag in chosen.languages if tag in BUILT_IN_LANGUAGES]
    if prompted:
        lines += [
            f"# Replies to the built-in prompts in {', '.join(prompted)} and bits per byte.",
            "evaluation: {suites: [language, chat]}",
            "",
        ]
    lines += [
        "# The paper's ratio. `cpt-merge sweep` measures others in memory once CPT has finished.",
        "merge: {ratio: 1.0}",
        "",
    ]
    return "\n".join(lines)


def _pieces(chosen: Chosen, tag: str) -> int:
    return chosen.languages[tag].pieces(coverage_of(chosen.texts, tag)[1])


def _corpus(chosen: Chosen, tokens_of: Mapping[str, float]) -> list[Part]:
    shares = choose_shares(tokens_of, chosen.replay)
    sources = [{"path": one.path, "language": one.language} for one in chosen.texts]
    amounts = "; ".join(f"{tag}: about {short(of)} tokens" for tag, of in tokens_of.items())
    replay = (
        f"English, {REPLAY:.0%}, is replay, which limits forgetting (Swallow took 10%, Sailor2 "
        "20%, SEA-LION 25%)."
    )
    if not chosen.replay:
        replay = f"WARNING: {NO_REPLAY}"
    return [
        Part(f"{amounts}, counted with the new pieces.", {"sources": sources}),
        Part(replay, {"shares": shares}),
        Part("Documents that training never reads, for measuring.", {"heldout": chosen.heldout}),
    ]


def _tokenizer(chosen: Chosen, pieces: Mapping[str, int]) -> list[Part]:
    reasons = []
    for tag, facts in chosen.languages.items():
        before = facts.curve[0][1]
        text = f"{tag}: the base takes {before:.2f} tokens a character"
        if not pieces[tag]:
            most = facts.curve[-1][0]
            text += f"; {most:,} new pieces would save {facts.gain:.0%}, so none are worth it"
        else:
            text += f", and {facts.fertility(pieces[tag]):.2f} with {pieces[tag]:,} new pieces"
            if pieces[tag] < facts.curve[-1][0]:
                text += f" ({facts.curve[-1][1]:.2f} with {facts.curve[-1][0]:,})"
        reasons.append(f"{text}.")
    new = {tag: size for tag, size in pieces.items() if size}
    parts = [Part(" ".join(reasons), {"new_pieces": new} if new else {})]
    if new:
        coverage = min(coverage_of(chosen.texts, tag)[0] for tag in new)
        why = "Rarer characters stay in bytes: there is too little text to train rows for them."
        parts.append(Part(why, {"character_coverage": coverage}))
    return parts


def _training(chosen: Chosen, pieces: Mapping[str, int], available: float) -> list[Part]:
    row, machine = chosen.row, chosen.machine
    tokens, why = choose_tokens(row, available, chosen.replay)
    length = min(row.sequence_length, chosen.facts.positions)
    batch = choose_batch(row, tokens, length, machine.ranks)
    steps = -(-tokens // (batch * length))
    few = " WARNING: these are few; add text, or take fewer GPUs."
    few *= steps < FEWEST_STEPS // 3
    parts = [
        Part(f"Training budget: {why}.", {"tokens": short(tokens)}),
        Part(
            f"{counted(steps, 'step')} of {batch * length:,} tokens.{few}",
            {"sequence_length": length, "global_batch_size": batch},
        ),
        Part(
            "bf16 with fp32 master weights." if machine.gpu else "There is no GPU.",
            {"precision": "bf16" if machine.gpu else "fp32"},
        ),
        Part(
            "About ten evaluations in a short run, and a checkpoint after at most 500 steps.",
            {
                "evaluate_every": max(1, min(500, steps // 10)),
                "checkpoints": {"every": max(50, min(500, steps // 10))},
            },
        ),
    ]
    fitting = _fitting(chosen, parts, sum(pieces.values()))
    rates = row.learning_rate, row.embedding_learning_rate
    why = (
        "Published runs of full training use 1e-5 to 1e-4. New rows start from a mean and have "
        "farther to go, so embedding and head get more."
    )
    if "lora" in fitting.keys:
        rates, why = (LORA_RATE, LORA_RATE), "Chinese-LLaMA-2's rate of adapters."
    optimizer = {"learning_rate": rates[0], "embedding_learning_rate": rates[1]}
    schedule = {"shape": "cosine", "warmup": WARMUP}
    parts.append(Part(why, {"optimizer": optimizer, "schedule": schedule}))
    if any(pieces.values()):
        first = {"train": "new_rows", "tokens": short(two_digits(tokens * NEW_ROWS))}
        staged = "New rows alone first, so that they do not disturb the rest (EEVE does this)."
        phases = [{**first, "learning_rate": rates[1]}, {"train": "all"}]
        parts.append(Part(staged, {"phases": phases}))
    return list(_together(parts, fitting))


def _together(parts: Sequence[Part], more: Part) -> Iterator[Part]:
    """The parts with the keys of another one, which go before those that are there already."""
    left = dict(more.keys)
    for part in parts:
        keys, why = dict(part.keys), part.why
        for name in part.keys.keys() & left.keys():
            value = left.pop(name)
            nested = isinstance(value, dict)
            keys[name] = {**keys[name], **value} if nested else value
            why = f"{why} {more.why}" if nested else more.why
        yield Part(why, keys)
    if left:
        yield Part(more.why, left)


def _fitting(chosen: Chosen, parts: Sequence[Part], rows: int) -> Part:
    """The fewest settings with which the run fits. Raises `UserError` if there are none."""
    machine = chosen.machine
    if machine.gpu is None:
        return Part("", {})
    config = TrainingConfig(**{name: of for part in parts for name, of in part.keys.items()})
    cluster = Cluster.of(machine.gpu, machine.nodes, machine.gpus)
    shape = chosen.facts.shape.resized(chosen.facts.shape.vocabulary + rows)
    best = shortest(fittings(shape, config, cluster))
    if best is None:
        raise UserError(
            f"nothing makes {chosen.base} fit on {machine}; give a machine with more memory, or a "
            "smaller model."
        )
    why = (
        f"Without this it does not fit on {machine}; with it, it takes {best.memory / 1e9:.1f} GB "
        "of a GPU under FSDP2."
    )
    return Part(why, _nested(best))


def _nested(fitting: Fitting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rung in fitting.rungs:
        found = rung.apply(found)
    return found


def _comment(text: str, indent: str = "") -> list[str]:
    """A comment in lines of the recipe."""
    mark = f"{indent}# "
    return textwrap.wrap(
        text, _LINE, initial_indent=mark, subsequent_indent=mark, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
