"""What an experiment ends with: tables, figures and sentences, as a folder with a page.

::

    results.json    every number, with what made it
    report.md       the same to read
    figures/*.svg   drawn with matplotlib
    index.html      the same as one page that opens from disk
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import write_atomically
from viscircuits.metrics import Interval
from viscircuits.tables import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SCHEMA = "viscircuits/experiment"
VERSION = 1

Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Table:
    """Rows under a head. A cell may be an interval; `note` says how to read it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        odd = next((row for row in self.rows if len(row) != len(self.head)), None)
        if odd is not None:
            raise ViscircuitsError(f"table {self.title!r} has {len(self.head)} columns, a row has {len(odd)}")


@dataclass(frozen=True)
class Figure:
    """A drawing; `name` is its file's, `note` says what it shows to one who cannot see it."""

    title: str
    name: str
    svg: str
    note: str


@dataclass(frozen=True)
class Report:
    """One run of an experiment. `said` are its sentences, the most important first; `made` what it was made with."""

    name: str
    title: str
    said: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    data: Mapping[str, Any]
    made: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write the folder; returns the page."""
        folder = Path(folder)
        numbers = {"schema": SCHEMA, "version": VERSION, "name": self.name, "made": self.made, **self.data}
        write_atomically(folder / "results.json", json.dumps(_plain(numbers), indent=1) + "\n")
        for each in self.figures:
            write_atomically(folder / "figures" / f"{each.name}.svg", each.svg)
        write_atomically(folder / "report.md", self.markdown("figures"))
        return write_atomically(folder / "index.html", self.page())

    def markdown(self, figures: str, level: int = 1) -> str:
        """The report as Markdown; `figures` is the folder of the drawings as seen from the text."""
        mark = "#" * level
        parts = [f"{mark} {self.title}", *self.said]
        parts += [
            f"**{each.title}**\n\n{_markdown(each)}" + (f"\n\n{each.note}" if each.note else "") for each in self.tables
        ]
        parts += [f"**{each.title}**\n\n![{each.note}]({figures}/{each.name}.svg)" for each in self.figures]
        return "\n\n".join([*parts, f"Made with: {_settings(self.made)}"]) + "\n"

    def text(self) -> str:
        """The report for a terminal."""
        tables = [
            "\n".join([each.title, *aligned([each.head, *([show(c) for c in row] for row in each.rows)]), each.note])
            for each in self.tables
        ]
        return "\n\n".join([*tables, *self.said]).replace("**", "")

    def page(self) -> str:
        """The report as one HTML page without script or network."""
        body = [f"<p>{_inline(sentence)}</p>" for sentence in self.said]
        body += [_html(each) for each in self.tables]
        body += [
            f"<figure>{_drawn(each)}<figcaption><b>{html.escape(each.title)}.</b> {html.escape(each.note)}</figcaption>"
            "</figure>"
            for each in self.figures
        ]
        slots = {
            "title": html.escape(self.title),
            "body": "\n".join(body),
            "made": html.escape(_settings(self.made)),
        }
        template = (files("viscircuits") / "web" / "experiment.html").read_text(encoding="utf-8")
        return re.sub(r"@@(\w+)@@", lambda match: slots[match[1]], template)


def check_folder(folder: str | Path, name: str) -> None:
    """Refuse a folder whose results are not those of the experiment `name`, before anything is computed.

    Raises
    ------
    FileFormatError
        If saving there would replace the report of another experiment, or a ``results.json`` of something else.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    known = isinstance(found, dict) and found.get("schema") == SCHEMA
    if known and found.get("name") == name:
        return
    of = f"the result of experiment {found.get('name')!r}" if known else "a results.json that no experiment wrote"
    raise FileFormatError(f"{str(folder)!r} holds {of}, which {name!r} would replace; give another folder (--out)")


def draw(plot: Callable[..., None], width: float = 6.4, height: float = 3.6) -> str:
    """What `plot(figure)` draws, as SVG; the same numbers give the same bytes.

    Raises
    ------
    ViscircuitsError
        If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Drawing
    except ImportError as error:
        raise ViscircuitsError(
            "figures are drawn with matplotlib, which is not installed: pip install 'viscircuits[experiments]'"
        ) from error
    import io

    with matplotlib.rc_context({"svg.hashsalt": "viscircuits", "svg.fonttype": "none", "font.size": 9}):
        figure: Drawing = Drawing(figsize=(width, height), layout="constrained")
        plot(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def show(cell: Cell) -> str:
    """A cell as text: a number with three digits, an interval with its ends, a dash for nothing."""
    if cell is None:
        return "–"
    if isinstance(cell, Interval):
        return f"{cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]".replace("-0.00", "0.00")
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _markdown(table: Table) -> str:
    rows = [table.head, ("---",) * len(table.head), *(tuple(show(cell) for cell in row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _html(table: Table) -> str:
    def cells(row: Sequence[Cell], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(show(cell))}</{tag}>" for cell in row)

    head = f"<thead><tr>{cells(table.head, 'th')}</tr></thead>"
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2><div class=wide><table>{head}<tbody>{body}</tbody></table></div>{note}"


def _drawn(figure: Figure) -> str:
    """The drawing without its XML head, named for those who cannot see it."""
    svg = figure.svg[figure.svg.index("<svg") :]
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(figure.note, quote=True)}"', 1)


def _inline(sentence: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(sentence))


def _settings(made: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made.items())


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
