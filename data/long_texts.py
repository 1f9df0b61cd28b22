"""Long texts are cut where no token can reach across, so that memory does not grow with them."""

from __future__ import annotations

import re

LONGEST = 1 << 20  # characters that are tokenised at once; about 100 MB with the tokenizers library


def cut(text: str, border: re.Pattern[str], longest: int = LONGEST) -> list[str]:
    """The text in parts of `longest` characters or up to the next border, where one is longer.

    `border` matches the empty string at places where the text may be cut.
    """
    parts, start = list[str](), 0
    while len(text) - start > longest:
        found = border.search(text, start + longest)
        if found is None:
            break
        parts.append(text[start : found.start()])
        start = found.start()
    return [*parts, text[start:]]
