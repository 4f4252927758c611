"""One self-contained page that shows a circuit: no network, no build step, opens from disk.

1. The circuit becomes plain lists: units are numbered layer by layer, edges name those numbers
   (`viscircuits.contract` has the shapes, and `web/contract.js` checks them in the browser).
2. `viscircuits.layout` says in which column a layer stands, in which order its units, and in which order edges are
   revealed.
3. All pictures of a kind go into one sprite sheet, so that a thousand units cost one decoded image.
4. Data, style and scripts are put into the template of `web/`. The scripts are plain modules that import one another
   as ``viscircuits/NAME.js``; an import map says where those are: inside the page itself, or at the server that
   gives it.

The page promises nothing that was not measured: without an evaluation it says so.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image, ImageOps, features

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.comparing import Comparison
from viscircuits.connections import Connections
from viscircuits.contract import (
    SCHEMA,
    VERSION,
    ContributionsData,
    EdgesData,
    KernelsData,
    LayerData,
    NoteData,
    PageData,
    ProbesData,
    SizeData,
    SpriteData,
)
from viscircuits.exemplars import Exemplar
from viscircuits.layout import columns, order_units, reveal
from viscircuits.probes import Probes
from viscircuits.sizes import sizes
from viscircuits.visualisations import Visualisation

MAX_EDGES = 20_000
MAX_ORDERING_EDGES = 4_000
SPRITE_PIXELS = 10_000_000
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline' data:"
SERVED_POLICY = (  # the server says it again, and names the scripts by their digests
    "default-src 'none'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; connect-src 'self'"
)
TILES = (160, 128, 96, 72, 56, 48, 40, 32, 24, 16)


def page(
    circuit: Circuit,
    evaluation: Mapping[str, Any] | None,
    pictures: Mapping[Unit, Sequence[Exemplar]] | None,
    *,
    title: str,
    command: str,
    visualisations: Sequence[Visualisation] = (),
    connections: Connections | None = None,
    probes: Probes | None = None,
    notes: Mapping[str, NoteData] | None = None,
    comparison: Comparison | None = None,
    elsewhere: Mapping[str, Sequence[str]] | None = None,
    served: bool = False,
) -> str:
    """The circuit, its pictures and its evaluation as one HTML page.

    Parameters
    ----------
    evaluation
        What was measured, as in ``evaluation.json``; every entry may be missing.
    pictures
        Image regions that excite each unit, strongest first.
    title
        The concept's name.
    command
        What made the page, shown to be copied.
    visualisations, connections, probes, notes
        The further parts of a result folder; what is missing is not shown.
    comparison
        A second circuit laid over the first; `circuit` is then the union of both (`Comparison.union`).
    elsewhere
        Units, as ``layer:index``, with the titles of other circuits that hold them.
    served
        Whether a server gives the page, which it can then ask.

    Notes
    -----
    At most 20,000 edges go into the page, the strongest of each pair of layers; the page says so.
    """
    data = page_data(
        circuit,
        evaluation,
        pictures,
        title=title,
        command=command,
        visualisations=visualisations,
        connections=connections,
        probes=probes,
        notes=notes,
        comparison=comparison,
        elsewhere=elsewhere,
    )
    parts = {
        "title": html.escape(title),
        "policy": SERVED_POLICY if served else POLICY,
        "style": _web("style.css") + _web("panels.css"),
        "imports": _json({"imports": _modules(served)}),
        "data": _json(data),
        "server": _json({"served": True} if served else None),
    }
    return re.sub(r"@@(\w+)@@", lambda match: parts[match[1]], _web("index.html"))


def page_data(
    circuit: Circuit,
    evaluation: Mapping[str, Any] | None,
    pictures: Mapping[Unit, Sequence[Exemplar]] | None,
    *,
    title: str,
    command: str,
    visualisations: Sequence[Visualisation] = (),
    connections: Connections | None = None,
    probes: Probes | None = None,
    notes: Mapping[str, NoteData] | None = None,
    comparison: Comparison | None = None,
    elsewhere: Mapping[str, Sequence[str]] | None = None,
) -> PageData:
    """Everything that `page` shows, as plain lists; parameters as there."""
    units, revealed = list(circuit), reveal(circuit.edges)
    shown = revealed[:MAX_EDGES]
    edges = [edge for edge, _ in shown]
    places = {(edge.source, edge.target): place for place, edge in enumerate(edges)}
    held = None if connections is None else connections.of([pair for pair in places if pair in connections.places])
    drawn, tiles, names, classes = _pictures(units, pictures or {})
    made, made_tiles = _visualisations(units, visualisations)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "title": title,
        "command": command,
        "layers": _layers(circuit, shown),
        "edges": _edges(units, shown),
        "n_edges": len(revealed),
        "sprite": _sprite(tiles),
        "pictures": drawn,
        "names": names,
        "classes": classes,
        "visualisations": made,
        "visualisation_sprite": _sprite(made_tiles),
        "kernels": _kernels(held, places),
        "contributions": _contributions(held, places),
        "probes": None if probes is None or not len(probes) else _probes(units, probes),
        "comparison": None if comparison is None else comparison.data(units, edges),
        # sizes are those of one circuit, and a union of two is none that was measured
        "sizes": {} if comparison is not None else _sizes(evaluation),
        "notes": dict(notes or {}),
        "elsewhere": {key: list(titles) for key, titles in (elsewhere or {}).items()},
        "evaluation": None if evaluation is None else dict(evaluation),
        "selection": dict(circuit.selection),
        "provenance": dict(circuit.provenance),
    }


# ------------------------------------------------------------------ below: the graph


def _layers(circuit: Circuit, shown: Sequence[tuple[Edge, float]]) -> list[LayerData]:
    number = {unit: i for i, unit in enumerate(circuit)}
    links = [(number[e.source], number[e.target], share) for e, share in shown[:MAX_ORDERING_EDGES]]
    groups = [[number[Unit(layer, index)] for index in indices] for layer, indices in circuit.units.items()]
    column = columns(circuit.layers, {(edge.source.layer, edge.target.layer) for edge in circuit.edges})
    return [
        {
            "name": layer,
            "width": circuit.widths[layer],
            "units": list(indices),
            # in full: the size slider ranks by them
            "scores": [float(score) for score in circuit.scores.get(layer, ())],
            "chosen": [_short(share) for share in circuit.chosen.get(layer, ())],
            "order": order,
            "column": column[layer],
        }
        for (layer, indices), order in zip(circuit.units.items(), order_units(groups, links), strict=True)
    ]


def _edges(units: Sequence[Unit], shown: Sequence[tuple[Edge, float]]) -> EdgesData:
    number = {unit: i for i, unit in enumerate(units)}
    return {
        "source": [number[edge.source] for edge, _ in shown],
        "target": [number[edge.target] for edge, _ in shown],
        "score": [_short(edge.score) for edge, _ in shown],
        "signed": [_short(edge.signed) for edge, _ in shown],
        "share": [_short(share) for _, share in shown],
        "chosen": [None if edge.chosen is None else _short(edge.chosen) for edge, _ in shown],
    }


def _kernels(held: Connections | None, places: Mapping[tuple[Unit, Unit], int]) -> KernelsData | None:
    if held is None or not held.edges:
        return None
    scale = np.abs(held.kernels).max((1, 2))
    unit = np.where(scale > 0, scale, 1)[:, None, None]
    return {
        "edges": [places[pair] for pair in held.edges],
        "side": held.side,
        "values": _base64(np.rint(held.kernels / unit * 127).astype(np.int8)),
        "scale": [_short(float(largest)) for largest in scale],
    }


def _contributions(held: Connections | None, places: Mapping[tuple[Unit, Unit], int]) -> ContributionsData | None:
    if held is None or not held.edges or not held.images:
        return None
    values = _base64(held.contributions.astype("<f4"))
    return {"images": list(held.images), "edges": [places[pair] for pair in held.edges], "values": values}


def _sizes(evaluation: Mapping[str, Any] | None) -> dict[str, list[SizeData]]:
    if not evaluation:
        return {}
    by_ablation = evaluation.get("full", {}).get("by_ablation") or {evaluation.get("ablation", ""): {"removed": {}}}
    found = {ablation: sizes({**evaluation, **part["removed"]}) for ablation, part in by_ablation.items()}
    return {ablation: measured for ablation, measured in found.items() if measured}


# ------------------------------------------------------------------ pictures


def _pictures(
    units: Sequence[Unit], pictures: Mapping[Unit, Sequence[Exemplar]]
) -> tuple[list[list[tuple[int, int, float]]], list[Image.Image], list[str], list[str]]:
    """For each unit its exemplars as (tile, place in names, activation); the tiles; the names; what they show."""
    chosen = [list(pictures.get(unit, ())) for unit in units]
    tiles = [exemplar.image for mine in chosen for exemplar in mine]
    shows = {exemplar.name: exemplar.shows for mine in chosen for exemplar in mine}
    names = {name: i for i, name in enumerate(shows)}
    numbers = iter(range(len(tiles)))
    drawn = [[(next(numbers), names[e.name], _short(e.activation)) for e in mine] for mine in chosen]
    return drawn if tiles else [], tiles, list(names), list(shows.values())


def _visualisations(
    units: Sequence[Unit], visualisations: Sequence[Visualisation]
) -> tuple[list[list[tuple[int, str]]], list[Image.Image]]:
    """For each unit its visualisations as (tile, kind); the tiles."""
    of: dict[Unit, list[Visualisation]] = {unit: [] for unit in units}
    for each in visualisations:
        of.get(each.unit, []).append(each)
    numbers = iter(range(len(visualisations)))
    drawn = [[(next(numbers), each.kind) for each in mine] for mine in of.values()]
    tiles = [each.image for mine in of.values() for each in mine]
    return drawn if tiles else [], tiles


def _probes(units: Sequence[Unit], probes: Probes) -> ProbesData:
    place = {unit: i for i, unit in enumerate(probes.units)}
    rows = [[_short(float(row[place[u]])) if u in place else None for u in units] for row in probes.activations]
    most = np.abs(probes.activations).max(0)
    return {
        "sprite": _sprite(probes.pictures),
        "probes": [
            {"name": name, "kind": kind, "answers": list(answers), "activations": activations}
            for name, kind, answers, activations in zip(probes.names, probes.kinds, probes.answers, rows, strict=True)
        ],
        "most": [_short(float(most[place[unit]])) if unit in place else 0.0 for unit in units],
    }


def _sprite(images: Sequence[Image.Image]) -> SpriteData | None:
    if not images:
        return None
    tile = next((size for size in TILES if size * size * len(images) <= SPRITE_PIXELS), TILES[-1])
    across = math.ceil(math.sqrt(len(images)))
    sheet = Image.new("RGB", (across * tile, math.ceil(len(images) / across) * tile), (128, 128, 128))
    for i, image in enumerate(images):
        fitted = ImageOps.pad(image.convert("RGB"), (tile, tile), Image.Resampling.LANCZOS, color=(128, 128, 128))
        sheet.paste(fitted, (i % across * tile, i // across * tile))
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    sheet.save(buffer, kind, quality=82)
    uri = f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": uri, "tile": tile, "columns": across, "rows": sheet.height // tile}


# ------------------------------------------------------------------ the file


def _modules(served: bool) -> dict[str, str]:
    """Where each of the page's modules is: at the server, or in the page itself."""
    names = sorted(each.name for each in (files("viscircuits") / "web").iterdir() if each.name.endswith(".js"))
    address = _at_server if served else _inside
    return {f"viscircuits/{name}": address(name) for name in names}


def _at_server(name: str) -> str:
    return f"/web/{name}"


def _inside(name: str) -> str:
    return "data:text/javascript;base64," + base64.b64encode(_web(name).encode()).decode("ascii")


def _web(name: str) -> str:
    return (files("viscircuits") / "web" / name).read_text(encoding="utf-8")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _json(data: Any) -> str:
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c")  # so that no text in it can end the script element


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(number: float | int) -> float:
    return float(f"{number:.4g}")
