"""Labels: which of the model's classes each picture shows.

1. A table ``path,label`` says it outright. Without one the picture's label is asked, then the
   folder it lies in, then its file name (``281_tabby.jpg``, ``n02123045_17.jpg``).
2. A label is compared with every name of every class: case, underscores and hyphens do not
   count, a plural is tried when nothing fits as it stands.
3. A label that fits several classes is an error that lists them; one that fits none is an error
   as soon as another picture's fits, because a share of the pictures would silently be left out.

When no label fits any class, nothing is known and nothing is guessed: every index is None.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from viscircuits.errors import ViscircuitsError, closest

Classes = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Labels:
    """The class of each picture.

    Parameters
    ----------
    indices
        For each picture its class index, or None when it is not known.
    origin
        Where they were read: ``table``, ``labels``, ``folders``, ``file names``, several of the
        last three, or ``none``.
    unmatched
        Names of the pictures whose class is not known.
    """

    indices: tuple[int | None, ...]
    origin: str
    unmatched: tuple[str, ...]

    @property
    def n_matched(self) -> int:
        """How many pictures have a known class."""
        return len(self.indices) - len(self.unmatched)


def match_labels(
    names: Sequence[str],
    labels: Sequence[str | None],
    classes: Classes | None,
    *,
    table: str | Path | Mapping[str, str] | None = None,
    leading_index: bool = False,
    partly: bool = False,
) -> Labels:
    """Find the class of each picture among the classes of a model.

    Parameters
    ----------
    names
        The pictures' names: paths, of which the last part is the file name.
    labels
        What the pictures were said to show, None where nobody said. Usually the folder they lie
        in; a number that is not a folder's name is a class index.
    classes
        For each class its names, the usual one first. None: only a table of indices can match.
    table
        Picture → label, or a file of ``path,label`` lines (CSV, or TSV by its ending); a label
        is a class index or a name. Folders and file names are then not asked.
    leading_index
        Believe the number before a file or folder name even where the rest does not name the
        same class.
    partly
        Allow pictures without a class beside pictures with one.

    Raises
    ------
    ViscircuitsError
        If a label fits several classes, an index lies outside the classes, or only some
        pictures have a label that fits.
    """
    if len(names) != len(labels):
        raise ViscircuitsError(f"expected one label for each picture, got {len(labels)} for {len(names)} pictures")
    if table is not None:
        return _match_table(names, classes, table, partly)
    known = _Names(classes or ())
    found = [_match_picture(name, label, known, leading_index) for name, label in zip(names, labels, strict=True)]
    indices = tuple(index for index, _ in found)
    origin = " and ".join(dict.fromkeys(origin for _, origin in found if origin)) or "none"
    shown = [f"{name!r}{f' (label {label!r})' if label else ''}" for name, label in zip(names, labels, strict=True)]
    return _checked(names, indices, origin, shown, partly)


def find_class(label: str, classes: Classes, *, leading_index: bool = False) -> int | None:
    """Index of the one class that a label names, or None when it names none.

    Raises
    ------
    ViscircuitsError
        If it names several.
    """
    known = _Names(classes)
    return _only(label, known.find(label, leading_index), known)


def read_labels(path: str | Path) -> dict[str, str]:
    """Read a table of ``path,label`` lines: CSV, or TSV by its ending; a header is skipped."""
    path = Path(path)
    if not path.is_file():
        raise ViscircuitsError(f"no table of labels {str(path)!r}; expected a file of path,label lines (CSV or TSV)")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    table: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file, delimiter=delimiter), start=1):
                cells = [cell.strip() for cell in row]
                if not any(cells) or (number == 1 and cells[-1].lower() in ("label", "class")):
                    continue
                if len(cells) != 2 or not all(cells):
                    raise ViscircuitsError(
                        f"line {number} of {str(path)!r} is not path{'<tab>' if delimiter == chr(9) else ','}label: "
                        f"{delimiter.join(row)!r}"
                    )
                if table.setdefault(cells[0], cells[1]) != cells[1]:
                    raise ViscircuitsError(
                        f"{str(path)!r} gives {cells[0]!r} two labels, {table[cells[0]]!r} and {cells[1]!r}"
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise ViscircuitsError(f"{str(path)!r} is not a table of path,label lines: {error}") from error
    if not table:
        raise ViscircuitsError(f"{str(path)!r} holds no labels; expected path,label lines")
    return table


# ---------------------------------------------------------------------- one picture


def _match_picture(name: str, label: str | None, known: _Names, leading_index: bool) -> tuple[int | None, str]:
    """The class of one picture and where it was read: its label, its folder, or its file name."""
    path = PurePosixPath(name.replace("\\", "/"))
    said = PurePosixPath(label.replace("\\", "/")).name if label else ""
    # a number that somebody wrote down is an index; the number of a folder may count anything
    fitting = known.find(said, leading_index or said not in path.parent.parts)
    if len(fitting) == 1:
        return fitting[0], "labels"
    for place, text, look in (
        ("folders", path.parent.name, known.find),
        ("file names", path.stem, known.find_numbered),
    ):
        inner = look(text, leading_index)
        if len(inner) == 1:
            return inner[0], place
    return _only(said, fitting, known), ""


class _Names:
    """Every name of every class, ready to be looked up."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.usual = [_plain(names[0]) if names else "" for names in classes]
        self.plain = _index(classes, _plain)
        self.singular = _index(classes, _singular)

    def find(self, label: str, leading_index: bool = False) -> tuple[int, ...]:
        """Classes that a label fits: by its leading index and the rest, or by name."""
        return self.find_numbered(label, leading_index) or self.find_name(label)

    def find_numbered(self, label: str, leading_index: bool = False) -> tuple[int, ...]:
        """The class of ``281_tabby`` or ``n02123045_17``, where the rest agrees or need not."""
        match = re.fullmatch(r"(\d+)(?:[\s_\-.]+(.*))?|(n\d{8})(?:[\s_\-.].*)?", label)
        if match is None:
            return ()
        number, rest, wordnet = match.groups()
        if wordnet:
            return self.find_name(wordnet)
        index = int(number)
        agrees = index in self.find_name(re.sub(r"[\s_\-.]*\d*$", "", rest or ""))
        return (index,) if index < len(self.classes) and (agrees or leading_index) else ()

    def find_name(self, label: str) -> tuple[int, ...]:
        """Classes one of whose names a label is; of ``tabby, tabby cat`` every part must fit."""
        parts = [fitting for part in label.split(",") if (fitting := self._find_part(part))]
        return tuple(sorted(set.intersection(*parts))) if parts else ()

    def _find_part(self, label: str) -> set[int]:
        plain = _plain(label)
        fitting = self.plain.get(plain) or self.singular.get(_singular(label)) or set()
        # a harp is a harp, although it is also a name of the harmonica; but a crane may be a "crane bird"
        return {i for i in fitting if f"{self.usual[i]} ".startswith(f"{plain} ")} or fitting


