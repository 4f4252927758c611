"""Whether a planted circuit is what it is said to be: exact interventions, one by one and together.

1. Every unit, and every edge between adjacent layers, is removed alone; what that changes is its *share*:
   the change over that of removing everything.
2. What is in the circuit must change more than `Planted.least`. A unit that is redundant is removed with
   its group, an edge that touches one with the edges beside it.
3. What is not must change no more than `Planted.tolerance`, alone and all of it together: then the circuit
   alone behaves as the whole network does.

It looks at the concept's images only, and at nothing the builder says of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from viscircuits.ablation import ablate, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import activations
from viscircuits.planted import Planted
from viscircuits.task import Pair, Task, costing, outcomes

Connection = tuple[Unit, Unit]


@dataclass(frozen=True)
class Check:
    """What removing each part of a planted network changes, as shares of what removing everything does.

    Parameters
    ----------
    size
        Mean change of the behaviour when every unit is removed: what the shares are shares of.
    units
        Layer → share of each unit, removed alone. In the circuit it is ``|mean change|``, so that a suppressor
        counts; outside, ``mean |change|``, so that nothing cancels.
    edges
        (source, target) → the same of each edge, rows targets.
    weakest_unit, weakest_edge
        The smallest share in the circuit, redundant ones taken with their group.
    stray_unit, stray_edge
        The largest outside it.
    other_units, other_edges
        Share of all units, and of all edges, outside it removed together.
    others
        Share of all of both: what the circuit alone misses.
    spared
        Largest share of all but one unit of a redundant group; 0 without one.
    problems
        What contradicts the stated truth; empty where it holds.
    """

    size: float
    units: Mapping[str, Float[Tensor, " unit"]]
    edges: Mapping[Pair, Float[Tensor, "target source"]]
    weakest_unit: float
    weakest_edge: float
    stray_unit: float
    stray_edge: float
    other_units: float
    other_edges: float
    others: float
    spared: float
    problems: tuple[str, ...]


def check(planted: Planted, *, held_out: bool = False, n_images: int | None = None) -> Check:
    """Shares of every unit and edge by exact removal, and what in them contradicts the stated truth.

    Parameters
    ----------
    planted
        The network and its truth.
    held_out
        Look at the test images instead of those for discovery.
    n_images
        Only the first so many images of the concept; the reference's statistics are of all its images.

    Raises
    ------
    ViscircuitsError
        If removing everything changes nothing: there is no behaviour to speak of.
    """
    task = planted.held_out() if held_out else planted.task()
    task = replace(task, concept=task.concept[:n_images], concept_labels=task.concept_labels[:n_images])
    with costing(task) as counted:
        return _Removing(planted, counted).check()


class _Removing:
    """Removes parts of one planted network and compares what that changes with the stated truth."""

    def __init__(self, planted: Planted, task: Task) -> None:
        self.planted = planted
        self.task = task
        self.full = self._outcome((), ())
        empty = self._outcome((Unit(layer, i) for layer, n in planted.widths.items() for i in range(n)), ())
        self.size = (self.full - empty).abs().mean().item()
        if self.size == 0:
            raise ViscircuitsError(
                f"removing every unit of {planted.name!r} changes its {planted.behaviour} on the concept's images by "
                "nothing; its layers do not lead to the output judged"
            )
        self.group_of = {unit: group for group in planted.redundant for unit in group}
        self.by_parallel: dict[frozenset[Connection], float] = {}

    def check(self) -> Check:
        """Remove everything there is to remove."""
        planted = self.planted
        units = {layer: self._units(layer) for layer in planted.layers}
        edges = {pair: self._edges(*pair) for pair in planted.edges}
        false_units = list(planted.truth().complement())
        false_edges = list(planted.false_edges())
        found = Check(
            self.size,
            units,
            edges,
            weakest_unit=min(self._with_group(unit, units) for unit in planted.truth()),
            weakest_edge=min((self._with_parallels(edge, edges) for edge in planted.true_edges()), default=torch.inf),
            stray_unit=max((float(units[unit.layer][unit.index]) for unit in false_units), default=0.0),
            stray_edge=max((_of(edges, edge) for edge in false_edges), default=0.0),
            other_units=self._share(false_units),
            other_edges=self._share((), false_edges),
            others=self._share(false_units, false_edges),
            spared=max((self._share(_but_one(group, unit)) for unit, group in self.group_of.items()), default=0.0),
            problems=(),
        )
        return replace(found, problems=tuple(_problems(planted, found)))

    def _units(self, layer: str) -> Float[Tensor, " unit"]:
        """Share of each unit, removed alone."""
        changes = []
        for images, labels in self.task.batches():
            changes.append(self._in_turn(layer, images, labels, lambda true: self._emptied(layer, true)))
        return self._shares(torch.cat(changes, dim=1), self.planted.units[layer])

    def _edges(self, source: str, target: str) -> Float[Tensor, "target source"]:
        """Share of each edge between two layers: the target as it is without the source, all others as they are.

        What `prune_edges` does for one edge at a time.
        """
        true, task = self.planted.edges[source, target], self.task
        columns = []
        for m in range(true.shape[1]):
            without = _circuit([Unit(source, m)], self.planted.widths)
            changes = []
            for images, labels in task.batches():
                with ablate(task.spec, without, task.ablation, reference=task.statistics), torch.no_grad():
                    recomputed = activations(task.spec.model, [target], images)[target]
                changes.append(self._in_turn(target, images, labels, partial(_instead, recomputed)))
            columns.append(self._shares(torch.cat(changes, dim=1), true[:, m]))
        return torch.stack(columns, dim=1)

    def _in_turn(
        self, layer: str, images: Tensor, labels: Tensor, replacement: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "unit image"]:
        """Change of the behaviour when each unit of a layer in turn takes its values from the replacement.

        All in one pass: a copy of the images for each unit, and one in which nothing is replaced.
        """
        n, axis = self.planted.widths[layer], self._axis(layer)

        def exchange(flowing: Tensor) -> Tensor:
            blocks = flowing.clone().unflatten(0, (n + 1, len(images)))  # (unit + 1, image, …)
            new = replacement(blocks[n]).expand_as(blocks[n])
            for i in range(n):
                blocks[i].select(axis, i).copy_(new.select(axis, i))
            return blocks.flatten(0, 1)

        copies = images.repeat(n + 1, *[1] * (images.ndim - 1))
        found = outcomes(self.task, copies, labels.repeat(n + 1), {layer: exchange}).double().cpu()
        found = found.unflatten(0, (n + 1, len(images)))
        return found[:n] - found[n]

    def _emptied(self, layer: str, true: Tensor) -> Tensor:
        """A layer's values with every unit removed."""
        return self.task.baseline(next(each for each in self.task.layers if each.address == layer), true)

    def _axis(self, layer: str) -> int:
        return next(each.unit_axis for each in self.task.layers if each.address == layer)

    def _shares(self, changes: Float[Tensor, "unit image"], true: Bool[Tensor, " unit"]) -> Float[Tensor, " unit"]:
        """What is in the circuit by its mean change, what is not by its mean absolute change."""
        return torch.where(true, changes.mean(1).abs(), changes.abs().mean(1)) / self.size

    def _with_group(self, unit: Unit, alone: Mapping[str, Tensor]) -> float:
        """Share of a unit, or of its whole group where it is redundant."""
        if unit in self.group_of:
            return self._share(self.group_of[unit], signed=True)
        return float(alone[unit.layer][unit.index])

    def _with_parallels(self, edge: Connection, alone: Mapping[Pair, Tensor]) -> float:
        """Share of an edge, or where its ends are redundant of all true edges between their groups."""
        sources, targets = (self.group_of.get(unit, (unit,)) for unit in edge)
        if len(sources) == len(targets) == 1:
            return _of(alone, edge)
        true = set(self.planted.true_edges())
        parallel = frozenset(product(sources, targets)) & true
        if parallel not in self.by_parallel:
            self.by_parallel[parallel] = self._share((), parallel, signed=True)
        return self.by_parallel[parallel]

    def _share(self, units: Iterable[Unit], edges: Iterable[Connection] = (), *, signed: bool = False) -> float:
        """Change of the behaviour without these units and edges, over the change without any unit."""
        change = self._outcome(units, edges) - self.full
        return (change.mean().abs() if signed else change.abs().mean()).item() / self.size

    def _outcome(self, units: Iterable[Unit], edges: Iterable[Connection]) -> Float[Tensor, " image"]:
        """The behaviour on the concept's images without these units and edges, in float64."""
        task, removed = self.task, _circuit(units, self.planted.widths)
        pruned = [Edge(source, target, 0.0, 0.0) for source, target in edges]
        with ExitStack() as stack:
            stack.enter_context(ablate(task.spec, removed, task.ablation, reference=task.statistics))
            stack.enter_context(prune_edges(task.spec, pruned, task.ablation, reference=task.statistics))
            return torch.cat([outcomes(task, *batch).double().cpu() for batch in task.batches()])


