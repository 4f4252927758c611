"""Draw docs/img/visualisations.jpg: forty units of EfficientNet-Lite0, chosen by a seed, to be looked at.

1. Five layers, the input side first; eight units of each are drawn by `--seed`, whatever they turn out to be.
2. Each is pictured with `render`'s defaults. Under it stand its index, the mean over positions that the picture
   reaches, and the largest that any of the photographs in scikit-image and foolbox reaches.

Some minutes on one core. Needs the `demo` extra.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from viscircuits.demo import ANIMALS, THINGS, _paths
from viscircuits.featurevis.objectives import channel
from viscircuits.featurevis.render import Rendered, render
from viscircuits.hooks import activations
from viscircuits.images import batches, open_images
from viscircuits.models import ModelSpec, load_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "img" / "visualisations.jpg"
LAYERS = ("blocks.1.1.bn2", "blocks.2.1.bn2", "blocks.3.1.bn2", "blocks.4.1.bn2", "blocks.5.1.bn2")
N_UNITS = 8
SIDE, GAP, CAPTION, HEAD = 128, 8, 34, 22


def drawn(spec: ModelSpec, seed: int) -> dict[str, list[int]]:
    """Layer → the units whose turn it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values = activations(spec.model, LAYERS, spec.example())
    return {layer: torch.randperm(values[layer].shape[1], generator=generator)[:N_UNITS].tolist() for layer in LAYERS}


def strongest_means(spec: ModelSpec) -> dict[str, Tensor]:
    """For each layer the largest mean over positions that a photograph gives each unit."""
    paths = list(_paths(ANIMALS) | _paths(THINGS))
    best: dict[str, Tensor] = {}
    for batch in batches(open_images(paths), spec.transform, 8):
        with torch.no_grad():
            values = activations(spec.model, LAYERS, batch.images)
        for layer in LAYERS:
            means = values[layer].mean((2, 3)).amax(0)  # (unit,)
            best[layer] = torch.maximum(best[layer], means) if layer in best else means
    return best


def sheet(rows: list[tuple[str, list[tuple[int, Rendered, float]]]]) -> Image.Image:
    """One row a layer, each picture with its numbers."""
    width = GAP + N_UNITS * (SIDE + GAP)
    page = Image.new("RGB", (width, len(rows) * (HEAD + SIDE + CAPTION + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for i, (layer, units) in enumerate(rows):
        top = GAP + i * (HEAD + SIDE + CAPTION + GAP)
        pen.text((GAP, top + 2), layer, fill="black", font=font)
        for j, (index, made, photograph) in enumerate(units):
            left = GAP + j * (SIDE + GAP)
            page.paste(made.images[0], (left, top + HEAD))
            pen.text((left, top + HEAD + SIDE + 2), f"{index}: mean {made.reached[0]:.2f}", fill="black", font=font)
            pen.text((left, top + HEAD + SIDE + 17), f"photographs {photograph:.2f}", fill="#59636f", font=font)
    return page


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    spec = load_model("lite0")
    units, photograph = drawn(spec, asked.seed), strongest_means(spec)
    rows, began = [], time.process_time()
    for layer, indices in units.items():
        made = render(spec, [channel(layer, index) for index in indices], size=SIDE, seed=asked.seed)
        values = [float(photograph[layer][index]) for index in indices]
        rows.append((layer, list(zip(indices, made, values, strict=True))))
        print(f"{layer}: {time.process_time() - began:.0f} s of processor time so far", flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(asked.out, quality=85)
    beyond = sum(made.reached[0] > value for _, units_ in rows for _, made, value in units_)
    print(f"{asked.out}: {asked.out.stat().st_size // 1000} kB; {beyond} of 40 reach more than any photograph")


if __name__ == "__main__":
    main()
