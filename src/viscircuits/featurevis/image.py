"""How the numbers that are optimised become a picture, and how a picture becomes what the network sees.

1. A *basis* starts one picture's numbers from a generator and decodes a batch of them into colours from 0 to 1. The
   same gradient takes another way in another basis; in one whose coordinates are those natural images are
   uncorrelated in, pictures come out smooth rather than as high-frequency noise.
2. `Robustness` moves, scales and turns each picture a little, differently at each step, so that what is found is not
   one pixel pattern that only works where it stands.
3. `Eye` gives the network the colours in its own normalisation.

References
----------
Olah, Mordvintsev & Schubert 2017, "Feature visualization", Distill, doi:10.23915/distill.00007 (decorrelated space,
transformation robustness); Mordvintsev et al. 2018, "Differentiable image parameterizations", Distill,
doi:10.23915/distill.00012; Fel et al. 2023, "Unlocking feature visualization for deeper networks with magnitude
constrained optimization", arXiv:2306.06805 (MaCo).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Number: TypeAlias = int | float

# Square root of the covariance of colours over ImageNet, as Lucid has it (github.com/tensorflow/lucid,
# lucid/optvis/param/color.py); the columns are light, blue against yellow, green against red and blue.
COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
CONTRAST = 0.25  # of the colours that a unit step in each coordinate makes, before the sigmoid
MACO_CONTRAST = 2.0  # a picture of fixed magnitudes has all its contrast from the start


@dataclass(frozen=True)
class Basis:
    """One parametrisation of pictures.

    Parameters
    ----------
    start
        Side, generator → one picture's numbers.
    decode
        Numbers of several pictures, side → their colours, (image, 3, side, side), from 0 to 1.
    rate
        Step of Adam that suits its coordinates.
    """

    start: Callable[[int, torch.Generator], Tensor]
    decode: Callable[[Tensor, int], Tensor]
    rate: float


def correlated(coordinates: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image 3 height width"]:
    """Red, green and blue with the correlations of natural images, from three independent coordinates."""
    matrix = torch.tensor(COLOURS, device=coordinates.device, dtype=coordinates.dtype)
    matrix = matrix / matrix.norm(dim=0).max()
    return torch.einsum("rc,nchw->nrhw", matrix, coordinates)


def frequencies(side: int) -> Float[Tensor, "row column"]:
    """Cycles per pixel of each coefficient of a real Fourier transform; that of the mean counts as the slowest wave."""
    rows, columns = torch.fft.fftfreq(side), torch.fft.rfftfreq(side)
    return (rows[:, None].square() + columns.square()).sqrt().clamp(min=1 / side)


def _start_fourier(side: int, generator: torch.Generator) -> Tensor:
    return 0.01 * torch.randn(3, side, side // 2 + 1, 2, generator=generator)


def _decode_fourier(numbers: Tensor, side: int) -> Tensor:
    """Amplitudes fall as one over the frequency, as they do in natural images."""
    spectrum = torch.view_as_complex(numbers.contiguous()) / frequencies(side).to(numbers)
    waves = torch.fft.irfft2(spectrum, s=(side, side), norm="ortho")
    return torch.sigmoid(CONTRAST * correlated(waves))


def _start_pixel(side: int, generator: torch.Generator) -> Tensor:
    return 0.01 * torch.randn(3, side, side, generator=generator)


def _decode_pixel(numbers: Tensor, side: int) -> Tensor:
    return torch.sigmoid(correlated(numbers))


def _start_maco(side: int, generator: torch.Generator) -> Tensor:
    return 2 * pi * torch.rand(3, side, side // 2 + 1, generator=generator)


def _decode_maco(phases: Tensor, side: int) -> Tensor:
    """The magnitudes stay those of natural images: one over the frequency, and no mean."""
    magnitude = 1 / frequencies(side).to(phases)
    magnitude = magnitude.index_put((torch.tensor(0), torch.tensor(0)), magnitude.new_zeros(()))
    waves = torch.fft.irfft2(torch.polar(magnitude.expand_as(phases), phases), s=(side, side), norm="ortho")
    return torch.sigmoid(MACO_CONTRAST * correlated(waves / waves.std(dim=(1, 2, 3), keepdim=True)))


BASES: dict[str, Basis] = {
    "fourier": Basis(_start_fourier, _decode_fourier, 0.1),
    "pixel": Basis(_start_pixel, _decode_pixel, 0.1),
    "maco": Basis(_start_maco, _decode_maco, 0.1),
}


@dataclass(frozen=True)
class Robustness:
    """Robustness transforms in Distill's order: pad, jitter, scale, rotate, jitter.

    Together they are one affine map, so each picture is sampled once (bilinear) and is not blurred four times. What
    lies outside the picture is grey.

    Parameters
    ----------
    pad
        Pixels of grey around the picture that the network sees beside it.
    jitter
        Widths in pixels of the two ranges of shifts, before and after scaling and turning.
    scale
        Least and greatest factor.
    rotate
        Greatest angle to either side, in degrees.
    """

    pad: int = 0
    jitter: tuple[Number, Number] = (8, 4)
    scale: tuple[Number, Number] = (0.9, 1.1)
    rotate: Number = 10

    def maps(self, draws: Float[Tensor, "image 6"], side: int) -> Float[Tensor, "image 2 3"]:
        """The affine maps that six numbers from 0 to 1 for each picture stand for, as `affine_grid` takes them."""
        first, second = self.jitter[0] * (draws[:, :2] - 0.5), self.jitter[1] * (draws[:, 2:4] - 0.5)
        factor = (side + 2 * self.pad) / side / (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, 4])
        angle = torch.deg2rad(self.rotate * (2 * draws[:, 5] - 1))
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        linear = factor.view(-1, 1, 1) * turn
        shift = 2 / side * (first + (linear @ second.unsqueeze(2)).squeeze(2))
        return torch.cat([linear, shift.unsqueeze(2)], 2)


DISTILL = Robustness()
STILL = Robustness(pad=0, jitter=(0, 0), scale=(1, 1), rotate=0)
N_DRAWS = 6


def sampled(
    pictures: Float[Tensor, "image 3 side side"], maps: Float[Tensor, "image 2 3"], side: int
) -> Float[Tensor, "image 3 seen seen"]:
    """Each picture through its affine map, `side` pixels a side, with grey where there is none."""
    size = [len(pictures), 3, side, side]
    grid = torch.nn.functional.affine_grid(maps.to(pictures), size, align_corners=False)
    return torch.nn.functional.grid_sample(pictures - 0.5, grid, align_corners=False) + 0.5


@dataclass(frozen=True)
class Eye:
    """What a network's own transform does to colours: `matrix` times colour, plus `offset`."""

    matrix: Float[Tensor, "channel 3"]
    offset: Float[Tensor, " channel"]

    def __call__(self, pictures: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image channel height width"]:
        """Colours from 0 to 1 as the network's input."""
        matrix, offset = self.matrix.to(pictures), self.offset.to(pictures)
        return torch.einsum("cr,nrhw->nchw", matrix, pictures) + offset[:, None, None]
