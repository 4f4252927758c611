"""Circuits are sets of units with edges, and their files say what is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import write_atomically
from viscircuits.selection import shrink

WIDTHS = {"conv1": 4, "conv2": 5}
EDGES = tuple(
    Edge(Unit("conv1", m), Unit("conv2", n), score=m + n / 10, signed=float(m - n)) for m in range(4) for n in range(5)
)


def circuit(choice) -> Circuit:
    """A circuit of two layers with every edge between its units."""
    units = {layer: tuple(sorted(indices)) for layer, indices in zip(WIDTHS, choice, strict=True)}
    edges = tuple(e for e in EDGES if e.source.index in units["conv1"] and e.target.index in units["conv2"])
    return Circuit(units, WIDTHS, edges=edges)


choices = st.tuples(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 4)))


@pytest.fixture
def chosen() -> Circuit:
    return Circuit(
        units={"conv1": (0, 3), "conv2": (2,)},
        widths=WIDTHS,
        scores={"conv1": (0.5, 0.25), "conv2": (0.75,)},
        edges=(
            Edge(Unit("conv1", 0), Unit("conv2", 2), 0.5, -0.5),
            Edge(Unit("conv1", 3), Unit("conv2", 2), 0.25, 0.125),
        ),
        selection={"objective": 0.75, "bound": 0.75},
        provenance={"model": "toy", "options": {"units": [2, 1]}},
    )


# ------------------------------------------------------------------ set algebra


@given(choices, choices)
def test_and_or_minus_are_those_of_the_sets_of_units(a, b):
    a, b = circuit(a), circuit(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a | b) == set(a) | set(b)
    assert set(a - b) == set(a) - set(b)


@given(choices, choices, choices)
def test_set_algebra_obeys_its_laws(a, b, c):
    a, b, c = circuit(a), circuit(b), circuit(c)
    assert (a & b).units == (b & a).units and (a | b).units == (b | a).units
    assert (a & (b | c)).units == ((a & b) | (a & c)).units
    assert (a | a).units == a.units == (a & a).units
    assert (a - b).units == (a & b.complement()).units
    assert (a | b).complement().units == (a.complement() & b.complement()).units


@given(choices)
def test_a_circuit_and_its_complement_share_nothing_and_make_the_whole(a):
    a = circuit(a)
    other = a.complement()
    assert (a & other).n_units == 0
    assert (a | other).n_units == sum(WIDTHS.values())
    assert other.complement().units == a.units


@given(choices, choices)
def test_a_combination_keeps_just_the_known_edges_between_its_units(a, b):
    a, b = circuit(a), circuit(b)
    known = {*a.edges, *b.edges}
    for combined in (a & b, a | b, a - b):
        assert set(combined.edges) == {e for e in known if e.source in combined and e.target in combined}


def test_a_circuit_holds_lists_and_counts_its_units(chosen):
    assert list(chosen) == [Unit("conv1", 0), Unit("conv1", 3), Unit("conv2", 2)]
    assert [str(unit) for unit in chosen] == ["conv1:0", "conv1:3", "conv2:2"]
    assert len(chosen) == chosen.n_units == 3
    assert Unit("conv1", 3) in chosen and Unit("conv1", 1) not in chosen and Unit("conv9", 0) not in chosen


def test_restricting_keeps_the_part_inside_the_layers(chosen):
    part = chosen.restrict(("conv1",))
    assert part.units == {"conv1": (0, 3)} and part.scores == {"conv1": (0.5, 0.25)} and part.edges == ()
    assert chosen.restrict(chosen.layers) == chosen
    with pytest.raises(ViscircuitsError, match=r"no layer 'conv9'; it has conv1, conv2"):
        chosen.restrict(("conv9",))


def test_edges_between_two_layers_have_a_direction(chosen):
    assert chosen.edges_between("conv1", "conv2") == chosen.edges
    assert chosen.edges_between("conv2", "conv1") == ()


def test_circuits_of_different_layers_do_not_mix(chosen):
    for units, widths, wrong in (
        ({"conv1": (0,), "conv2": ()}, {"conv1": 9, "conv2": 5}, "layer 'conv1' has 4 units in one and 9 in the other"),
        ({"conv1": (0,)}, {"conv1": 4}, "layer 'conv2'"),
        ({"conv1": (0,)}, WIDTHS, "layer 'conv2'"),  # knows the width, does not choose there
        ({"conv2": (0,), "conv1": ()}, WIDTHS, "the layers stand in different order"),
    ):
        other = Circuit(units, widths)
        for combine in (lambda a, b: a & b, lambda a, b: b | a, lambda a, b: b - a):
            with pytest.raises(ViscircuitsError, match="circuits of different layers cannot be combined: ") as error:
                combine(chosen, other)
            assert wrong.split(" has 4")[0] in str(error.value)


@pytest.mark.parametrize(
    ("units", "wrong"),
    [
        ({"conv1": (4,)}, "layer 'conv1' has units 0 to 3, the circuit names"),
        ({"conv1": (-1, 2)}, "layer 'conv1' has units 0 to 3, the circuit names"),
        ({"conv1": (2, 1)}, "must be ascending and distinct"),
        ({"conv1": (1, 1)}, "must be ascending and distinct"),
        ({"conv9": (1,)}, "names layer 'conv9' but not how many units it has"),
    ],
)
def test_impossible_units_are_refused(units, wrong):
    with pytest.raises(ViscircuitsError, match=wrong):
        Circuit(units, WIDTHS)


# ------------------------------------------------------------------ JSON


def test_json_round_trip(chosen, tmp_path):
    assert Circuit.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    path = chosen.save(tmp_path / "new" / "circuit.json")
    assert Circuit.load(path) == Circuit.load(path.parent) == chosen  # the file, or the folder that holds it


@given(choices)
def test_every_circuit_survives_json(a):
    a = circuit(a)
    assert Circuit.from_json(json.loads(json.dumps(a.to_json()))) == a


def test_the_same_circuit_is_the_same_bytes(chosen, tmp_path):
    again = Circuit.from_json(chosen.to_json())
    assert chosen.save(tmp_path / "a").read_bytes() == again.save(tmp_path / "b").read_bytes()


@pytest.fixture
def sure(chosen) -> Circuit:
    """A circuit that carries shares of bootstrap draws."""
    edges = tuple(replace(edge, chosen=0.25) for edge in chosen.edges)
    return replace(chosen, chosen={"conv1": (0.5, 1.0), "conv2": (0.75,)}, edges=edges)


def test_shares_of_draws_survive_json_and_a_file_without_them_loads(sure, chosen, tmp_path):
    assert Circuit.load(sure.save(tmp_path / "sure.json")) == sure
    data = sure.to_json()
    for entry in (*data["layers"], *data["edges"]):
        del entry["chosen"]
    assert Circuit.from_json(data) == chosen
    assert "chosen" not in json.dumps(chosen.to_json())


def test_shares_of_draws_stay_with_their_units(sure):
    assert sure.restrict(("conv1",)).chosen == {"conv1": (0.5, 1.0)}
    small = shrink(sure, 0.5)
    assert small.units["conv1"] == (0,) and small.chosen == {"conv1": (0.5,), "conv2": (0.75,)}
    both = sure | sure.complement()
    assert not both.chosen and {edge.chosen for edge in both.edges} == {None}
    with pytest.raises(ViscircuitsError, match="2 shares of draws for 1 units"):
        replace(sure, chosen={"conv2": (0.5, 0.5)})


def damaged(data: dict, **changes) -> str:
    return json.dumps({**data, **changes})


DAMAGE = {
    "empty": lambda data: "",
    "half": lambda data: json.dumps(data)[:200],
    "list": lambda data: "[1, 2]",
    "foreign": lambda data: '{"nodes": []}',
    "other schema": lambda data: damaged(data, schema="someone/else"),
    "future version": lambda data: damaged(data, version=99),
    "no layers": lambda data: json.dumps({k: v for k, v in data.items() if k != "layers"}),
    "layers are a number": lambda data: damaged(data, layers=3),
    "no width": lambda data: damaged(data, layers=[{"name": "conv1", "units": [1], "scores": []}]),
    "unit out of range": lambda data: damaged(data, layers=[{"name": "a", "n_units": 2, "units": [7], "scores": []}]),
    "unit is no number": lambda data: damaged(data, layers=[{"name": "a", "n_units": 2, "units": ["x"], "scores": []}]),
    "unit is half": lambda data: damaged(data, layers=[{"name": "a", "n_units": 2, "units": [0.5], "scores": []}]),
    "scores too few": lambda data: damaged(data, layers=[{"name": "a", "n_units": 2, "units": [0, 1], "scores": [1]}]),
    "edge without target": lambda data: damaged(data, edges=[{"source": ["conv1", 0], "score": 1, "signed": 1}]),
    "edge from outside": lambda data: damaged(
        data, edges=[{"source": ["conv1", 1], "target": ["conv2", 2], "score": 1, "signed": 1}]
    ),
    "selection is a list": lambda data: damaged(data, selection=[1]),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_is_no_circuit_is_named(how, chosen, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(DAMAGE[how](chosen.to_json()))
    with pytest.raises(FileFormatError, match=r"mine\.json"):
        Circuit.load(path)


def test_a_binary_file_and_a_missing_one_are_named(tmp_path):
    (tmp_path / "photo.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(FileFormatError, match=r"photo\.json.* is not JSON"):
        Circuit.load(tmp_path / "photo.json")
    with pytest.raises(FileFormatError, match=r"no circuit at .*absent"):
        Circuit.load(tmp_path / "absent")


def test_a_circuit_is_read_without_torch(chosen, tmp_path):
    path = chosen.save(tmp_path / "circuit.json")
    program = (
        "import sys; sys.modules['torch'] = None; from viscircuits import Circuit; print(Circuit.load(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(chosen)


# ------------------------------------------------------------------ files


def test_a_failing_write_leaves_the_old_file_and_nothing_else(chosen, tmp_path, monkeypatch):
    path = chosen.save(tmp_path / "circuit.json")
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        chosen.restrict(("conv1",)).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["circuit.json"]


def test_what_cannot_be_json_is_never_half_written(tmp_path):
    bad = Circuit({"a": (0,)}, {"a": 1}, provenance={"model": object()})
    with pytest.raises(TypeError):
        bad.save(tmp_path / "circuit.json")
    assert list(tmp_path.iterdir()) == []


def test_writing_replaces_the_whole_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "deep" / "er" / "note.txt"
    assert write_atomically(path, "a long first version") == path
    write_atomically(path, "höher")
    assert path.read_bytes() == "höher".encode()
