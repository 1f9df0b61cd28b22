"""Compatibility: private functions of torch that this project needs. Tested with torch 2.13."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
