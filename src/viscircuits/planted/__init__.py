"""Networks whose circuit is known: what a method that finds circuits is tried on.

1. A `Planted` is a network, the images that show its concept and images that do not, and the truth: which
   units, and which edges between adjacent layers, the concept's output depends on under a stated ablation.
2. `PLANTED` lists them by name. To add one, write a builder that takes a seed and enter it there.
3. The truth is never taken on trust: `viscircuits.planted.checks.check` removes every unit and edge, alone
   and together, and says what that changes.

Builders are imported when they are first called.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.scores.formulas import choose
from viscircuits.task import Pair, Task, make_task


@dataclass(frozen=True)
class Planted:
    """A network with a known circuit, and the images to find it with.

    Parameters
    ----------
    name
        As in `PLANTED`.
    family
        How it was made: ``hand-wired``, ``merged``, ``merged with cross-talk``, ``trained`` or ``merged ViT``.
    model
        The network, in evaluation mode.
    layers
        Its layers in execution order.
    concept, reference
        Images that show the concept and images that do not, as the network takes them, for discovery.
    concept_labels, reference_labels
        The output that each image is judged by.
    test_concept, test_reference, test_concept_labels, test_reference_labels
        The same from another seed, held out.
    units
        Layer → True for each unit that belongs to the circuit.
    edges
        (source, target), adjacent layers → True for each edge that does, rows targets.
    behaviour, ablation
        What is judged, and what a removed value becomes: the truth holds for these.
    redundant
        Groups of units that do the same job so that one alone suffices: removing one of them changes nothing,
        removing the whole group does.
    tolerance
        Largest share of the behaviour that may change with what is not in the circuit.
    least
        Smallest share of it that must change with each unit and edge that is.
    note
        What this one is for, in a sentence.
    options
        What the builder was given, the seed among it.
    names
        Layer → what each unit is, where that can be said.
    """

    name: str
    family: str
    model: nn.Module
    layers: tuple[str, ...]
    concept: Float[Tensor, "image *axes"]
    concept_labels: Int[Tensor, " image"]
    reference: Float[Tensor, "other *axes"]
    reference_labels: Int[Tensor, " other"]
    test_concept: Float[Tensor, "held *axes"]
    test_concept_labels: Int[Tensor, " held"]
    test_reference: Float[Tensor, "spare *axes"]
    test_reference_labels: Int[Tensor, " spare"]
    units: Mapping[str, Bool[Tensor, " unit"]]
    edges: Mapping[Pair, Bool[Tensor, "target source"]]
    behaviour: str = "logit"
    ablation: str = "mean"
    redundant: tuple[tuple[Unit, ...], ...] = ()
    tolerance: float = 1e-5
    least: float = 1e-2
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.units) != set(self.layers):
            raise ViscircuitsError(
                f"{self.name!r} states units of {', '.join(self.units)}; its layers are {', '.join(self.layers)}"
            )
        for source, target in self.edges:
            if (source, target) not in set(pairwise(self.layers)):
                raise ViscircuitsError(f"{self.name!r} states edges from {source!r} to {target!r}, not adjacent layers")
        for (source, target), true in self.edges.items():
            if true.shape != (len(self.units[target]), len(self.units[source])):
                raise ViscircuitsError(
                    f"edges from {source!r} to {target!r} of {self.name!r} have shape {tuple(true.shape)}; "
                    f"the layers have {len(self.units[source])} and {len(self.units[target])} units"
                )
            if bool((true & ~(self.units[target][:, None] & self.units[source])).any()):
                raise ViscircuitsError(f"a true edge of {self.name!r} from {source!r} to {target!r} joins a false unit")
        outside = [unit for group in self.redundant for unit in group if not self.units[unit.layer][unit.index]]
        if outside:
            raise ViscircuitsError(f"{outside[0]} of {self.name!r} is named redundant but is not a unit of the circuit")

    @property
    def widths(self) -> dict[str, int]:
        """Layer → number of units, in execution order."""
        return {layer: len(self.units[layer]) for layer in self.layers}

    def task(self, **options: Any) -> Task:
        """The discovery images as a task, under the behaviour and ablation for which the truth is stated.

        Parameters
        ----------
        options
            As for `make_task`; they come before what is stated here.
        """
        return self._task(self.concept, self.reference, self.concept_labels, self.reference_labels, options)

    def held_out(self, **options: Any) -> Task:
        """The test images as a task: to judge a circuit with; options as for `task`."""
        return self._task(
            self.test_concept, self.test_reference, self.test_concept_labels, self.test_reference_labels, options
        )

    def _task(self, concept: Tensor, reference: Tensor, label: Tensor, other: Tensor, options: Mapping) -> Task:
        stated = {"behaviour": self.behaviour, "ablation": self.ablation}
        labels = {"concept_labels": label, "reference_labels": other}
        return make_task(self.model, self.layers, concept, reference, **{**labels, **stated, **options})

    def truth(self) -> Circuit:
        """The circuit itself."""
        units = {layer: tuple(self.units[layer].nonzero().flatten().tolist()) for layer in self.layers}
        edges = tuple(Edge(source, target, 1.0, 1.0) for source, target in self.true_edges())
        made = {"planted": self.name, "family": self.family, "options": dict(self.options)}
        return Circuit(units, self.widths, edges=edges, provenance=made)

    def true_edges(self) -> Iterator[tuple[Unit, Unit]]:
        """Source and target of each true edge."""
        for (source, target), true in self.edges.items():
            yield from ((Unit(source, m), Unit(target, n)) for n, m in true.nonzero().tolist())

    def false_edges(self) -> Iterator[tuple[Unit, Unit]]:
        """Source and target of each edge that is not in the circuit."""
        for (source, target), true in self.edges.items():
            yield from ((Unit(source, m), Unit(target, n)) for n, m in (~true).nonzero().tolist())


@dataclass(frozen=True)
class Builder:
    """A function in a file of this package that makes a `Planted`, imported when it is called.

    Parameters
    ----------
    family
        As in `Planted`.
    room, function
        File and function: ``function(seed, **options) -> Planted``.
    options
        What is passed to it each time.
    """

    family: str
    room: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int = 0, **options: Any) -> Planted:
        """The planted network of this seed."""
        build = getattr(importlib.import_module(f"viscircuits.planted.{self.room}"), self.function)
        return build(seed, **{**self.options, **options})


CROSS = "merged with cross-talk"
ALL_PARTS = ("letters", "gratings", "colours")

PLANTED: dict[str, Builder] = {
    "circle": Builder("hand-wired", "wired", "circle"),
    "conjunction": Builder("hand-wired", "wired", "conjunction"),
    "branches": Builder("hand-wired", "wired", "branches"),
    "residual": Builder("hand-wired", "wired", "residual"),
    "decoy": Builder("hand-wired", "wired", "decoy"),
    "copies": Builder("hand-wired", "wired", "copies"),
    "spare": Builder("hand-wired", "wired", "spare"),
    "suppressor": Builder("hand-wired", "wired", "suppressor"),
    "two-networks": Builder("merged", "merged", "merged"),
    "three-networks": Builder("merged", "merged", "merged", {"name": "three-networks", "parts": ALL_PARTS}),
    "cross-talk-weak": Builder(CROSS, "merged", "merged", {"name": "cross-talk-weak", "cross_talk": 0.03}),
    "cross-talk-middle": Builder(CROSS, "merged", "merged", {"name": "cross-talk-middle", "cross_talk": 0.1}),
    "cross-talk-strong": Builder(CROSS, "merged", "merged", {"name": "cross-talk-strong", "cross_talk": 0.3}),
    "trained-and": Builder("trained", "trained", "trained"),
    "trained-xor": Builder("trained", "trained", "trained", {"rule": "xor"}),
    "two-transformers": Builder("merged ViT", "vit", "merged_transformers"),
}
"""The registry. A builder put here is checked by the contract tests and run by the fidelity benchmark."""


def plant(name: str, seed: int = 0, **options: Any) -> Planted:
    """The planted network of this name.

    Parameters
    ----------
    name
        A name in `PLANTED`.
    seed
        Another seed gives other images, another order of units and other units around the circuit.
    options
        Of the builder, such as how many units lie around the circuit.

    Raises
    ------
    ViscircuitsError
        If there is none of this name.
    """
    return choose(PLANTED, name, "planted network")(seed, **options)


def families() -> dict[str, tuple[str, ...]]:
    """Family → the names of its planted networks."""
    found: dict[str, tuple[str, ...]] = {}
    for name, builder in PLANTED.items():
        found[builder.family] = (*found.get(builder.family, ()), name)
    return found
