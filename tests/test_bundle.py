"""A result folder is read back as it was saved, whatever lay there before."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone

import pytest
import torch
from PIL import Image

from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import FileFormatError
from viscircuits.evaluation import SCHEMA, VERSION, Evaluation
from viscircuits.exemplars import Exemplar
from viscircuits.matrices import AttributionMatrix, Attributions

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
        Exemplar("two.png", 0.3, (1, 2, 25, 32), picture("blue")),
    ],
    B: [Exemplar("x/one.png", 1 / 3, (5, 5, 29, 35), picture("green"))],
}
FULL = Bundle(CIRCUIT, ATTRIBUTIONS, EVALUATION, PICTURES, "dög & <cat>", "viscircuits discover --units '10%'")


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
        return bundle.circuit, matrices, activity, bundle.evaluation, pictures, bundle.title, bundle.command

    return plain(a) == plain(b)


def test_a_folder_is_read_back_as_it_was_saved(tmp_path):
    assert FULL.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert same(Bundle.load(tmp_path / "new" / "folder"), FULL)


@pytest.mark.parametrize("missing", ["attributions", "evaluation", "pictures"])
def test_parts_that_are_missing_stay_missing(tmp_path, missing):
    part = replace(FULL, **{missing: {} if missing == "pictures" else None})
    part.save(tmp_path)
    assert same(Bundle.load(tmp_path), part)


def test_nothing_of_an_earlier_result_passes_for_part_of_a_later_one(tmp_path):
    FULL.save(tmp_path / "used")
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
    assert names == {"pictures.json", "block-a-in_1_0.png", "block-a-in_1_1.png", "b_0_0.png"}


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
