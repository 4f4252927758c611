"""The fidelity benchmark's arithmetic is what a reader would do by hand, and its quick run says what was planted."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from viscircuits.ablation import ablate
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import forward
from viscircuits.methods import METHODS, find
from viscircuits.methods.exact import exact_effects
from viscircuits.prefix import Prefix
from viscircuits.task import Task, make_task

pytest.importorskip("matplotlib", reason="the benchmark draws with matplotlib")


@pytest.fixture
def fidelity(root, monkeypatch):
    """A module of `benchmarks/fidelity/` by its name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"fidelity.{name}")

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] == "fidelity"]:
        sys.modules.pop(name)


# ------------------------------------------------------------------ marks and intervals


def test_first_is_marked_and_who_reaches_its_interval(fidelity):
    """The first's mean is .9, its interval that of drawing .8 and 1 again: from .8 to 1."""
    found = fidelity("summary").standings(
        {
            "a": {"x": 0.8, "y": 1.0},
            "near": {"x": 0.81, "y": 0.81},
            "far": {"x": 0.79, "y": 0.79},
        }
    )
    level = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    assert found["a"] == {"value": 0.9, "low": 0.8, "high": 1.0, "n": 2, "mark": "first", "behind": level}
    assert [found[name]["mark"] for name in ("near", "far")] == ["within", ""]
    assert found["far"]["behind"] == {"value": -0.11, "low": -0.21, "high": -0.01, "n": 2}  # network by network
    page = fidelity("page")
    assert page._place(found["near"]) == "○"
    assert page._place(found["far"]) == "(-0.1100 [-0.2100, -0.0100] from the first)"


def test_equal_means_are_both_first(fidelity):
    found = fidelity("summary").standings({"a": {"x": 1.0, "y": 0.5}, "b": {"x": 0.5, "y": 1.0}})
    assert [each["mark"] for each in found.values()] == ["first", "first"]


def test_who_misses_a_network_is_not_marked(fidelity):
    found = fidelity("summary").standings({"partly": {"x": 1.0}, "whole": {"x": 0.9, "y": 0.5}})
    assert [found[name]["mark"] for name in ("partly", "whole")] == ["", "first"]


def test_families_keep_their_networks_apart(fidelity):
    cells = [
        {"family": family, "network": "n", "size": "small", "seed": seed, "method": "a", "units": units}
        for family, seed, units in (("wired", 0, {"auroc": 1.0}), ("wired", 1, {"auroc": 0.5}), ("merged", 0, None))
    ]
    summary = fidelity("summary")
    found = summary.by_family(cells, lambda cell: summary.of(cell, "units", "auroc"))
    assert {family: each["a"]["value"] for family, each in found.items()} == {"wired": 0.75}


def fold(number: int, concept: tuple[str, str], others: tuple[str, str], method: str = "a") -> dict:
    """A cell in which digits before become digits after, under both ablations alike."""
    after = {"0.05": {"concept": concept[1], "others": others[1]}}
    return {
        "fold": number,
        "method": method,
        "full": {"concept": concept[0], "others": others[0]},
        "after": {"mean": after, "zero": after},
    }


def test_folds_are_pooled_photograph_by_photograph(fidelity):
    """Three of four of the concept fall, one comes back; of four others one falls."""
    summary = fidelity("summary")
    cells = [fold(1, ("10", "01"), ("11", "11")), fold(0, ("11", "00"), ("11", "10"))]
    found = summary.of_concept(cells, "a")
    assert found["accuracy"] == {"concept": 0.75, "others": 1.0}
    assert found["n"] == {"concept": 4, "others": 4}
    assert found["after"]["mean"]["0.05"]["a"]["value"] == (3 - 1) / 4 - 1 / 4
    assert found["after"]["zero"]["0.05"]["a"]["accuracy"] == {"concept": 0.25, "others": 0.75}
    assert found["most"]["mean"]["0.05"]["value"] == 0.75  # three of four were answered right


def test_a_perfect_removal_stands_beside_the_search_and_the_remover(fidelity):
    """Of a concept always right all can be lost; the control takes nothing, so that both intervals keep apart."""
    page, summary, roster = fidelity("page"), fidelity("summary"), fidelity("roster")
    idle, taken = ("1" * 40, "1" * 40), ("1" * 40, "0" * 20 + "1" * 20)
    kept = "1" * 40, "1" * 40
    found = summary.of_concept(
        [fold(0, idle, kept, roster.AGAINST), fold(0, taken, kept, roster.REMOVER)], roster.AGAINST
    )
    searched = {"value": 0.75, "low": 0.5}
    found["bound"] = {ablation: {"0.05": searched, "0.1": searched} for ablation in ("mean", "zero")}
    results = {"removal": {"lite0": {"groups": {"concepts": {"dog": found}}}}}
    assert "1.00 / 0.75 / 0.50" in page._bounds(results)
    for low, n in ((0.5, 1), (0.0, 0)):  # the control's interval ends at 0
        searched["low"] = low
        row = page._removal_aims(results).splitlines()[2]
        assert row == f"| EfficientNet-Lite0, groups, 5%, mean | 1 | 1 / 1 / 1 | – | 1 | {n} |"
    del found["after"]["zero"]["0.05"][roster.REMOVER]
    assert page._removal_aims(results).splitlines()[3].startswith("| EfficientNet-Lite0, groups, 5%, zero | 1 | – |")
    assert page._removal_aims({"removal": {"lite0": {"groups": {"concepts": {"dog": {}}}}}}) == ""


