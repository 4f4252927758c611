"""Tests by permutation, and intervals over concepts, for matrices that have a row and a column for each concept.

Entries of such a matrix are not independent: each concept has a part in many. So concepts are permuted, or drawn
again, and never entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from viscircuits.metrics import Interval, ranks

Matrix = Float[Tensor, "concept concept"]


@dataclass(frozen=True)
class Tested:
    """A statistic, and the share of permutations (itself counted) in which it is as extreme."""

    value: float
    p: float


def mantel(values: Matrix, distance: Matrix, draws: int, generator: torch.Generator) -> Tested:
    """Spearman correlation of values with distances over pairs of different concepts, tested for being below 0.

    Concepts' places in the distances are permuted. A matrix of equal values correlates with nothing: 0, p = 1.

    References
    ----------
    Mantel 1967, Cancer Research 27, 209–220.
    """
    apart = _apart(len(values))
    if bool((values[apart] == values[apart][0]).all()):
        return Tested(0.0, 1.0)
    mine, steps = (_standardised(each, apart) for each in (values, distance))
    found = (mine * steps).sum()
    drawn = (mine * _permuted(steps, draws, generator)).sum((1, 2))
    return Tested(float(found), _share(drawn <= found + 1e-9))


def related_more(
    values: Float[Tensor, "layer concept concept"],
    related: Bool[Tensor, "concept concept"],
    draws: int,
    generator: torch.Generator,
) -> Tested:
    """Mean over related pairs less that over the others, averaged over layers; which pairs are related is permuted."""
    apart = _apart(len(related))
    mean = values.double().mean(0).masked_fill(~apart, 0.0)

    def difference(kin: Float[Tensor, "*draw concept concept"]) -> Float[Tensor, "*draw"]:
        others = apart.double() - kin
        return (mean * kin).sum((-2, -1)) / kin.sum((-2, -1)) - (mean * others).sum((-2, -1)) / others.sum((-2, -1))

    found = difference(related.double())
    drawn = difference(_permuted(related.double(), draws, generator))
    return Tested(float(found), _share(drawn >= found - 1e-9))


def falling(means: Float[Tensor, " layer"], draws: int, generator: torch.Generator) -> Tested:
    """Spearman correlation of numbers with their order, tested for being below 0 by permuting them."""
    order = torch.arange(len(means), dtype=torch.float64)
    if bool((means == means[0]).all()):
        return Tested(0.0, 1.0)
    mine, depth = _unit(ranks(means.double())), _unit(ranks(order))
    found = mine @ depth
    drawn = mine[_orders(len(means), draws, generator)] @ depth
    return Tested(float(found), _share(drawn <= found + 1e-9))


def own_more(values: Matrix, draws: int, generator: torch.Generator) -> Tested:
    """How far the diagonal lies above what its rows and columns let expect, on average, tested for being above 0.

    Which row belongs to which column is permuted; what a row or a column adds to all its entries plays no part.
    """
    found, n = values.diag().mean(), len(values)
    drawn = values[_orders(n, draws, generator), torch.arange(n)].mean(1)
    return Tested(float(beyond(values).diag().mean()), _share(drawn >= found - 1e-9))


def beyond(values: Matrix) -> Matrix:
    """Values less what their row and their column add, both estimated off the diagonal by least squares."""
    n = len(values)
    apart = _apart(n)
    row, column = apart.nonzero().T
    design = torch.cat([torch.eye(n, dtype=torch.float64)[each] for each in (row, column)], 1)  # (pair, effect)
    effects = torch.linalg.lstsq(design, values.double()[apart].unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return values.double() - effects[:n].unsqueeze(1) - effects[n:]


def holm(p_values: Sequence[float]) -> list[float]:
    """Probabilities of several tests, corrected for their number.

    References
    ----------
    Holm 1979, Scandinavian Journal of Statistics 6, 65–70.
    """
    found, least = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = least
    return found


# ------------------------------------------------------------------ intervals


def concepts_drawn(n: int, draws: int, generator: torch.Generator) -> Float[Tensor, "draw concept"]:
    """How often each concept is drawn, in bootstrap draws of concepts; the first row is once each."""
    picks = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(draws, n, dtype=torch.float64)
    )
    return torch.cat([torch.ones(1, n, dtype=torch.float64), counts])


def pair_means(
    values: Float[Tensor, "layer concept concept"],
    which: Bool[Tensor, "concept concept"],
    drawn: Float[Tensor, "draw concept"],
) -> Float[Tensor, "draw layer"]:
    """Mean over certain pairs in each draw; a pair counts as often as both its concepts. NaN where a draw has none."""
    masked = values.double() * which
    total = torch.einsum("di,dj,lij->dl", drawn, drawn, masked)
    return total / torch.einsum("di,dj,ij->d", drawn, drawn, which.double()).unsqueeze(1)


def concept_means(
    values: Float[Tensor, "layer concept"], drawn: Float[Tensor, "draw concept"]
) -> Float[Tensor, "draw layer"]:
    """Mean over concepts in each draw."""
    return drawn @ values.double().T / drawn.sum(1, keepdim=True)


def interval(drawn: Float[Tensor, " draw"], level: float = 0.95) -> Interval:
    """The first number, with the percentiles of the others; draws without a number are left out."""
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(drawn[1:].double(), tail).tolist()
    return Interval(float(drawn[0]), low, high)


# ------------------------------------------------------------------ below


def _apart(n: int) -> Tensor:
    return ~torch.eye(n, dtype=torch.bool)


def _orders(n: int, draws: int, generator: torch.Generator) -> Int[Tensor, "draw place"]:
    return torch.rand(draws, n, generator=generator, dtype=torch.float64).argsort(1)


def _permuted(matrix: Matrix, draws: int, generator: torch.Generator) -> Float[Tensor, "draw concept concept"]:
    """The matrix with its concepts in other orders, rows and columns alike."""
    orders = _orders(len(matrix), draws, generator)
    return matrix[orders[:, :, None], orders[:, None, :]]


def _share(extreme: Tensor) -> float:
    return (1 + int(extreme.sum())) / (1 + len(extreme))


def _standardised(values: Tensor, apart: Tensor) -> Tensor:
    """Ranks of the entries off the diagonal, of mean 0 and length 1; 0 on the diagonal."""
    found = torch.zeros_like(values, dtype=torch.float64)
    found[apart] = _unit(ranks(values[apart].double()))
    return found


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values - values.mean(), dim=0)
