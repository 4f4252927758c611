"""Slow twins, written from the definitions and not from the package: what the tests believe.

`derivatives` differentiates each value of a target with respect to each value of a source,
`attribution` puts the formulas on top; `captum_gradient` asks another library for the same gradient.
`colour_network` is a network whose circuits can be told by looking at it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Tail = Callable[[Tensor], Tensor]  # from the source layer's output to the target layer's


def summary_gradient(target: Tensor, summary: str) -> Tensor:
    """∂s/∂A for one map A of shape (position,): by hand for each kind of summary."""
    if summary == "norm":
        norm = target.square().sum().sqrt()
        return target / norm if norm > 0 else torch.zeros_like(target)
    if summary == "max":
        largest = (target == target.max()).to(target)
        return largest / largest.sum()  # ties share
    return torch.ones_like(target) / (len(target) if summary == "mean" else 1)


def score_of(score: str, activation: Tensor, gradient: Tensor) -> Tensor:
    """One connection's score from two maps of shape (position,)."""
    if score == "cla":
        return activation.square().sum().sqrt() * gradient.square().sum().sqrt()
    if score == "grad-x-act":
        return (activation * gradient).abs().sum()
    if score == "signed":
        return (activation * gradient).sum()
    return gradient.square().sum().sqrt()


def derivatives(
    tail: Tail, source: Tensor, source_axis: int = 1, target_axis: int = 1
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each image: source maps (m, p), target maps (n, q), and every derivative (n, q, m, p)."""
    found = []
    for image in source.detach().split(1):
        target = tail(image).detach()
        jacobian = torch.autograd.functional.jacobian(tail, image)  # (*target, *source), one image each
        jacobian = jacobian.movedim(target_axis, 1).flatten(2, target.ndim - 1)  # (1, n, q, *source)
        jacobian = jacobian.movedim(3 + source_axis, 4).flatten(5)[0, :, :, 0]  # (n, q, m, p)
        found.append(
            (image.movedim(source_axis, 1)[0].flatten(1), target.movedim(target_axis, 1)[0].flatten(1), jacobian)
        )
    return found


def attribution(derived: list[tuple[Tensor, Tensor, Tensor]], score: str = "cla", summary: str = "norm") -> Tensor:
    """Scores (image, target, source) of every connection: the formulas, on top of every derivative."""
    images = []
    for activations, maps, jacobian in derived:
        slopes = torch.stack([summary_gradient(each, summary) for each in maps])  # (n, q)
        gradients = torch.einsum("nq,nqmp->nmp", slopes, jacobian)
        scores = [[score_of(score, a, g) for a, g in zip(activations, row, strict=True)] for row in gradients]
        images.append(torch.tensor(scores))
    return torch.stack(images)


def removal_effect(tail: Tail, source: Tensor, summary: str = "sum") -> Tensor:
    """What zeroing each source takes from each target's sum or mean: (image, target, source)."""
    reduce = {"sum": lambda t: t.flatten(2).sum(2), "mean": lambda t: t.flatten(2).mean(2)}[summary]
    effects = []
    for m in range(source.shape[1]):
        without = source.clone()
        without[:, m] = 0
        effects.append(reduce(tail(source)) - reduce(tail(without)))
    return torch.stack(effects, dim=2)


# ------------------------------------------------------------------ a second opinion


class Continued(nn.Module):
    """The network as a function of one layer's output."""

    def __init__(self, model: nn.Module, source: str, images: Tensor):
        super().__init__()
        self.model, self.source, self.images = model, source, images

    def forward(self, values: Tensor) -> Tensor:
        layer = self.model.get_submodule(self.source)
        handle = layer.register_forward_hook(lambda *_: values.clone())
        try:
            return self.model(self.images)
        finally:
            handle.remove()


def out_of_place(model: nn.Module) -> nn.Module:
    """A copy whose activations work on copies: captum's hooks see what a later in-place operation left."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


def captum_gradient(
    model: nn.Module, images: Tensor, source: str, target: str, n: int, *, unit_axis: int = 1
) -> tuple[Tensor, Tensor]:
    """The source layer's output, and the gradient of the L2 norm of the target's unit n with respect to it."""
    from captum.attr import LayerActivation, NeuronGradient

    twin = out_of_place(model)
    values = LayerActivation(twin, twin.get_submodule(source)).attribute(images)
    neuron = NeuronGradient(Continued(twin, source, images), twin.get_submodule(target))
    gradient = neuron.attribute(
        values.detach().clone(), lambda out: out.select(unit_axis, n).flatten(1).square().sum(1).sqrt()
    )
    return values.detach(), gradient.detach()


# ------------------------------------------------------------------ networks


def colour_network() -> nn.Sequential:
    """Red, green and blue: each colour has two units, then one (three more are dead), then a class."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for colour in range(3):
            net[0].weight[[2 * colour, 2 * colour + 1], colour] = 1
            net[2].weight[colour, [2 * colour, 2 * colour + 1]] = 0.5
            net[6].weight[colour, colour] = 1
    return net.eval()
