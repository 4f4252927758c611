"""One self-contained page that shows a circuit: no network, no build step, opens from disk.

1. The circuit becomes plain lists: units are numbered layer by layer, edges name those numbers.
2. Edges are put in the order in which the page reveals them: each pair of layers reveals its
   strongest first, and all pairs at the same pace, measured in share of the pair's attribution.
3. Units of a layer are ordered so that strong edges cross little (barycentre sweeps).
4. All pictures go into one sprite sheet, so that a thousand units cost one decoded image.
5. Data, style and script are put into the template of `web/`; the script draws.

The page promises nothing that was not measured: without an evaluation it says so.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from PIL import Image, ImageOps, features

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.exemplars import Exemplar

MAX_EDGES = 20_000
MAX_ORDERING_EDGES = 4_000
SPRITE_PIXELS = 10_000_000
TILES = (96, 72, 56, 48, 40, 32, 24, 16)
SWEEPS = 8

Links = list[tuple[int, int, float]]


def page(
    circuit: Circuit,
    evaluation: Mapping[str, Any] | None,
    pictures: Mapping[Unit, Sequence[Exemplar]] | None,
    *,
    title: str,
    command: str,
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

    Notes
    -----
    At most 20,000 edges go into the page, the strongest of each pair of layers; the page says so.
    """
    data = {
        "title": title,
        "command": command,
        **_graph(circuit),
        **_pictures(circuit, pictures or {}),
        "evaluation": evaluation,
        "selection": circuit.selection,
        "provenance": circuit.provenance,
    }
    parts = {
        "title": html.escape(title),
        "style": _web("style.css"),
        "script": _web("page.js"),
        "data": _json(data),
    }
    return re.sub(r"@@(\w+)@@", lambda match: parts[match[1]], _web("index.html"))


def reveal(edges: Sequence[Edge]) -> list[tuple[Edge, float]]:
    """Edges in the order the page shows them, each with its share of its layer pair's attribution.

    Showing the first N of them covers about the same share of every pair, so that no pair is
    empty because its scores happen to be small numbers.
    """
    pairs: dict[tuple[str, str], list[Edge]] = defaultdict(list)
    for edge in edges:
        pairs[edge.source.layer, edge.target.layer].append(edge)
    ranked: list[tuple[float, Edge, float]] = []
    for members in pairs.values():
        total = math.fsum(abs(edge.score) for edge in members) or 1.0
        covered = 0.0
        for edge in sorted(members, key=lambda edge: -abs(edge.score)):
            share = abs(edge.score) / total
            ranked.append((covered, edge, share))
            covered += share
    ranked.sort(key=lambda entry: entry[0])
    return [(edge, share) for _, edge, share in ranked]


def order_units(groups: Sequence[Sequence[int]], links: Links) -> list[list[int]]:
    """Order each layer's units so that links cross little; never worse than the order given.

    Sweeps forwards and backwards, sorting each layer by the weighted mean position of what its
    units are linked to, and keeps the best order seen (Sugiyama et al. 1981).

    Parameters
    ----------
    groups
        Unit numbers, layer by layer.
    links
        Source, target and weight of each link.
    """
    order = [list(group) for group in groups]
    neighbours = _neighbours(order, links)
    best, fewest = order, crossings(order, links)
    for sweep in range(SWEEPS):
        forwards = sweep % 2 == 0
        position = _positions(order)
        order = [list(group) for group in order]
        for i in range(len(order)) if forwards else reversed(range(len(order))):
            order[i].sort(key=lambda unit: _barycentre(neighbours[not forwards][unit], position, position[unit]))
            position.update(_positions([order[i]]))
        count = crossings(order, links)
        if count < fewest:
            best, fewest = order, count
    return best


def crossings(order: Sequence[Sequence[int]], links: Links) -> int:
    """How many pairs of links between the same two layers cross."""
    layer_of = {unit: i for i, group in enumerate(order) for unit in group}
    rank = {unit: r for group in order for r, unit in enumerate(group)}
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for source, target, _ in links:
        pairs[layer_of[source], layer_of[target]].append((rank[source], rank[target]))
    return sum(_inversions(ends) for ends in pairs.values())


