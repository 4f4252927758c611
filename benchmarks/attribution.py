"""Time of one target's row of attribution: ours against captum's two routes, in one run.

SqueezeNet 1.1 with random weights, from one Fire module's output to the next's, batch 4, 224 pixels, one thread,
processor time. The claim is the ratio; seconds depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torchvision
from captum.attr import LayerGradientXActivation, NeuronGradient
from torch import Tensor, nn

import viscircuits

N_TARGETS = 16  # rows that captum computes; we compute the whole matrix
REPEATS = 3


class Target(nn.Module):
    """The network as a function whose only output is the norm of one unit: what captum's general route needs."""

    def __init__(self, features: nn.Sequential, unit: int):
        super().__init__()
        self.features, self.unit = features, unit

    def forward(self, images: Tensor) -> Tensor:
        return norm_of(self.unit)(self.features(images))


def norm_of(unit: int) -> Callable[[Tensor], Tensor]:
    return lambda maps: torch.linalg.vector_norm(maps[:, unit].flatten(1), dim=1)


def ours(net: nn.Module, images: Tensor) -> int:
    found = viscircuits.attribute(net, images, ["features.3", "features.4"], batch_size=len(images))
    return len(found.matrices[0].values)


def captum_submodule(net: nn.Module, images: Tensor) -> int:
    with torch.no_grad():
        source = net.features[:4](images).requires_grad_()
    gradient = NeuronGradient(net.features[4], net.features[4])
    for unit in range(N_TARGETS):
        gradient.attribute(source, neuron_selector=norm_of(unit))
    return N_TARGETS


def captum_general(net: nn.Module, images: Tensor) -> int:
    for unit in range(N_TARGETS):
        LayerGradientXActivation(Target(net.features[:5], unit), net.features[3]).attribute(images)
    return N_TARGETS


def seconds_per_row(route: Callable[[nn.Module, Tensor], int], net: nn.Module, images: Tensor) -> float:
    """Least processor time of a few runs, divided by the rows they gave."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        n_rows = route(net, images)
        best = min(best, (time.process_time() - start) / n_rows)
    return best


def main() -> None:
    torch.set_num_threads(1)
    net = torchvision.models.squeezenet1_1(weights=None).eval()
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    routes = {
        "viscircuits": ours,
        "captum NeuronGradient on the submodule": captum_submodule,
        "captum LayerGradientXActivation": captum_general,
    }
    seconds = {name: seconds_per_row(route, net, images) for name, route in routes.items()}
    print(f"{'route':<40}{'ms a row':>10}{'ratio':>8}")
    for name, each in seconds.items():
        print(f"{name:<40}{1000 * each:>10.1f}{each / seconds['viscircuits']:>7.1f}×")


if __name__ == "__main__":
    main()
