"""The command line: what it prints, what it exits with, and what it says to a mistake."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from viscircuits import cli, discovery
from viscircuits.ablation import ABLATIONS
from viscircuits.budget import ENGINES
from viscircuits.circuit import Circuit
from viscircuits.cli import app
from viscircuits.exports import FORMATS, from_graphml
from viscircuits.matrices import CONTRASTS
from viscircuits.scores.formulas import SCORES, SUMMARIES
from viscircuits.selection import REFINEMENTS

MODEL = ("torchvision:squeezenet1_1", "--weights", "none")
LAYERS = ("--layers", "features.11,features.12")
QUICK = ("--draws", "1", "--pictures", "1", "--units", "4", "--bootstrap", "3")


def run(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """A result folder that the command line made."""
    folder = tmp_path_factory.mktemp("found") / "grating"
    code, _, err = run(
        "discover", *MODEL, "render:grating,n=4", "--reference", "render:colour,n=4", *LAYERS, *QUICK, "--out", folder
    )
    assert code == 0, err
    return folder


def test_discover_writes_the_whole_folder(found):
    names = {path.name for path in found.iterdir()}
    assert names >= {"circuit.json", "attributions.safetensors", "evaluation.json", "pictures", "index.html"}
    circuit = Circuit.load(found)
    assert {layer: len(units) for layer, units in circuit.units.items()} == {"features.11": 4, "features.12": 4}


def test_layers_marks_the_default_ones_and_counts_units():
    code, out, _ = run("layers", "torchvision:squeezenet1_1", "--weights", "none")
    assert code == 0
    fire = next(line for line in out.splitlines() if " features.12 " in line)
    assert fire.startswith("*")
    assert fire.split()[1:] == ["features.12", "Fire", "512×13×13", "1", "512"]
    assert not next(line for line in out.splitlines() if "features.12.squeeze " in line).startswith("*")


def test_layers_as_json_says_the_same():
    code, out, _ = run("layers", "torchvision:squeezenet1_1", "--weights", "none", "--json")
    rows = {row["layer"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["features.12"] == {
        "layer": "features.12", "type": "Fire", "shape": [512, 13, 13], "unit_axis": 1, "n_units": 512, "default": True,
    }  # fmt: skip


def test_evaluate_renews_the_folder_under_another_ablation(found):
    code, out, err = run(
        "evaluate", found, "render:grating,n=3,seed=7", "--others", "render:colour,n=3,seed=7", "--ablation", "mean",
        "--draws", "1", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["evaluation"]["ablation"] == "mean"
    assert json.loads((found / "evaluation.json").read_text())["images"]["concept"]["n"] == 3


def test_edit_writes_weights_that_load_by_address(found, tmp_path):
    from viscircuits.ablation import ablate
    from viscircuits.models import load_model

    out = tmp_path / "edited.safetensors"
    code, text, err = run("edit", found, "--out", out, "--ablation", "zero")
    assert code == 0, err
    assert str(out) in text
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plain, edited = load_model(MODEL[0], weights="none"), load_model(MODEL[0], weights=out)
    with torch.no_grad(), ablate(plain, Circuit.load(found)):
        assert torch.allclose(edited.model(images), plain.model(images), atol=1e-5)
    assert edited.layers == plain.layers


def test_view_draws_the_page_anew(found):
    (found / "index.html").unlink()
    code, out, _ = run("view", found, "--no-browser")
    assert code == 0
    assert Path(out.strip()).read_text().startswith("<!doctype html>")


def test_view_with_another_circuit_writes_a_page_of_its_own(found):
    before = (found / "index.html").read_bytes()
    code, out, err = run("view", found, "--with", found, "--no-browser")
    assert (code, Path(out.strip()).name) == (0, "compared.html"), err
    assert (found / "index.html").read_bytes() == before


def test_export_writes_what_another_tool_reads(found, tmp_path):
    pytest.importorskip("networkx")
    code, out, err = run("export", found, "--format", "graphml", "--out", tmp_path / "c.graphml", "--json")
    assert code == 0, err
    (file,) = json.loads(out)["files"]
    assert from_graphml(Path(file).read_text(encoding="utf-8")) == Circuit.load(found)
    code, out, err = run("export", found, "--format", "csv", "--out", tmp_path / "c.csv")
    assert code == 0, err
    assert out.count("8 units") == 2
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + len(Circuit.load(found).edges)
    assert run("export", found, "--format", "csv")[0] == 2


def test_compare_of_a_circuit_with_itself_is_total_and_says_what_chance_is(found):
    code, out, _ = run("compare", found, found, "--json")
    assert code == 0
    assert [(row["jaccard"], row["size_a"]) for row in json.loads(out)] == [(1.0, 4), (1.0, 4)]
    assert all(0 < row["chance"] < 0.1 for row in json.loads(out))


@pytest.mark.parametrize(
    "command", ["layers", "discover", "attribute", "evaluate", "edit", "view", "compare", "export", "demo"]
)
def test_every_command_has_help_with_an_example(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"viscircuits {command}" in out.split("Example")[1]


def test_the_choices_of_the_command_line_are_the_registries():
    for choices, registry in (
        (cli.Score, SCORES), (cli.Summary, SUMMARIES), (cli.Contrast, CONTRASTS), (cli.Refine, REFINEMENTS),
        (cli.Ablation, ABLATIONS), (cli.Engine, ENGINES), (cli.Format, FORMATS),
    ):  # fmt: skip
        assert set(get_args(choices)) == set(registry)


def test_the_types_of_the_command_line_are_torchs_own():
    for name in get_args(cli.Dtype):
        assert cli._dtype(name) is getattr(torch, name)
    assert cli._dtype(None) is None


def test_the_version_is_that_of_the_package():
    assert run("--version") == (0, version("viscircuits") + "\n", "")


def test_attribute_writes_matrices_that_discover_goes_on_from(tmp_path, monkeypatch):
    words = (*MODEL, "render:grating,n=4", *LAYERS, "--bootstrap", "3", "--out", tmp_path)
    code, out, err = run("attribute", *words, "--find-with", "2", "-v")
    assert code == 0, err
    assert out == f"{tmp_path / 'attributions.safetensors'}: 2 images, 2 layers\n"
    head, row = (line.split() for line in err.splitlines()[-2:])
    assert head == ["from", "to", "engine", "left", "to", "autograd", "seconds"]
    assert row[:3] == ["concept", "features.11", "features.12"] and float(row[-1]) > 0
    monkeypatch.setattr(discovery, "attribute", lambda *_, **__: pytest.fail("attributed again"))
    code, out, err = run("discover", *words, "--find-with", "2", "--draws", "1", "--pictures", "0", "--units", "4")
    assert code == 0, err
    assert "3 bootstrap draws: circuits from as many other images would overlap by about" in out


def test_until_stable_says_how_many_images_were_needed(tmp_path):
    code, out, err = run(
        "discover", *MODEL, "render:grating,n=30", *LAYERS, *QUICK, "--until-stable", "0.01", "--out", tmp_path
    )
    assert code == 0, err
    assert "stable after 12 images (overlap 0.01 at 2 looks in a row)" in out


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(discovery, "attribute", interrupt)
    monkeypatch.setattr("sys.argv", ["viscircuits", "discover", "two words"])
    code, _, err = run("discover", *MODEL, "render:grating,n=4", *LAYERS, *QUICK, "--out", tmp_path)
    assert code == 130
    assert err.splitlines()[-1].endswith("to go on from what is finished: viscircuits discover 'two words'")


def test_a_rank_without_torchrun_silences_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    code, out, _ = run("attribute", *MODEL, "render:grating,n=2", *LAYERS, "--bootstrap", "0", "--out", tmp_path)
    assert code == 0 and "2 images" in out


def test_what_to_repeat_is_what_torchrun_was_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["viscircuits", "attribute", "a b"])
    assert cli._command() == "viscircuits attribute 'a b'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cli._command() == "torchrun --nproc-per-node 3 -m viscircuits attribute 'a b'"


def test_workers_but_the_first_print_nothing_but_their_mistakes(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")  # without torchrun's other words there is no team to join
    monkeypatch.setattr(cli, "_is_first", lambda: False)
    monkeypatch.setattr(discovery, "is_first", lambda: False)
    words = ("attribute", *MODEL, "render:grating,n=2", *LAYERS, "--bootstrap", "0", "-v")
    assert run(*words, "--out", tmp_path) == (0, "", "")
    assert not list(tmp_path.iterdir())
    code, out, err = run(*words, "--memory", "much", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("viscircuits: worker 1: ")


# ------------------------------------------------------------------ mistakes


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, found) -> Path:
    """A folder of everything that can be given by mistake."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("empty", "broken", "mixed", "one"):
        (folder / name).mkdir()
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (folder / "broken" / name).write_bytes(b"no picture")
    (folder / "mixed" / "bad.jpg").write_bytes(b"no picture either")
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 10, 10)).save(folder / "mixed" / f"{i}.png")
    Image.new("RGB", (40, 40)).save(folder / "one" / "only.png")
    (folder / "list.txt").write_text("nowhere.png\nneither.png\n")
    (folder / "damaged.tar").write_bytes(b"x" * 2000)
    (folder / "weights.pt").write_text("these are no weights")
    save_file({"other.weight": torch.zeros(3)}, folder / "other.safetensors")
    (folder / "labels.csv").write_text("nobody.png,tench\n")
    (folder / "file").write_text("a file, not a folder")
    for name, change in (("old", {"version": 99}), ("foreign", {"schema": "someone/else"})):
        (folder / name).mkdir()
        (folder / name / "circuit.json").write_text(
            json.dumps({**json.loads((found / "circuit.json").read_text()), **change})
        )
    (folder / "damaged").mkdir()
    (folder / "damaged" / "circuit.json").write_text('{"schema": "viscircuits/circuit", "version": 1, "layers": [')
    Circuit({"x": (0,)}, {"x": 3}).save(folder / "elsewhere.json")
    return folder


