"""Gates: the ordinary layer that an edit puts where existing weights cannot say what is meant.

A residual stream carries a unit past every weight that could silence it. There an edit inserts a
`UnitGate`, one scale and one shift for each unit, with weights like any other layer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from viscircuits.errors import LayerError
from viscircuits.hooks import submodule
from viscircuits.layers import along_units, parse_address


class UnitGate(nn.Module):
    """Multiplies each unit by its scale and adds its shift: 1 and 0 leave it, 0 and c make it c."""

    def __init__(self, n_units: int, unit_axis: int) -> None:
        super().__init__()
        self.unit_axis = unit_axis
        self.scale = nn.Parameter(torch.ones(n_units))
        self.shift = nn.Parameter(torch.zeros(n_units))

    def forward(self, values: Float[Tensor, "image *axes"]) -> Float[Tensor, "image *axes"]:
        """Gate every unit."""
        scale, shift = (along_units(each, values, self.unit_axis) for each in (self.scale, self.shift))
        return values * scale + shift


class Gated(nn.Sequential):
    """A module with a gate behind it, or before it; called as the module alone is."""

    def __init__(self, *pair: nn.Module, gate_first: bool) -> None:
        super().__init__(*pair)
        self.gate_first = gate_first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run both; a gate before the module sees the tensor that the module reads first."""
        first, second = self
        if not self.gate_first:
            return second(first(*args, **kwargs))
        if args:
            return second(first(args[0]), *args[1:], **kwargs)
        key = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return second(**{**kwargs, key: first(kwargs[key])})


def insert_gates(model: nn.Module, gates: Mapping[str, Mapping[str, Any]]) -> dict[str, UnitGate]:
    """Put a gate at each address, after the module or, for ``:in``, before it. Changes `model`.

    Parameters
    ----------
    model
        The network to change.
    gates
        Address → ``{"n_units": …, "unit_axis": …}``.

    Returns
    -------
    dict
        Address → the gate, still open.

    Raises
    ------
    LayerError
        If an address means one call of several, or one element of a tuple.
    """
    made: dict[str, UnitGate] = {}
    for text in sorted(gates, key=lambda text: -text.count(".")):  # inner modules first, so that names stay true
        address = parse_address(text)
        if address.call is not None or address.item is not None or not address.name:
            raise LayerError(f"no gate can be put at {text!r}; choose the output of a module that runs once")
        module = submodule(model, address)
        gate = UnitGate(**gates[text]).to(_device_and_dtype(model))
        parent, _, name = address.name.rpartition(".")
        pair = (gate, module) if address.input else (module, gate)
        gated = Gated(*pair, gate_first=address.input).train(module.training)
        setattr(model.get_submodule(parent), name, gated)
        made[text] = gate
    return made


def ungated(module: nn.Module) -> nn.Module:
    """The module a gate was put behind, or the module itself."""
    gated = isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], UnitGate)
    return module[0] if gated else module  # type: ignore[index]


def _device_and_dtype(model: nn.Module) -> Tensor:
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
