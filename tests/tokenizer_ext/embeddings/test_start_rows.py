"""Training starts from another model than the base: its rows are found by their tokens' names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.core.errors import UserError
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from tests.merge.conftest import BASE_ROWS, CPT_ROWS, Family, make_family, pieces_of

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


def resized(family: Family, start: Path, out: Path) -> dict[str, torch.Tensor]:
    resize_embeddings(EmbeddingsConfig(), family.base, family.tokenizer, out, start=start)
    return load_file(out / "model.safetensors")


def test_the_chat_model_s_weights_and_the_rows_of_its_own_tokens(
    untied: Family, tmp_path: Path
) -> None:
    weights, chat = resized(untied, untied.chat, tmp_path / "out"), untied.weights["chat"]
    token = untied.vocabulary.chat[0]
    assert token.id != token.chat_id
    for name in MATRICES:
        assert torch.equal(weights[name][:BASE_ROWS], chat[name][:BASE_ROWS])
        assert torch.equal(weights[name][token.id], chat[name][token.chat_id])
        assert len(weights[name]) == CPT_ROWS
    for name in chat.keys() - set(MATRICES):
        assert torch.equal(weights[name], chat[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == CPT_ROWS


def test_new_rows_are_made_of_the_start_s_rows_and_not_of_the_base_s(
    untied: Family, tmp_path: Path
) -> None:
    doubled = {name: values * 2 for name, values in untied.weights["base"].items()}
    shutil.copytree(untied.base, tmp_path / "start")
    save_file(doubled, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    plain = resize_embeddings(EmbeddingsConfig(), untied.base, untied.tokenizer, tmp_path / "plain")
    assert "from_start" not in plain
    before = load_file(tmp_path / "plain" / "model.safetensors")
    weights = resized(untied, tmp_path / "start", tmp_path / "out")
    for name in MATRICES:
        assert torch.allclose(weights[name].float(), 2 * before[name].float(), rtol=0.02)


def test_a_model_of_the_extended_vocabulary_is_taken_as_it_is(
    untied: Family, tmp_path: Path
) -> None:
    weights = resized(untied, untied.cpt, tmp_path / "out")
    assert all(torch.equal(weights[name], values) for name, values in untied.weights["cpt"].items())
    here, there = tmp_path / "out" / "model.safetensors", untied.cpt / "model.safetensors"
    assert here.samefile(there), "nothing changes, so nothing is copied"


def test_rows_in_another_order_are_found(tmp_path: Path) -> None:
    """The start's tokens have other ids: rows follow their names."""
    tied = make_family(tmp_path / "models", tied=True)
    order = torch.randperm(len(pieces_of("cpt")), generator=torch.Generator().manual_seed(0))
    places = {int(old): new for new, old in enumerate(order)}
    start = shutil.copytree(tied.cpt, tmp_path / "start")
    content = json.loads((start / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: places[number] for token, number in vocab.items()}
    for added in content["added_tokens"]:
        added["id"] = places[added["id"]]
    (start / "tokenizer.json").write_text(json.dumps(content))
    weights = load_file(start / "model.safetensors")
    name = MATRICES[0]
    before = weights[name].clone()
    weights[name] = torch.cat([before[order], before[len(order) :]])
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    found = resized(tied, start, tmp_path / "out")[name]
    for number, token in enumerate(pieces_of("cpt")):
        if not token.startswith("pad"):
            assert torch.equal(found[number], before[number]), token


def renamed_piece(start: Path, piece: str, name: str) -> None:
    path = start / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab[name] = vocab.pop(piece)
    content["model"]["merges"] = [
        one for one in content["model"]["merges"] if piece not in ("".join(one), *one)
    ]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("piece", "sentence"),
    [("the", "lacks 1 token of the base ('the')"), ("ing", "has 1 piece that this run's token")],
)
def test_another_vocabulary_is_refused(
    untied: Family, tmp_path: Path, piece: str, sentence: str
) -> None:
    start = shutil.copytree(untied.cpt, tmp_path / "start")
    renamed_piece(start, piece, "other")
    with pytest.raises(UserError) as error:
        resized(untied, start, tmp_path / "out")
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_with_fewer_new_pieces_gets_the_others(untied: Family, tmp_path: Path) -> None:
    """The run that made it had no `all`; its row is initialised, the others are taken."""
    start = shutil.copytree(untied.cpt, tmp_path / "start")
    path = start / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["all"]
    content["model"]["merges"] = [
        one for one in content["model"]["merges"] if "".join(one) != "all"
    ]
    path.write_text(json.dumps(content))
    weights, cpt = resized(untied, start, tmp_path / "out"), untied.weights["cpt"]
    for piece in untied.vocabulary.new:
        same = torch.equal(weights[MATRICES[0]][piece.id], cpt[MATRICES[0]][piece.id])
        assert same == (piece.piece != "all"), piece


def test_a_start_without_tokenizer_is_refused(untied: Family, tmp_path: Path) -> None:
    start = shutil.copytree(untied.cpt, tmp_path / "start")
    for file in start.glob("tokenizer*.json"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        resized(untied, start, tmp_path / "out")


def test_a_start_with_a_head_of_its_own_keeps_it(tmp_path: Path) -> None:
    tied = make_family(tmp_path / "tied", tied=True)
    other = make_family(tmp_path / "untied")
    weights = resized(tied, other.cpt, tmp_path / "out")
    assert torch.equal(weights["lm_head.weight"], other.weights["cpt"]["lm_head.weight"])
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
