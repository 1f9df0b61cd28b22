"""The recipe's `data` and `training` sections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator

from cpt_merge.core.config import ByLanguage, LanguageTag, Section, key
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_tag
from cpt_merge.data.sources import is_whole
from cpt_merge.training.context import Context, RopeConfig

MOMENT_BLOCK = 256  # 8-bit moments that share a scale in fp32
Offload = Literal["none", "optimizer", "all"]  # what is kept in the CPU's memory


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor of its peak."""

    shape: Literal["cosine", "linear", "wsd"] = key(
        "cosine", "how it decays: cosine, linear, or wsd (warmup, stable, decay)"
    )
    warmup: float = key(0.05, "share of the steps in which the rate rises linearly", ge=0, lt=1)
    decay: float = key(
        0.2, "wsd only: share of the steps, at the end, in which the rate falls", gt=0, le=1
    )
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
        None, "peak learning rate of embedding and head; learning_rate if not set", gt=0
    )
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    epsilon: float = key(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = key(
        0.1, "decoupled weight decay of matrices; norms and biases do not decay", ge=0
    )
    clip: float = key(1.0, "largest norm of the gradient", gt=0)
    moments: Literal["full", "8bit"] = key(
        "full",
        "how both moments are stored: full, in the type of the master weights; 8bit, in blocks of "
        "8-bit numbers with a scale, a quarter of the memory",
    )


class PhaseConfig(Section):
    """A part of the run that trains only some of the weights, with its own optimizer."""

    train: Literal["new_rows", "vocabulary", "all"] = key(
        ...,
        "new_rows: the rows of the new tokens; vocabulary: embedding and head; all: every weight, "
        "with lora: adapters, embedding and head",
    )
    tokens: int | None = key(
        None, "its budget; the last phase takes the rest if not set", unit="tokens", gt=0
    )
    learning_rate: float | None = key(
        None, "peak learning rate; optimizer.learning_rate if not set", gt=0
    )
    embedding_learning_rate: float | None = key(
        None,
        "peak learning rate of embedding and head; optimizer.embedding_learning_rate if not set",
        gt=0,
    )
    weights: dict[str, float] = key(
        {},
        "weights of sources in this phase, by their names in `plan` (`ko:web`) or by language; 0: "
        "not read; others keep theirs",
    )
    shares: ByLanguage[float] = key(
        {}, "share of each language in this phase; corpus.shares if not set"
    )
    sequence_length: int | None = key(
        None,
        "length of a packed sequence from this phase on; a step keeps its number of tokens, so "
        "both batch sizes change with it; that of the phase before if not set",
        unit="tokens",
        ge=8,
    )
    rope: RopeConfig | None = key(
        None,
        "rotary positions from this phase on, written to the trained and the merged model; those "
        "of the phase before if not set",
    )

    @field_validator("weights")
    @classmethod
    def _by_tag(cls, weights: dict[str, float]) -> dict[str, float]:
        """Languages by their known tags; names of sources stay."""
        return {find_tag(name) or name: weight for name, weight in weights.items()}

    @model_validator(mode="after")
    def _amounts_are_shares(self) -> PhaseConfig:
        if any(not 0 <= weight < math.inf for weight in self.weights.values()):
            raise ValueError("a weight is a number of at least 0")
        if self.shares and not is_whole(self.shares):
            raise ValueError(
                f"`shares` sum to {sum(self.shares.values()):g}; they must be positive and sum to 1"
            )
        return self

    def changes_mixture(self, before: PhaseConfig) -> bool:
        """Whether it reads the sources in other shares than the phase before."""
        mixture = {"weights", "shares"}
        return self.model_dump(include=mixture) != before.model_dump(include=mixture)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685)."""

    rank: int = key(64, "rank of the adapters", gt=0)
    alpha: float | None = key(
        None, "an adapter adds alpha / rank times its product; twice the rank if not set", gt=0
    )
    targets: list[str] = key(
        [],
        "linear layers that get an adapter: names, or ends of names (`q_proj`, `mlp.down_proj`); "
        "every linear layer of the decoder layers if not set",
    )

    @field_validator("targets")
    @classmethod
    def _are_names(cls, targets: list[str]) -> list[str]:
        for target in targets:
            if target != target.strip() or not target:
                raise ValueError(f'"{target}" is not a name; remove it, or its spaces')
            if targets.count(target) > 1:
                raise ValueError(f'"{target}" occurs twice; remove one of them')
        return targets

    @property
    def numerator(self) -> float:
        """alpha, or its default."""
        return self.alpha or 2.0 * self.rank

    def covers(self, module: str) -> bool:
        """Whether a linear layer of this name, in the decoder layers, is meant to get one."""
        return not self.targets or any(means(target, module) for target in self.targets)


def means(target: str, module: str) -> bool:
    """Whether a target of `LoraConfig` is the name of a module, or the end of it."""
    return f".{module}".endswith(f".{target}")


class ShieldConfig(Section):
    """Source-shielded updates (Yamaguchi et al., 2025, https://arxiv.org/abs/2512.04844)."""

    language: LanguageTag = key("en", "language of the text that decides which columns are needed")
    share: float = key(
        0.5, "share of the columns of each linear layer that are not trained", gt=0, lt=1
    )
    sequences: int = key(
        500, "sequences of that text on which importance is measured", unit="sequences", gt=0
    )


class CheckpointConfig(Section):
    """What a killed run continues from."""

    every: int = key(500, "steps between two checkpoints", unit="steps", gt=0)
    keep: int = key(2, "how many of the newest checkpoints are kept", gt=0)
    keep_every: int | None = key(
        None,
        "checkpoints at multiples of this many steps are never removed; none if not set",
        unit="steps",
        gt=0,
    )
    asynchronous: bool = key(
        True,
        "write during training, from a copy of the shards in CPU memory",
    )

    @model_validator(mode="after")
    def _kept_ones_are_made(self) -> CheckpointConfig:
        if self.keep_every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every = {self.keep_every} is no multiple of every = {self.every}; "
                "set a multiple"
            )
        return self


