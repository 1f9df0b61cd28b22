"""One model on a GPU, with every attention and recomputation, against float32 on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from cpt_merge.data.packing import IGNORED, Batch
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.attention import _by_document, _by_kernel, check_attention
from cpt_merge.training.model.build import CausalLM, build_model, load_weights, prepare_layers
from cpt_merge.training.model.loss import Head, cross_entropy_sum
from tests.training.conftest import CONFIG

SIZES: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LENGTHS = [
    100,
    1,
    155,
    37,
    219,
]  # documents of two rows of 256; the third goes on in the second row as a fourth
CPU = torch.device("cpu")


def batch() -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(3, 1000, (2, 256))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).view(2, 256)
    labels = ids.roll(-1, 1)
    labels.view(-1)[torch.tensor(LENGTHS).cumsum(0) - 1] = IGNORED
    return Batch.of(ids, labels, positions)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "llama")
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).save_pretrained(folder / "window")
    return {"llama": folder / "llama", "window": folder / "window"}


def loaded(folder: Path, device: torch.device, **changes: Any) -> CausalLM:
    config = TrainingConfig(**{**CONFIG, **changes})
    module = build_model(folder, config)
    prepare_layers(module, config, torch.device("cuda"))
    load_weights(module, folder, device)
    return module


def loss_and_gradients(
    module: CausalLM, device: torch.device
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = module(batch().to(device))
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in module.named_parameters()}


def assert_close(found: Any, expected: Any, loss_error: float, gradient_error: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=loss_error)
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < gradient_error, (name, error.item())


CASES = [
    *[
        (attention, "none", compiled)
        for attention in ("flash", "sdpa", "eager")
        for compiled in (False, True)
    ],
    *[("flash", mode, compiled) for mode in ("full", "selective") for compiled in (False, True)],
    ("flex", "none", False),
    ("flex", "none", True),
]


@pytest.mark.parametrize("family", ["llama", "window"])
@pytest.mark.parametrize(("attention", "mode", "compiled"), CASES)
def test_in_bf16_loss_and_gradients_are_those_of_float32_on_a_cpu(
    attention: str,
    mode: str,
    compiled: bool,
    family: str,
    models: dict[str, Path],
    device: torch.device,
) -> None:
    torch.compiler.reset()
    expected = loss_and_gradients(loaded(models[family], CPU, attention="eager"), CPU)
    changes = {
        "precision": "pure-bf16",
        "attention": attention,
        "activation_checkpointing": mode,
        "compile": compiled,
    }
    assert_close(
        loss_and_gradients(loaded(models[family], device, **changes), device), expected, 2e-3, 3e-2
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_float32_they_are_too(
    attention: str, models: dict[str, Path], device: torch.device
) -> None:
    expected = loss_and_gradients(loaded(models["llama"], CPU, attention="eager"), CPU)
    found = loss_and_gradients(loaded(models["llama"], device, attention=attention), device)
    assert_close(found, expected, 1e-5, 1e-4)


@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager", "flex"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [256, 2048])
def test_the_check_at_start_lets_it_pass(
    length: int, attention: str, compiled: bool, models: dict[str, Path], device: torch.device
) -> None:
    torch.compiler.reset()
    changes = {
        "precision": "pure-bf16",
        "attention": attention,
        "compile": compiled,
        "sequence_length": length,
    }
    module = loaded(models["llama"], device, **changes)
    check_attention(module, TrainingConfig(**{**CONFIG, **changes}), device)


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_computes_each_document_alone_backward_too(
    heads: int, key_value_heads: int, width: int, window: int | None, device: torch.device
) -> None:
    torch.manual_seed(0)
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = sum(LENGTHS)
    query, key, value = (
        torch.randn(tokens, n, width).bfloat16() for n in (heads, key_value_heads, key_value_heads)
    )
    upstream = torch.randn(tokens, heads, width).bfloat16()
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    there = [tensor.to(device).requires_grad_() for tensor in (query, key, value)]
    expected = _by_document(*exact, cu, None, window)
    found = _by_kernel(*there, cu.to(device), max(LENGTHS), None, window)
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    given = [found, *torch.autograd.grad(found, there, upstream.to(device))]
    for mine, theirs in zip(given, wanted, strict=True):
        assert (mine.double().cpu() - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.parametrize("chunk", [64, 1000])
def test_the_loss_in_chunks_is_the_plain_one_in_float64(chunk: int, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).bfloat16(), torch.randn(5000, 64).bfloat16()
    labels = torch.randint(0, 5000, (300,))
    labels[::7] = IGNORED
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(
        exact[0] @ exact[1].T, labels, ignore_index=IGNORED, reduction="sum"
    )
    there = [tensor.to(device).requires_grad_() for tensor in (hidden, weight)]
    loss = cross_entropy_sum(there[0], Head(there[1]), labels.to(device), chunk)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(loss, there), torch.autograd.grad(expected, exact), strict=True
    ):
        assert (mine.double().cpu() - theirs).norm() / theirs.norm() < 1e-2


def test_float8_layers_are_close(models: dict[str, Path], device: torch.device) -> None:
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no float8 matmuls")
    expected = loss_and_gradients(loaded(models["llama"], CPU, attention="eager"), CPU)
    for compiled in (False, True):
        torch.compiler.reset()
        changes = {"precision": "pure-bf16", "fp8": True, "compile": compiled}
        module = loaded(models["llama"], device, **changes)
        check_attention(module, TrainingConfig(**{**CONFIG, **changes}), device)
        assert any("Float8" in type(part).__name__ for part in module.modules())
        assert_close(loss_and_gradients(module, device), expected, 1e-2, 0.2)
