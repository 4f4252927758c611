"""A small convolutional network trained for seconds on rendered concepts, where no pretrained one is installed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from viscircuits.concepts import PREFIX
from viscircuits.images import open_images
from viscircuits.models import ModelSpec, wrap

SIDE = 48
WIDTHS = (16, 24, 32, 48, 64)
STRIDES = (1, 2, 1, 2, 1)
BATCH = 48
RATE = 3e-3
ADDRESS = "trained"


def train_small(
    concepts: Mapping[str, str], *, each: int = 48, steps: int = 200, seed: int = 0, progress: bool = False
) -> ModelSpec:
    """A network of five convolutions that tells rendered concepts apart.

    Parameters
    ----------
    concepts
        Name → what to render, as in an address after ``render:``.
    each
        Images of each, drawn for training alone.
    steps
        Of Adam.
    seed
        Of weights, images and batches.
    progress
        Show a progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    network = _network(len(concepts), generator)
    images = torch.cat([_rendered(address, each, seed) for address in concepts.values()])
    labels = torch.arange(len(concepts)).repeat_interleave(each)
    optimiser = torch.optim.Adam(network.parameters(), RATE)
    network.train()
    with torch.inference_mode(False), torch.enable_grad():
        for _ in tqdm(range(steps), "training", disable=not progress):
            picked = torch.randint(len(images), (BATCH,), generator=generator)
            loss = nn.functional.cross_entropy(network(images[picked]), labels[picked])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.ReLU)]
    return wrap(network.eval(), _transform, layers, list(concepts), address=ADDRESS)


def _network(n_classes: int, generator: torch.Generator) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = []
    before = 3
    for number, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True), 1):
        # skip_init: the usual one draws from the world's generator
        convolution = nn.utils.skip_init(nn.Conv2d, before, width, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, generator=generator)
        block = [("conv", convolution), ("norm", nn.BatchNorm2d(width)), ("act", nn.ReLU())]
        parts.append((f"block{number}", nn.Sequential(OrderedDict(block))))
        before = width
    head = nn.utils.skip_init(nn.Linear, before, n_classes)
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    return nn.Sequential(
        OrderedDict([*parts, ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", head)])
    )


def _rendered(address: str, n: int, seed: int) -> Float[Tensor, "image 3 side side"]:
    """Images for training: of a seed that no tree is rendered with."""
    pictures: Sequence = list(open_images(f"{PREFIX}{address},n={n},seed={1_000_003 + seed},size={SIDE}"))
    return torch.stack([_transform(picture.image) for picture in pictures])


def _transform(picture: Image.Image) -> Tensor:
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
