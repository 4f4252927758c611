"""One-target scores, searches and masks against networks whose answer is a calculation, and against slow twins."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from viscircuits.ablation import ablate, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.methods.acdc import acdc, acdc_behaviour
from viscircuits.methods.gcc import gcc, semantic_flow, sensitivity
from viscircuits.methods.masks import gate, masks, open_probability
from viscircuits.methods.patching import eap
from viscircuits.methods.single_target import actgrad, snip
from viscircuits.methods.wiring import Wiring
from viscircuits.planted import PLANTED, Planted, plant
from viscircuits.task import Finding, Task, make_task


class Residual(nn.Module):
    """Four ReLU maps; the second lies in a block that the first goes around."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(inplace=True))
        self.outer, self.joined = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.last = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU())
        self.head = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        joined = self.joined(self.outer(self.inner(first)) + first)
        return self.head(self.last(joined).mean((2, 3)))


class Branches(nn.Module):
    """Two convolutions of one map, one of them grouped, side by side in the next; then a linear layer on positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.one, self.grouped = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 3, padding=1, groups=2)
        self.pool = nn.MaxPool2d(3)
        self.hidden, self.active = nn.Linear(5 * 4, 3), nn.ReLU()
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        both = self.pool(torch.cat([self.one(stem), self.grouped(stem)], 1).relu())
        return self.head(self.active(self.hidden(both.flatten(1))))


class Vectors(nn.Sequential):
    """Modules on images of one pixel, a number for each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flatten(1))


class Chain(nn.Sequential):
    """Three ReLU maps of 3, 3 and 2 units, one after the other."""

    def __init__(self):
        convolutions = [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU()]
        super().__init__(*convolutions, nn.Flatten(), nn.Linear(8, 2))


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residual_task(**options) -> Task:
    net = seeded(Residual)
    layers = ["first", "inner", "joined", "last"]
    return make_task(net, layers, noise(4, 3, 8, 8), noise(5, 3, 8, 8, seed=1), **options)


def branches_task() -> Task:
    return make_task(seeded(Branches), ["stem", "pool", "active"], noise(4, 3, 6, 6), noise(4, 3, 6, 6, seed=1))


def pixels(*images: tuple[float, ...]) -> Tensor:
    return torch.tensor(images, dtype=torch.float32)[:, :, None, None]


