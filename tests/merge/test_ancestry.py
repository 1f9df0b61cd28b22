"""Models in the wrong place are noticed by their weights and files."""

import json
import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.core.errors import UserError
from cpt_merge.merge.ancestry import pair_warnings, sample, warnings
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.plan import MergeInputs, plan

SHAPES = {
    "model.embed_tokens.weight": (40, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (128, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (40, 64),
}


def drawn(seed: int, scale: float) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def save(directory: Path, weights: dict[str, torch.Tensor], template: bool = False) -> None:
    directory.mkdir()
    save_file({name: w.bfloat16() for name, w in weights.items()}, directory / "model.safetensors")
    config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 40}
    (directory / "config.json").write_text(json.dumps(config))
    if template:
        (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


@pytest.fixture
def family(tmp_path):
    """base, its chat model (20 % away) and its CPT model (10 % away), and a stranger."""
    base, vector, change = drawn(0, 0.1), drawn(1, 0.02), drawn(2, 0.01)
    save(tmp_path / "base", base)
    save(tmp_path / "chat", {name: base[name] + vector[name] for name in base}, template=True)
    save(tmp_path / "cpt", {name: base[name] + change[name] for name in base})
    save(tmp_path / "stranger", drawn(3, 0.1))
    return tmp_path


def said(family, base, chat, cpt, **settings):
    the_plan = plan(
        MergeConfig(**settings),
        MergeInputs(cpt=family / cpt, base=family / base, chat=family / chat),
    )
    return " ".join(warnings(the_plan, sample(the_plan)))


def test_models_in_their_places_cause_no_warning(family):
    assert said(family, "base", "chat", "cpt") == ""


EXPECTED = {
    ("base", "cpt", "chat"): "cpt has a chat template and chat has none: cpt and chat are",
    ("chat", "base", "cpt"): "either base and chat are swapped, or cpt was trained from the chat",
    ("chat", "cpt", "base"): "base has a chat template and chat has none: base and chat are",
    ("cpt", "base", "chat"): "cpt has a chat template and chat has none",
    ("cpt", "chat", "base"): "either base and cpt are swapped, or chat was trained from cpt",
}


@pytest.mark.parametrize(
    "places", [p for p in permutations(["base", "chat", "cpt"]) if p[0] != "base" or p[1] != "chat"]
)
def test_every_swap_is_named(family, places):
    assert EXPECTED[places] in said(family, *places)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (("stranger", "chat", "cpt"), "base is probably not chat's ancestor"),
        (("base", "stranger", "cpt"), "base is probably not chat's ancestor"),
        (("base", "chat", "stranger"), "base is probably not the CPT model's ancestor"),
        (("base", "base", "cpt"), "chat equals base"),
    ],
)
def test_a_model_of_another_family_is_named(family, places, words):
    assert words in said(family, *places)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(100, "ratio of 100 is far beyond"), ("4 - layer", "ratio of 4"), (-1, "takes the chat")],
)
def test_a_ratio_that_nobody_chooses_on_purpose_is_named(family, ratio, words):
    assert words in said(family, "base", "chat", "cpt", ratio=ratio)


def test_the_pair_is_examined_before_there_is_a_cpt_model(family):
    assert pair_warnings(family / "base", family / "chat") == []
    assert "swapped" in pair_warnings(family / "chat", family / "base")[0]
    assert "not chat's ancestor" in pair_warnings(family / "stranger", family / "chat")[0]
    assert "chat equals base" in pair_warnings(family / "base", family / "base")[0]


def test_a_cpt_model_that_equals_base_is_noticed(family):
    assert "cpt equals base" in said(family, "base", "chat", "base")
    shutil.copytree(family / "base", family / "copy")
    assert "cpt equals base" in said(family, "base", "chat", "copy")
    weights = load_file(family / "base" / "model.safetensors")
    weights["model.embed_tokens.weight"][39, 63] += 1
    save_file(weights, family / "copy" / "model.safetensors")  # it trained a row of the vocabulary
    assert "cpt equals base" not in said(family, "base", "chat", "copy")


def test_double_precision_is_one_sentence_with_what_to_do(family):
    weights = load_file(family / "cpt" / "model.safetensors")
    doubles = {name: values.double() for name, values in weights.items()}
    save_file(doubles, family / "cpt" / "model.safetensors")
    with pytest.raises(UserError, match=r"5 tensors in cpt .* as float64; convert them") as refused:
        said(family, "base", "chat", "cpt")
    assert len(refused.value.problems) == 1


def test_a_vector_given_as_a_model_is_called_one(family):
    extract(family / "base", family / "chat", family / "vector")
    with pytest.raises(UserError, match=r"vector is a vector .* give it with --vector"):
        said(family, "base", "chat", "vector")


def test_a_tensor_that_only_the_index_lacks_is_found(family):
    shard = "model-00001-of-00001.safetensors"
    (family / "cpt" / "model.safetensors").rename(family / "cpt" / shard)
    listed = {name: shard for name in SHAPES if name != "model.norm.weight"}
    index = family / "cpt" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(UserError, match=f"norm.weight is missing in cpt .{shard} holds it: add it"):
        said(family, "base", "chat", "cpt")
