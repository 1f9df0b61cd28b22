"""A Hugging Face model from training checkpoints: one of them, or the average of several.

Everything is read from files, tensor by tensor, on the CPU of one process, whatever number of
processes wrote the checkpoints. Memory holds the largest tensor in float32, and of an average two.

The average of checkpoints along a run at a constant learning rate is often better than each of
them and predicts what decaying the rate would bring: Li et al., Model Merging in Pre-training of
Large Language Models, 2025 (https://arxiv.org/abs/2505.12082).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import PickleError

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from cpt_merge.checkpoint.export import LocalShard, export_shards, untrained_shards
from cpt_merge.checkpoint.stored_shards import stored_shards
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import Meter, say
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.context import Context
from cpt_merge.training.distributed.checkpoint import STATE_FILE, check_readable
from cpt_merge.training.distributed.frozen import FrozenWeights
from cpt_merge.training.model.build import CausalLM, WeightSource, build_model
from cpt_merge.training.phases import phases_of, select_trained

ReadTensor = Callable[[str], Tensor]


def choose_steps(directory: Path, step: int | None, average: str | None) -> list[Path]:
    """The checkpoints of one step (by default the newest), or of all steps `N..M`.

    Raises `UserError` for steps that are not there, naming those that are.
    """
    complete = {
        int(path.name.removeprefix("step-")): path
        for path in sorted(directory.glob("step-*"))
        if path.name.removeprefix("step-").isdecimal() and (path / STATE_FILE).is_file()
    }
    if not complete:
        raise UserError(f"{directory} holds no complete checkpoint; train first.")
    known = ", ".join(map(str, complete))
    if average is not None:
        first, dots, last = average.partition("..")
        if step is not None or not dots or not (first.isdecimal() and last.isdecimal()):
            raise UserError("--average takes two steps, as in 500..2000, and no --step with it.")
        chosen = [path for at, path in complete.items() if int(first) <= at <= int(last)]
        if len(chosen) < 2:
            raise UserError(
                f"--average {average} has {len(chosen)} of the checkpoints in {directory}, which "
                f"are of the steps {known}; choose a range with at least two."
            )
        return chosen
    wanted = max(complete) if step is None else step
    if wanted not in complete:
        raise UserError(
            f"{directory} has no checkpoint of step {wanted}; there are {known}. "
            "training.checkpoints.keep and keep_every decide which are kept."
        )
    return [complete[wanted]]


def check_origin(checkpoints: Sequence[Path], key: str) -> None:
    """Raise `UserError` unless the checkpoints belong to a training of this key.

    Otherwise the model and the tokenizer that they are exported with may not be theirs.
    """
    for checkpoint in checkpoints:
        if _read_state(checkpoint)["key"] != key:
            raise UserError(
                f"{checkpoint} was written with other settings or inputs than the recipe has now, "
                "so its rows may be other tokens; export with the recipe as it was then."
            )


def export_checkpoints(
    config: TrainingConfig, like: Path, tokenizer: Path, checkpoints: Sequence[Path], out: Path
) -> None:
    """Write the mean of the checkpoints' weights as a model to `out`.

    Names, types and configuration are those of `like`, the model that training started from.
    Raises `UserError` for a checkpoint that is damaged or belongs to another model.
    """
    context = _context_of(config, checkpoints)
    module = build_model(like, config.within(context))
    source = WeightSource.open(module, like, torch.device("cpu"))  # finds the names in `like`
    names = [path.name for path in checkpoints]
    say(f"export: {' + '.join(names)}" + (f", divided by {len(names)}" if len(names) > 1 else ""))
    readers = [open_checkpoint(path) for path in checkpoints]
    frozen = None
    if config.lora:
        frozen = _frozen(module, config, source, checkpoints, readers)
    parameters: dict[str, Tensor] = {
        name: weight for name, weight in module.weights() if frozen is None or weight.requires_grad
    }

    def shards() -> Iterator[LocalShard]:
        """Of the model's tensors; a group of rearranged ones is in memory at once."""
        with Meter("export", len(parameters), "tensors") as meter:
            for name, parameter in parameters.items():
                values = _mean(f"model.{name}", readers)
                if values.shape != parameter.shape:
                    raise UserError(
                        f"{name} has the shape {tuple(values.shape)} in {checkpoints[0]} and "
                        f"{tuple(parameter.shape)} in {like}; they belong to different runs."
                    )
                yield LocalShard(name, tuple(values.shape), 0, values)
                meter.advance()

    untrained = untrained_shards(like, module.stored_parameters(), Ranks())
    merged = frozen.part(0, 1) if frozen else []
    everything = chain(stored_shards(module.stored, shards()), merged, untrained)
    export_shards(everything, like, tokenizer, out, Ranks(), extend=context.extend)


