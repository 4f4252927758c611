"""Choosing the circuit: k units in each layer that carry the most attribution between them.

With one matrix M_l for each pair of adjacent layers and k_l units to choose in layer l, the
circuit C is worth ``S(C) = Σ_l Σ_{m∈C_l, n∈C_{l+1}} M_l[n, m]``. Finding the best one is a
quadratic choice over a chain of layers, which is hard, so:

1. *Initial*: in each layer, the k units with the largest summed attribution to both neighbours.
2. *Refine*: improve the choice layer by layer (`REFINEMENTS`), from several starts if the
   refinement allows it.
3. *Relax*: an upper bound on S that no circuit can pass, so that the gap to it says how good the
   choice is at worst.

All arithmetic is float64 on the CPU: sums of float32 scores are then all but exact, and ties
break by unit index, lowest first. No network is needed, and the matrices are not changed.
`same_size`, `random_like` and `shrink` make the circuits to set beside a selected one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError, closest
from viscircuits.matrices import Attributions

Chosen = tuple[Tensor, ...]  # per layer, the chosen unit indices, ascending

CLOSE = 1e-9  # a relative gap below this counts as proof that the circuit is the best
PATIENCE, SHRINK = 5, 0.7  # steps without a lower bound before steps get shorter, and by what factor
RAMP = 1e-14  # slope, relative to the scores, that decides ties while the bound is lowered
SPREAD = 0.5  # standard deviation, in nats, of the noise on the scores of a perturbed start


@dataclass(frozen=True)
class Problem:
    """What to choose from and how much of it: float64 matrices and a number of units per layer."""

    matrices: tuple[Float[Tensor, "_target _source"], ...]
    sizes: tuple[int, ...]

    @cached_property
    def transposed(self) -> tuple[Float[Tensor, "_source _target"], ...]:
        """The matrices with a source's scores side by side in memory: gathering rows is several times as fast."""
        return tuple(matrix.T.contiguous() for matrix in self.matrices)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of units to choose from in each layer."""
        return (self.matrices[0].shape[1], *(matrix.shape[0] for matrix in self.matrices))


@dataclass(frozen=True)
class Refined:
    """The best circuit a refinement saw, and how it came there.

    `trace` holds S at the start and after each sweep. `cycled` says that the sweeps returned to
    an earlier circuit without coming to rest.
    """

    chosen: Chosen
    objective: float
    trace: tuple[float, ...]
    cycled: bool


@dataclass(frozen=True)
class Relaxation:
    """An upper bound on S, and circuits read off on the way to it."""

    bound: float
    circuits: tuple[Chosen, ...]


def select(
    attributions: Attributions,
    k: int | float | Mapping[str, int],
    *,
    refine: str = "coordinate",
    restarts: int = 8,
    bound_steps: int = 100,
    absolute: bool = False,
    generator: torch.Generator | None = None,
) -> Circuit:
    """Choose the units of each layer that carry the most attribution between them.

    Parameters
    ----------
    attributions
        One matrix for each pair of adjacent layers.
    k
        Units per layer: a number (the paper's), a fraction between 0 and 1 of each layer's units
        (rounded half up, at least 1), or layer → number.
    refine
        ``coordinate`` gives each layer, in turn, the best units for both its neighbours: S never
        falls. ``paper`` sweeps backward, looking only at the next layer, then forward, looking
        only at the previous one; S may fall and the sweeps may cycle, so the best circuit seen
        is returned. ``none`` keeps the initial circuit.
    restarts
        How many initial circuits ``coordinate`` starts from; with more than one it also tries
        those that the relaxation proposes.
    bound_steps
        Steps to lower the upper bound by. The bound holds after any number of them.
    absolute
        Select by the absolute value of the scores.
    generator
        Randomness of the perturbed starts, on the CPU; by default seeded with 0.

    Returns
    -------
    Circuit
        Its `selection` holds ``objective`` S, ``upper_bound``, ``gap`` = (bound − S) / |bound|,
        ``refine``, ``restarts`` (initial circuits tried), ``sweeps`` (of the run that won),
        ``cycled``, ``k`` (layer → units), ``absolute`` and ``seed``. A unit's score is its
        attribution from and to the chosen units of its neighbours. Edges are all pairs of chosen
        units of adjacent layers whose score is not 0, in falling order of score.

    Raises
    ------
    ViscircuitsError
        If `k` does not fit the layers, a score is not finite, or an option is unknown.

    References
    ----------
    Rajaram et al. 2023, arXiv:2404.14349 (the objective, the initial circuit, ``paper``).
    """
    _check_options(refine, restarts, bound_steps)
    problem = _problem(attributions, k, absolute)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    refinement, restarted = REFINEMENTS[refine], refine in RESTARTED and restarts > 1
    starts = _starts(problem, restarts, generator) if restarted else [initial(problem)]
    runs = [refinement(problem, start) for start in starts]
    found = _best(runs)
    relaxation = relax(problem, found.objective, bound_steps)
    if restarted:
        runs += [refinement(problem, start) for start in relaxation.circuits]
        found = _best(runs)
    bound = max(relaxation.bound, found.objective)  # equal to the last bit where the bound is tight
    selection = {
        "objective": found.objective,
        "upper_bound": bound,
        "gap": _gap(bound, found.objective),
        "refine": refine,
        "restarts": len(runs),
        "sweeps": len(found.trace) - 1,
        "cycled": found.cycled,
        "k": dict(zip(attributions.layers, problem.sizes, strict=True)),
        "absolute": absolute,
        "seed": generator.initial_seed(),
    }
    return _circuit(attributions, problem, found.chosen, selection)


def reselect(attributions: Attributions, circuit: Circuit) -> Circuit:
    """Choose from other attributions of the same layers as `circuit` was chosen: same sizes, same refinement.

    For asking many times how a choice would have come out: it proves no bound and lists no edges,
    which is most of the time `select` takes. ``coordinate`` starts from the initial circuit of
    the new attributions, the paper's, the leading one, and from `circuit` itself; the best end counts.

    Raises
    ------
    ViscircuitsError
        If `circuit` does not come from `select`, the layers differ, or a score is not finite.
    """
    how = circuit.selection
    if not {"refine", "k", "absolute"} <= set(how):
        raise ViscircuitsError("the circuit does not say how it was selected; give one that `select` returned")
    problem = _problem(attributions, how["k"], how["absolute"])
    starts = [initial(problem)]
    if how["refine"] in RESTARTED:
        given = tuple(torch.tensor(circuit.units[layer]) for layer in attributions.layers)
        starts += [_paper(problem, starts[0]).chosen, _leading(problem), given]
    found = _best([REFINEMENTS[how["refine"]](problem, start) for start in starts])
    selection = {**{name: how[name] for name in ("refine", "k", "absolute")}, "objective": found.objective}
    return replace(_without_edges(attributions, problem, found.chosen), selection=selection)


# ------------------------------------------------------------------ the problem


def _check_options(refine: str, restarts: int, bound_steps: int) -> None:
    if refine not in REFINEMENTS:
        raise ViscircuitsError(
            f"no refinement {refine!r}; choose one of {', '.join(REFINEMENTS)}.{closest(refine, REFINEMENTS)}"
        )
    if restarts < 1:
        raise ViscircuitsError(f"restarts must be 1 or more (1: only the initial circuit), got {restarts}")
    if bound_steps < 0:
        raise ViscircuitsError(f"bound_steps must be 0 or more, got {bound_steps}")


def _problem(attributions: Attributions, k: int | float | Mapping[str, int], absolute: bool) -> Problem:
    _check_chain(attributions)
    matrices = tuple(m.values.detach().to("cpu", torch.float64) for m in attributions.matrices)
    sizes = units_per_layer(attributions.widths, k)
    return Problem(tuple(m.abs() if absolute else m for m in matrices), tuple(sizes.values()))


def _check_chain(attributions: Attributions) -> None:
    if not attributions.matrices:
        raise ViscircuitsError("there is no attribution matrix to select from; attribute at least two layers")
    for matrix in attributions.matrices:
        if not bool(matrix.values.isfinite().all()):
            n_bad = int((~matrix.values.isfinite()).sum())
            raise ViscircuitsError(
                f"{n_bad} scores from {matrix.source!r} to {matrix.target!r} are not finite; "
                "attribute again: every row (no targets=…), and in float32 if the model ran in a shorter type"
            )
    for before, after in zip(attributions.matrices[:-1], attributions.matrices[1:], strict=True):
        if before.target != after.source or before.values.shape[0] != after.values.shape[1]:
            raise ViscircuitsError(
                f"the matrices do not form a chain: one ends in {before.target!r} with {before.values.shape[0]} units, "
                f"the next starts from {after.source!r} with {after.values.shape[1]}"
            )


def units_per_layer(widths: Mapping[str, int], k: int | float | Mapping[str, int]) -> dict[str, int]:
    """Return layer → how many units to choose, for a `k` as `select` takes it.

    A fraction f of n units is ``⌊f·n + ½⌋``, and at least 1.
    """
    if isinstance(k, Mapping):
        sizes = _sizes_by_name(widths, k)
    elif isinstance(k, float):
        if not 0 < k <= 1:
            raise ViscircuitsError(f"a fraction of units must lie in (0, 1], got {k}; give a whole number for a count")
        sizes = {layer: max(1, math.floor(k * width + 0.5)) for layer, width in widths.items()}
    else:
        sizes = dict.fromkeys(widths, k)
    for layer, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= widths[layer]:
            raise ViscircuitsError(f"cannot choose {size!r} units of layer {layer!r}: it has {widths[layer]}")
    return sizes


def _sizes_by_name(widths: Mapping[str, int], k: Mapping[str, int]) -> dict[str, int]:
    for layer in k:
        if layer not in widths:
            raise ViscircuitsError(f"no attribution for layer {layer!r}.{closest(layer, widths)}")
    for layer in widths:
        if layer not in k:
            raise ViscircuitsError(f"k names no number of units for layer {layer!r}")
    return {layer: k[layer] for layer in widths}


def objective(problem: Problem, chosen: Chosen) -> float:
    """Attribution within the circuit: ``S(C) = Σ_l Σ_{m∈C_l, n∈C_{l+1}} M_l[n, m]``."""
    return math.fsum(matrix[chosen[i + 1]][:, chosen[i]].sum().item() for i, matrix in enumerate(problem.matrices))


def _gap(bound: float, value: float) -> float:
    return (bound - value) / abs(bound) if bound > value and bound != 0 else bound - value


# ------------------------------------------------------------------ choosing in one layer


def largest(scores: Float[Tensor, " unit"], k: int) -> Int[Tensor, " chosen"]:
    """Indices of the `k` largest scores, ascending; among equals the lowest indices."""
    return torch.sort(scores, descending=True, stable=True).indices[:k].sort().values


def _from_sources(problem: Problem, layer: int, chosen: Chosen) -> Tensor:
    """Attribution each unit of `layer` receives from the chosen units of the layer before."""
    if layer == 0:
        return problem.matrices[0].new_zeros(problem.widths[0])
    return problem.transposed[layer - 1][chosen[layer - 1]].sum(0)  # (unit,)


def _to_targets(problem: Problem, layer: int, chosen: Chosen) -> Tensor:
    """Attribution each unit of `layer` sends to the chosen units of the layer after."""
    if layer == len(problem.matrices):
        return problem.matrices[-1].new_zeros(problem.widths[-1])
    return problem.matrices[layer][chosen[layer + 1]].sum(0)  # (unit,)


def _carried(problem: Problem, layer: int, chosen: Chosen) -> Tensor:
    return _from_sources(problem, layer, chosen) + _to_targets(problem, layer, chosen)


def _strengths(problem: Problem) -> list[Tensor]:
    """Each unit's summed attribution to all units of both adjacent layers."""
    everything = tuple(torch.arange(width) for width in problem.widths)
    return [_carried(problem, layer, everything) for layer in range(len(everything))]


def _choose(problem: Problem, scores: Iterable[Tensor]) -> Chosen:
    return tuple(largest(of_layer, k) for of_layer, k in zip(scores, problem.sizes, strict=True))


# ------------------------------------------------------------------ starts


def initial(problem: Problem) -> Chosen:
    """In each layer, the k units with the largest summed attribution to both adjacent layers."""
    return _choose(problem, _strengths(problem))


def _starts(problem: Problem, n: int, generator: torch.Generator) -> list[Chosen]:
    """The initial circuit, the paper's, the leading one, and perturbed initial ones; `n` in all."""
    first = initial(problem)
    starts = [first, _paper(problem, first).chosen, _leading(problem)]
    return starts[:n] + [_perturbed(problem, generator) for _ in range(n - len(starts))]


def _leading(problem: Problem, n_rounds: int = 50) -> Chosen:
    """The k largest entries per layer of a non-negative power iteration along the chain of matrices."""
    weights = [torch.ones(width, dtype=torch.float64) for width in problem.widths]
    for _ in range(n_rounds):
        received = [torch.zeros(width, dtype=torch.float64) for width in problem.widths]
        for i, matrix in enumerate(problem.matrices):
            received[i] += matrix.T @ weights[i + 1]
            received[i + 1] += matrix @ weights[i]
        weights = [torch.nn.functional.normalize(w.clamp(min=0), dim=0) for w in received]
    return _choose(problem, weights)


def _perturbed(problem: Problem, generator: torch.Generator) -> Chosen:
    """The initial circuit of scores with noise on them: the noise goes by rank, not by index."""
    noisy = []
    for strength in _strengths(problem):
        noise = torch.randn(len(strength), generator=generator, dtype=torch.float64)
        ranking = torch.sort(strength, descending=True, stable=True).indices
        # By rank, so that renumbering a layer's units renumbers the result.
        noisy.append(strength.index_add(0, ranking, SPREAD * noise * strength[ranking].abs()))
    return _choose(problem, noisy)


# ------------------------------------------------------------------ refinements


def _none(problem: Problem, start: Chosen) -> Refined:
    value = objective(problem, start)
    return Refined(start, value, (value,), cycled=False)


def _paper(problem: Problem, start: Chosen) -> Refined:
    last = len(problem.matrices)
    backward = [(layer, _to_targets) for layer in reversed(range(last))]
    forward = [(layer, _from_sources) for layer in range(1, last + 1)]
    return _alternate(problem, start, (backward, forward))


def _coordinate(problem: Problem, start: Chosen) -> Refined:
    layers = range(len(problem.sizes))
    backward = [(layer, _carried) for layer in reversed(layers)]
    forward = [(layer, _carried) for layer in layers]
    return _alternate(problem, start, (backward, forward))


Sweep = Sequence[tuple[int, Callable[[Problem, int, Chosen], Tensor]]]  # layers in turn, with the scores to choose by


def _alternate(problem: Problem, start: Chosen, sweeps: tuple[Sweep, Sweep]) -> Refined:
    """Repeat both sweeps until neither changes anything, or a circuit comes back."""
    chosen, trace, best, seen = start, [objective(problem, start)], start, set()
    moved = True
    while moved and _key(chosen) not in seen:
        seen.add(_key(chosen))
        moved = False
        for sweep in sweeps:
            before, chosen = chosen, _swept(problem, chosen, sweep)
            moved = moved or _key(chosen) != _key(before)
            trace.append(objective(problem, chosen))
            best = chosen if trace[-1] >= max(trace) else best
    return Refined(best, max(trace), tuple(trace), cycled=moved)


def _swept(problem: Problem, chosen: Chosen, sweep: Sweep) -> Chosen:
    for layer, scores in sweep:
        now = largest(scores(problem, layer, chosen), problem.sizes[layer])
        chosen = (*chosen[:layer], now, *chosen[layer + 1 :])
    return chosen


def _key(chosen: Chosen) -> tuple[bytes, ...]:
    return tuple(units.numpy().tobytes() for units in chosen)


def _best(runs: Sequence[Refined]) -> Refined:
    return max(runs, key=lambda run: run.objective)  # the first among equals


REFINEMENTS: dict[str, Callable[[Problem, Chosen], Refined]] = {
    "coordinate": _coordinate,
    "paper": _paper,
    "none": _none,
}
RESTARTED = frozenset({"coordinate"})  # the others are defined from the initial circuit alone


# ------------------------------------------------------------------ the upper bound


class _Charged:
    """One half of a pair's matrix, charged to the units in its rows: what each row can give at most.

    `sums` holds the sum of each row's k best entries, or more where the row is stale: sorting a
    row is put off until it is among the chosen.
    """

    def __init__(self, values: Float[Tensor, "charged other"], k: int) -> None:
        self.values, self.k = values, k
        self.sums, self.best = _tops(values, k)  # (charged,), (charged, k)
        self.stale = torch.zeros(len(values), dtype=torch.bool)

    def add(self, rows: Tensor, columns: Tensor, amounts: Tensor) -> None:
        self.values.view(-1).index_add_(0, rows * self.values.shape[1] + columns, amounts)
        self.sums.index_add_(0, rows, amounts.clamp(min=0))
        self.stale[rows] = True

    def freshen(self, rows: Tensor) -> None:
        """Sort again those of the rows that have changed."""
        stale = rows[self.stale[rows]]
        if len(stale):
            self.sums[stale], self.best[stale] = _tops(self.values[stale], self.k)
            self.stale[stale] = False


def _tops(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum and columns of the k largest entries of each row."""
    # numpy's partition is vectorised: up to ten times as fast as torch.topk.
    best = torch.from_numpy(np.argpartition(rows.numpy(), -k, axis=1)[:, -k:])  # (row, k)
    return rows.gather(1, best).sum(1), best


class _Split:
    """``M = T + U`` for one pair of layers: T charged to its targets, U to its sources."""

    def __init__(self, half: Float[Tensor, "target source"], matrix: Tensor, sizes: Sequence[int]) -> None:
        self.shape = matrix.shape
        self.targets = _Charged(half, sizes[0])
        self.sources = _Charged((matrix - half).T.contiguous(), sizes[1])

    def disagreement(self, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Entries counted by the chosen targets only (+1) and by the chosen sources only (−1)."""
        n_sources = self.shape[1]
        by_targets = (targets.unsqueeze(1) * n_sources + self.targets.best[targets]).flatten()
        by_sources = (self.sources.best[sources] * n_sources + sources.unsqueeze(1)).flatten()
        counted = torch.zeros(self.shape.numel(), dtype=torch.int8)
        counted[by_targets] += 1
        counted[by_sources] -= 1
        over, under = by_targets[counted[by_targets] > 0], by_sources[counted[by_sources] < 0]
        signs = torch.cat([torch.ones(len(over)), -torch.ones(len(under))]).double()
        return torch.cat([over, under]), signs

    def is_stale(self, sources: Tensor, targets: Tensor) -> bool:
        return bool(self.sources.stale[sources].any() or self.targets.stale[targets].any())

    def freshen(self, sources: Tensor, targets: Tensor) -> None:
        self.sources.freshen(sources)
        self.targets.freshen(targets)

    def move(self, entries: Tensor, amounts: Tensor) -> None:
        """Move `amounts` from the sources' half to the targets'."""
        target, source = entries // self.shape[1], entries % self.shape[1]
        self.targets.add(target, source, amounts)
        self.sources.add(source, target, -amounts)


def relax(problem: Problem, target: float, steps: int) -> Relaxation:
    """Bound S from above by letting every unit choose its own neighbours.

    Split each matrix into ``M_l = T_l + U_l`` and let ``p_l(j)`` be the sum of the k_{l−1} largest
    entries of row j of T_{l−1} plus the sum of the k_{l+1} largest of column j of U_l. Then
    ``S ≤ Σ_l (sum of the k_l largest p_l)`` for every split.

    *Proof.* S is the sum over chosen units j of the entries of T in row j at the k_{l−1} chosen
    sources and of U in column j at the k_{l+1} chosen targets: at most p_l(j), for the largest k
    entries sum to no less than any k. Summed over the k_l chosen j, the same argument ends it. ∎

    With ``T = M/2 + Λ``, ``U = M/2 − Λ`` the bound is convex in Λ: a maximum of linear functions.
    It is lowered by Polyak's subgradient steps towards `target`, a value of S that was reached;
    Λ moves only where the two sides disagree, and a row is sorted again only when it might be
    among the chosen, so a step costs little more than the circuit is large.

    References
    ----------
    Polyak 1969, doi:10.1016/0041-5553(69)90061-5; Held, Wolfe, Crowder 1974,
    doi:10.1007/BF01580223.
    """
    scales = _scales(problem)
    splits = _split(problem, _even_halves(problem, scales))
    bound, circuits = math.inf, []
    since_best: list[list[tuple[Tensor, Tensor]]] = []
    patience, pace = PATIENCE, 1.0
    for step in range(steps + 1):
        value, chosen = _relaxed_choice(problem, splits)
        if step & (step - 1) == 0:  # 0, 1, 2, 4, 8, …: late ones are nearly alike
            circuits.append(chosen)
        improved = value < bound
        bound, since_best = (value, []) if improved else (bound, since_best)
        patience = PATIENCE if improved else patience - 1
        if patience == 0:
            pace, patience = pace * SHRINK, PATIENCE
        moves = _polyak_moves(splits, scales, chosen, pace * (value - target))
        if step == steps or value - target <= CLOSE * abs(value) or not moves:
            break
        for split, (entries, amounts) in zip(splits, moves, strict=True):
            split.move(entries, amounts)
        since_best.append(moves)
    return Relaxation(_bound_at_best(problem, splits, since_best), tuple(circuits))


def _scales(problem: Problem) -> list[float]:
    """Size of the scores that matter in each pair, so that pairs of unlike size move alike."""
    chosen = initial(problem)
    inside = [matrix[chosen[i + 1]][:, chosen[i]].abs().mean().item() for i, matrix in enumerate(problem.matrices)]
    return [x or matrix.abs().mean().item() for x, matrix in zip(inside, problem.matrices, strict=True)]


def _even_halves(problem: Problem, scales: list[float]) -> list[Tensor]:
    """Half of each matrix, with a ramp far below the scores: equal scores fall in order of index.

    Without ties a partition answers alike on every machine; any split is a valid one.
    """
    halves = []
    for matrix, scale in zip(problem.matrices, scales, strict=True):
        n_targets, n_sources = matrix.shape
        ramp = torch.arange(n_targets).unsqueeze(1) - torch.arange(n_sources)  # (target, source)
        halves.append(matrix / 2 + RAMP * scale * ramp)
    return halves


def _split(problem: Problem, halves: list[Tensor]) -> list[_Split]:
    return [
        _Split(half, matrix, problem.sizes[i : i + 2])
        for i, (half, matrix) in enumerate(zip(halves, problem.matrices, strict=True))
    ]


def _relaxed_choice(problem: Problem, splits: list[_Split]) -> tuple[float, Chosen]:
    """The bound a split gives, and the units that attain it."""
    while True:
        potentials = [torch.zeros(width, dtype=torch.float64) for width in problem.widths]
        for i, split in enumerate(splits):
            potentials[i] += split.sources.sums
            potentials[i + 1] += split.targets.sums
        chosen = _choose(problem, potentials)
        # The chosen must be exact; the others are overestimated at most, and still lost.
        if not any(split.is_stale(chosen[i], chosen[i + 1]) for i, split in enumerate(splits)):
            return math.fsum(p[units].sum().item() for p, units in zip(potentials, chosen, strict=True)), chosen
        contenders = [largest(p, 2 * k) for p, k in zip(potentials, problem.sizes, strict=True)]
        for i, split in enumerate(splits):
            split.freshen(contenders[i], contenders[i + 1])


def _polyak_moves(
    splits: list[_Split], scales: list[float], chosen: Chosen, fall: float
) -> list[tuple[Tensor, Tensor]]:
    """For each pair, entries and amounts that would lower the bound by `fall` were it linear; [] at its minimum."""
    slopes = [split.disagreement(chosen[i], chosen[i + 1]) for i, split in enumerate(splits)]
    norm = sum(scale * len(entries) for scale, (entries, _) in zip(scales, slopes, strict=True))
    if norm == 0:
        return []
    return [(entries, -fall / norm * scale * signs) for scale, (entries, signs) in zip(scales, slopes, strict=True)]


def _bound_at_best(problem: Problem, splits: list[_Split], since_best: list[list[tuple[Tensor, Tensor]]]) -> float:
    """The bound where it was lowest, summed afresh so that no error of the updates is left in it."""
    halves = [split.targets.values for split in splits]
    for moves in since_best:
        for half, (entries, amounts) in zip(halves, moves, strict=True):
            half.view(-1)[entries] -= amounts
    return _relaxed_choice(problem, _split(problem, halves))[0]


# ------------------------------------------------------------------ the circuit


def _circuit(attributions: Attributions, problem: Problem, chosen: Chosen, selection: Mapping[str, Any]) -> Circuit:
    layers = attributions.layers
    edges = [
        edge
        for i, matrix in enumerate(attributions.matrices)
        for edge in _edges(layers[i : i + 2], chosen[i : i + 2], problem.matrices[i], matrix.signed)
    ]
    return replace(_without_edges(attributions, problem, chosen), edges=tuple(edges), selection=selection)


def _without_edges(attributions: Attributions, problem: Problem, chosen: Chosen) -> Circuit:
    layers = attributions.layers
    units = {layer: tuple(indices.tolist()) for layer, indices in zip(layers, chosen, strict=True)}
    scores = {layer: tuple(_carried(problem, i, chosen)[chosen[i]].tolist()) for i, layer in enumerate(layers)}
    return Circuit(units, attributions.widths, scores, provenance=dict(attributions.provenance))


def _edges(layers: tuple[str, ...], chosen: Chosen, values: Tensor, signed: Tensor) -> list[Edge]:
    """Edges between the chosen units of two layers in falling order of score, equals by source, then target."""
    sources, targets = ([Unit(layer, i) for i in c.tolist()] for layer, c in zip(layers, chosen, strict=True))
    score = values[chosen[1]][:, chosen[0]].T.flatten()  # (source · target,)
    sign = signed.detach().to("cpu", torch.float64)[chosen[1]][:, chosen[0]].T.flatten()
    order = torch.sort(score, descending=True, stable=True).indices
    columns = zip(order.tolist(), score[order].tolist(), sign[order].tolist(), strict=True)
    return [Edge(sources[at // len(targets)], targets[at % len(targets)], x, s) for at, x, s in columns if x != 0]


# ------------------------------------------------------------------ circuits beside a circuit


def same_size(circuit: Circuit, unit_scores: Mapping[str, Float[Tensor, " _unit"]]) -> Circuit:
    """Choose as many units per layer as `circuit` has, those with the highest given score.

    Parameters
    ----------
    circuit
        Sets the layers and the number of units in each.
    unit_scores
        Layer → one score per unit of that layer: activation, weight norm, anything. They become
        the scores of the units chosen.

    Raises
    ------
    ViscircuitsError
        If a layer has no scores, scores of another width, or scores that are NaN.
    """
    units, scores = {}, {}
    for layer, chosen in circuit.units.items():
        of_layer = _scores_of(layer, circuit.widths[layer], unit_scores)
        now = largest(of_layer, len(chosen))
        units[layer], scores[layer] = tuple(now.tolist()), tuple(of_layer[now].tolist())
    return Circuit(units, circuit.widths, scores, selection={"by": "unit scores"}, provenance=circuit.provenance)


def _scores_of(layer: str, width: int, unit_scores: Mapping[str, Tensor]) -> Tensor:
    if layer not in unit_scores:
        raise ViscircuitsError(f"no unit scores for layer {layer!r}.{closest(layer, unit_scores)}")
    scores = unit_scores[layer].detach().to("cpu", torch.float64)
    if scores.shape != (width,):
        raise ViscircuitsError(f"layer {layer!r} has {width} units, its scores have shape {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ViscircuitsError(f"scores of layer {layer!r} are not numbers for {int(scores.isnan().sum())} units")
    return scores


def random_like(circuit: Circuit, generator: torch.Generator) -> Circuit:
    """Choose as many units per layer as `circuit` has, at random.

    The scores are the random numbers they were drawn by, so that `shrink` keeps a random part.
    """
    priorities = {
        layer: torch.rand(circuit.widths[layer], generator=generator, dtype=torch.float64) for layer in circuit.layers
    }
    return replace(same_size(circuit, priorities), selection={"by": "random", "seed": generator.initial_seed()})


def ranked(circuit: Circuit) -> dict[str, tuple[int, ...]]:
    """Return layer → the circuit's units from the highest score to the lowest, equals by index."""
    missing = [layer for layer, units in circuit.units.items() if len(circuit.scores.get(layer, ())) != len(units)]
    if missing:
        raise ViscircuitsError(
            f"units of layer {missing[0]!r} have no scores to rank them by; use a circuit from select or same_size"
        )
    return {
        layer: tuple(
            unit for _, unit in sorted((-score, unit) for score, unit in zip(circuit.scores[layer], units, strict=True))
        )
        for layer, units in circuit.units.items()
    }


def shrink(circuit: Circuit, fraction: float) -> Circuit:
    """Keep the best ``⌈fraction · k⌉`` of each layer's k units, by score, and the edges between them.

    Smaller fractions give subsets of larger ones; the scores stay those of the whole circuit.
    """
    if not 0 <= fraction <= 1:
        raise ViscircuitsError(f"shrink keeps a fraction between 0 and 1 of a circuit, got {fraction}")
    kept = {}
    for layer, best_first in ranked(circuit).items():
        # The slack keeps 0.1 · 30 = 3.0000000000000004 at 3.
        kept[layer] = tuple(sorted(best_first[: math.ceil(fraction * len(best_first) - 1e-9)]))
    return replace(
        circuit,
        units=kept,
        scores=_of_kept(circuit, circuit.scores, kept),
        chosen=_of_kept(circuit, circuit.chosen, kept),
        edges=tuple(
            e
            for e in circuit.edges
            if e.source.index in kept[e.source.layer] and e.target.index in kept[e.target.layer]
        ),
        selection={**circuit.selection, "shrunk_to": fraction},
    )


def _of_kept(
    circuit: Circuit, numbers: Mapping[str, tuple[float, ...]], kept: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[float, ...]]:
    """The numbers of those of a circuit's units that are kept."""
    of = {layer: dict(zip(circuit.units[layer], mine, strict=True)) for layer, mine in numbers.items()}
    return {layer: tuple(mine[unit] for unit in kept[layer]) for layer, mine in of.items()}
