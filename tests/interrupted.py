"""A run of attribution that is killed again and again; started by test_checkpoint, prints how it went.

One process imports everything once and forks a child for each attempt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import squeezenet1_1

from viscircuits import attribute
from viscircuits.matrices import Attributions

LAYERS = ["features.2", "features.5", "features.8", "features.9.expand3x3_activation"]
OPTIONS = {"draws": 3, "batch_size": 2, "seed": 4}


def images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return squeezenet1_1(weights=None).eval()


def run(folder: Path, checkpoint: Path | None) -> None:
    found = attribute(
        network(), images(7, 1), LAYERS, reference=images(3, 2), checkpoint=checkpoint, checkpoint_seconds=0, **OPTIONS
    )
    found.save(folder / "found.safetensors")


def start(folder: Path, checkpoint: Path | None) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(folder, checkpoint)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def same(a: Attributions, b: Attributions) -> bool:
    tensors = [
        torch.equal(getattr(m, name), getattr(n, name))
        for m, n in zip(a.matrices, b.matrices, strict=True)
        for name in ("values", "signed", "variance", "draws")
    ]
    tensors += [torch.equal(a.activity[layer], b.activity[layer]) for layer in a.layers]
    seen = a.provenance["images"] == b.provenance["images"]
    return all(tensors) and seen and (a.reference is None or same(a.reference, b.reference))


def attempt(folder: Path, checkpoint: Path, delay: float) -> str:
    """Start the run, and kill it after a while if it has not come to its end."""
    (folder / "found.safetensors").unlink(missing_ok=True)
    child = start(folder, checkpoint)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "failed" if status else "finished"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed"


def main(folder: Path, n_kills: int) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    assert os.waitpid(start(folder, None), 0)[1] == 0
    length = time.monotonic() - started
    expected = Attributions.load(folder / "found.safetensors")
    moments = random.Random(0)
    outcomes = {"killed": 0, "finished": 0, "failed": 0, "resumed": 0, "different": 0}
    last = False
    while not last:
        last = outcomes["killed"] >= n_kills
        begun = any((folder / "parts").glob("0*"))
        outcome = attempt(folder, folder / "parts", 60 if last else moments.uniform(0.05, 0.7 * length))
        outcomes[outcome] += 1
        if outcome == "finished":
            outcomes["resumed"] += begun
            outcomes["different"] += not same(Attributions.load(folder / "found.safetensors"), expected)
    outcomes["left"] = len(list(folder.glob("parts")))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
