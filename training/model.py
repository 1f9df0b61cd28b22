"""The model: a causal language model of transformers under our loss, its weights loaded shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint.reader import Checkpoint
from core.errors import UserError
from training.config import TrainingConfig
from training.loss import cross_entropy_sum
from training.packing import Batch

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class CausalLM(nn.Module):
    """A causal LM whose forward pass gives the loss.

    The head is applied within this module's forward, so that under FSDP its weight is gathered there, and the logits
    are made in chunks.
    """

    model: Any  # a PreTrainedModel; transformers has no types

    def __init__(self, model: Any, loss_chunk: int) -> None:
        super().__init__()
        self.model = model
        self.loss_chunk = loss_chunk
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise UserError(f"{type(model).__name__} has no plain output head; such models cannot be trained here yet.")
        if getattr(model.config, "final_logit_softcapping", None):
            raise UserError(f"{type(model).__name__} caps its logits; such models cannot be trained here yet.")

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return cast(nn.ModuleList, self.model.get_decoder().layers)

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of the batch's targets, in nats."""
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        return cross_entropy_sum(
            hidden.flatten(0, 1), self.model.get_output_embeddings().weight, batch.labels.flatten(), self.loss_chunk
        )


def build_model(directory: Path, config: TrainingConfig) -> CausalLM:
    """The model of a checkpoint with its parameters on the meta device: shapes without memory."""
    model_config = AutoConfig.from_pretrained(directory)
    dtype = torch.bfloat16 if config.precision == "pure-bf16" else torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=config.attention)
    model.tie_weights()
    return CausalLM(model, config.loss_chunk).train()


def load_weights(module: CausalLM, directory: Path, device: torch.device) -> None:
    """Fill the (sharded) meta parameters from a checkpoint; every process reads only its own rows.

    Raises `UserError` for a parameter that the checkpoint lacks or holds in another shape.
    """
    checkpoint = Checkpoint.open(directory)
    state: dict[str, Any] = {}
    loaded: dict[int, nn.Parameter] = {}  # a tied parameter is loaded once and stays one
    for name, parameter in module.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in loaded:
            loaded[id(parameter)] = nn.Parameter(_load_parameter(checkpoint, name, parameter, device))
        state[name] = loaded[id(parameter)]
    module.model.load_state_dict(state, strict=False, assign=True)
    module.to(device)


def _load_parameter(checkpoint: Checkpoint, name: str, parameter: Tensor, device: torch.device) -> Tensor:
    info = checkpoint.tensors.get(name)
    if info is None or tuple(info.shape) != tuple(parameter.shape):
        found = f"in shape {tuple(info.shape)}" if info else "not at all"
        raise UserError(
            f"{checkpoint.directory} holds {name} {found}, the model needs {tuple(parameter.shape)}; "
            "use a checkpoint of the architecture that its config.json names."
        )
    start, stop = local_rows(parameter)
    stored = torch.from_numpy(checkpoint.read(name, start, stop)).view(TORCH_DTYPES[info.dtype])
    local = stored.to(device=device, dtype=parameter.dtype)
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """The rows [start, stop) of dimension 0 that this process holds."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def named_local_parameters(module: CausalLM) -> Iterator[tuple[str, nn.Parameter]]:
    """(checkpoint name, parameter) of every parameter, tied ones once."""
    yield from module.model.named_parameters()
