"""The recipe's `embeddings` section."""

from __future__ import annotations

from typing import Literal

from cpt_merge.core.config import Section, key

Method = Literal["auto", "constituents", "ends", "focus", "mean", "gaussian", "random"]


class EmbeddingsConfig(Section):
    """How the rows of new pieces are initialised, before continual pretraining."""

    input: Method = key(
        "auto",
        "method of the input embedding. auto: `ends` for pieces with a constituent that holds a "
        "letter, `constituents` for pieces that the base spells in bytes; constituents: mean of "
        "the rows of the tokens that spelt the piece before, scaled to the old rows' mean norm; "
        "ends: that mean, unscaled and leaning on the last constituent (head: the first); focus: "
        "mean of the constituents and of tokens with similar contexts in the new text; mean: mean "
        "of all old rows; gaussian: drawn with the old rows' mean and covariance; random: "
        "isotropic, with the old rows' mean norm",
    )
    head: Method = key(
        "auto", "method of the output head; a tied model has one matrix, which uses `input`"
    )
    focus_characters: int = key(
        20_000_000, "focus: text that is read in each language", unit="characters", gt=0
    )
    seed: int = key(0, "seed of everything that is drawn", ge=0)

    @property
    def needs_text(self) -> bool:
        """Whether a method reads the new text."""
        return "focus" in (self.input, self.head)
