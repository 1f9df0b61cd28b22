"""The heap of the C library."""

from __future__ import annotations

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 << 20  # bytes by which the heap grows at least


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation; False if the C library is another one.

    By default it gives blocks of 32 MB and more, and the end of its heap, back to the kernel at
    once. Training on a CPU asks for the same blocks again in every micro-batch, and the kernel
    would fill them with zeros first, which took up to a sixth of a step (docs/benchmarks.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(which, value) == 1 for which, value in wanted)
