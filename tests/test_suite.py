"""The full suite: each figure beside a slower twin or a law, on a network whose circuits were planted by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from oracles import colour_network
from viscircuits import (
    attribute,
    cli,
    discovery,
    evaluate,
    evaluate_fully,
    evaluation,
    measure,
    metrics,
    open_images,
    select,
    suite,
    tables,
    verdicts,
    wrap,
)
from viscircuits.ablation import ablate
from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.confidence import confidence
from viscircuits.contenders import OUTSIDE, at_size, contenders, gradient, strengths
from viscircuits.errors import FileFormatError, ImageError, ViscircuitsError
from viscircuits.evaluation import Evaluation
from viscircuits.hooks import count_hooks
from viscircuits.models import ModelSpec
from viscircuits.task import log_probability

LAYERS = ("1", "3")
WIDTHS = {"1": 6, "3": 6}
RED = Circuit(
    {"1": (0, 1), "3": (0,)},
    WIDTHS,
    {"1": (2.0, 1.0), "3": (1.0,)},
    tuple(Edge(Unit("1", m), Unit("3", 0), 1.0 - m / 10, 1.0) for m in (0, 1)),
)
IDLE = Circuit({"1": (0, 1), "3": (0, 5)}, WIDTHS, {"1": (2.0, 1.0), "3": (1.0, 0.5)})
SCORES = {
    "1": torch.tensor([2.0, 1.0, 0.5, 0.4, 0.3, 0.2], dtype=torch.float64),
    "3": torch.tensor([1.0, 0.8, 0.6, 0.3, 0.2, 0.1], dtype=torch.float64),
}
BRIEF = {"unit_fractions": (), "edge_fractions": (), "draws": 1, "checked_units": 0}


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "N_BOOTSTRAP", 20)
        patch.setattr(verdicts, "N_BOOTSTRAP", 60)
        patch.setattr(suite, "N_AGREEMENT", 20)
        patch.setattr(suite, "N_SIZED", 1)
        yield


def always_on() -> nn.Sequential:
    """As `colour_network`, but what says red is a unit that is at 0.3 whatever the image shows."""
    net = colour_network()
    with torch.no_grad():
        net[6].weight[0] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
        net[2].bias[3] = 0.3
    return net


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((4, 4)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(4, 4, 3).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return wrap(colour_network(), to_tensor, LAYERS, ["red", "green", "blue"])


def paint(folder, sets) -> None:
    for position, (set_, colour, n) in enumerate(sets):
        into = folder / set_ / ("red", "green", "blue")[colour]
        into.mkdir(parents=True)
        for i in range(n):
            pixel = [20 + 10 * i + position] * 3
            pixel[colour] = 150 + 20 * i
            pixel[(colour + 1) % 3] += 5
            Image.new("RGB", (6, 6), tuple(pixel)).save(into / f"{i}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photographs of one colour that hold a little of the others; 5 red, 3 green and 3 blue, and 3 other red ones."""
    tmp_path = tmp_path_factory.mktemp("colours")
    paint(tmp_path, (("concept", 0, 5), ("others", 1, 3), ("others", 2, 3), ("more", 0, 3)))
    return tmp_path


@pytest.fixture(scope="module")
def concept(folders):
    return open_images(folders / "concept")


@pytest.fixture(scope="module")
def others(folders):
    return open_images(folders / "others")


def pixels(images) -> Tensor:
    return torch.stack([to_tensor(picture.image) for picture in images])


def nats(spec, images, circuit=None, ablation="zero", **how) -> Tensor:
    """Log-probability of red on each image, with a circuit removed or kept: the slow twin."""
    with torch.no_grad():
        if circuit is None:
            outputs = spec.model(images)
        else:
            with ablate(spec, circuit, ablation, **how):
                outputs = spec.model(images)
    return log_probability(outputs, torch.zeros(len(images), dtype=torch.long)).double()


def everything(circuit: Circuit) -> Circuit:
    return circuit | circuit.complement()


