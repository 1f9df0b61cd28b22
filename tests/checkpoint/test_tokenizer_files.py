"""Tokens, roles, chat template and stop ids of a tokenizer's files."""

import json

import pytest

from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles, read_stop_ids
from cpt_merge.core.errors import UserError


@pytest.fixture
def directory(tmp_path):
    tokens = {"<|end|>": 2, "<s>": 3, "<|unused|>": 4, "\n\n": 5}  # Gemma adds runs of newlines
    added = [{"id": number, "content": token} for token, number in tokens.items()]
    content = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path


def configure(directory, **config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TokenizerFiles.read(directory)
    assert tokenizer is not None
    return tokenizer


def test_ids_and_roles(directory):
    tokenizer = configure(
        directory, bos_token={"content": "<s>"}, eos_token="<|end|>", pad_token=None
    )
    assert tokenizer.ids == {"a": 0, "b": 1, "<|end|>": 2, "<s>": 3, "<|unused|>": 4, "\n\n": 5}
    assert tokenizer.tokens[3] == "<s>"
    assert tokenizer.roles == {"bos_token": "<s>", "eos_token": "<|end|>"}


def test_the_template_comes_from_its_own_file_or_the_configuration(directory):
    assert configure(directory).chat_template is None
    assert configure(directory, chat_template="one").chat_template == "one"
    several = [{"name": "tools", "template": "two"}, {"name": "default", "template": "one"}]
    assert configure(directory, chat_template=several).chat_template == "one"
    (directory / "chat_template.jinja").write_text("own")
    assert configure(directory, chat_template="one").chat_template == "own"


def test_format_tokens_are_those_of_the_template_and_the_stop_ids(directory):
    assert configure(directory).format_tokens() == set()
    assert configure(directory, chat_template="{{ m }}<|end|>\n\n a").format_tokens() == {"<|end|>"}
    assert configure(
        directory, chat_template="{{ bos_token }}", bos_token="<s>"
    ).format_tokens() == {"<s>"}
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 99]}')
    assert configure(directory).format_tokens() == {"<|end|>"}


def test_stop_ids(tmp_path):
    assert read_stop_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert read_stop_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert read_stop_ids(tmp_path) == [8, 9]


def test_a_directory_without_a_tokenizer_and_a_damaged_one(tmp_path):
    assert TokenizerFiles.read(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        TokenizerFiles.read(tmp_path)
