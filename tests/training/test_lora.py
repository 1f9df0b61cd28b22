"""Training with adapters: the numbers of plain peft, any number of processes, and a merged export."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from cpt_merge.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_FILES
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.config import LoraConfig, TrainingConfig
from cpt_merge.training.distributed.frozen import AdaptedInfo, FrozenWeights, Product
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.memory import adapter_parameters
from cpt_merge.training.model.build import WeightSource, build_model
from cpt_merge.training.model.lora import Adapters, find_targets
from cpt_merge.training.saved import choose_steps, export_checkpoints, open_checkpoint
from cpt_merge.training.schedule import RateCurve
from cpt_merge.training.trainable import check_trainable
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.families import make_family
from tests.training.runs import Job, assert_same_weights, train_steps, weights
from tests.training.test_phases import (
    MATRICES,
    OLD_ROWS,
    extended_tokenizer,
    phase_model,
    train_and_keep,
)

LINEAR = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
LORA = {"lora": {"rank": 4}}


def reference_steps(model_path: Path, store: Path, lora: dict[str, Any]) -> dict[int, Any]:
    """The same in peft and torch, on one process with whole batches: loss and gradient norm."""
    from peft import LoraConfig, inject_adapter_in_model

    config = TrainingConfig(**CONFIG)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    rank = lora["rank"]
    settings = LoraConfig(
        r=rank, lora_alpha=lora.get("alpha", 2 * rank), target_modules="all-linear"
    )
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or name in ("model.embed_tokens.weight", "lm_head.weight")
        parameter.requires_grad_(trained)
        if ".lora_A." in name:
            parameter.data = Adapters().initial(name, parameter.shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    steps = {}
    rows = TrainingSequences(Store.open(store), config.sequence_length, config.seed)
    for step in range(config.steps):
        batch = rows.batch(list(range(step * 8, step * 8 + 8)))
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * RateCurve.over(0, config.steps, config.schedule).factor(
                step, config.schedule
            )
        optimizer.step()
        optimizer.zero_grad()
        steps[step + 1] = (loss.item(), norm.item())
    return steps


@pytest.mark.parametrize(
    ("backend", "size"), [("fsdp2", 2), pytest.param("fsdp2", 1, marks=pytest.mark.slow)]
)
def test_losses_are_those_of_plain_peft(
    backend: str, size: int, model: Path, store: Path, tmp_path: Path
) -> None:
    expected = reference_steps(model, store, LORA["lora"])
    found = run_ranks(train_steps, size, Job(model, store, tmp_path, LORA, backend))[0]
    for step, (loss, norm) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5)
        assert found[step][1] == pytest.approx(norm, rel=1e-4)


GROUPS = [
    ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3", 3),
]  # fmt: skip
UNEVEN = {"lora": {"rank": 5}, "global_batch_size": 12, "tokens": 32 * 12 * 8}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "size"), GROUPS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_processes_trains_the_same_and_resumes_exactly(
    backend: str, size: int, precision: str, model: Path, store: Path, tmp_path: Path
) -> None:
    changes = {**UNEVEN, "precision": precision}
    alone = run_ranks(train_steps, 1, Job(model, store, tmp_path / "one", changes))[0]
    job = Job(model, store, tmp_path / "whole", changes, backend)
    together = run_ranks(train_steps, size, job)[0]
    for step, (loss, _) in alone.items():
        assert together[step][0] == pytest.approx(loss, rel=2e-4 if precision == "fp32" else 1e-2)
    job.out, job.stop_after = tmp_path / "parts", 5
    first = run_ranks(train_steps, size, job)[0]
    job.stop_after = 0
    second = run_ranks(train_steps, size, job)[0]
    assert {**first, **second} == together
    assert len(second) < len(together)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    checkpoints = choose_steps(job.out / "checkpoints", None, None)
    export_checkpoints(job.config, model, model, checkpoints, tmp_path / "cpt")
    assert_same_weights(tmp_path / "whole", tmp_path)


@pytest.mark.parametrize(
    ("backend", "size"),
    [("fsdp2", 2), pytest.param("zero2", 2, marks=pytest.mark.slow),
     pytest.param("zero3", 3, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_hook_merges_what_the_files_would(
    backend: str, size: int, model: Path, chat_model: Path, store: Path, tmp_path: Path
) -> None:
    changes = {**UNEVEN, "tokens": 32 * 12 * 3}
    inputs = MergeInputs(model, model, chat_model, model)
    job = Job(model, store, tmp_path / "run", changes, backend, hook=inputs)
    run_ranks(train_steps, size, job)
    of_files = replace(inputs, cpt=job.out / "cpt")  # float32, so nothing is rounded before
    merge_directories(MergeConfig(), of_files, tmp_path / "files", Tracker())
    found, expected = (
        load_file(one / "model.safetensors") for one in (job.out / "merged", tmp_path / "files")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    start, trained = load_file(model / "model.safetensors"), weights(job.out)
    moved = {name for name, values in start.items() if not torch.equal(trained[name], values)}
    assert moved == {name for name in start if "norm" not in name}


def adapter_of(out: Path, base: Path, step: int) -> Path:
    """The adapters of a checkpoint, with embedding and head, in peft's format."""
    [checkpoint] = choose_steps(out / "checkpoints", step, None)
    read, tensors = open_checkpoint(checkpoint), {}
    for layer, name in itertools.product(range(2), LINEAR):
        for part in "AB":
            path = f"model.layers.{layer}.{name}.lora_{part}"
            tensors[f"base_model.model.{path}.weight"] = read(f"model.{path}.default.weight")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = read(f"model.{name}.weight")
    folder = out / "adapter"
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / ADAPTER_FILES[0])
    settings = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "target_modules": list(LINEAR),
                "base_model_name_or_path": str(base)}  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings))
    return folder


