"""Exact removal, gradients, relevance and attribution as methods: against hand calculation, brute force and captum."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from viscircuits import attribute
from viscircuits.ablation import ablate, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import activations, rewrite
from viscircuits.methods import find
from viscircuits.methods.exact import exact_effects
from viscircuits.methods.patching import _along_activations, _Sums, first_order
from viscircuits.methods.relevance import _parts, propagating
from viscircuits.selection import _problem, _strengths
from viscircuits.task import Task, make_task

CHAIN = ["1", "3", "5"]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)))


def biasless_net() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(),
            nn.Conv2d(5, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(3, 3, bias=False),
        )
    )  # fmt: skip


def task_of(net: nn.Module, layers: list[str], shape: tuple[int, ...] = (2, 6, 6), **options) -> Task:
    return make_task(net, layers, images(4, *shape), images(3, *shape, seed=2) + 0.5, **options)


def logits(task: Task, values: Callable[[], Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return task.judge(task.spec.model(task.concept), task.concept_labels)


def close(found: dict, expected: dict, tolerance: float = 1e-5) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[each].double(), expected[each].double(), atol=tolerance, rtol=tolerance) for each in found
    )


def by_hand() -> Task:
    """One image (1, 2); hidden h = relu(x), g = relu([[1, 1], [2, −1]] h + (0, 1)) = (3, 1), logit 4 g₀ − 5 g₁ = 7."""
    net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    net[2].weight.data = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    net[2].bias.data = torch.tensor([0.0, 1.0])
    net[4].weight.data = torch.tensor([[4.0, -5.0]])
    image = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    return make_task(net, ["1", "3"], image, image, ablation="zero")


# ------------------------------------------------------------------ exact


def test_exact_effects_by_hand():
    found = exact_effects(by_hand(), edges=True)
    # without h₀: g = (2, 0), logit 8; without h₁: g = (1, 3), logit −11
    assert found.units["1"].tolist() == [-1, 18]
    assert found.units["3"].tolist() == [12, -5]
    # h₀→g₁ cut: g₁ = relu(−2 + 1) = 0, logit 12
    assert found.edges["1", "3"].tolist() == [[4, 8], [-5, 10]]


def test_scores_of_exact_are_sizes_so_that_a_suppressor_counts():
    found = find(by_hand(), "exact", edges=True)
    assert found.units["3"].tolist() == [12, 5]
    assert found.edges["1", "3"].tolist() == [[4, 8], [5, 10]]


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample", "noise"])
def test_exact_equals_ablating_one_unit_after_another(conv_net, photographs, ablation):
    task = make_task(conv_net, CHAIN, photographs, photographs[:3] + 1, ablation=ablation)
    found = exact_effects(task)
    full = logits(task)
    for layer, unit in [("1", 0), ("3", 7), ("5", 2)]:
        one = Circuit({layer: (unit,)}, {layer: task.widths[layer]})
        with ablate(conv_net, one, ablation, reference=task.statistics):
            expected = (full - logits(task)).mean()
        assert found.units[layer][unit] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_exact_equals_pruning_one_edge_after_another(vit, photographs, ablation):
    layers = ["blocks.0.mlp.1", "blocks.1.mlp.1"]
    task = make_task(vit, layers, photographs[:2], photographs[2:], ablation=ablation)
    found = exact_effects(task, edges=True).edges[layers[0], layers[1]]
    full = logits(task)
    for n, m in [(0, 0), (3, 5), (7, 1)]:
        edge = Edge(Unit(layers[0], m), Unit(layers[1], n), 1.0, 1.0)
        with prune_edges(vit, [edge], ablation, reference=task.statistics):
            assert found[n, m] == pytest.approx(float((full - logits(task)).mean()), abs=1e-6)


def test_an_edge_that_carries_nothing_costs_nothing_and_has_no_effect():
    task = by_hand()
    task.spec.model[2].weight.data[:, 0] = 0
    before = find(by_hand(), "exact", edges=True)
    after = find(task, "exact", edges=True)
    assert after.edges["1", "3"][:, 0].tolist() == [0, 0]
    assert before.passes.forward - after.passes.forward == 2
    assert before.passes.backward == 0


def test_what_is_not_connected_has_an_effect_of_exactly_zero(conv_net, photographs):
    conv_net[4].weight.data[:, 3] = 0
    task = make_task(conv_net, CHAIN, photographs, photographs + 1)
    assert exact_effects(task).units["3"][3] == 0


# ------------------------------------------------------------------ first order


def test_first_order_effects_by_hand():
    found = first_order(by_hand())
    # ∂T/∂g = (4, −5), ∂T/∂h = (4 − 10, 4 + 5)
    assert found.units["1"].tolist() == [-6, 18]
    assert found.units["3"].tolist() == [12, -5]
    assert found.edges["1", "3"].tolist() == [[4, 8], [-10, 10]]


def test_a_unit_of_eap_scores_its_strongest_edge_by_hand():
    found = find(by_hand(), "eap")
    assert found.edges["1", "3"].tolist() == [[4, 8], [10, 10]]
    assert found.units["1"].tolist() == [10, 10]
    assert found.units["3"].tolist() == [8, 10]


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("attribution-patching", {}),
        ("eap-ig", {"path": "inputs", "steps": 2}),
        ("eap-ig", {"path": "activations", "steps": 3}),
        ("relp", {"convolutions": "zero"}),
    ],
)
def test_first_order_is_exact_on_a_linear_network(method, options, ablation):
    task = task_of(linear_net(), ["0", "1"], ablation=ablation)
    exact, found = find(task, "exact", edges=True), find(task, method, **options)
    assert close(found.units, exact.units)
    assert close(found.edges, exact.edges)


def test_sums_of_effects_in_a_network_without_biases():
    task = task_of(biasless_net(), CHAIN, ablation="zero")
    found = first_order(task)
    for layer in CHAIN:  # homogeneous: Σ a ∂T/∂a = T
        assert found.units[layer].sum() == pytest.approx(float(logits(task).mean()), abs=1e-5)
    for (source, target), edges in found.edges.items():
        assert torch.allclose(edges.sum(1), found.units[target], atol=1e-5)  # Σ_m a_m ∂a_n/∂a_m = a_n
        assert torch.allclose(edges.sum(0), found.units[source], atol=1e-5)  # all paths go through the next layer


def test_attribution_patching_equals_captums_gradient_times_activation(conv_net, photographs):
    from captum.attr import LayerGradientXActivation

    task = make_task(conv_net, CHAIN, photographs, photographs, ablation="zero")
    found = first_order(task, edges=False)
    for layer in CHAIN:
        captum = LayerGradientXActivation(conv_net, conv_net.get_submodule(layer))
        expected = captum.attribute(photographs, target=task.concept_labels).sum((2, 3)).mean(0)
        assert torch.allclose(found.units[layer], expected.double(), atol=1e-6)


class Residual(nn.Module):
    """A block whose input goes around it: one layer reaches the next along two paths."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.act, self.after = nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x.flatten(1)))
        return self.outer(self.after(x + self.inner(x)))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_eap_equals_jacobians_on_a_residual_network(ablation):
    net = seeded(Residual)
    task = task_of(net, ["act", "after"], (4, 1, 1), ablation=ablation)
    expected = torch.zeros(3, 3)
    for image, label in zip(task.concept, task.concept_labels, strict=True):
        a = net.act(net.first(image.flatten())).detach()
        jacobian = torch.autograd.functional.jacobian(lambda a: net.after(a + net.inner(a)), a)  # (n, m)
        removed = torch.zeros(3) if ablation == "zero" else task.statistics.mean["act"]
        expected += net.outer.weight[label].unsqueeze(1) * jacobian * (a - removed) / len(task.concept)
    assert torch.allclose(first_order(task).edges["act", "after"], expected.double(), atol=1e-6)