def linear(*matrix: tuple[float, ...]) -> nn.Linear:
    weight = torch.tensor(matrix, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def one_path(n_outputs: int = 2, ablation: str = "zero") -> Task:
    """Output 0 reads unit 0 of "3", which reads unit 0 of "1"; output 1 reads all the rest, which is larger."""
    outputs = [(2.0, 0.0), (0.0, 1.0)][:n_outputs]
    net = Vectors(linear((1, 0), (0, 1), (1, 1)), nn.ReLU(), linear((1, 0, 0), (0, 1, 5)), nn.ReLU(), linear(*outputs))
    images = pixels((1, 2), (2, 1), (3, 3))
    return make_task(
        net.eval(), ["1", "3"], images, images / 4, concept_labels=torch.zeros(3).long(), ablation=ablation
    )


def changed(task: Task, *interventions: AbstractContextManager) -> float:
    """Mean absolute change of the behaviour that interventions make together."""
    with torch.no_grad():
        whole = task.judge(task.spec.model(task.concept), task.concept_labels)
        with ExitStack() as stack:
            for each in interventions:
                stack.enter_context(each)
            now = task.judge(task.spec.model(task.concept), task.concept_labels)
    return (now - whole).abs().mean().item()


def edges_of(task: Task, gates: dict[int, Tensor]) -> list[Edge]:
    """The edges whose gates are shut."""
    return [
        Edge(Unit(task.addresses[i], m), Unit(task.addresses[i + 1], n), 1.0, 1.0)
        for i, each in gates.items()
        for n, m in (each == 0).nonzero().tolist()
    ]


def alone(task: Task, layer: str, unit: int) -> Circuit:
    return Circuit({each: (unit,) * (each == layer) for each in task.addresses}, task.widths)


# ------------------------------------------------------------------ wiring


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@torch.no_grad()
def test_gates_on_edges_are_prune_edges(ablation):
    task = residual_task(ablation=ablation)
    wiring, generator = Wiring(task, "behaviour"), torch.Generator().manual_seed(0)
    for _ in range(2):
        gates = {
            i: (torch.rand(target.n_units, source.n_units, generator=generator) < 0.6).float()
            for i, (source, target) in enumerate(task.pairs)
        }
        pruned = edges_of(task, gates)
        expected = changed(task, prune_edges(task.spec.model, pruned, ablation, reference=task.statistics))
        assert expected > 0
        assert wiring.distance(gates, {}).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_unit_is_its_edges_and_what_goes_around_the_next_layer():
    task = residual_task()
    wiring = Wiring(task, "behaviour")
    assert wiring.around == {0, 3}  # the skip goes around the block's inside; the last layer meets the output
    for i, layer in enumerate(task.layers):
        for unit in range(layer.n_units):
            circuit = alone(task, layer.address, unit)
            expected = changed(task, ablate(task.spec.model, circuit, "mean", reference=task.statistics))
            shut = torch.ones(layer.n_units).index_fill_(0, torch.tensor([unit]), 0)
            edges = {j: torch.ones(task.layers[j + 1].n_units, task.layers[j].n_units) for j in range(3)}
            edges.update({i: edges[i] * shut} if i < 3 else {})
            assert wiring.distance({}, {i: shut}).item() == pytest.approx(expected, rel=1e-5)
            onward = {i: shut} if i in wiring.around else {}
            assert wiring.distance(edges, onward).item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ ACDC


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("edges", [True, False])
def test_acdc_keeps_the_one_path_and_nothing_else(edges, ablation):
    found = acdc_behaviour(one_path(ablation=ablation), edges=edges)
    assert {layer: (scores > 0).tolist() for layer, scores in found.units.items()} == {
        "1": [True, False, False],
        "3": [True, False],
    }
    if edges:
        assert (found.edges["1", "3"] > 0).tolist() == [[True, False, False], [False, False, False]]


def test_acdc_by_kl_keeps_what_other_outputs_read():
    found = acdc(one_path(), thresholds=[1e-6])
    assert (found.edges["1", "3"] > 0).tolist() == [[True, False, False], [False, True, True]]


def test_acdc_judges_one_output_by_its_behaviour():
    task = one_path(n_outputs=1)
    expected = acdc(task, metric="behaviour")
    assert torch.equal(acdc(task, metric="kl").edges["1", "3"], expected.edges["1", "3"])
    assert expected.edges["1", "3"][0, 0] > 0


def sum_of_four() -> Task:
    """y = 1·x₀ + 2·x₁ + 4·x₂ + 8·x₃ at x = 1: removal takes 1, 2, 4 and 8 of 15, whatever else is removed."""
    net = Vectors(nn.Linear(4, 4, bias=False), linear((1, 2, 4, 8)), linear((1,)))
    net[0].weight.data = torch.eye(4)
    return make_task(net.eval(), ["0", "1"], torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 1, 1), ablation="zero")


def test_acdc_ladder_gives_the_largest_threshold_that_keeps_an_edge():
    ladder = [0.9, 0.05, 0.2, 0.1, 0.5]  # shares of 15: the edges weigh .067, .133, .267 and .533
    stepped = acdc(sum_of_four(), thresholds=ladder, rank="threshold")
    assert torch.allclose(stepped.edges["0", "1"], torch.tensor([[0.05, 0.1, 0.2, 0.5]]))
    assert torch.allclose(stepped.units["0"], torch.tensor([0.05, 0.1, 0.2, 0.5]))
    fine = acdc(sum_of_four(), thresholds=ladder)  # .05 + (.1 − .05)(1 − .05 · 15 / 1) and so on, then 8 / 15
    assert torch.allclose(fine.edges["0", "1"], torch.tensor([[0.0625, 0.125, 0.275, 0.5 + 0.4 * (1 - 0.5 * 15 / 8)]]))
    alone = acdc(sum_of_four(), thresholds=[0.05])
    assert torch.allclose(alone.edges["0", "1"], torch.tensor([[1.0, 2.0, 4.0, 8.0]]) / 15)
    absolute = acdc(sum_of_four(), thresholds=[3.0], relative=False)
    assert absolute.edges["0", "1"].tolist() == [[0, 0, 4, 8]]


