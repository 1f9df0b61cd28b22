"""Validation: loss and bits per byte of held-out text in each language during training.

Of conversations, the loss of the replies alone: which tokens count depends on the chat template.

They are called validation bits per byte, since they differ from the evaluation's held-out bits per
byte: the first packed sequences of the held-out text, in windows of `sequence_length`, with the end
of each document predicted as in training.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpt_merge.checkpoint.positions import positions_of
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.artifact import write_json
from cpt_merge.core.progress import say, timed
from cpt_merge.data.packing import Batch, PackedDocuments, stack
from cpt_merge.data.pairs import Preference
from cpt_merge.data.store import Store, StoreSplit
from cpt_merge.training.callbacks.callback import PeriodicCallback, TrainerView
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.fsdp import shard
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.model.build import build_model, load_weights

REFERENCE_FILE = "reference.json"


@dataclass(frozen=True)
class HeldoutText:
    """The first sequences of one language's held-out documents."""

    language: str
    sources: list[tuple[PackedDocuments, int]]  # (documents, how many sequences of them)

    @property
    def bytes(self) -> float:
        """UTF-8 bytes of the text; of a document that is cut, in proportion to its tokens."""
        return sum(
            _bytes_within(packed, packed.length * count + 1) for packed, count in self.sources
        )


def _heldout_sequences(
    store: Store,
    config: TrainingConfig,
    split: StoreSplit = "heldout",
    preference: Preference | None = None,
) -> list[HeldoutText]:
    """For each language up to `evaluate_sequences` sequences, from its sources in order."""
    found: dict[str, list[tuple[PackedDocuments, int]]] = {}
    for source in store.info.sources:
        documents = store.documents(source, split)
        packed = PackedDocuments(documents, config.sequence_length, preference)
        already = sum(count for _, count in found.get(source.language, []))
        count = min(packed.sequences, config.evaluate_sequences - already)
        if packed.sequences == 0 and split == "heldout":
            say(
                f"{source.name}: what is held out fills no sequence of {config.sequence_length}; "
                "raise `heldout`"
            )
        if count > 0:
            found.setdefault(source.language, []).append((packed, count))
    return [HeldoutText(language, sources) for language, sources in found.items()]


def _bytes_within(packed: PackedDocuments, tokens: int) -> float:
    starts, sizes = packed.documents.starts, packed.documents.bytes
    whole = int(np.searchsorted(starts, tokens, side="right")) - 1
    total = float(sizes[:whole].sum())
    if whole < len(sizes):
        total += (
            float(sizes[whole]) * (tokens - starts[whole]) / (starts[whole + 1] - starts[whole])
        )
    return total


@dataclass(frozen=True)
class LanguageLoss:
    """How well a model predicts one language's held-out text."""

    loss: float  # nats per target
    # sum of -log2 p(token) / UTF-8 bytes; comparable across tokenizers; None for conversations
    bits_per_byte: float | None

    def __str__(self) -> str:
        value = self.loss if self.bits_per_byte is None else self.bits_per_byte
        return f"{value:.3f}"


def _validate(
    loss_of: Callable[[Batch], Tensor],
    heldout: list[HeldoutText],
    micro_batch: int,
    parallel: Parallel,
    stopped: Callable[[], bool],
) -> dict[str, LanguageLoss] | None:
    """The losses by language, with the sequences divided over the processes.

    `loss_of` is a collective that gives the sum of a batch's losses in nats. `stopped`, also a
    collective, is asked before every batch; if it says so, the result is None.
    """
    found = {}
    for text in heldout:
        places = [(packed, number) for packed, count in text.sources for number in range(count)]
        nats = _sum_of_losses(loss_of, places, micro_batch, parallel, stopped)
        if nats is None:
            return None
        targets = sum(packed.targets(number) for packed, number in places)
        bits = nats / math.log(2) / text.bytes if text.bytes else None
        found[text.language] = LanguageLoss(nats / targets, bits)
    return found


