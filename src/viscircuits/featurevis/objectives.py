"""What a picture is made to maximise: values that add, subtract and scale.

::

    channel("layer3", 7) - 0.5 * channel("layer2", 1) + diversity("layer3")

An objective is a weighted sum of terms. A term says how strong something is in each picture of a group; it sees a
layer's output with the units on axis 1, whatever axis the network has them on, so that token streams and maps are
alike. Groups matter to `diversity` alone: every other term looks at each picture for itself.

References
----------
Olah, Mordvintsev & Schubert 2017, "Feature visualization", Distill, doi:10.23915/distill.00007.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.errors import LayerError, ViscircuitsError
from viscircuits.layers import Layer

Position = tuple[int, ...]


# ------------------------------------------------------------------ terms: how strong something is in each picture


@dataclass(frozen=True)
class _Channel:
    layer: str
    index: int

    def __call__(self, maps: Tensor) -> Tensor:
        return maps[:, self.index].flatten(1).mean(1) if maps.ndim > 2 else maps[:, self.index]

    def check(self, layer: Layer) -> None:
        _check_unit(layer, self.index)

    def __str__(self) -> str:
        return f"channel({self.layer}, {self.index})"


@dataclass(frozen=True)
class _Neuron:
    layer: str
    index: int
    position: Position | None

    def __call__(self, maps: Tensor) -> Tensor:
        place = tuple(size // 2 for size in maps.shape[2:]) if self.position is None else self.position
        _check_position(self.layer, place, tuple(maps.shape[2:]))
        where: tuple[int | slice, ...] = (slice(None), self.index, *place)
        return maps[where]

    def check(self, layer: Layer) -> None:
        _check_unit(layer, self.index)  # positions depend on the picture's size

    def __str__(self) -> str:
        where = "middle" if self.position is None else " ".join(map(str, self.position))
        return f"neuron({self.layer}, {self.index}, {where})"


@dataclass(frozen=True)
class _Direction:
    layer: str
    vector: tuple[float, ...]

    def __call__(self, maps: Tensor) -> Tensor:
        means = maps.flatten(2).mean(2) if maps.ndim > 2 else maps
        return means @ torch.tensor(self.vector, dtype=maps.dtype, device=maps.device)

    def check(self, layer: Layer) -> None:
        if len(self.vector) != layer.n_units:
            raise LayerError(
                f"a direction in layer {layer.address!r} has {layer.n_units} numbers, one a unit; got "
                f"{len(self.vector)}"
            )

    def __str__(self) -> str:
        digest = hashlib.sha256(repr(self.vector).encode()).hexdigest()[:16]
        return f"direction({self.layer}, {len(self.vector)} numbers {digest})"


@dataclass(frozen=True)
class _Diversity:
    layer: str

    def __call__(self, maps: Tensor) -> Tensor:
        if len(maps) == 1:
            return maps.new_zeros(1)
        each = maps.flatten(2)  # (image, unit, position)
        grams = (each @ each.mT).flatten(1)
        grams = grams / grams.norm(dim=1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny ** 0.5)
        alike = grams @ grams.T
        return -(alike.sum(1) - alike.diagonal()) / (len(maps) - 1)

    def check(self, layer: Layer) -> None:
        pass

    def __str__(self) -> str:
        return f"diversity({self.layer})"


def _factor(size: float) -> str:
    return "" if size == 1 else f"{size!r} "


Term: TypeAlias = _Channel | _Neuron | _Direction | _Diversity


# ------------------------------------------------------------------ objectives


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms; make one with `channel`, `neuron`, `direction` or `diversity`.

    Equal terms are one, terms of weight 0 are none, and the order in which they were written does not matter.
    """

    terms: tuple[tuple[float, Term], ...]

    def __add__(self, other: Objective) -> Objective:
        return _sum((*self.terms, *other.terms)) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, factor: int | float) -> Objective:
        if not isinstance(factor, int | float):
            return NotImplemented
        return _sum((weight * factor, term) for weight, term in self.terms)

    def __rmul__(self, factor: int | float) -> Objective:
        return self * factor

    def __truediv__(self, divisor: int | float) -> Objective:
        return self * (1 / divisor) if isinstance(divisor, int | float) else NotImplemented

    def __neg__(self) -> Objective:
        return self * -1

    def __sub__(self, other: Objective) -> Objective:
        return self + -other if isinstance(other, Objective) else NotImplemented

    def __str__(self) -> str:
        parts = [f"{'-' if weight < 0 else '+'} {_factor(abs(weight))}{term}" for weight, term in self.terms]
        return " ".join(parts).removeprefix("+ ") or "nothing"

    @property
    def layers(self) -> tuple[str, ...]:
        """Addresses of the layers it looks at, each once."""
        return tuple(dict.fromkeys(term.layer for _, term in self.terms))

    @property
    def units(self) -> tuple[tuple[str, int], ...]:
        """Layer and index of each unit that is named by itself."""
        named = [(term.layer, term.index) for _, term in self.terms if isinstance(term, _Channel | _Neuron)]
        return tuple(dict.fromkeys(named))

    def values(self, maps: Mapping[str, Tensor]) -> Float[Tensor, " image"]:
        """How strong it is in each picture of a group, given (image, unit, *position) for each of its layers."""
        return torch.stack([weight * term(maps[term.layer]) for weight, term in self.terms]).sum(0)

    def check(self, layers: Mapping[str, Layer]) -> None:
        """See that every term names something that is there.

        Raises
        ------
        LayerError
            If a unit, a position or a vector's length does not fit its layer.
        """
        for _, term in self.terms:
            term.check(layers[term.layer])


