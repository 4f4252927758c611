"""How far scores agree with removing units and edges one at a time, on pretrained networks.

On planted networks everything is removed (`fidelity.planted`). Here a sample of units and of edges of the last four
layers is, by mean ablation on sixteen photographs of dogs; every score is compared on that sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fidelity import photographs
from fidelity.halfway import remembering
from fidelity.photographs import Photographs
from fidelity.planted import correlated
from fidelity.removal import BEHAVIOUR
from fidelity.roster import ORACLE, Contender, attempted
from fidelity.sharing import sharing
from fidelity.store import Entry, Work, digest_of
from viscircuits.ablation import ablate
from viscircuits.circuit import Circuit, Unit
from viscircuits.hooks import activations, evaluating, forward, rewrite
from viscircuits.prefix import Prefix
from viscircuits.task import Finding, Task, make_task

FORMAT = 2
GROUP, N_IMAGES, N_REFERENCE, N_LAYERS, N_UNITS, N_EDGES = "dog", 16, 64, 4, 60, 60


@dataclass(frozen=True)
class Job:
    """One pretrained network, by every method."""

    network: str
    contenders: tuple[Contender, ...]
    cache: Path

    @property
    def name(self) -> str:
        return f"agreement/{self.network}"

    def wanted(self) -> dict[str, str]:
        """Key → digest of each cell, that of the removals first."""
        drawn_from = (photographs.N_REFERENCE, photographs.N_OTHERS)
        settings = (FORMAT, BEHAVIOUR, GROUP, N_IMAGES, N_REFERENCE, drawn_from, N_LAYERS, N_UNITS, N_EDGES)
        oracle = {f"{self.name}/{ORACLE}": digest_of(*settings)}
        return oracle | {f"{self.name}/{each.title}": each.digest(*settings) for each in self.contenders}

    def run(self, work: Work) -> None:
        """Remove the sample, then compare what is not compared yet."""
        cells = work.cells(self.name, self.wanted())
        if cells.complete:
            return
        shown = photographs.load(self.network, "groups", GROUP, self.cache)
        task = task_of(shown)
        sample = drawn(task)
        with remembering(shown.spec.model, shown.prefix), sharing():
            oracle = f"{self.name}/{ORACLE}"
            exact = cells.known.get(oracle, {}).get("scores")
            if exact is None:
                exact = removed(task, *sample)
                cells.keep(oracle, {"network": self.network, "method": ORACLE, "scores": exact})
            for contender in self.contenders:
                key = f"{self.name}/{contender.title}"
                if key not in cells.known:
                    entry = self._entry(task, contender, sample, exact)
                    cells.keep(key, {"network": self.network, "method": contender.title, **entry})

    @staticmethod
    def _entry(task: Task, contender: Contender, sample: Sample, exact: dict[str, list[float]]) -> Entry:
        found = attempted(contender, task)
        if isinstance(found, str):
            return {"reason": found}
        mine = sampled(found, *sample)
        agreement = {part: correlated(mine[part], exact[part]) for part in ("units", "edges")}
        return {"agreement": agreement, "passes": asdict(found.passes)}


Sample = tuple[list[Unit], list[tuple[Unit, Unit]]]


def task_of(shown: Photographs) -> Task:
    """A few photographs at the last layers."""
    concept, reference = (
        [each[:n] for each in part] for part, n in ((shown.concept, N_IMAGES), (shown.reference, N_REFERENCE))
    )
    return make_task(
        shown.spec, shown.layers[-N_LAYERS:], concept[0], reference[0], concept_labels=concept[1],
        reference_labels=reference[1], behaviour=BEHAVIOUR,
    )  # fmt: skip


def drawn(task: Task, seed: int = 0) -> Sample:
    """As many units of every layer, and edges of every pair of adjacent ones, without repetition."""
    generator = torch.Generator().manual_seed(seed)
    units: list[Unit] = []
    for layer in task.layers:
        chosen = torch.randperm(layer.n_units, generator=generator)[: N_UNITS // len(task.layers)]
        units += [Unit(layer.address, i) for i in sorted(chosen.tolist())]
    edges: list[tuple[Unit, Unit]] = []
    for source, target in task.pairs:
        n = source.n_units * target.n_units
        places = sorted(torch.randperm(n, generator=generator)[: N_EDGES // len(task.pairs)].tolist())
        ends = [divmod(place, source.n_units) for place in places]  # of rows that are targets
        edges += [(Unit(source.address, j), Unit(target.address, i)) for i, j in ends]
    return units, edges


def removed(task: Task, units: Sequence[Unit], edges: Sequence[tuple[Unit, Unit]]) -> dict[str, list[float]]:
    """Size of the mean effect of removing each of these alone; what comes before the first layer is run once."""
    model, places = task.spec.model, range(len(task.concept))
    prefix = Prefix(model, task.addresses, task.concept, len(task.concept))
    axes = {layer.address: layer.unit_axis for layer in task.layers}

    def without(unit: Unit) -> AbstractContextManager[None]:
        alone = Circuit({unit.layer: (unit.index,)}, {unit.layer: task.widths[unit.layer]})
        return ablate(model, alone, task.ablation, reference=task.statistics)

    def behaviour() -> Tensor:
        with prefix.replay(places) as images:
            return task.judge(forward(model, images), task.concept_labels).double()

    def without_edge(source: Unit, target: Unit) -> Tensor:
        with without(source), prefix.replay(places) as images:
            new = activations(model, [target.layer], images)[target.layer]

        def only_target(true: Tensor) -> Tensor:
            changed = true.clone()
            changed.select(axes[target.layer], target.index).copy_(new.select(axes[target.layer], target.index))
            return changed

        with rewrite(model, {target.layer: only_target}):
            return behaviour()

    found: dict[str, list[float]] = {"units": [], "edges": []}
    with evaluating(model), torch.no_grad():
        full = behaviour()
        for unit in units:
            with without(unit):
                found["units"].append(abs((full - behaviour()).mean().item()))
        for source, target in edges:
            found["edges"].append(abs((full - without_edge(source, target)).mean().item()))
    return found


def sampled(found: Finding, units: Sequence[Unit], edges: Sequence[tuple[Unit, Unit]]) -> dict[str, list[float]]:
    """A finding's scores of the sample; no edges where it has none."""
    of_units = [found.units[unit.layer][unit.index].item() for unit in units]
    if not all((source.layer, target.layer) in found.edges for source, target in edges):
        return {"units": of_units, "edges": []}
    of_edges = [found.edges[m.layer, n.layer][n.index, m.index].item() for m, n in edges]
    return {"units": of_units, "edges": of_edges}
