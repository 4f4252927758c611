"""Circuits of one part, found on plain images of it by one score or another, and the order in which edges are pruned.

Plain images show a single part; those of the other parts are the reference. No score sees a composite.

1. `CIRCUITS` choose units: the same share of each layer. ``anchored`` stands at the outputs whose pair holds the
   part (`Reading`) and protects what the other parts are recognised by; the ``cla`` ones maximise the attribution
   within the circuit; the others are controls.
2. Of the edges between these units those are pruned that *excite*: their signed contribution, on plain images of the
   part, is above 0. Whoever also prunes what inhibits sets units free, and destroys other answers with that.
3. `ORDERS` say which edge goes first.
4. `ROWS` name what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from viscircuits.ablation import Statistics, measure
from viscircuits.attribution import attribute
from viscircuits.circuit import Circuit
from viscircuits.experiments.edges import Masks
from viscircuits.experiments.pairs import Group
from viscircuits.experiments.training import Begun
from viscircuits.matrices import AttributionMatrix, Attributions
from viscircuits.methods import find
from viscircuits.models import ModelSpec
from viscircuits.selection import select
from viscircuits.task import Finding, make_task

INSIDE = "network."  # a reading holds the network under this name
STEPS_A_SIZE = 8  # of the published figures, whatever the default
Scores = Mapping[str, Float[Tensor, "target source"]]  # source layer → a number for each edge to the next


@dataclass(frozen=True)
class Row:
    """What is compared: a circuit, the order of its edges, and which edges those are.

    `edges` is ``exciting``, ``all``, or ``anywhere``: as many of the network's exciting edges, whatever units they
    join. `units` says whether removing the circuit's units is measured too. `size` is a share of each layer of its
    own, in place of the run's.
    """

    circuit: str
    order: str
    edges: str = "exciting"
    units: bool = False
    size: float | None = None

    @property
    def curve(self) -> bool:
        """Whether anything is measured between none and all of the edges."""
        return self.edges != "all"


OURS, CONTROL, PUBLISHED = "anchored", "activation difference", "CLA"
BEST = "activation difference, a tenth"  # of the units: the size at which it was best where sizes were chosen
ROWS = {
    OURS: Row("anchored", "contrast", units=True),
    PUBLISHED: Row("cla", "cla", units=True),
    "CLA difference": Row("cla-difference", "cla-difference", units=True),
    "CLA ratio": Row("cla-ratio", "cla-ratio", units=True),
    CONTROL: Row("activation-difference", "activation-difference", units=True),
    BEST: Row("activation-difference", "activation-difference", units=True, size=0.1),
    "activation": Row("activation", "activation", units=True),
    "weight norm": Row("weight-norm", "weight", units=True),
    "random units": Row("random", "random", units=True),
    "random edges": Row("anchored", "random", "anywhere"),
    "largest weights": Row("anchored", "weight", "anywhere"),
    "anchored, magnitude order": Row("anchored", "weight"),
    "anchored, all edges": Row("anchored", "contrast", "all"),
    "CLA, all edges": Row("cla", "cla", "all"),
    "activation difference, all edges": Row("activation-difference", "activation-difference", "all"),
}


@dataclass(frozen=True)
class Ranking:
    """Edges in the order in which they are to be pruned.

    Parameters
    ----------
    order
        Source layer → edges to the next layer as ``target · number of sources + source``, the first to go first.
    shapes
        Source layer → number of targets and sources.
    """

    order: Mapping[str, Int[Tensor, " edge"]]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def n_edges(self) -> int:
        """Edges of all layers."""
        return sum(len(edges) for edges in self.order.values())

    def masks(self, fraction: float) -> Masks:
        """The first of each pair of layers' edges."""
        found = {}
        for layer, order in self.order.items():
            mask = torch.zeros(self.shapes[layer], dtype=torch.bool)
            mask.view(-1)[order[: round(fraction * len(order))]] = True
            found[layer] = mask
        return found


class Reading(nn.Module):
    """For each part, the logarithm of the probability that the network's answer is a pair with it.

    It takes the *places* of images, as a tensor (image 1 1 1), and replays what precedes the layers of interest.

    Parameters
    ----------
    network
        Tells pairs.
    begun
        The images, as far as the network takes them before its layers of interest.
    pairs
        The parts of each of its outputs.
    """

    def __init__(self, network: nn.Module, begun: Begun, pairs: Sequence[Group]) -> None:
        super().__init__()
        self.network, self.begun = network, begun
        lacking = torch.full((1 + max(max(pair) for pair in pairs), len(pairs)), -torch.inf)
        for output, pair in enumerate(pairs):
            lacking[list(pair), output] = 0
        self.lacking = lacking  # (part, pair)

    def forward(self, places: Float[Tensor, "image 1 1 1"]) -> Float[Tensor, "image part"]:
        """Add up the probabilities of the pairs with each part."""
        with self.begun.replay(places.flatten().long()) as images:
            probabilities: Tensor = self.network(images).log_softmax(1)  # in logarithms
        return (probabilities[:, None] + self.lacking).logsumexp(2)


