"""What a run that was stopped needs to go on: its sums, and where it stood.

1. A checkpoint is a folder with one safetensors file for each worker: sums of every image set, what they were
   made of, and which portions they cover. It is written beside the old one, forced to the disk and renamed
   over it, so that a crash at any moment leaves the old or the new one.
2. A run goes on only with sums that were made of the same things; else it is refused, with what differs.
3. Portions are dealt out by number modulo the number of workers, so what each worker has done is one number.
   When the number of workers changes, the first of them adds up all files into its own. That file names what
   it has taken in before these are deleted, so that nothing can be counted twice.

A checkpoint holds no image and no weights.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from viscircuits.errors import ViscircuitsError
from viscircuits.layers import Layer
from viscircuits.matrices import HEADER, put_tensors
from viscircuits.running import Running

SCHEMA = "viscircuits/checkpoint"
VERSION = 1
MOST_SHOWN = 120  # characters of a value in a message


class CheckpointError(ViscircuitsError):
    """A checkpoint that was made of other things, or cannot be read."""


# ------------------------------------------------------------------ where a run stands


@dataclass
class Done:
    """Which portions of an image set are done.

    Parameters
    ----------
    claims
        For each team that ever worked on it, and each of its workers: the portion before which all of the
        worker's own are done.
    opened
        Portions that were begun: how many of their batches are done, and how many steps of the next one.
    """

    claims: list[list[int]]
    opened: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def begun(self) -> bool:
        """Whether anything was done at all."""
        return bool(self.opened) or any(map(any, self.claims))

    def has(self, portion: int) -> bool:
        """Whether a portion is done."""
        return any(portion < claim[portion % len(claim)] for claim in self.claims)

    def step(self, portion: int, batch: int, step: int) -> None:
        """Note how far a portion is."""
        self.opened[portion] = (batch, step)

    def close(self, portion: int) -> None:
        """Note that a portion, and all of this worker's before it, are done."""
        claim = self.claims[-1]
        claim[portion % len(claim)] = portion + 1
        self.opened.pop(portion, None)

    def join(self, n_workers: int) -> None:
        """Begin to work in another team."""
        self.claims.append([0] * n_workers)

    def merge(self, other: Done) -> None:
        """Add what another worker of the same team has done."""
        both = zip(self.claims, other.claims, strict=True)
        self.claims = [[max(pair) for pair in zip(mine, theirs, strict=True)] for mine, theirs in both]
        for portion, place in other.opened.items():
            self.opened[portion] = max(place, self.opened.get(portion, (0, 0)))
        self.opened = {portion: place for portion, place in self.opened.items() if not self.has(portion)}

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes the same again."""
        return {"claims": self.claims, "opened": [[p, *place] for p, place in self.opened.items()]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Done:
        """What `state` was taken of."""
        return cls([list(claim) for claim in state["claims"]], {p: (b, s) for p, b, s in state["opened"]})


@dataclass
class State:
    """The sums of each image set so far, and where this worker stands.

    Parameters
    ----------
    sums, done
        Image set → its sums, and the portions they cover.
    plan
        What was chosen at the start and has to stay: engines, batch size, chunk size.
    looks
        How many images had been seen each time someone looked whether it is enough.
    stable
        What was found the last time.
    until
        What the one who looks wants to remember.
    """

    sums: dict[str, Running]
    done: dict[str, Done]
    plan: dict[str, Any]
    looks: list[int] = field(default_factory=list)
    stable: bool = False
    until: Any = None

    @classmethod
    def fresh(cls, sets: Sequence[str], chain: Sequence[Layer], n_draws: int, n_workers: int) -> State:
        """Nothing done yet."""
        return cls(
            {what: Running.empty(chain, n_draws) for what in sets}, {what: Done([[0] * n_workers]) for what in sets}, {}
        )

    def begin_beside(self, other: State) -> None:
        """Begin in a team that goes on, in the place of a worker that had written nothing."""
        self.plan = other.plan
        for what, done in other.done.items():
            *before, now = done.claims
            self.done[what] = Done([*before, [0] * len(now)], dict(done.opened))

    def follow(self, other: State) -> None:
        """Stand where another worker stands who has looked more often."""
        if len(other.looks) > len(self.looks):
            self.looks, self.stable, self.until = list(other.looks), other.stable, other.until

    def merge(self, other: State) -> None:
        """Add what another worker has done."""
        for what, sums in self.sums.items():
            sums.merge(other.sums[what])
            self.done[what].merge(other.done[what])
        self.follow(other)

    def outline(self) -> State:
        """The same without what belongs to this worker's own images."""
        return State({}, self.done, self.plan, self.looks, self.stable, self.until)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which `from_parts` makes the same again."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for what, running in self.sums.items():
            own, plain[what] = running.state()
            plain[what]["done"] = self.done[what].state()
            tensors |= {f"{what}.{name}": tensor for name, tensor in own.items()}
        others = {name: getattr(self, name) for name in ("plan", "looks", "stable", "until")}
        return tensors, {"sets": plain, **others}

    @classmethod
    def from_parts(cls, chain: Sequence[Layer], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> State:
        """What `parts` was taken of."""
        sums, done = {}, {}
        for what, own in plain["sets"].items():
            prefix = f"{what}."
            named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            sums[what] = Running.from_state(chain, named, own)
            done[what] = Done.from_state(own["done"])
        return cls(sums, done, plain["plan"], list(plain["looks"]), plain["stable"], plain["until"])


# ------------------------------------------------------------------ the folder


@dataclass
class Checkpoint:
    """One worker's file in a folder of unfinished sums.

    Parameters
    ----------
    folder
        Where the files are.
    made_of
        What decides the numbers, in words a reader knows. A file made of other things is refused.
    versions
        Package → version. Others only warn.
    seconds
        Least time between two files.
    rank, n_workers
        This worker.
    """

    folder: Path
    made_of: dict[str, Any]
    versions: dict[str, str]
    seconds: int | float = 60.0
    rank: int = 0
    n_workers: int = 1
    written: float = field(default_factory=time.monotonic)
    warned: bool = False

    @property
    def path(self) -> Path:
        """The file of this worker."""
        return self.folder / f"{self.rank:04d}-of-{self.n_workers:04d}.safetensors"

    @property
    def due(self) -> bool:
        """Whether it is time for another file."""
        return time.monotonic() - self.written >= self.seconds

    def save(self, state: State, absorbed: Sequence[str] = ()) -> bool:
        """Write this worker's file; if that fails, warn, keep the old one and return False."""
        unsorted, plain = state.parts()
        tensors = dict(sorted(unsorted.items(), key=lambda item: -item[1].element_size()))  # so that all are aligned
        header = {
            "schema": SCHEMA, "version": VERSION, "made_of": self.made_of, "versions": self.versions,
            "n_workers": self.n_workers, "stamp": uuid.uuid4().hex, "absorbed": list(absorbed), **plain,
        }  # fmt: skip
        try:
            _write(self.path, header, tensors)
        except OSError as error:
            if not self.warned:
                warnings.warn(
                    f"cannot write the checkpoint {str(self.path)!r} ({error.strerror}); the run goes on, and an older "
                    "checkpoint stays as it was",
                    stacklevel=2,
                )
            self.warned = True
            return False
        finally:
            self.written = time.monotonic()
        return True

    def load(self, chain: Sequence[Layer]) -> State | None:
        """What this worker's file holds, if there is one.

        Raises
        ------
        CheckpointError
            If it was made of other things, or is damaged.
        """
        return self._read(self.path, chain) if self.path.exists() else None

    def gather(self, chain: Sequence[Layer]) -> None:
        """Bring the folder in order for this number of workers; only the first worker may do so.

        Raises
        ------
        CheckpointError
            If a file was made of other things, or is damaged.
        """
        headers = {path: self._header(path) for path in self._files()}
        obsolete = {stamp for header in headers.values() for stamp in header["absorbed"]}
        for path in [path for path, header in headers.items() if header["stamp"] in obsolete]:
            path.unlink()
            del headers[path]
        if all(header["n_workers"] == self.n_workers for header in headers.values()):
            return
        first, *others = headers
        whole = self._read(first, chain)
        for path in others:
            whole.merge(self._read(path, chain))
        for done in whole.done.values():
            done.join(self.n_workers)
        if not self.save(whole, [header["stamp"] for header in headers.values()]):
            raise CheckpointError(
                f"cannot write {str(self.path)!r}, which has to hold what {len(headers)} files hold together; make room"
            )
        for path in headers:
            if path != self.path:
                path.unlink()

    def remove(self) -> None:
        """Delete every worker's file, and the folder if nothing else is in it."""
        for path in self._files():
            path.unlink(missing_ok=True)
        for path in self.folder.glob(".*-of-*.safetensors"):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*-of-[0-9]*.safetensors"))

    def _header(self, path: Path) -> dict[str, Any]:
        with _reading(path), safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
        if (header.get("schema"), header.get("version")) != (SCHEMA, VERSION):
            raise CheckpointError(f"{str(path)!r} is no checkpoint of version {VERSION}; {self._remedy()}")
        self._compare(header)
        return header

    def _read(self, path: Path, chain: Sequence[Layer]) -> State:
        header = self._header(path)
        with _reading(path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return State.from_parts(chain, tensors, header)

    def _compare(self, header: Mapping[str, Any]) -> None:
        old, new = header["made_of"], json.loads(json.dumps(self.made_of))
        differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if differing:
            changes = "; ".join(f"{name}: {_short(old.get(name))} → {_short(new.get(name))}" for name in differing)
            raise CheckpointError(
                f"the checkpoint in {str(self.folder)!r} is of another run ({changes}). {self._remedy()}"
            )
        changed = {name for name in self.versions if header["versions"].get(name) != self.versions[name]}
        if changed and not self.warned:
            names = ", ".join(f"{n} {header['versions'].get(n)} → {self.versions[n]}" for n in sorted(changed))
            warnings.warn(f"the checkpoint was begun with other versions ({names})", stacklevel=2)

    def _remedy(self) -> str:
        return f"Go back to what it was to go on with it, or delete {str(self.folder)!r} to begin anew."


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {str(path)!r} ({type(error).__name__}: {error}); "
            "delete its folder to begin anew"
        ) from error


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def _write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file without a second copy of it in memory, force it to the disk, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}"  # always the same, so that crashes leave one at most
    try:
        with open(temporary, "wb") as file:
            put_tensors(file.write, header, tensors)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # not every system opens folders
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)
