"""How sure a circuit is: shares of bootstrap draws that can be counted by hand, and when to stop."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from viscircuits.circuit import Circuit
from viscircuits.confidence import Stable, confidence
from viscircuits.errors import ViscircuitsError
from viscircuits.matrices import AttributionMatrix, Attributions
from viscircuits.selection import reselect, select


def made(values: Tensor, draws: Tensor | None = None, n_images: int = 8) -> Attributions:
    """Two layers, `a` and `b`, with one matrix between them."""
    widths = {"a": values.shape[1], "b": values.shape[0]}
    activity = {layer: torch.ones(width) for layer, width in widths.items()}
    return Attributions((AttributionMatrix("a", "b", values, values, draws=draws),), activity, n_images)


def single(source: int, target: int, width: int = 3) -> Tensor:
    """A matrix of one connection."""
    values = torch.zeros(width, width)
    values[target, source] = 1.0
    return values


def noisy(noise: float, n_draws: int = 6, n_images: int = 8, seed: int = 0) -> Attributions:
    """The same ten by ten matrix each time, with draws that differ from it by `noise`."""
    plain = torch.rand(10, 10, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    return made(plain, plain + noise * torch.randn(n_draws, 10, 10, generator=generator), n_images)


# ------------------------------------------------------------------ shares and overlaps


def test_units_and_edges_carry_the_share_of_draws_that_choose_them():
    draws = torch.stack([single(0, 0), single(0, 0), single(0, 1), single(2, 1)])
    attributions = made(single(0, 0), draws)
    found = confidence(attributions, select(attributions, 1))
    assert found.circuit.units == {"a": (0,), "b": (0,)}
    assert found.circuit.chosen == {"a": (3 / 4,), "b": (2 / 4,)}
    assert found.circuit.edges[0].chosen == 2 / 4
    assert found.frequency["a"].tolist() == [0.75, 0, 0.25]
    assert found.frequency["b"].tolist() == [0.5, 0.5, 0]


def test_overlaps_are_those_of_layers_pooled():
    draws = torch.stack([single(0, 0), single(0, 1), single(2, 1)])
    attributions = made(single(0, 0), draws)
    found = confidence(attributions, select(attributions, 1))
    assert found.with_circuit == (1, 1 / 3, 0)  # two of two units, one of three in either, none
    assert found.among_draws == (1 / 3, 0, 1 / 3)
    assert found.overlap == pytest.approx(2 / 9)
    summary = found.summary()
    assert (summary["draws"], summary["with_circuit"]["mean"]) == (3, pytest.approx(4 / 9))
    assert 0 <= summary["with_circuit"]["low"] <= 4 / 9 <= summary["with_circuit"]["high"] <= 1


def test_draws_that_are_all_alike_leave_no_doubt():
    attributions = noisy(0.0)
    found = confidence(attributions, select(attributions, 3))
    assert found.overlap == 1 and set(found.with_circuit) == {1}
    assert {share for shares in found.circuit.chosen.values() for share in shares} == {1}


def test_more_noise_means_less_overlap():
    overlaps = [confidence(noisy(noise), select(noisy(noise), 3)).overlap for noise in (0.0, 0.1, 0.5, 5.0)]
    assert overlaps == sorted(overlaps, reverse=True) and overlaps[0] == 1 and overlaps[-1] < 0.5


def test_shares_are_counted_over_the_contrast_of_each_draw_with_its_own_reference():
    concept = made(single(0, 0), torch.stack([single(0, 0), single(0, 0) + 3 * single(1, 1)]))
    reference = made(torch.zeros(3, 3), torch.stack([torch.zeros(3, 3), 3 * single(1, 1)]))
    both = replace(concept, reference=reference)
    circuit = select(both.contrast("difference"), 1)
    assert confidence(both, circuit, "difference").circuit.chosen == {"a": (1,), "b": (1,)}


def test_another_way_to_choose_is_asked_for_each_draw():
    attributions = noisy(1.0)
    circuit = select(attributions, 2)
    always = confidence(attributions, circuit, choose=lambda drawn: circuit)
    assert always.overlap == 1


def test_the_shares_survive_json_and_belong_to_the_units():
    circuit = confidence(noisy(0.3), select(noisy(0.3), 3)).circuit
    assert Circuit.from_json(json.loads(json.dumps(circuit.to_json()))) == circuit


@pytest.mark.parametrize("refine", ["coordinate", "paper", "none"])
def test_reselecting_from_the_same_scores_gives_the_same_units(refine):
    attributions = noisy(0.0)
    circuit = select(attributions, 3, refine=refine)
    again = reselect(attributions, circuit)
    assert again.units == circuit.units and again.scores == circuit.scores
    assert not again.edges
    assert again.selection["objective"] == circuit.selection["objective"]


def test_without_draws_or_in_other_layers_there_is_no_confidence():
    attributions = made(torch.rand(3, 3))
    circuit = select(attributions, 1)
    with pytest.raises(ViscircuitsError, match="draws=20"):
        confidence(attributions, circuit)
    elsewhere = Circuit({"c": (0,), "b": (0,)}, {"c": 3, "b": 3}, selection=circuit.selection)
    with pytest.raises(ViscircuitsError, match=r"lies in c, b.*in a, b"):
        confidence(noisy(0.1), elsewhere)
    with pytest.raises(ViscircuitsError, match="how it was selected"):
        confidence(noisy(0.1), replace(select(noisy(0.1), 1), selection={}))


# ------------------------------------------------------------------ when to stop


def test_stable_needs_as_many_good_looks_in_a_row_as_it_has_patience():
    stable = Stable(3, overlap=0.9, patience=2)
    looks = [(8, 0.0), (12, 5.0), (18, 0.0), (27, 0.0)]
    assert [stable(noisy(noise, n_images=n)) for n, noise in looks] == [False, False, False, True]
    assert [n for n, _ in stable.history] == [8, 12, 18, 27]
    assert stable.history[1][1] < 0.9 == stable.overlap


def test_a_look_that_is_repeated_counts_once():
    stable = Stable(3, patience=2)
    assert [stable(noisy(0.0, n_images=8)) for _ in range(3)] == [False] * 3
    assert stable.history == [(8, 1.0)]


def test_a_run_goes_on_from_the_state_as_if_it_had_not_been_stopped():
    first, whole = Stable(3, patience=2), Stable(3, patience=2)
    first(noisy(0.0, n_images=8))
    second = Stable(3, patience=2)
    second.restore(json.loads(json.dumps(first.state)))
    assert [whole(noisy(0.0, n_images=n)) for n in (8, 12)][-1] is second(noisy(0.0, n_images=12)) is True
    assert second.state == whole.state


def test_looks_for_another_rule_are_refused():
    other = Stable(4)
    with pytest.raises(ViscircuitsError, match=r"'units': 3.*'units': 4"):
        other.restore(Stable(3).state)


def test_the_larger_of_the_two_sets_says_how_many_images_were_seen():
    both = replace(noisy(0.0, n_images=5), reference=noisy(0.0, n_images=12))
    stable = Stable(3)
    stable(both)
    assert stable.history[0][0] == 12


@pytest.mark.parametrize(
    ("options", "names"), [({"overlap": 0.0}, "0.0"), ({"overlap": 9.0}, "9.0"), ({"patience": 0}, "0")]
)
def test_a_rule_that_cannot_be_met_or_missed_is_refused(options, names):
    with pytest.raises(ViscircuitsError, match=names):
        Stable(3, **options)


# ------------------------------------------------------------------ what the number means


def test_of_two_units_that_are_equal_draws_pick_the_same_in_two_of_three_cases_and_other_images_in_one_of_two():
    """As docs/confidence.md derives: p is uniform for a tie, and p² + (1 − p)² is 2/3 on average."""
    generator = torch.Generator().manual_seed(0)

    def from_images(n: int = 40) -> Attributions:
        images = torch.randn(n, 2, 1, generator=generator)  # (image, target, source)
        counts = torch.poisson(torch.ones(20, n), generator=generator)
        return made(images.mean(0), torch.einsum("dn,nts->dts", counts / counts.sum(1, keepdim=True), images), n)

    def larger(attributions: Attributions) -> Circuit:
        return Circuit({"a": (0,), "b": (int(attributions.matrices[0].values.argmax()),)}, {"a": 1, "b": 2})

    def picks_the_same(overlap: float) -> float:
        return (overlap - 1 / 3) / (2 / 3)  # one unit of two, or both

    found = [confidence(each, larger(each), choose=larger) for each in (from_images() for _ in range(150))]
    assert picks_the_same(sum(each.overlap for each in found) / 150) == pytest.approx(2 / 3, abs=0.05)
    with_circuit = sum(each.summary()["with_circuit"]["mean"] for each in found) / 150
    assert picks_the_same(with_circuit) == pytest.approx(3 / 4, abs=0.05)
    first = sum(each.circuit.units["b"] == (0,) for each in found) / 150
    assert first**2 + (1 - first) ** 2 == pytest.approx(1 / 2, abs=0.05)
