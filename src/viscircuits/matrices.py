"""Attribution as values: one matrix for each pair of adjacent layers, and where it came from.

Rows are targets, columns sources. Matrices do not depend on a circuit: they are computed once,
kept in a safetensors file, and selected from many times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.files import Write, write_atomically

SCHEMA = "viscircuits/attributions"
VERSION = 1
HEADER = "viscircuits"  # the name of our entry in the file's metadata
Contrast = Callable[[Tensor, Tensor], Tensor]
OPTIONAL = ("per_image", "variance", "draws")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class AttributionMatrix:
    """How much each unit of one layer contributes to each unit of the next, over a set of images.

    Rows of targets that were not asked for are NaN.

    Parameters
    ----------
    source, target
        Addresses of the two layers.
    values
        The score, averaged over images.
    signed
        The signed linear contribution `Σ_p A_m · ∂s_n/∂A_m`, averaged over images.
    per_image
        The score before averaging, when it was asked for.
    variance
        Sample variance of the score over images (divided by n − 1); None for one image.
    draws
        Bootstrap replicates of `values`: the average when each image counts as often as a draw says.
    """

    source: str
    target: str
    values: Float[Tensor, "target source"]
    signed: Float[Tensor, "target source"]
    per_image: Float[Tensor, "image target source"] | None = None
    variance: Float[Tensor, "target source"] | None = None
    draws: Float[Tensor, "draw target source"] | None = None


@dataclass(frozen=True)
class Attributions:
    """The attribution matrices of a chain of layers, with each unit's activity on the way.

    Parameters
    ----------
    matrices
        One matrix for each pair of adjacent layers, in execution order.
    activity
        Layer address → mean over images of the L2 norm of each unit's map.
    n_images
        How many images were averaged.
    provenance
        What made them: model, digests, options, versions.
    reference
        The same, measured on the reference images, when there were any.
    """

    matrices: tuple[AttributionMatrix, ...]
    activity: Mapping[str, Float[Tensor, " unit"]]
    n_images: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reference: Attributions | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer addresses in execution order."""
        return (self.matrices[0].source, *(m.target for m in self.matrices))

    @property
    def widths(self) -> dict[str, int]:
        """Layer address → number of units."""
        first = self.matrices[0]
        return {first.source: first.values.shape[1], **{m.target: m.values.shape[0] for m in self.matrices}}

    @property
    def n_draws(self) -> int:
        """How many bootstrap replicates there are; 0 for none."""
        draws = self.matrices[0].draws
        return 0 if draws is None else len(draws)

    def draw(self, i: int) -> Attributions:
        """Bootstrap replicate `i`: these attributions had the images been drawn anew, the reference's likewise.

        `signed` and `activity` stay those of the whole.

        Raises
        ------
        ViscircuitsError
            If there is no such replicate.
        """
        if not 0 <= i < self.n_draws:
            raise ViscircuitsError(f"no bootstrap draw {i}: there are {self.n_draws}; ask attribute for more (draws=…)")
        matrices = tuple(
            replace(matrix, values=cast(Tensor, matrix.draws)[i], per_image=None, variance=None, draws=None)
            for matrix in self.matrices
        )
        reference = self.reference and self.reference.draw(i)
        return replace(self, matrices=matrices, provenance={**self.provenance, "draw": i}, reference=reference)

    def between(self, layers: Sequence[str]) -> Attributions:
        """The matrices between these layers only, which must be neighbours here.

        Raises
        ------
        ViscircuitsError
            If they are not a run of at least two neighbouring layers.
        """
        start = self.layers.index(layers[0]) if layers and layers[0] in self.layers else 0
        if len(layers) < 2 or self.layers[start : start + len(layers)] != tuple(layers):
            raise ViscircuitsError(
                f"{', '.join(layers)} are no run of neighbouring layers here; there are {', '.join(self.layers)}"
            )
        return replace(
            self,
            matrices=self.matrices[start : start + len(layers) - 1],
            activity={layer: self.activity[layer] for layer in layers},
            provenance={**self.provenance, "layers": list(layers)},
            reference=self.reference and self.reference.between(layers),
        )

    def contrast(self, how: str) -> Attributions:
        """Set the concept's attribution against the reference's.

        ``none`` returns the concept's own matrices (the paper's definition); ``difference`` is
        concept − reference; ``ratio`` is concept / (reference + ε) with ε the mean of the
        reference matrix, so that a connection silent in both is not chosen for dividing by
        nearly zero.

        Neither variance nor bootstrap draws are carried over: contrast a `draw` instead.

        Raises
        ------
        ViscircuitsError
            If there is no reference to contrast with, or `how` is not one of the three.
        """
        if how not in CONTRASTS:
            raise ViscircuitsError(f"no contrast {how!r}; choose one of {', '.join(CONTRASTS)}")
        if how == "none":
            return self
        if "contrast" in self.provenance:
            raise ViscircuitsError(f"these attributions are a contrast ({self.provenance['contrast']}) already")
        if self.reference is None:
            raise ViscircuitsError(f"contrast {how!r} needs reference images (--reference), none were given")
        operation = CONTRASTS[how]
        matrices = tuple(
            replace(
                mine,
                values=operation(mine.values, other.values),
                per_image=None,
                variance=None,
                draws=None,
            )
            for mine, other in zip(self.matrices, self.reference.matrices, strict=True)
        )
        return replace(self, matrices=matrices, provenance={**self.provenance, "contrast": how})

    def save(self, path: str | Path) -> Path:
        """Write every matrix to one safetensors file, with the provenance in its header."""
        tensors: dict[str, Tensor] = {}
        for prefix, part in self._parts():
            for i, matrix in enumerate(part.matrices):
                tensors[f"{prefix}.{i}.values"] = matrix.values
                tensors[f"{prefix}.{i}.signed"] = matrix.signed
                for name in OPTIONAL:
                    if (tensor := getattr(matrix, name)) is not None:
                        tensors[f"{prefix}.{i}.{name}"] = tensor
            for i, layer in enumerate(part.layers):
                tensors[f"{prefix}.{i}.activity"] = part.activity[layer]
        header = {
            "schema": SCHEMA,
            "version": VERSION,
            "layers": self.layers,
            "n_images": {prefix: part.n_images for prefix, part in self._parts()},
            "provenance": {prefix: dict(part.provenance) for prefix, part in self._parts()},
        }
        return write_atomically(Path(path), lambda write: put_tensors(write, header, tensors))

    @classmethod
    def load(cls, path: str | Path) -> Attributions:
        """Read what `save` wrote, from the file or from a result folder that holds it."""
        path = Path(path)
        path = path / "attributions.safetensors" if path.is_dir() else path
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise FileFormatError(f"cannot read attributions from {str(path)!r}: {error}") from error
        if not isinstance(header, dict) or (header.get("schema"), header.get("version")) != (SCHEMA, VERSION):
            raise FileFormatError(f"{str(path)!r} does not hold viscircuits attributions of version {VERSION}")
        try:
            layers, provenance = header["layers"], header["provenance"]
            parts = {
                prefix: _part(prefix, layers, tensors, n, provenance[prefix])
                for prefix, n in header["n_images"].items()
            }
            return replace(parts["concept"], reference=parts.get("reference"))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileFormatError(f"{str(path)!r} is damaged: {type(error).__name__} {error}") from error

    def _parts(self) -> list[tuple[str, Attributions]]:
        return [("concept", self)] + ([("reference", self.reference)] if self.reference else [])


