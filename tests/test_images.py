"""Image sets: odd images become what a viewer shows, damage is named, parts are partitions."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import random
import struct
import tarfile
import threading
import tracemalloc
import warnings
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from viscircuits.errors import ImageError
from viscircuits.images import (
    SHARD_PLACES,
    ImageSet,
    Picture,
    batches,
    digest_of,
    fingerprint,
    open_images,
    portions,
    sample,
    split,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def plain(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def png(image: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (image or plain()).save(buffer, "PNG")
    return buffer.getvalue()


def only(source: object) -> Picture:
    (picture,) = open_images(source)
    assert picture.image.mode == "RGB"
    return picture


def pixel(source: object, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return only(source).image.getpixel((x, y))


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Two labelled folders, an unlabelled image, and the litter of a real folder."""
    root = tmp_path / "zoo"
    for name, colour in {"dog/b.png": GREEN, "dog/deep/c.png": BLUE, "cat/a.png": RED, "z.png": WHITE}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        plain(colour).save(root / name)
    for litter in ("README.md", ".DS_Store", "dog/._b.png", "labels.txt", ".cache/x.png"):
        (root / litter).parent.mkdir(exist_ok=True)
        (root / litter).write_bytes(b"not an image")
    return root


# ---------------------------------------------------------------- odd images


def test_grey_becomes_equal_channels(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "grey.png") == (77, 77, 77)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_by_257_rather_than_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    image = only(tmp_path / f"deep.{suffix}").image
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_tiff_of_either_byte_order(tmp_path, order):
    mode = {"<u2": "I;16", ">u2": "I;16B"}[order]
    data = np.array([[0, 200 * 257]], dtype=order).tobytes()
    Image.frombytes(mode, (2, 1), data).save(tmp_path / "deep.tif")
    assert pixel(tmp_path / "deep.tif", x=1) == (200, 200, 200)


def test_32_bit_mode_is_read_as_16_bit_grey():
    assert pixel(Image.fromarray(np.array([[100 * 257, 65535]], dtype=np.int32))) == (100, 100, 100)


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.2, 1.0], 51), ([0.0, 51.0, 255.0], 51)])
def test_float_tiff_has_white_at_one_or_at_255(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "float.tif")
    assert pixel(tmp_path / "float.tif", x=1) == (expected,) * 3


def test_a_range_nobody_can_know_is_skipped_not_guessed(tmp_path):
    Image.fromarray(np.array([[-3.0, 900.0]], dtype=np.float32)).save(tmp_path / "depth.tif")
    plain().save(tmp_path / "fine.png")
    images = open_images(tmp_path)
    assert [p.name for p in images] == ["fine.png"]
    assert "values from -3 to 900" in images.skipped[0].reason


def test_black_and_white_bitmap(tmp_path):
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    assert pixel(tmp_path / "bit.png") == WHITE


def test_palette_image_shows_its_colours(tmp_path):
    plain(GREEN).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    assert pixel(tmp_path / "palette.gif") == GREEN


def test_cmyk_tiff_is_not_inverted(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.tif")
    assert pixel(tmp_path / "print.tif") == RED


def test_cmyk_jpeg_stored_inverted_as_adobe_does_is_read_right(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    data = (tmp_path / "print.jpg").read_bytes()
    assert b"Adobe" in data
    assert np.allclose(pixel(tmp_path / "print.jpg"), RED, atol=3)


def test_alpha_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]):
        image.putpixel((x, 0), colour)
    image.save(tmp_path / "alpha.png")
    found = only(tmp_path / "alpha.png").image
    assert [found.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (204, 204, 204)]


def test_grey_alpha_and_transparent_palette_are_laid_over_white(tmp_path):
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([*RED, *GREEN])
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixel(tmp_path / "la.png") == pixel(tmp_path / "p.png") == WHITE


