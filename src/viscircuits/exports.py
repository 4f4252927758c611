"""A circuit in the formats of other tools: networkx and GraphML, Neuronpedia's attribution graph, CSV.

- *networkx, GraphML*: a directed graph with everything the circuit knows; `from_networkx` reads it back.
- *Neuronpedia*: nodes and links as its graph viewer takes them. Its graphs have an axis of tokens, a circuit has none:
  all nodes stand at one position, whose token is the concept's name. A layer is the number of its place in the circuit,
  its name is in ``generation_settings``, and a link's weight is the edge's signed contribution.
- *CSV*: the edges as a table, and the units as another.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.contract import NoteData
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import write_atomically
from viscircuits.layout import reveal
from viscircuits.notes import writable

if TYPE_CHECKING:
    import networkx

Notes = Mapping[str, NoteData]

NODE_TYPE = "unit"  # none of the feature types of language models


def to_networkx(circuit: Circuit, notes: Notes | None = None) -> networkx.DiGraph:
    """The circuit as a directed graph; needs the package networkx (``pip install 'viscircuits[graph]'``).

    Nodes are called ``layer:index``. What a node or edge has is a number or a text, as GraphML demands; the graph's
    attribute ``viscircuits`` holds, as JSON, what belongs to the circuit as a whole.
    """
    graph = _networkx().DiGraph()
    whole = circuit.to_json()
    del whole["edges"]
    for entry in whole["layers"]:
        for column in ("units", "scores", "chosen"):
            entry.pop(column, None)
    graph.graph["viscircuits"] = json.dumps(whole, default=str)
    for place, (layer, indices) in enumerate(circuit.units.items()):
        for i, index in enumerate(indices):
            known = {"layer": layer, "index": index, "place": place}
            for what, numbers in (("score", circuit.scores), ("chosen", circuit.chosen)):
                if numbers.get(layer):
                    known[what] = numbers[layer][i]
            name = _name(notes, f"{layer}:{index}")
            graph.add_node(f"{layer}:{index}", **known, **({"name": name} if name else {}))
    for place, edge in enumerate(circuit.edges):
        known = {"place": place, "score": edge.score, "signed": edge.signed, "weight": abs(edge.signed)}
        graph.add_edge(
            str(edge.source), str(edge.target), **known, **({} if edge.chosen is None else {"chosen": edge.chosen})
        )
    return graph


def from_networkx(graph: networkx.DiGraph) -> Circuit:
    """The circuit that `to_networkx` made the graph of.

    Raises
    ------
    FileFormatError
        If the graph is not of a circuit.
    """
    try:
        whole = json.loads(graph.graph["viscircuits"])
        nodes = [data for _, data in graph.nodes(data=True)]
        for entry in whole["layers"]:
            mine = sorted((n for n in nodes if n["layer"] == entry["name"]), key=lambda node: node["index"])
            entry["units"] = [node["index"] for node in mine]
            entry["scores"] = [node["score"] for node in mine if "score" in node]
            if any("chosen" in node for node in mine):
                entry["chosen"] = [node["chosen"] for node in mine]
        whole["edges"] = [
            {
                "source": [graph.nodes[source]["layer"], graph.nodes[source]["index"]],
                "target": [graph.nodes[target]["layer"], graph.nodes[target]["index"]],
                **{name: data[name] for name in ("score", "signed", "chosen") if name in data},
            }
            for source, target, data in sorted(graph.edges(data=True), key=lambda edge: edge[2]["place"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the graph is not one that viscircuits made: {type(error).__name__} {error}") from error
    return Circuit.from_json(whole, origin="the graph")


def to_graphml(circuit: Circuit, notes: Notes | None = None) -> str:
    """The circuit as GraphML, which Gephi, Cytoscape, igraph and networkx read; needs networkx."""
    buffer = io.BytesIO()
    _networkx().write_graphml_xml(to_networkx(circuit, notes), buffer, encoding="utf-8", named_key_ids=True)
    return buffer.getvalue().decode("utf-8") + "\n"


def from_graphml(text: str) -> Circuit:
    """The circuit that `to_graphml` wrote.

    Raises
    ------
    FileFormatError
        If the text is not GraphML of a circuit.
    """
    package = _networkx()
    try:
        graph = package.parse_graphml(text)
    except (package.NetworkXError, SyntaxError) as error:
        raise FileFormatError(f"this is not GraphML: {error}") from error
    return from_networkx(graph)


def to_neuronpedia(circuit: Circuit, title: str = "circuit", notes: Notes | None = None) -> dict[str, Any]:
    """The circuit as Neuronpedia's attribution graph, ready for `json.dumps`.

    Parameters
    ----------
    title
        The concept's name: it stands where a language model's prompt would.
    notes
        Names that people gave to units become labels.
    """
    place = {layer: i for i, layer in enumerate(circuit.layers)}
    made = circuit.provenance
    settings = {name: made[name] for name in ("score", "summary", "contrast", "ablation") if name in made}
    model = str(made.get("model", "unknown"))
    return {
        "metadata": {
            "slug": _slug(f"{title}-{model}"),
            "scan": model,
            "prompt": title,
            "prompt_tokens": [title],
            "info": {
                "description": "A circuit of a vision model: nodes are units, one for each, whatever their positions; "
                "links are signed linear contributions, averaged over images.",
                "generator": {"name": "viscircuits", "version": version("viscircuits")},
            },
            "generation_settings": {**settings, "layers": list(circuit.layers), "widths": [*_widths(circuit)]},
        },
        "qParams": {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": []},
        "nodes": [
            {
                "node_id": _node_id(place, unit),
                "feature": unit.index,
                "layer": str(place[unit.layer]),
                "ctx_idx": 0,
                "feature_type": NODE_TYPE,
                "jsNodeId": f"{place[unit.layer]}_{unit.index}-0",
                "clerp": _name(notes, str(unit)) or str(unit),
                "influence": None,
                "activation": None,
            }
            for unit in circuit
        ],
        "links": [
            {"source": _node_id(place, edge.source), "target": _node_id(place, edge.target), "weight": edge.signed}
            for edge in circuit.edges
        ],
    }


def edges_to_csv(circuit: Circuit) -> str:
    """The edges in the order in which the page reveals them, a line each."""
    head = ("source_layer", "source", "target_layer", "target", "score", "signed", "share", "chosen")
    rows = [(*_ends(edge), edge.score, edge.signed, share, edge.chosen) for edge, share in reveal(circuit.edges)]
    return _csv(head, rows)


def units_to_csv(circuit: Circuit, notes: Notes | None = None) -> str:
    """The units, a line each."""
    rows = []
    for layer, indices in circuit.units.items():
        scores = circuit.scores.get(layer) or (None,) * len(indices)
        chosen = circuit.chosen.get(layer) or (None,) * len(indices)
        for index, score, share in zip(indices, scores, chosen, strict=True):
            name = _name(notes, f"{layer}:{index}")
            rows.append((layer, index, score, share, name))
    return _csv(("layer", "unit", "score", "chosen", "name"), rows)


def export(
    circuit: Circuit, kind: str, path: str | Path, *, title: str = "circuit", notes: Notes | None = None
) -> list[Path]:
    """Write a circuit in another tool's format; returns what was written.

    Parameters
    ----------
    kind
        ``graphml``, ``neuronpedia`` or ``csv``; the last also writes the units, into ``NAME-units.csv``.
    path
        The file.

    Raises
    ------
    ViscircuitsError
        If there is no such format, or it needs a package that is not installed.
    """
    path = Path(path)
    if kind not in FORMATS:
        raise ViscircuitsError(f"no format {kind!r}; choose one of {', '.join(FORMATS)}")
    texts = FORMATS[kind](circuit, title, notes)
    return [
        write_atomically(path.with_name(f"{path.stem}{suffix}{path.suffix}"), text) for suffix, text in texts.items()
    ]


def _graphml(circuit: Circuit, title: str, notes: Notes | None) -> dict[str, str]:
    return {"": to_graphml(circuit, notes)}


def _neuronpedia(circuit: Circuit, title: str, notes: Notes | None) -> dict[str, str]:
    return {"": json.dumps(to_neuronpedia(circuit, title, notes), indent=1) + "\n"}


def _tables(circuit: Circuit, title: str, notes: Notes | None) -> dict[str, str]:
    return {"": edges_to_csv(circuit), "-units": units_to_csv(circuit, notes)}


# name → what turns circuit, title and notes into texts by the suffix of their file's name
FORMATS: dict[str, Callable[[Circuit, str, Notes | None], dict[str, str]]] = {
    "graphml": _graphml,
    "neuronpedia": _neuronpedia,
    "csv": _tables,
}


def _networkx() -> Any:
    try:
        import networkx
    except ImportError:
        raise ViscircuitsError(
            "GraphML and networkx graphs need the package networkx: pip install 'viscircuits[graph]'"
        ) from None
    return networkx


def _name(notes: Notes | None, key: str) -> str | None:
    return writable(notes[key]["name"]) if notes and key in notes else None


def _widths(circuit: Circuit) -> Iterable[int]:
    return (circuit.widths[layer] for layer in circuit.layers)


def _node_id(place: Mapping[str, int], unit: Unit) -> str:
    return f"{place[unit.layer]}_{unit.index}_0"


def _ends(edge: Edge) -> tuple[str, int, str, int]:
    return edge.source.layer, edge.source.index, edge.target.layer, edge.target.index


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "circuit"


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)  # None is an empty cell
    return buffer.getvalue()