def _circuit(units: Iterable[Unit], widths: Mapping[str, int]) -> Circuit:
    chosen: dict[str, set[int]] = {layer: set() for layer in widths}
    for unit in units:
        chosen[unit.layer].add(unit.index)
    return Circuit({layer: tuple(sorted(indices)) for layer, indices in chosen.items()}, dict(widths))


def _instead(new: Tensor, true: Tensor) -> Tensor:
    return new


def _of(shares: Mapping[Pair, Tensor], edge: Connection) -> float:
    source, target = edge
    return float(shares[source.layer, target.layer][target.index, source.index])


def _but_one(group: Iterable[Unit], kept: Unit) -> list[Unit]:
    return [unit for unit in group if unit != kept]


def _problems(planted: Planted, found: Check) -> Iterable[str]:
    """What contradicts the truth, one sentence each."""
    tolerance, least = planted.tolerance, planted.least
    for what, share in {"unit": found.weakest_unit, "edge": found.weakest_edge}.items():
        if not share > least:
            yield f"the weakest {what} of the circuit changes {share:.2g} of the behaviour, not more than {least:g}"
    small = {
        "the strongest unit outside the circuit": found.stray_unit,
        "the strongest edge outside the circuit": found.stray_edge,
        "all units outside it": found.other_units,
        "all edges outside it": found.other_edges,
        "everything outside it": found.others,
        "all but one of a redundant group": found.spared,
    }
    for what, share in small.items():
        if not share <= tolerance:
            yield f"removing {what} changes {share:.2g} of the behaviour, more than {tolerance:g}"