def test_acdc_removes_one_of_two_that_do_the_same_job_and_keeps_the_other():
    # min(1, x₀ + x₁) at x = (1, 2): either source alone gives 1; the weaker goes first
    net = Vectors(linear((1, 0), (0, 1)), nn.ReLU(), linear((1, 1)), nn.Hardtanh(0, 1), linear((3,)))
    task = make_task(net.eval(), ["1", "3"], pixels((1, 2)), pixels((0, 0)), ablation="zero")
    found = acdc(task)
    assert (found.edges["1", "3"] > 0).tolist() == [[False, True]]


def test_acdc_with_a_tiny_threshold_keeps_what_has_any_effect_and_with_a_huge_one_nothing():
    task = make_task(seeded(Chain), ["1", "3", "5"], noise(2, 3, 6, 6), noise(2, 3, 6, 6, seed=1))
    found = acdc_behaviour(task, thresholds=[1e-9])
    alone = {pair: torch.zeros_like(scores) for pair, scores in found.edges.items()}
    for (source, target), effects in alone.items():
        for n, m in torch.ones_like(effects).nonzero().tolist():
            edge = Edge(Unit(source, m), Unit(target, n), 1.0, 1.0)
            effects[n, m] = changed(task, prune_edges(task.spec.model, [edge], "mean", reference=task.statistics))
        assert torch.equal(found.edges[source, target] > 0, effects > 0)
        assert (effects > 0).any()
    nothing = acdc_behaviour(task, thresholds=[1e6])
    assert not any(scores.any() for scores in [*nothing.units.values(), *nothing.edges.values()])


def slow_acdc(task: Task, threshold: float) -> tuple[set[Edge], set[Unit]]:
    """The published loop on a chain without skips, every network run anew through `ablate` and `prune_edges`."""
    model, layers = task.spec.model, task.layers

    def distance(pruned: list[Edge], removed: list[int]) -> float:
        units = {**dict.fromkeys(task.addresses, ()), layers[-1].address: tuple(removed)}
        given = {"ablation": task.ablation, "reference": task.statistics}
        edges = prune_edges(model, pruned, **given)
        return changed(task, edges, ablate(model, Circuit(units, task.widths), **given))

    pruned, removed, now = [], [], 0.0
    for m in range(layers[-1].n_units):
        tried = distance(pruned, [*removed, m])
        if tried - now < threshold:
            removed, now = [*removed, m], tried
    for source, target in reversed(list(pairwise(layers))):
        for n in range(target.n_units):
            for m in range(source.n_units):
                edge = Edge(Unit(source.address, m), Unit(target.address, n), 1.0, 1.0)
                tried = distance([*pruned, edge], removed)
                if tried - now < threshold:
                    pruned, now = [*pruned, edge], tried
    return set(pruned), {Unit(task.addresses[-1], m) for m in removed}


def test_acdc_is_the_published_loop():
    threshold = 0.01
    task = make_task(seeded(Chain), ["1", "3", "5"], noise(2, 3, 6, 6), noise(2, 3, 6, 6, seed=1))
    found = acdc_behaviour(task, thresholds=[threshold], relative=False, order="index")
    pruned, removed = slow_acdc(task, threshold)
    kept = {pair: scores > 0 for pair, scores in found.edges.items()}
    expected = {pair: torch.ones_like(mask) for pair, mask in kept.items()}
    for edge in pruned:
        expected[edge.source.layer, edge.target.layer][edge.target.index, edge.source.index] = False
    assert 0 < len(pruned) < sum(mask.numel() for mask in kept.values())
    assert all(torch.equal(kept[pair], expected[pair]) for pair in kept)
    assert {unit.index for unit in removed} == set((found.units["5"] == 0).nonzero().flatten().tolist())


