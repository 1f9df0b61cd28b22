"""FSDP2, HSDP, and one process without sharding: torch's own modules, AdamW and distributed checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import IGNORED, Batch
from cpt_merge.training.config import CheckpointConfig, TrainingConfig
from cpt_merge.training.distributed.backend import StepOutcome
from cpt_merge.training.distributed.build import Start
from cpt_merge.training.distributed.compute_copy import ComputeCopy
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.replaced import replaced
from cpt_merge.training.memory import Strategy
from cpt_merge.training.model.attention import check_attention, describe_attention
from cpt_merge.training.model.build import (
    CausalLM,
    build_model,
    load_weights,
    local_rows,
    named_local_parameters,
)
from cpt_merge.training.model.compiled import compile_layers, uncompiled
from cpt_merge.training.model.recompute import apply_recompute
from cpt_merge.training.optimizer import build_optimizer, full_shape, learning_rates, set_rate
from cpt_merge.training.phases import select_trained


class TorchBackend:
    """See `training.backends.backend.Backend`."""

    layout = "torch"

    def __init__(
        self,
        module: CausalLM,
        copy: ComputeCopy | None,
        optimizer: torch.optim.AdamW,
        start: Start,
        parallel: Parallel,
    ) -> None:
        self.module, self.optimizer, self.start, self.parallel = module, optimizer, start, parallel
        self.strategy: Strategy = "fsdp2" if isinstance(module, FSDPModule) else "single"
        self.copy = copy
        self.running = copy.module if copy else module
        self.clip = start.config.optimizer.clip
        self.shard_count = parallel.mesh.shape[1]
        pinned = parallel.device.type == "cuda"
        self._stager = DefaultStager(  # kept, so that its memory is allocated once
            StagingOptions(
                use_pinned_memory=pinned,
                use_non_blocking_copy=pinned,
                use_shared_memory=False,
                use_async_staging=False,
            )
        )

    @staticmethod
    def build(start: Start, parallel: Parallel) -> TorchBackend:
        """Select, shard, load, in this order: no process ever holds more than its part."""
        module, sharded = build_model(start.model, start.config), parallel.asked.backend == "fsdp2"
        select_trained(module, start.phase, start.base_rows)
        copy = ComputeCopy(module) if start.config.precision == "bf16" and not sharded else None
        running = copy.module if copy else module
        prepare_layers(running, start.config)
        if sharded:
            shard(module, start.config, parallel)
        load_weights(module, start.model, parallel.device)
        if copy:
            copy.materialise(parallel.device)
        check_attention(running, start.config, parallel.device)
        reshard(module)
        optimizer = build_optimizer(module, start.config.optimizer, start.phase)
        return TorchBackend(module, copy, optimizer, start, parallel)

    @torch.no_grad()
    @uncompiled
    def loss(self, batch: Batch) -> Tensor:
        """See `Backend`."""
        loss: Tensor = self.running(batch)
        return loss

    @torch.no_grad()
    @uncompiled
    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """See `Backend`."""
        logits: Tensor = self.running(whole_rows(input_ids).to(self.parallel.device), last=last)
        return logits

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """See `Backend`. Gradients are reduced to shards after every micro-batch, so that no process accumulates a
        whole gradient; over the replicas of HSDP after the last one only.
        """
        size = 1
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(last)
            size = self.parallel.world.size  # FSDP averages over the processes
        loss = self.running(batch) * (scale * size)
        loss.backward()
        return loss.detach() / size  # type: ignore[no-any-return]

    def step(self, factor: float) -> StepOutcome:
        """See `Backend`. Nobody waits for the device: the fused AdamW is told on the device whether to step."""
        set_rate(self.optimizer, factor)
        trained = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = norm.isfinite()
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # torch.amp.GradScaler's protocol
        self.optimizer.step()
        if self.copy:
            self.copy.refresh()
        self.discard_gradients()
        return StepOutcome(norm, finite)

    def discard_gradients(self) -> None:
        """See `Backend`."""
        self.optimizer.zero_grad(set_to_none=True)

    def learning_rates(self) -> dict[str, float]:
        """See `Backend`."""
        return learning_rates(self.optimizer)

    def save(self, directory: Path, asynchronous: bool) -> Future[None]:
        """See `Backend`."""
        # nothing is copied ahead: that would synchronise in torch's thread, whose current device is GPU 0 on every rank
        writer = FileSystemWriter(directory, sync_files=True, per_thread_copy_ahead=0)
        state = self._state()
        if asynchronous:
            group = self.parallel.checkpoint_group
            pending = async_save(
                state, storage_writer=writer, process_group=group, async_stager=self._stager
            )
            assert isinstance(pending, Future)  # AsyncSaveResponse is of asynchronous staging only
            return pending
        save(state, storage_writer=writer, process_group=self.parallel.checkpoint_group)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def writes_asynchronously(self, config: CheckpointConfig) -> bool:
        """See `Backend`."""
        return config.asynchronous

    def load(self, directory: Path) -> None:
        """See `Backend`. Any number of processes and any mesh."""
        state = self._state()
        load(
            state,
            storage_reader=FileSystemReader(directory),
            process_group=self.parallel.checkpoint_group,
        )
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        if self.copy:
            self.copy.refresh()

    def _state(self) -> dict[str, Any]:
        reshard(self.module)
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def state_bytes(self) -> int:
        """See `Backend`."""
        parameters = list(self.module.parameters())
        sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
        return sum(
            size * (3 if p.requires_grad else 1) for size, p in zip(sizes, parameters, strict=True)
        )

    def weights_are_finite(self) -> bool:
        """See `Backend`."""
        reshard(self.module)
        return all(
            bool(local_part(parameter).isfinite().all()) for parameter in self.module.parameters()
        )

    def shards(self) -> list[LocalShard]:
        """See `Backend`. Of the replicas of HSDP the first one gives them."""
        sharded = isinstance(self.module, FSDPModule)
        replica = (
            self.parallel.mesh.get_local_rank("replicate") if sharded else self.parallel.world.rank
        )
        return self._local_shards() if replica == 0 else []

    def _local_shards(self) -> list[LocalShard]:
        """What this process holds, in the order of the parameters."""
        reshard(self.module)
        found = []
        for name, parameter in named_local_parameters(self.module):
            start, stop = local_rows(parameter)
            values = local_part(parameter)[: stop - start]
            found.append(LocalShard(name, tuple(parameter.shape), start, values))
        return found

    @contextmanager
    def replaced(self, replace: Callable[[LocalShard], Tensor]) -> Iterator[None]:
        """See `Backend`."""
        shards = self._local_shards()
        pairs = zip(shards, self.running.parameters(), strict=True)
        with replaced(
            (local_part(parameter)[: len(shard.values)], replace(shard))
            for shard, parameter in pairs
        ):
            try:
                yield
            finally:
                reshard(self.module)

    def describe(self) -> dict[str, str]:
        """See `Backend`."""
        model = describe_model(self.module, self.start.config, self.parallel.device)
        return {**model, "backend": describe_backend(self.module, self.parallel)}

    def close(self) -> None:
        """See `Backend`."""
        self._stager.close()
        for module in {self.module, self.running}:
            module.to_empty(device="meta")
        self.optimizer.state.clear()


def reshard(module: CausalLM) -> None:
    """Free what a forward pass without a backward pass leaves gathered: the root's weights, or those of every layer."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def prepare_layers(module: CausalLM, config: TrainingConfig) -> None:
    """Activation checkpointing, then compile, in this order and before sharding, so that each sees the one before."""
    apply_recompute(module.layers, config.activation_checkpointing)
    if config.compile:
        compile_layers(module.layers)


