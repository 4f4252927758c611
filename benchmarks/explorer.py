"""How soon the page is drawn and how soon it answers a pointer, in a real browser.

1. A circuit of so many units and edges is made up, with a picture on each unit, and its page is opened from disk.
2. *Drawn*: from the start of loading to the frame in which units and edges are there.
3. *Lit*: from the moment the pointer reaches a unit to the frame in which its paths are lit, as the browser itself
   times events (to 8 ms; what takes less than 16 counts as 16). *Lit, script*: what of this the page's own code takes.
4. *Sized*: from a step of the size slider to the frame in which the smaller circuit stands.

Medians over repeats, in milliseconds. Nothing is asserted: what a browser takes depends on the machine. Run as
``python benchmarks/explorer.py [--units 1000] [--edges 10000] [--pictures 1] [--repeats 5] [--circuit DIR]``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from viscircuits.bundle import page_of
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.exemplars import Exemplar
from viscircuits.page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1600, 950
N_LAYERS, N_HOVERS = 10, 12
QUICKEST, REST = 16.0, 150  # milliseconds: the least that is timed, and between two hovers
SIZES = (0.75, 0.5, 1.0)

# Two frames: the first is handed over when the script is done, the second begins when it has been drawn.
WATCH = """
  window.afterDrawing = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  new MutationObserver(async (_, observer) => {
    if (!document.documentElement.dataset.ready) return;
    observer.disconnect();
    await afterDrawing();
    window.drawn = performance.now();
  }).observe(document, { attributes: true, subtree: true, attributeFilter: ["data-ready"] });
  window.timed = [];
  new PerformanceObserver((list) => timed.push(...list.getEntries())).observe({ type: "event", durationThreshold: 16 });
"""
TIMED = """() => timed.filter((entry) => entry.name === "pointerover" && entry.target?.closest(".unit"))
  .map((entry) => [entry.duration, entry.processingEnd - entry.processingStart])"""
UNTIL = "async (name) => { while (!window[name]) await afterDrawing(); }"
RESIZE = """async (fraction) => {
  const store = await import("viscircuits/store.js"), from = performance.now();
  store.set({ fraction });
  await afterDrawing();
  return performance.now() - from;
}"""


def made_up(n_units: int, n_edges: int, seed: int = 0) -> Circuit:
    """A circuit of ten layers of equal size, with edges of heavy-tailed scores between neighbouring layers."""
    rng = random.Random(seed)
    layers = [f"blocks.{i // 4}.{i % 4}.act" for i in range(N_LAYERS)]
    share = [n_units // N_LAYERS + (i < n_units % N_LAYERS) for i in range(N_LAYERS)]
    units = {layer: tuple(range(n)) for layer, n in zip(layers, share, strict=True)}
    pairs = [(Unit(a, i), Unit(b, j)) for a, b in pairwise(layers) for i in units[a] for j in units[b]]
    edges = []
    for source, target in rng.sample(pairs, min(n_edges, len(pairs))):
        score = rng.paretovariate(1.6)
        edges.append(Edge(source, target, score, score * rng.choice((0.8, -0.6)), rng.random()))
    scores = {layer: tuple(rng.paretovariate(2) for _ in indices) for layer, indices in units.items()}
    return Circuit(units, {layer: 8 * len(n) for layer, n in units.items()}, scores, tuple(edges))


def patches(circuit: Circuit, n: int, side: int = 48, seed: int = 0) -> dict[Unit, list[Exemplar]]:
    """Pictures of noise in a colour of its own for each unit."""
    rng = random.Random(seed)

    def patch() -> Image.Image:
        small = Image.new("RGB", (4, 4))
        small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(16)])
        return small.resize((side, side), Image.Resampling.BICUBIC)

    return {unit: [Exemplar(f"{i}.jpg", 1.0, (0, 0, side, side), patch()) for i in range(n)] for unit in circuit}


def measure(html: str, repeats: int, *, all_edges: bool = False) -> dict[str, Any]:
    """Medians in milliseconds of drawing the page, lighting a unit and changing the circuit's size."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("no Chromium on this machine; install the package chromium to run this benchmark")
    found: dict[str, list[float]] = {"drawn": [], "lit": [], "lit, script": [], "sized": []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "index.html"
        file.write_text(html, encoding="utf-8")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for _ in range(repeats):
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            tab.add_init_script(WATCH)
            tab.goto(file.as_uri() + ("#edges=1000000" if all_edges else ""))
            tab.evaluate(UNTIL, "drawn")
            found["drawn"].append(tab.evaluate("window.drawn"))
            _hover(tab)
            timed = tab.evaluate(TIMED)
            found["lit"] += [lit for lit, _ in timed] + [QUICKEST] * (N_HOVERS - len(timed))
            found["lit, script"] += [script for _, script in timed]
            found["sized"] += [tab.evaluate(RESIZE, fraction) for fraction in SIZES]
            shown = tab.locator("#shown").inner_text()
            tab.close()
        browser.close()
    return {
        **{name: round(statistics.median(values), 1) for name, values in found.items() if values},
        "slowest lit": round(max(found["lit"]), 1),
        "edges shown": shown,
    }


def _hover(tab: Any) -> None:
    """Move the pointer over units that are in sight, far enough apart that each lights anew."""
    boxes = tab.evaluate(
        """() => [...document.querySelectorAll(".unit")].map((unit) => unit.getBoundingClientRect())
          .filter((box) => box.width && box.top > 260 && box.bottom < 800 && box.right < 1100)
          .map((box) => [box.left + box.width / 2, box.top + box.height / 2])"""
    )
    for i in range(N_HOVERS):
        tab.mouse.move(*boxes[(i * len(boxes)) // N_HOVERS])
        tab.wait_for_timeout(REST)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--edges", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=1, help="on each unit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--circuit", type=Path, help="a result folder to open instead")
    options = parser.parse_args(arguments)
    if options.circuit:
        html = page_of(options.circuit)
    else:
        circuit = made_up(options.units, options.edges)
        html = page(circuit, None, patches(circuit, options.pictures), title="made up", command="")
    result = {
        "megabytes": round(len(html.encode()) / 1e6, 2),
        "as it opens": measure(html, options.repeats),
        "with all edges": measure(html, options.repeats, all_edges=True),
    }
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
