"""Rendered concepts: images that need no data, drawn from a seed.

1. A concept is a plain function ``(rng, size, *, parameters) -> image`` in `CONCEPTS`.
2. A parameter is a range or a set of choices, its default standing in the signature. Each image
   draws its own value; a single value is a range, or a set, of one.
3. An address such as ``render:text,n=32,seed=0,words=cat+dog,colour=red`` is parsed into a
   `Rendering`, and everything wrong with it is said before anything is drawn.
4. Image i depends on the concept, its parameters, the size, the seed and i, on nothing else. The random
   draws come from the concept's name, the seed and i alone, so two renderings that differ in one
   parameter are matched image by image.

It does not read files: `viscircuits.images.open_images` opens these addresses beside folders.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageColor, ImageDraw, ImageFont

from viscircuits.errors import ImageError, closest

PREFIX = "render:"
Range: TypeAlias = tuple[float, float]
Choices: TypeAlias = tuple[str, ...]
Parameters: TypeAlias = Mapping[str, Range | Choices]
Plane: TypeAlias = Float[np.ndarray, "height width"]
Canvas: TypeAlias = Float[np.ndarray, "height width 3"]

ANY: Choices = ("any",)
BACKGROUNDS: Choices = ("plain", "noise", "gradient")
WORDS: Choices = (
    *("cat", "dog", "bird", "fish", "horse", "car", "boat", "train", "plane", "tree"),
    *("house", "apple", "bread", "chair", "table", "clock", "phone", "shirt", "river", "stone"),
)
LEAST_CONTRAST = 0.35  # of luminance, between a figure and its ground when either is free


# ---------------------------------------------------------------- concepts


def text(
    rng: np.random.Generator,
    size: int,
    *,
    words: Choices = WORDS,
    font: Choices = ("default",),
    height: Range = (0.12, 0.3),
    x: Range = (0.0, 1.0),
    y: Range = (0.0, 1.0),
    rotation: Range = (-10.0, 10.0),
    colour: Choices = ANY,
    ground: Choices = ANY,
    background: Choices = BACKGROUNDS,
    grain: Range = (3.0, 3.0),
) -> Image.Image:
    """Draw a word somewhere on a plain, noisy or graded ground; shrunk where it would not fit."""
    ink, paper = _two_colours(rng, colour, ground)
    word, face = _choose(rng, words), _choose(rng, font)
    stencil = _lettering(word, face, size, _draw(rng, height), _draw(rng, rotation))
    left = round(_draw(rng, x) * (size - stencil.width))
    top = round(_draw(rng, y) * (size - stencil.height))
    mask = Image.new("L", (size, size))
    mask.paste(stencil, (left, top))
    canvas = _background(rng, size, _choose(rng, background), paper)
    return _finish(rng, _paint(canvas, np.asarray(mask, dtype=np.float64) / 255, ink), grain)


def grating(
    rng: np.random.Generator,
    size: int,
    *,
    frequency: Range = (4.0, 24.0),
    orientation: Range = (0.0, 180.0),
    phase: Range = (0.0, 360.0),
    contrast: Range = (0.5, 1.0),
    wave: Choices = ("sine",),
    colour: Choices = ("white",),
    ground: Choices = ("black",),
    grain: Range = (3.0, 3.0),
) -> Image.Image:
    """Fill the image with parallel bars that swing between two colours about their middle."""
    cycles, angle = _draw(rng, frequency), math.radians(_draw(rng, orientation))
    across, up = _grid(size)
    turns = cycles * (up * math.cos(angle) - across * math.sin(angle)) + _draw(rng, phase) / 360
    swing = np.sin(2 * np.pi * turns)
    swing = np.sign(swing) if _choose(rng, wave) == "square" else swing
    share = 0.5 + 0.5 * _draw(rng, contrast) * swing  # (height, width) of the bright colour
    bright, dark = _pick_colour(rng, colour), _pick_colour(rng, ground)
    return _finish(rng, _paint(np.broadcast_to(dark, (size, size, 3)), share, bright), grain)


def curve(
    rng: np.random.Generator,
    size: int,
    *,
    radius: Range = (0.15, 0.45),
    orientation: Range = (0.0, 360.0),
    extent: Range = (80.0, 150.0),
    thickness: Range = (0.02, 0.08),
    x: Range = (0.0, 1.0),
    y: Range = (0.0, 1.0),
    colour: Choices = ANY,
    ground: Choices = ANY,
    background: Choices = BACKGROUNDS,
    grain: Range = (3.0, 3.0),
) -> Image.Image:
    """Draw one arc with round ends, bulging the way `orientation` points."""
    ink, paper = _two_colours(rng, colour, ground)
    bend, middle = _draw(rng, radius), math.radians(_draw(rng, orientation))
    half, width = math.radians(_draw(rng, extent)) / 2, _draw(rng, thickness)
    angles = middle + np.linspace(-half, half, 181)
    centre_x = _place(_draw(rng, x), bend * np.cos(angles), width / 2)
    centre_y = _place(1 - _draw(rng, y), bend * np.sin(angles), width / 2)
    across, up = _grid(size)
    distance = _distance_to_arc(across - centre_x, up - centre_y, bend, middle, half)
    canvas = _background(rng, size, _choose(rng, background), paper)
    return _finish(rng, _paint(canvas, _inside(distance - width / 2, size), ink), grain)


def circle(
    rng: np.random.Generator,
    size: int,
    *,
    radius: Range = (0.1, 0.4),
    fill: Choices = ("disc", "ring"),
    thickness: Range = (0.02, 0.08),
    x: Range = (0.0, 1.0),
    y: Range = (0.0, 1.0),
    colour: Choices = ANY,
    ground: Choices = ANY,
    background: Choices = BACKGROUNDS,
    grain: Range = (3.0, 3.0),
) -> Image.Image:
    """Draw a filled disc, or a ring whose outer edge has the given radius."""
    ink, paper = _two_colours(rng, colour, ground)
    outer, width = _draw(rng, radius), _draw(rng, thickness)
    centre_x = _place(_draw(rng, x), np.array([-outer, outer]), 0.0)
    centre_y = _place(1 - _draw(rng, y), np.array([-outer, outer]), 0.0)
    across, up = _grid(size)
    distance = np.hypot(across - centre_x, up - centre_y)
    beyond = distance - outer
    if _choose(rng, fill) == "ring":
        beyond = np.maximum(beyond, outer - width - distance)
    canvas = _background(rng, size, _choose(rng, background), paper)
    return _finish(rng, _paint(canvas, _inside(beyond, size), ink), grain)


def colour(
    rng: np.random.Generator,
    size: int,
    *,
    colour: Choices = ANY,
    spread: Range = (8.0, 8.0),
    texture: Choices = ("plain", "gradient", "clouds", "patches"),
    grain: Range = (3.0, 3.0),
) -> Image.Image:
    """Fill the image with one colour, textured in lightness so that the colour is all images share."""
    hue, saturation, value = _to_hsv(_pick_colour(rng, colour))
    field = _texture(rng, size, _choose(rng, texture))  # (height, width), 0 to 1
    hues = hue + rng.uniform(-1, 1) * _draw(rng, spread) / 360
    softness, shade = rng.uniform(0.0, 0.25), rng.uniform(0.25, 0.5)
    canvas = _from_hsv(hues, saturation * (1 - softness * field), value * (1 - shade * (1 - field)))
    return _finish(rng, canvas, grain)


Draw: TypeAlias = Callable[..., Image.Image]
CONCEPTS: dict[str, Draw] = {"text": text, "grating": grating, "curve": curve, "circle": circle, "colour": colour}
"""The registry. A function put here gets an address; its keyword-only parameters default to a `Range` or `Choices`."""

MEANINGS: dict[str, str] = {
    "words": "words to write; %20 for a space, %2B for +",
    "font": "default, dejavu-sans, dejavu-sans-bold, dejavu-serif, dejavu-mono, or a .ttf/.otf file",
    "height": "letter size, as a share of the image",
    "x": "place from left (0) to right (1), always inside the image",
    "y": "place from top (0) to bottom (1), always inside the image",
    "rotation": "degrees, counter-clockwise",
    "colour": "any, a CSS name, rrggbb, or a hue such as hue120",
    "ground": "colour behind the figure: any, a CSS name, rrggbb, or a hue such as hue120",
    "background": "plain, noise or gradient, in the ground colour",
    "grain": "standard deviation of pixel noise, of 255; keeps images of a set distinct",
    "frequency": "cycles per image width",
    "orientation": "degrees, counter-clockwise: of the bars (0 lying, 90 upright); of a curve's bulge (0 right, 90 up)",
    "phase": "degrees at the image's centre",
    "contrast": "swing between the two colours, 0 to 1",
    "wave": "sine or square",
    "radius": "as a share of the image",
    "extent": "degrees of arc",
    "thickness": "of the line, as a share of the image",
    "fill": "disc or ring",
    "spread": "how far the hue may stray, in degrees",
    "texture": "plain, gradient, clouds or patches",
}
SHARE: Range = (0.0, 1.0)
LIMITS: dict[str, Range] = {
    "height": (0.02, 1.0),
    "x": SHARE,
    "y": SHARE,
    "contrast": SHARE,
    "radius": (0.01, 1.0),
    "thickness": (0.001, 1.0),
    "extent": (1.0, 360.0),
    "frequency": (0.0, 10_000.0),
    "spread": (0.0, 180.0),
    "grain": (0.0, 255.0),
}
KINDS: dict[str, Choices] = {
    "background": BACKGROUNDS,
    "fill": ("disc", "ring"),
    "wave": ("sine", "square"),
    "texture": ("plain", "gradient", "clouds", "patches"),
}
DEJAVU = {
    "dejavu-sans": "DejaVuSans.ttf",
    "dejavu-sans-bold": "DejaVuSans-Bold.ttf",
    "dejavu-serif": "DejaVuSerif.ttf",
    "dejavu-mono": "DejaVuSansMono.ttf",
}


# ---------------------------------------------------------------- addresses


@dataclass(frozen=True)
class Rendering:
    """A rendered concept, fully specified: `n` images that can be drawn one by one in any order."""

    concept: str
    n: int
    seed: int
    size: int
    parameters: Parameters

    def draw(self, index: int) -> Image.Image:
        """Return image `index` (from 0): the same bytes each time, whatever was drawn before."""
        rng = np.random.default_rng([self.seed, index, zlib.crc32(self.concept.encode())])
        return CONCEPTS[self.concept](rng, self.size, **self.parameters)


def parse(address: str) -> Rendering:
    """Read ``render:CONCEPT[,n=32][,seed=0][,size=224][,PARAMETER=VALUE…]``.

    A value is a number, a range ``low..high``, a word, or several joined by ``+``; each image draws
    its own. Special characters may be written as in a web address (``%20``).

    Raises
    ------
    ImageError
        If the concept or a parameter is unknown (names the closest and lists all), or a value is
        not one the parameter takes.
    """
    concept, *settings = address.removeprefix(PREFIX).split(",")
    if concept not in CONCEPTS:
        raise ImageError(
            f"no rendered concept {concept!r} in {address!r}.{closest(concept, CONCEPTS)} "
            f"There are {', '.join(CONCEPTS)}."
        )
    given = _settings(settings, address)
    n = _whole(given.pop("n", "32"), "n", 1)
    seed = _whole(given.pop("seed", "0"), "seed", 0)
    size = _whole(given.pop("size", "224"), "size", 16)
    return Rendering(concept, n, seed, size, _parameters(concept, given))


def concepts() -> dict[str, dict[str, str]]:
    """Concept → parameter → default, each written as in an address."""
    return {name: {parameter: _written(default) for parameter, default in _defaults(name).items()} for name in CONCEPTS}


def _settings(settings: list[str], address: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not value:
            raise ImageError(f"{setting!r} in {address!r} is not of the form parameter=value")
        if name in given:
            raise ImageError(f"{address!r} gives {name!r} twice; join several values with +")
        given[name] = value
    return given


def _defaults(concept: str) -> dict[str, Range | Choices]:
    parameters = inspect.signature(CONCEPTS[concept]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _parameters(concept: str, given: Mapping[str, str]) -> dict[str, Range | Choices]:
    values = _defaults(concept)
    known = ["n", "seed", "size", *values]
    for name, value in given.items():
        if name not in values:
            raise ImageError(
                f"{PREFIX}{concept} has no parameter {name!r}.{closest(name, known)} It has {', '.join(known)}."
            )
        is_range = isinstance(values[name][0], float)
        values[name] = _range(name, value) if is_range else _choices(name, value)
    return values


def _range(name: str, value: str) -> Range:
    low, dots, high = value.partition("..")
    try:
        found = float(low), float(high if dots else low)
    except ValueError:
        raise ImageError(f"{name!r} is a number or a range such as 0.2..0.4, got {value!r}") from None
    least, most = LIMITS.get(name, (-math.inf, math.inf))
    if not all(map(math.isfinite, found)) or not least <= found[0] <= found[1] <= most:
        bounds = f" within {least:g}..{most:g}" if name in LIMITS else ""
        raise ImageError(f"{name!r} is a number or a range low..high{bounds}, got {value!r}")
    return found


def _choices(name: str, value: str) -> Choices:
    found = tuple(unquote(part).strip() for part in value.split("+"))
    if not all(found):
        raise ImageError(f"{name!r} takes one value or several joined by +, got {value!r}")
    for choice in found:
        if choice not in KINDS.get(name, found):
            raise ImageError(f"{name!r} is one of {', '.join(KINDS[name])}, got {choice!r}")
        if name in ("colour", "ground") and choice != "any":
            _colour(choice)
        if name == "font":
            _font(choice, 12)
    return found


def _whole(value: str, name: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", value) or int(value) < least:
        raise ImageError(f"{name!r} is a whole number from {least}, got {value!r}")
    return int(value)


def _written(default: Range | Choices) -> str:
    if isinstance(default[0], str):
        return "+".join(str(choice) for choice in default)
    low, high = default
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"


# ---------------------------------------------------------------- drawing


def _draw(rng: np.random.Generator, values: Range) -> float:
    low, high = values
    return low + (high - low) * rng.random()


def _choose(rng: np.random.Generator, choices: Choices) -> str:
    # not rng.integers: it draws nothing from a set of one, and renderings would no longer match image by image
    return choices[int(rng.random() * len(choices))]


def _grid(size: int) -> tuple[Plane, Plane]:
    """Coordinates of pixel centres as shares of the image: rightwards, and upwards, both from its middle."""
    steps = (np.arange(size) + 0.5) / size - 0.5
    across, down = np.meshgrid(steps, steps)
    return across, -down


def _place(share: float, outline: Float[np.ndarray, " point"], margin: float) -> float:
    """Where the centre goes so that `outline` has `share` of the free room before it; in the middle if it has none."""
    low, high = float(outline.min()) - margin, float(outline.max()) + margin
    room = 1 - (high - low)
    return -0.5 - low + (share if room > 0 else 0.5) * room


def _distance_to_arc(across: Plane, up: Plane, radius: float, middle: float, half: float) -> Plane:
    off = np.abs((np.arctan2(up, across) - middle + np.pi) % (2 * np.pi) - np.pi)  # angle from the arc's middle
    to_ring = np.abs(np.hypot(across, up) - radius)
    ends = [(radius * math.cos(middle + side * half), radius * math.sin(middle + side * half)) for side in (-1, 1)]
    to_end = np.minimum(*(np.hypot(across - end_x, up - end_y) for end_x, end_y in ends))
    return np.where(off <= half, to_ring, to_end)


def _inside(beyond: Plane, size: int) -> Plane:
    """Coverage of each pixel, 1 inside and 0 outside, from its signed distance to the edge."""
    return np.clip(0.5 - beyond * size, 0, 1)


def _paint(canvas: Canvas, mask: Plane, ink: Float[np.ndarray, "3"]) -> Canvas:
    return canvas + mask[..., None] * (ink - canvas)


def _finish(rng: np.random.Generator, canvas: Canvas, grain: Range) -> Image.Image:
    noisy = 255 * canvas + _draw(rng, grain) * rng.standard_normal(canvas.shape)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _background(rng: np.random.Generator, size: int, kind: str, paper: Float[np.ndarray, "3"]) -> Canvas:
    canvas = np.broadcast_to(paper, (size, size, 3))
    if kind == "gradient":
        return np.clip(canvas + 0.4 * (_slope(rng, size)[..., None] - 0.5), 0, 1)
    if kind == "noise":
        blotches = np.stack([_clouds(rng, size) for _ in range(3)], axis=-1)  # (height, width, 3)
        return np.clip(canvas + 0.35 * (blotches - 0.5) + 0.06 * rng.standard_normal(canvas.shape), 0, 1)
    return canvas


def _texture(rng: np.random.Generator, size: int, kind: str) -> Plane:
    """A field between 0 and 1 that varies as `kind` says."""
    if kind == "gradient":
        return _slope(rng, size)
    if kind == "clouds":
        return _clouds(rng, size)
    if kind == "patches":
        cells = int(rng.integers(3, 9))
        return _enlarge(rng.random((cells, cells)), size, Image.Resampling.NEAREST)
    return np.full((size, size), rng.random())


def _slope(rng: np.random.Generator, size: int) -> Plane:
    angle = rng.uniform(0, 2 * np.pi)
    across, up = _grid(size)
    return 0.5 + (across * math.cos(angle) + up * math.sin(angle)) / math.sqrt(2)


def _clouds(rng: np.random.Generator, size: int) -> Plane:
    octaves = [(4, 0.5), (8, 0.3), (16, 0.2)]
    waves = [weight * _enlarge(rng.random((n, n)), size, Image.Resampling.BICUBIC) for n, weight in octaves]
    return np.clip(0.5 + 1.5 * (sum(waves) - 0.5), 0, 1)


def _enlarge(field: Float[np.ndarray, "row column"], size: int, resampling: Image.Resampling) -> Plane:
    small = Image.fromarray(field.astype(np.float32))
    return np.asarray(small.resize((size, size), resampling), dtype=np.float64)


# ---------------------------------------------------------------- colours


def _colour(name: str) -> Float[np.ndarray, "3"]:
    """Red, green and blue between 0 and 1 of a CSS name, ``rrggbb`` or ``hueDEGREES``."""
    if hue := re.fullmatch(r"hue(\d{1,3})", name):
        return _from_hsv(int(hue[1]) / 360, np.ones(()), np.ones(()))
    try:
        code = ImageColor.getrgb(f"#{name}" if re.fullmatch(r"[0-9a-fA-F]{6}", name) else name)
    except ValueError:
        raise ImageError(
            f"no colour {name!r}.{closest(name, ImageColor.colormap)} Give a CSS name, rrggbb, hue0 to hue360, or any."
        ) from None
    return np.array(code[:3]) / 255


def _pick_colour(rng: np.random.Generator, choices: Choices) -> Float[np.ndarray, "3"]:
    name, (hue, saturation, value) = _choose(rng, choices), rng.random(3)
    if name != "any":
        return _colour(name)
    return _from_hsv(hue, np.array(0.4 + 0.6 * saturation), np.array(0.25 + 0.75 * value))


def _two_colours(rng: np.random.Generator, figure: Choices, ground: Choices) -> tuple[np.ndarray, np.ndarray]:
    """A colour for the figure and one for the ground, far enough apart in luminance where there is a choice."""
    pairs = [(_pick_colour(rng, figure), _pick_colour(rng, ground)) for _ in range(16)]
    gaps = [abs(_luminance(ink) - _luminance(paper)) for ink, paper in pairs]
    enough = [i for i, gap in enumerate(gaps) if gap >= LEAST_CONTRAST]
    return pairs[enough[0] if enough else int(np.argmax(gaps))]


def _luminance(colour: Float[np.ndarray, "3"]) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114]))


def _from_hsv(hue: float, saturation: np.ndarray, value: np.ndarray) -> Float[np.ndarray, "*place 3"]:
    # Smith 1978 in one line per channel: n = 5, 3, 1 for red, green, blue
    turns = (np.array([5.0, 3.0, 1.0]) + 6 * (hue % 1.0)) % 6
    dip = np.clip(np.minimum(turns, 4 - turns), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * dip)


def _to_hsv(colour: Float[np.ndarray, "3"]) -> tuple[float, float, float]:
    value, chroma = float(colour.max()), float(colour.max() - colour.min())
    if chroma == 0:
        return 0.0, 0.0, value
    red, green, blue = (float(part) for part in colour)
    sextant = {
        red: (green - blue) / chroma,
        green: 2 + (blue - red) / chroma,
        blue: 4 + (red - green) / chroma,
    }
    return sextant[value] / 6 % 1, chroma / value, value


# ---------------------------------------------------------------- letters


def _lettering(word: str, face: str, size: int, height: float, degrees: float) -> Image.Image:
    """A white-on-black stencil of the word, rotated, no larger than the image."""
    pixels = max(6, round(height * size))
    for _ in range(8):
        stencil = _stencil(word, face, pixels).rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        excess = max(stencil.size) / size
        if excess <= 1 or pixels == 6:
            break
        pixels = max(6, min(pixels - 1, int(pixels / excess)))
    stencil.thumbnail((size, size))
    return stencil


def _stencil(word: str, face: str, pixels: int) -> Image.Image:
    font = _font(face, pixels)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(word))
    stencil = Image.new("L", (max(1, right - left) + 2, max(1, bottom - top) + 2))
    ImageDraw.Draw(stencil).text((1 - left, 1 - top), word, fill=255, font=font)
    return stencil


@lru_cache(maxsize=64)
def _font(face: str, pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if face == "default":
        return ImageFont.load_default(pixels)
    path = _dejavu(face) if face in DEJAVU else Path(face).expanduser()
    try:
        # Layout.BASIC: the other engine is not in every build of Pillow, and would change the pixels
        return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        names = ["default", *DEJAVU]
        raise ImageError(
            f"no font {face!r}.{closest(face, names)} Give a .ttf or .otf file, or one of {', '.join(names)}."
        ) from error


def _dejavu(face: str) -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ImageError(f"font {face!r} comes with matplotlib, which is not installed: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / DEJAVU[face]
