"""Image sets: whatever a person has, as a stream of upright 8-bit RGB pictures, and as batches.

1. `open_images` takes a folder, files, a list file, tar shards, a rendered concept, images in memory,
   or a sequence of these, and finds out which entries there are without decoding any.
2. Iterating an `ImageSet` decodes one picture at a time. Grey, 16-bit, CMYK, palette, transparent, rotated and
   animated images become what a viewer shows of them; one that cannot be decoded is named and skipped.
3. `split` and `sample` divide a set by seed; `batches` turns a set into tensors, one batch at a time.

It does not resize, crop or normalise (the model's own transform does), apply colour profiles, or know
what a model calls its classes.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from viscircuits.concepts import PREFIX, Rendering, parse
from viscircuits.errors import ImageError, closest

MAX_PIXELS = 178_000_000  # just below the point where Pillow itself refuses
MAX_BYTES = 2**30
IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "bmp", "dib", "webp", "tif", "tiff", "ppm", "pgm", "pbm"),
        *("pnm", "tga", "ico", "mpo", "jp2", "j2k", "pcx", "avif", "heic", "heif", "jxl"),
    )
)
LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv"})
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# an allow-list: Pillow would hand an EPS file to Ghostscript, whatever its name ends with
FORMATS = (
    *("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "TGA"),
    *("ICO", "JPEG2000", "PCX", "AVIF", "HEIF", "JXL"),
)
FORMS = (
    "a folder, an image file, a list of files (.txt, .csv, .tsv), tar shards (x.tar, 'shard-{000..003}.tar'), "
    "a glob such as 'photos/*.jpg', or a rendered concept such as render:text"
)
LABELS = ("cls", "json", "txt")  # members of a tar sample that may name what it shows, the surest first
TAR_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Picture:
    """One decoded image.

    Parameters
    ----------
    name
        Its path below the folder it was found in, or a made-up name for an image without a file.
    image
        Upright 8-bit RGB.
    label
        What it was said to show: folder, list file or tar label. None when nobody said.
    digest
        SHA-256 of the file's bytes, or of the pixels where there is no file.
    place
        Its place among the images of its set, unreadable ones counted.
    """

    name: str
    image: Image.Image
    label: str | None
    digest: str
    place: int = 0


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Images as the model sees them, with what is known of each."""

    images: Float[Tensor, "image channel height width"]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    digests: tuple[str, ...]
    places: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Entry:
    """An image not yet read: `read` returns its pixels and digest, or raises `Unreadable`."""

    name: str
    label: str | None
    read: Callable[[], tuple[Image.Image, str]]


class Unreadable(Exception):
    """Why one image could not be read; the set decides whether that is an error."""


class ImageSet:
    """Pictures that are decoded as they are iterated, as often as you like.

    Parameters
    ----------
    address
        What was opened, in the caller's words.
    entries
        The images, or, for a stream, a function that starts reading it from the beginning.
    strict
        Raise at the first image that cannot be read, rather than skip it.

    Attributes
    ----------
    skipped
        The images that could not be read in the latest iteration, as far as it went.
    """

    def __init__(
        self, address: str, entries: Sequence[Entry] | Callable[[], Iterator[Entry]], *, strict: bool = False
    ) -> None:
        self.address = address
        self.entries = entries
        self.strict = strict
        self.may_be_empty = False  # a portion of a set may hold nothing that can be read
        self.skipped: list[Skipped] = []

    @property
    def count(self) -> int | None:
        """How many images there are, readable or not; None for a stream."""
        return None if callable(self.entries) else len(self.entries)

    def __len__(self) -> int:
        if callable(self.entries):
            raise TypeError(f"{self.address} is a stream: its length is known only by reading it (count is None)")
        return len(self.entries)

    def __bool__(self) -> bool:
        return self.count != 0

    def __repr__(self) -> str:
        return f"ImageSet({self.address!r}, {'stream' if self.count is None else f'{self.count} images'})"

    def __iter__(self) -> Iterator[Picture]:
        """Yield each picture that can be read, and fill `skipped` with the others.

        Raises
        ------
        ImageError
            At the end if no image could be read; under `strict`, at the first that cannot.
        """
        self.skipped.clear()
        n_read, place = 0, -1
        entries = self.entries() if callable(self.entries) else iter(self.entries)
        for entry in entries:  # not enumerated: that would hold on to each
            place += 1
            try:
                image, digest = entry.read()
            except Unreadable as error:
                if self.strict:
                    raise ImageError(f"cannot read image {entry.name!r} of {self.address}: {error}") from error
                self.skipped.append(Skipped(entry.name, str(error)))
                continue
            n_read += 1
            picture = Picture(entry.name, image, entry.label, digest, place)
            del entry, image  # a stream's entry holds its bytes: let go before the next is read
            yield picture
            del picture
        if not n_read and not self.may_be_empty:
            raise ImageError(self._why_empty())

    def _why_empty(self) -> str:
        if not self.skipped:
            return f"no image in {self.address}"
        first = self.skipped[0]
        return f"none of the {len(self.skipped)} images of {self.address} could be read; {first.name!r}: {first.reason}"