def test_engines_give_the_same_edges(vit, conv_net, photographs):
    for net, layers in ((vit, ["blocks.0.mlp.1", "blocks.1.mlp.1"]), (conv_net, CHAIN)):
        task = make_task(net, layers, photographs, photographs + 1)
        for method in ("eap", "relp"):
            loop, structured = (find(task, method, engine=engine).edges for engine in ("loop", "structured"))
            assert close(loop, structured, 1e-5)


def test_a_gradient_has_no_direction_towards_noise(conv_net, photographs):
    task = make_task(conv_net, CHAIN, photographs, photographs, ablation="noise")
    with pytest.raises(ViscircuitsError, match="use 'zero' or 'mean'"):
        find(task, "attribution-patching")


def test_passes_are_one_forward_and_one_backward_and_one_more_for_each_target(conv_net, photographs):
    task = make_task(conv_net, CHAIN, photographs, photographs)  # 5 images; 6, 8 and 5 units
    units, both = (find(task, "attribution-patching", edges=edges).passes for edges in (False, True))
    assert (units.forward, units.backward) == (5, 5)
    assert (both.forward, both.backward) == (5, 5 + 5 * (8 + 5))
    assert task.passes.forward == 0


# ------------------------------------------------------------------ integrated gradients


def test_integrated_gradients_by_hand_where_the_path_crosses_a_kink():
    """T = 4 g₀ − 5 g₁ with g₁ = relu(2 h₀ − h₁ + 1) = relu(1): along h = α (1, 2) it is on all the way, slope 0."""
    task = by_hand()
    task.spec.model[2].bias.data = torch.tensor([-1.5, 1.0])  # g₀ = relu(3 α − 1.5): on for the second half
    found = find(task, "eap-ig", path="activations", steps=4)
    assert found.edges["1", "3"].tolist() == [[2, 4], [10, 10]]
    assert found.units["1"].tolist() == [8, 14]  # |2 − 10|, 4 + 10


