"""Circuits of photographed concepts removed from pretrained networks: what is lost of the concept, what of the rest.

A cell is one method on one fold of one concept in one network. Its scores are found once, under mean ablation (or if
asked under each), and circuits of all sizes are cut from them; each is removed under both ablations from photographs
held out. What is kept is which of them are still answered right, so that folds can be pooled and images drawn again.

The cells of the *bound* are found on the very photographs that test them, by a strong search. They say
how far a circuit of that size can get where it need not be carried over to new photographs; they are no results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fidelity import photographs
from fidelity.halfway import remembering
from fidelity.photographs import Fold, Photographs
from fidelity.roster import BLIND, FEWER, RECOMMENDED, Contender, attempted
from fidelity.sharing import sharing
from fidelity.store import Entry, Work
from viscircuits.ablation import Statistics, ablate, measure
from viscircuits.circuit import Circuit
from viscircuits.hooks import evaluating, forward
from viscircuits.task import Finding, Task, make_task

FORMAT = 3  # one more whenever circuits are cut or tested in another way
SIZES = (0.01, 0.02, 0.05, 0.10)
ABLATIONS = ("mean", "zero")
BEHAVIOUR = "logit"  # an answer's rivals are mostly its kin: a difference from them would hide what they share
BOUND, BOUNDED = "bound", ("lite0", photographs.QUICK)  # the networks where the dear search is given the answers


@dataclass(frozen=True)
class Job:
    """One concept in one network, by every method, fold after fold."""

    network: str
    source: str
    concept: str
    contenders: tuple[Contender, ...]
    n_folds: int
    bounded: bool
    cache: Path
    found_under: str = "mean"  # or "each"
    part: str = "removal"
    n_others: int = photographs.N_OTHERS  # beside a group
    sizes: tuple[float, ...] = SIZES

    @property
    def name(self) -> str:
        return f"{self.part}/{self.network}/{self.source}/{self.concept}"

    def key(self, fold: int | str, contender: Contender) -> str:
        return f"{self.name}/{fold}/{contender.title}"

    def wanted(self) -> dict[str, str]:
        """Key → digest of each cell."""
        return {self.key(fold, each): self._digest(each) for fold, each in self._cells()}

    def _cells(self) -> Iterator[tuple[int | str, Contender]]:
        for fold in range(self.n_folds):
            yield from ((fold, each) for each in self.contenders)
        if self.bounded:
            yield from ((BOUND, each) for each in self.contenders if each.method == RECOMMENDED)

    def _digest(self, contender: Contender) -> str:
        numbers = {name: value for name, value in vars(photographs).items() if name.isupper() and not callable(value)}
        settings = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        settings["N_OTHERS"] = self.n_others
        under = "mean" if contender.method in BLIND else self.found_under
        return contender.digest(
            FORMAT, self.n_folds, under, self.sizes, ABLATIONS, BEHAVIOUR, FEWER.get(contender.method), settings
        )

    def run(self, work: Work) -> None:
        """Find and test what is not known yet."""
        cells = work.cells(self.name, self.wanted())
        if cells.complete:
            return
        shown = photographs.load(
            self.network, self.source, self.concept, self.cache, n_folds=self.n_folds, n_others=self.n_others
        )
        with remembering(shown.spec.model, shown.prefix), sharing() as shared:
            testing = Testing(shown, self.sizes)
            for fold, contender in self._cells():
                key = self.key(fold, contender)
                if key in cells.known:
                    continue
                places = self._bound(shown) if fold == BOUND else shown.folds[int(fold)]
                shared.seconds = 0.0
                entry = self._entry(shown, testing, places, contender, bound=fold == BOUND)
                if "passes" in entry:
                    entry["passes"]["seconds"] += shared.seconds
                group = {"network": self.network, "source": self.source, "concept": self.concept, "fold": fold}
                cells.keep(key, {**group, "method": contender.title, **entry})

    def _entry(self, shown: Photographs, testing: Testing, places: Fold, contender: Contender, *, bound: bool) -> Entry:
        """Find under mean ablation, or under each in turn, and test."""
        once = self.found_under == "mean" or contender.method in BLIND
        task = task_of(shown, places, testing.statistics, contender, bound=bound)
        found = {}
        for ablation in ABLATIONS[:1] if once else ABLATIONS:
            finding = attempted(contender, replace(task, ablation=ablation))
            if isinstance(finding, str):
                return {"reason": finding}
            found[ablation] = finding
        return testing.of({ablation: found.get(ablation, found[ABLATIONS[0]]) for ablation in ABLATIONS}, places)

    @staticmethod
    def _bound(shown: Photographs) -> Fold:
        """All photographs of all folds, to be found with and tested."""
        test = tuple(place for fold in shown.folds for place in fold.test)
        return Fold(test, test, tuple(place for fold in shown.folds for place in fold.others))


def task_of(shown: Photographs, places: Fold, statistics: Statistics, contender: Contender, *, bound: bool) -> Task:
    """What a method is asked: fewer photographs where it is dear."""
    n_concept, n_reference = FEWER.get(contender.method, (None, None))
    concept = [part[list(places.find)][:n_concept] for part in shown.concept]
    reference = [part[list(places.others)] for part in shown.others] if bound else shown.reference
    return make_task(
        shown.spec, shown.layers, concept[0], reference[0][:n_reference], concept_labels=concept[1],
        reference_labels=reference[1][:n_reference], behaviour=BEHAVIOUR, ablation="mean", statistics=statistics,
    )  # fmt: skip


class Testing:
    """Removes circuits from held-out photographs."""

    def __init__(self, shown: Photographs, sizes: Sequence[float] = SIZES) -> None:
        self.shown, self.sizes = shown, sizes
        self.n_concept = len(shown.concept[0])
        self.images = torch.cat([shown.concept[0], shown.others[0]])
        self.labels = torch.cat([shown.concept[1], shown.others[1]])
        self.statistics = measure(shown.spec, shown.reference[0], shown.layers, n_samples=0)
        self.full: dict[Fold, dict[str, str]] = {}

    def of(self, found: Mapping[str, Finding], places: Fold) -> Entry:
        """Which photographs of a fold are answered right, whole and with circuits of every size removed.

        Parameters
        ----------
        found
            Ablation → the finding to cut circuits from.
        places
            The fold.
        """
        if places not in self.full:
            self.full[places] = self._right(places, None, "")
        return {
            "full": self.full[places],
            "after": {
                ablation: {str(size): self._right(places, finding.circuit(size), ablation) for size in self.sizes}
                for ablation, finding in found.items()
            },
            "passes": asdict(found[ABLATIONS[0]].passes),
        }

    def _right(self, places: Fold, circuit: Circuit | None, ablation: str) -> dict[str, str]:
        """A digit for each photograph: 1 where the answer is right."""
        where = torch.tensor([*places.test, *(self.n_concept + place for place in places.others)])
        outputs = []
        with evaluating(self.shown.spec.model), torch.no_grad():
            for batch in where.split(photographs.BATCH):
                with self._removing(circuit, ablation):
                    outputs.append(forward(self.shown.spec.model, self.images[batch]).argmax(1))
        digits = "".join(str(int(right)) for right in torch.cat(outputs) == self.labels[where])
        return {"concept": digits[: len(places.test)], "others": digits[len(places.test) :]}

    @contextmanager
    def _removing(self, circuit: Circuit | None, ablation: str) -> Iterator[None]:
        if circuit is None:
            yield
            return
        with ablate(self.shown.spec, circuit, ablation, reference=self.statistics):
            yield


def jobs(
    network: str,
    source: str,
    concepts: Sequence[str],
    contenders: Sequence[Contender],
    cache: Path,
    found_under: str = "mean",
) -> list[Job]:
    """Every concept of a source, its methods in an order in which they can share."""
    ordered = sorted(contenders, key=lambda each: each.method == "cla")  # after its contrasts, whose matrices it shares
    n = photographs.folds_of(network, source)
    bounded = source == "groups" and network in BOUNDED
    return [Job(network, source, concept, tuple(ordered), n, bounded, cache, found_under) for concept in concepts]