Source: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | ImageSet | Sequence
Leaf: TypeAlias = Path | Rendering | Image.Image | np.ndarray | ImageSet
Entries: TypeAlias = Sequence[Entry] | Callable[[], Iterator[Entry]]


# ---------------------------------------------------------------- opening


def open_images(source: Source, *, strict: bool = False, limit: int | None = None) -> ImageSet:
    """Return the images of a folder, file, list, tar shards, rendered concept, or of several of these.

    Parameters
    ----------
    source
        A folder (searched to the bottom, in order of path; the first folder below it is the label);
        an image file; a list file (one path a line in ``.txt``; ``path,label`` in ``.csv`` and ``.tsv``; relative
        to the list's folder); WebDataset tar shards; a glob; ``render:…`` (see `viscircuits.concepts`);
        a PIL image; an ``(H, W, 3)`` uint8 array; or a sequence of any of these.
    strict
        Raise at the first image that cannot be read, rather than name it in `ImageSet.skipped`.
    limit
        Take only the first so many images.

    Raises
    ------
    ImageError
        If something does not exist, is not one of these forms, or holds no image.
    """
    if limit is not None and limit < 1:
        raise ImageError(f"limit is a number of images from 1, got {limit}")
    leaves = list(_leaves(source))
    if not leaves:
        raise ImageError(f"no images were given: {source!r} is empty. Give {FORMS}.")
    base = _common_folder([leaf for leaf in leaves if isinstance(leaf, Path)])
    entries = _chain([_entries(leaf, base, position) for position, leaf in enumerate(leaves)])
    strict = strict or (isinstance(source, ImageSet) and source.strict)
    return ImageSet(_address(source), entries if limit is None else _cut(entries, 0, limit), strict=strict)


