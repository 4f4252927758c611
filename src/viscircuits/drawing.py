"""A circuit as one static SVG: what a notebook shows of it, without a script, a font or a network.

Layers are columns, units are dots as dark as their score, edges are lines as wide as the square root of their share.
Purple with an arrowhead excites, orange with a bar inhibits; a broken line is an unsure edge. Ink is the colour of the
text around it, so that it suits light and dark pages.
"""

from __future__ import annotations

from html import escape

from viscircuits.circuit import Circuit, Unit
from viscircuits.layout import Excerpt, excerpt, pattern

COLUMN, ROW, MARGIN, HEAD = 96, 30, 40, 34  # pixels
WIDEST = 7.0  # of a line
EXCITE, INHIBIT = "#7b5bb8", "#c4711a"  # legible on white and on black
N_LETTERS = 15  # of a layer's name
SHORT = 7  # pixels before a unit's centre at which its edges end
DASHES = {"solid": "", "dashed": ' stroke-dasharray="5 3"', "dotted": ' stroke-dasharray="1.2 2.4"'}


def draw(circuit: Circuit, *, n_units: int = 10, n_edges: int = 120) -> str:
    """The strongest units and edges of a circuit as SVG.

    Parameters
    ----------
    n_units
        Units of each layer, those with the highest scores.
    n_edges
        Edges, in the order in which the page reveals them.
    """
    shown = excerpt(circuit, n_units=n_units, n_edges=n_edges)
    place = _places(shown)
    rows = max((len(units) for units in shown.columns.values()), default=0)
    width = 2 * MARGIN + COLUMN * max(0, len(shown.columns) - 1)
    height = HEAD + ROW * max(1, rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" style="max-width:100%;height:auto;font:11px system-ui,sans-serif" fill="currentColor">',
        f"<title>{escape(_summary(circuit))}</title>",
        *_lines(shown, place),
        *_dots(circuit, shown, place),
        *_names(circuit, shown),
        "</svg>",
    ]
    return "".join(parts)


def to_html(circuit: Circuit, title: str = "circuit", **how: int) -> str:
    """`draw` under a line that says what is drawn."""
    few = excerpt(circuit, n_units=how.get("n_units", 10), n_edges=how.get("n_edges", 120))
    n_units, n_edges = sum(map(len, few.columns.values())), len(few.edges)
    note = (
        f"drawn: {n_units} units, {n_edges} edges" if (n_units, n_edges) != (len(circuit), len(circuit.edges)) else ""
    )
    return (
        '<div style="overflow-x:auto">'
        f"<div><b>{escape(title)}</b> · {escape(_summary(circuit))}{' · ' if note else ''}{note}</div>"
        f"{draw(circuit, **how)}</div>"
    )


def _summary(circuit: Circuit) -> str:
    model = circuit.provenance.get("model")
    return f"{circuit.size}, of {model}" if model else circuit.size


def _places(shown: Excerpt) -> dict[Unit, tuple[float, float]]:
    rows = max((len(units) for units in shown.columns.values()), default=0)
    found: dict[Unit, tuple[float, float]] = {}
    for column, units in enumerate(shown.columns.values()):
        top = HEAD + ROW * ((rows - len(units)) / 2 + 0.5)
        found.update({unit: (float(MARGIN + COLUMN * column), top + ROW * i) for i, unit in enumerate(units)})
    return found


def _lines(shown: Excerpt, place: dict[Unit, tuple[float, float]]) -> list[str]:
    most = max((share for _, share in shown.edges), default=1) or 1
    lines = []
    for edge, share in reversed(shown.edges):  # the strongest on top
        (x, y), (to_x, to_y) = place[edge.source], place[edge.target]
        to_x -= SHORT
        bend, wide = (to_x - x) / 2, max(0.5, WIDEST * (share / most) ** 0.5)
        colour = EXCITE if edge.signed >= 0 else INHIBIT
        lines.append(
            f'<path d="M{x:g} {y:g}C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}'
            f'{_end(to_x, to_y, wide, edge.signed >= 0)}" fill="none" stroke="{colour}" stroke-width="{wide:.2f}" '
            f'opacity=".55"{DASHES[pattern(edge.chosen)]}/>'
        )
    return lines


def _end(x: float, y: float, wide: float, excites: bool) -> str:
    """An arrowhead or a bar, as on the page, so that the sign can be read without colours."""
    half = 2 + 0.6 * wide
    if excites:
        return f"M{x - 1.5 * half:g} {y - half:g}L{x:g} {y:g}L{x - 1.5 * half:g} {y + half:g}"
    return f"M{x:g} {y - half:g}V{y + half:g}"


def _dots(circuit: Circuit, shown: Excerpt, place: dict[Unit, tuple[float, float]]) -> list[str]:
    dots = []
    for layer, units in shown.columns.items():
        scores = dict(zip(circuit.units[layer], circuit.scores.get(layer, ()), strict=False))
        most = max((abs(score) for score in scores.values()), default=0) or 1
        for unit in units:
            x, y = place[unit]
            score = scores.get(unit.index)
            said = f"{unit}" if score is None else f"{unit}, score {score:.3g}"
            opacity = 0.7 if score is None else 0.25 + 0.75 * abs(score) / most
            dots.append(
                f'<g><title>{escape(said)}</title><circle cx="{x:g}" cy="{y:g}" r="5" opacity="{opacity:.2f}"/>'
                f'<text x="{x:g}" y="{y + 15:g}" text-anchor="middle" font-size="8" opacity=".7">'
                f"{unit.index}</text></g>"
            )
    return dots


def _names(circuit: Circuit, shown: Excerpt) -> list[str]:
    names = []
    for column, layer in enumerate(shown.columns):
        x = MARGIN + COLUMN * column
        short = layer if len(layer) <= N_LETTERS else "…" + layer[1 - N_LETTERS :]
        names.append(
            f'<g text-anchor="middle"><title>{escape(layer)}</title><text x="{x}" y="12">{escape(short)}</text>'
            f'<text x="{x}" y="24" font-size="8" opacity=".7">'
            f"{len(circuit.units[layer])} of {circuit.widths[layer]}</text></g>"
        )
    return names
