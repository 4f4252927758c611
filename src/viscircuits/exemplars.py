"""The image regions that excite a unit most.

1. Stream the images once. A unit's activation on an image is its largest value over positions;
   each unit keeps its best `n` images by number, so no image outlives its batch.
2. Come back for those images only. The gradient of the unit's peak with respect to the image says
   what the peak looked at: the *receptive field as it is used*, measured, so that it holds for
   convolutions, skip connections and token streams alike. One backward pass an exemplar. Where the
   peak is clipped flat (ReLU6) the gradient is that of the unclipped activation, else there is none.
3. Asked for diverse exemplars, keep four times as many and choose among them, greedily, those whose layers were
   least alike.
4. Cut that box out of what the network saw. The transform's normalisation is undone by probing it:
   images of one colour (black, red, green, blue) give its affine map of colours, channel order
   included, and a fifth colour checks that it is one.

`heat` shows where on one picture a unit is active, `receptive_field` how far a layer's units can see at all.
The pictures are evidence of what excites a unit, not of what it means.
"""

from __future__ import annotations

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

from viscircuits.circuit import Unit
from viscircuits.clipping import Linearised, Unclipped
from viscircuits.colours import sequential
from viscircuits.errors import ImageError, LayerError
from viscircuits.hooks import activations, evaluating
from viscircuits.images import ImageSet, batches
from viscircuits.layers import by_unit

ENERGY = 0.9
MIN_SIDE = 24
MAX_CROP = 96
AMONG = 4  # times as many images are kept to choose diverse ones from
MOST_FRONT = 8  # class and register tokens that may stand before the grid of a transformer

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
    shows
        The class of the image, where somebody said it.
    """

    name: str
    activation: float
    box: Box
    image: Image.Image
    shows: str = ""


def exemplars(
    model: nn.Module,
    units: Iterable[Unit],
    images: ImageSet,
    transform: Transform,
    *,
    n: int = 4,
    batch_size: int = 16,
    unit_axes: Mapping[str, int],
    diverse: bool = False,
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
    diverse
        Of the 4·n strongest images that excite the unit at least half as much as the strongest does, take that
        one and then, one by one, the image least like those taken: by the cosine of the means over positions of the
        layer's units. What is missing then is filled up by strength.
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
        best = _strongest_images(model, wanted, stream, n, unit_axes, diverse)
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
    matrix, offset = colour_map(transform, size)
    inverse = np.linalg.pinv(matrix) * 255

    def picture(tensor: Float[Tensor, "channel height width"]) -> Image.Image:
        values = tensor.detach().double().cpu().numpy() - offset[:, None, None]
        colours = np.einsum("ck,khw->hwc", inverse, values)
        return Image.fromarray(colours.round().clip(0, 255).astype(np.uint8), "RGB")

    return picture


def colour_map(
    transform: Transform, size: tuple[int, int]
) -> tuple[Float[np.ndarray, "channel 3"], Float[np.ndarray, " channel"]]:
    """What `transform` makes of a colour from 0 to 1: a matrix times it, plus an offset.

    Raises
    ------
    ImageError
        As `unnormalise`.
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
    return matrix, offset


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


def heat(
    model: nn.Module,
    unit: Unit,
    image: Float[Tensor, "channel height width"],
    picture: Image.Image,
    *,
    unit_axis: int,
    most: int | float | None = None,
    colours: str = "viridis",
    opacity: int | float = 0.6,
) -> Image.Image:
    """Where on a picture a unit is active: its map, brought to the picture's size, laid over the picture in grey.

    Tokens are laid out as the grid they were cut from; class and register tokens, which stand in front of it, have no
    place and are left out. A layer without positions gives one colour. Values below 0 count as 0.

    Parameters
    ----------
    image
        What the transform makes of the picture.
    picture
        What is seen beneath: `unnormalise(transform, …)(image)`, so that both show the same part.
    unit_axis
        Of the unit's layer, the image axis being 0.
    most
        The activation that gets the last colour; None takes the map's largest value.
    colours
        A sequential map of `viscircuits.colours`.
    opacity
        Of the colours over the picture, from 0 to 1.

    Raises
    ------
    LayerError
        If the unit does not exist, or its layer's positions are no grid.
    """
    with evaluating(model), torch.no_grad():
        values = activations(model, [unit.layer], image.unsqueeze(0))[unit.layer]
    _of_units(values, unit.layer, [unit.index], {unit.layer: unit_axis})  # checks that the unit exists
    map_ = values.movedim(unit_axis, 1)[0, unit.index].float().cpu()
    grid = _on_grid(map_, unit.layer, image.shape[1] / image.shape[2])
    scale = float(grid.max()) if most is None else most
    shown = torch.nn.functional.interpolate(
        grid.clamp(min=0)[None, None], size=(picture.height, picture.width), mode="bilinear", align_corners=False
    )[0, 0]
    coloured = Image.fromarray(sequential((shown / scale if scale > 0 else shown).double().numpy(), colours))
    return Image.blend(picture.convert("L").convert("RGB"), coloured, opacity)


def _on_grid(map_: Tensor, layer: str, aspect: float) -> Float[Tensor, "height width"]:
    """A unit's values as rows and columns of the picture."""
    if map_.ndim == 2:
        return map_
    if map_.ndim == 0:
        return map_.reshape(1, 1)
    if map_.ndim == 1:
        for n_front in range(min(MOST_FRONT, len(map_) - 1) + 1):
            rows = round(((len(map_) - n_front) * aspect) ** 0.5)
            columns = round(rows / aspect)
            if rows * columns == len(map_) - n_front:
                return map_[n_front:].reshape(rows, columns)
    raise LayerError(
        f"layer {layer!r} has positions {'×'.join(map(str, map_.shape))}, which are no grid over a picture"
    )