def split(images: ImageSet, n_first: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Divide a set into `n_first` images and the rest, at random where its length is known.

    Both parts keep the order of the whole. A stream is cut where it stands: its first `n_first` images and
    those that follow, so shards should have been shuffled when they were written.

    Raises
    ------
    ImageError
        If a part would be empty.
    """
    if n_first < 1 or (images.count is not None and n_first >= images.count):
        raise ImageError(
            f"cannot split {images.address} into {n_first} images and the rest: it has {_how_many(images)}, "
            "and both parts need at least one"
        )
    if callable(images.entries):
        first, rest = _cut(images.entries, 0, n_first), _cut(images.entries, n_first, None)
        return _part(images, first, f"first {n_first}"), _part(images, rest, f"all but the first {n_first}")
    chosen = _drawn(len(images), n_first, seed)
    first = [entry for i, entry in enumerate(images.entries) if i in chosen]
    rest = [entry for i, entry in enumerate(images.entries) if i not in chosen]
    drawn = f"{n_first} of {len(images)} by seed {seed}"
    return _part(images, first, drawn), _part(images, rest, f"all but {drawn}")


def sample(images: ImageSet, n: int, seed: int) -> ImageSet:
    """Return `n` images of a set, at random where its length is known, the first `n` of a stream.

    A larger sample by the same seed contains the smaller one.

    Raises
    ------
    ImageError
        If the set is known to have fewer.
    """
    if n < 1 or (images.count is not None and n > images.count):
        raise ImageError(f"cannot take {n} images from {images.address}: it has {_how_many(images)}")
    if callable(images.entries):
        return _part(images, _cut(images.entries, 0, n), f"first {n}")
    chosen = _drawn(len(images), n, seed)
    kept = [entry for i, entry in enumerate(images.entries) if i in chosen]
    return _part(images, kept, f"{n} of {len(images)} by seed {seed}")


def fingerprint(images: Any) -> str:
    """What cheaply tells an image set from another: how many, and a digest of names, shards' sizes, or tensors."""
    if isinstance(images, ImageSet):
        names = _names(images.entries)
        many = "a stream" if images.count is None else f"{images.count} images"
        return f"{images.address}: {many}, names {digest_of(names)[:16]}"
    if isinstance(images, Tensor):
        return f"{len(images)} images, tensors {_tensor_digest(images)[:16]}"
    if isinstance(images, Sequence):
        return f"{len(images)} tensors {digest_of(_tensor_digest(each) for each in images)[:16]}"
    return type(images).__name__


def _names(entries: Entries) -> Iterator[str]:
    """Names of files, names and sizes of shards, and where a part of a stream begins and ends."""
    if isinstance(entries, Shards):
        for part in entries.parts:
            yield from _names(part)
    elif not callable(entries):
        yield from (entry.name for entry in entries)
    elif isinstance(entries, partial) and entries.func is _slice_of_stream:
        stream, start, stop = entries.args
        yield f"{start}:{stop}"
        yield from _names(stream)
    elif isinstance(entries, partial) and entries.func is _tar_entries:
        path = entries.args[0]
        yield f"{path.name} {path.stat().st_size}"


def digest_of(digests: Iterable[str]) -> str:
    """Return one SHA-256 that stands for a list of digests, in their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _drawn(count: int, n: int, seed: int) -> set[int]:
    if seed < 0:
        raise ImageError(f"a seed is a whole number from 0, got {seed}")
    return set(np.random.default_rng(seed).permutation(count)[:n].tolist())


def _part(images: ImageSet, entries: Entries, which: str) -> ImageSet:
    return ImageSet(f"{images.address} ({which})", entries, strict=images.strict)


def _how_many(images: ImageSet) -> str:
    return "an unknown number" if images.count is None else str(images.count)


def _cut(entries: Entries, start: int, stop: int | None) -> Entries:
    return partial(_slice_of_stream, entries, start, stop) if callable(entries) else entries[start:stop]


def _slice_of_stream(stream: Callable[[], Iterator[Entry]], start: int, stop: int | None) -> Iterator[Entry]:
    return itertools.islice(stream(), start, stop)


def _chain(parts: list[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    if any(callable(part) for part in parts):
        return Shards(tuple(parts))
    return [entry for part in parts for entry in part]  # type: ignore[union-attr]  # none is callable


@dataclass(frozen=True)
class Shards:
    """Several streams, one after the other, that can also be read apart."""

    parts: tuple[Entries, ...]

    def __call__(self) -> Iterator[Entry]:
        """Read them all, from the beginning."""
        for part in self.parts:
            yield from part() if callable(part) else part


def _address(source: Source) -> str:
    if isinstance(source, ImageSet):
        return source.address
    if isinstance(source, (Image.Image, np.ndarray)):
        return "an image in memory"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    parts = [_address(part) for part in source]
    return " + ".join(parts if len(parts) <= 4 else [*parts[:2], f"{len(parts) - 2} more"])


# ---------------------------------------------------------------- what was given


def _leaves(source: Any) -> Iterator[Leaf]:
    """Single folders, files, renderings and images, in the order given."""
    if isinstance(source, (ImageSet, Image.Image)):
        yield source
    elif isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(f"an image array is (H, W, 3) uint8, got {source.shape} {source.dtype}")
        yield source
    elif isinstance(source, str) and source.startswith(PREFIX):
        yield parse(source)
    elif isinstance(source, (str, os.PathLike)):
        yield from _paths(os.fspath(source))
    elif isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        for part in source:
            yield from _leaves(part)
    else:
        raise ImageError(
            f"cannot read images from {type(source).__name__}. Give {FORMS}, a PIL image, an array, or a list of these."
        )


def _paths(given: str) -> list[Path]:
    """The files and folders that a path, brace pattern or glob stands for."""
    if not given:
        raise ImageError(f"the path of an image set is empty. Give {FORMS}.")
    found = []
    literal = Path(given).expanduser()
    for name in [str(literal)] if literal.exists() else _expand_braces(str(literal)):
        if os.path.exists(name):
            found.append(Path(name))
        elif glob.has_magic(name):
            found += _matches(name)
        else:
            raise ImageError(_not_found(given, Path(name)))
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    """Each path of ``shard-{000..003}.tar`` or ``{train,val}.tar``, as a shell would list them."""
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if brace is None:
        yield pattern
        return
    first, last, names = brace.groups()
    if not names and int(first) > int(last):
        raise ImageError(f"the range {brace[0]} in {pattern!r} is empty: it goes from the smaller number to the larger")
    parts = names.split(",") if names else (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
    for part in parts:
        for rest in _expand_braces(pattern[brace.end() :]):
            yield pattern[: brace.start()] + part + rest


def _matches(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    own = Path(pattern).suffix
    kept = [p for p in paths if p.is_file() and (_is_image(p) or _is_tar(p) or (own and p.suffix == own))]
    if "**" not in pattern:  # else the files below a folder match on their own
        kept += [p for p in paths if p.is_dir()]
    if not kept:
        raise ImageError(f"no image, folder or tar file matches {pattern!r}. Give {FORMS}.")
    return sorted(kept)


def _not_found(given: str, path: Path) -> str:
    while not path.parent.exists():
        path = path.parent
    with os.scandir(path.parent if path.parent.is_dir() else ".") as listing:
        names = [item.name for item in itertools.islice(listing, 2000)]
    shown = repr(given) if Path(given) == path else f"{given!r} ({str(path)!r} does not exist)"
    hint = closest(given, [PREFIX + "text"]) if ":" in given else closest(path.name, names)
    return f"no images at {shown}.{hint} Give {FORMS}."


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def _common_folder(paths: list[Path]) -> Path:
    """The folder that names are written from: one folder's own, or the deepest that holds everything given."""
    if len(paths) == 1 and paths[0].is_dir():
        return paths[0].absolute()
    parents = {os.path.dirname(os.path.abspath(path)) for path in paths}
    return Path(os.path.commonpath(parents)) if parents else Path.cwd()


def _entries(leaf: Leaf, base: Path, position: int) -> Entries:
    if isinstance(leaf, ImageSet):
        return leaf.entries
    if isinstance(leaf, Rendering):
        return [Entry(f"{leaf.concept}-{i:04d}", None, partial(_render, leaf, i)) for i in range(leaf.n)]
    if isinstance(leaf, np.ndarray):
        return [Entry(f"image-{position:04d}", None, partial(_take, Image.fromarray(np.ascontiguousarray(leaf))))]
    if isinstance(leaf, Image.Image):
        file = getattr(leaf, "filename", "")
        name = os.path.basename(file) if isinstance(file, str) and file else f"image-{position:04d}"
        return [Entry(name, None, partial(_take, leaf))]
    if leaf.is_dir():
        return _folder(leaf, base)
    if _is_tar(leaf):
        return partial(_tar_entries, leaf)
    if leaf.suffix.lower() in LIST_SUFFIXES:
        return _listed(leaf)
    return [_file(leaf, base, None)]


def _file(path: Path, base: Path, label: str | None, root: Path | None = None) -> Entry:
    name = Path(os.path.relpath(path.absolute(), base)).as_posix()
    return Entry(name, label, partial(_read_file, path, root))


# ---------------------------------------------------------------- folders and lists


def _folder(root: Path, base: Path) -> list[Entry]:
    found = list(_files_below(root))
    entries = []
    for path in filter(_is_image, found):
        below = path.relative_to(root).parts
        entries.append(_file(path, base, below[0] if len(below) > 1 else root.name or None, root))
    if not entries:
        held = ", ".join(sorted({path.suffix for path in found if path.suffix})[:5]) or "nothing"
        raise ImageError(f"no image in folder {str(root)!r} or below (it holds {held}). Give {FORMS}.")
    return entries


def _files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files in order of path, hidden ones left out; links are followed, but not back into a folder they lie in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        items = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError as error:
        raise ImageError(f"cannot look into folder {str(folder)!r}: {_reason(error)}") from error
    for item in items:
        if item.name.startswith("."):
            continue
        if item.is_dir():
            yield from _files_below(folder / item.name, above | {real})
        elif item.is_file() or item.is_symlink():  # a broken link is named when it is read
            yield folder / item.name


def _listed(path: Path) -> list[Entry]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"cannot read the image list {str(path)!r}: {_reason(error)}") from error
    lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    rows = _rows(lines, path.suffix.lower())
    if not rows:
        raise ImageError(f"the image list {str(path)!r} is empty: give one path a line, or path,label in .csv and .tsv")
    files = [path.parent / Path(name).expanduser() for name, _ in rows]
    base = _common_folder(files) if len(files) > 1 else files[0].absolute().parent
    root = base if base.is_dir() else None
    return [_file(file, base, label, root) for file, (_, label) in zip(files, rows, strict=True)]


