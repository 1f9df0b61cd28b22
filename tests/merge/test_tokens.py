"""Tokens of the chat format that CPT's tokenizer lacks.

Named, appended, mapped; and the tokenizer that comes out.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer

from cpt_merge.checkpoint.token_changes import TokenChanges, apply
from cpt_merge.checkpoint.token_ids import read_tokens
from cpt_merge.core.errors import UserError
from tests.merge.conftest import CPT_ROWS, make_family, pieces_of, save_weights, write_config
from tests.merge.test_merge_files import load, merge
from tests.merge.test_rows import edit_tokenizer
from tests.real_tokenizers import BASES

TOOL = {"content": "<|tool|>", "single_word": False, "lstrip": True, "rstrip": False,
"normalized": False,
        "special": True}  # fmt: skip


@pytest.fixture
def with_tool(untied):
    """The chat model has one token more, `<|tool|>` at 39, that CPT's tokenizer does not know."""
    add_token(untied.chat, "<|tool|>", 39)
    return untied


def add_token(directory, token, number):
    """As loaders read it: what is not in the vocabulary they number themselves."""

    def add(content):
        content["added_tokens"].append({**TOOL, "content": token, "id": number})
        content["model"]["vocab"][token] = number

    edit_tokenizer(directory, add)


def test_a_token_that_cpt_lacks_is_appended_in_a_padding_row(with_tool, tmp_path, tracker, capsys):
    merge(with_tool, tmp_path / "out", tracker)
    row = pieces_of("cpt").index("<|im_start|>") + 1
    merged, chat = load(tmp_path / "out"), with_tool.weights["chat"]
    assert len(merged["lm_head.weight"]) == CPT_ROWS
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name][row], chat[name][39])
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.token_to_id("<|tool|>") == row
    assert tokenizer.encode("in <|tool|>").ids[-1] == row
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert next(token for token in added if token["content"] == "<|tool|>")[
        "lstrip"
    ]  # as in the chat model
    assert f"<|tool|> at {row}" in capsys.readouterr().err


def test_where_no_row_is_left_the_matrices_grow(tmp_path, tracker):
    family = make_family(tmp_path / "models")
    lacking = pieces_of("cpt")[:-1]

    def remove(content):
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["content"] != "<|im_start|>"
        ]
        del content["model"]["vocab"]["<|im_start|>"]

    edit_tokenizer(family.tokenizer, remove)
    (family.tokenizer / "vocabulary_map.json").unlink()
    rows = len(lacking)
    cpt = {
        name: v[:rows] if len(v) == CPT_ROWS and "layers" not in name else v
        for name, v in family.weights["cpt"].items()
    }
    save_weights({name: values.clone() for name, values in cpt.items()}, family.cpt)
    write_config(family.cpt, rows, False)
    merge(family, tmp_path / "out", tracker, ratio=0.5)
    merged = load(tmp_path / "out")
    assert len(merged["lm_head.weight"]) == rows + 1
    assert torch.equal(merged["lm_head.weight"][rows], family.weights["chat"]["lm_head.weight"][38])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows + 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_start|>")
        == rows
    )
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape[0] == rows + 1
    )


def test_rows_that_a_growing_matrix_gets_beyond_its_tokens_hold_the_mean(tmp_path, tracker):
    family = make_family(tmp_path / "models")
    cpt = {name: torch.cat([v, v[:16]]) if len(v) == CPT_ROWS and "layers" not in name else v
           for name, v in family.weights["cpt"].items()}  # 64 rows, all with tokens  # fmt: skip
    save_weights(cpt, family.cpt)
    write_config(family.cpt, 64, False)
    used = len(pieces_of("cpt"))

    def fill(content):
        content["model"]["vocab"] |= {f"filler{number}": number for number in range(used, 64)}

    edit_tokenizer(family.tokenizer, fill)
    add_token(family.chat, "<|tool|>", 39)
    (family.tokenizer / "vocabulary_map.json").unlink()
    merge(family, tmp_path / "out", tracker)
    merged = load(tmp_path / "out")["lm_head.weight"]
    assert len(merged) == 128
    assert torch.equal(merged[64], family.weights["chat"]["lm_head.weight"][39])
    mean = cpt["lm_head.weight"].double().mean(0).float().bfloat16()
    assert all(torch.equal(row, mean) for row in merged[65:])