def row(found: Evaluation, name: str, ablation: str = "zero") -> dict:
    rows = found.data["full"]["by_ablation"][ablation]["rows"]
    return next(each for each in rows if each["name"] == name)


def verdict_of(found: Evaluation, measure_: str, against: str, ablation: str) -> str:
    said = found.data["full"]["by_ablation"][ablation]["verdicts"]
    return next(each["verdict"] for each in said if (each["measure"], each["against"]) == (measure_, against))


# ------------------------------------------------------------------ figures beside their slow twins


def test_ratios_are_those_of_the_metrics_on_outcomes_taken_one_by_one(spec, concept, others):
    found = evaluate_fully(spec, RED, concept, others, **BRIEF)
    images = pixels(concept)
    full, empty = nats(spec, images), nats(spec, images, everything(RED))
    kept, without = nats(spec, images, RED, keep=True), nats(spec, images, RED)
    mine = row(found, "circuit")
    assert found.data["full"]["smooth"] == "log-probability"
    assert mine["faithfulness"]["log-probability"]["value"] == pytest.approx(metrics.faithfulness(full, kept, empty))
    assert mine["completeness"]["log-probability"]["value"] == pytest.approx(metrics.completeness(full, without, empty))
    assert mine["faithfulness"]["logit"]["value"] == pytest.approx(found.faithfulness.value)
    assert set(mine["faithfulness"]) == {"accuracy", "logit", "kl", "margin", "log-probability"}


def test_everything_is_faithful_and_leaves_nothing(spec, concept, others):
    whole = everything(RED)
    found = evaluate_fully(spec, whole, concept, others, **BRIEF)
    for measure_ in ("logit", "log-probability", "kl"):
        assert row(found, "circuit")["faithfulness"][measure_] == {"value": 1, "low": 1, "high": 1}
        assert row(found, "circuit")["completeness"][measure_] == {"value": 0, "low": 0, "high": 0}


def test_cpr_and_cmd_are_those_of_the_metrics_over_the_ranking_kept(spec, concept, others):
    found = evaluate_fully(spec, RED, concept, others, unit_scores=SCORES, **BRIEF)
    images = pixels(concept)
    full, empty = nats(spec, images), nats(spec, images, everything(RED))
    shares = []
    for fraction in metrics.MIB_FRACTIONS:
        kept = nats(spec, images, at_size(RED, SCORES, fraction), keep=True)
        shares.append(metrics.faithfulness(full, kept, empty))
    mine = row(found, "circuit")
    assert [each["value"] for each in mine["faithfulness_by_size"]] == pytest.approx(shares)
    assert mine["cpr"]["value"] == pytest.approx(metrics.cpr(torch.tensor(shares)), rel=1e-6)
    assert mine["cmd"]["value"] == pytest.approx(metrics.cmd(torch.tensor(shares)), rel=1e-6)
    assert shares[-1] == 1
    assert found.data["full"]["n_units"] == [2] * 7 + [2, 6, 12]


def test_the_area_is_that_of_the_metric_over_accuracies_taken_one_by_one(spec, concept, others):
    options = {**BRIEF, "unit_fractions": (0.5,)}
    found = evaluate_fully(spec, RED, concept, others, **options)
    curves = []
    half = Circuit({"1": (0,), "3": (0,)}, WIDTHS)
    for images, label in ((pixels(concept), [0] * 5), (pixels(others), [2] * 3 + [1] * 3)):
        points = []
        for part in (Circuit({"1": (), "3": ()}, WIDTHS), half, RED):
            with torch.no_grad(), ablate(spec, part):
                points.append(metrics.correct(spec.model(images), torch.tensor(label)))
        curves.append(torch.stack(points))
    area = metrics.selectivity_area(torch.tensor([0, 0.5, 1]), *curves)
    assert row(found, "circuit")["area"]["value"] == pytest.approx(area) == 0.75
    assert row(found, "circuit")["selectivity"]["value"] == 1