class Plain:
    """Plain images of every part, and what can be known of units and edges from them alone.

    Parameters
    ----------
    spec
        The network.
    layers
        The chain of layers that circuits lie in.
    pairs
        The parts of each output.
    begun
        Plain images, as many of each part, as far as the network takes them before the first of the layers.
    each
        How many of each part.
    size
        Units in a circuit, as a share of each layer.
    ablation
        What `anchored` looks at the removal by.
    weights
        Source layer → size of each edge's weights; None if it is not known.
    seed
        Of what is drawn.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: Sequence[str],
        pairs: Sequence[Group],
        begun: Begun,
        each: int,
        *,
        size: float,
        ablation: str = "zero",
        weights: Scores | None = None,
        seed: int = 0,
    ) -> None:
        self.layers, self.size, self.ablation, self.weights, self.seed = tuple(layers), size, ablation, weights, seed
        self.reading = Reading(spec.model, begun, pairs).eval()
        self.inside = [INSIDE + layer for layer in layers]
        n_parts = 1 + max(max(pair) for pair in pairs)
        self.places = torch.arange(n_parts * each, dtype=torch.float32).view(n_parts, each, 1, 1, 1)
        self.circuits: dict[tuple[int, str, float], Circuit] = {}

    @cached_property
    def attributions(self) -> list[Attributions]:
        """Cross-layer attribution of each part's images."""
        return [outside(attribute(self.reading, places, self.inside)) for places in self.places]

    @cached_property
    def measured(self) -> Statistics:
        """What units do on all parts' images, layers named as the reading names them."""
        return measure(self.reading, self.places.flatten(0, 1), self.inside, batch_size=50)

    @property
    def widths(self) -> dict[str, int]:
        """Number of units of each layer."""
        return {layer: len(values) for layer, values in self.attributions[0].activity.items()}

    def others(self, part: int) -> Attributions:
        """The mean attribution of all other parts."""
        mine, n = self.attributions[part], len(self.attributions) - 1
        matrices = tuple(
            AttributionMatrix(
                each.source, each.target,
                ((values - each.values) / n).clamp(min=0).float(), ((signed - each.signed) / n).float(),
            )
            for each, (values, signed) in zip(mine.matrices, self._totals, strict=True)
        )  # fmt: skip
        activity = {
            layer: torch.stack([each.activity[layer] for i, each in enumerate(self.attributions) if i != part]).mean(0)
            for layer in mine.layers
        }
        return Attributions(matrices, activity, n * mine.n_images)

    @cached_property
    def _totals(self) -> list[tuple[Tensor, Tensor]]:
        """Sums over all parts, in double precision, so that one part can be taken away again."""
        found = []
        for i in range(len(self.layers) - 1):
            mine = [each.matrices[i] for each in self.attributions]
            values, signed = mine[0].values.double(), mine[0].signed.double()
            for each in mine[1:]:
                values, signed = values + each.values, signed + each.signed
            found.append((values, signed))
        return found

    def contrasted(self, part: int, how: str) -> Attributions:
        """A part's attribution, set against the mean of the others'."""
        return replace(self.attributions[part], reference=self.others(part)).contrast(how)

    def raised(self, part: int) -> dict[str, Float[Tensor, " unit"]]:
        """How much more active units are on the part than on the others."""
        others = self.others(part).activity
        return {layer: mine - others[layer] for layer, mine in self.attributions[part].activity.items()}

    def circuit(self, part: int, method: str, size: float | None = None) -> Circuit:
        """The part's circuit, as `CIRCUITS` choose it, of the usual size or another."""
        key = part, method, size or self.size
        if key not in self.circuits:
            found = CIRCUITS[method](self, part, key[2])
            self.circuits[key] = Circuit(found.units, found.widths)  # edges by the thousand are not kept
        return self.circuits[key]

    def ranking(self, part: int, row: Row) -> Ranking:
        """The part's edges in the order in which a row prunes them."""
        circuit, scores, order = self.circuit(part, row.circuit, row.size), ORDERS[row.order](self, part), {}
        for matrix in self.attributions[part].matrices:
            layer, exciting = matrix.source, matrix.signed > 0
            inside = torch.zeros_like(exciting)
            targets, sources = (torch.tensor(circuit.units[each]) for each in (matrix.target, layer))
            inside[targets[:, None], sources] = True
            allowed = {"exciting": inside & exciting, "all": inside, "anywhere": exciting}[row.edges]
            n = int((inside & exciting).sum()) if row.edges == "anywhere" else int(allowed.sum())
            order[layer] = _largest_first(scores[layer].masked_fill(~allowed, -torch.inf).flatten(), n)
        return Ranking(order, {layer: (len(scores[layer]), scores[layer].shape[1]) for layer in order})

    def numbers(self, part: int, salt: int) -> torch.Generator:
        """A source of random numbers for a part."""
        return torch.Generator().manual_seed((self.seed * 1009 + part) * 10 + salt)