@pytest.mark.parametrize(
    ("orientation", "place"),
    [(1, (0, 0)), (2, (3, 0)), (3, (3, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 3)), (8, (0, 3))],
)
def test_exif_orientation_turns_the_image_upright(tmp_path, orientation, place):
    stored = plain(WHITE, (4, 2))
    stored.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    upright = only(tmp_path / "photo.png").image
    assert upright.size == ((4, 2) if orientation < 5 else (2, 4))
    assert upright.getpixel(place) == RED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    plain().save(tmp_path / "photo.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff", quality=95)
    assert np.allclose(pixel(tmp_path / "photo.jpg"), RED, atol=3)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    plain().save(tmp_path / f"film.{suffix}", save_all=True, append_images=[plain(GREEN), plain(BLUE)], **options)
    assert pixel(tmp_path / f"film.{suffix}") == RED


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [13_360, 100_000])
def test_an_enormous_image_is_named_and_skipped_without_being_decoded(tmp_path, side):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    plain().save(tmp_path / "small.png")
    images = open_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert [p.name for p in images] == ["small.png"]
    assert images.skipped[0].name == "huge.png"
    assert "limit of 178" in images.skipped[0].reason


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"hello, I am not an image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    ],
)
def test_a_file_that_is_no_image_is_named_with_the_reason(tmp_path, data, why):
    (tmp_path / "bad.jpg").write_bytes(data)
    plain().save(tmp_path / "good.png")
    images = open_images(tmp_path)
    assert len(list(images)) == 1
    assert [s.name for s in images.skipped] == ["bad.jpg"]
    assert why in images.skipped[0].reason
    assert "0x" not in images.skipped[0].reason  # the same reason in every run


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp"])
def test_a_truncated_file_is_skipped_rather_than_half_shown(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"cut.{suffix}")
    data = (tmp_path / f"cut.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
    plain().save(tmp_path / "whole.png")
    images = open_images(tmp_path)
    assert [p.name for p in images] == ["whole.png"]
    assert [s.name for s in images.skipped] == [f"cut.{suffix}"]


@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_leaves_an_image_that_is_read_or_named(tmp_path_factory, position, value):
    data = bytearray(png(plain(size=(16, 16))))
    data[position % len(data)] = value
    file = tmp_path_factory.getbasetemp() / "changed.png"
    file.write_bytes(bytes(data))
    images = open_images([file, plain()])
    assert len(list(images)) + len(images.skipped) == 2


# ---------------------------------------------------------------- damage and emptiness


def test_strict_stops_at_the_damaged_image_and_names_it(tmp_path):
    (tmp_path / "bad.png").write_bytes(png()[:40])
    with pytest.raises(ImageError, match=r"cannot read image 'bad\.png'"):
        list(open_images(tmp_path, strict=True))


def test_a_set_whose_every_image_fails_is_an_error_at_the_end(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"y")
    with pytest.raises(ImageError, match=r"none of the 2 images of .* could be read; 'a\.png': not an image"):
        list(open_images(tmp_path))


def test_iterating_again_counts_the_damaged_once(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    plain().save(tmp_path / "good.png")
    images = open_images(tmp_path)
    first, second = [p.name for p in images], [p.name for p in images]
    assert first == second == ["good.png"]
    assert len(images.skipped) == 1


def test_an_image_that_vanished_is_skipped(zoo):
    images = open_images(zoo)
    (zoo / "z.png").unlink()
    assert len(list(images)) == 3
    assert images.skipped[0].reason == "no such file or directory"


@pytest.mark.parametrize("litter", [(), ("README.md", "model.pth")])
def test_a_folder_without_images_is_an_error_that_says_what_it_holds(tmp_path, litter):
    for name in litter:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ImageError, match=r"\.md, \.pth" if litter else "it holds nothing"):
        open_images(tmp_path)


# ---------------------------------------------------------------- folders and files


def test_a_folder_is_read_to_the_bottom_in_order_of_path(zoo):
    found = [(p.name, p.label, p.image.getpixel((0, 0))) for p in open_images(zoo)]
    assert found == [
        ("cat/a.png", "cat", RED),
        ("dog/b.png", "dog", GREEN),
        ("dog/deep/c.png", "dog", BLUE),
        ("z.png", "zoo", WHITE),
    ]


def test_litter_in_a_folder_is_ignored_silently(zoo):
    images = open_images(zoo)
    list(images)
    assert images.skipped == []
    assert images.count == len(images) == 4


def test_a_folder_linked_into_itself_is_entered_once(zoo):
    (zoo / "dog" / "again").symlink_to(zoo, target_is_directory=True)
    assert len(open_images(zoo)) == 4


def test_a_linked_folder_has_the_label_of_its_link(zoo):
    (zoo / "wolf").symlink_to(zoo / "dog", target_is_directory=True)
    assert [p.label for p in open_images(zoo)] == ["cat", "dog", "dog", "wolf", "wolf", "zoo"]


def test_a_broken_link_is_skipped_by_name(zoo):
    (zoo / "lost.png").symlink_to(zoo / "nowhere.png")
    images = open_images(zoo)
    assert len(list(images)) == 4
    assert [s.name for s in images.skipped] == ["lost.png"]


def test_the_digest_is_that_of_the_files_bytes(zoo):
    picture = only(zoo / "cat" / "a.png")
    assert picture.digest == hashlib.sha256((zoo / "cat" / "a.png").read_bytes()).hexdigest()


def test_a_single_file_keeps_its_name_and_has_no_label(tmp_path):
    plain().save(tmp_path / "281_tabby.jpg")
    picture = only(str(tmp_path / "281_tabby.jpg"))
    assert (picture.name, picture.label) == ("281_tabby.jpg", None)


def test_files_are_named_below_the_folder_they_share(zoo):
    files = [zoo / "dog" / "b.png", zoo / "cat" / "a.png"]
    assert [p.name for p in open_images(files)] == ["dog/b.png", "cat/a.png"]
    assert [p.name for p in open_images(files[:1])] == ["b.png"]


def test_folders_given_together_keep_apart_in_name(zoo):
    assert [p.name for p in open_images([zoo / "dog", zoo / "cat"])] == ["dog/b.png", "dog/deep/c.png", "cat/a.png"]


def test_names_do_not_depend_on_where_the_folder_is_seen_from(zoo, monkeypatch):
    absolute = [p.name for p in open_images(zoo)]
    monkeypatch.chdir(zoo)
    assert [p.name for p in open_images(".")] == absolute


def test_a_glob_takes_what_it_matches(zoo):
    assert [p.name for p in open_images(f"{zoo}/*/*.png")] == ["cat/a.png", "dog/b.png"]
    assert [p.name for p in open_images(f"{zoo}/**/*.png")] == ["cat/a.png", "dog/b.png", "dog/deep/c.png", "z.png"]


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(tmp_path):
    (tmp_path / "my [1] {a,b}").mkdir()
    plain().save(tmp_path / "my [1] {a,b}" / "x.png")
    assert only(tmp_path / "my [1] {a,b}").name == "x.png"


def test_limit_takes_the_first(zoo):
    assert [p.name for p in open_images(zoo, limit=2)] == ["cat/a.png", "dog/b.png"]
    with pytest.raises(ImageError, match="limit is a number of images from 1, got 0"):
        open_images(zoo, limit=0)


# ---------------------------------------------------------------- wrong sources


def test_a_path_that_does_not_exist_names_the_closest_and_the_forms(zoo):
    with pytest.raises(ImageError, match=r"no images at .*zo/dog' \(.*zo' does not exist\)\. Did you mean 'zoo'"):
        open_images(zoo.parent / "zo" / "dog")
    with pytest.raises(ImageError, match=r"Did you mean 'cat'.* Give a folder, an image file, a list of files"):
        open_images(zoo / "cats")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the path of an image set is empty"),
        ([], "no images were given"),
        ([3], "cannot read images from int"),
        ([None], "cannot read images from NoneType"),
        (np.zeros((3, 8, 8), np.uint8), r"\(H, W, 3\) uint8, got \(3, 8, 8\)"),
        (np.zeros((8, 8, 3)), "uint8, got .* float64"),
        ("nowhere-*.jpg", "matches 'nowhere"),
        ("shard-{3..1}.tar", "range {3..1} .* is empty"),
        ("shard-{0..1}.tar", r"'shard-\{0\.\.1\}\.tar' \('shard-0.tar' does not exist\)"),
        ("shard-{0..99999999}.tar", "shard-00000000.tar|shard-0.tar"),
        ("rendr:text", "Did you mean 'render:text'"),
        ("render:txt", "Did you mean 'text'"),
    ],
)
def test_a_wrong_source_is_named(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=message):
        open_images(source)


