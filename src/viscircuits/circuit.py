"""Circuits as values: units, edges, set algebra and JSON.

A circuit is a choice of units, layer by layer, and the edges between chosen units of adjacent
layers. It knows how it was made (`provenance`) and how well it was chosen (`selection`), and it
never sees a network: it can be made, compared and drawn without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "viscircuits/circuit"
VERSION = 1


@dataclass(frozen=True, order=True)
class Unit:
    """One channel of one layer's output: the address `layer` and an index along its unit axis."""

    layer: str
    index: int

    def __str__(self) -> str:
        return f"{self.layer}:{self.index}"


@dataclass(frozen=True)
class Edge:
    """A connection from a unit to a unit of the next layer.

    `score` is the attribution the circuit was selected by, `signed` the signed linear
    contribution of the source to the target (its sign says excite or inhibit), `chosen` the
    share of the bootstrap draws that choose both its units, if that was asked for.
    """

    source: Unit
    target: Unit
    score: float
    signed: float
    chosen: float | None = None


@dataclass(frozen=True)
class Circuit:
    """The units of a concept, layer by layer, with the edges between adjacent layers.

    Parameters
    ----------
    units
        Layer address → chosen unit indices, ascending. Layers stand in execution order.
    widths
        Layer address → how many units that layer has in the network.
    scores
        Layer address → one number for each chosen unit: the attribution it carries inside the
        circuit. Empty when the circuit was not selected by attribution.
    edges
        Edges between units of adjacent layers, strongest first within a pair of layers.
    selection
        How the choice was made and how good it is: objective, upper bound, gap, refinement.
    provenance
        What made it: model, digests, options, versions, seeds.
    chosen
        Layer address → for each chosen unit, the share of the bootstrap draws that choose it
        (`viscircuits.confidence`). Empty when that was not asked for.
    """

    units: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, indices in self.units.items():
            width = self.widths.get(layer)
            if width is None:
                raise ViscircuitsError(f"circuit names layer {layer!r} but not how many units it has (widths)")
            if list(indices) != sorted(set(indices)):
                raise ViscircuitsError(f"units of layer {layer!r} must be ascending and distinct, got {indices}")
            if indices and not 0 <= indices[0] <= indices[-1] < width:
                raise ViscircuitsError(f"layer {layer!r} has units 0 to {width - 1}, the circuit names {indices}")
        for what, of_layers in (("scores", self.scores), ("shares of draws", self.chosen)):
            for layer, numbers in of_layers.items():
                n = len(self.units.get(layer, ()))
                if len(numbers) != n:
                    raise ViscircuitsError(f"layer {layer!r} has {len(numbers)} {what} for {n} units")
        outside = next((u for e in self.edges for u in (e.source, e.target) if u not in self), None)
        if outside is not None:
            raise ViscircuitsError(f"an edge of the circuit touches {outside}, which is not one of its units")

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer addresses in execution order."""
        return tuple(self.units)

    @property
    def n_units(self) -> int:
        """How many units the circuit has in all layers together."""
        return sum(len(indices) for indices in self.units.values())

    def __len__(self) -> int:
        return self.n_units

    def __iter__(self) -> Iterator[Unit]:
        return (Unit(layer, index) for layer, indices in self.units.items() for index in indices)

    def __contains__(self, unit: Unit) -> bool:
        return unit.index in self.units.get(unit.layer, ())

    def __and__(self, other: Circuit) -> Circuit:
        return self._combine(other, set.intersection)

    def __or__(self, other: Circuit) -> Circuit:
        return self._combine(other, set.union)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combine(other, set.difference)

    def complement(self) -> Circuit:
        """Every unit of the circuit's layers that the circuit does not hold."""
        everything = {layer: tuple(range(self.widths[layer])) for layer in self.units}
        return replace(Circuit(everything, self.widths) - self, provenance=self.provenance)

    def edges_between(self, source: str, target: str) -> tuple[Edge, ...]:
        """Edges from layer `source` to layer `target`, strongest first."""
        return tuple(e for e in self.edges if e.source.layer == source and e.target.layer == target)

    def restrict(self, layers: tuple[str, ...]) -> Circuit:
        """The part of the circuit that lies in `layers`."""
        unknown = [layer for layer in layers if layer not in self.units]
        if unknown:
            raise ViscircuitsError(f"the circuit has no layer {unknown[0]!r}; it has {', '.join(self.units)}")
        keep = set(layers)
        return replace(
            self,
            units={layer: v for layer, v in self.units.items() if layer in keep},
            widths={layer: v for layer, v in self.widths.items() if layer in keep},
            scores={layer: v for layer, v in self.scores.items() if layer in keep},
            chosen={layer: v for layer, v in self.chosen.items() if layer in keep},
            edges=tuple(e for e in self.edges if e.source.layer in keep and e.target.layer in keep),
        )

    def _shape(self) -> list[tuple[str, int]]:
        return [(layer, self.widths[layer]) for layer in self.units]

    def _combine(self, other: Circuit, operation: Callable[[set[int], set[int]], set[int]]) -> Circuit:
        if self._shape() != other._shape():
            raise ViscircuitsError("circuits of different layers cannot be combined: " + _difference(self, other))
        units = {
            layer: tuple(sorted(operation(set(indices), set(other.units[layer]))))
            for layer, indices in self.units.items()
        }
        known = {(e.source, e.target): e for e in (*other.edges, *self.edges)}
        edges = tuple(
            replace(e, chosen=None)  # no draw ever chose from this combination
            for e in known.values()
            if e.source.index in units[e.source.layer] and e.target.index in units[e.target.layer]
        )
        provenance = {"made of": [dict(self.provenance), dict(other.provenance)]}
        same = dict(self.provenance) == dict(other.provenance)
        return Circuit(units, self.widths, edges=edges, provenance=self.provenance if same else provenance)

    # ------------------------------------------------------------------ to be looked at

    @property
    def size(self) -> str:
        """How large it is, in words."""
        counts = ((self.n_units, "unit"), (len(self.layers), "layer"), (len(self.edges), "edge"))
        return "{} in {}, {}".format(*(f"{n} {what}{'' if n == 1 else 's'}" for n, what in counts))

    def __repr__(self) -> str:
        return f"Circuit({self.size})"

    def _repr_html_(self) -> str:
        from viscircuits.drawing import to_html

        return to_html(self)

    def plot(self, pictures: Mapping[Unit, Any] | None = None, **options: Any) -> Figure:
        """A figure for a paper, with options as for `viscircuits.plot.plot`; needs matplotlib."""
        from viscircuits.plot import plot

        return plot(self, pictures, **options)

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Return the circuit as plain lists and numbers, ready for `json.dumps`."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "layers": [
                {
                    "name": layer,
                    "n_units": self.widths[layer],
                    "units": list(indices),
                    "scores": list(self.scores.get(layer, ())),
                    **({"chosen": list(self.chosen[layer])} if layer in self.chosen else {}),
                }
                for layer, indices in self.units.items()
            ],
            "edges": [
                {
                    "source": [e.source.layer, e.source.index],
                    "target": [e.target.layer, e.target.index],
                    "score": e.score,
                    "signed": e.signed,
                    **({} if e.chosen is None else {"chosen": e.chosen}),
                }
                for e in self.edges
            ],
            "selection": dict(self.selection),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any, origin: str = "the circuit") -> Circuit:
        """Read what `to_json` wrote. `origin` names the file in errors."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise FileFormatError(f"{origin} is not a viscircuits circuit (no schema {SCHEMA!r})")
        if data.get("version") != VERSION:
            raise FileFormatError(
                f"{origin} has circuit schema version {data.get('version')!r}, this viscircuits reads {VERSION}"
            )
        try:
            layers = data["layers"]
            return cls(
                units={entry["name"]: tuple(map(index, entry["units"])) for entry in layers},
                widths={entry["name"]: index(entry["n_units"]) for entry in layers},
                scores={entry["name"]: tuple(map(float, entry["scores"])) for entry in layers if entry["scores"]},
                chosen={entry["name"]: tuple(map(float, entry["chosen"])) for entry in layers if "chosen" in entry},
                edges=tuple(map(_edge, data["edges"])),
                selection=dict(data["selection"]),
                provenance=dict(data["provenance"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileFormatError(f"{origin} is damaged: {type(error).__name__} {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write the circuit as JSON, to a temporary name first so that a crash leaves the old file."""
        return write_atomically(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read a circuit from its JSON file or from a result folder that holds ``circuit.json``."""
        path = Path(path)
        path = path / "circuit.json" if path.is_dir() else path
        if not path.is_file():
            raise FileFormatError(f"no circuit at {str(path)!r}; give a circuit.json or the folder `discover` wrote")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FileFormatError(f"{str(path)!r} is not JSON: {error}") from error
        return cls.from_json(data, origin=repr(str(path)))


def _edge(entry: Mapping[str, Any]) -> Edge:
    chosen = entry.get("chosen")
    score, signed = float(entry["score"]), float(entry["signed"])
    return Edge(
        Unit(*entry["source"]), Unit(*entry["target"]), score, signed, None if chosen is None else float(chosen)
    )


def _difference(a: Circuit, b: Circuit) -> str:
    mine, others = dict(a._shape()), dict(b._shape())
    for layer in {**mine, **others}:
        if layer not in mine or layer not in others:
            return f"layer {layer!r} is in one of them only"
        if mine[layer] != others[layer]:
            return f"layer {layer!r} has {mine[layer]} units in one and {others[layer]} in the other"
    return "the layers stand in different order"
