"""Training small networks in which every unit and every edge does something.

1. A network here is an `nn.Sequential` cut at its ReLUs: a *stage* leads from one layer of units to the next.
2. `shares` removes each unit, and each edge between adjacent layers, alone and exactly: what that changes of
   the label's logit on a concept's images, over what removing everything does.
3. `drop_idle` takes away the units and edges that do next to nothing. Its weights become zero and stay zero
   while the rest is trained on, until none is idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from viscircuits.errors import ViscircuitsError
from viscircuits.layers import along_units
from viscircuits.planted.composed import Pictures

WEIGHTS = Path(__file__).parent / "weights"


def load_weights(name: str) -> dict[str, Tensor]:
    """The weights of this name that `tools/plant.py` made.

    Raises
    ------
    ViscircuitsError
        If there are none.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise ViscircuitsError(f"no weights {name!r}: {path.name} is missing; run tools/plant.py")
    return load_file(path)


@dataclass(frozen=True)
class Shares:
    """Mean change of the behaviour without each unit and edge, over that without anything; signed.

    `units` has an entry for each layer, `edges` one for each pair of adjacent layers, rows targets.
    """

    units: tuple[Float[Tensor, " _"], ...]
    edges: tuple[Float[Tensor, "_ _"], ...]


def stages(network: nn.Sequential) -> list[nn.Sequential]:
    """The network cut after each ReLU: as many stages as layers of units, and one to the outputs."""
    found: list[list[nn.Module]] = [[]]
    for module in network:
        found[-1].append(module)
        if isinstance(module, nn.ReLU):
            found.append([])
    return [nn.Sequential(*modules) for modules in found]


def relus(network: nn.Sequential) -> tuple[str, ...]:
    """Names of the layers of units."""
    return tuple(name for name, module in network.named_children() if isinstance(module, nn.ReLU))


@torch.no_grad()
def shares(
    network: nn.Sequential,
    concept: Float[Tensor, "image 3 row column"],
    labels: Int[Tensor, " image"],
    reference: Float[Tensor, "other 3 row column"],
) -> Shares:
    """Share of the label's logit that hangs on each unit and edge, under mean ablation.

    Parameters
    ----------
    network
        Cut at its ReLUs.
    concept, labels
        Images, and the output each is judged by.
    reference
        Images whose mean a removed unit takes on.
    """
    parts = stages(network)
    values, means = _values(parts, concept), [each.flatten(2).mean((0, 2)) if each.ndim > 2 else each.mean(0)
                                              for each in _values(parts, reference)]  # fmt: skip
    removed = [along_units(mean, value, 1).expand_as(value) for mean, value in zip(means, values, strict=True)]

    def judged(value: Tensor, layer: int) -> Tensor:
        """The mean behaviour for each of several versions of a layer: (version, image, …) → (version,)."""
        outputs = nn.Sequential(*parts[layer + 1 :])(value.flatten(0, 1)).unflatten(0, value.shape[:2])
        return outputs.gather(2, labels.expand(len(value), -1).unsqueeze(2)).mean((1, 2))

    last = len(values) - 1
    full, empty = judged(torch.stack([values[last], removed[last]]), last)
    units, edges = [], []
    for layer, (value, gone) in enumerate(zip(values, removed, strict=True)):
        without = torch.stack([_exchanged(value, gone, [i]) for i in range(value.shape[1])])
        units.append((full - judged(without, layer)) / (full - empty))
        if layer == last:
            break
        rows = []
        for each in without:
            target = parts[layer + 1](each)
            one_by_one = [_exchanged(values[layer + 1], target, [n]) for n in range(target.shape[1])]
            rows.append((full - judged(torch.stack(one_by_one), layer + 1)) / (full - empty))
        edges.append(torch.stack(rows, 1))  # (target, source)
    return Shares(tuple(units), tuple(edges))