def test_acdc_runs_no_network_twice_and_none_for_what_cannot_matter():
    once, again = acdc_behaviour(one_path(), thresholds=[0.1]), acdc_behaviour(one_path(), thresholds=[0.1, 0.1])
    assert once.passes.forward == again.passes.forward
    # 3 images: the whole network, an empty one, two units onward, three edges into the one unit still read: a
    # partial pass each, and one onward where the target changed
    assert once.passes.forward == 3 * (1 + 1 + 2 + 3 + 1)


@pytest.mark.parametrize(
    "options", [{"thresholds": []}, {"thresholds": [0.0]}, {"metric": "l2"}, {"order": "alphabet"}]
)
def test_acdc_refuses_what_it_does_not_know(options):
    with pytest.raises(ViscircuitsError, match=r"thresholds above 0|metric|order"):
        acdc(one_path(), **options)


def test_a_drawn_replacement_is_refused():
    with pytest.raises(ViscircuitsError, match="one value for each removed unit"):
        acdc(one_path(ablation="resample"))


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("edges", [True, False])
def test_masks_keep_the_one_path_and_shut_the_rest(edges):
    found = masks(one_path(), edges=edges, prices=[0.3], steps=36)
    assert (found.units["1"] > 0.5).tolist() == [True, False, False]
    assert (found.units["3"] > 0.5).tolist() == [True, False]
    if edges:
        assert (found.edges["1", "3"] > 0.5).tolist() == [[True, False, False], [False, False, False]]


def test_a_price_of_nothing_shuts_no_gate_and_an_exorbitant_one_shuts_all():
    free, dear = (masks(one_path(), prices=[price], steps=40) for price in (0.0, 1000.0))
    assert min(scores.min() for scores in free.units.values()) >= open_probability(torch.tensor(5.0))
    assert max(scores.max() for scores in dear.units.values()) < 0.5


def test_masks_are_those_of_their_seed():
    first, same, other = (masks(residual_task(seed=seed), prices=[0.3], steps=3) for seed in (0, 0, 1))
    assert all(torch.equal(first.units[layer], same.units[layer]) for layer in first.units)
    assert not torch.equal(first.units["first"], other.units["first"])


def test_a_gate_is_open_as_often_as_stated():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    for logit in (-2.0, 0.0, 1.5):
        gates = gate(torch.full_like(uniform, logit), uniform)
        assert gates.min() >= 0 and gates.max() <= 1
        assert (gates > 0).float().mean() == pytest.approx(open_probability(torch.tensor(logit)).item(), abs=0.005)
    assert gate(torch.tensor(0.0), torch.tensor(0.5)) == 0.5


# ------------------------------------------------------------------ SNIP and ActGrad


def test_snip_of_a_network_by_hand():
    # h = (3x₀ + x₁, −x₀) → relu, y = 2h₀ + 5h₁ at x = (1, 2): h = (5, −1 → 0), ∂y/∂w₁ = 2·x for the first unit
    net = Vectors(linear((3, 1), (-1, 0)), nn.ReLU(), linear((2, 5)), nn.ReLU(), nn.Flatten())
    task = make_task(net.eval(), ["1", "3"], pixels((1, 2)), pixels((0, 0)))
    found = snip(task)
    assert found.edges["1", "3"].tolist() == [[10, 0]]  # 2·5 and 5·0
    assert found.units["1"].tolist() == [10, 0]  # |3·2·1| + |1·2·2| and a unit that is off
    assert found.units["3"].tolist() == [10]


def test_snip_is_weight_times_gradient_summed_over_kernels(conv_net, photographs):
    task = make_task(conv_net, ["1", "3", "5"], photographs, photographs.flip(0), batch_size=2)
    judged = task.judge(conv_net(photographs), task.concept_labels)
    found = snip(task)
    for (source, target), module in zip(found.edges, (conv_net[2], conv_net[4]), strict=True):
        slope = torch.autograd.grad(judged.mean(), module.weight, retain_graph=True)[0]
        expected = (module.weight * slope).abs().sum((2, 3))
        assert torch.allclose(found.edges[source, target], expected, atol=1e-7)
        assert torch.allclose(found.units[target], expected.sum(1), atol=1e-7)


