"""Several processes working on one image set, as `torchrun` starts them.

1. `torchrun` tells each process its rank and how many there are. `team` reads that, joins the others over gloo
   and returns a `Team`; without torchrun it is a team of one, and every method returns at once.
2. Workers share images, never layers: each adds up the scores of its own portions, and the sums are added
   up at the end. Nothing is exchanged in between.
3. The sums live in main memory wherever the network is, so the exchange is over gloo even when the network
   is on a GPU.

A worker that dies takes the exchange with it: the others get a `ViscircuitsError` that says so.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from viscircuits.errors import ViscircuitsError

T = TypeVar("T")

PATIENCE = timedelta(hours=24)  # a worker with the larger shards may be waited for this long
PIECE = 2**24  # numbers exchanged at a time


def rank() -> int:
    """Which worker this is, counted, from 0; 0 without torchrun."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", 0)) if _under_torchrun() else 0


def size() -> int:
    """How many workers there are; 1 without torchrun."""
    return dist.get_world_size() if _joined() else int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def is_first() -> bool:
    """Whether this is the worker that writes results and talks: the first, or the only one."""
    return rank() == 0


def _under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class Team:
    """The workers of this run, this one among them."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def owns(self, portion: int) -> bool:
        """Whether a portion of an image set is this worker's."""
        return portion % self.size == self.rank

    def agree(self, value: T) -> T:
        """The first worker's value, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        with _exchange():
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in order of rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _exchange():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def add_up(self, tensor: Tensor) -> None:
        """Turn a contiguous tensor into the sum of every worker's, in place."""
        if self.size == 1:
            return
        with _exchange():
            for piece in tensor.view(-1).split(PIECE):
                dist.all_reduce(piece, group=self.group)

    def wait(self) -> None:
        """Return once every worker has come here."""
        self.gather(None)


def team() -> Team:
    """The workers that torchrun started, joined; a team of one if it did not start this process.

    Raises
    ------
    ViscircuitsError
        If the other workers cannot be reached.
    """
    if size() == 1 and not _joined():
        return Team()
    if not _joined():
        try:
            dist.init_process_group("gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ViscircuitsError(
                f"cannot reach the other workers at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error}); "
                "start every worker with the same torchrun command, or unset RANK and WORLD_SIZE to run alone"
            ) from error
        atexit.register(_leave)
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    return Team(dist.get_rank(), dist.get_world_size(), group)


def _leave() -> None:
    if _joined():
        dist.destroy_process_group()


class WorkerDied(ViscircuitsError):
    """Another worker is gone; what this one has done is still good."""


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkerDied(
            f"another worker died or cannot be reached any more ({first}); see its own last lines"
        ) from error