def test_what_is_shown_outermost_is_what_the_basic_suite_gives(spec, concept, others):
    options = {"draws": 1, "unit_fractions": (0.5,), "edge_fractions": (1.0,)}
    full = evaluate_fully(
        spec, RED, concept, others, ablations=("mean", "zero"), reference=others, checked_units=2, **options
    )
    for ablation in ("mean", "zero"):
        basic = evaluate(spec, RED, concept, others, ablation=ablation, reference=others, **options).data
        found = full.under(ablation).data
        names = [entry["name"] for entry in basic["circuits"]]
        assert [entry["name"] for entry in found["circuits"]][: len(names)] == names
        for entry, expected in zip(found["circuits"], basic["circuits"], strict=False):
            assert entry["selectivity"] == expected["selectivity"]
            assert entry["concept"]["accuracy"] == expected["concept"]["accuracy"]
        for part in ("faithfulness", "completeness"):
            assert found[part] == basic[part]
        assert found["unit_curve"]["series"][: len(names)] == basic["unit_curve"]["series"]
        assert found["edge_curve"] == (basic["edge_curve"] if ablation == "mean" else None)
    assert full.data["ablation"] == "mean"
    with pytest.raises(ViscircuitsError, match="noise"):
        full.under("noise")


def test_what_comes_before_the_layers_is_run_once_for_each_batch_and_the_figures_stay(spec, concept, others):
    ran = []

    class Counted(nn.Conv2d):
        def forward(self, images):
            ran.append(1)
            return super().forward(images)

    spec.model[0].__class__ = Counted
    options = {**BRIEF, "unit_fractions": (0.25, 0.5), "draws": 2}
    try:
        few = evaluate_fully(spec, RED, concept, others, **BRIEF)
        n_few = len(ran)
        many = evaluate_fully(spec, RED, concept, others, **options)
    finally:
        spec.model[0].__class__ = nn.Conv2d
    assert len(ran) - n_few == n_few < 30  # more conditions cost the first layer nothing more
    assert row(many, "circuit")["selectivity"] == row(few, "circuit")["selectivity"]


# ------------------------------------------------------------------ units removed alone


def exact(spec, images) -> dict[str, Tensor]:
    """Every unit's effect on red's log-probability, one ablation after another."""
    full = nats(spec, images).mean()
    return {
        layer: torch.stack(
            [(full - nats(spec, images, Circuit({layer: (unit,)}, WIDTHS)).mean()).abs() for unit in range(6)]
        )
        for layer in LAYERS
    }


def test_exact_effects_agree_with_themselves_and_disagree_with_their_negation(spec, concept, others):
    effects = exact(spec, pixels(concept))
    options = {**BRIEF, "checked_units": 12}
    for sign in (1, -1):
        scores = {layer: sign * effect for layer, effect in effects.items()}
        found = evaluate_fully(spec, RED, concept, others, unit_scores=scores, **options)
        agreement = row(found, "circuit")["agreement"]
        assert agreement["pearson"]["value"] == pytest.approx(sign)
        assert agreement["spearman"]["value"] == pytest.approx(sign)
    assert found.data["full"]["checked"] == {"anywhere": 12, "inside": 3, "n_images": 5}


def test_a_score_that_is_the_same_for_all_units_has_no_agreement(spec, concept, others):
    flat = {layer: torch.ones(6) for layer in LAYERS}
    found = evaluate_fully(spec, RED, concept, others, unit_scores=flat, **{**BRIEF, "checked_units": 12})
    assert row(found, "circuit")["agreement"] is None


