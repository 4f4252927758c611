"""How long surgery takes over HTTP, beside the network's own forward pass.

``python benchmarks/surgery.py DIR [--threads 1] [--repeats 5]`` prints the table of ``docs/server.md`` for a result
folder, such as `viscircuits demo` makes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit
from viscircuits.discovery import found_with, model_of
from viscircuits.hooks import forward
from viscircuits.server import serving


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    circuit = Bundle.load(given.folder).circuit
    spec = model_of(circuit)
    picture = next(iter(found_with(circuit.provenance, "images"))).image
    image = spec.transform(picture)[None]
    path = given.folder.parent / "surgery.png"
    picture.save(path)
    print("| edit | the network alone | under the edit | the whole answer, over HTTP |\n|---|---|---|---|")
    with serving(given.folder, spec) as url:
        address, _, token = url.partition("/?token=")
        headers = {"Authorization": f"Bearer {token}", "X-Viscircuits": "1"}
        with httpx.Client(base_url=address, headers=headers, timeout=120) as client:
            probe = client.post("/api/probe", content=path.read_bytes()).json()["id"]
            for name, edit in edits(circuit).items():
                asked = {"edit": edit, "probes": [probe]}
                ask(client, asked)  # what comes before the circuit is put aside now
                alone, under, whole = [], [], []
                for _ in range(given.repeats):
                    alone.append(timed(lambda: untouched(spec.model, image))[0])
                    taken, answer = timed(partial(ask, client, asked))
                    whole.append(taken)
                    under.append(answer["milliseconds"]["forward"])
                row = (f"{statistics.median(values):.0f}" for values in (alone, under, whole))
                print(f"| {name} | {' | '.join(row)} |")
    path.unlink()


def untouched(model: torch.nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        forward(model, image)


def ask(client: httpx.Client, asked: dict[str, Any]) -> dict[str, Any]:
    return client.post("/api/surgery", json=asked).raise_for_status().json()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what came out."""
    began = time.perf_counter()
    found = work()
    return 1e3 * (time.perf_counter() - began), found


def edits(circuit: Circuit) -> dict[str, dict[str, Any]]:
    units = [[unit.layer, unit.index] for unit in circuit]
    edges = [[[e.source.layer, e.source.index], [e.target.layer, e.target.index]] for e in circuit.edges]
    some = {"1 unit": (1, 0), f"all {len(units)} units": (len(units), 0), "1 edge": (0, 1), "20 edges": (0, 20)}
    more = {"5 units and 100 edges": (5, 100), f"all {len(edges)} edges": (0, len(edges))}
    return {
        name: {"units": units[:n], "edges": edges[:m], "ablation": "mean"} for name, (n, m) in {**some, **more}.items()
    }


if __name__ == "__main__":
    main()
