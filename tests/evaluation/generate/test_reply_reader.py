"""Limits of replies: answers in characters, the same for all tokenizers; thoughts in tokens."""

import pytest
from transformers import PreTrainedTokenizerFast

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Turn
from cpt_merge.evaluation.generate.conversations import converse, generate
from cpt_merge.evaluation.generate.reader import CHECKED_EVERY, ReplyLimits, ReplyReader
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.evaluation.thoughts import find_thoughts
from tests.evaluation.thinkers import HYBRID, OPENS_THOUGHT, PLAIN, byte_tokenizer, write_thinker

ALONE = Ranks()
WORDS = ["가나다라마바사아자차", "서울"]


def reader(*limits: int, added: tuple[str, ...] = (), template: str = PLAIN) -> ReplyReader:
    tokenizer = byte_tokenizer(template, added)
    return ReplyReader(
        tokenizer, (1,), find_thoughts(tokenizer, template, []), ReplyLimits(*limits)
    )


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("added", [(), ("가나다",), ("가나다라마바사아자차",)])
def test_every_tokenizer_has_room_for_the_same_characters(added):
    one = reader(25, 1000, 10, added=added)
    text = "가나다라마바사아자차" * 3
    reply = one.read(ids_of(one.tokenizer, text), begun=False)
    assert reply.text == text[:25]
    assert not reply.stopped
    whole = one.read([*ids_of(one.tokenizer, text[:25]), 1], begun=False)
    assert (whole.text, whole.stopped) == (text[:25], True)


def test_what_is_generated_beyond_a_limit_has_no_effect():
    """So the reply does not depend on when the limit is looked at."""
    for limits, template, begun in [((25, 1000, 10), PLAIN, False), ((99, 20, 10), PLAIN, False),
                                    ((99, 99, 10), OPENS_THOUGHT, True)]:  # fmt: skip
        one = reader(*limits, template=template)
        ids = ids_of(one.tokenizer, "가나다라마바사아자차" * 3)
        over = next(count for count in range(len(ids)) if one.is_over(ids[:count], begun))
        found = {one.read(ids[:count], begun) for count in range(over, len(ids))}
        assert len(found) == 1
        assert not found.pop().stopped


def test_tokens_of_thoughts_are_counted_and_limited_apart():
    one = reader(10, 12, 11, template=OPENS_THOUGHT)
    reply = one.read([*ids_of(one.tokenizer, "abc</think>1234567890"), 1], begun=True)
    assert (reply.thought, reply.text, reply.stopped) == ("abc", "1234567890", True)
    assert (reply.thought_tokens, reply.tokens) == (11, 22)
    endless = one.read(ids_of(one.tokenizer, "abcdefghijkl</think>1"), begun=True)
    assert endless.within_thought
    assert (endless.text, endless.thought, endless.tokens) == ("", "abcdefghijk", 11)


def ask(directory, name="chat", **settings):
    model = LanguageModel.open(name, directory)
    template = read_chat_template(directory, config := EvaluationConfig(**settings), name)
    prompts = [template.render(model.tokenizer, [{"role": "user", "content": "?"}])] * 3
    return generate(TransformersEngine(model, ALONE), template, prompts, config)


def test_generation_ends_at_the_characters_for_any_tokenizer(tmp_path):
    """Both get 200 characters; one needs twenty times the tokens of the other."""
    long = write_thinker(tmp_path / "long", ["가나다라마바사아자차", "가나다라마바사아자차"], PLAIN)
    short = write_thinker(tmp_path / "short", ["가", "가"], PLAIN)
    replies = [ask(directory, max_characters=200)[0] for directory in (long, short)]
    assert [len(reply.text) for reply in replies] == [200, 200]
    assert [reply.tokens for reply in replies] == [20, 200]
    assert not any(reply.stopped for reply in replies)


