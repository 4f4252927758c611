"""What every method promises, whichever it is: those in `METHODS` enter by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.methods import METHODS, find
from viscircuits.task import Finding, Task, make_task

# options that keep a slow method quick
QUICK: dict[str, dict[str, Any]] = {
    "exact": {"edges": True},
    "eap-ig": {"steps": 2},
    "acdc": {"thresholds": [0.01]},
    "acdc-behaviour": {"thresholds": [0.01]},
    "masks": {"steps": 20, "prices": [0.3]},
}
FREE = {"weight-norm", "random"}  # methods that run no image
DRAWN = {"random", "masks"}  # methods whose scores go by a unit's index: they draw a number for each
ROUNDING = 1e-5
ORDER = torch.tensor([2, 0, 3, 1])


class Branched(nn.Module):
    """A convolution, two branches that are concatenated with it going around, batch norm, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.first_relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.left, self.right = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.norm, self.joined = nn.BatchNorm2d(5), nn.ReLU(inplace=True)
        self.last, self.last_relu = nn.Conv2d(5, 3, 3, stride=2), nn.ReLU()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_relu(self.first(x))
        x = self.joined(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(self.last_relu(self.last(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Four patches as tokens, and two perceptrons of four hidden units with a residual path around each."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, stride=4)
        self.norm = nn.LayerNorm(4)
        self.first, self.first_gelu, self.back = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)
        self.second, self.second_gelu, self.head = nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (image, token, unit)
        x = x + self.back(self.first_gelu(self.first(self.norm(x))))
        return self.head(self.second_gelu(self.second(x)).mean(1))


class Failing(nn.Module):
    """Stands in a network's head, counts its calls, and fails at one of them."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head, self.calls, self.last = head, 0, -1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise RuntimeError("out of order")
        return self.head(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "maps": (Branched, ["first_relu", "joined", "last_relu"]),
    "tokens": (Tokens, ["first_gelu", "second_gelu"]),
}


def network(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[kind][0]().eval()


def task_of(kind: str, net: nn.Module, **options: Any) -> Task:
    draw = torch.Generator().manual_seed(1)
    concept, others = (torch.randn(4, 3, 8, 8, generator=draw) for _ in range(2))
    return make_task(net, NETWORKS[kind][1], concept, others + 0.3, **options)


def run(method: str, task: Task) -> Finding:
    return find(task, method, **QUICK.get(method, {}))


@cache
def failing(kind: str) -> Task:
    net = network(kind)
    net.head = Failing(net.head)
    return task_of(kind, net)


@cache
def counted(method: str, kind: str) -> tuple[Finding, int]:
    """The method's answer, and how often it ran the network to its end."""
    head = failing(kind).spec.model.head
    head.calls, head.last = 0, -1
    return run(method, failing(kind)), head.calls


def found(method: str, kind: str) -> Finding:
    return counted(method, kind)[0]


@cache
def plain(kind: str) -> Task:
    return task_of(kind, network(kind))


@cache
def permuted(kind: str) -> Task:
    """The task with the units of the network's first layer in another order, and everything that reads them."""
    net = network(kind)
    readers = (net.left, net.right) if kind == "maps" else (net.back,)
    net.first.weight.data, net.first.bias.data = net.first.weight.data[ORDER], net.first.bias.data[ORDER]
    for reader in readers:
        reader.weight.data = reader.weight.data[:, ORDER]
    return task_of(kind, net)


def same(one: Finding, other: Finding, tolerance: float) -> bool:
    if one.units.keys() != other.units.keys() or one.edges.keys() != other.edges.keys():
        return False
    pairs = [*((one.units[each], other.units[each]) for each in one.units)]
    pairs += [(one.edges[each], other.edges[each]) for each in one.edges]
    return all(torch.allclose(a, b, rtol=10 * tolerance, atol=tolerance) for a, b in pairs)


every_method = pytest.mark.parametrize("method", METHODS)
on_both = pytest.mark.parametrize("kind", NETWORKS)


@every_method
@on_both
def test_scores_are_finite_numbers_for_every_unit_and_edge(method, kind):
    task, finding = plain(kind), found(method, kind)
    assert finding.method == method
    assert {layer: tuple(scores.shape) for layer, scores in finding.units.items()} == {
        layer.address: (layer.n_units,) for layer in task.layers
    }
    assert list(finding.units) == list(task.addresses)
    shapes = {(s.address, t.address): (t.n_units, s.n_units) for s, t in task.pairs}
    for pair, scores in finding.edges.items():
        assert tuple(scores.shape) == shapes[pair]
    for scores in (*finding.units.values(), *finding.edges.values()):
        assert bool(scores.isfinite().all())
    assert all(not bool((scores == scores[0]).all()) for scores in finding.units.values())  # something is told apart


@every_method
@on_both
def test_what_it_cost_is_recorded(method, kind):
    finding = found(method, kind)
    assert (finding.passes.forward > 0) == (method not in FREE)
    assert finding.passes.seconds > 0


@every_method
@on_both
def test_a_circuit_can_be_cut_at_any_size(method, kind):
    finding = found(method, kind)
    for k in (1, 2, 0.5):
        circuit = finding.circuit(k)
        asked = {layer: k if isinstance(k, int) else int(k * width + 0.5) for layer, width in finding.widths.items()}
        assert circuit.n_units == sum(asked.values())
        for layer, width in finding.widths.items():
            chosen = circuit.units[layer]
            assert len(chosen) == asked[layer] or (finding.share == "half" and len(chosen) >= asked[layer] // 2)
            left = [i for i in range(width) if i not in chosen]
            scores = finding.units[layer]
            assert not chosen or not left or scores[list(chosen)].min() >= scores[left].max()
    together = finding.circuit(5, share="over all")
    assert together.n_units == 5


@every_method
@on_both
def test_batches_change_nothing(method, kind):
    assert same(found(method, kind), run(method, replace(plain(kind), batch_size=3)), ROUNDING)


@every_method
@on_both
def test_permuting_units_permutes_their_scores(method, kind):
    if method in DRAWN:
        pytest.skip("draws a number for each unit")
    before, after = found(method, kind), run(method, permuted(kind))
    first = NETWORKS[kind][1][0]
    units = {layer: scores[ORDER] if layer == first else scores for layer, scores in before.units.items()}
    edges = {pair: scores[:, ORDER] if pair[0] == first else scores for pair, scores in before.edges.items()}
    expected = Finding(method, units, before.widths, edges)
    assert same(expected, after, ROUNDING)


@every_method
@on_both
def test_a_second_run_gives_the_same_scores_and_leaves_the_network_as_it_was_found(method, kind):
    net = plain(kind).spec.model.train()
    next(iter(net.parameters())).requires_grad_(False)
    before, asked = copy.deepcopy(net.state_dict()), [each.requires_grad for each in net.parameters()]
    assert same(found(method, kind), run(method, plain(kind)), 0)
    assert untouched(net, before, asked)


@every_method
@on_both
def test_the_network_is_left_as_it_was_found_after_an_exception(method, kind):
    n_calls = counted(method, kind)[1]
    if not n_calls:
        pytest.skip("never runs the network to its end")
    net = failing(kind).spec.model.train()
    before, asked = copy.deepcopy(net.state_dict()), [each.requires_grad for each in net.parameters()]
    net.head.calls, net.head.last = 0, n_calls // 2 + 1  # in the middle of its work
    with pytest.raises(ViscircuitsError, match="out of order"):
        run(method, failing(kind))
    assert untouched(net, before, asked)


def untouched(net: nn.Module, before: dict[str, Tensor], asked: list[bool]) -> bool:
    after = net.state_dict()
    return (
        count_hooks(net) == 0
        and all(torch.equal(after[name], before[name]) for name in before)
        and [each.requires_grad for each in net.parameters()] == asked
        and all(each.grad is None for each in net.parameters())
        and all(each.training for each in net.modules())
    )


def test_an_unknown_method_is_named_with_those_there_are():
    with pytest.raises(ViscircuitsError, match=r"no method 'eap_ig'\. Did you mean 'eap-ig'"):
        find(plain("maps"), "eap_ig")
