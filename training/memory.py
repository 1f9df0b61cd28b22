"""The memory that training takes on one process, by shape and settings, and what is available."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from cpt_merge.checkpoint.loaded import text_section
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import (
    OTHER_MODALITIES,
    is_routed,
    kind_of,
    layer_of,
    routed_parameters,
)
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say_once
from cpt_merge.training.config import LoraConfig, Offload, TrainingConfig
from cpt_merge.training.flops import experts, experts_taken

if TYPE_CHECKING:
    import torch  # `cpt-merge plan` estimates without it

Strategy = Literal["single", "fsdp2", "zero1", "zero2", "zero3"]
ZERO_STRATEGIES: dict[int, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}  # by DeepSpeed's stage
ZERO_BUCKET = 5e8  # elements; DeepSpeed's default reduce_bucket_size


NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers")
_HEADS = "num_attention_heads"  # which decoders without attention (Mamba, RWKV) do not have


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that decide its memory."""

    parameters: int  # a tied matrix once
    vocabulary: int
    width: int
    layers: int
    matrices: int  # 1 if embedding and head are tied, else 2
    intermediate: int  # width of the gated MLP; with experts, of all that a token is sent to
    heads: int  # 0 without attention
    query: int  # heads * head_dim
    key_value: int  # key-value heads * head_dim
    towers: int = 0  # parameters outside the decoder, which training does not load
    routed: int = 0  # parameters of the experts that routers choose among
    experts: int = 0  # in a layer, without shared ones
    taken: float = 0  # of them by a token

    @staticmethod
    def from_config(
        config: Mapping[str, Any], parameters: int, name: str, towers: int = 0, routed: int = 0
    ) -> ModelShape:
        """From the values of a config.json. Raises `UserError` with `name` if one is missing.

        `routed` of the parameters are those of experts. What a family's published files leave out
        (Gemma 3) is the default of its class.
        """
        config = text_section(config)
        unsaid = routed and experts_taken(SimpleNamespace(**config)) is None
        if unsaid or any(config.get(wanted) is None for wanted in (*NEEDED, _HEADS)):
            config = _with_defaults(config)
        for wanted in NEEDED:
            if config.get(wanted) is None:
                raise UserError(
                    f"config.json of {name} has no {wanted}; "
                    "only decoder language models can be planned."
                )
        width, heads = int(config["hidden_size"]), int(config.get(_HEADS) or 0)
        head = config.get("head_dim") or width // max(heads, 1)
        named = SimpleNamespace(**config)
        count = experts(named) if routed else 0
        taken = _taken(named, count, name) if count else 0
        return ModelShape(
            parameters=parameters,
            vocabulary=int(config["vocab_size"]),
            width=width,
            layers=int(config["num_hidden_layers"]),
            matrices=1 if config.get("tie_word_embeddings") else 2,
            intermediate=_mlp_width(config, taken) or 4 * width,
            heads=heads,
            query=heads * head or width,  # of a layer without attention: what it projects to
            key_value=(config.get("num_key_value_heads") or heads) * head or width,
            towers=towers,
            routed=routed if count else 0,
            experts=count,
            taken=taken,
        )

    @staticmethod
    def of(checkpoint: Checkpoint, name: str) -> ModelShape:
        """Of a model on this machine; see `from_config`."""
        sizes = {tensor: info.size for tensor, info in checkpoint.tensors.items()}
        return ModelShape.of_sizes(checkpoint.config, sizes, name)

    @staticmethod
    def of_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], name: str) -> ModelShape:
        """Of a model whose tensors have so many elements; see `from_config`."""
        towers = sum(size for one, size in sizes.items() if kind_of(one) in OTHER_MODALITIES)
        parameters, routed = sum(sizes.values()) - towers, routed_parameters(sizes)
        return ModelShape.from_config(config, parameters, name, towers, routed)

    def resized(self, vocabulary: int) -> ModelShape:
        """The same model with another number of rows."""
        more = (vocabulary - self.vocabulary) * self.width * self.matrices
        return ModelShape(
            **(vars(self) | {"parameters": self.parameters + more, "vocabulary": vocabulary})
        )

    @property
    def vocabulary_parameters(self) -> int:
        """Parameters of embedding and head."""
        return self.vocabulary * self.width * self.matrices

    @property
    def layer_parameters(self) -> float:
        """Parameters of one decoder layer."""
        return (self.parameters - self.vocabulary_parameters) / max(self.layers, 1)

    @property
    def active(self) -> int:
        """Parameters that a token uses: of the experts, those that it is sent to."""
        unused = self.routed * (1 - self.taken / self.experts) if self.experts else 0
        return self.parameters - round(unused)

    @property
    def active_layer_parameters(self) -> float:
        """The same of one decoder layer."""
        return (self.active - self.vocabulary_parameters) / max(self.layers, 1)