def test_snip_and_actgrad_of_one_unit_look_at_that_unit_alone(conv_net, photographs):
    task = make_task(conv_net, ["1", "3", "5"], photographs, photographs.flip(0))
    slope = torch.autograd.grad(conv_net[:6](photographs)[:, 2].sum() / len(photographs), conv_net[2].weight)[0]
    found = snip(task, target=2)
    assert torch.allclose(found.edges["1", "3"], (conv_net[2].weight * slope).abs().sum((2, 3)), atol=1e-6)
    assert (actgrad(task, target=2).units["5"] > 0).tolist() == [False, False, True, False, False]
    with pytest.raises(ViscircuitsError, match="no unit 5 in layer '5'"):
        snip(task, target=5)


def test_kernels_are_found_through_concatenation_groups_and_flattening():
    task = branches_task()
    net = task.spec.model
    judged = task.judge(net(task.concept), task.concept_labels).mean()
    weights = [net.one.weight, net.grouped.weight, net.hidden.weight]
    one, grouped, hidden = (
        (w * slope).abs() for w, slope in zip(weights, torch.autograd.grad(judged, weights), strict=True)
    )
    expected = torch.zeros(5, 4)
    expected[:3], expected[3, :2], expected[4, 2:] = one.sum((2, 3)), grouped[0].sum((1, 2)), grouped[1].sum((1, 2))
    found = snip(task)
    assert torch.allclose(found.edges["stem", "pool"], expected, atol=1e-7)
    assert torch.allclose(found.edges["pool", "active"], hidden.unflatten(1, (5, 4)).sum(2), atol=1e-7)


def test_actgrad_is_what_each_kernel_puts_out_times_the_gradient():
    task = branches_task()
    net = task.spec.model
    stem = net.stem(task.concept).detach().requires_grad_()
    one, grouped = net.one(stem), net.grouped(stem)
    pool = net.pool(torch.cat([one, grouped], 1).relu())
    judged = task.judge(net.head(net.active(net.hidden(pool.flatten(1)))), task.concept_labels).sum()
    of_stem, of_one, of_grouped, of_pool = torch.autograd.grad(judged, [stem, one, grouped, pool])
    found = actgrad(task)
    assert torch.allclose(found.units["stem"], (stem * of_stem).abs().sum((2, 3)).mean(0), atol=1e-7)
    assert torch.allclose(found.units["pool"], (pool * of_pool).abs().sum((2, 3)).mean(0), atol=1e-7)
    for n, m in torch.ones(3, 4).nonzero().tolist():
        kernel = nn.functional.conv2d(stem[:, m : m + 1], net.one.weight[n : n + 1, m : m + 1])
        expected = (kernel * of_one[:, n : n + 1]).abs().sum((1, 2, 3)).mean()
        assert found.edges["stem", "pool"][n, m] == pytest.approx(expected.item(), abs=1e-7)
    kernel = nn.functional.conv2d(stem[:, 3:4], net.grouped.weight[1:2, 1:2], padding=1)
    expected = (kernel * of_grouped[:, 1:2]).abs().sum((1, 2, 3)).mean()
    assert found.edges["stem", "pool"][4, 3] == pytest.approx(expected.item(), abs=1e-7)
    assert found.edges["stem", "pool"][4, 0] == 0


def test_a_pair_that_no_one_weight_joins_has_no_edges_but_scores(conv_net, photographs):
    found = snip(make_task(conv_net, ["1", "5"], photographs, photographs.flip(0)))
    assert not found.edges
    assert (found.units["5"] > 0).any()


def test_snip_refuses_a_layer_whose_units_no_kernel_makes(vit, photographs):
    task = make_task(vit, ["blocks.0.norm2", "blocks.1.norm2"], photographs, photographs.flip(0))
    with pytest.raises(ViscircuitsError, match=r"blocks\.0\.norm2.*no kernels to score"):
        snip(task)


