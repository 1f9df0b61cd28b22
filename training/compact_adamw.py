"""AdamW with moments in 8 bits, and with bf16 weights that are rounded stochastically.

Both make training smaller than AdamW on fp32 masters, with its 16 bytes a parameter: moments in 8
bits take 2 bytes instead of 8, bf16 weights without masters 2 instead of 4. A step computes in fp32
with torch's fused AdamW, some rows at a time, so it needs little memory beside what is stored.

**8-bit moments** (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022): values are
divided by the largest of their block of 256, and stored as the nearest of 256 numbers that are
dense around zero. Blocks lie within a row, so the codes and scales of a sharded parameter are
sharded as its rows are, and a checkpoint fits any number of processes. A second moment above zero
never becomes zero: an embedding's row gets no gradient in a step without its token, and its first
moment over the root of zero would be an update of any size. Sharded vectors (norms, biases) keep
fp32 moments.

**Stochastic rounding** (Gupta et al., Deep Learning with Limited Numerical Precision, 2015): a
weight between two bf16 numbers becomes the upper one with a probability of its distance from the
lower one. Rounding to nearest loses every update below 1/512 of a weight, so training stands still
where learning rates are low. bf16 moments are rounded in the same way. The random numbers depend on
the seed, the step, the parameter and the first row of the shard: a resumed run, and the replicas of
HSDP, draw the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.optim.adamw import adamw

from cpt_merge.training.config import MOMENT_BLOCK as BLOCK
from cpt_merge.training.model.build import local_rows

# Values that a step computes at once, some 20 bytes each: few kernels on a GPU, a CPU's cache
AT_ONCE, AT_ONCE_ON_CPU = 2**23, 2**20
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) as the module describes it.

    `found_inf`, as `torch.optim.AdamW(fused=True)` reads it: where it is not zero, nothing changes.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        eight_bits: bool,
        seed: int,
    ) -> None:
        self.eight_bits, self.seed = eight_bits, seed
        # `calls` counts steps, also skipped ones; it is saved with the groups
        super().__init__(groups, {"betas": betas, "eps": eps, "calls": 0})

    def describe(self) -> str:
        """What is stored in place of fp32 weights and moments, for the startup summary."""
        # ZeRO 3 lends its flat weights for a step only, and all of their moments are in 8 bits
        mine = [one for group in self.param_groups for one in group["params"] if one.numel()]
        total = sum(one.numel() for one in mine)
        rounded = any(one.dtype == torch.bfloat16 for one in mine)
        words = ["rounded stochastically"] if rounded else []
        if self.eight_bits:
            small = sum(one.numel() for one in mine if _is_quantised(one))
            share = f" of {small / total:.1%} of the trained weights" if total else ""
            words.append(f"moments{share} in 8 bits")
        return "AdamW, " + ", ".join(words)

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state with which a parameter begins: moments of zero."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for name, signed in MOMENTS.items():
            if self.eight_bits and _is_quantised(parameter):
                codes = torch.zeros_like(parameter, dtype=torch.uint8)
                _local(codes).fill_(_code_of_zero(signed))
                state[name], state[f"{name}_scale"] = codes, _zero_scales(parameter)
            else:
                kept = torch.float32 if self.eight_bits else parameter.dtype
                state[name] = torch.zeros_like(parameter, dtype=kept)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter] = self.fresh_state(parameter)
                    self._update(parameter, group, number)
                number += 1
            group["calls"] += 1

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        skipped = self.found_inf
        state = {name: _local(value) for name, value in self.state[parameter].items()}
        weights, gradient = _local(parameter), _local(parameter.grad)
        draw = self._generator(group["calls"], number, parameter)
        for part in _parts(weights):
            moments = {name: part.read(state, name) for name in MOMENTS}
            new = part.of(weights).float()  # the weights themselves, if they are fp32
            adamw(
                [new], [part.of(gradient).float().contiguous()],
                [moments["exp_avg"]], [moments["exp_avg_sq"]], [], [state["step"].clone()],
                beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                lr=group["lr"], weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
                fused=True, found_inf=skipped,
            )  # fmt: skip
            for name in MOMENTS:
                part.write(state, name, moments[name], skipped, draw)
            if weights.dtype == torch.bfloat16:
                _replace(part.of(weights), stochastic_bf16(new, draw), skipped)
        state["step"] += 1 if skipped is None else 1 - skipped

    def _generator(self, calls: int, number: int, parameter: Tensor) -> torch.Generator:
        key = (self.seed, calls, number, local_rows(parameter)[0])
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(_local(parameter).device).manual_seed(seed)

    @torch.no_grad()
    def unpacked(self, flat: Tensor) -> dict[str, Tensor]:
        """The moments of a flat parameter in fp32: its own, or CPU copies of those in 8 bits."""
        state, found = self.state[flat], {}
        for name in MOMENTS:
            if f"{name}_scale" not in state:
                found[name] = state[name]
                continue
            found[name] = torch.empty(len(flat))
            for part in _parts(flat):
                part.of(found[name]).copy_(part.read(state, name))
        return found

    @torch.no_grad()
    def pack(self, flat: Tensor, moments: dict[str, Tensor]) -> None:
        """Take moments as `unpacked` gives them, which give the same codes and scales again."""
        state = self.state[flat]
        for name, signed in MOMENTS.items():
            if f"{name}_scale" not in state:
                continue  # they are the state's own
            for part in _parts(flat):
                codes, scales = quantised(part.of(moments[name]).to(flat.device), signed)
                part.of(state[name]).copy_(codes)
                state[f"{name}_scale"][part.scales].copy_(scales.flatten())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state as it is; torch would cast codes and scales to the weights' type."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, mine, strict=True):
            if saved := state_dict["state"].get(number):
                self.state[parameter] = {
                    name: value.to(parameter.device) for name, value in saved.items()
                }


@dataclass(frozen=True)
class _Part:
    """Rows of a parameter on this process, or a stretch of a flat one, and the scales of these."""

    rows: slice
    scales: slice

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the parameter, or of what has its shape, as rows."""
        taken = tensor[self.rows]
        return taken.reshape(len(taken), -1) if taken.ndim > 1 else taken.unsqueeze(0)

    def read(self, state: dict[str, Tensor], name: str) -> Tensor:
        """A moment in fp32."""
        stored = self.of(state[name])
        if f"{name}_scale" not in state:
            return stored.float()
        scales = state[f"{name}_scale"][self.scales].reshape(len(stored), -1)
        return dequantised(stored, scales, MOMENTS[name])

    def write(
        self,
        state: dict[str, Tensor],
        name: str,
        values: Tensor,
        skipped: Tensor | None,
        draw: torch.Generator,
    ) -> None:
        """Store a moment, if the step is not skipped."""
        stored = self.of(state[name])
        if f"{name}_scale" in state:
            values, scales = quantised(values, MOMENTS[name])
            kept = state[f"{name}_scale"][self.scales]
            _replace(kept, scales.reshape(kept.shape), skipped)
        if stored.dtype == torch.bfloat16:
            values = stochastic_bf16(values, draw)
        if values.data_ptr() != stored.data_ptr():  # fp32 moments were updated in place
            _replace(stored, values, skipped)


