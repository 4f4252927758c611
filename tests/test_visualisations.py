"""Visualisations in a folder, and the command that puts them there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Unit
from viscircuits.cli import app
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.exemplars import Exemplar
from viscircuits.hooks import activations
from viscircuits.images import batches, open_images
from viscircuits.models import load_model
from viscircuits.visualisations import LISTING, Visualisation, load_visualisations, save_visualisations
from viscircuits.visualising import parse_units

MODEL = "torchvision:squeezenet1_1"
QUICK = ("--steps", "2", "--size", "32")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8))


MADE = [
    Visualisation(Unit("block/a:in", 3), "channel, 1 of 2", picture(0), 1 / 3, 0.1 + 0.2, 7.5),
    Visualisation(Unit("block/a:in", 3), "channel, 2 of 2", picture(1), -1e-9, 6.0, 7.5),
    Visualisation(Unit("b", 0), "channel", picture(2), 0.5, 1.5),
    Visualisation(Unit("block-a-in", 3), "channel", picture(3), 0.5, 1.5),  # must not overwrite that of block/a:in
]


def run(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_they_are_read_back_as_they_were_saved(tmp_path):
    save_visualisations(tmp_path, MADE)
    found = load_visualisations(tmp_path)
    assert [(e.unit, e.kind, e.objective, e.activation, e.exemplar_activation) for e in found] == [
        (e.unit, e.kind, e.objective, e.activation, e.exemplar_activation) for e in MADE
    ]
    assert [each.image.tobytes() for each in found] == [each.image.tobytes() for each in MADE]


def test_saving_takes_away_what_was_there_and_nothing_else(tmp_path):
    save_visualisations(tmp_path, MADE)
    (tmp_path / "visualisations" / "mine.png").write_bytes(b"kept")
    save_visualisations(tmp_path, MADE[2:])
    assert set(contents(tmp_path)) == {
        LISTING,
        "visualisations/b_0_0.png",
        "visualisations/block-a-in_3_0.png",
        "visualisations/mine.png",
    }
    save_visualisations(tmp_path, [])
    assert load_visualisations(tmp_path) == []
    assert set(contents(tmp_path)) == {"visualisations/mine.png"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["pictures"][0].pop("kind"),
        lambda data: data["pictures"][0].update(file="visualisations/gone.png"),
        lambda data: data.update(schema="other"),
        lambda data: data["pictures"][0].update(objective="much"),
    ],
)
def test_damage_is_said(tmp_path, damage):
    path = save_visualisations(tmp_path, MADE)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match="make them anew with `viscircuits render`"):
        load_visualisations(tmp_path)


def test_no_listing_leads_out_of_its_folder(tmp_path):
    picture(5).save(tmp_path / "secret.png")
    path = save_visualisations(tmp_path / "result", MADE[2:])
    path.write_text(path.read_text().replace("visualisations/b_0_0.png", "../secret.png"))
    with pytest.raises(FileFormatError):
        load_visualisations(tmp_path / "result")
    save_visualisations(tmp_path / "result", [])
    assert (tmp_path / "secret.png").exists()


def test_they_are_read_without_torch():
    program = "import sys, viscircuits.visualisations; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# ------------------------------------------------------------------ the command


def test_units_are_read_from_the_command_line():
    assert parse_units("features.3:7, blocks.1.act:in:0") == [Unit("features.3", 7), Unit("blocks.1.act:in", 0)]
    for text in ("features.3", "features.3:x", ":3", ",", "features.3:-1"):
        with pytest.raises(ViscircuitsError, match="LAYER:INDEX"):
            parse_units(text)


def test_render_pictures_a_models_units(tmp_path):
    units = "features.3:0,features.4:2"
    options = ("--weights", "none", "--negative", "--diversity", "2", "--out", tmp_path, *QUICK)
    code, out, err = run("render", MODEL, units, *options)
    assert code == 0, err
    found = load_visualisations(tmp_path)
    assert [str(each.unit) for each in found] == ["features.3:0"] * 4 + ["features.4:2"] * 4
    assert [each.kind for each in found[:4]] == [
        "channel, 1 of 2", "channel, 2 of 2", "channel, negative, 1 of 2", "channel, negative, 2 of 2",
    ]  # fmt: skip
    assert all(each.image.size == (32, 32) and each.exemplar_activation is None for each in found)
    rows = [line for line in out.splitlines() if line.startswith("features")]
    assert len(rows) == 8 and f"{found[0].activation:.4g}" in rows[0]
    assert run("render", MODEL, units, *options, "--json")[1] == (tmp_path / LISTING).read_text()


def test_render_sets_the_strongest_image_beside_the_picture(tmp_path):
    code, _, err = run(
        "render",
        MODEL,
        "features.3:9",
        "--weights",
        "none",
        "--images",
        "render:grating,n=2",
        "--out",
        tmp_path,
        *QUICK,
    )
    assert code == 0, err
    (found,) = load_visualisations(tmp_path)
    spec = load_model(MODEL, weights="none")
    (batch,) = batches(open_images("render:grating,n=2"), spec.transform, 2)
    with torch.no_grad():
        strongest = activations(spec.model, ["features.3"], batch.images)["features.3"][:, 9].max()
    assert found.exemplar_activation == pytest.approx(float(strongest), rel=1e-4)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """A result folder with two units in each of two layers, and an exemplar of one."""
    folder = tmp_path_factory.mktemp("result")
    spec = load_model(MODEL, weights="none")
    circuit = Circuit(
        {"features.3": (1, 5), "features.4": (0, 2)},
        {"features.3": 128, "features.4": 128},
        {"features.3": (0.5, 0.9), "features.4": (0.8, 0.1)},
        provenance={"model": MODEL, "weights_from": "none", "weights": spec.weights_digest()},
    )
    shots = [Exemplar("a.png", 0.75, (0, 0, 20, 20), picture(0))]
    Bundle(circuit, pictures={Unit("features.3", 5): shots}).save(folder)
    return folder


def test_render_pictures_the_strongest_units_of_a_result(result):
    (result / "index.html").unlink()
    code, out, err = run("render", result, "--per-layer", "1", *QUICK)
    assert code == 0, err
    found = load_visualisations(result)
    assert [(str(each.unit), each.exemplar_activation) for each in found] == [
        ("features.3:5", 0.75),
        ("features.4:0", None),
    ]
    assert (result / "index.html").read_text() == Bundle.load(result).page()
    assert str(result / "index.html") in out


def test_render_goes_on_from_what_is_finished(result, monkeypatch):
    run("render", result, "--per-layer", "1", *QUICK)
    before = contents(result)
    monkeypatch.setattr("viscircuits.featurevis.render._optimise", None)  # nothing is left to optimise
    code, _, err = run("render", result, "--per-layer", "1", *QUICK)
    assert code == 0, err
    assert contents(result) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no-such-folder",), "is no folder; to picture a model's units, name them"),
        ((MODEL, "features.3:999", "--weights", "none"), "layer 'features.3' has units 0 to 127, asked for 999"),
        ((MODEL, "features.99:0", "--weights", "none"), "no layer 'features.99'"),
        ((MODEL, "features.3:0", "--weights", "none", "--size", "3"), "size is a number from 16, got 3"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    code, _, err = run("render", *words, *(("--out", tmp_path) if len(words) > 1 else ()))
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1
