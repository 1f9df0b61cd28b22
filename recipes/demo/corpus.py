"""The demo's text: where it comes from, how documents are made of it, and what is held out.

Everything is read from installed packages (the extra `demo`); nothing is downloaded here and nothing is committed.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from typing import TypeVar

import yaml

from recipes.demo.intents import Exchange, IntentSampler

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
    "ai", "botprofile", "conversations", "emotion", "food", "gossip", "greetings", "history", "humor", "literature",
    "money", "movies", "politics", "psychology", "science", "sports", "trivia",
)  # fmt: skip
_JUPYTER = {"zh_tw": "zh_TW", "ko": "ko_KR"}

T = TypeVar("T")
Conversation = tuple[str, ...]
"""Turns of one conversation, the user's first; each turn is one line."""


@dataclass(frozen=True)
class CorpusSettings:
    """How much text is made, and how much of it is held out."""

    seed: int = 0
    intent_draws: int = 16_000  # per language; about two thirds become distinct exchanges
    turns_per_document: int = 60  # long documents: the text itself must not teach a model to stop after a sentence
    held_out_share: float = 0.02  # of the conversations of each source
    intent_prompts: int = 18  # per language
    chatterbot_prompts: int = 6  # per language
    longest_turn: int = 160  # characters


@dataclass(frozen=True)
class Corpus:
    """Text of all languages: documents to train on, and what no model may see before it is evaluated."""

    documents: dict[str, list[str]]
    held_out_documents: dict[str, list[str]]
    conversations: dict[str, list[Conversation]]
    prompts: dict[str, list[str]]


def build_corpus(settings: CorpusSettings) -> Corpus:
    """Read every source, hold out conversations and prompts, and join the rest into documents."""
    corpus = Corpus({}, {}, {}, {})
    for language in LANGUAGES:
        rng = random.Random(f"{settings.seed}-{language}")
        intents = _distinct([(e.prompt, e.reply) for e in intent_exchanges(language, settings.intent_draws, rng)])
        chats = _distinct(chatterbot_conversations(language, settings.longest_turn))
        held_intents, intents = _split(intents, settings.held_out_share, rng)
        held_chats, chats = _split(chats, max(settings.held_out_share, 2 * settings.chatterbot_prompts / len(chats)), rng)
        first_turns = [
            *[turns[0] for turns in held_intents[: settings.intent_prompts]],
            *[turns[0] for turns in held_chats[: settings.chatterbot_prompts]],
        ]
        unseen = set(first_turns)
        conversations = [turns for turns in [*intents, *chats] if not unseen.intersection(turns)]
        rng.shuffle(conversations)
        prose = list(dict.fromkeys(prose_lines(language)))
        held_prose, prose = _split(prose, settings.held_out_share, rng)
        corpus.documents[language] = [
            *_join(["\n".join(turns) + "\n" for turns in conversations], settings.turns_per_document),
            *_join([line for line in prose if line not in unseen], settings.turns_per_document),
        ]
        rng.shuffle(corpus.documents[language])
        corpus.held_out_documents[language] = [
            *_join(["\n".join(turns) + "\n" for turns in [*held_intents, *held_chats]], settings.turns_per_document),
            *_join(held_prose, settings.turns_per_document),
        ]
        corpus.conversations[language] = conversations
        corpus.prompts[language] = first_turns
    return corpus


def intent_exchanges(language: str, draws: int, rng: random.Random) -> Iterator[Exchange]:
    """Voice-assistant requests with their replies (home-assistant-intents)."""
    for exchange in IntentSampler(language, rng).exchanges(draws):
        yield Exchange(_nfc(exchange.prompt), _nfc(exchange.reply))


def chatterbot_conversations(language: str, longest_turn: int) -> list[Conversation]:
    """Small talk and questions by topic (chatterbot-corpus); conversations with a turn that is too long are left out."""
    folder = resources.files("chatterbot_corpus") / "data" / _CHATTERBOT[language]
    conversations = []
    for topic in _TOPICS:
        for turns in yaml.safe_load((folder / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]:
            lines = tuple(_nfc(" ".join(str(turn).split())) for turn in turns)
            if len(lines) >= 2 and all(0 < len(line) <= longest_turn for line in lines):
                conversations.append(lines)
    return conversations


def prose_lines(language: str) -> list[str]:
    """Sentences that are nobody's turn: textbook sentences (hsk-sentences-audio), messages (jupyterlab-language-pack)."""
    lines: list[str] = []
    if language in ("zh_tw", "en"):
        cards = json.loads((resources.files("hsk_sentences_audio") / "data/sentences.json").read_text(encoding="utf-8"))
        lines += [card["traditional"] if language == "zh_tw" else card["translation"]["en"] for card in cards]
    if language in _JUPYTER:
        lines += _jupyter_messages(_JUPYTER[language])
    return [_nfc(line.strip()) for line in lines]


def _jupyter_messages(locale: str) -> list[str]:
    folder = resources.files(f"jupyterlab_language_pack_{locale}") / "locale" / locale / "LC_MESSAGES"
    messages = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if not path.name.endswith(".json"):
            continue
        for source, translations in json.loads(path.read_text(encoding="utf-8")).items():
            if source and isinstance(translations, list):
                messages += [text for text in translations if len(text) >= 8 and "\n" not in text and text != source]
    return messages


def licences() -> str:
    """One line per package: name, version, licence as its own metadata state it."""
    lines = []
    for package in PACKAGES:
        about = metadata.metadata(package)
        stated = about["License-Expression"] or about["License"] or ""
        classified = [line.split("::")[-1].strip() for line in about.get_all("Classifier") or [] if "License" in line]
        lines.append(f"{package} {about['Version']}: {'; '.join(filter(None, [*classified, stated.split(chr(10))[0]]))}")
    return "\n".join(lines) + "\n"


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _distinct(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The first conversation of each opening turn: a held-out opening must have no twin left in training."""
    return list({turns[0]: turns for turns in reversed(list(conversations))}.values())


def _split(items: Sequence[T], share: float, rng: random.Random) -> tuple[list[T], list[T]]:
    """A random `share` of the items, and the rest."""
    shuffled = rng.sample(items, len(items))
    count = round(len(items) * share)
    return shuffled[:count], shuffled[count:]


def _join(lines: Sequence[str], per_document: int) -> list[str]:
    return ["\n".join(lines[start : start + per_document]) for start in range(0, len(lines), per_document)]
