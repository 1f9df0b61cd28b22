"""What is not public in DeepSpeed (0.19): how it is imported, and which keys its files may have."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, for processes on this device."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at import
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # DeepSpeed would compile collectives for one node at first use (46 s), and wait for ever
        # for the lock of a compilation that was killed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def unknown_keys(settings: Mapping[str, Any]) -> Iterator[tuple[str, set[str]]]:
    """Keys of DeepSpeed's own file that it does not know, each with those that it knows there."""
    import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = _top_keys()
    yield from ((name, known) for name in settings if name not in known)
    section = settings.get("zero_optimization")
    if isinstance(section, dict):
        yield from _unknown_fields(DeepSpeedZeroConfig, section, "zero_optimization.")


def _unknown_fields(
    model: type[BaseModel], section: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, set[str]]]:
    fields = {
        name: field
        for ours, field in model.model_fields.items()
        for name in (ours, field.alias)
        if name
    }
    known = {prefix + name for name in fields}
    for name, value in section.items():
        if name not in fields:
            yield prefix + name, known
        elif isinstance(value, dict) and (inner := _model_of(fields[name].annotation)):
            yield from _unknown_fields(inner, value, f"{prefix}{name}.")


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next(
        (one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None
    )


class _Asked(dict[str, Any]):
    """Settings that remember which keys they were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Asked:
        return self


def _top_keys() -> set[str]:
    """The names of all sections: those that DeepSpeed looks for, since there is no list of them."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = _Asked({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(asked)
    return asked.names
