"""What a run of the hierarchy says, as numbers.

*Overlap* is the Jaccard index less its chance value, a matrix over concepts for each layer. *Hurt* is the logarithm of
the divergence that removing one concept's circuit causes on another's images, less what that circuit causes and those
images suffer in any case (`permuting.beyond`). Intervals are over concepts, tests permute them; every number draws
from a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from viscircuits.circuit import Circuit
from viscircuits.experiments.permuting import (
    Tested,
    beyond,
    concept_means,
    concepts_drawn,
    falling,
    holm,
    interval,
    mantel,
    own_more,
    pair_means,
    related_more,
)
from viscircuits.experiments.trees import Concept, distances, labels, siblings
from viscircuits.metrics import Interval, bootstrap, chance_jaccard

RANDOM = "random"
THIRDS = ("early", "middle", "late")
FALL = "early − late"
N_BOOTSTRAP = 2000
TINY = 1e-9  # nats, below which a divergence is none


@dataclass(frozen=True)
class Overlaps:
    """How far circuits of one method overlap.

    Parameters
    ----------
    jaccard
        Of each pair of concepts.
    chance
        Of two random circuits.
    itself
        Of each concept's circuit with the one from its other images.
    """

    jaccard: Float[Tensor, "layer concept concept"]
    chance: Float[Tensor, " layer"]
    itself: Float[Tensor, "layer concept"]

    @property
    def above(self) -> Float[Tensor, "layer concept concept"]:
        """Overlap of each pair, less chance."""
        return self.jaccard - self.chance[:, None, None]


@dataclass(frozen=True)
class Hurt:
    """What removing circuits of one method did.

    Parameters
    ----------
    own, others
        Mean divergence, in nats, on a circuit's own concept and on the others.
    times
        How many times more a concept's own removal hurts it than circuit and images let expect.
    p
        Of that, by permuting which circuit is whose.
    worst
        How many concepts are hurt most by the removal of their own circuit.
    by_distance
        Correlation of hurt with distance over pairs of different concepts.
    beyond
        Logarithm of the divergence, less what circuit and images add in any case.
    """

    own: float
    others: float
    times: Interval
    p: float
    worst: int
    by_distance: Tested
    beyond: Float[Tensor, "circuit concept"]


@dataclass(frozen=True)
class Shared:
    """Units that many circuits share: how many are in most, by thirds of the depth, in all, and by chance."""

    n: int
    thirds: tuple[int, ...]
    everywhere: int
    by_chance: float

    @property
    def p(self) -> float:
        """Probability of as many if each circuit's units are permuted within each layer: the tail of Poisson's law.

        Permuted, each unit is in a binomial number of circuits, so nothing need be drawn. That units displace each
        other in a circuit makes large numbers rarer still.
        """
        if not self.n:
            return 1.0
        # summed as such, a tail of some hundred units overflows
        n, mean = (torch.tensor(float(value), dtype=torch.float64) for value in (self.n, self.by_chance))
        return torch.special.gammainc(n, mean).item()


def overlaps_of(first: Sequence[Circuit], second: Sequence[Circuit]) -> Overlaps:
    """Overlaps of the circuits of several concepts, and of each with its own from other images."""
    jaccard, chance, itself = [], [], []
    for layer, width in first[0].widths.items():
        mine, others = (_holds(circuits, layer) for circuits in (first, second))
        jaccard.append(_jaccard(mine, mine))
        itself.append(_jaccard(mine, others).diag())
        size = len(first[0].units[layer])
        chance.append(chance_jaccard(width, size, size))
    return Overlaps(torch.stack(jaccard), torch.tensor(chance, dtype=torch.float64), torch.stack(itself))


def in_most_by_chance(widths: Mapping[str, int], sizes: Mapping[str, int], n: int, least: int) -> float:
    """How many units are in at least so many of `n` circuits, on average, if circuits are drawn independently."""
    found = 0.0
    for layer, width in widths.items():
        p = sizes[layer] / width
        found += width * math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(least, n + 1))
    return found


class Analysis:
    """Everything that is said of a run.

    Parameters
    ----------
    found
        ``circuits``, ``hurt``, ``backbone``, ``parts``, ``sizes`` and ``widths`` as `hierarchy` collects them.
    concepts
        The tree.
    n_permuted
        Permutations of each test.
    seed
        Of permutations and draws.
    """

    def __init__(self, found: Mapping[str, Any], concepts: Sequence[Concept], n_permuted: int, seed: int) -> None:
        self.found, self.concepts, self.n_permuted, self.seed = found, concepts, n_permuted, seed
        places = [concept.place for concept in concepts]
        self.names, self.distance, self.related = labels(places), distances(places), siblings(places)
        self.apart = ~torch.eye(len(places), dtype=torch.bool)
        circuits = found["circuits"]
        self.methods = [method for method in circuits["first"] if method != RANDOM]
        self.overlaps = {
            method: overlaps_of(circuits["first"][method], circuits["second"][method]) for method in circuits["first"]
        }
        self.layers = list(found["widths"])
        self.parts = list(found["parts"])
        self.later = self.parts[-1]

    # ---------------------------------------------------------------- overlap

    @cached_property
    def drawn(self) -> Float[Tensor, "draw concept"]:
        """Bootstrap draws of concepts, the same for every number."""
        return concepts_drawn(len(self.concepts), N_BOOTSTRAP, self._generator())

    @cached_property
    def curves(self) -> dict[str, dict[str, Float[Tensor, "draw layer"]]]:
        """Method → which pairs → mean overlap above chance at each layer, in each draw of concepts."""
        pairs = {"all pairs": self.apart, "related": self.related, "unrelated": self.apart & ~self.related}
        found = {}
        for method in self.methods:
            overlap = self.overlaps[method]
            found[method] = {kind: pair_means(overlap.above, which, self.drawn) for kind, which in pairs.items()}
            found[method]["itself"] = concept_means(overlap.itself - overlap.chance[:, None], self.drawn)
        return found

    def thirds(self, method: str, kind: str = "all pairs") -> dict[str, Interval]:
        """Mean overlap in each third of the depth, and in the first less that in the last."""
        return _with_fall([part.mean(1) for part in self.curves[method][kind].tensor_split(3, 1)])

    def of_itself(self, method: str) -> dict[str, Interval]:
        """Overlap of all pairs as a share of a circuit's overlap with itself, likewise."""
        kinds = (self.curves[method][kind].tensor_split(3, 1) for kind in ("all pairs", "itself"))
        return _with_fall([pair.mean(1) / own.mean(1) for pair, own in zip(*kinds, strict=True)])

    def fall(self, method: str) -> Tested:
        """Correlation of the mean overlap with the layer's number."""
        return falling(self.curves[method]["all pairs"][0], self.n_permuted, self._generator())

    @cached_property
    def kinship(self) -> dict[str, tuple[Interval, float]]:
        """Method → how much more related pairs overlap, over all layers: with an interval, and p by permutation."""
        found = {}
        for method in self.methods:
            curves = self.curves[method]
            tested = related_more(self.overlaps[method].above, self.related, self.n_permuted, self._generator())
            found[method] = interval((curves["related"] - curves["unrelated"]).mean(1)), tested.p
        return found

    @cached_property
    def by_distance(self) -> dict[str, list[Tested]]:
        """Method → at each layer the correlation of overlap with distance; p corrected for the number of layers."""
        return {method: self._by_distance(self.overlaps[method].jaccard) for method in self.methods}

    @cached_property
    def by_distance_alone(self) -> dict[str, list[Tested]]:
        """The same, less what each concept adds to all its overlaps: some circuits are steadier than others."""
        found = {}
        for method in self.methods:
            rest = torch.stack([beyond(each) for each in self.overlaps[method].jaccard])
            found[method] = self._by_distance(rest)
        return found

    def _by_distance(self, overlap: Float[Tensor, "layer concept concept"]) -> list[Tested]:
        tested = [mantel(each, self.distance, self.n_permuted, self._generator()) for each in overlap]
        return [Tested(each.value, p) for each, p in zip(tested, holm([each.p for each in tested]), strict=True)]

    # ---------------------------------------------------------------- removal

    @cached_property
    def hurt(self) -> dict[tuple[str, str], Hurt]:
        """(Part, method) → who is hurt by whom."""
        return {
            (part, method): self._hurt(torch.tensor(rows, dtype=torch.float64))
            for part, methods in self.found["hurt"].items()
            for method, rows in methods.items()
        }

    def beside_random(self, part: str, method: str) -> Interval:
        """How many times more circuits of a method hurt their own concept than random ones that were dealt to it."""
        mine, random = (self.hurt[part, which].beyond.diag() for which in (method, RANDOM))
        return self._times(mine - random)

    def _times(self, logarithms: Float[Tensor, " concept"]) -> Interval:
        found = bootstrap(_mean, logarithms, draws=N_BOOTSTRAP, generator=self._generator())
        return Interval(*(math.exp(each) for each in (found.value, found.low, found.high)))

    def _hurt(self, divergence: Float[Tensor, "circuit concept"]) -> Hurt:
        logarithm = divergence.clamp(min=TINY).log()
        rest = beyond(logarithm)
        return Hurt(
            float(divergence.diag().mean()),
            float(divergence[self.apart].mean()),
            self._times(rest.diag()),
            own_more(logarithm, self.n_permuted, self._generator()).p,
            int((logarithm.argmax(0) == torch.arange(len(logarithm))).sum()),
            mantel(rest, self.distance, self.n_permuted, self._generator()),
            rest,
        )

    # ---------------------------------------------------------------- backbone

    def shared(self, method: str) -> Shared:
        """How many units are in most circuits."""
        least, counts = self.found["backbone"]["least"], self.found["backbone"]["counts"][method]
        each = torch.tensor([sum(n >= least for n in counts[layer]) for layer in self.layers])
        everywhere = sum(n == len(self.concepts) for of_layer in counts.values() for n in of_layer)
        expected = in_most_by_chance(self.found["widths"], self.found["sizes"], len(self.concepts), least)
        return Shared(int(each.sum()), tuple(int(part.sum()) for part in each.tensor_split(3)), everywhere, expected)

    def removed(self, name: str, what: str) -> Float[Tensor, " concept"]:
        """Of each concept, what removing a set did: ``kl`` or ``same``; random sets averaged."""
        sets = [entry[what] for key, entry in self.found["backbone"]["removed"].items() if key.startswith(name)]
        return torch.tensor(sets, dtype=torch.float64).mean(0)

    def over_concepts(self, values: Float[Tensor, " concept"]) -> Interval:
        """Mean with an interval over concepts."""
        return interval(concept_means(values[None], self.drawn)[:, 0])

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _with_fall(parts: Sequence[Float[Tensor, " draw"]]) -> dict[str, Interval]:
    found = {third: interval(part) for third, part in zip(THIRDS, parts, strict=True)}
    return {**found, FALL: interval(parts[0] - parts[2])}


def _holds(circuits: Sequence[Circuit], layer: str) -> Bool[Tensor, "circuit unit"]:
    found = torch.zeros(len(circuits), circuits[0].widths[layer], dtype=torch.bool)
    for row, circuit in zip(found, circuits, strict=True):
        row[list(circuit.units[layer])] = True
    return found


def _jaccard(some: Bool[Tensor, "a unit"], others: Bool[Tensor, "b unit"]) -> Float[Tensor, "a b"]:
    shared = some.double() @ others.double().T
    return shared / (some.sum(1)[:, None] + others.sum(1) - shared)


def _mean(values: Tensor) -> float:
    return values.mean().item()