def test_minimality_is_that_of_the_metric_and_names_the_idle_unit(spec, concept, others):
    options = {**BRIEF, "checked_units": 12}
    images = pixels(concept)
    alone = torch.stack([nats(spec, images, Circuit({u.layer: (u.index,)}, WIDTHS)) for u in RED])
    found = evaluate_fully(spec, RED, concept, others, **options).data["full"]["by_ablation"]["zero"]["minimality"]
    assert found["value"] == pytest.approx(metrics.minimality(nats(spec, images), alone))
    assert found["unit"] in ("1:0", "1:1")
    assert found["felt"]["circuit"] == 1
    idle = evaluate_fully(spec, IDLE, concept, others, **options).data["full"]["by_ablation"]["zero"]["minimality"]
    assert (idle["value"], idle["unit"], idle["felt"]["circuit"], idle["n_units"]) == (0, "3:5", 0.75, 4)


def test_a_sample_of_units_and_images_is_counted_and_repeats(spec, concept, others):
    options = {**BRIEF, "checked_units": 2, "checked_images": 3, "unit_scores": SCORES}
    first, again = (evaluate_fully(spec, RED, concept, others, **options).data for _ in range(2))
    assert first["full"]["checked"] == {"anywhere": 2, "inside": 2, "n_images": 3}
    assert first == again


# ------------------------------------------------------------------ contenders and rankings


def test_a_ranking_has_the_circuits_units_first_and_grows_by_taking_units_in():
    backwards = {layer: -scores for layer, scores in SCORES.items()}
    sizes = [at_size(RED, backwards, fraction).units for fraction in (1 / 6, 2 / 6, 0.5, 1.0)]
    assert sizes[0] == {"1": (0,), "3": (0,)}
    assert sizes[1] == {"1": (0, 1), "3": (0, 5)}  # all of the circuit, then the best of the rest
    assert sizes[2] == {"1": (0, 1, 5), "3": (0, 4, 5)}
    assert sizes[3] == {layer: tuple(range(6)) for layer in LAYERS}


def test_contenders_have_the_circuits_size_and_those_outside_share_nothing_with_it(spec, concept, others):
    attributions = attribute(spec, concept, LAYERS, reference=others)
    circuit = select(attributions.contrast("difference"), {"1": 2, "3": 1})
    found, scores = contenders(
        spec, circuit, concept, attributions=attributions, rivals={"green": RED}, found_with=concept, draws=3
    )
    assert list(found) == [
        "circuit", "random", "activation", "activation difference", "weight norm", "gradient", OUTSIDE,
        "no refinement", "green",
    ]  # fmt: skip
    for drawn in found.values():
        assert [[len(each.units[layer]) for layer in LAYERS] for each in drawn] == [[2, 1]] * len(drawn)
    assert all((each & circuit).n_units == 0 for each in found[OUTSIDE])
    assert len(found[OUTSIDE]) == 3
    assert set(scores) == {
        "circuit", "random", "activation", "activation difference", "weight norm", "gradient"
    }  # fmt: skip
    assert found["no refinement"][0].units == select(
        attributions.contrast("difference"), {"1": 2, "3": 1}, refine="none"
    ).units  # fmt: skip


def test_there_is_nothing_outside_more_than_half_of_a_layer(spec, concept):
    large = Circuit({"1": (0, 1, 2, 3), "3": (0,)}, WIDTHS)
    assert OUTSIDE not in contenders(spec, large, concept)[0]


def test_strengths_are_the_sums_of_rows_and_columns_by_the_circuits_contrast(spec, concept, others):
    attributions = attribute(spec, concept, LAYERS, reference=others)
    (matrix,) = attributions.contrast("ratio").matrices
    found = strengths(attributions, replace(RED, provenance={"contrast": "ratio"}))
    assert found["1"].tolist() == pytest.approx(matrix.values.double().sum(0).tolist())
    assert found["3"].tolist() == pytest.approx(matrix.values.double().sum(1).tolist())
    assert strengths(None, RED) is None
    assert strengths(attributions, Circuit({"3": (0,)}, WIDTHS)) is None


def test_the_gradient_control_is_the_gradients_norm_by_hand(spec, concept):
    images = pixels(concept)
    maps = spec.model[:4](images).detach().requires_grad_()
    spec.model[4:](maps).log_softmax(1)[:, 0].sum().backward()  # red is the answer to all
    expected = maps.grad.flatten(2).norm(dim=2).mean(0)
    assert gradient(spec, ["3"], images, 2)["3"].tolist() == pytest.approx(expected.tolist())


