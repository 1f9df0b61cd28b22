"""The model: a causal language model of transformers, with our loss, loaded shard by shard."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.loaded import refuse_image_layers
from cpt_merge.checkpoint.model_names import StoredTensors, find_stored
from cpt_merge.checkpoint.pieces import RearrangedInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.checkpoint.text_models import (
    auto_class,
    is_wrapper,
    keep_text_decoder,
    text_decoder,
    with_attention,
)
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.data.packing import IGNORED, Batch
from cpt_merge.training.config import LoraConfig, TrainingConfig
from cpt_merge.training.model.activations import OffloadedActivations
from cpt_merge.training.model.attention import (
    IMPLEMENTATIONS,
    attention_of,
    describe_attention,
)
from cpt_merge.training.model.choice import Choice, choose
from cpt_merge.training.model.compile import check_compiler, compilable, compile_layers
from cpt_merge.training.model.documents import PackedDocuments, decode, run_one_by_one
from cpt_merge.training.model.fp8 import convert_to_fp8
from cpt_merge.training.model.head import find_head_form
from cpt_merge.training.model.lora import Adapters, add_adapters, find_targets
from cpt_merge.training.model.loss import Head, cross_entropy_sum
from cpt_merge.training.model.preference import log_probabilities, preference_loss
from cpt_merge.training.model.recompute import apply_recompute
from cpt_merge.training.model.routing import (
    AuxiliaryLoss,
    Routers,
    Routing,
    auxiliary_loss,
    choose_matmuls,
    describe_experts,
    find_auxiliary_loss,
    statistics,
)

_NOT_CAUSAL = ("ForMaskedLM", "ForPreTraining")
_CPU = torch.device("cpu")
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}
_LARGE = 1 << 28  # elements
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class CausalLM(nn.Module):
    """A causal LM whose forward pass gives the loss.

    The head is applied in this module's forward pass, so that FSDP gathers its weight there and the
    logits are made in chunks. Dropout is off, so the order of the data is the only random state of
    a run, which therefore resumes exactly.
    """

    model: Any  # a PreTrainedModel; transformers has no types

    def __init__(
        self,
        model: Any,
        loss_chunk: int,
        compiled_loss: bool = False,
        choice: Choice | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.choice, self.documents = choice or Choice(attention_of(model)), PackedDocuments()
        run_one_by_one(model, self.choice.separation.one_by_one, self.documents)
        self.loss_chunk, self.compiled_loss = loss_chunk, compiled_loss
        self.form = find_head_form(model)
        decoder = text_decoder(model)
        self.decoder_name = next(name for name, part in model.named_modules() if part is decoder)
        self.routers, self.auxiliary = Routers(decoder), auxiliary
        self.auxiliary_weight = 0.0
        """What the auxiliary loss of the routers counts next to a target; see `weigh_auxiliary`."""
        self.margins: list[Tensor] = []
        """Of the pairs since the last call of `take_margins`."""
        self.routing: list[Tensor] = []
        """Auxiliary loss, entropy and largest share (`routing.statistics`) of each micro-batch."""
        self.activations: OffloadedActivations | None = None
        self.frozen_rows = 0
        """Rows 0 .. frozen_rows - 1 of embedding and head get a gradient of exactly zero."""
        self.stored = StoredTensors({}, {}, {})
        """Where the checkpoint that was loaded holds the model's tensors."""
        self.adapters = Adapters()
        model.get_input_embeddings().register_forward_hook(self._freeze)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return decoder_layers(self.model)

    @property
    def head(self) -> Head:
        """The output head as it is now; with FSDP, usable in `forward` only."""
        output = self.model.get_output_embeddings()
        bias = getattr(output, "bias", None)
        return Head(output.weight, bias, self.form.scale, self.form.softcap, self.frozen_rows)

    def add_adapters(self, config: LoraConfig, seed: int) -> None:
        """Low-rank adapters in the decoder layers, whose parameters are on the meta device.

        Where the checkpoint holds the weights has to be known before, as their names change.
        """
        targets = find_targets(self.model, self.layers, config)
        self.adapters = add_adapters(self.model, self.layers, targets, config, seed)

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights by the names that transformers gives them; no matrices of adapters."""
        for name, parameter in self.model.named_parameters():
            if name not in self.adapters.factors:
                yield self.adapters.plain.get(name, name), parameter

    def stored_parameters(self) -> set[str]:
        """The tensors of the checkpoint that hold the weights."""
        return self.stored.stored_names(name for name, _ in self.weights())

    def forward(self, batch: Batch, last: Tensor | None = None) -> Tensor:
        """Sum of the cross-entropies of the batch's targets, in nats.

        Its gradient is also that of the auxiliary loss, if there is one. With `last`, instead the
        float32 logits [sequences, vocabulary] of one position of each sequence; no others are made.
        Of pairs, the sum of the losses that compare their replies (`model/preference.py`), or
        without a reference the log probabilities of the replies [pairs, 2].
        """
        decoder, separation = self.model.get_submodule(self.decoder_name), self.choice.separation
        moving = self.activations.moving() if self.activations else nullcontext()
        with self.routers.recording() as heard, moving:
            hidden = decode(decoder, batch, separation, self.documents)
        if last is not None:
            return self.head.logits(
                hidden[torch.arange(len(last), device=hidden.device), last.to(hidden.device)]
            )
        flat, labels = hidden.flatten(0, 1), batch.labels.flatten()
        if batch.pairs is not None and batch.pairs.reference is None:
            return log_probabilities(flat, self.head, labels, batch.pairs, self.loss_chunk)
        if batch.pairs is not None:
            chunk, compiled = self.loss_chunk, self.compiled_loss
            loss, margins = preference_loss(flat, self.head, labels, batch.pairs, chunk, compiled)
            if torch.is_grad_enabled():
                self.margins.append(margins)
        else:
            loss = cross_entropy_sum(flat, self.head, labels, self.loss_chunk, self.compiled_loss)
        if not heard or not torch.is_grad_enabled():
            return loss
        auxiliary = self._of_routers(heard)
        return loss + (auxiliary - auxiliary.detach()) if self.auxiliary else loss

    def _of_routers(self, heard: Sequence[Routing]) -> Tensor:
        """The weighted auxiliary loss, NaN if there is none; notes what the routers did."""
        auxiliary = torch.full((), math.nan, device=heard[0].logits.device)
        if self.auxiliary:
            auxiliary = auxiliary_loss([one.logits for one in heard], self.auxiliary.taken)
        self.routing.append(torch.cat([auxiliary.detach().view(1), statistics(heard)]))
        return self.auxiliary_weight * auxiliary

    def weigh_auxiliary(self, scale: float, micro_batches: int) -> None:
        """Let the auxiliary loss count in a step whose loss is `scale` times the summed loss.

        The step then minimises the mean loss of a target plus `coefficient` times the mean of the
        auxiliary losses of all micro-batches, of which all processes together have so many.
        """
        if self.auxiliary:
            self.auxiliary_weight = self.auxiliary.coefficient / (scale * micro_batches)

    def take_margins(self) -> Tensor | None:
        """The margins of the pairs trained on since the last call [pairs]; None without any."""
        found, self.margins = self.margins, []
        return torch.cat(found) if found else None

    def take_routing(self) -> Tensor | None:
        """The means of `routing` over the micro-batches since the last call; None without any."""
        taken, self.routing = self.routing, []
        return torch.stack(taken).mean(0) if taken else None

    def train(self, mode: bool = True) -> CausalLM:
        """Training mode for this module; the inner model stays in evaluation mode: no dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def _freeze(self, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.frozen_rows:
            return output
        return torch.where((inputs[0] < self.frozen_rows).unsqueeze(-1), output.detach(), output)


def build_model(directory: Path, config: TrainingConfig, device: torch.device = _CPU) -> CausalLM:
    """The model of a checkpoint with its parameters on the meta device, where they take no memory.

    It will run on `device`. Raises `UserError` for a model that cannot be trained as the
    configuration says.
    """
    return build_from(read_model_config(directory), directory, config, device)


def build_from(
    model_config: Any, directory: Path, config: TrainingConfig, device: torch.device = _CPU
) -> CausalLM:
    """The model of a configuration that was read, with the rotary positions of `config`.

    `directory` is what messages call it.
    """

    if config.rope:
        extended = config.context.extend(model_config.to_dict())
        model_config = type(model_config).from_dict(extended)

    def build(attention: str) -> Any:
        return _build_with(attention, model_config, directory, config)

    model, choice = choose(build, config, device)
    _report_unused_settings(model_config.get_text_config(decoder=True))
    if config.fp8:
        convert_to_fp8(
            decoder_layers(model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
    auxiliary = find_auxiliary_loss(model) if config.auxiliary_loss else None
    module = CausalLM(model, config.loss_chunk, config.compile, choice, auxiliary).train()
    if is_wrapper(model):
        keep_text_decoder(model)
    return module


def _build_with(attention: str, model_config: Any, directory: Path, config: TrainingConfig) -> Any:
    dtype = torch.bfloat16 if config.precision == "pure-bf16" else torch.float32
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            model = auto_class(model_config).from_config(
                with_attention(model_config, IMPLEMENTATIONS[attention]),
                dtype=dtype,
                trust_remote_code=False,
            )
            text_decoder(model)
            if model.get_output_embeddings() is None:
                raise ValueError("transformers names no output head of it")
    except (ValueError, ImportError, KeyError, NotImplementedError) as error:
        # a model that chooses among its own attention classes
        own = isinstance(error, KeyError) and error.args == (IMPLEMENTATIONS[attention],)
        reason = "it has no such attention" if own else _reason(error)
        raise UserError(
            f"the model in {directory} cannot be built with attention: {attention} ({reason}); "
            + ("" if config.attention == "auto" else "set training.attention to auto, or ")
            + "use a causal language model."
        ) from None
    model.tie_weights()
    choose_matmuls(model, 4 if config.precision == "fp32" else 2)
    if config.precision != "fp32":
        _keep_wide(model)
    return model


class _LargeOnMeta(TorchFunctionMode):
    """Within it, tensors that only weights are as large as are created on the meta device.

    `init_empty_weights` moves weights there after they were allocated, which is 30 GB for the
    experts of a large layer. Buffers, which the model computes, are smaller and keep their values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {**(kwargs or {})}
        if func in _FACTORIES and given.get("device") is None:
            made = func(*args, **{**given, "device": "meta"})
            if made.numel() >= _LARGE:
                return made
        return func(*args, **given)


def _keep_wide(model: Any) -> None:
    """What transformers keeps in fp32 next to bf16 weights: here buffers; a line names weights."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, buffer in model.named_buffers():
        if any(part in name for part in kept) and buffer.is_floating_point():
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, buffer.float())
    weights = [name for name, _ in model.named_parameters() if any(part in name for part in kept)]
    if weights:
        say(
            f"model: {len(weights)} weights ({weights[0]}, ...) that transformers would keep in "
            "fp32 are bf16 in the forward pass, as the others are"
        )


def read_model_config(directory: Path, named: Path | None = None) -> Any:
    """The configuration of a causal language model. Raises `UserError` for another model.

    `named` is what messages call the directory.
    """
    named = named or directory
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # each class validates in its own way
        raise UserError(
            f"transformers cannot read the config.json of {named} ({_reason(error)}); correct "
            "it, or use a model that transformers knows without code of its own."
        ) from None
    masked = [name for name in config.architectures or () if name.endswith(_NOT_CAUSAL)]
    kind = "an encoder-decoder" if config.is_encoder_decoder else masked[0] if masked else None
    if kind or auto_class(config) is None:
        raise UserError(
            f"the model in {named} ({kind or type(config).__name__}) is no causal language "
            "model, and only those can be trained; use another base."
        )
    refuse_image_layers(config.get_text_config(decoder=True).to_dict(), named)
    return config


def _reason(error: Exception) -> str:
    """The first sentence of an error, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split(". ")[0].split())[:200]


def _report_unused_settings(config: Any) -> None:
    dropout = [name for name, value in config.to_dict().items() if _is_dropout(name) and value]
    if dropout:
        say(
            f"model: {', '.join(dropout)} of its config.json are ignored, "
            "since training has no dropout"
        )


def _is_dropout(name: str) -> bool:
    return ("dropout" in name or name.endswith("_pdrop")) and not name.startswith(
        ("classifier", "summary")
    )


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a model: the list of `num_hidden_layers` modules in its decoder.

    Raises `UserError` if there is none.
    """
    decoder = text_decoder(model)
    count = decoder.config.num_hidden_layers
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        f"{type(model).__name__} has no list of {count} decoder layers; it cannot be trained."
    )


def load_weights(
    module: CausalLM, directory: Path, device: torch.device, on_cpu: bool = False
) -> None:
    """Fill the (sharded) meta parameters from a checkpoint; every process reads only its rows.

    With `on_cpu` the parameters stay in the CPU's memory, as FSDP2's offloading wants them.

    Buffers that a checkpoint holds are read whole; the others were computed when the model was
    built. Raises `UserError` for a tensor that the checkpoint lacks or holds in another shape or
    type.
    """
    source = WeightSource.open(module, directory, _CPU if on_cpu else device)
    state: dict[str, Any] = {}
    loaded: dict[int, nn.Parameter] = {}  # a tied parameter is loaded once and stays one
    for name, parameter in module.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in loaded:
            loaded[id(parameter)] = nn.Parameter(source.load(name, parameter))
        state[name] = loaded[id(parameter)]
    state |= {name: source.load(name, buffer) for name, buffer in stored_buffers(module)}
    module.model.load_state_dict(state, strict=False, assign=True)
    if on_cpu:
        _move_buffers(module, device)
    else:
        module.to(device)
    unused = sorted(module.stored.shapes.keys() - module.stored.used)
    if unused:
        say(
            f"model: {len(unused)} tensors of {directory} are not loaded, because training does "
            f"not use them: {unused[0]}, ..."
        )


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def stored_buffers(module: CausalLM) -> list[tuple[str, Tensor]]:
    """The buffers that a checkpoint holds, such as the bias of a router; no others."""
    stored = module.model.state_dict().keys()  # parameters and persistent buffers
    return [(name, buffer) for name, buffer in module.model.named_buffers() if name in stored]


@dataclass(frozen=True)
class WeightSource:
    """A checkpoint whose tensors are found, and rearranged, by the model's names."""

    checkpoint: Checkpoint
    names: dict[str, str]
    device: torch.device
    adapters: Adapters

    @staticmethod
    def open(module: CausalLM, directory: Path, device: torch.device) -> WeightSource:
        """Open the checkpoint in `directory`, and tell the module its names."""
        return WeightSource.of(module, Checkpoint.open(directory), device)

    @staticmethod
    def of(module: CausalLM, checkpoint: Checkpoint, device: torch.device) -> WeightSource:
        """A checkpoint that is open."""
        adapters = module.adapters
        if not adapters.of:  # they change the names that transformers knows
            shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
            module.stored = find_stored(module.model, shapes, checkpoint.directory)
        stored = module.stored.names
        names = {**stored, **{now: stored.get(name, name) for now, name in adapters.plain.items()}}
        return WeightSource(module.stored.seen_in(checkpoint), names, device, adapters)

    def find(self, name: str, target: Tensor) -> TensorInfo:
        """Where the values for `target` are stored.

        Raises `UserError` if that is nowhere, or in another shape or a type without values.
        """
        stored_name, directory = self.names.get(name, name), self.checkpoint.directory
        info = self.checkpoint.tensors.get(stored_name)
        if info is None or tuple(info.shape) != tuple(target.shape):
            found = f"in shape {tuple(info.shape)}" if info else "not at all"
            if isinstance(info, RearrangedInfo):
                found = (
                    f"as {len(info.parts)} tensors ({info.parts[0].name}, ...), together {found}"
                )
            raise UserError(
                f"{directory} holds {stored_name} {found}, but the model needs "
                f"{tuple(target.shape)}; "
                "use a checkpoint of the architecture that its config.json names."
            )
        if target.is_floating_point() and info.dtype not in TORCH_DTYPES:
            raise UserError(
                f"{directory} holds {stored_name} as {info.dtype}; "
                "convert the checkpoint to bfloat16."
            )
        return info

    def load(self, name: str, target: Tensor) -> Tensor:
        """Values for `target`; of a sharded one, this process's rows."""
        stored = self.rows(name, target, *local_rows(target))
        local = stored.to(device=self.device, dtype=target.dtype)
        if not isinstance(target, DTensor):
            return local
        made = DTensor.from_local(
            local,
            target.device_mesh,
            target.placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )
        return made.to(self.device)  # `from_local` moves to the mesh's

    def rows(self, name: str, target: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) for `target`, as they are stored."""
        if name in self.adapters.factors:
            return self.adapters.initial(name, target.shape)[start:stop].clone()
        info, stored_name = self.find(name, target), self.names.get(name, name)
        stored = torch.from_numpy(self.checkpoint.read(stored_name, start, stop))
        dtype = TORCH_DTYPES.get(info.dtype)
        return stored.view(dtype) if dtype else stored


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """The rows [start, stop) of dimension 0 that this process holds."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0] if parameter.ndim else 1
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def prepare_layers(module: CausalLM, config: TrainingConfig, device: torch.device) -> None:
    """Activation checkpointing and offloading, then compilation; call it before sharding."""
    apply_recompute(module.layers, config.activation_checkpointing)
    if config.offload_activations:
        module.activations = OffloadedActivations(len(module.layers))
    if config.compile:
        check_compiler(device)
        compile_layers(module.layers)


def one_document_each(input_ids: Tensor) -> Batch:
    """A batch of sequences that are one document each, without targets."""
    positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    return Batch.of(input_ids, torch.full_like(input_ids, IGNORED), positions.contiguous())


def describe_model(
    module: CausalLM, config: TrainingConfig, device: torch.device
) -> dict[str, str]:
    """Lines of the startup summary: what is computed, and how."""
    count = sum(full_shape(parameter).numel() for _, parameter in module.weights())
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
            "bf16": "bf16 compute, fp32 master weights, fp32 reduction",
            "fp32": "fp32",
            "pure-bf16": "bf16 throughout",
        }[config.precision] + (", fp8 matmuls in the layers" if config.fp8 else ""),
        "attention": describe_attention(module.choice.attention, config, device)
        + "".join(f"; {reason}" for reason in module.choice.passed_over),
        **describe_experts(module.model, module.auxiliary),
        **_describe_adapters(module, config),
        "layers": _describe_compiled(module.layers, config.compile)
        + f", activation checkpointing {config.activation_checkpointing}"
        + _describe_activations(config, device),
    }  # fmt: skip


