"""FSDP2, HSDP, and one process without sharding, with torch's AdamW and distributed checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.checkpoint.stored_shards import check_divisible, replaced_shards, stored_shards
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.data.packing import Batch
from cpt_merge.training.config import CheckpointConfig, TrainingConfig
from cpt_merge.training.distributed.backend import StepOutcome, layout_of, replaced
from cpt_merge.training.distributed.compute_copy import ComputeCopy
from cpt_merge.training.distributed.frozen import FrozenWeights, open_frozen
from cpt_merge.training.distributed.offload import offloaded
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.state_files import StateFiles
from cpt_merge.training.memory import Strategy
from cpt_merge.training.model.attention import check_attention
from cpt_merge.training.model.build import (
    CausalLM,
    build_model,
    describe_model,
    load_weights,
    local_rows,
    one_document_each,
    prepare_layers,
)
from cpt_merge.training.model.compile import uncompiled
from cpt_merge.training.optimizer import (
    AdamW,
    build_optimizer,
    bytes_of_moments,
    complete_state,
    describe_optimizer,
    learning_rates,
    set_rate,
)
from cpt_merge.training.phases import PhaseSetup, prepare_phase
from cpt_merge.training.shield import Shield, frozen_share, importance, squares_of_inputs


class TorchBackend:
    """See `training.distributed.backend.Backend`."""

    def __init__(
        self,
        module: CausalLM,
        copy: ComputeCopy | None,
        optimizer: AdamW,
        setup: PhaseSetup,
        parallel: Parallel,
    ) -> None:
        self.module, self.optimizer, self.setup, self.parallel = module, optimizer, setup, parallel
        self.layout = layout_of(parallel.settings, setup.config)
        self.choice = module.choice
        self.strategy: Strategy = "fsdp2" if isinstance(module, FSDPModule) else "single"
        self.copy = copy
        self.files = open_frozen(module, setup)
        self.running = copy.module if copy else module
        self.clip = setup.config.optimizer.clip
        self.micro_batches = parallel.size * setup.config.micro_batches(parallel.size)
        self.shard_count = parallel.mesh.shape[1]
        self.state_files = StateFiles(parallel)
        self.frozen_columns: Shield | None = None

    @staticmethod
    def build(setup: PhaseSetup, parallel: Parallel) -> TorchBackend:
        """Select, shard, load, in this order, so that no process ever holds more than its part."""
        module = build_model(setup.model, setup.config, parallel.device)
        sharded, on_cpu = parallel.settings.backend == "fsdp2", parallel.settings.offload == "all"
        prepare_phase(module, setup)
        copy = ComputeCopy(module) if setup.config.precision == "bf16" and not sharded else None
        running = copy.module if copy else module
        prepare_layers(running, setup.config, parallel.device)
        if sharded:
            shard(module, setup.config, parallel, on_cpu)
        load_weights(module, setup.model, parallel.device, on_cpu)
        if sharded:
            check_divisible(module.stored, setup.model)
        if copy:
            copy.materialise(parallel.device)
        check_attention(running, setup.config, parallel.device)
        reshard(module)
        _prove_placed(module, parallel)
        optimizer = build_optimizer(module, setup.config, setup.phase)
        return TorchBackend(module, copy, optimizer, setup, parallel)

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
        logits: Tensor = self.running(
            one_document_each(input_ids).to(self.parallel.device), last=last
        )
        return logits

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """See `Backend`. Gradients are reduced to shards after every micro-batch.

        So no process accumulates a whole gradient. Over HSDP's replicas they are reduced only after
        the last micro-batch.
        """
        size = 1
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(last)
            size = self.parallel.size  # FSDP averages over the processes
        self.running.weigh_auxiliary(scale, self.micro_batches)
        loss = self.running(batch) * (scale * size)
        loss.backward()
        return loss.detach() / size  # type: ignore[no-any-return]

    def take_margins(self) -> Tensor | None:
        """See `Backend`."""
        return self.running.take_margins()

    def take_routing(self) -> Tensor | None:
        """See `Backend`."""
        return self.running.take_routing()

    @torch.no_grad()
    @uncompiled
    def importance(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """See `Backend`."""
        with squares_of_inputs(self.running) as squares:
            for batch in batches:
                self.running(batch)
        reshard(self.module)
        return importance(self.module, squares)

    def shield(self, shield: Shield) -> float:
        """See `Backend`."""
        self.frozen_columns = shield.to(self.parallel.device)
        return frozen_share(shield, self.module)

    def step(self, factor: float) -> StepOutcome:
        """See `Backend`. The fused AdamW reads on the device whether to step, so nobody waits.

        Offloaded gradients, their norm and AdamW are on the CPU, which has waited for them.
        """
        set_rate(self.optimizer, factor)
        trained = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        if self.frozen_columns:
            self.frozen_columns.clear_gradients(self.module)
        norm = torch.nn.utils.clip_grad_norm_(trained, self.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = norm.isfinite()
        # the protocol of torch.amp.GradScaler
        self.optimizer.found_inf = (~finite).float()  # type: ignore[union-attr]
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
        return self.state_files.write(self._state(), directory, asynchronous)

    def writes_asynchronously(self, config: CheckpointConfig) -> bool:
        """See `Backend`."""
        return config.asynchronous

    def load(self, directory: Path) -> None:
        """See `Backend`. Any number of processes and any mesh can load it."""
        state = self._state()
        self.state_files.read(state, directory)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"], options=self._trained_alone(),
        )  # fmt: skip
        if self.copy:
            self.copy.refresh()

    def _state(self) -> dict[str, Any]:
        reshard(self.module)
        complete_state(self.optimizer)
        model, optimizer = get_state_dict(
            self.module, self.optimizer, options=self._trained_alone()
        )
        return {"model": model, "optimizer": optimizer}

    def _trained_alone(self) -> StateDictOptions:
        """With adapters, a checkpoint has no frozen weights (`training.distributed.frozen`)."""
        alone = self.setup.config.lora is not None
        return StateDictOptions(ignore_frozen_params=alone, strict=not alone)

    def state_bytes(self) -> int:
        """See `Backend`."""
        total = 0
        for parameter in self.module.parameters():
            values, size = parameter.numel(), parameter.element_size()
            if parameter.requires_grad:
                total += values * size + bytes_of_moments(self.optimizer, values, size)
            elif self.setup.config.lora is None:
                total += values * size
        return total

    def weights_are_finite(self) -> bool:
        """See `Backend`."""
        reshard(self.module)
        return all(
            bool(_local_part(parameter).isfinite().all()) for parameter in self.module.parameters()
        )

    def parameter_names(self) -> set[str]:
        """See `Backend`."""
        return self.module.stored_parameters()

    def shards(self) -> list[LocalShard]:
        """See `Backend`. With HSDP, the first replica has what memory holds."""
        frozen = self._frozen()
        sharded = isinstance(self.module, FSDPModule)
        replica = self.parallel.mesh.get_local_rank("replicate") if sharded else self.parallel.rank
        held = (
            []
            if replica
            else [
                _held_rows(name, weight)
                for name, weight in self.module.weights()
                if weight.requires_grad or frozen is None
            ]
        )
        found = list(stored_shards(self.module.stored, held))
        return found + (frozen.part(self.parallel.rank, self.parallel.size) if frozen else [])

    def _frozen(self) -> FrozenWeights | None:
        """What is not in memory in its own type; a collective."""
        reshard(self.module)
        if self.files is None:
            return None
        parameters = dict(self.module.model.named_parameters())

        def whole(name: str) -> Tensor:
            parameter = parameters[name].detach()
            return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

        return FrozenWeights.of(self.module, self.files, whole, self.parallel.device)

    @contextmanager
    def replaced(self, replace: Callable[[LocalShard], Tensor]) -> Iterator[None]:
        """See `Backend`. Products of adapters are in the new weights, so B is zero meanwhile."""
        frozen, running = self._frozen(), dict(self.running.weights())
        shards = (
            frozen.rows(name, *local_rows(weight))
            if frozen and not weight.requires_grad
            else _held_rows(name, weight)
            for name, weight in self.module.weights()
        )
        changed = (
            (_local_part(running[shard.name])[: len(shard.values)], values)
            for shard, values in replaced_shards(self.module.stored, shards, replace)
        )
        inside = dict(self.running.model.named_parameters())
        lefts = [_local_part(inside[name]) for name in self.module.adapters.lefts]
        with replaced(chain(changed, ((left, torch.zeros_like(left)) for left in lefts))):
            try:
                yield
            finally:
                reshard(self.module)

    def describe(self) -> dict[str, str]:
        """See `Backend`."""
        model = describe_model(self.module, self.setup.config, self.parallel.device)
        backend = _describe_backend(self.module, self.parallel)
        return {**model, **describe_optimizer(self.optimizer), "backend": backend}

    def close(self) -> None:
        """See `Backend`."""
        self.state_files.close()
        for module in {self.module, self.running}:
            module.to_empty(device="meta")
        self.optimizer.state.clear()


def reshard(module: CausalLM) -> None:
    """Free the weights that a forward pass without a backward pass leaves gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def shard(
    module: CausalLM, config: TrainingConfig, parallel: Parallel, on_cpu: bool = False
) -> None:
    """FSDP2 on a model whose parameters are still meta tensors.

    The units are each decoder layer, the embedding, and the rest (norm and head) with the root,
    which applies the head; a tied matrix is part of the root. Parameters are fp32 masters (bf16 for
    pure-bf16), gathered in the compute type; gradients are reduced in fp32. With one replica the
    mesh is flat. Shards that are kept `on_cpu` are copied to the device each time that their unit
    is gathered, and its gradients back after each reduction.
    """
    compute = torch.float32 if config.precision == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = parallel.mesh if parallel.mesh.shape[0] > 1 else parallel.mesh["shard"]
    offload = OffloadPolicy()
    if on_cpu:
        offload = CPUOffloadPolicy(pin_memory=parallel.device.type == "cuda")
    divide = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
    reshard_after_forward = parallel.settings.reshard
    embedding, head = module.model.get_input_embeddings(), module.model.get_output_embeddings()
    for layer in module.layers:
        divide(layer, reshard_after_forward=reshard_after_forward)
    if embedding.weight is not head.weight:
        divide(embedding, reshard_after_forward=reshard_after_forward)
    divide(module)
    _prove_sharded(module, parallel)


