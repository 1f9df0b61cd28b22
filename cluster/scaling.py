"""How long a training step takes on a cluster under FSDP or HSDP, from shapes and datasheets.

A roofline per layer, and collectives by bandwidth and latency, overlapped as FSDP2 does.
docs/scaling.md says where each constant comes from, which published runs were used to fit it, and
how accurate the estimates of other runs are. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import Offload, TrainingConfig
from cpt_merge.training.flops import PEAKS, TERA, mfu
from cpt_merge.training.memory import (
    MemoryEstimate,
    MemorySetup,
    ModelShape,
    Trained,
    checkpoint_bytes,
    estimate_memory,
    heaviest,
    kept_activations,
    trained_by,
)

GIGA = 1e9
LINK_SHARE = 0.8  # of a link's rate, for large NCCL messages (235 of 300 GB/s: ml-engineering)
MEMORY_SHARE = 0.8  # of a GPU's nominal memory bandwidth, for elementwise kernels; assumed
# Seconds per collective and per hop within a node and between nodes: NCCL's tuning.cc, ring, Simple
START_LATENCY = 8.4e-6
LINK_HOP = 3.4e-6
NETWORK_HOP = 14.0e-6
STRAGGLER = 0.0253  # standard deviation of a GPU's step, as a share of it; fitted
RESERVE = 2e9  # bytes of a GPU that allocator and libraries take (see `estimate_memory`)
HOST_BANDWIDTH = 150e9  # bytes/s of a node's own memory, for AdamW on its CPUs; assumed
COMPACT_BYTES = 60  # per value: what the kernels of an 8-bit AdamW read and write; counted
GBIT_PER_GPU = 400.0  # network where none is given: one 400 Gbit/s adapter per GPU
STORAGE = 5e9  # bytes/s where none is given
# A node's own memory where none is given: a workstation's, or of servers 3 times that of the GPUs
# (Amazon's p4d, p5, g5.48xlarge and g6e.48xlarge have 3.1 to 4 times)
LEAST_NODE_MEMORY, NODE_MEMORY = 128e9, 3
HOST_RESERVE = 4e9  # bytes of it that a process takes with its libraries; assumed


@dataclass(frozen=True)
class GpuSpec:
    """A device: datasheets' rates in FLOP/s and bytes/s, and the shares that training reaches."""

    name: str
    peak: float  # dense, in the compute type
    matmul_share: float  # of the peak, in a step's matrix products; fitted once per chip
    attention_share: float  # of the peak, in flash attention, forward and backward
    memory: float  # bytes
    bandwidth: float  # of its memory
    link: float  # to the other GPUs of its node, one direction
    host_link: float  # to the host's memory, for pinned copies
    interference: float  # computing lost to hidden traffic, over its time on the link; fitted
    fp8: bool  # whether it has float8 matmuls
    hop: float = LINK_HOP  # seconds
    fitted: bool = True  # the shares, on published runs

    def stream(self, size: float) -> float:
        """Seconds to read or write `size` bytes of its memory."""
        return size / (self.bandwidth * MEMORY_SHARE)


# matmul_share and interference are fitted on two published runs each of A100 and H100
# (docs/scaling.md); the H200 has the H100's chip. attention_share: FlashAttention-2 reaches 50-73 %
# on A100 (Dao, 2023) and 298-335 TFLOP/s, causal, on H100. host_link: four fifths of PCIe 4 and 5
# x16, 31 and 63 GB/s.
_AMPERE = GpuSpec(
    "a100", PEAKS["A100"] * TERA, 0.8016, 0.55, 80e9, 2.039e12, 300e9, 25e9, 0.561, fp8=False
)
_HOPPER = GpuSpec(
    "h100", PEAKS["H100"] * TERA, 0.6948, 0.33, 80e9, 3.35e12, 450e9, 50e9, 0.788, fp8=True
)
# Meta's Grand Teton: 96 GB of HBM2e, 500 W; its peak is "between SXM and NVL" (torchtitan), here
# NVL's
_GRAND_TETON = replace(
    _HOPPER, name="h100-500w", peak=PEAKS["H100 NVL"] * TERA, memory=96e9, bandwidth=2.4e12
)
_PCIE4, _PCIE5 = 25e9, 50e9  # bytes/s, to the host and between GPUs without NVLink


