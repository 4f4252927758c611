"""Removing units step by step, and keeping account of what each of them does to a concept's answers and to others'.

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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import Tap, forward, record, rewrite
from viscircuits.layers import Layer, by_unit
from viscircuits.norms import AffineNorms
from viscircuits.prefix import Prefix
from viscircuits.scores.formulas import choose
from viscircuits.selection import largest
from viscircuits.task import Task, gradients, margin

SIZES = (0.01, 0.02, 0.05, 0.10)
STEPS_A_SIZE = 8
IMAGES_A_STEP = (16, 32)
CAUTION = 0.3
RAISED = 1.0  # standard deviations of the reference from which on an output is the concept's
IMAGES_FOR_EQUAL_WEIGHT = 64
LEAST_WEIGHT = 0.1  # of an image's own answer
MEMORY = 0.9  # of the running mean of effects, a step
ROUNDING = 1e-12  # of the largest score


@dataclass(frozen=True)
class Removal:
    """How units are removed; the parameters are those of `viscircuits.methods.anchored.anchored`."""

    protect: float = 1.0
    sizes: tuple[float, ...] = SIZES
    steps_a_size: int = STEPS_A_SIZE
    images_a_step: tuple[int, int] = IMAGES_A_STEP
    raise_weight: float | None = None
    caution: float = CAUTION
    answers: str = "concept"

    @property
    def options(self) -> dict[str, Any]:
        """Everything but `protect`, as a `Finding` keeps it."""
        kept = {**asdict(self), "sizes": list(self.sizes), "images_a_step": list(self.images_a_step)}
        del kept["protect"]
        return kept

    def checked(self, task: Task) -> Removal:
        """The same with the weight of the raise settled.

        Raises
        ------
        ViscircuitsError
            If a number makes no sense, or there is but one reference image.
        """
        for name, weight in (("protect", self.protect), ("caution", self.caution)):
            if not 0 <= weight < inf:
                raise ViscircuitsError(f"{name} is a weight of 0 or more, got {weight}")
        choose(ANSWERS, self.answers, "way to judge answers")
        if len(task.reference) < 2:
            raise ViscircuitsError("one reference image has no spread to set the concept against; give 2 or more")
        if not self.sizes or any(not 0 < a < b <= 1 for a, b in pairwise((1e-9, *self.sizes))):
            raise ViscircuitsError(
                f"sizes are shares of a layer, rising from above 0 to at most 1; got {list(self.sizes)}"
            )
        if self.steps_a_size < 1:
            raise ViscircuitsError(f"a size needs 1 step or more, got {self.steps_a_size}")
        if min(self.images_a_step) < 1:
            raise ViscircuitsError(f"a step needs 1 image or more of either kind, got {self.images_a_step}")
        if self.raise_weight is not None:
            return self
        return replace(self, raise_weight=max(1.0, (IMAGES_FOR_EQUAL_WEIGHT / len(task.concept)) ** 0.5))


@dataclass(frozen=True)
class Answers:
    """Which outputs are the concept's, how much each weighs, and how wide a usual margin is; None: each image's own."""

    weights: Float[Tensor, " output"] | None
    scale: float

    @classmethod
    def of(cls, concept: Tensor, reference: Tensor, labels: Tensor, reference_labels: Tensor) -> Answers:
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
                "nothing to protect; give a concept of fewer classes or answers='own', or ask what computes the "
                "answers: 'anchored' with protect=0"
            )
        return cls(weights / weights.sum(), _scale(reference, reference_labels))

    @classmethod
    def own(cls, concept: Tensor, reference: Tensor, labels: Tensor, reference_labels: Tensor) -> Answers:
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


ANSWERS = {"concept": Answers.of, "own": Answers.own}


class Removing:
    """Removes units step by step and keeps account of what each does to the anchor."""

    def __init__(self, task: Task, removal: Removal) -> None:
        self.task, self.removal = task, removal
        self.n_concept, self.n_reference = removal.images_a_step
        images = torch.cat([task.concept, task.reference])
        self.labels = torch.cat([task.concept_labels, task.reference_labels])
        self.generator = torch.Generator().manual_seed(task.seed)
        self.prefix = Prefix(task.spec.model, task.addresses, images, task.batch_size)
        task.passes.forward += len(images)  # what is replayed afterwards
        self.raised, outputs = self._look()
        n = len(task.concept)
        self.answers = ANSWERS[removal.answers](outputs[:n], outputs[n:], self.labels[:n], self.labels[n:])
        self.effects = {layer.address: torch.zeros(3, layer.n_units, dtype=torch.float64) for layer in task.layers}
        self.removed = {layer.address: torch.zeros(layer.n_units, dtype=torch.bool) for layer in task.layers}
        self.tier = {layer.address: torch.zeros(layer.n_units, dtype=torch.float64) for layer in task.layers}

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

    def walk(self, progress: bool) -> None:
        """Remove units step by step, from the first size to the last."""
        last, sizes, steps = 0.0, self.removal.sizes, self.removal.steps_a_size
        with tqdm(total=len(sizes) * steps, desc="removing", unit="step", delay=2, disable=not progress) as bar:
            for number, size in enumerate(sizes):
                kept_out = {layer: removed.clone() for layer, removed in self.removed.items()}
                for step in range(steps):
                    self._step(done=number * steps + step)
                    part = min(1.0, 2 * (step + 1) / steps)  # half of the steps are spent at the size itself
                    self._remove(last + part * (size - last), kept_out)
                    bar.update()
                for layer, removed in self.removed.items():
                    self.tier[layer] += removed
                last = size

    def ranks(self) -> dict[str, Tensor]:
        """After the walk: each unit's rank, the larger the sooner it was removed, with its score as the fraction."""
        return {layer: self.tier[layer] + _between_0_and_1(scores) for layer, scores in self._scores().items()}

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
        tapped = rewrite(task.spec.model, self._taps(gates))
        with self.prefix.replay(places) as images, torch.enable_grad(), AffineNorms(), tapped:
            outputs = forward(task.spec.model, images)
            concept = self.answers.of_concept(outputs[: len(mine)], self.labels[mine].to(outputs.device))
            reference = self.answers.of_reference(outputs[len(mine) :], self.labels[others].to(outputs.device))
        judged = concept.sum() + reference.sum()
        found = gradients(judged, gates)
        task.passes.forward += len(places)
        task.passes.backward += len(places)
        weight = (1 - MEMORY) / (1 - MEMORY ** (done + 1))  # a mean from the first step on
        for layer, gradient in found.items():
            each = gradient.double().cpu()
            now = (each[: len(mine)].mean(0), each[len(mine) :].mean(0), each[len(mine) :].square().mean(0))
            for mean, value in zip(self.effects[layer], now, strict=True):
                mean += weight * (value - mean)

    def _taps(self, gates: Mapping[str, Tensor]) -> dict[str, Tap]:
        def tap(layer: Layer) -> Tap:
            def gated(values: Tensor) -> Tensor:
                gate = _by_image(gates[layer.address], values, layer.unit_axis)
                return torch.lerp(self.task.baseline(layer, values), values, gate)

            return gated

        return {layer.address: tap(layer) for layer in self.task.layers}

    def effects_of_removal(self) -> dict[str, Tensor]:
        """Layer → what each unit does for the concept's answers less what it does for others', by the last steps."""
        found = {}
        for layer, (concept, reference, square) in self.effects.items():
            found[layer] = concept - self.removal.protect * (reference + self.removal.caution * square.sqrt())
        return found

    def _scores(self) -> dict[str, Tensor]:
        weight = self.removal.raise_weight or 0.0
        return {
            layer: standard(effects) + weight * standard(self.raised[layer])
            for layer, effects in self.effects_of_removal().items()
        }

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


def standard(scores: Tensor) -> Tensor:
    """Divided by their spread; all 0 where they do not differ by more than rounding."""
    spread = scores.std(correction=0)
    if spread <= ROUNDING * scores.abs().max():
        return torch.zeros_like(scores)
    return scores / spread


def _between_0_and_1(scores: Tensor) -> Tensor:
    """The same order within (0, 1)."""
    order = scores.argsort(stable=True).argsort(stable=True)
    return (order + 0.5) / len(scores)
