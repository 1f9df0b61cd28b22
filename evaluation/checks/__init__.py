"""Checks of a reply by program, in the manner of IFEval; importing this package registers them.

Each is a small function `check(reply, **arguments) -> bool`.
"""

from cpt_merge.evaluation.checks import content, counts, format
from cpt_merge.evaluation.checks.registry import CHECKS, Check, loose_variants, parse_check

__all__ = ["CHECKS", "Check", "content", "counts", "format", "loose_variants", "parse_check"]