def _context_of(config: TrainingConfig, checkpoints: Sequence[Path]) -> Context:
    """The context in which the checkpoints were written.

    Raises `UserError` if they have different rotary positions, whose weights have no useful mean.
    """
    phases = phases_of(config)
    found = [phases[int(_read_state(path)["phase"])].context for path in checkpoints]
    if any(context.rope != found[-1].rope for context in found):
        raise UserError(
            f"{checkpoints[0]} and {checkpoints[-1]} are of phases with different rotary positions "
            "(training.phases), so their weights have no useful mean; choose a range in one phase."
        )
    return found[-1]


def _frozen(
    module: CausalLM, config: TrainingConfig, source: WeightSource, checkpoints: Sequence[Path],
    readers: Sequence[ReadTensor],
) -> FrozenWeights:  # fmt: skip
    """The weights that `like` holds, plus the mean of the checkpoints' products of adapters.

    The mean of B A is one product, of all B side by side and all A below each other. Checkpoints of
    phases without adapters add nothing.
    """
    phases = phases_of(config)
    of_phase = [phases[int(_read_state(path)["phase"])] for path in checkpoints]
    adapted = [read for read, phase in zip(readers, of_phase, strict=True) if phase.train == "all"]
    if adapted and config.lora:
        module.add_adapters(config.lora, config.seed)
    select_trained(module, of_phase[-1], 0)

    def joined(name: str) -> Tensor:
        axis = 1 if name in module.adapters.lefts else 0
        return torch.cat([read(f"model.{name}").float() for read in adapted], axis)

    share = 1 / len(checkpoints)
    return FrozenWeights.of(module, source.checkpoint, joined, torch.device("cpu"), share)


def _mean(name: str, readers: Sequence[ReadTensor]) -> Tensor:
    """The mean of a tensor over checkpoints, in float32."""
    mean = readers[0](name).float()
    for read in readers[1:]:
        mean += read(name)
    return mean.div_(len(readers)) if len(readers) > 1 else mean


def open_checkpoint(directory: Path) -> ReadTensor:
    """What reads a tensor of a checkpoint by its name in `CausalLM`, in the type of the masters.

    Raises `UserError` if the checkpoint is damaged or of an earlier version; so does the function.
    """
    check_readable(directory, _read_state(directory)["layout"])
    with _damage_named(directory):
        tensors = FileSystemReader(directory).read_metadata().state_dict_metadata

    def read(name: str) -> Tensor:
        with _damage_named(directory), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
            stored = tensors[f"model.{name}"]
            assert isinstance(stored, TensorStorageMetadata), f"{name} is no tensor"
            values = torch.empty(stored.size, dtype=stored.properties.dtype)
            load({f"model.{name}": values}, storage_reader=FileSystemReader(directory))
        return values

    return read


def _read_state(directory: Path) -> dict[str, str]:
    """The layout and phase of a checkpoint, and the key of its training."""
    with _damage_named(directory):
        state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        return {name: str(state[name]) for name in ("layout", "phase", "key")}


@contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
        PickleError, CheckpointException,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{directory} cannot be read ({reason}); choose another step.") from error
