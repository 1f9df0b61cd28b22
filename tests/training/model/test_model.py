"""Causal LMs of transformers with our loss: equal to transformers, loaded by rows, partly frozen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, ElectraConfig, ElectraForCausalLM

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import IGNORED
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.model.build import (
    CausalLM,
    build_model,
    decoder_layers,
    load_weights,
)
from cpt_merge.training.model.head import HeadForm, find_head_form
from cpt_merge.training.trainable import check_trainable
from tests.distributed import run_ranks
from tests.merge.test_multimodal import mllama
from tests.training.conftest import CONFIG
from tests.training.families import FAMILIES, SIZES, apart, documents, make_family

CPU = torch.device("cpu")


def loaded(folder: Path, **changes: Any) -> CausalLM:
    module = build_model(folder, TrainingConfig(**{**CONFIG, "attention": "eager", **changes}))
    load_weights(module, folder, CPU)
    return module


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradients_equal_those_of_transformers_full_logits(
    family: str, tied: bool, tmp_path: Path
) -> None:
    reference, batch = make_family(tmp_path, family, tied), documents(2)
    expected = torch.zeros(())
    for part in apart(batch):
        logits = reference(input_ids=part.input_ids, use_cache=False).logits[0].float()
        if (part.labels != IGNORED).any():
            expected = expected + F.cross_entropy(
                logits, part.labels[0], ignore_index=IGNORED, reduction="sum"
            )
    expected.backward()
    module = loaded(tmp_path)
    loss = module(batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, found), wanted in zip(
        module.model.named_parameters(), reference.parameters(), strict=True
    ):
        assert found.grad is not None
        assert wanted.grad is not None
        assert torch.allclose(
            found.grad, wanted.grad, rtol=1e-3, atol=2e-5 * float(wanted.grad.abs().max())
        ), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
def test_logits_of_one_position_of_each_row(family: str, tmp_path: Path) -> None:
    reference, batch = make_family(tmp_path, family, tied=True), documents(3, (33,))
    with torch.no_grad():
        expected = (
            reference(input_ids=batch.input_ids)
            .logits[torch.arange(3), torch.tensor([32, 5, 0])]
            .float()
        )
        found = loaded(tmp_path)(batch, last=torch.tensor([32, 5, 0]))
    assert found.shape == (3, 100)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_form_of_the_head_is_measured(tmp_path: Path) -> None:
    forms = {}
    for family in ("llama", "gemma2", "cohere", "granite"):
        make_family(tmp_path / family, family, tied=False)
        forms[family] = loaded(tmp_path / family).form
    assert forms["llama"] == HeadForm(1.0, None)
    assert forms["gemma2"] == HeadForm(1.0, 2.0)
    assert forms["cohere"].scale == pytest.approx(0.3, rel=1e-9)
    assert forms["granite"].scale == pytest.approx(1 / 6, rel=1e-9)


def test_a_head_that_is_not_of_the_formula_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    make_family(tmp_path, "llama", tied=False)
    forward = LlamaForCausalLM.forward

    def squared(self: Any, *arguments: Any, **names: Any) -> Any:
        output = forward(self, *arguments, **names)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    with pytest.raises(UserError, match="LlamaForCausalLM makes its logits in its own way"):
        loaded(tmp_path)


def test_layers_between_decoder_and_head_are_named() -> None:
    """In place of the error of a matrix product that does not fit."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ElectraConfig(vocab_size=20, embedding_size=4, hidden_size=8, is_decoder=True, **sizes)
    with pytest.raises(UserError, match="makes 8 numbers of a token and its head takes 4"):
        find_head_form(ElectraForCausalLM(config))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_decoder_layers_are_found(family: str, tmp_path: Path) -> None:
    layers = decoder_layers(make_family(tmp_path, family, tied=False))
    assert len(layers) == 2
    assert type(layers[0]) is type(layers[1])


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    model = make_family(tmp_path, "llama", tied=False)
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match="has no list of 2 decoder layers"):
        decoder_layers(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
def test_frozen_rows_get_no_gradient_and_the_others_the_same(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """gemma2 scales embeddings within the module, gpt2 adds positions later, phi's head has a bias."""
    make_family(tmp_path, family, tied)
    free, frozen = loaded(tmp_path), loaded(tmp_path)
    frozen.frozen_rows = 60
    for module in (free, frozen):
        module(documents(3)).backward()
    for (name, expected), found in zip(free.named_parameters(), frozen.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        vocabulary = found.shape[0] == 100
        if vocabulary:
            assert expected.grad[:60].any()
            assert (found.grad[:60] == 0).all(), name
        rows = slice(60 if vocabulary else 0, None)
        assert torch.allclose(found.grad[rows], expected.grad[rows], rtol=1e-5, atol=1e-7), name


def test_dropout_of_the_config_is_off_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_family(tmp_path, "gpt2", tied=True)
    module = loaded(tmp_path)
    assert "attn_pdrop" in capsys.readouterr().err
    assert module.training
    assert module(documents(2)).item() == module(documents(2)).item()


# loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_from_any_float_type(dtype: torch.dtype, tmp_path: Path) -> None:
    make_family(tmp_path, "llama", tied=False).to(dtype).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    for name, parameter in loaded(tmp_path).model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name].float()), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("precision", ["fp32", "pure-bf16"])
def test_buffers_equal_those_that_transformers_loads(
    family: str, precision: str, tmp_path: Path
) -> None:
    """Rotary frequencies and embedding scales are computed, although parameters are on meta."""
    make_family(tmp_path, family, tied=True)
    dtype = torch.bfloat16 if precision == "pure-bf16" else torch.float32
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_buffers())
    found = dict(loaded(tmp_path, precision=precision).model.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


def test_experts_that_no_memory_holds_are_built_without_values(tmp_path: Path) -> None:
    """1.1 PB for the experts of the layer, which not even an untouched allocation may have."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=4096, moe_intermediate_size=4096, num_experts=8192, num_hidden_layers=1,
        vocab_size=64, max_position_embeddings=128,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = build_model(tmp_path, TrainingConfig(**CONFIG)).model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_buffers_of_the_checkpoint_are_loaded(tmp_path: Path) -> None:
    make_family(tmp_path, "llama", tied=False)
    module = build_model(tmp_path, TrainingConfig(**CONFIG))
    module.model.model.register_buffer("correction", torch.zeros(3))
    with pytest.raises(UserError, match=r"holds model\.correction not at all"):
        load_weights(module, tmp_path, CPU)
    save_file({**load_file(tmp_path / "model.safetensors"), "model.correction": torch.arange(3.0)},
              tmp_path / "model.safetensors")  # fmt: skip
    load_weights(module, tmp_path, CPU)
    assert module.model.model.correction.tolist() == [0, 1, 2]


def test_names_that_transformers_changes_on_loading(tmp_path: Path) -> None:
    """GPT-NeoX's head is `embed_out` in files; a GPT-2 saved without its head lacks the prefix."""
    make_family(tmp_path / "neox", "gpt-neox", tied=False)
    names = loaded(tmp_path / "neox").stored_parameters()
    assert names == set(load_file(tmp_path / "neox" / "model.safetensors"))
    assert "embed_out.weight" in names
    reference = make_family(tmp_path / "gpt2", "gpt2", tied=True)
    save_file(reference.transformer.state_dict(), tmp_path / "gpt2" / "model.safetensors")
    module = loaded(tmp_path / "gpt2")
    assert "wte.weight" in module.stored_parameters()
    assert torch.equal(module.model.transformer.wte.weight, reference.transformer.wte.weight)


def test_what_the_model_lacks_or_does_not_need_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_family(tmp_path, "llama", tied=False)
    file, stored = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    save_file({**stored, "mtp.weight": torch.zeros(2)}, file)
    loaded(tmp_path)
    assert "1 tensors of" in capsys.readouterr().err
    for changed, what in ((None, "not at all"), (torch.zeros(5, 32), r"in shape \(5, 32\)")):
        rest = {name: tensor for name, tensor in stored.items() if name != "lm_head.weight"}
        save_file(rest if changed is None else {**rest, "lm_head.weight": changed}, file)
        with pytest.raises(UserError, match=f"holds lm_head.weight {what}, but the model needs"):
            loaded(tmp_path)
    save_file({**stored, "lm_head.weight": torch.zeros(100, 32, dtype=torch.int8)}, file)
    with pytest.raises(UserError, match=r"contains lm_head\.weight as I8"):
        loaded(tmp_path)


SMALL = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
HALVES = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
NOT_TRAINED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**HALVES)),
        r"\(an encoder-decoder\) is no causal language model",
    ),
    "masked": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        r"\(BertForMaskedLM\) is no causal language model",
    ),
    "vision": (
        lambda: transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
        ),
        r"\(SiglipVisionConfig\) is no causal language model",
    ),
    "cross-attention": (mllama, "layers for images alone .*; such models cannot be trained"),
}  # fmt: skip


