"""Every method on every planted network: how near its ranking comes to the circuit that is known.

A cell is one method on one network of one size and seed. Scores are compared with the truth pooled over layers
(a score that is not on one scale over layers pays for it), and layer by layer.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import viscircuits.planted
from fidelity.roster import ORACLE, Contender, attempted
from fidelity.store import Entry, Work, digest_of, source_of
from viscircuits.metrics import auroc, pearson, precision_recall, spearman
from viscircuits.planted import PLANTED, Planted, plant
from viscircuits.task import Finding

FORMAT = 1
SIZES: dict[str, dict[str, Any]] = {"small": {}, "large": {"n_decoys": 8}}  # large where a builder knows the option
FIRST_SEED = 3  # the weights of `anchored`'s paths were chosen on the seeds before
SEEDS_OF_LARGE = 1


@dataclass(frozen=True)
class Job:
    """One planted network of one size and seed, by every method."""

    network: str
    size: str
    seed: int
    contenders: tuple[Contender, ...]

    @property
    def name(self) -> str:
        return f"planted/{self.network}/{self.size}/{self.seed}"

    @property
    def group(self) -> dict[str, Any]:
        return {"network": self.network, "family": PLANTED[self.network].family, "size": self.size, "seed": self.seed}

    def wanted(self) -> dict[str, str]:
        """Key → digest of each cell."""
        module = f"viscircuits.planted.{PLANTED[self.network].room}"
        importlib.import_module(module)
        builder = PLANTED[self.network]
        weights = "" if builder.family == "hand-wired" else _kept_weights()
        source = source_of(module, "viscircuits.planted")
        network = digest_of(FORMAT, source, weights, dict(builder.options), SIZES[self.size])
        return {f"{self.name}/{each.title}": each.digest(network) for each in self.contenders}

    def run(self, work: Work) -> None:
        """Find what is not known yet; the oracle comes first, since others are compared with it."""
        cells = work.cells(self.name, self.wanted())
        if cells.complete:
            return
        planted = plant(self.network, self.seed, **SIZES[self.size])
        exact = cells.known.get(f"{self.name}/{ORACLE}", {}).get("scores")
        for contender in sorted(self.contenders, key=lambda each: each.method != ORACLE):
            key = f"{self.name}/{contender.title}"
            if key in cells.known:
                continue
            found = attempted(contender, planted.task())
            entry = {"reason": found} if isinstance(found, str) else judged(found, planted)
            if contender.method == ORACLE and isinstance(found, Finding):
                exact = scores_of(found)
                entry["scores"] = exact
            elif exact and isinstance(found, Finding):
                entry["agreement"] = agreement(found, exact)
            cells.keep(key, {**self.group, "method": contender.title, **entry})


def jobs(networks: Sequence[str], seeds: int, contenders: Sequence[Contender], sizes: Sequence[str]) -> list[Job]:
    """Every network in every size it comes in, dear ones first."""
    found = []
    for size in sorted(sizes, key=list(SIZES).index, reverse=True):
        for network in networks:
            if size == "small" or _takes(network, SIZES[size]):
                n = seeds if size == "small" else min(seeds, SEEDS_OF_LARGE)
                found += [Job(network, size, seed, tuple(contenders)) for seed in range(FIRST_SEED, FIRST_SEED + n)]
    return found


@cache
def _kept_weights() -> str:
    """Digest of the trained weights that come with the package."""
    folder = Path(viscircuits.planted.__file__).parent / "weights"
    return digest_of({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*")})


def _takes(network: str, options: Mapping[str, Any]) -> bool:
    builder = PLANTED[network]
    function = getattr(importlib.import_module(f"viscircuits.planted.{builder.room}"), builder.function)
    return set(options) <= set(inspect.signature(function).parameters)


# ------------------------------------------------------------------ one finding


def judged(found: Finding, planted: Planted) -> Entry:
    """How near a finding comes to the truth, and what it cost."""
    units = [(found.units[layer], planted.units[layer]) for layer in planted.layers]
    edges = [
        (found.edges[pair].flatten(), truth.flatten()) for pair, truth in planted.edges.items() if pair in found.edges
    ]
    whole = bool(planted.edges) and len(edges) == len(planted.edges)
    entry = {"units": compared(units), "edges": compared(edges) if whole else None, "passes": asdict(found.passes)}
    return entry if whole else {**entry, "reason": "it scores no edges here, or not those of every pair of layers"}


def compared(parts: Sequence[tuple[Tensor, Tensor]]) -> Entry | None:
    """AUROC, and precision and recall at the true size; None where nothing or everything is true.

    At the true size precision and recall are one number. ``auroc_by_part`` is the mean over parts.
    """
    scores = torch.cat([scores.double().cpu() for scores, _ in parts])
    truth = torch.cat([truth.cpu() for _, truth in parts])
    if not 0 < int(truth.sum()) < len(truth):
        return None
    mixed = [(s.double().cpu(), t.cpu()) for s, t in parts if 0 < int(t.sum()) < len(t)]
    precision, recall = precision_recall(scores, truth)
    return {
        "auroc": auroc(scores, truth),
        "auroc_by_part": sum(auroc(s, t) for s, t in mixed) / len(mixed) if mixed else None,
        "precision": precision,
        "recall": recall,
    }


def scores_of(found: Finding) -> dict[str, list[float]]:
    """All scores of a finding, pooled over layers in order."""
    units = torch.cat([each.double().cpu() for each in found.units.values()])
    pairs = [found.edges[pair].double().cpu().flatten() for pair in sorted(found.edges)]
    return {"units": units.tolist(), "edges": torch.cat(pairs).tolist() if pairs else []}


def agreement(found: Finding, exact: Mapping[str, list[float]]) -> Entry:
    """Correlations with the sizes of exact effects; None where there is nothing to correlate."""
    mine = scores_of(found)
    return {part: correlated(mine[part], exact[part]) for part in ("units", "edges")}


def correlated(mine: Sequence[float], exact: Sequence[float]) -> Entry | None:
    """Pearson's and Spearman's correlation, or None if either score is the same for all."""
    if len(mine) != len(exact) or len(set(mine)) < 2 or len(set(exact)) < 2:
        return None
    a, b = (torch.tensor(each, dtype=torch.float64) for each in (mine, exact))
    return {"pearson": pearson(a, b), "spearman": spearman(a, b)}
