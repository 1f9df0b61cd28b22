"""What DeepSpeed's optimizers hold, by the names of the weights. Tested with DeepSpeed 0.19.

DeepSpeed's own checkpoints can be loaded only by the same ZeRO stage on the same number of
processes. But each process knows which elements of which weight it holds, so these are written
under the weight's name, as `fsdp` writes rows. Any stage, number of processes and offloading can
load them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpt_merge.core.errors import UserError
from cpt_merge.training.compact_adamw import MOMENTS, CompactAdamW
from cpt_merge.training.distributed.exact_rows import ExactRows, divided_rows
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.state_files import FlatPart, StateFiles
from cpt_merge.training.model.build import CausalLM, WeightSource, full_shape
from cpt_merge.training.optimizer import AdamW, fresh_state


def names_of_groups(module: CausalLM, optimizer: AdamW) -> list[list[str]]:
    """The weights of each of AdamW's groups, before DeepSpeed puts flat tensors in their place."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]


@dataclass(frozen=True)
class _Held:
    """The elements of a trained weight whose fp32 master is on this process."""

    shape: tuple[int, ...]  # of the whole weight
    first: int  # of its elements
    flat: Tensor  # the masters of several weights, which is what AdamW steps
    offset: int  # in `flat`
    count: int

    def part(self, flat: Tensor) -> FlatPart:
        """The elements in `flat`, or in what has its shape."""
        values = flat.detach()[self.offset : self.offset + self.count]
        return FlatPart(self.shape, self.first, values)


@dataclass(frozen=True)
class ZeroState:
    """Writes and reads masters, moments and frozen weights of an engine, each process its own."""

    engine: Any
    files: StateFiles
    parallel: Parallel
    groups: list[list[str]]  # of `names_of_groups`
    with_frozen: bool
    running: Callable[[Tensor], tuple[Tensor, int]]
    """The elements of a weight with which this process runs, and the number of the first."""
    exact: ExactRows

    @torch.no_grad()
    def prove_masters(self) -> None:
        """Raise `UserError` if masters are not where DeepSpeed says; call it before any step.

        DeepSpeed has made them of what runs, and everything here trusts what it says.
        """
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            held, (values, first) = self._held(parameter), self.running(parameter)
            start = held.first - first
            runs = values[start : start + held.count].detach()
            masters = held.part(held.flat).values
            if not torch.equal(masters.to(runs.device, runs.dtype), runs):
                raise UserError(
                    f"DeepSpeed says wrongly where the fp32 master of {name} is, so checkpoints "
                    "and exports would be wrong; leave out unusual keys of zero_optimization."
                )

    @torch.no_grad()
    def load_masters(self, source: WeightSource) -> None:
        """Take the masters from files; DeepSpeed makes them of what runs, which bf16 rounded."""
        module: CausalLM = self.engine.module
        for name, parameter in module.model.named_parameters():
            if not parameter.requires_grad:
                continue
            held, whole = self._held(parameter), torch.empty(full_shape(parameter), device="meta")
            width = math.prod(held.shape[1:])
            start, stop = held.first // width, -(-(held.first + held.count) // width)
            if held.count > 0:
                rows = source.rows(name, whole, start, stop).reshape(-1)
                first = held.first - start * width
                held.part(held.flat).values.copy_(rows[first : first + held.count])

    def write(self, directory: Path, asynchronous: bool) -> Future[None]:
        """As `Backend.save`."""
        state = self._state(self._moments(), shared=True)
        return self.files.write(state, directory, asynchronous)

    def read(self, directory: Path) -> None:
        """Read what `write` wrote. What runs of the trained weights remains as it is."""
        moments = self._moments()
        state = self._state(moments, shared=False)
        del state["optimizer"]["param_groups"]  # they are the recipe's, and steps set the rate
        self.files.read(state, directory)
        steps = [of_weight["step"] for of_weight in state["optimizer"]["state"].values()]
        for flat, values in moments.items():
            self._adamw.state[flat]["step"].copy_(torch.stack(steps).max())
            if isinstance(self._adamw, CompactAdamW):
                self._adamw.pack(flat, values)

    @property
    def _adamw(self) -> AdamW:
        optimizer: AdamW = self.engine.basic_optimizer
        return optimizer

    def _moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """The moments of each flat tensor in fp32: the optimizer's, or copies of 8-bit ones."""
        found = {}
        for flat in self._flats():
            state = self._adamw.state[flat]
            if not state:  # before the first step
                state.update(fresh_state(self._adamw, flat))
            if isinstance(self._adamw, CompactAdamW):
                found[flat] = self._adamw.unpacked(flat)
            else:
                found[flat] = {name: state[name] for name in MOMENTS}
        return found

    def _state(self, moments: dict[Tensor, dict[str, Tensor]], shared: bool) -> dict[str, Any]:
        """What is written, by the names that torch's `get_state_dict` gives.

        `shared`: of frozen weights that all processes hold, each has a share.
        """
        module: CausalLM = self.engine.module
        model: dict[str, Any] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter):
                model[name] = tensor
            elif tensor.requires_grad:
                held = self._held(tensor)
                model[name] = held.part(held.flat)
            elif self.with_frozen:
                model[name] = self._frozen(tensor, shared)
        state = {}
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                held = self._held(weight)
                of_flat = moments[held.flat]
                state[name] = {moment: held.part(of_flat[moment]) for moment in MOMENTS}
                state[name]["step"] = self._adamw.state[held.flat]["step"].clone()
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._adamw.param_groups
        ]
        groups = [
            {**group, "params": names} for group, names in zip(settings, self.groups, strict=True)
        ]
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}}

    def _frozen(self, weight: Tensor, shared: bool) -> FlatPart:
        """What this process writes or reads of a frozen weight."""
        shape, exact = tuple(full_shape(weight)), self.exact.of(weight)
        if exact is not None:
            start, _ = divided_rows(shape, self.parallel)
            return FlatPart(shape, start * math.prod(shape[1:]), exact.view(-1))
        values, first = self.running(weight)
        part = FlatPart(shape, first, values.detach())
        return part.share(self.parallel.rank, self.parallel.size) if shared else part

    def _flats(self) -> list[Tensor]:
        """The flat tensors that AdamW steps."""
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 3:  # AdamW has them during a step only
            return list(optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._adamw.param_groups for flat in group["params"]]

    def _held(self, parameter: Tensor) -> _Held:
        """What this process has of a trained weight's masters; maybe nothing, with ZeRO 1 and 2."""
        shape, flats = tuple(full_shape(parameter)), self._flats()
        if self.engine.zero_optimization_stage() == 3:
            optimizer = self.engine.optimizer
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = self.parallel.rank * count
            rest = max(math.prod(shape) - first, 0)  # the last parts may be padded
            return _Held(shape, first, flats[group], offset, min(count, rest))
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return _Held(shape, 0, flats[0], 0, 0)
        first, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        return _Held(shape, first, flats[mapping.param_group_index], offset, count)
