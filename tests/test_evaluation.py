"""What an evaluation says of a network whose circuits were planted by hand, and what it does with bad input."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from oracles import colour_network
from viscircuits import attribute, evaluate, evaluation, measure, open_images, select, split, wrap
from viscircuits.ablation import ablate, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.contract import SizeData
from viscircuits.errors import FileFormatError, ImageError, ViscircuitsError
from viscircuits.evaluation import SCHEMA, Evaluation
from viscircuits.hooks import count_hooks
from viscircuits.models import ModelSpec
from viscircuits.sizes import sizes

LAYERS = ("1", "3")
NO_CURVES = {"unit_fractions": (), "edge_fractions": (), "draws": 2}
WIDTHS = {"1": 6, "3": 6}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(evaluation, "N_BOOTSTRAP", 50)


def chosen_by_hand(colour: int) -> Circuit:
    units = {"1": (2 * colour, 2 * colour + 1), "3": (colour,)}
    edges = tuple(Edge(Unit("1", m), Unit("3", colour), 1.0 - m / 10, 1.0) for m in units["1"])
    return Circuit(units, WIDTHS, {"1": (2.0, 1.0), "3": (1.0,)}, edges)


RED, GREEN = chosen_by_hand(0), chosen_by_hand(1)
EVERYTHING = Circuit({layer: tuple(range(6)) for layer in LAYERS}, WIDTHS, dict.fromkeys(LAYERS, (1.0,) * 6))


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((4, 4)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(4, 4, 3).permute(2, 0, 1).float() / 255


@pytest.fixture
def spec() -> ModelSpec:
    return wrap(colour_network(), to_tensor, LAYERS, ["red", "green", "blue"])


@pytest.fixture
def folders(tmp_path):
    """Photographs of one colour that hold a little of the others: 4 red ones, and 3 green and 3 blue ones."""
    for position, (set_, colour, n) in enumerate((("concept", 0, 4), ("others", 1, 3), ("others", 2, 3))):
        folder = tmp_path / set_ / ("red", "green", "blue")[colour]
        folder.mkdir(parents=True)
        for i in range(n):
            pixel = [20 + 10 * i + position] * 3
            pixel[colour] = 150 + 20 * i
            pixel[(colour + 1) % 3] += 5
            Image.new("RGB", (6, 6), tuple(pixel)).save(folder / f"{i}.png")
    return tmp_path


@pytest.fixture
def concept(folders):
    return open_images(folders / "concept")


@pytest.fixture
def others(folders):
    return open_images(folders / "others")


def row(found: Evaluation, name: str) -> dict:
    return next(entry for entry in found.data["circuits"] if entry["name"] == name)


def same(a, b, tolerance: float = 1e-6) -> bool:
    """Equal but for rounding, to the bottom of the nest."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return math.isclose(a, b, abs_tol=tolerance) if isinstance(a, float) else a == b


# ------------------------------------------------------------------ the planted circuit


def test_removing_the_units_that_alone_decide_a_class_takes_that_class_and_nothing_else(spec, concept, others):
    found = evaluate(spec, RED, concept, others, **NO_CURVES)
    assert found.data["measure"] == "accuracy"
    assert found.data["baseline"]["concept"]["accuracy"] == pytest.approx(
        {"value": 1, "low": 0.5101, "high": 1}, abs=1e-4
    )
    assert row(found, "circuit")["concept"]["accuracy"]["value"] == 0
    assert row(found, "circuit")["others"]["accuracy"]["value"] == 1
    assert row(found, "circuit")["concept"]["logit"]["value"] == 0
    assert row(found, "circuit")["others"]["logit"] == found.data["baseline"]["others"]["logit"]
    assert row(found, "circuit")["concept"]["kl"]["value"] > 0
    assert found.selectivity.value == 1
    assert found.faithfulness.value == pytest.approx(1)
    assert found.data["completeness"]["value"] == pytest.approx(0)


