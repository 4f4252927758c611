"""Colour maps that readers with any colour vision can read, from a few anchors and without a plotting library.

- `sequential`: from little to much, of evenly growing lightness. Viridis (van der Walt & Smith 2015) and cividis
  (Nuñez, Anderton & Renslow 2018, doi:10.1371/journal.pone.0199239), which most colour-blind readers see as others do.
- `diverging`: from minus to plus through white: orange inhibits, purple excites, as on the page.

A map is straight lines between its anchors, at most 6 of 255 off the original.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from viscircuits.errors import ViscircuitsError, closest

_ANCHORS = {
    "viridis": "440154 470d60 48186a 482374 472d7b 453781 424086 3e4989 3b528b 375b8d 33638d 2f6b8e 2c728e "
    "297a8e 26828e 23898e 21918c 1f988b 1fa088 22a785 28ae80 32b67a 3fbc73 4ec36b 5ec962 70cf57 "
    "84d44b 98d83e addc30 c2df23 d8e219 ece51b fde725",
    "cividis": "00224e 00285b 002e6a 053371 1a386f 273e6e 32436d 3b496c 434e6c 4b546c 535a6d 5a5f6e 61656f "
    "686a71 6f7073 767676 7d7c78 848279 8c8878 938e78 9b9476 a39a74 aba072 b4a76f bcae6c c4b468 "
    "cdbb63 d5c25e dec958 e7d150 f0d846 f9e03a fee838",
    "diverging": "7f3b08 b35806 e08214 fdb863 fee0b6 f7f7f7 d8daeb b2abd2 8073ac 542788 2d004b",
}
SEQUENTIAL = ("viridis", "cividis")


def sequential(values: Float[np.ndarray, "*axes"], name: str = "viridis") -> UInt8[np.ndarray, "*axes 3"]:
    """Colours for numbers from 0 to 1; what lies outside takes the colour of the nearer end.

    Raises
    ------
    ViscircuitsError
        If there is no such map.
    """
    if name not in SEQUENTIAL:
        raise ViscircuitsError(
            f"no sequential colour map {name!r}; there is {' and '.join(SEQUENTIAL)}.{closest(name, SEQUENTIAL)}"
        )
    return _mapped(values, _ANCHORS[name])


def diverging(values: Float[np.ndarray, "*axes"]) -> UInt8[np.ndarray, "*axes 3"]:
    """Colours for numbers from −1 (orange) through 0 (nearly white) to 1 (purple); ends as in `sequential`.

    References
    ----------
    PuOr of Cynthia Brewer's ColorBrewer.
    """
    return _mapped((values + 1) / 2, _ANCHORS["diverging"])


def _mapped(values: np.ndarray, anchors: str) -> np.ndarray:
    table = np.array([list(bytes.fromhex(anchor)) for anchor in anchors.split()], dtype=np.float64)  # (anchor, 3)
    places = np.linspace(0, 1, len(table))
    channels = [np.interp(values, places, table[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
