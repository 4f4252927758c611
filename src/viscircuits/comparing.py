"""Two circuits of one network laid over each other: the units and edges of both, and which are whose.

The union is a circuit like any other, so whatever draws circuits draws it; `Comparison.data` says which of its units
and edges are in the first, in the second, in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.contract import ComparisonData
from viscircuits.errors import ViscircuitsError
from viscircuits.metrics import overlap

Member = Literal[1, 2, 3]  # in the first alone, in the second alone, in both


@dataclass(frozen=True)
class Comparison:
    """Two circuits of the same network.

    Parameters
    ----------
    first, second
        The circuits; they may have different layers, but of the same widths.
    title
        What to call the second.
    """

    first: Circuit
    second: Circuit
    title: str

    def union(self) -> Circuit:
        """The units and edges of both, with the first's numbers where it has some.

        Raises
        ------
        ViscircuitsError
            If a layer has different widths in the two, or the two have no layer in common.
        """
        first, second = self.first, self.second
        for layer, width in first.widths.items():
            if second.widths.get(layer, width) != width:
                raise ViscircuitsError(
                    f"layer {layer!r} has {width} units in one circuit and {second.widths[layer]} in {self.title!r}; "
                    "compare circuits of the same network"
                )
        if not set(first.layers) & set(second.layers):
            raise ViscircuitsError(
                f"the circuits have no layer in common: one has {', '.join(first.layers)}, "
                f"{self.title!r} has {', '.join(second.layers)}"
            )
        units = {
            layer: tuple(sorted({*first.units.get(layer, ()), *second.units.get(layer, ())}))
            for layer in _merged(first.layers, second.layers)
        }
        edges = {(edge.source, edge.target): edge for edge in (*second.edges, *first.edges)}
        return Circuit(
            units,
            {layer: first.widths.get(layer, second.widths.get(layer, 0)) for layer in units},
            _numbers(units, first, first.scores, second, second.scores),
            tuple(edges.values()),
            dict(first.selection),
            dict(first.provenance),
            _numbers(units, first, first.chosen, second, second.chosen),
        )

    def member(self, unit: Unit) -> Member:
        """Whose a unit is."""
        return _member(unit in self.first, unit in self.second)

    def data(self, units: Iterable[Unit], edges: Iterable[Edge]) -> ComparisonData:
        """What the page is told: whose each of these units and edges is, in their order, and how far both overlap."""
        mine, theirs = ({(e.source, e.target) for e in each.edges} for each in (self.first, self.second))
        return {
            "title": self.title,
            "member": [self.member(unit) for unit in units],
            "edge_member": [_member((e.source, e.target) in mine, (e.source, e.target) in theirs) for e in edges],
            "overlap": [asdict(each) for each in overlap(self.first, self.second)],
        }


def elsewhere(circuit: Circuit, others: Mapping[str, Circuit]) -> dict[str, list[str]]:
    """For each unit, as ``layer:index``, the titles of the other circuits that hold it; units of none are left out."""
    found = {str(unit): [title for title, other in others.items() if unit in other] for unit in circuit}
    return {key: titles for key, titles in found.items() if titles}


def _member(in_first: bool, in_second: bool) -> Member:
    if in_first and in_second:
        return 3
    return 1 if in_first else 2


def _merged(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Both orders in one: a layer that only the second has comes just before the next that both have."""
    merged = list(first)
    place = len(merged)
    for layer in reversed(second):
        if layer in merged:
            place = merged.index(layer)
        else:
            merged.insert(place, layer)
    return merged


def _numbers(
    units: Mapping[str, tuple[int, ...]],
    first: Circuit,
    firsts: Mapping[str, tuple[float, ...]],
    second: Circuit,
    seconds: Mapping[str, tuple[float, ...]],
) -> dict[str, tuple[float, ...]]:
    """One number a unit of each layer, the first's before the second's; none for a layer where one is unknown."""
    found = {}
    for layer, indices in units.items():
        known = dict(zip(second.units.get(layer, ()), seconds.get(layer, ()), strict=False))
        known.update(zip(first.units.get(layer, ()), firsts.get(layer, ()), strict=False))
        if all(index in known for index in indices):
            found[layer] = tuple(known[index] for index in indices)
    return found
