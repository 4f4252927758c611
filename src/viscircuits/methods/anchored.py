"""Ours: attribution anchored at what the network answers, along a path on which what is found is removed.

Two questions, one machine. `protect` says which.

**What computes this?** (``protect=0``) The behaviour on the concept's images is the anchor. Each unit's and edge's
first-order effect is averaged along three paths (`viscircuits.methods.patching.eap_ig`) and the sizes of the three
are added: from the mean reference image to the image; from what the ablation makes of a layer to its own values, one
layer at a time; and the same in all layers at once, which counts a tenth. The first two stay near what the network
computes. The third leaves it, and so finds copies that can stand in for one another, to which the others may be blind.

**What can be removed so that only this is lost?** (``protect`` above 0)

1. The *concept's answers*: outputs that the concept's images raise over the reference by more than one standard
   deviation, each weighed by how much more. They hold the answers of the images at hand and of their kin, so that
   what is found is the concept's and not those images'.
2. The anchor is the share of right answers, smoothed: ``σ(margin / τ)``, a margin being an output minus the largest
   output that does not belong to the concept (for a reference image: that is not its own). It falls for the
   concept's answers on the concept's images; ``protect`` times its fall on reference images counts against.
3. Units have gates, 1 for whole and 0 for removed. From step to step more units are removed, up to the last of
   `sizes`, a share of each layer. The derivative of the anchor in the gates, removed ones included, is averaged over
   steps, and the units that are removed are chosen anew.
4. To this effect is added how far the concept raises the unit at all, (mean on the concept − mean on the reference)
   / deviation on the reference, each divided by its spread over the layer's units. A handful of images leaves the
   effect uncertain, and the raise is known better: it stands where CLA has `|a_m|`.
5. Units are ranked by the size at which they were removed first, then by this sum.

Where its constants were set is told in docs/rivals.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import Tap, forward, record, rewrite
from viscircuits.layers import Layer, by_unit
from viscircuits.methods.patching import eap_ig
from viscircuits.prefix import Prefix
from viscircuits.scores.formulas import choose
from viscircuits.selection import largest
from viscircuits.task import Finding, Pair, Passes, Task, costing, margin

PATHS = {"inputs": 1.0, "activations": 1.0, "all": 0.1}
SIZES = (0.01, 0.02, 0.05, 0.10)
RAISED = 1.0  # standard deviations of the reference from which on an output is the concept's
IMAGES_FOR_EQUAL_WEIGHT = 64
LEAST_WEIGHT = 0.1  # of an image's own answer
MEMORY = 0.9  # of the running mean of effects, a step


def anchored(
    task: Task,
    *,
    protect: float = 0.0,
    steps: int = 5,
    sizes: Sequence[float] = SIZES,
    steps_a_size: int = 12,
    images_a_step: tuple[int, int] = (16, 32),
    raise_weight: float | None = None,
    caution: float = 0.3,
    answers: str = "concept",
    edges: bool = True,
    engine: str = "auto",
    progress: bool = False,
) -> Finding:
    """Size of what each unit and edge does to the concept's answers, averaged over a path of removal.

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    protect
        0: what computes the task's behaviour. Above 0: what can be removed so that the concept's answers fall and the
        reference images' own answers stand, these weighing `protect` times as much.
    steps
        Points on each path, where nothing is protected.
    sizes
        Shares of each layer that are removed one after the other, rising; nothing beyond the last is looked for.
    steps_a_size
        Steps on the way from one size to the next.
    images_a_step
        Concept and reference images that are drawn for a step.
    raise_weight
        Of how far the concept raises a unit, against its effect; 0 leaves the effect alone. By default √(64 / number
        of concept images), at least 1: the fewer they are, the less their effects say of others.
    caution
        Of a unit's effect on single reference images, as root mean square, what counts as harm beside the mean: the
        mean of many small effects either way is nothing, the harm of many such units together is not.
    answers
        Whose fall is looked for: the ``concept``'s, shared by its images; or each image's ``own`` label, where images
        have nothing in common but what makes the network answer so (words pasted on photographs).
    edges
        Score edges too, by their effect on the paths where nothing is protected.
    engine
        For edges: ``auto``, ``structured`` or ``loop``, as for `attribute`.
    progress
        Show a progress bar.

    Raises
    ------
    ViscircuitsError
        If an option makes no sense; or, where answers are to be protected, if there is but one reference image or
        every output of the network is an answer of the concept's images, so that none is left.

    References
    ----------
    Ours. Paths: Sundararajan et al. 2017, arXiv:1703.01365; Hanna et al. 2024, arXiv:2403.17806. Removing step
    by step while gates may reopen is iterative pruning (Mostafa and Wang 2019, arXiv:1902.05967).
    """
    if protect < 0:
        raise ViscircuitsError(f"protect is a weight of 0 or more, got {protect}")
    choose(ANSWERS, answers, "way to judge answers")
    options = {"protect": protect, "steps": steps, "edges": edges, "engine": engine}
    if not protect:
        return _explained(task, steps, edges, engine, options)
    _check_removal(task, sizes, steps_a_size, images_a_step)
    if raise_weight is None:
        raise_weight = max(1.0, (IMAGES_FOR_EQUAL_WEIGHT / len(task.concept)) ** 0.5)
    options |= {
        "sizes": list(sizes), "steps_a_size": steps_a_size, "images_a_step": list(images_a_step),
        "raise_weight": raise_weight, "caution": caution, "answers": answers,
    }  # fmt: skip
    with costing(task) as counted:
        removing = _Removing(counted, protect, images_a_step, raise_weight, caution, answers)
        ranks = removing.ranked(sizes, steps_a_size, progress)
    found: Mapping[Pair, Tensor] = {}
    if edges:
        explained = _explained(task, steps, True, engine, {})
        found = explained.edges
        counted.passes.add(explained.passes)
    return Finding("anchored", ranks, task.widths, found, counted.passes, options)


def _explained(task: Task, steps: int, edges: bool, engine: str, options: Mapping[str, Any]) -> Finding:
    """Sizes of effects along the three paths, added up."""
    units = {layer: torch.zeros(width, dtype=torch.float64) for layer, width in task.widths.items()}
    connections: dict[Pair, Tensor] = {}
    spent = Passes()
    for path, weight in PATHS.items():
        if path == "inputs" and task.concept.shape[1:] != task.reference.shape[1:]:
            continue  # no mean reference image lies on a path to the concept's
        found = eap_ig(task, path=path, steps=steps, edges=edges, engine=engine)
        for layer, scores in found.units.items():
            units[layer] += weight * scores
        for pair, scores in found.edges.items():
            connections[pair] = connections.get(pair, 0) + weight * scores
        spent.add(found.passes)
    return Finding("anchored", units, task.widths, connections, spent, options)


def _check_removal(task: Task, sizes: Sequence[float], steps_a_size: int, images_a_step: tuple[int, int]) -> None:
    if len(task.reference) < 2:
        raise ViscircuitsError("one reference image has no spread to set the concept against; give 2 or more")
    if not sizes or any(not 0 < a < b <= 1 for a, b in pairwise((1e-9, *sizes))):
        raise ViscircuitsError(f"sizes are shares of a layer, rising from above 0 to at most 1; got {list(sizes)}")
    if steps_a_size < 1:
        raise ViscircuitsError(f"a size needs 1 step or more, got {steps_a_size}")
    if min(images_a_step) < 1:
        raise ViscircuitsError(f"a step needs 1 image or more of either kind, got {images_a_step}")


@dataclass(frozen=True)
class _Answers:
    """Which outputs are the concept's, how much each weighs, and how wide a usual margin is; None: each image's own."""

    weights: Float[Tensor, " output"] | None
    scale: float

    @classmethod
    def of(cls, concept: Tensor, reference: Tensor, labels: Tensor, reference_labels: Tensor) -> _Answers:
        """From the outputs for both sets of images."""
        spread = reference.std(0).clamp(min=1e-6)
        raised = (concept.mean(0) - reference.mean(0)) / spread  # (output,)
        weights = (raised - RAISED).clamp(min=0)
        weights[labels] = weights[labels].clamp(min=LEAST_WEIGHT)
        if bool((weights > 0).all()):  # too few outputs to tell kin from the rest
            weights = torch.zeros_like(weights).index_fill_(0, labels, 1.0)
        if bool((weights > 0).all()):
            raise ViscircuitsError(
                f"every one of the network's {len(weights)} outputs is an answer of the concept's images, so there is "
                "nothing to protect; use protect=0, a concept of fewer classes, or answers='own'"
            )
        return cls(weights / weights.sum(), _scale(reference, reference_labels))

    @classmethod
    def own(cls, concept: Tensor, reference: Tensor, labels: Tensor, reference_labels: Tensor) -> _Answers:
        """Each image is judged by its own label."""
        return cls(None, _scale(reference, reference_labels))

    def of_concept(self, outputs: Float[Tensor, "image output"], labels: Tensor) -> Float[Tensor, " image"]:
        """How far the concept's answers, or each image's own, stand above all others, from 0 to 1."""
        if self.weights is None:
            return self.of_reference(outputs, labels)
        weights = self.weights.to(outputs)
        others = outputs.masked_fill(weights > 0, -torch.inf).amax(1, keepdim=True)
        return torch.sigmoid((outputs - others) / self.scale) @ weights

    def of_reference(self, outputs: Float[Tensor, "image output"], labels: Tensor) -> Float[Tensor, " image"]:
        """How far each image's own answer stands above all others, from 0 to 1."""
        return torch.sigmoid(margin(outputs, labels) / self.scale)