# ---------------------------------------------------------------- lists and memory


def test_a_text_list_is_relative_to_itself_and_may_be_commented(zoo):
    (zoo / "list.txt").write_text("# my images\n\ndog/b.png\n  z.png  \n")
    found = [(p.name, p.label) for p in open_images(zoo / "list.txt")]
    assert found == [("dog/b.png", None), ("z.png", None)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "path,label\ndog/b.png,corgi\n# note\ncat/a.png,\n"),
        ("list.csv", '"dog/b.png","corgi"\ncat/a.png\n'),
        ("list.tsv", "\ufeffdog/b.png\tcorgi\ncat/a.png\t\n"),
    ],
)
def test_a_table_gives_labels(zoo, name, text):
    (zoo / name).write_text(text, encoding="utf-8")
    found = [(p.name, p.label) for p in open_images(zoo / name)]
    assert found == [("dog/b.png", "corgi"), ("cat/a.png", None)]


def test_a_listed_file_that_is_missing_is_skipped_by_name(zoo):
    (zoo / "list.txt").write_text("z.png\ngone.png\n")
    images = open_images(zoo / "list.txt")
    assert len(list(images)) == 1
    assert [(s.name, s.reason) for s in images.skipped] == [("gone.png", "no such file or directory")]


@pytest.mark.parametrize(("data", "message"), [(b"# nothing\n\n", "is empty"), (b"\xff\xfe\x00", "cannot read")])
def test_an_empty_or_undecodable_list_is_an_error(tmp_path, data, message):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ImageError, match=message):
        open_images(tmp_path / "list.txt")


