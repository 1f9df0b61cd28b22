"""Whether a base can be trained as a recipe says, found without reading its weights.

The model is built on the meta device, which also chooses its attention (`training.model.choice`),
and compared with the headers of its files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from cpt_merge.checkpoint.loaded import is_tied, open_model, written_config
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.stored_shards import check_divisible
from cpt_merge.checkpoint.text_only import text_only
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.build import check_backend, check_choice
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.flops import peak_flops
from cpt_merge.training.model.attention import check_device
from cpt_merge.training.model.build import (
    CausalLM,
    WeightSource,
    build_from,
    decoder_layers,
    read_model_config,
    stored_buffers,
)
from cpt_merge.training.model.choice import Choice
from cpt_merge.training.model.compile import check_compiler
from cpt_merge.training.model.fp8 import check_capability, check_torchao
from cpt_merge.training.model.lora import check_peft, find_targets

_CPU, _META = torch.device("cpu"), torch.device("meta")


def check_trainable(
    base: Path,
    config: TrainingConfig,
    asked: BackendSettings,
    device: torch.device | None,
    without_towers: bool = False,
) -> Choice:
    """How packed documents are kept apart in a model that can be trained.

    Raises `UserError` for what the start of training would refuse: backend, device, model.

    Without a `device` the model may train on another machine, which has to check its GPUs itself;
    lines say so. `without_towers`: it is the text decoder of the wrapper in `base`.
    """
    check_backend(asked, config)
    if config.fp8:
        check_torchao()
    if config.lora:
        check_peft()
    if device:
        _check_device(config, device)
    else:
        _report_unchecked(config)
    module = check_model(base, config, device or _CPU, without_towers)
    if asked.backend != "none":
        check_divisible(module.stored, base)
    if config.lora:
        find_targets(module.model, module.layers, config.lora)
    choice = module.choice
    check_choice(asked, choice)
    for line in choice.describe():
        say(line)
    return choice


def _check_device(config: TrainingConfig, device: torch.device) -> None:
    """Raise `UserError` for what does not train on the device, whatever the model."""
    if config.attention != "auto":
        check_device(config.attention, config.precision, device)
    if config.compile:
        check_compiler(device)
    if config.fp8:
        check_capability(device)
    if device.type == "cuda" and not config.peak_tflops:
        peak_flops(torch.cuda.get_device_name(device))


def _report_unchecked(config: TrainingConfig) -> None:
    """Say what only the machine that trains can check, and what a run on this one would refuse."""
    asked = [name for name in ("compile", "fp8") if getattr(config, name)]
    settings = " and ".join([f"attention: {config.attention}", *asked])
    say(f"training: no GPU is here, so whether one trains with {settings} is checked at the start")
    try:
        _check_device(config, _CPU)
    except UserError as error:
        say(f"training: a run on this machine would be refused: {error}")


def check_model(
    directory: Path,
    config: TrainingConfig,
    device: torch.device = _CPU,
    without_towers: bool = False,
) -> CausalLM:
    """A model that training can build, and whose files hold all its weights.

    Raises `UserError` for another one.
    """
    checkpoint = open_model(directory)
    if without_towers:
        checkpoint = text_only(checkpoint)
    with tempfile.TemporaryDirectory() as folder:  # config.json as the resized base has it
        settings = written_config(checkpoint.config, is_tied(checkpoint))
        write_json(Path(folder) / "config.json", settings)
        model_config = read_model_config(Path(folder), directory)
    module = build_from(model_config, directory, config.model_copy(update={"fp8": False}), device)
    _check_weights(module, checkpoint)
    decoder_layers(module.model)
    return module


def _check_weights(module: CausalLM, checkpoint: Checkpoint) -> None:
    """Raise `UserError` unless the files hold every weight of the model, in its shape."""
    source = WeightSource.of(module, checkpoint, _META)
    seen: set[int] = set()  # a tied parameter is stored once
    for name, parameter in module.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            source.find(name, parameter)
        seen.add(id(parameter))
    for name, buffer in stored_buffers(module):
        source.find(name, buffer)
