from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from viscircuits.circuit import Unit
from viscircuits.errors import ImageError, LayerError
from viscircuits.exemplars import (
    MAX_CROP,
    ReceptiveField,
    exemplars,
    heat,
    receptive_box,
    receptive_field,
    unlike,
    unnormalise,
)
from viscircuits.hooks import activations, count_hooks
from viscircuits.images import batches, open_images
from viscircuits.layers import by_unit

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalised(image: Image.Image) -> torch.Tensor:
    return (pixels(image) - MEAN) / STD


def caffe(image: Image.Image) -> torch.Tensor:
    return pixels(image).flip(0) * 255 - torch.tensor([104.006, 116.669, 122.679])[:, None, None]


def unscaled(image: Image.Image) -> torch.Tensor:
    return (pixels(image) * 255 - 127) / 128


def noise(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def spot(left: int, top: int, side: int = 64, colour=(255, 0, 0)) -> Image.Image:
    image = Image.new("RGB", (side, side))
    image.paste(colour, (left, top, left + 8, top + 8))
    return image


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU())


def red_detector() -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1, bias=False), nn.ReLU())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 3, 3))
    return network


# ------------------------------------------------------------------ which images


@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
def test_exemplars_are_the_images_with_the_largest_peaks(batch_size):
    network, images = small_network(), open_images([noise(seed) for seed in range(11)])
    units = [Unit("4", 3), Unit("1", 0), Unit("4", 5)]
    found = exemplars(network, units, images, normalised, n=3, batch_size=batch_size, unit_axes={"1": 1, "4": 1})
    (everything,) = batches(images, normalised, 100)
    assert list(found) == [Unit("4", 3), Unit("4", 5), Unit("1", 0)]
    for unit, shots in found.items():
        peaks = by_unit(activations(network, [unit.layer], everything.images)[unit.layer], 1).amax(2)[:, unit.index]
        best = peaks.argsort(descending=True)[:3]
        assert [shot.name for shot in shots] == [everything.names[i] for i in best]
        assert [shot.activation for shot in shots] == pytest.approx(peaks[best].tolist(), rel=1e-4)


def test_equal_activations_keep_the_order_of_the_images():
    images = open_images([spot(8, 8), spot(40, 8), spot(8, 40), spot(40, 40)])
    (shots,) = exemplars(red_detector(), [Unit("1", 0)], images, pixels, n=3, batch_size=2, unit_axes={"1": 1}).values()
    assert [shot.name for shot in shots] == [picture.name for picture in images][:3]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_clipped_unit_prefers_the_widest_excitement_and_still_looks_somewhere(inplace):
    network = red_detector()
    with torch.no_grad():
        network[0].weight *= 100
    network[1] = nn.ReLU6(inplace=inplace)
    wide = spot(8, 8)
    wide.paste((255, 0, 0), (32, 32, 52, 52))
    images = open_images([spot(8, 8), spot(40, 8), wide])
    (shots,) = exemplars(network, [Unit("1", 0)], images, pixels, n=2, batch_size=1, unit_axes={"1": 1}).values()
    names = [picture.name for picture in images]
    assert [(shot.name, shot.activation) for shot in shots] == [(names[2], 6.0), (names[0], 6.0)]
    left, top, right, bottom = shots[0].box
    assert right - left == 24 and left <= 42 <= right and top <= 42 <= bottom


def test_both_passes_tell_a_progress_bar_their_length():
    lengths = []

    def watch(stream):
        items = list(stream)
        lengths.append((len(stream), len(items)))
        return items

    images = open_images([spot(8, 8), spot(40, 8), spot(8, 40, colour=(0, 0, 255))])
    exemplars(red_detector(), [Unit("1", 0)], images, pixels, batch_size=2, unit_axes={"1": 1}, progress=watch)
    assert lengths == [(2, 2), (2, 2)]


