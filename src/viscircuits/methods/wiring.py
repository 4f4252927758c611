"""A network whose connections are open, shut or half open: what searches over edges and learned masks run.

Every connection has a gate between 0, removed, and 1, untouched: what passes is
``gate · value + (1 − gate) · replacement``. Two kinds of connection leave a unit:

1. *Edges* to the units of the next layer. A target is recomputed from its source layer with that target's
   own gates, all paths between the two layers included, as in `viscircuits.ablation.prune_edges`. Later
   layers work on what earlier ones left.
2. *Onward*: whatever else the unit reaches. For the last layer this is the output; for any other it is
   what goes round the next layer (the skip of a residual block), and most layers have none.

Where a layer has no edge gates its onward gates are its units', for every reader, as in `viscircuits.ablation.ablate`.
Targets that share their gates share a pass; different ones lie side by side along the image axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import Tap, activations, forward, record, rewrite
from viscircuits.layers import Layer
from viscircuits.scores.formulas import choose
from viscircuits.task import Task

EdgeGates = Mapping[int, Float[Tensor, "_target _source"]]  # place of the source layer → gates
OnwardGates = Mapping[int, Float[Tensor, " _unit"]]  # place of the layer → gates
Distance = Callable[[Task, Tensor, Tensor, Tensor], Tensor]


def kl(task: Task, full: Tensor, changed: Tensor, labels: Tensor) -> Tensor:
    """KL(full ‖ changed) of the outputs' probabilities, in nats, for each image."""
    logs = full.double().log_softmax(1)  # of nearly equal outputs, so that single precision would be all that is left
    return (logs.exp() * (logs - changed.double().log_softmax(1))).sum(1)


def behaviour_change(task: Task, full: Tensor, changed: Tensor, labels: Tensor) -> Tensor:
    """Absolute change of the task's behaviour, for each image."""
    return (task.judge(full.double(), labels) - task.judge(changed.double(), labels)).abs()


DISTANCES: dict[str, Distance] = {"kl": kl, "behaviour": behaviour_change}


@dataclass(frozen=True)
class Batch:
    """Some images, and what the untouched network makes of them."""

    images: Tensor
    labels: Tensor
    values: tuple[Tensor, ...]  # of each layer
    outputs: Tensor


