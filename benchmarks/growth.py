"""How the work grows: with the number of images, their size, and the width of the network.

The number of images goes through `viscircuits.attribute` with a stream that holds none of them, in a process of its
own; size and width compare the engine with the loop on a pair of Fire modules, as SqueezeNet is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.squeezenet import Fire

from memory import isolated, rise
from viscircuits import attribute, load_model
from viscircuits.models import as_spec
from ways import WAYS, Pair, drained, evenly, recorded

IMAGES, SIZES, WIDTHS = (10, 30, 100, 300, 1000), (96, 128, 192, 256, 384), (32, 64, 128, 256, 512)
QUICK_IMAGES, QUICK_SIZES, QUICK_WIDTHS = (4, 8), (32, 64), (16, 32)
ADDRESS, LAYERS = "torchvision:squeezenet1_1", ("features.3", "features.4", "features.6")
PIXELS, WIDTH, BATCH, REPEATS, LOOP_ROWS = 64, 128, 4, 3, 6


def measure(quick: bool) -> dict[str, Any]:
    """Three curves, each a list of points."""
    images, sizes, widths = (QUICK_IMAGES, QUICK_SIZES, QUICK_WIDTHS) if quick else (IMAGES, SIZES, WIDTHS)
    return {
        "images": [{"images": n, **isolated(of_images, n)} for n in images],
        "size": [{"size": size, **of_fires(WIDTH, size)} for size in sizes],
        "width": [{"width": width, **of_fires(width, 2 * PIXELS)} for width in widths],
    }


class Noise:
    """Seeded images, made one at a time when they are asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(3, PIXELS, PIXELS, generator=generator) for _ in range(self.n))


def of_images(n: int) -> dict[str, float]:
    """Seconds an image through `attribute`, and bytes at the peak on top of the loaded network."""
    spec = load_model(ADDRESS, weights="none")
    start = perf_counter()
    n_bytes = rise(lambda: attribute(spec, Noise(n), LAYERS))
    return {"seconds": (perf_counter() - start) / n, "bytes": n_bytes}


def of_fires(width: int, size: int) -> dict[str, float]:
    """Seconds an image for all rows between two Fire modules: ours, and the loop scaled from a few rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Conv2d(3, width, 3, stride=4, padding=1)
        fires = [Fire(width, width // 8, width // 2, width // 2) for _ in range(2)]
    spec = as_spec(nn.Sequential(stem, nn.ReLU(), *fires).eval())
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    (pair,) = recorded(spec, images, ("2", "3"))
    few = evenly(pair.n_targets, LOOP_ROWS)
    seconds = {way: _timed(way, pair, rows) for way, rows in (("float32", None), ("loop", few))}
    return {"float32": seconds["float32"] / BATCH, "loop": seconds["loop"] / BATCH * pair.n_targets / len(few)}


def _timed(way: str, pair: Pair, rows: Tensor | None) -> float:
    drained(WAYS[way], pair, rows)
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        drained(WAYS[way], pair, rows)
        times.append(perf_counter() - start)
    return median(times)
