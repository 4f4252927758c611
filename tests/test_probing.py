"""Probes: the pictures that are kept, and what the network made of exactly these pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from viscircuits import open_images, wrap
from viscircuits.circuit import Circuit, Unit
from viscircuits.errors import FileFormatError, ModelError, ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.models import as_spec
from viscircuits.probes import Probes, remove_probes
from viscircuits.probing import answers_of, probe

CIRCUIT = Circuit({"1": (0, 4), "5": (2,)}, {"1": 6, "5": 5})


def transform(image: Image.Image) -> torch.Tensor:
    return F.to_tensor(F.center_crop(F.resize(image, 20), 16))


@pytest.fixture
def spec(conv_net):
    return wrap(conv_net, transform, classes=["red", "green", "blue", "grey"])


def pictures(n: int, size: tuple[int, int] = (40, 30), seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture
def probes(spec) -> Probes:
    sets = {"concept": open_images(pictures(3)), "reference": open_images(pictures(5, seed=1))}
    return probe(spec, CIRCUIT, sets, most=2, batch_size=3)


def test_the_first_of_each_kind_are_kept_and_named(probes):
    assert probes.kinds == ("concept", "concept", "reference", "reference")
    assert len(set(probes.names)) == 2  # each set names its own
    assert probes.units == (Unit("1", 0), Unit("1", 4), Unit("5", 2))


def test_what_is_kept_of_a_probe_is_what_the_network_makes_of_its_picture(spec, probes):
    images = torch.stack([transform(picture) for picture in probes.pictures])
    with torch.no_grad():
        first = spec.model[:2](images)
        last = spec.model[2:6](first)
        logits = spec.model(images)
    expected = torch.stack([each.flatten(1).amax(1) for each in (first[:, 0], first[:, 4], last[:, 2])], dim=1)
    assert torch.allclose(torch.from_numpy(probes.activations), expected, atol=1e-6)
    for answers, output in zip(probes.answers, logits, strict=True):
        assert [each["index"] for each in answers] == output.argsort(descending=True).tolist()
        assert [each["probability"] for each in answers] == pytest.approx(
            output.softmax(0).sort()[0].flip(0).tolist(), abs=1e-5
        )
        assert [each["label"] for each in answers] == [spec.classes[each["index"]][0] for each in answers]
    assert count_hooks(spec.model) == 0


def test_a_picture_keeps_no_more_than_the_transform_uses(spec):
    large, small = Image.new("RGB", (300, 200), "tan"), Image.new("L", (18, 19), 7)
    found = probe(spec, CIRCUIT, {"mine": open_images([large, small])})
    assert [picture.size for picture in found.pictures] == [(32, 21), (18, 19)]
    assert [picture.mode for picture in found.pictures] == ["RGB", "RGB"]


def test_a_network_that_gives_embeddings_answers_nothing(conv_net):
    spec = wrap(conv_net, transform, outputs="embedding")
    assert probe(spec, CIRCUIT, {"concept": open_images(pictures(1))}).answers == ((),)


def test_an_output_without_a_name_is_called_by_its_number(conv_net):
    best = answers_of(as_spec(conv_net), torch.tensor([0.0, 2.0, 1.0, -5.0]), 2)
    assert [(each["index"], each["label"]) for each in best] == [(1, "output 1"), (2, "output 2")]


def test_probes_are_read_back_as_they_were_saved_byte_for_byte(probes, tmp_path):
    probes.save(tmp_path / "result" / "probes")
    found = Probes.load(tmp_path / "result")
    assert (found.names, found.kinds, found.units, found.answers) == (
        probes.names, probes.kinds, probes.units, probes.answers,
    )  # fmt: skip
    assert [each.tobytes() for each in found.pictures] == [each.tobytes() for each in probes.pictures]
    assert np.allclose(found.activations, probes.activations, rtol=1e-5)
    found.save(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "result" / "probes" / path.name).read_bytes()


def test_what_an_earlier_save_wrote_is_taken_away_and_nothing_else(probes, tmp_path):
    probes.save(tmp_path)
    (tmp_path / "mine.png").write_bytes(b"mine")
    one = Probes(*(part[:1] for part in (probes.names, probes.kinds, probes.pictures)), probes.units,
                 probes.activations[:1], probes.answers[:1])  # fmt: skip
    one.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "probes.json", "mine.png"}
    remove_probes(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.png"}


def test_a_list_of_probes_cannot_reach_outside_its_folder(probes, tmp_path):
    probes.save(tmp_path / "probes")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    listed = tmp_path / "probes" / "probes.json"
    listed.write_text(listed.read_text().replace('"0.png"', '"../secret.png"'))
    with pytest.raises(FileFormatError, match=r"probes.*secret\.png"):
        Probes.load(tmp_path)
    remove_probes(tmp_path / "probes")
    assert (tmp_path / "secret.png").exists()


@pytest.mark.parametrize("change", [{"version": 2}, {"probes": [{}]}, {"units": [["1", 0]]}])
def test_a_damaged_list_is_an_error_that_names_it(probes, tmp_path, change):
    probes.save(tmp_path / "probes")
    listed = tmp_path / "probes" / "probes.json"
    listed.write_text(json.dumps({**json.loads(listed.read_text()), **change}))
    with pytest.raises(FileFormatError, match="probes"):
        Probes.load(tmp_path)


def test_a_network_without_a_transform_cannot_be_probed_with_pictures(conv_net):
    with pytest.raises(ModelError, match="transform"):
        probe(as_spec(conv_net), CIRCUIT, {"concept": open_images(pictures(1))})
    with pytest.raises(ViscircuitsError, match="no picture"):
        probe(wrap(conv_net, transform), CIRCUIT, {})
