"""Training on the base's own vocabulary: the tokenizer stage keeps the tokenizer."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cpt_merge.checkpoint.vocabulary_map import ChatToken, VocabularyMap
from cpt_merge.tokenizer_ext import TokenizerConfig
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken, add_tokens
from tests.tokenizer_ext.small_tokenizers import CHAT_TEMPLATE, write_base


def keep(base: Path, chat: Path, corpus, out: Path) -> VocabularyMap:
    results = extend_tokenizer(TokenizerConfig(), base, corpus, out, chat)
    assert results["new_pieces"] == 0
    return VocabularyMap.load(out)


def test_a_tokenizer_that_lacks_nothing_is_copied(bl_base, corpus, tmp_path) -> None:
    vocabulary = keep(bl_base, bl_base, corpus, tmp_path / "out")
    rows = read_base(bl_base).rows
    assert vocabulary == VocabularyMap(rows, rows, [], [], [])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (bl_base / file).read_bytes()


def test_tokens_of_the_chat_model_get_the_free_rows_and_then_new_ones(
    bl_base, corpus, tmp_path
) -> None:
    base = read_base(bl_base)
    first = len(base.ids)
    own = [AddedToken(first + number, f"<|tool_{number}|>") for number in range(9)]
    chat = write_base(
        tmp_path / "chat", first + 9, content=add_tokens(base.content, own), eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    vocabulary = keep(bl_base, chat, corpus, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for token in own:
        assert tokenizer.convert_tokens_to_ids(token.content) == token.id
    beyond = [token for token in own if token.id >= base.rows]
    assert vocabulary.chat == [ChatToken(one.id, one.content, one.id) for one in beyond]
    assert vocabulary.rows % 64 == 0
    assert len(vocabulary.padding) == vocabulary.rows - base.rows - len(beyond)
    texts = ["Read the question.", "<|im_start|>user\nx<|im_end|>"]
    assert (
        tokenizer(texts)["input_ids"] == AutoTokenizer.from_pretrained(bl_base)(texts)["input_ids"]
    )


def test_a_base_of_another_kind_can_be_kept(bl_base, corpus, tmp_path) -> None:
    """Unigram cannot be extended, but it can be trained on."""
    pieces = [["<unk>", 0.0], *([f"▁w{number}", -float(number)] for number in range(1, 50))]
    content = json.loads((bl_base / "tokenizer.json").read_text())
    content |= {"added_tokens": [], "pre_tokenizer": None, "decoder": None}
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    base = write_base(tmp_path / "base", 50, content=content, unk_token="<unk>")
    assert keep(base, base, corpus, tmp_path / "out").rows == 50


@pytest.mark.parametrize("chat", ["sp_chat", "sp_base"])
def test_a_base_with_tokenizer_model_alone(sp_base, chat, corpus, tmp_path, request) -> None:
    folder = shutil.copytree(request.getfixturevalue(chat), tmp_path / "chat")
    vocabulary = keep(sp_base, folder, corpus, tmp_path / "out")
    before, after = map(AutoTokenizer.from_pretrained, (sp_base, tmp_path / "out"))
    assert before.get_vocab().items() <= after.get_vocab().items()
    assert len(vocabulary.chat) == (3 if chat == "sp_chat" else 0)
