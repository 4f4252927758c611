"""Composites: pictures of two things on one canvas, whose label is the pair.

1. Parts are named image sets: class folders of any data set, or rendered concepts.
2. Pairs of parts are drawn so that every part has about as many partners as any other.
3. A composite is a canvas of one colour with a picture of either part, cropped square and scaled to a tile, at random
   places where the tiles do not overlap. Composite i depends on the parts, the pairs, the canvas, the seed and i.

With groups of one part instead of two the same makes *plain* images: one tile, or one that fills the canvas.

References
----------
Rajaram et al. 2023, arXiv:2404.14349 (as its readers report it: 300 pixels, tiles of 100, the mean colour around them).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from torch import Tensor, tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from viscircuits.errors import ImageError, ViscircuitsError, closest
from viscircuits.files import write_atomically
from viscircuits.images import ImageSet, Unreadable, open_images

Parts = Mapping[str, ImageSet]
Group = tuple[int, ...]  # places of parts: one, or two that are shown together
Spot = tuple[int, int]  # left, top

RENDERED = {
    "red": "colour,colour=red,texture=clouds+patches",
    "green": "colour,colour=green,texture=clouds+patches",
    "blue": "colour,colour=blue,texture=clouds+patches",
    "yellow": "colour,colour=yellow,texture=clouds+patches",
    "disc": "circle,fill=disc,radius=0.2..0.4,colour=white,ground=black",
    "ring": "circle,fill=ring,radius=0.25..0.4,thickness=0.06..0.1,colour=white,ground=black",
    "curve": "curve,radius=0.3..0.45,thickness=0.06..0.1,colour=white,ground=black",
    "text": "text,height=0.2..0.35,colour=white,ground=black",
    "bars": "grating,frequency=4..6,orientation=75..105",
    "planks": "grating,frequency=4..6,orientation=-15..15",
    "slopes": "grating,frequency=4..6,orientation=30..60",
    "weave": "grating,frequency=9..12,orientation=120..150",
}
COLOUR_FROM = 24  # images of each part that the mean colour is taken of
RENDERED_EACH = 200


# ---------------------------------------------------------------- parts


def open_parts(folder: str | Path, part: str | None = None, names: Sequence[str] | None = None) -> dict[str, ImageSet]:
    """Image sets by name from a folder of class folders.

    Parameters
    ----------
    folder
        Class folders, or ``train`` and ``val`` folders of class folders.
    part
        ``train`` or ``val``, where the folder has them.
    names
        The classes wanted; by default all, in order of name.

    Raises
    ------
    ImageError
        If there are fewer than two classes, or one of those wanted is missing.
    """
    root = Path(folder)
    root = root / part if part is not None and (root / part).is_dir() else root
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if len(known) < 2:
        raise ImageError(f"{str(root)!r} holds no folders of images, one for each class; give such a folder")
    for name in names or ():
        if name not in known:
            raise ImageError(f"there is no class {name!r} in {str(root)!r}.{closest(name, known)}")
    return {name: open_images(root / name) for name in names or known}


def render_parts(side: int, seed: int, names: Sequence[str] | None = None, each: int = RENDERED_EACH) -> Parts:
    """Rendered concepts as parts: colours, shapes and textures, `each` images of `side` pixels."""
    settings = f"n={each},seed={seed},size={side}"
    return {name: open_images(f"render:{RENDERED[name]},{settings}") for name in names or RENDERED}


def choose_pairs(n_parts: int, per_part: int, seed: int) -> tuple[Group, ...]:
    """Pairs of parts at random, such that every part has `per_part` partners, or one more or less.

    Raises
    ------
    ViscircuitsError
        If there are not so many partners.
    """
    if not 1 <= per_part < n_parts:
        raise ViscircuitsError(
            f"each of {n_parts} parts can have 1 to {n_parts - 1} partners, got {per_part} (--pairs)"
        )
    rng = np.random.default_rng([seed, n_parts, per_part])
    free, partners = list(combinations(range(n_parts), 2)), [0] * n_parts
    chosen: list[Group] = []
    for _ in range(-(-n_parts * per_part // 2)):  # rounded up: no part is left alone
        rng.shuffle(free)
        best = min(free, key=lambda pair: (max(partners[i] for i in pair), sum(partners[i] for i in pair)))
        free.remove(best)
        chosen.append(best)
        for i in best:
            partners[i] += 1
    return tuple(sorted(chosen))


def mean_colour(parts: Parts) -> tuple[int, int, int]:
    """Mean colour of the parts' images, of some twenty evenly spaced ones of each."""
    means = []
    for images in parts.values():
        step = max(1, len(images) // COLOUR_FROM)
        means += [np.asarray(_read(images, i)).mean((0, 1)) for i in range(0, len(images), step)]
    red, green, blue = (round(float(value)) for value in np.mean(means, 0))
    return red, green, blue


# ---------------------------------------------------------------- canvases


def random_spots(rng: np.random.Generator, free: int, tile: int, n: int) -> list[Spot]:
    """Left and top of `n` tiles, every way in which they do not overlap being as likely.

    Parameters
    ----------
    rng
        Draws the places.
    free
        Side of the canvas less that of a tile.
    tile
        Side of a tile.
    n
        One or two.
    """
    if n == 1:
        left, top = rng.integers(0, free + 1, 2)
        return [(int(left), int(top))]
    cumulated = _ways(free, tile)
    first = int(np.searchsorted(cumulated, rng.integers(cumulated[-1]), side="right"))
    left, top = first % (free + 1), first // (free + 1)
    near = [np.abs(np.arange(free + 1) - at) < tile for at in (top, left)]
    open_to = np.flatnonzero(~(near[0][:, None] & near[1][None, :]))
    second = int(open_to[rng.integers(len(open_to))])
    return [(left, top), (second % (free + 1), second // (free + 1))]


@lru_cache(maxsize=8)
def _ways(free: int, tile: int) -> np.ndarray:
    """For each place of the first tile, row by row, how many places the second can take; cumulated."""
    places = np.arange(free + 1)
    near = np.minimum(places + tile - 1, free) - np.maximum(places - tile + 1, 0) + 1
    return np.cumsum((free + 1) ** 2 - np.outer(near, near).ravel())


def spots_beside(rng: np.random.Generator, free: int, tile: int, n: int) -> list[Spot]:
    """One tile in the middle; of two, one in the middle of either half, left and right at random."""
    if n == 1:
        return [(free // 2, free // 2)]
    outer = max(0, (free - tile) // 4)
    sides = [outer, free - outer]
    rng.shuffle(sides)
    return [(left, free // 2) for left in sides]


PLACEMENTS: dict[str, Callable[[np.random.Generator, int, int, int], list[Spot]]] = {
    "random": random_spots,
    "beside": spots_beside,
}


@dataclass(frozen=True)
class Canvas:
    """What tiles are put on.

    Parameters
    ----------
    side, tile
        Pixels a side of the canvas and of a tile.
    ground
        Colour around the tiles; None for the mean colour of the parts.
    placement
        ``random``, or ``beside``: one tile in the middle of either half.
    """

    side: int = 300
    tile: int = 100
    ground: tuple[int, ...] | None = None
    placement: str = "random"

    def __post_init__(self) -> None:
        if not 1 <= self.tile <= self.side:
            raise ViscircuitsError(f"a tile of {self.tile} pixels does not fit on a canvas of {self.side}")
        if self.ground is not None and (len(self.ground) != 3 or any(not 0 <= value <= 255 for value in self.ground)):
            raise ViscircuitsError(f"a ground is three numbers from 0 to 255, got {self.ground} (--ground)")
        if self.placement not in PLACEMENTS:
            raise ViscircuitsError(f"no placement {self.placement!r}; choose {' or '.join(PLACEMENTS)}")

    def lay(self, pictures: Sequence[Image.Image], ground: Any, rng: np.random.Generator) -> Image.Image:
        """The canvas with these pictures on it."""
        canvas = Image.new("RGB", (self.side, self.side), ground)
        spots = PLACEMENTS[self.placement](rng, self.side - self.tile, self.tile, len(pictures))
        for picture, spot in zip(pictures, spots, strict=True):
            canvas.paste(_square(picture, self.tile), spot)
        return canvas


def _square(picture: Image.Image, side: int) -> Image.Image:
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    box = (left, top, left + short, top + short)
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=box)


def _read(images: ImageSet, index: int) -> Image.Image:
    entry = images.entries[index]  # type: ignore[index]  # parts are folders or rendered, never streams
    try:
        return entry.read()[0]
    except Unreadable as error:
        raise ImageError(f"cannot read {entry.name!r} of {images.address}: {error}; remove it") from error


# ---------------------------------------------------------------- the set


class Composites(Dataset):
    """Composites with the number of their group as label; item i is the same whenever it is asked for.

    Parameters
    ----------
    parts
        What can be shown.
    groups
        Pairs of parts, or single parts for plain images.
    each
        Images of each group; those of a group stand together.
    canvas
        What they are put on.
    seed, stream
        Of photographs and places; other streams of a seed share neither but by chance.
    transform
        Turns a picture into an item; by default the picture itself.
    """

    def __init__(
        self,
        parts: Parts,
        groups: Sequence[Group],
        each: int,
        canvas: Canvas | None = None,
        *,
        seed: int = 0,
        stream: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.parts, self.groups, self.each, self.seed, self.stream = parts, tuple(groups), each, seed, stream
        self.canvas = canvas or Canvas()
        self.transform = transform
        self.names = tuple("-".join(list(parts)[i] for i in group) for group in self.groups)
        self._check()
        self.ground = self.canvas.ground or mean_colour(parts)

    def _check(self) -> None:
        if self.each < 1 or not self.groups:
            raise ViscircuitsError(f"composites need groups and images of each, got {len(self.groups)} and {self.each}")
        if any(len(group) not in (1, 2) for group in self.groups):
            raise ViscircuitsError("a composite shows one part or two")
        if len(set(self.names)) < len(self.names):  # 'a-b' with 'c', and 'a' with 'b-c'
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ViscircuitsError(f"two groups are called {twice!r}; rename a part so that hyphens tell them apart")
        if any(len(group) == 2 for group in self.groups) and self.canvas.side < 2 * self.canvas.tile:
            raise ViscircuitsError(
                f"two tiles of {self.canvas.tile} pixels overlap on a canvas of {self.canvas.side}; it takes "
                f"{2 * self.canvas.tile} (--canvas, --tile)"
            )

    def __len__(self) -> int:
        return len(self.groups) * self.each

    def draw(self, index: int) -> Image.Image:
        """Composite `index` as a picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"composite {index} of {len(self)}")
        label, number = divmod(index, self.each)
        rng = np.random.default_rng([self.seed, label, number, self.stream])
        shown = [list(self.parts.values())[i] for i in self.groups[label]]
        pictures = [_read(images, int(rng.integers(len(images)))) for images in shown]
        return self.canvas.lay(pictures, self.ground, rng)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = self.draw(index)
        return (self.transform(picture) if self.transform else picture), index // self.each

    @property
    def labels(self) -> Tensor:
        """The group of each image."""
        return tensor([index // self.each for index in range(len(self))])

    def holds(self, part: int) -> Bool[Tensor, " image"]:
        """Whether each image shows the part."""
        return tensor([part in self.groups[label] for label in self.labels.tolist()])

    def digest(self) -> str:
        """Short digest of every picture and label."""
        found = hashlib.sha256(json.dumps([self.names, self.each]).encode())
        for index in range(len(self)):
            found.update(self.draw(index).tobytes())
        return found.hexdigest()[:12]

    def write(self, folder: str | Path, progress: bool = False) -> Path:
        """Write every composite as a PNG in a folder of its pair, and ``composites.json`` with what made them.

        `viscircuits.images.open_images` reads the folder with the pairs as labels.

        Raises
        ------
        ViscircuitsError
            If the folder holds other composites.
        """
        folder = Path(folder)
        listing, said = folder / "composites.json", self._said()
        if listing.is_file() and listing.read_text(encoding="utf-8") != said:
            raise ViscircuitsError(f"{str(folder)!r} holds other composites; give another folder (--out)")
        write_atomically(listing, said)
        for index in tqdm(range(len(self)), "composites", disable=not progress):
            name = self.names[index // self.each]
            path = folder / name / f"{index % self.each:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.draw(index).save(path)
        return listing

    def _said(self) -> str:
        """What made the set, as JSON."""
        made = {
            "parts": {name: images.address for name, images in self.parts.items()},
            "pairs": self.names, "each": self.each, "seed": self.seed,
            "stream": self.stream, "canvas": {**asdict(self.canvas), "ground": self.ground},
        }  # fmt: skip
        return json.dumps(made, indent=1) + "\n"