def test_units_of_a_layer_integrate_to_the_effect_of_the_whole_layer(vit, photographs):
    task = make_task(vit, ["blocks.0.mlp.1", "blocks.1.mlp.1"], photographs, photographs + 1)
    found = _along_activations(_Sums(task, False, "auto"), 12)
    for layer in task.layers:
        with rewrite(vit, {layer.address: lambda a, layer=layer: task.baseline(layer, a).expand_as(a)}):
            gone = logits(task)
        assert found.units[layer.address].sum() == pytest.approx(float((logits(task) - gone).mean()), abs=2e-5)


def test_edges_of_integrated_gradients_add_up_to_the_unit_where_all_paths_pass_the_next_layer(conv_net, photographs):
    task = make_task(conv_net, CHAIN, photographs, photographs + 1)
    found = _along_activations(_Sums(task, True, "loop"), 2)
    for (source, _), edges in found.edges.items():
        assert torch.allclose(edges.sum(0), found.units[source], atol=1e-6)


def test_integrated_gradients_along_activations_equal_captums():
    from captum.attr import LayerIntegratedGradients

    net = biasless_net()  # a black image has no activation: captum's path begins where zero ablation's does
    task = task_of(net, CHAIN, ablation="zero")
    found = find(task, "eap-ig", path="activations", steps=7, edges=False)
    for layer in CHAIN:
        captum = LayerIntegratedGradients(net, net.get_submodule(layer))
        expected = captum.attribute(
            task.concept, torch.zeros_like(task.concept), task.concept_labels, n_steps=7, method="riemann_middle"
        )
        assert torch.allclose(found.units[layer], expected.sum((2, 3)).mean(0).abs().double(), atol=1e-6)