def test_generation_stops_soon_after_the_limit(tmp_path, monkeypatch):
    short = write_thinker(tmp_path / "short", ["가", "가"], PLAIN)
    steps: list[int] = []
    model = LanguageModel.open("short", short)
    model.loaded.register_forward_hook(lambda *_: steps.append(1))
    template, config = read_chat_template(short), EvaluationConfig(max_characters=40)
    generate(TransformersEngine(model, ALONE), template, ["[/INST]"], config)
    assert 40 <= len(steps) <= 40 + CHECKED_EVERY


def test_thoughts_and_answers_of_a_model(tmp_path):
    says = ["<think>", "음, 어디", "</think>", *WORDS, "</s>"]
    for number, (template, after) in enumerate([(HYBRID, "[/INST]"), (OPENS_THOUGHT, "\n")]):
        said = says if template is HYBRID else says[1:]
        directory = write_thinker(tmp_path / str(number), said, template, after=[after])
        for reply in ask(directory):
            assert (reply.text, reply.thought, reply.stopped) == ("".join(WORDS), "음, 어디", True)
            assert reply.tokens == len(said)
            assert reply.thought_tokens == len(said) - 3
    off = {"chat_template_kwargs": {"chat": {"enable_thinking": False}}}
    quiet = write_thinker(
        tmp_path / "q", [*WORDS, "</s>"], after=["[/INST]", "</think>", "<think>"]
    )
    assert ask(quiet, **off)[0].text == "".join(WORDS)


def test_a_model_that_never_stops_thinking_has_no_answer_and_is_named(tmp_path, capsys):
    directory = write_thinker(tmp_path / "m", ["<think>", "음", "음"])
    model = LanguageModel.open("endless", directory)
    config = EvaluationConfig(max_thought_tokens=40)
    asked = [Conversation("ko", (Turn([{"role": "user", "content": "?"}]),) * 2)]
    [exchange] = converse(
        TransformersEngine(model, ALONE), read_chat_template(directory), asked, config
    ).exchanges
    for reply in exchange.replies:
        assert (reply.text, reply.stopped, reply.within_thought) == ("", False, True)
        assert (reply.tokens, reply.thought_tokens, reply.thought) == (40, 40, "음" * 39)
    said = capsys.readouterr().err
    assert "endless: 2 of 2 replies ended within a thought" in " ".join(said.split())


def test_the_next_turn_sees_the_answer_and_the_template_gets_the_thought(tmp_path):
    directory = write_thinker(tmp_path / "m", ["<think>", "음", "</think>", "네", "</s>"])
    model, template = LanguageModel.open("chat", directory), read_chat_template(directory)
    user = {"role": "user", "content": "?"}
    asked = [Conversation("ko", (Turn([user]), Turn([user])))]
    [exchange] = converse(
        TransformersEngine(model, ALONE), template, asked, EvaluationConfig()
    ).exchanges
    assert [reply.text for reply in exchange.replies] == ["네", "네"]
    turn = template.turn_of(exchange.replies[0])
    assert turn == {"role": "assistant", "content": "네", "reasoning_content": "음"}
    history = template.render(model.tokenizer, [user, turn, user])
    assert history == "[user]?네</s>[user]?[/INST]"


def test_a_ceiling_of_tokens_that_is_reached_first_is_named(tmp_path, capsys):
    short = write_thinker(tmp_path / "short", ["가", "가"], PLAIN)
    model, asked = (
        LanguageModel.open("short", short),
        [Conversation("ko", (Turn([{"role": "user", "content": "?"}]),))],
    )
    converse(
        TransformersEngine(model, ALONE),
        read_chat_template(short),
        asked,
        EvaluationConfig(max_new_tokens=9),
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 1 replies were cut off at evaluation.max_new_tokens = 9" in said


def test_marks_that_nothing_declares_are_named(tmp_path, capsys):
    directory = write_thinker(tmp_path / "m", ["<think", ">음</", "think>네", "</s>"], PLAIN)
    model, asked = (
        LanguageModel.open("m", directory),
        [Conversation("ko", (Turn([{"role": "user", "content": "?"}]),))],
    )
    converse(
        TransformersEngine(model, ALONE), read_chat_template(directory), asked, EvaluationConfig()
    )
    assert "set evaluation.thoughts" in capsys.readouterr().err
