"""The forms a cotangent takes between two layers, from the cheapest to the fullest.

A cotangent holds the derivatives of several targets, one a row. Rows come first, then the axes of the
value it belongs to; `axis` is that value's unit axis, counting without the row axis, so that maps
(image, unit, height, width) have axis 1 and tokens (image, token, unit) have axis 2.

1. `One`: nothing but a map in a single unit. Activations, norms of batches, pooling, depthwise
   convolutions, concatenations and the identity of a residual block leave it so.
2. `Spread`: the same map in every unit, times a number for each. What mixes units at a single
   position (a 1×1 convolution, a linear layer) makes it out of `One`, and a further one only
   changes the numbers.
3. `Dense`: a map for each unit.
4. `Through` and `Unpooled`: a cotangent and a mixing of units, or a max-pooling, that it still has to
   go through; the norms of what would come out can be cheaper than the thing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class One:
    """Row r is zero but for unit `units[r]`, which holds `maps[r]`."""

    maps: Tensor  # (row, *axes but for the units')
    units: Tensor  # (row,)
    rows: Tensor  # (row,) which targets of the chunk
    axis: int


@dataclass(frozen=True)
class Spread:
    """Unit u of row r is `mix[r, u] · maps[r]`."""

    maps: Tensor  # (row, *axes but for the units')
    mix: Tensor  # (row, unit)
    rows: Tensor
    axis: int


@dataclass(frozen=True)
class Dense:
    """Every unit of every row."""

    maps: Tensor  # (row, *axes)
    rows: Tensor
    gain: Tensor | None = None  # to be multiplied in, along axis 1 of the value
    shared: bool = False  # somebody else reads these maps: do not write to them


@dataclass(frozen=True)
class Through:
    """What `maps`, units along `axis`, give when they are mixed by `mix` at each position, and `plus` beside it."""

    maps: Tensor  # (row, *axes) before the mixing
    mix: Tensor  # (unit before, unit after), or one such for each row
    rows: Tensor
    axis: int
    plus: One | Spread | None = None  # of the same rows


@dataclass(frozen=True)
class Factored:
    """Row r is `maps[r] · (mix[r] + tilt[r] · base)`, all with every axis, most of them of size one."""

    maps: Tensor  # (row, *axes), broadcasts
    mix: Tensor  # (row, *axes), broadcasts
    tilt: Tensor  # (row, *axes), broadcasts
    base: Tensor  # (1, *axes), the same for every target
    rows: Tensor
    origin: Any  # the operation that `base` stems from
    axis: int = 0  # of no meaning here: any axis may hold units

    def is_along(self, n: int) -> bool:
        """Whether the axes are n, and `mix` varies along the last of them only, `maps` and `tilt` not along it."""
        shape, sizes = self.base.shape[1:], self.mix.shape[1:]
        return len(shape) == n and sizes.numel() == sizes[-1] == shape[-1] and self.maps.shape[-1] == 1


@runtime_checkable
class MaxPool(Protocol):
    """What a max-pooling remembers."""

    given: Tensor  # (image, unit, height, width)
    indices: Tensor  # (image, unit, pooled height, pooled width) position of the largest value
    reach: list[int]  # how many neighbours further on a window overlaps with, down and across

    def back(self, maps: Tensor) -> Tensor:
        """(row, image, unit, pooled height, pooled width) → (row, image, unit, height, width)."""


@dataclass(frozen=True)
class Unpooled:
    """What `inner`, a cotangent of max-pooled maps, gives when each value goes back to where it was taken from."""

    inner: Spread | Dense | Through
    pool: MaxPool

    @property
    def rows(self) -> Tensor:
        """Which targets of the chunk."""
        return self.inner.rows

    @property
    def maps(self) -> Tensor:
        """Maps of the inner cotangent."""
        return self.inner.maps

    @property
    def axis(self) -> int:
        """Maps have their units there."""
        return 1


C = TypeVar("C", bound="One | Spread | Dense | Through | Unpooled | Factored")
Cotangent = One | Spread | Dense | Through | Unpooled | Factored


def as_dense(cotangent: Cotangent, n_units: int) -> Dense:
    """Return the same cotangent in full, nothing pending."""
    if isinstance(cotangent, Dense):
        return settled(cotangent)
    if isinstance(cotangent, Unpooled):
        return Dense(cotangent.pool.back(as_dense(cotangent.inner, n_units).maps), cotangent.rows)
    if isinstance(cotangent, Spread):
        axis = cotangent.axis + 1
        maps = cotangent.maps.unsqueeze(axis) * along(cotangent.mix, axis, cotangent.maps.ndim + 1)
        return Dense(maps, cotangent.rows)
    if isinstance(cotangent, Through):
        maps = mixed(cotangent.maps, cotangent.mix, cotangent.axis + 1)
        if cotangent.plus is not None:
            put_in(maps, cotangent.plus)
        return Dense(maps, cotangent.rows)
    if isinstance(cotangent, Factored):
        inner = torch.addcmul(cotangent.mix, cotangent.tilt, cotangent.base)
        return Dense(inner.mul_(cotangent.maps), cotangent.rows)
    shape = list(cotangent.maps.shape)
    shape.insert(cotangent.axis + 1, n_units)
    dense = Dense(cotangent.maps.new_zeros(shape), cotangent.rows)
    put_in(dense.maps, cotangent)
    return dense


def settled(cotangent: Dense) -> Dense:
    """Multiply the pending gain in."""
    if cotangent.gain is None:
        return cotangent
    gain = cotangent.gain.to(cotangent.maps.dtype)
    return Dense(cotangent.maps * along(gain[None], 2, cotangent.maps.ndim), cotangent.rows)


def along(per_unit: Tensor, axis: int, ndim: int) -> Tensor:
    """Shape (row or 1, unit) so that it broadcasts against rows of maps whose units lie along `axis`."""
    shape = [1] * ndim
    shape[0], shape[axis] = per_unit.shape
    return per_unit.reshape(shape)


def mixed(maps: Tensor, mix: Tensor, axis: int) -> Tensor:
    """Mix the units along `axis` at each position: (…, unit before, …) → (…, unit after, …)."""
    mix = mix.to(maps.dtype)
    if axis == maps.ndim - 1:
        return maps @ mix if mix.ndim == 2 else (maps.flatten(1, -2) @ mix).reshape(*maps.shape[:-1], -1)
    flat = maps.flatten(0, axis - 1).flatten(2)  # (row · axes before, unit before, position)
    if mix.ndim == 2:
        each = mix.t().expand(len(flat), -1, -1)  # matmul would copy to and fro
    else:
        each = mix.mT.repeat_interleave(len(flat) // len(mix), 0)
    return torch.bmm(each, flat).reshape(*maps.shape[:axis], mix.shape[-1], *maps.shape[axis + 1 :])


def put_in(maps: Tensor, light: One | Spread) -> None:
    """Add each row of a cotangent to `maps`, of the same rows, in place."""
    by_unit = maps.movedim(light.axis + 1, 1)  # (row, unit, *axes)
    if isinstance(light, One):
        by_unit[torch.arange(len(light.units), device=maps.device), light.units] += light.maps.to(maps.dtype)
        return
    mix = light.mix.reshape(*light.mix.shape, *[1] * (light.maps.ndim - 1))
    by_unit.addcmul_(mix.to(maps.dtype), light.maps.unsqueeze(1).to(maps.dtype))


def added(
    a: Cotangent, b: Cotangent, shape: Sequence[int]
) -> tuple[Cotangent | None, Cotangent | None, Cotangent | None]:
    """Add two cotangents of one value up: the rows that both have, those of `a` alone, those of `b` alone."""
    if a.rows.shape == b.rows.shape and torch.equal(a.rows, b.rows):
        return _same_rows(a, b, shape), None, None
    in_a, in_b = torch.isin(a.rows, b.rows), torch.isin(b.rows, a.rows)
    if not in_a.any():
        return None, a, b
    both = _same_rows(of_rows(a, in_a), of_rows(b, in_b), shape)  # rows are in rising order everywhere
    return both, None if in_a.all() else of_rows(a, ~in_a), None if in_b.all() else of_rows(b, ~in_b)


def of_rows(cotangent: C, mine: Tensor) -> C:
    """Some of its rows, `mine` a mask over them."""
    if mine.all():
        return cotangent
    if isinstance(cotangent, Unpooled):
        return cast(C, Unpooled(of_rows(cotangent.inner, mine), cotangent.pool))
    fields: dict[str, Any] = {"maps": cotangent.maps[mine], "rows": cotangent.rows[mine]}
    if isinstance(cotangent, One):
        fields["units"] = cotangent.units[mine]
    elif isinstance(cotangent, Spread) or (isinstance(cotangent, Through) and cotangent.mix.ndim == 3):
        fields["mix"] = cotangent.mix[mine]
    elif isinstance(cotangent, Through) and cotangent.plus is not None:
        fields["plus"] = of_rows(cotangent.plus, mine)
    elif isinstance(cotangent, Factored):
        fields |= {"mix": cotangent.mix[mine], "tilt": cotangent.tilt[mine]}
    return replace(cotangent, **fields)


def _same_rows(a: Cotangent, b: Cotangent, shape: Sequence[int]) -> Cotangent:
    if isinstance(a, One) and isinstance(b, One) and a.axis == b.axis and torch.equal(a.units, b.units):
        return replace(a, maps=a.maps + b.maps)
    if isinstance(a, One | Spread):
        a, b = b, a
    if (
        isinstance(a, Through)
        and isinstance(b, One | Spread)
        and a.plus is None
        and a.mix.ndim == 2
        and a.axis == b.axis
    ):
        return replace(a, plus=b)
    if isinstance(a, Factored):
        a, b = b, a
    dense = as_dense(a, shape[a.axis] if not isinstance(a, Dense) else 0)
    if isinstance(b, Factored):
        maps = dense.maps.clone() if dense.shared else dense.maps
        weight, mix, tilt, base = (each.to(maps.dtype) for each in (b.maps, b.mix, b.maps * b.tilt, b.base))
        return Dense(maps.addcmul_(weight, mix).addcmul_(tilt, base), a.rows)
    if not isinstance(b, One | Spread):
        return Dense(dense.maps + as_dense(b, 0).maps, a.rows)
    own = dense.maps.clone() if dense.shared else dense.maps
    put_in(own, b)
    return Dense(own, a.rows)


def scaled(cotangent: Cotangent, factor: float | int) -> Cotangent:
    """Multiply by a number."""
    if factor == 1:
        return cotangent
    if isinstance(cotangent, Through):
        plus = cotangent.plus and cast("One | Spread", scaled(cotangent.plus, factor))
        return replace(cotangent, mix=cotangent.mix * factor, plus=plus)
    if isinstance(cotangent, Unpooled):
        return replace(cotangent, inner=cast("Spread | Dense | Through", scaled(cotangent.inner, factor)))
    if isinstance(cotangent, Dense):
        return replace(cotangent, maps=cotangent.maps * factor, shared=False)
    return replace(cotangent, maps=cotangent.maps * factor)


def n_bytes(cotangent: Cotangent) -> int:
    """Memory of its maps."""
    return cotangent.maps.numel() * cotangent.maps.element_size()
