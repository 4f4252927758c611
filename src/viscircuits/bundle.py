"""A result folder: circuit, attributions, evaluation, pictures and the page that shows them.

::

    circuit.json               the circuit, with everything that made it
    attributions.safetensors   every matrix, to select from again
    evaluation.json            what was measured
    pictures/                  image regions that excite each unit, and pictures.json about them
    index.html                 one page that opens from disk

The same inputs give the same bytes, but for the time in `circuit.json`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from PIL import Image

from viscircuits.circuit import Circuit, Unit
from viscircuits.errors import FileFormatError
from viscircuits.evaluation import Evaluation
from viscircuits.exemplars import Exemplar
from viscircuits.files import write_atomically
from viscircuits.matrices import Attributions
from viscircuits.page import page

PICTURES_SCHEMA = "viscircuits/pictures"


@dataclass(frozen=True)
class Bundle:
    """What one discovery found, in memory or read from its folder."""

    circuit: Circuit
    attributions: Attributions | None = None
    evaluation: Evaluation | None = None
    pictures: Mapping[Unit, Sequence[Exemplar]] = field(default_factory=dict)
    title: str = "circuit"
    command: str = ""

    def save(self, folder: str | Path) -> Path:
        """Write the folder; files that are there already are replaced one by one."""
        folder = Path(folder)
        data = {
            **self.circuit.to_json(),
            "title": self.title,
            "command": self.command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_atomically(folder / "circuit.json", json.dumps(data, indent=1) + "\n")
        if self.attributions is not None:
            self.attributions.save(folder / "attributions.safetensors")
        if self.evaluation is not None:
            self.evaluation.save(folder / "evaluation.json")
        if self.pictures:
            _save_pictures(folder / "pictures", self.pictures)
        write_atomically(folder / "index.html", self.page())
        return folder

    def page(self) -> str:
        """The page of this circuit, as HTML."""
        evaluation = self.evaluation.data if self.evaluation else None
        return page(self.circuit, evaluation, self.pictures or None, title=self.title, command=self.command)

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """Read a folder that `save` wrote. Parts that are missing stay None.

        Raises
        ------
        FileFormatError
            If there is no circuit, or a part is damaged.
        """
        folder = Path(folder)
        circuit = Circuit.load(folder)
        data = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
        return cls(
            circuit,
            Attributions.load(folder) if (folder / "attributions.safetensors").exists() else None,
            Evaluation.load(folder) if (folder / "evaluation.json").exists() else None,
            _load_pictures(folder / "pictures"),
            data.get("title", "circuit"),
            data.get("command", ""),
        )


def _save_pictures(folder: Path, pictures: Mapping[Unit, Sequence[Exemplar]]) -> None:
    listed = []
    for unit, exemplars in pictures.items():
        for rank, each in enumerate(exemplars):
            name = f"{unit.layer.replace(':', '-').replace('/', '-')}_{unit.index}_{rank}.png"
            buffer = io.BytesIO()
            each.image.save(buffer, format="PNG")
            write_atomically(folder / name, buffer.getvalue())
            about = {"layer": unit.layer, "index": unit.index, "rank": rank, "file": name, "image": each.name}
            listed.append({**about, "activation": each.activation, "box": list(each.box)})
    content = {"schema": PICTURES_SCHEMA, "version": 1, "pictures": listed}
    write_atomically(folder / "pictures.json", json.dumps(content, indent=1) + "\n")


def _load_pictures(folder: Path) -> dict[Unit, list[Exemplar]]:
    if not (folder / "pictures.json").exists():
        return {}
    try:
        listed = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))["pictures"]
        found: dict[Unit, list[Exemplar]] = {}
        for each in listed:
            with Image.open(folder / Path(each["file"]).name) as image:
                picture = image.convert("RGB")
            exemplar = Exemplar(each["image"], each["activation"], tuple(each["box"]), picture)
            found.setdefault(Unit(each["layer"], each["index"]), []).append(exemplar)
        return found
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"the pictures in {str(folder)!r} are damaged: {error}") from error
