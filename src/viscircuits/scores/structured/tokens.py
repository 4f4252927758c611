"""Rules for tokens (image, token, unit): linear layers, layer norm, attention, changes of shape.

Where units are the last axis, a linear layer makes `Spread` out of `One`, and layer norm makes
`Factored` out of `Spread`: two factors that broadcast, whatever the target. A further linear layer
only changes those factors, and attention takes its products with the values from them; the first
full maps are those of queries, keys and values. Every rule for a change of shape moves the axes of
all forms alike; where the units are cut up, they are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from viscircuits.scores.structured import maps
from viscircuits.scores.structured.forms import (
    Cotangent,
    Dense,
    Factored,
    One,
    Spread,
    Through,
    Unpooled,
    as_dense,
    scaled,
)
from viscircuits.scores.structured.graph import Graph, Merge, Passed, Rule, Unknown
from viscircuits.scores.structured.maps import signed_int

Shape = tuple[int, ...]


def full(graph: Graph, node: Any, cotangent: Cotangent, output: int = 0) -> Tensor:
    """Maps (row, *axes) of what arrives at a node, written out, in the graph's dtype."""
    axis = 0 if isinstance(cotangent, Dense) else cotangent.axis
    return as_dense(cotangent, graph.shape_at((node, output))[axis]).maps.to(graph.dtype)


def only(graph: Graph, node: Any) -> int:
    """Which input of a node leads to the source, if it is just one."""
    on_way = [i for i, place in enumerate(node.next_functions) if graph.is_on(place)]
    if len(on_way) != 1:
        raise Unknown
    return on_way[0]


def to(graph: Graph, node: Any, i: int, cotangent: Cotangent) -> Passed:
    """The cotangent of a node's input `i`, and nothing for the others."""
    return [cotangent if j == i else None for j in range(len(node.next_functions))]


def spread(cotangent: One | Spread, n_units: int) -> Spread:
    """`One` as a `Spread` that has nothing in the other units."""
    if isinstance(cotangent, Spread):
        return cotangent
    mix = torch.nn.functional.one_hot(cotangent.units, n_units).to(cotangent.maps.dtype)
    return Spread(cotangent.maps, mix, cotangent.rows, cotangent.axis)


# ------------------------------------------------------------------ changes of shape


def moved(cotangent: Cotangent, move: Callable[[Tensor], Tensor], axis: int) -> Cotangent:
    """The same cotangent with its axes moved; `axis` is where the units come to lie."""
    if isinstance(cotangent, Dense):
        return Dense(move(cotangent.maps), cotangent.rows, shared=cotangent.shared)
    if isinstance(cotangent, Factored):
        a, m, b, base = map(move, (cotangent.maps, cotangent.mix, cotangent.tilt, cotangent.base))
        return replace(cotangent, maps=a, mix=m, tilt=b, base=base)
    if isinstance(cotangent, Through):
        plus = cotangent.plus and cast("One | Spread", moved(cotangent.plus, move, axis))
        return replace(cotangent, maps=move(cotangent.maps), axis=axis, plus=plus)
    if isinstance(cotangent, Unpooled):
        raise Unknown
    full_axes = move(cotangent.maps.unsqueeze(cotangent.axis + 1))
    return replace(cotangent, maps=full_axes.squeeze(axis + 1), axis=axis)