# ------------------------------------------------------------------ below: what goes into the page


def _graph(circuit: Circuit) -> dict[str, Any]:
    number = {unit: i for i, unit in enumerate(circuit)}
    revealed = reveal(circuit.edges)
    shown = revealed[:MAX_EDGES]
    links = [(number[e.source], number[e.target], share) for e, share in shown[:MAX_ORDERING_EDGES]]
    groups = [[number[Unit(layer, index)] for index in indices] for layer, indices in circuit.units.items()]
    orders = order_units(groups, links)
    return {
        "layers": [
            {
                "name": layer,
                "width": circuit.widths[layer],
                "units": list(indices),
                "scores": [_short(score) for score in circuit.scores.get(layer, ())],
                "chosen": [_short(share) for share in circuit.chosen.get(layer, ())],
                "order": order,
            }
            for (layer, indices), order in zip(circuit.units.items(), orders, strict=True)
        ],
        "edges": {
            "source": [number[edge.source] for edge, _ in shown],
            "target": [number[edge.target] for edge, _ in shown],
            "score": [_short(edge.score) for edge, _ in shown],
            "signed": [_short(edge.signed) for edge, _ in shown],
            "share": [_short(share) for _, share in shown],
            "chosen": [None if edge.chosen is None else _short(edge.chosen) for edge, _ in shown],
        },
        "n_edges": len(revealed),
    }


def _pictures(circuit: Circuit, pictures: Mapping[Unit, Sequence[Exemplar]]) -> dict[str, Any]:
    chosen = [list(pictures.get(unit, ())) for unit in circuit]
    tiles = [exemplar for mine in chosen for exemplar in mine]
    if not tiles:
        return {"sprite": None, "pictures": [], "names": []}
    names = {name: i for i, name in enumerate(dict.fromkeys(exemplar.name for exemplar in tiles))}
    numbers = iter(range(len(tiles)))
    return {
        "sprite": _sprite([exemplar.image for exemplar in tiles]),
        "pictures": [[[next(numbers), names[e.name], _short(e.activation)] for e in mine] for mine in chosen],
        "names": list(names),
    }


def _sprite(images: Sequence[Image.Image]) -> dict[str, Any]:
    tile = next((size for size in TILES if size * size * len(images) <= SPRITE_PIXELS), TILES[-1])
    columns = math.ceil(math.sqrt(len(images)))
    sheet = Image.new("RGB", (columns * tile, math.ceil(len(images) / columns) * tile), (128, 128, 128))
    for i, image in enumerate(images):
        fitted = ImageOps.pad(image.convert("RGB"), (tile, tile), Image.Resampling.LANCZOS, color=(128, 128, 128))
        sheet.paste(fitted, (i % columns * tile, i // columns * tile))
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    sheet.save(buffer, kind, quality=82)
    uri = f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": uri, "tile": tile, "columns": columns, "rows": sheet.height // tile}


def _web(name: str) -> str:
    return (files("viscircuits") / "web" / name).read_text(encoding="utf-8")


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


# ------------------------------------------------------------------ below: fewer crossings


def _neighbours(order: Sequence[Sequence[int]], links: Links) -> tuple[dict, dict]:
    before: dict[int, list[tuple[int, float]]] = {unit: [] for group in order for unit in group}
    after: dict[int, list[tuple[int, float]]] = {unit: [] for group in order for unit in group}
    for source, target, weight in links:
        after[source].append((target, weight))
        before[target].append((source, weight))
    return before, after


def _positions(order: Sequence[Sequence[int]]) -> dict[int, float]:
    return {unit: (r + 0.5) / len(group) for group in order for r, unit in enumerate(group)}


def _barycentre(linked: Sequence[tuple[int, float]], position: Mapping[int, float], otherwise: float) -> float:
    total = sum(weight for _, weight in linked)
    return sum(weight * position[unit] for unit, weight in linked) / total if total else otherwise


def _inversions(ends: list[tuple[int, int]]) -> int:
    seen: list[int] = []
    count = 0
    for _, target in sorted(ends):
        count += len(seen) - bisect_right(seen, target)
        insort(seen, target)
    return count