def _index(classes: Classes, form: Callable[[str], str]) -> dict[str, set[int]]:
    index: dict[str, set[int]] = {}
    for i, names in enumerate(classes):
        for name in names:
            index.setdefault(form(name), set()).add(i)
    return index


def _plain(name: str) -> str:
    """``Yellow_Lady's-Slipper`` → ``yellow ladys slipper``; accents fall."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    letters = "".join(c for c in letters if not unicodedata.combining(c) and c not in "'’.")
    return " ".join(re.sub(r"[\W_]+", " ", letters).split())


def _singular(name: str) -> str:
    """The plain name with its last word in the singular, near enough to compare two of them."""
    plain = _plain(name)
    for pattern, ending in ((r"(\w{2})ies$", "y"), (r"(s|x|z|ch|sh)es$", ""), (r"([^siu])s$", "")):
        shorter, n = re.subn(pattern, rf"\g<1>{ending}", plain)
        if n:
            return shorter
    return plain


def _only(label: str, fitting: tuple[int, ...], known: _Names) -> int | None:
    if len(fitting) > 1:
        listed = ", ".join(f"{i} ({', '.join(known.classes[i][:2])})" for i in fitting)
        raise ViscircuitsError(
            f"label {label!r} fits several classes: {listed}. Put the index before the name, "
            f"as in '{fitting[0]}_{label}', or give a table of path,label lines with the index as label"
        )
    return fitting[0] if fitting else None


# ---------------------------------------------------------------------- a table


def _match_table(
    names: Sequence[str], classes: Classes | None, table: str | Path | Mapping[str, str], partly: bool
) -> Labels:
    given = table if isinstance(table, Mapping) else read_labels(table)
    known = _Names(classes or ())
    n_classes = len(classes) if classes is not None else None
    find = {label: _table_class(label, known, n_classes) for label in dict.fromkeys(given.values())}
    rows = [_row(name, given) for name in names]
    indices = tuple(find[given[row]] if row is not None else None for row in rows)
    shown = [
        f"{n!r} ({f'label {given[r]!r}' if r is not None else 'not in the table'})"
        for n, r in zip(names, rows, strict=True)
    ]
    if all(row is None for row in rows):
        raise ViscircuitsError(
            f"the table of labels names none of the {len(names)} pictures: it has {next(iter(given))!r}, "
            f"the pictures are called {names[0]!r} and so on"
            if names
            else "there are no pictures to label"
        )
    if all(index is None for index in indices):
        hint = closest(next(iter(find)), (name for one in classes or () for name in one))
        raise ViscircuitsError(
            f"no label of the table is one of the model's classes, the first is {next(iter(find))!r}.{hint} "
            "A class index is always understood"
        )
    return _checked(names, indices, "table", shown, partly)


def _table_class(label: str, known: _Names, n_classes: int | None) -> int | None:
    if not re.fullmatch(r"\d+", label):
        return _only(label, known.find(label), known)
    if n_classes is not None and int(label) >= n_classes:
        raise ViscircuitsError(f"label {label} of the table is outside the model's classes, 0 to {n_classes - 1}")
    return int(label)


def _row(name: str, table: Mapping[str, str]) -> str | None:
    """The row of a picture: its name as it stands, or the longest end of its path that is in the table."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return name if name in table else next((end for end in ends if end in table), None)


def _checked(
    names: Sequence[str], indices: tuple[int | None, ...], origin: str, shown: Sequence[str], partly: bool
) -> Labels:
    unmatched = [i for i, index in enumerate(indices) if index is None]
    if unmatched and len(unmatched) < len(indices) and not partly:
        first = ", ".join(shown[i] for i in unmatched[:3]) + (", ..." if len(unmatched) > 3 else "")
        raise ViscircuitsError(
            f"{len(unmatched)} of {len(indices)} pictures have no label among the model's classes: {first}. Name their "
            "folders after classes, label all of them in a table of path,label lines, or allow partly labelled pictures"
        )
    return Labels(indices, origin if len(unmatched) < len(indices) else "none", tuple(names[i] for i in unmatched))
