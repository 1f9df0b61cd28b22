"""Colours: a model or language has the same colour in every figure and on the report page."""

from __future__ import annotations

# the palette of Okabe and Ito (2008), which colour-blind people can tell apart
MODEL_COLOURS = {"base": "#8c8c8c", "chat": "#56b4e9", "cpt": "#e69f00", "merged": "#009e73"}
FURTHER_COLOURS = ("#cc79a7", "#0072b2", "#d55e00")  # for models with other names
LANGUAGE_COLOURS = ("#3b5bdb", "#c2255c", "#6f7500", "#8f3fbf", "#00808f", "#a0522d")