def _parts(weights: Tensor) -> Iterator[_Part]:
    """Parts of about `AT_ONCE` values that together are all of a parameter."""
    at_once = AT_ONCE_ON_CPU if weights.device.type == "cpu" else AT_ONCE
    if weights.ndim > 1:
        size = max(1, at_once // max(1, weights[:1].numel()))
        for start in range(0, len(weights), size):
            yield _Part(slice(start, start + size), slice(start, start + size))
    else:
        for start in range(0, len(weights), at_once):
            stop = start + at_once
            yield _Part(slice(start, stop), slice(start // BLOCK, stop // BLOCK))


def _replace(old: Tensor, new: Tensor, skipped: Tensor | None) -> None:
    old.copy_(new if skipped is None else torch.where(skipped.bool(), old, new))


def quantised(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] (uint8) and scales [rows, blocks] (fp32) of fp32 values.

    A scale is the value of the largest size with its sign, so that it is stored exactly, and the
    values of `dequantised` give the same codes and scales again.
    """
    rows, columns = values.shape
    blocks = pad(values, (0, -columns % BLOCK)).view(rows, -(-columns // BLOCK), BLOCK)
    scales = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    shares = blocks / scales.where(scales != 0, 1.0).unsqueeze(-1)
    codes = torch.bucketize(shares, _midpoints(signed, values.device), out_int32=True)
    if not signed:
        codes = codes.where((codes > 0) | (shares == 0), 1)
    return codes.view(rows, -1)[:, :columns].to(torch.uint8), scales


def dequantised(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The fp32 values [rows, columns] of `quantised`."""
    rows, columns = codes.shape
    values = pad(levels(signed, codes.device)[codes.int()], (0, -columns % BLOCK))
    scaled = values.view(rows, -1, BLOCK) * scales.unsqueeze(-1)
    return scaled.view(rows, -1)[:, :columns].contiguous()  # as the fused AdamW takes for granted


@cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers of dynamic quantisation, ascending (Dettmers, 8-Bit Approximations, 2015).

    0, 1, and of each decade from 1e-7 .. 1e-6 to 0.1 .. 1 the means of 1, 2, 4, ... 64 equal parts,
    with both signs; without a sign of twice as many parts.
    """
    found = [0.0, 1.0]
    for place in range(7):
        edges = torch.linspace(
            0.1, 1, 2 ** (place if signed else place + 1) + 1, dtype=torch.float64
        )
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (place - 6)
        found += [*means.tolist(), *((-means).tolist() if signed else ())]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@cache
def _midpoints(signed: bool, device: torch.device) -> Tensor:
    """Between neighbouring levels."""
    return (levels(signed, device)[1:] + levels(signed, device)[:-1]) / 2


@cache
def _code_of_zero(signed: bool) -> int:
    return levels(signed, torch.device("cpu")).tolist().index(0.0)


def stochastic_bf16(values: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 values in bf16, up or down at random, so that their mean is the value.

    An fp32 number is its bf16 neighbour towards zero and 16 bits more; a random number of 16 bits
    is added, which carries with the probability of that rest.
    """
    noise = torch.randint(
        2**16, values.shape, generator=draw, device=values.device, dtype=torch.int32
    )
    carried = (values.view(torch.int32) + noise) & -(2**16)
    return carried.view(torch.float32).to(torch.bfloat16)


def _is_quantised(parameter: Tensor) -> bool:
    """Matrices, and the long flat tensors that DeepSpeed makes of them."""
    flat = not isinstance(parameter, DTensor) and parameter.numel() > 16 * BLOCK
    return parameter.ndim > 1 or flat


def _zero_scales(parameter: Tensor) -> Tensor:
    """A scale for each block: [rows, blocks of a row], or [blocks] of a flat parameter."""
    if parameter.ndim == 1:
        return torch.zeros(-(-len(parameter) // BLOCK), device=parameter.device)
    blocks = -(-parameter.shape[1:].numel() // BLOCK)
    zeros = torch.zeros(len(_local(parameter)), blocks, device=_local(parameter).device)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((parameter.shape[0], blocks))
    made = DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape,
        stride=(blocks, 1),
    )  # fmt: skip
    return made.to(parameter.device)  # of offloaded weights; `from_local` moves to the mesh's


def _local(tensor: Tensor | None) -> Tensor:
    """The rows on this process."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
