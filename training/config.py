"""The recipe's `data` and `training` sections."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from core.config import Section, key


class DataConfig(Section):
    """How the text is turned into a token store."""

    batch_documents: int = key(1000, "documents that the tokenizer is given at a time", unit="documents", gt=0)


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor of its peak."""

    shape: Literal["cosine", "linear", "wsd"] = key("cosine", "decay: cosine, linear, or warmup-stable-decay")
    warmup: float = key(0.05, "share of the steps in which the rate rises linearly", ge=0, lt=1)
    decay: float = key(0.2, "wsd only: share of the steps, at the end, in which the rate falls", gt=0, le=1)
    final: float = key(0.1, "the rate at the last step, as a factor of the peak", ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            raise ValueError("warmup and decay together are longer than the run; lower one")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = key(2e-5, "peak learning rate", gt=0)
    embedding_learning_rate: float | None = key(
        None, "peak learning rate of the embedding and head matrices; the same as the others' if not set", gt=0
    )
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    epsilon: float = key(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = key(0.1, "decoupled weight decay, on matrices only (not on norms and biases)", ge=0)
    clip: float = key(1.0, "largest norm of the gradient", gt=0)


class TrainingConfig(Section):
    """Continual pretraining."""

    sequence_length: int = key(4096, "length of a packed row", unit="tokens", ge=8)
    batch_rows: int = key(256, "packed rows per optimizer step, over all processes", unit="rows", gt=0)
    micro_batch_rows: int = key(1, "packed rows that one process takes through the model at once", unit="rows", gt=0)
    tokens: int = key(..., "training budget; rounded up to whole steps", unit="tokens", gt=0)
    precision: Literal["bf16", "fp32", "pure-bf16"] = key(
        "bf16", "bf16: bf16 compute, fp32 master weights and reduction; pure-bf16: bf16 throughout"
    )
    optimizer: OptimizerConfig = key(OptimizerConfig(), "AdamW")
    schedule: ScheduleConfig = key(ScheduleConfig(), "learning rate schedule")
    fp8: bool = key(False, "float8 matmuls in the decoder layers, by torchao; GPUs of capability 8.9 and newer")
    activation_checkpointing: Literal["none", "full", "selective"] = key(
        "none",
        "what the backward pass computes again, to save memory: nothing; each layer; or each layer but for its "
        "attention and every second matmul",
    )
    compile: bool = key(False, "torch.compile each decoder layer")
    attention: Literal["flash", "sdpa", "flex", "eager"] = key(
        "flash",
        "flash: document by document (a GPU's variable-length kernel, bf16 only; on a CPU sdpa per document); "
        "sdpa, flex, eager: transformers' own, with a mask",
    )
    loss_chunk: int = key(1024, "tokens whose logits exist at once in the head and the loss", unit="tokens", gt=0)
    log_every: int = key(10, "steps between two rows of metrics", unit="steps", gt=0)
    evaluate_every: int = key(
        200, "steps between two held-out evaluations; also at step 0 and the end", unit="steps", gt=0
    )
    evaluate_rows: int = key(64, "held-out rows per language that an evaluation reads", unit="rows", gt=0)
    checkpoint_every: int = key(500, "steps between two checkpoints", unit="steps", gt=0)
    keep_checkpoints: int = key(2, "how many of the newest checkpoints are kept", gt=0)
    max_skipped_steps: int = key(
        5, "steps in a row with a non-finite gradient after which training stops", unit="steps", gt=0
    )
    seed: int = key(0, "seed of the order of the rows")
    post_train_merge: bool = key(True, "add the chat vector to the trained shards in memory when training ends")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads, over all processes."""
        return self.sequence_length * self.batch_rows

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.tokens // self.tokens_per_step)
