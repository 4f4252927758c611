"""A result folder: circuit, attributions, evaluation, pictures and the page that shows them.

::

    circuit.json               the circuit, with everything that made it
    attributions.safetensors   every matrix, to select from again
    evaluation.json            what was measured
    pictures/                  image regions that excite each unit, and pictures.json about them
    connections.safetensors    what edges are made of: effective kernels, contributions on single images
    probes/                    images with what units and outputs make of them, and probes.json about them
    visualisations/            pictures made to excite a unit, and visualisations.json about them
    notes.json                 what people wrote about units; saving never takes a note away
    index.html                 one page that opens from disk

Every part but the circuit may be missing.

`discover` adds ``attributions.draws.safetensors``, the same with the bootstrap draws, where it is not
too large: needed only to select another circuit, free to be deleted.

The same inputs give the same bytes, but for the time in `circuit.json` and the seconds that each
pair of layers took in `attributions.safetensors`.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image

from viscircuits import connections as connections_file
from viscircuits import probes as probes_folder
from viscircuits.circuit import Circuit, Unit
from viscircuits.comparing import Comparison, elsewhere
from viscircuits.connections import Connections
from viscircuits.contract import NoteData
from viscircuits.drawing import to_html
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.evaluation import Evaluation
from viscircuits.exemplars import Exemplar
from viscircuits.files import write_atomically
from viscircuits.matrices import Attributions
from viscircuits.notes import check_key, load_notes, merge, save_notes, saying
from viscircuits.page import page
from viscircuits.plot import plot
from viscircuits.probes import Probes, remove_probes
from viscircuits.visualisations import LISTING, Visualisation, load_visualisations, save_visualisations
from viscircuits.widget import can_show, show_page

if TYPE_CHECKING:
    from anywidget import AnyWidget
    from matplotlib.figure import Figure

PICTURES_SCHEMA = "viscircuits/pictures"
MOST_BESIDE = 50  # folders beside a result that are looked at for circuits that share its units


@dataclass(frozen=True)
class Bundle:
    """What one discovery found, in memory or read from its folder."""

    circuit: Circuit
    attributions: Attributions | None = None
    evaluation: Evaluation | None = None
    pictures: Mapping[Unit, Sequence[Exemplar]] = field(default_factory=dict)
    title: str = "circuit"
    command: str = ""
    connections: Connections | None = None
    probes: Probes | None = None
    visualisations: Sequence[Visualisation] = ()
    notes: Mapping[str, NoteData] = field(default_factory=dict)

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
        for name, part in (
            ("attributions.safetensors", self.attributions),
            ("evaluation.json", self.evaluation),
            (connections_file.FILE, self.connections),
        ):
            if part is not None:
                part.save(folder / name)
            else:  # an older circuit's would pass for this one's
                (folder / name).unlink(missing_ok=True)
        _save_pictures(folder / "pictures", self.pictures)
        if self.probes is not None:
            self.probes.save(folder / probes_folder.FOLDER)
        else:
            remove_probes(folder / probes_folder.FOLDER)
        if self.visualisations or (folder / LISTING).exists():
            save_visualisations(folder, self.visualisations)
        if not self.visualisations:
            (folder / LISTING).unlink(missing_ok=True)
        notes = merge(load_notes(folder, taken_away=True), self.notes)  # somebody may have written one since
        save_notes(folder, notes)
        write_atomically(folder / "index.html", replace(self, notes=saying(notes)).page())
        return folder

    def page(
        self,
        *,
        comparison: Comparison | None = None,
        elsewhere: Mapping[str, Sequence[str]] | None = None,
        served: bool = False,
    ) -> str:
        """The page of this circuit, as HTML.

        Parameters
        ----------
        comparison
            Another circuit to lay over this one; its first circuit is this one.
        elsewhere
            Units, as ``layer:index``, with the titles of other circuits that hold them.
        served
            Whether a server gives the page, which it can then ask.
        """
        evaluation = self.evaluation.data if self.evaluation else None
        again = (evaluation or {}).get("command")
        return page(
            self.circuit if comparison is None else comparison.union(),
            evaluation,
            self.pictures or None,
            title=self.title,
            command=f"{self.command}\n{again}" if again else self.command,
            visualisations=self.visualisations,
            connections=self.connections,
            probes=self.probes,
            notes={key: note for key, note in self.notes.items() if _belongs(self.circuit, key)},
            comparison=comparison,
            elsewhere=elsewhere or {},
            served=served,
        )

    def __repr__(self) -> str:
        return f"Bundle({self.title!r}, {self.circuit!r})"

    def _repr_html_(self) -> str:
        return to_html(self.circuit, self.title)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        """What a notebook shows: the page if it can show widgets, else the static drawing."""
        fallback = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if not can_show():
            return fallback
        shown: Any = self.widget()._repr_mimebundle_(include=include, exclude=exclude)
        return fallback if shown is None else ({**shown[0], **fallback}, shown[1])

    def _display_(self) -> Any:  # marimo asks for this
        return self.widget() if can_show() else self.circuit

    def widget(self, height: int = 720) -> AnyWidget:
        """The page as a widget for Jupyter, VS Code and marimo; needs anywidget, and no network.

        Parameters
        ----------
        height
            In pixels.
        """
        return show_page(self.page(), height=height)

    def plot(self, **options: Any) -> Figure:
        """A figure for a paper with the exemplars as pictures, options as for `viscircuits.plot.plot`."""
        return plot(self.circuit, self.pictures, **options)

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
            Connections.load(folder) if (folder / connections_file.FILE).exists() else None,
            Probes.load(folder) if (folder / probes_folder.FOLDER / probes_folder.LISTED).exists() else None,
            tuple(load_visualisations(folder)),
            load_notes(folder),
        )


def page_of(
    folder: str | Path,
    *,
    other: str | Path | None = None,
    among: Sequence[str | Path] | None = None,
    served: bool = False,
) -> str:
    """The page of a result folder, which also says in which other circuits its units are.

    Parameters
    ----------
    folder
        What `discover` wrote.
    other
        Another result folder or ``circuit.json``, to be laid over it.
    among
        As for `circuits_beside`.
    served
        As for `Bundle.page`.

    Raises
    ------
    FileFormatError
        If a folder holds no circuit, or a part is damaged.
    ViscircuitsError
        If the two circuits are not of one network, or one of `among` is not.
    """
    bundle = Bundle.load(folder)
    found = elsewhere(bundle.circuit, circuits_beside(folder, bundle.circuit, among))
    if other is None:
        return bundle.page(elsewhere=found, served=served)
    second = Circuit.load(other)
    if second.provenance.get("weights") != bundle.circuit.provenance.get("weights"):
        warnings.warn("the two circuits were found in networks with different weights", stacklevel=2)
    return bundle.page(
        comparison=Comparison(bundle.circuit, second, _title(Path(other))), elsewhere=found, served=served
    )


def circuits_beside(
    folder: str | Path, circuit: Circuit, among: Sequence[str | Path] | None = None
) -> dict[str, Circuit]:
    """Circuits of other result folders that were found in the same weights, by title.

    Parameters
    ----------
    folder
        The result folder in question, which is left out.
    circuit
        Its circuit.
    among
        Folders to look at; by default those that stand beside it.

    Raises
    ------
    FileFormatError
        If one of `among` holds no circuit. A folder beside that holds none is passed over.
    ViscircuitsError
        If one of `among` is of other weights.
    """
    folder = Path(folder).resolve()
    beside = sorted(path.parent for path in folder.parent.glob("*/circuit.json"))[:MOST_BESIDE]
    found: dict[str, Circuit] = {}
    for path in beside if among is None else [Path(each) for each in among]:
        if path.resolve() == folder:
            continue
        try:
            other, title = Circuit.load(path), _title(path)
        except (FileFormatError, OSError):
            if among is not None:
                raise
            continue
        if other.provenance.get("weights") == circuit.provenance.get("weights"):
            found[title if title not in found else f"{title} ({path.name})"] = other
        elif among is not None:
            raise ViscircuitsError(
                f"the circuit in {str(path)!r} was found in other weights than that in {str(folder.name)!r}, "
                "so they share no units; leave it out"
            )
    return found


def _title(path: Path) -> str:
    """What the circuit in a result folder, or in its circuit.json, is called."""
    file = path / "circuit.json" if path.is_dir() else path
    return str(json.loads(file.read_text(encoding="utf-8")).get("title", file.parent.name or file.name))


def _belongs(circuit: Circuit, key: str) -> bool:
    try:
        check_key(circuit, key)
    except ViscircuitsError:
        return False
    return True


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
            name = f"{quote(unit.layer, safe='')}_{unit.index}_{rank}.png"  # one name for one layer, and no path
            buffer = io.BytesIO()
            each.image.save(buffer, format="PNG")
            write_atomically(folder / name, buffer.getvalue())
            about = {"layer": unit.layer, "index": unit.index, "rank": rank, "file": name, "image": each.name}
            said = {"shows": each.shows} if each.shows else {}
            listed.append({**about, "activation": each.activation, "box": list(each.box), **said})
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
            box, shows = tuple(each["box"]), str(each.get("shows", ""))
            exemplar = Exemplar(each["image"], each["activation"], box, picture, shows)
            found.setdefault(Unit(each["layer"], each["index"]), []).append(exemplar)
        return found
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the pictures in {str(folder)!r} are damaged: {error}") from error
