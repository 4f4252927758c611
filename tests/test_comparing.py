"""Two circuits laid over each other."""

from __future__ import annotations

import pytest

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.comparing import Comparison, elsewhere
from viscircuits.errors import ViscircuitsError
from viscircuits.metrics import overlap

A1, A2, B0, B1 = Unit("a", 1), Unit("a", 2), Unit("b", 0), Unit("b", 1)
WIDTHS = {"a": 4, "b": 3}
FIRST = Circuit(
    {"a": (1, 2), "b": (0,)}, WIDTHS, {"a": (5.0, 6.0), "b": (7.0,)}, (Edge(A1, B0, 0.5, 0.5), Edge(A2, B0, 0.4, -0.4))
)
SECOND = Circuit(
    {"a": (0, 2), "b": (0, 1)}, WIDTHS, {"a": (1.0, 2.0), "b": (3.0, 4.0)},
    (Edge(A2, B0, 9.0, 9.0), Edge(A2, B1, 0.1, 0.1)),
)  # fmt: skip


def test_the_union_holds_the_units_and_edges_of_both_with_the_firsts_numbers():
    union = Comparison(FIRST, SECOND, "second").union()
    assert union.units == (FIRST | SECOND).units == {"a": (0, 1, 2), "b": (0, 1)}
    assert union.scores == {"a": (1.0, 5.0, 6.0), "b": (7.0, 4.0)}
    scores = {(edge.source, edge.target): edge.score for edge in union.edges}
    assert scores == {(A1, B0): 0.5, (A2, B0): 0.4, (A2, B1): 0.1}


def test_each_unit_and_edge_is_the_firsts_the_seconds_or_both():
    comparison = Comparison(FIRST, SECOND, "second")
    union = comparison.union()
    data = comparison.data(union, [FIRST.edges[0], SECOND.edges[1], SECOND.edges[0]])
    assert data["member"] == [2, 1, 3, 3, 2]
    assert data["edge_member"] == [1, 2, 3]
    assert [each["shared"] for each in data["overlap"]] == [each.shared for each in overlap(FIRST, SECOND)] == [1, 1]


def test_a_circuit_laid_over_itself_is_in_both_everywhere():
    comparison = Comparison(FIRST, FIRST, "again")
    assert comparison.union().units == FIRST.units
    assert set(comparison.data(FIRST, FIRST.edges)["member"] + comparison.data(FIRST, FIRST.edges)["edge_member"]) == {
        3
    }


def test_layers_of_both_stand_in_an_order_that_fits_either():
    widths = dict.fromkeys("abcdef", 1)
    one, other = (Circuit(dict.fromkeys(layers, (0,)), widths) for layers in ("ace", "abdef"))
    assert "".join(Comparison(one, other, "x").union().layers) == "acbdef"
    assert not Comparison(one, other, "x").union().scores  # nobody knows any


def test_circuits_of_other_networks_are_refused():
    with pytest.raises(ViscircuitsError, match="has 4 units in one circuit and 5"):
        Comparison(FIRST, Circuit({"a": (0,)}, {"a": 5}), "x").union()
    with pytest.raises(ViscircuitsError, match="no layer in common"):
        Comparison(FIRST, Circuit({"c": (0,)}, {"c": 5}), "x").union()


def test_a_unit_is_listed_with_the_other_circuits_that_hold_it():
    assert elsewhere(FIRST, {"dogs": SECOND, "cats": FIRST - SECOND}) == {
        "a:1": ["cats"], "a:2": ["dogs"], "b:0": ["dogs"],
    }  # fmt: skip
