"""Defences against words on photographs: edges of the circuit of text, and what one would try without a circuit.

Simple ones: the zero-shot head fitted anew on attacked photographs; text found by a linear probe on an early layer and
painted over; text painted over where it is known to be, which no finder can beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, interpolate

from viscircuits.ablation import prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.experiments.attacks import BATCH, Outcome, Trial, tell
from viscircuits.experiments.kept import Entry
from viscircuits.hooks import evaluating, forward, record
from viscircuits.models import seeded

if TYPE_CHECKING:
    from viscircuits.experiments.typographic import Setting

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
MEASURED = ("clean", "wrong word", "nonsense word")
PROBE_STEPS, HEAD_STEPS = 300, 300
EDGE_PHOTOGRAPHS = 120


def bits(outcome: Outcome) -> Entry:
    """An outcome as it is kept: a digit for each picture."""
    right, fooled = ("".join("01"[int(value)] for value in values) for values in (outcome.right, outcome.fooled))
    return {"right": right, "fooled": fooled, "copies": outcome.copies}


def of_bits(entry: Entry) -> Outcome:
    """The outcome that was kept."""
    right, fooled = (torch.tensor([bit == "1" for bit in entry[name]]) for name in ("right", "fooled"))
    return Outcome(right, fooled, entry["copies"])


# ------------------------------------------------------------------ edges


def edges(setting: Setting, circuit: Circuit, scores: Any, pair: tuple[str, str]) -> dict[str, Any]:
    """Edges of the circuit between two layers pruned, a fraction at a time, in order of score and in random order."""
    ordered = ranked_edges(circuit, scores, pair)
    order = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(setting.seed)).tolist()
    orders = {"by score": ordered, "random order": [ordered[i] for i in order]}
    trials = {kind: first(setting.trial(kind, "test"), EDGE_PHOTOGRAPHS) for kind in ("clean", "wrong word")}
    found: dict[str, Any] = {"source": pair[0], "target": pair[1], "n": len(ordered), "fractions": list(FRACTIONS)}
    found["before"] = {kind: bits(tell(setting.spec, trial)) for kind, trial in trials.items()}
    for name, sequence in orders.items():
        found[name] = []
        for fraction in FRACTIONS:
            chosen = sequence[: round(fraction * len(sequence))]
            with prune_edges(setting.spec, chosen, "mean", reference=setting.statistics):
                found[name].append({kind: bits(tell(setting.spec, trial)) for kind, trial in trials.items()})
    return found


def edges_everywhere(setting: Setting, circuits: Mapping[str, Circuit]) -> dict[str, Entry]:
    """All edges of each circuit between neighbouring layers pruned at once: their number, and kind → outcome."""
    trials = {kind: first(setting.trial(kind, "test"), EDGE_PHOTOGRAPHS) for kind in ("clean", "wrong word")}
    found = {}
    for name, circuit in circuits.items():
        every = [
            Edge(Unit(source, m), Unit(target, n), 0.0, 0.0)
            for source, target in pairwise(setting.layers)
            for n in circuit.units[target]
            for m in circuit.units[source]
        ]
        with prune_edges(setting.spec, every, "mean", reference=setting.statistics):
            told = {kind: bits(tell(setting.spec, trial)) for kind, trial in trials.items()}
        found[name] = {"n": len(every), **told}
    return found


def ranked_edges(circuit: Circuit, scores: Float[Tensor, "target source"], pair: tuple[str, str]) -> list[Edge]:
    """The edges between a circuit's units of two layers, highest score first."""
    sources, targets = circuit.units[pair[0]], circuit.units[pair[1]]
    found = [
        Edge(Unit(pair[0], m), Unit(pair[1], n), float(scores[n, m]), float(scores[n, m]))
        for n in targets
        for m in sources
    ]
    return sorted(found, key=lambda edge: -edge.score)


