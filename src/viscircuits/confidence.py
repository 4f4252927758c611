"""How far a circuit depends on the images it was found with, and when there are enough of them.

1. `attribute` with ``draws`` keeps, beside the average over images, averages in which each image
   counts as often as a Poisson(1) number says: how the matrices might have come out with other
   images of the same kind.
2. From each draw a circuit is chosen as the circuit was (`viscircuits.selection.reselect`).
3. A unit's confidence is the share of the draws that choose it; the circuit's are two overlaps:
   of the circuit with the draws, and of the draws among themselves (`Confidence`).
4. `Stable` asks for the second while images come in, and stops when it is high enough.

No network is needed. What the numbers mean and what they do not is in docs/confidence.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from viscircuits.circuit import Circuit, Edge
from viscircuits.errors import ViscircuitsError
from viscircuits.matrices import Attributions
from viscircuits.metrics import stability
from viscircuits.selection import reselect, select

LEVEL = 0.95  # of the interval that holds the draws' overlaps


@dataclass(frozen=True)
class Confidence:
    """How a circuit fares over bootstrap draws of the images it was found with.

    Parameters
    ----------
    circuit
        The circuit, its units and edges carrying the share of the draws that choose them.
    frequency
        Layer address → for every unit of the layer, the share of the draws that choose it.
    with_circuit
        For each draw, the Jaccard overlap of its units with the circuit's, layers pooled.
    among_draws
        The same for each pair of draws.
    """

    circuit: Circuit
    frequency: Mapping[str, Float[Tensor, " _unit"]]
    with_circuit: tuple[float, ...]
    among_draws: tuple[float, ...]

    @property
    def n_draws(self) -> int:
        """How many draws there are."""
        return len(self.with_circuit)

    @property
    def overlap(self) -> float:
        """Mean overlap among the draws: estimates that of two circuits from as many images each, rather too high."""
        return _mean(self.among_draws or self.with_circuit)

    def summary(self) -> dict[str, Any]:
        """Plain data: the number of draws, both mean overlaps, and where 95 % of the draws lie."""
        low, high = _middle(self.with_circuit)
        return {
            "draws": self.n_draws,
            "overlap": self.overlap,
            "with_circuit": {"mean": _mean(self.with_circuit), "low": low, "high": high},
        }


def confidence(
    attributions: Attributions,
    circuit: Circuit,
    contrast: str = "none",
    choose: Callable[[Attributions], Circuit] | None = None,
) -> Confidence:
    """How often each unit and edge of a circuit is chosen again over bootstrap draws of the images.

    Parameters
    ----------
    attributions
        What the circuit was selected from, before any contrast, with bootstrap draws.
    circuit
        What `select` returned.
    contrast
        What it was selected by; as for `Attributions.contrast`.
    choose
        How a circuit is chosen from a contrasted draw; by default `reselect`, with the circuit's own options.

    Returns
    -------
    Confidence
        An edge counts as chosen where both its units are.

    Raises
    ------
    ViscircuitsError
        If there are no draws, or the circuit lies in other layers.

    References
    ----------
    Efron 1979, doi:10.1214/aos/1176344552 (the bootstrap); Hanley, MacGibbon 2006,
    doi:10.1016/j.cmpb.2006.04.006 (Poisson weights); Kuncheva 2007 (stability of a selection as the
    mean overlap of all pairs).
    """
    if not attributions.n_draws:
        raise ViscircuitsError("these attributions hold no bootstrap draws; attribute with draws=20")
    if attributions.layers != circuit.layers:
        raise ViscircuitsError(
            f"the circuit lies in {', '.join(circuit.layers)}, the attributions in {', '.join(attributions.layers)}"
        )
    again = choose or (lambda drawn: reselect(drawn, circuit))
    chosen = [again(attributions.draw(i).contrast(contrast)) for i in range(attributions.n_draws)]
    drawn = {layer: torch.stack([_holds(each, layer) for each in chosen]) for layer in circuit.layers}
    pooled = torch.cat(list(drawn.values()), dim=1)  # (draw, unit of any layer)
    own = torch.cat([_holds(circuit, layer) for layer in circuit.layers]).unsqueeze(0)
    pairs = torch.triu_indices(len(pooled), len(pooled), 1)
    return Confidence(
        _with_shares(circuit, drawn),
        stability(chosen),
        tuple(_overlaps(pooled, own)[:, 0].tolist()),
        tuple(_overlaps(pooled, pooled)[pairs[0], pairs[1]].tolist()),
    )


@dataclass
class Stable:
    """Whether enough images have been seen, for ``attribute(until=…)``: the circuit has come to rest.

    Called on what was attributed so far, it selects the circuits of the draws and says yes when
    their mean overlap among themselves reached `overlap` at this look and the `patience − 1` before. The
    answer depends on the attributions and on `history` alone, and a look that is repeated
    replaces the earlier one, so a run that was killed goes on as if it had not been.

    Parameters
    ----------
    units, contrast, refine
        The circuit looked for: as for `select` and `Attributions.contrast`.
    overlap
        Mean Jaccard overlap to reach, above 0 and at most 1.
    patience
        At how many looks in a row.
    seed
        Of the circuit's starts.
    history
        What each look found: images of the larger set so far, and the overlap.
    """

    units: int | float | Mapping[str, int]
    contrast: str = "none"
    refine: str = "coordinate"
    overlap: float = 0.9
    patience: int = 2
    seed: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= 1:
            raise ViscircuitsError(
                f"a circuit is stable at an overlap above 0 and up to 1, such as 0.9, not {self.overlap}"
            )
        if self.patience < 1:
            raise ViscircuitsError(f"patience is a number of looks from 1, got {self.patience}")

    def __call__(self, attributions: Attributions) -> bool:
        """Look: True if no more images are needed."""
        seen = attributions.reference.n_images if attributions.reference else 0
        n = max(attributions.n_images, seen)
        contrasted = attributions.contrast(self.contrast)
        generator = torch.Generator().manual_seed(self.seed)
        circuit = select(contrasted, self.units, refine=self.refine, restarts=3, bound_steps=0, generator=generator)
        self.history = [look for look in self.history if look[0] < n]
        self.history.append((n, confidence(attributions, circuit, self.contrast).overlap))
        return self.reached

    @property
    def reached(self) -> bool:
        """Whether the last looks were all good enough."""
        last = self.history[-self.patience :]
        return len(last) == self.patience and all(overlap >= self.overlap for _, overlap in last)

    @property
    def rule(self) -> dict[str, Any]:
        """What is asked for, as plain data."""
        units = dict(self.units) if isinstance(self.units, Mapping) else self.units
        how = {"units": units, "contrast": self.contrast, "refine": self.refine, "seed": self.seed}
        return {"overlap": self.overlap, "patience": self.patience, **how}

    @property
    def state(self) -> dict[str, Any]:
        """The rule and the looks so far, as plain data that JSON can hold."""
        return {"rule": self.rule, "history": [list(look) for look in self.history]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises
        ------
        ViscircuitsError
            If the state is that of another rule.
        """
        if state["rule"] != self.rule:
            raise ViscircuitsError(f"the looks so far were for {state['rule']}, this run asks for {self.rule}")
        self.history = [(int(n), float(overlap)) for n, overlap in state["history"]]