def _assumed(
    name: str, peak: float, gigabytes: float, bandwidth: float, link: float, host: float, fp8: bool
) -> GpuSpec:
    """A GPU without published runs to fit: the A100's shares. Peak in TFLOP/s, rates in bytes/s."""
    return GpuSpec(
        name, peak * TERA, _AMPERE.matmul_share, _AMPERE.attention_share, gigabytes * GIGA,
        bandwidth, link, host, _AMPERE.interference, fp8, fitted=False,
    )  # fmt: skip


# Memory, bandwidth and links of the datasheets that training/flops.py names for the peaks
GPUS = {
    gpu.name: gpu
    for gpu in (
        replace(_AMPERE, name="a100-40gb", memory=40e9, bandwidth=1.555e12),
        _AMPERE,  # SXM, 80 GB
        _HOPPER,  # SXM5, 700 W
        _GRAND_TETON,
        replace(_HOPPER, name="h200", memory=141e9, bandwidth=4.8e12),
        _assumed("rtx3090", PEAKS["RTX 3090"], 24, 936e9, _PCIE4, _PCIE4, fp8=False),
        _assumed("rtx4090", PEAKS["RTX 4090"], 24, 1008e9, _PCIE4, _PCIE4, fp8=True),
        _assumed("rtx5090", PEAKS["RTX 5090"], 32, 1792e9, _PCIE5, _PCIE5, fp8=True),
        _assumed("l4", PEAKS["L4"], 24, 300e9, _PCIE4, _PCIE4, fp8=True),
        _assumed("l40s", PEAKS["L40S"], 48, 864e9, _PCIE4, _PCIE4, fp8=True),
        _assumed("a6000", PEAKS["A6000"], 48, 768e9, _PCIE4, _PCIE4, fp8=False),
        _assumed("h20", PEAKS["H20"], 96, 4.0e12, 450e9, _PCIE5, fp8=True),
        _assumed("b200", PEAKS["B200"], 180, 7.7e12, 900e9, _PCIE5, fp8=True),
        _assumed("mi300x", PEAKS["MI300X"], 192, 5.3e12, 448e9, _PCIE5, fp8=True),
    )
}
_NUMBERS = ("memory", "tflops", "bandwidth")  # of a GPU that is not in the table


_BY_NUMBERS = (
    "--gpu memory=48,tflops=181,bandwidth=864 (GB, dense bf16, GB/s; and link=25, GB/s to the "
    "other GPUs, PCIe 4 if not given)"
)


def _numbers_of(text: str) -> dict[str, float]:
    """The numbers of `gpu_named`. Raises `UserError` for what is wrong with them."""
    numbers: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        wrong = None
        if name not in {*_NUMBERS, "link"}:
            wrong = f"{name} in --gpu {text} is none of {', '.join(_NUMBERS)}, link"
        elif name in numbers:
            wrong = f"{name} stands twice in --gpu {text}"
        else:
            try:
                numbers[name] = float(value)
            except ValueError:
                numbers[name] = math.nan
            if not 0 < numbers[name] < math.inf:
                wrong = f"{name} = {value} in --gpu {text} is no number above 0"
        if wrong:
            raise UserError(f"{wrong}; give {_BY_NUMBERS}.")
    if missing := [name for name in _NUMBERS if name not in numbers]:
        raise UserError(f"{missing[0]} is missing in --gpu {text}; give {_BY_NUMBERS}.")
    return numbers


