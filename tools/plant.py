"""Train the planted networks and keep their weights in ``src/viscircuits/planted/weights``.

    python tools/plant.py [NAME …]

Everything comes from seeds: on one machine the same call gives the same files. Without names all are made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from viscircuits.planted import merged, trained, vit
from viscircuits.planted.composed import QUESTIONS
from viscircuits.planted.learning import WEIGHTS

Weights = dict[str, Tensor]


def networks() -> dict[str, Callable[[], Weights]]:
    """File name → what trains the network kept there."""
    parts = {
        f"{question}-{variant}": partial(_part, question, variant)
        for question in QUESTIONS
        for variant in range(merged.N_VARIANTS)
    }
    holders = {
        f"{rule}-{variant}": partial(_holder, rule, variant)
        for rule in trained.RULES
        for variant in range(trained.N_VARIANTS)
    }
    transformers = {
        f"vit-{question}-{variant}": partial(_transformer, question, variant)
        for question in ("letters", "gratings")
        for variant in range(vit.N_VARIANTS)
    }
    return {**parts, **holders, **transformers}


def _part(question: str, variant: int) -> Weights:
    return merged.train_part(question, variant).network.state_dict()


def _transformer(question: str, variant: int) -> Weights:
    return vit.train_part(question, variant).state_dict()


def _holder(rule: str, variant: int) -> Weights:
    holder = trained.train_holder(rule, variant)
    return {**holder.network.state_dict(), **{f"groups.{i}": group for i, group in enumerate(holder.groups)}}


def keep(weights: Weights, path: Path) -> None:
    """Write weights to a temporary name, then rename."""
    new = path.with_suffix(".new")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, new)
    new.chmod(0o644)  # safetensors writes for its owner alone
    os.replace(new, path)


def main(names: list[str]) -> None:
    """Train and keep the networks of these names."""
    torch.set_num_threads(1)  # the order of sums, and so the last digits, depend on it
    makers = networks()
    for name in names or list(makers):
        path = WEIGHTS / f"{name}.safetensors"
        keep(makers[name](), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
