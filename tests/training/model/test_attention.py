"""Packed documents do not see each other, in every attention and family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.attention import (  # fmt: skip
    _by_document,
    _by_mask,
    _two_documents,
    check_attention,
    describe_attention,
    document_attention,
)
from cpt_merge.training.model.build import CausalLM, build_model, load_weights
from tests.training.conftest import CONFIG
from tests.training.families import apart, documents, make_family

CPU = torch.device("cpu")


def loaded(folder: Path, attention: str, **changes: Any) -> CausalLM:
    module = build_model(folder, TrainingConfig(**{**CONFIG, "attention": attention, **changes}))
    load_weights(module, folder, CPU)
    return module


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
def test_packed_documents_cost_what_they_cost_alone(
    attention: str, family: str, rows: int, tmp_path: Path
) -> None:
    """Grouped heads (llama), sliding windows shorter than a document (mistral, gemma3), full (gpt2)."""
    make_family(tmp_path, family, tied=rows == 2)
    module = loaded(tmp_path, attention)
    with torch.no_grad():
        together = module(documents(rows))
        alone = sum(float(module(part)) for part in apart(documents(rows)))
    assert together.item() == pytest.approx(alone, rel=1e-6)


def test_the_gradients_are_those_of_documents_alone(tmp_path: Path) -> None:
    make_family(tmp_path, "mistral", tied=False)
    packed, alone = loaded(tmp_path, "flash"), loaded(tmp_path, "eager")
    packed(documents(3)).backward()
    for part in apart(documents(3)):
        alone(part).backward()
    for (name, a), b in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(b.grad.abs().max())), (
            name
        )


@pytest.mark.parametrize("window", [None, 5])
def test_by_mask_equals_by_document(window: int | None) -> None:
    batch = documents(3)
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 33, 8) for heads in (4, 2, 2))
    flat = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    expected = _by_document(*flat, batch.cu_seqlens, None, window).unflatten(0, (3, 33))
    found = _by_mask(query, key, value, batch.cu_seqlens, None, window)
    assert torch.allclose(found, expected, atol=1e-6)


def test_short_documents_in_bf16_attend_in_fp32_on_a_cpu() -> None:
    batch = documents(3)
    torch.manual_seed(0)
    flat = [torch.randn(3 * 33, heads, 8).bfloat16() for heads in (4, 2, 2)]
    exact = _by_document(*(one.float() for one in flat), batch.cu_seqlens, None, None)
    assert torch.equal(_by_document(*flat, batch.cu_seqlens, None, None), exact.bfloat16())


def test_flash_makes_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family(tmp_path, "gemma3", tied=True)
    module, masks = loaded(tmp_path, "flash"), list[Any]()
    asked = module.model.config._attn_implementation

    def seeing(layer: Any, query: Any, key: Any, value: Any, mask: Any, **names: Any) -> Any:
        masks.append(mask)
        return document_attention(layer, query, key, value, mask, **names)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, asked, seeing)
    module(documents(2))
    assert masks == [None, None]


@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "phi3"])
def test_a_model_that_keeps_documents_apart_passes_the_check(
    attention: str, family: str, tmp_path: Path
) -> None:
    make_family(tmp_path, family, tied=False)
    module = loaded(tmp_path, attention)
    check_attention(module, TrainingConfig(**{**CONFIG, "attention": attention}), CPU)


def test_a_model_in_which_documents_see_each_other_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path, "llama", tied=False)
    module = loaded(tmp_path, "flash")
    for kind, what in (("leaking", "the document before it"), ("looking ahead", "later tokens")):

        def wrong(
            layer: Any, query: Any, key: Any, value: Any, mask: Any, kind: str = kind, **names: Any
        ) -> Any:
            causal = kind == "leaking"
            key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
            halves = [
                tensor if causal else tensor.unflatten(2, (4, 8)) for tensor in (query, key, value)
            ]
            out = torch.nn.functional.scaled_dot_product_attention(*halves, is_causal=causal)
            return (out if causal else out.flatten(2, 3)).transpose(1, 2), None

        monkeypatch.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping, module.model.config._attn_implementation, wrong
        )
        with pytest.raises(UserError, match=f"lets a document see {what}"):
            check_attention(module, TrainingConfig(**{**CONFIG, "attention": "flash"}), CPU)


def test_the_check_looks_at_the_second_document_only() -> None:
    batch = _two_documents(rows=2, length=24)
    assert batch.cu_seqlens.tolist() == [0, 16, 24, 40, 48]
    assert (batch.labels != -100).nonzero()[:, 1].tolist() == [*range(16, 22)] * 2


@pytest.mark.parametrize(
    ("family", "attention", "sentence"),
    [
        ("gemma2", "flash", "caps its attention scores; set auto"),
        ("gemma2", "sdpa", "attention: sdpa"),
        ("stablelm", "flash", "does not pass on where documents begin; set auto"),
        ("llama", "flex", "trains on GPUs only"),
        ("falcon", "flash", "it has no such attention"),
        ("bloom", "eager", "lets a document see the document before it in this model"),
    ],
)
def test_what_does_not_fit_a_model_is_one_sentence(
    family: str, attention: str, sentence: str, tmp_path: Path
) -> None:
    make_family(tmp_path, family, tied=False)
    with pytest.raises(UserError, match=sentence):
        check_attention(
            loaded(tmp_path, attention), TrainingConfig(**{**CONFIG, "attention": attention}), CPU
        )


def test_the_startup_summary_says_what_runs_on_a_cpu() -> None:
    lines = [
        describe_attention(name, TrainingConfig(**{**CONFIG, **settings}), CPU)
        for name, settings in (
            ("sdpa", {}),
            ("flash", {"precision": "fp32"}),
            ("flash", {"precision": "bf16"}),
            ("flash", {"compile": True}),
        )
    ]
    assert lines == [
        "sdpa",
        "flash (on a CPU: sdpa per document)",
        "flash (on a CPU: sdpa per document, in fp32 below 512 tokens)",
        "flash (on a CPU and compiled: sdpa with a mask)",
    ]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch's flex_attention has no backward pass on a CPU"
)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_flex_packed_documents_cost_what_they_cost_alone(rows: int, tmp_path: Path) -> None:
    make_family(tmp_path, "llama", tied=False)
    device = torch.device("cuda")
    module = loaded(tmp_path, "flex").to(device)
    alone = sum(float(module(part.to(device))) for part in apart(documents(rows)))
    assert module(documents(rows).to(device)).item() == pytest.approx(alone, rel=1e-4)
