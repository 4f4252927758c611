"""What an edge's kernel and its contributions are, beside weights a reader can look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from viscircuits import attribute, select
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.connecting import carried, connect
from viscircuits.connections import Connections
from viscircuits.errors import FileFormatError, ImageError, LayerError, ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.layout import reveal


def images(n: int = 6, side: int = 13, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def seeded(*layers: nn.Module) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers)
    with torch.no_grad():
        for values in network.parameters():
            values.copy_(torch.randn(values.shape, generator=generator))
    return network.eval()


def all_edges(sources: int, targets: int, layers: tuple[str, str]) -> list[tuple[Unit, Unit]]:
    return [(Unit(layers[0], m), Unit(layers[1], n)) for n in range(targets) for m in range(sources)]


def kernels(network: nn.Module, n_targets: int, to: str, pictures: Tensor, **how) -> Tensor:
    """All kernels from layer 0's four units to a layer's, (target, source, side, side)."""
    circuit = Circuit({"0": (0,), to: (0,)}, {"0": 4, to: n_targets})
    found = connect(network, circuit, pictures, all_edges(4, n_targets, ("0", to)), n_kernel_images=99, **how)
    return torch.from_numpy(found.kernels).reshape(n_targets, 4, found.side, found.side)


# ------------------------------------------------------------------ kernels


@pytest.mark.parametrize("side", [12, 13])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 1, 0, 1), (5, 1, 2, 1), (3, 2, 1, 1), (5, 2, 2, 1), (3, 2, 0, 1), (1, 2, 0, 1), (3, 1, 2, 2)],
)
def test_the_kernel_of_a_convolution_is_its_weight(size, stride, padding, dilation, side):
    convolution = nn.Conv2d(4, 5, size, stride, padding, dilation)
    network = seeded(convolution)
    found = kernels(network, 5, "1", images(40, side), side=7)
    weight = torch.zeros(5, 4, 7, 7)
    reach = dilation * (size - 1) // 2
    weight[:, :, 3 - reach : 4 + reach : dilation, 3 - reach : 4 + reach : dilation] = convolution.weight.detach()
    assert torch.allclose(found, weight, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("n", [2, 3])
def test_over_several_strided_layers_the_kernel_is_what_they_compose_wherever_the_peak_is(n, padding):
    between = [nn.Conv2d(4, 4, 3, 2, padding) for _ in range(n)]
    network = seeded(*between)
    side = 2 ** (n + 1) - 1
    weight = between[0].weight.detach()
    for i, layer in enumerate(between[1:], start=1):  # a step of the layer above is 2^i of those below
        spread = torch.zeros(4, 4, 2 * 2**i + 1, 2 * 2**i + 1)
        spread[:, :, :: 2**i, :: 2**i] = layer.weight.detach()
        weight = composed(spread, weight)
    assert weight.shape[-1] == side
    pictures = torch.zeros(1, 3, 95, 95)
    for place in ((47, 47), (30, 61)):
        pictures.zero_()[..., place[0] - 2 : place[0] + 3, place[1] - 2 : place[1] + 3] = 1
        found = kernels(network, 4, str(n), pictures, side=side)
        assert torch.allclose(found, weight, atol=1e-4)


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """The weight of one convolution after another."""
    reach = inner.shape[-1] - 1
    return nn.functional.conv2d(nn.functional.pad(outer, [reach] * 4), inner.transpose(0, 1).flip(2, 3))


def test_a_weight_of_nought_moves_no_kernel():
    first, second = nn.Conv2d(4, 1, 3, 2), nn.Conv2d(1, 1, 3, 2)
    network = seeded(first, second)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.zero_()[0, 0, 0, 0] = 1  # the top left corner alone
    found = kernels(network, 1, "2", images(20, 41), side=7)
    assert found[0, 0].nonzero().tolist() == [[0, 0]]


def test_the_kernel_of_a_depthwise_convolution_is_its_weight_and_nothing_between_channels():
    convolution = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
    found = kernels(seeded(convolution), 4, "1", images(40), side=3)
    expected = torch.diag_embed(convolution.weight.detach()[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_with_a_batch_norm_it_is_the_folded_weight():
    convolution, norm = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
    network = seeded(convolution, norm)
    norm.running_mean.copy_(torch.arange(5.0))
    norm.running_var.copy_(torch.arange(1.0, 6.0))
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    found = kernels(network, 5, "2", images(40), side=3)
    assert torch.allclose(found, convolution.weight.detach() * scale[:, None, None, None], atol=1e-5)


def test_the_targets_own_relu_changes_nothing_since_a_peak_is_above_it():
    convolution = nn.Conv2d(4, 5, 3, padding=1)
    found = kernels(seeded(convolution, nn.ReLU()), 5, "2", images(40), side=3)
    assert torch.allclose(found, convolution.weight.detach(), atol=1e-5)


def test_a_unit_clipped_flat_shows_the_weight_of_its_unclipped_self():
    convolution = nn.Conv2d(4, 5, 3, padding=1)
    network = seeded(convolution, nn.ReLU6())
    assert float(network(images()).detach().amax()) == 6
    assert torch.allclose(kernels(network, 5, "2", images(40), side=3), convolution.weight.detach(), atol=1e-5)


def test_with_a_relu_between_it_is_the_weight_times_the_share_of_images_that_open_it():
    inner, outer = nn.Conv2d(4, 1, 1), nn.Conv2d(1, 1, 1)
    network = seeded(inner, nn.ReLU(), outer)
    pictures = images(8, 1)
    opened = (inner(network[0](pictures)) > 0).float().mean()
    assert 0 < opened < 1
    expected = outer.weight * opened * inner.weight
    assert torch.allclose(kernels(network, 1, "3", pictures, side=1), expected.detach(), atol=1e-6)


def test_images_on_which_the_target_is_silent_do_not_count():
    convolution = nn.Conv2d(4, 1, 1)
    network = seeded(convolution, nn.ReLU())
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        network[0].weight[1, 0, 1, 1] = 1  # unit 1 is the first colour
        convolution.weight.copy_(torch.tensor([0.5, 2.0, 0, 0])[None, :, None, None])
        convolution.bias.fill_(-1.0)  # 0.5 + 2·colour − 1 > 0 where the colour is above a quarter
    pictures = torch.zeros(3, 3, 4, 4)
    pictures[1, 0] = 1
    found = kernels(network, 1, "2", pictures, side=1)
    assert found.flatten().tolist() == [0.5, 2.0, 0, 0]  # not a third of it
    silent = connect(network, Circuit({}, {}), pictures[:1], [(Unit("0", 1), Unit("2", 0))])
    assert not silent.kernels.any()


def test_tokens_lie_on_their_grid_and_a_linear_layer_joins_each_with_itself_alone(vit, photographs):
    edges = [(Unit("blocks.0.mlp.0:in", 2), Unit("blocks.0.mlp.0", 5))]
    circuit = Circuit({}, {})
    found = connect(vit, circuit, photographs, edges, side=3)
    expected = np.zeros((3, 3))
    expected[1, 1] = vit.blocks[0].mlp[0].weight[5, 2].item()
    assert np.allclose(found.kernels[0], expected, atol=1e-6)


def test_layers_without_a_grid_have_kernels_of_one_position():
    network = seeded(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        network[3].bias.fill_(50.0)
    found = connect(network, Circuit({}, {}), images(), [(Unit("4", 1), Unit("5", 0))])
    assert found.kernels.tolist() == [[[pytest.approx(network[5].weight[0, 1].item())]]]


def test_positions_are_carried_over_centre_to_centre():
    assert [carried(i, 5, 5) for i in range(5)] == [0, 1, 2, 3, 4]
    assert [carried(i, 3, 5) for i in range(3)] == [0, 2, 4]  # halved, odd
    assert [carried(i, 4, 8) for i in range(4)] == [0, 2, 4, 6]  # halved, even
    assert [carried(i, 6, 8) for i in range(6)] == [1, 2, 3, 4, 5, 6]  # not padded
    assert [carried(i, 8, 4) for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]  # enlarged
    assert carried(0, 1, 7) == 3


# ------------------------------------------------------------------ contributions


@pytest.mark.parametrize("summary", ["norm", "sum"])
def test_the_mean_contribution_is_the_edges_signed_attribution(conv_net, photographs, summary):
    attributions = attribute(conv_net, photographs, ["1", "3", "5"], summary=summary)
    circuit = select(attributions, 0.5)
    found = connect(conv_net, circuit, photographs)
    assert found.edges == tuple((edge.source, edge.target) for edge, _ in reveal(circuit.edges))
    signed = [edge.signed for edge, _ in reveal(circuit.edges)]
    assert found.contributions.mean(1).tolist() == pytest.approx(signed, rel=1e-4, abs=1e-6)
    assert found.provenance["summary"] == summary


def test_a_contribution_is_activation_times_gradient_of_the_targets_norm(conv_net, photographs):
    found = connect(conv_net, Circuit({}, {}), photographs, [(Unit("1", 2), Unit("5", 3))])  # not adjacent
    source = conv_net[:2](photographs).detach().requires_grad_()
    conv_net[2:6](source)[:, 3].flatten(1).norm(dim=1).sum().backward()
    expected = (source * source.grad)[:, 2].sum((1, 2))
    assert torch.allclose(torch.from_numpy(found.contributions[0]), expected, atol=1e-6)
    assert found.images == tuple(f"image-{i:04d}" for i in range(5))


def test_batches_change_nothing_and_the_first_images_are_taken(conv_net, photographs):
    edges = all_edges(6, 8, ("1", "3"))
    one, many = (connect(conv_net, Circuit({}, {}), photographs, edges, batch_size=size) for size in (1, 5))
    assert np.allclose(one.kernels, many.kernels, atol=1e-6)
    assert np.allclose(one.contributions, many.contributions, atol=1e-6)
    few = connect(conv_net, Circuit({}, {}), photographs, edges, n_images=3, batch_size=2)
    assert np.allclose(few.contributions, many.contributions[:, :3], atol=1e-6)
    least = connect(conv_net, Circuit({}, {}), photographs, edges, n_kernel_images=2, batch_size=3)
    first = connect(conv_net, Circuit({}, {}), photographs[:2], edges)
    assert np.allclose(least.kernels, first.kernels, atol=1e-6)


def test_the_network_is_left_as_it_was(conv_net, photographs):
    conv_net.train()
    connect(conv_net, Circuit({}, {}), photographs, all_edges(6, 8, ("1", "3")))
    assert conv_net.training
    assert count_hooks(conv_net) == 0
    assert all(values.grad is None for values in conv_net.parameters())


@pytest.mark.parametrize(
    ("edge", "how", "error", "says"),
    [
        (("1", 6, "3", 0), {}, ViscircuitsError, "'1' has units 0 to 5"),
        (("3", 0, "1", 0), {}, LayerError, "does not run later"),
        (("1", 0, "3", 0), {"side": 4}, ViscircuitsError, "odd number"),
        (("1", 0, "nothing", 0), {}, LayerError, "no layer|never runs"),
    ],
)
def test_mistakes_are_named(conv_net, photographs, edge, how, error, says):
    pairs = [(Unit(*edge[:2]), Unit(*edge[2:]))]
    with pytest.raises(error, match=says):
        connect(conv_net, Circuit({}, {}), photographs, pairs, **how)
    with pytest.raises(ImageError):
        connect(conv_net, Circuit({}, {}), [], pairs)


# ------------------------------------------------------------------ the file


def test_connections_are_read_back_as_they_were_saved_byte_for_byte(tmp_path):
    random = np.random.default_rng(0)
    edges = ((Unit("a:in", 1), Unit("b", 0)), (Unit("a:in", 2), Unit("b", 0)))
    kernels, contributions = (random.normal(size=(2, *rest)).astype(np.float32) for rest in ((3, 3), (4,)))
    names = ("ä.png", "b.png", "c", "d")
    made = Connections(edges, kernels, names, contributions, {"summary": "sum"})
    made.save(tmp_path / "connections.safetensors")
    found = Connections.load(tmp_path)
    assert (found.edges, found.images, found.provenance) == (made.edges, made.images, made.provenance)
    assert (found.kernels == made.kernels).all() and (found.contributions == made.contributions).all()
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "connections.safetensors").read_bytes()
    (only,) = found.of([edges[1], (Unit("x", 0), Unit("y", 0))]).edges
    assert only == edges[1]


def test_what_is_no_connections_file_is_said_to_be_none(tmp_path):
    (tmp_path / "connections.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="connections"):
        Connections.load(tmp_path)
    edges = ((Unit("a", 0), Unit("b", 0)),)
    with pytest.raises(ViscircuitsError, match="one kernel an edge"):
        Connections(edges, np.zeros((2, 1, 1), np.float32), (), np.zeros((1, 0), np.float32))
    with pytest.raises(ViscircuitsError, match="twice"):
        Connections(edges * 2, np.zeros((2, 1, 1), np.float32), (), np.zeros((2, 0), np.float32))


def test_a_circuit_without_edges_has_no_connections(conv_net, photographs):
    found = connect(conv_net, Circuit({"1": (0,)}, {"1": 6}, edges=()), photographs)
    assert (found.edges, found.kernels.shape[0], found.contributions.shape) == ((), 0, (0, 5))
    assert Edge(Unit("1", 0), Unit("3", 0), 1.0, 1.0) not in found.places