class PreviewConfig(Section):
    """A preview of the chat model during training."""

    every: int | None = key(
        None,
        "steps between two previews, also at step 0 and at the end: the chat vector is added to "
        "the weights in memory as `merge` says, prompts are answered, and the weights are "
        "restored bit for bit; no previews if not set",
        unit="steps",
        gt=0,
    )
    prompts: int = key(
        4,
        "prompts per language: the first of evaluation.prompts, or else of evaluation.instructions",
        gt=0,
    )
    max_new_tokens: int = key(64, "longest reply", unit="tokens", gt=0)


class TrainingConfig(Section):
    """Continual pretraining."""

    sequence_length: int = key(4096, "length of a packed sequence", unit="tokens", ge=8)
    rope: RopeConfig | None = key(
        None,
        "rotary positions for longer sequences, written to the trained and the merged model; the "
        "model's own if not set",
    )
    global_batch_size: int = key(
        256, "sequences per optimizer step, over all processes", unit="sequences", gt=0
    )
    micro_batch_size: int = key(
        1, "sequences that one process takes through the model at once", unit="sequences", gt=0
    )
    tokens: int = key(
        ...,
        "training budget; rounded up to whole steps; raise it, and a run continues",
        unit="tokens",
        gt=0,
    )
    start: str | None = key(
        None,
        "the model whose weights training starts from, a directory or a hub id: the chat model, "
        "or a model that another run made of the same base; the base if not set",
    )
    precision: Literal["bf16", "fp32", "pure-bf16"] = key(
        "bf16",
        "bf16: bf16 compute, fp32 master weights and reduction; pure-bf16: no masters, weights are "
        "rounded stochastically",
    )
    optimizer: OptimizerConfig = key(OptimizerConfig(), "AdamW")
    schedule: ScheduleConfig = key(ScheduleConfig(), "learning rate schedule of each phase")
    phases: list[PhaseConfig] = key(
        [], "what is trained one after the other; every weight all the time if not set"
    )
    lora: LoraConfig | None = key(
        None,
        "train low-rank adapters of the decoder's linear layers instead of these layers, with "
        "embedding and head in full; the exported model has them merged; every weight is trained "
        "if not set",
    )
    shield: ShieldConfig | None = key(
        None,
        "for a model that chats already: do not train the columns of its linear layers that the "
        "source language needs most; every weight is trained if not set",
    )
    fp8: bool = key(
        False,
        "float8 matmuls in the decoder layers, by torchao; needs a GPU of capability 8.9 or newer",
    )
    activation_checkpointing: Literal["none", "full", "selective"] = key(
        "none",
        "what the backward pass computes again to save memory: nothing; each layer; or each layer "
        "except its attention and every second matmul",
    )
    offload: Offload | None = key(
        None,
        "what is in the CPU's memory instead of the GPU's: optimizer: moments and master weights, "
        "and the optimizer steps there (DeepSpeed); all: also weights and gradients (FSDP2, "
        "ZeRO 3); what the accelerate configuration says if not set",
    )
    offload_activations: bool = key(
        False,
        "move what the backward pass needs to the CPU's memory until then: the layers' inputs with "
        "activation_checkpointing: full, otherwise all of it",
    )
    compile: bool = key(False, "torch.compile each decoder layer")
    attention: Literal["auto", "flash", "sdpa", "flex", "eager"] = key(
        "auto",
        "auto: the fastest that fits the model and keeps packed documents apart; flash: document "
        "by document (on a GPU a variable-length kernel, bf16 only; on a CPU sdpa per document); "
        "flex, sdpa, eager: those of transformers, with a mask",
    )
    loss_chunk: int = key(
        1024, "tokens whose logits exist at once in the head and the loss", unit="tokens", gt=0
    )
    auxiliary_loss: bool = key(
        True,
        "add the load-balancing loss of expert routers, with the coefficient in config.json, if "
        "the family has one in transformers",
    )
    log_every: int = key(10, "steps between two rows of metrics", unit="steps", gt=0)
    evaluate_every: int = key(
        200,
        "steps between two held-out evaluations; also at step 0 and at the end",
        unit="steps",
        gt=0,
    )
    evaluate_sequences: int = key(
        64, "held-out sequences per language that an evaluation reads", unit="sequences", gt=0
    )
    continuations: int = key(
        2,
        "held-out documents per language of which each evaluation shows a continuation; 0: none",
        ge=0,
    )
    preview: PreviewConfig = key(PreviewConfig(), "the chat model during training")
    checkpoints: CheckpointConfig = key(CheckpointConfig(), "checkpoints")
    max_skipped_steps: int = key(
        5,
        "consecutive steps with a non-finite gradient after which training stops",
        unit="steps",
        gt=0,
    )
    spike_sigma: float = key(
        6.0,
        "a loss this many standard deviations above the mean of the last 128 steps is reported "
        "with its sequences",
        gt=0,
    )
    watchdog: float = key(
        600.0,
        "when no step ends in this time, every process writes the stacks of its threads",
        unit="s",
        gt=0,
    )
    stop_margin: float = key(
        120.0,
        "time before --stop-at, or before the end of the Slurm job, at which to save and stop",
        unit="s",
        ge=0,
    )
    peak_tflops: float | None = key(
        None,
        "dense bf16 peak of the GPU, for MFU; from a table of known GPUs if not set",
        unit="TFLOP/s",
        gt=0,
    )
    seed: int = key(0, "seed of the order of the sequences")
    post_train_merge: bool = key(
        True, "add the chat vector to the trained shards in memory when training ends"
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads, over all processes."""
        return self.sequence_length * self.global_batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.tokens // self.tokens_per_step)

    @property
    def context(self) -> Context:
        """Length of the sequences, and rotary positions, where no phase has others."""
        return Context(self.sequence_length, self.rope)

    @property
    def contexts(self) -> list[Context]:
        """Length and rotary positions in each of `phases`; of the run if it has none."""
        found = [self.context]
        for phase in self.phases:
            last = found[-1]
            found.append(Context(phase.sequence_length or last.length, phase.rope or last.rope))
        return found[1:] or found

    def within(self, context: Context) -> TrainingConfig:
        """The settings of a phase with this context; a step has as many tokens as in any other."""
        if context.length == self.sequence_length:
            return self.model_copy(update={"rope": context.rope})
        sequences = self.tokens_per_step // context.length
        at_once = self.micro_batch_size * self.sequence_length // context.length
        return self.model_copy(
            update={
                "sequence_length": context.length,
                "rope": context.rope,
                "global_batch_size": sequences,
                "micro_batch_size": min(max(1, at_once), sequences),
            }
        )

    @property
    def longest(self) -> TrainingConfig:
        """The settings of the phase with the longest sequences, which takes the most memory."""
        return self.within(max(self.contexts, key=lambda context: context.length))

    def continues(self, place: int) -> bool:
        """Whether nothing but the mixture of a phase differs from the one before.

        Then it belongs to that one.
        """
        if place == 0:
            return False
        before, phase = self.phases[place - 1 : place + 1]
        own = {"train", "learning_rate", "embedding_learning_rate"}
        return (
            phase.model_dump(include=own) == before.model_dump(include=own)
            and self.contexts[place] == self.contexts[place - 1]
            and phase.changes_mixture(before)
        )

    def micro_batches(self, processes: int) -> int:
        """Micro-batches of each process in one step."""
        return -(-self.global_batch_size // (processes * self.micro_batch_size))

    def check_processes(
        self, processes: int, note: str = "", kind: str = "processes", section: str = "training"
    ) -> None:
        """Raises `UserError` if a batch does not divide over the processes; `note` names them.

        `section` of the recipe has the size of the batch.
        """
        size = self.global_batch_size
        if size < processes:
            raise UserError(
                f"{section}.global_batch_size = {size:,} has fewer sequences than there are "
                f"{kind}{note}, {processes:,}; take at most {size:,}, or set a multiple of "
                f"{processes:,}."
            )
        if size % processes:
            most = next(n for n in range(processes, 0, -1) if size % n == 0)
            raise UserError(
                f"{section}.global_batch_size = {size:,} does not divide over {processes:,} "
                f"{kind}{note}; set {-(-size // processes) * processes:,}, or take {most:,}."
            )

        for context in self.contexts:
            size, length = self.tokens_per_step // context.length, context.length
            if size % processes == 0:
                continue
            step = length * processes // math.gcd(self.sequence_length, length * processes)
            raise UserError(
                f"a step of the phase with sequences of {length:,} tokens has {size:,} of them, "
                f"which does not divide over {processes:,} {kind}{note}; set "
                f"{section}.global_batch_size = {-(-self.global_batch_size // step) * step:,}."
            )

    def check_positions(self, model: Mapping[str, Any], section: str = "training") -> None:
        """Raises `UserError` if a sequence has more tokens than the model has positions.

        `model` has the values of its config.json; `section` of the recipe has the length.
        """
        self.context.check(model, f"{section}.sequence_length")
        for place, context in enumerate(self.contexts if self.phases else []):
            context.check(model, f"{section}.phases.{place}.sequence_length")

    def extend(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the trained model; `model` has that of the one training starts from.

        Raises `UserError` as `Context.extend` does.
        """
        return self.contexts[-1].extend(model)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights. Others may change when a run continues."""
        names = {
            "sequence_length",
            "global_batch_size",
            "tokens",
            "precision",
            "fp8",
            "optimizer",
            "schedule",
            "phases",
            "seed",
        }
        # runs that do not set these keep the keys that they had before these existed
        if not self.auxiliary_loss:
            names.add("auxiliary_loss")
        names |= {name for name in ("lora", "shield", "rope") if getattr(self, name)}
        found = self.model_dump(include=names)
        for phase in found["phases"]:
            for name in ("weights", "shares", "sequence_length", "rope"):
                if not phase[name]:
                    del phase[name]
        if self.optimizer.moments == "full":
            del found["optimizer"]["moments"]
        if self.precision == "pure-bf16":
            found["rounding"] = "stochastic"
        return found

    @model_validator(mode="after")
    def _activations_can_move(self) -> TrainingConfig:
        if self.offload_activations and self.activation_checkpointing == "selective":
            raise ValueError(
                "offload_activations moves only the layers' inputs with activation_checkpointing: "
                "selective, the smallest part of what is kept; set that to full or none"
            )
        return self

    @model_validator(mode="after")
    def _shield_fits(self) -> TrainingConfig:
        if self.shield and (
            self.lora or self.optimizer.moments == "8bit" or self.precision == "pure-bf16"
        ):
            raise ValueError(
                "`shield` trains the layers themselves, with fp32 masters and full moments; leave "
                "out lora, optimizer.moments: 8bit and precision: pure-bf16"
            )
        return self

    @model_validator(mode="after")
    def _sequences_are_whole(self) -> TrainingConfig:
        for context in self.contexts:
            if self.tokens_per_step % context.length:
                raise ValueError(
                    f"a step has {self.tokens_per_step:,} tokens, which are no whole number of "
                    f"sequences of {context.length:,} in `phases`; set global_batch_size * "
                    "sequence_length to a multiple of it"
                )
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> TrainingConfig:
        budgets = [phase.tokens for phase in self.phases]
        if None in budgets[:-1]:
            raise ValueError(
                "only the last of `phases` may leave out its tokens; give the others a budget"
            )
        planned = sum(budget or 0 for budget in budgets)
        if planned > self.tokens or (budgets and budgets[-1] is None and planned == self.tokens):
            raise ValueError(
                f"`phases` take {planned:,} tokens but `tokens` is {self.tokens:,}; raise it"
            )
        if budgets and budgets[-1] is not None and planned < self.tokens:
            raise ValueError(
                f"`phases` take {planned:,} of {self.tokens:,} tokens; "
                "leave out the last one's tokens so that it takes the rest"
            )
        follow = [place for place in range(1, len(self.phases)) if not self.continues(place)]
        if self.lora and any(self.phases[place - 1].train == "all" for place in follow):
            raise ValueError(
                "with `lora`, only the last of `phases` may train `all`, since checkpoints hold "
                "no weights of layers, which have to stay the base's; put that phase last"
            )
        return self
