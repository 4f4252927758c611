"""A circuit as a figure for a paper, drawn with matplotlib: vectors, its own fonts embedded, nothing that is not data.

Needs the package matplotlib (``pip install 'viscircuits[plot]'``). `Circuit.plot` and `Bundle.plot` call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from viscircuits.circuit import Circuit, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.layout import Excerpt, excerpt, pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN_WIDTH, PAGE_WIDTH = 3.3, 6.8  # inches: one column of a paper, and both
EXCITE, INHIBIT = "#5e3c99", "#b85c00"
WIDEST = 2.6  # points
FONT_SIZE = 7
SETTINGS: Any = {"font.size": FONT_SIZE, "font.family": "sans-serif", "pdf.fonttype": 42, "svg.fonttype": "none"}
HEAD = 0.95  # rows for the layers' names
DOT = 0.1  # half a dot with the room around it, in rows
DASHES: Any = {"solid": "-", "dashed": (0, (3, 1.5)), "dotted": (0, (0.8, 1.2))}
FACE = 0.8  # share of the room between two units that a picture takes

Pictures = Mapping[Unit, Any]
Place = tuple[float, float]


def plot(
    circuit: Circuit,
    pictures: Pictures | None = None,
    *,
    layers: Sequence[str] | None = None,
    n_units: int = 8,
    n_edges: int = 60,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A figure of the strongest units and edges: layers as columns, pictures on units.

    A line is as wide as the square root of the edge's share of the attribution between its two layers; purple with an
    arrowhead excites, orange with a bar inhibits, and a broken line is an unsure edge, as on the page.

    Parameters
    ----------
    pictures
        Unit → its exemplars, strongest first, or any picture; units without one are dots.
    layers
        Which layers; by default all.
    n_units, n_edges
        How many units of each layer, and how many edges in all.
    width
        In inches; by default 3.3, one column of a paper, or 6.8 from six layers on.
    ax
        Draw into these axes instead of a new figure.

    Returns
    -------
    Figure
        To be saved with ``savefig("circuit.pdf")``.

    Raises
    ------
    ViscircuitsError
        If matplotlib is not installed, or the circuit has no such layer or no unit.
    """
    shown = excerpt(circuit, layers=layers, n_units=n_units, n_edges=n_edges)
    rows = max((len(units) for units in shown.columns.values()), default=0)
    if not rows:
        raise ViscircuitsError("there is no unit to plot; the circuit is empty in these layers")
    figure_type, rc_context = _matplotlib()
    with rc_context(SETTINGS):
        if ax is None:
            across = width or (COLUMN_WIDTH if len(shown.columns) < 6 else PAGE_WIDTH)
            room = across / len(shown.columns)
            figure = figure_type(figsize=(across, min(0.62 * room, 0.45) * (rows + HEAD)), dpi=200)
            ax = figure.add_axes((0.005, 0.005, 0.99, 0.99))
        _draw(ax, circuit, shown, pictures or {}, rows)
        return ax.figure  # type: ignore[return-value]


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # not pyplot: no global state, no window
    except ImportError:
        raise ViscircuitsError("plots need the package matplotlib: pip install 'viscircuits[plot]'") from None

    class PaperFigure(Figure):
        """A figure that is saved with its text as text, whatever the settings then are."""

        def savefig(self, *args: Any, **kwargs: Any) -> None:
            with rc_context(SETTINGS):
                super().savefig(*args, **kwargs)

    return PaperFigure, rc_context


def _draw(ax: Axes, circuit: Circuit, shown: Excerpt, pictures: Pictures, rows: int) -> None:
    box = ax.get_window_extent()
    columns = len(shown.columns)
    step = box.width / columns / (box.height / (rows + HEAD))  # a column's room in rows
    ax.set_xlim(0, columns * step)
    ax.set_ylim(rows + 0.07, -HEAD)
    ax.set_aspect("equal")
    ax.axis("off")
    place = {
        unit: (step * (column + 0.5), (rows - len(units)) / 2 + i + 0.5)
        for column, units in enumerate(shown.columns.values())
        for i, unit in enumerate(units)
    }
    half = min(FACE, 0.6 * step) / 2
    _edges(ax, shown, place, {unit: DOT if _picture(pictures.get(unit)) is None else half for unit in place})
    for layer, units in shown.columns.items():
        scores = dict(zip(circuit.units[layer], circuit.scores.get(layer, ()), strict=False))
        for unit in units:
            _unit(ax, place[unit], half, _picture(pictures.get(unit)), unit.index, scores)
    _names(ax, circuit, shown, step)