class Wiring:
    """The task's network with gates on its connections, and how far its outputs are from the untouched ones.

    Parameters
    ----------
    task
        Its concept images are run; its passes are counted.
    metric
        ``kl`` or ``behaviour``. A network with one output has no KL and is judged by its behaviour.

    Raises
    ------
    ViscircuitsError
        If the ablation does not give each removed unit one value, or removing every unit changes nothing.
    """

    def __init__(self, task: Task, metric: str) -> None:
        choose(DISTANCES, metric, "metric")
        if task.ablation not in ("zero", "mean"):
            raise ViscircuitsError(
                f"a gate needs one value for each removed unit, and {task.ablation!r} ablation draws it anew; "
                "make the task with 'zero' or 'mean'"
            )
        self.task, self.layers = task, task.layers
        self.batches = [self._batch(images, labels) for images, labels in task.batches()]
        self.metric = metric if self.batches[0].outputs.shape[1] > 1 else "behaviour"
        with torch.no_grad():
            self.empty = float(
                self.distance({}, {i: torch.zeros(layer.n_units) for i, layer in enumerate(self.layers)})
            )
        if not self.empty > 0:
            raise ViscircuitsError(
                f"removing every unit of {', '.join(task.addresses)} changes nothing ({self.metric}): "
                "choose other layers, or images that the network answers differently"
            )

    def _batch(self, images: Tensor, labels: Tensor) -> Batch:
        self.task.passes.forward += len(images)
        model = self.task.spec.model
        with torch.no_grad(), record(model, self.task.addresses) as seen:
            outputs = forward(model, images)
        return Batch(images, labels, tuple(seen[address] for address in self.task.addresses), outputs)

    # ------------------------------------------------------------------ what is known of the network

    @cached_property
    def around(self) -> frozenset[int]:
        """Places of layers that reach the output other than through the next layer; the last one always does."""
        return frozenset(i for i in range(len(self.layers)) if self._goes_around(i))

    def _goes_around(self, i: int) -> bool:
        if i == len(self.layers) - 1:
            return True
        images, model = self.batches[0].images[:1], self.task.spec.model
        here, following = self.task.addresses[i : i + 2]
        with torch.enable_grad(), rewrite(model, {following: Tensor.detach}), record(model, [here]) as seen:
            outputs = forward(model, images)
            if not outputs.requires_grad:
                return False
            return torch.autograd.grad(outputs.sum(), seen[here], allow_unused=True)[0] is not None

    def displacement(self, i: int) -> Float[Tensor, " unit"]:
        """How far each unit of layer `i` is from what removal makes of it: root of the squared sum over all images."""
        layer = self.layers[i]
        total = torch.zeros(layer.n_units, dtype=torch.float64)
        for batch in self.batches:
            moved = (batch.values[i] - self.task.baseline(layer, batch.values[i])).movedim(layer.unit_axis, 0)
            total += moved.flatten(1).double().square().sum(1).cpu()
        return total.sqrt()

    # ------------------------------------------------------------------ running it

    def distance(self, edges: EdgeGates, onward: OnwardGates) -> Tensor:
        """Mean distance over the images between the outputs with these gates and the untouched ones."""
        total = sum(self.distances(batch, edges, onward, {}).sum() for batch in self.batches)
        return torch.as_tensor(total) / sum(len(batch.images) for batch in self.batches)

    def distances(
        self, batch: Batch, edges: EdgeGates, onward: OnwardGates, known: Mapping[int, Tensor]
    ) -> Float[Tensor, " image"]:
        """The same for each image of a batch; `known` are layers whose values are already worked out."""
        current = dict(known)
        for i in sorted(edges):
            if i + 1 not in known:
                self._work_out(batch, i, edges, onward, current)
        taps = {
            self.task.addresses[i]: self._tap(i, current.get(i), _spread(onward.get(i), len(batch.images)))
            for i in {*current, *onward}
        }
        self.task.passes.forward += len(batch.images)
        with rewrite(self.task.spec.model, taps):
            outputs = forward(self.task.spec.model, batch.images)
        return DISTANCES[self.metric](self.task, batch.outputs, outputs, batch.labels)

    def _work_out(
        self, batch: Batch, i: int, edges: EdgeGates, onward: OnwardGates, current: dict[int, Tensor]
    ) -> None:
        """Enter the values of layer `i + 1` in `current`, unless they come about by themselves."""
        gates = edges[i]
        read = self.read(i + 1, edges, onward)
        wanted = gates[read]
        untouched = bool((wanted == 1).all()) and (i not in onward or bool((onward[i] == 1).all()))
        if untouched or not len(wanted):
            return
        if gates.requires_grad:
            rows, which = wanted, torch.arange(len(wanted))
        else:
            rows, which = wanted.unique(dim=0, return_inverse=True)
        place = torch.zeros(len(gates), dtype=torch.long).masked_scatter(read, which)
        values = self.recompute(batch, i, rows, onward, current)
        axis = self.layers[i + 1].unit_axis
        by_unit = values.movedim(axis + 1, 1)  # (set, unit, image, …)
        current[i + 1] = by_unit[place, torch.arange(len(place))].movedim(0, axis)

    def recompute(
        self,
        batch: Batch,
        i: int,
        rows: Float[Tensor, "set source"],
        onward: OnwardGates,
        current: Mapping[int, Tensor],
    ) -> Float[Tensor, "set image *axes"]:
        """Values of layer `i + 1` for several sets of gates on layer `i`."""
        n_sets, n_images = len(rows), len(batch.images)
        taps = {
            self.task.addresses[j]: self._tap(
                j,
                _repeated(current.get(j), n_sets),
                rows.repeat_interleave(n_images, 0) if j == i else _spread(onward.get(j), n_sets * n_images),
            )
            for j in {*current, *onward, i}
            if j <= i
        }
        target = self.task.addresses[i + 1]
        self.task.passes.forward += n_sets * n_images
        with rewrite(self.task.spec.model, taps):
            values = activations(self.task.spec.model, [target], torch.cat([batch.images] * n_sets))[target]
        return values.unflatten(0, (n_sets, n_images))

    def read(self, i: int, edges: EdgeGates, onward: OnwardGates) -> Bool[Tensor, " unit"]:
        """Which units of layer `i` anything still reads: what the others do does not matter."""
        read = torch.zeros(self.layers[i].n_units, dtype=torch.bool)
        if i < len(self.layers) - 1:
            read |= (edges[i] != 0).any(0) if i in edges else True
        if i in self.around:
            read |= onward[i] != 0 if i in onward else True
        return read

    def _tap(self, i: int, values: Tensor | None, gates: Float[Tensor, "image unit"] | None) -> Tap:
        """What makes a layer's values these, if they are given, and lets through what the gates do."""
        return partial(self._replaced, i, values, gates)

    def _replaced(self, i: int, values: Tensor | None, gates: Tensor | None, flowing: Tensor) -> Tensor:
        new = flowing if values is None else values.clone()  # what comes after may work in place
        return new if gates is None else mixed(new, self.task.baseline(self.layers[i], new), gates, self.layers[i])


def best_leaving(
    i: int, edges: Mapping[int, Float[Tensor, "_target _source"]], onward: Mapping[int, Float[Tensor, " _unit"]]
) -> Float[Tensor, " unit"]:
    """Score of each unit of layer `i`: that of the best connection that leaves it."""
    leaving = [edges[i].amax(0)] if i in edges else []
    leaving += [onward[i]] if i in onward else []
    return torch.stack(leaving).amax(0).float()


def mixed(
    values: Float[Tensor, "image *axes"], replacement: Tensor, gates: Float[Tensor, "image unit"], layer: Layer
) -> Float[Tensor, "image *axes"]:
    """Let through as much of each unit as its gate says; the rest becomes the replacement."""
    shape = [1] * values.ndim
    shape[0], shape[layer.unit_axis] = gates.shape
    weight = gates.to(values).reshape(shape)
    return weight * values + (1 - weight) * replacement


def _spread(gates: Tensor | None, n_images: int) -> Tensor | None:
    return None if gates is None else gates.expand(n_images, -1)


def _repeated(values: Tensor | None, n_sets: int) -> Tensor | None:
    return None if values is None else torch.cat([values] * n_sets)
