"""What is known already: one file of JSON lines a job, a line a cell, written as soon as a cell is done.

A cell is known if a line bears its key and its digest; the digest covers what decides the numbers, the method's
source among it. The last line of a key counts. A line that was cut off by a kill is passed over.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

Entry = dict[str, Any]
DIGITS = 4  # of numbers that are kept


@dataclass(frozen=True)
class Work:
    """The work folder."""

    folder: Path

    def cells(self, job: str, wanted: dict[str, str]) -> Cells:
        """The cells of a job, by key → digest."""
        return Cells(self.folder / f"{job.replace('/', '-')}.jsonl", wanted)


class Cells:
    """The cells of one job: those known, and where to write the others."""

    def __init__(self, path: Path, wanted: dict[str, str]) -> None:
        self.path, self.wanted = path, wanted
        lines = path.read_bytes().split(b"\n") if path.is_file() else ()
        last = {cell["key"]: cell for cell in _readable(lines)}
        self.known = {
            key: last[key]["entry"] for key, digest in wanted.items() if key in last and last[key]["digest"] == digest
        }
        self.clock = time.perf_counter()

    @property
    def complete(self) -> bool:
        return len(self.known) == len(self.wanted)

    def keep(self, key: str, entry: Entry) -> None:
        """Write a cell down, with the seconds since the one before."""
        now = time.perf_counter()
        entry = {**entry, "took": now - self.clock}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        line = json.dumps({"key": key, "digest": self.wanted[key], "entry": entry}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line + "\n")
        self.known[key], self.clock = entry, now


def _readable(lines: Iterable[bytes]) -> Iterator[Entry]:
    for line in lines:
        with suppress(ValueError):  # cut off, perhaps inside a character
            yield json.loads(line)


def digest_of(*parts: Any) -> str:
    """Short digest of anything JSON can say."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def source_of(module: str, package: str) -> str:
    """Digest of a module's source and that of everything in `package` that it reads, however far."""
    texts = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name in texts or not name.startswith(package + "."):
            continue
        texts[name] = inspect.getsource(sys.modules[name])
        todo += _read_by(sys.modules[name])
    return digest_of(texts)


def _read_by(module: ModuleType) -> list[str]:
    """Modules that a module's names come from."""
    values = vars(module).values()
    names = (each.__name__ if isinstance(each, ModuleType) else getattr(each, "__module__", "") for each in values)
    return [str(name) for name in names]