def _edges(ax: Axes, shown: Excerpt, place: Mapping[Unit, Place], halves: Mapping[Unit, float]) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    most = max((share for _, share in shown.edges), default=1) or 1
    for order, (edge, share) in enumerate(reversed(shown.edges)):  # the strongest on top
        (x, y), (to_x, to_y) = place[edge.source], place[edge.target]
        x, to_x = x + halves[edge.source], to_x - halves[edge.target] - 0.04  # room for the end
        bend, wide = (to_x - x) / 2, max(0.3, WIDEST * (share / most) ** 0.5)
        excites = edge.signed >= 0
        mark = _end(to_x, to_y, 0.035 + 0.02 * wide, excites)
        codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.MOVETO, *[Path.LINETO] * (len(mark) - 1)]
        path = Path([(x, y), (x + bend, y), (to_x - bend, to_y), (to_x, to_y), *mark], codes)
        ax.add_patch(
            PathPatch(
                path, facecolor="none", edgecolor=EXCITE if excites else INHIBIT, zorder=1 + order / 1e6, alpha=0.75,
                linewidth=wide, linestyle=DASHES[pattern(edge.chosen)], capstyle="butt",
            )
        )  # fmt: skip


def _end(x: float, y: float, half: float, excites: bool) -> list[Place]:
    """An arrowhead or a bar, as on the page, so that a print in grey still tells the sign."""
    if excites:
        return [(x - 1.5 * half, y - half), (x, y), (x - 1.5 * half, y + half)]
    return [(x, y - half), (x, y + half)]


def _unit(ax: Axes, place: Place, half: float, picture: Any, index: int, scores: Mapping[int, float]) -> None:
    x, y = place
    if picture is None:
        most = max((abs(score) for score in scores.values()), default=0)
        grey = 0.75 - 0.75 * abs(scores.get(index, 0)) / most if most else 0.35
        ax.plot([x], [y], "o", color=str(grey), markersize=5, zorder=3)
    else:
        ax.imshow(picture, extent=(x - half, x + half, y + half, y - half), zorder=3, interpolation="lanczos")
    label: dict[str, Any] = {"fontsize": 0.7 * FONT_SIZE, "color": "0.35", "zorder": 4}
    if picture is None:
        ax.annotate(str(index), (x, y), (0, -4), textcoords="offset points", ha="center", va="top", **label)
    else:
        ax.annotate(str(index), (x, y + half), (0, -0.5), textcoords="offset points", ha="center", va="top", **label)


def _names(ax: Axes, circuit: Circuit, shown: Excerpt, step: float) -> None:
    """Each layer's name, turned where it would not fit, and how many of its units are in the circuit."""
    common = _common_start(list(shown.columns))
    for column, (layer, units) in enumerate(shown.columns.items()):
        x = step * (column + 0.5)
        ax.text(x, -0.42, layer[len(common) :] or layer, ha="center", va="bottom", fontsize=FONT_SIZE)
        n = len(circuit.units[layer])
        said = f"{n} units" if n == len(units) else f"{len(units)} of {n} units"
        ax.text(x, -0.36, said, ha="center", va="top", fontsize=0.7 * FONT_SIZE, color="0.35")


def _common_start(names: Sequence[str]) -> str:
    """What all layers' names begin with, up to a dot: it tells nothing apart."""
    parts = [name.split(".") for name in names]
    same = 0
    while len(names) > 1 and all(len(each) > same + 1 and each[same] == parts[0][same] for each in parts):
        same += 1
    return "".join(f"{part}." for part in parts[0][:same])


def _picture(given: Any) -> Any:
    """The picture itself, of a list of exemplars the first."""
    if isinstance(given, list | tuple):
        given = given[0] if given else None
    return getattr(given, "image", given)
