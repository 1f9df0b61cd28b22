import json

import numpy as np
import pytest

from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.errors import UserError
from cpt_merge.merge.fit import RefusedError
from cpt_merge.merge.rows import (
    Role,
    add_constituents,
    align_by_position,
    align_rows,
    check_map,
    check_rows,
    lost_tokens,
    output_tokens,
)
from tests.merge.conftest import BASE_ROWS, CHAT_ROWS, CPT_ROWS, NEW, pieces_of, write_tokenizer


def align(family, rows=CPT_ROWS, new_rows="keep", with_map=True, token_map=None):
    """As `merge.plan` does it."""
    cpt, base, chat = (
        TokenizerFiles.read(path) for path in (family.tokenizer, family.base, family.chat)
    )
    map = family.vocabulary if with_map else None
    for tokenizer, count in ((cpt, rows), (base, BASE_ROWS), (chat, CHAT_ROWS)):
        check_rows(tokenizer, count)
    tokens = output_tokens(cpt, base, chat, rows, token_map or {})
    check_map(map, tokens, chat)
    problems = lost_tokens(family.tokenizer, tokens, base, chat)
    if problems:
        raise RefusedError(problems)
    alignment = align_rows(tokens, base, chat, map)
    if new_rows == "constituents":
        add_constituents(alignment, map, tokens, base, chat)
    return alignment


def add(content, token, number):
    content["added_tokens"].append({"id": number, "content": token})
    content["model"]["vocab"][token] = number


def edit_tokenizer(directory, change):
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))


def test_rows_meet_by_token(untied):
    """Chat's id 38 is <|im_start|>, CPT's id 38 is a new piece; neither gets the other's row."""
    alignment = align(untied)
    cpt, chat = pieces_of("cpt"), pieces_of("chat")
    assert chat[38] == "<|im_start|>"
    assert alignment.role[38] == Role.NEW
    assert alignment.role[cpt.index("<|im_start|>")] == Role.CHAT
    assert alignment.chat[cpt.index("<|im_start|>")] == 38
    shared = np.flatnonzero(alignment.role == Role.SHARED)
    assert [cpt[row] for row in shared] == [
        pieces_of("base")[row] for row in alignment.base[shared]
    ]
    assert [cpt[row] for row in shared] == [chat[row] for row in alignment.chat[shared]]
    assert alignment.counts() == {
        "padding": 6,
        "shared": 35,
        "new": len(NEW),
        "chat": 2,
        "unmatched": 0,
    }
    assert alignment.chat_tokens == ["<|eot|>", "<|im_start|>"]


def test_a_shuffled_vocabulary_still_meets_by_token(untied):
    def shuffle(content):
        vocabulary = content["model"]["vocab"]
        ids = np.random.default_rng(0).permutation(list(vocabulary.values())).tolist()
        content["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
        for token in content["added_tokens"]:
            token["id"] = content["model"]["vocab"].get(token["content"], token["id"])

    edit_tokenizer(untied.chat, shuffle)
    alignment = align(untied, with_map=False)
    chat = TokenizerFiles.read(untied.chat)
    for row in np.flatnonzero(alignment.role == Role.SHARED).tolist():
        assert chat.tokens[int(alignment.chat[row])] == pieces_of("cpt")[row]


def test_the_base_s_own_specials_follow_the_rule_although_the_template_names_them(untied):
    edit = json.loads((untied.chat / "tokenizer_config.json").read_text())
    edit["chat_template"] = "<s>{{ m }}</s>"
    (untied.chat / "tokenizer_config.json").write_text(json.dumps(edit))
    alignment = align(untied)
    assert alignment.role[1] == alignment.role[2] == Role.SHARED
    assert alignment.chat_tokens == [
        "<|eot|>",
        "<|im_start|>",
    ]  # eot: chat's eos in generation_config


def test_without_a_map_the_tokens_are_enough(untied):
    with_map = align(untied)
    without = align(untied, with_map=False)
    assert (with_map.role == without.role).all()
    assert (with_map.chat == without.chat).all()


def test_constituents_are_found_in_chat_by_token(untied):
    alignment = align(untied, new_rows="constituents")
    pairs = alignment.constituents[38]
    assert pairs.base.tolist() == NEW["ing"] == pairs.chat.tolist()
    assert set(alignment.constituents) == {38, 39, 40, 41, 42}


def test_an_added_token_that_chat_renamed_keeps_cpt_s_row(untied):
    def rename(content):
        for token in content["added_tokens"]:
            if token["content"] == "<|spare|>":
                token["content"] = "<|tool|>"
        content["model"]["vocab"]["<|tool|>"] = content["model"]["vocab"].pop("<|spare|>")

    for model in ("base", "chat", "tokenizer"):
        edit_tokenizer(untied.root / model, lambda content: add(content, "<|spare|>", 37))
    edit_tokenizer(untied.chat, rename)
    edit_tokenizer(untied.tokenizer, lambda content: add(content, "<|tool|>", 46))
    alignment = align(untied, with_map=False)
    assert alignment.unmatched == ["<|spare|>"]
    assert alignment.role[46] == Role.CHAT


def refused(family, *words, **more):
    with pytest.raises(UserError) as caught:
        align(family, **more)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_cannot_be_aligned_is_named(untied):
    edit_tokenizer(untied.tokenizer, lambda content: content["model"]["vocab"].pop("the"))
    refused(untied, "'the'", "extend the base's own")


def test_a_piece_that_chat_lacks_is_named(untied):
    edit_tokenizer(untied.chat, lambda content: content["model"]["vocab"].pop("the"))
    refused(untied, "'the'", str(untied.chat))


def test_a_map_of_another_chat_model_is_refused(untied):
    def move(content):
        content["added_tokens"][-1]["id"] = content["model"]["vocab"]["<|im_start|>"] = 39

    edit_tokenizer(untied.chat, move)
    refused(untied, "<|im_start|>", "make the tokenizer again")


def test_a_piece_beyond_the_matrix_is_named(untied):
    refused(untied, "'all'", "40", rows=40)


def test_the_fixture_s_base_is_the_cpt_tokenizer_s_beginning(tmp_path):
    write_tokenizer(tmp_path, "cpt")
    assert pieces_of("cpt")[: len(pieces_of("base"))] == pieces_of("base")


def test_by_position_all_rows_are_shared():
    alignment = align_by_position(5)
    assert alignment.counts()["shared"] == 5
    assert alignment.base.tolist() == alignment.chat.tolist() == [0, 1, 2, 3, 4]