def test_unit_scores_that_do_not_fit_are_refused(spec, concept):
    with pytest.raises(ViscircuitsError, match="layer '3' has 6 units, its scores have shape"):
        evaluate_fully(spec, RED, concept, unit_scores={**SCORES, "3": torch.ones(5)})


def test_a_rival_in_other_layers_is_removed_but_not_kept_alone(spec, concept, others):
    late = Circuit({"3": (0,)}, {"3": 6})
    found = evaluate_fully(spec, RED, concept, others, rivals={"late": late}, **BRIEF)
    assert row(found, "late")["selectivity"]["value"] == 1
    assert row(found, "late")["faithfulness"] == {}
    said = found.data["full"]["by_ablation"]["zero"]["verdicts"]
    assert {each["measure"] for each in said if each["against"] == "late"} == {"selectivity"}


# ------------------------------------------------------------------ verdicts


def test_a_verdict_is_where_the_whole_interval_lies():
    assert verdicts.verdict({"value": 0.3, "low": 0.1, "high": 0.5}) == "beats"
    assert verdicts.verdict({"value": -0.3, "low": -0.5, "high": -0.1}) == "loses"
    assert verdicts.verdict({"value": 0.3, "low": 0.0, "high": 0.5}) == "undecided"
    assert verdicts.verdict({"value": 0.0, "low": 0.0, "high": 0.0}) == "undecided"


def test_less_is_better_of_cmd_and_of_the_distance_of_completeness_from_nothing():
    rows = {
        "circuit": dict.fromkeys(verdicts.BETTER, torch.full((9,), -0.1)),
        "rival": dict.fromkeys(verdicts.BETTER, torch.full((9,), 0.4)),
    }
    found = {each["measure"]: each["verdict"] for each in verdicts.verdicts(rows)}
    assert found == {
        "selectivity": "loses", "area": "loses", "faithfulness": "loses", "completeness": "beats", "cpr": "loses",
        "cmd": "beats",
    }  # fmt: skip


def test_flips_are_the_verdicts_that_differ_and_say_which_turned_round():
    def said(*verdicts_):
        names = ("a", "b", "c")
        return [{"measure": "area", "against": n, "verdict": v} for n, v in zip(names, verdicts_, strict=True)]

    found = verdicts.flips({"zero": said("beats", "beats", "beats"), "mean": said("beats", "undecided", "loses")})
    assert [(flip["against"], flip["reversed"]) for flip in found] == [("b", False), ("c", True)]
    assert found[0]["verdicts"] == {"zero": "beats", "mean": "undecided"}
    assert verdicts.flips({"zero": said("beats", "loses", "undecided")}) == []


def test_a_unit_that_is_always_on_beats_a_dead_one_under_zero_but_not_under_mean(concept, others):
    spec = wrap(always_on(), to_tensor, LAYERS, ["red", "green", "blue"])
    on, dead = (Circuit({"3": (unit,)}, {"3": 6}) for unit in (3, 5))
    found = evaluate_fully(
        spec, on, concept, others, rivals={"dead": dead}, ablations=("zero", "mean"), reference=others, **BRIEF
    )
    assert verdict_of(found, "selectivity", "dead", "zero") == "beats"
    assert verdict_of(found, "selectivity", "dead", "mean") == "undecided"
    flip = next(each for each in found.data["full"]["flips"] if each["against"] == "dead")
    assert (flip["measure"], flip["verdicts"]) == ("selectivity", {"zero": "beats", "mean": "undecided"})
    assert "against dead: beats under zero, undecided under mean" in found.table()


