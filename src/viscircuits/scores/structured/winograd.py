"""Convolution with 3×3 kernels in a quarter of the multiplications: Winograd's F(4×4, 3×3).

A 6×6 tile of the input and each kernel are taken to 36 numbers, multiplied number by number (for all
units at once that is 36 matrix products), and taken back to a 4×4 tile of the output (Lavin and Gray
2015, arXiv:1509.09308). In float32 the result differs from the plain sum by 1e-5 of its largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST_UNITS = 128  # below, taking tiles there and back costs what it saves

_INPUT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)  # fmt: skip
_KERNEL = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)  # fmt: skip
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def pays(maps: Tensor, weight: Tensor) -> bool:
    """Whether this is the faster way: float32 on a processor (graphics cards have their own) and enough units."""
    return maps.device.type == "cpu" and maps.dtype == torch.float32 and min(weight.shape[:2]) >= FEWEST_UNITS


def transformed(weight: Tensor) -> Tensor:
    """Kernels (out, in, 3, 3) of a convolution → (36, out, in) for the way back through it."""
    flat = weight.flip(-2, -1).permute(2, 3, 0, 1).flatten(0, 1).flatten(1)  # (9, out · in)
    return (_kron(_KERNEL, weight) @ flat).reshape(36, *weight.shape[:2])


def led_back(maps: Tensor, kernels: Tensor, padding: tuple[int, int]) -> Tensor:
    """Lead the output of a 3×3 convolution of stride 1 back to its input.

    Parameters
    ----------
    maps
        (n, out, height, width)
    kernels
        What `transformed` gave.
    padding
        The convolution's own, at most 2.
    """
    n, n_units, height, width = maps.shape
    size = [have + 2 - 2 * p for have, p in zip((height, width), padding, strict=True)]
    down, across = (-(-each // 4) for each in size)
    top, left = (2 - p for p in padding)
    wide = maps.new_zeros(n, 4 * down + 2, 4 * across + 2, n_units)  # units last: tiles are runs of memory
    wide[:, top : top + height, left : left + width] = maps.permute(0, 2, 3, 1)
    tiles = wide.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
    there = (_kron(_INPUT, maps) @ tiles).reshape(36, -1, n_units)
    product = torch.bmm(there, kernels).reshape(36, -1)
    back = (_kron(_OUTPUT, maps) @ product).reshape(4, 4, n, down, across, -1)
    full = back.permute(2, 5, 3, 0, 4, 1).reshape(n, -1, 4 * down, 4 * across)
    return full[..., : size[0], : size[1]]


def _kron(matrix: tuple[tuple[float | int, ...], ...], like: Tensor) -> Tensor:
    one = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(one, one)