def test_the_export_has_the_bits_of_the_adapter_in_pefts_format(
    model: Path, store: Path, tmp_path: Path
) -> None:
    job = Job(model, store, tmp_path, {**UNEVEN, "tokens": 32 * 12 * 4})
    run_ranks(train_steps, 1, job)
    adapted, exported = Checkpoint.open(adapter_of(tmp_path, model, 4)), weights(tmp_path)
    for name, values in exported.items():
        assert torch.equal(torch.from_numpy(adapted.read_float32(name)), values), name


def test_an_adapter_that_adds_nothing_changes_no_bit(model: Path) -> None:
    """-0.0 + 0.0 is 0.0, so a sum would."""
    module = build_model(model, TrainingConfig(**CONFIG))
    source = WeightSource.open(module, model, torch.device("cpu"))
    module.add_adapters(LoraConfig(rank=3), 0)
    files = Checkpoint.open(model)
    factors = dict(module.model.named_parameters())

    def first(name: str) -> torch.Tensor:
        return module.adapters.initial(name, factors[name].shape)

    merged = FrozenWeights.of(module, source.checkpoint, first, torch.device("cpu")).files
    name = "model.layers.1.mlp.up_proj.weight"
    assert merged.info(name) != files.info(name)
    assert (merged.read_float32(name).view("i4") == files.read(name).view("i4")).all()
    product = Product(torch.zeros(2, 3), torch.ones(3, 4), 2.0, torch.device("cpu"))
    zeros = AdaptedInfo.of(TensorInfo("w", "F32", (2, 4), "", 0, 32), product)
    minus = np.full(8, -0.0, np.float32)
    assert (zeros.rows(lambda *_: minus, 0, 2).view("i4") == minus.view("i4").reshape(2, 4)).all()


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            ["q_prj"],
            r'q_prj is no linear layer .* \(did you mean "q_proj"\?\); they have .*up_proj',
        ),
        (["mlp.q_proj"], r"mlp.q_proj is no linear layer"),
        (["lm_head"], r"lm_head is no linear layer of the decoder layers"),
        (["proj"], r"proj is no linear layer"),
    ],
)
def test_targets_that_do_not_exist_are_refused_before_the_training(
    targets: list[str], sentence: str, model: Path
) -> None:
    config = TrainingConfig(**CONFIG, lora={"targets": targets})
    with pytest.raises(UserError, match=sentence):
        check_trainable(model, config, BackendSettings(), torch.device("cpu"))


def test_targets_are_names_or_ends_of_names(model: Path) -> None:
    module = build_model(model, TrainingConfig(**CONFIG))
    targets = ["q_proj", "mlp.down_proj", "layers.1.self_attn.o_proj"]
    found = find_targets(module.model, module.layers, LoraConfig(targets=targets))
    assert sorted(found) == sorted(
        ["0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.down_proj",
         "1.self_attn.o_proj"]
    )  # fmt: skip


def test_peft_that_is_missing_is_one_sentence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_merge.training.model.lora.find_spec", lambda name: None)
    config = TrainingConfig(**CONFIG, lora={})
    with pytest.raises(UserError, match=r"needs peft, .* pip install .*\[lora\]"):
        check_trainable(model, config, BackendSettings(), torch.device("cpu"))


def test_adapters_change_the_identity_of_a_run_and_nothing_else_does() -> None:
    plain, four = TrainingConfig(**CONFIG), TrainingConfig(**CONFIG, lora={"rank": 4})
    assert "lora" not in plain.identity()
    assert four.identity() != plain.identity()
    assert four.identity() != TrainingConfig(**CONFIG, lora={"rank": 5}).identity()


@pytest.mark.parametrize("lora_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_checkpoint_of_the_other_kind_of_training_is_refused(
    lora_first: bool, model: Path, store: Path, tmp_path: Path
) -> None:
    """The launcher gives such a run another key; here, both have the same one."""
    changes = ({**LORA, "tokens": 32 * 8 * 4}, {"tokens": 32 * 8 * 4})
    first, second = changes if lora_first else changes[::-1]
    run_ranks(train_steps, 1, Job(model, store, tmp_path, first))
    with pytest.raises(
        AssertionError, match=r"was written by torch.* and cannot be loaded by torch"
    ):
        run_ranks(train_steps, 1, Job(model, store, tmp_path, second))


