"""A circuit in other tools' formats, and back."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.exports import (
    edges_to_csv,
    export,
    from_graphml,
    from_networkx,
    to_graphml,
    to_networkx,
    to_neuronpedia,
)
from viscircuits.layout import reveal

A1, A2, B0 = Unit("block/a:in", 1), Unit("block/a:in", 2), Unit("b", 0)
CIRCUIT = Circuit(
    {"block/a:in": (1, 2), "b": (0,)},
    {"block/a:in": 3, "b": 2},
    {"block/a:in": (0.1 + 0.2, 1e-9), "b": (1 / 3,)},
    (Edge(A2, B0, 1 / 7, -1 / 9, 0.25), Edge(A1, B0, 1e-12, 3e5)),
    {"objective": 0.1, "refine": "coordinate"},
    {"model": "tiny:net", "score": "cla", "images": {"names": ["ä.png", "</script>.png"]}},
    {"block/a:in": (1.0, 0.5), "b": (0.25,)},
)
NOTES = {"b:0": {"name": "eye <ö>", "text": "", "by": "", "when": "2024-01-01T00:00:00+00:00"}}
SCHEMA = json.loads((Path(__file__).parent / "neuronpedia.schema.json").read_text(encoding="utf-8"))


def test_a_graph_has_the_circuits_units_and_edges():
    networkx = pytest.importorskip("networkx")
    graph = to_networkx(CIRCUIT, NOTES)
    assert set(graph) == {"block/a:in:1", "block/a:in:2", "b:0"}
    assert graph.nodes["b:0"] == {
        "layer": "b",
        "index": 0,
        "place": 1,
        "score": 1 / 3,
        "chosen": 0.25,
        "name": "eye <ö>",
    }
    assert graph.edges["block/a:in:2", "b:0"] == {
        "place": 0, "score": 1 / 7, "signed": -1 / 9, "weight": 1 / 9, "chosen": 0.25,
    }  # fmt: skip
    assert networkx.is_directed_acyclic_graph(graph)


def test_graphml_holds_whatever_stands_in_a_note_but_what_no_xml_can():
    networkx = pytest.importorskip("networkx")
    told = {"b:0": {**NOTES["b:0"], "name": "a\x00b\x1b[0m 😀"}}  # a file that somebody wrote by hand
    text = to_graphml(CIRCUIT, told)
    assert networkx.parse_graphml(text).nodes["b:0"]["name"] == "ab[0m 😀"
    assert from_graphml(text) == CIRCUIT


def test_a_circuit_comes_back_from_a_graph_and_from_graphml_as_it_went():
    pytest.importorskip("networkx")
    assert from_networkx(to_networkx(CIRCUIT)) == CIRCUIT
    assert from_graphml(to_graphml(CIRCUIT, NOTES)) == CIRCUIT
    bare = Circuit({"a": (0,), "b": ()}, {"a": 1, "b": 2})
    assert from_graphml(to_graphml(bare)) == bare


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_graphml_keeps_every_number_to_the_last_bit(score, signed):
    pytest.importorskip("networkx")
    circuit = Circuit(
        {"a": (0,), "b": (0,)}, {"a": 1, "b": 1}, edges=(Edge(Unit("a", 0), Unit("b", 0), score, signed),)
    )
    assert from_graphml(to_graphml(circuit)) == circuit


def test_what_is_no_graph_of_a_circuit_is_refused():
    networkx = pytest.importorskip("networkx")
    with pytest.raises(FileFormatError, match="not GraphML"):
        from_graphml("nothing")
    with pytest.raises(FileFormatError, match="not one that viscircuits made"):
        from_networkx(networkx.DiGraph([(1, 2)]))


def test_neuronpedias_graph_fits_its_schema():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; it comes with the extra 'test'")
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    check = jsonschema.Draft7Validator(SCHEMA)
    graph = json.loads(json.dumps(to_neuronpedia(CIRCUIT, "a dög", NOTES), allow_nan=False))
    check.validate(graph)
    for part, name in (("nodes", "clerp"), ("links", "weight"), ("metadata", "slug")):
        entry = graph[part] if part == "metadata" else graph[part][0]
        kept = entry.pop(name)
        assert not check.is_valid(graph)
        entry[name] = kept


def test_neuronpedias_graph_says_which_unit_each_node_is_and_its_links_are_the_signed_edges():
    graph = to_neuronpedia(CIRCUIT, "a dög", NOTES)
    layers = graph["metadata"]["generation_settings"]["layers"]
    unit_of = {node["node_id"]: Unit(layers[int(node["layer"])], node["feature"]) for node in graph["nodes"]}
    assert len(unit_of) == len(graph["nodes"])
    assert list(unit_of.values()) == list(CIRCUIT)
    assert {(unit_of[e["source"]], unit_of[e["target"]], e["weight"]) for e in graph["links"]} == {
        (edge.source, edge.target, edge.signed) for edge in CIRCUIT.edges
    }
    assert [node["clerp"] for node in graph["nodes"]] == ["block/a:in:1", "block/a:in:2", "eye <ö>"]
    assert {node["ctx_idx"] for node in graph["nodes"]} == set(range(len(graph["metadata"]["prompt_tokens"])))
    assert graph["metadata"]["slug"] == "a-d-g-tiny-net"


def test_the_table_of_edges_is_in_the_order_of_the_page():
    rows = list(csv.DictReader(edges_to_csv(CIRCUIT).splitlines()))
    for row, (edge, share) in zip(rows, reveal(CIRCUIT.edges), strict=True):
        assert Unit(row["source_layer"], int(row["source"])) == edge.source
        assert Unit(row["target_layer"], int(row["target"])) == edge.target
        assert [float(row[name]) for name in ("score", "signed", "share")] == [edge.score, edge.signed, share]
    assert [row["chosen"] for row in rows] == ["0.25", ""]


def test_a_file_is_written_in_each_format(tmp_path):
    pytest.importorskip("networkx")
    (graphml,) = export(CIRCUIT, "graphml", tmp_path / "c.graphml")
    assert from_graphml(graphml.read_text(encoding="utf-8")) == CIRCUIT
    (graph,) = export(CIRCUIT, "neuronpedia", tmp_path / "c.json", title="dog")
    assert json.loads(graph.read_text(encoding="utf-8")) == to_neuronpedia(CIRCUIT, "dog")
    edges, units = export(CIRCUIT, "csv", tmp_path / "c.csv", notes=NOTES)
    assert (edges.name, units.name) == ("c.csv", "c-units.csv")
    assert units.read_text(encoding="utf-8").splitlines()[-1] == f"b,0,{1 / 3},0.25,eye <ö>"
    with pytest.raises(ViscircuitsError, match="graphml, neuronpedia, csv"):
        export(CIRCUIT, "pdf", tmp_path / "c.pdf")


def test_without_networkx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ViscircuitsError, match=r"viscircuits\[graph\]"):
        to_networkx(CIRCUIT)
    assert to_neuronpedia(CIRCUIT)["nodes"]