def test_another_classes_circuit_recovers_nothing_and_takes_the_others(spec, concept, others):
    found = evaluate(spec, GREEN, concept, others, **NO_CURVES)
    assert found.faithfulness.value == pytest.approx(0)
    assert found.data["completeness"]["value"] == pytest.approx(1)
    assert found.selectivity.value == -0.5  # the green half of the others


def test_random_circuits_are_no_match(spec, concept, others):
    found = evaluate(spec, RED, concept, others, draws=12, unit_fractions=(), edge_fractions=())
    assert row(found, "random")["draws"] == 12
    assert row(found, "random")["n_units"] == RED.n_units
    assert row(found, "random")["selectivity"]["value"] < 0.5


def test_logits_are_those_of_the_ablated_network(spec, concept, others):
    found = evaluate(spec, RED, concept, others, reference=others, ablation="mean", **NO_CURVES)
    images = torch.stack([to_tensor(picture.image) for picture in concept])
    statistics = measure(spec, others, LAYERS)
    with torch.no_grad(), ablate(spec, RED, "mean", reference=statistics):
        expected = spec.model(images)[:, 0].mean()
    assert row(found, "circuit")["concept"]["logit"]["value"] == pytest.approx(float(expected))
    assert found.data["ablation"] == "mean"


def test_keeping_everything_is_the_untouched_network(spec, concept, others):
    found = evaluate(spec, EVERYTHING, concept, others, **NO_CURVES)
    assert found.faithfulness.value == 1
    assert found.data["completeness"]["value"] == 0


def test_a_network_that_reads_nothing_from_the_layers_has_no_faithfulness(spec, concept):
    with torch.no_grad():
        spec.model[6].weight.zero_()
        spec.model[6].bias[0] = 1
    found = evaluate(spec, RED, concept, **NO_CURVES)
    assert found.faithfulness is None
    assert found.data["completeness"] is None


def test_an_image_without_any_behaviour_does_not_stop_the_interval_of_faithfulness(folders, spec):
    black = folders / "concept" / "red" / "black.png"
    Image.new("RGB", (6, 6)).save(black)
    found = evaluate(spec, RED, open_images([black, folders / "concept" / "red" / "0.png"]), labels=None, **NO_CURVES)
    assert found.faithfulness.value == pytest.approx(1)  # one of the two images alone would divide 0 by 0
    assert found.faithfulness.low == pytest.approx(1)


# ------------------------------------------------------------------ curves


def test_the_curve_over_units_starts_at_the_untouched_network_and_ends_at_the_table(spec, concept, others):
    found = evaluate(spec, RED, concept, others, unit_fractions=(0.5, 0.25), edge_fractions=(), draws=2)
    curve = found.data["unit_curve"]
    assert curve["x"] == [0, 0.25, 0.5, 1]
    assert curve["n_units"] == [0, 2, 2, 3]  # ⌈fraction · 2⌉ + ⌈fraction · 1⌉
    assert [series["name"] for series in curve["series"]] == [entry["name"] for entry in found.data["circuits"]]
    for series in curve["series"]:
        main = row(found, series["name"])
        for images in ("concept", "others"):
            assert series[images][0] == found.data["baseline"][images]["accuracy"]
            assert series[images][-1] == main[images]["accuracy"]
        assert series["selectivity"][0]["value"] == 0
        assert series["selectivity"][-1] == main["selectivity"]


def test_a_part_of_a_circuit_is_its_highest_scores(spec, concept):
    found = evaluate(spec, RED, concept, unit_fractions=(0.5,), edge_fractions=(), draws=1)
    half = Circuit({"1": (0,), "3": (0,)}, WIDTHS, {"1": (2.0,), "3": (1.0,)})
    expected = evaluate(spec, half, concept, **NO_CURVES)
    assert found.data["unit_curve"]["series"][0]["concept"][1] == row(expected, "circuit")["concept"]["accuracy"]


