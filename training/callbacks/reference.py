"""The line that the new model's bits per byte are compared with: the original base, with its own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from cpt_merge.core.artifact import write_json
from cpt_merge.core.progress import say, timed
from cpt_merge.data.packing import Batch
from cpt_merge.data.store import Store
from cpt_merge.training.callbacks.validation import heldout_sequences, validate
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.fsdp import shard
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.model.build import build_model, load_weights

FILE = "reference.json"


def reference_line(
    base: Path | None, store: Store, config: TrainingConfig, parallel: Parallel, out: Path
) -> dict[str, float]:
    """Bits per byte of the base per language, on the same held-out documents; measured once and kept in `out`.

    Empty, and said, where there is no base or the store has no text in its tokens. A collective.
    """
    path = out / FILE
    kept = parallel.broadcast(lambda: _kept(path, config.evaluate_sequences))
    if kept is not None:
        return kept
    heldout = heldout_sequences(store, config, "reference") if base and store.info.reference else []
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

        losses = validate(loss_of, heldout, config.micro_batch_size, parallel, lambda: False)
    assert losses is not None, "nobody stops it"
    found = {language: loss.bits_per_byte for language, loss in losses.items()}
    if parallel.world.is_main:
        write_json(path, {"rows": config.evaluate_sequences, "bits_per_byte": found})
    return found


def _kept(path: Path, rows: int) -> dict[str, float] | None:
    """What was measured before, if it was on so many rows: they may change between two attempts."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return dict(kept["bits_per_byte"]) if kept.get("rows") == rows else None
