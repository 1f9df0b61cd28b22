"""The models under evaluation: found, checked, and loaded one after the other."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its own tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    @property
    def positions(self) -> int:
        """How many tokens it can take, prompt and reply together; without end where its config names no number."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone, without bos or eos."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def shared_context(models: Mapping[str, Path], wanted: int) -> int:
    """The window that every model can take: `wanted`, or the fewest positions of any model, which is then said.

    Raises `UserError` for a directory that holds no whole model: the last one is found before the first one is asked.
    """
    context = wanted
    for name, directory in models.items():
        try:
            _ = Checkpoint.open(directory).config
            config = AutoConfig.from_pretrained(directory)
        except (UserError, OSError, ValueError) as error:
            raise UserError(f"model {name}: {first_line(error)}") from None
        load_tokenizer(directory)
        positions = getattr(config, "max_position_embeddings", context)
        if positions < context:
            say(
                f"evaluation.context = {wanted}, but {name} has {positions} positions: {positions} for all models"
            )
            context = positions
    return context


def load_model(
    name: str, directory: Path, local_rank: int, weights: Path | None = None
) -> LoadedModel:
    """Load a model for inference: bfloat16 on a GPU, float32 on the CPU, whatever type it is stored in.

    With `weights`, `directory` holds all but the weights; rows of the vocabulary that they lack hold anything.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    other = (
        {"config": AutoConfig.from_pretrained(directory), "ignore_mismatched_sizes": True}
        if weights
        else {}
    )
    model = (
        AutoModelForCausalLM.from_pretrained(weights or directory, dtype=dtype, **other)
        .to(device)
        .eval()
    )
    return LoadedModel(name, model, load_tokenizer(directory))


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that lies beside a model. Raises `UserError` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} holds no tokenizer that transformers can read ({first_line(error)}); copy that of the model "
            "into it."
        ) from None


def first_line(error: Exception) -> str:
    """What an error says first; libraries' go on over several lines."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def end_tokens(directory: Path, tokenizer: Any) -> list[str]:
    """The tokens that end a reply: those of `generation_config.json`, and the tokenizer's eos."""
    ids: list[int | None] = [tokenizer.eos_token_id]
    if (directory / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
        ids += eos if isinstance(eos, list) else [eos]
    return list(
        dict.fromkeys(tokenizer.convert_ids_to_tokens(id_) for id_ in ids if id_ is not None)
    )