def _mlp_width(config: Mapping[str, Any], taken: float) -> int:
    """Width of the gated MLP, or of all experts together that a token uses; 0 if it is not said."""
    dense = int(config.get("intermediate_size") or 0)
    if not taken:
        return dense
    one = int(config.get("moe_intermediate_size") or dense)
    shared = (
        config.get("shared_expert_intermediate_size")
        or config.get("shared_intermediate_size")
        or one * (config.get("n_shared_experts") or config.get("num_shared_experts") or 0)
    )
    return round(taken * one) + int(shared)


def _taken(config: Any, count: int, name: str) -> float:
    """Experts that a token is sent to; all of them, with a line, if nothing says how many."""
    found = experts_taken(config)
    if found is None:
        say_once(
            f"{name}: its config.json does not say how many of its {count} experts a token takes; "
            "all are counted"
        )
    return min(found or count, count)


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a config.json, and those of its family's class for what it leaves out.

    Importing the class takes seconds, so call it only if something is missing.
    """
    from cpt_merge.checkpoint.text_models import config_of

    try:
        model = config_of(config)
        text = model.get_text_config(decoder=True) if model.sub_configs else model
        wanted = (*NEEDED, _HEADS)
        computed = {name: getattr(text, name, None) for name in wanted}  # Nemotron-H counts a list
        complete = {**computed, **model.to_dict(), **text.to_dict()}
    except Exception:  # an unknown family, or values that training will name
        return config
    return {**complete, **config}


@dataclass(frozen=True)
class MemorySetup:
    """What decides the memory of one process, besides the model."""

    strategy: Strategy
    shards: int  # processes that share the parameters (HSDP: of one replica); 1: not divided
    precision: str
    sequence_length: int
    micro_batch_size: int
    micro_batches: int  # of one process in one step
    loss_chunk: int
    activation_checkpointing: str = "none"  # none | selective | full
    attention: str = "sdpa"
    compile: bool = False
    vocabulary_only: bool = False  # only embedding and head are trained
    offload: Offload = "none"  # what is in the CPU's memory

    @staticmethod
    def of(config: TrainingConfig, strategy: Strategy, processes: int, shards: int) -> MemorySetup:
        """The setup of a configuration on so many processes."""
        return MemorySetup(
            strategy, shards, config.precision, config.sequence_length, config.micro_batch_size,
            config.micro_batches(processes), config.loss_chunk, config.activation_checkpointing,
            config.attention, config.compile,
        )  # fmt: skip

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.sequence_length * self.micro_batch_size

    def trained(self, shape: ModelShape) -> int:
        """Parameters that have gradients."""
        return shape.vocabulary_parameters if self.vocabulary_only else shape.parameters


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one process, by part. Not all parts exist at the same time: see `total`."""

    parameters: float
    gradients: float
    optimizer: float
    # not divided at the end of the forward pass, with the gradients of earlier micro-batches
    gathered_forward: float
    gathered_backward: float  # not divided at the end of the backward pass
    activations: float
    recomputed: float  # activations of one layer, if the backward pass computes them again
    logits: float

    @property
    def total(self) -> float:
        """The peak: at the loss (or the last layer recomputed), or at the end of the backward pass.

        In between, activations are freed as gradients appear, so the peak is at one of the two.
        """
        loss = self.gathered_forward + self.activations + max(self.logits, self.recomputed)
        end = self.gathered_backward + self.gradients + self.recomputed
        return self.parameters + self.optimizer + max(loss, end)


def estimate_memory(shape: ModelShape, setup: MemorySetup) -> MemoryEstimate:
    """Memory of one process.

    The allocator's fragments and the libraries' own buffers (1-2 GB on a GPU) are not included.
    Parameters, gradients and optimizer are exact up to the padding of the last shard; `_single`,
    `_fsdp2` and `_zero` say what is divided. Only trained weights have gradients and moments.
    """
    divided = {"single": _single, "fsdp2": _fsdp2}.get(setup.strategy, _zero)
    return MemoryEstimate(
        *divided(shape, setup), *_activations(shape, setup), _logits(shape, setup)
    )


