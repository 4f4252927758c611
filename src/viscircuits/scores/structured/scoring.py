"""Scores and signed contributions of what arrives at the source, from the form it arrives in.

The norm of a `Spread` is a product of two norms. That of a `Through` needs no map for each unit: with
H the maps before the mixing W, `‖Wᵀ H‖² = diag(Wᵀ (H Hᵀ) W)`, and `⟨A, Wᵀ H⟩ = diag(Wᵀ (H Aᵀ))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from viscircuits.layers import by_unit
from viscircuits.scores.formulas import cla, grad_x_act, gradient_only, signed
from viscircuits.scores.loop import Score
from viscircuits.scores.structured.forms import (
    Cotangent,
    Dense,
    Factored,
    MaxPool,
    One,
    Spread,
    Through,
    Unpooled,
    as_dense,
    of_rows,
)
from viscircuits.scores.structured.graph import N_TEMPORARY

Many = Spread | Dense | Through | Unpooled | Factored  # forms that have something in every unit
Scored = tuple[Tensor, Tensor]  # scores and signed contributions, each (image, row, source)

# When a Gram matrix is cheaper than the maps: multiplications in the time that one number of a map
# takes to be written and read twice. Measured on two processors; the results do not depend on it.
PASSES = {torch.float32: 50, torch.bfloat16: 250}
N_POSITIONS = 384  # that a product of matrices needs to be worth reading a mixing for
MOST_WEIGHED = 1  # times the memory of a chunk, for what makes the overlap one product
FEWEST_ROWS = 3  # for which the product of a matrix is faster than that of numbers
MOST_MIXINGS = 8  # for which something is kept
FEW_OVERLAPS, MOST_OVERLAPS = 6, 64  # offsets at which max-pooling windows meet, up to which full maps cost more


class Scorer:
    """Turns cotangents of one source into its scores.

    Parameters
    ----------
    source
        The source's activation.
    axis
        Its unit axis.
    score
        One of `viscircuits.scores.formulas`.
    most_bytes
        Memory for maps that only scoring needs in full.
    """

    def __init__(self, source: Tensor, axis: int, score: Score, most_bytes: int) -> None:
        self.activation = by_unit(source.detach(), axis).float().contiguous()  # (image, source, position)
        self.shape = source.shape
        self.axis, self.score, self.most_bytes = axis, score, most_bytes
        self.size = _norms(self.activation).unsqueeze(1)
        self.turned = self.activation.transpose(1, 2).contiguous()  # (image, position, source)
        self.has_tokens = source.ndim > 2 and axis == source.ndim - 1
        self.pooled: dict[MaxPool, _Pooled] = {}
        self.squared: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a mixing: itself, and what was made of it
        self.weighed: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, parts: list[Cotangent], n_rows: int) -> Scored:
        """Score parts that have no row in common; rows that nothing reached are zero."""
        n_images, n_sources, _ = self.activation.shape
        values, contributions = (self.activation.new_zeros(n_images, n_rows, n_sources) for _ in range(2))
        for part in map(self._by_unit, parts):
            if isinstance(part, One):
                mine = self.activation[:, part.units]
                maps = _flat(part.maps).transpose(0, 1).float()
                values[:, part.rows, part.units] = self.score(mine, maps)
                contributions[:, part.rows, part.units] = signed(mine, maps)
                continue
            for few in self._few_rows(part):
                values[:, few.rows], contributions[:, few.rows] = self.score_rows(few)
        return values, contributions

    def _by_unit(self, part: Cotangent) -> Cotangent:
        """In full, if its form belongs to another axis than that of the source's units."""
        if isinstance(part, Dense | Factored) or part.axis == self.axis:
            return part
        return as_dense(part, self.shape[part.axis])

    def _few_rows(self, part: Many) -> Iterator[Many]:
        """The same in pieces, if it is to be scored in full and that takes too much."""
        is_pooled = isinstance(part, Unpooled) and self.score in (cla, gradient_only)
        like = part.pool.indices if is_pooled else self.activation  # type: ignore[union-attr]
        n_rows = max(1, self.most_bytes // (N_TEMPORARY * like.numel() * self.activation.element_size()))
        if isinstance(part, Dense) or len(part.rows) <= n_rows or self._needs_no_maps(part):
            yield part
            return
        places = torch.arange(len(part.rows), device=part.rows.device)
        for first in range(0, len(places), n_rows):
            yield of_rows(part, (places >= first) & (places < first + n_rows))

    def _needs_no_maps(self, part: Many) -> bool:
        if isinstance(part, Unpooled):
            return isinstance(part.inner, Spread) and self.score in (cla, gradient_only)
        if isinstance(part, Spread):
            return self.score in _SPREAD
        if self.has_tokens and isinstance(part, Through) and part.mix.ndim == 2:
            return True
        if isinstance(part, Dense | Factored):
            return False
        return self.score in (cla, gradient_only) and self._pays(part)

    def score_rows(self, part: Many) -> Scored:
        """Scores and contributions of these rows alone."""
        if isinstance(part, Unpooled):
            return self._unpooled(part)
        if isinstance(part, Spread) and self.score in _SPREAD:
            maps, mix = _flat(part.maps).transpose(0, 1).float(), part.mix.float()
            both = (_SPREAD[how](self.activation, maps, mix) for how in (self.score, signed))
            return next(both), next(both)
        if isinstance(part, Through) and self.score in (cla, gradient_only) and self._pays(part):
            return self._by_gram(part)
        if self.has_tokens:
            return self._tokens(part)
        dense = as_dense(part, self.activation.shape[1]).maps
        maps = _by_row(dense, self.axis)  # (image, row, source, position)
        return self._dense(maps)

    def _dense(self, maps: Tensor) -> Scored:
        """Score maps (image, row, source, position)."""
        maps = maps.float() if maps.dtype == torch.float64 else maps
        if self.score in (cla, gradient_only):
            values = torch.linalg.vector_norm(maps, dim=-1, dtype=torch.float32)
            values = values * self.size if self.score is cla else values
        else:
            values = self.score(self.activation.unsqueeze(1), maps.float())
        return values, self.contributions(maps)

    def contributions(self, maps: Tensor) -> Tensor:
        """Signed contributions of maps (image, row, source, position)."""
        if maps.shape[1] < FEWEST_ROWS:
            return (maps.float() * self.activation.unsqueeze(1)).sum(-1)
        each = [torch.einsum("rsp,sp->rs", m.float(), a) for m, a in zip(maps, self.activation, strict=True)]
        return torch.stack(each)

    def _unpooled(self, part: Unpooled) -> Scored:
        if part.pool not in self.pooled:
            self.pooled[part.pool] = _Pooled(part.pool, self.activation, self.most_bytes)
        pooled = self.pooled[part.pool]
        if self.score not in (cla, gradient_only) or not pooled.pays(part.inner):
            return self.score_rows(as_dense(part, self.activation.shape[1]))
        inner = part.inner
        if isinstance(inner, Through) and pooled.overlaps:
            inner = as_dense(inner, self.activation.shape[1])
        values, contributions = pooled.norms(inner)
        return (values * self.size if self.score is cla else values), contributions

    def _tokens(self, part: Spread | Dense | Through | Factored) -> Scored:
        """Units along the last axis: a few rows of an image at a time, whose maps stay in the processor's cache."""
        n_images, n_sources, n_positions = self.activation.shape
        mix = part.mix if isinstance(part, Through) and part.plus is None and part.mix.ndim == 2 else None
        rows = (as_dense(part, n_sources).maps if mix is None else part.maps).flatten(2, -2)
        values, contributions = (self.activation.new_empty(n_images, len(rows), n_sources) for _ in range(2))
        few = max(1, N_POSITIONS // n_positions)
        products = self.turned.new_empty(few, n_positions, n_sources)
        full = rows.new_empty(products.shape)
        for image, turned in enumerate(self.turned):
            for start in range(0, len(rows), few):
                before = rows[start : start + few, image]
                n = len(before)
                if mix is not None:
                    torch.mm(before.flatten(0, 1), mix, out=full[:n].flatten(0, 1))
                maps = (before if mix is None else full[:n]).float()  # (row, position, source)
                torch.sum(torch.mul(maps, turned, out=products[:n]), 1, out=contributions[image, start : start + n])
                values[image, start : start + n] = self._of_tokens(image, maps, products[:n])
        return (values * self.size if self.score is cla else values), contributions

    def _of_tokens(self, image: int, maps: Tensor, products: Tensor) -> Tensor:
        """Scores of maps (row, position, source), before the sizes of the sources' activations are multiplied in."""
        if self.score in (cla, gradient_only):
            return torch.mul(maps, maps, out=products).sum(1).sqrt_()
        return self.score(self.activation[image], maps.transpose(1, 2))

    def _pays(self, part: Through) -> bool:
        before, after = part.mix.shape[-2:]
        n_positions = self.activation.shape[2]
        return before * (before / (2 * after) + before / n_positions) < PASSES.get(part.maps.dtype, 50)

    def _by_gram(self, part: Through) -> Scored:
        maps = _by_row(part.maps, part.axis)  # (image, row, before, position)
        squares = self._squares(part.mix, maps @ maps.transpose(-2, -1))
        contributions = self._overlap(part.mix, maps)
        if part.plus is not None:
            self._add(part, part.plus, squares, contributions)
        values = squares.clamp(min=0).sqrt()
        if self.score is cla:
            values = values * self.size
        return values, contributions

    def _squares(self, mix: Tensor, gram: Tensor) -> Tensor:
        """`diag(Wᵀ Gram W)`: with `W_km W_lm` in one piece if it is small, which saves two passes."""
        if mix.ndim == 3 or len(mix) * mix.numel() * gram.element_size() > MOST_WEIGHED * self.most_bytes:
            return (gram @ mix.to(gram.dtype)).float().mul_(mix).sum(-2)
        square = _once(self.squared, mix, lambda: (mix[:, None] * mix).flatten(0, 1).to(gram.dtype))
        return (gram.flatten(-2) @ square).float()  # `square` is (before · before, source)

    def _overlap(self, mix: Tensor, maps: Tensor) -> Tensor:
        """`Σ_k W_km ⟨H_k, A_m⟩`: with `W_km A_m` in one piece if it is small, which saves a pass."""
        n_bytes = len(mix) * self.activation.numel() * maps.element_size()
        if mix.ndim == 2 and n_bytes <= MOST_WEIGHED * self.most_bytes:
            turned = self.turned.to(maps.dtype)
            weighed = _once(
                self.weighed, mix, lambda: (mix.to(maps.dtype)[None, :, None] * turned[:, None]).flatten(1, 2)
            )  # (image, before · position, source)
            return (maps.flatten(2) @ weighed).float()
        overlap = maps.flatten(1, 2) @ self.turned.to(maps.dtype)  # (image, row · before, source)
        return overlap.float().unflatten(1, maps.shape[1:3]).mul_(mix).sum(-2)

    def _add(self, part: Through, plus: One | Spread, squares: Tensor, contributions: Tensor) -> None:
        """`‖T + g‖² = ‖T‖² + 2⟨T, g⟩ + ‖g‖²`, in the unit of a `One` or in every unit of a `Spread`."""
        g = _flat(plus.maps).transpose(0, 1).float()  # (image, row, position)
        maps = _by_row(part.maps, part.axis).float()
        across = (maps @ g.unsqueeze(-1)).squeeze(-1)  # (image, row, before)
        if isinstance(plus, Spread):
            mix = plus.mix.float()
            squares += mix * (2 * across @ part.mix.float() + mix * g.square().sum(-1, keepdim=True))
            contributions += (g @ self.turned) * mix
            return
        rows, units = torch.arange(len(plus.units), device=squares.device), plus.units
        squares[:, rows, units] += 2 * (across * part.mix.float()[:, units].t()).sum(-1) + g.square().sum(-1)
        contributions[:, rows, units] += (self.activation[:, units] * g).sum(-1)


class _Pooled:
    """Scores of a max-pooling's source from cotangents that stay pooled.

    With U the way back, only values that were taken from the same position meet:
    `‖U x‖² = Σ_q x_q² + 2 Σ_{q<q'} x_q x_q'`, the second sum over such pairs of windows; and
    `⟨A, U x⟩ = ⟨A at the positions taken, x⟩`.
    """

    def __init__(self, pool: MaxPool, activation: Tensor, most_bytes: int) -> None:
        height, width = pool.given.shape[2:]
        taken = activation.gather(2, pool.indices.flatten(2))  # (image, source, pooled position)
        assert height * width == activation.shape[2]
        self.scorer = Scorer(taken, 1, gradient_only, most_bytes)
        self.overlaps = list(_overlaps(pool))
        self._for_spread: Tensor | None = None

    def pays(self, inner: Spread | Dense | Through) -> bool:
        """Whether this is cheaper than to go back to full maps."""
        return len(self.overlaps) <= (MOST_OVERLAPS if isinstance(inner, Spread) else FEW_OVERLAPS)

    def norms(self, inner: Spread | Dense | Through) -> Scored:
        """Norms of `U x` and the signed contributions: (image, row, source)."""
        if not self.overlaps:
            return self.scorer.score_rows(inner)
        if isinstance(inner, Spread):
            norms, contributions = self.scorer.score_rows(inner)
            maps = inner.maps.flatten(2).transpose(0, 1).float()  # (image, row, pooled position)
            pairs = torch.cat([maps[..., :-shift] * maps[..., shift:] for shift, _ in self.overlaps], 2)
            if self._for_spread is None:
                self._for_spread = torch.cat([same for _, same in self.overlaps], 2).transpose(1, 2)
            met = (pairs @ self._for_spread) * inner.mix.float().square()
            return (norms.square() + 2 * met).clamp(min=0).sqrt(), contributions
        maps = inner.maps.flatten(3).float()  # (row, image, source, pooled position)
        met = maps * 0.5
        for shift, same in self.overlaps:
            met[..., :-shift].addcmul_(same, maps[..., shift:])
        squares = 2 * met.mul_(maps).sum(-1).transpose(0, 1)
        return squares.clamp(min=0).sqrt(), self.scorer.contributions(maps.transpose(0, 1))


def _overlaps(pool: MaxPool) -> Iterator[tuple[int, Tensor]]:
    """For each distance at which windows overlap: the distance, and 1 where both took the same position."""
    down, across = pool.reach
    height, width = pool.indices.shape[2:]
    for y in range(down + 1):
        for x in range(-across, across + 1):
            if (y, x) <= (0, 0) or y >= height or abs(x) >= width:
                continue
            same = torch.zeros_like(pool.indices, dtype=torch.float32)
            columns = slice(max(0, -x), width - max(0, x))
            others = pool.indices[..., y:, max(0, x) : width - max(0, -x)]
            same[..., : height - y, columns] = (pool.indices[..., : height - y, columns] == others).float()
            if same.any():
                yield y * width + x, same.flatten(2)[..., : -(y * width + x)]


def _once(kept: dict[int, tuple[Tensor, Tensor]], mix: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """What was made of this very mixing before, or is now. A mixing made for one chunk alone must not stay for good."""
    if id(mix) not in kept:
        if len(kept) >= MOST_MIXINGS:
            kept.clear()
        kept[id(mix)] = mix, make()  # the mixing stays alive as long, so that no other gets its id
    return kept[id(mix)][1]


def _flat(maps: Tensor) -> Tensor:
    """(row, image, *positions) → (row, image, position)."""
    return maps.reshape(*maps.shape[:2], -1)


def _by_row(maps: Tensor, axis: int) -> Tensor:
    """(row, image, …, unit, …) → (image, row, unit, position)."""
    by_unit = maps.movedim(axis + 1, 2)
    return by_unit.reshape(*by_unit.shape[:3], -1).transpose(0, 1)


def _norms(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=-1)


# the formulas of scores/formulas.py for a gradient mix[r, s] · maps[r]: (image, source, position),
# (image, row, position), (row, source) → (image, row, source)
_SPREAD: Mapping[Score, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    cla: lambda a, g, mix: _norms(g).unsqueeze(2) * _norms(a).unsqueeze(1) * mix.abs(),
    grad_x_act: lambda a, g, mix: (g.abs() @ a.abs().transpose(1, 2)) * mix.abs(),
    signed: lambda a, g, mix: (g @ a.transpose(1, 2)) * mix,
    gradient_only: lambda a, g, mix: _norms(g).unsqueeze(2) * mix.abs(),
}
