"""Controls against hand computation: activity, its rise over the reference, the norm of incoming weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from viscircuits import attribute
from viscircuits.hooks import activations
from viscircuits.matrices import Attributions
from viscircuits.scores.controls import CONTROLS, activation, activation_difference, weight_norm
from viscircuits.tracing import trace


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + ("var" in name))
    return module.eval()


def norms(model: nn.Module, layers: dict[str, int], images: Tensor) -> dict[str, Tensor] | None:
    """Weight norms at layers of these widths."""
    activity = {layer: torch.zeros(width) for layer, width in layers.items()}
    return weight_norm(_Chain(activity), model, trace(model, images))


class _Chain(Attributions):
    """Layers and widths are all that the control asks attributions for."""

    def __init__(self, activity: dict[str, Tensor]):
        super().__init__((), activity, 1)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.activity)

    @property
    def widths(self) -> dict[str, int]:
        return {layer: len(values) for layer, values in self.activity.items()}


def filter_norms(conv: nn.Conv2d | nn.Linear) -> Tensor:
    return torch.tensor([sum(w**2 for w in each.flatten().tolist()) ** 0.5 for each in conv.weight])


# ------------------------------------------------------------------ activity


def test_activation_is_the_mean_norm_of_the_concepts_maps(conv_net, photographs):
    attributions = attribute(conv_net, photographs, ["1", "3"])
    scores = activation(attributions, conv_net, trace(conv_net, photographs))
    maps = activations(conv_net, ["3"], photographs)["3"].detach()
    assert torch.allclose(scores["3"], maps.square().sum((2, 3)).sqrt().mean(0))
    assert set(scores) == {"1", "3"}


def test_activation_difference_is_what_the_reference_does_not_do(conv_net, photographs):
    concept, reference = photographs[:2], photographs[2:]
    attributions = attribute(conv_net, concept, ["1", "3"], reference=reference)
    traced = trace(conv_net, photographs)
    mine, others = (
        activation(attribute(conv_net, images, ["1", "3"]), conv_net, traced) for images in (concept, reference)
    )
    for layer, rise in activation_difference(attributions, conv_net, traced).items():
        assert torch.allclose(rise, mine[layer] - others[layer])
    assert activation_difference(attribute(conv_net, concept, ["1", "3"]), conv_net, traced) is None


def test_every_control_scores_every_unit_of_every_layer(conv_net, photographs):
    attributions = attribute(conv_net, photographs, ["1", "3", "5"], reference=photographs)
    traced = trace(conv_net, photographs)
    for control in CONTROLS.values():
        scores = control(attributions, conv_net, traced)
        assert {layer: len(values) for layer, values in scores.items()} == attributions.widths


# ------------------------------------------------------------------ weight norm


def test_the_weight_norm_of_a_convolution_is_that_of_each_filter(conv_net, photographs):
    found = norms(conv_net, {"0": 6, "1": 6, "3": 8, "8": 4}, photographs)
    assert torch.allclose(found["1"], filter_norms(conv_net[0]))
    assert torch.equal(found["0"], found["1"])  # the activation passes it on
    assert torch.allclose(found["3"], filter_norms(conv_net[2]))
    assert torch.allclose(found["8"], filter_norms(conv_net[8]))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_scales_the_filters(photographs, affine):
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.5, affine=affine), nn.ReLU6()))
    scale = (model[1].weight if affine else 1) / (model[1].running_var + 0.5).sqrt()
    found = norms(model, {"0": 4, "2": 4}, photographs)
    assert torch.allclose(found["2"], filter_norms(model[0]) * scale)
    assert torch.allclose(found["0"], filter_norms(model[0]))


class Branches(nn.Module):
    """Two branches, concatenated, and then a residual block."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.joined, self.inner, self.summed = nn.Identity(), nn.Conv2d(5, 5, 1), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.joined(torch.cat([self.left(images).relu(), self.right(images).relu()], 1))
        return self.summed(maps + self.inner(maps))


def test_a_concatenation_has_its_branches_norms_and_a_sum_their_root_sum_of_squares(photographs):
    model = seeded(Branches())
    found = norms(model, {"joined": 5, "summed": 5}, photographs)
    joined = torch.cat([filter_norms(model.left), filter_norms(model.right)])
    assert torch.allclose(found["joined"], joined)
    assert torch.allclose(found["summed"], (joined**2 + filter_norms(model.inner) ** 2).sqrt())


def test_filters_held_under_two_names_are_found(photographs):
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    model.add_module("again", model[0])  # sequential would run it again, on the wrong number of channels
    model.forward = lambda images: model[1](model[0](images))
    assert torch.allclose(norms(model, {"1": 4}, photographs)["1"], filter_norms(model[0]))


@pytest.mark.parametrize(
    "first",
    [
        nn.Identity(),  # no weights at all before the activation
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),  # weights that are themselves computed
        nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2)),  # more filters than units
    ],
)
def test_where_no_weights_make_the_units_there_is_no_such_control(first, photographs):
    model = nn.Sequential(first.eval(), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU()).eval()
    assert norms(model, {"3": 2}, photographs) is not None
    assert norms(model, {"1": 3, "3": 2}, photographs) is None


def test_the_control_is_blind_to_images_and_keeps_no_graph(conv_net, photographs):
    first, second = (norms(conv_net, {"1": 6, "3": 8}, images) for images in (photographs[:1], photographs[1:]))
    assert all(torch.equal(first[layer], second[layer]) for layer in first)
    assert not any(values.requires_grad for values in first.values())
