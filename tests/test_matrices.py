"""Attribution matrices: contrasts a reader can check by hand, and files that come back as they were."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.matrices import CONTRASTS, SCHEMA, AttributionMatrix, Attributions


def random_attributions(seed: int = 0, widths=(2, 3, 4), n_images: int = 5, per_image: bool = True) -> Attributions:
    g = torch.Generator().manual_seed(seed)
    names = [f"layer{i}" for i in range(len(widths))]
    matrices = []
    for i in range(len(widths) - 1):
        shape = (widths[i + 1], widths[i])
        each = torch.rand(n_images, *shape, generator=g)
        signed = torch.randn(shape, generator=g)
        matrices.append(AttributionMatrix(names[i], names[i + 1], each.mean(0), signed, each if per_image else None))
    activity = {name: torch.rand(width, generator=g) for name, width in zip(names, widths, strict=True)}
    return Attributions(tuple(matrices), activity, n_images, {"model": "toy", "seed": seed})


def pair(values: list, reference: list | None = None) -> Attributions:
    """Attributions of one pair of layers with these scores."""

    def of(v: list) -> Attributions:
        matrix = torch.tensor(v, dtype=torch.float32)
        activity = {"a": torch.ones(matrix.shape[1]), "b": torch.ones(matrix.shape[0])}
        return Attributions((AttributionMatrix("a", "b", matrix, matrix.clone()),), activity, 1)

    mine = of(values)
    return mine if reference is None else Attributions(mine.matrices, mine.activity, 1, {}, of(reference))


def assert_same(a: Attributions, b: Attributions) -> None:
    assert (a.layers, a.n_images, a.provenance) == (b.layers, b.n_images, b.provenance)
    for mine, other in zip(a.matrices, b.matrices, strict=True):
        assert torch.equal(mine.values, other.values) and torch.equal(mine.signed, other.signed)
        assert (mine.per_image is None) == (other.per_image is None)
        assert mine.per_image is None or torch.equal(mine.per_image, other.per_image)
    assert all(torch.equal(a.activity[layer], b.activity[layer]) for layer in a.layers)
    assert (a.reference is None) == (b.reference is None)
    if a.reference is not None:
        assert_same(a.reference, b.reference)


def test_layers_and_widths_follow_the_matrices():
    found = random_attributions(widths=(2, 3, 4))
    assert found.layers == ("layer0", "layer1", "layer2")
    assert found.widths == {"layer0": 2, "layer1": 3, "layer2": 4}


# ------------------------------------------------------------------ contrast


def contrasted(how: str, values: list, reference: list) -> Tensor:
    return pair(values, reference).contrast(how).matrices[0].values


def test_contrasts_on_numbers_checked_by_hand():
    values, reference = [[4.0, 1.0]], [[1.0, 3.0]]  # the reference's mean is 2
    assert contrasted("none", values, reference).tolist() == [[4, 1]]
    assert contrasted("difference", values, reference).tolist() == [[3, -2]]
    assert contrasted("ratio", values, reference)[0].tolist() == pytest.approx([4 / 3, 1 / 5])


@given(st.integers(0, 1000), st.floats(0.5, 4))
def test_scaling_both_sets_scales_the_difference_and_leaves_the_ratio(seed, factor):
    mine, other = random_attributions(seed).matrices[0].values, random_attributions(seed + 1).matrices[0].values
    scaled = CONTRASTS["difference"](factor * mine, factor * other)
    torch.testing.assert_close(scaled, factor * CONTRASTS["difference"](mine, other))
    torch.testing.assert_close(CONTRASTS["ratio"](factor * mine, factor * other), CONTRASTS["ratio"](mine, other))


def test_against_itself_nothing_is_left():
    values = [[4.0, 1.0], [0.0, 2.0]]
    assert contrasted("difference", values, values).abs().max() == 0
    assert contrasted("ratio", values, values).max() < 1


def test_a_connection_silent_in_both_sets_has_no_contrast():
    assert contrasted("ratio", [[0.0, 5.0]], [[0.0, 1.0]])[0, 0] == 0
    assert contrasted("ratio", [[1.0, 2.0]], [[0.0, 0.0]]).tolist() == [[1, 2]]  # nothing to divide by


def test_the_contrast_is_named_and_leaves_the_original_alone():
    found = pair([[4.0, 1.0]], [[1.0, 3.0]])
    assert found.contrast("difference").provenance["contrast"] == "difference"
    assert found.matrices[0].values.tolist() == [[4, 1]] and "contrast" not in found.provenance
    assert found.contrast("none") is found


def test_a_contrast_needs_a_reference_and_a_known_name():
    with pytest.raises(ViscircuitsError, match="'ratio' needs reference images"):
        pair([[1.0]]).contrast("ratio")
    with pytest.raises(ViscircuitsError, match="no contrast 'quotient'; choose one of none, difference, ratio"):
        pair([[1.0]], [[1.0]]).contrast("quotient")


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
def test_safetensors_round_trip(tmp_path, per_image, with_reference):
    mine, other = random_attributions(0, per_image=per_image), random_attributions(1, n_images=7, per_image=per_image)
    found = Attributions(mine.matrices, mine.activity, 5, mine.provenance, other if with_reference else None)
    path = found.save(tmp_path / "attributions.safetensors")
    assert_same(Attributions.load(path), found)
    assert_same(Attributions.load(tmp_path), found)  # the folder that holds it


def test_a_view_of_a_larger_tensor_is_saved_alone(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    matrix = AttributionMatrix("a", "b", whole.T[:3], whole.T[3:])
    found = Attributions((matrix,), {"a": whole[0, :4], "b": whole[0, :3]}, 1)
    assert_same(Attributions.load(found.save(tmp_path / "x.safetensors")), found)


def test_the_same_attributions_are_the_same_bytes(tmp_path):
    a, b = (random_attributions(3).save(tmp_path / name) for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def header_of(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["viscircuits"])


def rewritten(path, change: dict | None = None, drop: str | None = None) -> None:
    """Write a saved file again with another header, or without one of its tensors."""
    header = {key: value for key, value in {**header_of(path), **(change or {})}.items() if value is not None}
    tensors = {key: value for key, value in load_file(path).items() if key != drop}
    save_file(tensors, path, metadata={"viscircuits": json.dumps(header)})


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "photograph": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" * 50),
    "weights": lambda path: save_file({"conv.weight": torch.ones(2)}, path),
    "future version": lambda path: rewritten(path, {"version": 99}),
    "foreign": lambda path: rewritten(path, {"schema": "someone/else"}),
    "no layers": lambda path: rewritten(path, {"layers": None}),
    "layers are a number": lambda path: rewritten(path, {"layers": 3}),
    "header is no JSON": lambda path: save_file(load_file(path), path, metadata={"viscircuits": "{"}),
    "header is a list": lambda path: save_file(load_file(path), path, metadata={"viscircuits": "[]"}),
    "a matrix is missing": lambda path: rewritten(path, drop="concept.0.values"),
    "an activity is missing": lambda path: rewritten(path, drop="concept.1.activity"),
    "no concept": lambda path: rewritten(path, {"n_images": {}}),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_holds_no_attributions_is_named(how, tmp_path):
    path = random_attributions().save(tmp_path / "mine.safetensors")
    DAMAGE[how](path)
    with pytest.raises(FileFormatError, match=r"mine\.safetensors"):
        Attributions.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileFormatError, match="absent"):
        Attributions.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileFormatError, match=r"attributions\.safetensors"):
        Attributions.load(tmp_path)  # a folder without one


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = random_attributions(0).save(tmp_path / "attributions.safetensors")
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        random_attributions(1).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["attributions.safetensors"]


def test_the_schema_stands_in_the_header(tmp_path):
    header = header_of(random_attributions().save(tmp_path / "x.safetensors"))
    assert (header["schema"], header["version"], header["layers"]) == (SCHEMA, 1, ["layer0", "layer1", "layer2"])
