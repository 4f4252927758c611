"""What edges are made of: the effective kernel of each, and what its source gave its target on each image.

Values alone, as numpy arrays; `viscircuits.connecting` computes them. They are kept in one safetensors file beside
the circuit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from viscircuits.circuit import Unit
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import write_atomically

SCHEMA = "viscircuits/connections"
VERSION = 1
FILE = "connections.safetensors"
HEADER = "viscircuits"  # the name of our entry in the file's metadata

Pair = tuple[Unit, Unit]


@dataclass(frozen=True, eq=False)
class Connections:
    """Kernels and contributions of some edges of a circuit.

    Parameters
    ----------
    edges
        Source and target of each.
    kernels
        What the target's value at its peak owes to each position of the source around it, averaged over images;
        see `viscircuits.connecting.connect`.
    images
        Names of the images.
    contributions
        The signed contribution of the source to the target on each image, as in ``Edge.signed``, which is its mean.
    provenance
        How they were computed.
    """

    edges: tuple[Pair, ...]
    kernels: Float[np.ndarray, "edge side side"]
    images: tuple[str, ...]
    contributions: Float[np.ndarray, "_edge image"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.edges)
        if len(self.kernels) != n or self.contributions.shape != (n, len(self.images)):
            raise ViscircuitsError(
                f"{n} edges and {len(self.images)} images, but {len(self.kernels)} kernels and contributions of shape "
                f"{self.contributions.shape}; give one kernel an edge, one contribution an edge and image"
            )
        if len(set(self.edges)) != n:
            raise ViscircuitsError("an edge stands twice among the connections; name each once")

    @property
    def side(self) -> int:
        """How many positions a kernel has along each axis."""
        return int(self.kernels.shape[1])

    @cached_property
    def places(self) -> dict[Pair, int]:
        """Edge → its place in the arrays."""
        return {pair: i for i, pair in enumerate(self.edges)}

    def of(self, edges: Sequence[Pair]) -> Connections:
        """These of the edges alone, in this order; those that are not here are left out."""
        kept = [self.places[pair] for pair in edges if pair in self.places]
        pairs = tuple(self.edges[i] for i in kept)
        return Connections(pairs, self.kernels[kept], self.images, self.contributions[kept], self.provenance)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, with the edges' names in its header."""
        header = {
            "schema": SCHEMA,
            "version": VERSION,
            "edges": [[s.layer, s.index, t.layer, t.index] for s, t in self.edges],
            "images": list(self.images),
            "provenance": dict(self.provenance),
        }
        arrays = {
            "kernels": np.ascontiguousarray(self.kernels, dtype=np.float32),
            "contributions": np.ascontiguousarray(self.contributions, dtype=np.float32),
        }
        # one entry, because the library writes several in an order that changes from run to run
        return write_atomically(Path(path), to_bytes(arrays, metadata={HEADER: json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> Connections:
        """Read what `save` wrote, from the file or from a result folder that holds it.

        Raises
        ------
        FileFormatError
            If it is no such file, or damaged.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            with safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise FileFormatError(f"cannot read connections from {str(path)!r}: {error}") from error
        if not isinstance(header, dict) or (header.get("schema"), header.get("version")) != (SCHEMA, VERSION):
            raise FileFormatError(f"{str(path)!r} does not hold viscircuits connections of version {VERSION}")
        try:
            edges = tuple((Unit(s, int(m)), Unit(t, int(n))) for s, m, t, n in header["edges"])
            return cls(edges, arrays["kernels"], tuple(header["images"]), arrays["contributions"], header["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{str(path)!r} is damaged: {type(error).__name__} {error}") from error
