"""`cpt-merge chat`, on tiny models: a random one, and ones whose every next token follows from the last alone."""

import fcntl
import io
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.launcher.chat import ReplyStreamer
from cpt_merge.launcher.cli import main
from tests.evaluation.thinkers import write_thinker
from tests.processes import LIMIT, ROOT, Processes

SPECIAL = ["<s>", "</s>", "<stop>", "<mark>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<stop>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
GENERATION = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7, "max_length": 20}


def write_tokenizer(directory: Path, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, so that a Chinese or Korean character is three."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast


def write_model(directory: Path, positions: int, follows: dict[int, int] | None = None) -> Path:
    """A random model; with `follows`, one that says nothing but what follows a token there."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=positions, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            if follows and ("o_proj" in name or "down_proj" in name):
                parameter.zero_()  # what is left is the embedding of the last token
        if follows:
            model.lm_head.weight.zero_()
            for token, next_token in follows.items():
                model.lm_head.weight[next_token] = model.model.embed_tokens.weight[token]
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    return directory


def chain(tokenizer: PreTrainedTokenizerFast, text: str) -> dict[int, int]:
    """Each token of the text follows the one before; none may be in it twice."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(set(ids)) == len(ids)
    return dict(pairwise(ids))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random")
    write_tokenizer(directory)
    return write_model(directory, positions=400)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It always says the same: characters of several bytes, and a special token that is no stop."""
    directory = tmp_path_factory.mktemp("parrot")
    return write_model(
        directory, 400, chain(write_tokenizer(directory), ":가天<mark> ok\n씨<stop>")
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("endless")
    tokenizer = write_tokenizer(directory)
    follows = chain(tokenizer, ":abcdefghijklmnop")
    return write_model(directory, 1_000_000, {**follows, **chain(tokenizer, "pa")})


class Talk:
    """Runs the command in this process with lines as stdin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(
        self, directory: Path, lines: list[str], *options: str, code: int = 0
    ) -> tuple[str, str]:
        self.monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(directory), *options]) == code
        return self.capsys.readouterr()


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(monkeypatch, capsys)


