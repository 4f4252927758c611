"""What each unit and edge does, found by removing it: the oracle that every other score approximates.

1. A unit is removed in each image by the task's ablation; its effect is the behaviour before minus after.
2. For an edge m→n the network is run as far as the target layer without m, which gives every target as it
   would be; then once for each target that changed, with that target alone replaced (`ablation.prune_edges`).
3. Several removals share a forward pass along the image axis, beside an untouched run of the same shape, so
   that what has no effect has an effect of exactly 0.

It costs one forward pass for each image and unit, or edge that carries anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from viscircuits.ablation import ABLATIONS
from viscircuits.hooks import activations, rewrite
from viscircuits.layers import Layer, by_unit
from viscircuits.scores.formulas import choose
from viscircuits.task import Finding, Pair, Task, costing, outcomes

MOST_NUMBERS = 2**17  # of input that share a pass: small images go together, large ones one batch at a time


@dataclass(frozen=True)
class Effects:
    """Signed effects, in units of the behaviour: above 0 where removing something lowers it.

    Parameters
    ----------
    units
        Layer → mean over concept images of behaviour before minus behaviour after.
    edges
        (source layer, target layer) → the same, rows targets.
    sizes
        Mean over images (and points of a path) of the size of each edge's effect: it cannot cancel. Empty where not
        asked for.
    """

    units: Mapping[str, Float[Tensor, " unit"]]
    edges: Mapping[Pair, Float[Tensor, "target source"]]
    sizes: Mapping[Pair, Float[Tensor, "target source"]] = field(default_factory=dict)

    @classmethod
    def none(cls, task: Task, *, edges: bool, sizes: bool = False) -> Effects:
        """Zeros of the right shapes, to be added to."""
        units = {layer.address: torch.zeros(layer.n_units, dtype=torch.float64) for layer in task.layers}
        shapes = {(s.address, t.address): (t.n_units, s.n_units) for s, t in task.pairs if edges}
        signed, unsigned = (
            {pair: torch.zeros(shape, dtype=torch.float64) for pair, shape in shapes.items() if wanted}
            for wanted in (True, sizes)
        )
        return cls(units, signed, unsigned)

    def averaged(self, n: int) -> Effects:
        """Sums over `n` images as means."""
        edges, sizes = ({pair: total / n for pair, total in part.items()} for part in (self.edges, self.sizes))
        return Effects({layer: total / n for layer, total in self.units.items()}, edges, sizes)

    def finding(self, method: str, task: Task, options: Mapping[str, Any]) -> Finding:
        """Their sizes as scores: what suppresses the behaviour is part of its circuit too."""
        units = {layer: effect.abs() for layer, effect in self.units.items()}
        edges = {pair: effect.abs() for pair, effect in self.edges.items()}
        return Finding(method, units, task.widths, edges, task.passes, options)


def exact(task: Task, *, edges: bool = False) -> Finding:
    """Size of the effect of removing each unit, and with `edges` each edge, one at a time.

    ``|mean over concept images of T(full) − T(without)|``, T the task's behaviour; any ablation will do.

    Parameters
    ----------
    task
        What to explain.
    edges
        Also remove every edge between adjacent layers: a forward pass for each that carries anything.
    """
    with costing(task) as counted:
        found = exact_effects(counted, edges=edges)
    return found.finding("exact", counted, {"edges": edges})


def exact_effects(task: Task, *, edges: bool = False) -> Effects:
    """Signed effect of removing each unit, and with `edges` each edge, one at a time; `exact` has their sizes."""
    found = Effects.none(task, edges=edges)
    generator = torch.Generator().manual_seed(task.seed)  # of ablations that draw: one seed for each image
    for images, labels in task.batches():
        seeds = torch.randint(2**62, (len(images),), generator=generator).tolist()
        removing = _Removing(task, images, labels, seeds)
        for layer in task.layers:
            found.units[layer.address].add_(removing.units(layer))
        for (source, target), total in zip(task.pairs if edges else [], found.edges.values(), strict=True):
            total.add_(removing.edges(source, target))
    return found.averaged(len(task.concept))


class _Removing:
    """Removes one thing after another from the network's view of a batch."""

    def __init__(self, task: Task, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> None:
        self.task, self.images, self.labels, self.seeds = task, images, labels, seeds
        self.replacement = choose(ABLATIONS, task.ablation, "ablation")
        self.at_once = max(1, MOST_NUMBERS // images.numel())
        self.full: dict[int, Tensor] = {}  # copies of the batch in a pass → the untouched behaviour

    def units(self, layer: Layer) -> Float[Tensor, " unit"]:
        """Effect of each unit of a layer, summed over the batch."""
        effects = torch.zeros(layer.n_units, dtype=torch.float64)
        for units in torch.arange(layer.n_units).split(self.at_once):
            effects[units] = self._effects(layer, units, lambda true: self._removed(layer, true))
        return effects

    def edges(self, source: Layer, target: Layer) -> Float[Tensor, "target source"]:
        """Effect of each edge between two layers, summed over the batch."""
        effects = torch.zeros(target.n_units, source.n_units, dtype=torch.float64)
        true = self._values(target, {})
        for m in range(source.n_units):
            new = self._values(target, {source.address: self._without(source, m)})
            differs = by_unit((new != true).to(true.dtype), target.unit_axis)  # (image, target, position)
            changed = differs.amax((0, 2)).nonzero().flatten().cpu()
            for units in changed.split(self.at_once) if len(changed) else ():
                effects[units, m] = self._effects(target, units, partial(_repeated, new))
        return effects

    def _effects(
        self, layer: Layer, units: Tensor, replacement: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, " removed"]:
        """Behaviour lost when each of these units takes its replacement, a copy of the batch for each of them."""
        n = len(units)
        images, labels = self.images.repeat(n, *[1] * (self.images.ndim - 1)), self.labels.repeat(n)
        if n not in self.full:
            self.full[n] = outcomes(self.task, images, labels)

        def tap(true: Tensor) -> Tensor:
            return torch.where(_one_each(units, layer, len(self.images), true), replacement(true), true)

        lost = self.full[n] - outcomes(self.task, images, labels, {layer.address: tap})
        return lost.double().reshape(n, -1).sum(1).cpu()

    def _removed(self, layer: Layer, true: Tensor) -> Tensor:
        """What every unit of the layer would become."""
        seeds = [*self.seeds] * (len(true) // len(self.seeds))
        return self.replacement(self.task.statistics, layer.address, true, seeds)

    def _without(self, layer: Layer, unit: int) -> Callable[[Tensor], Tensor]:
        only = torch.tensor([unit])
        return lambda true: torch.where(_one_each(only, layer, len(true), true), self._removed(layer, true), true)

    def _values(self, layer: Layer, replaced: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """A layer's values, the network run no further than that."""
        self.task.passes.forward += len(self.images)
        with torch.no_grad(), rewrite(self.task.spec.model, replaced):
            return activations(self.task.spec.model, [layer.address], self.images)[layer.address]


def _one_each(units: Tensor, layer: Layer, n_images: int, like: Tensor) -> Bool[Tensor, "copies *axes"]:
    """True at one unit in each copy of a batch, shaped to broadcast against the layer's output."""
    copies = torch.nn.functional.one_hot(units, layer.n_units).bool().repeat_interleave(n_images, 0)  # (copies, unit)
    shape = [len(copies)] + [1] * (like.ndim - 1)
    shape[layer.unit_axis] = layer.n_units
    return copies.reshape(shape).to(like.device)


def _repeated(new: Tensor, like: Tensor) -> Tensor:
    return new.repeat(len(like) // len(new), *[1] * (new.ndim - 1))
