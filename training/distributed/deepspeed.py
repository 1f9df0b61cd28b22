"""DeepSpeed ZeRO 1, 2 and 3: optimizer state, gradients and parameters are divided over processes.

DeepSpeed's engine owns gradients, clipping and the step; the loop gives it the scaled loss and
reads what it did. Checkpoints are ours (`training.distributed.zero_state`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.checkpoint.stored_shards import check_divisible, replaced_shards, stored_shards
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.core.world import World
from cpt_merge.data.packing import Batch
from cpt_merge.training.config import CheckpointConfig, TrainingConfig
from cpt_merge.training.distributed.backend import StepOutcome, layout_of, replaced
from cpt_merge.training.distributed.deepspeed_compat import import_deepspeed
from cpt_merge.training.distributed.exact_rows import ExactRows, divided_rows, joined_rows
from cpt_merge.training.distributed.frozen import FrozenWeights, open_frozen
from cpt_merge.training.distributed.offload import offloaded
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.settings import OFFLOAD_SECTIONS, BackendSettings
from cpt_merge.training.distributed.state_files import StateFiles
from cpt_merge.training.distributed.zero_state import ZeroState, names_of_groups
from cpt_merge.training.memory import ZERO_STRATEGIES
from cpt_merge.training.model.attention import check_attention
from cpt_merge.training.model.build import (
    CausalLM,
    WeightSource,
    build_model,
    describe_model,
    full_shape,
    load_weights,
    one_document_each,
    prepare_layers,
    stored_buffers,
)
from cpt_merge.training.model.choice import Choice
from cpt_merge.training.model.compile import uncompiled
from cpt_merge.training.optimizer import (
    AdamW,
    build_optimizer,
    describe_optimizer,
    learning_rates,
    set_rate,
)
from cpt_merge.training.phases import PhaseSetup, prepare_phase
from cpt_merge.training.shield import Shield


class ZeroBackend:
    """See `training.distributed.backend.Backend`."""

    def __init__(
        self,
        engine: Any,
        optimizer: AdamW,
        groups: list[list[str]],
        setup: PhaseSetup,
        parallel: Parallel,
    ) -> None:
        """`groups` are the names of what `optimizer` trains (`names_of_groups`)."""
        self.engine, self.optimizer, self.setup, self.parallel = engine, optimizer, setup, parallel
        self.stage: int = engine.zero_optimization_stage()
        self.offload = parallel.settings.offload
        alone = setup.config.lora is not None
        self.layout = layout_of(parallel.settings, setup.config)
        self.state_files = StateFiles(parallel)
        self.exact = ExactRows(parallel)
        self.state = ZeroState(
            engine, self.state_files, parallel, groups, not alone, self._part, self.exact
        )
        self.files = open_frozen(self.module, setup)
        self.choice = self.module.choice
        self.strategy = ZERO_STRATEGIES[self.stage]
        self.shard_count = parallel.size
        self.micro_batches = parallel.size * setup.config.micro_batches(parallel.size)

    @staticmethod
    def build(setup: PhaseSetup, parallel: Parallel) -> ZeroBackend:
        """Load the weights (with ZeRO 3 tensor by tensor), then shard."""
        deepspeed = import_deepspeed(parallel.device)
        ignore_former_names()
        settings = _engine_settings(setup.config, parallel)
        stage = settings["zero_optimization"]["stage"]
        module = build_model(setup.model, setup.config, parallel.device)
        prepare_phase(module, setup)
        prepare_layers(module, setup.config, parallel.device)
        source = WeightSource.open(module, setup.model, torch.device("cpu"))
        if stage == 3:
            check_documents(module.choice)
            _load_partitioned(module, setup.model, settings, parallel.device)
        else:
            load_weights(module, setup.model, parallel.device)
        check_divisible(module.stored, setup.model)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        optimizer = build_optimizer(module, setup.config, setup.phase)
        groups = names_of_groups(module, optimizer)
        with _named_in_environment(parallel.world):
            engine, wrapped, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, dist_init_required=False
            )
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name]  # DeepSpeed's cast would cost rotary frequencies digits
        _prove_zero(engine, stage, setup.config, parallel)
        _prove_offloaded(engine, parallel)
        check_attention(engine, setup.config, parallel.device)
        backend = ZeroBackend(engine, wrapped, groups, setup, parallel)
        backend.state.prove_masters()
        if setup.config.precision == "bf16":
            backend._load_exactly(source)
        return backend

    @torch.no_grad()
    def _load_exactly(self, source: WeightSource) -> None:
        """Masters, and frozen weights that are exported, as they were before DeepSpeed's cast."""
        self.state.load_masters(source)
        for name, parameter in self._exported_frozen():
            whole = torch.empty(full_shape(parameter), device="meta")
            rows = source.rows(name, whole, *divided_rows(whole.shape, self.parallel))
            self.exact.keep(parameter, rows)

    def _exported_frozen(self) -> list[tuple[str, nn.Parameter]]:
        """Frozen weights that come from memory, not from files."""
        if self.setup.config.lora:
            return []
        return [
            (name, parameter)
            for name, parameter in self.module.weights()
            if not parameter.requires_grad
        ]

    @property
    def module(self) -> CausalLM:
        """The model under DeepSpeed's engine."""
        module: CausalLM = self.engine.module
        return module

    @torch.no_grad()
    @uncompiled
    def loss(self, batch: Batch) -> Tensor:
        """See `Backend`."""
        self.engine.eval()
        loss: Tensor = self.engine(batch)
        self.engine.train()
        return loss

    @torch.no_grad()
    @uncompiled
    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """See `Backend`."""
        self.engine.eval()
        logits: Tensor = self.engine(
            one_document_each(input_ids).to(self.parallel.device), last=last
        )
        self.engine.train()
        return logits

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """See `Backend`."""
        size = self.parallel.size  # DeepSpeed averages over the processes
        self.engine.set_gradient_accumulation_boundary(last)
        self.module.weigh_auxiliary(scale, self.micro_batches)
        loss = self.engine(batch) * (scale * size)
        self.engine.backward(loss, scale_wrt_gas=False)
        return loss.detach() / size  # type: ignore[no-any-return]

    def take_margins(self) -> Tensor | None:
        """See `Backend`."""
        return self.module.take_margins()

    def take_routing(self) -> Tensor | None:
        """See `Backend`."""
        return self.module.take_routing()

    def importance(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """See `Backend`. `check_backend` refuses a shield with DeepSpeed."""
        raise NotImplementedError

    def shield(self, shield: Shield) -> float:
        """See `Backend`. `check_backend` refuses a shield with DeepSpeed."""
        raise NotImplementedError

    def step(self, factor: float) -> StepOutcome:
        """See `Backend`. DeepSpeed itself skips a step whose gradient is not finite."""
        set_rate(self.optimizer, factor)
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)
        return StepOutcome(norm, torch.tensor(bool(self.engine.was_step_applied())))

    def discard_gradients(self) -> None:
        """See `Backend`."""
        self.optimizer.zero_grad()

    def learning_rates(self) -> dict[str, float]:
        """See `Backend`."""
        return learning_rates(self.optimizer)

    def save(self, directory: Path, asynchronous: bool) -> Future[None]:
        """See `Backend`."""
        return self.state.write(directory, asynchronous)

    def writes_asynchronously(self, config: CheckpointConfig) -> bool:
        """See `Backend`."""
        return config.asynchronous

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """See `Backend`. Any stage and number of processes can load it."""
        self.engine.empty_partition_cache()  # ZeRO 3: gathered tensors must not outlive this
        if self.setup.config.precision == "bf16":
            self.exact.make_room(parameter for _, parameter in self._exported_frozen())
        self.state.read(directory)
        for parameter in self.module.parameters():
            rows = self.exact.of(parameter)
            if rows is not None:
                whole = joined_rows(rows, full_shape(parameter), self.parallel)
                self.exact.keep(parameter, rows)
            elif parameter.requires_grad:
                whole = _gathered(parameter)
            else:
                continue
            part, first = self._part(parameter)
            part.copy_(whole.view(-1)[first : first + len(part)])

    def state_bytes(self) -> int:
        """See `Backend`."""
        held = 4 if self.setup.config.precision == "fp32" else 2
        frozen = 0 if self.setup.config.lora else held
        total = 0
        for parameter in self.module.parameters():
            exact = self.exact.of(parameter) is not None
            each = 12 if parameter.requires_grad else 4 if exact else frozen  # master and moments
            total += full_shape(parameter).numel() * each
        return total

    def weights_are_finite(self) -> bool:
        """See `Backend`."""
        parts = (self._part(parameter)[0] for parameter in self.module.parameters())
        return all(bool(part.isfinite().all()) for part in parts)

    def _part(self, parameter: Tensor) -> tuple[Tensor, int]:
        """The elements of a parameter that this process holds, flat, and the number of the first.

        That is all of it, or with ZeRO 3 a part. The last part is as long as the others, with
        anything at its end.
        """
        part: Tensor | None = getattr(parameter, "ds_tensor", None)
        if part is None:
            return parameter.data.view(-1), 0
        first = self.parallel.rank * part.numel()
        return part.view(-1)[: max(full_shape(parameter).numel() - first, 0)], first

    def parameter_names(self) -> set[str]:
        """See `Backend`."""
        return self.module.stored_parameters()

    def shards(self) -> list[LocalShard]:
        """See `Backend`."""
        frozen = self._frozen()
        held = [
            self._held_rows(name, weight)
            for name, weight in self.module.weights()
            if weight.requires_grad or frozen is None
        ]
        found = list(stored_shards(self.module.stored, held))
        return found + (frozen.part(self.parallel.rank, self.parallel.size) if frozen else [])

    def _held_rows(self, name: str, parameter: Tensor) -> LocalShard:
        """This process's rows of a parameter; fp32 masters, which all processes gather."""
        shape, exact = tuple(full_shape(parameter)), self.exact.of(parameter)
        start, stop = divided_rows(shape, self.parallel)
        values = _gathered(parameter)[start:stop] if exact is None else exact
        return LocalShard(name, shape, start, values.to("cpu", copy=True))

    def _frozen(self) -> FrozenWeights | None:
        """What is not in memory in its own type; a collective."""
        if self.files is None:
            return None
        parameters = dict(self.module.model.named_parameters())
        return FrozenWeights.of(
            self.module, self.files, lambda name: _gathered(parameters[name]), self.parallel.device
        )

    @contextmanager
    def replaced(self, replace: Callable[[LocalShard], Tensor]) -> Iterator[None]:
        """See `Backend`. Each process makes its rows and sends them to all, tensor by tensor."""
        self.engine.empty_partition_cache()  # ZeRO 3: gathered tensors must not outlive this
        with replaced(self._replacements(replace)):
            try:
                yield
            finally:
                self.engine.empty_partition_cache()

    def _replacements(
        self, replace: Callable[[LocalShard], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What runs here, and its new values: whole parameters, or (ZeRO 3) parts of them.

        Products of adapters are in the new weights, so B is zero.
        """
        frozen, parameters = self._frozen(), dict(self.module.weights())
        shards = (
            frozen.rows(name, *divided_rows(full_shape(weight), self.parallel))
            if frozen and not weight.requires_grad
            else self._held_rows(name, weight)
            for name, weight in parameters.items()
        )
        changed = replaced_shards(self.module.stored, shards, replace)
        for shard, values in changed:
            whole = joined_rows(values, shard.shape, self.parallel)
            part, first = self._part(parameters[shard.name])
            yield part, whole.view(-1)[first : first + len(part)]
        for name, parameter in self.module.model.named_parameters():
            if name in self.module.adapters.lefts:
                part, _ = self._part(parameter)
                yield part, torch.zeros_like(part)

    def describe(self) -> dict[str, str]:
        """See `Backend`."""
        what = {
            1: "optimizer",
            2: "optimizer and gradients",
            3: "optimizer, gradients and parameters",
        }[self.stage]
        size = self.parallel.size
        return {
            **describe_model(self.module, self.setup.config, self.parallel.device),
            **describe_optimizer(self.engine.basic_optimizer),
            "backend": f"DeepSpeed ZeRO {self.stage}: {what} divided over "
            f"{counted(size, 'process')}{self._offloaded()}",
        }

    def _offloaded(self) -> str:
        if self.offload == "none":
            return ""
        what = "optimizer" if self.offload == "optimizer" else "optimizer and weights"
        return offloaded(what, self.parallel.device)

    def close(self) -> None:
        """See `Backend`."""
        self.state_files.close()
        self.engine.destroy()


def check_zero(settings: BackendSettings) -> None:
    """Raise `UserError` if DeepSpeed is missing, or refuses the accelerate configuration."""
    if find_spec("deepspeed") is None:
        raise UserError(
            "the accelerate config asks for DeepSpeed, which is not installed; "
            "pip install -c constraints.txt -e '.[deepspeed]'"
        )
    _check_sections(settings)


def _check_sections(settings: BackendSettings) -> None:
    """Raise `UserError` for values of `zero_optimization` that DeepSpeed or its optimizer lacks."""
    section = settings.zero_section
    if section.get("round_robin_gradients"):
        raise UserError(
            "zero_optimization asks for round_robin_gradients, with which DeepSpeed 0.19 says "
            "wrongly which process has which weights; remove it."
        )
    optimizer = section.get("offload_optimizer", {})
    if optimizer.get("super_offload") or optimizer.get("ratio", 1.0) != 1.0:
        raise UserError(
            "offload_optimizer asks for super_offload or a ratio below 1, which only DeepSpeed's "
            "own Adam has; remove it, since AdamW here is torch's."
        )
    for name in OFFLOAD_SECTIONS:
        device = section.get(name, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(
                f"{name} asks for the device {device}; only the CPU's memory is supported, so set "
                "cpu."
            )
    import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as refused:
        first = refused.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(
            f"DeepSpeed refuses {key}: {first['input']!r} ({first['msg']}); correct it."
        ) from None


def check_documents(choice: Choice) -> None:
    """Raise `UserError` for a model in which ZeRO 3 would wait for ever.

    It gathers a module's weights each time that it runs, and modules that take documents one by one
    run as often as the process's documents need.
    """
    if choice.separation.one_by_one:
        raise UserError(
            f"packed documents go {choice.separation.describe()}, which ZeRO 3 does not allow, "
            "since processes have different documents; use FSDP2 or ZeRO 2."
        )


def _engine_settings(config: TrainingConfig, parallel: Parallel) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Batches, precision and clipping come from the recipe, ZeRO from the accelerate config.
    """
    micro = config.micro_batches(parallel.size)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": parallel.settings.zero_section,
        # torch's fused AdamW, on the CPU too: as fast there as DeepSpeed's, which is compiled first
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if config.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        settings["communication_data_type"] = "fp32"
    return settings


def ignore_former_names() -> None:
    """Leave out torch's warnings that its functions have new names, which DeepSpeed does not use.

    Python shows such a warning once, but again after any code has changed its filters, and every
    process shows its own.
    """
    text = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", text, FutureWarning)


@contextmanager
def _named_in_environment(world: World) -> Iterator[None]:
    """Rank and world size in the environment, from which DeepSpeed's engine reads them."""
    names = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    missing = [name for name in names if name not in os.environ]
    os.environ.update({name: str(names[name]) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _load_partitioned(
    module: CausalLM, directory: Path, settings: dict[str, Any], device: torch.device
) -> None:
    """Load for ZeRO 3: each process reads a whole tensor and keeps its part before the next one."""
    from deepspeed.runtime.zero import Init

    source = WeightSource.open(module, directory, device)
    dtype = torch.bfloat16 if "bf16" in settings else torch.float32
    loaded: dict[int, nn.Parameter] = {}  # a tied parameter is loaded once and stays one
    for path, owner in module.model.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in loaded:
                # of the type that will run, for modules that look at the type of a part (peft's)
                values = source.load(f"{path}.{name}".lstrip("."), parameter).to(dtype)
                loaded[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(owner, name, loaded[id(parameter)])
        if next(owner.parameters(recurse=False), None) is not None:
            Init(module=_Alone(owner), config_dict_or_path=settings, dtype=dtype)
    for name, buffer in stored_buffers(module):
        buffer.data = source.load(name, buffer)
    module.to(device)


class _Alone(nn.Module):
    """A module's own parameters, without those of its submodules."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        for name, parameter in owner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def _gathered(parameter: Tensor) -> Tensor:
    """A whole parameter, of a trained one the fp32 master; a collective."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)  # type: ignore[no-any-return]
    with GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
        return parameter.detach().float().clone()


def _prove_zero(engine: Any, stage: int, config: TrainingConfig, parallel: Parallel) -> None:
    """No silent fallback: what was asked for is active, or the run stops."""
    active = engine.zero_optimization_stage(), engine.dp_world_size
    if active != (stage, parallel.size):
        raise UserError(
            f"ZeRO {stage} on {parallel.size} processes was asked for, but DeepSpeed runs "
            f"{active}; report this with the log."
        )
    wanted = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for name, parameter in engine.module.named_parameters():
        if parameter.dtype != wanted:
            raise UserError(
                f"precision {config.precision} was asked for, but {name} is {parameter.dtype} in "
                "DeepSpeed's engine; report this with the log."
            )


def _prove_offloaded(engine: Any, parallel: Parallel) -> None:
    """What was asked for is in the CPU's memory, and nothing else, or the run stops."""
    offload, optimizer = parallel.settings.offload, engine.optimizer
    names = ("cpu_offload", "offload_optimizer")  # of ZeRO 1 and 2, and of ZeRO 3
    active = (
        any(getattr(optimizer, name, False) for name in names),
        bool(getattr(optimizer, "offload_param", False)),
    )
    places = set()
    if active[0]:
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
        places |= {part.device.type for part in masters or optimizer.fp32_partitioned_groups_flat}
    if active[1]:
        places |= {parameter.ds_tensor.device.type for parameter in engine.module.parameters()}
    if active != (offload != "none", offload == "all") or places - {"cpu"}:
        raise UserError(
            f"offload {offload} was asked for, but DeepSpeed offloads (optimizer, weights) "
            f"{active}, to {sorted(places)}; report this with the log."
        )
