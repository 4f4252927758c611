"""Find the circuit of a visual concept in a pretrained vision model, test it, and edit it out.

::

    images ──attribute──▶ Attributions ──select──▶ Circuit ──evaluate──▶ Evaluation
                                                      └──────edit──────▶ a network without it

`discover` does all of it in one call. Importing this package loads nothing else; each name is
fetched from its room when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viscircuits.ablation import Statistics as Statistics
    from viscircuits.ablation import ablate as ablate
    from viscircuits.ablation import measure as measure
    from viscircuits.ablation import prune_edges as prune_edges
    from viscircuits.attribution import attribute as attribute
    from viscircuits.bundle import Bundle as Bundle
    from viscircuits.circuit import Circuit as Circuit
    from viscircuits.circuit import Edge as Edge
    from viscircuits.circuit import Unit as Unit
    from viscircuits.confidence import Confidence as Confidence
    from viscircuits.confidence import Stable as Stable
    from viscircuits.discovery import discover as discover
    from viscircuits.editing import Edited as Edited
    from viscircuits.editing import edit as edit
    from viscircuits.errors import ViscircuitsError as ViscircuitsError
    from viscircuits.evaluation import Evaluation as Evaluation
    from viscircuits.evaluation import evaluate as evaluate
    from viscircuits.featurevis.objectives import channel as channel
    from viscircuits.featurevis.objectives import direction as direction
    from viscircuits.featurevis.objectives import diversity as diversity
    from viscircuits.featurevis.objectives import neuron as neuron
    from viscircuits.featurevis.render import render as render
    from viscircuits.hooks import record as record
    from viscircuits.hooks import rewrite as rewrite
    from viscircuits.images import ImageSet as ImageSet
    from viscircuits.images import batches as batches
    from viscircuits.images import open_images as open_images
    from viscircuits.images import split as split
    from viscircuits.matrices import AttributionMatrix as AttributionMatrix
    from viscircuits.matrices import Attributions as Attributions
    from viscircuits.metrics import overlap as overlap
    from viscircuits.models import ModelSpec as ModelSpec
    from viscircuits.models import load_model as load_model
    from viscircuits.models import wrap as wrap
    from viscircuits.selection import select as select
    from viscircuits.suite import evaluate_fully as evaluate_fully

_ROOMS = {
    "ablation": ("Statistics", "ablate", "measure", "prune_edges"),
    "attribution": ("attribute",),
    "bundle": ("Bundle",),
    "circuit": ("Circuit", "Edge", "Unit"),
    "confidence": ("Confidence", "Stable"),
    "discovery": ("discover",),
    "editing": ("Edited", "edit"),
    "errors": ("ViscircuitsError",),
    "evaluation": ("Evaluation", "evaluate"),
    "featurevis.objectives": ("channel", "direction", "diversity", "neuron"),
    "featurevis.render": ("render",),
    "hooks": ("record", "rewrite"),
    "images": ("ImageSet", "batches", "open_images", "split"),
    "matrices": ("AttributionMatrix", "Attributions"),
    "metrics": ("overlap",),
    "models": ("ModelSpec", "load_model", "wrap"),
    "selection": ("select",),
    "suite": ("evaluate_fully",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("viscircuits")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'viscircuits' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"viscircuits.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
