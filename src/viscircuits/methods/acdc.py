"""ACDC: take one connection after another out of the network, from the output back, while it makes no difference.

1. Order the layers from the last to the first. In each, first what its units reach other than through the
   next layer (the output, for the last one), then the edges into its units.
2. A connection stays removed if that increases the distance between the outputs of the network left and
   those of the whole one by less than the threshold.
3. One threshold gives one circuit. A ranking comes from a ladder of them, each run starting from the whole
   network again: what is still kept at a larger threshold comes sooner.

No pass is spent on what cannot matter: an edge into a unit that nothing reads any more, a source that is
on every image exactly what removal would make of it, a network that an earlier threshold has already
tried. What is left after that is decided by running it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.errors import ViscircuitsError
from viscircuits.methods.wiring import Wiring, best_leaving
from viscircuits.scores.formulas import choose
from viscircuits.task import Finding, Task, costing

LADDER = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # shares of the distance that removing everything makes

ONWARD = -1
Connection = tuple[int, int, int]  # place of the source's layer, source, target or `ONWARD`
Costs = tuple[dict[int, Tensor], dict[int, Tensor]]  # place of the source's layer → of edges, of units onward


def acdc(
    task: Task,
    *,
    thresholds: Sequence[float] = LADDER,
    relative: bool = True,
    metric: str = "kl",
    edges: bool = True,
    rank: str = "effect",
    order: str = "weakest",
) -> Finding:
    """Largest threshold at which greedy removal from the output back keeps each edge and unit; 0: at none.

    An edge is removed if ``D(H without it) − D(H) < τ``, where H is the network left so far and D the mean
    over the concept's images of ``KL(whole network ‖ H)``, or of the absolute change of the behaviour. A unit's
    score is that of the best connection that leaves it.

    Parameters
    ----------
    task
        Ablated with ``zero`` or ``mean``.
    thresholds
        The τ to try. One of them gives the published algorithm.
    relative
        Thresholds are shares of the distance at which everything is removed, as the size of a behaviour
        differs from network to network; else nats, or units of the behaviour.
    metric
        ``kl`` (of all outputs: what matters to another output is kept too) or ``behaviour``. A network with
        one output is judged by its behaviour.
    edges
        Remove edges. Without, remove whole units: one pass over the images for each unit and threshold.
    rank
        ``effect``: those that go at the same threshold are told apart by what their removal would have cost at
        the last threshold that kept them; with one threshold that cost is the score. ``threshold``: they tie.
    order
        ``weakest``: in each layer the units first that removal would move least, so that the result does not
        depend on how units are numbered; ``index``: as they are numbered. The paper leaves this open.

    Raises
    ------
    ViscircuitsError
        If a threshold is not above 0, an option is unknown, or removing everything changes nothing.

    References
    ----------
    Conmy et al. 2023, arXiv:2304.14997.
    """
    choose(RANKS, rank, "rank")
    choose(ORDERS, order, "order")
    if not thresholds or min(thresholds) <= 0:
        raise ViscircuitsError(f"ACDC needs thresholds above 0, got {tuple(thresholds)}")
    options: dict[str, Any] = {
        "thresholds": [float(each) for each in thresholds],
        "relative": relative,
        "metric": metric,
        "edges": edges,
        "rank": rank,
        "order": order,
    }
    with costing(task) as counted, torch.no_grad():
        wiring = Wiring(counted, metric)
        scale = wiring.empty if relative else 1.0
        search = Search(wiring, [ORDERS[order](wiring.displacement(i)) for i in range(len(task.layers))], edges)
        ladder = sorted(options["thresholds"])
        costs = [search.run(threshold * scale) for threshold in ladder]
        of_edges, onward = (
            {i: RANKS[rank](ladder, [kind[i] / scale for kind in kinds]) for i in kinds[0]}
            for kinds in zip(*costs, strict=True)
        )
    units = {layer.address: best_leaving(i, of_edges, onward) for i, layer in enumerate(task.layers)}
    between = {(task.addresses[i], task.addresses[i + 1]): scores.float() for i, scores in of_edges.items()}
    return Finding("acdc", units, task.widths, between, counted.passes, options)


def acdc_behaviour(task: Task, **options: Any) -> Finding:
    """`acdc` that judges by the task's behaviour, so that what only matters to other outputs goes."""
    return replace(acdc(task, **{"metric": "behaviour", **options}), method="acdc-behaviour")