def first(trial: Trial, n: int) -> Trial:
    """`n` photographs of a trial, evenly taken, each in its first picture."""
    places = torch.linspace(0, len(trial) // trial.copies - 1, min(n, len(trial) // trial.copies)).long() * trial.copies
    return Trial(trial.images[places], trial.labels[places], trial.written[places])


# ------------------------------------------------------------------ without a circuit


def simple(setting: Setting) -> dict[str, dict[str, Entry]]:
    """Each simple defence on held-out photographs: kind → outcome."""
    trials = {kind: setting.trial(kind, "test") for kind in MEASURED}
    found: dict[str, dict[str, Entry]] = {}
    head = _head(setting)
    found["head fitted on attacked photographs"] = {
        kind: bits(_told_by(head, _features(setting, trial.images), trial)) for kind, trial in trials.items()
    }
    if _has_maps(setting):  # tokens have no places that a probe could paint over
        cover = _Cover(setting)
        found["text found by a probe and painted over"] = {
            kind: bits(tell(setting.spec, cover.of(trial))) for kind, trial in trials.items()
        }
    plain = trials["clean"].images
    found["text painted over where it is known to be"] = {
        kind: bits(
            tell(setting.spec, painted(trial, (trial.images != plain.repeat_interleave(trial.copies, 0)).any(1)))
        )
        for kind, trial in trials.items()
    }
    return found


def _has_maps(setting: Setting) -> bool:
    with evaluating(setting.spec.model), torch.no_grad(), record(setting.spec.model, setting.layers[:1]) as values:
        forward(setting.spec.model, setting.reference[:1])
    return values[setting.layers[0]].ndim == 4


def _features(setting: Setting, images: Tensor) -> Float[Tensor, "image dimension"]:
    """What the head reads: the tower's embeddings."""
    tower = next(iter(setting.spec.model.children()))
    with evaluating(tower), torch.no_grad():
        return torch.cat([forward(tower, part) for part in images.split(BATCH)])


def _head(setting: Setting) -> nn.Linear:
    """A linear head on the frozen tower, fitted on photographs clean and attacked, labelled with what they show."""
    trials = [setting.trial(kind, "find") for kind in MEASURED]
    features = torch.cat([_features(setting, trial.images) for trial in trials])
    labels = torch.cat([trial.labels for trial in trials])
    with seeded(setting.seed):
        head = nn.Linear(features.shape[1], len(setting.to_find.classes))
    mean, spread = features.mean(0), features.std(0) + 1e-6
    _fit(head, lambda: cross_entropy(head((features - mean) / spread), labels), HEAD_STEPS, decay=0.1)
    with torch.no_grad():  # the same map on features as they are
        head.weight.div_(spread)
        head.bias.sub_(head.weight @ mean)
    return head


def _fit(model: nn.Module, loss: Any, steps: int, decay: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def _told_by(head: nn.Linear, features: Tensor, trial: Trial) -> Outcome:
    with torch.no_grad():
        found = head(features).argmax(1)
    return Outcome(found == trial.labels, found == trial.written, trial.copies)


class _Cover:
    """Finds text with a linear probe on an early layer, and paints it over with the picture's mean colour."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.layer = setting.layers[len(setting.layers) // 4]
        plain = setting.trial("clean", "find").images
        values, truth = [], []
        for kind in ("wrong word", "nonsense word", "clean"):
            images = setting.trial(kind, "find").images
            maps = self._maps(images)
            values.append(maps.flatten(2).mT.flatten(0, 1))  # (image · position, unit)
            changed = (images != plain).any(1, keepdim=True).float()
            truth.append((interpolate(changed, maps.shape[-2:], mode="area") > 0.5).flatten().float())
        x, y = torch.cat(values), torch.cat(truth)
        self.mean, self.spread = x.mean(0), x.std(0) + 1e-6
        with seeded(setting.seed):
            self.probe = nn.Linear(x.shape[1], 1)
        x = (x - self.mean) / self.spread
        _fit(self.probe, lambda: binary_cross_entropy_with_logits(self.probe(x)[:, 0], y), PROBE_STEPS, decay=0.01)

    def of(self, trial: Trial) -> Trial:
        maps = self._maps(trial.images)
        x = ((maps.movedim(1, -1) - self.mean) / self.spread).detach()  # (image, row, column, unit)
        with torch.no_grad():
            found = (self.probe(x)[..., 0] > 0).float()[:, None]
        smooth = avg_pool2d(found, 3, 1, 1, count_include_pad=False)  # lone positions are no text
        return painted(trial, interpolate(smooth, trial.images.shape[-2:], mode="bilinear")[:, 0] > 0.5)

    def _maps(self, images: Tensor) -> Float[Tensor, "image unit row column"]:
        found = []
        for part in images.split(BATCH):
            with (
                evaluating(self.setting.spec.model),
                torch.no_grad(),
                record(self.setting.spec.model, [self.layer]) as values,
            ):
                forward(self.setting.spec.model, part)
            found.append(values[self.layer].float())
        return torch.cat(found)


def painted(trial: Trial, where: Bool[Tensor, "image height width"]) -> Trial:
    """The pictures with their mean colour in some places."""
    mean = trial.images.mean((2, 3), keepdim=True)
    return Trial(torch.where(where[:, None], mean, trial.images), trial.labels, trial.written, trial.copies)
