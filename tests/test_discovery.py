"""From images to a result folder and on, with a tiny network and rendered concepts."""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from viscircuits import discovery, evaluation, wrap
from viscircuits.ablation import ablate, measure
from viscircuits.attribution import attribute
from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit
from viscircuits.discovery import attribute_images, concept_name, discover, edit_from, evaluate_again, strongest
from viscircuits.errors import ImageError, LayerError, ModelError, ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.images import batches, open_images
from viscircuits.models import ModelSpec, load_state
from viscircuits.notes import write_note

GRATING, COLOUR = "render:grating,size=32,n=6", "render:colour,size=32,n=6"
LAYERS = ("1", "3", "5")
OPTIONS = {
    "reference": COLOUR, "units": 2, "draws": 2, "n_pictures": 1, "edge_fractions": (1.0,),
    "bootstrap": 4, "command": "viscircuits discover tiny render:grating",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "N_BOOTSTRAP", 20)
        yield


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((24, 24)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(24, 24, 3).permute(2, 0, 1).float() / 255 - 0.5


def tiny(seed: int = 0) -> ModelSpec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
        )  # fmt: skip
    return wrap(net.eval(), to_tensor, LAYERS, address="tiny")


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without the time in circuit.json and the seconds that attribution took."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    data = json.loads(found["circuit.json"])
    del data["created"]
    timeless = {name: without_seconds(content) for name, content in found.items() if name.endswith(".safetensors")}
    return {**found, **timeless, "circuit.json": json.dumps(data).encode()}


def without_seconds(content: bytes) -> bytes:
    """A safetensors file's header and body, without what the header says of time."""
    end = 8 + int.from_bytes(content[:8], "little")
    return re.sub(rb'\\"seconds\\": [\d.e-]+', b"", content[8:end]).rstrip() + content[end:]


def shown(bundle: Bundle) -> dict:
    return {
        unit: [(e.name, e.activation, e.box, e.image.tobytes()) for e in exemplars]
        for unit, exemplars in bundle.pictures.items()
        if exemplars
    }


def refuse(*args, **options):
    raise AssertionError("attribution was computed")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Bundle]:
    """A result folder and the bundle it came from."""
    folder = tmp_path_factory.mktemp("run") / "grating"
    return folder, discover(tiny(), GRATING, folder, **OPTIONS)


@pytest.fixture
def unevaluated(run, monkeypatch) -> None:
    """For tests of something else: any circuit's evaluation is the first run's."""
    monkeypatch.setattr(discovery, "evaluate", lambda *args, **options: run[1].evaluation)


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A copy of the result folder that a test may change."""
    for name, content in {str(p.relative_to(run[0])): p.read_bytes() for p in run[0].rglob("*") if p.is_file()}.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    return tmp_path / "copy"


@pytest.fixture
def photographs_of_noise(tmp_path) -> Path:
    """A folder of four photographs and two files that are none."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "photos" / "notes.txt").write_text("no picture either")
    return tmp_path / "photos"


def shards(path: Path, n: int) -> Path:
    """A tar of `n` pictures, which is read as a stream."""
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (40 * i, 100, 200 - 40 * i)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{i:03d}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    return path


# ------------------------------------------------------------------ the folder


def test_a_run_leaves_the_whole_folder_and_it_reads_back_as_what_was_found(run):
    folder, found = run
    assert {path.name for path in folder.iterdir()} == {
        "circuit.json", "attributions.safetensors", "attributions.draws.safetensors", "evaluation.json", "pictures",
        "connections.safetensors", "probes", "index.html",
    }  # fmt: skip
    loaded = Bundle.load(folder)
    assert loaded.circuit == found.circuit
    assert loaded.evaluation == found.evaluation
    assert (loaded.title, loaded.command) == ("grating", OPTIONS["command"])
    for mine, theirs in zip(loaded.attributions.matrices, found.attributions.matrices, strict=True):
        assert torch.equal(mine.values, theirs.values) and torch.equal(mine.signed, theirs.signed)
    assert shown(loaded) == shown(found) != {}
    assert loaded.pictures.keys() <= set(found.circuit)
    assert loaded.connections.edges == found.connections.edges
    assert (loaded.connections.kernels == found.connections.kernels).all()
    assert (loaded.probes.activations == found.probes.activations).all()
    assert (loaded.probes.names, loaded.probes.answers) == (found.probes.names, found.probes.answers)
    assert loaded.page() == found.page() == (folder / "index.html").read_text(encoding="utf-8")


