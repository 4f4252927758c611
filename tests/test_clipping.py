"""Other gradients, the same values: what gets through activations where they are flat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from viscircuits.clipping import Linearised, Redirected, Unclipped

VALUES = torch.tensor([[-2.0, 1.0, 8.0], [-1.0, -3.0, -0.5], [7.0, 9.0, 6.5]])  # (image, position)
ACTIVATIONS = {
    "relu": nn.functional.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": torch.Tensor.relu,
    "relu, in place": lambda x: nn.functional.relu(x, inplace=True),
    "relu_": lambda x: x.relu_(),
    "nn.ReLU": nn.ReLU(inplace=True),
    "relu6": nn.functional.relu6,
    "nn.ReLU6": nn.ReLU6(inplace=True),
    "hardtanh": lambda x: nn.functional.hardtanh(x, 0.0, 6.0),
    "hardtanh, named": lambda x: nn.functional.hardtanh(input=x, min_val=0.0, max_val=6.0, inplace=True),
}
CEILED = [name for name in ACTIVATIONS if "6" in name or "tanh" in name]


def through(activation, upward: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation's values, and what arrives before it of `upward`."""
    values = VALUES.clone().requires_grad_()
    out = activation(values * 1)
    (arrived,) = torch.autograd.grad(out, values, upward)
    return out.detach(), arrived


@pytest.mark.parametrize("mode", [Unclipped, Redirected, Linearised])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_stay_what_they_are(name, mode):
    plain, _ = through(ACTIVATIONS[name], torch.ones(3, 3))
    with mode():
        inside, _ = through(ACTIVATIONS[name], torch.ones(3, 3))
    after, _ = through(ACTIVATIONS[name], torch.ones(3, 3))
    assert torch.equal(inside, plain) and torch.equal(after, plain)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_image_with_a_true_gradient_keeps_it_and_a_stuck_one_gets_the_way_out(name):
    upward = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, 1.0, -2.0], [-1.0, 1.0, 2.0]])  # negative: values shall grow
    _, true = through(ACTIVATIONS[name], upward)
    with Redirected():
        _, arrived = through(ACTIVATIONS[name], upward)
    assert torch.equal(arrived[0], true[0]) and true[0].any()
    assert arrived[1].tolist() == [-1, 0, -2]  # silent: up, not further down
    if name in CEILED:
        assert not true[2].any()
        assert arrived[2].tolist() == [0, 1, 2]  # saturated: down, not further up
    else:
        assert torch.equal(arrived[2], true[2])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_unclipped_passes_the_ceiling_and_not_the_floor(name):
    with Unclipped():
        _, arrived = through(ACTIVATIONS[name], torch.ones(3, 3))
    assert arrived.tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linearised_passes_everything(name):
    with Linearised():
        _, arrived = through(ACTIVATIONS[name], VALUES)
    assert torch.equal(arrived, VALUES)


def test_linearised_maximum_pooling_reaches_every_place_it_looks_at():
    image = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    with Linearised():
        pooled = nn.MaxPool2d(3, stride=1)(image)
        (gradient,) = torch.autograd.grad(pooled[0, 0, 0, 0], image)
    assert (gradient[0, 0] != 0).tolist() == [[True] * 3 + [False]] * 3 + [[False] * 4]
