"""Photographs of named classes, and the pictures that teach a network to see and to read.

A `Photographs` holds all of them, small and of one size. The functions spoil, crop and write on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from viscircuits.concepts import parse
from viscircuits.errors import ImageError
from viscircuits.images import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Photographs:
    """Photographs of named classes, all of one size."""

    classes: tuple[str, ...]
    pixels: np.ndarray  # (photograph, height, width, 3), uint8
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """Short digest of pixels, labels and names."""
        parts = (self.pixels.tobytes(), self.labels.tobytes(), "/".join(self.classes).encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:12]

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


PARTS = ("train", "val")
RENDERED = {  # class → the rendered concept that stands for its photographs
    "red": "colour,colour=red", "green": "colour,colour=green", "blue": "colour,colour=blue",
    "circle": "circle,fill=disc", "ring": "circle,fill=ring", "curve": "curve", "stripes": "grating",
}  # fmt: skip


SCENES = {  # what is none of these classes
    "orange": "colour,colour=orange", "purple": "colour,colour=purple", "grey": "colour,colour=grey",
    "teal": "colour,colour=teal",
}  # fmt: skip


def dealt_classes(names: Sequence[str], n: int, seed: int) -> tuple[list[str], list[str]]:
    """`n` of the classes, drawn, and all others.

    Raises
    ------
    ImageError
        If no class is left for the others, or too few are asked for.
    """
    if n < 2:
        raise ImageError(f"a reader chooses between 2 classes or more, got {n}")
    if len(names) <= n:
        raise ImageError(
            f"{n} classes and photographs of something else are needed, got {len(names)} classes; take fewer "
            "(--classes N)"
        )
    order = np.random.default_rng([seed, 7]).permutation(len(names))
    drawn = sorted(names[i] for i in order[:n])
    return drawn, sorted(set(names) - set(drawn))


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
        As `photograph_files` does, or if a file cannot be read.
    """
    files = photograph_files(folder, part)
    return read_files({name: paths[:each] for name, paths in files.items()}, side)


def photograph_files(folder: str | Path, part: str | None = None) -> dict[str, list[Path]]:
    """Class → its image files by name; hidden files and those that are no images are passed over.

    Parameters
    ----------
    folder
        Class folders, or ``train`` and ``val`` folders of class folders.
    part
        ``train`` or ``val``, where the folder has either.

    Raises
    ------
    ImageError
        If the part is missing, there are not two classes, or one has no images.
    """
    root = Path(folder)
    if part is not None and any((root / name).is_dir() for name in PARTS):
        root = root / part
        if not root.is_dir():
            raise ImageError(
                f"{str(folder)!r} has no folder {part!r}; photographs stand in train/CLASS and val/CLASS, or in CLASS"
            )
    folders = sorted(path for path in root.iterdir() if _is_shown(path) and path.is_dir()) if root.is_dir() else []
    found = {path.name: sorted(filter(_is_image, path.iterdir())) for path in folders}
    if len(found) < 2 or not any(found.values()):
        raise ImageError(
            f"{str(root)!r} holds no folders of images, one for each class; give such a folder (--data DIR)"
        )
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise ImageError(f"the class folder {str(root / empty[0])!r} has no images in it; fill it or take it away")
    return found


def set_apart(
    files: Mapping[str, Sequence[Path]], share: float, seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The files of each class but a drawn share, one at least, and that share: what training never sees.

    Raises
    ------
    ImageError
        If a class would have none left.
    """
    rest, apart = {}, {}
    for name, paths in files.items():
        n = max(1, round(share * len(paths)))
        if n >= len(paths):
            raise ImageError(
                f"class {name!r} has {len(paths)} photographs; training needs one and sets {n} apart: add some"
            )
        order = np.random.default_rng([seed, 8]).permutation(len(paths))
        apart[name] = [paths[i] for i in sorted(order[:n])]
        rest[name] = [paths[i] for i in sorted(order[n:])]
    return rest, apart


def read_files(files: Mapping[str, Sequence[Path]], side: int = 64) -> Photographs:
    """Photographs from the files of each class, cropped square and scaled to `side`.

    Raises
    ------
    ImageError
        If a file cannot be read.
    """
    found = [(path, label) for label, paths in enumerate(files.values()) for path in paths]
    pixels = np.stack([_square(path, side) for path, _ in found])
    return Photographs(tuple(files), pixels, np.array([label for _, label in found]))


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".")


def _is_image(path: Path) -> bool:
    return _is_shown(path) and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _square(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise ImageError(f"cannot read {str(path)!r}: {error}; mend it or take it away") from error
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
