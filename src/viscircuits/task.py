"""What a method is asked, and what it answers.

A `Task` is a network, the images that show a concept, images that do not, and the number by which the
network's behaviour on an image is judged. A method (`viscircuits.methods`) turns a task into a `Finding`:
one number for each unit and for each edge between adjacent layers, larger for what belongs to the circuit
sooner, and what it cost. `Finding.circuit` cuts a circuit of a given size from it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from viscircuits.ablation import Statistics, describe_layers, measure
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import evaluating, forward, frozen, record, rewrite
from viscircuits.layers import Layer, along_units
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores.formulas import choose
from viscircuits.selection import largest, units_per_layer

Behaviour = Callable[[Float[Tensor, "image output"], Int[Tensor, " image"]], Float[Tensor, " image"]]
Pair = tuple[str, str]  # source layer, target layer


def logit(outputs: Float[Tensor, "image output"], labels: Int[Tensor, " image"]) -> Float[Tensor, " image"]:
    """The label's own output."""
    return outputs.gather(1, labels.unsqueeze(1)).squeeze(1)


def log_probability(outputs: Float[Tensor, "image output"], labels: Int[Tensor, " image"]) -> Float[Tensor, " image"]:
    """Logarithm of the label's probability among all outputs, in nats."""
    return logit(outputs.log_softmax(1), labels)


def margin(outputs: Float[Tensor, "image output"], labels: Int[Tensor, " image"]) -> Float[Tensor, " image"]:
    """The label's output minus the largest of the others: above 0 where the answer is right."""
    others = outputs.scatter(1, labels.unsqueeze(1), -torch.inf)
    return logit(outputs, labels) - others.amax(1)


BEHAVIOURS: dict[str, Behaviour] = {"logit": logit, "log-probability": log_probability, "margin": margin}


@dataclass(frozen=True)
class Task:
    """What to explain, on which images; made by `make_task`.

    Parameters
    ----------
    spec
        The network.
    layers
        Its layers in execution order; edges run between adjacent ones.
    concept, reference
        Transformed images with and without the concept.
    concept_labels, reference_labels
        The output that each image is judged by.
    behaviour
        A name in `BEHAVIOURS`: what of that output is judged.
    ablation
        What a removed value becomes: ``zero`` or ``mean``, or what else `viscircuits.ablation` knows.
    statistics
        Of the reference, at the layers.
    """

    spec: ModelSpec
    layers: tuple[Layer, ...]
    concept: Float[Tensor, "image *axes"]
    concept_labels: Int[Tensor, " image"]
    reference: Float[Tensor, "other *sizes"]
    reference_labels: Int[Tensor, " other"]
    behaviour: str
    ablation: str
    statistics: Statistics
    batch_size: int = 16
    seed: int = 0
    passes: Passes = field(default_factory=lambda: Passes())

    @property
    def addresses(self) -> tuple[str, ...]:
        """Layer addresses in execution order."""
        return tuple(layer.address for layer in self.layers)

    @property
    def widths(self) -> dict[str, int]:
        """Layer address → number of units."""
        return {layer.address: layer.n_units for layer in self.layers}

    @property
    def pairs(self) -> list[tuple[Layer, Layer]]:
        """Adjacent layers: source and target of each pair."""
        return list(pairwise(self.layers))

    def judge(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The behaviour, one number for each image."""
        return choose(BEHAVIOURS, self.behaviour, "behaviour")(outputs, labels.to(outputs.device))

    def batches(self, which: str = "concept") -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of ``concept`` or ``reference``, a batch at a time."""
        images, labels = (
            (self.concept, self.concept_labels) if which == "concept" else (self.reference, self.reference_labels)
        )
        yield from zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)

    def baseline(self, layer: Layer, like: Tensor) -> Tensor:
        """What removed values of a layer become under ``zero`` or ``mean``, to broadcast against its output."""
        if self.ablation == "zero":
            return torch.zeros((), dtype=like.dtype, device=like.device)
        if self.ablation != "mean":
            raise ViscircuitsError(
                f"a gradient has no one direction towards {self.ablation!r} ablation; use 'zero' or 'mean'"
            )
        return along_units(self.statistics.mean[layer.address], like, layer.unit_axis)


@dataclass
class Passes:
    """What a method cost: images run forward and back, and seconds.

    A forward or backward pass that stops or starts in the middle of the network counts as a whole one.
    """

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0

    def add(self, others: Passes) -> None:
        """Count what others cost as well."""
        self.forward += others.forward
        self.backward += others.backward
        self.seconds += others.seconds


