"""Words written on pictures: the typographic attack and its controls.

A `Hand` says how words are written: faces, heights, whether on a box. `write` puts one word on a picture somewhere;
`nonsense` makes words that mean nothing.

References
----------
Goh et al. 2021, Multimodal Neurons in Artificial Neural Networks, Distill (a word pasted on a photograph decides
what CLIP sees).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from viscircuits.errors import ImageError

Colour = tuple[int, int, int]

FACES_TO_TRAIN = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono-Bold"),
    *("cmss10", "STIXGeneralBol"),
)
FACES_HELD_OUT = ("DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneral", "cmr10", "cmtt10", "cmb10")
FACES_WITH_ACCENTS = ("DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneral")  # held out, and é, ñ, ö in them
FACES_TO_DEVELOP = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta")
FACES_LIKE_HANDWRITING = ("cmmi10", "STIXGeneralItalic", "cmti10")
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
SMALLEST = 7  # pixels of a face, below which no one reads


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OTHER_WORDS = _words("""
house bread river guitar window bottle garden yellow winter doctor money music letter coffee paper market summer friday
bridge castle planet engine pocket kitchen island forest candle button pencil camera mirror hammer basket carpet ladder
wallet ticket village sister brother monday office hotel sugar butter cheese tomato potato carrot dinner silver purple
juice number energy future history science police justice freedom peace sale open closed exit stop push pull hello
welcome free
""")
WORDS_HELD_OUT = _words("""
table flower mountain school blanket shoulder weather morning spoon curtain jacket ceiling station harbor theater
laundry
""")


@dataclass(frozen=True)
class Hand:
    """How words are written.

    Parameters
    ----------
    faces
        Names of fonts that matplotlib ships, or paths of .ttf files; each word takes one.
    height
        Of a line, from … to, as a share of the picture.
    boxed
        Share of the words that stand on a box of one colour; the others have an outline.
    place
        ``any``, or ``top``, ``middle`` or ``bottom``.
    colour
        ``any``, or ``black on white``.
    jitter
        Degrees by which letters are turned, one by one, and how far they leave the line: a shaky hand.
    """

    faces: tuple[str, ...] = FACES_TO_TRAIN
    height: tuple[float, float] = (0.12, 0.2)
    boxed: float = 0.8
    place: str = "any"
    colour: str = "any"
    jitter: float = 0.0


def write(picture: Image.Image, word: str, hand: Hand, rng: np.random.Generator) -> Image.Image:
    """The picture with the word on it, as large as the hand says or as fits.

    Upper and lower case are drawn; two words that do not fit on a line stand on two.
    """
    word = _cased(word.replace("_", " "), rng)
    lines = [word] if len(word) < 11 else word.split(" ")
    face = hand.faces[rng.integers(len(hand.faces))]
    width, height = picture.size
    font = _fitting(lines, face, round(rng.uniform(*hand.height) * height), width - 6)
    lettering = _lettering(lines, font, hand.jitter, rng)  # black on white, a mask
    ink, paper = _colours(hand.colour, rng)
    left = int(rng.integers(2, max(3, width - lettering.width - 2)))
    top = _top(hand.place, height - lettering.height, rng)
    written = picture.copy()
    if rng.random() < hand.boxed:
        ImageDraw.Draw(written).rectangle(
            [left - 3, top - 1, left + lettering.width + 2, top + lettering.height + 1], fill=paper
        )
    else:
        for across, down in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            written.paste(paper, (left + across, top + down), lettering)
    written.paste(ink, (left, top), lettering)
    return written


def check_hand(hand: Hand) -> None:
    """Refuse a hand that cannot write.

    Raises
    ------
    ImageError
        If there is no such font, place or colour, or a height is no share of the picture.
    """
    low, high = hand.height
    if not 0 < low <= high <= 1:
        raise ImageError(f"a word's height is a share of the picture, from … to, such as 0.12, 0.2; got {low}, {high}")
    for face in hand.faces:
        shown = replace(hand, faces=(face,), height=(0.2, 0.2))
        write(Image.new("RGB", (64, 64)), "word", shown, np.random.default_rng(0))


def check_legible(hand: Hand, side: int) -> None:
    """Refuse letters that no one could read in a picture of `side` pixels.

    Raises
    ------
    ImageError
        If the lowest line has fewer than `SMALLEST` pixels.
    """
    low = hand.height[0]
    if low * side < SMALLEST:
        raise ImageError(
            f"letters of {low:g} of {side} pixels cannot be read; with this network take a height of "
            f"{ceil(1000 * SMALLEST / side) / 1000:g} or more (--size FROM,TO)"
        )


def shared_faces(one: Hand, other: Hand) -> bool:
    """Whether two hands have a face in common, by the names that the font files themselves give."""
    names, others = ({font_of(face, SMALLEST).getname() for face in hand.faces} for hand in (one, other))
    return not names.isdisjoint(others)


def blank(picture: Image.Image, word: str, hand: Hand, rng: np.random.Generator) -> Image.Image:
    """The picture with the box that the word would stand on, and no word."""
    clear = replace(hand, boxed=1.0)
    state = rng.bit_generator.state
    boxed = np.asarray(write(picture, word, clear, rng))
    rng.bit_generator.state = state
    return _emptied(picture, boxed)


def nonsense(rng: np.random.Generator) -> str:
    """Four to nine letters, consonants and vowels by turns, that mean nothing."""
    letters = (CONSONANTS, VOWELS)
    return "".join(letters[i % 2][rng.integers(len(letters[i % 2]))] for i in range(int(rng.integers(4, 10))))


def _emptied(picture: Image.Image, boxed: np.ndarray) -> Image.Image:
    """The box filled with its own most frequent colour."""
    changed = (boxed != np.asarray(picture)).any(2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    if not len(rows):
        return picture.copy()
    corner = tuple(int(value) for value in boxed[rows[0], columns[0]])
    empty = picture.copy()
    ImageDraw.Draw(empty).rectangle([int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])], fill=corner)
    return empty


def _cased(word: str, rng: np.random.Generator) -> str:
    drawn = rng.random()
    return word.upper() if drawn < 0.2 else word.title() if drawn < 0.45 else word


def _fitting(lines: list[str], face: str, pixels: int, width: int) -> ImageFont.FreeTypeFont:
    while pixels > SMALLEST and max(font_of(face, pixels).getlength(line) for line in lines) > width:
        pixels -= 1
    return font_of(face, pixels)


def _lettering(lines: list[str], font: ImageFont.FreeTypeFont, jitter: float, rng: np.random.Generator) -> Image.Image:
    ascent, descent = font.getmetrics()
    step = max(1, ascent + descent - 2)
    width = int(max(font.getlength(line) for line in lines)) + 2
    mask = Image.new("L", (width, step * len(lines) + 2))
    for row, line in enumerate(lines):
        if not jitter:
            ImageDraw.Draw(mask).text((1, row * step), line, font=font, fill=255)
            continue
        for place, letter in enumerate(line):
            across = 1 + font.getlength(line[:place])
            down = row * step + rng.normal(0, jitter / 8)
            mask.paste(255, (round(across), round(down)), _turned(letter, font, step, rng.normal(0, jitter)))
    return mask


def _turned(letter: str, font: ImageFont.FreeTypeFont, height: int, degrees: float) -> Image.Image:
    stencil = Image.new("L", (int(font.getlength(letter)) + 3, height))
    ImageDraw.Draw(stencil).text((1, 0), letter, font=font, fill=255)
    return stencil.rotate(degrees, Image.Resampling.BICUBIC)


def _colours(colour: str, rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Ink and paper, one dark and one light."""
    if colour != "any":
        ink, _, ground = colour.partition(" on ")
        try:
            return ImageColor.getrgb(ink)[:3], ImageColor.getrgb(ground)[:3]
        except ValueError as error:
            raise ImageError(
                f"a word's colour is 'any', or 'INK on PAPER' such as 'red on white'; got {colour!r}"
            ) from error
    dark = tuple(int(value) for value in rng.integers(0, 90, 3))
    light = tuple(int(value) for value in rng.integers(170, 256, 3))
    return (dark, light) if rng.random() < 0.5 else (light, dark)  # type: ignore[return-value]


def _top(place: str, room: int, rng: np.random.Generator) -> int:
    room = max(1, room)
    starts = {"top": (0.0, 0.2), "middle": (0.4, 0.6), "bottom": (0.8, 1.0), "any": (0.0, 1.0)}
    if place not in starts:
        raise ImageError(f"a word stands at {', '.join(starts)}; got {place!r}")
    return int(rng.uniform(*starts[place]) * room)


@lru_cache(maxsize=256)
def font_of(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A face that matplotlib ships, by name, or from a .ttf file."""
    path = Path(face).expanduser() if face.endswith((".ttf", ".otf")) else _shipped(face)
    try:
        return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ImageError(f"no font {face!r}; give a .ttf file, or a name from {path.parent}") from error


def _shipped(face: str) -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ImageError(f"font {face!r} comes with matplotlib, which is not installed: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{face}.ttf"
