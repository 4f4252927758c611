"""The dog circuit of EfficientNet-Lite0 beside its controls: writes the tables of docs/results.md.

Sixteen dogs find the circuit, with thirty-two other photographs as reference; the remaining dogs and
120 other photographs test it. Every circuit takes the same share of units in each layer. What is
compared: CLA as published, CLA with a reference (difference and ratio), random units (several
draws), the most active, those the concept raises most over the reference, those with the largest
weights; at three sizes, in early and late layers, under zero and mean ablation.

    python benchmarks/results.py [--data ../shared/data/imagenet-sample] [--seed 0]

Nothing is chosen on the images that are reported: the grid is fixed and reported whole.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch

from viscircuits import attribute, evaluate, load_model, measure, open_images, select, split
from viscircuits.images import sample

ROOT = Path(__file__).resolve().parent.parent
SIZES = (0.02, 0.05, 0.10)
CONTRASTS = {"none": "CLA as published", "difference": "CLA, concept − reference", "ratio": "CLA, concept ÷ reference"}
ABLATIONS = ("zero", "mean")
N_FIND, N_REFERENCE, N_OTHERS = 16, 32, 120


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "imagenet-sample")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--draws", type=int, default=3)
    options = arguments.parse_args()
    started = time.time()
    spec = load_model("lite0")
    find, dogs, reference, others = image_sets(options.data, options.seed)
    found = attribute(spec, find, reference=reference, progress=True)
    spec.model.to(memory_format=torch.channels_last)  # halves the time of forward passes; same numbers to rounding
    half = len(found.layers) // 2
    places = {"early": found.layers[:half], "late": found.layers[half:]}
    statistics = measure(spec, reference, found.layers, n_samples=0, progress=True)
    rows = []
    for place, layers in places.items():
        for size in SIZES:
            for ablation in ABLATIONS:
                compared = compare(spec, found.between(layers), size, ablation, statistics, dogs, others, options)
                rows += [{**row, "layers": place, "size": size, "ablation": ablation} for row in compared]
                print(f"{time.time() - started:5.0f} s  {place} {size:.0%} {ablation}", flush=True)
    report = {"seed": options.seed, "n_find": N_FIND, "n_reference": N_REFERENCE, "draws": options.draws,
              "layers": {place: list(layers) for place, layers in places.items()}, "rows": rows}  # fmt: skip
    (ROOT / "docs" / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_tables(report, ROOT / "docs" / "results.md")


def image_sets(data: Path, seed: int):
    """Dogs to find with, dogs to test, reference to find with, others to test: all disjoint."""
    dogs = set(json.loads((data / "groups.json").read_text())["dog"])
    rest = [path for path in sorted(data.glob("*.jpg")) if path.name not in dogs]
    find, test = split(open_images([data / name for name in sorted(dogs)]), N_FIND, seed)
    reference, others = split(sample(open_images(rest), N_REFERENCE + N_OTHERS, seed), N_REFERENCE, seed)
    return find, test, reference, others


def compare(spec, found, size, ablation, statistics, dogs, others, options) -> list[dict]:
    """One row for each way of choosing the units: the fall of dogs and of others, and selectivity."""
    circuits = {title: select(found.contrast(how), size, bound_steps=20) for how, title in CONTRASTS.items()}
    first, *more = circuits
    evaluation = evaluate(
        spec, circuits[first], dogs, others, attributions=found, rivals={name: circuits[name] for name in more},
        ablation=ablation, reference=statistics, draws=options.draws, unit_fractions=(), edge_fractions=(),
        batch_size=32, seed=options.seed,
    ).data  # fmt: skip
    shared = {
        "baseline": [evaluation["baseline"][images]["accuracy"]["value"] for images in ("concept", "others")],
        "n": [evaluation["images"][images]["n"] for images in ("concept", "others")],
    }
    return [
        {
            "name": first if entry["name"] == "circuit" else entry["name"],
            "n_units": entry["n_units"],
            "dogs": entry["concept"]["accuracy"],
            "others": entry["others"]["accuracy"],
            "selectivity": entry["selectivity"],
            **shared,
        }
        for entry in evaluation["circuits"]
    ]


def write_tables(report: dict, path: Path) -> None:
    """Replace what stands between the two marks of the page by the tables of this run."""
    rows = report["rows"]
    lines = [
        f"{rows[0]['n'][0]} held-out dogs (accuracy {rows[0]['baseline'][0]:.2f} untouched) and {rows[0]['n'][1]} "
        f"others ({rows[0]['baseline'][1]:.2f}); {report['n_find']} dogs and {report['n_reference']} others found the "
        f"circuits; seed {report['seed']}; random is the mean of {report['draws']} draws; brackets are 95 % bootstrap "
        "intervals over images. Each cell: **selectivity** [interval], then accuracy of dogs / others after removal.",
    ]
    names = sorted(dict.fromkeys(row["name"] for row in rows), key=lambda name: not name.startswith("CLA"))
    for place, layers in report["layers"].items():
        for ablation in ABLATIONS:
            lines += ["", f"### {place.capitalize()} layers (`{layers[0]}` to `{layers[-1]}`), {ablation} ablation", ""]
            lines += ["| units chosen by | " + " | ".join(f"{size:.0%} of units" for size in SIZES) + " |"]
            lines += ["|---" * (len(SIZES) + 1) + "|"]
            for name in names:
                cells = [_cell(rows, name, place, size, ablation) for size in SIZES]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = path.read_text(encoding="utf-8")
    marks = r"(<!-- tables: begin -->\n).*(<!-- tables: end -->)"
    path.write_text(re.sub(marks, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.S), encoding="utf-8")


def _cell(rows: list[dict], name: str, place: str, size: float, ablation: str) -> str:
    (row,) = (r for r in rows if (r["name"], r["layers"], r["size"], r["ablation"]) == (name, place, size, ablation))
    share = row["selectivity"]
    interval = f"[{share['low']:.2f}, {share['high']:.2f}]"
    return f"**{share['value']:.2f}** {interval} {row['dogs']['value']:.2f} / {row['others']['value']:.2f}"


if __name__ == "__main__":
    main()
