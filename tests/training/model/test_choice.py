"""The attention that `auto` chooses is the fastest that keeps documents apart, and what else it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.attention import check_attention, document_attention
from cpt_merge.training.model.build import CausalLM, build_from, build_model
from cpt_merge.training.model.small import small_config, small_decoder
from tests.training.conftest import CONFIG
from tests.training.families import FAMILIES, HYBRIDS, LEAKING, SIZES, make_family


def built(folder: Path, **changes: Any) -> CausalLM:
    return build_model(folder, TrainingConfig(**{**CONFIG, **changes}))


def leaking_function(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "documents", wrong)


@pytest.mark.parametrize(
    ("family", "attention", "reasons"),
    [
        ("llama", "flash", []),
        ("gemma2", "eager", ["flash does not fit", "sdpa"]),  # caps its scores
        ("stablelm", "sdpa", ["flash does not fit"]),
        ("falcon", "sdpa", ["cannot be built with attention: flash"]),
        ("opt", "flash", []),
    ],
)
def test_the_fastest_attention_that_fits_is_chosen(
    family: str, attention: str, reasons: list[str], tmp_path: Path
) -> None:
    make_family(tmp_path, family, tied=False)
    choice = built(tmp_path).choice
    assert choice.attention == attention
    assert len(choice.passed_over) == len(reasons)
    assert all(reason in why for reason, why in zip(reasons, choice.passed_over, strict=True))


def test_an_attention_that_the_recipe_insists_on_is_used_or_refused(tmp_path: Path) -> None:
    make_family(tmp_path, "gemma2", tied=False)
    assert built(tmp_path, attention="eager").choice.attention == "eager"
    for attention in ("flash", "sdpa"):
        with pytest.raises(UserError, match=f"attention: {attention}"):
            built(tmp_path, attention=attention)


def _unfaithful(forward: Any) -> Any:
    """Attention whose output is right and whose gradient reaches the tokens before a document."""

    class Leaking(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, hidden: Tensor) -> Tensor:
            return hidden.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient + gradient.mean(1, keepdim=True)

    def attention(layer: Any, query: Any, *others: Any, **names: Any) -> Any:
        out, weights = forward(layer, query, *others, **names)
        return Leaking.apply(out), weights

    return attention


def test_an_attention_that_leaks_in_the_gradient_only_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path, "llama", tied=False)
    leaking_function(monkeypatch, _unfaithful(document_attention))
    choice = built(tmp_path).choice
    assert choice.attention == "sdpa"
    assert "flash lets a document see" in choice.passed_over[0]
    with pytest.raises(UserError, match="attention: flash lets a document see"):
        built(tmp_path, attention="flash")


def test_an_attention_that_takes_a_document_for_another_one_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing leaks if every token sees itself only, but those are not the document's values."""
    make_family(tmp_path, "llama", tied=False)

    def blind(layer: Any, query: Any, key: Any, value: Any, mask: Any, **names: Any) -> Any:
        if query.shape[2] == 8:  # a document alone
            return document_attention(layer, query, key, value, mask, **names)
        return value.repeat_interleave(2, 1).transpose(1, 2), None

    leaking_function(monkeypatch, blind)
    assert "other values than it has alone" in built(tmp_path).choice.passed_over[0]


def test_a_model_that_nothing_helps_is_refused_with_every_reason(tmp_path: Path) -> None:
    make_family(tmp_path, "bloom", tied=False)
    with pytest.raises(
        UserError, match=r"packed documents: flash .*, and .* sdpa .*, and eager lets"
    ):
        built(tmp_path)


SPARSE: dict[str, Any] = {
    **SIZES, "head_dim": 16, "num_experts_per_tok": 2, "num_local_experts": 4, "rotary_dim": 8,
    "dense_intermediate_size": 48, "shared_intermediate_size": 16, "index_n_heads": 2,
    "index_head_dim": 16, "layer_types": ["full_attention", "minimax_m3_sparse"],
}  # fmt: skip


@pytest.mark.parametrize(("block", "one_by_one"), [(32, True), (128, False)])
def test_sparse_attention_that_leaks_beyond_its_budget_only(block: int, one_by_one: bool) -> None:
    """Its blocks of keys begin where the sequence does, and not the document."""
    model_config = transformers.MiniMaxM3VLTextConfig(
        **{**SPARSE, "index_block_size": block, "index_topk_blocks": 2}
    )
    config = TrainingConfig(**{**CONFIG, "sequence_length": 128, "precision": "fp32"})
    module = build_from(model_config, Path("minimax-m3"), config)
    kinds = [kind.__name__ for kind in module.choice.separation.one_by_one]
    assert kinds == (["MiniMaxM3VLAttention"] if one_by_one else [])
    torch.manual_seed(0)
    for part in module.model.modules():  # buffers have their values, which `to_empty` would lose
        for name, parameter in part.named_parameters(recurse=False):
            values = torch.nn.init.normal_(torch.empty(parameter.shape), std=0.3)
            setattr(part, name, torch.nn.Parameter(values))
    check_attention(module, config, torch.device("cpu"))


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gemma3", "mixtral", "phi3", "qwen3-next", "granite-4", "falcon-h1", "jamba"),
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("nemotron-h", "zamba2")),
    ],
)
def test_a_small_model_has_every_kind_of_layer(family: str) -> None:
    """Of published sizes, and not only of the tests' own."""
    name = {**FAMILIES, **HYBRIDS, **LEAKING}[family][0]
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)())
    config = small_config(model.get_decoder(), 4096)
    assert config is not None, "no small model"
    small = small_decoder(config, "eager")
    assert sum(parameter.numel() for parameter in small.parameters()) < 30e6
    kinds = [{type(part) for part in one.modules()} for one in (model.get_decoder(), small)]
    assert kinds[0] == kinds[1]
