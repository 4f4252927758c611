"""From what images did under many conditions to numbers with intervals, and from these to verdicts.

1. Every number here is made of means over images, so all of them share the same bootstrap draws (`Drawn`): row 0
   is the images as they are, each other row one draw. Where a control has several random circuits, these
   are drawn again as well.
2. `figures` makes one row for each statistic; an interval holds the middle 95 % of the draws.
3. A *verdict* compares the circuit with a control draw by draw: it *beats* it where the whole interval of
   the difference is on the better side of 0, *loses* where it is on the other, else *undecided*.
4. `flips` are the verdicts that differ between ablations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.metrics import MIB_FRACTIONS
from viscircuits.trials import BASELINE, Key, Outcomes

N_BOOTSTRAP = 1000
LEVEL = 0.95
NOTHING = 1e-9  # if removing everything changes a behaviour by less, shares of it have no meaning
BETTER = {"selectivity": 1, "area": 1, "faithfulness": 1, "completeness": -1, "cpr": 1, "cmd": -1}

Row = Float[Tensor, " draw"]  # the value itself, then one for each bootstrap draw
Rows = Float[Tensor, "draw circuit"]


class Drawn:
    """Means over images, of the images as they are (row 0) and of every bootstrap draw."""

    def __init__(self, outcomes: Mapping[str, Outcomes], seed: int) -> None:
        self.outcomes = outcomes
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            what: _weights(len(next(iter(found[next(iter(found))].values()))), generator)
            for what, found in outcomes.items()
        }
        self.seed = seed

    def mean(self, what: str, keys: Sequence[Key], measure: str) -> Rows:
        """Mean of a measure over the images of a set, a column for each condition."""
        values = torch.stack([self.outcomes[what][key][measure] for key in keys], dim=1)  # (image, circuit)
        return self.weights[what] @ values

    def selectivity(self, keys: Sequence[Key], measure: str) -> Rows:
        """Fall of the concept less fall of the others."""
        falls = [
            self.mean(what, [(BASELINE,)], measure) - self.mean(what, keys, measure) for what in ("concept", "others")
        ]
        return falls[0] - falls[1]

    def recovered(self, keys: Sequence[Key], measure: str) -> Rows | None:
        """Share of what the layers do for the concept that is left; None if they do nothing.

        `viscircuits.metrics.faithfulness`, a draw at a time; a draw of images on which they do nothing
        counts as the whole.
        """
        full, empty = (self.mean("concept", [key], measure) for key in ((BASELINE,), ("empty",)))
        behaviour = full - empty
        if abs(float(behaviour[0])) < NOTHING:
            return None
        shares = (self.mean("concept", keys, measure) - empty) / behaviour
        return torch.where(behaviour.abs() < NOTHING, shares[:1], shares)

    def over_circuits(self, rows: Rows) -> Row:
        """Mean over random circuits, which each draw draws anew."""
        n = rows.shape[1]
        return (rows * _weights(n, torch.Generator().manual_seed(self.seed), len(rows) - 1)).sum(1)


def _weights(n: int, generator: torch.Generator, draws: int | None = None) -> Float[Tensor, "draw image"]:
    """How much each of n counts: all the same in row 0, then as often as it is drawn."""
    draws = N_BOOTSTRAP if draws is None else draws
    picks = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, picks, torch.ones(draws, n).double())
    return torch.cat([torch.ones(1, n, dtype=torch.float64), counts]) / n


def interval(row: Row | None) -> dict[str, float] | None:
    """The value, and the ends of the middle 95 % of its draws."""
    if row is None:
        return None
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(row[1:].double(), ends).tolist()
    return {"value": float(row[0]), "low": low, "high": high}


def figures(
    drawn: Drawn,
    measure: str,
    smooth: str,
    *,
    removed: Sequence[Sequence[Key]],
    kept: Sequence[Key] | None,
    sizes: Sequence[Sequence[Key]] | None,
    x: Sequence[float],
) -> dict[str, Row | None]:
    """A row of draws for each statistic of one circuit, or of several random ones; None where it cannot be had.

    Parameters
    ----------
    drawn
        The outcomes under one ablation.
    measure
        What selectivity is about.
    smooth
        What ratios are taken of.
    removed
        For each fraction pruned from 0 to 1, the conditions of all the circuits.
    kept
        The conditions in which each alone is kept; None if it lies in other layers.
    sizes
        The same for each of MIB's sizes; None if there is no ranking.
    x
        The fractions pruned.
    """
    found: dict[str, Row | None] = dict.fromkeys(BETTER)
    if "others" in drawn.outcomes:
        curve = torch.stack([drawn.selectivity(keys, measure).expand(-1, len(removed[-1])) for keys in removed])
        points = torch.tensor(x, dtype=torch.float64)
        found["selectivity"] = drawn.over_circuits(curve[-1])
        if len(x) > 2:  # a straight line from nothing to everything says no more than its end
            found["area"] = drawn.over_circuits(torch.trapezoid(curve, points, dim=0))
    if kept is not None:
        found["faithfulness"] = share_left(drawn, kept, smooth)
        found["completeness"] = share_left(drawn, removed[-1], smooth)
    shares = [drawn.recovered(keys, smooth) for keys in sizes or ()]
    if shares and all(share is not None for share in shares):
        curve = torch.stack([share.expand(-1, len(sizes[0])) for share in shares])  # type: ignore[union-attr,index]
        points = torch.tensor(MIB_FRACTIONS, dtype=torch.float64)
        found["cpr"] = drawn.over_circuits(torch.trapezoid(curve, points, dim=0))
        found["cmd"] = drawn.over_circuits(torch.trapezoid((1 - curve).abs(), points, dim=0))
    return found


def share_left(drawn: Drawn, keys: Sequence[Key], measure: str) -> Row | None:
    """Faithfulness or completeness by one measure, over the circuits of these conditions."""
    shares = drawn.recovered(keys, measure)
    return None if shares is None else drawn.over_circuits(shares)


def verdicts(rows: Mapping[str, Mapping[str, Row | None]]) -> list[dict[str, Any]]:
    """For each statistic and each other circuit, whether the circuit in question beats it.

    Less is better of completeness, which counts by its distance from 0, and of CMD; the difference is
    turned so that above 0 always speaks for the circuit.

    Parameters
    ----------
    rows
        Name → what `figures` gave; the circuit in question is called ``circuit``.
    """
    found = []
    for statistic, sign in BETTER.items():
        for name, other in rows.items():
            mine, theirs = rows["circuit"][statistic], other[statistic]
            if name == "circuit" or mine is None or theirs is None:
                continue
            if statistic == "completeness":
                mine, theirs = mine.abs(), theirs.abs()
            difference = interval(sign * (mine - theirs))
            found.append(
                {"measure": statistic, "against": name, "difference": difference, "verdict": verdict(difference)}
            )
    return found


def verdict(difference: Mapping[str, float] | None) -> str:
    """``beats`` where the interval of a difference lies above 0, ``loses`` where below, else ``undecided``."""
    if difference is None:
        return "undecided"
    return "beats" if difference["low"] > 0 else "loses" if difference["high"] < 0 else "undecided"


def flips(by_ablation: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Verdicts that differ between ablations; ``reversed`` where the circuit beats under one and loses under another.

    Parameters
    ----------
    by_ablation
        Ablation → what `verdicts` gave.
    """
    said: dict[tuple[str, str], dict[str, str]] = {}
    for ablation, found in by_ablation.items():
        for each in found:
            said.setdefault((each["measure"], each["against"]), {})[ablation] = each["verdict"]
    return [
        {"measure": statistic, "against": name, "verdicts": each, "reversed": {"beats", "loses"} <= set(each.values())}
        for (statistic, name), each in said.items()
        if len(set(each.values())) > 1
    ]
