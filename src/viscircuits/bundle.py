"""A result folder: circuit, attributions, evaluation, pictures and the page that shows them.

::

    circuit.json               the circuit, with everything that made it
    attributions.safetensors   every matrix, to select from again
    evaluation.json            what was measured
    pictures/                  image regions that excite each unit, and pictures.json about them
    index.html                 one page that opens from disk

`discover` adds ``attributions.draws.safetensors``, the same with the bootstrap draws, where it is not
too large: needed only to select another circuit, free to be deleted.

The same inputs give the same bytes, but for the time in `circuit.json` and the seconds that each
pair of layers took in `attributions.safetensors`.
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
        """Write the folder; files that are there already are replaced one by one, and parts it lacks taken away."""
        folder = Path(folder)
        data = {
            **self.circuit.to_json(),
            "title": self.title,
            "command": self.command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_atomically(folder / "circuit.json", json.dumps(data, indent=1) + "\n")
        for name, part in (("attributions.safetensors", self.attributions), ("evaluation.json", self.evaluation)):
            if part is not None:
                part.save(folder / name)
            else:  # an older circuit's would pass for this one's
                (folder / name).unlink(missing_ok=True)
        _save_pictures(folder / "pictures", self.pictures)
        write_atomically(folder / "index.html", self.page())
        return folder

    def page(self) -> str:
        """The page of this circuit, as HTML."""
        evaluation = self.evaluation.data if self.evaluation else None
        again = (evaluation or {}).get("command")
        command = f"{self.command}\n{again}" if again else self.command
        return page(self.circuit, evaluation, self.pictures or None, title=self.title, command=command)

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
        attributions = Attributions.load(folder) if (folder / "attributions.safetensors").exists() else None
        evaluation = Evaluation.load(folder) if (folder / "evaluation.json").exists() else None
        _check_belongs(circuit, attributions, folder)
        return cls(
            circuit,
            attributions,
            evaluation,
            _load_pictures(folder / "pictures"),
            data.get("title", "circuit"),
            data.get("command", ""),
        )


def _check_belongs(circuit: Circuit, attributions: Attributions | None, folder: Path) -> None:
    """Matrices copied from another result would make the controls those of another concept."""
    if attributions is None:
        return
    ours, theirs = (each.provenance.get("images", {}).get("digest") for each in (circuit, attributions))
    if ours and theirs and ours != theirs:
        raise FileFormatError(
            f"{str(folder / 'attributions.safetensors')!r} was made from other images than the circuit beside it; "
            "take the file away, or discover again"
        )


def _save_pictures(folder: Path, pictures: Mapping[Unit, Sequence[Exemplar]]) -> None:
    old = _files_listed(folder)
    listed = []
    for unit, exemplars in pictures.items():
        for rank, each in enumerate(exemplars):
            name = f"{unit.layer.replace(':', '-').replace('/', '-')}_{unit.index}_{rank}.png"
            buffer = io.BytesIO()
            each.image.save(buffer, format="PNG")
            write_atomically(folder / name, buffer.getvalue())
            about = {"layer": unit.layer, "index": unit.index, "rank": rank, "file": name, "image": each.name}
            listed.append({**about, "activation": each.activation, "box": list(each.box)})
    if listed:
        content = {"schema": PICTURES_SCHEMA, "version": 1, "pictures": listed}
        write_atomically(folder / "pictures.json", json.dumps(content, indent=1) + "\n")
    else:
        (folder / "pictures.json").unlink(missing_ok=True)
    for name in old - {each["file"] for each in listed}:
        (folder / name).unlink(missing_ok=True)


def _files_listed(folder: Path) -> set[str]:
    """Names of the pictures that an earlier `save` put into the folder."""
    try:
        listed = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))["pictures"]
        return {Path(each["file"]).name for each in listed}
    except (OSError, KeyError, TypeError, ValueError):
        return set()


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
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the pictures in {str(folder)!r} are damaged: {error}") from error