def _values(parts: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    values = []
    for part in parts[:-1]:
        images = part(images)
        values.append(images)
    return values


def _exchanged(value: Tensor, other: Tensor, units: Sequence[int]) -> Tensor:
    new = value.clone()
    new[:, units] = other[:, units]
    return new


@dataclass
class Kept:
    """Which units and edges a network still has; what it has not, has zero weights.

    `units` has an entry for each layer, `edges` one for each pair of adjacent layers, rows targets.
    """

    units: list[Bool[Tensor, " _"]]
    edges: list[Bool[Tensor, "_ _"]]


def everything(network: nn.Sequential) -> Kept:
    """Every unit and edge of a network."""
    widths = [len(layer.weight) for layer in weighted(network)[:-1]]
    units = [torch.ones(n, dtype=torch.bool) for n in widths]
    return Kept(units, [torch.ones(n, m, dtype=torch.bool) for m, n in pairwise(widths)])


@runtime_checkable
class Weighted(Protocol):
    """A convolution or linear layer with a bias."""

    weight: Tensor
    bias: Tensor


def weighted(network: nn.Module) -> list[Weighted]:
    """The convolutions and linear layers, in order: one for each layer of units, and one to the outputs."""
    found = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return cast("list[Weighted]", found)


@torch.no_grad()
def silence(network: nn.Sequential, kept: Kept) -> None:
    """Set to zero the weights of all that is not kept."""
    layers = weighted(network)
    for i, units in enumerate(kept.units):
        layers[i].weight[~units] = 0
        layers[i].bias[~units] = 0
        sources = by_source(layers[i + 1].weight, len(units))
        sources[:, ~units] = 0
        if i < len(kept.edges):
            sources[~kept.edges[i]] = 0


def by_source(weight: Tensor, n_sources: int) -> Float[Tensor, "target source position"]:
    """A view of a layer's weights, source by source: a source has a kernel, or a place for each pixel of its map."""
    return weight.view(len(weight), n_sources, -1)


@torch.no_grad()
def copy_units(old: nn.Module, new: nn.Module, units: Sequence[Int[Tensor, " _"]]) -> None:
    """Fill a network with another's weights: unit i of each layer is the other's unit at place i of its list.

    Parameters
    ----------
    old, new
        Alike but for how many units their layers have; outputs stay as they are.
    units
        For each layer of the new network, the old places of its units.
    """
    outputs = torch.arange(len(weighted(old)[-1].weight))
    columns, n_sources = torch.arange(3), 3
    for before, after, rows in zip(weighted(old), weighted(new), [*units, outputs], strict=True):
        after.weight.copy_(by_source(before.weight, n_sources)[rows][:, columns].reshape(after.weight.shape))
        after.bias.copy_(before.bias[rows])
        columns, n_sources = rows, len(before.weight)


def fit(
    network: nn.Module,
    n_images: int,
    loss: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    rate: float,
    generator: torch.Generator,
    after_step: Callable[[], object] = lambda: None,
    batch_size: int = 50,
) -> None:
    """Train a network by AdamW under one cycle of the learning rate.

    Parameters
    ----------
    network
        Trained in place.
    n_images, batch_size
        How many images there are, and how many go into a step.
    loss
        Loss of a batch, given the places of its images.
    epochs, rate
        How often all images are seen, and the largest learning rate.
    generator
        Of the images' order.
    after_step
        Called after each step.
    """
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    steps = epochs * -(-n_images // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(n_images, generator=generator).split(batch_size):
            value = loss(batch)
            optimiser.zero_grad()
            torch.autograd.backward(value)
            optimiser.step()
            schedule.step()
            after_step()


def drop_idle(
    kept: Kept, found: Shares, least: tuple[float, float], *, among: Kept | None = None, at_most: float = 1.0
) -> int:
    """Take the idle units and edges from what is kept, and return how many were taken.

    Parameters
    ----------
    kept
        Changed in place. A unit goes together with its edges, and with its last edge.
    found
        What hangs on each.
    least
        Shares under which a unit, and an edge, is idle.
    among
        Only these are taken; all by default.
    at_most
        Share of a layer's units, and of a pair's edges, that are taken at a time, the idlest first; at least one.
    """
    before = _count(kept)
    allowed = among or kept
    for i, share in enumerate(found.units):
        kept.units[i] &= ~_idlest(share, kept.units[i] & allowed.units[i], least[0], at_most)
    for i, share in enumerate(found.edges):
        kept.edges[i] &= ~_idlest(share, kept.edges[i] & allowed.edges[i], least[1], at_most)
    for _ in range(len(kept.units)):  # what lost its last edge is idle too, and so is what fed it alone
        for i, edges in enumerate(kept.edges):
            edges &= kept.units[i + 1][:, None] & kept.units[i]
            kept.units[i] &= edges.any(0)
            kept.units[i + 1] &= edges.any(1)
    return before - _count(kept)


def _idlest(share: Tensor, candidates: Tensor, least: float, at_most: float) -> Tensor:
    """True for the candidates whose share is less, but only for so many of them, the smallest first."""
    size = share.abs().where(candidates, torch.inf)
    n = max(1, int(at_most * candidates.sum()))
    bound = size.flatten().sort().values[:n].max() if candidates.any() else 0.0
    return (size < least) & (size <= bound)


def _count(kept: Kept) -> int:
    return sum(int(each.sum()) for each in (*kept.units, *kept.edges))


def accuracy(network: nn.Module, pictures: Pictures, question: str, outputs: slice = slice(None)) -> float:
    """Share of the pictures whose largest of these outputs is the answer to the question."""
    with torch.no_grad():
        said = network(pictures.images)[:, outputs].argmax(1)
    return float((said == pictures.answers[question]).float().mean())


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw a network's weights as He et al. 2015 do, from this generator alone; biases are zero."""
    for layer in weighted(network):
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
