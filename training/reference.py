"""The line that the new model's bits per byte are compared with: the original base, with its own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from core.artifact import write_json
from core.progress import say, timed
from training.backends.torch_native import shard
from training.config import TrainingConfig
from training.model import build_model, load_weights
from training.packing import Batch
from training.parallel import Parallel
from training.store import Store
from training.validation import heldout_rows, validate

FILE = "reference.json"


def reference_line(
    base: Path | None, store: Store, config: TrainingConfig, parallel: Parallel, out: Path
) -> dict[str, float]:
    """Bits per byte of the base per language, on the same held-out documents; measured once and kept in `out`.

    Empty, and said, where there is no base or the store has no text in its tokens. A collective.
    """
    path = out / FILE
    kept = parallel.from_main(lambda: _kept(path, config.evaluate_rows))
    if kept is not None:
        return kept
    heldout = heldout_rows(store, config, "reference") if base and store.info.reference else []
    if base is None or not heldout:
        say("training: no reference line, since the store holds no text in the base's own tokens")
        return {}
    with timed(f"bits per byte of {base}"):
        module = build_model(base, config).requires_grad_(False)
        if parallel.world.size > 1 or config.precision == "bf16":
            shard(module, config, parallel)
        load_weights(module, base, parallel.device)

        @torch.no_grad()
        def loss_of(batch: Batch) -> Tensor:
            loss: Tensor = module(batch)
            return loss

        losses = validate(loss_of, heldout, config.micro_batch_rows, parallel, lambda: False)
    assert losses is not None, "nobody stops it"
    found = {language: loss.bits_per_byte for language, loss in losses.items()}
    if parallel.world.is_main:
        write_json(path, {"rows": config.evaluate_rows, "bits_per_byte": found})
    return found


def _kept(path: Path, rows: int) -> dict[str, float] | None:
    """What was measured before, if it was on so many rows: they may change between two attempts."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return dict(kept["bits_per_byte"]) if kept.get("rows") == rows else None