def test_integrated_gradients_along_inputs_equal_captums_influence(conv_net, photographs):
    from captum.attr import InternalInfluence

    task = make_task(conv_net, CHAIN, photographs, photographs[:3] + 1)
    found = find(task, "eap-ig", path="inputs", steps=6, edges=False)
    start = task.reference.mean(0, keepdim=True).expand_as(photographs).contiguous()
    for layer in task.layers:
        captum = InternalInfluence(conv_net, conv_net.get_submodule(layer.address))
        slopes = captum.attribute(photographs, start, task.concept_labels, n_steps=6, method="riemann_middle")
        values = activations(conv_net, [layer.address], photographs)[layer.address].detach()
        expected = ((values - task.baseline(layer, values)) * slopes).sum((2, 3)).mean(0).abs()
        assert torch.allclose(found.units[layer.address], expected.double(), atol=1e-6)


# ------------------------------------------------------------------ relevance


def test_the_zero_rule_is_attribution_patching_on_a_relu_network(conv_net, photographs):
    task = make_task(conv_net, CHAIN, photographs, photographs + 1)
    plain, relevance = find(task, "attribution-patching"), find(task, "relp", convolutions="zero")
    assert close(relevance.units, plain.units, 1e-6)
    assert close(relevance.edges, plain.edges, 1e-6)


def test_the_gamma_rule_by_hand():
    """x = (1, 2), weights (3, −1): z = 1 = 3 − 2. With γ = 1: (6, −1) and z = 4: a coefficient of 6/4 and −1/4."""
    net = nn.Sequential(nn.Identity(), nn.Conv2d(2, 1, 1, bias=False), nn.Flatten())
    net[1].weight.data = torch.tensor([3.0, -1.0]).reshape(1, 2, 1, 1)
    image = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    task = make_task(net, ["0", "1"], image, image, ablation="zero")
    assert find(task, "relp", gamma=1.0).units["0"].tolist() == [1.5, 0.5]
    assert find(task, "relp", gamma=0.0).units["0"].tolist() == [3, 2]
    assert find(task, "relp", convolutions="z-plus").units["0"].tolist() == [1, 0]
    net[1].weight.data *= -1  # the output is −1 now, and what agrees with it gets the relevance
    assert find(task, "relp", gamma=1.0).units["0"].tolist() == [1.5, 0.5]
    assert find(task, "relp", convolutions="z-plus").units["0"].tolist() == [1, 0]


def test_the_difference_of_relevance_by_hand():
    """Weights (3, −1): relevance is (3, −2) on the concept's image, (6, −1) and (−3, 2) on the reference's two."""
    net = nn.Sequential(nn.Identity(), nn.Conv2d(2, 1, 1, bias=False), nn.Flatten())
    net[1].weight.data = torch.tensor([3.0, -1.0]).reshape(1, 2, 1, 1)
    concept, *others = (torch.tensor(each).reshape(1, 2, 1, 1) for each in ([1.0, 2.0], [2.0, 1.0], [-1.0, -2.0]))
    task = make_task(net, ["0", "1"], concept, torch.cat(others), ablation="zero")
    for protect, expected in ((0.0, [3, -2]), (1.0, [3 - 6 / 2, -2 - 2 / 2]), (2.0, [3 - 6, -2 - 2])):
        assert find(task, "relp-difference", gamma=0.0, protect=protect).units["0"].tolist() == expected


def test_each_image_is_judged_by_its_own_label():
    """Outputs (x₀, 5 x₁): the concept's image (1, 1) is judged by the second, the reference's (2, 3) by the first."""
    net = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 1, bias=False), nn.Flatten())
    net[1].weight.data = torch.tensor([[1.0, 0.0], [0.0, 5.0]]).reshape(2, 2, 1, 1)
    concept, reference = torch.ones(1, 2, 1, 1), torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1)
    labels = {"concept_labels": torch.tensor([1]), "reference_labels": torch.tensor([0])}
    task = make_task(net, ["0", "1"], concept, reference, ablation="zero", **labels)
    found = find(task, "relp-difference", gamma=0.0)
    assert found.units["0"].tolist() == [-2, 5]
    assert (found.passes.forward, found.passes.backward) == (2, 2)