def _rows(lines: list[str], suffix: str) -> list[tuple[str, str | None]]:
    if suffix == ".txt":
        return [(line, None) for line in lines]
    cells = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",")]
    rows = [(row[0], row[1] if len(row) > 1 and row[1] else None) for row in cells if row and row[0]]
    return rows[1:] if rows and rows[0][0].lower() == "path" else rows


# ---------------------------------------------------------------- tar shards


def _tar_entries(path: Path) -> Iterator[Entry]:
    """Read a shard from beginning to end, as from a pipe, holding one sample at a time."""
    if not path.exists():
        raise ImageError(f"the shard {str(path)!r} has vanished since it was opened; bring it back")
    try:
        with tarfile.open(path, "r|*") as tar:
            for key, sample in _samples(tar):
                suffix = next((s for s in sorted(sample, key=lambda s: s.count(".")) if _is_picture(s)), None)
                if suffix is not None:
                    yield Entry(f"{path.name}/{key}.{suffix}", _label(sample), partial(decode, sample.pop(suffix)))
                sample.clear()
    except TAR_DAMAGE as error:
        yield Entry(path.name, None, partial(_refuse, f"damaged tar file, the rest of it is lost: {_reason(error)}"))


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Neighbouring members whose paths agree up to the first dot of the name: key, and bytes by suffix."""
    current = ""
    sample: dict[str, bytes] = {}
    damage = None
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or every header it has seen would be kept
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != current:
                if sample:
                    yield current, sample
                current, sample = key, {}
            if member.isfile() and stem and (_is_picture(suffix) or suffix.lower() in LABELS):
                sample[suffix] = _member_bytes(tar, member)
    except TAR_DAMAGE as error:
        damage = error
    if sample:
        yield current, sample
    if damage is not None:
        raise damage


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    # one byte too many is enough for `decode` to refuse it
    return file.read(min(member.size, MAX_BYTES + 1)) if file else b""


def _is_picture(suffix: str) -> bool:
    return f".{suffix.lower().rpartition('.')[2]}" in IMAGE_SUFFIXES


def _label(sample: dict[str, bytes]) -> str | None:
    """The label beside an image: ``.cls``, else a label in ``.json``, else ``.txt``."""
    for suffix in LABELS:
        text = sample.get(suffix, b"").decode("utf-8", errors="replace").strip()
        label = _label_in_json(text) if suffix == "json" else text
        if label:
            return label
    return None


def _label_in_json(text: str) -> str | None:
    try:
        found: Any = json.loads(text)
    except ValueError:
        return None
    if isinstance(found, dict):
        found = next((found[key] for key in ("label", "class", "cls") if key in found), None)
    return str(found) if isinstance(found, (str, int)) and not isinstance(found, bool) else None


# ---------------------------------------------------------------- reading one image


def _read_file(path: Path, root: Path | None) -> tuple[Image.Image, str]:
    """Read a file; one that is not there is skipped, but not if all of `root`, where it was found, has gone."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        if root is not None and _is_gone(root):
            raise ImageError(
                f"cannot read {str(path)!r}: its folder {str(root)!r} has vanished since it was opened; "
                "bring it back (is a disk or a share still mounted?)"
            ) from error
        raise Unreadable(_reason(error)) from error
    if size > MAX_BYTES:
        raise Unreadable(f"{size} bytes, more than the limit of {MAX_BYTES}")
    return decode(data)


