"""Files that lack a tensor of the class that loads them, whatever the class is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.checkpoint.loaded import open_model
from cpt_merge.checkpoint.tensor_kinds import OTHER_MODALITIES, kind_of
from cpt_merge.checkpoint.whole_models import check_whole
from cpt_merge.core.errors import UserError
from tests.training.families import make_family
from tests.wrappers import WRAPPERS, make_wrapper

Tensors = dict[str, torch.Tensor]


def changed(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def check(folder: Path) -> None:
    check_whole(open_model(folder))


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_tensor_of_a_tower_that_is_missing_is_named_as_in_the_files(
    family: str, tmp_path: Path
) -> None:
    make_wrapper(tmp_path, family)
    check(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for kind in OTHER_MODALITIES:
        of_kind = [name for name in tensors if kind_of(name) == kind]
        for name in of_kind[:: max(len(of_kind) // 2, 1)]:
            changed(tmp_path, lambda new, name=name: (new.update(tensors), new.pop(name)))
            with pytest.raises(UserError, match=f"lacks {name} of .*random values; copy or down"):
                check(tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("gpt2", "transformer.h.0.ln_1.bias"),
        ("gpt-neox", "gpt_neox.layers.0.attention.dense.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.1.w3.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ("gpt-oss", "model.layers.0.mlp.experts.down_proj_bias"),
        ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("qwen3-next", "model.layers.0.linear_attn.A_log"),
        ("nemotron-h", "backbone.layers.0.mixer.dt_bias"),
        ("falcon-h1", "model.layers.1.mamba.conv1d.bias"),
    ],
)
def test_a_tensor_of_a_text_model(family: str, name: str, tmp_path: Path) -> None:
    make_family(tmp_path, family, tied=False)
    check(tmp_path)
    changed(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"lacks {name}[ ,].*; copy or download the model again"):
        check(tmp_path)


def test_two_experts_that_each_lack_another_part(tmp_path: Path) -> None:
    """transformers joins what is left, in which experts have parts of others."""
    make_family(tmp_path, "mixtral", tied=False)
    experts = "model.layers.0.block_sparse_moe.experts"
    changed(tmp_path, lambda t: (t.pop(f"{experts}.1.w1.weight"), t.pop(f"{experts}.2.w3.weight")))
    with pytest.raises(UserError, match=rf"lacks {experts}\.1\.w1\.weight"):
        check(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_counts_as_stored_only_if_it_is_tied(tied: bool, tmp_path: Path) -> None:
    make_family(tmp_path, "llama", tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    if tied:
        check(tmp_path)
    else:
        with pytest.raises(UserError, match="has no output head"):
            check(tmp_path)


def test_another_shape_in_a_tower(tmp_path: Path) -> None:
    make_wrapper(tmp_path, "qwen2.5-vl")
    name = next(n for n in load_file(tmp_path / "model.safetensors") if "merger.ln_q" in n)
    changed(tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(
        UserError, match=rf"holds {name} in shape \(3,\), but the model needs \(16,"
    ):
        check(tmp_path)


def test_a_config_with_another_number_of_experts(tmp_path: Path) -> None:
    make_family(tmp_path, "qwen3-moe", tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    for count, sentence in (
        (6, r"lacks model.layers.0.mlp.experts.4.*correct its config.json"),
        (2, r"together in shape \(4, .*but the model needs \(2, .* that its config.json names"),
    ):
        numbers = {"num_experts": count, "num_local_experts": count}
        (tmp_path / "config.json").write_text(json.dumps({**config, **numbers}))
        with pytest.raises(UserError, match=sentence):
            check(tmp_path)


def test_a_tensor_that_the_class_does_not_have_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_family(tmp_path, "qwen3", tied=False)
    changed(tmp_path, lambda tensors: tensors.update({"score.weight": torch.ones(1, 4)}))
    check(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "1 tensor (score.weight) unknown to Qwen3ForCausalLM stay" in said


def test_a_family_that_is_not_known_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_family(tmp_path, "llama", tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "of_tomorrow"}))
    check(tmp_path)
    assert "is not checked" in " ".join(capsys.readouterr().err.split())
