import pytest
import torch
from torch import nn
from torch.testing import assert_close

from viscircuits.hooks import frozen
from viscircuits.methods import find
from viscircuits.norms import AffineNorms
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


def test_half_precision_stays_half():
    net = normed(nn.BatchNorm2d(4)).bfloat16()
    images = torch.randn(6, 4, 5, 5).bfloat16()
    with AffineNorms():
        assert net(images).dtype == torch.bfloat16


def test_a_path_of_removal_sees_no_native_batch_norm(monkeypatch):
    """What it finds is what it would find with native ones."""
    net = nn.Sequential(
        normed(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5)
    ).eval()
    concept, reference = torch.randn(6, 4, 5, 5) + 1, torch.randn(12, 4, 5, 5)
    task = make_task(net, ["0.1", "1"], concept, reference, ablation="mean")
    options = {"protect": 1.0, "sizes": (0.5,), "images_a_step": (4, 4), "answers": "own", "edges": False}
    found = find(task, "anchored", **options)
    monkeypatch.setattr("viscircuits.methods.removing.AffineNorms", lambda: frozen(net))
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
