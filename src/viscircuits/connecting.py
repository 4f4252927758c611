"""Effective kernels and contributions: what lies in an edge, through whatever lies between its two layers.

1. *Kernel.* At the position where a target n is largest on an image, its value is differentiated with respect to the
   source's map, G = ∂a_n[peak] / ∂a_m. The `side` × `side` positions of G around that place are averaged over the
   images on which the target is active: the linearised weight between the two units, signed. For a convolution alone
   it is the convolution's weight; with a batch norm, the folded one; with a ReLU between, the weight times the share
   of images that open it. A value clipped flat, as by ReLU6, counts as unclipped (`viscircuits.clipping`). A position
   outside the source's map counts in no average.
2. *Place.* The peak is carried over to the source's map centre to centre; of two positions equally near it is the
   first. Centres are measured: gradients of two middle positions, with all weights equal, say what these can see of the
   source and so where the field of any other lies. Where a middle position sees to the border, its centre cannot be
   told and the ratio of the two sizes stands in (`carried`). A stream of tokens is the square grid it holds besides its
   class and register tokens. A source without a grid has its whole derivative in the middle.
3. *Contribution.* For each image the signed linear contribution Σ_p A_m ⊙ ∂s_n/∂A_m with the summary s_n that the
   circuit was attributed with: the mean over the images it was found with is ``Edge.signed``.

One backward pass a target and batch for the kernels, through what lies between the two layers alone; contributions
take the attribution's own engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from viscircuits.ablation import describe_layers
from viscircuits.attribution import Images
from viscircuits.budget import ENGINES, Scoring
from viscircuits.circuit import Circuit, Unit
from viscircuits.clipping import Evened, Unclipped
from viscircuits.connections import Connections, Pair
from viscircuits.errors import ImageError, LayerError, ViscircuitsError
from viscircuits.hooks import activations, evaluating
from viscircuits.images import Batch, batches
from viscircuits.layers import Layer, by_unit
from viscircuits.layout import reveal
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores.formulas import SUMMARIES, choose, signed
from viscircuits.scores.structured import CHUNK_BYTES

MOST_TOKENS_BEFORE_GRID = 8  # class and register tokens

Grid = tuple[int, int]


def connect(
    model: nn.Module | ModelSpec,
    circuit: Circuit,
    images: Images,
    edges: Sequence[Pair] | None = None,
    *,
    side: int = 7,
    most: int = 2000,
    n_images: int = 32,
    n_kernel_images: int = 8,
    batch_size: int = 4,
    progress: bool = False,
) -> Connections:
    """Effective kernels and per-image contributions of edges.

    Parameters
    ----------
    model
        The network the circuit was found in.
    circuit
        Its provenance says with which summary contributions are taken (``norm`` if it says nothing).
    images
        Images to look at, normally those that found the circuit.
    edges
        Source and target of each; by default the first `most` in the order in which the page reveals them. They need
        not be in the circuit.
    side
        Positions of a kernel along each axis, an odd number. If no source has a grid, kernels have one position.
    most
        How many edges, where none are named.
    n_images, n_kernel_images
        How many of the images, from the first on, contributions and kernels are taken from.
    batch_size
        Images per pass.
    progress
        Show a progress bar.

    Raises
    ------
    ViscircuitsError
        If `side` is not odd, or an edge names a unit that does not exist.
    LayerError
        If no gradient flows from a target to its source.
    ImageError
        If there are no images.
    """
    if side < 1 or side % 2 == 0:
        raise ViscircuitsError(f"a kernel has an odd number of positions along each axis, such as 7; got {side}")
    pairs = [(e.source, e.target) for e, _ in reveal(circuit.edges)[:most]] if edges is None else list(edges)
    pairs = list(dict.fromkeys(pairs))
    summary = circuit.provenance.get("summary", "norm")
    choose(SUMMARIES, summary, "summary")
    spec = as_spec(model)
    taken = _first(batches(images, spec.transform, batch_size), n_images)
    if not taken:
        raise ImageError("there is no image to look at edges with")
    joints = _joints(spec, taken[0][0][:1], pairs, side)
    seen = 0
    bar = tqdm(total=sum(len(batch) for batch, _ in taken), desc="edges", unit="image", delay=2, disable=not progress)
    with bar, evaluating(spec.model), torch.inference_mode(False), torch.enable_grad():
        _line_up(spec, joints, taken[0][0][:1])
        for batch, _ in taken:
            _look(spec, joints, batch, batch[: max(0, n_kernel_images - seen)], summary)
            seen += len(batch)
            bar.update(len(batch))
    made = {"summary": summary, "kernel_images": min(seen, n_kernel_images), "n_images": seen}
    names = tuple(name for _, some in taken for name in some)
    kernels, contributions = _gathered(joints, len(pairs), seen)
    return Connections(tuple(pairs), kernels, names, contributions, made)


@dataclass
class _Joint:
    """The edges between two layers, and what is known of them so far."""

    source: Layer
    target: Layer
    side: int
    edges: list[tuple[int, Unit, Unit]] = field(default_factory=list)  # place among all edges, source, target
    kernels: Tensor = field(default_factory=lambda: torch.zeros(0))  # (edge, side, side), sums
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))
    contributions: list[Tensor] = field(default_factory=list)  # (image, edge) of each batch
    centres: dict[int, tuple[float, float]] = field(default_factory=dict)  # axis → source's of target's 0, and the step

    def __post_init__(self) -> None:
        self.grid, self.before = _grid(self.source)
        self.target_grid, self.target_before = _grid(self.target)

    def begin(self) -> None:
        """Room for the sums, once all edges are in."""
        self.kernels = torch.zeros(len(self.edges), self.side, self.side, dtype=torch.float64)
        self.counts = torch.zeros_like(self.kernels)

    def seat(self, axis: int, place: int, n_source: int) -> int:
        """Where a position along an axis of the target's map lies on the source's."""
        if axis not in self.centres:
            return carried(place, 1 if self.target_grid is None else self.target_grid[axis], n_source)
        first, step = self.centres[axis]
        return min(max(math.ceil(first + step * place - 0.5), 0), n_source - 1)

    @property
    def by_target(self) -> dict[int, list[int]]:
        """Target unit → places of its edges here."""
        found: dict[int, list[int]] = {}
        for i, (_, _, target) in enumerate(self.edges):
            found.setdefault(target.index, []).append(i)
        return found


def _first(stream: Iterable[Batch], n: int) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Images and names of the first `n`, batch by batch."""
    taken: list[tuple[Tensor, tuple[str, ...]]] = []
    left = n
    for batch in stream:
        taken.append((batch.images[:left], batch.names[:left]))
        left -= len(batch)
        if left <= 0:
            break
    return taken


