"""Colour maps are ordered by lightness, so that they read the same to every eye."""

from __future__ import annotations

import numpy as np
import pytest

from viscircuits.colours import SEQUENTIAL, diverging, sequential
from viscircuits.errors import ViscircuitsError

STEPS = np.linspace(0, 1, 256)


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours."""
    linear = np.where(colours <= 10.31, colours / 3294.6, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return 116 * np.cbrt(luminance) - 16


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_more_is_lighter(name):
    light = lightness(sequential(STEPS, name))
    assert (np.diff(light) > -0.2).all()  # whole numbers of 255 wobble
    assert light[-1] - light[0] > 70
    assert np.corrcoef(STEPS, light)[0, 1] > 0.99


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_it_is_the_map_of_that_name(name):
    original = pytest.importorskip("matplotlib").colormaps[name](STEPS)[:, :3] * 255
    assert np.abs(sequential(STEPS, name) - original).max() < 6


def test_diverging_is_darker_the_farther_from_zero_and_differs_by_sign():
    values = np.linspace(0, 1, 51)
    minus, plus = diverging(-values), diverging(values)
    for light in (lightness(minus), lightness(plus)):
        assert (np.diff(light) < 0.2).all()
    assert lightness(diverging(np.zeros(1)))[0] > 95
    assert minus[-1, 0] > minus[-1, 2] and plus[-1, 2] > plus[-1, 0]  # orange has red, purple has blue


def test_beyond_the_ends_are_the_ends_and_axes_are_kept():
    colours = sequential(np.array([[-3.0, 0.0], [1.0, 9.0]]))
    assert colours.shape == (2, 2, 3)
    assert (colours[0, 0] == colours[0, 1]).all() and (colours[1, 0] == colours[1, 1]).all()


def test_an_unknown_map_names_the_known_ones():
    with pytest.raises(ViscircuitsError, match="there is viridis and cividis"):
        sequential(STEPS, "jet")