def _sum_of_losses(
    loss_of: Callable[[Batch], Tensor],
    places: list[tuple[PackedDocuments, int]],
    micro_batch: int,
    parallel: Parallel,
    stopped: Callable[[], bool],
) -> float | None:
    mine = places[parallel.rank :: parallel.size]
    # the same number on all processes, since FSDP gathers weights in every forward pass
    batches = -(-len(places) // (parallel.size * micro_batch))
    nats = torch.zeros((), dtype=torch.float64)
    for number in range(batches):
        if stopped():
            return None
        chosen = mine[number * micro_batch : (number + 1) * micro_batch]
        batch = stack(chosen or places[:1])
        loss = loss_of(batch.to(parallel.device))
        nats += loss.double().cpu() * bool(chosen)
    return parallel.total(float(nats))


def reference_line(
    base: Path | None, store: Store, config: TrainingConfig, parallel: Parallel, out: Path
) -> dict[str, float]:
    """Bits per byte of the base by language, on the same held-out documents. A collective.

    Measured once and kept in `out`. Empty, with a message, where there is no base or the store has
    no text in its tokens.
    """
    if store.has_conversations:
        return {}  # a base has no chat template
    path = out / REFERENCE_FILE
    kept = parallel.broadcast(lambda: _kept(path, config.evaluate_sequences))
    if kept is not None:
        return kept
    heldout = (
        _heldout_sequences(store, config, "reference") if base and store.info.reference else []
    )
    if base is None or not heldout:
        say("training: no reference line, since the store holds no text in the base's own tokens")
        return {}
    positions = positions_of(Checkpoint.open(base).config)
    if positions is not None and positions < config.sequence_length:
        say(f"training: no reference line, since {base} has only {positions:,} positions")
        return {}
    config = config.model_copy(update={"rope": None})
    with timed(f"validation bits per byte of {base}"):
        module = build_model(base, config, parallel.device).requires_grad_(False)
        on_cpu = parallel.settings.offload != "none"  # what is trained would not fit, either
        if parallel.size > 1 or config.precision == "bf16" or on_cpu:
            shard(module, config, parallel, on_cpu)
        load_weights(module, base, parallel.device, on_cpu)

        @torch.no_grad()
        def loss_of(batch: Batch) -> Tensor:
            loss: Tensor = module(batch)
            return loss

        losses = _validate(loss_of, heldout, config.micro_batch_size, parallel, lambda: False)
    assert losses is not None, "nothing stops it"
    found = {
        language: loss.bits_per_byte
        for language, loss in losses.items()
        if loss.bits_per_byte is not None
    }
    if parallel.is_main:
        write_json(path, {"sequences": config.evaluate_sequences, "bits_per_byte": found})
    return found


def _kept(path: Path, sequences: int) -> dict[str, float] | None:
    """An earlier measurement, if it used as many sequences: attempts may differ in that setting."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return dict(kept["bits_per_byte"]) if kept.get("sequences") == sequences else None


class HeldoutEvaluation(PeriodicCallback):
    """Measures the held-out text, next to the base's bits per byte with its own tokenizer."""

    name = "evaluation"

    @property
    def every(self) -> int:
        """See `PeriodicCallback`."""
        return self.trainer.config.evaluate_every

    def attach(self, trainer: TrainerView) -> None:
        """See `Callback`. Measures the base, if that has not been done."""
        super().attach(trainer)
        config, store = trainer.config, trainer.sequences.store
        self.micro_batch_size = config.micro_batch_size
        self.heldout = _heldout_sequences(store, config, "heldout", trainer.sequences.preference)
        self.reference = reference_line(
            trainer.inputs.base, store, config, trainer.parallel, trainer.out
        )

    def look(self) -> bool:
        """See `PeriodicCallback`."""
        trainer, state, started = self.trainer, self.trainer.state, time.monotonic()
        found = _validate(
            trainer.backend.loss,
            self.heldout,
            self.micro_batch_size,
            trainer.parallel,
            trainer.stop.agreed,
        )
        if found is None:
            return False
        metrics = {"train/tokens": float(state.tokens)}
        for language, loss in found.items():
            metrics[f"valid/{language}/loss"] = loss.loss
            if loss.bits_per_byte is not None:
                metrics[f"valid/{language}/bits_per_byte"] = loss.bits_per_byte
            if language in self.reference:
                metrics[f"valid/{language}_base/bits_per_byte"] = self.reference[language]
        trainer.tracker.log(metrics, step=state.step)
        shown = ", ".join(f"{language} {loss}" for language, loss in found.items())
        measure = "bits per byte"
        if trainer.sequences.store.has_conversations:
            measure = "loss of pairs" if trainer.sequences.preference else "loss of replies"
        seconds = time.monotonic() - started
        say(f"step {state.step}: validation {measure} {shown} ({seconds:.1f} s)")
        return True