def _largest_first(scores: Float[Tensor, " edge"], n: int) -> Int[Tensor, " chosen"]:
    return scores.argsort(descending=True, stable=True)[:n]


def outside(found: Attributions) -> Attributions:
    """The same, with layers named as the network itself names them."""
    matrices = tuple(
        replace(each, source=each.source.removeprefix(INSIDE), target=each.target.removeprefix(INSIDE))
        for each in found.matrices
    )
    activity = {layer.removeprefix(INSIDE): values for layer, values in found.activity.items()}
    return Attributions(matrices, activity, found.n_images)


# ---------------------------------------------------------------- circuits


Choosing = Callable[["Plain", int, float], Circuit]  # of whose images, which part, which share of each layer


def _by_attribution(how: str, refine: str = "coordinate") -> Choosing:
    return lambda plain, part, size: select(plain.contrasted(part, how), size, refine=refine, bound_steps=0)


def _anchored(plain: Plain, part: int, size: float) -> Circuit:
    n_parts, each = plain.places.shape[:2]
    others = torch.tensor([i for i in range(n_parts) if i != part])
    task = make_task(
        plain.reading, plain.inside, plain.places[part], plain.places[others].flatten(0, 1),
        concept_labels=torch.full((each,), part), reference_labels=others.repeat_interleave(each),
        behaviour="margin", ablation=plain.ablation, statistics=plain.measured, batch_size=48, seed=plain.seed,
    )  # fmt: skip
    sizes = [size / 4, size / 2, size]
    found = find(task, "anchored", protect=1.0, sizes=sizes, steps_a_size=STEPS_A_SIZE, edges=False)
    return _cut(plain, {layer.removeprefix(INSIDE): scores for layer, scores in found.units.items()}, size)


def _by_weights(plain: Plain, part: int, size: float) -> Circuit:
    weights = _weights(plain, part)
    units = {target: weights[source].norm(dim=1) for source, target in pairwise(plain.layers)}
    return _cut(plain, {plain.layers[0]: weights[plain.layers[0]].norm(dim=0), **units}, size)


def _at_random(plain: Plain, part: int, size: float) -> Circuit:
    generator = plain.numbers(part, 0)
    return _cut(plain, {layer: torch.rand(width, generator=generator) for layer, width in plain.widths.items()}, size)


def _cut(plain: Plain, units: Mapping[str, Tensor], size: float) -> Circuit:
    """The best share of each layer."""
    scores = {layer: units[layer].double() for layer in plain.layers}
    return Finding("", scores, plain.widths).circuit(size)


CIRCUITS: dict[str, Choosing] = {
    "anchored": _anchored,
    "cla": _by_attribution("none", "paper"),  # as published, its search too
    "cla-difference": _by_attribution("difference"),
    "cla-ratio": _by_attribution("ratio"),
    "activation-difference": lambda plain, part, size: _cut(plain, plain.raised(part), size),
    "activation": lambda plain, part, size: _cut(plain, plain.attributions[part].activity, size),
    "weight-norm": _by_weights,
    "random": _at_random,
}


# ---------------------------------------------------------------- orders of edges


def _attributed(how: str) -> Callable[[Plain, int], Scores]:
    return lambda plain, part: {each.source: each.values for each in plain.contrasted(part, how).matrices}


def _contrast(plain: Plain, part: int) -> Scores:
    """What an edge brings its target on this part more than on the others, times how far the target is raised."""
    raised, others = plain.raised(part), plain.others(part)
    return {
        mine.source: (mine.signed - theirs.signed) * raised[mine.target].clamp(min=0)[:, None]
        for mine, theirs in zip(plain.attributions[part].matrices, others.matrices, strict=True)
    }


def _product(plain: Plain, units: Mapping[str, Tensor]) -> Scores:
    """The product of both ends."""
    ends = {layer: scores.clamp(min=0) for layer, scores in units.items()}
    return {source: ends[target][:, None] * ends[source] for source, target in pairwise(plain.layers)}


def _random(plain: Plain, part: int) -> Scores:
    generator, widths = plain.numbers(part, 1), plain.widths
    return {
        source: torch.rand(widths[target], widths[source], generator=generator)
        for source, target in pairwise(plain.layers)
    }


def _weights(plain: Plain, part: int) -> Scores:
    assert plain.weights is not None
    return plain.weights


ORDERS: dict[str, Callable[[Plain, int], Scores]] = {
    "contrast": _contrast,
    "cla": _attributed("none"),
    "cla-difference": _attributed("difference"),
    "cla-ratio": _attributed("ratio"),
    "activation-difference": lambda plain, part: _product(plain, plain.raised(part)),
    "activation": lambda plain, part: _product(plain, plain.attributions[part].activity),
    "weight": _weights,
    "random": _random,
}