def _describe_adapters(module: CausalLM, config: TrainingConfig) -> dict[str, str]:
    """What has adapters, and which matrices of the layers are frozen without one."""
    if config.lora is None:
        return {}
    held = "fp32" if config.precision == "fp32" else "bf16"
    adapted = module.adapters.of
    if not adapted:
        return {"lora": f"no adapters in this phase; frozen weights in {held}"}
    shapes = {name: full_shape(p) for name, p in module.model.named_parameters()}
    count = sum(shapes[name].numel() for name in module.adapters.factors)
    names = sorted({name.split(".")[-2] for name in adapted})
    bare: Counter[str] = Counter()
    for name, weight in module.weights():
        shape = full_shape(weight)
        if len(shape) > 1 and not weight.requires_grad and name not in adapted:
            bare[kind_of(name)] += shape.numel()
    without = ", ".join(f"{size / 1e6:,.1f} M of {kind}" for kind, size in bare.items())
    return {
        "lora": f"rank {config.lora.rank}, alpha {config.lora.numerator:g}: "
        f"{counted(len(adapted), 'adapter')} ({', '.join(names)}) of {count / 1e6:,.1f} M "
        f"parameters; frozen weights in {held}"
        + (f"; frozen without an adapter: {without}" if without else "")
    }


def _describe_activations(config: TrainingConfig, device: torch.device) -> str:
    """`OffloadedActivations` sees that it is so in every forward pass."""
    if not config.offload_activations:
        return ""
    where = ", where everything is on a CPU machine" if device.type == "cpu" else ""
    return f"; activations in the CPU's memory{where}"


def _describe_compiled(layers: nn.ModuleList, asked: bool) -> str:
    done = len(compilable(layers)) if asked else 0
    some = f"{done} of {len(layers)} compiled, those without documents one by one"
    return some if asked and done < len(layers) else "compiled" if asked else "not compiled"


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The whole shape of a parameter, of which ZeRO 3 shows only a part."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