def _prove_sharded(module: CausalLM, parallel: Parallel) -> None:
    """No silent fallback: what was asked for is active, or the run stops."""
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


def _prove_placed(module: CausalLM, parallel: Parallel) -> None:
    """The shards are where they were asked to be: on the device, or in the CPU's memory."""
    on_cpu = parallel.settings.offload == "all"
    wanted = "cpu" if on_cpu else parallel.device.type
    for name, parameter in module.named_parameters():
        shard = _local_part(parameter)
        pinned = not (on_cpu and parallel.device.type == "cuda") or shard.is_pinned()
        if shard.device.type != wanted or not (pinned or shard.numel() == 0):
            raise UserError(
                f"{name} was to be in {'pinned CPU' if on_cpu else 'device'} memory but is on "
                f"{shard.device}; report this with the log."
            )


def _describe_backend(module: CausalLM, parallel: Parallel) -> str:
    """How the module is sharded, as found on the module itself."""
    if not isinstance(module, FSDPModule):
        return "one process, not sharded"
    (replicas, shards), size = parallel.mesh.shape, parallel.size
    where = ""
    if parallel.settings.offload == "all":
        where = offloaded("weights, gradients and optimizer", parallel.device)
    if replicas > 1:
        return f"HSDP: {replicas} replicas of {shards} shards, {size} processes{where}"
    return f"FSDP2: {shards} shards, {counted(size, 'process')}{where}"


def _held_rows(name: str, parameter: Tensor) -> LocalShard:
    """The rows of a parameter that this process holds, under the parameter's name."""
    start, stop = local_rows(parameter)
    values = _local_part(parameter)[: stop - start]
    return LocalShard(name, tuple(parameter.shape), start, values)


def _local_part(parameter: Tensor) -> Tensor:
    """The rows of a parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
