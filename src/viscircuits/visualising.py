"""Feature visualisations for a result folder, and for units named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Unit
from viscircuits.discovery import model_of, strongest
from viscircuits.errors import ModelError, ViscircuitsError
from viscircuits.exemplars import exemplars
from viscircuits.featurevis.unit import visualise
from viscircuits.files import write_atomically
from viscircuits.images import open_images
from viscircuits.models import ModelSpec
from viscircuits.tracing import trace
from viscircuits.visualisations import FOLDER, Visualisation, save_visualisations

CACHE = "cache"


def parse_units(text: str) -> list[Unit]:
    """Units from ``LAYER:INDEX`` with commas between them.

    Raises
    ------
    ViscircuitsError
        If the text is something else.
    """
    units = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        layer, _, index = part.rpartition(":")
        if not layer or not index.isdecimal():
            raise ViscircuitsError(f"units are LAYER:INDEX with commas between them, got {part!r}")
        units.append(Unit(layer, int(index)))
    if not units:
        raise ViscircuitsError(f"no unit is named in {text!r}; write LAYER:INDEX with commas between them")
    return units


def visualise_circuit(
    folder: str | Path, *, per_layer: int = 4, weights: str | None = None, progress: bool = False, **options: Any
) -> list[Visualisation]:
    """Make pictures of a result's strongest units, put them in its folder, and draw its page anew.

    A run that was stopped goes on from the pictures that are finished (kept in ``visualisations/cache``).

    Parameters
    ----------
    per_layer
        Units of each layer, those with the highest scores.
    weights
        If the model's weights are elsewhere now.
    options
        As for `viscircuits.featurevis.unit.visualise`.
    """
    folder = Path(folder)
    circuit = Circuit.load(folder)
    spec = model_of(circuit, weights)
    pictures = Bundle.load(folder).pictures
    seen = {unit: max(each.activation for each in shots) for unit, shots in pictures.items() if shots}
    found = visualise(
        spec,
        strongest(circuit, per_layer),
        exemplars=seen,
        cache=folder / FOLDER / CACHE,
        progress=_bar(progress),
        **options,
    )
    save_visualisations(folder, found)
    write_atomically(folder / "index.html", Bundle.load(folder).page())
    return found


def visualise_units(
    spec: ModelSpec,
    units: Sequence[Unit],
    out: str | Path,
    *,
    images: str | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Visualisation]:
    """Make pictures of units and put them, with their listing, into a folder.

    Parameters
    ----------
    images
        Where to look for each unit's strongest exemplar, whose activation is set beside the picture's; None: nowhere.
    options
        As for `viscircuits.featurevis.unit.visualise`.
    """
    out = Path(out)
    seen = {} if images is None else _strongest_exemplars(spec, units, images, progress)
    found = visualise(spec, units, exemplars=seen, cache=out / FOLDER / CACHE, progress=_bar(progress), **options)
    save_visualisations(out, found)
    return found


def _strongest_exemplars(spec: ModelSpec, units: Sequence[Unit], images: str, progress: bool) -> dict[Unit, float]:
    if spec.transform is None:
        raise ModelError(
            "images need the model's transform: describe the model with viscircuits.wrap(model, transform)"
        )
    traced = trace(spec.model, spec.example())
    axes = {unit.layer: traced.layer(unit.layer).unit_axis for unit in units}
    found = exemplars(
        spec.model,
        units,
        open_images(images),
        spec.transform,
        n=1,
        unit_axes=axes,
        progress=_bar(progress, "exemplars"),
    )
    return {unit: shots[0].activation if shots else 0.0 for unit, shots in found.items()}  # without shots: silent


def _bar(shown: bool, what: str = "visualisations") -> Any:
    return lambda stream: tqdm(stream, desc=what, delay=2, disable=not shown)
