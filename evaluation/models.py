"""The models under evaluation: checked, then loaded one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer

from cpt_merge.checkpoint.reader import check_complete
from cpt_merge.checkpoint.text_models import auto_class
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say, timed
from cpt_merge.evaluation.gpus import Gpus

DEFAULT_CONTEXT = 1024  # of models from elsewhere


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its own tokenizer. The weights are loaded when they are first
    asked for: if a server answers, no process here needs them."""

    name: str
    tokenizer: Any
    config: Any
    load: Callable[[], Any]

    @staticmethod
    def open(
        name: str, directory: Path, gpus: Gpus | None = None, weights: Path | None = None
    ) -> LanguageModel:
        """A model for inference: in bfloat16 on GPUs, in float32 on the CPU.

        `gpus` hold it; the default is the first one, if there are any. If `weights` is given,
        `directory` holds everything but the weights. Vocabulary rows that the weights lack have
        arbitrary values then.
        """
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        place = gpus or Gpus.one(0)

        def load() -> Any:
            options: dict[str, Any] = {"dtype": torch.bfloat16 if place.count else torch.float32}
            if weights:
                options |= {"config": config, "ignore_mismatched_sizes": True}
            with timed(f"{name}: loading {weights or directory}"):
                model = _class_of(directory, config).from_pretrained(
                    weights or directory, trust_remote_code=False, **options, **place.placement()
                )
            return model.eval()

        return LanguageModel(name, load_tokenizer(directory), config, load)

    @cached_property
    def loaded(self) -> Any:
        """The model with its weights, for inference."""
        return self.load()

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return torch.device(self.loaded.device)

    @property
    def positions(self) -> int:
        """The most tokens of prompt and reply together; unlimited if its config names no number."""
        return _positions(self.config) or sys.maxsize

    @property
    def beginning(self) -> str:
        """The bos token, if the tokenizer puts it before a text; else nothing."""
        ids = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return str(self.tokenizer.bos_token) if ids[:1] == [self.tokenizer.bos_token_id] else ""

    @property
    def rows(self) -> int:
        """Rows of its embedding, which may be more than there are tokens; 0 if unknown."""
        return int(getattr(self.config.get_text_config(), "vocab_size", None) or 0)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone, without bos or eos."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def shared_context(
    models: Mapping[str, Path], wanted: int | None, trained_on: int | None = None
) -> int:
    """The window for all models, in tokens, at most the positions of each.

    `wanted` is the recipe's; if it is None, the window is as long as the sequences of continued
    pretraining, `trained_on`, which are None for models from elsewhere.

    Raises `UserError` for a directory without a complete model, before any model is loaded.
    """
    context = wanted or trained_on or DEFAULT_CONTEXT
    if wanted or not trained_on:
        source = f"evaluation.context = {context}" + ("" if wanted else " by default")
    else:
        source = f"training.sequence_length = {context}"
    if trained_on is not None and context > trained_on:
        say(
            f"evaluation.context = {context} is longer than the sequences of continued pretraining "
            f"({trained_on}), so the trained model is asked for what it was not trained on"
        )
    for name, directory in models.items():
        try:
            check_complete(directory)
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            _check_quantiser(config)
            _class_of(directory, config)
        except (UserError, OSError, ValueError) as error:
            raise UserError(f"model {name}: {first_line(error)}") from None
        load_tokenizer(directory)
        positions = _positions(config)
        if positions and positions < context:
            say(
                f"{source}, but {name} has only {positions} positions; "
                f"all models use windows of {positions}"
            )
            context = positions
    return context


def _positions(config: Any) -> int | None:
    """The number of positions that a configuration of transformers names, if it names one."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None)


def _class_of(directory: Path, config: Any) -> Any:
    """The class that loads a model. Raises `UserError` for one that writes no text."""
    found = auto_class(config)
    if found is None:
        raise UserError(
            f"{directory} ({type(config).__name__}) is no model that writes text; use another one."
        )
    return found


def _check_quantiser(config: Any) -> None:
    """Raise `UserError` if transformers lacks what it needs to load a quantised model."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment()
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(
            f"it is quantised, and transformers cannot load it here ({first_line(error)}); install "
            "what is missing, or evaluate the model in 16 bits."
        ) from None


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model. Raises `UserError` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} holds no tokenizer that transformers can read ({first_line(error)}); "
            "copy the model's tokenizer into it."
        ) from None
    except ImportError as error:
        raise UserError(
            f"the tokenizer in {directory} needs a package that is missing or incomplete "
            f"({first_line(error)}); install that package."
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error; those of libraries have several."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of items of similar length, `size` per batch, the longest first.

    Batches are formed before processes divide them, so padding does not depend on the world size.
    If a batch does not fit into memory, the first one fails.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]
