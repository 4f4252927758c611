"""Rendered concepts: the seed decides the bytes, the parameters decide what is seen."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from viscircuits import concepts as room
from viscircuits.concepts import CONCEPTS, LIMITS, MEANINGS, concepts, parse
from viscircuits.errors import ImageError
from viscircuits.images import open_images

CLEAN = "n=1,size=64,grain=0"


def pixels(address: str, index: int = 0) -> np.ndarray:
    return np.asarray(parse(address).draw(index)).astype(float)


def ink(address: str) -> np.ndarray:
    """Where a black figure covers at least half a pixel of a plain white ground."""
    plain = "" if "grating" in address else ",colour=black,ground=white,background=plain"
    return pixels(f"{address},{CLEAN}{plain}").mean(axis=-1) < 128


def middle_of(mask: np.ndarray) -> tuple[float, float]:
    """Mean column and row of the mask, as shares of the image."""
    rows, columns = np.nonzero(mask)
    return float(columns.mean() + 0.5) / mask.shape[1], float(rows.mean() + 0.5) / mask.shape[0]


# ---------------------------------------------------------------- every concept


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_same_address_gives_the_same_bytes_in_any_order(concept):
    address = f"render:{concept},n=4,size=32"
    forwards = [p.digest for p in open_images(address)]
    rendering = parse(address)
    backwards = [rendering.draw(i).tobytes() for i in (3, 2, 1, 0)]
    assert [p.digest for p in open_images(address)] == forwards
    assert [p.image.tobytes() for p in open_images(address)] == backwards[::-1]


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_longer_set_begins_with_the_shorter(concept):
    short, long = (list(open_images(f"render:{concept},n={n},size=32")) for n in (2, 4))
    assert [p.digest for p in short] == [p.digest for p in long[:2]]


@pytest.mark.parametrize("concept", CONCEPTS)
def test_images_of_a_set_are_distinct_and_of_the_size_asked_for(concept):
    pictures = list(open_images(f"render:{concept},n=24,size=40"))
    assert len({p.digest for p in pictures}) == 24
    assert {(p.image.size, p.image.mode, p.label) for p in pictures} == {((40, 40), "RGB", None)}
    assert pictures[3].name == f"{concept}-0003"


def test_images_stay_distinct_when_every_parameter_is_fixed():
    fixed = "render:grating,n=8,size=32,frequency=4,orientation=30,phase=0,contrast=1"
    assert len({p.digest for p in open_images(fixed)}) == 8


@pytest.mark.parametrize("concept", CONCEPTS)
def test_another_seed_draws_other_images(concept):
    first, other = (parse(f"render:{concept},size=32,seed={seed}").draw(0) for seed in (0, 1))
    assert first.tobytes() != other.tobytes()


@given(seed=st.integers(0, 10**9), index=st.integers(0, 10**6), concept=st.sampled_from(list(CONCEPTS)))
def test_every_seed_and_index_can_be_drawn(seed, index, concept):
    image = parse(f"render:{concept},size=16,seed={seed}").draw(index)
    assert image.size == (16, 16)


def test_renderings_that_differ_in_one_parameter_are_matched_image_by_image():
    cat, dog = (ink(f"render:text,words={word},rotation=0,height=0.3,x=0.5") for word in ("cat", "dog"))
    assert not np.array_equal(cat, dog)
    assert abs(middle_of(cat)[1] - middle_of(dog)[1]) < 0.08
    red, blue = (
        pixels(f"render:circle,size=64,colour={name},ground=white,background=plain") for name in ("red", "blue")
    )
    assert np.array_equal(red[..., 1] < 128, blue[..., 1] < 128)


# ---------------------------------------------------------------- what is seen


def test_text_has_the_colour_place_and_size_asked_for():
    address = "render:text,words=HH,rotation=0,background=plain,colour=red,ground=white"
    low, high = (pixels(f"{address},{CLEAN},height={height},x=0,y=0") for height in (0.2, 0.6))
    reds = [int((image[..., 1] < 128).sum()) for image in (low, high)]
    assert 5 < reds[1] / reds[0] < 14  # three times the height, nine times the ink
    assert np.allclose(high[high[..., 1] < 20], (255, 0, 0), atol=20)
    assert all(middle_of(low[..., 1] < 128)[axis] < 0.25 for axis in (0, 1))
    far = pixels(f"{address},{CLEAN},height=0.2,x=1,y=1")
    assert all(middle_of(far[..., 1] < 128)[axis] > 0.75 for axis in (0, 1))


def test_a_word_too_long_is_shrunk_to_fit_whole():
    mask = ink("render:text,words=incomprehensibility,height=0.5,rotation=0")
    assert mask.any()
    columns = np.nonzero(mask.any(axis=0))[0]
    assert columns[-1] - columns[0] > 40  # of 64
    word = parse("render:text,words=incomprehensibilities%20all%20the%20way,size=64,height=1,rotation=45")
    assert word.draw(0).size == (64, 64)


def test_words_may_hold_spaces_commas_and_plus_signs():
    assert parse("render:text,words=hot%20dog+a%2Cb+1%2B1").parameters["words"] == ("hot dog", "a,b", "1+1")


def test_each_image_writes_one_of_the_words():
    masks = {
        parse(
            "render:text,words=I+WWW,x=0.5,y=0.5,height=0.2,rotation=0,colour=black,ground=white,background=plain,"
            "size=64,grain=0"
        )
        .draw(i)
        .tobytes()
        for i in range(12)
    }
    assert len(masks) == 2


def test_a_font_file_is_used(tmp_path):
    pytest.importorskip("matplotlib", reason="the DejaVu fonts come with matplotlib")
    by_name, built_in = (
        ink(f"render:text,words=Rag,height=0.4,rotation=0,font={f}") for f in ("dejavu-serif", "default")
    )
    path = room._dejavu("dejavu-serif")
    assert np.array_equal(ink(f"render:text,words=Rag,height=0.4,rotation=0,font={path}"), by_name)
    assert not np.array_equal(by_name, built_in)


@pytest.mark.parametrize("frequency", [2, 5, 9])
@pytest.mark.parametrize(("orientation", "direction"), [(0, (1, 0)), (90, (0, 1))])
def test_a_grating_has_its_frequency_across_its_bars(frequency, orientation, direction):
    image = pixels(f"render:grating,{CLEAN},frequency={frequency},orientation={orientation}").mean(axis=-1)
    spectrum = np.abs(np.fft.fft2(image - image.mean()))[:33, :33]
    peak = np.unravel_index(spectrum.argmax(), spectrum.shape)  # (cycles down, cycles across)
    assert tuple(peak) == (frequency * direction[0], frequency * direction[1])


def test_bars_turn_counter_clockwise():
    image = pixels(f"render:grating,{CLEAN},frequency=4,orientation=45").mean(axis=-1)
    rising = np.corrcoef(image[:-4, 4:].ravel(), image[4:, :-4].ravel())[0, 1]  # along /
    falling = np.corrcoef(image[:-4, :-4].ravel(), image[4:, 4:].ravel())[0, 1]  # along \
    assert rising > 0.99 > falling


def test_contrast_is_michelsons():
    image = pixels(f"render:grating,{CLEAN},contrast=0.5,frequency=2,wave=square")
    bright, dark = image.max(), image.min()
    assert (bright - dark) / (bright + dark) == pytest.approx(0.5, abs=0.01)


def test_phase_shifts_the_bars_and_half_a_turn_inverts_them():
    upright, shifted = (pixels(f"render:grating,{CLEAN},contrast=1,frequency=3,phase={p}") for p in (0, 180))
    assert np.allclose(upright + shifted, 255, atol=1)


@pytest.mark.parametrize(("fill", "area"), [("disc", np.pi * 0.3**2), ("ring", np.pi * (0.3**2 - 0.2**2))])
def test_a_circle_covers_its_area(fill, area):
    mask = ink(f"render:circle,radius=0.3,fill={fill},thickness=0.1")
    assert mask.mean() == pytest.approx(area, rel=0.03)


@given(x=st.floats(0, 1), y=st.floats(0, 1), radius=st.floats(0.05, 0.49))
def test_a_circle_stands_where_it_is_put_and_never_leaves_the_image(x, y, radius):
    mask = ink(f"render:circle,radius={radius},fill=disc,x={x},y={y}")
    expected = [radius + share * (1 - 2 * radius) for share in (x, y)]
    assert middle_of(mask) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("orientation", "axis", "sign"), [(0, 0, 1), (90, 1, -1), (180, 0, -1), (270, 1, 1)])
def test_a_curve_bulges_the_way_it_points(orientation, axis, sign):
    mask = ink(f"render:curve,orientation={orientation},radius=0.3,extent=120,thickness=0.04,x=0.5,y=0.5")
    # the box stands in the middle of the image, and most of an arc lies on the side it bulges to
    assert sign * (middle_of(mask)[axis] - 0.5) > 0.01
    assert middle_of(mask)[1 - axis] == pytest.approx(0.5, abs=0.01)


def test_a_curve_covers_its_length_times_its_width():
    mask = ink("render:curve,radius=0.4,extent=100,thickness=0.06")
    assert mask.mean() == pytest.approx(0.4 * np.radians(100) * 0.06 + np.pi * 0.03**2, rel=0.05)


@given(orientation=st.floats(0, 360), extent=st.floats(10, 200), radius=st.floats(0.1, 0.4), x=st.floats(0, 1))
def test_a_curve_is_never_cut_by_the_edge(orientation, extent, radius, x):
    shape = f"orientation={orientation},extent={extent},radius={radius},x={x},y={1 - x},thickness=0.06"
    expected = radius * np.radians(extent) * 0.06 + np.pi * 0.03**2
    black_on_white = pixels(f"render:curve,{shape},{CLEAN},colour=black,ground=white,background=plain")
    assert 1 - black_on_white.mean() / 255 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("name", "hue"), [("red", 0), ("lime", 120), ("0000ff", 240), ("hue60", 60)])
@pytest.mark.parametrize("texture", ["plain", "gradient", "clouds", "patches"])
def test_a_colour_keeps_its_hue_whatever_the_texture(name, hue, texture):
    for index in range(3):
        image = parse(f"render:colour,size=32,grain=0,spread=0,colour={name},texture={texture}").draw(index)
        hues = np.asarray(image.convert("HSV"))[..., 0].astype(float) * 360 / 255
        assert np.all(np.abs((hues - hue + 180) % 360 - 180) < 4)


def test_a_texture_varies_within_the_image_but_plain_does_not():
    spreads = {
        t: pixels(f"render:colour,{CLEAN},colour=red,texture={t}").std(axis=(0, 1)).max()
        for t in ("plain", "gradient", "clouds", "patches")
    }
    assert spreads.pop("plain") == 0
    assert min(spreads.values()) > 5


def test_grey_stays_grey():
    image = pixels(f"render:colour,{CLEAN},colour=white,texture=clouds")
    assert np.all(image.max(axis=-1) == image.min(axis=-1))


@given(seed=st.integers(0, 10**6))
def test_free_colours_set_the_figure_off_from_its_ground(seed):
    rng = np.random.default_rng(seed)
    figure, ground = room._two_colours(rng, ("any",), ("any",))
    assert abs(room._luminance(figure) - room._luminance(ground)) >= room.LEAST_CONTRAST


@given(code=st.tuples(*[st.integers(0, 255)] * 3))
def test_hsv_and_back_is_the_same_colour(code):
    colour = np.array(code) / 255
    hue, saturation, value = room._to_hsv(colour)
    assert np.allclose(room._from_hsv(hue, np.array(saturation), np.array(value)), colour)


# ---------------------------------------------------------------- addresses


def test_a_value_is_a_range_or_choices():
    found = parse("render:circle,n=3,seed=7,size=32,radius=0.1..0.2,thickness=0.05,colour=red+00ff00+hue300")
    assert (found.n, found.seed, found.size) == (3, 7, 32)
    assert found.parameters["radius"] == (0.1, 0.2)
    assert found.parameters["thickness"] == (0.05, 0.05)
    assert found.parameters["colour"] == ("red", "00ff00", "hue300")


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_defaults_listed_are_the_defaults(concept):
    listed = ",".join(f"{name}={value}" for name, value in concepts()[concept].items())
    assert parse(f"render:{concept},{listed}") == parse(f"render:{concept}")


def test_every_parameter_has_a_meaning_and_every_meaning_a_parameter():
    used = {name for parameters in concepts().values() for name in parameters}
    assert used == set(MEANINGS)
    assert set(LIMITS) <= used


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("render:txt", "no rendered concept 'txt' .* Did you mean 'text'.* There are text, grating"),
        ("render:", "no rendered concept ''"),
        ("render:text,sizes=3", "has no parameter 'sizes'. Did you mean 'size'.* It has n, seed, size, words"),
        ("render:circle,color=red", "Did you mean 'colour'"),
        ("render:text,n", "'n' .* is not of the form parameter=value"),
        ("render:text,words=", "not of the form parameter=value"),
        ("render:text,n=2,n=3", "gives 'n' twice"),
        ("render:text,n=0", "'n' is a whole number from 1, got '0'"),
        ("render:text,n=2.5", "'n' is a whole number"),
        ("render:text,seed=-1", "'seed' is a whole number from 0"),
        ("render:text,size=8", "'size' is a whole number from 16"),
        ("render:text,words=cat++dog", "several joined by"),
        ("render:text,font=comic", "no font 'comic'"),
        ("render:text,font=dejavu-san", "Did you mean 'dejavu-sans'"),
        ("render:circle,colour=redd", "no colour 'redd'. Did you mean 'red'"),
        ("render:circle,ground=hue1234", "no colour 'hue1234'"),
        ("render:circle,fill=square", "'fill' is one of disc, ring, got 'square'"),
        ("render:circle,radius=big", "'radius' is a number or a range such as"),
        ("render:circle,radius=0.4..0.2", "range low..high within 0.01..1, got '0.4..0.2'"),
        ("render:circle,radius=-1", "within 0.01..1"),
        ("render:grating,orientation=nan", "'orientation' is a number or a range"),
        ("render:grating,contrast=2", "'contrast' is a number or a range low..high within 0..1"),
    ],
)
def test_a_wrong_address_says_what_is_wrong_before_anything_is_drawn(address, message):
    with pytest.raises(ImageError, match=message):
        open_images(address)


def test_a_font_of_matplotlib_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    room._font.cache_clear()
    with pytest.raises(ImageError, match="pip install matplotlib"):
        parse("render:text,font=dejavu-mono")


def test_a_concept_put_into_the_registry_has_an_address(monkeypatch):
    def stripes(rng: np.random.Generator, size: int, *, width: tuple[float, float] = (2.0, 4.0)) -> Image.Image:
        return Image.new("RGB", (size, size), (round(10 * width[0]), round(10 * width[1]), 0))

    monkeypatch.setitem(CONCEPTS, "stripes", stripes)
    assert concepts()["stripes"] == {"width": "2..4"}
    (picture,) = open_images("render:stripes,n=1,size=16,width=3")
    assert picture.image.getpixel((0, 0)) == (30, 30, 0)


def test_the_table_in_the_docs_lists_every_parameter_and_default(root: Path):
    text = (root / "docs" / "images.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+?) \|$", text, flags=re.MULTILINE)
    by_concept = re.split(r"^### `render:(\w+)`", text, flags=re.MULTILINE)[1:]
    tables = dict(zip(by_concept[::2], by_concept[1::2], strict=True))
    for concept, parameters in concepts().items():
        found = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", tables[concept], flags=re.MULTILINE))
        assert found == parameters
    assert all(meaning == MEANINGS[name] for name, _, meaning in rows)