def _joints(spec: ModelSpec, image: Tensor, pairs: Sequence[Pair], side: int) -> list[_Joint]:
    described = {
        layer.address: layer
        for layer in describe_layers(spec, image, dict.fromkeys(unit.layer for pair in pairs for unit in pair))
    }
    order = list(described)
    joints: dict[tuple[str, str], _Joint] = {}
    for place, (source, target) in enumerate(pairs):
        for unit in (source, target):
            if not 0 <= unit.index < described[unit.layer].n_units:
                n = described[unit.layer].n_units
                raise ViscircuitsError(f"there is no unit {unit}: layer {unit.layer!r} has units 0 to {n - 1}")
        if order.index(source.layer) >= order.index(target.layer):
            raise LayerError(f"an edge leads from {source} to {target}, but {target.layer!r} does not run later")
        ends = source.layer, target.layer
        joint = joints.setdefault(ends, _Joint(described[ends[0]], described[ends[1]], side))
        joint.edges.append((place, source, target))
    if all(joint.grid is None for joint in joints.values()):
        for joint in joints.values():
            joint.side = 1
    for joint in joints.values():
        joint.begin()
    return list(joints.values())


def _line_up(spec: ModelSpec, joints: Sequence[_Joint], image: Tensor) -> None:
    """Measure each joint's `centres`."""
    mapped = [joint for joint in joints if joint.grid and joint.target_grid]
    if not mapped:
        return
    addresses = list(dict.fromkeys(a for joint in mapped for a in (joint.source.address, joint.target.address)))
    with Evened():
        values = activations(spec.model, addresses, image.detach().clone().requires_grad_())
    for joint in mapped:
        source = values[joint.source.address]
        map_ = by_unit(values[joint.target.address], joint.target.unit_axis)[0, :, joint.target_before :].sum(0)
        rows, columns = joint.target_grid or (1, 1)
        middle = rows // 2, columns // 2
        for axis, back in ((0, columns), (1, 1)):
            if middle[axis] == 0:
                continue
            at = middle[0] * columns + middle[1]
            here, before = (_centre(joint, source, map_[place], axis) for place in (at, at - back))
            if here is not None and before is not None and here > before:
                joint.centres[axis] = here - (here - before) * middle[axis], here - before


