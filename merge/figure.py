"""The figure of a merge: how long vector and CPT's change are in each layer, and their cosine.

Drawn as SVG without a library, because importing one takes longer than a small merge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path

from cpt_merge.core.artifact import write_text
from cpt_merge.core.curves import HEIGHT, WIDTH, ChartForm, Curve, draw_curves
from cpt_merge.core.palette import FURTHER_COLOURS, MODEL_COLOURS
from cpt_merge.merge.norms import Sums

HEAD = 58  # above the charts, for keys and titles
SMALL = (-0.2, 0.2)  # the cosine axis reaches these, so that noise looks as small as it is

STYLE = """
text { font: 11px system-ui, sans-serif; fill: #555 } .title { font-size: 13px; fill: #222 }
.grid { stroke: #e3e3e3 } .axis { stroke: #999 } rect.hover { fill: transparent }
polyline { fill: none; stroke: var(--c); stroke-width: 1.8 } circle { fill: var(--c) }
"""


def draw(layers: Mapping[str, Mapping[str, Sums]], path: Path) -> None:
    """Write the figure. `layers`: vector -> part of the model, in order -> sums."""
    first = next(iter(layers.values()))
    parts = list(first)
    colours = {"change": MODEL_COLOURS["cpt"]}
    lengths, cosines, names = [], [], {}
    for number, (label, of_vector) in enumerate(layers.items()):
        colours[f"v{number}"] = (MODEL_COLOURS["chat"], *FURTHER_COLOURS)[number % 4]
        names[f"v{number}"] = f"{label}: |chat - base| / |base|"
        shares = {part: sums.vector_share for part, sums in of_vector.items()}
        lengths.append(Curve(label, _points(parts, shares), f"v{number}"))
        cosine = {part: sums.cosine for part, sums in of_vector.items() if sums.change}
        cosines.append(Curve(label, _points(parts, cosine), f"v{number}"))
    if any(sums.change for sums in first.values()):
        names["change"] = "CPT's change: |cpt - base| / |base|"
        shares = {part: sums.change_share for part, sums in first.items()}
        lengths.append(Curve("CPT's change", _points(parts, shares), "change"))
    keys = "".join(
        f'<circle class="{colour}" cx="{60 + 250 * place}" cy="16" r="4"/>'
        f'<text x="{70 + 250 * place}" y="20">{escape(name)}</text>'
        for place, (colour, name) in enumerate(names.items())
    )
    charts = [
        _placed(0, "Length of the changes", lengths, ChartForm("layer", True, categories=parts)),
        _placed(
            WIDTH + 20,
            "Cosine between vector and CPT's change",
            cosines,
            ChartForm("layer", categories=parts, include=SMALL),
        ),
    ]
    width, height = max(2 * WIDTH + 20, 60 + 250 * len(names)), HEAD + HEIGHT
    classes = "".join(f".{name} {{ --c: {colour} }}\n" for name, colour in colours.items())
    write_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}"><style>{STYLE}{classes}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{keys}{"".join(charts)}</svg>\n',
    )


def _points(parts: list[str], values: Mapping[str, float]) -> list[tuple[float, float]]:
    """A point for each part; only those of layers are joined."""
    points: list[tuple[float, float]] = []
    for place, part in enumerate(parts):
        if place and not (part.isdigit() and parts[place - 1].isdigit()):
            points.append((place - 0.5, math.nan))
        points.append((place, values.get(part, math.nan)))
    return points


def _placed(x: int, title: str, curves: list[Curve], form: ChartForm) -> str:
    chart = draw_curves(title, curves, form)
    place = f'<svg x="{x}" y="{HEAD}" width="{WIDTH}" height="{HEIGHT}" '
    return f'<text class="title" x="{x + 52}" y="48">{escape(title)}</text>' + chart.replace(
        "<svg ", place, 1
    )
