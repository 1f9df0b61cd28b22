"""The memory that training takes on one process, by shape and settings, and what is available."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from cpt_merge.training.config import MOMENT_BLOCK, LoraConfig, Offload, TrainingConfig
from cpt_merge.training.flops import experts, experts_taken
from cpt_merge.training.norms import multiply_in_fp32

if TYPE_CHECKING:
    import torch  # `cpt-merge plan` estimates without it

Strategy = Literal["single", "fsdp2", "zero1", "zero2", "zero3"]
ZERO_STRATEGIES: dict[int, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}  # by DeepSpeed's stage
ZERO_BUCKET = 5e8  # elements; DeepSpeed's default reduce_bucket_size


Trained = Literal["all", "vocabulary", "adapters"]  # adapters: also embedding and head

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
    adapters: int = 0  # parameters that `training.lora` adds, or would by its defaults
    norms: float = 0.0  # elements of a token that the norms of a layer see; 0: two of the width
    wide_norms: bool = False  # whether norms multiply by their weight in fp32

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
            wide_norms=multiply_in_fp32(config.get("model_type") or ""),
        )

    @staticmethod
    def of(checkpoint: Checkpoint, name: str, lora: LoraConfig | None = None) -> ModelShape:
        """Of a model on this machine; see `of_shapes`."""
        shapes = {tensor: tuple(info.shape) for tensor, info in checkpoint.tensors.items()}
        return ModelShape.of_shapes(checkpoint.config, shapes, name, lora)

    @staticmethod
    def of_shapes(
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        name: str,
        lora: LoraConfig | None = None,
    ) -> ModelShape:
        """Of a model whose tensors have these shapes, with such adapters; see `from_config`."""
        sizes = {tensor: math.prod(shape) for tensor, shape in shapes.items()}
        adapters = adapter_parameters(shapes, lora or LoraConfig())
        found = ModelShape.of_sizes(config, sizes, name)
        norms = _normed(shapes, found) / max(found.layers, 1)
        return replace(found, adapters=adapters, norms=norms)

    @staticmethod
    def of_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], name: str) -> ModelShape:
        """Of a model whose tensors have so many elements; see `from_config`."""
        towers = sum(size for one, size in sizes.items() if kind_of(one) in OTHER_MODALITIES)
        parameters, routed = sum(sizes.values()) - towers, routed_parameters(sizes)
        return ModelShape.from_config(config, parameters, name, towers, routed)

    def resized(self, vocabulary: int) -> ModelShape:
        """The same model with another number of rows."""
        more = (vocabulary - self.vocabulary) * self.width * self.matrices
        return replace(self, parameters=self.parameters + more, vocabulary=vocabulary)

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


def _normed(shapes: Mapping[str, tuple[int, ...]], shape: ModelShape) -> int:
    """Elements of a token that the norms of all layers see; those of queries and keys are heads."""
    total = 0
    for name, size in shapes.items():
        if kind_of(name) == "norm" and layer_of(name) is not None and name.endswith(".weight"):
            heads = {"q": shape.query, "k": shape.key_value}
            total += heads.get(name.split(".")[-2].partition("_norm")[0], math.prod(size))
    return total


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
    trained: Trained = "all"
    moments: str = "full"  # full | 8bit
    offload: Offload = "none"  # what is in the CPU's memory
    offload_activations: bool = False
    lora: bool = False  # whether the run has adapters, in whatever phase

    @staticmethod
    def of(
        config: TrainingConfig, strategy: Strategy, processes: int, shards: int, train: str = "all"
    ) -> MemorySetup:
        """The setup of a configuration on so many processes, in a phase that trains `train`."""
        return MemorySetup(
            strategy, shards, config.precision, config.sequence_length, config.micro_batch_size,
            config.micro_batches(processes), config.loss_chunk, config.activation_checkpointing,
            config.attention, config.compile, trained_by(config, train), config.optimizer.moments,
            offload_activations=config.offload_activations, lora=config.lora is not None,
        )  # fmt: skip

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.sequence_length * self.micro_batch_size

    @property
    def master(self) -> int:
        """Bytes of a trained weight."""
        return 2 if self.precision == "pure-bf16" else 4

    @property
    def frozen(self) -> int:
        """Bytes of a weight that is not trained; in a run with adapters it has the compute type."""
        return self.compute if self.in_files else self.master

    @property
    def in_files(self) -> bool:
        """Whether frozen weights are read from the base again, where their exact values count."""
        return self.lora or self.trained == "adapters"

    @property
    def both_moments(self) -> float:
        """Bytes of AdamW's two moments of a weight (training/compact_adamw.py)."""
        return 2 * (1 + 4 / MOMENT_BLOCK) if self.moments == "8bit" else 2 * self.master

    def split(self, shape: ModelShape) -> tuple[int, int]:
        """(trained parameters, frozen parameters)."""
        vocabulary = shape.vocabulary_parameters
        trained = {
            "all": shape.parameters,
            "vocabulary": vocabulary,
            "adapters": vocabulary + shape.adapters,
        }[self.trained]
        return trained, 0 if self.trained == "all" else shape.parameters - vocabulary

    def layer(self, shape: ModelShape) -> float:
        """Parameters of one decoder layer, with its adapters."""
        added = shape.adapters / max(shape.layers, 1) if self.trained == "adapters" else 0.0
        return shape.layer_parameters + added

    def trained_of_layer(self, shape: ModelShape) -> float:
        """Trained parameters of one decoder layer."""
        by_kind = {"all": shape.layer_parameters, "adapters": shape.adapters / max(shape.layers, 1)}
        return by_kind.get(self.trained, 0.0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one process, by part. Not all parts exist at the same time: see `total`."""

    parameters: float
    gradients: float
    optimizer: float
    # not divided at the end of the forward pass and in the second layer of the backward pass, with
    # the gradients of earlier micro-batches
    gathered_forward: float
    gathered_begin: float
    gathered_backward: float  # not divided in the last layer of the backward pass, with `gradients`
    gathered_end: float  # the same after it
    activations: float
    freed: float  # of them, those of the two layers that the backward pass reaches first
    layer: float  # what the backward pass of one layer takes: its activations, and gradients
    logits: float
    on_host: float = 0.0  # in the CPU's memory instead, for a process

    @property
    def total(self) -> float:
        """The peak: at the loss, at the beginning, or at the end of the backward pass.

        In between, activations are freed as gradients appear, so the peak is at one of these.
        """
        loss = self.gathered_forward + self.activations + self.logits
        begin = self.gathered_begin + self.activations - self.freed + self.layer
        end = max(self.gathered_backward + self.layer, self.gathered_end) + self.gradients
        return self.parameters + self.optimizer + max(loss, begin, end)


def trained_by(config: TrainingConfig, train: str) -> Trained:
    """What a phase of the kind `train` trains."""
    if train != "all":
        return "vocabulary"
    return "adapters" if config.lora else "all"


def heaviest(config: TrainingConfig) -> str:
    """The kind of the phase that takes the most memory."""
    kinds = {phase.train for phase in config.phases} or {"all"}
    return next(kind for kind in ("all", "vocabulary", "new_rows") if kind in kinds)


@dataclass(frozen=True)
class _Divided:
    """Bytes that the strategy divides: see `MemoryEstimate`."""

    parameters: float
    gradients: float
    optimizer: float
    gathered_forward: float
    gathered_begin: float
    gathered_backward: float
    gathered_end: float = 0.0
    of_layer: float = 0.0  # gradients of one layer, before they are divided
    on_host: float = 0.0


def estimate_memory(shape: ModelShape, setup: MemorySetup) -> MemoryEstimate:
    """Memory of one process.

    The allocator's fragments and the libraries' own buffers (1-2 GB on a GPU) are not included.
    Parameters, gradients and optimizer are exact up to the padding of the last shard; `_single`,
    `_fsdp2` and `_zero` say what is divided. Only trained weights have gradients and moments.
    """
    divided = {"single": _single, "fsdp2": _fsdp2}.get(setup.strategy, _zero)(shape, setup)
    activations, on_host = kept_activations(shape, setup), divided.on_host
    later = max(0, shape.layers - 2) * setup.tokens * _kept_between(shape, setup)
    freed = activations - later
    if setup.offload_activations:  # those of a layer are on the device until it has computed
        on_host += activations
        activations = freed = activations / max(shape.layers, 1)
    parts = vars(divided) | {"on_host": on_host}
    layer = setup.tokens * _backward_of_layer(shape, setup, parts.pop("of_layer") / setup.tokens)
    return MemoryEstimate(
        **parts, activations=activations, freed=freed, layer=layer, logits=_logits(shape, setup)
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
        and kind_of(name) not in {"router", "norm", *OTHER_MODALITIES}
        and not is_routed(name)
        and config.covers(name.removesuffix(".weight"))
    ]
    return config.rank * sum(matrices)


def checkpoint_bytes(shape: ModelShape, setup: MemorySetup) -> float:
    """Bytes of a checkpoint: trained weights and moments, and frozen weights of no files."""
    trained, frozen = setup.split(shape)
    kept = 0 if setup.in_files else setup.frozen * frozen
    return (setup.master + setup.both_moments) * trained + kept


def _single(shape: ModelShape, setup: MemorySetup) -> _Divided:
    """One process without FSDP2, letters as in `_fsdp2`: m T + f F, m T and b T.

    If the compute type is not the master's: a copy of all parameters in it that are not in it
    already, and in the backward pass the gradient of the largest matrix, c V h. In the forward pass
    also the gradients of earlier micro-batches, m T.
    """
    m, c, (trained, frozen) = setup.master, setup.compute, setup.split(shape)
    copied = (trained if c != m else 0) + (frozen if c != setup.frozen else 0)
    passing = c * shape.vocabulary * shape.width if c != m else 0
    held = m * trained if setup.micro_batches > 1 else 0
    return _Divided(
        parameters=m * trained + setup.frozen * frozen,
        gradients=m * trained,
        optimizer=setup.both_moments * trained,
        gathered_forward=c * copied + held,
        gathered_begin=c * copied + held + passing,
        gathered_backward=c * copied + passing,
    )


def _fsdp2(shape: ModelShape, setup: MemorySetup) -> _Divided:
    """FSDP2, and HSDP with the shards of one replica.

    With N shards, T trained and F frozen parameters, m bytes of the master type (4; pure-bf16: 2),
    f bytes of a frozen weight, b bytes of both moments, and c bytes of the compute type:

        parameters (m T + f F) / N    gradients m T / N    optimizer (AdamW's moments) b T / N

    Gathered in the forward pass, in the compute type, of V h a matrix of the vocabulary and P, T
    the weights and the trained ones of a layer: the head, which stays until the backward pass ends,
    and the buffer of the last gather, c (V h + P); also the gradients of earlier micro-batches,
    m T / N. In the backward pass: the head and its gradient, 2 c V h; a layer, the buffer of the
    next one, the layer's gradients, and the fp32 gradients of the layer before, whose reduction is
    waited for: 2 c P + (c + 4) T; for the last layer an embedding of its own is the next one. After
    it come the embedding and its gradient, 2 c V h, while the last layer's reduction is waited for,
    and for an embedding of its own 4 V h of the gradient in fp32. What torch's tracker finds
    (`benchmarks/dry_run.py`) is within some per cent of this.

    Offloaded, the three parts are in the CPU's memory; the GPU gets a unit's shard in the master
    type before it is cast and gathered.
    """
    m, c, (trained, frozen) = setup.master, setup.compute, setup.split(shape)
    layer, trained_layer = setup.layer(shape), setup.trained_of_layer(shape)
    vocabulary, matrix = shape.vocabulary_parameters, shape.vocabulary * shape.width
    forward = c * (matrix + layer)
    head, reduced = 2 * c * matrix, 4 * trained_layer
    begin = head + 2 * c * layer + reduced
    last = head + c * (layer + (shape.matrices - 1) * matrix) + reduced
    backward = max(begin, last)
    end = head + 2 * c * matrix + max(reduced, 4 * matrix if shape.matrices == 2 else 0)
    parameters = (m * trained + setup.frozen * frozen) / setup.shards
    gradients, optimizer = m * trained / setup.shards, setup.both_moments * trained / setup.shards
    found = _Divided(
        parameters, gradients, optimizer, forward, begin, backward, end, c * trained_layer
    )
    if setup.offload == "all":
        sent = m * max(vocabulary, layer) / setup.shards
        return replace(
            found, parameters=0, gradients=0, optimizer=0, gathered_forward=forward + sent,
            gathered_begin=begin + sent, gathered_backward=backward + sent, gathered_end=end + sent,
            on_host=parameters + gradients + optimizer,
        )  # fmt: skip
    if setup.micro_batches > 1:
        return replace(
            found, gathered_forward=forward + gradients, gathered_begin=begin + gradients
        )
    # of the gradients, those of the layers before are there
    one, absent = m * trained_layer / setup.shards, m * vocabulary / setup.shards
    return replace(
        found, gathered_begin=begin + one,
        gathered_backward=max(begin - 2 * one, last - one) - absent, gathered_end=end - absent,
    )  # fmt: skip


def _zero(shape: ModelShape, setup: MemorySetup) -> _Divided:
    """DeepSpeed's ZeRO (Rajbhandari et al., ZeRO, 2020, section 3), letters as in `_fsdp2`:

        parameters c P, from stage 3 / N    gradients c T, from stage 2 / N
        optimizer (4 + b) T / N, from stage 1: fp32 masters and moments, for fp32 training too

    Gathered in the forward pass: the gradients of earlier micro-batches; for stage 3 embedding,
    head and two layers in the compute type, and the gradients that it always holds. In the backward
    pass the optimizer's gradient in fp32, 4 T / N, and two buckets of the reduction. Counted in
    DeepSpeed 0.19 on two CPU processes, bf16: 8.3, 8.3 and 10.0 bytes per parameter after a step of
    stages 1, 2, 3; this gives 8.0, 8.0 and 10.0.

    Offloaded (Ren et al., ZeRO-Offload, 2021), as DeepSpeed 0.19's sources have it: the optimizer
    and its fp32 gradient are in the CPU's memory, and a pinned copy of the new weights, c T / N;
    stages 1 and 2 collect the gradient on the GPU in fp32, 4 T / N; stage 3 needs 4 T / N more on
    the host and nothing on the GPU, and its weights are on the host, too, if they are offloaded.
    """
    if setup.precision == "pure-bf16":
        raise UserError(
            "training.precision: pure-bf16 is not possible with DeepSpeed, "
            "which keeps fp32 masters; set bf16."
        )
    stage, c, (trained, frozen) = int(setup.strategy[-1]), setup.compute, setup.split(shape)
    parameters = c * (trained + frozen) / (setup.shards if stage == 3 else 1)
    gradients = c * trained / (setup.shards if stage >= 2 else 1)
    optimizer = (4 + setup.both_moments) * trained / setup.shards
    whole = c * (shape.vocabulary_parameters + 2 * shape.layer_parameters) if stage == 3 else 0
    converted = 4 * trained / setup.shards
    on_host = 0.0
    if setup.offload != "none":
        fp32 = 4 * trained / setup.shards
        on_host = optimizer + fp32 + (fp32 if stage == 3 else c * trained / setup.shards)
        gradients, optimizer, converted = 0.0 if stage == 3 else fp32, 0.0, 0.0
    if setup.offload == "all":
        on_host, parameters = on_host + parameters, 0.0
    backward = whole + converted + 2 * c * min(ZERO_BUCKET, trained)
    held = gradients + converted if stage == 3 else gradients if setup.micro_batches > 1 else 0
    forward = whole + held
    return _Divided(parameters, gradients, optimizer, forward, forward, backward, on_host=on_host)


def kept_activations(shape: ModelShape, setup: MemorySetup) -> float:
    """Bytes that the layers and the final norm keep of a micro-batch for the backward pass."""
    final = (4 + 2 * setup.compute) * shape.width
    return setup.tokens * (shape.layers * _kept_between(shape, setup) + final)


def _kept_between(shape: ModelShape, setup: MemorySetup) -> float:
    """Bytes of one token that a layer keeps from its forward to its backward pass."""
    if setup.activation_checkpointing == "none":
        return _kept_by_layer(shape, setup)
    kept = setup.compute * shape.width  # the input of the layer
    if setup.activation_checkpointing == "selective":  # attention and every second matmul
        q, v, gate, down = shape.query, shape.key_value, shape.intermediate, shape.width
        products = q + v + gate + down
        kept += setup.compute * (shape.query + products) + 4 * shape.heads
    return kept


def _backward_of_layer(shape: ModelShape, setup: MemorySetup, gradients: float) -> float:
    """The most bytes that the backward pass of a layer takes, by token.

    `gradients` of its weights appear while activations are freed. Letters as in `_kept_by_layer`;
    in this order there are at once:

        everything kept, the gradients of the MLP's last matrix, of the gate's product, 2 c i, and
        of the layer's result, c h
        of experts: what attention and norms keep, the MLP's gradients, those of the gate's product,
        and inputs and their gradients of the k experts of a token, c (2 k + 1) h
        what attention and norms keep, the MLP's gradients, and in fp32 a norm's, (16 + 2 c) h
        the first norm, (4 + c) h, all gradients, and those in the norm

    What is computed again needs the layer's input as well; of what `selective` keeps, the result of
    the last matrix is not asked for.
    """
    c, h, i = setup.compute, shape.width, shape.intermediate
    whole, of_mlp = _kept_by_layer(shape, setup), _kept_by_mlp(shape, setup)
    attention = 2 * h * (shape.query + shape.key_value) / max(shape.layer_parameters, 1)
    of_matrices = max(0.0, 1 - attention) * gradients
    in_norm = (16 + 2 * c) * h
    experts = 2 * c * i + c * (2 * shape.taken + 1) * h if shape.experts else 0
    most = max(
        whole + of_matrices / 3 + 2 * c * i + c * h,
        whole - of_mlp + of_matrices + max(in_norm, experts),
        gradients + (4 + c) * h + in_norm,
    )
    return most + {"none": 0, "full": 1, "selective": 2}[setup.activation_checkpointing] * c * h


def _kept_by_layer(shape: ModelShape, setup: MemorySetup) -> float:
    """Bytes that autograd keeps of one token in a layer of LLaMA, counted in transformers' graph.

    For width h, norms of n elements (2 h), MLP width i and c bytes of the compute type: the norms
    in fp32 (4 n, and 4 for a root), and the gate, its activation and up (3 c i). Trained matrices
    keep their input, 2 c h + c i, and trained norms the normalised one, c n (4 n if they multiply
    in fp32). Attention: see `_kept_by_attention`. A compiled layer computes the norms in fp32 and
    the gate's activation again, so it keeps 4 n + c i less. Of E experts of which a token takes k:
    what each of them made (c h), the router's logits (12 E), and if the experts are trained, their
    inputs (c h each).
    """
    c, h, normed = setup.compute, shape.width, shape.norms or 2 * shape.width
    norms = 0 if setup.compile else 4 * normed
    inputs = 0 if setup.trained == "vocabulary" else c * h
    trained = (4 if shape.wide_norms else c) * normed if setup.trained == "all" else 0
    others = norms + 8 + inputs + trained + _kept_by_attention(shape, setup)
    return others + _kept_by_mlp(shape, setup)


def _kept_by_mlp(shape: ModelShape, setup: MemorySetup) -> float:
    """The same of its MLP or its experts; see `_kept_by_layer`."""
    c, h, i = setup.compute, shape.width, shape.intermediate
    routed = shape.taken * c * h * (2 if setup.trained == "all" else 1) + 12 * shape.experts
    gated = (2 if setup.compile else 3) * c * i
    return gated + routed + (0 if setup.trained == "vocabulary" else c * (h + i))


def _kept_by_attention(shape: ModelShape, setup: MemorySetup) -> float:
    """The same of its attention, for a heads, sequence length s and query width q.

    flash keeps q, k, v, its output and an fp32 number per head. sdpa, given a mask for packed
    documents, repeats keys and values to the width q and keeps the mask in the compute type: c s.
    eager keeps the weights in fp32 and in the compute type: a s (4 + c).
    """
    c, q, s = setup.compute, shape.query, setup.sequence_length
    if setup.attention == "eager":
        scores = shape.heads * s * (4 if c == 4 else 4 + c)
        return 3 * c * q + scores + (0 if setup.trained == "vocabulary" else c * q)
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