# ------------------------------------------------------------------ the search


@dataclass
class State:
    """The network left: its gates, its distance from the whole one, and what is worked out of one layer.

    `costs` are 0 where a connection is removed, and else what removing it would have added to the distance.
    """

    edges: dict[int, Tensor]
    onward: dict[int, Tensor]
    costs: Costs
    distance: float = 0.0
    removed: int = 0  # a bit for each connection
    values: list[Tensor] = field(default_factory=list)  # of the layer whose incoming edges are tried, for each batch
    stale: set[int] = field(default_factory=set)  # units of it whose values are not worked out


class Search:
    """Greedy removal on one network, for several thresholds; what was run once is not run again."""

    def __init__(self, wiring: Wiring, order: Sequence[list[int]], by_edges: bool) -> None:
        self.wiring, self.order, self.by_edges = wiring, order, by_edges
        self.last = len(wiring.layers) - 1
        self.moved = [wiring.displacement(i) > 0 for i in range(self.last + 1)]
        self.distances: dict[int, float] = {}  # connections removed, as bits → distance
        self.bits = {connection: 1 << n for n, connection in enumerate(self.connections())}

    def connections(self) -> Iterator[Connection]:
        """Every connection, from the output back."""
        for i in range(self.last, -1, -1):
            if not self.by_edges or i in self.wiring.around:
                yield from ((i, m, ONWARD) for m in self.order[i])
            if self.by_edges and i:
                yield from ((i - 1, m, n) for n in self.order[i] for m in self.order[i - 1])

    def run(self, threshold: float) -> Costs:
        """Remove every connection whose removal adds less than this to the distance."""
        state = self._start()
        layer = -1
        for connection, bit in self.bits.items():
            i, m, n = connection
            if n != ONWARD and i != layer:
                layer, state.values, state.stale = i, [batch.values[i + 1] for batch in self.wiring.batches], set()
            if not self._can_matter(connection, state):
                self._remove(connection, state)
                continue
            values, distance = self._try(connection, bit, state)
            cost = distance - state.distance
            if cost >= threshold:
                (state.costs[1][i] if n == ONWARD else state.costs[0][i][n])[m] = cost
                continue
            self._remove(connection, state)
            state.distance, state.removed = distance, state.removed | bit
            if values:
                state.values = values
            elif n != ONWARD:
                state.stale.add(n)
        return state.costs

    def _start(self) -> State:
        widths = [layer.n_units for layer in self.wiring.layers]
        pairs = range(self.last) if self.by_edges else ()
        ends = [i for i in range(self.last + 1) if not self.by_edges or i in self.wiring.around]
        edges, costs = (({i: make(widths[i + 1], widths[i]) for i in pairs}) for make in (torch.ones, torch.zeros))
        onward, ends_costs = ({i: make(widths[i]) for i in ends} for make in (torch.ones, torch.zeros))
        return State(edges, onward, (costs, ends_costs))

    def _can_matter(self, connection: Connection, state: State) -> bool:
        i, m, n = connection
        if not self.moved[i][m]:
            return False
        return n == ONWARD or bool(self.wiring.read(i + 1, state.edges, state.onward)[n])

    @staticmethod
    def _remove(connection: Connection, state: State) -> None:
        i, m, n = connection
        (state.onward[i] if n == ONWARD else state.edges[i][n])[m] = 0

    def _try(self, connection: Connection, bit: int, state: State) -> tuple[list[Tensor], float]:
        """What the target layer and the distance would be; no values where the distance is known already."""
        tried = state.removed | bit
        values: list[Tensor] = []
        if tried not in self.distances:
            i, m, n = connection
            if n == ONWARD:
                onward = {**state.onward, i: state.onward[i].index_fill(0, torch.tensor([m]), 0)}
                edges = {j: gates for j, gates in state.edges.items() if j >= i}
                self.distances[tried] = float(self.wiring.distance(edges, onward))
            else:
                values, self.distances[tried] = self._try_edge(connection, state)
        return values, self.distances[tried]

    def _try_edge(self, connection: Connection, state: State) -> tuple[list[Tensor], float]:
        i, m, n = connection
        self._refresh(i, state)
        row = state.edges[i][n : n + 1].index_fill(1, torch.tensor([m]), 0)
        values = [
            self._with(i, before, [n], self.wiring.recompute(batch, i, row, {}, {}))
            for batch, before in zip(self.wiring.batches, state.values, strict=True)
        ]
        if all(torch.equal(now, before) for now, before in zip(values, state.values, strict=True)):
            return values, state.distance
        later = {j: gates for j, gates in state.edges.items() if j > i}
        total = sum(
            float(self.wiring.distances(batch, later, state.onward, {i + 1: now}).sum())
            for batch, now in zip(self.wiring.batches, values, strict=True)
        )
        return values, total / sum(len(batch.images) for batch in self.wiring.batches)

    def _refresh(self, i: int, state: State) -> None:
        """Work out the units that lost a source in a network tried before."""
        if not state.stale:
            return
        units = sorted(state.stale)
        state.values = [
            self._with(i, before, units, self.wiring.recompute(batch, i, state.edges[i][units], {}, {}))
            for batch, before in zip(self.wiring.batches, state.values, strict=True)
        ]
        state.stale = set()

    def _with(
        self, i: int, values: Float[Tensor, "image *axes"], units: Sequence[int], sets: Float[Tensor, "set image *axes"]
    ) -> Float[Tensor, "image *axes"]:
        """Values of layer `i + 1` with each of these units as in its own set."""
        axis = self.wiring.layers[i + 1].unit_axis
        new = values.clone()
        for unit, recomputed in zip(units, sets, strict=True):
            new.select(axis, unit).copy_(recomputed.select(axis, unit))
        return new