def _is_gone(root: Path) -> bool:
    try:
        return next(os.scandir(root), None) is None  # an unmounted share leaves an empty folder
    except OSError:
        return True


def decode(
    data: bytes, *, formats: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, str]:
    """A file's picture, upright and 8-bit RGB, and the SHA-256 of its bytes.

    Parameters
    ----------
    data
        What the file holds.
    formats
        Pillow's names of those that may be read; by default all of `FORMATS`.
    max_pixels
        A larger picture is refused by what its header says, before its pixels are decoded.

    Raises
    ------
    Unreadable
        If it is no such picture, too large, or damaged.
    """
    if not data:
        raise Unreadable("the file is empty")
    if len(data) > MAX_BYTES:
        raise Unreadable(f"more than the limit of {MAX_BYTES} bytes")
    known = _formats() if formats is None else [name for name in formats if name in _formats()]
    with _decoding(), Image.open(io.BytesIO(data), formats=known) as image:
        if image.width * image.height > max_pixels:
            size, most = f"{image.width}×{image.height}", max_pixels // 10**6
            raise Unreadable(f"{size} pixels, more than the limit of {most} million")
        return to_rgb(image), hashlib.sha256(data).hexdigest()


def _take(image: Image.Image) -> tuple[Image.Image, str]:
    with _decoding():
        rgb = to_rgb(image)
        return rgb, _pixel_digest(rgb)