def test_a_circuit_is_undecided_against_itself(spec, concept, others):
    found = evaluate_fully(spec, RED, concept, others, rivals={"itself": RED}, unit_scores=SCORES, **BRIEF)
    said = found.data["full"]["by_ablation"]["zero"]["verdicts"]
    mine = [each for each in said if each["against"] == "itself"]
    assert {each["measure"] for each in mine} == {"selectivity", "faithfulness", "completeness"}
    assert all(each["difference"] == {"value": 0, "low": 0, "high": 0} for each in mine)


def test_bootstrap_means_of_shared_draws_equal_the_metrics_bootstrap():
    values = torch.rand(30, generator=torch.Generator().manual_seed(3)).double()
    drawn = verdicts.Drawn({"concept": {("baseline",): {"m": values}}}, seed=5)
    expected = metrics.bootstrap(torch.mean, values, draws=60, generator=torch.Generator().manual_seed(5))
    found = verdicts.interval(drawn.mean("concept", [("baseline",)], "m")[:, 0])
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )  # fmt: skip


# ------------------------------------------------------------------ other images, overlap, stability


def test_selectivity_on_other_images_is_what_evaluate_gives_on_these(spec, folders, concept, others):
    more = open_images(folders / "more")
    found = evaluate_fully(spec, RED, concept, others, transfer=(more, None), found_with=(concept, others), **BRIEF)
    there, back = found.data["full"]["by_ablation"]["zero"]["transfer"]
    expected = evaluate(spec, RED, more, others, unit_fractions=(), edge_fractions=(), draws=1)
    assert there["n"]["concept"]["n"] == 3
    for mine, basic in zip(there["rows"][:2], expected.data["circuits"], strict=True):
        assert mine["selectivity"]["value"] == pytest.approx(basic["selectivity"]["value"])
    assert back["rows"][0]["difference"]["value"] == 0  # the same images as here
    assert back["images"] == "the images it was found with"


def test_transfer_leaves_out_images_that_found_the_circuit_and_found_with_does_not(spec, folders, concept, others):
    circuit = select(attribute(spec, concept, LAYERS), {"1": 2, "3": 1})
    more = open_images(folders / "more")
    found = evaluate_fully(spec, circuit, more, others, found_with=(concept, others), **BRIEF)
    (back,) = found.data["full"]["by_ablation"]["zero"]["transfer"]
    assert back["n"]["concept"] == {"n": 5, "left_out": 0}
    with pytest.raises(ImageError, match="all 5 images"):
        evaluate_fully(spec, circuit, more, others, transfer=(concept, None), **BRIEF)


def test_without_other_images_transfer_says_why_it_is_not_known(spec, folders, concept):
    found = evaluate_fully(spec, RED, concept, transfer=(open_images(folders / "more"), None), **BRIEF)
    (there,) = found.data["full"]["by_ablation"]["zero"]["transfer"]
    assert "no selectivity" in there["why"]
    assert row(found, "circuit")["selectivity"] is None


def test_overlap_with_a_rival_stands_beside_chance(spec, concept, others):
    found = evaluate_fully(spec, RED, concept, others, rivals={"idle": IDLE}, **BRIEF).data["full"]["overlap"]
    idle = next(each for each in found if each["name"] == "idle")
    together = metrics.overlap_together(metrics.overlap(RED, IDLE))
    assert (idle["jaccard"], idle["chance"], idle["p_value"]) == (0.75, together.chance, together.p_value)
    outside = next(each for each in found if each["name"] == OUTSIDE)
    assert outside["jaccard"] == 0 < outside["chance"]


def test_stability_comes_from_the_circuit_the_draws_or_single_images_or_says_that_it_is_unknown(spec, concept, others):
    drawn = attribute(spec, concept, LAYERS, draws=5)
    circuit = select(drawn, {"1": 2, "3": 1})
    asked = confidence(drawn, circuit)
    said = suite.stability_of(circuit, drawn)
    assert said["units"] == {layer: list(each) for layer, each in asked.circuit.chosen.items()}
    assert (said["draws"], said["from"]) == (5, "the draws of the attributions")
    carried = replace(asked.circuit, selection={**circuit.selection, "confidence": asked.summary()})
    assert suite.stability_of(carried, None) == {**said, "from": "the draws it was discovered with"}
    assert not suite.stability_of(circuit, None)["known"]
    single = attribute(spec, concept, LAYERS, reference=others, per_image=True)
    by_image = suite.stability_of(select(single.contrast("difference"), {"1": 2, "3": 1}), single)
    assert (by_image["draws"], by_image["from"]) == (20, "single images, drawn anew")


