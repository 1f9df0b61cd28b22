"""Checks of a reply by program, in the manner of IFEval: each a small function `check(reply, **arguments) -> bool`.

Importing this package registers all of them.
"""

from cpt_merge.evaluation.checks import content, counts, format
from cpt_merge.evaluation.checks.registry import CHECKS, Check, loose_variants, parse_check

__all__ = ["CHECKS", "Check", "content", "counts", "format", "loose_variants", "parse_check"]