def _centre(joint: _Joint, source: Tensor, value: Tensor, axis: int) -> float | None:
    """The middle, along an axis of the source's map, of all that a value can see; None if that reaches the border."""
    (gradient,) = torch.autograd.grad(value, source, retain_graph=True, allow_unused=True)
    if gradient is None or joint.grid is None:
        return None
    seen = (by_unit(gradient, joint.source.unit_axis)[0, :, joint.before :] != 0).any(0).reshape(joint.grid)
    places = seen.any(1 - axis).nonzero().flatten().tolist()
    if not places or places[0] == 0 or places[-1] == joint.grid[axis] - 1:
        return None
    return (places[0] + places[-1]) / 2


def _look(spec: ModelSpec, joints: Sequence[_Joint], images: Tensor, for_kernels: Tensor, summary: str) -> None:
    addresses = list(dict.fromkeys(a for joint in joints for a in (joint.source.address, joint.target.address)))
    if not addresses:
        return
    values = activations(spec.model, addresses, images)
    for joint in joints:
        joint.contributions.append(_contributions(joint, values, summary))
    if len(for_kernels):
        with Unclipped():
            values = activations(spec.model, addresses, for_kernels)
        for joint in joints:
            _add_kernels(joint, values)


def _contributions(joint: _Joint, values: Mapping[str, Tensor], summary: str) -> Float[Tensor, "image edge"]:
    rows = torch.tensor(sorted(joint.by_target))
    scoring = Scoring([joint.source, joint.target], signed, SUMMARIES[summary], [rows], ENGINES["auto"])
    found = torch.zeros(len(values[joint.source.address]), len(joint.edges), dtype=torch.float64)
    by_target = joint.by_target
    for targets, _, block in scoring.blocks(0, values, "structured", rows, CHUNK_BYTES, lambda engine, left: None):
        for row, target in enumerate(targets.tolist()):
            places = by_target[target]
            sources = [joint.edges[i][1].index for i in places]
            found[:, places] = block[:, row, sources].detach().double().cpu()
    return found