def test_the_curve_over_edges_ends_at_the_same_point_in_every_order(spec, concept, others):
    found = evaluate(spec, RED, concept, others, edge_fractions=(1.0, 0.5), unit_fractions=(), draws=1)
    curve = found.data["edge_curve"]
    assert (curve["source"], curve["target"]) == LAYERS
    assert curve["x"] == [0, 0.5, 1]
    assert curve["n_edges"] == [0, 1, 2]
    by_score, at_random = curve["series"]
    for images in ("concept", "others", "selectivity"):
        assert by_score[images][-1] == at_random[images][-1]
        assert by_score[images][0]["value"] == (0 if images == "selectivity" else 1)
    assert by_score["selectivity"][-1]["value"] == 1  # red reads nothing any more


def test_edges_are_pruned_from_the_strongest_on(concept, spec):
    weak = replace(RED, edges=(replace(RED.edges[0], score=3.0), RED.edges[1]))
    with torch.no_grad():
        spec.model[2].weight[0, :2, 0, 0] = torch.tensor([0.9, 0.1])
    found = evaluate(spec, weak, concept, edge_fractions=(0.5,), unit_fractions=(), draws=1)
    images = torch.stack([to_tensor(picture.image) for picture in concept])
    with torch.no_grad(), prune_edges(spec, weak.edges[:1]):
        expected = (spec.model(images).argmax(1) == 0).double().mean()
    assert found.data["edge_curve"]["series"][0]["concept"][1]["value"] == expected == 0


@pytest.mark.parametrize(("fraction", "n"), [(0.07, 7), (0.29, 29), (0.071, 8), (1.0, 100)])
def test_a_fraction_of_the_edges_is_not_rounded_up_by_the_machine(fraction, n):
    assert evaluation._share(fraction, 100) == n


@pytest.mark.parametrize(
    "circuit",
    [
        Circuit({"3": (0,)}, {"3": 6}, {"3": (1.0,)}),  # one layer has no edges
        Circuit({"1": (0, 1), "3": (0,)}, WIDTHS),  # no scores to take a part by
    ],
)
def test_circuits_made_by_hand_can_be_evaluated(circuit, spec, concept, others):
    found = evaluate(spec, circuit, concept, others, unit_fractions=(), draws=1)
    assert found.selectivity.value == 1
    assert found.data["edge_curve"] is None


# ------------------------------------------------------------------ controls