def reserve(family, token, row, models):
    for model in models:
        add_token(family.root / model, token, row)


def test_a_reserved_token_that_chat_gave_a_name_gets_it_in_cpt_too(
    untied, tmp_path, tracker, capsys
):
    reserve(untied, "<|reserved_7|>", 36, ["base", "tokenizer"])
    reserve(untied, "<|tool|>", 36, ["chat"])
    merge(untied, tmp_path / "out", tracker)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.token_to_id("<|tool|>") == 36
    assert tokenizer.token_to_id("<|reserved_7|>") is None
    assert torch.equal(
        load(tmp_path / "out")["lm_head.weight"][36], untied.weights["chat"]["lm_head.weight"][36]
    )
    assert "<|reserved_7|> -> <|tool|>" in capsys.readouterr().err


def test_a_token_that_the_recipe_maps(with_tool, tmp_path, tracker):
    reserve(with_tool, "<|reserved_9|>", 46, ["tokenizer"])
    merge(with_tool, tmp_path / "out", tracker, token_map={"<|tool|>": "<|reserved_9|>"})
    assert (
        Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).token_to_id("<|tool|>") == 46
    )
    assert torch.equal(
        load(tmp_path / "out")["lm_head.weight"][46],
        with_tool.weights["chat"]["lm_head.weight"][39],
    )


@pytest.mark.parametrize(
    ("token_map", "word"),
    [
        ({"<|none|>": "<unk>"}, "no such special token"),
        ({"<|im_start|>": "<unk>"}, "has '<|im_start|>' already"),
        ({"<|tool|>": "the"}, "no special token 'the'"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(with_tool, tmp_path, tracker, token_map, word):
    with pytest.raises(UserError) as caught:
        merge(with_tool, tmp_path / "out", tracker, token_map=token_map)
    assert word in str(caught.value)


def test_a_tokenizer_without_tokenizer_json_lists_its_added_tokens(tmp_path):
    BASES["mistral"](tmp_path)  # a real SentencePiece model
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.model").is_file()
    apply(TokenChanges({"<|new|>": 32_000}), tmp_path, tmp_path)
    assert read_tokens(tmp_path).ids["<|new|>"] == 32_000
    assert json.loads((tmp_path / "added_tokens.json").read_text())["<|new|>"] == 32_000
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"]["32000"]["content"] == "<|new|>"


def test_a_reserved_token_that_all_three_have_can_be_mapped(with_tool, tmp_path, tracker):
    """As in Llama 3: the reserved token stays in base and chat, CPT's becomes the chat token."""
    for model in ("base", "chat", "tokenizer"):
        add_token(with_tool.root / model, "<|reserved_5|>", 36)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = with_tool.tokenizer / file
        settings = json.loads(path.read_text()) if path.is_file() else {}
        settings |= {"pad_token": "<|reserved_5|>", "additional_special_tokens": ["<|reserved_5|>"]}
        path.write_text(json.dumps(settings))
    merge(with_tool, tmp_path / "out", tracker, token_map={"<|tool|>": "<|reserved_5|>"})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<|tool|>") == 36
    assert tokenizer.pad_token_id == 36
    assert len(tokenizer) <= CPT_ROWS  # nothing was added anew under an old name
    for row in (36,):
        assert torch.equal(
            load(tmp_path / "out")["lm_head.weight"][row],
            with_tool.weights["chat"]["lm_head.weight"][39],
        )


def test_an_added_token_that_loaders_number_otherwise_is_refused(untied, tmp_path, tracker):
    edit_tokenizer(untied.chat, lambda content: content["added_tokens"].append({"id": 39, **TOOL}))
    edit_tokenizer(untied.chat, lambda content: content["model"]["vocab"].update(filler=37))
    edit_tokenizer(untied.chat, lambda content: content["added_tokens"][-1].update(id=45))
    loaded = Tokenizer.from_file(str(untied.chat / "tokenizer.json")).token_to_id("<|tool|>")
    with pytest.raises(UserError, match=rf"'<\|tool\|>' at 45, but loaders read it at {loaded}"):
        merge(untied, tmp_path / "out", tracker)
