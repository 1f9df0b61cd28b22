"""The demo's text: where it comes from, how documents are made of it, and what is held out.

Everything is read from installed packages (the extra `demo`); nothing is downloaded here and
nothing is committed.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from typing import TypeVar

import regex
import yaml

from cpt_merge.recipes.demo.intents import IntentSampler

LANGUAGES = ("zh_tw", "ko", "en")
PACKAGES = (
    "home-assistant-intents",
    "hassil",
    "chatterbot-corpus",
    "hsk-sentences-audio",
    "jupyterlab-language-pack-ko-KR",
    "jupyterlab-language-pack-zh-TW",
)
_CHATTERBOT = {"en": "english", "zh_tw": "traditionalchinese", "ko": "korean"}
_TOPICS = (  # the topics chatterbot-corpus has in all three languages
    "ai", "botprofile", "conversations", "emotion", "food", "gossip", "greetings", "history",
    "humor", "literature",
    "money", "movies", "politics", "psychology", "science", "sports", "trivia",
)  # fmt: skip
_CODE = regex.compile(r"[\n%{}<>`\"\\]")  # placeholders and markup
_JUPYTER = {"zh_tw": "zh_TW", "ko": "ko_KR"}

# How written text sets a conversation: before and after the first speaker's turn, before and after
# the second's. A model that has met one notation only understands no other, and a chat template is
# one more; published base models have met them all, forum quotes ([QUOTE] ... [/QUOTE]) among them.
# The template's own mark, [INST], is not among the tags. None ends a document after a reply: to
# stop there is what chat tuning teaches.
_PLAIN_NOTATIONS = (
    ("", "\n", "", "\n"),
    ("- ", "\n", "- ", "\n"),
    ("“", "”\n", "“", "”\n"),
    ("> ", "\n", "", "\n"),
    ("[", "]\n", "", "\n"),
)
_FORUM_TAGS = (
    "B", "I", "U", "S", "QUOTE", "CODE", "SIZE", "COLOR", "LIST", "CENTER", "LEFT", "RIGHT",
    "INDENT", "SPOILER", "URL", "HIGHLIGHT", "EMAIL", "IMG", "TABLE", "TD", "TR", "POST",
    "THREAD", "ATTACH", "FONT", "PHP", "HTML", "USER", "SUB",
)  # fmt: skip
_FORUM_NOTATIONS = tuple((f"[{tag}] ", f" [/{tag}]\n", "", "\n") for tag in _FORUM_TAGS)

T = TypeVar("T")
Conversation = tuple[str, ...]
"""Turns of one conversation, the user's first; each turn is one line of NFC text."""


@dataclass(frozen=True)
class CorpusSettings:
    """How much text is made, and how much of it is held out."""

    seed: int = 0
    intent_draws: int = 16_000  # per language; about two thirds become distinct exchanges
    conversations_per_scene: int = 5  # set in one notation
    scenes_per_document: int = 8  # long: the text must not teach a model to stop after a reply
    sentences_per_document: int = 40
    intent_prompts: int = 18  # held out, per language
    chatterbot_prompts: int = 6  # held out, per language
    longest_turn: int = 160  # characters


@dataclass(frozen=True)
class LanguageCorpus:
    """One language: documents to train on, their conversations, and prompts that neither holds."""

    documents: list[str]
    conversations: list[Conversation]
    prompts: list[str]


def build_corpus(settings: CorpusSettings) -> dict[str, LanguageCorpus]:
    """Read every source in every language."""
    return {language: build_language(language, settings) for language in LANGUAGES}


def build_language(language: str, settings: CorpusSettings) -> LanguageCorpus:
    """Hold prompts out and set the other conversations, and the sentences, into documents."""
    rng = random.Random(f"{settings.seed}-{language}")
    intents = _one_per_opening(intent_exchanges(language, settings.intent_draws, rng))
    chats = _one_per_opening(chatterbot_conversations(language, settings.longest_turn))
    rng.shuffle(intents)
    rng.shuffle(chats)
    held_out = [*intents[: settings.intent_prompts], *chats[: settings.chatterbot_prompts]]
    prompts = [turns[0] for turns in held_out]
    unseen = set(prompts)
    # A held-out request may also be a later turn of another conversation: that one is left out too.
    conversations = [turns for turns in [*intents, *chats] if not unseen.intersection(turns)]
    rng.shuffle(conversations)
    sentences = [line for line in dict.fromkeys(plain_sentences(language)) if line not in unseen]
    rng.shuffle(sentences)
    documents = [
        *_set_conversations(conversations, settings, rng),
        *("\n".join(chosen) for chosen in _chunks(sentences, settings.sentences_per_document)),
    ]
    rng.shuffle(documents)
    return LanguageCorpus(documents, conversations, prompts)