def _render(rendering: Rendering, index: int) -> tuple[Image.Image, str]:
    image = rendering.draw(index)
    return image, _pixel_digest(image)


def _refuse(reason: str) -> tuple[Image.Image, str]:
    raise Unreadable(reason)


def _pixel_digest(image: Image.Image) -> str:
    return hashlib.sha256(f"RGB {image.width} {image.height}\n".encode() + image.tobytes()).hexdigest()


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:  # on damaged bytes decoders raise nearly anything
        raise Unreadable(_reason(error)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text holds an address in memory
        return "not an image, or in a format that Pillow cannot read here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return str(error) or type(error).__name__


# ---------------------------------------------------------------- pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as a viewer shows it: upright, 8-bit RGB, transparency over white.

    16-bit grey is scaled so that 65535 is white; a float image has white at 1, or at 255 if it goes beyond 1.

    Raises
    ------
    ValueError
        If an integer or float image goes beyond those ranges: nobody said what white is.
    """
    upright = _upright(image)
    if upright.mode.startswith("I"):
        return _grey(np.asarray(upright).astype(np.float64), 65535)
    if upright.mode == "F":
        values = np.asarray(upright).astype(np.float64)
        return _grey(values, 1 if values.max() <= 1 else 255)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels, which are fine
        return image


def _grey(values: Float[np.ndarray, "height width"], white: int) -> Image.Image:
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"values from {values.min():g} to {values.max():g}: 0 to {white} was expected")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert("RGB")


# ---------------------------------------------------------------- portions and batches


@dataclass(frozen=True)
class Portion:
    """A part of an image set that one worker reads: a run of neighbouring images, or a shard.

    Parameters
    ----------
    number
        Its place among the portions.
    first
        The place of its first image in the whole set. In sets of several shards each shard's places start
        at its own multiple of `SHARD_PLACES`, because nobody knows how many images the others hold.
    images
        What it holds.
    """

    number: int
    first: int
    images: ImageSet | Tensor | list[Tensor]

    def batches(self, transform: Callable[[Image.Image], Tensor] | None, batch_size: int) -> Iterator[Batch]:
        """The portion's images as `batches` gives them; none, if none can be read."""
        return batches(self.images, transform, batch_size, first=self.first)

    @property
    def skipped(self) -> list[Skipped]:
        """The images that could not be read when the portion was read last."""
        return self.images.skipped if isinstance(self.images, ImageSet) else []


SHARD_PLACES = 2**40


def portions(
    images: ImageSet | Tensor | Iterable[Tensor], size: int, cuts: Iterable[int] = (), *, by_shard: bool = True
) -> Iterator[Portion]:
    """Yield the parts of an image set that can be worked on apart, without decoding any image.

    Parameters
    ----------
    images
        As for `batches`.
    size
        Images in a portion.
    cuts
        Places no portion reaches across.
    by_shard
        Take each tar shard of several as one portion. Else, and for a single stream or part of one, neighbouring
        images are taken as they come, and every reader of portions has to pass over all bytes before them.
    """
    if by_shard and isinstance(images, ImageSet) and isinstance(images.entries, Shards):
        parts: list[tuple[int, Any]] = [(i * SHARD_PLACES, part) for i, part in enumerate(_shards(images.entries))]
    else:
        parts = [(0, images.entries if isinstance(images, ImageSet) else images)]
    numbers = itertools.count()
    for base, part in parts:
        whole = by_shard and len(parts) > 1 and callable(part)
        for first, piece in [(0, part)] if whole else _runs(part, size, cuts):
            yield Portion(next(numbers), base + first, _portion_of(images, piece))


def _shards(shards: Shards) -> Iterator[Entries]:
    for part in shards.parts:
        if isinstance(part, Shards):
            yield from _shards(part)
        else:
            yield part


def _portion_of(images: Any, piece: Any) -> ImageSet | Tensor | list[Tensor]:
    if not isinstance(images, ImageSet):
        return piece
    portion = ImageSet(images.address, piece, strict=images.strict)
    portion.may_be_empty = True
    return portion


def _runs(items: Any, size: int, cuts: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Runs of at most `size` neighbours that end at every cut, each with the place of its first."""
    ends, first = _ends(size, cuts), 0
    sliceable = isinstance(items, Tensor) or (isinstance(items, Sequence) and not _holds_batches(items))
    stream = iter(()) if sliceable else _one_by_one(items)
    for end in ends:
        run = items[first:end] if sliceable else list(itertools.islice(stream, end - first))
        if len(run):
            yield first, run
        if len(run) < end - first:
            return
        first = end


def _ends(size: int, cuts: Iterable[int]) -> Iterator[int]:
    """Where each run ends: `size` after the one before, or at the next cut."""
    end = 0
    for cut in cuts:
        while end < cut:
            end = min(end + size, cut)
            yield end
    while True:
        end += size
        yield end


def _holds_batches(items: Sequence) -> bool:
    return bool(len(items)) and not isinstance(items[0], Entry)


def _one_by_one(items: Any) -> Iterator[Any]:
    for item in items() if callable(items) else items:
        if isinstance(item, Entry):
            yield item
        else:
            yield from _single(item)


def batches(
    images: Tensor | Iterable[Picture] | Iterable[Tensor],
    transform: Callable[[Image.Image], Tensor] | None,
    batch_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
) -> Iterator[Batch]:
    """Yield the images as tensors, `batch_size` at a time, holding none longer than its batch.

    Parameters
    ----------
    images
        An `ImageSet`; or images already transformed: one tensor ``(N, C, H, W)``, or an iterable of tensors
        ``(C, H, W)`` or ``(n, C, H, W)``, which are named by their position.
    transform
        The model's own: a picture to ``(C, H, W)``. Not applied to tensors.
    batch_size
        Images in a batch; the last may have fewer.
    dtype
        Of the tensors yielded.
    first
        Place of the first image, where `images` are a portion of a larger set.

    Raises
    ------
    ImageError
        If an image cannot be transformed, the transform gives images of different sizes, or there is no image.
    """
    if batch_size < 1:
        raise ImageError(f"batch_size is a number of images from 1, got {batch_size}")
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ImageError(f"an image tensor is (N, C, H, W), got {tuple(images.shape)}")
    may_be_empty = isinstance(images, ImageSet) and images.may_be_empty
    rows = _transformed(iter(images), transform, dtype, first)
    return _batches(rows, batch_size, may_be_empty)


def _batches(rows: Iterator[Row], batch_size: int, may_be_empty: bool) -> Iterator[Batch]:
    n_batches = 0
    while taken := list(itertools.islice(rows, batch_size)):
        batch = _stack(taken)
        taken.clear()
        n_batches += 1
        yield batch
        del batch
    if not n_batches and not may_be_empty:
        raise ImageError("no image was given: the tensor or iterable is empty")


Row: TypeAlias = tuple[Tensor, str, str | None, str, int]


def _transformed(
    items: Iterator[Picture] | Iterator[Tensor],
    transform: Callable[[Image.Image], Tensor] | None,
    dtype: torch.dtype,
    first: int,
) -> Iterator[Row]:
    """Tensor, name, label, digest and place of each image, none of which is held here while the next is made."""
    position = itertools.count(first)
    for item in items:
        if isinstance(item, Picture):
            row = _apply(transform, item).to(dtype), item.name, item.label, item.digest, first + item.place
            del item
            yield row
            del row
        else:
            for tensor in _single(item):
                place = next(position)
                yield tensor.to(dtype), f"image-{place:04d}", None, _tensor_digest(tensor), place


def _apply(transform: Callable[[Image.Image], Tensor] | None, picture: Picture) -> Tensor:
    if transform is None:
        raise ImageError("pictures need the model's transform to become tensors; none was given")
    try:
        tensor = transform(picture.image)
    except Exception as error:
        raise ImageError(f"the transform failed on {picture.name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
        given = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ImageError(f"the transform makes {given} of {picture.name!r}; a float tensor (C, H, W) was expected")
    return tensor


def _single(item: object) -> tuple[Tensor, ...]:
    if not isinstance(item, Tensor) or item.ndim not in (3, 4) or not item.is_floating_point():
        given = f"{tuple(item.shape)} {item.dtype}" if isinstance(item, Tensor) else type(item).__name__
        raise ImageError(
            f"cannot make a batch of {given}. Give an image set from open_images, "
            "or float tensors (C, H, W) or (n, C, H, W)."
        )
    return (item,) if item.ndim == 3 else item.unbind()


def _tensor_digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + data.tobytes()).hexdigest()


def _stack(rows: list[Row]) -> Batch:
    tensors, names, labels, digests, places = zip(*rows, strict=True)
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ImageError(
                f"images of one batch differ in size: {tuple(tensors[0].shape)} from {names[0]!r}, "
                f"{tuple(tensor.shape)} from {name!r}. Let the transform crop to one size, or use batch_size=1."
            )
    return Batch(torch.stack(tensors), names, labels, digests, places)
