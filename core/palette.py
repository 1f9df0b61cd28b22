"""Colours of figures: the same thing has the same colour in every one, and on the report's page."""

from __future__ import annotations

# Okabe and Ito (2008), told apart by the colour-blind
MODEL_COLOURS = {"base": "#8c8c8c", "chat": "#56b4e9", "cpt": "#e69f00", "merged": "#009e73"}
FURTHER_COLOURS = ("#cc79a7", "#0072b2", "#d55e00")  # of models with other names
LANGUAGE_COLOURS = ("#3b5bdb", "#c2255c", "#6f7500", "#8f3fbf", "#00808f", "#a0522d")
