"""The heap of the C library."""

from __future__ import annotations

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_TOP_PAD = 64 << 20  # bytes by which the heap grows at least
_LARGE = 32 << 20  # bytes; glibc takes no higher threshold


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation; False if the C library is another one.

    By default it gives the end of its heap back to the kernel whenever more than 64 MB of it are
    free. Training on a CPU asks for the same memory again in the next layer, and the kernel fills
    it with zeros first (measured: docs/benchmarks.md). Blocks of more than 32 MB are still given
    back: among smaller ones they would leave gaps that no later block fits.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = (
        (_M_MMAP_THRESHOLD, _LARGE),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, _TOP_PAD),
    )
    return all(mallopt(which, value) == 1 for which, value in wanted)
