"""The processor that something was measured on."""

from __future__ import annotations

import os
from pathlib import Path

_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def processor() -> str:
    """Its name, as the kernel knows it, with family and model, vector extensions and cores.

    Virtual machines often hide the model in the name ("AMD EPYC"), which its numbers tell.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = said.get("flags", said.get("Features", "")).split()
    numbers = [f"{key} {said[key]}" for key in ("cpu family", "model") if key in said]
    words = [*numbers, *(one for one in _EXTENSIONS if one in flags)]
    cores = len(os.sched_getaffinity(0))
    return f"{said.get('model name', 'processor')} ({', '.join(words)}), {cores} cores"
