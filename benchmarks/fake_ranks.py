"""One rank of many at real shapes, without the others and without memory for its tensors.

The product's own code builds, shards, loads, trains a step, and plans a checkpoint and an export.
Its collectives run on torch's fake process group, which answers for the other ranks, and its
tensors are fake ones, which have shapes and types but no values. What fake tensors cannot do is
left out: the check of the attention and the step of `CompactAdamW`, which look at values.

Fake tensors are on the CPU, because torch has no guard for CUDA without a GPU build, but they say
that they are on a GPU (`is_cuda`), so that the attention, the loss and the matrix products are
those of a GPU. Streams, and what an allocator keeps beyond live tensors, are not seen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import _utils as placements
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import revert_weight_conversion

from cpt_merge.checkpoint.derived import DerivedInfo
from cpt_merge.checkpoint.dtypes import STORED, Array
from cpt_merge.checkpoint.export import check_shard
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.reader import SINGLE_FILE, Checkpoint
from cpt_merge.checkpoint.stored_shards import check_divisible
from cpt_merge.checkpoint.writer import CheckpointLayout, TensorSpec
from cpt_merge.core.world import World
from cpt_merge.data.packing import Batch
from cpt_merge.training import compact_adamw
from cpt_merge.training.compact_adamw import CompactAdamW
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.fsdp import TorchBackend, shard
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.model.build import build_model, load_weights, prepare_layers
from cpt_merge.training.optimizer import build_optimizer
from cpt_merge.training.phases import PhaseSetup, phases_of, prepare_phase

_CPU = torch.device("cpu")
_DOCUMENT = 300  # tokens
_OFFSETS, _CODES = "_compute_local_shape_and_global_offset", "_code_of_zero"
_c10d, _functional = torch.ops.c10d, torch.ops._c10d_functional


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds all the time; gradients from the backward pass to the step."""

    parameters: int = 0
    gradients: int = 0
    moments: int = 0


@dataclass
class Trace:
    """What one rank holds, moves, reads and writes, in bytes."""

    held: Held = Held()
    last: Held = Held()  # on the rank with the last rows, which are the fewest
    peak: dict[str, int] = field(default_factory=dict)  # by the kinds of torch's tracker, and Total
    traffic: Counter[str] = field(default_factory=Counter)  # whole tensors, by kind of collective
    calls: Counter[str] = field(default_factory=Counter)
    # (tensor of the files, first element, one past its last one)
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    exports: list[tuple[str, int, int]] = field(default_factory=list)
    read: int = 0
    checkpoint: int = 0
    export: int = 0


@dataclass(frozen=True)
class RankCase:
    """One of `ranks` processes, in HSDP with several replicas."""

    model: Path  # see `write_shapes`
    config: TrainingConfig
    ranks: int
    replicas: int = 1
    rank: int = 0

    @cached_property
    def setup(self) -> PhaseSetup:
        """The first phase."""
        return PhaseSetup(self.config, phases_of(self.config)[0], self.model, 0)

    def batch(self) -> Batch:
        """A micro-batch of documents of `_DOCUMENT` tokens."""
        rows, length = self.config.micro_batch_size, self.config.sequence_length
        ids = torch.arange(rows * length).view(rows, length) % 64
        return Batch.of(ids, ids, (torch.arange(length) % _DOCUMENT).expand(rows, -1).contiguous())