def test_a_silent_unit_has_no_exemplar_and_few_images_give_few():
    images = open_images([spot(8, 8), spot(8, 8, colour=(0, 0, 255))])
    (shots,) = exemplars(red_detector(), [Unit("1", 0)], images, pixels, n=4, unit_axes={"1": 1}).values()
    assert len(shots) == 1


# ------------------------------------------------------------------ which region


@pytest.mark.parametrize(("left", "top"), [(0, 0), (20, 36), (56, 56)])
def test_the_region_is_where_the_unit_looked(left, top):
    (shots,) = exemplars(
        red_detector(), [Unit("1", 0)], open_images(spot(left, top)), pixels, unit_axes={"1": 1}
    ).values()
    box = shots[0].box
    assert box[2] - box[0] == box[3] - box[1] == 24
    assert box[0] <= left + 4 <= box[2] and box[1] <= top + 4 <= box[3]
    assert np.array(shots[0].image)[..., 0].max() == 255


def test_a_token_looks_at_its_own_patch():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 32, stride=32, bias=False)
            self.act = nn.GELU()

        def forward(self, images):
            return self.act(self.patches(images).flatten(2).transpose(1, 2))  # (image, token, unit)

    network = Tokens()
    nn.init.constant_(network.patches.weight, 0.01)
    image = Image.new("RGB", (128, 128))
    image.paste((200, 200, 200), (64, 32, 96, 64))
    found = exemplars(network, [Unit("act", 2)], open_images(image), pixels, unit_axes={"act": 2})
    left, top, right, bottom = found[Unit("act", 2)][0].box
    assert 64 <= left < right <= 96 and 32 <= top < bottom <= 64
    assert right - left >= 30  # 95 % of the side of an evenly weighted patch


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(24, 70), st.integers(24, 70), st.floats(0.0, 6.0))
def test_the_box_is_inside_square_and_holds_the_energy(seed, height, width, peakedness):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(3, height, width, generator=generator)
    gradient *= torch.rand(height, width, generator=generator) ** peakedness
    left, top, right, bottom = receptive_box(gradient)
    energy = gradient.double().square().sum(0)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert energy[top:bottom, left:right].sum() >= 0.9 * energy.sum() * (1 - 1e-9)
    shortest, longest = sorted((right - left, bottom - top))
    assert shortest >= 24 and shortest == min(longest, height, width)


def test_no_gradient_means_the_whole_image():
    assert receptive_box(torch.zeros(3, 30, 50)) == (0, 0, 50, 30)


def test_a_large_region_is_kept_small():
    network = nn.Sequential(nn.Conv2d(3, 1, 200), nn.ReLU())
    nn.init.constant_(network[0].weight, 0.01)
    (shots,) = exemplars(network, [Unit("1", 0)], open_images(noise(0, 200, 200)), pixels, unit_axes={"1": 1}).values()
    assert shots[0].box[2] - shots[0].box[0] > 180
    assert shots[0].image.size == (MAX_CROP, MAX_CROP)


# ------------------------------------------------------------------ what it saw


@pytest.mark.parametrize("transform", [pixels, normalised, caffe, unscaled])
def test_every_fixed_normalisation_is_undone(transform):
    image = noise(3, 40, 30)
    assert np.array_equal(np.array(unnormalise(transform, image.size)(transform(image))), np.array(image))


def test_an_image_of_its_own_statistics_is_refused():
    def standardised(image):
        values = pixels(image)
        return (values - values.mean()) / (values.std() + 1e-6)

    with pytest.raises(ImageError, match="fixed affine map"):
        unnormalise(standardised, (32, 32))


# ------------------------------------------------------------------ manners


def test_the_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout()).train()
    network[3].eval()
    network[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    exemplars(network, [Unit("2", 1)], open_images([noise(0), noise(1)]), pixels, unit_axes={"2": 1})
    assert [module.training for module in network.modules()] == [True, True, True, True, False]
    assert count_hooks(network) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_that_changes_its_input_in_place_has_exemplars_too():
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.ReLU())
    nn.init.constant_(network[1].weight, 0.1)
    found = exemplars(network, [Unit("2", 0)], open_images(noise(0)), normalised, unit_axes={"2": 1})
    assert len(found[Unit("2", 0)]) == 1