def generated(directory: Path, messages: list[dict[str, str]]) -> str:
    """What model.generate replies to the messages in 12 tokens."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def expected(directory: Path, turns: list[str], system: str | None = None) -> list[str]:
    """What model.generate replies to the turns, one after the other."""
    messages = [{"role": "system", "content": system}] if system else []
    replies = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        replies.append(generated(directory, messages))
        messages.append({"role": "assistant", "content": replies[-1].strip()})
    return replies


def as_printed(replies: list[str]) -> str:
    return "".join(f"{reply}\n" for reply in replies)


def test_a_piped_dialogue_gives_the_replies_of_generate_and_nothing_else(
    talk: Talk, random_model: Path
) -> None:
    turns = ["今天天氣", "날씨가 좋다", "and you?"]
    options = ["--system", "be brief", "--temperature", "0", "--max-new-tokens", "12"]
    lines = [turns[0], "", *turns[1:], "/clear", turns[2]]
    out, errors = talk(random_model, lines, *options)
    replies = [
        *expected(random_model, turns, "be brief"),
        *expected(random_model, turns[2:], "be brief"),
    ]
    assert len(set(replies)) == 4
    assert out == as_printed(replies)
    assert "(new conversation)" in errors


def test_undo_takes_an_exchange_back(talk: Talk, random_model: Path) -> None:
    options = ("--temperature", "0", "--max-new-tokens", "12")
    out, _ = talk(random_model, ["one", "two", "/undo", "three", "/exit", "four"], *options)
    first, second = expected(random_model, ["one", "two"])
    assert out == as_printed([first, second, expected(random_model, ["one", "three"])[1]])


def test_a_reply_ends_at_any_stop_id_and_shows_no_special_token(talk: Talk, parrot: Path) -> None:
    out, errors = talk(parrot, ["hello"], "--temperature", "0")
    assert out == "가天 ok\n씨\n"
    assert "cut off" not in errors


def test_a_reply_that_does_not_end_is_cut_off_and_that_is_said(talk: Talk, parrot: Path) -> None:
    out, errors = talk(parrot, ["hello"], "--temperature", "0", "--max-new-tokens", "7")
    assert out == "가天\n"
    assert "cut off after 7 tokens" in errors


def test_the_model_decides_how_to_sample_where_nothing_is_said(
    talk: Talk, random_model: Path
) -> None:
    def reply(*options: str) -> str:
        return talk(random_model, ["hello"], "--max-new-tokens", "12", *options)[0]

    assert reply("--seed", "1") == reply("--seed", "1")
    assert len({reply(), reply(), reply("--seed", "1")}) == 3
    assert reply("--seed", "1") != reply("--seed", "1", "--temperature", "5")
    (greedy,) = expected(random_model, ["hello"])
    assert (
        reply("--temperature", "0") == reply("--temperature", "0", "--seed", "2") == f"{greedy}\n"
    )


def test_the_oldest_exchanges_are_dropped_when_the_context_is_full(
    talk: Talk, random_model: Path
) -> None:
    turns = ["a" * 150, "b" * 100, "c" * 100]
    options = ("--temperature", "0", "--max-new-tokens", "12", "--system", "brief")
    out, errors = talk(random_model, turns, *options)
    replies = expected(random_model, turns[:2], "brief")
    left = [
        ("system", "brief"),
        ("user", turns[1]),
        ("assistant", replies[1].strip()),
        ("user", turns[2]),
    ]
    replies.append(
        generated(random_model, [{"role": role, "content": content} for role, content in left])
    )
    assert out == as_printed(replies)
    assert errors.count("exchanges dropped: 1") == 1


def test_a_turn_that_is_too_long_is_refused(talk: Talk, parrot: Path) -> None:
    out, errors = talk(parrot, ["a" * 400], code=2)
    assert out == ""
    assert "the model takes 400" in errors
    out, errors = talk(parrot, ["a" * 377], "--temperature", "0")
    assert out == "가\ufffd\n"
    assert "cut off after 5 tokens" in errors  # which is all that the context has left


def one_sentence(errors: str, *words: str) -> None:
    last = errors.strip().splitlines()[-1]
    assert last.startswith("cpt-merge: ")
    assert all(word in last for word in words), last


def test_what_is_no_chat_model_is_said_in_a_sentence(
    talk: Talk, parrot: Path, tmp_path: Path
) -> None:
    one_sentence(talk(tmp_path / "nowhere", [], code=2)[1], "nowhere does not exist", "directory")
    one_sentence(talk(tmp_path, [], code=2)[1], "config.json")
    base = write_model(tmp_path / "base", 100)
    write_tokenizer(base, template=None)
    one_sentence(
        talk(base, ["hello"], code=2)[1], str(base), "no chat template", "chat_template.jinja"
    )
    write_tokenizer(
        base, "{{ raise_exception('no system, please') if messages[0].role == 'system' }}"
    )
    one_sentence(talk(base, [], "--system", "be brief", code=2)[1], "system", "no system, please")
    (base / "model.safetensors").write_bytes(b"damaged")
    one_sentence(talk(base, ["hello"], code=2)[1], "model.safetensors", "download")
    (base / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}'
    )
    one_sentence(talk(base, ["hello"], code=2)[1], str(base), "transformers")


@pytest.mark.parametrize("of_the_tokenizer", [False, True])
def test_a_models_own_code_does_not_run_whatever_stdin_says(
    of_the_tokenizer: bool, talk: Talk, tmp_path: Path
) -> None:
    directory = write_model(tmp_path / "model", 100)
    write_tokenizer(directory)
    (directory / "own.py").write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\n")
    name = "tokenizer_config.json" if of_the_tokenizer else "config.json"
    values = json.loads((directory / name).read_text())
    if of_the_tokenizer:
        values |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    else:
        own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        values |= {"model_type": "own", "auto_map": own}
    (directory / name).write_text(json.dumps(values))
    one_sentence(talk(directory, ["y", "y", "y"], code=2)[1], "transformers")
    assert not (tmp_path / "has run").exists()


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop_ids: list[int]) -> list[str]:
    """What the streamer hands on, token by token."""
    written: list[str] = []
    streamer = ReplyStreamer(tokenizer, stop_ids, written.append)
    streamer.put(torch.tensor([[7, 7, 7]]))  # the prompt
    for number in ids:
        streamer.put(torch.tensor([number]))
    streamer.end()
    assert "".join(written) == streamer.text
    return written


def test_text_is_handed_on_as_soon_as_it_is_whole_characters(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    ids = tokenizer.encode("가天<mark> a</s>b", add_special_tokens=False)
    assert pieces(tokenizer, ids, [1]) == ["가", "天", " ", "a"]
    assert pieces(tokenizer, ids[:4], [1]) == ["가", "\ufffd"]  # ended within a character


def test_sentencepiece_keeps_the_spaces_at_the_start_of_a_line(pair: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair / "chat")
    text = "go home\n  and eat 天 rice\n\n 가나 well"
    ids = tokenizer.encode(text, add_special_tokens=False)
    written = pieces(tokenizer, ids, [2])
    assert "".join(written) == text
    assert "天" in written


def test_help_comes_without_torch(processes: Processes) -> None:
    code = (
        "import sys, cpt_merge.launcher.cli as c; c.main(['chat', '--help'])\n"
        "print({'torch', 'transformers'} & set(sys.modules) or 'light')"
    )
    done = processes.run_python("-c", code)
    assert done.stdout.splitlines()[-1] == "light", done.stderr
    assert "--max-new-tokens" in done.stdout


class Terminal:
    """The command in its own pseudo terminal."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.screen = ""
        self.master, slave = pty.openpty()
        settings = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cpt_merge", "chat", str(directory), *options],
            stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            env={**os.environ, **settings},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self.master, False)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = LIMIT) -> str:
        """Read until the text is on the screen; forget the screen up to it."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < deadline, self.screen
            assert self.process.poll() is None, self.screen
            try:
                self.screen += os.read(self.master, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        before, _, self.screen = self.screen.partition(text)
        return before


@pytest.fixture
def terminal(endless: Path) -> Iterator[Terminal]:
    started = Terminal(endless, "--temperature", "0", "--max-new-tokens", "900000")
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        os.close(started.master)


def test_ctrl_c_stops_a_reply_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    for _ in range(2):
        terminal.type("hello\n")
        terminal.wait_for("abcdefghijklmnopabc")
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
    terminal.type("half a line\x03")
    terminal.wait_for("/exit or Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.type("天가\x7f\x7f/undo\n")  # two backspaces take two characters of three bytes away
    terminal.wait_for("exchanges left: 1")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(LIMIT) == 0


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    says = ["<thi", "nk>", "음,", "</thi", "nk>\n", "서울", "<s>", "입니다.", "</s>"]
    directory = tmp_path_factory.mktemp("thinker")
    return write_thinker(directory, says, after=["[/INST]", "</think>"])


def test_thoughts_go_to_stderr_and_are_no_part_of_the_conversation(
    talk: Talk, thinker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    encode = LanguageModel.encode
    monkeypatch.setattr(
        LanguageModel, "encode", lambda self, text: prompts.append(text) or encode(self, text)
    )
    out, errors = talk(thinker, ["?", "!"], "--temperature", "0", "--max-new-tokens", "9")
    assert out == "서울입니다.\n" * 2
    assert "(thinking)\n음,\n(answer)\n" in errors
    assert "think>" not in errors
    assert prompts[-1] == "[user]?서울입니다.</s>[user]![/INST]"
    out, errors = talk(thinker, ["?"], "--temperature", "0", "--max-new-tokens", "1",
                       "--max-thought-tokens", "1")  # fmt: skip
    assert out == "\n"
    assert "cut off after 2 tokens" in errors


def test_variables_of_the_template(talk: Talk, thinker: Path) -> None:
    off = ("--chat-template-kwargs", "{enable_thinking: false}")
    one_sentence(
        talk(thinker, [], off[0], "{enable_thinkin: false}", code=2)[1],
        "--chat-template-kwargs.enable_thinkin", "the nearest is enable_thinking",
    )  # fmt: skip
    one_sentence(talk(thinker, [], off[0], "false", code=2)[1], "is no mapping")
    one_sentence(talk(thinker, [], off[0], "{tokenize: true}", code=2)[1], "tokenize is set")
    assert talk(thinker, ["?"], "--temperature", "0", *off)[0] == "서울입니다.\n"
