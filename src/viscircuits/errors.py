"""The few exceptions of viscircuits.

Every message says what was given, what was expected, and what to do next. All of them are
the caller's to mend, so the command line turns each into one line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ViscircuitsError(ValueError):
    """Anything the caller can mend: a wrong name, an empty folder, an impossible size."""


class ModelError(ViscircuitsError):
    """A model that cannot be built, loaded or run as asked."""


class LayerError(ViscircuitsError):
    """A layer that does not exist, never runs, or does not hold units."""


class ImageError(ViscircuitsError):
    """An image set that is missing, empty or, under ``strict``, partly unreadable."""


class FileFormatError(ViscircuitsError):
    """A saved file that is not what its name or schema says."""


def closest(given: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to the given one, or nothing."""
    matches = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
