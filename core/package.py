"""Where this package is installed, and its version."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # `cpt_merge/`, with recipes/ and slurm/ in it


def checkout() -> Path | None:
    """The root of the git checkout that the package is imported from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / ".git").exists() else None
