"""The image regions that excite a unit most.

1. Stream the images once. A unit's activation on an image is its largest value over positions;
   each unit keeps its best `n` images by number, so no image outlives its batch.
2. Come back for those images only. The gradient of the unit's peak with respect to the image says
   what the peak looked at: the *receptive field as it is used*, measured, so that it holds for
   convolutions, skip connections and token streams alike. One backward pass an exemplar. Where the
   peak is clipped flat (ReLU6) the gradient is that of the unclipped activation, else there is none.
3. Cut that box out of what the network saw. The transform's normalisation is undone by probing it:
   images of one colour (black, red, green, blue) give its affine map of colours, channel order
   included, and a fifth colour checks that it is one.

The pictures are evidence of what excites a unit, not of what it means.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from viscircuits.circuit import Unit
from viscircuits.errors import ImageError, LayerError
from viscircuits.hooks import activations, evaluating
from viscircuits.images import ImageSet, batches
from viscircuits.layers import by_unit

ENERGY = 0.9
MIN_SIDE = 24
MAX_CROP = 96

Transform = Callable[[Image.Image], Tensor]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Exemplar:
    """One image region that excites a unit.

    Parameters
    ----------
    name
        Which image.
    activation
        The unit's largest value over the positions of that image.
    box
        Left, top, right, bottom of the region, in pixels of the network's input.
    image
        The region as the network saw it, at most 96 pixels a side.
    """

    name: str
    activation: float
    box: Box
    image: Image.Image


def exemplars(
    model: nn.Module,
    units: Iterable[Unit],
    images: ImageSet,
    transform: Transform,
    *,
    n: int = 4,
    batch_size: int = 16,
    unit_axes: Mapping[str, int],
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> dict[Unit, list[Exemplar]]:
    """The `n` image regions that excite each unit most, strongest first, at most one an image.

    A unit that is exactly 0 on an image (silent under a ReLU) is not excited by it, so a unit may
    have fewer than `n` exemplars, or none. Of equal activations (a clipped one has many) the image
    with the larger mean over positions comes first, then the earlier image.

    Parameters
    ----------
    images
        Read twice, in the same order; only the best images are run again.
    transform
        The network's own: picture → normalised tensor.
    unit_axes
        Layer address → axis of its units, the image axis being 0.
    progress
        Wraps the stream of batches, then that of the chosen images, as `tqdm` does; both know their length.

    Raises
    ------
    LayerError
        If a unit does not exist or its layer has no unit axis given.
    ImageError
        If the transform's colours cannot be turned back into a picture.
    """
    wanted = _by_layer(units, unit_axes)
    if not wanted:
        return {}
    watch = progress or (lambda stream: stream)
    n_batches = None if images.count is None else math.ceil(images.count / batch_size)
    with evaluating(model):
        stream = watch(_Stream(batches(images, transform, batch_size), n_batches))
        best = _strongest_images(model, wanted, stream, n, unit_axes)
        found = _regions(model, best, images, transform, unit_axes, watch)
    return {unit: [found[unit, number] for number in numbers] for unit, numbers in best.items()}


def unnormalise(transform: Transform, size: tuple[int, int]) -> Callable[[Tensor], Image.Image]:
    """The way back from what `transform` makes to the picture it shows.

    Probes the transform with pictures of `size` (width, height) in black, red, green and blue.
    On colours it must be an affine map, as every fixed normalisation is, whatever its channel order.

    Raises
    ------
    ImageError
        If a fifth colour does not come out where the map of those four puts it.
    """

    def probe(*colour: int) -> np.ndarray:
        tensor = transform(Image.new("RGB", size, colour))
        return tensor[:, tensor.shape[1] // 2, tensor.shape[2] // 2].double().cpu().numpy()

    offset = probe(0, 0, 0)
    matrix = np.stack([probe(255, 0, 0), probe(0, 255, 0), probe(0, 0, 255)], axis=1) - offset[:, None]
    expected = offset + matrix @ np.array([64, 128, 192]) / 255
    if not matrix.any() or not np.allclose(probe(64, 128, 192), expected, rtol=0, atol=0.02 * np.abs(matrix).max()):
        raise ImageError(
            "the transform does not map colours by a fixed affine map (it may standardise each image or change "
            "colours at random), so its pictures cannot be shown; go on without exemplars"
        )
    inverse = np.linalg.pinv(matrix) * 255

    def picture(tensor: Float[Tensor, "channel height width"]) -> Image.Image:
        values = tensor.detach().double().cpu().numpy() - offset[:, None, None]
        colours = np.einsum("ck,khw->hwc", inverse, values)
        return Image.fromarray(colours.round().clip(0, 255).astype(np.uint8), "RGB")

    return picture


def receptive_box(gradient: Float[Tensor, "channel height width"]) -> Box:
    """The square that holds at least 90 % of a gradient's squared energy.

    Each axis gives up 2.5 % at either end of its marginal, so that the box keeps at least 90 %
    together. It is squared up, at least 24 pixels a side, and shifted to lie inside the image; a
    side longer than the image is the image's. No gradient, no clue: the whole image.
    """
    height, width = gradient.shape[1:]
    energy = gradient.detach().double().square().sum(0)
    if not torch.isfinite(energy).all() or not energy.any():
        return 0, 0, width, height
    left, right = _central(energy.sum(0))
    top, bottom = _central(energy.sum(1))
    side = max(right - left, bottom - top, MIN_SIDE)
    left, right = _widen(left, right, side, width)
    top, bottom = _widen(top, bottom, side, height)
    return left, top, right, bottom


# ------------------------------------------------------------------ below: the two passes


def _by_layer(units: Iterable[Unit], unit_axes: Mapping[str, int]) -> dict[str, list[int]]:
    wanted: dict[str, list[int]] = {}
    for unit in dict.fromkeys(units):
        if unit.layer not in unit_axes:
            raise LayerError(f"no unit axis given for layer {unit.layer!r}; unit_axes has {', '.join(unit_axes)}")
        wanted.setdefault(unit.layer, []).append(unit.index)
    return wanted


class _Stream:
    """An iterator that knows how long it is, so that a progress bar can tell the time left."""

    def __init__(self, items: Iterable[Any], length: int | None) -> None:
        self.items = items
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the length of a stream is known only by reading it")
        return self.length


def _strongest_images(
    model: nn.Module, wanted: Mapping[str, list[int]], stream: Iterable[Any], n: int, unit_axes: Mapping[str, int]
) -> dict[Unit, list[int]]:
    best: dict[str, Tensor] = {}
    n_seen = 0
    for batch in stream:
        with torch.no_grad():
            values = activations(model, wanted, batch.images)
        numbers = torch.arange(n_seen, n_seen + len(batch), dtype=torch.float64)
        for layer, indices in wanted.items():
            maps = _of_units(values[layer], layer, indices, unit_axes)  # (image, unit, position)
            peaks, means = (each.T.double().cpu() for each in (maps.amax(2), maps.mean(2)))
            rows = torch.stack([peaks, means, numbers.expand_as(peaks)])
            best[layer] = _strongest(torch.cat([best[layer], rows], 2) if layer in best else rows, n)
        n_seen += len(batch)
    return {
        Unit(layer, index): [int(i) for i, peak in zip(images, peaks, strict=True) if peak and math.isfinite(peak)]
        for layer, (all_peaks, _, all_images) in best.items()
        for index, peaks, images in zip(wanted[layer], all_peaks.tolist(), all_images.tolist(), strict=True)
    }


def _of_units(values: Tensor, layer: str, indices: list[int], unit_axes: Mapping[str, int]) -> Tensor:
    each = by_unit(values, unit_axes[layer])  # (image, unit, position)
    if max(indices) >= each.shape[1] or min(indices) < 0:
        culprit = max(indices) if max(indices) >= each.shape[1] else min(indices)
        raise LayerError(f"layer {layer!r} has units 0 to {each.shape[1] - 1}, asked for {culprit}")
    return each[:, indices]


def _strongest(rows: Float[Tensor, "3 unit image"], n: int) -> Float[Tensor, "3 unit kept"]:
    """The `n` columns with the largest peak, then the largest mean, then the earliest image."""
    peaks, means, _ = rows.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    order = means.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, peaks.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :n]
    return rows.gather(2, order.expand(3, -1, -1))


def _regions(
    model: nn.Module,
    best: Mapping[Unit, list[int]],
    images: ImageSet,
    transform: Transform,
    unit_axes: Mapping[str, int],
    watch: Callable[[Iterable[Any]], Iterable[Any]],
) -> dict[tuple[Unit, int], Exemplar]:
    by_image: dict[int, list[Unit]] = defaultdict(list)
    for unit, numbers in best.items():
        for number in numbers:
            by_image[number].append(unit)
    found: dict[tuple[Unit, int], Exemplar] = {}
    show: Callable[[Tensor], Image.Image] | None = None
    chosen = ((number, picture) for number, picture in enumerate(images) if number in by_image)
    for number, picture in watch(_Stream(chosen, len(by_image))):
        show = show or unnormalise(transform, picture.image.size)
        crops = _crops(model, by_image[number], picture.name, transform(picture.image), show, unit_axes)
        found.update({(unit, number): exemplar for unit, exemplar in crops.items()})
    return found


def _crops(
    model: nn.Module,
    units: list[Unit],
    name: str,
    image: Float[Tensor, "channel height width"],
    show: Callable[[Tensor], Image.Image],
    unit_axes: Mapping[str, int],
) -> dict[Unit, Exemplar]:
    with torch.enable_grad(), _Unclipped():
        pixels = image.detach().unsqueeze(0).requires_grad_()
        # a copy goes in: a network that changes its input in place could not otherwise have a gradient
        values = activations(model, dict.fromkeys(unit.layer for unit in units), pixels.clone())
        seen = show(image)
        crops = {}
        for unit in units:
            map_ = by_unit(values[unit.layer], unit_axes[unit.layer])[0, unit.index]  # (position,)
            equal = (map_ == map_.max()).nonzero().flatten()
            peak = map_[equal[len(equal) // 2]]  # the middle one, where a plateau is clipped flat
            (gradient,) = torch.autograd.grad(peak, pixels, retain_graph=True, allow_unused=True)
            box = receptive_box((torch.zeros_like(pixels) if gradient is None else gradient)[0])
            crop = seen.crop(box)
            crop.thumbnail((MAX_CROP, MAX_CROP))
            crops[unit] = Exemplar(name, float(peak.detach()), box, crop)
    return crops


class _Unclipped(TorchFunctionMode):
    """ReLU6 and Hardtanh with their true values, and at the ceiling the gradient of their unclipped selves."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function not in CLIPPED:
            return function(*args, **kwargs)
        bounds = inspect.signature(function).bind(*args, **kwargs)
        bounds.apply_defaults()
        given = bounds.arguments
        clipped = _Clip.apply(given["input"], given.get("min_val", 0.0), given.get("max_val", 6.0))
        return given["input"].copy_(clipped) if given.get("inplace") else clipped


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, low: float, high: float) -> Tensor:
        context.save_for_backward(values > low)
        return values.clamp(low, high)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (above,) = context.saved_tensors
        return gradient * above, None, None


CLIPPED = {nn.functional.relu6, nn.functional.hardtanh}


def _central(marginal: Float[Tensor, " pixel"]) -> tuple[int, int]:
    share = marginal.cumsum(0) / marginal.sum()
    margin = (1 - ENERGY) / 4
    first = int((share <= margin).sum())
    last = int((share < 1 - margin).sum())
    return first, min(last, len(share) - 1) + 1


def _widen(start: int, stop: int, side: int, limit: int) -> tuple[int, int]:
    side = min(side, limit)
    start = min(max((start + stop - side) // 2, 0), limit - side)
    return start, start + side