def test_half_precision_networks_have_exemplars_too():
    network = red_detector().to(torch.bfloat16)
    found = exemplars(network, [Unit("1", 0)], open_images(spot(20, 36)), pixels, unit_axes={"1": 1})
    left, top, right, bottom = found[Unit("1", 0)][0].box
    assert left <= 24 <= right and top <= 40 <= bottom


@pytest.mark.parametrize(
    ("unit", "culprit"), [(Unit("1", 9), "asked for 9"), (Unit("1", -1), "asked for -1"), (Unit("relu", 0), "'relu'")]
)
def test_a_unit_that_does_not_exist_is_named(unit, culprit):
    with pytest.raises(LayerError, match=culprit):
        exemplars(red_detector(), [unit], open_images(spot(8, 8)), pixels, unit_axes={"1": 1})


# ------------------------------------------------------------------ diverse ones


def test_diverse_exemplars_start_with_the_strongest_and_go_on_with_the_least_alike():
    peaks = {7: 10.0, 3: 9.0, 8: 8.0, 1: 6.0, 5: 4.0}  # 5 is under half the strongest
    along = {7: [1, 0, 0], 3: [2, 0.1, 0], 8: [0, 1, 0], 1: [0, 0.5, 0.6], 5: [0, 0, 1]}
    pooled = {image: torch.tensor(vector, dtype=torch.double) for image, vector in along.items()}
    assert unlike(peaks, pooled, 1) == [7]
    assert unlike(peaks, pooled, 2) == [7, 8]
    assert unlike(peaks, pooled, 3) == [7, 8, 1]
    assert unlike(peaks, pooled, 4) == [7, 3, 8, 1]
    assert unlike(peaks, pooled, 5) == [7, 3, 8, 1, 5]  # strength fills up
    assert unlike({}, pooled, 3) == []


