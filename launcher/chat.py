"""`cpt-merge chat`: talk to a model in the terminal. Replies go to stdout as they come, everything else to stderr."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, StoppingCriteriaList

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_local, model_directory
from cpt_merge.core.progress import say
from cpt_merge.evaluation.chat_template import render
from cpt_merge.evaluation.conversation import Message
from cpt_merge.evaluation.models import LoadedModel, load_model, load_tokenizer

HELP = "/clear: a new conversation   /undo: take the last exchange back   /exit or Ctrl-D: end   Ctrl-C: stop a reply"
UNFINISHED_CHARACTER = "\ufffd"  # what bytes decode to that are no whole character yet


@dataclass(frozen=True)
class ChatSettings:
    """What the command line decides."""

    system: str | None
    max_new_tokens: int
    temperature: (
        float | None
    )  # 0: the likeliest token; None: as the model's generation_config.json says
    seed: int | None  # None: other replies each time


def chat(name: str, settings: ChatSettings) -> None:
    """Talk to a model, a directory or a hub id, until the user ends it or stdin does.

    Raises `UserError` for what is no chat model; where stdin is no terminal, also for a turn that cannot be answered.
    """
    conversation = Conversation(_load(name, settings), settings)
    if settings.seed is None:
        torch.seed()
    else:
        torch.manual_seed(settings.seed)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # half a character, typed or piped, is no reason to end
    terminal = sys.stdin.isatty()
    for line in _lines(terminal):
        try:
            if not _obey(conversation, line):
                return
        except (UserError, KeyboardInterrupt) as error:
            if not terminal:
                raise
            say(str(error) or "(stopped; this turn is left out of the conversation)")


def _load(name: str, settings: ChatSettings) -> LoadedModel:
    """The model, after a look at all that can be wrong with it before its weights are read."""
    if is_local(name) and not Path(name).expanduser().is_dir():
        raise UserError(
            f"{name} does not exist; give the directory of a model, or its hub id (org/model)."
        )
    directory = model_directory(name)
    try:
        # otherwise transformers asks on the terminal whether it may run the model's own code
        AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"{directory} holds no model that transformers can load ({reason})."
        ) from None
    tokenizer = load_tokenizer(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory} has no chat template, as base models have none; give a chat model, or put a template into it "
            "as chat_template.jinja."
        )
    _render(tokenizer, [*_opening(settings), {"role": "user", "content": "?"}])
    Checkpoint.open(directory)
    loaded = load_model(name, directory, local_rank=0)
    loaded.model.generation_config.max_length = (
        None  # of prompt and reply; the limits here are others
    )
    say(f"{name} on {loaded.device}; /help says what else there is than to talk")
    return loaded


def _opening(settings: ChatSettings) -> list[Message]:
    return [{"role": "system", "content": settings.system}] if settings.system else []


def _render(tokenizer: Any, messages: list[Message]) -> str:
    template = tokenizer.chat_template
    return render(tokenizer, template if isinstance(template, str) else "default", messages)


def _lines(terminal: bool) -> Iterator[str]:
    """What the user says, a line at a time. On a terminal Ctrl-C forgets the line, and Ctrl-D ends."""
    if not terminal:
        yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - from now on, input() edits lines, also where a character is several bytes
    while True:
        try:
            line = _ask().strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D ends)")
            continue
        if line:
            yield line


def _ask() -> str:
    """A line from the terminal. Raises `EOFError` at Ctrl-D."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)  # input() would write it among the replies
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a line says. False if it says to end."""
    if not line.startswith("/"):
        conversation.answer(line)
    elif line in ("/exit", "/quit"):
        return False
    elif line == "/clear":
        conversation.turns.clear()
        say("(a new conversation)")
    elif line == "/undo":
        del conversation.turns[-2:]
        say(f"(exchanges left: {len(conversation.turns) // 2})")
    else:
        say(HELP if line == "/help" else f"{line} is no command. {HELP}")
    return True


@dataclass
class Conversation:
    """A dialogue with a model: the turns so far, which alternate between user and assistant."""

    loaded: LoadedModel
    settings: ChatSettings
    turns: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> None:
        """Write the reply to `text` to stdout, and keep both. Raises `UserError` if the text is too long."""
        self.turns, prompt = self._fit([*self.turns, {"role": "user", "content": text}])
        room = self.settings.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(prompt))
        try:
            reply = self._generate(prompt, room)
        except BaseException:
            self.turns.pop()  # the user's, which has no reply
            raise
        self.turns.append({"role": "assistant", "content": reply})

    @property
    def context(self) -> int | None:
        """How many tokens the model takes; None if its configuration does not say."""
        positions = getattr(
            self.loaded.model.config.get_text_config(), "max_position_embeddings", None
        )
        return int(positions) if positions else None

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a reply: those of the model's generation settings, and the tokenizer's eos."""
        ids = self.loaded.model.generation_config.eos_token_id
        found = [*(ids if isinstance(ids, list) else [ids]), self.loaded.tokenizer.eos_token_id]
        return list(dict.fromkeys(number for number in found if number is not None))

    def _fit(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """The turns and their tokens, without the oldest exchanges if they would leave too little for the reply.

        That is a quarter of the context, or `max_new_tokens` if fewer. Raises `UserError` if the last turn is too long.
        """
        dropped, prompt = 0, self._encode(turns)
        if self.context is None:
            return turns, prompt
        longest = self.context - min(self.settings.max_new_tokens, self.context // 4)
        while len(prompt) > longest and len(turns) > 1:
            dropped, turns = dropped + 1, turns[2:]
            prompt = self._encode(turns)
        if len(prompt) >= self.context:
            raise UserError(
                f"this turn makes {len(prompt)} tokens and the model takes {self.context}; shorten it."
            )
        if dropped:
            say(
                f"(the model takes {self.context} tokens: the oldest of the dialogue is dropped, exchanges: {dropped})"
            )
        return turns, prompt

    def _encode(self, turns: list[Message]) -> list[int]:
        return self.loaded.encode(
            _render(self.loaded.tokenizer, [*_opening(self.settings), *turns])
        )

    def _generate(self, prompt: list[int], room: int) -> str:
        """Write a reply of at most `room` tokens to stdout and return it. Ctrl-C ends it early."""
        inputs = torch.tensor([prompt], device=self.loaded.device)
        streamer = ReplyStreamer(self.loaded.tokenizer, self.stop_ids, _write)
        with _interruptible() as asked:
            self.loaded.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=self._generation_config(room),
                stopping_criteria=StoppingCriteriaList([_when(asked)]),
                streamer=streamer,
            )
        _write("\n")
        if asked.is_set():
            say("(stopped)")
        elif not streamer.stopped:
            say(
                f"(cut off after {len(streamer.ids)} tokens; --max-new-tokens and the model's context are the limits)"
            )
        return streamer.text.strip()

    def _generation_config(self, room: int) -> GenerationConfig:
        """What is decided here; transformers takes the rest from the model's generation_config.json."""
        stop_ids, temperature = self.stop_ids, self.settings.temperature
        settings: dict[str, Any] = {
            "max_new_tokens": room,
            "num_beams": 1,
            "eos_token_id": stop_ids or None,
        }
        if stop_ids and self.loaded.tokenizer.pad_token_id is None:
            settings["pad_token_id"] = stop_ids[0]
        if temperature == 0:
            settings |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        elif temperature is not None:
            settings |= {"do_sample": True, "temperature": temperature}
        return GenerationConfig(**settings)


class ReplyStreamer:
    """A streamer for `generate` that hands text on as soon as its tokens spell whole characters.

    transformers' TextStreamer waits for a space, so that Korean comes by words and Japanese not before the end, and
    with SentencePiece it loses the space that begins a line. Special tokens are not in the text.
    """

    def __init__(self, tokenizer: Any, stop_ids: list[int], write: Callable[[str], None]) -> None:
        self.ids: list[int] = []  # of the reply, without the one that stops it
        self.stopped = False
        self._tokenizer, self._stop_ids, self._write = tokenizer, frozenset(stop_ids), write
        self._in_prompt = True
        self._start = self._written = 0  # the last piece that was written is of ids[start:written]

    @property
    def text(self) -> str:
        """The reply so far."""
        return self._decode(self.ids)

    def put(self, tokens: torch.Tensor) -> None:
        """Take new tokens, shape (1,) or (1, length). The first ones are the prompt."""
        if self._in_prompt:
            self._in_prompt = False
            return
        for number in tokens.flatten().tolist():
            self.stopped = self.stopped or number in self._stop_ids
            if not self.stopped:
                self.ids.append(number)
        self._hand_on()

    def end(self) -> None:
        """Hand on what is left, though it be half a character."""
        self._hand_on(all_of_it=True)

    def _hand_on(self, all_of_it: bool = False) -> None:
        """Hand on what the new tokens add to the piece before them: a token's text depends on what stands before it."""
        before, text = (
            self._decode(self.ids[self._start : self._written]),
            self._decode(self.ids[self._start :]),
        )
        if len(text) > len(before) and (all_of_it or not text.endswith(UNFINISHED_CHARACTER)):
            self._write(text[len(before) :])
            self._start, self._written = self._written, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _when(asked: threading.Event) -> Callable[..., torch.Tensor]:
    """A stopping criterion: as soon as it was asked for."""

    def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), asked.is_set(), dtype=torch.bool, device=ids.device)

    return stop


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, to end at the next token with all in order; a second one is a `KeyboardInterrupt`."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