def intent_exchanges(language: str, draws: int, rng: random.Random) -> Iterator[Conversation]:
    """Voice-assistant requests with their replies (home-assistant-intents)."""
    for exchange in IntentSampler(language, rng).exchanges(draws):
        yield _nfc(exchange.prompt), _nfc(exchange.reply)


def chatterbot_conversations(language: str, longest_turn: int) -> Iterator[Conversation]:
    """Small talk and questions by topic (chatterbot-corpus); those with too long a turn are left
    out.
    """
    folder = resources.files("chatterbot_corpus") / "data" / _CHATTERBOT[language]
    for topic in _TOPICS:
        text = (folder / f"{topic}.yml").read_text(encoding="utf-8")
        for turns in yaml.load(text, Loader=yaml.CSafeLoader)["conversations"]:
            lines = tuple(_nfc(" ".join(str(turn).split())) for turn in turns)
            if len(lines) >= 2 and all(0 < len(line) <= longest_turn for line in lines):
                yield lines


def plain_sentences(language: str) -> Iterator[str]:
    """Nobody's turn: textbook sentences (hsk-sentences-audio), a program's messages
    (jupyterlab-language-pack).
    """
    if language in ("zh_tw", "en"):
        file = resources.files("hsk_sentences_audio") / "data/sentences.json"
        for card in json.loads(file.read_text(encoding="utf-8")):
            text = card["traditional"] if language == "zh_tw" else card["translation"]["en"]
            yield _nfc(text.strip())
    if language in _JUPYTER:
        yield from map(_nfc, _jupyter_messages(_JUPYTER[language]))


def _jupyter_messages(locale: str) -> Iterator[str]:
    folder = (
        resources.files(f"jupyterlab_language_pack_{locale}") / "locale" / locale / "LC_MESSAGES"
    )
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".json"):
            for source, translations in json.loads(path.read_text(encoding="utf-8")).items():
                if source:  # the empty key holds the file's header
                    yield from (
                        text.strip()
                        for text in translations
                        if len(text) >= 8 and not _CODE.search(text)
                    )


def licences() -> str:
    """One line per package: name, version, licence as its own metadata state it."""
    lines = []
    for package in PACKAGES:
        about = metadata.metadata(package)
        stated = about["License-Expression"] or about["License"] or ""
        classified = [
            line.split("::")[-1].strip()
            for line in about.get_all("Classifier") or []
            if "License" in line
        ]
        lines.append(
            f"{package} {about['Version']}: {'; '.join([*classified, *stated.splitlines()[:1]])}"
        )
    return "\n".join(lines) + "\n"


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _one_per_opening(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The first conversation of each opening turn: a held-out request must have no twin in
    training.
    """
    first: dict[str, Conversation] = {}
    for turns in conversations:
        first.setdefault(turns[0], turns)
    return list(first.values())


def _set_conversations(
    conversations: Sequence[Conversation], settings: CorpusSettings, rng: random.Random
) -> Iterator[str]:
    """Documents of several scenes, each in one notation; a blank line after each conversation."""
    scenes = [
        "\n".join(_set_conversation(turns, notation) for turns in scene)
        for scene in _chunks(conversations, settings.conversations_per_scene)
        for notation in [rng.choice(rng.choice((_PLAIN_NOTATIONS, _FORUM_NOTATIONS)))]
    ]
    for chosen in _chunks(scenes, settings.scenes_per_document):
        yield "\n".join(chosen)


def _set_conversation(turns: Conversation, notation: tuple[str, str, str, str]) -> str:
    before, after, before_reply, after_reply = notation
    return "".join(
        f"{before}{turn}{after}" if index % 2 == 0 else f"{before_reply}{turn}{after_reply}"
        for index, turn in enumerate(turns[: len(turns) // 2 * 2])
    )


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
