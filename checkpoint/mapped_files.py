"""Compatibility: the address at which `torch.load(..., mmap=True)` maps a file.

torch does not tell it. The addresses of the tensors are public (`data_ptr`); the start of the
mapping is read from Linux's `/proc/self/maps`. Tested with torch 2.13 on Linux 6.18.
"""

from __future__ import annotations

from pathlib import Path


def mapping_start(address: int) -> int:
    """The address of byte 0 of the file that is mapped at `address`, or `ValueError`."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, offset, _, inode = line.split(maxsplit=5)[:5]
        start, stop = (int(bound, 16) for bound in span.split("-"))
        if start <= address < stop and inode != "0":
            return start - int(offset, 16)
    raise ValueError("its tensors are not in it")
