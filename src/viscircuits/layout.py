"""How a circuit is laid out to be looked at: which edges come first, and in what order a layer's units stand.

1. Edges are put in the order in which they are revealed: each pair of layers reveals its strongest first,
   and all pairs at the same pace, measured in share of the pair's attribution.
2. Units of a layer are ordered so that strong edges cross little (barycentre sweeps).
3. Layers stand in columns from left to right; those that run side by side, as the branches of an Inception block do,
   share one.
4. Where there is room for a few units only, an `excerpt` has the strongest of each layer and the edges between them.

Numbers in, numbers out: the page, the static drawing and the figure for a paper all draw what this says.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from viscircuits.circuit import Circuit, Edge, Unit

SWEEPS = 8
NEARLY_ALL, HALF = 0.8, 0.5  # of the bootstrap draws

Links = list[tuple[int, int, float]]


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


def pattern(chosen: float | None) -> str:
    """How a line says which share of the bootstrap draws chooses its edge: ``solid``, ``dashed`` or ``dotted``.

    The page, the static drawing and the figure for a paper agree: broken lines are unsure edges, whatever their sign.
    Where nobody drew, lines are solid.
    """
    if chosen is None or chosen >= NEARLY_ALL:
        return "solid"
    return "dashed" if chosen >= HALF else "dotted"


def strongest(circuit: Circuit, n: int) -> list[Unit]:
    """The `n` units of each layer with the highest scores, in the circuit's order."""
    found = []
    for layer, indices in circuit.units.items():
        scores = circuit.scores.get(layer) or (0.0,) * len(indices)
        ranked = sorted(zip(indices, scores, strict=True), key=lambda pair: -pair[1])[:n]
        found += [Unit(layer, index) for index in sorted(index for index, _ in ranked)]
    return found


@dataclass(frozen=True)
class Excerpt:
    """As much of a circuit as there is room for.

    Parameters
    ----------
    columns
        Layer → its strongest units, from top to bottom.
    edges
        The strongest edges between them, all pairs of layers at the same pace, each with its share of the attribution
        between its two layers.
    """

    columns: Mapping[str, tuple[Unit, ...]]
    edges: tuple[tuple[Edge, float], ...]


def excerpt(circuit: Circuit, *, layers: Sequence[str] | None = None, n_units: int = 8, n_edges: int = 60) -> Excerpt:
    """The `n_units` strongest units of each layer, with the `n_edges` of the edges between them that come first.

    Parameters
    ----------
    layers
        Which layers; by default all.

    Raises
    ------
    ViscircuitsError
        If the circuit has no such layer.
    """
    part = circuit if layers is None else circuit.restrict(tuple(layers))
    units = strongest(part, n_units)
    shown = set(units)
    shares = {(edge.source, edge.target): share for edge, share in reveal(circuit.edges)}  # of all edges of the pair
    between = reveal([edge for edge in circuit.edges if edge.source in shown and edge.target in shown])
    edges = [(edge, shares[edge.source, edge.target]) for edge, _ in between[:n_edges]]
    number = {unit: i for i, unit in enumerate(units)}
    groups = [[number[unit] for unit in units if unit.layer == layer] for layer in part.layers]
    ordered = order_units(groups, [(number[e.source], number[e.target], share) for e, share in edges])
    columns = {layer: tuple(units[i] for i in order) for layer, order in zip(part.layers, ordered, strict=True)}
    return Excerpt(columns, tuple(edges))


def columns(layers: Sequence[str], pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The column of each layer, from 0 on: edges always lead to a later column, and no column is left empty.

    A layer stands one column behind the latest of those that reach it (longest path); one that nothing reaches stands
    just before the first that it reaches. A layer without edges has a column of its own, after the layer before it.

    Parameters
    ----------
    layers
        In execution order.
    pairs
        Source and target layer of the edges.
    """
    place = {layer: i for i, layer in enumerate(layers)}
    forwards = {(a, b) for a, b in pairs if place[a] < place[b]}
    before = {layer: [a for a, b in forwards if b == layer] for layer in layers}
    after = {layer: [b for a, b in forwards if a == layer] for layer in layers}
    depth: dict[str, int] = {}
    for layer in layers:
        depth[layer] = max((depth[source] + 1 for source in before[layer]), default=0)
    for layer in layers:
        if after[layer] and not before[layer]:
            depth[layer] = min(depth[target] for target in after[layer]) - 1
    found: dict[str, tuple[int, int]] = {}
    last = (-1, 0)
    for layer in layers:
        alone = not before[layer] and not after[layer]
        last = (last[0], last[1] + 1) if alone else (depth[layer], 0)
        found[layer] = last
    ranks = {key: i for i, key in enumerate(sorted(set(found.values())))}
    return {layer: ranks[key] for layer, key in found.items()}


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
