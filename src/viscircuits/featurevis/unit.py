"""Pictures of units: what excites each one, in several ways if asked for, and what silences it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from viscircuits.circuit import Unit
from viscircuits.featurevis.objectives import Objective, channel, diversity
from viscircuits.featurevis.render import SIZE, Rendered, on_noise, render
from viscircuits.models import ModelSpec
from viscircuits.visualisations import Visualisation

APART = 4.0  # weight of diversity, in units of what the layer does on noise


def visualise(
    model: nn.Module | ModelSpec,
    units: Iterable[Unit],
    *,
    negative: bool = False,
    diverse: int = 1,
    exemplars: Mapping[Unit, float] | None = None,
    **options: Any,
) -> list[Visualisation]:
    """Pictures that excite each unit, unit by unit.

    Parameters
    ----------
    negative
        Make pictures that lower the unit as well. After a ReLU a unit cannot be lower than silent, so ask for the
        input of the ReLU there (layer ``NAME:in``).
    diverse
        How many pictures of each kind; more than one are kept apart by the diversity of their layer.
    exemplars
        The largest activation of each unit on real images, to be set beside that of its pictures.
    options
        As for `render`: size, steps, seed, batch_size, progress, cache.
    """
    units = list(dict.fromkeys(units))
    apart = _weights(model, units, options) if diverse > 1 else {}
    kinds: dict[Objective, tuple[Unit, str]] = {}
    for unit in units:
        for sign, kind in ((1, "channel"), (-1, "channel, negative"))[: 1 + negative]:
            objective = sign * channel(unit.layer, unit.index)
            if diverse > 1:
                objective = objective + apart[unit.layer] * diversity(unit.layer)
            kinds[objective] = unit, kind
    found = render(model, list(kinds), n=diverse, **options)
    return [each for made in found for each in _pictures(made, *kinds[made.objective], exemplars or {})]


def _weights(model: nn.Module | ModelSpec, units: Iterable[Unit], options: Mapping[str, Any]) -> dict[str, float]:
    """How much diversity counts in each layer: it goes by no scale, activations by their network's."""
    maps = on_noise(model, [unit.layer for unit in units], size=options.get("size", SIZE))
    return {layer: round(APART * float(each.std()), 6) or APART for layer, each in maps.items()}


def _pictures(made: Rendered, unit: Unit, kind: str, exemplars: Mapping[Unit, float]) -> list[Visualisation]:
    several = len(made.images) > 1
    return [
        Visualisation(
            unit,
            f"{kind}, {i + 1} of {len(made.images)}" if several else kind,
            image,
            reached,
            peaks[str(unit)],
            exemplars.get(unit),
        )
        for i, (image, reached, peaks) in enumerate(zip(made.images, made.reached, made.peaks, strict=True))
    ]