def test_edges_are_looked_into_on_the_images_that_found_them_and_probes_are_of_those_that_test(run):
    circuit, connections, probes = run[1].circuit, run[1].connections, run[1].probes
    signed = {(edge.source, edge.target): edge.signed for edge in circuit.edges}
    means = connections.contributions.mean(1)
    assert {edge: pytest.approx(mean, abs=1e-5) for edge, mean in zip(connections.edges, means, strict=True)} == signed
    assert set(connections.images) == set(circuit.provenance["images"]["names"])
    tested = run[1].evaluation.data["images"]
    assert probes.names == (*tested["concept"]["names"], *tested["others"]["names"])
    assert probes.kinds == ("concept",) * 3 + ("reference",) * 3
    spec = tiny()
    images = torch.stack([to_tensor(picture) for picture in probes.pictures])
    with torch.no_grad():
        peaks = spec.model[:2](images).flatten(2).amax(2)[:, circuit.units["1"]]
    assert torch.allclose(torch.from_numpy(probes.activations[:, : len(circuit.units["1"])]), peaks, atol=1e-6)


def test_a_rerun_keeps_what_people_wrote(folder, unevaluated):
    unit = next(iter(Bundle.load(folder).circuit))
    write_note(folder, Bundle.load(folder).circuit, str(unit), text="bars")
    discover(tiny(), GRATING, folder, **{**OPTIONS, "units": 1})
    assert Bundle.load(folder).notes[str(unit)]["text"] == "bars"


def test_the_same_inputs_give_the_same_bytes_but_for_the_time(run, tmp_path):
    discover(tiny(), GRATING, tmp_path, **OPTIONS)
    assert bytes_of(tmp_path) == bytes_of(run[0])


