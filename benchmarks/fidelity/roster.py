"""Which methods take part in what, with which options, and why some do not.

A method that is entered in `viscircuits.methods.METHODS` takes part everywhere with its own defaults; only what
departs from that stands here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fidelity.store import digest_of, source_of
from viscircuits.errors import ViscircuitsError
from viscircuits.methods import METHODS, find
from viscircuits.task import Finding, Task

RECOMMENDED, REMOVER = "anchored", "relp-anchored"  # for what computes something, and for what only it needs
AGAINST, ORACLE = "activation-difference", "exact"
OURS = (  # failure is an error
    "anchored", "relp-anchored", "relp-difference", "cla", "cla-difference", "cla-ratio", "cla-anchored",
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A row of the tables: a method with options."""

    title: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    share: str | None = None  # of units between layers, if not the method's own

    @property
    def is_ours(self) -> bool:
        return self.method in OURS

    def digest(self, *more: Any) -> str:
        """Of all that decides its numbers, but for what every method shares."""
        module = METHODS[self.method].__module__
        package = "viscircuits.methods" if module.startswith("viscircuits.methods.") else module.rpartition(".")[0]
        shared = () if self.share is None else (self.share,)
        return digest_of(self.method, dict(self.options), source_of(module, package), *shared, *more)

    def find(self, task: Task) -> Finding:
        found = find(task, self.method, **self.options)
        return found if self.share is None else replace(found, share=self.share)


# ------------------------------------------------------------------ planted networks, agreement

PLANTED_OPTIONS: dict[str, dict[str, Any]] = {"exact": {"edges": True}}
PLANTED_MORE = [  # one price and fewer steps: a gate for each edge is dear to train
    Contender("masks on edges", "masks", {"edges": True, "prices": [0.3], "steps": 40})
]
QUICK_LEAVES_OUT = ("masks", "acdc", "acdc-behaviour")

AGREEMENT_OPTIONS: dict[str, dict[str, Any]] = {"relp": {"edges": False}}  # minutes, for each target's own pass
# what agreement on a pretrained network cannot wait for, 16 photographs and 60 sampled units
AGREEMENT_LEAVES_OUT = {
    "gcc": "a forward pass for each unit: 1800 or 3500 units × 16 photographs, some 5 minutes on Lite0",
    "acdc": "a forward pass for each edge and threshold: 3.4 million edges on Lite0",
    "acdc-behaviour": "as acdc",
    "masks": "180 steps over the whole network forward and back, some 6 minutes",
}

# ------------------------------------------------------------------ removal from pretrained networks

REMOVAL_OPTIONS: dict[str, dict[str, Any]] = {
    "attribution-patching": {"edges": False},
    "eap-ig": {"edges": False},
    "relp": {"edges": False},
    "anchored": {"protect": 1.0, "edges": False},
}
REMOVAL_MORE = [  # the control with its units shared out between layers as the remover's are
    Contender(f"{AGAINST} half", AGAINST, share="half")
]
REMOVAL_LEAVES_OUT = {
    "exact": "a forward pass for each unit: 7 104 units × up to 63 photographs, some 50 minutes a circuit",
    "eap": "a backward pass for each target where attribution patching of units, its sum, needs one in all",
    "gcc": "a forward pass for each unit, as exact",
    "acdc": "a forward pass for each edge and threshold: 5.6 million edges on Lite0, months",
    "acdc-behaviour": "as acdc",
    "masks": "180 steps over the whole network forward and back, some 15 minutes a circuit",
}
FEWER = {  # concept and reference images: a backward pass for each target is dear
    "cla": (16, 32),
    "cla-difference": (16, 32),
    "cla-ratio": (16, 32),
    "cla-anchored": (16, 32),
}

BLIND = {  # to what a removed value becomes: found once, whatever the ablation
    "cla", "cla-difference", "cla-ratio", "snip", "actgrad",
    "activation", "activation-difference", "weight-norm", "random",
}  # fmt: skip


def of_planted(only: Sequence[str] | None, *, quick: bool = False) -> list[Contender]:
    """Who takes part on planted networks."""
    everyone = [Contender(name, name, PLANTED_OPTIONS.get(name, {})) for name in METHODS] + PLANTED_MORE
    return [each for each in _chosen(everyone, only) if not quick or each.method not in QUICK_LEAVES_OUT]


def of_agreement(only: Sequence[str] | None) -> list[Contender]:
    """Whose scores are set beside removal one at a time on pretrained networks."""
    left = {ORACLE, *AGREEMENT_LEAVES_OUT}
    return _chosen(
        [Contender(name, name, AGREEMENT_OPTIONS.get(name, {})) for name in METHODS if name not in left], only
    )


def of_removal(only: Sequence[str] | None, *, dear: bool = False) -> list[Contender]:
    """Whose circuits are removed from pretrained networks, with `dear` all."""
    names = [name for name in METHODS if dear or name not in REMOVAL_LEAVES_OUT]
    return _chosen([Contender(name, name, REMOVAL_OPTIONS.get(name, {})) for name in names] + REMOVAL_MORE, only)


def _chosen(everyone: list[Contender], only: Sequence[str] | None) -> list[Contender]:
    return [each for each in everyone if only is None or each.title in only or each.method in only]


def attempted(contender: Contender, task: Task) -> Finding | str:
    """The finding, or why there is none; what goes wrong in a method of ours is raised."""
    try:
        return contender.find(task)
    except ViscircuitsError as error:
        if contender.is_ours:
            raise
        return str(error)