@dataclass(frozen=True)
class Finding:
    """One number for each unit and edge, larger for what belongs to the circuit sooner.

    Parameters
    ----------
    method
        Its name in `viscircuits.methods.METHODS`.
    units
        Layer → one score for each unit.
    edges
        (source layer, target layer) → scores, rows targets. Empty for a method that says nothing of edges.
    widths
        Layer → number of units, in execution order.
    passes
        What it cost.
    options
        What else it was given.
    share
        How `circuit` shares units out if it is not told: scores of different layers compare only in some methods.
    """

    method: str
    units: Mapping[str, Float[Tensor, " unit"]]
    widths: Mapping[str, int]
    edges: Mapping[Pair, Float[Tensor, "target source"]] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)
    options: Mapping[str, Any] = field(default_factory=dict)
    share: str = "per layer"

    def circuit(self, k: int | float | Mapping[str, int], *, share: str | None = None) -> Circuit:
        """The units with the highest scores, with the edges between chosen units of adjacent layers.

        A score is a size, so an edge's `signed` is its score: whether it excites or inhibits is not known.

        Parameters
        ----------
        k
            Units a layer: a number, a fraction of each layer's, or layer → number.
        share
            ``per layer``: each layer gives its own part. ``over all``: a fraction of the units of all layers
            together, wherever they lie; `k` is then that fraction, or the number in all. ``half``: as many in all as
            ``per layer``, of which each layer gives half of its part, rounded down, and the rest lie wherever scores
            are highest; a number for each layer is taken as it is. By default, what the method was made for.

        Raises
        ------
        ViscircuitsError
            If the size is not possible.
        """
        share = self.share if share is None else share
        sizes = choose(SHARES, share, "way to share units out")(self, k)
        units, scores = {}, {}
        for layer, size in sizes.items():
            of_layer = self.units[layer].double().cpu()
            chosen = largest(of_layer, size)
            units[layer] = tuple(chosen.tolist())
            if size:
                scores[layer] = tuple(of_layer[chosen].tolist())
        made = {"method": self.method, "options": dict(self.options), "passes": asdict(self.passes), "share": share}
        return Circuit(units, dict(self.widths), scores, self._edges(units), provenance=made)

    def _sizes_per_layer(self, k: int | float | Mapping[str, int]) -> dict[str, int]:
        return units_per_layer(self.widths, k)

    def _sizes_over_all(self, k: int | float | Mapping[str, int]) -> dict[str, int]:
        together = {"all layers": sum(self.widths.values())}
        if isinstance(k, Mapping):
            raise ViscircuitsError("a number for each layer is given; share units out 'per layer'")
        return self._wherever(units_per_layer(together, k)["all layers"], dict.fromkeys(self.widths, 0))

    def _sizes_half(self, k: int | float | Mapping[str, int]) -> dict[str, int]:
        if isinstance(k, Mapping):
            return self._sizes_per_layer(k)
        sizes = self._sizes_per_layer(k)
        return self._wherever(sum(sizes.values()), {layer: size // 2 for layer, size in sizes.items()})

    def _wherever(self, n: int, least: Mapping[str, int]) -> dict[str, int]:
        """Layer → its `least`, and how many of the units with the highest scores among all others, `n` in all."""
        places, scores = [], []
        for layer, of_layer in self.units.items():
            left = torch.ones(len(of_layer), dtype=torch.bool)
            left[largest(of_layer.double().cpu(), least[layer])] = False
            places += [layer] * int(left.sum())
            scores.append(of_layer.double().cpu()[left])
        more = Counter(places[i] for i in largest(torch.cat(scores), n - sum(least.values())).tolist())
        return {layer: least[layer] + more[layer] for layer in self.widths}

    def _edges(self, units: Mapping[str, tuple[int, ...]]) -> tuple[Edge, ...]:
        edges: list[Edge] = []
        for (source, target), scores in self.edges.items():
            pairs = [(scores[n, m].item(), m, n) for n in units[target] for m in units[source] if scores[n, m] != 0]
            for score, m, n in sorted(pairs, key=lambda each: -each[0]):
                edges.append(Edge(Unit(source, m), Unit(target, n), score, score))
        return tuple(edges)


SHARES: dict[str, Callable[[Finding, int | float | Mapping[str, int]], dict[str, int]]] = {
    "per layer": Finding._sizes_per_layer,
    "over all": Finding._sizes_over_all,
    "half": Finding._sizes_half,
}


@dataclass(frozen=True)
class Observed:
    """A batch run forward and back: values of layers, the behaviour, and its gradient in the values."""

    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    behaviour: Float[Tensor, " image"]


def make_task(
    model: nn.Module | ModelSpec,
    layers: Sequence[str],
    concept: Float[Tensor, "image *axes"],
    reference: Float[Tensor, "other *sizes"],
    *,
    concept_labels: Int[Tensor, " image"] | None = None,
    reference_labels: Int[Tensor, " other"] | None = None,
    behaviour: str = "logit",
    ablation: str = "mean",
    statistics: Statistics | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Task:
    """A task from images that are already transformed; without labels the network's own answers are the labels.

    Parameters
    ----------
    model, layers
        The network and the layers whose units can be in the circuit, in any order.
    concept, reference
        Images with and without the concept.
    concept_labels, reference_labels
        For each image the output it is judged by.
    behaviour
        ``logit``, ``log-probability`` or ``margin``.
    ablation
        What a removed value becomes.
    statistics
        What units do on the reference, if it was measured before.
    batch_size
        Images per pass.
    seed
        Of whatever a method draws.

    Raises
    ------
    LayerError
        If a layer does not exist or holds no units.
    ViscircuitsError
        If there are no images of either kind, or the behaviour is unknown.
    """
    spec = as_spec(model)
    choose(BEHAVIOURS, behaviour, "behaviour")
    if not (len(concept) and len(reference)):
        raise ViscircuitsError(f"a task needs images of both kinds, got {len(concept)} and {len(reference)}")
    chain = describe_layers(spec, concept[:1], layers)
    if statistics is None:
        statistics = measure(spec, reference, [layer.address for layer in chain], batch_size=batch_size)
    labels = [
        answers(spec, images, batch_size) if given is None else given
        for images, given in ((concept, concept_labels), (reference, reference_labels))
    ]
    return Task(
        spec, tuple(chain), concept, labels[0], reference, labels[1], behaviour, ablation, statistics, batch_size, seed
    )


def answers(spec: ModelSpec, images: Tensor, batch_size: int) -> Int[Tensor, " image"]:
    """The network's own answers: the largest output for each image."""
    with evaluating(spec.model), torch.no_grad():
        return torch.cat([forward(spec.model, batch).argmax(1).cpu() for batch in images.split(batch_size)])


def observe(
    task: Task,
    images: Tensor,
    labels: Tensor,
    *,
    replaced: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    judge: Behaviour | None = None,
) -> Observed:
    """Run a batch forward and back once: every layer's values, and the behaviour's gradient in them.

    Parameters
    ----------
    task, images, labels
        The task, and a batch of its images.
    replaced
        Layer → what its values become before the network goes on; the values recorded are the new ones.
    judge
        What is differentiated in place of the task's behaviour.
    """
    task.passes.forward += len(images)
    task.passes.backward += len(images)
    with torch.enable_grad(), rewrite(task.spec.model, replaced or {}), record(task.spec.model, task.addresses) as seen:
        judged = (judge or task.judge)(forward(task.spec.model, images), labels)
        values = dict(seen)
    slopes = gradients(judged.sum(), values)
    return Observed({layer: value.detach() for layer, value in values.items()}, slopes, judged.detach())


def gradients(judged: Float[Tensor, ""], values: Mapping[str, Tensor], *, keep: bool = False) -> dict[str, Tensor]:
    """Gradient of a number in each tensor, 0 where it does not depend on one; with `keep` the graph stays."""
    if not judged.requires_grad:  # on none at all
        return {name: torch.zeros_like(value) for name, value in values.items()}
    found = torch.autograd.grad(judged, list(values.values()), allow_unused=True, retain_graph=keep)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(values.items(), found, strict=True)
    }


def outcomes(
    task: Task, images: Tensor, labels: Tensor, replaced: Mapping[str, Callable[[Tensor], Tensor]] | None = None
) -> Float[Tensor, " image"]:
    """The behaviour on a batch, with layers' values replaced or without."""
    task.passes.forward += len(images)
    with torch.no_grad(), rewrite(task.spec.model, replaced or {}):
        return task.judge(forward(task.spec.model, images), labels)


@contextmanager
def costing(task: Task) -> Iterator[Task]:
    """The task with a fresh count of passes, timed; the network in evaluation mode and frozen meanwhile."""
    fresh = replace(task, passes=Passes())
    begun = time.perf_counter()
    with evaluating(task.spec.model), frozen(task.spec.model):
        yield fresh
    fresh.passes.seconds = time.perf_counter() - begun
