"""Relevance and the effect of removal added up, on a network whose answer is known beforehand."""

import math

import pytest
import torch
from torch import nn

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.methods import find
from viscircuits.methods.removing import Removal, Removing, standard
from viscircuits.task import make_task

BRIEF = {"sizes": (0.25, 0.5), "steps_a_size": 3, "images_a_step": (4, 4)}


def task(layers=("0", "2"), **options):
    """Units of both layers: read by the concept's output alone, by both, by the other's alone, by none."""
    reads = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0]])
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data, net[4].weight.data = torch.eye(4)[:, :, None, None], reads
    generator = torch.Generator().manual_seed(0)
    concept, reference = (
        torch.tensor(levels)[None, :, None, None] + 0.1 * torch.rand(n, 4, 1, 1, generator=generator)
        for levels, n in (([1.0, 1.0, 0.0, 1.0], 12), ([0.0, 1.0, 1.0, 1.0], 16))
    )
    return make_task(net, layers, concept, reference, **options)


def test_what_only_the_concept_needs_comes_first_and_what_others_need_last():
    for layer, scores in find(task(ablation="zero"), "relp-anchored", **BRIEF).units.items():
        assert scores.argmax() == 0, layer
        assert scores.argmin() == 2, layer


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"protect": 0.5, "caution": 0.7, "answers": "own", "raise_weight": 3.0},
        {"protect": 2.0, "linear": "gamma", "convolutions": "z-plus", "gamma": 2.0},
    ],
)
def test_it_is_relevance_over_the_spread_of_all_layers_and_effects_over_that_of_their_own(more):
    asked, weight = task(), 0.7
    found = find(asked, "relp-anchored", effect_weight=weight, **BRIEF, **more)
    of_relevance = {name: more[name] for name in ("protect", "linear", "convolutions", "gamma") if name in more}
    of_removal = {name: more[name] for name in ("protect", "caution", "answers", "raise_weight") if name in more}
    relevance = find(asked, "relp-difference", **of_relevance).units
    removing = Removing(asked, Removal(**BRIEF, **of_removal).checked(asked))
    removing.walk(progress=False)
    over_all = torch.cat(list(relevance.values())).std(correction=0)
    for layer, effects in removing.effects_of_removal().items():
        expected = relevance[layer] / over_all + weight * effects / effects.std(correction=0)
        assert torch.allclose(found.units[layer], expected)


def test_its_options_find_the_same_again():
    found = find(task(), "relp-anchored", **BRIEF)
    again = find(task(), "relp-anchored", **{**found.options, "images_a_step": (4, 4)})  # kept as a list, for JSON
    assert all(torch.equal(found.units[layer], again.units[layer]) for layer in found.units)


@pytest.mark.parametrize("method", ["relp-difference", "relp-anchored"])
def test_circuits_are_cut_by_half(method):
    assert find(task(), method).circuit(0.5).provenance["share"] == "half"


def test_scores_that_do_not_differ_say_nothing():
    """A layer of one unit has no spread to be measured by; rounding is none either."""
    for scores in ([-0.3], [0.1, 0.1, 0.1 + 1e-17], [0.0, 0.0]):
        assert standard(torch.tensor(scores, dtype=torch.float64)).tolist() == [0.0] * len(scores)


def test_without_the_effect_it_is_the_difference_of_relevance():
    asked = task()
    found, relevance = find(asked, "relp-anchored", effect_weight=0.0), find(asked, "relp-difference")
    assert found.circuit(0.5).units == relevance.circuit(0.5).units
    assert found.passes.forward == relevance.passes.forward


def test_what_others_lose_counts_in_both_parts():
    asked = task()
    spared, not_spared = (find(asked, "relp-anchored", protect=weight, **BRIEF).units["2"] for weight in (1.0, 0.01))
    assert spared[1] < not_spared[1]  # the unit that both answers rest on


def test_it_costs_what_its_parts_cost_and_says_what_it_was_given():
    asked = task()
    found = find(asked, "relp-anchored", **BRIEF)
    looked = find(asked, "relp-difference").passes
    assert found.passes.backward == looked.backward + 2 * 3 * 8
    assert found.passes.forward == looked.forward + 2 * 28 + 2 * 3 * 8  # kept for replay, looked at once, the steps
    assert found.passes.seconds > 0
    assert found.options["effect_weight"] == 0.4
    assert found.options["sizes"] == [0.25, 0.5]
    assert found.options["protect"] == 1.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"effect_weight": -1.0}, "effect_weight is 0 or more"),
        ({"effect_weight": math.nan}, "effect_weight is 0 or more"),
        ({"protect": 0.0}, "protect is a weight above 0"),
        ({"protect": math.inf}, "protect is a weight above 0"),
        ({"caution": math.nan}, "caution is a weight of 0 or more"),
        ({"gamma": -1.0}, "γ must be 0 or more"),
        ({"sizes": (0.5, 0.2)}, "rising"),
        ({"answers": "typo"}, "typo"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_run(options, reason, monkeypatch):
    asked = task()
    monkeypatch.setattr(Removing, "walk", lambda *_: pytest.fail("walked"))
    with pytest.raises(ViscircuitsError, match=reason):
        find(asked, "relp-anchored", **options)
    assert count_hooks(asked.spec.model) == 0


def test_an_ablation_without_a_direction_is_refused_and_leaves_no_hooks():
    asked = task(ablation="noise")
    with pytest.raises(ViscircuitsError, match="'zero' or 'mean'"):
        find(asked, "relp-anchored", **BRIEF)
    assert count_hooks(asked.spec.model) == 0


def test_progress_is_shown_if_asked(monkeypatch):
    shown = []

    def bar(**options):
        shown.append(Bar(**options))
        return shown[-1]

    monkeypatch.setattr("viscircuits.methods.relevance.tqdm", bar)
    find(task(), "relp-difference", progress=True)
    find(task(), "relp-difference")
    assert [(bar.total, bar.n, bar.disable) for bar in shown] == [(28, 28, False), (28, 28, True)]


class Bar:
    """Stands in for tqdm: what it was told."""

    def __init__(self, total, disable, **_):
        self.total, self.disable, self.n = total, disable, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, n):
        self.n += n