def write_shapes(config: Mapping[str, Any], directory: Path) -> None:
    """A checkpoint with the names, shapes and types of a model, of zeros that take no disk space.

    Its files are those that transformers would write for the config.json, in bf16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    settings = TrainingConfig(tokens=1, precision="pure-bf16", attention="eager")
    model = build_model(directory, settings).model
    weights = dict(model.named_parameters())  # tied ones once
    header: dict[str, Any] = {}
    end = 0
    for name, weight in revert_weight_conversion(model, weights).items():
        start, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": [*weight.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def trace_fake(case: RankCase) -> Trace:
    """The trace of a rank without the others; no process group may exist."""
    # its results name the mesh, and so the rank, of an earlier call
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    dist.init_process_group("fake", rank=case.rank, world_size=case.ranks, store=FakeStore())
    says_gpu = patch.object(FakeTensor, "is_cuda", property(lambda _: True), create=True)
    try:
        with says_gpu, _with_values(placements, _OFFSETS), _with_values(compact_adamw, _CODES):
            return trace_rank(case, FakeTensorMode(allow_non_fake_inputs=True))
    finally:
        dist.destroy_process_group()


def trace_rank(case: RankCase, fake: FakeTensorMode | None = None) -> Trace:
    """The trace of this process in the default group, with real tensors unless `fake` is given."""
    found = Trace()
    world, group = World(rank=case.rank, size=case.ranks), dist.group.WORLD
    assert group is not None
    mesh = init_device_mesh(
        "cpu", (case.replicas, case.ranks // case.replicas), mesh_dim_names=("replicate", "shard")
    )
    parallel = Parallel(
        world=world, group=group, settings=BackendSettings("fsdp2", case.replicas), device=_CPU,
        mesh=mesh, checkpoint_group=group,
    )  # fmt: skip
    module, batch = build_model(case.model, case.config, _CPU), case.batch()
    prepare_phase(module, case.setup)
    prepare_layers(module, case.config, _CPU)
    with fake or _nothing(), _noted(found):
        if fake:
            batch = batch._mapped(fake.from_tensor)
        shard(module, case.config, parallel)
        load_weights(module, case.model, _CPU)
        check_divisible(module.stored, case.model)
        optimizer = build_optimizer(module, case.config, case.setup.phase)
        backend = TorchBackend(module, None, optimizer, case.setup, parallel)
        _fill_moments(backend)
        _step(backend, batch, found)
        _plan_files(backend, found)
    return found


def _with_values(module: Any, name: str) -> Any:
    """A patch that gives real tensors to a function that computes Python numbers with them."""
    function = getattr(module, name)

    def real(*arguments: Any, **names: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **names)

    return patch.object(module, name, real)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _noted(found: Trace) -> Iterator[None]:
    """Within the block, what is read from files is noted, and zeros."""
    elements = Checkpoint._elements

    def note(self: Checkpoint, info: TensorInfo, start: int, stop: int) -> Array:
        if isinstance(info, DerivedInfo):
            return elements(self, info, start, stop)
        found.reads.append((info.name, start, stop))
        found.read += (stop - start) * STORED[info.dtype].itemsize
        return np.zeros(stop - start, STORED[info.dtype])

    with patch.object(Checkpoint, "_elements", note):
        yield


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _fill_moments(backend: TorchBackend) -> None:
    """As after a first step, so that the step that is traced is like all others.

    DTensor then knows the shapes of all results; finding them counts as memory.
    """
    optimizer = backend.optimizer
    for weight in _trained(optimizer):
        if isinstance(optimizer, CompactAdamW):
            optimizer.state[weight] = optimizer.fresh_state(weight)
        weight.grad = torch.zeros_like(weight)
    _update(backend)


def _update(backend: TorchBackend) -> None:
    """The step of the optimizer, of `CompactAdamW` only the clipping."""
    optimizer = backend.optimizer
    looks = isinstance(optimizer, CompactAdamW)  # at addresses, which fake tensors do not have
    with patch.object(optimizer, "step") if looks else _nothing():
        backend.step(1.0)


def _step(backend: TorchBackend, batch: Batch, found: Trace) -> None:
    """One step under torch's tracker of memory and a count of what collectives move."""
    tracker = FSDPMemTracker(backend.module, backend.optimizer)
    tracker.track_inputs((batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens))
    micro_batches = backend.setup.config.micro_batches(backend.parallel.size)
    with Collectives(found), tracker:
        for number in range(micro_batches):
            if number:
                tracker.reset_mod_stats()
            backend.backward(batch, 1.0, last=number == micro_batches - 1)
        last = backend.parallel.mesh.shape[1] - 1
        found.held = _held(backend, backend.parallel.mesh.get_local_rank("shard"))
        found.last = _held(backend, last)
        _update(backend)
    [peak] = tracker.get_tracker_snapshot("peak").values()
    found.peak = {str(getattr(kind, "value", kind)): size for kind, size in peak.items()}


def _held(backend: TorchBackend, coordinate: int) -> Held:
    """What the rank at a place of the shards' dimension of the mesh holds."""
    trained, states = _trained(backend.optimizer), backend.optimizer.state.values()
    moments = [value for state in states for name, value in state.items() if name != "step"]
    tensors = backend.module.parameters(), [weight.grad for weight in trained], moments
    return Held(*(sum(_bytes_at(one, coordinate) for one in many) for many in tensors))


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the bytes of whole tensors in collectives to a trace, by what these do."""

    kinds: ClassVar = {
        _c10d._allgather_base_.default: "gather",
        _c10d._reduce_scatter_base_.default: "reduce",
        _c10d.allreduce_.default: "all-reduce",
        _functional.all_gather_into_tensor.default: "gather",
        _functional.all_reduce.default: "all-reduce",
    }

    def __init__(self, found: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace = func.namespace
        if namespace in ("c10d", "_c10d_functional") and not any(
            word in func.__name__ for word in ("wait", "wrap")
        ):
            kind = self.kinds.get(func, str(func))
            tensors = args[0] if isinstance(args[0], list) else args[:2]
            sizes = [one.nbytes for one in [*tensors, result] if isinstance(one, Tensor)]
            self.found.calls[kind] += 1
            self.found.traffic[kind] += max(sizes, default=0)
        return result


def _bytes_at(tensor: Tensor | None, coordinate: int) -> int:
    """Bytes of the rows of a sharded tensor at a place of the shards' dimension of the mesh."""
    assert isinstance(tensor, DTensor)
    rows, shards = tensor.shape[0], tensor.device_mesh.shape[-1]
    local, _ = Shard.local_shard_size_and_offset(rows, shards, coordinate)
    return local * tensor.shape[1:].numel() * tensor.dtype.itemsize


def _plan_files(backend: TorchBackend, found: Trace) -> None:
    """What the rank writes of a checkpoint and of the exported model."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(backend._state(), is_coordinator=backend.parallel.is_main)
    found.checkpoint = _bytes_of(planner.create_local_plan())
    like = Checkpoint.open(backend.setup.model)
    specs = [TensorSpec(one.name, one.copied_dtype, one.shape) for one in like.tensors.values()]
    layout = CheckpointLayout.by_size(specs)
    for one in backend.shards():
        check_shard(one, layout, like.directory)
        found.exports.append((one.name, one.start, one.stop))
        found.export += one.values.numel() * STORED[layout.tensors[one.name].dtype].itemsize


def _bytes_of(plan: SavePlan) -> int:
    chunks = [item.tensor_data for item in plan.items if item.tensor_data]
    return sum(one.chunk.sizes.numel() * one.properties.dtype.itemsize for one in chunks)