def test_images_in_memory_are_named_by_position_and_digested_by_pixels():
    array = np.full((2, 2, 3), 9, np.uint8)
    pictures = list(open_images([plain(), array, Image.fromarray(array).convert("RGBA")]))
    assert [p.name for p in pictures] == ["image-0000", "image-0001", "image-0002"]
    assert pictures[1].digest == pictures[2].digest != pictures[0].digest
    assert pictures[1].image.getpixel((1, 1)) == (9, 9, 9)


def test_the_digest_of_pixels_knows_the_shape():
    wide, tall = (only(plain(size=size)).digest for size in [(4, 2), (2, 4)])
    assert wide != tall


def test_an_image_in_memory_is_not_changed(tmp_path):
    plain().save(tmp_path / "film.gif", save_all=True, append_images=[plain(GREEN)])
    with Image.open(tmp_path / "film.gif") as film:
        film.seek(1)
        assert only(film).name == "film.gif"
        assert film.tell() == 1
        assert film.convert("RGB").getpixel((0, 0)) == GREEN


def test_sources_of_different_kinds_combine_in_order(zoo):
    tar = write_tar(zoo / "x.tar", {"k.png": png()})
    images = open_images([zoo / "cat", "render:circle,n=2,size=16", plain(), tar])
    assert [p.name for p in images] == ["cat/a.png", "circle-0000", "circle-0001", "image-0002", "x.tar/k.png"]
    assert images.count is None
    assert open_images([images, plain()]).count is None
    assert open_images([open_images(zoo), plain()]).count == 5


# ---------------------------------------------------------------- tar shards


def test_a_shard_groups_members_by_key_and_reads_labels(tmp_path):
    members = {
        "a/001.jpg": png(plain(RED)),
        "a/001.cls": b"7\n",
        "a/002.json": json.dumps({"label": "dog", "w": 8}).encode(),
        "a/002.txt": b"a caption",
        "a/002.seg.png": png(plain(BLUE)),
        "a/002.png": png(plain(GREEN)),
        "a/003.npy": b"\0" * 2000,
        "./004.txt": b"cat",
        "./004.PNG": png(plain(WHITE)),
        "._004.png": b"litter",
    }
    found = [
        (p.name, p.label, p.image.getpixel((0, 0))) for p in open_images(write_tar(tmp_path / "shard.tar", members))
    ]
    assert found == [
        ("shard.tar/a/001.jpg", "7", RED),
        ("shard.tar/a/002.png", "dog", GREEN),
        ("shard.tar/004.PNG", "cat", WHITE),
    ]


def test_the_digest_in_a_shard_is_that_of_the_members_bytes(tmp_path):
    data = png()
    assert only(write_tar(tmp_path / "s.tar", {"x.png": data})).digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("pattern", ["s-{00..02}.tar", "s-*.tar", "s-{00,01,02}.tar"])
