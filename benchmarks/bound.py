"""Multiply-adds that the one-channel structure leaves to do between two layers: what the engine could at best reach.

A count on paper. The recorded autograd graph is walked from target to source with three numbers at each
node: how many targets' cotangents are still one channel (`one`), one map times a number a channel (`spread`), or a
map for each channel (`dense`).

1. Whatever does not mix channels costs nothing and leaves `one` as it is. A concatenation shares the `one` targets
   out over its branches, by width; every branch gets all the others.
2. The first mixing operation costs what its kernels of one channel cost; a 1×1 convolution or a matrix product
   costs nothing and leaves a `spread`. On a `spread` a further one costs one small product without positions.
3. A non-linearity between makes `dense` of a `spread`. A `dense` target costs the operation's whole transpose.
4. Where ways meet, targets that arrive twice are `dense`.

It is the least for this way of working, not for every way: identities across operations (a Gram matrix instead of
a map, a composed kernel) can be cheaper. As in `torch.utils.flop_counter` only products and convolutions count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch.autograd.graph import get_gradient_edge

from ways import Pair

# what a spread survives: linear, and the same in every channel up to a factor
ALIKE = ("NativeBatchNorm", "Add", "AvgPool2D", "Mean", "AdaptiveAvgPool2D", "Clone", "ConstantPadNd", "Cat",
         "View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Expand", "Alias", "ToCopy")  # fmt: skip
# what a single channel survives besides
APART = ("Relu", "Hardtanh", "Gelu", "Silu", "Hardswish", "Sigmoid", "MaxPool2DWithIndices", "Mul", "Pow")


@dataclass(frozen=True)
class Carried:
    """How many targets' cotangents are in which form at one node."""

    one: float = 0
    spread: float = 0
    dense: float = 0

    @property
    def total(self) -> float:
        return self.one + self.spread + self.dense

    def joined(self, other: Carried, n: int) -> Carried:
        both = Carried(self.one + other.one, self.spread + other.spread, self.dense + other.dense)
        if both.total <= n:
            return both
        dense = min(n, both.spread + both.dense)
        return Carried(n - dense, 0, dense)


Step = Callable[[Any, Carried], tuple[Carried, float]]  # what is handed on, and what it cost


def bound(pair: Pair) -> float:
    """Floating-point operations (two a multiply-add) for all targets and images of a pair."""
    edge = get_gradient_edge(pair.source)
    waiting = {get_gradient_edge(pair.target).node: Carried(one=pair.n_targets)}
    total = 0.0
    for node in between(next(iter(waiting)), edge.node):
        here = waiting.pop(node, None)
        if here is None or node is edge.node:
            continue
        passed, cost = _step(node)(node, here)
        total += cost
        for following, share in _shared(node, passed):
            if following is not None:
                waiting[following] = waiting.get(following, Carried()).joined(share, pair.n_targets)
    return total


def between(start: Any, end: Any) -> list[Any]:
    """Nodes from `start` on that lead to `end`, each before those it hands its cotangent to."""
    leads, order, stack = {end: True}, [], [(start, False)]
    while stack:
        node, seen = stack.pop()
        following = [each for each, _ in node.next_functions if each is not None]
        if seen:
            leads[node] = any(leads[each] for each in following)
            order += [node] if leads[node] else []
        elif node not in leads:
            leads[node] = False
            stack += [(node, True), *((each, False) for each in following if each not in leads)]
    return order[::-1]


def shape_of(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _shared(node: Any, carried: Carried) -> list[tuple[Any, Carried]]:
    following = [each for each, _ in node.next_functions]
    if not node.name().startswith("CatBackward"):
        return [(each, carried) for each in following]
    widths = [0 if each is None else shape_of(each)[1] for each in following]
    return [
        (each, replace(carried, one=carried.one * width / sum(widths)))
        for each, width in zip(following, widths, strict=True)
    ]


def _step(node: Any) -> Step:
    kind = node.name().rpartition("::")[2].partition("Backward")[0]
    if kind in STEPS:
        return STEPS[kind]
    if kind in ALIKE:
        return lambda node, carried: (carried, 0)
    if kind in APART:
        return lambda node, carried: (Carried(carried.one, 0, carried.spread + carried.dense), 0)
    return lambda node, carried: (Carried(dense=carried.total), 0)


def _convolution(node: Any, carried: Carried) -> tuple[Carried, float]:
    n_out, n_in, *kernel = node._saved_weight.shape  # n_in channels of one group
    positions = shape_of(node)[0] * prod(shape_of(node)[2:])
    window = prod(kernel)
    whole = carried.dense * 2 * positions * n_out * n_in * window
    if node._saved_groups > 1 and n_in == 1:  # depthwise
        apart = (carried.one + carried.spread * n_out) * 2 * positions * window
        return Carried(carried.one, 0, carried.spread + carried.dense), whole + apart
    combined = carried.spread * 2 * n_out * n_in * window
    if window == 1:
        return Carried(0, carried.one + carried.spread, carried.dense), whole + combined
    fan_out = (carried.one + carried.spread) * 2 * positions * n_in * window
    return Carried(dense=carried.total), whole + combined + fan_out


def _product(node: Any, carried: Carried) -> tuple[Carried, float]:
    n_in, n_out = node._saved_mat2.shape
    positions = prod(shape_of(node)[:-1])
    cost = 2 * n_in * n_out * (carried.spread + carried.dense * positions)
    return Carried(0, carried.one + carried.spread, carried.dense), cost


def _attention(node: Any, carried: Carried) -> tuple[Carried, float]:
    """Four products of scores with features a target; the scores themselves are the same for all."""
    *heads, n_tokens, width = node._saved_query.shape
    return Carried(dense=carried.total), carried.total * 4 * 2 * prod(heads) * n_tokens**2 * width


STEPS: dict[str, Step] = {
    "Convolution": _convolution,
    "Addmm": _product,
    "Mm": _product,
    "ScaledDotProductFlashAttentionForCpu": _attention,
}
