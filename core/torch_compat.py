"""Compatibility: private functions of torch that this project needs. Tested with torch 2.13."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup


def memory_store() -> Store:
    """A store inside this process, for a process group of one; it opens no port."""
    from torch._C._distributed_c10d import HashStore

    return HashStore()


def set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """Change how long a collective of an existing group may take.

    A device mesh creates its groups with torch's default timeout (10 minutes with NCCL).
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timeout, group)


def compilers_missing(device: torch.device) -> str:
    """What torch.compile lacks to make code for a device; empty if nothing.

    On a CPU torch compiles C++; on a GPU Triton makes the code, and compiles its launcher from C.
    """
    if device.type != "cpu":
        if find_spec("triton") is None:
            return "Triton"
        found = map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))
        return "" if any(found) else "a C compiler"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler"
    return ""