def test_the_difference_of_relevance_is_the_concepts_where_nothing_is_protected(conv_net, photographs):
    task = make_task(conv_net, CHAIN, photographs[:3], photographs[3:], batch_size=2)
    signed = find(task, "relp-difference", protect=0.0)
    plain = find(task, "relp", gamma=signed.options["gamma"], edges=False)
    assert close({layer: units.abs() for layer, units in signed.units.items()}, plain.units, 1e-6)
    assert find(task, "relp-difference").passes.forward == len(photographs) > signed.passes.forward


@pytest.mark.parametrize("gamma", [0.0, 0.25, 3.0, math.inf])
def test_relevance_is_conserved_from_layer_to_layer(gamma):
    task = task_of(biasless_net(), CHAIN, ablation="zero")
    rule = _parts(gamma)["gamma"] if gamma < math.inf else _parts(0)["z-plus"]
    found = first_order(task, edges=True, rules=lambda: propagating(task.spec.model, rule, rule))
    for layer in CHAIN:
        assert found.units[layer].sum() == pytest.approx(float(logits(task).mean()), abs=1e-5)
    for (_, target), edges in found.edges.items():
        assert torch.allclose(edges.sum(1), found.units[target], atol=1e-5)


def test_a_large_gamma_comes_to_the_z_plus_rule():
    task = task_of(biasless_net(), CHAIN, ablation="zero")
    far, limit = find(task, "relp", gamma=1e6), find(task, "relp", convolutions="z-plus")
    assert close(far.units, limit.units, 1e-5)
    assert close(far.edges, limit.edges, 1e-5)


@pytest.mark.parametrize(("rule", "options"), [("GammaRule", {"gamma": 0.25}), ("Alpha1_Beta0_Rule", {})])
def test_relevance_of_units_equals_captums(rule, options):
    from captum.attr import LRP
    from captum.attr._utils import lrp_rules

    net = biasless_net()
    task = task_of(net, CHAIN, ablation="zero")
    net[7].weight.data.abs_()  # captum's rules are for outputs above 0
    convolutions = {"GammaRule": "gamma", "Alpha1_Beta0_Rule": "z-plus"}[rule]
    for layer, below in (("1", 2), ("3", 4)):
        found = find(task, "relp", convolutions=convolutions, edges=False).units[layer]
        head = net[below:]
        for name, module in head.named_children():
            linear = isinstance(module, nn.Linear)
            if linear or isinstance(module, nn.Conv2d):
                module.rule = lrp_rules.EpsilonRule() if linear else getattr(lrp_rules, rule)(**options)
            elif isinstance(module, nn.Flatten):
                setattr(head, name, Flat())
        values = activations(net, [layer], task.concept)[layer].detach().requires_grad_()
        relevance = LRP(head).attribute(values, target=task.concept_labels)
        assert torch.allclose(found, relevance.sum((2, 3)).mean(0).abs().double(), atol=1e-5)


class Flat(nn.Flatten):
    """Captum asks each part for a rule."""

    def __init__(self):
        from captum.attr._utils.lrp_rules import EpsilonRule

        super().__init__()
        self.rule = EpsilonRule()


def test_batch_norm_right_after_a_convolution_counts_as_part_of_it():
    separate = seeded(lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Head()))
    norm = separate[2]
    norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 1.0])
    norm.bias.data = torch.tensor([0.1, 0.2, 0.3, -0.4])
    merged = nn.utils.fusion.fuse_conv_bn_eval(separate[1], norm)
    fused = nn.Sequential(separate[0], merged, nn.Identity(), separate[3], separate[4])
    one, other = (find(task_of(net, ["0", "3"], (3, 6, 6)), "relp") for net in (separate, fused))
    assert close(one.units, other.units)
    assert close(one.edges, other.edges)
    gradient = find(task_of(separate, ["0", "3"], (3, 6, 6)), "attribution-patching")
    assert not close(one.units, gradient.units, 1e-3)


