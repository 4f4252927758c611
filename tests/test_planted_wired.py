"""Planted networks wired by hand, and the check that their truth passes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from viscircuits.ablation import ablate, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import activations
from viscircuits.metrics import auroc
from viscircuits.planted import PLANTED, Planted, families, plant
from viscircuits.planted.checks import Check, check
from viscircuits.planted.scenes import Figure, glyph, pictures
from viscircuits.planted.wired import arc, line, point
from viscircuits.task import observe

HAND_WIRED = families()["hand-wired"]


@lru_cache
def small(name: str, seed: int = 0) -> Planted:
    return plant(name, seed, n_decoys=2, n_images=6)


@lru_cache
def checked(name: str) -> Check:
    return check(small(name), n_images=4)


def unit(planted: Planted, layer: str, name: str) -> Unit:
    return Unit(layer, planted.names[layer].index(name))


def without(planted: Planted, *units: Unit, ablation: str | None = None) -> torch.Tensor:
    """Change of the behaviour on each concept image when these units are removed."""
    task = planted.task()
    chosen = {layer: tuple(sorted(u.index for u in units if u.layer == layer)) for layer in planted.layers}
    full = planted.model(planted.concept)[:, 0]
    with ablate(planted.model, Circuit(chosen, planted.widths), ablation or task.ablation, reference=task.statistics):
        return (planted.model(planted.concept)[:, 0] - full).detach()


# ---------------------------------------------------------------- the truth holds


@pytest.mark.parametrize("name", HAND_WIRED)
def test_the_stated_truth_is_what_exact_removal_finds(name: str) -> None:
    found = checked(name)
    assert found.problems == ()
    assert found.stray_unit == found.stray_edge == found.others == 0  # wired to nothing: not even rounding


@pytest.mark.parametrize("name", ["suppressor"])
def test_the_truth_holds_on_held_out_images_of_another_seed(name: str) -> None:
    assert check(small(name, seed=1), held_out=True, n_images=4).problems == ()


@pytest.mark.parametrize("name", sorted(set(HAND_WIRED) - {"spare"}))
def test_a_perfect_method_has_auroc_1(name: str) -> None:
    planted, found = small(name), checked(name)
    for layer, true in planted.units.items():
        assert auroc(found.units[layer], true) == 1
    for pair, true in planted.edges.items():
        assert auroc(found.edges[pair].flatten(), true.flatten()) == 1


@pytest.mark.parametrize("name", HAND_WIRED)
def test_the_concept_stands_out_from_its_matched_reference(name: str) -> None:
    planted = plant(name)
    concept, reference = planted.model(planted.test_concept)[:, 0], planted.model(planted.test_reference)[:, 0]
    beats = (concept[:, None] > reference).float().mean()
    assert beats > (0.8 if name == "suppressor" else 0.99)  # a suppressor is there to spoil some


# ---------------------------------------------------------------- the check can fail


def test_shares_are_those_of_ablate_and_prune_edges() -> None:
    planted, found = small("circle"), checked("circle")
    task = planted.task()
    images = planted.concept[:4]
    full = planted.model(images)[:, 0]
    source, target = unit(planted, "lines", "line 45"), unit(planted, "parts", "arc north-east")
    with prune_edges(planted.model, [Edge(source, target, 0.0, 0.0)], task.ablation, reference=task.statistics):
        by_pruning = (planted.model(images)[:, 0] - full).mean().abs() / found.size
    torch.testing.assert_close(
        found.edges["lines", "parts"][target.index, source.index], by_pruning.double(), atol=1e-5, rtol=1e-4
    )
    by_ablation = without(planted, source)[:4].mean().abs() / found.size
    torch.testing.assert_close(found.units["lines"][source.index], by_ablation.double(), atol=1e-5, rtol=1e-4)


def with_unit(planted: Planted, which: Unit, true: bool) -> Planted:
    units = {layer: each.clone() for layer, each in planted.units.items()}
    units[which.layer][which.index] = true
    edges = {pair: each & units[pair[1]][:, None] & units[pair[0]] for pair, each in planted.edges.items()}
    return replace(planted, units=units, edges=edges)


def test_a_unit_left_out_of_the_truth_is_found() -> None:
    planted = small("circle")
    lacking = with_unit(planted, unit(planted, "parts", "arc north-east"), False)
    problems = check(lacking, n_images=2).problems
    assert any("the strongest unit outside the circuit" in each for each in problems)
    assert any("the strongest edge outside the circuit" in each for each in problems)


def test_a_decoy_in_the_truth_is_found() -> None:
    planted = small("circle")
    (problem,) = check(with_unit(planted, unit(planted, "parts", "decoy 0"), True), n_images=2).problems
    assert problem == "the weakest unit of the circuit changes 0 of the behaviour, not more than 0.01"


def test_an_edge_left_out_of_the_truth_is_found() -> None:
    planted = small("circle")
    edges = {pair: each.clone() for pair, each in planted.edges.items()}
    n, m = edges["parts", "shapes"].nonzero()[0].tolist()
    edges["parts", "shapes"][n, m] = False
    problems = check(replace(planted, edges=edges), n_images=2).problems
    assert any("the strongest edge outside the circuit" in each for each in problems)
    assert not any("unit" in each for each in problems)


def test_redundancy_that_is_not_declared_is_found() -> None:
    problems = check(replace(small("spare"), redundant=()), n_images=2).problems
    assert [each.split(" of the circuit")[0] for each in problems] == ["the weakest unit", "the weakest edge"]


def test_redundancy_that_is_not_there_is_found() -> None:
    planted = small("copies")
    rings = tuple(unit(planted, "shapes", f"ring {copy}") for copy in "AB")
    (problem,) = check(replace(planted, redundant=(rings,)), n_images=2).problems
    assert "all but one of a redundant group" in problem


def test_a_network_that_does_nothing_has_no_truth() -> None:
    planted = small("circle")
    dead = replace(planted, concept=torch.zeros_like(planted.concept), reference=torch.zeros_like(planted.reference))
    with pytest.raises(ViscircuitsError, match="by nothing; its layers do not lead to the output judged"):
        check(dead)


# ---------------------------------------------------------------- what each network is for


def test_a_circuit_can_be_counted_by_hand() -> None:
    truth = small("circle").truth()
    assert [len(truth.units[layer]) for layer in truth.layers] == [4, 4, 1]  # lines, quarters, ring
    assert len(truth.edges_between("lines", "parts")) == 16
    assert len(truth.edges_between("parts", "shapes")) == 4


@pytest.mark.parametrize(("name", "seed"), [("circle", 0), ("decoy", 2), ("spare", 4), ("residual", 0)])
def test_decoys_are_as_active_as_the_circuit_and_have_no_effect(name: str, seed: int) -> None:
    planted = plant(name, seed, n_images=6)
    for layer, values in activations(planted.model, planted.layers, planted.concept).items():
        activity = values.square().mean((0, 2, 3)).sqrt()
        typical = activity[planted.units[layer]].mean()
        decoys = [unit(planted, layer, f"decoy {i}") for i in range(4)]
        for each in decoys:
            assert 0.49 * typical < activity[each.index] < 2.01 * typical
        assert not without(planted, *decoys).any()


def test_the_decoy_path_is_busier_than_the_true_one_and_busier_than_in_the_reference() -> None:
    planted = small("decoy")
    for layer, name in (("lines", "blue"), ("parts", "blue area")):
        concept, reference = (
            activations(planted.model, [layer], images)[layer].square().mean((0, 2, 3)).sqrt()
            for images in (planted.concept, planted.reference)
        )
        path = unit(planted, layer, name)
        assert concept[path.index] > concept[planted.units[layer]].max()
        assert concept[path.index] > 2 * reference[path.index]
        assert not without(planted, path).any()


def test_a_constant_unit_is_in_the_circuit_under_zero_and_not_under_mean_ablation() -> None:
    planted = small("decoy")
    constant = unit(planted, "parts", "constant")
    assert not planted.units["parts"][constant.index]
    assert not without(planted, constant).any()
    assert (without(planted, constant, ablation="zero") < -1).all()


def test_each_of_two_copies_carries_half_of_the_output() -> None:
    planted = small("copies")
    output = planted.model(planted.concept)[:, 0] + 3  # the threshold
    for copy in "AB":
        lost = -without(planted, unit(planted, "shapes", f"ring {copy}"), ablation="zero")
        torch.testing.assert_close(lost, output / 2)


def test_no_unit_of_a_spare_copy_has_an_effect_alone_nor_a_gradient() -> None:
    planted, found = small("spare"), checked("spare")
    seen = observe(planted.task(), planted.concept, planted.concept_labels)
    assert len(planted.redundant) == 3
    for group in planted.redundant:
        for each in group:
            assert found.units[each.layer][each.index] < 1e-6
            assert not seen.gradients[each.layer][:, each.index].any()
        assert without(planted, *group).mean() == pytest.approx(-10, abs=1e-4)  # the whole output


def test_removing_a_suppressor_raises_the_output_where_it_is_present() -> None:
    planted = plant("suppressor", n_decoys=0)
    green, blue = (unit(planted, "parts", f"{colour} area") for colour in ("green", "blue"))
    for each, plane in ((green, 1), (blue, 2)):
        change = without(planted, each)
        others = planted.concept[:, [c for c in range(3) if c != plane]].amax(1)
        present = ((planted.concept[:, plane] - others) > 0.5).flatten(1).sum(1) > 8  # pixels of that colour alone
        assert 0 < present.sum() < len(present)
        assert (change[present] > 0).all()
        assert change[present].mean() > 5 * change[~present].abs().mean()
        assert planted.units["parts"][each.index]


def test_a_residual_unit_is_read_through_its_own_skip() -> None:
    planted, found = small("residual"), checked("residual")
    before, after = unit(planted, "block1", "red area"), unit(planted, "block2", "red area")
    assert found.edges["block1", "block2"][after.index, before.index] > 0.5
    skip = planted.model.get_submodule("block2").skip.weight[..., 0, 0]
    torch.testing.assert_close(skip != 0, torch.eye(len(skip), dtype=torch.bool))  # nothing but itself


def test_both_colour_and_shape_are_needed_for_the_conjunction() -> None:
    planted = small("conjunction")
    full = planted.model(planted.concept)[:, 0]
    for name in ("ring", "red area"):
        assert without(planted, unit(planted, "parts", name)).mean() < -0.9 * full.mean()
    assert planted.model(planted.reference)[:, 0].abs().max() == 0  # every part is there, never together


# ---------------------------------------------------------------- seeds, sizes, pictures


def test_a_seed_gives_the_same_network_and_pictures_again() -> None:
    one, two = plant("branches", 3, n_images=2), plant("branches", 3, n_images=2)
    for name, weights in one.model.state_dict().items():
        assert torch.equal(weights, two.model.state_dict()[name])
    assert torch.equal(one.test_reference, two.test_reference)


def test_another_seed_shuffles_units_and_draws_other_pictures() -> None:
    one, two = small("circle", 0), small("circle", 1)
    assert sorted(one.names["parts"]) == sorted(two.names["parts"])
    assert one.names["parts"] != two.names["parts"]
    assert not torch.equal(one.concept, two.concept)
    assert not torch.equal(one.concept, one.test_concept)


def test_the_number_of_decoys_is_an_option() -> None:
    assert plant("circle", n_decoys=0, n_images=2).widths == {"lines": 4, "parts": 8, "shapes": 2}
    assert plant("circle", n_decoys=5, n_images=2).widths == {"lines": 9, "parts": 13, "shapes": 7}


def test_a_reference_differs_from_its_concept_in_the_exchanged_figure_only() -> None:
    ring = Figure("ring")
    concept, reference = pictures(lambda rng: [ring, Figure("plus")], {ring: Figure("broken ring")}, 3, (0,))
    differs = (concept != reference).any(1).flatten(1).sum(1)
    assert (differs > 0).all() and (differs <= 12 * 12).all()
    torch.testing.assert_close(concept.sum((1, 2, 3)), reference.sum((1, 2, 3)))  # the same ink
    assert glyph("ring").sum() == pytest.approx(glyph("broken ring").sum())


def test_a_line_filter_answers_1_to_its_line_and_0_to_an_even_ground() -> None:
    picture = torch.zeros(5, 5, dtype=torch.float64)
    picture[2] = 1  # a lying line through the middle
    assert (line(0) * 1.0).sum() == pytest.approx(0, abs=1e-12)
    assert (line(0) * picture).sum() == pytest.approx(1, abs=0.1)
    assert (line(90) * picture).sum() < 0.1
    torch.testing.assert_close(line(90), line(0).T)


def test_a_point_lies_right_and_above_where_it_says() -> None:
    kernel = point(2, 1, 3.0, size=7, width=0.3)
    assert divmod(int(kernel.argmax()), 7) == (2, 5)  # row 3 − 1, column 3 + 2
    assert kernel.sum() == pytest.approx(3)


def test_the_top_of_a_ring_is_a_lying_line() -> None:
    top = arc(90, 0, 11)
    assert divmod(int(top["line 0"].argmax()), 11)[1] == 5  # in the middle column
    assert float(top["line 0"].sum()) == pytest.approx(1)
    assert float(top["line 90"].sum()) == pytest.approx(-1)  # a standing line speaks against it
    assert float(top["line 45"].abs().sum()) == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- the contract


def test_a_task_asks_under_the_behaviour_and_ablation_of_the_truth() -> None:
    planted = small("circle")
    task = planted.task(batch_size=2)
    assert (task.behaviour, task.ablation, task.addresses) == ("logit", "mean", planted.layers)
    assert task.widths == planted.widths
    assert planted.task(ablation="zero").ablation == "zero"
    assert torch.equal(planted.held_out().concept, planted.test_concept)


def test_a_planted_network_names_its_true_and_false_edges_once_each() -> None:
    planted = small("branches")
    true, false = set(planted.true_edges()), set(planted.false_edges())
    n_edges = sum(each.numel() for each in planted.edges.values())
    assert len(true) + len(false) == n_edges and not true & false
    assert {(edge.source, edge.target) for edge in planted.truth().edges} == true


def test_a_truth_that_contradicts_itself_is_refused() -> None:
    planted = small("circle")
    with pytest.raises(ViscircuitsError, match="joins a false unit"):
        replace(planted, units={layer: torch.zeros_like(each) for layer, each in planted.units.items()})
    with pytest.raises(ViscircuitsError, match="not adjacent layers"):
        replace(planted, edges={("lines", "shapes"): torch.zeros(4, 6, dtype=torch.bool)})
    with pytest.raises(ViscircuitsError, match="have shape"):
        replace(planted, edges={("lines", "parts"): torch.zeros(1, 1, dtype=torch.bool)})
    with pytest.raises(ViscircuitsError, match="its layers are"):
        replace(planted, units={"lines": planted.units["lines"]})
    with pytest.raises(ViscircuitsError, match="named redundant"):
        replace(planted, redundant=((unit(planted, "parts", "decoy 0"),),))


def test_an_unknown_planted_network_is_named_with_the_nearest_known() -> None:
    with pytest.raises(ViscircuitsError, match=r"no planted network 'circel'. Did you mean 'circle'\?"):
        plant("circel")


def test_every_planted_network_is_of_one_family_and_builders_load_when_called() -> None:
    assert sorted(name for names in families().values() for name in names) == sorted(PLANTED)
    code = "import sys, viscircuits.planted; print('viscircuits.planted.wired' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.startswith("False")
