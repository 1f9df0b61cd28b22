"""Merge any slice of any tensor: what the file carrier and the carrier in memory share, so that their bytes are equal.

Both give float32 values of the CPT model; the slice's rows of base and chat are read here, by token for the matrices of
the vocabulary. Everything is computed in chunks that stay in a core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from checkpoint.dtypes import Array, Float32, narrow, widen
from checkpoint.reader import Checkpoint
from checkpoint.writer import CheckpointWriter
from core.errors import UserError
from merge import kernel
from merge.align import Role, Rows
from merge.plan import MergePlan, PlannedTensor
from merge.rules import Treatment
from merge.statistics import Sums

CHUNK = 1 << 17  # elements; in float32 half a megabyte

ReadCpt = Callable[[int, int], Float32]


class SliceMerger:
    """Merges slices into a writer. Safe to use from several threads."""

    def __init__(self, plan: MergePlan, writer: CheckpointWriter) -> None:
        self.plan, self.writer = plan, writer
        keep_freed_memory()

    def merge(self, tensor: PlannedTensor, start: int, stop: int, read_cpt: ReadCpt) -> Sums:
        """Merge elements [start, stop) and write them; `read_cpt(a, b)` gives CPT's elements [a, b) in float32.

        A slice of a vocabulary matrix holds whole rows. Raises `UserError` for NaN or Inf.
        """
        sums = Sums()
        row = self.writer.layout.tensors[tensor.name].row_size
        step = max(CHUNK // row, 1) * row if tensor.by_token else CHUNK
        for first in range(start, stop, step):
            last = min(first + step, stop)
            cpt = read_cpt(first, last)
            if tensor.by_token:
                merged = self._merge_rows(tensor, first // row, cpt.reshape(-1, row), sums).reshape(-1)
            else:
                merged = self._merge_flat(tensor, first, last, cpt, sums)
            self.writer.write_flat(tensor.name, first, rounded(merged, tensor.spec.dtype, tensor.name))
        return sums

    def _merge_flat(self, tensor: PlannedTensor, first: int, last: int, cpt: Float32, sums: Sums) -> Float32:
        treatment = _treatment(tensor)
        if treatment.action == "skip":
            return cpt
        base = _read_float32(self.plan.base, tensor.name, first, last)
        chat = _read_float32(self.plan.chat, tensor.name, first, last)
        return _merge(tensor.name, treatment, cpt, base, chat, sums)

    def _merge_rows(self, tensor: PlannedTensor, first_row: int, cpt: Float32, sums: Sums) -> Float32:
        """Rows [first_row, first_row + len(cpt)) of a vocabulary matrix, each treated as its role says."""
        rows, treatment, merged = self.plan.rows, _treatment(tensor), cpt.copy()
        part = slice(first_row, first_row + len(cpt))
        role, base_rows, chat_rows = rows.role[part], rows.base[part], rows.chat[part]
        transplanted = np.flatnonzero(role == Role.CHAT)
        merged[transplanted] = self.plan.chat.gather_float32(tensor.name, chat_rows[transplanted])
        shared = np.flatnonzero(role == Role.SHARED)
        if treatment.action != "skip" and len(shared):
            base = self.plan.base.gather_float32(tensor.name, base_rows[shared])
            chat = self.plan.chat.gather_float32(tensor.name, chat_rows[shared])
            merged[shared] = _merge(tensor.name, treatment, cpt[shared], base, chat, sums)
        if treatment.action == "add":
            self._add_to_new_rows(tensor, first_row, treatment.ratio, merged)
        return merged

    def _add_to_new_rows(self, tensor: PlannedTensor, first_row: int, ratio: float, merged: Float32) -> None:
        """Add the mean vector of their constituents to the new rows that are to get one, in place."""
        for row in range(first_row, first_row + len(merged)):
            if row in self.plan.rows.constituents:
                base_rows, chat_rows = self.plan.rows.constituents[row]
                base = mean_row(self.plan.base, tensor.name, base_rows)
                chat = mean_row(self.plan.chat, tensor.name, chat_rows)
                merged[row - first_row] = kernel.add(merged[row - first_row], kernel.vector(chat, base), ratio)


def keep_freed_memory() -> None:
    """Let malloc keep the chunks' buffers between chunks; otherwise half of the time goes into page faults.

    glibc returns freed memory to the kernel beyond thresholds that grow with the largest mapped block that was ever
    freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). So one is freed, untouched. Harmless elsewhere.
    """
    np.empty(31 << 20, np.uint8)


def mean_row(checkpoint: Checkpoint, name: str, rows: Rows) -> Float32:
    """Mean of some rows of a matrix in float32: added one by one, in their order, then divided."""
    values = checkpoint.gather_float32(name, rows)
    total: Float32 = values[0]
    for row in values[1:]:
        total += row
    total /= np.float32(len(rows))
    return total


def rounded(values: Float32, dtype: str, name: str) -> Array:
    """The one rounding. Raises `UserError` where the result is not finite."""
    flat = values.reshape(-1)
    narrowed = narrow(flat, dtype)
    # the sum of squares is finite for all sane values, at a fraction of the cost of looking at each
    sane = math.isfinite(float(np.dot(flat, flat))) or bool(np.isfinite(flat).all())
    if not sane:
        raise UserError(f"{name} would hold NaN or Inf; one of the models is damaged.")
    if dtype == "F16" and not np.isfinite(narrowed).all():
        raise UserError(f"{name} has values beyond float16's 65504; choose dtype: bfloat16.")
    return narrowed


def _merge(name: str, treatment: Treatment, cpt: Float32, base: Float32, chat: Float32, sums: Sums) -> Float32:
    """What a rule makes of corresponding elements."""
    vector = kernel.vector(chat, base)
    sums.count(cpt, base, vector)
    if not math.isfinite(sums.base + sums.vector + sums.change):
        for model, values in (("cpt", cpt), ("base", base), ("chat", chat)):
            if not np.isfinite(values).all():
                raise UserError(f"{name} of the {model} model holds NaN or Inf; use a checkpoint without.")
    return chat if treatment.action == "replace" else kernel.add(cpt, vector, treatment.ratio)


def _treatment(tensor: PlannedTensor) -> Treatment:
    assert tensor.treatment is not None, f"{tensor.name} is copied, not merged"
    return tensor.treatment


def _read_float32(checkpoint: Checkpoint, name: str, first: int, last: int) -> Float32:
    return widen(checkpoint.read_flat(name, first, last), checkpoint.tensors[name].dtype)
