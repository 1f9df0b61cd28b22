"""Where this package is installed, and its version."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # the folder `cpt_merge/`, which contains recipes/ and slurm/


def checkout() -> Path | None:
    """The root of the git checkout that contains the package; None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / ".git").exists() else None