def test_controls_have_the_circuits_size_in_each_layer(spec, concept, others, monkeypatch):
    removed = []

    def spy(spec, circuit, *args, keep=False, **options):
        gone = circuit.complement() if keep else circuit
        removed.append(tuple(len(gone.units[layer]) for layer in LAYERS))
        return ablate(spec, circuit, *args, keep=keep, **options)

    attributions = attribute(spec, concept, LAYERS, reference=others)
    monkeypatch.setattr(evaluation, "ablate", spy)
    found = evaluate(spec, RED, concept, others, attributions=attributions, **NO_CURVES)
    names = [entry["name"] for entry in found.data["circuits"]]
    assert names == ["circuit", "random", "activation", "activation difference", "weight norm"]
    assert [entry["n_units"] for entry in found.data["circuits"]] == [3] * 5
    n_batches = 2
    kept, empty, *controls = removed[: len(removed) // n_batches]
    assert (kept, empty) == ((4, 5), (6, 6))
    assert controls == [(2, 1)] * (4 + 2)  # two draws of random


def test_the_most_active_units_of_red_images_are_red(spec, concept, others):
    attributions = attribute(spec, concept, LAYERS, reference=others)
    found = evaluate(spec, RED, concept, others, attributions=attributions, **NO_CURVES)
    for name in ("activation", "activation difference"):
        assert row(found, name)["selectivity"]["value"] == 1
    without = attribute(spec, concept, LAYERS)
    found = evaluate(spec, RED, concept, others, attributions=without, **NO_CURVES)
    assert "activation difference" not in [entry["name"] for entry in found.data["circuits"]]


# ------------------------------------------------------------------ labels and measures


def test_without_labels_the_untouched_networks_answer_is_the_standard(spec, concept, others):
    found = evaluate(spec, RED, concept, others, labels=None, **NO_CURVES)
    assert (found.data["measure"], found.data["labelled"]) == ("agreement", False)
    assert found.data["baseline"]["concept"]["agreement"]["value"] == 1
    assert found.data["baseline"]["concept"]["kl"]["value"] == 0
    assert found.selectivity.value == 1


def test_folders_that_name_no_class_are_as_good_as_no_labels(spec, concept, others):
    unnamed = replace(spec, classes=(("one",), ("two",), ("three",)))
    found = evaluate(unnamed, RED, concept, others, **NO_CURVES)
    assert found.data == evaluate(spec, RED, concept, others, labels=None, **NO_CURVES).data


def test_a_table_a_file_and_folders_give_the_same_labels(spec, concept, others, tmp_path):
    table = {f"{colour}/{i}.png": colour for colour in ("red", "green", "blue") for i in range(4)}
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(table.items())
    by_folder, by_table, by_file = (
        evaluate(spec, RED, concept, others, labels=labels, **NO_CURVES).data
        for labels in ("auto", table, tmp_path / "labels.csv")
    )
    assert by_folder == by_table == by_file
    assert by_folder["labelled"]


def test_a_wrong_label_counts_as_a_wrong_answer(spec, concept):
    labels = {f"red/{i}.png": "red" if i else "blue" for i in range(4)}
    found = evaluate(spec, RED, concept, labels=labels, **NO_CURVES)
    assert found.data["baseline"]["concept"]["accuracy"]["value"] == 0.75


def test_a_label_beyond_the_outputs_names_itself(spec, concept):
    nameless = replace(spec, classes=None)
    with pytest.raises(ViscircuitsError, match=r"label 7 .* 3 outputs"):
        evaluate(nameless, RED, concept, labels={f"red/{i}.png": "7" for i in range(4)})


def test_embeddings_are_compared_by_their_direction(spec, concept, others):
    towers = replace(spec, outputs="embedding")
    found = evaluate(towers, RED, concept, others, **NO_CURVES)
    images = torch.stack([to_tensor(picture.image) for picture in concept])
    with torch.no_grad():
        full = spec.model(images)
        without = full * torch.tensor([0.0, 1.0, 1.0])
    expected = torch.nn.functional.cosine_similarity(full, without).mean()
    assert found.data["measure"] == "cosine"
    assert found.data["baseline"]["concept"]["cosine"]["value"] == pytest.approx(1)
    assert row(found, "circuit")["concept"]["cosine"]["value"] == pytest.approx(float(expected))
    assert found.selectivity.value > 0.5


def test_tensors_and_bare_networks_are_taken_too(spec, concept):
    images = torch.stack([to_tensor(picture.image) for picture in concept])
    options = {"draws": 1, "unit_fractions": (), "edge_fractions": (1.0,)}
    found = evaluate(spec.model, RED, images, list(images), **options)
    expected = evaluate(spec, RED, concept, concept, labels=None, **options)
    for part in ("baseline", "circuits", "faithfulness", "unit_curve", "edge_curve"):
        assert same(found.data[part], expected.data[part])
    assert found.selectivity.value == 0  # one set against itself


# ------------------------------------------------------------------ which images


def test_images_that_found_the_circuit_are_left_out_and_counted(spec, concept, others):
    finding, testing = split(concept, 3, seed=0)
    background, tested = split(others, 2, seed=0)
    circuit = select(attribute(spec, finding, LAYERS, reference=background), {"1": 2, "3": 1})
    found = evaluate(spec, circuit, concept, others, **NO_CURVES)
    expected = evaluate(spec, circuit, testing, tested, **NO_CURVES)
    assert {name: (each["n"], each["left_out"]) for name, each in found.data["images"].items()} == {
        "concept": (1, 3), "others": (4, 2),
    }  # fmt: skip
    for part in ("baseline", "circuits", "faithfulness", "unit_curve", "edge_curve"):
        assert found.data[part] == expected.data[part]
    assert found.data["images"]["concept"]["names"] == expected.data["images"]["concept"]["names"]


@pytest.mark.parametrize("which", ["concept", "others"])
def test_only_images_that_found_the_circuit_cannot_test_it(which, spec, concept, others):
    finding, testing = split(concept, 3, seed=0)
    background, tested = split(others, 2, seed=0)
    circuit = select(attribute(spec, finding, LAYERS, reference=background), {"1": 2, "3": 1})
    sets = {"concept": (finding, tested), "others": (testing, background)}[which]
    with pytest.raises(ImageError, match=rf"all \d images of the {which} set"):
        evaluate(spec, circuit, *sets)


def test_unreadable_images_are_named_and_left_out(spec, folders):
    (folders / "concept" / "red" / "broken.png").write_bytes(b"no picture")
    found = evaluate(spec, RED, open_images(folders / "concept"), **NO_CURVES)
    described = found.data["images"]["concept"]
    assert described["n"] == 4
    assert [name for name, _ in described["skipped"]] == ["red/broken.png"]


# ------------------------------------------------------------------ the same again


@pytest.mark.parametrize("ablation", ["zero", "resample", "noise"])
def test_a_seed_repeats_exactly_and_another_draws_anew(ablation, spec, concept, others):
    options = {"ablation": ablation, "reference": others, "draws": 1, "unit_fractions": (), "edge_fractions": (0.5,)}
    first, again, other = (evaluate(spec, RED, concept, others, seed=seed, **options).data for seed in (1, 1, 2))
    assert first == again
    assert row(Evaluation(first), "random") != row(Evaluation(other), "random")


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_batch_size_changes_nothing(ablation, spec, concept, others):
    options = {"ablation": ablation, "reference": others, "draws": 1, "unit_fractions": (), "edge_fractions": (1.0,)}
    two, all_ = (evaluate(spec, RED, concept, others, batch_size=size, **options).data for size in (2, 16))
    assert same(two, all_)


def test_reference_images_and_their_statistics_are_the_same_reference(spec, concept, others):
    given = measure(spec, others, LAYERS)
    found, expected = (evaluate(spec, RED, concept, ablation="mean", reference=r, **NO_CURVES) for r in (given, others))
    assert same(found.data, expected.data)


def test_an_evaluation_is_read_back_as_it_was_saved(spec, concept, others, tmp_path):
    found = evaluate(spec, RED, concept, others, **NO_CURVES)
    path = found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(path).data == found.data == Evaluation.load(tmp_path).data
    assert Evaluation.load(path).selectivity == found.selectivity
    assert found.save(tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("content", ["", "[]", '{"schema": "viscircuits/circuit"}', json.dumps({"schema": SCHEMA})])
def test_a_file_that_holds_no_evaluation_is_named(content, tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(FileFormatError, match=r"evaluation\.json"):
        Evaluation.load(path)
    with pytest.raises(FileFormatError, match="nowhere"):
        Evaluation.load(tmp_path / "nowhere")


def test_every_interval_holds_its_value_and_everything_is_plain_json(spec, concept, others):
    attributions = attribute(spec, concept, LAYERS, reference=others)
    options = {"draws": 1, "unit_fractions": (0.5,), "edge_fractions": (1.0,)}
    found = evaluate(spec, RED, concept, others, attributions=attributions, **options)
    assert json.loads(json.dumps(found.data, allow_nan=False)) == found.data

    def intervals(value):
        if isinstance(value, dict) and "low" in value:
            yield value
        elif isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                yield from intervals(each)

    listed = list(intervals(found.data))
    assert len(listed) > 80
    assert all(each["low"] <= each["value"] + 1e-9 and each["value"] <= each["high"] + 1e-9 for each in listed)


def test_the_table_has_a_row_for_each_circuit_and_aligned_columns(spec, concept, others):
    attributions = attribute(spec, concept, LAYERS, reference=others)
    found = evaluate(spec, RED, concept, others, attributions=attributions, **NO_CURVES)
    head, *rows = found.table().split("\n")
    assert [line.split("  ")[0] for line in rows] == [
        "nothing", "circuit", "random", "activation", "activation difference", "weight norm",
    ]  # fmt: skip
    columns = [head.index(name) for name in ("concept accuracy", "others accuracy", "selectivity")]
    for line in rows:
        assert all(line[at - 1] == " " and line[at] != " " for at in columns if at < len(line))
    assert " ".join(rows[1].split()) == "circuit 0.00 [0.00, 0.49] 1.00 [0.61, 1.00] 1.00 [1.00, 1.00]"
    assert "–" in evaluate(spec, RED, concept, **NO_CURVES).table()  # no others, nothing to show for them


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("ablation", ["mean", "resample", "noise"])
def test_an_ablation_without_its_reference_is_refused(ablation, spec, concept):
    with pytest.raises(ViscircuitsError, match=rf"'{ablation}' ablation needs reference"):
        evaluate(spec, RED, concept, ablation=ablation)
    assert count_hooks(spec.model) == 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"draws": 0}, "draws=0"),
        ({"unit_fractions": (0.5, 1.5)}, "1.5"),
        ({"edge_fractions": (-0.5,)}, "-0.5"),
        ({"edge_layers": ("3", "1")}, "from '3' to '1'"),
        ({"ablation": "median"}, "median"),
        ({"labels": {"elsewhere.png": "red"}}, "elsewhere.png"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_mistakes_name_the_culprit(options, names, spec, concept):
    with pytest.raises(ViscircuitsError, match=names):
        evaluate(spec, RED, concept, **options)
    assert count_hooks(spec.model) == 0


def test_a_circuit_of_another_network_is_refused(spec, concept):
    wider = Circuit({"1": (0,), "3": (6,)}, {"1": 6, "3": 7}, {"1": (1.0,), "3": (1.0,)})
    with pytest.raises(ViscircuitsError, match="belongs to another network"):
        evaluate(spec, wider, concept)
    with pytest.raises(ViscircuitsError, match="'9'"):
        evaluate(spec, Circuit({"9": (0,)}, {"9": 4}, {"9": (1.0,)}), concept)


def test_an_empty_set_is_an_error_that_names_it(spec, concept, folders):
    nothing = torch.zeros(0, 3, 4, 4)
    with pytest.raises(ImageError, match="no image"):
        evaluate(spec, RED, nothing)
    with pytest.raises(ImageError, match="no image"):
        evaluate(spec, RED, concept, nothing)
    (folders / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        evaluate(spec, RED, open_images(folders / "broken.png"))


def test_images_that_can_be_read_only_once_are_refused_rather_than_lost(spec, concept):
    once = (to_tensor(picture.image) for picture in concept)
    with pytest.raises(ImageError, match="only once"):
        evaluate(spec, RED, once)


def test_an_exception_inside_leaves_no_hook_and_the_networks_modes_and_weights(spec, concept, others):
    before = {name: value.clone() for name, value in spec.model.state_dict().items()}
    calls = []

    def failing(image: Image.Image) -> Tensor:
        calls.append(image)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return to_tensor(image)

    spec.model.train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(spec, transform=failing), RED, concept, others, batch_size=1, **NO_CURVES)
    assert len(calls) == 4
    assert spec.model.training
    assert count_hooks(spec.model) == 0
    assert all(torch.equal(value, before[name]) for name, value in spec.model.state_dict().items())


def test_no_image_that_found_any_of_the_circuits_tests_them_whichever_set_it_is_in(spec, concept, others):
    found = attribute(spec, concept, ["1", "3"], reference=others)
    circuit = select(found.contrast("difference"), 1)
    for left, right in ((concept, others), (others, concept)):
        with pytest.raises(ImageError, match="used to find"):
            evaluate(spec, circuit, left, right, unit_fractions=(), edge_fractions=(), draws=1)
    fresh = replace(circuit, provenance={})
    with pytest.raises(ImageError, match="used to find"):
        evaluate(
            spec, fresh, concept, rivals={"rival": circuit | circuit}, unit_fractions=(), edge_fractions=(), draws=1
        )


# ------------------------------------------------------------------ sizes


def kept_alone(spec, images, circuit, empty) -> float:
    pictures = torch.stack([to_tensor(picture.image) for picture in images])
    with torch.no_grad():
        full = spec.model(pictures)[:, 0].mean()
        with ablate(spec, circuit, keep=True):
            kept = spec.model(pictures)[:, 0].mean()
        with ablate(spec, empty):
            nothing = spec.model(pictures)[:, 0].mean()
    return float((kept - nothing) / (full - nothing))


def test_each_part_is_also_kept_alone_and_so_are_random_parts_of_its_size(spec, concept, others):
    found = evaluate(spec, RED, concept, others, unit_fractions=(0.5,), edge_fractions=(), draws=2, seed=3)
    by_name = {series["name"]: series for series in found.data["unit_curve"]["series"]}
    half = Circuit({"1": (0,), "3": (0,)}, WIDTHS)
    own = [each["value"] for each in by_name["circuit"]["faithfulness"]]
    assert own == pytest.approx([0, kept_alone(spec, concept, half, EVERYTHING), 1])
    assert by_name["circuit"]["faithfulness"][-1] == found.data["faithfulness"]
    generator = torch.Generator().manual_seed(3)
    drawn = [evaluation.random_like(RED, generator=generator) for _ in range(2)]
    expected = sum(kept_alone(spec, concept, each, EVERYTHING) for each in drawn) / 2
    control = by_name["random"]["faithfulness"][-1]
    assert control["value"] == pytest.approx(expected)
    assert control["low"] <= control["value"] <= control["high"]


def test_what_is_kept_alone_is_run_on_the_concept_and_not_on_the_others(spec, concept, others):
    passes = []
    count = spec.model.register_forward_hook(lambda *_: passes.append(1))
    options = {"unit_fractions": (0.5,), "edge_fractions": (), "draws": 1, "labels": None}
    evaluate(spec, RED, concept, **options)
    alone = len(passes)
    evaluate(spec, RED, concept, others, **options)
    count.remove()
    n_kept = 2 + 1 + 2  # the circuit's half and whole, everything, the random circuit's half and whole
    assert len(passes) - alone == alone + (alone - n_kept) - 1  # one pass described the layers


def test_sizes_are_the_curve_in_the_words_of_the_page(spec, concept, others):
    found = evaluate(spec, RED, concept, others, unit_fractions=(0.5,), edge_fractions=(), draws=2).data
    series = {each["name"]: each for each in found["unit_curve"]["series"]}
    half, whole = sizes(found)
    assert (half["fraction"], half["n_units"], whole["fraction"], whole["n_units"]) == (0.5, 2, 1.0, 3)
    for i, size in ((1, half), (2, whole)):
        for part in ("concept", "others", "selectivity", "faithfulness"):
            assert size[part] == series["circuit"][part][i]
        assert size["controls"] == {"random": series["random"]["selectivity"][i]}
    (alone,) = sizes(evaluate(spec, RED, concept, unit_fractions=(), edge_fractions=(), draws=1).data)
    assert (alone["others"], alone["selectivity"]) == (None, None)
    assert set(alone["controls"]) == {"random"}
    assert set(half) == set(SizeData.__annotations__)


def test_an_older_evaluation_knows_faithfulness_of_the_whole_circuit_alone(spec, concept):
    found = json.loads(json.dumps(evaluate(spec, RED, concept, edge_fractions=(), draws=1).data))
    for series in found["unit_curve"]["series"]:
        series.pop("faithfulness", None)
    assert [size["faithfulness"] for size in sizes(found)] == [None, None, None, found["faithfulness"]]
    assert sizes(None) == sizes({"unit_curve": None}) == []
