"""The recipe's sections `finetune` and `dpo`, and the training that they ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from cpt_merge.core.config import key
from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_config import ConversationsConfig
from cpt_merge.data.mixture import SourceShare
from cpt_merge.data.preferences import PairSource
from cpt_merge.data.store import SourceInfo
from cpt_merge.training.config import LoraConfig, ScheduleConfig, TrainingConfig


class FurtherTraining(ConversationsConfig):
    """A training on conversations. What has no key here is as in `training`."""

    epochs: float = key(
        2.0, "how often every conversation is read; a source's own `epochs` goes before it", gt=0
    )
    learning_rate: float = key(1e-5, "peak learning rate of every weight", gt=0)
    schedule: ScheduleConfig = key(
        ScheduleConfig(shape="cosine", warmup=0.03, final=0.1), "learning rate schedule"
    )
    weight_decay: float = key(
        0.0, "decoupled weight decay of matrices; norms and biases do not decay", ge=0
    )
    sequence_length: int | None = key(
        None,
        "longest conversation, and length of a packed sequence; training.sequence_length if not "
        "set",
        unit="tokens",
        ge=8,
    )
    global_batch_size: int = key(
        64, "sequences per optimizer step, over all processes", unit="sequences", gt=0
    )
    lora: LoraConfig | None = key(
        None, "train adapters, embedding and head, as in training.lora; every weight if not set"
    )
    log_every: int = key(1, "steps between two rows of metrics", unit="steps", gt=0)
    evaluate_every: int = key(
        50,
        "steps between two losses of the held-out conversations; also at step 0 and at the end",
        unit="steps",
        gt=0,
    )

    def length(self, training: TrainingConfig) -> int:
        """The length of a sequence."""
        return self.sequence_length or training.sequence_length

    def training_config(self, training: TrainingConfig, tokens: int) -> TrainingConfig:
        """The settings of the loop that reads so many tokens."""
        length = self.length(training)
        steps = math.ceil(tokens / (self.global_batch_size * length))
        optimizer = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        changed: dict[str, Any] = {
            "sequence_length": length,
            "rope": None,  # what is trained has those of the training
            "global_batch_size": self.global_batch_size,
            "tokens": steps * self.global_batch_size * length,
            "optimizer": training.optimizer.model_copy(
                update={**optimizer, "embedding_learning_rate": None}
            ),
            "schedule": self.schedule,
            "phases": [],
            "lora": self.lora,
            "shield": None,
            "log_every": self.log_every,
            "evaluate_every": self.evaluate_every,
            "continuations": 0,
        }
        return training.model_copy(update=changed)

    def settings(self, training: TrainingConfig) -> dict[str, Any]:
        """What decides the trained weights besides the conversations, for the key of a stage."""
        found = self.training_config(training, 1).identity()
        del found["tokens"]  # follows from the conversations and the epochs
        epochs = [source.epochs for source in self.sources]
        return {**found, "epochs": self.epochs, "epochs_of_sources": epochs}

    def check_batch(self, training: TrainingConfig, sources: Sequence[SourceInfo]) -> None:
        """Raise `UserError` if a store with these sources fills fewer sequences than one batch."""
        length = self.length(training)
        sequences = sum(info.train.tokens // length for info in sources)
        if sequences < self.global_batch_size:
            raise UserError(
                f"what {self.section}.sources has for training fills {sequences} sequences of "
                f"{length} tokens, fewer than {self.section}.global_batch_size = "
                f"{self.global_batch_size}; lower global_batch_size or sequence_length, or give "
                "more."
            )

    def reading(self, sources: Sequence[SourceInfo]) -> tuple[int, list[SourceShare]]:
        """How many tokens are read of a store with these sources, and of which source.

        A source is read as often as its epochs say, so its share follows from its size.
        """
        epochs = [source.epochs or self.epochs for source in self.sources]
        tokens = [n * info.train.tokens for n, info in zip(epochs, sources, strict=True)]
        total = sum(tokens)
        shares = [
            SourceShare(info.name, info.language, read / total, read, n)
            for info, read, n in zip(sources, tokens, epochs, strict=True)
        ]
        return max(1, round(total)), shares  # however few, one step reads them


class FinetuneConfig(FurtherTraining):
    """Fine-tuning on conversations."""

    after: Literal["training", "merge"] = key(
        "training",
        "what is fine-tuned; training: CPT, with the rows of the chat format, and the vector is "
        "added to the result as well; merge: the merged model",
    )


class PreferenceConfig(FurtherTraining):
    """Direct preference optimisation (Rafailov et al., 2023) of the chat model, at the end."""

    section: ClassVar[str] = "dpo"

    sources: list[PairSource] = key(  # type: ignore[assignment]  # a list of a subclass
        ..., "the pairs of a preferred and a rejected reply", min_length=1
    )
    beta: float = key(
        0.1, "how much a log probability may differ from the start's: less, the larger it is", gt=0
    )
    epochs: float = key(
        1.0, "how often every pair is read; a source's own `epochs` goes before it", gt=0
    )
    learning_rate: float = key(5e-7, "peak learning rate of every weight", gt=0)

    def settings(self, training: TrainingConfig) -> dict[str, Any]:
        """See `FurtherTraining`."""
        return {**super().settings(training), "beta": self.beta}