@pytest.mark.parametrize("batch_size", [2, 5, 40])
def test_diverse_exemplars_look_less_alike_to_their_layer(batch_size):
    network, images = small_network(), open_images([noise(seed // 2) for seed in range(24)])  # each image twice

    def chosen(**options):
        (shots,) = exemplars(
            network, [Unit("4", 3)], images, normalised, n=3, batch_size=batch_size, unit_axes={"4": 1}, **options
        ).values()
        return shots

    (everything,) = batches(images, normalised, 100)
    with torch.no_grad():
        pooled = by_unit(activations(network, ["4"], everything.images)["4"], 1).mean(2)
    place = {name: i for i, name in enumerate(everything.names)}

    def alike(shots) -> float:
        vectors = torch.nn.functional.normalize(pooled[[place[shot.name] for shot in shots]], dim=1)
        return float((vectors @ vectors.T).triu(1).max())

    plain, diverse = chosen(), chosen(diverse=True)
    assert plain[0].name == diverse[0].name
    assert alike(plain) == pytest.approx(1)  # an image and its twin
    assert alike(diverse) < 1 - 1e-4
    assert [shot.activation for shot in diverse] == sorted((shot.activation for shot in diverse), reverse=True)


# ------------------------------------------------------------------ where a unit is active


@pytest.mark.parametrize("colours", ["viridis", "cividis"])
@pytest.mark.parametrize("corner", [(8, 8), (40, 24)])
def test_a_heat_map_is_hot_where_the_unit_is_active(corner, colours):
    picture = spot(*corner)
    shown = heat(red_detector(), Unit("1", 0), pixels(picture), picture, unit_axis=1, colours=colours)
    assert shown.size == picture.size
    warmth = pixels(shown)[:2].sum(0)  # both maps end in yellow
    hot = torch.zeros(64, 64, dtype=torch.bool)
    hot[corner[1] : corner[1] + 8, corner[0] : corner[0] + 8] = True
    assert warmth[hot].min() > warmth[~hot].quantile(0.99)
    assert warmth[~hot].median() < warmth[hot].median() / 2


def test_heat_goes_by_the_activation_that_is_called_most():
    picture = spot(8, 8)
    full, half = (
        pixels(heat(red_detector(), Unit("1", 0), pixels(picture), picture, unit_axis=1, most=most, opacity=1))
        for most in (None, 2 * 9.0)  # nine red pixels under the filter
    )
    assert (full[:, 12, 12] * 255).tolist() == pytest.approx([253, 231, 37], abs=1)  # the last of viridis
    assert (half[:, 12, 12] * 255).tolist() == pytest.approx([33, 145, 140], abs=1)  # its middle


class Tokens(nn.Module):
    """Patches of 8×8 pixels as tokens, behind a class token and registers; the unit is the patch's red."""

    def __init__(self, n_front: int):
        super().__init__()
        self.n_front, self.patches = n_front, nn.AvgPool2d(8)
        self.tokens = nn.Identity()

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)  # (image, token, channel)
        front = patches.new_full((len(images), self.n_front, 3), 9.0)
        return self.tokens(torch.cat([front, patches], 1))


@pytest.mark.parametrize("n_front", [0, 1, 5])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (48, 32)])
def test_tokens_are_laid_out_as_the_grid_they_were_cut_from(n_front, width, height):
    picture = Image.new("RGB", (width, height))
    picture.paste((255, 0, 0), (16, 8, 24, 16))
    shown = heat(Tokens(n_front), Unit("tokens", 0), pixels(picture), picture, unit_axis=2, opacity=1)
    hottest = pixels(shown)[0].argmax().item()
    assert 8 <= hottest // width < 16 and 16 <= hottest % width < 24


def test_positions_that_are_no_grid_and_units_that_are_not_there_are_said():
    picture = spot(8, 8)
    with pytest.raises(LayerError, match="positions 73, which are no grid"):
        heat(Tokens(9), Unit("tokens", 0), pixels(picture), picture, unit_axis=2)
    with pytest.raises(LayerError, match="units 0 to 0, asked for 4"):
        heat(red_detector(), Unit("1", 4), pixels(picture), picture, unit_axis=1)


# ------------------------------------------------------------------ how far a layer can see


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    ("network", "layer", "size", "stride"),
    [
        (chain(nn.Conv2d(3, 4, 3), nn.ReLU()), "1", 3, 1),
        (chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()), "3", 5, 1),
        (chain(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)), "2", 3 + 2 * 2, 2),
        (chain(nn.Conv2d(3, 4, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3)), "2", 11 + 2 * 4, 4),
        (chain(nn.Conv2d(3, 4, 3, dilation=4), nn.ReLU6()), "1", 9, 1),
    ],
)
def test_a_receptive_field_is_that_of_the_arithmetic(network, layer, size, stride):
    # each layer adds (kernel − 1)·dilation·(product of the strides before it)
    field = receptive_field(network, layer, torch.rand(1, 3, 64, 64))
    assert field == ReceptiveField((size, size), (stride, stride), whole=False)
    assert count_hooks(network) == 0


def test_a_field_that_fills_the_input_says_so():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gated = nn.Conv2d(3, 4, 3, padding=1), nn.Identity()

        def forward(self, images):
            maps = self.conv(images)
            return self.gated(maps * maps.mean((2, 3), keepdim=True))

    field = receptive_field(Squeezed().eval(), "gated", torch.rand(1, 3, 32, 32))
    assert field.whole and field.size == (32, 32)
    with pytest.raises(LayerError, match="no rows and columns"):
        receptive_field(Tokens(1), "tokens", torch.rand(1, 3, 32, 32), unit_axis=2)