def reshaping(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Any operation that leaves the values in their order: view, flatten, squeeze, unsqueeze."""
    shape, before = graph.shape_at((node, 0)), graph.shape_at(node.next_functions[0])
    if prod(shape) != prod(before):
        raise Unknown
    if isinstance(cotangent, Dense):
        maps_ = full(graph, node, cotangent)
        return [Dense(maps_.reshape(len(maps_), *before), cotangent.rows, shared=cotangent.shared)]
    groups = _groups(shape, before)
    try:
        axis = 0 if isinstance(cotangent, Factored) else _unit_axis(cotangent.axis, shape, before, groups)
        return [moved(cotangent, lambda t: _regrouped(t, shape, before, groups), axis)]
    except ValueError:
        return [Dense(full(graph, node, cotangent).reshape(-1, *before), cotangent.rows)]


def _groups(shape: Shape, before: Shape) -> list[tuple[range, range]]:
    """Runs of axes that hold the same values in both shapes, as short as can be."""
    cuts = [(0, 0)]
    i = j = 0
    while i < len(shape) and j < len(before):
        i, j = i + 1, j + 1
        a, b = shape[i - 1], before[j - 1]
        while a != b:
            if a < b:
                a, i = a * shape[i], i + 1
            else:
                b, j = b * before[j], j + 1
        cuts.append((i, j))
    if len(cuts) == 1:
        return [(range(len(shape)), range(len(before)))]
    cuts[-1] = (len(shape), len(before))  # axes of size one that are left at the end
    return [(range(i, k), range(j, m)) for (i, j), (k, m) in pairwise(cuts)]


def _unit_axis(axis: int, shape: Shape, before: Shape, groups: list[tuple[range, range]]) -> int:
    """Where the units were, if their axis is not cut up or merged."""
    for mine, others in groups:
        if axis in mine:
            large = [j for j in others if before[j] != 1] or [others[0]]
            if len(large) == 1 and before[large[0]] == shape[axis]:
                return large[0]
    raise ValueError


def _regrouped(t: Tensor, shape: Shape, before: Shape, groups: list[tuple[range, range]]) -> Tensor:
    """Reshape (row, *axes), each group of which is whole, of size one, or a single axis of another size."""
    sizes = list(before)
    for mine, others in groups:
        have = prod(t.shape[i + 1] for i in mine)
        if have == prod(shape[i] for i in mine):
            continue
        large = [j for j in others if before[j] != 1] or [others[0]]
        if have != 1 and (len(large) != 1 or sum(shape[i] != 1 for i in mine) > 1):
            raise ValueError
        for j in others:
            sizes[j] = have if j == large[0] else 1
    return t.reshape(len(t), *sizes)


def transposed(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Two axes exchanged."""
    n = len(graph.shape_at((node, 0)))
    order = list(range(n))
    a, b = signed_int(node._saved_dim0) % n, signed_int(node._saved_dim1) % n
    order[a], order[b] = b, a
    return [_permuted(graph, node, cotangent, order)]


def two_axes(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """`x.t()`."""
    return [_permuted(graph, node, cotangent, [1, 0])]


def permuted(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Axes in another order."""
    dims = [signed_int(d) % len(node._saved_dims) for d in node._saved_dims]
    return [_permuted(graph, node, cotangent, dims)]


def _permuted(graph: Graph, node: Any, cotangent: Cotangent, dims: list[int]) -> Cotangent:
    back = [0, *(dims.index(i) + 1 for i in range(len(dims)))]
    if isinstance(cotangent, Dense) and cotangent.gain is not None:
        cotangent = as_dense(cotangent, 0)
    axis = 0 if isinstance(cotangent, Dense | Factored) else dims[cotangent.axis]
    return moved(cotangent, lambda t: t.permute(back), axis)


def expanded(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Values that were repeated get the sum."""
    shape, before = graph.shape_at((node, 0)), graph.shape_at(node.next_functions[0])
    if shape == before:
        return [cotangent]
    filled = (1,) * (len(shape) - len(before)) + before
    axes = [i + 1 for i, (a, b) in enumerate(zip(shape, filled, strict=True)) if a != b]
    maps_ = full(graph, node, cotangent)
    return [Dense((maps_.sum(axes, keepdim=True) if axes else maps_).reshape(-1, *before), cotangent.rows)]


def padding(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Zeros around any axes: cut off again."""
    sides = [signed_int(side) for side in node._saved_pad]
    if not any(sides):
        return [cotangent]
    shape = graph.shape_at((node, 0))
    if len(shape) == 4 and len(sides) <= 4 and (isinstance(cotangent, Dense | Through) or cotangent.axis == 1):
        return maps.padding(graph, node, written_out(graph, node, cotangent))
    if min(sides) < 0:
        raise Unknown
    whole = full(graph, node, cotangent)
    for i in range(len(sides) // 2):
        before, after = sides[2 * i : 2 * i + 2]
        dim = len(shape) - 1 - i
        whole = whole.narrow(dim + 1, before, shape[dim] - before - after)
    return [Dense(whole, cotangent.rows, shared=True)]


def token_mean(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A mean over some axes, none of them the units'."""
    before = tuple(node._saved_self_sym_sizes)
    axes = {signed_int(d) % len(before) for d in node._saved_dim or range(len(before))}
    kept = tuple(1 if i in axes else size for i, size in enumerate(before))
    ahead = graph.shape_at((node, 0))
    if not isinstance(cotangent, One | Spread):
        spaced = full(graph, node, cotangent).reshape(-1, *kept)
        return [Dense((spaced / prod(before[i] for i in axes)).expand(-1, *before), cotangent.rows, shared=True)]
    rest = [i for i in range(len(before)) if i not in axes] if len(ahead) < len(before) else list(range(len(before)))
    axis = rest[cotangent.axis]
    if axis in axes:
        raise Unknown
    small, large = (tuple(size for i, size in enumerate(each) if i != axis) for each in (kept, before))
    spaced = cotangent.maps.reshape(-1, *small) / prod(before[i] for i in axes)
    return [replace(cotangent, maps=spaced.expand(-1, *large), axis=axis)]


# ------------------------------------------------------------------ parts and what they are parts of


@dataclass(frozen=True)
class _Part:
    """Places `first, first + step, …` below `stop` of an axis, which is gone if there is just the one."""

    dim: int
    first: int
    stop: int
    step: int
    whole: Shape
    is_gone: bool = False

    def put_back(self, cotangent: Cotangent) -> Cotangent:
        """Zeros everywhere else."""
        if isinstance(cotangent, One | Spread):
            axis = cotangent.axis + (self.is_gone and self.dim <= cotangent.axis)
            if axis == self.dim:
                return self._among_units(cotangent)
            at = self.dim - (self.dim > axis)
            shape = tuple(size for i, size in enumerate(self.whole) if i != axis)
            return replace(cotangent, maps=self._placed(cotangent.maps, at, shape), axis=axis)
        maps_ = as_dense(cotangent, 0).maps
        return Dense(self._placed(maps_, self.dim, self.whole), cotangent.rows)

    def _placed(self, part: Tensor, dim: int, shape: Shape) -> Tensor:
        whole = part.new_zeros(len(part), *shape)
        self.within(whole, dim).copy_(part.unsqueeze(dim + 1) if self.is_gone else part)
        return whole

    def within(self, whole: Tensor, dim: int) -> Tensor:
        """The part itself in the whole (row, *axes)."""
        return whole[(slice(None),) * (dim + 1) + (slice(self.first, self.stop, self.step),)]

    def _among_units(self, cotangent: One | Spread) -> Cotangent:
        if isinstance(cotangent, One):
            return replace(cotangent, units=self.first + self.step * cotangent.units)
        mix = cotangent.mix.new_zeros(len(cotangent.mix), self.whole[self.dim])
        mix[:, self.first : self.stop : self.step] = cotangent.mix
        return replace(cotangent, mix=mix)


def selected(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """One place of an axis, which is gone."""
    whole = tuple(node._saved_self_sym_sizes)
    dim = signed_int(node._saved_dim) % len(whole)
    first = signed_int(node._saved_index) % whole[dim]
    return [_joined_in_place(graph, node, _Part(dim, first, first + 1, 1, whole, is_gone=True), cotangent)]


def sliced(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Places of an axis at equal distances."""
    whole, ahead = tuple(node._saved_self_sym_sizes), graph.shape_at((node, 0))
    dim = signed_int(node._saved_dim) % len(whole)
    start = signed_int(node._saved_start)
    start = min(max(start + whole[dim] * (start < 0), 0), whole[dim])
    if ahead[dim] == whole[dim]:
        return [cotangent]
    step = node._saved_step
    part = _Part(dim, start, start + (ahead[dim] - 1) * step + 1, step, whole)
    return [_joined_in_place(graph, node, part, cotangent)]


def _joined_in_place(graph: Graph, node: Any, part: _Part, cotangent: Cotangent) -> Cotangent | None:
    """Write a part beside the others that wait for the same value, which saves adding zeros up."""
    waiting = graph.waiting.get(node.next_functions[0], [])
    there = waiting[0] if len(waiting) == 1 else None
    if isinstance(cotangent, One | Spread) or not isinstance(there, Dense) or there.shared or there.gain is not None:
        return part.put_back(cotangent)
    if not torch.equal(there.rows, cotangent.rows):
        return part.put_back(cotangent)
    maps_ = as_dense(cotangent, 0).maps
    part.within(there.maps, part.dim).add_(maps_.unsqueeze(part.dim + 1) if part.is_gone else maps_)
    return None


def unbound(graph: Graph, node: Any, here: dict[int, Cotangent]) -> Cotangent:
    """All places of an axis, each by itself."""
    whole = graph.shape_at(node.next_functions[0])
    dim = signed_int(node._saved_dim) % len(whole)
    parts = [full(graph, node, here[i], i) if i in here else None for i in range(whole[dim])]
    known = [each for each in parts if each is not None]
    if len(known) == len(parts) and (joined := _side_by_side(known, dim + 1)) is not None:
        return Dense(joined, _rows(here), shared=True)  # the parts may be somebody else's
    empty = torch.zeros_like(known[0])
    return Dense(torch.stack([empty if each is None else each for each in parts], dim + 1), _rows(here))


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor | None:
    """Parts stacked along an axis, without a copy, if they lie at equal distances in one piece of memory."""
    first = parts[0]
    steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(parts)}
    alike = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parts)
    if not alike or len(steps) != 1 or min(steps) <= 0 or any(p.stride() != first.stride() for p in parts):
        return None
    size, stride = list(first.shape), list(first.stride())
    size.insert(dim, len(parts))
    stride.insert(dim, int(steps.pop()))
    return first.as_strided(size, stride)


def split(graph: Graph, node: Any, here: dict[int, Cotangent]) -> Cotangent:
    """Consecutive pieces of an axis."""
    whole = tuple(node._saved_self_sym_sizes)
    dim = signed_int(node._saved_dim) % len(whole)
    rows = _rows(here)
    shapes = [graph.shape_at((node, i)) for i in range(len(node._input_metadata))]
    if len(here) == 1:
        ((i, only_one),) = here.items()
        if isinstance(only_one, One | Spread) and only_one.axis == dim:
            return _shifted(only_one, sum(shape[dim] for shape in shapes[:i]), whole[dim])
    some = {i: full(graph, node, each, i) for i, each in here.items()}
    like = next(iter(some.values()))
    return Dense(
        torch.cat([some.get(i, like.new_zeros(1).expand(len(rows), *s)) for i, s in enumerate(shapes)], dim + 1), rows
    )


def _shifted(cotangent: One | Spread, start: int, n_units: int) -> Cotangent:
    if isinstance(cotangent, One):
        return replace(cotangent, units=cotangent.units + start)
    mix = cotangent.mix.new_zeros(len(cotangent.mix), n_units)
    mix[:, start : start + cotangent.mix.shape[1]] = cotangent.mix
    return replace(cotangent, mix=mix)


def _rows(here: dict[int, Cotangent]) -> Tensor:
    return next(iter(here.values())).rows


def stacked(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Values laid along a new axis get their places of it."""
    dim = signed_int(node._saved_dim) % len(graph.shape_at((node, 0)))
    maps_ = full(graph, node, cotangent)
    return [
        Dense(maps_.select(dim + 1, i), cotangent.rows, shared=True) if graph.is_on(place) else None
        for i, place in enumerate(node.next_functions)
    ]


# ------------------------------------------------------------------ linear layers, products


def linear(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A product of rows with a matrix, and perhaps something added."""
    where = only(graph, node)
    has_added = "Addmm" in node.name()
    if where == 0 and has_added:
        if node._saved_beta != 1 or graph.shape_at(node.next_functions[0]) != graph.shape_at((node, 0)):
            raise Unknown
        return to(graph, node, where, cotangent)
    if where != has_added:  # the matrix itself leads to the source
        raise Unknown
    matrix: Tensor = graph.keep(node, "matrix", lambda: _matrix(node, has_added))  # (unit before, unit after)
    return to(graph, node, where, _through_matrix(graph, node, cotangent, matrix))


def _matrix(node: Any, has_added: bool) -> Tensor:
    matrix: Tensor = node._saved_mat2.detach().t()
    return matrix * node._saved_alpha if has_added and node._saved_alpha != 1 else matrix


def _through_matrix(graph: Graph, node: Any, cotangent: Cotangent, matrix: Tensor) -> Cotangent:
    if isinstance(cotangent, One | Spread) and cotangent.axis == 1:
        mix = matrix[cotangent.units] if isinstance(cotangent, One) else cotangent.mix @ matrix
        return Spread(cotangent.maps, mix, cotangent.rows, 1)
    if isinstance(cotangent, Factored) and cotangent.is_along(2):
        base = graph.keep(node, f"base {id(cotangent.origin)}", lambda: cotangent.base @ matrix)
        return replace(cotangent, mix=cotangent.mix @ matrix, base=base)
    maps_ = full(graph, node, cotangent)
    return Through(maps_, graph.keep(node, "cast", lambda: matrix.to(graph.dtype).contiguous()), cotangent.rows, 1)


def scaling(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A product that does no more than weigh units (layer scale) keeps the form."""
    shape = graph.shape_at((node, 0))
    is_one_way = sum(map(graph.is_on, node.next_functions)) == 1
    if is_one_way and isinstance(cotangent, Spread | Factored | Through) and getattr(cotangent, "plus", None) is None:
        where = only(graph, node)
        factor = (node._saved_other, node._saved_self)[where]
        if isinstance(factor, Tensor) and graph.shape_at(node.next_functions[where]) == shape:
            weighed = _weighed(graph, node, cotangent, factor.detach(), len(shape))
            if weighed is not None:
                return to(graph, node, where, weighed)
    return maps.product(graph, node, written_out(graph, node, cotangent))


def _weighed(
    graph: Graph, node: Any, cotangent: Spread | Factored | Through, factor: Tensor, n: int
) -> Cotangent | None:
    sizes = (1,) * (n - factor.ndim) + tuple(factor.shape)
    if isinstance(cotangent, Factored):
        if not cotangent.is_along(n) or prod(sizes[:-1]) != 1:
            return None
        factor = factor.reshape(-1)
        base = graph.keep(node, f"base {id(cotangent.origin)}", lambda: cotangent.base * factor)
        return replace(cotangent, mix=cotangent.mix * factor, base=base)
    if prod(sizes) != sizes[cotangent.axis]:
        return None
    return replace(cotangent, mix=cotangent.mix * factor.reshape(-1).to(cotangent.mix.dtype))


def times_number(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A product with a number."""
    return [scaled(cotangent, node._saved_other)]


def batched_product(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A product of two stacks of matrices, either or both of which lead to the source."""
    first = "Baddbmm" in node.name()
    left, right = ("batch1", "batch2") if first else ("self", "mat2")
    alpha = node._saved_alpha if first else 1
    passed: Passed = [cotangent if node._saved_beta == 1 else None] if first else []
    if (
        first
        and graph.is_on(node.next_functions[0])
        and (node._saved_beta != 1 or graph.shape_at(node.next_functions[0]) != graph.shape_at((node, 0)))
    ):
        raise Unknown
    maps_ = full(graph, node, cotangent)  # (row, matrix, m, n)
    for place, other, is_left in zip(node.next_functions[first:], (right, left), (True, False), strict=True):
        if not graph.is_on(place):
            passed.append(None)
            continue
        factor = graph.keep(node, other, partial(_factor, graph, node, other, alpha))
        out = maps_.new_empty(len(maps_), *graph.shape_at(place))
        for row, into in zip(maps_, out, strict=True):
            torch.bmm(*((row, factor.mT) if is_left else (factor.mT, row)), out=into)
        passed.append(Dense(out, cotangent.rows))
    return passed


def _factor(graph: Graph, node: Any, name: str, alpha: float | int) -> Tensor:
    return getattr(node, f"_saved_{name}").detach().to(graph.dtype) * alpha


# ------------------------------------------------------------------ norms and attention


def layer_norm(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A norm over the last axis: the derivative takes out the mean and the part along what was normed."""
    given = node._saved_input
    if len(node._saved_normalized_shape) != 1 or not graph.is_on(node.next_functions[0]):
        raise Unknown
    if isinstance(cotangent, One | Spread) and cotangent.axis == given.ndim - 1:
        return to(graph, node, 0, _normed(graph, node, spread(cotangent, given.shape[-1])))
    maps_ = full(graph, node, cotangent)
    out = torch.empty_like(maps_, memory_format=torch.contiguous_format)
    rest = (list(node._saved_normalized_shape), node._saved_result1, node._saved_result2, node._saved_weight,
            node._saved_bias, [True, False, False])  # fmt: skip
    for row, into in zip(maps_, out, strict=True):
        into.copy_(torch.ops.aten.native_layer_norm_backward(row.to(given.dtype).contiguous(), given, *rest)[0])
    return to(graph, node, 0, Dense(out, cotangent.rows))


def _normed(graph: Graph, node: Any, cotangent: Spread) -> Factored:
    base, per_token = graph.keep(node, "normed", lambda: _normed_input(node))  # (1, *axes), (1, *axes, 1)
    weight = node._saved_weight
    mix = (cotangent.mix if weight is None else cotangent.mix * weight.detach()).float()
    maps_ = (cotangent.maps.unsqueeze(-1) * per_token).float()  # (row, *axes but for units, 1)
    along = (base.flatten(0, -2) @ mix.t() / base.shape[-1]).t().reshape(-1, *base.shape[1:-1], 1)
    mix = (mix - mix.mean(1, keepdim=True)).reshape(len(mix), *[1] * (base.ndim - 2), -1)
    return Factored(maps_, mix, -along, base, cotangent.rows, node)


def _normed_input(node: Any) -> tuple[Tensor, Tensor]:
    given, mean, per_token = (
        each.detach().float() for each in (node._saved_input, node._saved_result1, node._saved_result2)
    )
    return ((given - mean) * per_token).unsqueeze(0), per_token.unsqueeze(0)


def softmax(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Shares of one."""
    shares, dim = node._saved_result.detach(), signed_int(node._saved_dim) % node._saved_result.ndim
    maps_ = full(graph, node, cotangent)
    out = torch.empty_like(maps_)
    for row, into in zip(maps_, out, strict=True):
        into.copy_(torch.ops.aten._softmax_backward_data(row.to(shares.dtype), shares, dim, shares.dtype))
    return [Dense(out, cotangent.rows)]


class _Attention:
    """What the derivatives of an attention need that no target changes, each (image, head, token, …)."""

    def __init__(self, node: Any, dtype: torch.dtype) -> None:
        names = ("query", "key", "value", "output")
        query, key, value, out = (getattr(node, f"_saved_{name}").detach().float() for name in names)
        scale = query.shape[-1] ** -0.5 if node._saved_scale is None else node._saved_scale
        logits = query @ key.mT * scale
        if node._saved_attn_mask is not None:
            logits = logits + node._saved_attn_mask.detach().float()
        if node._saved_is_causal:
            logits = logits + torch.full_like(logits[0, 0], -torch.inf).triu(1)
        shares = logits.softmax(-1)  # (image, head, query, key)
        self.query, self.key = (query * scale).to(dtype), (key * scale).to(dtype)
        self.value, self.out, self.shares = value.to(dtype), out.to(dtype), shares.to(dtype)
        self.turned = self.shares.mT.contiguous()

    def tilted(self, base: Tensor) -> Tensor:
        """What `base` (image, head, token, number) alone would give the logits."""
        moved_ = base @ self.value.float().mT
        return self.shares * (moved_ - (moved_ * self.shares).sum(-1, keepdim=True)).to(self.shares.dtype)


def attention(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Scaled dot products, the softmax and the sum of values in one operation; one row and image at a time."""
    on_way = [graph.is_on(place) for place in node.next_functions]
    if node._saved_dropout_p or any(on_way[3:]) or node._saved_key.shape[1] != node._saved_query.shape[1]:
        raise Unknown
    kept: _Attention = graph.keep(node, "attention", lambda: _Attention(node, graph.dtype))
    if isinstance(cotangent, Factored) and _splits_heads(cotangent):
        pulled = _few_factors(graph, node, kept, cotangent)
    else:
        pulled = _in_full(kept, full(graph, node, cotangent))
    outs = _outputs(graph, node, len(cotangent.rows), kept.shares)
    places = product(range(len(cotangent.rows)), range(len(kept.shares)))
    for (i, image), (row, logits, weight) in zip(places, pulled, strict=True):
        query = kept.query[image] if weight is None else kept.query[image] * weight
        products = ((logits, kept.key[image]), (logits.mT, query), (kept.turned[image], row))
        for out, (left, right) in zip(outs, products, strict=True):
            if out is not None:
                torch.bmm(left, right, out=out[i, image])
        if weight is not None and outs[0] is not None:
            outs[0][i, image].mul_(weight)
    return [None if out is None else Dense(out, cotangent.rows) for out in (*outs, *[None] * (len(on_way) - 3))]


def _outputs(graph: Graph, node: Any, n_rows: int, like: Tensor) -> list[Tensor | None]:
    """Where queries', keys' and values' cotangents go; side by side where one linear layer makes all three."""
    places = node.next_functions[:3]
    shapes = [graph.shape_at(place) if graph.is_on(place) else None for place in places]
    if shapes[0] is None or len(set(shapes)) > 1:
        return [None if shape is None else like.new_empty(n_rows, *shape) for shape in shapes]
    n_images, n_heads, n_tokens, n = shapes[0]
    whole = like.new_empty(n_rows, n_images, n_tokens, 3, n_heads, n)
    return [whole[:, :, :, i].transpose(2, 3) for i in range(3)]


Pulled = Iterator[tuple[Tensor, Tensor, Tensor | None]]


def _in_full(kept: _Attention, rows: Tensor) -> Pulled:
    """Cotangents of the output and of the logits (head, token, …), and what else weighs the latter's rows."""
    logits = torch.empty_like(kept.shares[0])
    for row in rows:
        for image, each in enumerate(row):
            torch.bmm(each, kept.value[image].mT, out=logits)
            mean = (each * kept.out[image]).sum(-1, keepdim=True)
            yield each, logits.sub_(mean).mul_(kept.shares[image]), None


def _splits_heads(cotangent: Factored) -> bool:
    """Whether the factors are one for each token and one for each number of a head."""
    return cotangent.mix.shape[1::2] == (1, 1) and cotangent.maps.shape[2::2] == (1, 1)


def _few_factors(graph: Graph, node: Any, kept: _Attention, cotangent: Factored) -> Pulled:
    """The same from factors: their products with the values need no maps."""
    base = cotangent.base[0].to(graph.dtype)  # (image, head, token, number)
    tilted: Tensor = graph.keep(node, f"tilted {id(cotangent.origin)}", lambda: kept.tilted(cotangent.base[0].float()))
    logits = torch.empty_like(kept.shares[0])
    factors = (each.to(graph.dtype) for each in (cotangent.maps, cotangent.mix, cotangent.tilt))
    for a, m, b in zip(*factors, strict=True):  # (image, 1, token, 1), (1, head, 1, number), (image, 1, token, 1)
        for image in range(len(base)):
            value, out = kept.value[image] @ m[0].mT, kept.out[image] @ m[0].mT  # (head, token, 1)
            torch.sub(value.mT, out, out=logits).mul_(kept.shares[image]).addcmul_(tilted[image], b[image])
            yield torch.addcmul(m[0], b[image], base[image]).mul_(a[image]), logits, a[image]


def written_out(graph: Graph, node: Any, cotangent: Cotangent) -> Cotangent:
    """What other rules know: factors become maps."""
    return Dense(full(graph, node, cotangent), cotangent.rows) if isinstance(cotangent, Factored) else cotangent


def _with_factors_written_out(rule: Rule) -> Rule:
    return lambda graph, node, cotangent: rule(graph, node, written_out(graph, node, cotangent))


def _with_pools_written_out(rule: Rule) -> Rule:
    def settle(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
        return rule(graph, node, as_dense(cotangent, 0) if isinstance(cotangent, Unpooled) else cotangent)

    return settle


def addition(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A sum of values of one shape keeps factors."""
    if isinstance(cotangent, Factored) and node._saved_alpha == 1 and "Add" in node.name():
        shape = graph.shape_at((node, 0))
        places = [place for place in node.next_functions if graph.is_on(place)]
        if all(graph.shape_at(place) == shape for place in places):
            return [cotangent for _ in node.next_functions]
    return maps.add(graph, node, written_out(graph, node, cotangent))


def mean(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A mean over height and width, or over any axes."""
    try:
        return maps.spatial_mean(graph, node, written_out(graph, node, cotangent))
    except Unknown:
        return token_mean(graph, node, cotangent)


OWN: dict[str, Rule] = {
    **dict.fromkeys(
        ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1",
         "SqueezeBackward2", "UnsqueezeBackward0"),
        reshaping,
    ),
    "TransposeBackward0": transposed,
    "TBackward0": two_axes,
    "PermuteBackward0": permuted,
    "ExpandBackward0": expanded,
    "ConstantPadNdBackward0": padding,
    "MeanBackward1": mean,
    "SelectBackward0": selected,
    "SliceBackward0": sliced,
    "StackBackward0": stacked,
    "MulBackward0": scaling,
    "MulBackward1": times_number,
    "AddmmBackward0": linear,
    "MmBackward0": linear,
    "BmmBackward0": batched_product,
    "BaddbmmBackward0": batched_product,
    "NativeLayerNormBackward0": layer_norm,
    "SoftmaxBackward0": softmax,
    "SafeSoftmaxBackward0": softmax,
    "ScaledDotProductFlashAttentionForCpuBackward0": attention,
}  # fmt: skip
RULES: dict[str, Rule | Merge] = {
    **{name: _with_factors_written_out(rule) for name, rule in maps.RULES.items()},
    **{name: _with_pools_written_out(rule) for name, rule in OWN.items()},
    **dict.fromkeys(("CloneBackward0", "AliasBackward0"), maps.pass_on),
    **dict.fromkeys(("AddBackward0", "SubBackward0"), addition),
    "UnbindBackward0": Merge(unbound),
    "SplitBackward0": Merge(split),
    "SplitWithSizesBackward0": Merge(split),
}
