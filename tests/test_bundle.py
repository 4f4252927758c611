"""A result folder is read back as it was saved, whatever lay there before."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image

from viscircuits import bundle as room
from viscircuits.bundle import Bundle, circuits_beside, page_of
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.connections import Connections
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.evaluation import SCHEMA, VERSION, Evaluation
from viscircuits.exemplars import Exemplar
from viscircuits.matrices import AttributionMatrix, Attributions
from viscircuits.notes import load_notes, save_notes, write_note
from viscircuits.probes import Probes
from viscircuits.visualisations import Visualisation

A, B = Unit("block/a:in", 1), Unit("b", 0)
CIRCUIT = Circuit(
    {"block/a:in": (1, 2), "b": (0,)},
    {"block/a:in": 3, "b": 2},
    {"block/a:in": (0.1 + 0.2, 1e-9), "b": (1 / 3,)},  # numbers that are easily rounded
    (Edge(A, B, 1 / 7, -1 / 9),),
    {"objective": 0.1, "refine": "coordinate"},
    {"model": "tiny", "images": {"names": ["ä.png", "</script>.png"]}},
)
NUMBERS = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
ATTRIBUTIONS = Attributions(
    (AttributionMatrix("block/a:in", "b", NUMBERS, -NUMBERS),),
    {"block/a:in": NUMBERS[0], "b": NUMBERS[:, 0]},
    n_images=5,
    provenance={"score": "cla"},
)
EVALUATION = Evaluation({
    "schema": SCHEMA, "version": VERSION, "measure": "accuracy", "baseline": {}, "circuits": [{"name": "circuit"}],
})  # fmt: skip


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (24, 30), colour)


PICTURES = {
    A: [
        Exemplar("x/one.png", 2.5, (0, 0, 24, 30), picture("red")),
        Exemplar("two.png", 0.3, (1, 2, 25, 32), picture("blue"), "dög"),
    ],
    B: [Exemplar("x/one.png", 1 / 3, (5, 5, 29, 35), picture("green"))],
}
CONNECTIONS = Connections(((A, B),), np.full((1, 3, 3), 0.1, np.float32), ("ä.png",), np.ones((1, 1), np.float32))
PROBES = Probes(
    ("x.png",), ("concept",), (picture("red"),), tuple(CIRCUIT), np.array([[0.1, 2.0, 1 / 3]], np.float32),
    (({"index": 3, "label": "dög", "probability": 0.25},),),
)  # fmt: skip
VISUALISATIONS = (
    Visualisation(B, "channel", picture("teal"), 1 / 3, 0.5),
    Visualisation(A, "channel", picture("tan"), 2.0, 0.5, 0.7),
)
NOTES = {"b:0": {"name": "eye", "text": "</script>", "by": "me", "when": "2024-01-01T00:00:00+00:00"}}
FULL = Bundle(
    CIRCUIT, ATTRIBUTIONS, EVALUATION, PICTURES, "dög & <cat>", "viscircuits discover --units '10%'", CONNECTIONS,
    PROBES, VISUALISATIONS, NOTES,
)  # fmt: skip


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder, without the time in circuit.json."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    data = json.loads(found["circuit.json"])
    del data["created"]
    return {**found, "circuit.json": json.dumps(data).encode()}


def same(a: Bundle, b: Bundle) -> bool:
    def plain(bundle: Bundle) -> tuple:
        pictures = {
            unit: [(e.name, e.activation, e.box, e.image.size, e.image.tobytes()) for e in exemplars]
            for unit, exemplars in bundle.pictures.items()
        }
        matrices = bundle.attributions and [
            (m.source, m.target, m.values.tolist(), m.signed.tolist()) for m in bundle.attributions.matrices
        ]
        activity = bundle.attributions and {layer: v.tolist() for layer, v in bundle.attributions.activity.items()}
        edges = bundle.connections and (
            bundle.connections.edges, bundle.connections.kernels.tolist(), bundle.connections.contributions.tolist(),
        )  # fmt: skip
        probes = bundle.probes and (
            bundle.probes.names, bundle.probes.units, bundle.probes.answers, bundle.probes.activations.tolist(),
            [each.tobytes() for each in bundle.probes.pictures],
        )  # fmt: skip
        made = [(v.unit, v.kind, v.objective, v.exemplar_activation, v.image.tobytes()) for v in bundle.visualisations]
        whole = bundle.circuit, matrices, activity, bundle.evaluation, pictures, bundle.title, bundle.command
        return *whole, edges, probes, made, bundle.notes

    return plain(a) == plain(b)


def test_a_folder_is_read_back_as_it_was_saved(tmp_path):
    assert FULL.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert same(Bundle.load(tmp_path / "new" / "folder"), FULL)


ABSENT = {
    "attributions": None, "evaluation": None, "pictures": {}, "connections": None, "probes": None, "visualisations": (),
    "notes": {},
}  # fmt: skip


@pytest.mark.parametrize("missing", ABSENT)
def test_parts_that_are_missing_stay_missing(tmp_path, missing):
    part = replace(FULL, **{missing: ABSENT[missing]})
    part.save(tmp_path)
    assert same(Bundle.load(tmp_path), part)


def test_nothing_of_an_earlier_result_passes_for_part_of_a_later_one(tmp_path):
    replace(FULL, notes={}).save(tmp_path / "used")
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "used" / "pictures" / "mine.png").write_bytes(b"mine")
    fewer = Bundle(CIRCUIT, pictures={B: PICTURES[B]})
    for bundle in (fewer, Bundle(CIRCUIT)):
        bundle.save(tmp_path / "used")
        bundle.save(tmp_path / "fresh")
        assert same(Bundle.load(tmp_path / "used"), bundle)
        left = contents(tmp_path / "used")
        assert left.pop("notes.txt") == b"mine"  # the folder's owner may keep things there
        assert left.pop("pictures/mine.png") == b"mine"
        assert left == contents(tmp_path / "fresh")


def test_saving_what_was_loaded_changes_no_byte_but_the_time(tmp_path):
    FULL.save(tmp_path / "a")
    Bundle.load(tmp_path / "a").save(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_circuit_json_is_a_circuit_with_a_title_a_command_and_the_time(tmp_path):
    before = datetime.now(timezone.utc).replace(microsecond=0)
    FULL.save(tmp_path)
    data = json.loads((tmp_path / "circuit.json").read_text(encoding="utf-8"))
    assert before <= datetime.fromisoformat(data["created"]) <= datetime.now(timezone.utc)
    assert (data["title"], data["command"]) == (FULL.title, FULL.command)
    assert Circuit.load(tmp_path) == CIRCUIT


def test_the_page_in_the_folder_is_the_bundles_page(tmp_path):
    FULL.save(tmp_path)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == FULL.page()


def test_picture_files_are_flat_and_one_a_picture(tmp_path):
    FULL.save(tmp_path)
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"pictures.json", "block%2Fa%3Ain_1_0.png", "block%2Fa%3Ain_1_1.png", "b_0_0.png"}


def test_a_list_of_pictures_cannot_reach_outside_its_folder(tmp_path):
    FULL.save(tmp_path / "folder")
    picture("black").save(tmp_path / "secret.png")
    listed = tmp_path / "folder" / "pictures" / "pictures.json"
    listed.write_text(listed.read_text().replace("b_0_0.png", "../../secret.png"))
    with pytest.raises(FileFormatError, match=r"secret\.png"):
        Bundle.load(tmp_path / "folder")
    Bundle(CIRCUIT).save(tmp_path / "folder")
    assert (tmp_path / "secret.png").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("circuit.json", b"{"),
        ("circuit.json", b"[]"),
        ("evaluation.json", b"\xff"),
        ("attributions.safetensors", b"no tensors"),
        ("pictures/pictures.json", b"{}"),
        ("pictures/pictures.json", b"\xff"),
        ("pictures/b_0_0.png", b"no picture"),
        ("connections.safetensors", b"no tensors"),
        ("probes/probes.json", b"{}"),
        ("probes/0.png", b"no picture"),
        ("visualisations.json", b"{}"),
        ("notes.json", b"[]"),
    ],
)
def test_a_damaged_part_is_an_error_that_names_it(tmp_path, file, content):
    FULL.save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FileFormatError, match=file.split("/")[0].split(".")[0]):
        Bundle.load(tmp_path)


def test_a_folder_without_a_circuit_says_so(tmp_path):
    with pytest.raises(FileFormatError, match=r"no circuit at .*circuit\.json"):
        Bundle.load(tmp_path)


# ------------------------------------------------------------------ notes, and circuits beside


def test_a_note_written_while_a_bundle_was_in_memory_is_not_lost_and_none_is_ever_taken_away(tmp_path):
    FULL.save(tmp_path)
    later = {**NOTES["b:0"], "text": "ear", "when": "2024-01-02T00:00:00+00:00"}
    save_notes(tmp_path, {"b:0": later, "": {**later, "text": "whole"}})
    FULL.save(tmp_path)
    assert {key: note["text"] for key, note in load_notes(tmp_path).items()} == {"b:0": "ear", "": "whole"}
    replace(FULL, notes={}).save(tmp_path)
    assert set(load_notes(tmp_path)) == {"b:0", ""}


@pytest.fixture
def shown(monkeypatch) -> list[dict]:
    """What the page was last asked to show."""
    asked: list[dict] = []
    monkeypatch.setattr(room, "page", lambda circuit, *_, **rest: asked.append({"circuit": circuit, **rest}) or "page")
    return asked


def test_a_note_that_was_taken_away_while_a_bundle_was_in_memory_is_not_brought_back(tmp_path):
    write_note(tmp_path, CIRCUIT, "b:0", text="ear")
    held = replace(FULL, notes=load_notes(tmp_path))
    write_note(tmp_path, CIRCUIT, "b:0")
    held.save(tmp_path)
    assert load_notes(tmp_path) == {}
    assert Bundle.load(tmp_path).notes == {}
    assert "ear" not in json.dumps(page_notes((tmp_path / "index.html").read_text(encoding="utf-8")))


def page_notes(html: str) -> dict:
    """The notes that a page shows."""
    return json.loads(re.search(r'<script[^>]*id="data">(.*?)</script>', html, re.DOTALL)[1])["notes"]


def test_the_page_is_given_every_part_and_no_note_that_fits_no_unit(shown):
    stray = {**NOTES, "c:0": NOTES["b:0"]}
    assert replace(FULL, notes=stray).page() == "page"
    (asked,) = shown
    assert (asked["connections"], asked["probes"]) == (CONNECTIONS, PROBES)
    assert (asked["visualisations"], asked["notes"], asked["comparison"]) == (VISUALISATIONS, NOTES, None)


def results(folder, **weights: str) -> None:
    for name, digest in weights.items():
        circuit = replace(CIRCUIT, provenance={"weights": digest}, edges=())
        Bundle(circuit if name != "less" else circuit.restrict(("b",)), title=name.upper()).save(folder / name)


def test_circuits_in_folders_beside_of_the_same_weights_are_found_by_title(tmp_path):
    results(tmp_path, one="x", two="x", other="y", less="x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "circuit.json").write_text("{")
    circuit = Circuit.load(tmp_path / "one")
    assert list(circuits_beside(tmp_path / "one", circuit)) == ["LESS", "TWO"]
    assert list(circuits_beside(tmp_path / "one", circuit, [tmp_path / "two"])) == ["TWO"]
    with pytest.raises(ViscircuitsError, match="other weights"):
        circuits_beside(tmp_path / "one", circuit, [tmp_path / "other"])
    with pytest.raises(FileFormatError):
        circuits_beside(tmp_path / "one", circuit, [tmp_path / "broken"])


def test_the_page_of_a_folder_says_where_else_its_units_are(tmp_path, shown):
    results(tmp_path, one="x", less="x")
    shown.clear()
    page_of(tmp_path / "one")
    assert shown[0]["elsewhere"] == {"b:0": ["LESS"]}


def test_the_page_of_two_folders_is_of_the_union_of_their_circuits(tmp_path, shown):
    results(tmp_path, one="x", less="x", other="y")
    shown.clear()
    page_of(tmp_path / "one", other=tmp_path / "less", among=[])
    (asked,) = shown
    assert asked["circuit"].units == CIRCUIT.units
    assert asked["comparison"].title == "LESS"
    assert [asked["comparison"].member(unit) for unit in asked["circuit"]] == [1, 1, 3]
    with pytest.warns(UserWarning, match="different weights"):
        page_of(tmp_path / "one", other=tmp_path / "other" / "circuit.json")
