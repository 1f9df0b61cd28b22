"""The training stage: phase by phase build, load or resume, train, export; and the post-training hook."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cpt_merge.checkpoint.dtypes import Dtype
from cpt_merge.checkpoint.export import LocalShard, export_shards
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE, VocabularyMap
from cpt_merge.core.distributed import stop_process_group
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import say, timed
from cpt_merge.data.mixture import SourceShare, by_size, bytes_per_token, mixture
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.sources import Corpus
from cpt_merge.data.store import Store
from cpt_merge.merge.plan import MergePlan
from cpt_merge.tracking import Tracker
from cpt_merge.training.callbacks.continuations import prompts_from
from cpt_merge.training.callbacks.observe import PROMPT_TOKENS, Observer
from cpt_merge.training.callbacks.preview import Interview, Preview
from cpt_merge.training.callbacks.reference import reference_line
from cpt_merge.training.callbacks.spikes import Spikes
from cpt_merge.training.callbacks.validation import heldout_sequences
from cpt_merge.training.callbacks.watchdog import Watchdog
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.build import Start, build_backend
from cpt_merge.training.distributed.checkpoint import Checkpoints, TrainState
from cpt_merge.training.distributed.parallel import Parallel, start_parallel
from cpt_merge.training.distributed.stopping import StopRequest
from cpt_merge.training.phases import Phase, phases_of
from cpt_merge.training.start import start_block, throughput_of
from cpt_merge.training.trainer import Trainer

Hook = Callable[[list[LocalShard], Parallel], None]


@dataclass(frozen=True)
class TrainingInputs:
    """What a run of training starts from."""

    model: Path  # the resized base
    tokenizer: Path  # the extended tokenizer
    store: Path  # the token store made with it
    key: str  # names configuration and inputs; checkpoints of another key are refused
    base: Path | None = None  # the original base, for the line that bits per byte are compared with
    corpus: Corpus | None = (
        None  # how much of each source; in proportion to their sizes if not given
    )


def run(
    config: TrainingConfig,
    inputs: TrainingInputs,
    out: Path,
    tracker: Tracker,
    hook: Hook | None,
    previewed: tuple[MergePlan, Interview] | None = None,
) -> dict[str, Any]:
    """Train the model on the store; called by all processes. Leaves `out`/checkpoints and the trained model `out`/cpt.

    `hook` is called on all processes with this process's trained shards. `previewed`: how the chat model is made and
    asked while training goes on, if the configuration wants that.
    Raises `Interrupted` when it was asked to stop; everything is saved then.
    """
    parallel = start_parallel()
    try:
        training = prepare(config, inputs, out, tracker, parallel)
        if previewed:
            training.preview = Preview(config.preview, *previewed, out, parallel, tracker)
        with StopRequest(parallel, config.stop_margin) as stop:
            state, backend = training.through_phases(stop)
        shards = backend.shards()
        with timed("export of the trained model"):
            training.export(shards, out / "cpt")
        if hook:
            hook(shards, parallel)
        training.remove_phases()
        return {"steps": state.step, "tokens": state.tokens, "targets": state.targets}
    finally:
        stop_process_group()


@dataclass
class Training:
    """A run of training: what all its phases share."""

    config: TrainingConfig
    inputs: TrainingInputs
    out: Path
    tracker: Tracker
    parallel: Parallel
    rows: TrainingSequences
    shares: list[SourceShare]
    observer: Observer
    checkpoints: Checkpoints
    base_rows: int
    phases: list[Phase]
    preview: Preview | None = None

    def through_phases(self, stop: StopRequest) -> tuple[TrainState, Backend]:
        """Train phase after phase, from the newest checkpoint on. Each begins with the weights of the one before."""
        saved = self.checkpoints.read_state(self.inputs.key)
        state = saved or TrainState(0, 0, 0, 0, self.inputs.key)
        self.tracker.resume_from(state.step)
        self.observer.resume(state)
        if self.preview:
            self.preview.resume(state.previewed)
        backend: Backend | None = None
        for phase in self.phases[self._first(saved) :]:
            start = Start(self.config, phase, self._source(phase, saved), self.base_rows)
            backend = build_backend(start, self.parallel)
            say(start_block(start, backend, self.parallel, self.shares))
            if saved and saved.phase == phase.number:
                self.checkpoints.load(backend, saved)
            state = self._train(phase, backend, replace(state, phase=phase.number), stop)
            if stop.was_asked():
                text = f"after step {state.step} of {self.config.steps} ({stop.reason})"
                raise Interrupted(f"training stopped {text}; it is saved.", stop.reason)
            if phase is not self.phases[-1]:
                self.export(backend.shards(), self._exported(phase), "float32")
                backend.close()
        assert backend, "there is always a last phase"
        return state, backend

    def _first(self, saved: TrainState | None) -> int:
        """The phase to begin with: the checkpoint's, or the next one if its weights were exported already."""
        if saved is None:
            return 0
        phase = self.phases[saved.phase]
        over = saved.step == phase.stop and phase is not self.phases[-1]
        exported = over and self.parallel.any((self._exported(phase) / "config.json").is_file())
        return saved.phase + 1 if exported else saved.phase

    def _source(self, phase: Phase, saved: TrainState | None) -> Path:
        """What the weights are loaded from; where a checkpoint replaces them, any model of the shapes will do."""
        if phase.number == 0 or (saved and saved.phase == phase.number):
            return self.inputs.model
        return self._exported(self.phases[phase.number - 1])

    def _exported(self, phase: Phase) -> Path:
        return self.out / f"phase-{phase.number + 1}"

    def _train(
        self, phase: Phase, backend: Backend, state: TrainState, stop: StopRequest
    ) -> TrainState:
        with Watchdog(
            self.config.watchdog, self.out / "stacks", self.parallel.world.rank,
            lambda text: self.tracker.alert("no step ends", text),
        ) as watchdog:  # fmt: skip
            throughput = throughput_of(self.config, self.inputs.model, self.parallel)
            trainer = Trainer(
                self.config, phase, backend, self.rows, bytes_per_token(self.rows.store, self.shares),
                self.checkpoints, self.observer, throughput, watchdog, self.parallel, self.tracker, self.preview,
                state.skipped,
            )  # fmt: skip
            return trainer.train(state, stop)

    def export(self, shards: list[LocalShard], directory: Path, dtype: Dtype | None = None) -> None:
        """Write a Hugging Face checkpoint, by all processes; in the model's own types if no type is given."""
        if self.parallel.world.is_main:
            shutil.rmtree(
                directory, ignore_errors=True
            )  # of an attempt that was cut short after the export
        self.parallel.barrier()
        like, tokenizer = self.inputs.model, self.inputs.tokenizer
        export_shards(shards, like, tokenizer, directory, self.parallel, dtype)

    def remove_phases(self) -> None:
        """The weights between phases are not needed once the last one is exported."""
        if self.parallel.world.is_main:
            for phase in self.phases:
                shutil.rmtree(self._exported(phase), ignore_errors=True)


