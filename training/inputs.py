"""What a run of training starts from, checked and opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import vocabulary_rows
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE, VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.data.mixture import SourceShare, by_size, check_repeats
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.pairs import Preference
from cpt_merge.data.sources import Corpus
from cpt_merge.data.store import Store
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.phases import Phase
from cpt_merge.training.stretches import Stretch, stretches_of, whole_run


@dataclass(frozen=True)
class TrainingInputs:
    """What a run of training starts from."""

    model: Path  # the resized base
    tokenizer: Path  # the extended tokenizer
    store: Path  # the token store made with it
    key: str  # names configuration and inputs; checkpoints of another key are refused
    base: Path | None = None  # the original base, with which bits per byte are compared
    corpus: Corpus | None = None  # the weights of the sources; by their sizes if not given
    shares: list[SourceShare] | None = None  # what is read of each source, if that is known
    preference: Preference | None = None  # the store has pairs of replies to compare


def open_sequences(
    config: TrainingConfig, inputs: TrainingInputs
) -> tuple[TrainingSequences, list[Stretch]]:
    """The sequences of a run, and the share of each source in its steps.

    Raises `UserError` if the store does not fit the tokenizer, the model or the batch size.
    """
    store = Store.open(inputs.store)
    store.check_tokenizer(inputs.tokenizer)
    store.check_vocabulary(vocabulary_rows(Checkpoint.open(inputs.model)))
    available = [source.train.tokens for source in store.info.sources]
    stretches = [Stretch(0, config.steps, inputs.shares or by_size(store))]
    if inputs.corpus:
        stretches = stretches_of(config, inputs.corpus, available)
        check_repeats(inputs.corpus, whole_run(stretches))
    (_, shares), *changes = [
        (one.start * config.global_batch_size, [share.share for share in one.shares])
        for one in stretches
    ]
    sequences = TrainingSequences(
        store, config.sequence_length, config.seed, shares, inputs.preference, changes
    )
    sequences.check_batch(config.global_batch_size)
    return sequences, stretches


def first_new_row(inputs: TrainingInputs, phases: list[Phase]) -> int:
    """The first row that the extension added, if a phase trains new rows only; otherwise 0.

    Raises `UserError` if such a phase has no new rows to train.
    """
    if not any(phase.train == "new_rows" for phase in phases):
        return 0
    if not (inputs.tokenizer / MAP_FILE).is_file():
        raise UserError(
            f"training.phases names new_rows but {inputs.tokenizer} has no {MAP_FILE}, "
            "so nothing tells which rows are new; "
            "use a tokenizer that `cpt-merge tokenizer` made."
        )
    vocabulary = VocabularyMap.load(inputs.tokenizer)
    if vocabulary.rows == vocabulary.base_rows:
        raise UserError(
            "training.phases names new_rows but the tokenizer has none; remove that phase."
        )
    return vocabulary.base_rows