def whole_rows(input_ids: Tensor) -> Batch:
    """Rows of one document each, without targets."""
    positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    return Batch.of(input_ids, torch.full_like(input_ids, IGNORED), positions.contiguous())


def shard(module: CausalLM, config: TrainingConfig, parallel: Parallel) -> None:
    """FSDP2 on a model whose parameters are still meta tensors.

    The units: each decoder layer, the embedding, and the rest (norm and head) with the root, which applies the head; a
    tied matrix lies in the root. Parameters are fp32 masters (or bf16 for pure-bf16), gathered in the compute type;
    gradients are reduced in fp32. With one replica the mesh is flat.
    """
    compute = torch.float32 if config.precision == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = parallel.mesh if parallel.mesh.shape[0] > 1 else parallel.mesh["shard"]
    embedding, head = module.model.get_input_embeddings(), module.model.get_output_embeddings()
    for layer in module.layers:
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, reshard_after_forward=parallel.asked.reshard
        )
    if embedding.weight is not head.weight:
        fully_shard(
            embedding, mesh=mesh, mp_policy=policy, reshard_after_forward=parallel.asked.reshard
        )
    fully_shard(module, mesh=mesh, mp_policy=policy)
    _prove_sharded(module, parallel)


def _prove_sharded(module: CausalLM, parallel: Parallel) -> None:
    """Law 7: what was asked for is active, or the run stops."""
    shards = parallel.mesh.shape[1]
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor) or not any(
            isinstance(kind, Shard) for kind in parameter.placements
        ):
            raise UserError(
                f"FSDP2 was asked for but {name} is not sharded; report this with the log."
            )
        if parameter.device_mesh.size(parameter.device_mesh.ndim - 1) != shards:
            raise UserError(
                f"{name} is not sharded over {shards} processes; report this with the log."
            )


def describe_model(
    module: CausalLM, config: TrainingConfig, device: torch.device
) -> dict[str, str]:
    """What is computed, and how."""
    count = sum(full_shape(parameter).numel() for parameter in module.parameters())
    trained = sum(
        full_shape(parameter).numel()
        for parameter in module.parameters()
        if parameter.requires_grad
    )
    name, rows = type(module.model).__name__, module.frozen_rows
    return {
        "model": f"{name}, {count / 1e6:,.1f} M parameters"
        + (f", {trained / 1e6:,.1f} M trained" if trained < count else "")
        + (f", of embedding and head the rows from {rows:,} on" if rows else ""),
        "precision": {
            "bf16": "bf16 compute, fp32 master weights, fp32 reduction", "fp32": "fp32", "pure-bf16": "bf16 throughout",
        }[config.precision] + (", fp8 matmuls in the layers" if config.fp8 else ""),
        "attention": describe_attention(config, device),
        "layers": ("compiled" if config.compile else "not compiled")
        + f", activation checkpointing {config.activation_checkpointing}",
    }  # fmt: skip


def describe_backend(module: CausalLM, parallel: Parallel) -> str:
    """What is active, as found on the module itself."""
    if not isinstance(module, FSDPModule):
        return "one process, not sharded"
    (replicas, shards), size = parallel.mesh.shape, parallel.world.size
    if replicas > 1:
        return f"HSDP: {replicas} replicas of {shards} shards, {size} processes"
    return f"FSDP2: {shards} shards, {size} process{'es' if size > 1 else ''}"


def local_part(parameter: Tensor) -> Tensor:
    """The rows of this process."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