def test_how_much_must_be_lost_to_stand_apart(fidelity):
    """Four drawn photographs hold none of two that are lost with a chance of .0625, none of three with one of .0039."""
    needed = fidelity("summary").needed
    assert needed(4, 4, -0.1, 4) == 0
    assert needed(4, 4, 0.0, 4) == 3
    assert needed(4, 2, 0.0, 4) is None
    assert needed(4, 4, 0.9, 4) == 4
    assert needed(4, 4, 1.0, 4) is None
    assert needed(7, 7, 0.5714, 4) == 7  # with six lost the interval begins at 4 / 7, which touches
    page, roster = fidelity("page"), fidelity("roster")
    highs = {"mean": {"0.05": 0.0, "0.1": 0.9}, "zero": {"0.05": -0.1, "0.1": 0.0}}
    after = {at: {size: {roster.AGAINST: {"high": high}} for size, high in each.items()} for at, each in highs.items()}
    most = {"mean": {"0.05": {"apart": True}, "0.1": {"apart": True}}, "zero": {"0.05": {"apart": True}, "0.1": {}}}
    concept = {"n": {"concept": 4}, "accuracy": {"concept": 0.75}, "after": after, "most": most}
    results = {"removal": {"lite0": {"groups": {"concepts": {"dog": concept, "cat": {**concept, "after": {}}}}}}}
    assert page._needed(results).splitlines()[-1] == "| EfficientNet-Lite0, dog | 3 of 3 | – of 3 | 0 of 3 | – of 3 |"


def test_how_many_concepts_are_above_the_control_surely_and_apart(fidelity):
    page = fidelity("page")
    told = {
        "all three": ({"value": 0.2, "low": 0.1, "high": 0.3}, True),
        "surely": ({"value": 0.2, "low": 0.1, "high": 0.3}, False),
        "above": ({"value": 0.2, "low": -0.1, "high": 0.5}, False),
        "level": ({"value": 0.0, "low": -0.1, "high": 0.1}, False),
        "below": ({"value": -0.2, "low": -0.3, "high": -0.1}, False),
    }
    concepts = [
        {"after": {"mean": {"0.05": {"m": {"difference": difference, "apart": apart}}}}}
        for difference, apart in told.values()
    ]
    assert page._ahead(concepts, "m", "mean", "0.05") == "3 / 2 / 1"
    assert page._ahead([*concepts, {}], "m", "mean", "0.05") == "3 / 2 / 1 of 5"  # one has no such result
    assert page._ahead(concepts, "other", "mean", "0.05") == "–"


def test_a_closer_look_tells_units_from_edges(fidelity):
    cells = [
        {"network": "n", "family": "f", "size": "small", "seed": seed, "method": "a",
         "units": {"auroc": 0.9}, "edges": {"auroc": 0.8}}
        for seed in (0, 1)
    ]  # fmt: skip
    told = fidelity("page")._closer_planted(cells).splitlines()
    assert told[0].startswith("| AUROC, 2 seeds of f | units | from the first | edges |")
    assert told[2].startswith("| `a` | 0.900 [0.900, 0.900] ● | 0.0000 [0.0000, 0.0000] | 0.800 [0.800, 0.800] ● |")


def test_planted_aims_are_told_for_the_recommended_method_and_agreement_for_all_but_the_oracle(fidelity):
    page, roster = fidelity("page"), fidelity("roster")
    same = {"pearson": 1.0, "spearman": 1.0}
    cells = [
        {"network": "n", "family": "f", "size": "small", "seed": 0, "method": method,
         "units": {"auroc": auroc}, "edges": {"auroc": auroc}, "agreement": {"units": same, "edges": same}}
        for method, auroc in ((roster.ORACLE, 0.75), (roster.RECOMMENDED, 0.5))
    ]  # fmt: skip
    table = page._agreement({"planted": cells, "agreement": []})
    assert f"`{roster.RECOMMENDED}`" in table
    assert f"`{roster.ORACLE}`" not in table
    units, edges = page._planted_aims({"planted": cells})
    assert units.startswith("AUROC over units, asked for at least 0.98: f 0.500 (-0.2500 [-0.2500, -0.2500]")
    assert edges.startswith("AUROC over edges, asked for at least 0.95: f 0.500")