def discover(*more: str, images: str = "render:grating,n=4", layers: tuple[str, ...] = LAYERS) -> tuple[str, ...]:
    return ("discover", *MODEL, images, *layers, *QUICK, "--out", "{out}", *more)


MISTAKES = [
    # words, and what the one line must name
    (("layers", "lite9"), "lite9"),
    (("layers", "keras:resnet50"), "keras:resnet50"),
    (("layers", "torchvision:resnet17", "--weights", "none"), "resnet17"),
    (("layers", "timm:resnet_500x", "--weights", "none"), "resnet_500x"),
    (("layers", "open_clip:RN5000", "--weights", "none"), "RN5000"),
    (("layers", "torchvision:squeezenet1_1", "--weights", "{wrong}/no.pt"), "no.pt"),
    (("layers", "torchvision:squeezenet1_1", "--weights", "{wrong}/weights.pt"), "weights.pt"),
    (("layers", "torchvision:squeezenet1_1", "--weights", "{wrong}/other.safetensors"), "other.weight"),
    (discover(images="{wrong}/nowhere"), "nowhere"),
    (discover(images="{wrong}/empty"), "empty"),
    (discover(images="{wrong}/broken", layers=LAYERS), "broken"),
    (discover(images="{wrong}/list.txt"), "nowhere.png"),
    (discover(images="{wrong}/one"), "at least 2"),
    (discover("--find-with", "1", images="{wrong}/damaged.tar"), "damaged.tar"),
    (discover("--strict", images="{wrong}/mixed"), "bad.jpg"),
    (discover(images="render:cube"), "render:cube"),
    (discover(images="render:grating,colour=nocolour"), "nocolour"),
    (discover(images="render:grating,hue=3"), "hue"),
    (discover(layers=("--layers", "features.11,features.99")), "features.99"),
    (discover(layers=("--layers", "features.11,features.11")), "features.11"),
    (discover(layers=("--layers", "features.12")), "at least two layers"),
    (discover(layers=("--layers", "features.12.expand1x1,features.12.expand3x3")), "no path"),
    (discover("--units", "0"), "0"),
    (discover("--units", "ten"), "'ten'"),
    (discover("--units", "150%"), "1.5"),
    (discover("--units", "5000"), "5000"),
    (discover("--score", "magic"), "magic"),
    (discover("--refine", "magic"), "magic"),
    (discover("--contrast", "ratio"), "--reference"),
    (discover("--reference", "render:grating,n=4"), "concept's own"),
    (discover(layers=("--layers", ",")), "--layers"),
    (("edit", "{found}", "--out", "{out}.pth"), ".pth"),
    (discover("--ablation", "mean"), "--reference"),
    (discover("--find-with", "4"), "4"),
    (discover("--batch-size", "0"), "batch size"),
    (discover("--draws", "0"), "draws"),
    (discover("--engine", "steam"), "steam"),
    (discover("--dtype", "int8"), "int8"),
    (discover("--memory", "much"), "much"),
    (discover("--memory", "1K"), "--memory"),
    (discover("--bootstrap", "-1"), "bootstrap"),
    (discover("--bootstrap", "some"), "--bootstrap"),
    (discover("--until-stable", "1.5"), "1.5"),
    (discover("--until-stable", "soon"), "--until-stable"),
    (discover("--until-stable", "0.9", "--bootstrap", "1"), "--bootstrap"),
    (("attribute", *MODEL, "{wrong}/nowhere", "--out", "{out}"), "nowhere"),
    (("attribute", *MODEL, "render:grating,n=4", *LAYERS), "--out"),
    (("attribute", *MODEL, "render:grating,n=4", *LAYERS, "--out", "{wrong}/file"), "file"),
    (("attribute", *MODEL, "render:grating,n=4", *LAYERS, "--find-with", "4", "--out", "{out}"), "4"),
    (("attribute", *MODEL, "render:grating,n=4", *LAYERS, "--batch-size", "0", "--out", "{out}"), "batch size"),
    (discover("--labels", "{wrong}/nolabels.csv"), "nolabels.csv"),
    (discover("--labels", "{wrong}/labels.csv"), "nobody.png"),
    (discover("--test", "render:grating,n=4"), "used to find"),
    (("discover", *MODEL, "render:grating,n=4", *LAYERS, *QUICK, "--out", "{wrong}/file"), "file"),
    (("evaluate", "{wrong}/nowhere", "render:grating"), "nowhere"),
    (("evaluate", "{found}", "render:grating,n=2,seed=9", "--draws", "0"), "draws"),
    (("edit", "{found}", "--out", "{out}.safetensors", "--ablation", "resample"), "resample"),
    (("edit", "{found}", "--out", "{out}.safetensors", "--weights", "{wrong}/no.pt"), "no.pt"),
    (("view", "{wrong}/old", "--no-browser"), "99"),
    (("view", "{wrong}/foreign", "--no-browser"), "foreign"),
    (("view", "{wrong}/damaged", "--no-browser"), "damaged"),
    (("compare", "{found}", "{wrong}/elsewhere.json"), "features.11"),
]


@pytest.mark.parametrize(("words", "culprit"), MISTAKES, ids=[" ".join(words)[:70] for words, _ in MISTAKES])
def test_a_mistake_exits_with_2_and_one_line_that_names_the_culprit(words, culprit, wrong, found, tmp_path):
    filled = [word.format(wrong=wrong, found=found, out=tmp_path / "out") for word in words]
    code, out, err = run(*filled)
    assert code == 2, (code, out, err)
    assert culprit in err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("viscircuits: ")]
    assert len(lines) == 1 or "Usage" in err  # what the argument parser itself refuses
    if lines:
        assert culprit in lines[0]
