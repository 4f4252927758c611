"""What a method is asked and what it answers, by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from viscircuits.circuit import Circuit
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.task import Finding, Passes, costing, log_probability, logit, make_task, margin, observe, outcomes

OUTPUTS = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
LABELS = torch.tensor([1, 2])


def network():
    """Two units on vectors of two entries, doubled and swapped, then added up in the first output."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model[1].weight.data = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    model[3].weight.data = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    return model.eval()


def images(*rows):
    return torch.tensor(rows)[:, :, None, None]


def task(**options):
    return make_task(network(), ["2"], images([1.0, 2.0], [3.0, 0.0]), images([0.0, 0.5]), **options)


def test_behaviours_by_hand():
    assert logit(OUTPUTS, LABELS).tolist() == [3, 0]
    assert margin(OUTPUTS, LABELS).tolist() == [1, 0]
    third = -torch.tensor(3.0).log()
    assert log_probability(OUTPUTS, LABELS)[1] == pytest.approx(third.item())


def test_without_labels_the_networks_own_answers_are_judged():
    assert task().concept_labels.tolist() == [0, 0]
    assert task(concept_labels=torch.tensor([1, 1])).concept_labels.tolist() == [1, 1]


def test_observing_gives_values_behaviour_and_its_gradient():
    with costing(task()) as counted:
        ((batch, labels),) = counted.batches()
        seen = observe(counted, batch, labels)
    assert seen.values["2"].tolist() == [[4, 2], [0, 6]]  # doubled and swapped
    assert seen.behaviour.tolist() == [10, 18]  # 4 + 3·2 and 0 + 3·6
    assert seen.gradients["2"].tolist() == [[1, 3], [1, 3]]
    assert (counted.passes.forward, counted.passes.backward) == (2, 2)


def test_replacing_values_changes_what_follows():
    given = task()
    batch, labels = next(given.batches())
    assert outcomes(given, batch, labels, {"2": torch.ones_like}).tolist() == [4, 4]
    assert outcomes(given, batch, labels).tolist() == [10, 18]


def test_a_removed_value_is_zero_or_the_references_mean():
    like = torch.zeros(1, 2)
    assert task(ablation="zero").baseline(task().layers[0], like).tolist() == 0
    assert task().baseline(task().layers[0], like).tolist() == [[1, 0]]
    with pytest.raises(ViscircuitsError, match="'zero' or 'mean'"):
        task(ablation="noise").baseline(task().layers[0], like)


def test_costs_are_counted_anew_and_the_network_is_put_back_after_an_exception():
    given = task()
    given.spec.model.train()
    with pytest.raises(RuntimeError, match="no reason"), costing(given) as counted:
        observe(counted, *next(counted.batches()))
        raise RuntimeError("no reason")
    assert given.passes == Passes()
    assert given.spec.model.training
    assert count_hooks(given.spec.model) == 0


FINDING = Finding(
    "by hand",
    {"a": torch.tensor([1.0, 5.0, 3.0]), "b": torch.tensor([4.0, 2.0])},
    {"a": 3, "b": 2},
    {("a", "b"): torch.tensor([[0.0, 7.0, 8.0], [9.0, 1.0, 2.0]])},
)


def test_a_circuit_takes_the_highest_scores_of_each_layer_and_the_edges_between_them():
    circuit = FINDING.circuit({"a": 2, "b": 1})
    assert dict(circuit.units) == {"a": (1, 2), "b": (0,)}
    assert [(e.source.index, e.target.index, e.score) for e in circuit.edges] == [(2, 0, 8.0), (1, 0, 7.0)]


def test_over_all_layers_a_circuit_takes_the_highest_scores_wherever_they_lie():
    assert dict(FINDING.circuit(3, share="over all").units) == {"a": (1, 2), "b": (0,)}
    assert dict(FINDING.circuit(0.2, share="over all").units) == {"a": (1,), "b": ()}


def test_with_half_each_layer_gives_half_of_its_part_and_the_rest_lie_wherever_scores_are_highest():
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 100, "c": torch.arange(10.0) + 200}
    finding = Finding("by hand", scores, dict.fromkeys("abc", 10))
    circuit = finding.circuit(0.4, share="half")
    assert dict(circuit.units) == {"a": (8, 9), "b": (8, 9), "c": tuple(range(2, 10))}
    assert circuit.provenance["share"] == "half"
    assert {len(units) for units in finding.circuit(1, share="half").units.values()} == {0, 3}
    assert dict(finding.circuit({"a": 1, "b": 2, "c": 1}, share="half").units) == {"a": (9,), "b": (8, 9), "c": (9,)}
    assert replace(finding, share="half").circuit(0.4) == circuit
    assert replace(finding, share="half").circuit(0.4, share="per layer") == finding.circuit(0.4)


def test_with_half_no_score_changes_and_those_that_are_no_numbers_take_no_ones_part():
    scores = {"a": torch.full((10,), torch.inf), "b": torch.arange(10.0), "c": torch.full((10,), torch.nan)}
    given = {layer: each.double() for layer, each in scores.items()}
    finding = Finding("by hand", given, dict.fromkeys("abc", 10), share="half")
    sizes = {layer: len(units) for layer, units in finding.circuit(4).units.items()}
    assert sum(sizes.values()) == 12
    assert min(sizes.values()) >= 2
    assert given["b"].tolist() == list(range(10))


def test_a_circuit_with_an_empty_layer_is_read_as_it_was_saved(tmp_path):
    circuit = FINDING.circuit(0.2, share="over all")
    assert circuit.units["b"] == ()
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == circuit


def test_a_size_or_share_that_is_not_possible_is_refused():
    with pytest.raises(ViscircuitsError, match="per layer"):
        FINDING.circuit(2, share="somehow")
    with pytest.raises(ViscircuitsError, match="for each layer"):
        FINDING.circuit({"a": 1, "b": 1}, share="over all")
    with pytest.raises(ViscircuitsError, match="it has 2"):
        FINDING.circuit(3)


def test_no_images_or_an_unknown_behaviour_are_refused():
    with pytest.raises(ViscircuitsError, match="images of both kinds"):
        make_task(network(), ["2"], images([1.0, 2.0])[:0], images([0.0, 0.5]))
    with pytest.raises(ViscircuitsError, match="log-probability"):
        task(behaviour="log_probability")


def test_costs_add_up():
    passes = Passes(1, 2, 0.5)
    passes.add(Passes(10, 20, 1.0))
    assert passes == Passes(11, 22, 1.5)