def test_method_without_all_folds_is_left_out(fidelity):
    fell = ("1", "0"), ("1", "1")
    cells = [fold(0, *fell), fold(1, *fell), fold(0, *fell, "partly")]
    assert set(fidelity("summary").of_concept(cells, "a")["after"]["mean"]["0.05"]) == {"a"}


def test_intervals_that_do_not_touch_are_apart(fidelity):
    """All of one method's photographs fall, none of the other's: no draw can say otherwise."""
    falls, none = torch.ones(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    found, _ = fidelity("summary").selectivities({"all": (falls, none), "nothing": (0 * falls, none)}, "nothing")
    assert found["all"]["apart"] is True
    assert found["nothing"]["apart"] is False
    assert found["all"]["difference"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_method_differs_from_its_double_by_nothing_in_every_draw(fidelity):
    """Draws are paired: both have an interval, their difference has none."""
    falls = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    others = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    found, _ = fidelity("summary").selectivities({"a": (falls, others), "double": (falls, others)}, "a")
    assert found["a"]["low"] < found["a"]["value"] < found["a"]["high"]
    assert found["double"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_mean_over_concepts_is_surer_than_one(fidelity):
    """Twice the same photographs, drawn apart: the interval shrinks by about √2."""
    summary = fidelity("summary")
    half = ("1" * 40, "10" * 20)
    concept = summary.of_concept([fold(0, half, ("1" * 40, "1" * 40))], "a")
    one = concept["after"]["mean"]["0.05"]["a"]
    both = summary.over_concepts([concept, concept], "a")["mean"]["0.05"]["a"]
    assert both["value"] == one["value"] == 0.5
    assert (one["high"] - one["low"]) / (both["high"] - both["low"]) == pytest.approx(2**0.5, rel=0.1)


def test_verdict_flips_only_where_both_signs_are_beyond_chance(fidelity):
    def concept(mean: tuple[float, float], zero: tuple[float, float]) -> dict:
        ends = {"mean": mean, "zero": zero}
        return {"after": {name: {"0.1": {"m": {"difference": {"low": a, "high": b}}}} for name, (a, b) in ends.items()}}

    flips = fidelity("summary").flips
    assert flips(concept((0.1, 0.2), (-0.2, -0.1)), "m", "0.1")
    assert not flips(concept((0.1, 0.2), (-0.2, 0.1)), "m", "0.1")
    assert not flips(concept((0.1, 0.2), (0.1, 0.2)), "m", "0.1")


# ------------------------------------------------------------------ planted


def test_scores_on_two_scales_lose_when_pooled_and_not_layer_by_layer(fidelity):
    """Pooled, true 1 stands above false 0 but below false 9, true 10 above both: three pairs of four."""
    layers = [
        (torch.tensor([1.0, 0.0]), torch.tensor([True, False])),
        (torch.tensor([10.0, 9.0]), torch.tensor([True, False])),
    ]
    assert fidelity("planted").compared(layers) == {
        "auroc": 0.75, "auroc_by_part": 1.0, "precision": 0.5, "recall": 0.5,
    }  # fmt: skip


def test_everything_true_has_no_auroc(fidelity):
    assert fidelity("planted").compared([(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))]) is None


def test_correlation_of_a_constant_is_a_dash(fidelity):
    correlated = fidelity("planted").correlated
    assert correlated([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert correlated([], [1.0, 2.0]) is None
    assert correlated([1.0, 2.0, 4.0], [2.0, 3.0, 9.0])["spearman"] == pytest.approx(1)


def test_larger_size_is_built_only_where_the_builder_knows_it(fidelity):
    planted = fidelity("planted")
    jobs = planted.jobs(["circle", "two-networks"], 2, [], ["small", "large"])
    places = [(job.network, job.size, job.seed - planted.FIRST_SEED) for job in jobs]
    small = [(network, "small", place) for network in ("circle", "two-networks") for place in range(2)]
    assert places == [("circle", "large", 0), *small]


# ------------------------------------------------------------------ photographs


@pytest.mark.parametrize("n", [8, 95])
def test_each_photograph_is_tested_once_and_never_found_with(fidelity, n):
    photographs = fidelity("photographs")
    n_folds = photographs.folds_of("lite0", "groups")
    folds = photographs.cross_fitted(n, 100, 0, n_folds)
    assert len(folds) == n_folds
    assert sorted(place for fold in folds for place in fold.test) == list(range(n))
    assert sorted(place for fold in folds for place in fold.others) == list(range(100))
    for fold in folds:
        assert not set(fold.find) & set(fold.test)
        assert len(fold.find) == n - len(fold.test)


def test_hands_are_even_and_seeded(fidelity):
    dealt = fidelity("photographs").dealt
    assert sorted(len(hand) for hand in dealt(8, 3, 0)) == [2, 3, 3]
    assert dealt(20, 2, 0) == dealt(20, 2, 0) != dealt(20, 2, 1)


def test_groups_share_no_photograph_with_what_they_are_set_beside(fidelity, shared_data, tmp_path, monkeypatch):
    """The sample's images stand in by their places, so that each can be told."""
    photographs = fidelity("photographs")
    files = photographs._files()
    blank = torch.arange(len(files), dtype=torch.float32).reshape(-1, 1, 1, 1).numpy()
    monkeypatch.setattr(photographs.np, "load", lambda *_, **__: blank)
    *parts, folds = photographs._group("lite0", "fruit", tmp_path, 0, 4, 70)
    assert len(folds) == 4
    places = [set(images.flatten().int().tolist()) for images, _ in parts]
    assert {files[i] for i in places[0]} == set(photographs.group_members("fruit"))
    assert [len(each) for each in places[1:]] == [photographs.N_REFERENCE, 70]
    assert not (places[0] & places[1] or places[0] & places[2] or places[1] & places[2])
    assert parts[0][1].tolist() == [int(files[i].split("_")[0]) for i in sorted(places[0])]


# ------------------------------------------------------------------ a network that begins halfway


class Skipping(nn.Module):
    """What the first convolution puts out is read again after the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.late = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, images):
        early = self.first(images)
        return self.late(early + self.second(early)).mean((2, 3))


@pytest.fixture
def halfway(fidelity):
    """A network, a prefix of five images, and a count of what its first module runs on."""
    model, images = Skipping().eval(), torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    plain, runs = model.first._conv_forward, []
    model.first._conv_forward = lambda x, *more: runs.append(len(x)) or plain(x, *more)
    prefix = Prefix(model, ["late"], images[:5])
    runs.clear()
    return fidelity("halfway").remembering, model, prefix, images, runs


def test_known_images_begin_halfway_and_others_go_all_the_way(halfway):
    remembering, model, prefix, images, runs = halfway
    altered = images[:2].clone()
    altered[:, :, 1:9, 1:9] = 0.0  # where no pixel is looked up
    batches = [images[1:3], images[3:], altered, images[:2].clone().requires_grad_()]
    whole = [model(batch).detach() for batch in batches]
    runs.clear()
    with remembering(model, prefix):
        for batch, expected in zip(batches, whole, strict=True):
            torch.testing.assert_close(model(batch).detach(), expected)
    assert runs == [3, 2, 2]  # one is new, two altered, two to be differentiated


def test_a_prefix_made_where_the_network_remembers_is_that_of_the_network(halfway):
    remembering, model, prefix, images, _ = halfway
    with remembering(model, prefix):
        inner = Prefix(model, ["late"], images[:3])
    assert inner.unread == prefix.unread == frozenset()
    with inner.replay([2, 0]) as same:
        torch.testing.assert_close(model(same), model(images[[2, 0]]))


def test_remembering_ends_as_it_began_also_nested_and_after_an_exception(halfway):
    remembering, model, prefix, images, _ = halfway
    with pytest.raises(RuntimeError, match="no reason"), remembering(model, prefix), remembering(model, prefix):
        raise RuntimeError("no reason")
    assert "forward" not in vars(model)
    model.forward = own = lambda x: Skipping.forward(model, x) + 1
    with remembering(model, prefix):
        torch.testing.assert_close(model(images[:2]), own(images[:2]))
    assert vars(model)["forward"] is own


def test_every_method_finds_the_same_where_the_network_remembers(fidelity, shown, task):
    """Of the later layers, whose first is made by a convolution that is not remembered."""
    roster, remembering = fidelity("roster"), fidelity("halfway").remembering
    later = make_task(
        task.spec, ("3", "5"), task.concept, task.reference,
        concept_labels=task.concept_labels, reference_labels=task.reference_labels,
    )  # fmt: skip
    prefix = Prefix(task.spec.model, ["2"], torch.cat([shown.concept[0], shown.reference[0]]))
    assert prefix.names == ("0", "1")
    for contender in roster.of_removal(None):
        alone = contender.find(later)
        with remembering(task.spec.model, prefix):
            together = contender.find(later)
        for layer, scores in together.units.items():
            torch.testing.assert_close(scores, alone.units[layer], rtol=1e-3, atol=1e-5)


def test_the_clock_is_kept_while_nothing_else_was_measured(fidelity, tmp_path):
    command = fidelity("command")
    before = {"seconds": 3.5, "jobs": 2, "machine": {"cores": 2}, "clock": 2.0}
    (tmp_path / "f").write_text(json.dumps(before))
    assert command._clock_before({**before, "clock": None}, tmp_path / "f") == {"clock": 2.0}
    assert command._clock_before({**before, "seconds": 4.0}, tmp_path / "f") == {}
    assert command._clock_before({**before, "jobs": 1}, tmp_path / "f") == {}
    assert command._clock_before(before, tmp_path / "none") == {}


def test_costs_are_medians_over_circuits(fidelity):
    cells = [{"method": "a", "passes": {"forward": n, "backward": 1, "seconds": n / 2}} for n in (1, 2, 9)]
    (found,) = fidelity("command")._costs(cells)
    assert found == {"method": "a", "passes": {"forward": 2, "backward": 1, "seconds": 1.0}}


# ------------------------------------------------------------------ removal, agreement


@pytest.fixture
def shown(fidelity):
    """The quick run's network and noise."""
    return fidelity("photographs").load("quick", "groups", "noise", Path())


@pytest.fixture
def task(shown) -> Task:
    (images, labels), (others, other_labels) = shown.concept, shown.reference
    return make_task(
        shown.spec, shown.layers, images[:6], others, concept_labels=labels[:6], reference_labels=other_labels
    )


def test_digits_are_the_answers_of_the_network_without_the_circuit(fidelity, shown, task):
    """Run plainly, whole network and all, instead of from where the first layer begins."""
    removal = fidelity("removal")
    finding, places = find(task, "activation"), shown.folds[1]
    entry = removal.Testing(shown).of({"mean": finding, "zero": finding}, places)
    images, labels = (part[list(places.test)] for part in shown.concept)
    statistics = removal.Testing(shown).statistics
    for ablation, sizes in entry["after"].items():
        with torch.no_grad(), ablate(shown.spec, finding.circuit(0.1), ablation, reference=statistics):
            right = forward(shown.spec.model, images).argmax(1) == labels
        assert sizes["0.1"]["concept"] == "".join(str(int(each)) for each in right)
    assert entry["full"]["concept"] == "1" * len(labels)  # the labels are the network's own answers
    assert entry["after"]["mean"]["0.1"]["concept"] != entry["full"]["concept"]


def test_found_under_each_ablation_or_once(fidelity, shown, tmp_path):
    roster, removal, store = (fidelity(name) for name in ("roster", "removal", "store"))
    asked: list[str] = []

    class Asked(roster.Contender):
        def find(self, task):
            asked.append(task.ablation)
            return super().find(task)

    two = (Asked("eap-ig", "attribution-patching", {"edges": False}), Asked("random", "random"))
    for under in ("mean", "each"):
        job = removal.Job("quick", "groups", "noise", two, 2, False, tmp_path, under)
        job.run(store.Work(tmp_path / under))
    assert asked == ["mean", "mean"] * 2 + ["mean", "zero", "mean"] * 2  # random has no use for the ablation


def test_bound_finds_and_tests_on_the_same_photographs(fidelity, shown):
    places = fidelity("removal").Job._bound(shown)
    assert places.find == places.test
    assert sorted(places.test) == list(range(len(shown.concept[0])))


@pytest.mark.parametrize(
    ("names", "module", "computed"),
    [
        (("cla-ratio", "cla-difference", "cla-anchored", "cla"), "cross_layer", "attribute"),
        (("relp-difference", "relp-anchored"), "relp_anchored", "relp_difference"),
        (("anchored", "relp-anchored"), "", "Removing"),
    ],
)
def test_methods_share_one_computation_and_give_the_same_scores(fidelity, task, monkeypatch, names, module, computed):
    sharing, options = fidelity("sharing"), fidelity("roster").REMOVAL_OPTIONS
    owner = getattr(sharing, module) if module else sharing
    plain, calls = getattr(owner, computed), []

    @wraps(plain)
    def counted(*given, **more):
        calls.append(given)
        return plain(*given, **more)

    alone = {name: find(task, name, **options.get(name, {})) for name in names}
    monkeypatch.setattr(owner, computed, counted)
    with sharing.sharing():
        together = {name: find(task, name, **options.get(name, {})) for name in names}
    assert len(calls) == 1
    for name, finding in together.items():
        for layer, scores in finding.units.items():
            torch.testing.assert_close(scores, alone[name].units[layer], rtol=1e-4, atol=1e-6)
    if module != "cross_layer":  # what is shared there is counted by the one who asked for it
        assert [cost(together[name]) for name in names] == [cost(alone[name]) for name in names]


def cost(finding) -> tuple[int, int]:
    return finding.passes.forward, finding.passes.backward


@pytest.mark.parametrize("method", ["activation-difference", "relp-difference"])
def test_the_reference_is_looked_at_once_for_all_folds(fidelity, task, method):
    """With other concept images the scores and the passes told are those of the method alone."""
    others = replace(task, concept=task.concept[2:], concept_labels=task.concept_labels[2:])
    alone = find(others, method)
    with fidelity("sharing").sharing() as shared:
        find(task, method)
        first = len(shared.measured)
        together = find(others, method)
        assert first < len(shared.measured) < 2 * first  # the concept's anew, not the reference's
    assert cost(together) == cost(alone)
    for layer, scores in together.units.items():
        torch.testing.assert_close(scores, alone.units[layer], rtol=1e-4, atol=1e-6)


def test_nothing_of_sharing_outlasts_it(fidelity):
    sharing = fidelity("sharing")

    def now():
        at = sharing.anchored.Removing, sharing.relp_anchored.Removing, sharing.relp_anchored.relp_difference
        of_images = sharing.relevance._of_images, sharing.controls._measured
        return [*at, *of_images, sharing.cross_layer.attribute, sharing.METHODS["relp-difference"]]

    before = now()
    with pytest.raises(RuntimeError, match="three"), sharing.sharing():
        assert not any(each is other for each, other in zip(now(), before, strict=True))
        raise RuntimeError("three")
    assert now() == before


def test_sampled_removals_are_those_of_the_oracle(fidelity, task):
    agreement = fidelity("agreement")
    units, edges = agreement.drawn(task)
    effects = exact_effects(task, edges=True)
    exact = effects.finding("exact", task, {})
    expected, found = agreement.sampled(exact, units, edges), agreement.removed(task, units, edges)
    assert len(set(edges)) == len(edges) == agreement.N_EDGES
    for part in ("units", "edges"):
        assert found[part] == pytest.approx(expected[part], rel=1e-3, abs=1e-6)
        assert max(found[part]) > 0


def test_agreement_is_with_removals_that_remembering_does_not_change(fidelity, tmp_path, monkeypatch):
    agreement, photographs = fidelity("agreement"), fidelity("photographs")
    shown = photographs.load("quick", "groups", "noise", Path())
    monkeypatch.setattr(photographs, "load", lambda *_: shown)
    contenders = fidelity("roster").of_agreement(["attribution-patching", "random"])
    job, work = agreement.Job("lite0", tuple(contenders), tmp_path), fidelity("store").Work(tmp_path)
    job.run(work)
    cells = {each["method"]: each for each in work.cells(job.name, job.wanted()).known.values()}
    task = agreement.task_of(shown)
    alone = agreement.removed(task, *agreement.drawn(task))
    for part in ("units", "edges"):
        assert cells["exact"]["scores"][part] == pytest.approx(alone[part], abs=1e-5)
    near, far = (cells[name]["agreement"]["units"]["spearman"] for name in ("attribution-patching", "random"))
    assert near > 0.5 > far


# ------------------------------------------------------------------ the store, the roster


def test_cell_is_known_again_until_its_digest_changes(fidelity, tmp_path):
    work = fidelity("store").Work(tmp_path)
    cells = work.cells("a/b", {"x": "1", "y": "1"})
    cells.keep("x", {"n": 1})
    cells.keep("x", {"n": 2})
    again = work.cells("a/b", {"x": "1", "y": "1"})
    assert again.known["x"]["n"] == 2
    assert not again.complete
    assert work.cells("a/b", {"x": "2"}).known == {}


@pytest.mark.parametrize("torn", [b'{"key": "y", "dig', '{"key": "é'.encode()[:-1]])
def test_line_that_a_kill_cut_off_is_passed_over(fidelity, tmp_path, torn):
    work, wanted = fidelity("store").Work(tmp_path), {"x": "1", "y": "1", "z": "1"}
    work.cells("job", wanted).keep("x", {})
    path = tmp_path / "job.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    work.cells("job", wanted).keep("z", {})
    assert set(work.cells("job", wanted).known) == {"x", "z"}


def test_source_changes_with_what_it_reads(fidelity, tmp_path, monkeypatch):
    source_of = fidelity("store").source_of
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for text in ("def low(): return 1\n", "def low(): return 2\n"):
        package = tmp_path / f"rooms{len(digests)}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "below.py").write_text(text)
        (package / "above.py").write_text(f"from {package.name}.below import low\n")
        (package / "beside.py").write_text("x = 1\n")
        for name in ("above", "beside"):
            importlib.import_module(f"{package.name}.{name}")
        digests.append([source_of(f"{package.name}.{name}", package.name) for name in ("below", "beside")])
        read = fidelity("store")._read_by(sys.modules[f"{package.name}.above"])
        assert f"{package.name}.below" in read
    assert digests[0][0] != digests[1][0]


def test_others_may_fail_and_ours_may_not(fidelity, task, monkeypatch):
    roster = fidelity("roster")

    def fails(task):
        raise ViscircuitsError("no weights here")

    for name in ("fails", *roster.OURS):
        monkeypatch.setitem(METHODS, name, fails)
    assert roster.attempted(roster.Contender("fails", "fails"), task) == "no weights here"
    for name in roster.OURS:
        with pytest.raises(ViscircuitsError, match="no weights"):
            roster.attempted(roster.Contender("ours", name), task)


def test_method_that_is_entered_takes_part_everywhere(fidelity, monkeypatch):
    monkeypatch.setitem(METHODS, "newcomer", METHODS["random"])
    roster = fidelity("roster")
    for part in (roster.of_planted, roster.of_agreement, roster.of_removal):
        assert "newcomer" in [each.title for each in part(None)]


def test_every_name_of_the_roster_is_a_method(fidelity):
    roster = fidelity("roster")
    named = [roster.PLANTED_OPTIONS, roster.REMOVAL_OPTIONS, roster.REMOVAL_LEAVES_OUT, roster.AGREEMENT_LEAVES_OUT]
    named += [roster.FEWER, roster.BLIND, roster.QUICK_LEAVES_OUT]
    named.append((roster.RECOMMENDED, roster.REMOVER, roster.AGAINST, roster.ORACLE))
    named.append({each.method for each in (*roster.PLANTED_MORE, *roster.REMOVAL_MORE)})
    assert {name for each in named for name in each} <= set(METHODS)


# ------------------------------------------------------------------ the page, the run


def test_cells_of_tables(fidelity):
    page = fidelity("page")
    entry = {"value": 0.5, "low": -0.001, "high": 1.0}
    assert page.bracketed(entry) == "0.50 [0.00, 1.00]"
    assert page._bold({**entry, "apart": True}) == "**0.50 [0.00, 1.00]**"
    assert page._bold(None) == "–"
    assert page._share([1.0, 0.9, None]) == "1 of 2"
    assert page.table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|--:|\n| 1 | 2 |"


def test_unknown_names_are_refused(fidelity, capsys):
    with pytest.raises(SystemExit):
        fidelity("command").parse(["--methods", "eaq"])
    assert "choose from exact" in capsys.readouterr().err


def test_failure_of_one_job_is_told_and_stops_no_other(fidelity, tmp_path):
    command, done = fidelity("command"), []

    class Job:
        def __init__(self, name: str):
            self.name = name

        def run(self, work) -> None:
            if self.name == "bad":
                raise ValueError("three")
            done.append(self.name)

    failures = command.drained([(Job(name), None) for name in ("bad", "good")], command._run, 1, "jobs")
    assert failures == ["bad: ValueError: three"]
    assert done == ["good"]


@pytest.mark.slow
def test_quick_run_writes_the_page_and_another_measures_nothing(fidelity, tmp_path, monkeypatch):
    command = fidelity("command")
    methods = "exact,eap,anchored,cla-ratio,activation-difference,random"
    arguments = ["--quick", "--planted", "circle", "--methods", methods]
    arguments += ["--out", str(tmp_path / "docs"), "--work", str(tmp_path / "work")]
    command.main(arguments)
    page = (tmp_path / "docs" / "fidelity.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "docs" / "fidelity.json").read_text(encoding="utf-8"))
    cells = {cell["method"]: cell for cell in results["planted"]}
    for part in ("units", "edges"):
        for method in ("exact", "eap"):
            assert cells[method][part]["precision"] == 1  # the circuit, the whole circuit, and nothing else first
    assert cells["activation-difference"]["edges"] is None
    assert "scores no edges" in results["reasons"]["planted circle activation-difference"]
    assert cells["eap"]["agreement"]["edges"]["spearman"] > cells["random"]["agreement"]["edges"]["spearman"]
    noise = results["removal"]["quick"]["groups"]["concepts"]["noise"]
    assert noise["accuracy"] == {"concept": 1.0, "others": 1.0}
    tried = {"anchored", "cla-ratio", "activation-difference", "activation-difference half", "random"}
    assert set(noise["after"]["zero"]["0.1"]) == tried
    assert set(noise["bound"]["mean"]) == {"0.01", "0.02", "0.05", "0.1"}
    assert page.count("<!--") == page.count("<!-- not run") == 2  # every place for a table is filled
    for name in fidelity("plots").ALT:
        assert f"(img/{name}.svg)" in page
        assert "</svg>" in (tmp_path / "docs" / "img" / f"{name}.svg").read_text(encoding="utf-8")
    for room in ("planted", "removal"):
        monkeypatch.setattr(fidelity(room), "attempted", lambda *_: pytest.fail("measured again"))
    command.main(arguments)
    assert (tmp_path / "docs" / "fidelity.md").read_text(encoding="utf-8") == page


@pytest.fixture
def look(fidelity, tmp_path, monkeypatch):
    """Runs the benchmark on a planted network, and a closer look at noise and at it; and reads what was written."""
    command, closer = fidelity("command"), fidelity("closer")
    small = {"NETWORK": "quick", "FOLDS": {"noise": 3}, "N_OTHERS": 12, "TRAINED": ("circle",), "SEEDS": (60, 61)}
    for name, value in small.items():
        monkeypatch.setattr(closer, name, value)
    monkeypatch.setattr(command, "_prepare", lambda _: None)
    folders = ["--out", str(tmp_path / "docs"), "--work", str(tmp_path / "work"), "--jobs", "1"]
    few = ["--quick", "--only", "planted", "--planted", "circle", "--methods", "exact,anchored"]

    def run(*, closer: bool) -> tuple[dict, str]:
        command.main([*(["--closer"] if closer else few), *folders])
        texts = [(tmp_path / "docs" / f"fidelity.{end}").read_text(encoding="utf-8") for end in ("json", "md")]
        return json.loads(texts[0]), texts[1].partition("## A closer look")[2].partition("## Cost")[0]

    return run


@pytest.mark.slow
def test_a_closer_look_is_added_and_kept_while_it_holds(fidelity, look, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        look(closer=True)
    assert "run the benchmark without --closer first" in capsys.readouterr().err
    before, _ = look(closer=False)
    looked, page = look(closer=True)
    found = looked.pop("closer")
    assert looked == before
    assert found["seconds"] > 0
    assert [cell["seed"] for cell in found["planted"]] == [60, 60, 61, 61]
    noise = found["removal"]["quick"]["groups"]["concepts"]["noise"]
    assert noise["n"]["others"] == 12
    assert {ablation: set(sizes) for ablation, sizes in noise["after"].items()} == {
        "mean": {"0.05", "0.1"},
        "zero": {"0.05", "0.1"},
    }
    assert set(noise["after"]["mean"]["0.05"]) == {each.title for each in fidelity("closer")._removers()}
    for told in (
        "AUROC, 2 seeds of hand-wired",
        "| quick, groups, 10%, zero | 1 |",
        "| `relp-anchored over all` |",
        "| `relp-anchored` − `activation-difference` |",
        "right answers to take",
    ):
        assert told in page
    assert look(closer=False)[0]["closer"] == found
    monkeypatch.setattr(fidelity("closer"), "N_OTHERS", 13)
    capsys.readouterr()
    assert "closer" not in look(closer=False)[0]
    assert "until --closer is run again" in capsys.readouterr().out


@pytest.mark.slow
def test_a_closer_look_that_fails_replaces_none(fidelity, look, monkeypatch):
    look(closer=False)
    found = look(closer=True)[0]["closer"]
    monkeypatch.setattr(fidelity("closer"), "SEEDS", (60, 61, 62))
    plain = fidelity("planted").plant

    def plant(network: str, seed: int, **options):
        if seed == 62:
            raise ValueError("no such seed")
        return plain(network, seed, **options)

    monkeypatch.setattr(fidelity("planted"), "plant", plant)
    with pytest.raises(SystemExit, match="no such seed"):
        look(closer=True)
    monkeypatch.setattr(fidelity("closer"), "SEEDS", (60, 61))
    assert look(closer=False)[0]["closer"] == found


def test_a_closer_look_takes_nothing_else(fidelity, capsys):
    for more in (["--quick"], ["--methods", "eap"], ["--page"], ["--found-under", "each"]):
        with pytest.raises(SystemExit):
            fidelity("command").parse(["--closer", *more])
        assert f"--closer takes no {more[0]}" in capsys.readouterr().err


def test_a_closer_look_takes_all_groups_seeds_of_its_own_and_the_removers(fidelity, shared_data):
    closer, photographs = fidelity("closer"), fidelity("photographs")
    assert set(closer.FOLDS) == set(photographs.GROUPS)
    for concept, n_folds in closer.FOLDS.items():
        assert n_folds <= len(photographs.group_members(concept))
    jobs = closer.jobs(Path())
    assert {job.name.partition("/")[0] for job in jobs} == {"closer", "planted"}
    assert {job.seed for job in jobs if job.name.startswith("planted")} == set(range(60, 110))
    of_groups = [job for job in jobs if job.name.startswith("closer")]
    assert {(job.n_folds, job.n_others) for job in of_groups} == {(n, 300) for n in closer.FOLDS.values()}
    removers = {each.title: each for each in of_groups[0].contenders}
    assert removers["anchored"].options["protect"] == 1
    assert removers["relp-anchored over all"].share == "over all"
    assert removers["relp-anchored"].share is None
