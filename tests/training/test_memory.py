"""The estimate against a real model: parameters, gradients and optimizer exactly, activations nearly."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
)

from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.training.compact_adamw import CompactAdamW
from cpt_merge.training.config import LoraConfig, TrainingConfig
from cpt_merge.training.distributed.compute_copy import ComputeCopy
from cpt_merge.training.memory import (
    ZERO_STRATEGIES,
    MemorySetup,
    ModelShape,
    Strategy,
    Trained,
    _cgroup_limits,
    _memory_free,
    available_memory,
    estimate_memory,
)
from cpt_merge.training.model.build import CausalLM
from cpt_merge.training.model.loss import Head, cross_entropy_sum
from tests.distributed import run_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ROWS, LENGTH = 2, 128
WHICH: dict[bool, Trained] = {False: "all", True: "vocabulary"}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "pure-bf16": torch.bfloat16}


def build(dtype: torch.dtype, tied: bool = False, attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention).train()


def shape_of(model: LlamaForCausalLM) -> ModelShape:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape.from_config(model.config.to_dict(), parameters, "the model")


def setup(
    strategy: Strategy = "fsdp2", shards: int = 1, precision: str = "bf16", **changes: Any
) -> MemorySetup:
    values = {
        "sequence_length": LENGTH,
        "micro_batch_size": ROWS,
        "micro_batches": 1,
        "loss_chunk": 64,
    }
    return MemorySetup(strategy, shards, precision, **(values | changes))


def freeze_layers(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name or "lm_head" in name)


def packed_sequences() -> dict[str, Tensor]:
    """Two documents in each sequence."""
    positions = torch.arange(LENGTH // 2).repeat(ROWS, 2)
    return {"input_ids": torch.randint(0, 512, (ROWS, LENGTH)), "position_ids": positions}


def local_bytes(tensors: Any) -> int:
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


def shard_and_step(
    precision: str, tied: bool, vocabulary_only: bool, replicas: int
) -> tuple[int, int, int]:
    """(parameters, gradients, moments) in bytes on this rank, after one step under FSDP2 or HSDP."""
    torch.distributed.init_process_group("gloo")
    world = torch.distributed.get_world_size()
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=names)
    model = build(torch.bfloat16 if precision == "pure-bf16" else torch.float32, tied)
    if vocabulary_only:
        freeze_layers(model)
    policy = MixedPrecisionPolicy(param_dtype=TYPES[precision], reduce_dtype=torch.float32)
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh if replicas > 1 else mesh["shard"], mp_policy=policy)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    model(**packed_sequences(), use_cache=False).logits.float().square().mean().backward()
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    gradients = [parameter.grad for parameter in trained]
    result = local_bytes(model.parameters()), local_bytes(gradients), local_bytes(moments)
    torch.distributed.destroy_process_group()
    return result


@pytest.mark.parametrize(
    ("precision", "tied", "vocabulary_only", "size", "replicas"),
    [
        ("bf16", True, True, 2, 1),
        pytest.param("bf16", False, False, 2, 1, marks=pytest.mark.slow),
        pytest.param("fp32", False, False, 1, 1, marks=pytest.mark.slow),
        pytest.param("pure-bf16", False, False, 2, 1, marks=pytest.mark.slow),
        pytest.param("bf16", False, False, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_divided_is_exact(
    precision: str, tied: bool, vocabulary_only: bool, size: int, replicas: int
) -> None:
    shape = shape_of(build(torch.float32, tied))
    estimate = estimate_memory(
        shape, setup("fsdp2", size // replicas, precision, trained=WHICH[vocabulary_only])
    )
    for found in run_ranks(shard_and_step, size, precision, tied, vocabulary_only, replicas):
        assert found == (estimate.parameters, estimate.gradients, estimate.optimizer)


def tensors_alive() -> int:
    gc.collect()
    alive = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not isinstance(thing, DTensor):
            alive[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(alive.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_what_its_paper_says(stage: int) -> None:
    """Rajbhandari et al., figure 1: 7.5 billion parameters on 64 devices."""
    shape = ModelShape(7_500_000_000, 50_000, 4096, 36, 1, 16_384, 32, 4096, 4096)
    strategies: dict[int, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}
    estimate = estimate_memory(shape, setup(strategies[stage], 64))
    published = {1: 31.4, 2: 16.6, 3: 1.9}[stage]
    assert (estimate.parameters + estimate.gradients + estimate.optimizer) / 1e9 == pytest.approx(
        published, abs=0.05
    )


def test_zero_has_fp32_masters_always() -> None:
    shape = shape_of(build(torch.float32))
    assert estimate_memory(shape, setup("zero2", 4, "fp32")).optimizer == 12 * shape.parameters / 4
    with pytest.raises(UserError, match="pure-bf16 is not possible with DeepSpeed"):
        estimate_memory(shape, setup("zero2", 4, "pure-bf16"))


def test_8_bit_moments_are_what_the_optimizer_stores() -> None:
    model = build(torch.float32)
    group = {"params": list(model.parameters()), "lr": 1.0, "weight_decay": 0.0}
    optimizer = CompactAdamW([group], betas=(0.9, 0.95), eps=1e-8, eight_bits=True, seed=0)
    states = [optimizer.fresh_state(parameter) for parameter in model.parameters()]
    stored = sum(value.nbytes for state in states for value in state.values())
    estimate = estimate_memory(shape_of(model), setup("fsdp2", moments="8bit"))
    # rows of 64 have scales of their own, and norms full moments
    assert estimate.optimizer == pytest.approx(stored, rel=0.06)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_what_is_offloaded_is_in_the_memory_of_the_cpu(strategy: Strategy) -> None:
    shape = shape_of(build(torch.float32))
    here, there = (
        estimate_memory(shape, setup(strategy, 2, offload=offload)) for offload in ("none", "all")
    )
    assert there.parameters == there.optimizer == here.on_host == 0
    assert there.on_host >= here.parameters + here.optimizer + here.gradients


def test_a_phase_of_a_run_with_adapters_holds_frozen_weights_in_the_compute_type() -> None:
    shape = shape_of(build(torch.float32))
    config = TrainingConfig(tokens=10**6)
    lora = TrainingConfig(tokens=10**6, lora=LoraConfig())
    plain, frozen = (
        estimate_memory(shape, MemorySetup.of(one, "fsdp2", 1, 1, "vocabulary")).parameters
        for one in (config, lora)
    )
    layers = shape.parameters - shape.vocabulary_parameters
    assert plain - frozen == 2 * layers


@pytest.mark.parametrize(("stage", "on_gpu", "on_host"), [(1, 6, 18), (2, 6, 18), (3, 2, 20)])
def test_zeros_offloaded_optimizer(stage: int, on_gpu: int, on_host: int) -> None:
    """Bytes a parameter on one process in bf16: 16 of the optimizer, and what travels."""
    shape = shape_of(build(torch.float32))
    estimate = estimate_memory(shape, setup(ZERO_STRATEGIES[stage], 1, offload="optimizer"))
    assert estimate.optimizer == 0
    assert estimate.parameters + estimate.gradients == on_gpu * shape.parameters
    assert estimate.on_host == on_host * shape.parameters


def kept_bytes(model: LlamaForCausalLM) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors are held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(
            model.model(**packed_sequences(), use_cache=False).last_hidden_state
        )  # the loss keeps it
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("vocabulary_only", [False, True])
def test_activations_are_what_autograd_keeps(
    precision: str, attention: str, vocabulary_only: bool
) -> None:
    model = build(TYPES[precision], attention=attention)
    if vocabulary_only:
        freeze_layers(model)
    found = kept_bytes(model)
    estimate = estimate_memory(
        shape_of(model),
        setup("fsdp2", 1, precision, attention=attention, trained=WHICH[vocabulary_only]),
    )
    assert estimate.activations == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_with_adapters_are_what_autograd_keeps(precision: str) -> None:
    """Of a small rank: what the adapters themselves keep is not counted."""
    model = build(TYPES[precision])
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    config = LoraConfig(rank=1)
    shape = ModelShape.of_shapes(model.config.to_dict(), shapes, "the model", config)
    inject_adapter_in_model(PeftConfig(r=1, target_modules="all-linear"), model.model.layers)
    added = {name: one for name, one in model.named_parameters() if "lora_" in name}
    assert sum(one.numel() for one in added.values()) == shape.adapters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in added or "embed_tokens" in name or "lm_head" in name)
    estimate = estimate_memory(shape, setup("fsdp2", 1, precision, trained="adapters"))
    assert estimate.activations == pytest.approx(kept_bytes(model), rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("taken", [2, 4])
@pytest.mark.parametrize("vocabulary_only", [False, True])
def test_activations_of_experts_are_what_autograd_keeps(
    precision: str, taken: int, vocabulary_only: bool
) -> None:
    sizes = {
        **SIZES,
        "intermediate_size": 176,
        "num_local_experts": 8,
        "num_experts_per_tok": taken,
    }
    model = MixtralForCausalLM._from_config(
        MixtralConfig(**sizes), dtype=TYPES[precision], attn_implementation="sdpa"
    ).train()
    if vocabulary_only:
        freeze_layers(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shape = ModelShape.of_sizes(model.config.to_dict(), sizes, "the model")
    estimate = estimate_memory(
        shape,
        setup("fsdp2", 1, precision, attention="sdpa", trained=WHICH[vocabulary_only]),
    )
    assert estimate.activations == pytest.approx(kept_bytes(model), rel=0.03)


def test_recomputation_keeps_the_input_of_each_layer() -> None:
    model = build(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shape = shape_of(model)
    none, selective, full = (
        estimate_memory(shape, setup(activation_checkpointing=kind))
        for kind in ("none", "selective", "full")
    )
    assert full.activations == pytest.approx(kept_bytes(model), rel=0.03)
    assert full.activations < selective.activations < none.activations
    inputs = 2 * shape.width * ROWS * LENGTH
    assert full.layer == none.layer + inputs  # they are there until the layer is done


def allocated_at_peak(profile: torch.profiler.profile) -> int:
    """The most bytes that were there at once of what was allocated under the profiler."""
    live = peak = 0
    for event in sorted(
        profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()
    ):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


MEMORY_PROFILE: dict[str, Any] = {
    "profile_memory": True,
    "activities": [torch.profiler.ProfilerActivity.CPU],
}


def test_the_peak_of_the_loss_is_what_is_said() -> None:
    """Peak of what the loss allocates, by the profiler."""
    shape = shape_of(build(torch.float32))
    hidden = torch.randn(ROWS * LENGTH, shape.width, requires_grad=True)
    weight = torch.randn(shape.vocabulary, shape.width, requires_grad=True)
    labels = torch.randint(0, shape.vocabulary, (ROWS * LENGTH,))
    with torch.profiler.profile(**MEMORY_PROFILE) as profile:
        cross_entropy_sum(hidden, Head(weight), labels, 64).backward()
    peak = allocated_at_peak(profile)
    assert estimate_memory(shape, setup(precision="fp32")).logits == pytest.approx(peak, rel=0.01)


def whole_steps(store: Path, sizes: dict[str, Any], asked: MemorySetup) -> tuple[int, int]:
    """(parameters of the model, bytes on this rank at the peak of a step)."""
    torch.distributed.init_process_group("gloo")
    dtype = torch.bfloat16 if asked.precision == "pure-bf16" else torch.float32
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**sizes), dtype=dtype, attn_implementation="sdpa"
    ).train()
    if asked.activation_checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = CausalLM(model, asked.loss_chunk)
    policy = MixedPrecisionPolicy(TYPES[asked.precision], torch.float32, cast_forward_inputs=False)
    copy = ComputeCopy(module) if asked.strategy == "single" else None
    running = copy.module if copy else module
    if copy:
        copy.materialise(torch.device("cpu"))
    else:
        for unit in (*module.layers, module):
            fully_shard(unit, mp_policy=policy)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    rows = TrainingSequences(Store.open(store), asked.sequence_length, 0)

    def step() -> None:
        for _ in range(asked.micro_batches):
            running(rows.batch(list(range(asked.micro_batch_size)))).backward()
        optimizer.step()
        if copy:
            copy.refresh()
        optimizer.zero_grad()

    step()
    held = local_bytes(
        {id(one): one for one in (*module.parameters(), *running.parameters())}.values()
    )
    held += local_bytes(value for state in optimizer.state.values() for value in state.values())
    with torch.profiler.profile(**MEMORY_PROFILE) as profile:
        step()
    torch.distributed.destroy_process_group()
    return sum(parameter.numel() for parameter in module.parameters()), held + allocated_at_peak(
        profile
    )


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {}),
        ({"strategy": "single", "shards": 1, "micro_batches": 2}, {}),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ({"precision": "fp32", "micro_batches": 2}, {}),
                ({"precision": "pure-bf16", "activation_checkpointing": "full"}, {}),
                ({"strategy": "single", "shards": 1, "activation_checkpointing": "full"}, {}),
                # fp32: a CPU copies what it adds in another type, and a GPU does not
                ({"precision": "fp32", "activation_checkpointing": "full", "micro_batches": 2}, {}),
                (
                    {"precision": "fp32", "loss_chunk": 32},
                    {"vocab_size": 16_384, "tie_word_embeddings": True},
                ),
            )
        ),
    ],
)
def test_the_peak_of_a_whole_step_is_near(
    changes: dict[str, Any], sizes: dict[str, Any], store: Path
) -> None:
    whole = {**SIZES, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, **sizes}
    asked = setup(**({"shards": 2, "micro_batch_size": 4} | changes))
    for parameters, peak in run_ranks(whole_steps, 2, store, whole, asked):
        shape = ModelShape.from_config(LlamaConfig(**whole).to_dict(), parameters, "the model")
        assert estimate_memory(shape, asked).total == pytest.approx(
            peak, rel=0.25
        )  # a loaded machine holds more at once


def test_the_setup_follows_from_the_configuration() -> None:
    config = TrainingConfig(
        tokens=10**6, global_batch_size=64, micro_batch_size=2, sequence_length=512
    )
    found = MemorySetup.of(config, "fsdp2", processes=8, shards=4)
    assert (found.shards, found.micro_batches, found.tokens, found.compute) == (4, 4, 1024, 2)
    assert found.activation_checkpointing == "none"


def test_a_configuration_without_a_width_is_named() -> None:
    with pytest.raises(UserError, match=r"config\.json of model has no hidden_size"):
        ModelShape.from_config({"vocab_size": 1, "num_hidden_layers": 1}, 1, "model")


def test_a_decoder_without_attention_has_no_heads() -> None:
    """Mamba as published."""
    config = {"model_type": "mamba", "vocab_size": 50280, "hidden_size": 768, "n_layer": 24}
    shape = ModelShape.from_config(config, 130 * 10**6, "mamba-130m")
    assert (shape.layers, shape.heads, shape.query, shape.key_value) == (24, 0, 768, 768)


def test_what_a_family_leaves_out_of_its_configuration_is_its_default() -> None:
    """Gemma-3 4B as published."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    shape = ModelShape.from_config({"model_type": "gemma3", "text_config": text}, 4 * 10**9, "it")
    assert (shape.vocabulary, shape.matrices, shape.query, shape.key_value) == (
        262_208,
        1,
        2048,
        1024,
    )
    del text["model_type"]  # then the wrapper's class knows it
    config = {"model_type": "gemma3", "text_config": text}
    assert ModelShape.from_config(config, 4 * 10**9, "it") == shape


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_layers_that_a_configuration_lists_are_counted(tmp_path: Path) -> None:
    """Nemotron-H has a list of blocks, and an infinite number, which JSON has not."""
    blocks = ["mamba", "attention", "mlp"]
    NemotronHConfig(layers_block_type=blocks, hidden_size=32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "num_hidden_layers" not in config
    assert ModelShape.from_config(config, 1000, "base").layers == len(blocks)


def test_the_smallest_limit_of_the_control_groups_around_counts(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/job_7/step_0/task_3\n")
    write(tmp_path / "sys/fs/cgroup/system.slice/job_7/memory.max", "8589934592\n")
    write(tmp_path / "sys/fs/cgroup/system.slice/job_7/step_0/task_3/memory.max", "max\n")
    assert _cgroup_limits(tmp_path) == [8 * 2**30]
    write(tmp_path / "proc/self/cgroup", "9:cpu,cpuacct:/x\n5:memory:/slurm/job_7\n")
    write(tmp_path / "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes", "4294967296\n")
    assert _cgroup_limits(tmp_path) == [4 * 2**30]


def test_available_memory_is_shared_by_the_processes_of_a_node() -> None:
    device = torch.device("cpu")
    assert 0 < available_memory(device, {}) <= _memory_free() * 1.1
    job = {"SLURM_MEM_PER_NODE": "1024"}
    assert available_memory(device, job) == 2**30
    assert available_memory(device, job | {"LOCAL_WORLD_SIZE": "4"}) == 2**28
    assert available_memory(device, job | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),2"}) == 2**28


def test_offloaded_activations_leave_one_layers_on_the_device() -> None:
    shape = shape_of(build(torch.float32))
    for recompute in ("none", "full"):
        here = estimate_memory(shape, setup(activation_checkpointing=recompute))
        moved = estimate_memory(
            shape, setup(activation_checkpointing=recompute, offload_activations=True)
        )
        assert moved.activations == here.activations / 3
        assert moved.on_host == here.activations