@pytest.mark.parametrize("between", [nn.ReLU(inplace=True), nn.Identity()])
def test_batch_norm_is_not_merged_over_what_was_done_in_place(between):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4)))
    x, rule = images(2, 3, 5, 5), _parts(0.25)["gamma"]
    with propagating(model, rule, rule):
        output = model(x.clone().requires_grad_())
    torch.testing.assert_close(output.detach(), model(x).detach())


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class Through(nn.Module):
    """One layer, and an output made of it by a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.units, self.function = nn.Identity(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.units(x))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: nn.functional.silu(x).sum(1, keepdim=True), lambda x: nn.functional.silu(x)),  # identity: f(x)
        (lambda x: x[:, :1] * x[:, 1:], lambda x: x.prod(1, keepdim=True).expand_as(x) / 2),  # half to each factor
        (lambda x: x[:, :1] * x[:, 1:].sigmoid(), lambda x: x * x.flip(1).sigmoid() * torch.tensor([1, 0])),
        (lambda x: x[:, :1] / x[:, 1:], lambda x: x / x.flip(1) * torch.tensor([1, 0])),
        (lambda x: (x.softmax(1) * x).sum(1, keepdim=True), lambda x: x.softmax(1) * x),
        (
            lambda x: nn.functional.layer_norm(x, (2,))[:, :1],
            lambda x: x / (x.var(1, False, keepdim=True) + 1e-5).sqrt() * torch.tensor([0.5, -0.5]),
        ),
    ],
    ids=["activation", "product", "gate", "quotient", "softmax", "layer norm"],
)
def test_rules_of_single_operations(function, expected):
    x = torch.tensor([[1.5, -0.5]])
    model = Through(function)
    with propagating(model, None, None):
        x.requires_grad_()
        output = model(x)
    assert torch.equal(output, function(x.detach()))
    (coefficients,) = torch.autograd.grad(output.sum(), x)
    assert torch.allclose(x * coefficients, expected(x.detach()), atol=1e-5)


def test_activations_in_place_do_what_they_say():
    x = torch.tensor([[1.5, -0.5]], requires_grad=True)
    with propagating(nn.Identity(), None, None):
        changed = x * 2
        same = nn.functional.leaky_relu(changed, 0.1, inplace=True)
        product = changed * 3
    assert same is changed
    assert torch.allclose(product, torch.tensor([[9.0, -0.3]]))
    assert torch.allclose(torch.autograd.grad(product.sum(), x)[0], torch.tensor([[6.0, 0.6]]))


def test_attention_is_held_fast():
    """With fixed weights P of attention the output is P V: linear in the values."""
    attention = seeded(lambda: nn.MultiheadAttention(4, 2, bias=False, batch_first=True))
    tokens = images(1, 3, 4).requires_grad_()
    with propagating(attention, None, None):
        output = attention(tokens, tokens, tokens)[0]
    held = attention(tokens.detach(), tokens.detach(), tokens)[0]
    expected, found = (torch.autograd.grad(each.square().sum(), tokens)[0] for each in (held, output))
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(output, held, atol=1e-6)


def test_outputs_are_the_networks_own_and_parameters_are_given_back(conv_net, vit, photographs):
    for net in (conv_net, vit):
        frozen = next(iter(net.parameters())).requires_grad_(False)
        asked = [parameter.requires_grad for parameter in net.parameters()]
        with pytest.raises(ZeroDivisionError), propagating(net, *[_parts(0.25)["gamma"]] * 2):
            given = net(photographs.clone().requires_grad_())
            assert not any(parameter.requires_grad for parameter in net.parameters())
            raise ZeroDivisionError
        assert torch.allclose(given, net(photographs), atol=1e-6)
        assert [parameter.requires_grad for parameter in net.parameters()] == asked
        assert not frozen.requires_grad


def test_a_negative_gamma_is_refused():
    with pytest.raises(ViscircuitsError, match="γ must be 0 or more, got -1"):
        find(by_hand(), "relp", gamma=-1)


@pytest.mark.parametrize("options", [{"protect": -1.0}, {"protect": math.nan}, {"protect": math.inf}])
def test_the_references_weight_is_a_number_from_0(options):
    with pytest.raises(ViscircuitsError, match="protect is a weight of 0 or more"):
        find(by_hand(), "relp-difference", **options)


# ------------------------------------------------------------------ attribution and controls


@pytest.mark.parametrize("contrast", ["none", "difference", "ratio"])
def test_cla_scores_are_summed_attribution_to_both_neighbours(conv_net, photographs, contrast):
    task = make_task(conv_net, CHAIN, photographs[:3], photographs[3:])
    found = find(task, {"none": "cla"}.get(contrast, f"cla-{contrast}"))
    expected = attribute(conv_net, photographs[:3], CHAIN, reference=photographs[3:]).contrast(contrast)
    for layer, strength in zip(CHAIN, _strengths(_problem(expected, 1, False)), strict=True):
        assert torch.allclose(found.units[layer], strength, atol=1e-6)
    for matrix in expected.matrices:
        assert torch.allclose(found.edges[matrix.source, matrix.target], matrix.values.double(), atol=1e-6)
    n_images = 3 if contrast == "none" else 5
    assert (found.passes.forward, found.passes.backward) == (n_images, n_images * (8 + 5))


def test_anchored_relevance_by_hand():
    """CLA of h to g: [[1, 2], [2, 2]] (vectors: |a_m · weight|); of g to T: |3 · 4| = 12 and |1 · 5| = 5."""
    found = find(by_hand(), "cla-anchored", contrast="none")
    assert torch.allclose(found.units["3"], torch.tensor([12.0, 5.0]).double())
    assert torch.allclose(found.edges["1", "3"], torch.tensor([[4.0, 8.0], [2.5, 2.5]]).double())
    assert torch.allclose(found.units["1"], torch.tensor([6.5, 10.5]).double())


def test_a_decoy_leads_without_an_anchor_and_counts_nothing_with_one():
    task = by_hand()
    task.spec.model[2].weight.data = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    task.spec.model[4].weight.data = torch.tensor([[1.0, 0.0]])  # nothing reads g₁
    assert find(task, "cla").units["1"].argmax() == 1
    assert find(task, "cla-anchored", contrast="none").units["1"].tolist() == [1, 0]


def test_anchored_relevance_is_handed_down_whole(conv_net, photographs):
    found = find(make_task(conv_net, CHAIN, photographs, photographs + 1), "cla-anchored", contrast="ratio")
    sums = [found.units[layer].sum() for layer in CHAIN]
    assert sums[0] > 0
    assert torch.allclose(torch.stack(sums), sums[-1].expand(3))


def test_controls_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False), nn.Flatten())
    net[0].weight.data = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
    net[2].weight.data = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    light, dark = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2), torch.tensor([-6.0, 8.0]).reshape(1, 1, 1, 2)
    task = make_task(net, ["1", "2"], light, dark)
    assert find(task, "activation").units["1"].tolist() == [5, 0]
    assert find(task, "activation-difference").units["1"].tolist() == [-3, -12]
    assert find(task, "weight-norm").units["1"].tolist() == [1, 2]
    assert find(task, "weight-norm").units["2"].tolist() == [5]


def test_random_scores_repeat_with_the_seed_and_change_with_it(conv_net, photographs):
    task = make_task(conv_net, CHAIN, photographs, photographs, seed=3)
    own, same, other = find(task, "random"), find(task, "random", seed=3), find(task, "random", seed=4)
    for layer in CHAIN:
        assert torch.equal(own.units[layer], same.units[layer])
        assert not torch.equal(own.units[layer], other.units[layer])
    assert {pair: tuple(scores.shape) for pair, scores in own.edges.items()} == {("1", "3"): (8, 6), ("3", "5"): (5, 8)}
    assert own.passes.forward == own.passes.backward == 0