PHASES = [
    {"train": "new_rows", "tokens": 4 * 256},
    {"train": "vocabulary", "tokens": 4 * 256},
    {"train": "all"},
]


def test_only_the_last_phase_trains_adapters() -> None:
    with pytest.raises(ValueError, match="only the last of `phases` may train `all`"):
        TrainingConfig(
            **CONFIG,
            lora={},
            phases=[{"train": "all", "tokens": 256}, PHASES[1] | {"tokens": None}],
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "backend", "size"),
    [("bf16", "fsdp2", 1), ("fp32", "fsdp2", 2), ("bf16", "zero2", 2), ("bf16", "zero3", 2)],
)
@pytest.mark.parametrize("tied", [False, True])
def test_phases_freeze_what_they_do_not_train_and_resume(
    precision: str, backend: str, size: int, tied: bool, model: Path, tied_model: Path, store: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    chosen = tied_model if tied else model
    tokenizer = extended_tokenizer(chosen, tmp_path)
    changes = {**LORA, "phases": PHASES, "precision": precision}
    job = Job(chosen, store, tmp_path / "run", changes, backend, tokenizer=tokenizer)
    whole = run_ranks(train_and_keep, size, job)[0]
    start = load_file(chosen / "model.safetensors")
    first, second, last = phase_model(job.out, 1), phase_model(job.out, 2), weights(job.out)
    for name, before in start.items():
        if name not in MATRICES:
            assert torch.equal(first[name], before), name
            assert torch.equal(second[name], before), name
            assert torch.equal(last[name], before) == ("norm" in name), name
        else:
            assert torch.equal(first[name][:OLD_ROWS], before[:OLD_ROWS])
            assert not torch.equal(second[name], first[name])
            assert not torch.equal(last[name], second[name])
    for stop_after in (6, 10):
        job.out, job.stop_after = tmp_path / f"parts-{stop_after}", stop_after
        parts = run_ranks(train_and_keep, size, job)[0]
        job.stop_after = 0
        assert {**parts, **run_ranks(train_and_keep, size, job)[0]} == whole
        assert_same_weights(tmp_path / "run", job.out)


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gpt-neox", "mixtral", "deepseek-v3", "qwen3.5"]
)
def test_adapters_are_counted_by_the_shapes_of_files(family: str, tmp_path: Path) -> None:
    make_family(tmp_path, family, tied=False)
    module = build_model(tmp_path, TrainingConfig(**CONFIG))
    WeightSource.open(module, tmp_path, torch.device("cpu"))  # finds the names
    config = LoraConfig(rank=3)
    module.add_adapters(config, 0)
    parameters = dict(module.model.named_parameters())
    built = sum(parameters[name].numel() for name in module.adapters.factors)
    shapes = {name: info.shape for name, info in Checkpoint.open(tmp_path).tensors.items()}
    assert adapter_parameters(shapes, config) == built


def test_layers_that_are_not_called_get_no_adapter(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of `dt_proj` itself, so an adapter there would do nothing."""
    settings = MambaConfig(
        vocab_size=100, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0
    )
    MambaForCausalLM(settings).save_pretrained(tmp_path)
    module = build_model(tmp_path, TrainingConfig(**CONFIG))
    found = find_targets(module.model, module.layers, LoraConfig())
    assert {name.rpartition(".")[2] for name in found} == {"in_proj", "x_proj", "out_proj"}
    with pytest.raises(UserError, match="dt_proj can have no adapter, because the family's code"):
        find_targets(module.model, module.layers, LoraConfig(targets=["dt_proj"]))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "size"), [("fsdp2", 2), ("zero2", 2)])
def test_an_average_is_the_mean_of_the_merged_models(
    backend: str, size: int, model: Path, store: Path, tmp_path: Path
) -> None:
    job = Job(model, store, tmp_path, {**UNEVEN, "tokens": 32 * 12 * 8}, backend)
    run_ranks(train_steps, size, job)
    for name, step, average in (("4", 4, None), ("8", 8, None), ("mean", None, "4..8")):
        checkpoints = choose_steps(job.out / "checkpoints", step, average)
        export_checkpoints(job.config, model, model, checkpoints, tmp_path / name / "cpt")
    four, eight, mean = (weights(tmp_path / name) for name in ("4", "8", "mean"))
    for name, values in mean.items():
        expected = (four[name].double() + eight[name].double()) / 2
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(four[name], eight[name]) == ("norm" in name)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ([""], "`targets` = ['']: \"\" is not a name; remove it"),
        ([" q_proj"], '" q_proj" is not a name; remove it, or its spaces'),
        (["q_proj", "v_proj", "q_proj"], '"q_proj" occurs twice; remove one of them'),
    ],
)
def test_targets_that_nobody_means(targets: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_section(LoraConfig, {"targets": targets}, "recipe")
    assert sentence in str(refused.value)
