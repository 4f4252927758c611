"""What people wrote about units and circuits: names and remarks, kept in the result folder.

``notes.json`` maps a key, ``layer:index`` or ``""`` for the circuit, to a `NoteData`. Writing one note reads the file
again first, so that two who write at the same time lose nothing but what they wrote about the same unit. A note that
was taken away stays in the file as one that says nothing, so that an older copy of it in memory does not bring it back.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from viscircuits.circuit import Circuit, Unit
from viscircuits.contract import NoteData
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import write_atomically

SCHEMA = "viscircuits/notes"
VERSION = 1
FILE = "notes.json"
LONGEST = {"name": 80, "text": 4000, "by": 80, "when": 40}  # characters

FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML 1.0

Notes = dict[str, NoteData]

_writing = threading.Lock()


def load_notes(folder: str | Path, *, taken_away: bool = False) -> Notes:
    """The notes of a result folder; none if nobody wrote any.

    Parameters
    ----------
    folder
        What `discover` wrote.
    taken_away
        Also those that say nothing any more.

    Raises
    ------
    FileFormatError
        If ``notes.json`` is not what its name says.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"cannot read notes from {str(path)!r}: {error}") from error
    if not isinstance(data, dict) or (data.get("schema"), data.get("version")) != (SCHEMA, VERSION):
        raise FileFormatError(f"{str(path)!r} does not hold viscircuits notes of version {VERSION}")
    try:
        notes = {_as_now(str(key)): _checked(_as_now(str(key)), note) for key, note in data["notes"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{str(path)!r} is damaged: {error}") from error
    return notes if taken_away else saying(notes)


def saying(notes: Mapping[str, NoteData]) -> Notes:
    """The notes that say anything."""
    return {key: note for key, note in notes.items() if note["name"] or note["text"]}


def save_notes(folder: str | Path, notes: Mapping[str, NoteData]) -> Path | None:
    """Write the notes into a result folder; without any there is no file."""
    path = Path(folder) / FILE
    if not notes:
        path.unlink(missing_ok=True)
        return None
    data = {"schema": SCHEMA, "version": VERSION, "notes": {key: dict(notes[key]) for key in sorted(notes)}}
    return write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def merge(mine: Mapping[str, NoteData], theirs: Mapping[str, NoteData]) -> Notes:
    """The notes of both, with those taken away; where both wrote about the same thing, the later one."""
    merged = dict(mine)
    for key, note in theirs.items():
        if key not in merged or _moment(note) > _moment(merged[key]):
            merged[key] = note
    return merged


def write_note(
    folder: str | Path, circuit: Circuit, key: str, *, name: str = "", text: str = "", by: str = ""
) -> Notes:
    """Keep a note in a result folder, and return all of them. A note that says nothing takes the old one away.

    Parameters
    ----------
    folder
        What `discover` wrote.
    circuit
        The circuit in it, to which the key must belong.
    key
        ``layer:index``, or ``""`` for the circuit as a whole.
    name, text, by
        A short name, any remark, and who says so.

    Raises
    ------
    ViscircuitsError
        If the key names nothing in the circuit's layers, or a text is too long.
    """
    check_key(circuit, key)
    moment = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    name, text, by = (writable(part) for part in (name, text, by))
    note = _checked(key, {"name": name, "text": text, "by": by, "when": moment})
    with _writing:
        notes = load_notes(folder, taken_away=True) | {key: note}
        save_notes(folder, notes)
    return saying(notes)


def check_key(circuit: Circuit, key: str) -> None:
    """See that a note's key is a unit of the circuit's layers, or ``""``.

    Raises
    ------
    ViscircuitsError
        If it is not.
    """
    if key == "":
        return
    unit = unit_of(key)
    if unit.layer not in circuit.widths:
        raise ViscircuitsError(f"a note on {key!r}: the circuit has no such layer; it has {', '.join(circuit.layers)}")
    n_units = circuit.widths[unit.layer]
    if not 0 <= unit.index < n_units:
        raise ViscircuitsError(f"a note on {key!r}: layer {unit.layer!r} has units 0 to {n_units - 1}")


def unit_of(key: str) -> Unit:
    """The unit that a key ``layer:index`` names.

    Raises
    ------
    ViscircuitsError
        If the key has no index.
    """
    layer, _, index = key.rpartition(":")  # a layer's own name may hold colons
    if not layer or not re.fullmatch(r"0|[1-9][0-9]{0,8}", index):  # one key for one unit
        raise ViscircuitsError(f"a note's key is layer:index, or nothing for the whole circuit; got {key!r}")
    return Unit(layer, int(index))


def _as_now(key: str) -> str:
    """A key as it is written now: an index could once have noughts before it."""
    layer, _, index = key.rpartition(":")
    return f"{layer}:{int(index)}" if re.fullmatch(r"[0-9]{1,9}", index) else key


def writable(text: str) -> str:
    """The text without blanks around it, halves of characters, which no file can hold, and what XML forbids."""
    return FORBIDDEN.sub("", text.encode("utf-8", "replace").decode("utf-8")).strip()


def _checked(key: Any, note: Mapping[str, Any]) -> NoteData:
    if key != "":
        unit_of(str(key))
    for part, longest in LONGEST.items():
        if not isinstance(note[part], str):
            raise ViscircuitsError(f"the {part} of a note is text, got {type(note[part]).__name__}")
        if len(note[part]) > longest:
            raise ViscircuitsError(
                f"the {part} of a note has {len(note[part])} characters; shorten it to {longest} or fewer"
            )
    return {"name": note["name"], "text": note["text"], "by": note["by"], "when": note["when"]}


def _moment(note: NoteData) -> datetime:
    try:
        moment = datetime.fromisoformat(note["when"])
    except ValueError:
        return datetime.min.replace(tzinfo=timezone.utc)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