def test_draws_of_single_images_are_weighted_means_of_them(spec, concept):
    single = attribute(spec, concept, LAYERS, per_image=True)
    (matrix,) = suite._with_draws(single, seed=0).matrices
    low, high = matrix.per_image.min(0).values, matrix.per_image.max(0).values
    assert matrix.draws.shape == (20, 6, 6)
    assert bool(((matrix.draws >= low - 1e-6) & (matrix.draws <= high + 1e-6)).all())
    assert matrix.draws.std(0).max() > 0


# ------------------------------------------------------------------ as data and as text


@pytest.fixture(scope="module")
def found(spec, concept, others) -> Evaluation:
    return evaluate_fully(
        spec, RED, concept, others, unit_scores=SCORES, rivals={"activation difference": IDLE},
        ablations=("zero", "mean"), reference=others, transfer=(others, concept), draws=1, unit_fractions=(0.5,),
        edge_fractions=(), checked_units=6,
    )  # fmt: skip


def test_it_is_read_back_as_it_was_saved_and_is_plain_json(found, tmp_path):
    path = found.save(tmp_path / "evaluation.json")
    assert json.loads(json.dumps(found.data, allow_nan=False)) == found.data
    assert Evaluation.load(path).data == found.data
    assert Evaluation.load(path).under("mean").data["ablation"] == "mean"


def test_an_evaluation_from_before_the_full_suite_still_loads(tmp_path):
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    old = {
        "schema": "viscircuits/evaluation", "version": 1, "ablation": "zero", "measure": "accuracy",
        "images": {"concept": {"n": 4}}, "baseline": {"concept": {"accuracy": interval}},
        "circuits": [{"name": "circuit", "concept": {"accuracy": interval}, "selectivity": interval}],
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(old))
    loaded = Evaluation.load(tmp_path)
    assert (loaded.selectivity.low, loaded.under("zero").data) == (0.25, old)
    assert "0.50 [0.25, 0.75]" in loaded.table()
    (tmp_path / "evaluation.json").write_text(json.dumps({**old, "full": {"version": 99}}))
    with pytest.raises(FileFormatError, match="full suite"):
        Evaluation.load(tmp_path)


def test_the_table_fits_100_columns_and_holds_every_part(found):
    lines = found.table().split("\n")
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for part in (
        "ZERO ABLATION", "MEAN ABLATION", "selectivity, area", "faithfulness", "CPR", "CMD", "Spearman", "minimality",
        "given for transfer", "units shared with", "by chance", "stability", "VERDICTS",
    ):  # fmt: skip
        assert part in text, part
    flips = found.data["full"]["flips"]
    assert sum(line.lstrip().startswith("against ") for line in lines) == len(flips)
    assert tables.show({"value": -0.001, "low": -0.5, "high": 2.0}) == "0.00 [-0.50, 2.00]"


def test_the_page_opens_with_it(found):
    from viscircuits.page import page

    assert '"by_ablation"' in page(RED, found.data, None, title="red", command="")


def test_batch_size_changes_nothing_but_rounding(spec, concept, others):
    options = {**BRIEF, "ablations": ("mean",), "reference": measure(spec, others, LAYERS), "unit_scores": SCORES}
    two, all_ = (evaluate_fully(spec, RED, concept, others, batch_size=size, **options) for size in (2, 16))
    for name in ("circuit", "random"):
        for part in ("selectivity", "cpr", "cmd"):
            assert row(two, name, "mean")[part] == pytest.approx(row(all_, name, "mean")[part], abs=1e-5)