# ------------------------------------------------------------------ below: counting


def _holds(circuit: Circuit, layer: str) -> Bool[Tensor, " unit"]:
    holds = torch.zeros(circuit.widths[layer], dtype=torch.bool)
    holds[list(circuit.units[layer])] = True
    return holds


def _overlaps(some: Bool[Tensor, "draw unit"], others: Bool[Tensor, "other unit"]) -> Float[Tensor, "draw other"]:
    """Jaccard overlap of every row of one with every row of the other."""
    shared = some.double() @ others.double().T
    either = some.sum(1).unsqueeze(1) + others.sum(1) - shared
    return shared / either.clamp(min=1)


def _with_shares(circuit: Circuit, drawn: Mapping[str, Bool[Tensor, "draw _unit"]]) -> Circuit:
    """The circuit with each unit's and each edge's share of the draws."""
    chosen = {}
    both: dict[tuple[str, str], list[list[float]]] = {}  # (source, target) → share of the draws, [source][target]
    for layer, indices in circuit.units.items():
        chosen[layer] = tuple(drawn[layer].double().mean(0)[list(indices)].tolist())
    for pair in {(edge.source.layer, edge.target.layer) for edge in circuit.edges}:
        source, target = (drawn[layer].double() for layer in pair)
        both[pair] = (source.T @ target / len(source)).tolist()

    def counted(edge: Edge) -> Edge:
        share = both[edge.source.layer, edge.target.layer][edge.source.index][edge.target.index]
        return replace(edge, chosen=share)

    return replace(circuit, chosen=chosen, edges=tuple(map(counted, circuit.edges)))


def _mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


def _middle(numbers: tuple[float, ...]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = torch.tensor(numbers, dtype=torch.float64).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)
