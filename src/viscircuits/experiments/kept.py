"""What an experiment has finished: a line of JSON for each part, written as soon as the part is done.

A part is known by its key and by the digest of what decides its numbers, so that a run with other options starts it
anew. A line that was cut off by a kill is passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Kept:
    """Finished parts of an experiment.

    Parameters
    ----------
    path
        The file, ``parts.jsonl`` in the output folder.
    made
        Whatever decides the numbers of every part: options, seed, digests of weights and data.
    """

    def __init__(self, path: Path, made: Mapping[str, Any]) -> None:
        self.path, self.digest = path, digest_of(made)
        lines = path.read_bytes().split(b"\n") if path.is_file() else ()
        self.known = {line["key"]: line["entry"] for line in _readable(lines) if line["digest"] == self.digest}

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def of(self, key: str, compute: Callable[[], Entry]) -> Entry:
        """The part of that key: read if it was finished before, else computed and written."""
        if key not in self.known:
            entry = json.loads(json.dumps(compute()))  # what is computed now and what is read later are the same
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
            line = json.dumps({"key": key, "digest": self.digest, "entry": entry}, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + line + "\n")
            self.known[key] = entry
        return self.known[key]


def digest_of(made: Mapping[str, Any]) -> str:
    """Short digest of anything JSON can say."""
    text = json.dumps(made, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def _readable(lines: Iterable[bytes]) -> Iterator[Entry]:
    for line in lines:
        with suppress(ValueError):  # cut off, perhaps inside a character
            yield json.loads(line)
