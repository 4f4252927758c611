"""The demo's photographs: they are where it looks, and they show what it says."""

from __future__ import annotations

import pytest
from PIL import Image

from viscircuits.demo import ANIMALS, THINGS, _paths
from viscircuits.errors import ImageError


def test_every_photograph_is_there_and_named_once():
    try:
        found = {**_paths(ANIMALS), **_paths(THINGS)}
    except ImageError as error:
        pytest.skip(str(error))
    assert len({path.name for path in found}) == len(ANIMALS) + len(THINGS)
    for path in found:
        with Image.open(path) as image:
            assert min(image.size) >= 200
