"""Bits per byte: against a model whose cost is known, against a plain loop, and independent of batches."""

import math

import pytest
import torch

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.evaluators.evaluator import Subject
from cpt_merge.evaluation.evaluators.language import (
    LanguageEvaluator,
    cut_windows,
    measure_documents,
)
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.models import LanguageModel, shared_context

DOCUMENTS = [
    "今天天氣很好，我們去公園散步。" * 5,
    "도서관은 어디에 있습니까?",
    "a",
    "Where is the library? " * 4,
]
ALONE = Ranks()


def measure(model, **settings):
    return measure_documents(model, DOCUMENTS, EvaluationConfig(**settings), ALONE, "test")


def test_a_uniform_model_costs_log2_of_its_vocabulary_per_token(uniform_model):
    model = LanguageModel.open("uniform", uniform_model)
    vocabulary = model.loaded.config.vocab_size
    for text, found in zip(DOCUMENTS, measure(model, context=16), strict=True):
        tokens = len(model.tokenizer(text, add_special_tokens=False).input_ids)
        assert (found.tokens, found.bytes) == (tokens, len(text.encode()))
        assert found.bits == pytest.approx(tokens * math.log2(vocabulary), rel=1e-6)


def test_every_token_is_predicted_once_with_the_context_before_it():
    windows = cut_windows(0, [11, 12, 13, 14, 15], first=0, context=2)
    assert [window.inputs for window in windows] == [[0, 11], [12, 13], [14]]
    assert [window.targets for window in windows] == [[11, 12], [13, 14], [15]]
    assert cut_windows(0, [], first=0, context=2) == []


def test_equal_to_a_plain_loop_over_tokens(models_of_two_vocabularies):
    model = LanguageModel.open("chat", models_of_two_vocabularies["chat"])
    context = 8
    for text, found in zip(DOCUMENTS, measure(model, context=context), strict=True):
        ids = [0, *model.encode(text)]
        bits = 0.0
        for place in range(1, len(ids)):
            seen = ids[context * ((place - 1) // context) : place]
            with torch.no_grad():
                logits = model.loaded(torch.tensor([seen])).logits[0, -1]
            bits -= float(logits.log_softmax(-1)[ids[place]]) / math.log(2)
        assert found.bits == pytest.approx(bits, rel=1e-4)


def test_independent_of_the_batch_size(models_of_two_vocabularies):
    model = LanguageModel.open("base", models_of_two_vocabularies["base"])
    one, many = measure(model, batch_size=1, context=32), measure(model, batch_size=7, context=32)
    for a, b in zip(one, many, strict=True):
        assert a.bits == pytest.approx(b.bits, rel=1e-5)


def test_a_tokenizer_without_bos_and_eos_is_an_error(models_of_two_vocabularies):
    model = LanguageModel.open("base", models_of_two_vocabularies["base"])
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither bos nor eos"):
        measure(model)


def measured(model, texts):
    return LanguageEvaluator(EvaluationConfig(), {"ko": texts}).measure(
        Subject(TransformersEngine(model, ALONE), None), []
    )


def test_damaged_weights_give_no_metric(uniform_model):
    model = LanguageModel.open("broken", uniform_model)
    torch.nn.init.constant_(model.loaded.lm_head.weight, math.nan)
    found = measured(model, DOCUMENTS)
    assert found.measurements == []
    assert "weights are damaged" in found.not_run[0].reason


def test_the_share_of_unknown_tokens_is_reported(uniform_model, capsys):
    model = LanguageModel.open("uniform", uniform_model)
    assert measured(model, DOCUMENTS).details["text"]["ko"]["unknown_tokens"] == 0
    assert capsys.readouterr().err.count("too low") == 0
    (first, *_) = model.encode("a")
    model.tokenizer.unk_token = model.tokenizer.convert_ids_to_tokens(first)
    found = measured(model, ["a", "bb"])
    assert found.details["text"]["ko"]["unknown_tokens"] == 1
    assert (
        "of the tokens are a, which stands for any text, so the value is too low to be compared"
        in capsys.readouterr().err
    )


def test_the_window_is_what_every_model_was_trained_on(models_of_two_vocabularies, capsys):
    models = models_of_two_vocabularies  # with 256 positions
    assert shared_context(models, None, trained_on=64) == 64
    assert capsys.readouterr().err == ""
    assert shared_context(models, 32, trained_on=64) == 32
    assert capsys.readouterr().err == ""
    assert shared_context(models, 128, trained_on=64) == 128
    said = " ".join(capsys.readouterr().err.split())
    assert "128 is longer than the sequences of continued pretraining (64)" in said
    assert shared_context(models, None) == 256
    assert "has only 256 positions" in capsys.readouterr().err
