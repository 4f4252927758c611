"""Images kept with a result, with how strongly each excites the circuit's units and what the network answered.

A probe *is* the picture that is kept: activations and answers are those of the network on it, so that whoever opens
the folder can run it again and get them. Values alone; `viscircuits.probing` computes them.

``probes/`` holds a PNG for each, and ``probes.json`` about them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from viscircuits.circuit import Unit
from viscircuits.contract import Answer
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import write_atomically

SCHEMA = "viscircuits/probes"
VERSION = 1
FOLDER = "probes"
LISTED = "probes.json"


@dataclass(frozen=True, eq=False)
class Probes:
    """Some images as the network sees them through a circuit.

    Parameters
    ----------
    names
        What each image is called.
    kinds
        ``concept``, ``reference``, or what the user calls it.
    pictures
        The images themselves, as given to the network's transform.
    units
        The units, in the order of the circuit.
    activations
        The largest value of each unit over positions.
    answers
        The network's strongest outputs on each image, strongest first; none for a network that gives embeddings.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    units: tuple[Unit, ...]
    activations: Float[np.ndarray, "probe unit"]
    answers: tuple[tuple[Answer, ...], ...]

    def __post_init__(self) -> None:
        counts = {len(self.names), len(self.kinds), len(self.pictures), len(self.answers), len(self.activations)}
        if counts != {len(self.names)} or self.activations.shape[1:] != (len(self.units),):
            raise ViscircuitsError(
                f"{len(self.names)} names, {len(self.kinds)} kinds, {len(self.pictures)} pictures, {len(self.answers)} "
                f"answers and activations of shape {self.activations.shape} for {len(self.units)} units do not belong "
                "together; give one of each a probe, one activation a probe and unit"
            )

    def __len__(self) -> int:
        return len(self.names)

    def save(self, folder: str | Path) -> Path:
        """Write the pictures and the list of them; pictures that an earlier list named are taken away."""
        folder = Path(folder)
        old = _files_listed(folder)
        listed = []
        for i, name in enumerate(self.names):
            buffer = io.BytesIO()
            self.pictures[i].save(buffer, format="PNG")
            write_atomically(folder / f"{i}.png", buffer.getvalue())
            values = [_written(value) for value in self.activations[i]]
            about = {"file": f"{i}.png", "name": name, "kind": self.kinds[i]}
            listed.append({**about, "answers": [dict(each) for each in self.answers[i]], "activations": values})
        units = [[unit.layer, unit.index] for unit in self.units]
        content = {"schema": SCHEMA, "version": VERSION, "units": units, "probes": listed}
        write_atomically(folder / LISTED, json.dumps(content, indent=1) + "\n")
        for file in old - {each["file"] for each in listed}:
            (folder / file).unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Probes:
        """Read what `save` wrote, from ``probes/`` or from the result folder that holds it.

        Raises
        ------
        FileFormatError
            If the list or a picture is missing or damaged.
        """
        folder = Path(folder)
        folder = folder if (folder / LISTED).exists() else folder / FOLDER
        try:
            data = json.loads((folder / LISTED).read_text(encoding="utf-8"))
            if (data["schema"], data["version"]) != (SCHEMA, VERSION):
                raise ValueError(f"no {SCHEMA} of version {VERSION}")
            listed = data["probes"]
            units = tuple(Unit(layer, int(index)) for layer, index in data["units"])
            values = np.array([each["activations"] for each in listed], dtype=np.float32)
            return cls(
                tuple(str(each["name"]) for each in listed),
                tuple(str(each["kind"]) for each in listed),
                tuple(_read(folder / Path(each["file"]).name) for each in listed),
                units,
                values.reshape(len(listed), len(units)),
                tuple(tuple(_answer(answer) for answer in each["answers"]) for each in listed),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"the probes in {str(folder)!r} are damaged: {error}") from error


def remove_probes(folder: str | Path) -> None:
    """Take away what `Probes.save` wrote into a folder."""
    folder = Path(folder)
    for file in _files_listed(folder):
        (folder / file).unlink(missing_ok=True)
    (folder / LISTED).unlink(missing_ok=True)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _answer(entry: Mapping[str, Any]) -> Answer:
    return {"index": int(entry["index"]), "label": str(entry["label"]), "probability": float(entry["probability"])}


def _written(value: np.floating) -> float:
    return float(str(np.float32(value)))  # the shortest text that comes back as the same float32


def _files_listed(folder: Path) -> set[str]:
    try:
        listed = json.loads((folder / LISTED).read_text(encoding="utf-8"))["probes"]
        return {Path(each["file"]).name for each in listed}
    except (OSError, KeyError, TypeError, ValueError):
        return set()