@dataclass(frozen=True)
class ReceptiveField:
    """How much of the input one position of a layer can depend on.

    Parameters
    ----------
    size
        Height and width in pixels.
    stride
        How far down and to the right the next position's field lies, in pixels.
    whole
        Whether the input was no larger than the field, so that the true one may be larger.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    whole: bool


def receptive_field(
    model: nn.Module, layer: str, images: Float[Tensor, "image channel height width"], *, unit_axis: int = 1
) -> ReceptiveField:
    """Which part of the input a middle position of a layer is computed from, whatever the weights' sizes.

    The gradient of that position, with activations linear and maximum pooling as average pooling, is other than 0
    exactly where there is a path. `receptive_box` measures what of this is used.

    Parameters
    ----------
    images
        One input of the size in question; its values matter little.

    Raises
    ------
    LayerError
        If the layer has no rows and columns of positions.
    """
    with evaluating(model), torch.enable_grad(), Linearised():
        pixels = images[:1].detach().clone().requires_grad_()
        maps = activations(model, [layer], pixels.clone())[layer].movedim(unit_axis, 1)
        if maps.ndim != 4:
            raise LayerError(f"layer {layer!r} has shape {tuple(maps.shape[1:])}: no rows and columns of positions")
        middle = [size // 2 for size in maps.shape[2:]]
        after = [min(at + 1, size - 1) for at, size in zip(middle, maps.shape[2:], strict=True)]
        weights = torch.rand(maps.shape[1], generator=torch.Generator().manual_seed(0)).to(maps)  # so that none cancel
        extents = []
        for row, column in (middle, after):
            value = (maps[0, :, row, column] * weights).sum()
            (gradient,) = torch.autograd.grad(value, pixels, retain_graph=True)
            seen = (gradient[0] != 0).any(0)
            extents.append([_extent(seen.any(1)), _extent(seen.any(0))])
    (rows, columns), next_ = extents
    size = rows[1] - rows[0], columns[1] - columns[0]
    stride = next_[0][0] - rows[0], next_[1][0] - columns[0]
    edges = [extent for each in extents[:1] for extent in each]
    whole = any(start == 0 or stop == length for (start, stop), length in zip(edges, images.shape[2:], strict=True))
    return ReceptiveField(size, stride, whole)


def _extent(seen: Tensor) -> tuple[int, int]:
    places = seen.nonzero().flatten()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


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
    model: nn.Module,
    wanted: Mapping[str, list[int]],
    stream: Iterable[Any],
    n: int,
    unit_axes: Mapping[str, int],
    diverse: bool,
) -> dict[Unit, list[int]]:
    best: dict[str, Tensor] = {}
    pooled: dict[str, dict[int, Tensor]] = {layer: {} for layer in wanted}
    n_seen, n_kept = 0, n * (AMONG if diverse else 1)
    for batch in stream:
        with torch.no_grad():
            values = activations(model, wanted, batch.images)
        numbers = torch.arange(n_seen, n_seen + len(batch), dtype=torch.float64)
        for layer, indices in wanted.items():
            maps = _of_units(values[layer], layer, indices, unit_axes)  # (image, unit, position)
            peaks, means = (each.T.double().cpu() for each in (maps.amax(2), maps.mean(2)))
            rows = torch.stack([peaks, means, numbers.expand_as(peaks)])
            best[layer] = _strongest(torch.cat([best[layer], rows], 2) if layer in best else rows, n_kept)
            if diverse:
                each = by_unit(values[layer], unit_axes[layer]).mean(2).double().cpu()
                pooled[layer] |= dict(zip(range(n_seen, n_seen + len(batch)), each, strict=True))
                kept = set(best[layer][2].flatten().int().tolist())
                pooled[layer] = {number: each for number, each in pooled[layer].items() if number in kept}
        n_seen += len(batch)
    found = {}
    for layer, (all_peaks, _, all_images) in best.items():
        for index, peaks, images in zip(wanted[layer], all_peaks.tolist(), all_images.tolist(), strict=True):
            strong = {int(i): peak for i, peak in zip(images, peaks, strict=True) if peak and math.isfinite(peak)}
            found[Unit(layer, index)] = unlike(strong, pooled[layer], n) if diverse else list(strong)
    return found


def unlike(peaks: Mapping[int, float], pooled: Mapping[int, Float[Tensor, " unit"]], n: int) -> list[int]:
    """Up to `n` images, strongest first, that excite a unit and are little alike; see `exemplars`, `diverse`.

    Parameters
    ----------
    peaks
        Image → how strongly it excites the unit, strongest first.
    pooled
        Image → what its layer looks like, as a vector.
    """
    if not peaks:
        return []
    first = next(iter(peaks))
    able = [image for image, peak in peaks.items() if peak >= peaks[first] / 2]
    rest = [image for image in peaks if image not in able]
    chosen = [first]
    while len(chosen) < n and len(chosen) < len(able):
        left = [image for image in able if image not in chosen]
        vectors = torch.nn.functional.normalize(torch.stack([pooled[image] for image in left]), dim=1)
        taken = torch.nn.functional.normalize(torch.stack([pooled[image] for image in chosen]), dim=1)
        nearest = (vectors @ taken.T).amax(1)  # (left,): to which of the chosen each is most alike
        chosen.append(left[int(nearest.argmin())])
    chosen += rest[: n - len(chosen)]
    return [image for image in peaks if image in chosen]


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
    with torch.enable_grad(), Unclipped():
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