def _add_kernels(joint: _Joint, values: Mapping[str, Tensor]) -> None:
    source = values[joint.source.address]
    maps = by_unit(values[joint.target.address], joint.target.unit_axis)[..., joint.target_before :]
    for target, places in joint.by_target.items():
        peaks, at = _peaks(maps[:, target])
        active = (peaks.detach() != 0) & peaks.detach().isfinite()
        if not active.any():
            continue
        (gradient,) = torch.autograd.grad(peaks[active].sum(), source, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise LayerError(
                f"no gradient flows from {joint.target.address!r} back to {joint.source.address!r}; "
                "choose edges between layers that feed each other"
            )
        sources = [joint.edges[i][1].index for i in places]
        slopes = by_unit(gradient, joint.source.unit_axis)[:, sources].detach().double().cpu()
        for image in active.nonzero().flatten().tolist():
            patch, inside = _patch(joint, slopes[image], int(at[image]))
            joint.kernels[places] += patch
            joint.counts[places] += inside


def _peaks(map_: Float[Tensor, "image position"]) -> tuple[Float[Tensor, " image"], Tensor]:
    """The largest value of each image and where it is: the middle one, where a plateau is clipped flat."""
    equal = map_.detach() == map_.detach().amax(1, keepdim=True)  # (image, position)
    middle = (equal.sum(1) // 2 + 1).clamp(max=equal.sum(1).clamp(min=1))
    at = (equal.cumsum(1) == middle[:, None]).int().argmax(1)
    return map_.gather(1, at[:, None]).squeeze(1), at.cpu()


def _patch(
    joint: _Joint, slopes: Float[Tensor, "edge position"], at: int
) -> tuple[Float[Tensor, "edge side side"], Bool[Tensor, "side side"]]:
    """The slopes around the place that belongs to the target's position `at`, and which positions exist."""
    half = joint.side // 2
    patch = torch.zeros(len(slopes), joint.side, joint.side, dtype=slopes.dtype)
    if joint.grid is None:
        patch[:, half, half] = slopes.sum(1)
        return patch, torch.ones(joint.side, joint.side, dtype=torch.bool)
    height, width = joint.grid
    row, column = divmod(at, joint.target_grid[1]) if joint.target_grid else (0, 0)
    y, x = joint.seat(0, row, height), joint.seat(1, column, width)
    field_ = slopes[:, joint.before :].reshape(-1, height, width)
    top, left, bottom, right = max(0, y - half), max(0, x - half), min(height, y + half + 1), min(width, x + half + 1)
    there = slice(top - y + half, bottom - y + half), slice(left - x + half, right - x + half)
    patch[:, there[0], there[1]] = field_[:, top:bottom, left:right]
    inside = torch.zeros(joint.side, joint.side, dtype=torch.bool)
    inside[there] = True
    return patch, inside


def carried(place: int, n_target: int, n_source: int) -> int:
    """Where a position along one axis of the target's map lies on the source's, centre to centre.

    For where no centres can be measured: the step is the whole number nearest to the ratio of the sizes (below 1 the
    ratio itself), as a convolution's is, padded or not. Of two positions equally near it is the first. Exact for one
    convolution; the sizes do not say the step of several.
    """
    ratio = n_source / n_target
    step = round(ratio) if ratio >= 1 else ratio
    exact = (n_source - 1) / 2 + step * (place - (n_target - 1) / 2)
    return min(max(math.ceil(exact - 0.5), 0), n_source - 1)


def _grid(layer: Layer) -> tuple[Grid | None, int]:
    """Height and width of a layer's map, and how many tokens stand before it; None for a layer without one."""
    positions = [size for axis, size in enumerate(layer.shape, start=1) if axis != layer.unit_axis]
    if len(positions) == 2:
        return (positions[0], positions[1]), 0
    if len(positions) != 1:
        return None, 0
    for before in range(min(MOST_TOKENS_BEFORE_GRID + 1, positions[0])):
        edge = math.isqrt(positions[0] - before)
        if edge > 1 and edge * edge == positions[0] - before:
            return (edge, edge), before
    return None, 0


def _gathered(
    joints: Sequence[_Joint], n_edges: int, n_images: int
) -> tuple[Float[np.ndarray, "edge side side"], Float[np.ndarray, "edge image"]]:
    side = joints[0].side if joints else 1
    kernels = np.zeros((n_edges, side, side), dtype=np.float32)
    contributions = np.zeros((n_edges, n_images), dtype=np.float32)
    for joint in joints:
        places = [place for place, _, _ in joint.edges]
        kernels[places] = (joint.kernels / joint.counts.clamp(min=1)).numpy()
        contributions[places] = torch.cat(joint.contributions).T.numpy()
    return kernels, contributions