# ------------------------------------------------------------------ from runs to a ranking


def _weakest(displacement: Float[Tensor, " unit"]) -> list[int]:
    return displacement.argsort(stable=True).tolist()


def _index(displacement: Float[Tensor, " unit"]) -> list[int]:
    return list(range(len(displacement)))


def _effect(ladder: Sequence[float], costs: Sequence[Tensor]) -> Tensor:
    """The last threshold τ that kept it, and on the way to the next one, τ′: ``τ + (τ′ − τ)(1 − τ / cost of removal)``.

    Beyond the largest threshold there is nothing to be told apart from: the cost itself.
    """
    score = torch.zeros_like(costs[0])
    for cost, threshold, following in zip(costs[:-1], ladder, ladder[1:], strict=False):
        score = torch.where(cost > 0, threshold + (following - threshold) * (1 - threshold / cost), score)
    return torch.where(costs[-1] > 0, costs[-1], score)


def _threshold(ladder: Sequence[float], costs: Sequence[Tensor]) -> Tensor:
    score = torch.zeros_like(costs[0])
    for cost, threshold in zip(costs, ladder, strict=True):
        score = torch.where(cost > 0, threshold, score)
    return score


ORDERS: dict[str, Callable[[Tensor], list[int]]] = {"weakest": _weakest, "index": _index}
RANKS: dict[str, Callable[[Sequence[float], Sequence[Tensor]], Tensor]] = {"effect": _effect, "threshold": _threshold}
