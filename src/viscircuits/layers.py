"""Layer addresses, and a layer's output seen unit by unit.

An address names one tensor of one forward pass::

    inception4a            the output of the submodule of that name in `named_modules()`
    layer1.0.relu@1        its second call, for a module that runs more than once
    blocks.3.0.conv_pwl:in its input instead of its output
    encoder[0]             one element of a tuple or dictionary it returns

A unit is one index along the layer's unit axis: the channel axis of a convolutional map, the
feature axis of a token stream. Everything else (height, width, tokens) is a position.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from viscircuits.errors import LayerError

_ADDRESS = re.compile(r"(?P<name>[^@:\[\]]*)(?:@(?P<call>\d+))?(?:(?P<input>:in)|\[(?P<item>[^\[\]]+)\])?")


@dataclass(frozen=True)
class Address:
    """A parsed layer address; see the module's text for the grammar."""

    text: str
    name: str
    call: int | None = None
    input: bool = False
    item: str | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of a network as one execution showed it.

    Parameters
    ----------
    address
        What to call it.
    kind
        Class name of the module.
    shape
        Shape for one image, without the image axis.
    unit_axis
        Axis of the units, counting the image axis as 0; negative axes are resolved.
    """

    address: str
    kind: str
    shape: tuple[int, ...]
    unit_axis: int

    @property
    def n_units(self) -> int:
        """How many units the layer has."""
        return self.shape[self.unit_axis - 1]


def parse_address(text: str) -> Address:
    """Split a layer address into its parts.

    Raises
    ------
    LayerError
        If the text is not an address.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise LayerError(f"{text!r} is not a layer address; write NAME, NAME@CALL, NAME:in or NAME[ITEM]")
    call = match["call"]
    return Address(text, match["name"], None if call is None else int(call), bool(match["input"]), match["item"])


def by_unit(values: Float[Tensor, "image *axes"], unit_axis: int) -> Float[Tensor, "image unit position"]:
    """Bring the unit axis to the front and flatten the rest into positions."""
    return values.movedim(unit_axis, 1).flatten(2) if values.ndim > 2 else values.unsqueeze(2)


def along_units(
    per_unit: Float[Tensor, " unit"], like: Float[Tensor, "image *axes"], unit_axis: int
) -> Float[Tensor, "..."]:
    """Shape one number per unit so that it broadcasts against a layer's output."""
    shape = [1] * like.ndim
    shape[unit_axis] = -1
    return per_unit.to(like).reshape(shape)