def test_embeddings_are_judged_by_their_direction(spec, concept, others):
    towers = replace(spec, outputs="embedding")
    found = evaluate_fully(towers, RED, concept, others, found_with=(concept, others), **BRIEF)
    assert found.data["full"]["smooth"] == "cosine"
    assert set(row(found, "circuit")["faithfulness"]) == {"cosine"}
    assert "gradient" not in {each["name"] for each in found.data["circuits"]}


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ablations": ()}, "at least one ablation"),
        ({"ablations": ("zero", "mean")}, "'mean' ablation needs reference"),
        ({"ablations": ("zero", "median")}, "median"),
        ({"checked_images": 0}, "0 images"),
        ({"checked_units": -1}, "-1 units"),
        ({"draws": 0}, "draws=0"),
    ],
)
def test_mistakes_name_the_culprit(options, told, spec, concept):
    with pytest.raises(ViscircuitsError, match=told):
        evaluate_fully(spec, RED, concept, **options)
    assert count_hooks(spec.model) == 0


# ------------------------------------------------------------------ on the command line


@pytest.fixture
def folder(spec, folders, tmp_path, monkeypatch):
    """A result folder of the planted network, found with halves of both sets."""
    monkeypatch.setattr(discovery, "load_model", lambda address, *, weights: spec)
    options = {"reference": folders / "others", "units": {"1": 2, "3": 1}, "draws": 1, "n_pictures": 0, "bootstrap": 3}
    discovery.discover(spec, folders / "concept", tmp_path / "red", edge_fractions=(), **options)
    return tmp_path / "red"


def run_evaluate(*words) -> int:
    with patch.object(sys, "argv", ["viscircuits", "evaluate", *map(str, words)]):
        try:
            return int(cli.main() or 0)
        except SystemExit as end:
            return int(end.code or 0)


def test_the_full_suite_of_a_folder_takes_zero_and_mean_and_the_images_it_was_found_with(folder, folders, capsys):
    code = run_evaluate(
        folder, folders / "more", "--others", folders / "others", "--suite", "full", "--draws", "1",
        "--checked-units", "2", "--transfer", folders / "concept",
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    loaded = Bundle.load(folder)
    full = loaded.evaluation.data["full"]
    assert list(full["by_ablation"]) == ["zero", "mean"]
    assert loaded.evaluation.table() in printed
    assert full["checked"]["anywhere"] == 2
    given, back = full["by_ablation"]["mean"]["transfer"]
    assert (given["n"]["concept"]["n"], given["n"]["concept"]["left_out"]) == (3, 2)
    assert (back["n"]["concept"]["n"], back["n"]["concept"]["left_out"]) == (2, 0)
    assert full["stability"]["draws"] == 3
    assert "by_ablation" in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (("--ablation", "zero,mean"), "--suite full"),
        (("--ablation", "zero,median", "--suite", "full"), "median"),
        (("--ablation", ","), "--ablation"),
        (("--transfer", "nowhere"), "--suite full"),
        (("--suite", "full", "--checked-images", "0"), "0 images"),
        (("--suite", "half"), "half"),
    ],
)
def test_mistakes_in_words_name_the_culprit(words, culprit, folder, folders, capsys):
    assert run_evaluate(folder, folders / "more", *words) == 2
    assert culprit in capsys.readouterr().err


def test_the_confidence_of_a_circuit_and_stability_count_the_same(spec, concept):
    drawn = attribute(spec, concept, LAYERS, draws=6)
    circuit = select(drawn, {"1": 2, "3": 1})
    again = [select(drawn.draw(i), {"1": 2, "3": 1}, restarts=1) for i in range(6)]
    counted = metrics.stability(again)
    found = confidence(drawn, circuit, choose=lambda each: again[each.provenance["draw"]]).frequency
    assert all(torch.equal(found[layer], counted[layer]) for layer in LAYERS)
