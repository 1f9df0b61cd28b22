"""Freed memory is kept, so the same blocks cost no page faults again."""

import subprocess
import sys

import pytest

_COUNT = """
import ctypes, resource, sys
from cpt_merge.core.heap import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 20 << 20
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(SIZE) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(how: str) -> int:
    """Of the third time that a process writes to 160 MB in eight blocks and frees them."""
    done = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_blocks_cost_no_page_faults_again() -> None:
    assert _page_faults("returned") > 40  # pages of 4 kB, or of 2 MB
    assert _page_faults("kept") < 40
