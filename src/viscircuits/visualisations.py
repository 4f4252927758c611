"""Feature visualisations as values, and the folder they are kept in.

::

    visualisations/*.png       one picture each
    visualisations.json        which unit and kind each is, and what was measured on it

They are made by `viscircuits.featurevis`; to read, keep and show them no network is needed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from viscircuits.circuit import Unit
from viscircuits.errors import FileFormatError
from viscircuits.files import write_atomically

SCHEMA = "viscircuits/visualisations"
VERSION = 1
LISTING = "visualisations.json"
FOLDER = "visualisations"


@dataclass(frozen=True)
class Visualisation:
    """A picture that was made to excite a unit, or to silence it.

    Parameters
    ----------
    unit
        Which unit.
    kind
        What the picture maximises, for people: ``channel``, ``channel, negative``, ``channel, 2 of 4``.
    image
        The picture.
    objective
        What was maximised, measured on this picture as it is, without robustness transforms.
    activation
        The unit's largest value over the positions of this picture.
    exemplar_activation
        The same on the image that excites the unit most, as far as images were searched; None if none were.
    """

    unit: Unit
    kind: str
    image: Image.Image
    objective: float
    activation: float
    exemplar_activation: float | None = None


def save_visualisations(folder: str | Path, visualisations: Iterable[Visualisation]) -> Path:
    """Write the pictures and their listing into a result folder in place of those that were there.

    Returns the path of the listing; of no visualisations there is none.
    """
    folder = Path(folder)
    old = _files_listed(folder)
    listed: list[dict[str, Any]] = []
    for each in visualisations:
        layer = quote(each.unit.layer, safe="")  # one name for one layer, and no path
        rank = sum(other["layer"] == each.unit.layer and other["index"] == each.unit.index for other in listed)
        name = f"{FOLDER}/{layer}_{each.unit.index}_{rank}.png"
        buffer = io.BytesIO()
        each.image.save(buffer, format="PNG")
        write_atomically(folder / name, buffer.getvalue())
        listed.append(
            {
                "layer": each.unit.layer,
                "index": each.unit.index,
                "kind": each.kind,
                "file": name,
                "objective": each.objective,
                "activation": each.activation,
                "exemplar_activation": each.exemplar_activation,
            }
        )
    if listed:
        content = {"schema": SCHEMA, "version": VERSION, "pictures": listed}
        write_atomically(folder / LISTING, json.dumps(content, indent=1) + "\n")
    else:
        (folder / LISTING).unlink(missing_ok=True)
    for name in old - {each["file"] for each in listed}:
        (folder / name).unlink(missing_ok=True)
    return folder / LISTING


def load_visualisations(folder: str | Path) -> list[Visualisation]:
    """Read the visualisations in a result folder, in the order in which they were saved; none if it has none.

    Raises
    ------
    FileFormatError
        If the listing or a picture is damaged.
    """
    folder = Path(folder)
    if not (folder / LISTING).exists():
        return []
    try:
        data = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA or data["version"] != VERSION:
            raise ValueError(f"schema {data['schema']!r}, version {data['version']!r}")
        return [_loaded(folder, each) for each in data["pictures"]]
    except (OSError, KeyError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise FileFormatError(
            f"the visualisations in {str(folder)!r} are damaged ({error}); make them anew with `viscircuits render`"
        ) from error


def _loaded(folder: Path, about: dict[str, Any]) -> Visualisation:
    with Image.open(folder / FOLDER / Path(about["file"]).name, formats=["PNG"]) as image:
        picture = image.convert("RGB")
    exemplar = about["exemplar_activation"]
    return Visualisation(
        Unit(str(about["layer"]), int(about["index"])),
        str(about["kind"]),
        picture,
        float(about["objective"]),
        float(about["activation"]),
        None if exemplar is None else float(exemplar),
    )


def _files_listed(folder: Path) -> set[str]:
    """Names of the pictures that an earlier `save_visualisations` put there, and nothing outside."""
    try:
        listed = json.loads((folder / LISTING).read_text(encoding="utf-8"))["pictures"]
        return {f"{FOLDER}/{Path(each['file']).name}" for each in listed}
    except (OSError, KeyError, TypeError, ValueError):
        return set()