def test_the_page_asks_nothing_of_the_network(run):
    page = (run[0] / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//|\bfetch\(|XMLHttpRequest|WebSocket", page)
    assert "default-src 'none'" in page and "connect-src" not in page  # so no module of it could either


def test_without_a_folder_nothing_is_written(run, tmp_path, monkeypatch, unevaluated):
    monkeypatch.chdir(tmp_path)
    found = discover(tiny(), GRATING, **OPTIONS)
    assert found.circuit == run[1].circuit
    assert not list(tmp_path.iterdir())


def test_the_circuit_says_what_made_it(run):
    circuit, spec = run[1].circuit, tiny()
    made = circuit.provenance
    assert made["model"] == "tiny"
    assert made["weights"] == spec.weights_digest()
    assert made["layers"] == list(LAYERS) == list(circuit.layers)
    assert (made["score"], made["summary"], made["ablation"], made["seed"]) == ("cla", "norm", "zero", 0)
    assert made["images"]["n"] == len(made["images"]["names"]) == len(set(made["images"]["digests"])) == 3
    assert made["versions"]["torch"] == version("torch")
    assert all(len(units) == 2 for units in circuit.units.values())


def test_the_images_that_test_are_not_those_that_found(run):
    circuit, tested = run[1].circuit, run[1].evaluation.data["images"]
    assert (tested["concept"]["n"], tested["others"]["n"]) == (3, 3)
    assert (tested["concept"]["left_out"], tested["others"]["left_out"]) == (0, 0)
    assert not set(tested["concept"]["digests"]) & set(circuit.provenance["images"]["digests"])
    assert not set(tested["others"]["digests"]) & set(circuit.provenance["reference"]["digests"])


def test_test_images_of_their_own_leave_every_image_to_find_with():
    test, others = "render:curve,size=32,n=2", "render:circle,size=32,n=3"
    found = discover(tiny(), GRATING, test=test, others=others, **{**OPTIONS, "n_pictures": 0})
    assert found.circuit.provenance["images"]["n"] == 6
    assert {name: each["n"] for name, each in found.evaluation.data["images"].items()} == {"concept": 2, "others": 3}
    assert not found.pictures


def test_others_need_no_reference():
    found = discover(tiny(), GRATING, others=COLOUR, **{**OPTIONS, "reference": None, "n_pictures": 0})
    assert "reference" not in found.circuit.provenance
    assert found.evaluation.data["images"]["others"]["n"] == 6
    assert found.attributions.reference is None


def test_the_network_is_left_as_it_was(run):
    spec = tiny()
    before = {name: value.clone() for name, value in spec.model.state_dict().items()}
    discover(spec, GRATING, **OPTIONS)
    assert count_hooks(spec.model) == 0
    assert all(torch.equal(value, before[name]) for name, value in spec.model.state_dict().items())


# ------------------------------------------------------------------ going on where a run stood


@pytest.mark.parametrize(
    "change",
    [{"units": 3}, {"refine": "paper"}, {"contrast": "none"}, {"ablation": "mean"}, {"title": "stripes"}],
    ids=lambda change: " ".join(change),
)
def test_a_run_with_other_choices_takes_the_attributions_from_its_folder(folder, run, change, monkeypatch, unevaluated):
    monkeypatch.setattr(discovery, "attribute", refuse)
    found = discover(tiny(), GRATING, folder, **{**OPTIONS, **change})
    assert (folder / "attributions.safetensors").read_bytes() == (run[0] / "attributions.safetensors").read_bytes()
    assert (found.circuit, found.title) != (run[1].circuit, run[1].title)


@pytest.mark.parametrize(
    "change",
    [
        {"score": "signed"},
        {"summary": "mean"},
        {"layers": ["1", "5"]},
        {"find_with": 2},
        {"seed": 1},
        {"reference": None},
    ],
    ids=lambda change: " ".join(change),
)
def test_attributions_of_something_else_are_not_taken(folder, change, monkeypatch):
    monkeypatch.setattr(discovery, "attribute", refuse)
    with pytest.raises(AssertionError, match="was computed"):
        discover(tiny(), GRATING, folder, **{**OPTIONS, **change})


def test_other_attributions_in_the_folder_are_not_replaced_in_silence(folder, unevaluated):
    with pytest.warns(UserWarning, match=r"something else \(score\): attributing anew"):
        discover(tiny(), GRATING, folder, **{**OPTIONS, "score": "gradient"})


@pytest.mark.parametrize("what", ["weights", "images", "damaged"])
def test_attributions_of_another_network_or_concept_or_damaged_ones_are_not_taken(folder, what, monkeypatch):
    if what == "damaged":
        for file in folder.glob("*.safetensors"):
            file.write_bytes(b"half a file")
    monkeypatch.setattr(discovery, "attribute", refuse)
    images = "render:curve,size=32,n=6" if what == "images" else GRATING
    with pytest.raises(AssertionError, match="was computed"):
        discover(tiny(seed=1 if what == "weights" else 0), images, folder, **OPTIONS)


def test_a_run_that_was_killed_goes_on_from_its_attributions_and_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
    def kill(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(discovery, "evaluate", kill)
        with pytest.raises(KeyboardInterrupt):
            discover(tiny(), GRATING, tmp_path, **OPTIONS)
    monkeypatch.setattr(discovery, "attribute", refuse)
    discover(tiny(), GRATING, tmp_path, **OPTIONS)
    assert bytes_of(tmp_path) == bytes_of(run[0])


def test_exemplars_say_what_their_images_show_as_far_as_labels_do(tmp_path):
    spec = replace(tiny(), classes=tuple((name,) for name in ("tabby cat", "dog", "ant", "bee")))
    for name, source in (("cats", GRATING), ("rest", COLOUR)):
        for i, each in enumerate(open_images(source)):
            path = tmp_path / name / ("tabby_cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            each.image.save(path)
    given = {**OPTIONS, "reference": tmp_path / "rest", "bootstrap": 0}
    discover(spec, tmp_path / "cats", tmp_path / "out", **given)
    shots = [shot for mine in Bundle.load(tmp_path / "out").pictures.values() for shot in mine]
    assert shots and {(shot.name.split("/")[0], shot.shows) for shot in shots} <= {
        ("tabby_cat", "tabby cat"), ("dog", "dog"),
    }  # fmt: skip
    untold = discover(spec, tmp_path / "cats", labels=None, **given)
    assert {shot.shows for mine in untold.pictures.values() for shot in mine} == {""}


def test_a_rerun_with_fewer_units_and_no_pictures_leaves_none_of_the_old_ones(folder, unevaluated):
    discover(tiny(), GRATING, folder, **{**OPTIONS, "units": 1, "n_pictures": 0})
    left = Bundle.load(folder)
    assert (left.pictures, left.connections, left.probes) == ({}, None, None)
    assert not list(folder.glob("probes/*"))
    assert not list(folder.rglob("*.png"))


def test_without_its_draws_a_folder_serves_a_run_that_asks_for_none(folder, run, monkeypatch, unevaluated):
    (folder / "attributions.draws.safetensors").unlink()
    monkeypatch.setattr(discovery, "attribute", refuse)
    found = discover(tiny(), GRATING, folder, **{**OPTIONS, "bootstrap": 0})
    assert found.circuit.units == run[1].circuit.units
    assert (found.circuit.chosen, found.circuit.edges[0].chosen) == ({}, None)
    with pytest.warns(UserWarning, match="bootstrap draws"), pytest.raises(AssertionError, match="was computed"):
        discover(tiny(), GRATING, folder, **OPTIONS)


def test_large_draws_are_kept_for_a_discovery_to_come_but_not_after_it(tmp_path, monkeypatch, unevaluated):
    monkeypatch.setattr(discovery, "MOST_KEPT", 100)
    discover(tiny(), GRATING, tmp_path / "found", **OPTIONS)
    attribute_images(tiny(), GRATING, tmp_path / "to come", bootstrap=4)
    assert [path.name for path in (tmp_path / "found").glob("attributions*")] == ["attributions.safetensors"]
    assert (tmp_path / "to come" / "attributions.draws.safetensors").exists()


def test_the_attributions_alone_serve_a_run_that_finds_with_the_same_images(run, tmp_path, monkeypatch, unevaluated):
    found = attribute_images(tiny(), GRATING, tmp_path, reference=COLOUR, find_with=3, bootstrap=4)
    assert {path.name for path in tmp_path.iterdir()} == {"attributions.safetensors", "attributions.draws.safetensors"}
    assert (found.n_images, found.reference.n_images) == (3, 3)
    monkeypatch.setattr(discovery, "attribute", refuse)
    assert discover(tiny(), GRATING, tmp_path, **OPTIONS).circuit == run[1].circuit


def test_without_a_number_every_image_is_attributed_and_serves_a_run_with_test_images(
    tmp_path, monkeypatch, unevaluated
):
    attribute_images(tiny(), GRATING, tmp_path, bootstrap=0)
    monkeypatch.setattr(discovery, "attribute", refuse)
    options = {**OPTIONS, "reference": None, "bootstrap": 0, "test": "render:curve,size=32,n=2"}
    assert discover(tiny(), GRATING, tmp_path, **options).circuit.provenance["images"]["n"] == 6


def test_how_to_attribute_reaches_attribute_with_a_checkpoint_in_the_folder(tmp_path, monkeypatch, unevaluated):
    asked = {}
    monkeypatch.setattr(discovery, "attribute", lambda *given, **how: asked.update(how) or attribute(*given, **how))
    how = {"engine": "loop", "dtype": torch.float32, "memory": "1G", "batch_size": 2, "seed": 5}
    discover(tiny(), GRATING, tmp_path, **{**OPTIONS, **how})
    assert {**how, "draws": 4, "until": None, "checkpoint": tmp_path / "attributions.parts"}.items() <= asked.items()


def test_a_worker_that_is_not_the_first_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "is_first", lambda: False)
    found = discover(tiny(), GRATING, tmp_path, **OPTIONS)
    assert found.circuit.units == run[1].circuit.units
    assert found.evaluation is None
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ how sure, and how many images


def test_every_unit_and_edge_carries_how_often_it_is_chosen(run):
    circuit = Circuit.load(run[0])
    assert circuit.chosen.keys() == circuit.units.keys()
    shares = {share * 4 for of_layer in circuit.chosen.values() for share in of_layer}
    assert shares <= {0, 1, 2, 3, 4}  # of four draws
    assert all(
        0 <= edge.chosen <= min(share_of(circuit, edge.source), share_of(circuit, edge.target))
        for edge in circuit.edges
    )
    assert circuit.selection["confidence"]["draws"] == 4
    assert 0 < circuit.selection["confidence"]["overlap"] <= 1


def share_of(circuit: Circuit, unit) -> float:
    return circuit.chosen[unit.layer][circuit.units[unit.layer].index(unit.index)]


MANY = {"images": "render:grating,size=32,n=80", "reference": "render:colour,size=32,n=80"}


def test_images_are_taken_in_until_the_circuit_is_stable_and_the_rest_is_left(tmp_path, monkeypatch, unevaluated):
    options = {**OPTIONS, "reference": MANY["reference"], "n_pictures": 0, "until_stable": 0.05}
    made = discover(tiny(), MANY["images"], tmp_path, **options).circuit.provenance
    assert (made["images"]["n"], made["reference"]["n"]) == (12, 12)  # the second look of 8, 12, 18, …
    assert made["stopped"]["stable"] and made["stopped"]["looks"] == [8, 12]
    assert made["stopped"]["rule"]["overlap"] == 0.05 and made["stopped"]["rule"]["units"] == 2
    assert [n for n, _ in made["stopped"]["overlaps"]] == [8, 12]
    with monkeypatch.context() as patch:
        patch.setattr(discovery, "attribute", refuse)
        assert discover(tiny(), MANY["images"], tmp_path, **options).circuit.provenance == made
        with pytest.warns(UserWarning, match="when to stop"), pytest.raises(AssertionError, match="was computed"):
            discover(tiny(), MANY["images"], tmp_path, **{**options, "units": 3})


def test_a_circuit_that_never_comes_to_rest_takes_the_whole_half_and_says_so(tmp_path, monkeypatch):
    tested = []
    monkeypatch.setattr(discovery, "evaluate", lambda spec, circuit, concept, others, **_: tested.append(concept))
    options = {
        **OPTIONS,
        "reference": MANY["reference"],
        "n_pictures": 0,
        "until_stable": 1.0,
        "units": 1,
        "layers": ["1", "3"],
    }
    monkeypatch.setattr(discovery.Stable, "reached", property(lambda self: False))
    made = discover(tiny(), MANY["images"], None, **options).circuit.provenance
    assert made["images"]["n"] == 40  # more than the 32 that are enough where nobody asks
    assert not made["stopped"]["stable"]
    names = {entry.name for entry in tested[0].entries}
    assert len(names) == 40 and not names & set(made["images"]["names"])


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("images", "options", "error", "names"),
    [
        ("render:grating,size=32,n=1", {}, ImageError, "has 1 image.*--test"),
        (GRATING, {"reference": "render:colour,size=32,n=1"}, ImageError, "reference set .*has 1 image"),
        (GRATING, {"find_with": 6}, ImageError, "6 of 6"),
        (GRATING, {"find_with": 0}, ImageError, "0 of 6"),
        (GRATING, {"reference": None, "contrast": "difference"}, ViscircuitsError, "'difference' needs reference"),
        (GRATING, {"reference": None, "ablation": "mean"}, ViscircuitsError, "'mean' needs reference"),
        (GRATING, {"score": "clap"}, ViscircuitsError, "clap.*'cla'"),
        (GRATING, {"summary": "median"}, ViscircuitsError, "median"),
        (GRATING, {"contrast": "quotient"}, ViscircuitsError, "quotient"),
        (GRATING, {"refine": "annealing"}, ViscircuitsError, "annealing"),
        (GRATING, {"ablation": "median"}, ViscircuitsError, "median"),
        (GRATING, {"engine": "steam"}, ViscircuitsError, "steam"),
        (GRATING, {"bootstrap": -1}, ViscircuitsError, "bootstrap must be at least 0, got -1"),
        (GRATING, {"until_stable": 1.5}, ViscircuitsError, "1.5"),
        (GRATING, {"until_stable": 0.9, "bootstrap": 1}, ViscircuitsError, "at least 2.*got 1"),
        (GRATING, {"units": 9}, ViscircuitsError, "9"),
        (GRATING, {"layers": ["1", "nowhere"]}, LayerError, "nowhere"),
        (GRATING, {"labels": {"elsewhere.png": "red"}}, ViscircuitsError, "elsewhere"),
        ("no/such/folder", {}, ImageError, "no/such/folder"),
        (GRATING, {"others": "no/such/folder"}, ImageError, "no/such/folder"),
    ],
)
def test_a_mistake_shows_before_the_work_and_leaves_no_folder(images, options, error, names, tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "attribute", refuse)
    with pytest.raises(error, match=names):
        discover(tiny(), images, tmp_path / "out", **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_a_result_cannot_go_into_a_file(tmp_path):
    (tmp_path / "out").write_text("here already")
    with pytest.raises(ViscircuitsError, match="is a file"):
        discover(tiny(), GRATING, tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out").read_text() == "here already"


def test_a_stream_says_how_many_of_it_find_the_circuit(tmp_path):
    stream = shards(tmp_path / "a.tar", 5)
    options = {**OPTIONS, "reference": None, "n_pictures": 0}
    with pytest.raises(ImageError, match=r"stream of unknown length.*--find-with"):
        discover(tiny(), stream, **options)
    found = discover(tiny(), stream, find_with=2, **options)
    assert found.circuit.provenance["images"]["n"] == 2
    assert found.evaluation.data["images"]["concept"]["n"] == 3


def test_an_unreadable_image_is_named_skipped_and_counted_and_strict_stops(photographs_of_noise, tmp_path, unevaluated):
    options = {**OPTIONS, "reference": None, "test": "render:curve,size=32,n=2", "n_pictures": 0}
    discover(tiny(), photographs_of_noise, tmp_path / "out", **options)
    made = json.loads((tmp_path / "out" / "circuit.json").read_text())["provenance"]["images"]
    assert made["n"] == 4
    assert [name for name, _ in made["skipped"]] == ["broken.png"]
    with pytest.raises(ImageError, match=r"broken\.png"):
        discover(tiny(), photographs_of_noise, tmp_path / "strict", strict=True, **options)


# ------------------------------------------------------------------ evaluating again


@pytest.fixture
def loads_tiny(monkeypatch) -> list[tuple]:
    """`load_model` gives the tiny network; the list fills with what it was asked for."""
    asked: list[tuple] = []

    def load(address: str, *, weights="default") -> ModelSpec:
        asked.append((address, weights))
        return tiny()

    monkeypatch.setattr(discovery, "load_model", load)
    return asked


def test_evaluating_again_renews_the_evaluation_and_nothing_that_was_found(folder, run, loads_tiny):
    test, others = "render:grating,size=32,n=2,seed=9", "render:colour,size=32,n=3,seed=9"
    found = evaluate_again(folder, test, others=others, ablation="mean", draws=2)
    assert loads_tiny == [("tiny", "default")]
    assert found.evaluation.data["ablation"] == "mean"
    assert {name: each["n"] for name, each in found.evaluation.data["images"].items()} == {"concept": 2, "others": 3}
    after, before = bytes_of(folder), bytes_of(run[0])
    assert {name for name in after if after[name] != before[name]} == {"evaluation.json", "index.html"}
    assert after.keys() == before.keys()
    assert Bundle.load(folder).evaluation == found.evaluation


def test_evaluating_again_on_the_same_images_leaves_those_out_that_found_the_circuit(folder, run, loads_tiny):
    again = evaluate_again(folder, GRATING, others=COLOUR, draws=2).evaluation.data
    assert again["images"]["concept"]["left_out"] == again["images"]["others"]["left_out"] == 3
    assert again["circuits"][0] == run[1].evaluation.data["circuits"][0]


def test_evaluating_again_needs_a_reference_for_means(folder, run, loads_tiny):
    with pytest.raises(ViscircuitsError, match="'mean' needs reference"):
        discovery._reference_of(Circuit({"x": (0,)}, {"x": 3}), "mean", None)
    own = evaluate_again(folder, GRATING, ablation="mean", draws=2)  # those it was found with
    assert own.evaluation.data["ablation"] == "mean"
    found = evaluate_again(folder, GRATING, reference=COLOUR, ablation="mean", draws=2)
    assert "others" not in found.evaluation.data["images"]
    with pytest.raises(ViscircuitsError, match=r"no circuit at"):
        evaluate_again(folder / "nowhere", GRATING)


def test_a_circuit_finds_its_model_again_or_says_that_it_is_another(folder, monkeypatch):
    monkeypatch.setattr(discovery, "load_model", lambda address, weights: tiny(seed=1))
    with pytest.raises(ModelError, match="'tiny' are not those"):
        evaluate_again(folder, GRATING)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="no model 'tiny'"):
        evaluate_again(folder, GRATING)
    with pytest.raises(ModelError, match="does not say which model"):
        discovery.model_of(Circuit({"1": (0,)}, {"1": 6}))


def test_weights_are_looked_for_where_they_were_or_where_the_caller_says(run, loads_tiny):
    circuit = run[1].circuit
    discovery.model_of(replace(circuit, provenance={**circuit.provenance, "weights_from": "none"}))
    discovery.model_of(circuit, weights="elsewhere.safetensors")
    assert loads_tiny == [("tiny", "none"), ("tiny", "elsewhere.safetensors")]


# ------------------------------------------------------------------ editing from a folder


@torch.no_grad()
@pytest.mark.parametrize("ablation", [None, "zero", "mean"])
def test_an_edit_from_a_folder_is_the_ablation_with_the_reference_of_the_circuit(
    folder, loads_tiny, ablation, tmp_path
):
    out = tmp_path / "edited.safetensors"
    edited, onnx = edit_from(folder, out, ablation=ablation)
    spec, bundle = tiny(), Bundle.load(folder)
    part = discovery.split(open_images(COLOUR), 3, seed=0)[0]
    statistics = measure(spec, part, LAYERS)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with ablate(spec, bundle.circuit, ablation or "zero", reference=statistics):
        expected = spec.model(images)
    assert torch.allclose(edited.model(images), expected, atol=1e-6)
    assert torch.equal(load_state(tiny(seed=3).model, out)(images), edited.model(images))
    assert onnx is None
    assert not torch.allclose(spec.model(images), expected, atol=1e-4)


def test_an_edit_takes_the_folders_own_ablation(loads_tiny, tmp_path, unevaluated):
    discover(tiny(), GRATING, tmp_path, **{**OPTIONS, "ablation": "mean", "n_pictures": 0})
    assert edit_from(tmp_path, tmp_path / "edited.safetensors")[0].provenance["ablation"] == "mean"


def test_an_edit_is_checked_on_the_images_that_found_the_circuit_unreadable_ones_among_them(
    photographs_of_noise, loads_tiny, tmp_path, monkeypatch, unevaluated
):
    options = {**OPTIONS, "reference": None, "n_pictures": 0, "find_with": 4}
    found = discover(tiny(), photographs_of_noise, tmp_path / "out", **options)
    assert found.circuit.provenance["images"]["skipped"]
    checked = []
    edit = discovery.edit
    monkeypatch.setattr(discovery, "edit", lambda *given, **how: checked.append(given[2]) or edit(*given, **how))
    edit_from(tmp_path / "out", tmp_path / "edited.safetensors")
    expected = attribute(tiny(), checked[0], LAYERS).matrices
    assert torch.allclose(expected[0].values, found.attributions.matrices[0].values)


@pytest.mark.parametrize("gone", ["changed", "in memory"])
def test_images_that_are_not_there_any_more_are_asked_for(
    gone, photographs_of_noise, loads_tiny, tmp_path, unevaluated
):
    options = {**OPTIONS, "reference": None, "n_pictures": 0}
    images = [Image.open(path) for path in sorted(photographs_of_noise.glob("?.png"))]
    discover(tiny(), images if gone == "in memory" else photographs_of_noise, tmp_path / "out", **options)
    Image.new("RGB", (32, 32)).save(photographs_of_noise / "2.png")
    for path in photographs_of_noise.glob("[01].png"):
        path.rename(path.with_name(f"new-{path.name}"))
    with pytest.raises(ImageError, match="--images IMAGES"):
        edit_from(tmp_path / "out", tmp_path / "edited.safetensors")
    assert edit_from(tmp_path / "out", tmp_path / "edited.safetensors", images=GRATING)[0].folded == LAYERS
    with pytest.raises(ViscircuitsError, match="'mean' needs reference"):
        edit_from(tmp_path / "out", tmp_path / "edited.safetensors", images=GRATING, ablation="mean")


def test_the_images_of_a_stream_that_were_enough_are_found_again(tmp_path, monkeypatch, loads_tiny, unevaluated):
    stream = shards(tmp_path / "a.tar", 20)
    monkeypatch.setattr(discovery.Stable, "reached", property(lambda self: True))  # at the first look, of 8
    options = {**OPTIONS, "reference": None, "n_pictures": 0, "find_with": 14, "until_stable": 0.5}
    made = discover(tiny(), stream, tmp_path / "out", **options).circuit.provenance
    assert made["images"]["n"] == 8
    again = discovery.found_with(json.loads((tmp_path / "out" / "circuit.json").read_text())["provenance"], "images")
    assert [picture.digest[:16] for picture in again] == made["images"]["digests"]


# ------------------------------------------------------------------ names and the strongest units


@pytest.mark.parametrize(
    ("images", "name"),
    [
        ("photos/dogs", "dogs"),
        (Path("photos/dogs/"), "dogs"),
        ("lists/dogs.csv", "dogs"),
        ("render:text,word=cat,n=4", "text"),
        (["a.png", "b.png"], "concept"),
    ],
)
def test_a_concept_is_called_after_its_folder_or_file(images, name):
    assert concept_name(images) == name


def test_the_strongest_units_of_each_layer_stand_in_the_circuits_order():
    circuit = Circuit({"a": (1, 4, 5), "b": (0, 2)}, {"a": 6, "b": 3}, {"a": (0.1, 3.0, 2.0), "b": (1.0, 1.0)})
    assert [str(unit) for unit in strongest(circuit, 2)] == ["a:4", "a:5", "b:0", "b:2"]
    assert [str(unit) for unit in strongest(circuit, 1)] == ["a:4", "b:0"]


def test_pictures_are_of_the_strongest_units_and_of_images_that_found_the_circuit(unevaluated):
    found = discover(tiny(), GRATING, **{**OPTIONS, "n_pictures": 3, "n_pictured": 1})
    assert set(found.pictures) == set(strongest(found.circuit, 1))
    names = {exemplar.name for exemplars in found.pictures.values() for exemplar in exemplars}
    assert names <= set(found.circuit.provenance["images"]["names"])
    (batch,) = batches(open_images(GRATING), to_tensor, 6)
    assert names <= set(batch.names)
