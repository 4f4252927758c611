"""Attribution between two layers by what the network's structure allows: the loop's numbers, cheaper.

1. The way from target to source is read off the recorded autograd graph (`graph`).
2. A chunk of targets is carried down it at a time, each cotangent in the smallest form that is still
   exact (`forms`), by a rule for each kind of operation (`maps`, `tokens`). What has no rule is left
   to autograd, row by row.
3. What arrives at the source is scored in the form it arrives in (`scoring`), and let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from viscircuits.layers import Layer, by_unit
from viscircuits.scores.loop import Block, Score, Summary
from viscircuits.scores.structured import maps, tokens
from viscircuits.scores.structured.forms import One
from viscircuits.scores.structured.graph import Graph, Unsupported
from viscircuits.scores.structured.scoring import Scorer

__all__ = ["CHUNK_BYTES", "RULES", "Costs", "Unsupported", "blocks"]

CHUNK_BYTES = 16 * 2**20
N_TRIED = 8
RULES = {**maps.RULES, **tokens.RULES}


@dataclass
class Costs:
    """What targets of a pair take on the way, in bytes an image, found by trying a few of them.

    Handed from one batch to the next, so that they are tried once.
    """

    found: dict[int, float] = field(default_factory=dict)  # place among the rows wanted → bytes

    def chunks(self, rows: Tensor, most: float) -> Iterator[Tensor]:
        """Runs of rows that take at most `most` bytes an image, if none takes more than the nearest that were tried."""
        places = sorted(self.found)
        costs: list[float] = []
        for first, last in [*pairwise(places), (places[-1], len(rows))]:
            costs += [max(self.found[first], self.found.get(last, 0.0))] * (last - first)
        start, highest = 0, 0.0
        for i, cost in enumerate(costs):
            if i > start and max(highest, cost) * (i + 1 - start) > most:
                yield rows[start:i]
                start, highest = i, 0.0
            highest = max(highest, cost)
        yield rows[start:]


def blocks(
    source: Tensor,
    target: Tensor,
    source_layer: Layer,
    target_layer: Layer,
    score: Score,
    summary: Summary,
    rows: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    dtype: torch.dtype | None = None,
    left: set[str] | None = None,
    costs: Costs | None = None,
) -> Iterator[Block]:
    """Yield scores and signed contributions of every source, for a chunk of targets at a time.

    Parameters
    ----------
    source, target
        Recorded in one forward pass, with gradients.
    source_layer, target_layer
        Their layers.
    score, summary
        From `viscircuits.scores.formulas`.
    rows
        Which targets; all by default.
    chunk_bytes
        Memory that a chunk of targets may take on the way. Changes speed, not the result.
    dtype
        Of dense maps, by default the network's; sums over positions are kept in float32.
    left
        Gets the names of the operations that were left to autograd.
    costs
        Those found for the same pair and rows before, or empty ones to be filled.

    Raises
    ------
    Unsupported
        Before anything is yielded, if no cotangent can be carried from target to source.
    """
    if not (source.requires_grad and target.requires_grad):
        raise Unsupported("a way that no gradient takes")
    graph = Graph(source, target, RULES, dtype or target.dtype)
    rows = torch.arange(target_layer.n_units) if rows is None else rows
    own = _own_gradients(target, target_layer.unit_axis, summary)  # (target, image, *positions)
    with torch.no_grad():
        scorer = Scorer(source, source_layer.unit_axis, score, chunk_bytes)
        costs = Costs() if costs is None else costs
        if not costs.found:
            for place in torch.linspace(0, len(rows) - 1, min(N_TRIED, len(rows))).long().unique().tolist():
                graph.row_bytes = 0
                graph.pull(_start(own, rows[place : place + 1], target_layer.unit_axis))
                costs.found[place] = graph.row_bytes / len(source)
        for chunk in costs.chunks(rows, chunk_bytes / len(source)):
            parts = graph.pull(_start(own, chunk, target_layer.unit_axis))
            yield chunk, *scorer(parts, len(chunk))
    if left is not None:
        left |= graph.left


def _own_gradients(target: Tensor, axis: int, summary: Summary) -> Tensor:
    """`∂s_n/∂A_n` for every target: its summary sees no other unit, so one backward pass does all."""
    values = target.detach().requires_grad_()
    with torch.enable_grad():
        maps = by_unit(values, axis).float()  # (image, target, position)
        s = summary(maps.flatten(0, 1))
        (gradient,) = torch.autograd.grad(s.sum(), values)
    return gradient.movedim(axis, 0)


def _start(own: Tensor, targets: Tensor, axis: int) -> One:
    return One(own[targets], targets.to(own.device), torch.arange(len(targets), device=own.device), axis)