def test_frozen_weights_are_scored_as_others_are(conv_net, photographs):
    task = make_task(conv_net, ["1", "3"], photographs, photographs.flip(0))
    expected = snip(task)
    conv_net.requires_grad_(False)
    assert torch.equal(snip(task).edges["1", "3"], expected.edges["1", "3"])
    assert not any(parameter.requires_grad for parameter in conv_net.parameters())


# ------------------------------------------------------------------ GCC


def test_semantic_flow_is_the_share_of_highest_images_in_common():
    source = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]]).bool()  # two images; one image
    target = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).bool()
    assert semantic_flow(source, target).tolist() == [[0.5, 1.0], [0.5, 0.0]]


def test_sensitivity_is_the_share_of_what_targets_lose():
    # targets 3s₀ + s₁, s₀ and −s₀ + s₁ + 20 at s = (1, 2): muting s₀ takes 3, 1 and −1; muting s₁ takes 2, 0 and 2
    net = Vectors(linear((1, 0), (0, 1)), linear((3, 1), (1, 0), (-1, 1)), linear((1, 1, 1), (0, 1, 0)))
    task = make_task(net.eval(), ["0", "1"], pixels((1, 2)), pixels((0, 0)))
    found = sensitivity(task, *task.layers, muted="zero")
    assert torch.allclose(found, torch.tensor([[0.75, 0.5], [0.25, 0.0], [0.0, 0.5]]))
    assert found.sum(0).tolist() == [1, 1]


def test_gcc_follows_sensitive_connections_that_agree_from_the_roots():
    # s₀ is high on the concept and s₁ on the reference; t₀ = s₀ and t₁ = s₁ agree with one source each
    net = Vectors(linear((1, 0), (0, 1)), linear((2, 0), (1, 3)), linear((1, 1), (0, 1)))
    task = make_task(net.eval(), ["0", "1"], pixels((4, 1), (5, 1)), pixels((0, 9), (1, 8)))
    found = gcc(task)
    assert found.units["0"].tolist() == [1, 0]
    # s₀ muted takes 2·s₀ of t₀ and 1·s₀ of t₁, which is high on other images and is left out
    assert torch.allclose(found.edges["0", "1"], torch.tensor([[2 / 3, 0.0], [0.0, 0.0]]))
    assert torch.allclose(found.units["1"], torch.tensor([1 + 2 / 3, 0.0]))
    assert found.passes.forward == 4 + 2 * 3  # the pool, then the concept whole and with either source muted
    with pytest.raises(ViscircuitsError, match="pool's 4 images"):
        gcc(task, top=5)


# ------------------------------------------------------------------ planted circuits

HAND_WIRED = [name for name, builder in PLANTED.items() if builder.family == "hand-wired"]


def kept_and_true(planted: Planted, found: Finding) -> list[tuple[Tensor, Tensor]]:
    """What has a score, and what ought to: units of each layer, then edges of each pair."""
    units = [(found.units[layer] > 0, planted.units[layer]) for layer in planted.layers]
    return units + [(found.edges[pair] > 0, true) for pair, true in planted.edges.items()]


@pytest.mark.parametrize("name", HAND_WIRED)
def test_acdc_recovers_hand_wired_circuits(name):
    planted = plant(name, n_images=4, n_decoys=2)
    found = acdc_behaviour(planted.task(), thresholds=[1e-3])
    if not planted.redundant:
        assert all(torch.equal(kept, true) for kept, true in kept_and_true(planted, found))
        return
    assert not any((kept & ~true).any() for kept, true in kept_and_true(planted, found))
    for group in planted.redundant:
        assert any(found.units[unit.layer][unit.index] > 0 for unit in group)


@pytest.mark.parametrize("name", HAND_WIRED)
def test_eap_recovers_hand_wired_circuits(name):
    planted = plant(name, n_images=6)
    both = kept_and_true(planted, eap(planted.task()))
    assert not any((kept & ~true).any() for kept, true in both)
    blind = bool(planted.redundant)  # where either of two suffices the behaviour has no slope in either
    assert all(torch.equal(kept, true) for kept, true in both) != blind
