"""Interventions against hand-made networks, and against what they promise to leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from viscircuits.ablation import Statistics, ablate, measure, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import activations, count_hooks, record

LAYERS = ("1", "3", "5")
WIDTHS = {"1": 6, "3": 8, "5": 5}


def circuit(**units: tuple[int, ...]) -> Circuit:
    chosen = {layer: units.get(f"l{layer}", ()) for layer in LAYERS}
    return Circuit(chosen, WIDTHS)


def edge(source: tuple[str, int], target: tuple[str, int]) -> Edge:
    return Edge(Unit(*source), Unit(*target), 1.0, 1.0)


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same_state(net: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@torch.no_grad()
def test_zero_ablation_equals_zeroed_filters(conv_net, photographs):
    with ablate(conv_net, circuit(l3=(1, 4))):
        given = conv_net(photographs)
    conv_net[2].weight[[1, 4]] = 0
    conv_net[2].bias[[1, 4]] = 0
    assert torch.allclose(given, conv_net(photographs), atol=1e-6)


@torch.no_grad()
def test_removing_nothing_and_keeping_everything_are_the_untouched_network_bit_for_bit(conv_net, photographs):
    expected = conv_net(photographs)
    everything = circuit(l1=tuple(range(6)), l3=tuple(range(8)), l5=tuple(range(5)))
    with ablate(conv_net, circuit()):
        assert torch.equal(conv_net(photographs), expected)
    with ablate(conv_net, everything, keep=True):
        assert torch.equal(conv_net(photographs), expected)
    with prune_edges(conv_net, []):
        assert torch.equal(conv_net(photographs), expected)


@torch.no_grad()
def test_keeping_a_circuit_is_removing_its_complement(conv_net, photographs):
    chosen = circuit(l1=(0, 2), l3=(1, 3, 5), l5=(4,))
    with ablate(conv_net, chosen, keep=True):
        kept = conv_net(photographs)
    with ablate(conv_net, chosen.complement()):
        assert torch.equal(conv_net(photographs), kept)


@torch.no_grad()
def test_mean_ablation_replaces_by_the_mean_over_images_and_positions(conv_net, photographs):
    reference = measure(conv_net, photographs, LAYERS)
    maps = activations(conv_net, ["3"], photographs)["3"]
    maps[:, 2] = maps[:, 2].mean()
    with ablate(conv_net, circuit(l3=(2,)), "mean", reference=reference):
        given = conv_net(photographs)
    assert torch.allclose(given, conv_net[4:](maps), atol=1e-6)


@torch.no_grad()
def test_resampling_takes_every_unit_of_an_image_from_one_reference_image(conv_net, photographs):
    reference = measure(conv_net, photographs[:2], LAYERS)
    everything = circuit(l3=tuple(range(8)))
    with ablate(conv_net, everything, "resample", reference=reference):
        given = conv_net(photographs)
    choices = conv_net(photographs[:2])
    distance = (given[:, None] - choices[None]).abs().amax(-1)  # (image, reference image)
    assert (distance.min(1).values < 1e-6).all()
    assert len(set(distance.argmin(1).tolist())) == 2  # both are drawn from


@torch.no_grad()
def test_noise_has_the_references_mean_and_variance(conv_net, photographs):
    reference = measure(conv_net, photographs, ["3"])
    images = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with ablate(conv_net, circuit(l3=(1,)), "noise", reference=reference):
        (maps,) = activations(conv_net, ["3"], images).values()
    assert maps[:, 1].mean() == pytest.approx(float(reference.mean["3"][1]), abs=0.02)
    assert maps[:, 1].var() == pytest.approx(float(reference.variance["3"][1]), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["resample", "noise"])
def test_drawn_replacements_repeat_with_the_seed_and_change_with_it(conv_net, photographs, ablation):
    reference = measure(conv_net, photographs, LAYERS)
    given = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        with ablate(conv_net, circuit(l3=(0, 1, 2)), ablation, reference=reference, generator=generator):
            given.append(conv_net(photographs))
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])


def test_statistics_are_those_of_all_images_whatever_the_batch_size(conv_net, photographs):
    one, all_at_once = (measure(conv_net, photographs, LAYERS, batch_size=n) for n in (1, 5))
    (maps,) = activations(conv_net, ["3"], photographs).values()
    assert torch.allclose(all_at_once.mean["3"], maps.detach().mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(all_at_once.variance["3"], maps.detach().transpose(0, 1).flatten(1).var(1, False), atol=1e-6)
    for layer in LAYERS:
        assert torch.allclose(one.mean[layer], all_at_once.mean[layer], atol=1e-6)
        assert torch.allclose(one.samples[layer], all_at_once.samples[layer], atol=1e-6)


# ------------------------------------------------------------------ edges


@torch.no_grad()
def test_pruning_one_edge_changes_one_target_as_if_its_weight_were_zero(conv_net, photographs):
    with prune_edges(conv_net, [edge(("1", 2), ("3", 4))]):
        (given,) = activations(conv_net, ["3"], photographs).values()
    before = activations(conv_net, ["3"], photographs)["3"]
    conv_net[2].weight[4, 2] = 0
    after = activations(conv_net, ["3"], photographs)["3"]
    assert torch.allclose(given, after, atol=1e-6)
    others = [n for n in range(8) if n != 4]
    assert torch.equal(given[:, others], before[:, others])
    assert not torch.allclose(given[:, 4], before[:, 4])


@torch.no_grad()
def test_pruning_edges_of_two_pairs_equals_zeroing_their_weights(conv_net, photographs):
    edges = [edge(("1", 2), ("3", 4)), edge(("1", 0), ("3", 4)), edge(("1", 5), ("3", 1)), edge(("3", 4), ("5", 3))]
    with prune_edges(conv_net, edges):
        given = conv_net(photographs)
    conv_net[2].weight[4, 2] = 0
    conv_net[2].weight[4, 0] = 0
    conv_net[2].weight[1, 5] = 0
    conv_net[4].weight[3, 4] = 0
    assert torch.allclose(given, conv_net(photographs), atol=1e-6)


@torch.no_grad()
def test_pruning_every_edge_of_a_source_is_removing_the_source(conv_net, photographs):
    edges = [edge(("1", 3), ("3", n)) for n in range(8)]
    with prune_edges(conv_net, edges):
        given = conv_net(photographs)
    with ablate(conv_net, circuit(l1=(3,))):
        assert torch.allclose(conv_net(photographs), given, atol=1e-6)


@torch.no_grad()
def test_a_target_fed_by_two_layers_loses_both_sources_at_once():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.skip = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            a = self.a(x)
            b = self.b(a)
            return self.c(b) + self.skip(a)

    torch.manual_seed(0)
    net, x = Skipping().eval(), torch.randn(5, 4)
    with prune_edges(net, [edge(("b", 1), ("c", 2)), edge(("b", 0), ("c", 2))]):
        (given,) = activations(net, ["c"], x).values()
    net.c.weight[2, [0, 1]] = 0
    assert torch.allclose(given, activations(net, ["c"], x)["c"], atol=1e-6)


@torch.no_grad()
def test_edges_are_pruned_on_token_streams_too(vit):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    layers = ["blocks.0.mlp.1", "blocks.1.mlp.1"]
    before = activations(vit, layers, images)["blocks.1.mlp.1"]
    with prune_edges(vit, [edge((layers[0], 3), (layers[1], 5))]):
        (after,) = activations(vit, layers[1:], images).values()
    removed = Circuit({layers[0]: (3,)}, {layers[0]: 8})
    with ablate(vit, removed):
        (without,) = activations(vit, layers[1:], images).values()
    assert torch.allclose(after[..., 5], without[..., 5], atol=1e-6)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(after[..., others], before[..., others])


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["mean", "resample", "noise"])
def test_all_edges_into_all_targets_equal_removing_the_sources_under_every_ablation(conv_net, photographs, ablation):
    reference = measure(conv_net, photographs, LAYERS)
    sources = (0, 4)
    edges = [edge(("1", m), ("3", n)) for m in sources for n in range(8)]
    with prune_edges(conv_net, edges, ablation, reference=reference):
        given = conv_net(photographs)
    with ablate(conv_net, circuit(l1=sources), ablation, reference=reference):
        assert torch.allclose(conv_net(photographs), given, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["resample", "noise"])
def test_drawn_replacements_do_not_depend_on_the_batch_size(conv_net, photographs, ablation):
    reference = measure(conv_net, photographs, LAYERS)
    given = []
    for size in (1, 2, 5):
        with ablate(conv_net, circuit(l3=(0, 1, 2)), ablation, reference=reference):
            given.append(torch.cat([conv_net(part) for part in photographs.split(size)]))
    assert torch.allclose(given[0], given[1], atol=1e-6)
    assert torch.allclose(given[0], given[2], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["resample", "noise"])
@pytest.mark.parametrize("outer_first", [True, False])
def test_edges_are_pruned_in_the_very_network_another_context_makes(conv_net, photographs, ablation, outer_first):
    reference = measure(conv_net, photographs, LAYERS)
    outer = ablate(conv_net, circuit(l1=(0, 1, 2)), ablation, reference=reference)
    inner = prune_edges(conv_net, [edge(("3", 0), ("5", 0))])
    first, second = (outer, inner) if outer_first else (inner, outer)
    with first, second, record(conv_net, ["3", "5"]) as seen:
        conv_net(photographs)
    maps = seen["3"].clone()
    maps[:, 0] = 0
    assert torch.allclose(conv_net[4:6](maps)[:, 0], seen["5"][:, 0], atol=1e-6)


def test_every_reference_image_may_be_resampled_from(conv_net):
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = measure(conv_net, images, ["1"], n_samples=8).samples["1"]
    (maps,) = activations(conv_net, ["1"], images).values()
    found = [int((maps - each).flatten(1).norm(dim=1).argmin()) for each in samples]
    assert len(set(found)) == 8
    assert max(found) >= 8  # not merely the first ones


# ------------------------------------------------------------------ what they leave behind


@pytest.mark.parametrize("opener", [
    lambda net: ablate(net, circuit(l3=(1,))),
    lambda net: ablate(net, circuit(l3=(1,)), keep=True),
    lambda net: prune_edges(net, [edge(("1", 2), ("3", 4))]),
])  # fmt: skip
def test_an_exception_leaves_no_hook_and_the_old_weights(conv_net, photographs, opener):
    before, expected = state(conv_net), conv_net(photographs)
    with pytest.raises(KeyboardInterrupt), opener(conv_net):
        conv_net(photographs)
        raise KeyboardInterrupt
    with pytest.raises((RuntimeError, ViscircuitsError)), opener(conv_net):
        conv_net(torch.zeros(1, 7, 16, 16))  # the network itself fails
    assert count_hooks(conv_net) == 0
    assert same_state(conv_net, before)
    assert torch.equal(conv_net(photographs), expected)


def test_contexts_nest_and_the_inner_one_ends_first(conv_net, photographs):
    with torch.no_grad(), ablate(conv_net, circuit(l1=(0,))):
        outer = conv_net(photographs)
        with ablate(conv_net, circuit(l3=(1,))):
            both = conv_net(photographs)
        assert torch.equal(conv_net(photographs), outer)
        assert not torch.equal(both, outer)


def test_edges_are_pruned_on_top_of_an_ablation(conv_net, photographs):
    with torch.no_grad(), ablate(conv_net, circuit(l1=(0,))), prune_edges(conv_net, [edge(("1", 2), ("3", 4))]):
        given = conv_net(photographs)
    with torch.no_grad():
        conv_net[2].weight[:, 0] = 0
        conv_net[2].weight[4, 2] = 0
        assert torch.allclose(given, conv_net(photographs), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda net: ablate(net, circuit(l3=(1,)), "median"), "median"),
        (lambda net: ablate(net, circuit(l3=(1,)), "mean"), "reference"),
        (lambda net: ablate(net, circuit(l3=(1,)), "mean", reference=Statistics({})), "'3'"),
        (lambda net: ablate(net, Circuit({"9": (0,)}, {"9": 4})), "'9'"),
        (lambda net: ablate(net, Circuit({"3": (8,)}, {"3": 9})), "9 in the circuit"),
        (lambda net: prune_edges(net, [edge(("1", 0), ("nowhere", 0))]), "'nowhere'"),
        (lambda net: prune_edges(net, [edge(("3", 0), ("1", 0))]), "runs before"),
        (lambda net: prune_edges(net, [edge(("1", 0), ("3", 77))]), "no unit 3:77"),
        (lambda net: prune_edges(net, [edge(("1", -1), ("3", 0))]), "no unit 1:-1"),
        (lambda net: prune_edges(net.train(), [edge(("1", 0), ("3", 0))]), "eval"),
    ],
)
def test_mistakes_name_the_culprit(conv_net, photographs, make, names):
    with pytest.raises(ViscircuitsError, match=names), make(conv_net):
        conv_net(photographs)
    assert count_hooks(conv_net) == 0
