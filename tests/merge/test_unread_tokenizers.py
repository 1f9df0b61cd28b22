"""Tokenizers that only transformers can read are refused, and its conversion of them is merged."""

import json
import shutil

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.plan import MergeInputs, plan
from tests.merge.conftest import make_family

FILES = (
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "qwen.tiktoken", "tokenizer.model.v3", "source.spm", "tokenization_own.py",
)  # fmt: skip


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path / "models")


def inputs(family):
    return MergeInputs(family.cpt, family.base, family.chat, family.tokenizer)


def change_settings(directory, **changes):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_tokenizers(family):
    """Base, chat and CPT with equally many rows, which were once aligned by position."""
    for directory in (family.cpt, family.tokenizer):
        for path in directory.glob("*token*"):
            path.unlink()
    for name in ("base", "chat"):
        shutil.rmtree(family.root / name)
        shutil.copytree(family.cpt, family.root / name)


@pytest.mark.parametrize("file", FILES)
def test_a_tokenizer_in_another_file_is_refused_by_its_name(family, tmp_path, file):
    without_tokenizers(family)
    plan(MergeConfig(), inputs(family))
    (family.chat / file).write_text("x")
    for act in (
        lambda: plan(MergeConfig(), inputs(family)),
        lambda: extract(family.base, family.chat, tmp_path / "vector"),
    ):
        with pytest.raises(UserError, match=f"but only {file}; .*AutoTokenizer"):
            act()


def test_settings_that_name_a_class_are_a_tokenizer(family):
    without_tokenizers(family)
    settings = family.base / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    plan(MergeConfig(), inputs(family))
    settings.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(UserError, match=r"base.*but only tokenizer_config\.json;"):
        plan(MergeConfig(), inputs(family))


@pytest.mark.parametrize(
    "named",
    [
        {"additional_special_tokens": ["<|a|>", "<|b|>"]},
        {"extra_special_tokens": {"a_token": "<|a|>", "b_token": {"content": "<|b|>"}}},
        {"pad_token": "<|a|>", "eos_token": "<|b|>"},
    ],
)
def test_tokens_that_only_the_chat_model_s_settings_name(family, tmp_path, named):
    change_settings(family.chat, **named)
    with pytest.raises(UserError, match=r"chat, tokenizer_config\.json names .*<\|.\|>.*AutoTok"):
        plan(MergeConfig(), inputs(family))
    with pytest.raises(UserError, match=r"names .*<\|.\|>"):
        extract(family.base, family.chat, tmp_path / "vector")


def test_the_map_of_special_tokens_counts_as_well(family):
    content = {"additional_special_tokens": ["<|a|>"]}
    (family.chat / "special_tokens_map.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"special_tokens_map\.json names <\|a\|>"):
        plan(MergeConfig(), inputs(family))


def test_a_token_of_cpt_s_settings_with_a_row_is_refused(family):
    change_settings(family.tokenizer, pad_token="<|a|>")
    with pytest.raises(UserError, match=r"tokenizer_config\.json names <\|a\|>"):
        plan(MergeConfig(), inputs(family))