def adapter_parameters(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> int:
    """Parameters of the adapters (training/model/lora.py) of a model with tensors of these shapes.

    A linear layer of width h and i gets rank (h + i). Of the experts that routers choose among,
    which files hold one by one and training as one tensor, none has an adapter.
    """
    matrices = [
        sum(shape)
        for name, shape in shapes.items()
        if len(shape) == 2
        and name.endswith(".weight")
        and layer_of(name) is not None
        and kind_of(name) not in ("router", "norm")
        and not is_routed(name)
        and config.covers(name.removesuffix(".weight"))
    ]
    return config.rank * sum(matrices)


def _single(shape: ModelShape, setup: MemorySetup) -> tuple[float, float, float, float, float]:
    """One process without FSDP2, letters as in `_fsdp2`: m P, m T and 2 m T.

    If the compute type is not the master's: a copy of all parameters in it, c P, and in the
    backward pass the gradient of the largest matrix, c V h. In the forward pass also the gradients
    of earlier micro-batches, m T.
    """
    master, c = (2 if setup.precision == "pure-bf16" else 4), setup.compute
    trained = setup.trained(shape)
    copy, passing = (
        (c * shape.parameters, c * shape.vocabulary * shape.width) if c != master else (0, 0)
    )
    held = master * trained if setup.micro_batches > 1 else 0
    return (
        master * shape.parameters,
        master * trained,
        2 * master * trained,
        copy + held,
        copy + passing,
    )


def _fsdp2(shape: ModelShape, setup: MemorySetup) -> tuple[float, float, float, float, float]:
    """FSDP2, and HSDP with the shards of one replica.

    With N shards, P parameters of which T are trained, m bytes of the master type (4; pure-bf16: 2)
    and c bytes of the compute type:

        parameters m P / N    gradients m T / N    optimizer (AdamW's two moments) 2 m T / N

    Gathered in the forward pass, in the compute type: the root unit (embedding and head), which
    stays until the backward pass ends, and two layers, the current and the next; also the gradients
    of earlier micro-batches, m T / N. In the backward pass also the gradients of the root and of
    one layer, and one unit's in fp32 for the reduction, which follows every micro-batch.
    """
    master, c = (2 if setup.precision == "pure-bf16" else 4), setup.compute
    layer, vocabulary, trained = (
        shape.layer_parameters,
        shape.vocabulary_parameters,
        setup.trained(shape),
    )
    forward = c * (vocabulary + 2 * layer)
    reduced = (c + 4) * (0 if setup.vocabulary_only else layer)
    backward = c * 2 * vocabulary + max(2 * c * layer + reduced, 4 * vocabulary)
    mine = master / setup.shards
    forward += trained * mine if setup.micro_batches > 1 else 0
    return shape.parameters * mine, trained * mine, 2 * trained * mine, forward, backward


def _zero(shape: ModelShape, setup: MemorySetup) -> tuple[float, float, float, float, float]:
    """DeepSpeed's ZeRO (Rajbhandari et al., ZeRO, 2020, section 3), letters as in `_fsdp2`:

        parameters c P, from stage 3 / N    gradients c T, from stage 2 / N
        optimizer 12 T / N, from stage 1: fp32 masters and two moments, for fp32 training too

    Gathered in the forward pass: the gradients of earlier micro-batches; for stage 3 embedding,
    head and two layers in the compute type, and the gradients that it always holds. In the backward
    pass the optimizer's gradient in fp32, 4 T / N, and two buckets of the reduction. Counted in
    DeepSpeed 0.19 on two CPU processes, bf16: 8.3, 8.3 and 10.0 bytes per parameter after a step of
    stages 1, 2, 3; this gives 8.0, 8.0 and 10.0.
    """
    if setup.precision == "pure-bf16":
        raise UserError(
            "training.precision: pure-bf16 is not possible with DeepSpeed, "
            "which keeps fp32 masters; set bf16."
        )
    stage, c, trained = int(setup.strategy[-1]), setup.compute, setup.trained(shape)
    parameters = c * shape.parameters / (setup.shards if stage == 3 else 1)
    gradients = c * trained / (setup.shards if stage >= 2 else 1)
    whole = c * (shape.vocabulary_parameters + 2 * shape.layer_parameters) if stage == 3 else 0
    converted = 4 * trained / setup.shards
    backward = whole + converted + 2 * c * min(ZERO_BUCKET, trained)
    held = gradients + converted if stage == 3 else gradients if setup.micro_batches > 1 else 0
    forward = whole + held
    return parameters, gradients, 12 * trained / setup.shards, forward, backward


def _activations(shape: ModelShape, setup: MemorySetup) -> tuple[float, float]:
    """What autograd keeps of one micro-batch with the final norm, and what one layer recomputes."""
    whole = _kept_by_layer(shape, setup)
    final = (4 + 2 * setup.compute) * shape.width
    if setup.activation_checkpointing == "none":
        return setup.tokens * (shape.layers * whole + final), 0
    kept = setup.compute * shape.width  # the input of the layer
    if setup.activation_checkpointing == "selective":  # attention and every second matmul
        q, v, gate, down = shape.query, shape.key_value, shape.intermediate, shape.width
        products = q + v + gate + down
        kept += setup.compute * (shape.query + products) + 4 * shape.heads
    return setup.tokens * (shape.layers * kept + final), setup.tokens * whole


def _kept_by_layer(shape: ModelShape, setup: MemorySetup) -> float:
    """Bytes that autograd keeps of one token in a layer of LLaMA, counted in transformers' graph.

    For width h, MLP width i and c bytes of the compute type: two norms in fp32 (4 h each, and 4 for
    the root), and the gate, its activation and up (3 c i). Trained matrices keep their input, and
    trained norms the normalised one: 4 c h + c i. Attention: see `_kept_by_attention`. A compiled
    layer computes the norms in fp32 and the gate's activation again, so it keeps 8 h + c i less.
    Of E experts of which a token takes k: what each of them made (c h), the router's logits (12 E),
    and if the experts are trained, their inputs (c h each).
    """
    c, h, i = setup.compute, shape.width, shape.intermediate
    routed = shape.taken * c * h * (1 if setup.vocabulary_only else 2) + 12 * shape.experts
    norms, gated = (0, 2 * c * i) if setup.compile else (8 * h, 3 * c * i)
    frozen = norms + 8 + gated + routed + _kept_by_attention(shape, setup)
    return frozen if setup.vocabulary_only else frozen + 4 * c * h + c * i


def _kept_by_attention(shape: ModelShape, setup: MemorySetup) -> float:
    """The same of its attention, for a heads, sequence length s and query width q.

    flash keeps q, k, v, its output and an fp32 number per head. sdpa, given a mask for packed
    documents, repeats keys and values to the width q and keeps the mask in the compute type: c s.
    eager keeps the weights in fp32 and in the compute type: a s (4 + c).
    """
    c, q, s = setup.compute, shape.query, setup.sequence_length
    if setup.attention == "eager":
        scores = shape.heads * s * (4 if c == 4 else 4 + c)
        return 3 * c * q + scores + (0 if setup.vocabulary_only else c * q)
    if setup.attention == "sdpa":
        return 4 * c * q + c * s + 4 * shape.heads
    return 2 * c * (q + shape.key_value) + 4 * shape.heads


def _logits(shape: ModelShape, setup: MemorySetup) -> float:
    """The head and the loss (training/model/loss.py).

    For chunks of t tokens, vocabulary V, width h and c bytes: a chunk's logits in fp32, which
    become its gradient, and that in the compute type if it is another one; also the gradient of the
    head, 4 V h, and of the hidden states. With bf16, the chunk's part of the head's gradient exists
    at the same time when the fp32 logits are gone: c t V + 8 V h.
    """
    c, hidden = setup.compute, setup.compute * setup.tokens * shape.width
    chunk = min(setup.loss_chunk, setup.tokens) * shape.vocabulary
    head = 4 * shape.vocabulary * shape.width
    if c == 4:
        return 4 * chunk + head + hidden
    return max((4 + c) * chunk + head, c * chunk + 2 * head) + hidden


def available_memory(device: torch.device, environment: Mapping[str, str] = os.environ) -> int:
    """Bytes that this process can use: the GPU's total, or its share of the free memory."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [_memory_free(), *_cgroup_limits()]
    if int(environment.get("SLURM_MEM_PER_NODE", "0")):  # MB; 0: the whole node
        limits.append(int(environment["SLURM_MEM_PER_NODE"]) * 2**20)
    return min(limits) // processes_on_node(environment)


def _memory_free(root: Path = Path("/")) -> int:
    lines = (root / "proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _cgroup_limits(root: Path = Path("/")) -> list[int]:
    """The limits of this process's control groups and of those around them, version 1 and 2."""
    found = []
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        files = [
            base / part / name for part in (inner, *inner.parents)
        ]  # in a container only the outermost is seen
        found += [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in found if text != "max"]


def processes_on_node(environment: Mapping[str, str]) -> int:
    """Processes on this node. Slurm writes `4(x2),3` for two nodes with four and one with three."""
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    counts = re.sub(r"\(x\d+\)", "", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return max(int(count) for count in counts.split(","))