def prepare(
    config: TrainingConfig, inputs: TrainingInputs, out: Path, tracker: Tracker, parallel: Parallel
) -> Training:
    """Check that everything fits, and open it. Raises `UserError` with what does not."""
    _check_fit(config, inputs.model, parallel)
    phases = phases_of(config)
    base_rows = _base_rows(inputs, phases)
    store = Store.open(inputs.store)
    store.check_tokenizer(inputs.tokenizer)
    store.check_vocabulary(int(Checkpoint.open(inputs.model).config["vocab_size"]))
    available = [source.train.tokens for source in store.info.sources]
    shares = mixture(inputs.corpus, available, config.tokens) if inputs.corpus else by_size(store)
    rows = TrainingSequences(
        store, config.sequence_length, config.seed, [share.share for share in shares]
    )
    rows.check_batch(config.global_batch_size)
    checkpoints = Checkpoints(out / "checkpoints", config.checkpoints, parallel)
    checkpoints.start()
    observer = Observer(
        config, rows, heldout_sequences(store, config), reference_line(inputs.base, store, config, parallel, out),
        prompts_from(store, config.continuations, PROMPT_TOKENS), AutoTokenizer.from_pretrained(inputs.tokenizer),
        out, parallel, tracker, Spikes(sigma=config.spike_sigma),
    )  # fmt: skip
    return Training(
        config,
        inputs,
        out,
        tracker,
        parallel,
        rows,
        shares,
        observer,
        checkpoints,
        base_rows,
        phases,
    )


def _base_rows(inputs: TrainingInputs, phases: list[Phase]) -> int:
    if not any(phase.train == "new_rows" for phase in phases):
        return 0
    if not (inputs.tokenizer / MAP_FILE).is_file():
        raise UserError(
            f"training.phases names new_rows but {inputs.tokenizer} has no {MAP_FILE}, so no row is known to be new; "
            "use a tokenizer that `cpt-merge tokenizer` made."
        )
    vocabulary = VocabularyMap.load(inputs.tokenizer)
    if vocabulary.rows == vocabulary.base_rows:
        raise UserError(
            "training.phases names new_rows but the tokenizer has none; take that phase out."
        )
    return vocabulary.base_rows


def _check_fit(config: TrainingConfig, model: Path, parallel: Parallel) -> None:
    config.check_positions(Checkpoint.open(model).config)
    config.check_processes(parallel.world.size)
