"""Trees of concepts: each leaf has images, and two leaves are as far apart as the steps between them.

1. Photographs with a ``groups.json`` (group → files): the groups take their places in WordNet (`WORDNET`); large
   ones are divided as WordNet divides them, by the ImageNet class that a file's name starts with.
2. Any folder of folders: one with images in it is a concept, its path is its place.
3. No data: rendered concepts (`RENDERED`).

The images of a concept are dealt into two halves. The first finds circuits, the second tests them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from viscircuits.concepts import PREFIX
from viscircuits.errors import ImageError
from viscircuits.images import IMAGE_SUFFIXES, ImageSet, open_images

Place = tuple[str, ...]  # from the tree's top to the concept

LEAST = 4  # images in each half; a smaller concept is left out
GROUPS = "groups.json"

# Hypernyms of WordNet 3.0 (wordnet.princeton.edu), written out by hand, steps that part nothing left out; the group
# "cat" holds lions too: WordNet's feline. Numbers are ImageNet classes, from and to; without any, the group is whole.
WORDNET: Mapping[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "organism/animal/vertebrate/mammal/carnivore/dog/hunting dog/hound": ("dog", ((159, 178),)),
    "organism/animal/vertebrate/mammal/carnivore/dog/hunting dog/terrier": ("dog", ((179, 204),)),
    "organism/animal/vertebrate/mammal/carnivore/dog/hunting dog/sporting dog": ("dog", ((205, 221),)),
    "organism/animal/vertebrate/mammal/carnivore/dog/working dog": ("dog", ((222, 250),)),
    "organism/animal/vertebrate/mammal/carnivore/dog/toy dog": ("dog", ((151, 158),)),
    "organism/animal/vertebrate/mammal/carnivore/feline": ("cat", ()),
    "organism/animal/vertebrate/mammal/primate": ("primate", ()),
    "organism/animal/vertebrate/bird/songbird": ("bird", ((10, 20),)),
    "organism/animal/vertebrate/bird/gallinaceous bird": ("bird", ((80, 86),)),
    "organism/animal/vertebrate/bird/aquatic bird": ("bird", ((97, 100), (127, 146))),
    "organism/animal/vertebrate/reptile/snake": ("snake", ()),
    "organism/animal/vertebrate/reptile/lizard": ("lizard", ()),
    "organism/animal/vertebrate/fish": ("fish", ()),
    "organism/animal/arthropod/insect": ("insect", ()),
    "organism/animal/arthropod/spider": ("spider", ()),
    "organism/fungus": ("fungus", ()),
    "natural object/fruit": ("fruit", ()),
    "artifact/instrumentality/vehicle/wheeled vehicle/car": ("car", ()),
    "artifact/instrumentality/vehicle/wheeled vehicle/other land vehicle": ("land_vehicle", ()),
    "artifact/instrumentality/vehicle/boat": ("boat", ()),
    "artifact/instrumentality/musical instrument": ("musical_instrument", ()),
}

RENDERED: Mapping[str, str] = {
    "colour/warm/red": "colour,colour=red",
    "colour/warm/orange": "colour,colour=orange",
    "colour/cold/blue": "colour,colour=blue",
    "colour/cold/cyan": "colour,colour=cyan",
    "shape/circle/disc": "circle,fill=disc",
    "shape/circle/ring": "circle,fill=ring",
    "shape/curve/bulging up": "curve,orientation=60..120",
    "shape/curve/bulging right": "curve,orientation=-30..30",
    "texture/coarse/upright": "grating,frequency=4..7,orientation=80..100",
    "texture/coarse/lying": "grating,frequency=4..7,orientation=-10..10",
    "texture/fine/upright": "grating,frequency=14..20,orientation=80..100",
    "texture/fine/lying": "grating,frequency=14..20,orientation=-10..10",
}


@dataclass(frozen=True)
class Concept:
    """A leaf: its place in the tree, the images that find its circuit, and those held out."""

    place: Place
    first: ImageSet
    second: ImageSet

    @property
    def key(self) -> str:
        """The place as one word, for files and tables."""
        return "/".join(self.place)


def distances(places: Sequence[Place]) -> Float[Tensor, "concept concept"]:
    """Steps from each concept up to the lowest place above both, and down to the other."""
    steps = [[len(a) + len(b) - 2 * _shared(a, b) for b in places] for a in places]
    return torch.tensor(steps, dtype=torch.float64)


def siblings(places: Sequence[Place]) -> Bool[Tensor, "concept concept"]:
    """Which pairs have the same parent, or, if none has, are the nearest of the tree."""
    same = torch.tensor([[a != b and a[:-1] == b[:-1] for b in places] for a in places])
    if same.any():
        return same
    steps = distances(places).fill_diagonal_(torch.inf)
    return steps == steps.min()


def labels(places: Sequence[Place]) -> list[str]:
    """The last step of each place, with the one above where that alone would name two."""
    last = [place[-1] for place in places]
    return [name if last.count(name) == 1 else ", ".join(place[-2:]) for name, place in zip(last, places, strict=True)]


def open_tree(folder: str | Path, each: int, seed: int) -> list[Concept]:
    """The concepts of a folder of photographs, in order of the tree.

    Parameters
    ----------
    folder
        Nested folders, or one with a ``groups.json``.
    each
        How many images each half has at most.
    seed
        Of what falls into which half.

    Raises
    ------
    ImageError
        If the folder holds fewer than four concepts with enough images, or all are equally far apart.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(
            f"there is no folder {str(folder)!r}; give a folder of folders of images, or none for rendered ones"
        )
    found = dict(_of_groups(folder) if (folder / GROUPS).is_file() else _of_folders(folder))
    large = {place: files for place, files in found.items() if len(files) >= 2 * LEAST}
    concepts = [_dealt(place, files, each, seed) for place, files in large.items()]
    _check(concepts, f"{str(folder)!r} ({len(found) - len(large)} left out with fewer than {2 * LEAST} images)")
    return concepts


