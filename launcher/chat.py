"""`cpt-merge chat`: talk to a model in the terminal. Replies go to stdout, the rest to stderr."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from transformers import AutoConfig, GenerationConfig, StoppingCriteriaList

from cpt_merge.checkpoint.reader import check_complete, refuse_adapter
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
from cpt_merge.core.progress import counted, say
from cpt_merge.evaluation.chat_template import check_variables, render, special_tokens, turn_of
from cpt_merge.evaluation.config import ARGUMENTS
from cpt_merge.evaluation.conversation import Message, Reply
from cpt_merge.evaluation.gpus import divide_gpus
from cpt_merge.evaluation.models import LanguageModel, load_tokenizer
from cpt_merge.evaluation.thoughts import Thoughts, find_thoughts

HELP = (
    "/clear: start a new conversation   /undo: remove the last exchange   "
    "/exit or Ctrl-D: end   Ctrl-C: stop a reply"
)
UNFINISHED_CHARACTER = "\ufffd"  # incomplete bytes decode to it


@dataclass(frozen=True)
class ChatSettings:
    """The options of the command line."""

    system: str | None
    max_new_tokens: int
    max_thought_tokens: int  # as many more, for a model that thinks
    temperature: float | None  # 0: greedy; None: that of the model's generation_config.json
    seed: int | None  # None: replies differ each time
    variables: dict[str, Any]  # of the chat template


def read_variables(text: str) -> dict[str, Any]:
    """Variables of a chat template, written in YAML. Raises `UserError`."""
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise UserError(
            f"--chat-template-kwargs {text} is no mapping; write '{{enable_thinking: false}}'."
        )
    if taken := ARGUMENTS & given.keys():
        raise UserError(f"--chat-template-kwargs: {min(taken)} is set by the chat; leave it out.")
    return given


def chat(name: str, settings: ChatSettings) -> None:
    """Talk to a model (a directory or a hub id) until the user or the end of stdin ends it.

    Raises `UserError` if it is not a chat model and, if stdin is not a terminal, for a turn that
    cannot be answered.
    """
    dialogue = Dialogue(_load(name, settings), settings)
    if settings.seed is None:
        torch.seed()
    else:
        torch.manual_seed(settings.seed)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # half a character must not end the program
    terminal = sys.stdin.isatty()
    for line in _lines(terminal):
        try:
            if not _obey(dialogue, line):
                return
        except (UserError, KeyboardInterrupt) as error:
            if not terminal:
                raise
            say(str(error) or "(stopped; this turn is not part of the conversation)")


def _load(name: str, settings: ChatSettings) -> LanguageModel:
    """Load the model, after checking everything that can be wrong with it."""
    directory = model_directory(name)
    refuse_adapter(directory)
    try:
        # without the argument, transformers asks on the terminal whether to run the model's code
        AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"transformers cannot load a model from {directory} ({reason}).") from None
    tokenizer = load_tokenizer(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory} has no chat template, so it is probably a base model; give a chat model, "
            "or add a template as chat_template.jinja."
        )
    check_variables("--chat-template-kwargs", tokenizer.chat_template, settings.variables)
    _render(tokenizer, [*_opening(settings), {"role": "user", "content": "?"}], settings)
    check_complete(directory)
    model = LanguageModel.open(name, directory, divide_gpus(directory, None, Ranks())[0])
    model.loaded.generation_config.max_length = None  # the limits are those of `_fit`
    say(f"{name} on {model.device}; /help lists the commands")
    return model


def _opening(settings: ChatSettings) -> list[Message]:
    return [{"role": "system", "content": settings.system}] if settings.system else []


def _render(tokenizer: Any, messages: list[Message], settings: ChatSettings) -> str:
    template = tokenizer.chat_template
    chosen = template if isinstance(template, str) else "default"
    return render(tokenizer, chosen, messages, settings.variables)


def _lines(terminal: bool) -> Iterator[str]:
    """The user's lines. On a terminal, Ctrl-C discards the line and Ctrl-D ends."""
    if not terminal:
        yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - lets input() edit lines, also of multi-byte characters
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
    print("> ", end="", file=sys.stderr, flush=True)  # input() would write it to stdout
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _obey(dialogue: Dialogue, line: str) -> bool:
    """Execute a command or answer. Returns False at the end of the program."""
    if not line.startswith("/"):
        dialogue.answer(line)
    elif line in ("/exit", "/quit"):
        return False
    elif line == "/clear":
        dialogue.turns.clear()
        say("(new conversation)")
    elif line == "/undo":
        del dialogue.turns[-2:]
        say(f"(exchanges left: {len(dialogue.turns) // 2})")
    else:
        say(HELP if line == "/help" else f"{line} is not a command. {HELP}")
    return True


