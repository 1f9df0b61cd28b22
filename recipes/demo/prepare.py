"""Prepare the demo's inputs: `python -m recipes.demo.prepare --out runs/demo-inputs`.

Writes OUT/base and OUT/chat (a Llama pretrained on English and its chat sibling, Hugging Face format), OUT/text and
OUT/held_out (one document per line, per language), OUT/prompts.jsonl (requests no model has seen) and OUT/licences.txt.
This is no part of the framework: a real run starts from published models and its user's own text.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPLETE = "complete.json"  # written last: its digest says which code and settings made the folder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, prepare, and say what happened; 2 when something is missing."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.prepare", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-inputs"), help="folder to write")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for training")
    options = parser.parse_args(arguments)
    try:
        from recipes.demo.build import Settings, build
    except ModuleNotFoundError as missing:
        print(f"demo: the package {missing.name} is missing; install it with: pip install -e .[demo]", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
