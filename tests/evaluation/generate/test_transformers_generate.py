"""Generation: batches equal one by one; what ends a reply; turn by turn; the model's own sampling settings have no effect."""

import json
import shutil

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.chat_template import read_chat_template, render, template_for
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Turn, prompt
from cpt_merge.evaluation.generate.conversations import converse, generate
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.models import LanguageModel, batches_by_length
from tests.evaluation.conftest import TEXTS

ALONE = Ranks()
PROMPTS = [text for texts in TEXTS.values() for text in texts]


def ask(model, directory, **settings):
    template = template_for(model, directory, read_chat_template(directory))
    texts = [
        render(model.tokenizer, template.template, [{"role": "user", "content": text}])
        for text in PROMPTS
    ]
    return generate(
        TransformersEngine(model, ALONE),
        template,
        texts,
        EvaluationConfig(max_new_tokens=24, **settings),
    )


def test_batched_equals_one_by_one(models_of_two_vocabularies):
    directory = models_of_two_vocabularies["chat"]
    model = LanguageModel.open("chat", directory)
    batched = ask(model, directory, batch_size=5)
    assert batched == ask(model, directory, batch_size=1)
    assert batched == ask(model, directory, batch_size=5), (
        "the sampling in generation_config.json must not enter"
    )
    assert len({reply.text for reply in batched}) > 1


def test_the_models_own_generation_config_has_no_effect(models_of_two_vocabularies, tmp_path):
    """Two models with the same weights reply alike, whatever settings they come with."""
    directory = models_of_two_vocabularies["chat"]
    other = shutil.copytree(directory, tmp_path / "other")
    config = json.loads((other / "generation_config.json").read_text())
    forced = {
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 20,
        "num_beams": 3,
        "suppress_tokens": [5, 6, 7],
        "top_k": 2,
    }
    (other / "generation_config.json").write_text(json.dumps({**config, **forced}))
    replies = [ask(LanguageModel.open("chat", path), directory) for path in (directory, other)]
    assert replies[0] == replies[1]


def test_sampling_is_a_function_of_the_seed(models_of_two_vocabularies):
    directory = models_of_two_vocabularies["chat"]
    model = LanguageModel.open("chat", directory)
    first, again, other = (ask(model, directory, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_reply_that_ends_and_one_that_does_not(uniform_model):
    model = LanguageModel.open("uniform", uniform_model)
    endless = ask(model, uniform_model)  # the argmax of equal logits is token 0, bos
    assert {(reply.stopped, reply.tokens) for reply in endless} == {(False, 24)}
    model.tokenizer.eos_token = "<s>"
    assert {(reply.stopped, reply.tokens, reply.text) for reply in ask(model, uniform_model)} == {
        (True, 1, "")
    }


def test_batches_hold_everything_once_and_the_longest_first():
    lengths = [3, 9, 1, 7, 7]
    assert batches_by_length(lengths, 2) == [[1, 3], [4, 0], [2]]
    assert batches_by_length([], 2) == []


def user(text):
    return [{"role": "user", "content": text}]


def test_the_next_turn_sees_the_models_own_reply(models_of_two_vocabularies):
    directory = models_of_two_vocabularies["chat"]
    model = LanguageModel.open("chat", directory)
    template, config = (
        read_chat_template(directory),
        EvaluationConfig(max_new_tokens=12, batch_size=2),
    )
    dialogue = Conversation(
        "ko", (Turn(user(PROMPTS[3])), Turn(user(PROMPTS[4])), Turn(user(PROMPTS[5])))
    )
    conversations = [prompt("en", user(PROMPTS[6])), dialogue, prompt("zh_tw", user(PROMPTS[0]))]
    exchanges = converse(
        TransformersEngine(model, ALONE), template, conversations, config
    ).exchanges
    assert [len(exchange.replies) for exchange in exchanges] == [1, 3, 1]

    seen = exchanges[1].messages()
    assert [message["role"] for message in seen] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert [seen[1]["content"], seen[3]["content"]] == [
        reply.text for reply in exchanges[1].replies[:2]
    ]
    for length in (1, 3, 5):
        text = render(model.tokenizer, template.template, seen[:length])
        [alone] = generate(TransformersEngine(model, ALONE), template, [text], config)
        assert exchanges[1].replies[length // 2] == alone


def test_a_prompt_that_fills_the_models_positions_is_not_answered_and_one_near_it_is_cut(
    models_of_two_vocabularies, capsys
):
    directory = models_of_two_vocabularies["chat"]
    model = LanguageModel.open("chat", directory)
    one = len(model.encode("x"))
    texts = ["x" * (256 // one), "x" * (250 // one), "x"]
    template = read_chat_template(directory)
    replies = generate(
        TransformersEngine(model, ALONE), template, texts, EvaluationConfig(max_new_tokens=12)
    )
    assert (replies[0].tokens, replies[0].text, replies[0].stopped) == (0, "", False)
    assert 0 < replies[1].tokens <= 6
    assert replies[2].tokens > 6
    assert "no reply to 1 prompt as long as its 256 positions" in capsys.readouterr().err
