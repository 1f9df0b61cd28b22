"""LoRA: W + scaling * B A in the linear layers of the decoder, of which only A and B are trained.

Embedding and head are trained in full (Cui et al., Efficient and Effective Text Encoding for
Chinese LLaMA and Alpaca, 2023); norms, biases and routers are frozen. peft puts the adapters into
the decoder layers; here they get names and first values.

The experts of most families are one tensor of three dimensions, and stay frozen: peft adds an
adapter to such a tensor by making the sum in every forward pass, and autograd keeps that sum, as
large as all experts, in each layer. That takes more memory than the adapter saves.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.checkpoint.text_models import text_decoder
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say_once
from cpt_merge.core.spelling import nearest
from cpt_merge.training.config import LoraConfig, means
from cpt_merge.training.model.small import TOKENS, small_config, small_decoder

_PEFTS_NAME = "default"  # of an adapter


@dataclass(frozen=True)
class Adapter:
    """The matrices of one weight, by their names in the model."""

    left: str  # B, (out, rank)
    right: str  # A, (rank, in)
    scaling: float
    transposed: bool  # the weight is stored as (in, out), as GPT-2's are


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, and the names that its weights have without them."""

    of: Mapping[str, Adapter] = field(default_factory=dict)
    """By the name of the weight in transformers."""
    plain: Mapping[str, str] = field(default_factory=dict)
    """The name of a weight now -> its name in transformers, where they differ."""
    seed: int = 0

    @cached_property
    def lefts(self) -> frozenset[str]:
        """The names of all B."""
        return frozenset(adapter.left for adapter in self.of.values())

    @cached_property
    def factors(self) -> frozenset[str]:
        """The names of all A and B."""
        return self.lefts.union(adapter.right for adapter in self.of.values())

    def initial(self, name: str, shape: Sequence[int]) -> Tensor:
        """The first values of a matrix, float32: of B zero, of A uniform, as in peft.

        They depend on the seed and the name alone, so they do not change with the processes.
        """
        if name in self.lefts:
            return torch.zeros(*shape)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def check_peft() -> None:
    """Raise `UserError` if peft is not installed."""
    if find_spec("peft") is None:
        raise UserError(
            "training.lora needs peft, which is not installed; "
            "pip install -c constraints.txt -e '.[lora]'"
        )


def find_targets(model: Any, layers: nn.ModuleList, config: LoraConfig) -> list[str]:
    """The linear layers that get an adapter, by their names within the decoder layers.

    Raises `UserError` for a target that is none of them.
    """
    prefix = next(name for name, module in model.named_modules() if module is layers)
    linear = [name for name, module in layers.named_modules() if _is_linear(module)]
    unfit = _unfit(model, layers, linear)
    for target in config.targets:
        meant = [name for name in linear if means(target, f"{prefix}.{name}")]
        if meant and not unfit.keys() >= set(meant):
            continue
        if meant:
            raise UserError(
                f"training.lora.targets: {target} can have no adapter, because {unfit[meant[0]]}; "
                "remove it."
            )
        known = sorted({name.split(".", 1)[1] for name in linear if "." in name})
        ends = {name.rpartition(".")[2] for name in known}
        raise UserError(
            f"training.lora.targets: {target} is no linear layer of the decoder layers of "
            f"{type(model).__name__}{nearest(target, [*sorted(ends), *known])}; "
            f"they have {', '.join(sorted(ends))}."
        )
    found = [name for name in linear if name not in unfit and config.covers(f"{prefix}.{name}")]
    shapes = (cast(Tensor, layers.get_submodule(name).weight).shape for name in found)
    widest = max(map(min, shapes), default=0)
    if config.rank > widest:
        say_once(
            f"training.lora.rank = {config.rank} is more than any of the adapted matrices can use; "
            f"{widest} gives all that they can learn"
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _unfit(model: Any, layers: nn.ModuleList, linear: Sequence[str]) -> dict[str, str]:
    """Linear layers that can have no adapter, each with the reason."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    never = _never_called(model)
    found = {}
    for name in linear:
        if uses[id(layers.get_submodule(name).weight)] > 1:
            found[name] = "several layers share its weight"
        elif kind_of(f"layers.{name}.weight") == "router":
            found[name] = "routers are frozen"
        elif _anywhere(name) in never:
            found[name] = "the family's code uses its weight without calling it"
    return found


def _anywhere(name: str) -> str:
    """The name of a module within the decoder layers, without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@torch.no_grad()
def _never_called(model: Any) -> set[str]:
    """The linear layers that a small model of the architecture has but does not call.

    An adapter there would do nothing (Mamba's `dt_proj`). None if no small model runs.
    """
    config = small_config(text_decoder(model), TOKENS)
    if config is None:
        return set()
    decoder = small_decoder(config, "eager")
    layers = max((m for m in decoder.children() if isinstance(m, nn.ModuleList)), key=len)
    called: set[str] = set()
    linear = {name: module for name, module in layers.named_modules() if _is_linear(module)}
    for name, module in linear.items():
        module.register_forward_hook(lambda *_, name=name: called.add(_anywhere(name)))
    decoder(input_ids=torch.arange(2 * TOKENS).view(2, TOKENS), use_cache=False)
    return {_anywhere(name) for name in linear} - called


def add_adapters(
    model: Any, layers: nn.ModuleList, targets: Sequence[str], config: LoraConfig, seed: int
) -> Adapters:
    """Put adapters into a model whose parameters are on the meta device.

    What is trained stays to be selected. Raises `UserError` if peft is not installed.
    """
    check_peft()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    before = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {id(one): one.requires_grad for one in model.parameters()}
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.numerator,  # type: ignore[arg-type]  # it need not be whole
        target_modules=list(targets),
        init_lora_weights=False,
    )
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # it sets what fits
        inject_adapter_in_model(settings, layers, adapter_name=_PEFTS_NAME)
    plain = {
        name: before[id(parameter)]
        for name, parameter in model.named_parameters()
        if id(parameter) in before and before[id(parameter)] != name
    }
    for parameter in model.parameters():  # peft froze what it was given
        parameter.requires_grad_(trained.get(id(parameter), True))
    of = {}
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for target in targets:
        path, module = f"{prefix}.{target}", cast(Any, layers.get_submodule(target))
        left, right = (f"{path}.lora_{part}.{_PEFTS_NAME}.weight" for part in "BA")
        of[f"{path}.weight"] = Adapter(
            left, right, module.scaling[_PEFTS_NAME], bool(module.fan_in_fan_out)
        )
    return Adapters(of, plain, seed)