def channel(layer: str, index: int) -> Objective:
    """The mean over positions of a unit's activation."""
    return Objective(((1.0, _Channel(layer, int(index))),))


def neuron(layer: str, index: int, position: int | Position | None = None) -> Objective:
    """A unit's activation at one position.

    Parameters
    ----------
    position
        Row and column of a map, or the place of a token; None takes the middle.
    """
    place = (position,) if isinstance(position, int) else position if position is None else tuple(map(int, position))
    return Objective(((1.0, _Neuron(layer, int(index), place)),))


def direction(layer: str, vector: Iterable[int | float] | Tensor) -> Objective:
    """The mean over positions of a layer's activations along a vector; the vector's length does not matter."""
    numbers = torch.as_tensor(vector if isinstance(vector, Tensor) else list(vector)).detach().double().cpu().flatten()
    length = float(numbers.norm())
    if not 0 < length < float("inf"):
        raise ViscircuitsError(f"a direction is a vector of finite length, got one of length {length:g}")
    return Objective(((1.0, _Direction(layer, tuple((numbers / length).tolist()))),))


def diversity(layer: str) -> Objective:
    """How unlike the other pictures of its group each one is: less the mean cosine of their Gram matrices.

    From −1, all alike, to 0. A layer's Gram matrix says which units are active together, wherever that is.
    Add it to another objective and ask `render` for several pictures (`n`).
    """
    return Objective(((1.0, _Diversity(layer)),))


def _sum(terms: Iterable[tuple[float, Term]]) -> Objective:
    weights: dict[Term, float] = {}
    for weight, term in terms:
        weights[term] = weights.get(term, 0.0) + float(weight)
    return Objective(tuple((weights[term], term) for term in sorted(weights, key=str) if weights[term]))


def _check_unit(layer: Layer, index: int) -> None:
    if not 0 <= index < layer.n_units:
        raise LayerError(f"layer {layer.address!r} has units 0 to {layer.n_units - 1}, asked for {index}")


def _check_position(layer: str, place: Position, shape: tuple[int, ...]) -> None:
    if len(place) != len(shape) or not all(0 <= at < size for at, size in zip(place, shape, strict=True)):
        raise LayerError(
            f"layer {layer!r} has {'×'.join(map(str, shape)) or 'no'} positions for pictures of this size; "
            f"there is none at {place}"
        )