def test_shards_are_read_in_order_and_again(tmp_path, pattern, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        write_tar(tmp_path / f"s-{i:02d}.tar", {f"{i}{j}.png": png() for j in range(2)})
    images = open_images(pattern)
    names = [p.name for p in images]
    assert [name.split("/")[1] for name in names] == ["00.png", "01.png", "10.png", "11.png", "20.png", "21.png"]
    assert [p.name for p in images] == names
    assert images.count is None
    with pytest.raises(TypeError, match="is a stream"):
        len(images)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_open_too(tmp_path, mode):
    path = write_tar(tmp_path / f"s.tar.{mode[2:]}", {"x.png": png()}, mode)
    assert pixel(path) == RED


def test_a_shard_is_read_as_from_a_pipe(tmp_path):
    data = write_tar(tmp_path / "x.tar", {f"{i}.png": png() for i in range(3)}).read_bytes()
    os.mkfifo(tmp_path / "pipe.tar")
    writer = threading.Thread(target=(tmp_path / "pipe.tar").write_bytes, args=(data,))
    writer.start()
    names = [p.name for p in open_images(tmp_path / "pipe.tar")]
    writer.join()
    assert names == ["pipe.tar/0.png", "pipe.tar/1.png", "pipe.tar/2.png"]


def test_a_stream_holds_one_sample_at_a_time(tmp_path):
    heavy = png() + random.Random(0).randbytes(200_000)  # bytes after the image's end are ignored
    members = {f"{i}.{view}png": heavy for i in range(8) for view in ("", "a.", "b.", "c.", "d.")}
    images = open_images(write_tar(tmp_path / "x.tar", members))
    tracemalloc.start()
    n_images = sum(1 for _ in images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_images == 8
    assert peak < 8 * len(heavy)  # five to a sample; reading one takes its chunks and their sum


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_cut_shard_gives_what_came_before_and_is_named(tmp_path, mode):
    noise = [png(Image.effect_noise((64, 64), 90)) for _ in range(6)]
    path = write_tar(tmp_path / "s.tar", {f"{i}.png": data for i, data in enumerate(noise)}, mode)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(sum(map(len, noise[:4])) + 512 * 4 + 3000)] if mode == "w" else whole[:-9000])
    images = open_images(path)
    names = [p.name for p in images]
    assert names == [f"s.tar/{i}.png" for i in range(len(names))]
    assert 3 <= len(names) < 6
    assert images.skipped[0].name == "s.tar"
    assert "damaged tar file" in images.skipped[0].reason
    with pytest.raises(ImageError, match="damaged tar"):
        list(open_images(path, strict=True))


def test_a_file_that_only_calls_itself_tar_is_an_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"certainly not a tar file" * 100)
    with pytest.raises(ImageError, match=r"x\.tar.*damaged tar file"):
        list(open_images(tmp_path / "x.tar"))


def test_a_shard_without_images_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="no image in"):
        list(open_images(write_tar(tmp_path / "x.tar", {"a.txt": b"x"})))