EAGER = {**CONFIG, "attention": "eager"}


@pytest.mark.parametrize("kind", NOT_TRAINED)
def test_a_model_that_cannot_be_trained_is_refused_before_its_weights_are_read(
    kind: str, tmp_path: Path
) -> None:
    build, sentence = NOT_TRAINED[kind]
    build().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=sentence):
        check_trainable(tmp_path, TrainingConfig(**EAGER), BackendSettings(), CPU)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_that_are_trained_pass_the_same_check(family: str, tmp_path: Path) -> None:
    make_family(tmp_path, family, tied=False)
    check_trainable(tmp_path, TrainingConfig(**EAGER), BackendSettings(), device=None)


@pytest.mark.parametrize("model_type", ["t5", "of_another_library"])
def test_an_unknown_architecture_is_one_sentence(model_type: str, tmp_path: Path) -> None:
    make_family(tmp_path, "llama", tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(UserError, match=r"is no causal language model|cannot read the config.json"):
        loaded(tmp_path)


def load_sharded(
    folder: Path, shape: tuple[int, ...], names: tuple[str, ...]
) -> dict[str, list[float]]:
    """Weights and gradients of a sharded model after a backward pass, and the rows that were read."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found, read = dict[str, list[float]](), Checkpoint.read

    def counted(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Any:
        rows = read(self, name, start, stop)
        found["rows of " + name] = [len(rows)]
        return rows

    Checkpoint.read = counted  # type: ignore[method-assign]  # in this process only
    module = build_model(folder, TrainingConfig(**CONFIG))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    load_weights(module, folder, CPU)
    module.frozen_rows = 60
    module(documents(2)).backward()
    for name, parameter in module.model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.grad is not None
        found[name] = parameter.full_tensor().flatten().tolist()
        found["gradient of " + name] = parameter.grad.full_tensor().flatten().tolist()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(
    ("shape", "names", "tied"),
    [
        ((2,), ("shard",), False),
        ((1, 2), ("replicate", "shard"), True),
        pytest.param((2,), ("shard",), True, marks=pytest.mark.slow),
        pytest.param((1, 2), ("replicate", "shard"), False, marks=pytest.mark.slow),
        pytest.param((2, 1), ("replicate", "shard"), False, marks=pytest.mark.slow),
        pytest.param((2, 1), ("replicate", "shard"), True, marks=pytest.mark.slow),
    ],
)
def test_each_process_reads_its_rows(
    shape: tuple[int, ...], names: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    """Sharded, and sharded and replicated (HSDP); frozen rows are frozen in shards too."""
    make_family(tmp_path, "llama", tied)
    alone = loaded(tmp_path, attention="flash")
    alone.frozen_rows = 60
    alone(documents(2)).backward()
    for found in run_ranks(load_sharded, 2, tmp_path, shape, names):
        for name, parameter in alone.model.named_parameters():
            assert found[name] == parameter.flatten().tolist(), name
            assert found["rows of " + name] == [len(parameter) // shape[-1]], name
            assert parameter.grad is not None
            gradient = torch.tensor(found["gradient of " + name]).view_as(parameter)
            assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5), name
            if len(parameter) == 100:
                assert (gradient[:60] == 0).all(), name


@pytest.mark.parametrize(("width", "precision", "used"), [
    (20, "pure-bf16", "eager"), (24, "pure-bf16", "grouped_mm"), (20, "fp32", "grouped_mm"), (18, "fp32", "eager"),
])  # fmt: skip
def test_experts_whose_sizes_do_not_fit_grouped_matmuls_are_multiplied_one_by_one(
    width: int, precision: str, used: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_family(tmp_path, "qwen3-moe", tied=False, moe_intermediate_size=width)
    module = loaded(tmp_path, precision=precision)
    module(documents(2)).backward()
    assert module.model.config._experts_implementation == used
    assert ("experts are multiplied one by one" in capsys.readouterr().err) == (used == "eager")
