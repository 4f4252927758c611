"""How a run of attribution is laid out: engines, images at once, memory.

1. Every pair is tried on one image and a few targets: the first engine that can carry them is taken.
2. What one image's recorded values take is measured while it runs; the sums are known beforehand. A chunk
   holds at least one target, whose cotangent is as large as the largest map.
3. A budget is parted: the sums first, then one image or more, and the rest is for chunks of targets.

A layout is chosen once, by the first worker, and kept in the checkpoint, so that a run that goes on adds its
numbers in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from viscircuits.errors import LayerError, ViscircuitsError
from viscircuits.hooks import activations
from viscircuits.layers import Layer
from viscircuits.scores import loop, structured

Engines = tuple[str, ...]
ENGINES: dict[str, Engines] = {"auto": ("structured", "loop"), "loop": ("loop",), "structured": ("structured",)}

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SLACK = 96 * 2**20  # what allocator, convolution library and one decoded picture take
LEAST_CHUNK = 2**20
CHUNK_SHARE = 4  # a chunk's temporaries take up to so many times the chunk itself
IMAGE_SHARE = 2  # a backward pass holds about as much again as was recorded
N_TRIED = 4  # targets of each pair that are tried
SMALL, USUAL = 1, 8  # images at once: one keeps the structured engine in the cache


def bytes_of(memory: int | str | None) -> int | None:
    """A number of bytes from a number, or from a text such as ``512M`` or ``2G``.

    Raises
    ------
    ViscircuitsError
        If the text is not a size, or the size is not positive.
    """
    if memory is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(memory), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ViscircuitsError(f"a memory budget is a number of bytes, or a text such as 512M or 2G; got {memory!r}")
    return size


@dataclass(frozen=True)
class Layout:
    """How a run is laid out.

    Parameters
    ----------
    engines
        For each pair of layers the engine that carries it.
    batch_size
        Images per forward pass.
    chunk_bytes
        Memory for a chunk of targets in the structured engine.
    """

    engines: tuple[str, ...]
    batch_size: int
    chunk_bytes: int

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes the same again."""
        return {**asdict(self), "engines": list(self.engines)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Layout:
        """What `state` was taken of."""
        return cls(tuple(state["engines"]), state["batch_size"], state["chunk_bytes"])


@dataclass(frozen=True)
class Scoring:
    """What is computed for each pair of layers, and how it may be.

    Parameters
    ----------
    chain
        The layers, in execution order.
    score, summary
        From `viscircuits.scores.formulas`.
    rows
        For each pair the targets asked for; None for all.
    engines
        Engines to try, in order.
    dtype
        Of dense work in the structured engine; None for the network's own.
    costs
        For each pair what its targets take, once the structured engine has tried them.
    """

    chain: Sequence[Layer]
    score: loop.Score
    summary: loop.Summary
    rows: Sequence[Tensor | None]
    engines: Engines
    dtype: torch.dtype | None = None
    costs: dict[int, structured.Costs] = field(default_factory=dict)

    @property
    def pairs(self) -> list[tuple[Layer, Layer]]:
        """Source and target of each pair."""
        return list(pairwise(self.chain))

    @property
    def n_rows(self) -> list[int]:
        """How many targets of each pair are wanted."""
        return [
            target.n_units if rows is None else len(rows)
            for (_, target), rows in zip(self.pairs, self.rows, strict=True)
        ]

    def blocks(
        self,
        i: int,
        values: Mapping[str, Tensor],
        first: str,
        rows: Tensor | None,
        chunk_bytes: int,
        note: Callable[[str, set[str]], None],
    ) -> Iterator[loop.Block]:
        """Blocks of pair `i` from the first engine, beginning with `first`, that can carry it; `note` is told which.

        Raises
        ------
        LayerError
            If only the structured engine may be used, and cannot.
        """
        source, target = self.pairs[i]
        given = (values[source.address], values[target.address], source, target, self.score, self.summary, rows)
        for engine in self.engines[self.engines.index(first) :]:
            left: set[str] = set()
            if engine == "loop":
                yield from loop.blocks(*given)
            else:
                try:
                    costs = self.costs.setdefault(i, structured.Costs())
                    yield from structured.blocks(
                        *given, chunk_bytes=chunk_bytes, dtype=self.dtype, left=left, costs=costs
                    )
                except structured.Unsupported as error:  # raised before the first block
                    if engine == self.engines[-1]:
                        raise LayerError(
                            f"the structured engine has no rule for {error} between {source.address!r} and "
                            f"{target.address!r}; use engine 'auto'"
                        ) from error
                    continue
            note(engine, left)
            return


def lay_out(
    model: nn.Module,
    scoring: Scoring,
    image: Tensor,
    *,
    memory: int | None = None,
    batch_size: int | None = None,
    n_sets: int = 1,
    n_draws: int = 0,
) -> Layout:
    """Choose engines, batch size and chunk size from a trial on one image ``(1, C, H, W)``.

    Raises
    ------
    ViscircuitsError
        If the sums and one image do not fit into `memory`; the message says how much is needed.
    """
    with _counting(model) as counted:
        values = activations(model, [layer.address for layer in scoring.chain], image)
    engines, left = _try(scoring, values)
    usual = SMALL if "loop" not in engines and not left else USUAL
    size = batch_size or usual
    if memory is None:
        return Layout(engines, size, structured.CHUNK_BYTES)
    fixed = _sums_bytes(scoring.chain, n_sets, n_draws) + SLACK
    recorded = counted()
    each = IMAGE_SHARE * sum(recorded) + CHUNK_SHARE * max(recorded, default=0) + _scores_bytes(scoring.chain)
    least = fixed + each + CHUNK_SHARE * LEAST_CHUNK
    if least > memory:
        raise ViscircuitsError(
            f"a memory budget of {_shown(memory)} cannot hold the sums ({_shown(fixed)}) and one image "
            f"({_shown(each)}); "
            f"give at least {_shown(least, up=True)} (--memory), or ask for fewer bootstrap draws or layers"
        )
    chunk = (memory - fixed - each) // CHUNK_SHARE
    chunk = min(chunk, structured.CHUNK_BYTES)
    size = max(1, min(size, (memory - fixed - CHUNK_SHARE * chunk) // each))
    return Layout(engines, int(size), int(chunk))


def _try(scoring: Scoring, values: Mapping[str, Tensor]) -> tuple[tuple[str, ...], set[str]]:
    """Each pair's engine, and what was left to autograd."""
    engines: list[str] = []
    left: set[str] = set()

    def note(engine: str, operations: set[str]) -> None:
        engines.append(engine)
        left.update(operations)

    for i, ((_, target), rows) in enumerate(zip(scoring.pairs, scoring.rows, strict=True)):
        rows = torch.arange(target.n_units) if rows is None else rows
        tried = rows[:: max(1, len(rows) // N_TRIED)][:N_TRIED]
        for _ in replace(scoring, costs={}).blocks(i, values, scoring.engines[0], tried, LEAST_CHUNK, note):
            pass
    return tuple(engines), left


@contextmanager
def _counting(model: nn.Module) -> Iterator[Callable[[], list[int]]]:
    """Bytes of each thing that autograd keeps inside, the network's own tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: list(found.values())


def _sums_bytes(chain: Sequence[Layer], n_sets: int, n_draws: int) -> int:
    """Sums of all sets and the matrices made from them: values, squares, signed; replicates; and three results."""
    entries = sum(source.n_units * target.n_units for source, target in pairwise(chain))
    return n_sets * entries * (3 * 8 + 4 * n_draws + 3 * 4)


def _scores_bytes(chain: Sequence[Layer]) -> int:
    """One image's scores of the largest pair, and working copies in double precision."""
    return max(source.n_units * target.n_units for source, target in pairwise(chain)) * (4 + 3 * 8)


def _shown(size: int, *, up: bool = False) -> str:
    mebibytes = -(-size // 2**20) if up else size // 2**20
    return f"{mebibytes}M"