def _scale(reference: Tensor, labels: Tensor) -> float:
    """Half the usual margin of a reference image."""
    return max(margin(reference, labels).abs().median().item() / 2, 1e-6)


ANSWERS = {"concept": _Answers.of, "own": _Answers.own}


class _Removing:
    """Removes units step by step and keeps account of what each does to the anchor."""

    def __init__(
        self,
        task: Task,
        protect: float,
        images_a_step: tuple[int, int],
        raise_weight: float,
        caution: float,
        answers: str,
    ) -> None:
        self.task, self.protect, self.raise_weight, self.caution = task, protect, raise_weight, caution
        self.n_concept, self.n_reference = images_a_step
        images = torch.cat([task.concept, task.reference])
        self.labels = torch.cat([task.concept_labels, task.reference_labels])
        self.generator = torch.Generator().manual_seed(task.seed)
        self.prefix = Prefix(task.spec.model, task.addresses, images, task.batch_size)
        task.passes.forward += len(images)  # what is replayed afterwards
        self.raised, outputs = self._look()
        n = len(task.concept)
        self.answers = ANSWERS[answers](outputs[:n], outputs[n:], self.labels[:n], self.labels[n:])
        self.effects = {layer.address: torch.zeros(3, layer.n_units, dtype=torch.float64) for layer in task.layers}
        self.removed = {layer.address: torch.zeros(layer.n_units, dtype=torch.bool) for layer in task.layers}

    def _look(self) -> tuple[dict[str, Tensor], Tensor]:
        """How far the concept raises each unit, in deviations of the reference; and all outputs."""
        task, outputs = self.task, []
        levels: dict[str, list[Tensor]] = {layer: [] for layer in task.addresses}
        for places in torch.arange(len(self.labels)).split(task.batch_size):
            with (
                self.prefix.replay(places) as images,
                torch.no_grad(),
                record(task.spec.model, task.addresses) as values,
            ):
                outputs.append(forward(task.spec.model, images).float().cpu())
                task.passes.forward += len(images)
            for layer in task.layers:
                levels[layer.address].append(by_unit(values[layer.address], layer.unit_axis).mean(2).double().cpu())
        raised = {}
        for address, parts in levels.items():
            level, n = torch.cat(parts), len(task.concept)
            spread = level[n:].std(0, correction=0)
            raised[address] = (level[:n].mean(0) - level[n:].mean(0)) / (spread + 0.1 * spread.mean()).clamp(min=1e-12)
        return raised, torch.cat(outputs)

    def ranked(self, sizes: Sequence[float], steps: int, progress: bool) -> dict[str, Tensor]:
        """Each unit's rank, the larger the sooner it is removed, with its score as the fraction."""
        last = 0.0
        tier = {layer: torch.zeros(len(removed), dtype=torch.float64) for layer, removed in self.removed.items()}
        with tqdm(total=len(sizes) * steps, desc="removing", unit="step", delay=2, disable=not progress) as bar:
            for number, size in enumerate(sizes):
                kept_out = {layer: removed.clone() for layer, removed in self.removed.items()}
                for step in range(steps):
                    self._step(done=number * steps + step)
                    part = min(1.0, 2 * (step + 1) / steps)  # half of the steps are spent at the size itself
                    self._remove(last + part * (size - last), kept_out)
                    bar.update()
                for layer, removed in self.removed.items():
                    tier[layer] += removed
                last = size
        return {layer: tier[layer] + _between_0_and_1(scores) for layer, scores in self._scores().items()}

    def _step(self, done: int) -> None:
        """One batch: the running mean of effects moves towards its derivatives in the gates."""
        task, n = self.task, len(self.task.concept)
        mine = torch.randperm(n, generator=self.generator)[: self.n_concept]
        others = n + torch.randperm(len(task.reference), generator=self.generator)[: self.n_reference]
        places = torch.cat([mine, others])
        gates = {
            layer: (~removed).float().expand(len(places), -1).clone().requires_grad_()
            for layer, removed in self.removed.items()
        }  # (image, unit): images do not see one another, so each has its own derivative
        with self.prefix.replay(places) as images, torch.enable_grad(), rewrite(task.spec.model, self._taps(gates)):
            outputs = forward(task.spec.model, images)
            concept = self.answers.of_concept(outputs[: len(mine)], self.labels[mine].to(outputs.device))
            reference = self.answers.of_reference(outputs[len(mine) :], self.labels[others].to(outputs.device))
        judged = concept.sum() + reference.sum()
        found: Sequence[Tensor | None] = torch.autograd.grad(judged, list(gates.values()), allow_unused=True)
        task.passes.forward += len(places)
        task.passes.backward += len(places)
        weight = (1 - MEMORY) / (1 - MEMORY ** (done + 1))  # a mean from the first step on
        for layer, gradient in zip(gates, found, strict=True):
            if gradient is None:
                continue
            each = gradient.double().cpu()
            now = (each[: len(mine)].mean(0), each[len(mine) :].mean(0), each[len(mine) :].square().mean(0))
            for mean, value in zip(self.effects[layer], now, strict=True):
                mean += weight * (value - mean)

    def _taps(self, gates: Mapping[str, Tensor]) -> dict[str, Tap]:
        def tap(layer: Layer) -> Tap:
            def gated(values: Tensor) -> Tensor:
                start = self.task.baseline(layer, values)
                return start + _by_image(gates[layer.address], values, layer.unit_axis) * (values - start)

            return gated

        return {layer.address: tap(layer) for layer in self.task.layers}

    def _scores(self) -> dict[str, Tensor]:
        scores = {}
        for layer, (concept, reference, square) in self.effects.items():
            harm = reference + self.caution * square.sqrt()
            scores[layer] = _standard(concept - self.protect * harm) + self.raise_weight * _standard(self.raised[layer])
        return scores

    def _remove(self, share: float, kept_out: Mapping[str, Tensor]) -> None:
        """Choose anew the units that are removed, but for those of an earlier size."""
        for layer, scores in self._scores().items():
            n = max(1, int(share * len(scores) + 0.5))
            chosen = largest(scores.masked_fill(kept_out[layer], torch.inf), max(n, int(kept_out[layer].sum())))
            self.removed[layer] = torch.zeros_like(kept_out[layer]).index_fill_(0, chosen, True)


def _by_image(gates: Tensor, like: Tensor, unit_axis: int) -> Tensor:
    """(image, unit) shaped so that it broadcasts against a layer's output."""
    shape = [len(gates), *([1] * (like.ndim - 1))]
    shape[unit_axis] = gates.shape[1]
    return gates.to(like).reshape(shape)


def _standard(scores: Tensor) -> Tensor:
    return scores / scores.std(correction=0).clamp(min=1e-12)


def _between_0_and_1(scores: Tensor) -> Tensor:
    """The same order within (0, 1)."""
    order = scores.argsort(stable=True).argsort(stable=True)
    return (order + 0.5) / len(scores)