def _part(prefix: str, layers: list[str], tensors: dict[str, Tensor], n_images: int, provenance: dict) -> Attributions:
    matrices = tuple(
        AttributionMatrix(
            source,
            target,
            tensors[f"{prefix}.{i}.values"],
            tensors[f"{prefix}.{i}.signed"],
            **{name: tensors.get(f"{prefix}.{i}.{name}") for name in OPTIONAL},
        )
        for i, (source, target) in enumerate(pairwise(layers))
    )
    activity = {layer: tensors[f"{prefix}.{i}.activity"] for i, layer in enumerate(layers)}
    return Attributions(matrices, activity, n_images, provenance)


def put_tensors(write: Write, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file tensor by tensor, without a copy of all of them in memory.

    The header is one entry, because the library writes several in an order that changes from run to run.
    """
    index: dict[str, Any] = {"__metadata__": {HEADER: json.dumps(header, sort_keys=True)}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        index[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(index).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            write(tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data)


def _concept_alone(concept: Tensor, reference: Tensor) -> Tensor:
    return concept


def _difference(concept: Tensor, reference: Tensor) -> Tensor:
    return concept - reference


def _ratio(concept: Tensor, reference: Tensor) -> Tensor:
    scale = reference.abs().nanmean()  # targets that were not asked for are NaN
    return concept / (reference + scale) if scale > 0 else concept.clone()


CONTRASTS: dict[str, Contrast] = {
    "none": _concept_alone,
    "difference": _difference,
    "ratio": _ratio,
}
