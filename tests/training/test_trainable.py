"""What the start of training would refuse is known without the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.build import check_backend
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.model import small
from cpt_merge.training.trainable import check_trainable
from tests.training.conftest import CONFIG
from tests.training.families import FAMILIES, GEMMA, SIZES, make_family

CPU = torch.device("cpu")
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**SIZES, "is_decoder": False}),
    "phi3-long": (  # its factors have the length of the model's own heads
        "Phi3Config",
        {
            **SIZES, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
            "pad_token_id": 0, "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8,
                             "long_factor": [1.0] * 8},
        },
    ),
    "gemma2-uncapped": (
        "Gemma2Config", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
}  # fmt: skip


def check(folder: Path, asked: BackendSettings = BackendSettings(), **changes: Any) -> None:  # noqa: B008
    check_trainable(folder, TrainingConfig(**{**CONFIG, **changes}), asked, CPU)


def make(folder: Path, family: str) -> None:
    if family not in OTHERS:
        make_family(folder, family, tied=False)
        return
    name, values = OTHERS[family]
    config = getattr(transformers, name)(**{**values, "tie_word_embeddings": False})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (family, "eager" if family == "gemma2" else "sdpa" if family == "stablelm" else "flash")
        for family in [*FAMILIES, "gemma2-uncapped"]
    ],
)
def test_a_family_that_trains_is_let_through(family: str, attention: str, tmp_path: Path) -> None:
    make(tmp_path, family)
    check(tmp_path, attention=attention)


def test_an_architecture_that_cannot_be_made_small_is_left_to_training_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "phi3-long")
    check(tmp_path, attention="sdpa")
    assert "checked when training starts" not in capsys.readouterr().err
    monkeypatch.setattr(small, "_LARGEST", 0)
    check(tmp_path, attention="sdpa")
    assert "keeps packed documents apart is checked when training starts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("llama", ""),
        ("gemma2", "attention: eager, since flash does not fit Gemma2ForCausalLM, which caps its"),
        ("gpt-oss", "attention: eager, since flash does not fit this model, whose attention needs"),
        ("stablelm", "attention: sdpa, since flash does not fit this model, whose attention does"),
        ("falcon", "packed documents: one by one in FalconAttention"),
        ("qwen3-next", "packed documents: one by one in Qwen3NextGatedDeltaNet"),
    ],
)
def test_what_was_chosen_is_reported_unless_everybody_expects_it(
    family: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, family)
    capsys.readouterr()
    check(tmp_path, attention="auto")
    said = capsys.readouterr().err
    assert line in " ".join(said.split()) if line else "attention" not in said


@pytest.mark.parametrize(
    ("family", "attention", "sentence"),
    [
        ("gemma2", "flash", "caps its attention scores; set auto"),
        ("gemma2", "sdpa", "attention: sdpa"),
        ("gpt-oss", "sdpa", "attention: sdpa"),
        ("stablelm", "flash", "does not pass on where documents begin"),
        ("bloom", "eager", "lets a document see the document before it in this model"),
        ("bert", "eager", "such models cannot be trained"),
        ("llama", "flex", "flex trains on GPUs only"),
    ],
)
def test_attention_that_a_model_does_not_support(
    family: str, attention: str, sentence: str, tmp_path: Path
) -> None:
    make(tmp_path, family)
    with pytest.raises(UserError, match=sentence):
        check(tmp_path, attention=attention)


def test_sinks_do_not_fit_flash(tmp_path: Path) -> None:
    make(tmp_path, "gpt-oss")
    with pytest.raises(UserError, match=r"needs s_aux; set auto|cannot be trained"):
        check(tmp_path, attention="flash")


def test_an_architecture_that_transformers_does_not_contain(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    stranger = {"model_type": "nonsense", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **stranger}))
    with pytest.raises(UserError, match="transformers cannot read the config"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "sentence"),
    [
        (
            "llama",
            lambda weights: weights.pop("model.norm.weight"),
            r"model\.norm\.weight not at all",
        ),
        (
            "qwen3-moe",
            lambda weights: weights.pop("model.layers.1.mlp.gate.weight"),
            r"model\.layers\.1\.mlp\.gate\.weight not at all",
        ),
        (
            "qwen3-moe",
            lambda weights: weights.pop("model.layers.1.mlp.experts.2.down_proj.weight"),
            r"as 3 tensors \(model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight, \.\.\.\), together "
            r"in shape \(3, 32, 16\), but the model needs \(4, 32, 16\)",
        ),
        (
            "qwen3-moe",
            lambda weights: [weights.pop(name) for name in [*weights] if "gate_proj" in name],
            r"holds a part of what makes .*gate_up_proj of Qwen3MoeForCausalLM, but no .*gate_proj",
        ),
        (
            "llama",
            lambda weights: weights.update({"model.norm.weight": torch.ones(31)}),
            r"in shape \(31,\), but the model needs \(32,\)",
        ),
        (
            "deepseek-v3",
            lambda weights: weights.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
            r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias not at all",
        ),
    ],
)
def test_weights_that_do_not_fit_their_config(
    family: str, change: Any, sentence: str, tmp_path: Path
) -> None:
    make(tmp_path, family)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        check(tmp_path)


@pytest.mark.parametrize(
    ("asked", "changes", "sentence"),
    [
        ({"mixed_precision": "fp16"}, {}, "asks for mixed_precision: fp16"),
        (
            {"backend": "deepspeed", "zero_stage": 3},
            {"precision": "pure-bf16"},
            "DeepSpeed",  # which is not installed everywhere
        ),
        ({}, {"fp8": True}, "training.fp8 needs"),
        ({}, {"offload": "all"}, "training.offload: all needs FSDP2 or ZeRO 3"),
        (
            {"backend": "fsdp2", "offload": "all"},
            {"offload": "none"},
            "training.offload: none would offload nothing, but the accelerate config asks",
        ),
    ],
)
def test_backends_and_devices(
    asked: dict[str, Any], changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    make(tmp_path, "llama")
    with pytest.raises(UserError, match=sentence):
        check(tmp_path, BackendSettings(**asked), **changes)


@pytest.mark.parametrize(
    ("changes", "waiting", "refusal"),
    [
        ({"attention": "flex"}, "attention: flex", "attention: flex trains on GPUs only"),
        ({"attention": "auto", "fp8": True}, "attention: auto and fp8", "training.fp8 needs a GPU"),
        ({"attention": "sdpa"}, "attention: sdpa", ""),
    ],
)
def test_what_waits_for_the_machine_that_trains_is_said(
    changes: dict[str, Any], waiting: str, refusal: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("cpt_merge.training.model.fp8.find_spec", lambda _: object())  # torchao
    make(tmp_path, "llama")
    check_trainable(tmp_path, TrainingConfig(**{**CONFIG, **changes}), BackendSettings(), None)
    said = " ".join(capsys.readouterr().err.split())
    assert f"whether one trains with {waiting} is checked at the start" in said
    assert (f"a run on this machine would be refused: {refusal}" in said) == bool(refusal)


def test_an_order_of_weights_that_deepspeed_does_not_know_is_refused() -> None:
    pytest.importorskip("deepspeed")
    asked = BackendSettings("deepspeed", zero_stage=2, zero={"round_robin_gradients": True})
    with pytest.raises(UserError, match="asks for round_robin_gradients, with which DeepSpeed"):
        check_backend(asked, TrainingConfig(**CONFIG))


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"device": "nvme", "nvme_path": "/tmp"}, "asks for the device nvme; only the CPU's"),
        ({"device": "cpu", "ratio": 0.5}, "asks for super_offload or a ratio below 1"),
        ({"device": "cpu", "super_offload": True}, "asks for super_offload or a ratio below 1"),
        (
            {"device": "cpu", "buffer_count": -1},
            r"zero_optimization.offload_optimizer.buffer_count: -1 .Input should .*correct",
        ),
    ],
)
def test_offload_sections_that_cannot_be_active(
    section: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    asked = BackendSettings(
        "deepspeed", zero_stage=3, zero={"offload_optimizer": section}, offload="optimizer"
    )
    with pytest.raises(UserError, match=sentence):
        check_backend(asked, TrainingConfig(**CONFIG))


def test_training_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    make(tmp_path, "llama")
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
    check(tmp_path)
    with pytest.raises(UserError, match=r"training.compile needs a C\+\+ compiler"):
        check(tmp_path, compile=True)