def test_limit_reads_no_further_than_it_must(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": png() for i in range(50)})
    path.write_bytes(path.read_bytes()[:15_000])
    images = open_images(path, limit=3)
    assert len(list(images)) == 3
    assert images.skipped == []


# ---------------------------------------------------------------- parts


def names_of(images: ImageSet) -> list[str]:
    return [entry.name for entry in images.entries]


@given(count=st.integers(2, 40), data=st.data(), seed=st.integers(0, 2**32))
def test_split_is_a_partition_that_keeps_order(count, data, seed):
    whole = open_images(f"render:colour,n={count},size=16")
    n_first = data.draw(st.integers(1, count - 1))
    first, rest = split(whole, n_first, seed)
    assert len(first) == n_first
    assert sorted(names_of(first) + names_of(rest)) == names_of(whole)
    assert names_of(first) == sorted(names_of(first))
    assert names_of(split(whole, n_first, seed)[0]) == names_of(first)


@given(count=st.integers(2, 40), data=st.data(), seed=st.integers(0, 99))
def test_a_larger_sample_contains_the_smaller(count, data, seed):
    whole = open_images(f"render:colour,n={count},size=16")
    small = data.draw(st.integers(1, count))
    large = data.draw(st.integers(small, count))
    assert set(names_of(sample(whole, small, seed))) <= set(names_of(sample(whole, large, seed)))
    assert len(sample(whole, large, seed)) == large


def test_another_seed_draws_others():
    whole = open_images("render:colour,n=40,size=16")
    assert names_of(sample(whole, 10, 0)) != names_of(sample(whole, 10, 1))


def test_a_stream_is_split_where_it_stands(tmp_path):
    images = open_images(write_tar(tmp_path / "x.tar", {f"{i}.png": png() for i in range(5)}))
    first, rest = split(images, 2, seed=0)
    assert [p.name[-5:] for p in rest] == ["2.png", "3.png", "4.png"]
    assert [p.name[-5:] for p in first] == [p.name[-5:] for p in sample(images, 2, seed=9)] == ["0.png", "1.png"]
    with pytest.raises(ImageError, match=r"no image in .*all but the first 7"):
        list(split(images, 7, seed=0)[1])


@pytest.mark.parametrize("n_first", [0, 4, 9])
def test_a_split_with_an_empty_part_is_refused(zoo, n_first):
    with pytest.raises(ImageError, match="it has 4, and both parts need at least one"):
        split(open_images(zoo), n_first, seed=0)


def test_a_sample_larger_than_the_set_is_refused(zoo):
    with pytest.raises(ImageError, match=r"cannot take 5 images .* it has 4"):
        sample(open_images(zoo), 5, seed=0)
    with pytest.raises(ImageError, match="a seed is a whole number from 0, got -1"):
        sample(open_images(zoo), 2, seed=-1)


def test_parts_stay_strict(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    for part in split(open_images(tmp_path, strict=True), 1, seed=0):
        with pytest.raises(ImageError, match="cannot read image"):
            list(part)


@given(st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), min_size=2, max_size=5, unique=True))
def test_the_digest_of_a_set_depends_on_order_and_on_every_member(digests):
    assert digest_of(digests) == digest_of(iter(digests))
    assert digest_of(digests) != digest_of(digests[::-1])
    assert digest_of(digests) != digest_of(digests[:-1])


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_batches_hold_every_image_once_in_order(zoo, batch_size):
    found = list(batches(open_images(zoo), to_tensor, batch_size))
    whole = torch.stack([to_tensor(p.image) for p in open_images(zoo)])
    assert torch.equal(torch.cat([b.images for b in found]), whole)
    assert [n for b in found for n in b.names] == [p.name for p in open_images(zoo)]
    assert [label for b in found for label in b.labels] == ["cat", "dog", "dog", "zoo"]
    assert [d for b in found for d in b.digests] == [p.digest for p in open_images(zoo)]
    assert all(len(b) == batch_size for b in found[:-1])


def test_batches_of_tensors_are_the_tensors():
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for given_as in (images, list(images), [images[:2], images[2:]], (image for image in images)):
        found = list(batches(given_as, None, 2))
        assert [len(b) for b in found] == [2, 2, 1]
        assert torch.equal(torch.cat([b.images for b in found]), images)
        assert found[2].names == ("image-0004",)
    assert len({d for b in found for d in b.digests}) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_batches_come_in_the_dtype_asked_for(dtype):
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (batch,) = batches(images.to(dtype), None, 2, dtype=dtype)
    assert batch.images.dtype == dtype
    assert len(set(batch.digests)) == 2


def test_no_image_is_held_longer_than_its_batch():
    pictures, tensors = [], []

    def transform(image: Image.Image) -> Tensor:
        pictures.append(weakref.ref(image))
        tensors.append(weakref.ref(tensor := to_tensor(image)))
        return tensor

    for i, batch in enumerate(batches(open_images("render:colour,n=9,size=16"), transform, 3)):
        gc.collect()
        alive = [sum(ref() is not None for ref in refs[: 3 * i + 2]) for refs in (pictures, tensors)]
        assert alive == [0, 0]
        assert len(pictures) == 3 * i + 3 == 3 * i + len(batch)


def test_no_picture_is_held_while_the_next_is_made():
    made = []

    def pictures() -> Iterator[Picture]:
        for i in range(6):
            assert not any(ref() for ref in made)
            picture = Picture(f"{i}", plain(), None, "")
            made.append(weakref.ref(picture.image))
            yield picture
            del picture

    assert [len(batch) for batch in batches(pictures(), to_tensor, 4)] == [4, 2]


def test_batches_name_the_image_that_differs_in_size():
    with pytest.raises(ImageError, match=r"\(3, 8, 8\) from 'image-0000', \(3, 4, 8\) from 'image-0001'.*one size"):
        list(batches(open_images([plain(), plain(size=(8, 4))]), to_tensor, 2))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (None, "need the model's transform"),
        (lambda image: image, "makes Image of 'image-0000'"),
        (lambda image: to_tensor(image)[0], r"makes \(8, 8\) torch.float32"),
        (lambda image: 1 / 0, "failed on 'image-0000': ZeroDivisionError"),
    ],
)
def test_a_transform_that_does_not_make_tensors_is_named(transform, message):
    with pytest.raises(ImageError, match=message):
        list(batches(open_images([plain()]), transform, 1))


