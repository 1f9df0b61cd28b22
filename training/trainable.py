"""Whether a base can be trained as a recipe says, found without reading its weights.

The model is built on the meta device and compared with the headers of its files. What only a
running model shows (does its attention keep packed documents apart?) is found with the same
architecture in small: two layers of random weights, a few hundred kilobytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cpt_merge.checkpoint.loaded import is_tied, open_model, text_section, written_config
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.text_models import auto_class
from cpt_merge.checkpoint.text_sections import TEXT_SECTIONS
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.build import check_backend
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.flops import peak_flops
from cpt_merge.training.model.attention import IMPLEMENTATIONS, check_attention, check_device
from cpt_merge.training.model.build import (
    CausalLM,
    WeightSource,
    build_from,
    read_model_config,
)
from cpt_merge.training.model.compile import check_compiler
from cpt_merge.training.model.fp8 import check_capability, check_torchao

_META = torch.device("meta")
_SMALL: dict[str, int] = {
    "vocab_size": 64,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "d_ff": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "sliding_window": 6,
}  # fmt: skip
"""Sizes that stay a model of the family, by the names of the families in transformers."""


def check_trainable(
    base: Path, config: TrainingConfig, asked: BackendSettings, device: torch.device | None
) -> None:
    """Raise `UserError` for what the start of training would refuse: backend, device, model.

    Without a `device` the model trains on another machine, which has to check its GPUs itself.
    """
    check_backend(asked, config)
    if config.fp8:
        check_torchao()
    if config.compile:
        check_compiler(device or torch.device("cpu"))
    if device:
        check_device(config, device)
        if config.fp8:
            check_capability(device)
        if device.type == "cuda" and not config.peak_tflops:
            peak_flops(torch.cuda.get_device_name(device))
    model_config = check_model(base, config)
    composite = any(hasattr(model_config, section) for section in TEXT_SECTIONS)
    if config.attention != "flex" and not composite:
        _check_in_small(model_config, config)


def check_model(directory: Path, config: TrainingConfig) -> Any:
    """The configuration of a model that training can build, and whose files hold all its weights.

    Raises `UserError` for another model.
    """
    checkpoint = open_model(directory)
    with tempfile.TemporaryDirectory() as folder:  # config.json as the resized base has it
        settings = written_config(checkpoint.config, is_tied(checkpoint))
        write_json(Path(folder) / "config.json", settings)
        model_config = read_model_config(Path(folder), directory)
    module = build_from(model_config, directory, config.model_copy(update={"fp8": False}))
    _check_weights(module, checkpoint)
    return model_config


def _check_weights(module: CausalLM, checkpoint: Checkpoint) -> None:
    """Raise `UserError` unless the files hold every weight of the model, in its shape."""
    source = WeightSource.of(module, checkpoint, _META)
    seen: set[int] = set()  # a tied parameter is stored once
    for name, parameter in module.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            source.find(name, parameter)
        seen.add(id(parameter))


def _check_in_small(model_config: Any, config: TrainingConfig) -> None:
    """`check_attention` on a small model of the same architecture.

    An architecture that cannot be made small in this way is left to the start of training, which
    checks the model itself, with a message.
    """
    try:
        torch.manual_seed(0)
        model = auto_class(model_config).from_config(
            type(model_config).from_dict(_in_small(model_config.to_dict())),
            dtype=torch.float32,
            attn_implementation=IMPLEMENTATIONS[config.attention],
            trust_remote_code=False,
        )
        for parameter in model.parameters():  # far from uniform, so that every leak shows
            mean = 0.5 if parameter.ndim == 1 else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.3)
        module = CausalLM(model, config.loss_chunk).train()
    except Exception as error:  # of the family's own code: any kind
        _leave_to_training(config, error)
        return
    shape = {"micro_batch_size": 1, "sequence_length": 24}
    try:
        check_attention(module, config.model_copy(update=shape), torch.device("cpu"))
    except UserError as error:
        if not isinstance(error.__cause__, RuntimeError):  # it ran, and the result is wrong
            raise
        _leave_to_training(config, error.__cause__)
    except Exception as error:  # as above
        _leave_to_training(config, error)


def _leave_to_training(config: TrainingConfig, error: BaseException) -> None:
    say(
        f"whether attention {config.attention!r} keeps packed documents apart is checked when "
        f"training starts: a small model of this kind cannot be tried ({type(error).__name__})"
    )


def _in_small(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same family and kinds of layers, with few and small layers."""
    text = text_section(settings)
    small = {name: _SMALL[name] for name in _SMALL if isinstance(settings.get(name), int)}
    groups = settings.get("num_key_value_heads")
    if isinstance(groups, int):
        grouped = groups < text["num_attention_heads"]
        small["num_key_value_heads"] = min(groups, 2) if grouped else 4
    kinds = settings.get("layer_types")
    if kinds:
        different = list(dict.fromkeys(kinds))
        kinds = (different * 2)[: max(2, len(different))]
        small["num_hidden_layers"] = len(kinds)
    of_layers = {"layer_types": kinds} if kinds else {}
    return {**settings, **small, **of_layers, "pad_token_id": None}
