from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from viscircuits import norms
from viscircuits.hooks import frozen
from viscircuits.methods import find
from viscircuits.norms import AffineNorms, coefficients
from viscircuits.task import make_task


def normed(norm: nn.Module, *before: nn.Module) -> nn.Sequential:
    """A network whose norm has seen something."""
    torch.manual_seed(0)
    net = nn.Sequential(*before, norm)
    for _ in range(3):
        net(2 * torch.randn(16, *shape_of(norm)) + 1)
    return net.eval()


def shape_of(norm: nn.Module) -> tuple[int, ...]:
    return {nn.BatchNorm1d: (4,), nn.BatchNorm2d: (4, 5, 5), nn.BatchNorm3d: (4, 2, 3, 3)}[type(norm)]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("affine", [True, False])
def test_values_and_gradients_are_those_of_batch_norm(norm, affine):
    net = normed(norm(4, affine=affine))
    images = torch.randn(6, *shape_of(net[0]), requires_grad=True)
    plain = net(images)
    (gradient,) = torch.autograd.grad(plain.square().sum(), images)
    with AffineNorms():
        found = net(images)
    (also,) = torch.autograd.grad(found.square().sum(), images)
    assert found.grad_fn.name().startswith("Addcmul")
    assert_close(found, plain)
    assert_close(also, gradient)


@pytest.mark.parametrize("net", [nn.BatchNorm2d(4).train(), nn.BatchNorm2d(4, track_running_stats=False).eval()])
def test_norms_that_look_at_the_batch_are_left_as_they_are(net):
    images = torch.randn(6, 4, 5, 5)
    plain = nn.functional.batch_norm(images, None, None, net.weight, net.bias, training=True)
    with AffineNorms():
        assert torch.equal(net(images), plain)
    if net.training:
        assert net.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_batch_norm_itself(dtype):
    """A mean of many deviations: rounded to half first, it would leave little of what stands above it."""
    net = normed(nn.BatchNorm2d(4))
    net[0].running_mean.fill_(30.0)
    net[0].running_var.fill_(0.09)
    images = (30 + 0.3 * torch.randn(8, 4, 5, 5)).to(dtype)
    true = net(images.float())
    net.to(dtype)
    with AffineNorms():
        found = net(images)
    assert found.dtype == dtype
    assert (found - true).square().mean() <= 1.1 * (net(images) - true).square().mean()


def test_a_path_of_removal_goes_through_affine_norms_and_finds_the_same(monkeypatch):
    net = nn.Sequential(
        normed(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(100, 5),
    ).eval()  # fmt: skip
    concept, reference = torch.randn(6, 4, 5, 5) + 1, torch.randn(12, 4, 5, 5)
    task = make_task(net, ["1", "4"], concept, reference, ablation="mean")
    options = {"protect": 1.0, "sizes": (0.5,), "images_a_step": (4, 4), "answers": "own", "edges": False}
    made = []
    monkeypatch.setattr(norms, "coefficients", lambda *args: made.append(args) or coefficients(*args))
    found = find(task, "anchored", **options)
    assert len(made) >= 8  # one a step at least
    monkeypatch.setattr("viscircuits.methods.removing.AffineNorms", nullcontext)
    plain = find(task, "anchored", **options)
    for layer, ranks in plain.units.items():
        assert_close(found.units[layer], ranks)


def test_frozen_gives_each_parameter_back_as_it_was():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight.requires_grad_(False)
    with pytest.raises(KeyError), frozen(net):
        assert not any(parameter.requires_grad for parameter in net.parameters())
        raise KeyError
    assert [parameter.requires_grad for parameter in net.parameters()] == [False, True, True, True]


def test_parameters_made_in_inference_mode_are_left_alone():
    with torch.inference_mode():
        net = nn.Linear(2, 2)
    with frozen(net):
        pass
    assert net.weight.requires_grad


@pytest.mark.parametrize("method", ["attribution-patching", "eap", "eap-ig", "snip", "actgrad"])
def test_layers_that_do_not_lead_to_the_output_score_nothing(method):
    """Frozen, such a network has no graph at all."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.more, self.head = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(100, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.more(self.side(images).relu())
            return self.head(images.flatten(1))

    torch.manual_seed(0)
    task = make_task(
        Beside().eval(), ["side", "more"], torch.randn(4, 4, 5, 5), torch.randn(6, 4, 5, 5), ablation="mean"
    )
    assert not any(bool(scores.any()) for scores in find(task, method).units.values())