@pytest.mark.parametrize(
    ("images", "batch_size", "message"),
    [
        (torch.zeros(3, 4, 4), 1, r"is \(N, C, H, W\), got \(3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 1, "uint8"),
        (torch.zeros(0, 3, 4, 4), 1, "no image was given"),
        ([torch.zeros(4)], 1, r"cannot make a batch of \(4,\)"),
        (torch.zeros(1, 3, 4, 4), 0, "batch_size is a number of images from 1, got 0"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(images, batch_size, message):
    with pytest.raises(ImageError, match=message):
        list(batches(images, None, batch_size))


# ---------------------------------------------------------------- real photographs


def test_every_photograph_of_the_sample_is_read(shared_data):
    images = open_images(shared_data / "imagenet-sample", limit=40)
    assert [p.name for p in images][:2] == ["000_tench.jpg", "001_goldfish.jpg"]
    assert images.skipped == []


# ---------------------------------------------------------------- portions


def places(images, size: int, cuts=(), **options) -> list[list[int]]:
    """Places of the images of each portion."""
    return [
        [place for batch in portion.batches(tensor_of, 2) for place in batch.places]
        for portion in portions(images, size, cuts, **options)
    ]


def tensor_of(image: Image.Image) -> torch.Tensor:
    return torch.full((3, 2, 2), float(image.getpixel((0, 0))[0]))


def test_portions_are_runs_that_end_at_every_cut():
    tensor = torch.rand(9, 3, 2, 2)
    for images in (tensor, list(tensor), [tensor[:4], tensor[4:]]):
        assert places(images, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        assert places(images, 4, [3, 5]) == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    assert places(tensor[:0], 4) == []
    assert [p.number for p in portions(tensor, 4)] == [0, 1, 2]


def test_each_of_several_shards_is_a_portion_with_places_of_its_own(tmp_path):
    for i, n in enumerate((2, 3)):
        write_tar(tmp_path / f"s{i}.tar", {f"{j}.png": png() for j in range(n)})
    images = open_images(str(tmp_path / "s*.tar"))
    first = SHARD_PLACES
    assert places(images, 2) == [[0, 1], [first, first + 1, first + 2]]
    assert places(images, 2, by_shard=False) == [[0, 1], [2, 3], [4]]
    part = sample(images, 3, 0)  # nobody knows how many of them are in which shard
    assert places(part, 2) == [[0, 1], [2]]
    opened = list(portions(images, 2))
    (tmp_path / "s0.tar").unlink()
    assert len(list(opened[1].batches(tensor_of, 8))) == 1  # another's shard is never looked at
    with pytest.raises(ImageError, match=r"s0\.tar' has vanished since it was opened"):
        list(opened[0].batches(tensor_of, 8))


def test_a_portion_may_hold_nothing_that_can_be_read(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png() if i >= 2 else b"no")
    one, two = portions(open_images(tmp_path), 2)
    assert list(one.batches(tensor_of, 2)) == [] and [each.name for each in one.skipped] == ["0.png", "1.png"]
    assert [batch.names for batch in two.batches(tensor_of, 2)] == [("2.png", "3.png")]


def test_a_fingerprint_tells_sets_apart_without_reading_them(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        (tmp_path / "pictures" / f"{name}.png").write_bytes(b"never read")
    folder = fingerprint(open_images(tmp_path / "pictures"))
    assert fingerprint(open_images(tmp_path / "pictures")) == folder
    (tmp_path / "pictures" / "b.png").rename(tmp_path / "pictures" / "c.png")
    assert fingerprint(open_images(tmp_path / "pictures")) != folder
    shard = write_tar(tmp_path / "s.tar", {"a.png": png()})
    before = fingerprint(open_images(shard))
    assert fingerprint(open_images(shard, limit=1)) != before
    write_tar(shard, {f"{i}.png": png() for i in range(30)})
    assert fingerprint(open_images(shard)) != before
    tensor = torch.rand(2, 3, 2, 2)
    assert fingerprint(tensor) == fingerprint(tensor.clone()) != fingerprint(tensor + 1)