def rendered_tree(each: int, seed: int) -> list[Concept]:
    """The concepts of `RENDERED`, `each` images in each half.

    Every concept has a seed of its own: by the same one, discs and rings would have the same colours and places.
    """
    concepts = []
    for number, (path, address) in enumerate(RENDERED.items()):
        images = open_images(f"{PREFIX}{address},n={2 * each},seed={seed * len(RENDERED) + number}")
        assert not callable(images.entries)  # a rendering is no stream
        halves = [ImageSet(images.address, images.entries[part]) for part in (slice(each), slice(each, None))]
        concepts.append(Concept(tuple(path.split("/")), *halves))
    return concepts


def _shared(a: Place, b: Place) -> int:
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _check(concepts: Sequence[Concept], where: str) -> None:
    if len(concepts) < 4:
        raise ImageError(f"a tree has four concepts or more, got {len(concepts)} from {where}")
    steps = distances([concept.place for concept in concepts])
    if len(torch.unique(steps[~torch.eye(len(steps), dtype=torch.bool)])) == 1:
        raise ImageError(
            f"all {len(concepts)} concepts of {where} are equally far apart, so nothing can depend on distance; "
            "nest the folders: animals/dogs/terrier, animals/cats, vehicles/car"
        )


def _of_groups(folder: Path) -> Iterator[tuple[Place, list[Path]]]:
    """Groups in their places, each file once; groups that have no place stand by themselves."""
    groups = _read_groups(folder / GROUPS)
    taken: set[str] = set()
    placed = {group for group, _ in WORDNET.values()}
    own = {group: (group, ()) for group in groups if group not in placed}
    for path, (group, ranges) in {**WORDNET, **own}.items():
        mine = [name for name in groups.get(group, ()) if name not in taken and _is_of(name, ranges)]
        taken.update(mine)
        yield tuple(path.split("/")), [folder / name for name in mine]


def _read_groups(path: Path) -> Mapping[str, list[str]]:
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read {str(path)!r}: {error}") from error
    lists = groups.values() if isinstance(groups, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ImageError(f"{str(path)!r} must hold the files of each group: {{'dog': ['151_chihuahua.jpg', …], …}}")
    return groups


def _is_of(name: str, ranges: Sequence[tuple[int, int]]) -> bool:
    number = name.split("_")[0]
    return not ranges or (number.isdigit() and any(low <= int(number) <= high for low, high in ranges))


def _of_folders(folder: Path) -> Iterator[tuple[Place, list[Path]]]:
    for root, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        shown = (Path(name) for name in sorted(files) if not name.startswith("."))
        images = [Path(root, name) for name in shown if name.suffix.lower() in IMAGE_SUFFIXES]
        if images and Path(root) != folder:
            yield Path(root).relative_to(folder).parts, images


def _dealt(place: Place, files: Sequence[Path], each: int, seed: int) -> Concept:
    """Half of the files, at most `each`, to find; as many of the others to test. A concept's deal is its own."""
    order = np.random.default_rng([seed, zlib.crc32("/".join(place).encode())]).permutation(len(files))
    n = min(each, len(files) // 2)
    halves = [[files[i] for i in sorted(part)] for part in (order[:n], order[n : n + each])]
    return Concept(place, *(open_images(half, strict=True) for half in halves))  # a torn one is named, not passed over