@dataclass
class Dialogue:
    """A dialogue with a model; its turns alternate between user and assistant."""

    model: LanguageModel
    settings: ChatSettings
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokenizer = self.model.tokenizer
        self.thoughts = find_thoughts(tokenizer, tokenizer.chat_template, [])

    def answer(self, text: str) -> None:
        """Write the reply to stdout and keep both. Raises `UserError` if the text is too long."""
        self.turns, prompt = self._fit([*self.turns, {"role": "user", "content": text}])
        room = self.settings.max_new_tokens
        if self.thoughts:
            room += self.settings.max_thought_tokens
        if self.context is not None:
            room = min(room, self.context - len(prompt))
        try:
            reply = self._generate(prompt, room)
        except BaseException:
            self.turns.pop()  # the user's turn, which has no reply
            raise
        self.turns.append(turn_of(reply, self.model.tokenizer.chat_template))

    @property
    def context(self) -> int | None:
        """The longest input in tokens; None if the model's configuration does not limit it."""
        positions = getattr(
            self.model.loaded.config.get_text_config(), "max_position_embeddings", None
        )
        return int(positions) if positions else None

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a reply: the model's generation settings' and the tokenizer's eos."""
        ids = self.model.loaded.generation_config.eos_token_id
        found = [*(ids if isinstance(ids, list) else [ids]), self.model.tokenizer.eos_token_id]
        return list(dict.fromkeys(number for number in found if number is not None))

    def _fit(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """The turns and their tokens, without the oldest exchanges if the reply needs their room.

        A reply gets at least a quarter of the context, or `max_new_tokens` if that is less. Raises
        `UserError` if the last turn is too long.
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
                f"this turn has {len(prompt)} tokens, the model takes {self.context}; shorten it."
            )
        if dropped:
            say(f"(the model takes {self.context} tokens; oldest exchanges dropped: {dropped})")
        return turns, prompt

    def _encode(self, turns: list[Message]) -> list[int]:
        messages = [*_opening(self.settings), *turns]
        return self.model.encode(_render(self.model.tokenizer, messages, self.settings))

    def _generate(self, prompt: list[int], room: int) -> Reply:
        """Write a reply of at most `room` tokens to stdout and return it. Ctrl-C stops it."""
        inputs = torch.tensor([prompt], device=self.model.device)
        asked = threading.Event()

        def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), asked.is_set(), dtype=torch.bool, device=ids.device)

        divided = None
        if self.thoughts:
            begun = self.thoughts.begin_in(self.model.tokenizer.decode(prompt))
            divided = DividedWriter(self.thoughts, begun, special_tokens(self.model.tokenizer))
        streamer = ReplyStreamer(self.model.tokenizer, self.stop_ids, _write, divided)
        with _interruptible(asked):
            self.model.loaded.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=self._generation_config(room),
                stopping_criteria=StoppingCriteriaList([stop]),
                streamer=streamer,
            )
        _write("\n")
        if asked.is_set():
            say("(stopped)")
        elif not streamer.stopped:
            say(
                f"(cut off after {counted(len(streamer.ids), 'token')}; the limits are "
                "--max-new-tokens and the model's context)"
            )
        thought = divided.thought if divided else ""
        return Reply(streamer.text.strip(), streamer.stopped, len(streamer.ids), thought)

    def _generation_config(self, room: int) -> GenerationConfig:
        """Our settings; transformers takes all others from the model's generation_config.json."""
        stop_ids, temperature = self.stop_ids, self.settings.temperature
        settings: dict[str, Any] = {
            "max_new_tokens": room,
            "num_beams": 1,
            "eos_token_id": stop_ids or None,
        }
        if stop_ids and self.model.tokenizer.pad_token_id is None:
            settings["pad_token_id"] = stop_ids[0]
        if temperature == 0:
            settings |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        elif temperature is not None:
            settings |= {"do_sample": True, "temperature": temperature}
        return GenerationConfig(**settings)


class ReplyStreamer:
    """A streamer for `generate` that writes text as soon as its tokens spell whole characters.

    transformers' TextStreamer waits for spaces, so Korean appears word by word and Japanese at the
    end; with SentencePiece it also loses the space at the beginning of a line. Special tokens are
    not in the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: list[int],
        write: Callable[[str], None],
        divided: DividedWriter | None = None,
    ) -> None:
        """With `divided`, text goes there with its special tokens, and not to `write`."""
        self._divided = divided
        self.ids: list[int] = []  # of the reply, without the stop token
        self.stopped = False
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self._write = divided.write if divided else write
        self._in_prompt = True
        self._start = self._written = 0  # the last text written is that of ids[start:written]

    @property
    def text(self) -> str:
        """The reply so far, without thoughts."""
        return self._divided.answer if self._divided else self._decode(self.ids)

    def put(self, tokens: torch.Tensor) -> None:
        """Take new tokens, of shape (1,) or (1, length). The first call passes the prompt."""
        if self._in_prompt:
            self._in_prompt = False
            return
        for number in tokens.flatten().tolist():
            self.stopped = self.stopped or number in self._stop_ids
            if not self.stopped:
                self.ids.append(number)
        self._write_new()

    def end(self) -> None:
        """Write what is left, even an incomplete character."""
        self._write_new(complete=True)
        if self._divided:
            self._divided.end()

    def _write_new(self, complete: bool = False) -> None:
        """Write what the new tokens add: the text of a token depends on those before it."""
        before = self._decode(self.ids[self._start : self._written])
        text = self._decode(self.ids[self._start :])
        if len(text) > len(before) and (complete or not text.endswith(UNFINISHED_CHARACTER)):
            self._write(text[len(before) :])
            self._start, self._written = self._written, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids,
                skip_special_tokens=self._divided is None,
                clean_up_tokenization_spaces=False,
            )
        )


class DividedWriter:
    """Writes the answer of a reasoning model to stdout, and its thoughts to stderr."""

    def __init__(self, thoughts: Thoughts, begun: bool, hidden: Sequence[str]) -> None:
        """`hidden` are the special tokens, which are not written."""
        self._thoughts, self._begun, self._hidden = thoughts, begun, hidden
        self._text = self.answer = self.thought = ""

    def write(self, text: str) -> None:
        """Take the text that follows. What may be the beginning of a mark is held back."""
        self._text += text
        self._write_up_to(len(self._text) - self._thoughts.may_continue(self._text))

    def end(self) -> None:
        """Write what was held back."""
        self._write_up_to(len(self._text))

    def _write_up_to(self, place: int) -> None:
        found = self._thoughts.divide(self._text[:place], self._begun)
        thought, answer = self._shown(found.thought), self._shown(found.answer).lstrip()
        if not self.thought and thought:
            say("(thinking)")
        if not answer.startswith(self.answer):  # only a later mark told that it was a thought
            say("\n(this was a thought)")
            self.answer = ""
        elif thought.startswith(self.thought):
            print(thought[len(self.thought) :], end="", file=sys.stderr, flush=True)
        if answer and not self.answer and thought:
            say("\n(answer)")
        _write(answer[len(self.answer) :])
        self.thought, self.answer = thought, answer

    def _shown(self, text: str) -> str:
        for token in self._hidden:
            text = text.replace(token, "")
        return text


def _write(text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def _interruptible(asked: threading.Event) -> Iterator[None]:
    """Ctrl-C sets the event, which ends the reply at the next token; a second one raises."""

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
