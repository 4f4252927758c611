"""Photographs of named classes, and the pictures that teach a network to see and to read.

A `Photographs` holds all of them, small and of one size. The functions spoil, crop and write on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from viscircuits.concepts import parse
from viscircuits.errors import ImageError


@dataclass(frozen=True)
class Photographs:
    """Photographs of named classes, all of one size."""

    classes: tuple[str, ...]
    pixels: np.ndarray  # (photograph, height, width, 3), uint8
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def of_classes(self, names: Sequence[str]) -> Photographs:
        """Those of some classes, which are numbered anew.

        Raises
        ------
        ImageError
            If a class is not among them.
        """
        missing = [name for name in names if name not in self.classes]
        if missing:
            raise ImageError(f"there are no photographs of {missing[0]!r}, only of {', '.join(self.classes)}")
        numbers = {self.classes.index(name): label for label, name in enumerate(names)}
        places = np.flatnonzero(np.isin(self.labels, list(numbers)))
        labels = np.array([numbers[label] for label in self.labels[places]])
        return Photographs(tuple(names), self.pixels[places], labels)

    def part(self, places: np.ndarray) -> Photographs:
        """Some of them."""
        return Photographs(self.classes, self.pixels[places], self.labels[places])


RENDERED = {  # class → the rendered concept that stands for its photographs
    "red": "colour,colour=red", "green": "colour,colour=green", "blue": "colour,colour=blue",
    "circle": "circle,fill=disc", "ring": "circle,fill=ring", "curve": "curve", "stripes": "grating",
}  # fmt: skip


SCENES = {  # what is none of these classes
    "orange": "colour,colour=orange", "purple": "colour,colour=purple", "grey": "colour,colour=grey",
    "teal": "colour,colour=teal",
}  # fmt: skip


def dealt_classes(photographs: Photographs, n: int, seed: int) -> tuple[Photographs, Photographs]:
    """Photographs of `n` of the classes, drawn, and those of all others.

    Raises
    ------
    ImageError
        If no class is left for the others.
    """
    if len(photographs.classes) <= n:
        raise ImageError(
            f"{n} classes and photographs of something else are needed, got {len(photographs.classes)} classes"
        )
    order = np.random.default_rng([seed, 7]).permutation(len(photographs.classes))
    drawn = sorted(photographs.classes[i] for i in order[:n])
    return photographs.of_classes(drawn), photographs.of_classes(sorted(set(photographs.classes) - set(drawn)))


def render_photographs(each: int, seed: int, side: int = 64, scenes: bool = False) -> Photographs:
    """Rendered pictures in place of photographs, `each` of every class (or of every scene): they need no data."""
    addresses = SCENES if scenes else RENDERED
    pixels, labels = [], []
    for label, address in enumerate(addresses.values()):
        rendering = parse(f"render:{address},n={each},seed={seed},size={side}")
        pixels += [np.asarray(rendering.draw(i).convert("RGB")) for i in range(each)]
        labels += [label] * each
    return Photographs(tuple(addresses), np.stack(pixels), np.array(labels))


def read_photographs(
    folder: str | Path, part: str | None = None, each: int | None = None, side: int = 64
) -> Photographs:
    """Photographs from a folder of class folders.

    Parameters
    ----------
    folder
        Class folders, or ``train`` and ``val`` folders of class folders.
    part
        ``train`` or ``val``, where the folder has them.
    each
        The first so many of each class.
    side
        Pixels a side that photographs are cropped square and scaled to.

    Raises
    ------
    ImageError
        If there are no classes with images.
    """
    root = Path(folder) / part if part is not None and (Path(folder) / part).is_dir() else Path(folder)
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())[:each]]
    if len(classes) < 2 or not found:
        raise ImageError(
            f"{str(root)!r} holds no folders of images, one for each class; give such a folder (--data DIR)"
        )
    pixels = np.stack([_square(path, side) for path, _ in found])
    return Photographs(tuple(classes), pixels, np.array([label for _, label in found]))


def _square(path: Path, side: int) -> np.ndarray:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return np.asarray(
        picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)
    )


def varied(pixels: np.ndarray, side: int, rng: np.random.Generator) -> Image.Image:
    """A photograph cropped by up to a quarter of its side, perhaps mirrored, `side` pixels a side."""
    height, width = pixels.shape[:2]
    crop = int(rng.integers(3 * min(height, width) // 4, min(height, width) + 1))
    top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
    picture = Image.fromarray(pixels).crop((left, top, left + crop, top + crop))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def paper(rng: np.random.Generator, side: int) -> Image.Image:
    """A ground to write on: one colour, or soft patches."""
    if rng.random() < 0.5:
        return Image.new("RGB", (side, side), tuple(int(value) for value in rng.integers(0, 256, 3)))
    n = int(rng.integers(2, 9))
    patches = Image.fromarray(rng.integers(0, 256, (n, n, 3)).astype(np.uint8))
    return patches.resize((side, side), Image.Resampling.BICUBIC)


def spoilt(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A photograph blurred, half hidden, or faded under noise."""
    way = int(rng.integers(3))
    if way == 0:
        return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(3, 6))))
    if way == 2:
        values = np.asarray(picture).astype(float) * 0.3 + rng.uniform(0, 180)
        return Image.fromarray((values + rng.normal(0, 25, values.shape)).clip(0, 255).astype(np.uint8))
    hidden, side = picture.copy(), picture.width
    for _ in range(3):
        left, top = (int(value) for value in rng.integers(0, side * 2 // 3, 2))
        across, down = (int(value) for value in rng.integers(side // 4, side * 5 // 8, 2))
        fill = tuple(int(value) for value in rng.integers(0, 256, 3))
        ImageDraw.Draw(hidden).rectangle([left, top, left + across, top + down], fill=fill)
    return hidden