def gpu_named(text: str) -> GpuSpec:
    """A GPU by its name, or by numbers: `memory=48,tflops=181,bandwidth=864,link=25` (GB, GB/s).

    Raises `UserError` for an unknown name, and for numbers that are missing or none.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    if "=" not in text:
        raise UserError(
            f"the GPU {text!r} is not known; use one of {', '.join(GPUS)}, or give its numbers: "
            f"{_BY_NUMBERS}."
        )
    numbers = _numbers_of(text)
    link = numbers.get("link", _PCIE4 / GIGA) * GIGA
    return _assumed(
        f"{numbers['memory']:g} GB GPU", numbers["tflops"], numbers["memory"],
        numbers["bandwidth"] * GIGA, link, _PCIE4, fp8=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    gpu: GpuSpec
    nodes: int
    gpus_per_node: int
    network: float  # of one node, bytes/s in one direction
    node_memory: float = math.inf  # bytes of a node's own memory

    @staticmethod
    def of(
        gpu: str,
        nodes: int,
        gpus_per_node: int,
        network_gbit: float | None = None,
        node_gigabytes: float | None = None,
    ) -> Cluster:
        """From a GPU (see `gpu_named`), and the network of a node in Gbit/s and its memory in GB.

        Not given, these are `GBIT_PER_GPU`, and `NODE_MEMORY` times the GPUs' memory. Raises
        `UserError` for an unknown GPU.
        """
        found, gbit = gpu_named(gpu), network_gbit or GBIT_PER_GPU * gpus_per_node
        usual = max(LEAST_NODE_MEMORY, NODE_MEMORY * gpus_per_node * found.memory)
        memory = node_gigabytes * GIGA if node_gigabytes else usual
        return Cluster(found, nodes, gpus_per_node, gbit * GIGA / 8, memory)

    @property
    def ranks(self) -> int:
        """The number of GPUs, each with one process."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Workload:
    """What one GPU does in one step."""

    sequence_length: int
    micro_batch_size: float  # a mean: the last micro-batch of a step may be smaller
    micro_batches: int
    precision: str = "bf16"
    activation_checkpointing: str = "none"
    compile: bool = False
    fp8: bool = False
    loss_chunk: int = 1024
    attention: str = "flash"
    trained: Trained = "all"
    moments: str = "full"  # full | 8bit
    offload: Offload = "none"
    offload_activations: bool = False
    asynchronous: bool = False  # whether checkpoints are written from a copy in a node's memory
    reduce_bytes: int = 4  # per reduced gradient; ours are fp32, those of some published runs bf16

    @staticmethod
    def of(config: TrainingConfig, ranks: int) -> Workload:
        """A recipe's workload on so many GPUs, in the phase with the longest sequences.

        Raises `UserError` if its batch does not divide.
        """
        config.check_processes(ranks, kind="GPUs")
        config = config.longest
        if config.precision == "fp32":
            raise UserError(
                "the speed of GPUs can be estimated for bf16 only; "
                "set training.precision to bf16 or pure-bf16."
            )
        sequences = config.global_batch_size // ranks
        micro_batches = -(-sequences // config.micro_batch_size)
        return Workload(
            sequence_length=config.sequence_length,
            micro_batch_size=sequences / micro_batches,
            micro_batches=micro_batches,
            precision=config.precision,
            activation_checkpointing=config.activation_checkpointing,
            compile=config.compile,
            fp8=config.fp8,
            loss_chunk=config.loss_chunk,
            attention=config.attention,
            trained=trained_by(config, heaviest(config)),
            moments=config.optimizer.moments,
            offload=config.offload or "none",
            offload_activations=config.offload_activations,
            asynchronous=config.checkpoints.asynchronous,
        )

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.precision == "fp32" else 2

    @property
    def master(self) -> int:
        """Bytes of a number of the master weights and the moments."""
        return 2 if self.precision == "pure-bf16" else 4

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch."""
        return self.sequence_length * self.micro_batch_size

    def memory_setup(self, shards: int) -> MemorySetup:
        """The setup for `estimate_memory`, on one of `shards` GPUs that share a model."""
        sequences = math.ceil(self.micro_batch_size)
        return MemorySetup(
            "fsdp2", shards, self.precision, self.sequence_length, sequences, self.micro_batches,
            self.loss_chunk, self.activation_checkpointing, self.attention, self.compile,
            self.trained, self.moments, self.offload, self.offload_activations,
        )  # fmt: skip


@dataclass(frozen=True)
class Compute:
    """Seconds of one GPU, by what bounds them."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> float:
        """Kernels run one after the other."""
        return self.matmul + self.attention + self.memory

    def times(self, matmul: float, attention: float, memory: float) -> Compute:
        """Each part multiplied by a factor."""
        return Compute(self.matmul * matmul, self.attention * attention, self.memory * memory)

    def __add__(self, other: Compute) -> Compute:
        return Compute(
            self.matmul + other.matmul, self.attention + other.attention, self.memory + other.memory
        )


# What the backward pass recomputes of the forward pass: matmuls, attention, elementwise
# (training/model/recompute.py)
RECOMPUTED = {"none": (0.0, 0.0, 0.0), "selective": (0.5, 0.0, 1.0), "full": (1.0, 1.0, 1.0)}


def layer_compute(shape: ModelShape, work: Workload, gpu: GpuSpec) -> tuple[Compute, Compute]:
    """(forward, backward) of one decoder layer for one micro-batch.

    Forward, per token: 2 FLOPs per parameter; causal attention, 2 q s FLOPs (half of 4 q s; query
    width q, sequence length s); and `_elementwise_bytes`. Backward: twice the matmuls and the
    elementwise part, 2.5 times the attention, which flash attention recomputes (Dao,
    FlashAttention-2, 2023, section 4.1), and what activation checkpointing recomputes. fp8 doubles
    the rate of the matmuls.
    """
    rate = gpu.peak * gpu.matmul_share * (2 if work.fp8 else 1)
    forward = Compute(
        work.tokens * 2 * shape.active_layer_parameters / rate,
        work.tokens * 2 * shape.query * work.sequence_length / (gpu.peak * gpu.attention_share),
        gpu.stream(work.tokens * _elementwise_bytes(shape, work)),
    )
    recomputed = forward.times(*RECOMPUTED[work.activation_checkpointing])
    products = 2 if work.trained == "all" else 1  # frozen matrices need no gradients of their own
    return forward, forward.times(products, 2.5, 2) + recomputed


def _elementwise_bytes(shape: ModelShape, work: Workload) -> float:
    """Bytes that a LLaMA layer reads and writes outside of matmuls, per token of the forward pass.

    For width h, query and key width q + k, MLP width i and c bytes of the compute type:

                            compiled    one kernel per operation
        two norms           4 c h       2 (28 + 4 c) h   to fp32, square, mean, scale, back
        rotary embedding    2 c (q+k)   10 c (q+k)
        two residual sums   6 c h       6 c h
        gated activation    3 c i       5 c i

    fp8: the inputs of each matmul and, backward, the gradients are read twice and written once, 5
    bytes an element. A third of it is counted here, because the backward pass counts this size
    twice.
    """
    c, h, i, rotated = work.compute, shape.width, shape.intermediate, shape.query + shape.key_value
    if work.compile:
        size = 10 * c * h + 2 * c * rotated + 3 * c * i
    else:
        size = (2 * (28 + 4 * c) + 6 * c) * h + 10 * c * rotated + 5 * c * i
    cast = 5 * (7 * h + 2 * shape.query + 2 * shape.key_value + 3 * i) / 3
    return size + (cast if work.fp8 else 0)


def _head_compute(shape: ModelShape, work: Workload, gpu: GpuSpec) -> Compute:
    """Head and loss of a micro-batch: 6 V h FLOPs a token, 12 + 3 c bytes a logit."""
    flops = 6 * shape.vocabulary * shape.width
    return Compute(
        matmul=work.tokens * flops / (gpu.peak * gpu.matmul_share),
        memory=gpu.stream(work.tokens * shape.vocabulary * (12 + 3 * work.compute)),
    )


@dataclass(frozen=True)
class Ring:
    """Ranks of a collective on `nodes` nodes. Each GPU of these nodes is in one such ring."""

    ranks: int
    nodes: int

    def seconds(self, size: float, cluster: Cluster, passes: int = 1) -> float:
        """All-gather or reduce-scatter of a tensor of `size` bytes; an all-reduce is two passes.

            passes * ((n - 1) / n * size / bandwidth + latency)       (Thakur et al., 2005: ring)

        Between nodes, a ring has the part of a node's network that its ranks there account for:
        FSDP over all GPUs has all of it, since each node receives the tensor once; HSDP's rings,
        one for each GPU of a node, share it.
        """
        if self.ranks == 1:
            return 0.0
        bandwidth = cluster.gpu.link
        if self.nodes > 1:
            network = cluster.network * self.ranks / self.nodes / cluster.gpus_per_node
            bandwidth = min(bandwidth, network)
        hops = cluster.gpu.hop * (self.ranks - self.nodes) + NETWORK_HOP * (self.nodes - 1)
        return passes * (self.moved(size) / (bandwidth * LINK_SHARE) + hops + START_LATENCY)

    def moved(self, size: float) -> float:
        """Bytes that each rank sends in one pass."""
        return (self.ranks - 1) / self.ranks * size


@dataclass(frozen=True)
class Sharding:
    """FSDP over all GPUs (one replica), or HSDP: replicas, each sharded over neighbouring GPUs."""

    cluster: Cluster
    replicas: int = 1

    def __post_init__(self) -> None:
        ranks, node = self.cluster.ranks, self.cluster.gpus_per_node
        if ranks % self.replicas or (self.shards % node and node % self.shards):
            raise UserError(
                f"{self.replicas} replicas do not divide {self.cluster.nodes} nodes of {node} GPUs "
                f"evenly; use {self.cluster.nodes}, one a node."
            )

    @property
    def shards(self) -> int:
        """The number of GPUs of one replica."""
        return self.cluster.ranks // self.replicas

    @property
    def shard_ring(self) -> Ring:
        """The GPUs of one replica."""
        return Ring(self.shards, max(1, self.shards // self.cluster.gpus_per_node))

    @property
    def replica_ring(self) -> Ring:
        """The GPUs that have the same shard."""
        return Ring(self.replicas, min(self.replicas, self.cluster.nodes))

    def gather(self, size: float) -> Traffic:
        """Gather parameters of `size` bytes."""
        return self._on(self.shard_ring, size)

    def reduce(self, size: float, over_replicas: bool) -> Traffic:
        """Reduce gradients of `size` bytes into shards, and the shards over the replicas."""
        traffic = self._on(self.shard_ring, size)
        if over_replicas:
            traffic += self._on(self.replica_ring, size / self.shards, passes=2)
        return traffic

    def _on(self, ring: Ring, size: float, passes: int = 1) -> Traffic:
        seconds = ring.seconds(size, self.cluster, passes)
        moved = passes * ring.moved(size) / (self.cluster.gpu.link * LINK_SHARE)
        return Traffic(0.0, seconds, moved) if ring.nodes > 1 else Traffic(seconds, 0.0, moved)


@dataclass(frozen=True)
class Traffic:
    """Seconds that the links within nodes and, at the same time, the network are busy."""

    link: float
    network: float
    moved: float  # seconds that the bytes alone take at the rate of the links within a node

    @property
    def seconds(self) -> float:
        """Seconds until both are done."""
        return max(self.link, self.network)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.link + other.link, self.network + other.network, self.moved + other.moved
        )

    def hidden_by(self, computing: float) -> tuple[float, float]:
        """(seconds that remain after so much computing, share of the traffic that it hides)."""
        if not self.seconds:
            return 0.0, 0.0
        return max(0.0, self.seconds - computing), min(1.0, computing / self.seconds)


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of one optimizer step, by part, and what follows from them."""

    ranks: int
    tokens: float  # of the step, over all ranks
    flops: float  # per token, by the formula of MFU
    peak: float
    matmul: float
    attention: float
    elementwise: float  # norms, activations, rotary embedding, loss: bound by memory
    copies: float  # of gathered parameters and of gradients, within the GPU
    optimizer: float
    host: float  # weights from the CPU's memory and gradients to it, if they are offloaded
    exposed: float  # communication that no computing hides
    contention: float  # computing time lost to hidden communication
    stragglers: float  # waiting for the slowest GPU

    @property
    def seconds(self) -> float:
        """The whole step."""
        computing = self.matmul + self.attention + self.elementwise + self.copies
        computing += self.optimizer + self.host
        return computing + self.exposed + self.contention + self.stragglers

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.tokens / self.seconds

    @property
    def tokens_per_second_per_device(self) -> float:
        """Of one GPU."""
        return self.tokens_per_second / self.ranks

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 .. 1, as `training.flops` defines it."""
        return mfu(self.tokens_per_second_per_device, self.flops, self.peak)

    @property
    def exposed_share(self) -> float:
        """The share of the step in which GPUs only wait for communication."""
        return self.exposed / self.seconds

    def hours(self, tokens: float) -> float:
        """Wall-clock hours for so many tokens, without evaluations, checkpoints and restarts."""
        return tokens / self.tokens_per_second / 3600


def flops_of(shape: ModelShape, sequence_length: int, trained: Trained = "all") -> float:
    """FLOPs per token, forward and backward, by the formula of `training.flops.flops_per_token`."""
    lookup = shape.vocabulary * shape.width if shape.matrices == 2 else 0
    frozen = 0 if trained == "all" else shape.active - shape.vocabulary_parameters
    passes = 6 * (shape.active - lookup) - 2 * frozen
    return passes + 12 * shape.layers * shape.query * sequence_length


def estimate_step(
    shape: ModelShape, work: Workload, cluster: Cluster, replicas: int = 1
) -> StepEstimate:
    """One step of FSDP over all GPUs, or of HSDP with several replicas.

    A layer's collectives run while the layer before it computes, so max(0, communication -
    computing) of them is exposed. All communication is exposed before the first layer (gathering
    embedding and head) and after the last (the embedding's gradient). Hidden communication costs
    `interference` of computing. HSDP reduces over its replicas in the last micro-batch only
    (training/distributed/fsdp.py).
    """
    sharding, gpu, count = Sharding(cluster, replicas), cluster.gpu, work.micro_batches
    forward, backward = layer_compute(shape, work, gpu)
    computing = (forward + backward).times(*[shape.layers] * 3) + _head_compute(shape, work, gpu)
    first, last = (
        _overlap(shape, work, sharding, forward, backward, over_replicas)
        for over_replicas in (False, True)
    )
    exposed, contention = (first[part] * (count - 1) + last[part] for part in (0, 1))
    copied = 0.0
    if sharding.shards > 1:  # out of two gathers, into one reduction
        copied = gpu.stream((5 * work.compute + 4) * shape.parameters)
    # The expected maximum of so many normal variables
    slowest = STRAGGLER * math.sqrt(2 * math.log(cluster.ranks))
    return StepEstimate(
        ranks=cluster.ranks,
        tokens=work.tokens * count * cluster.ranks,
        flops=flops_of(shape, work.sequence_length, work.trained),
        peak=gpu.peak,
        matmul=count * computing.matmul,
        attention=count * computing.attention,
        elementwise=count * computing.memory,
        copies=count * copied,
        optimizer=_optimizer_seconds(shape, work, sharding),
        host=count * _host_seconds(shape, work, sharding),
        exposed=exposed,
        contention=contention,
        stragglers=slowest * count * computing.total,
    )


def _optimizer_seconds(shape: ModelShape, work: Workload, sharding: Sharding) -> float:
    """AdamW reads 4 numbers and writes 3, clipping reads and writes 3; offloaded, on the CPUs."""
    trained, _ = work.memory_setup(sharding.shards).split(shape)
    value = COMPACT_BYTES if work.moments == "8bit" else 10 * work.master
    size = value * trained / sharding.shards
    if work.offload == "none":
        return sharding.cluster.gpu.stream(size)
    return size * sharding.cluster.gpus_per_node / HOST_BANDWIDTH


def _host_seconds(shape: ModelShape, work: Workload, sharding: Sharding) -> float:
    """What a micro-batch sends to the host and gets from it; computing waits for it.

    The shards of the weights for both passes, and gradients; activations there and back.
    """
    setup, size = work.memory_setup(sharding.shards), 0.0
    if work.offload != "none":
        trained, frozen = setup.split(shape)
        weights = 2 * (setup.master * trained + setup.frozen * frozen)
        size += (weights + setup.master * trained) / sharding.shards
    if work.offload_activations:
        size += 2 * kept_activations(shape, setup)
    return size / sharding.cluster.gpu.host_link


def _overlap(
    shape: ModelShape,
    work: Workload,
    sharding: Sharding,
    forward: Compute,
    backward: Compute,
    over_replicas: bool,
) -> tuple[float, float]:
    """(exposed, contention) of one micro-batch, in seconds."""
    sizes = UnitSizes.of(shape, work)
    gathered = sharding.gather(sizes.layer)
    reduced = sharding.reduce(sizes.layer_gradient, over_replicas)
    exposed = sharding.gather(sizes.matrix * shape.matrices).seconds
    exposed += sharding.reduce(sizes.matrix_gradient, over_replicas).seconds
    taken = 0.0
    if shape.matrices == 2:
        # The backward pass gathers the embedding again, and reduces the head's gradient early
        again = sharding.gather(sizes.matrix)
        again += sharding.reduce(sizes.matrix_gradient, over_replicas)
        taken += again.moved
    for computing, traffic in ((forward, gathered), (backward, gathered + reduced)):
        remaining, hidden = traffic.hidden_by(computing.total)
        exposed += shape.layers * remaining
        taken += shape.layers * hidden * traffic.moved
    return exposed, sharding.cluster.gpu.interference * taken


@dataclass(frozen=True)
class UnitSizes:
    """Bytes of what FSDP2 gathers and reduces at once: a decoder layer; embedding or head."""

    layer: float  # in the compute type
    layer_gradient: float
    matrix: float
    matrix_gradient: float

    @staticmethod
    def of(shape: ModelShape, work: Workload) -> UnitSizes:
        """Frozen layers are gathered, too, with their adapters."""
        setup, matrix = work.memory_setup(1), shape.vocabulary * shape.width
        layer, trained = setup.layer(shape), setup.trained_of_layer(shape)
        c, r = work.compute, work.reduce_bytes
        return UnitSizes(c * layer, r * trained, c * matrix, r * matrix)


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of the whole tensors that the collectives of a step gather and reduce, for one rank."""

    gathered: float
    reduced: float
    all_reduced: float  # over HSDP's replicas, once a step

    @staticmethod
    def of(shape: ModelShape, work: Workload, shards: int, replicas: int = 1) -> StepTraffic:
        """Both passes gather a layer and an embedding of its own, the forward pass alone the head.

        `benchmarks/dry_run.py` counts the same in a step of the product.
        """
        sizes = UnitSizes.of(shape, work)
        gathered = 2 * shape.layers * sizes.layer + (2 * shape.matrices - 1) * sizes.matrix
        reduced = shape.layers * sizes.layer_gradient + shape.matrices * sizes.matrix_gradient
        over_replicas = reduced / shards if replicas > 1 else 0.0
        count = work.micro_batches
        return StepTraffic(count * gathered, count * reduced, over_replicas)

    @property
    def total(self) -> float:
        """All of it."""
        return self.gathered + self.reduced + self.all_reduced


def memory_on(
    shape: ModelShape, work: Workload, cluster: Cluster, replicas: int = 1
) -> MemoryEstimate:
    """Memory of one rank; HSDP's shards are larger than FSDP's, as fewer GPUs share a replica.

    The CPU's memory also holds the copy that a checkpoint is written from.
    """
    shards = Sharding(cluster, replicas).shards
    setup = work.memory_setup(shards)
    memory = estimate_memory(shape, setup)
    copied = checkpoint_bytes(shape, setup) / shards if work.asynchronous else 0.0
    return replace(memory, on_host=memory.on_host + copied)


def on_node(memory: MemoryEstimate, cluster: Cluster) -> float:
    """Bytes of a node's own memory that its processes take."""
    return (memory.on_host + HOST_RESERVE) * cluster.gpus_per_node


def fits_gpu(memory: MemoryEstimate, cluster: Cluster) -> bool:
    """Whether a GPU has that much memory and what allocator and libraries need."""
    return memory.total + RESERVE <= cluster.gpu.memory


def fits(memory: MemoryEstimate, cluster: Cluster) -> bool:
    """Whether GPUs and nodes have that much memory."""
    return fits_gpu(memory, cluster) and on_node(memory, cluster) <= cluster.node_memory


def hsdp_ranges(
    shape: ModelShape, work: Workload, cluster: Cluster, limit: int = 256
) -> list[tuple[int, int]]:
    """(first, last) numbers of nodes on which HSDP with a replica per node is faster than FSDP.

    Every GPU keeps its micro-batches, so the batch grows with the nodes, up to `limit` of them.
    HSDP may win on two nodes, where its all-reduce is cheapest, and lose on more.
    """
    ranges: list[tuple[int, int]] = []
    for nodes in range(2, limit + 1):
        larger = replace(cluster, nodes=nodes)
        hsdp = estimate_step(shape, work, larger, nodes).seconds
        if hsdp < estimate_step(shape, work, larger).seconds:
            first = ranges.pop()[0] if ranges and ranges[-1][1] == nodes - 1 else nodes
            ranges.append((first, nodes))
    return ranges


@dataclass(frozen=True)
class CheckpointCost:
    """A checkpoint's bytes, and the seconds that it takes."""

    size: float  # master weights and two moments
    stall: float  # a lower bound: training waits while the shards are copied to the host
    background: float  # until it is on disk


def checkpoint_cost(
    shape: ModelShape, work: Workload, cluster: Cluster, replicas: int, storage: float
) -> CheckpointCost:
    """The cost of an asynchronous checkpoint, to storage of so many bytes/s in all.

    The stall follows from bandwidth alone: size / shards / link to the host. Planning comes on top:
    0.78 s were published for 70 B parameters on 1,856 GPUs with pinned memory and cached plans,
    where this gives 0.01 s.
    """
    shards = Sharding(cluster, replicas).shards
    size = checkpoint_bytes(shape, work.memory_setup(shards))
    return CheckpointCost(size, size / shards / cluster.gpu.host_link, size / storage)
