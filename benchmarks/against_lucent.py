"""Does our feature visualisation reach what lucent's does? Same network, seed, steps and strength of transforms.

Run by hand: it installs nothing. Lucent (torch-lucent 0.1.8, PyPI) works only with kornia 0.4.1 and asks for many
packages that it does not need here, so give it a folder of its own, beside the torch that is installed:

    python -m pip install --target ../lucent --no-deps torch-lucent==0.1.8 kornia==0.4.1 decorator
    PYTHONPATH=../lucent python benchmarks/against_lucent.py

1. Units are drawn by `--seed` from two layers of each network; both tools make a picture of each, `--size` pixels a
   side, with Adam for `--steps` steps, in lucent's default basis and ours, with the transforms of lucent's
   `standard_transforms`: pad 12, jitter 8, scale 0.9 to 1.1, rotate ±10°, jitter 4.
2. Both pictures are rounded to eight bits, given to the network as they are, and the mean of the unit over positions
   is what is compared.

Each tool takes its own step size, lucent's being 0.05 and ours 0.1; `--rate` gives both the same.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from viscircuits.circuit import Unit
from viscircuits.featurevis.image import Robustness
from viscircuits.featurevis.objectives import channel
from viscircuits.featurevis.render import network_eye, render
from viscircuits.hooks import activations, count_hooks
from viscircuits.models import ModelSpec, load_model

NETWORKS = {
    "lite0": ("default", ("blocks.2.1.bn2", "blocks.4.1.bn2")),
    "squeezenet1_1": ("default", ("features.6", "features.10")),
    "torchvision:squeezenet1_1": ("none", ("features.6", "features.10")),
    "torchvision:googlenet": ("none", ("inception3b", "inception4c")),
}
STRENGTH = Robustness(pad=12, jitter=(8, 4), scale=(0.9, 1.1), rotate=10)
INSTALL = "see the first lines of benchmarks/against_lucent.py for how to install it"


@dataclass(frozen=True)
class Row:
    """One unit, seen by both."""

    unit: Unit
    start: float
    lucent: float
    ours: float


def compare(
    spec: ModelSpec, layer: str, units: Sequence[int], size: int, steps: int, seed: int, rate: float | None
) -> tuple[list[Row], float, float, int]:
    """The rows, the seconds of lucent and of ours, and the hooks that lucent left on its copy of the network."""
    began = time.process_time()
    twin = copy.deepcopy(spec.model)
    theirs = by_lucent(spec, twin, layer, units, size, steps, seed, rate)
    between = time.process_time()
    ours = render(
        spec, [channel(layer, unit) for unit in units], size=size, steps=steps, transforms=STRENGTH, seed=seed,
        rate=rate,
        batch_size=len(units),
    )  # fmt: skip
    ended = time.process_time()
    mine = torch.stack([torch.from_numpy(np.array(each.images[0])) for each in ours])
    values = [measured(spec, layer, units, pictures) for pictures in (theirs, mine)]
    rows = [
        Row(Unit(layer, unit), each.started[0], lucent, our)
        for unit, each, lucent, our in zip(units, ours, *values, strict=True)
    ]
    return rows, between - began, ended - between, count_hooks(twin)


def by_lucent(
    spec: ModelSpec,
    model: nn.Module,
    layer: str,
    units: Sequence[int],
    size: int,
    steps: int,
    seed: int,
    rate: float | None,
) -> Tensor:
    """Lucent's pictures in eight bits, (image, height, width, 3)."""
    from lucent.optvis import objectives, param, transform
    from lucent.optvis.render import render_vis

    torch.manual_seed(seed)  # lucent draws from the global generators
    np.random.seed(seed)  # noqa: NPY002
    name = layer.replace(".", "_")
    wanted = objectives.Objective.sum([objectives.channel(name, unit, batch=i) for i, unit in enumerate(units)])
    (images,) = render_vis(
        model,
        wanted,
        optimizer=None if rate is None else lambda numbers: torch.optim.Adam(numbers, lr=rate),
        param_f=lambda: param.image(size, batch=len(units)),
        transforms=[*transform.standard_transforms, network_eye(spec)],
        preprocess=False,
        thresholds=(steps,),
        progress=False,
        show_image=False,
    )
    return torch.from_numpy(images).mul(255).round().clamp(0, 255).byte()


def measured(spec: ModelSpec, layer: str, units: Sequence[int], pictures: Tensor) -> list[float]:
    """The mean over positions of each picture's own unit."""
    with torch.no_grad():
        maps = activations(spec.model, [layer], network_eye(spec)(pictures.movedim(3, 1) / 255))[layer]
    return [float(maps[i, unit].mean()) for i, unit in enumerate(units)]


def main() -> None:
    """Print one table for all networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="with commas between them")
    parser.add_argument("--units", type=int, default=4, help="of each layer")
    parser.add_argument("--size", type=int, default=224, help="lucent enlarges smaller pictures, so at least 224")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, help="step size for both; default each tool's own")
    asked = parser.parse_args()
    try:
        import lucent.optvis.render  # noqa: F401
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"lucent cannot be imported ({error}); {INSTALL}") from error
    print("| network | weights | unit | noise | lucent | ours |\n|---|---|---|---|---|---|")
    notes = []
    for network in asked.networks.split(","):
        weights, layers = NETWORKS[network]
        spec = load_model(network, weights=weights)
        for layer in layers:
            width = activations(spec.model, [layer], spec.example())[layer].shape[1]
            drawn = torch.randperm(width, generator=torch.Generator().manual_seed(asked.seed))[: asked.units].tolist()
            rows, theirs, ours, left = compare(spec, layer, drawn, asked.size, asked.steps, asked.seed, asked.rate)
            for row in rows:
                print(
                    f"| {network} | {weights} | {row.unit} | {row.start:.3g} | {row.lucent:.3g} | {row.ours:.3g} |",
                    flush=True,
                )
            at_least = sum(row.ours >= row.lucent for row in rows)
            notes.append(
                f"{network} {layer}: mean {sum(r.lucent for r in rows) / len(rows):.4g} lucent, "
                f"{sum(r.ours for r in rows) / len(rows):.4g} ours; "
                f"ours at least lucent's in {at_least} of {len(rows)}; "
                f"{theirs:.0f} s and {ours:.0f} s of processor time; hooks left by lucent: {left}"
            )
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main()
