"""The classifier, with a tiny random model: equal to calling it one by one, and its labels."""

import os
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.conversation import Exchange, Reply, prompt
from cpt_merge.evaluation.scorers.classifier import ClassifierScorer, positions_of
from tests.evaluation.conftest import TEXTS, make_tokenizer

ALONE = Ranks()


@pytest.fixture(
    scope="module", params=["single_label_classification", "multi_label_classification"]
)
def classifier(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(300, None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, id2label={0: "neutral", 1: "Toxic", 2: "threat"},
        label2id={"neutral": 0, "Toxic": 1, "threat": 2}, problem_type=request.param, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exchanges(texts):
    return [
        Exchange(prompt("en", [{"role": "user", "content": "?"}]), (Reply(text, True, 3),))
        for text in texts
    ]


def test_batches_equal_one_by_one_and_an_empty_reply_has_no_score(classifier):
    texts = [*TEXTS["en"], "", *TEXTS["ko"], "long " * 100]
    scores = ClassifierScorer(str(classifier), ["toxic", "threat"], 3).score(
        exchanges(texts), ALONE
    )
    assert scores[3].value is None
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(classifier),
        make_tokenizer(300, None),
    )
    for text, score in zip(texts, scores, strict=True):
        if text:
            ids = torch.tensor([tokenizer(text).input_ids[:64]])
            logits = model(ids).logits[0].detach()
            multi = model.config.problem_type == "multi_label_classification"
            expected = logits.sigmoid()[1:].max() if multi else logits.softmax(0)[1:].sum()
            assert score.value == pytest.approx(float(expected), abs=1e-5)
            assert 0 <= score.value <= 1


def test_an_unknown_label_and_a_missing_directory_are_errors(classifier, tmp_path):
    with pytest.raises(
        UserError, match="has no label 'hate'; its labels are neutral, Toxic, threat"
    ):
        ClassifierScorer(str(classifier), ["hate"], 3)
    with pytest.raises(UserError, match="does not exist"):
        ClassifierScorer(str(tmp_path / "none"), ["toxic"], 3)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as a classifier"):
        ClassifierScorer(str(tmp_path), ["toxic"], 3)


def test_errors_are_found_before_replies_are_generated(classifier, tmp_path):
    broken = shutil.copytree(classifier, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        ClassifierScorer(str(broken), ["toxic"], 3)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded as a classifier"):
        ClassifierScorer(str(broken), ["toxic"], 3)


def test_a_long_reply_is_cut_at_the_positions_of_roberta(tmp_path):
    """Of 34 positions two are before the first token."""
    config = XLMRobertaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=34, id2label={0: "neutral", 1: "toxic"}, label2id={"neutral": 0, "toxic": 1},
    )  # fmt: skip
    XLMRobertaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(300, None).save_pretrained(tmp_path)
    assert positions_of(config) == 32
    (score,) = ClassifierScorer(str(tmp_path), ["toxic"], 3).score(
        exchanges(["long " * 100]), ALONE
    )
    assert 0 <= score.value <= 1
