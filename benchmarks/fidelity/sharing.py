"""What methods of one job share: cross-layer attribution, relevance, the path of removal.

Each method is told to have cost what it would have cost alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any
from unittest.mock import patch

from torch import Tensor

from viscircuits.matrices import Attributions
from viscircuits.methods import METHODS, anchored, cross_layer, relp_anchored
from viscircuits.methods.removing import Removal, Removing
from viscircuits.task import Finding, Task


@dataclass
class Shared:
    """What sharing saved: seconds that belong to the method now running too."""

    seconds: float = 0.0
    attributions: dict[Hashable, tuple[Attributions, float]] = field(default_factory=dict)
    relevances: dict[Hashable, Finding] = field(default_factory=dict)
    paths: dict[Hashable, Walked] = field(default_factory=dict)


class Walked:
    """A path of removal that is walked once; whoever asks again is told what it found, and what it cost."""

    def __init__(self, task: Task, removal: Removal) -> None:
        begun = time.perf_counter()
        before = task.passes.forward, task.passes.backward
        self.removing = Removing(task, removal)
        self.removing.walk(progress=False)
        self.forward, self.backward = task.passes.forward - before[0], task.passes.backward - before[1]
        self.seconds = time.perf_counter() - begun

    def walk(self, progress: bool) -> None:
        """Done."""

    def ranks(self) -> dict[str, Tensor]:
        return self.removing.ranks()

    def effects_of_removal(self) -> dict[str, Tensor]:
        return self.removing.effects_of_removal()


@contextmanager
def sharing() -> Iterator[Shared]:
    """Let methods share what they have in common, the last that was asked for of each kind."""
    shared = Shared()
    relevance = partial(_relevance, shared, relp_anchored.relp_difference)
    with (
        patch.object(cross_layer, "attribute", partial(_attribution, shared, cross_layer.attribute)),
        patch.object(relp_anchored, "relp_difference", relevance),
        patch.dict(METHODS, {"relp-difference": relevance}),
        patch.object(relp_anchored, "Removing", partial(_path, shared)),
        patch.object(anchored, "Removing", partial(_path, shared)),
    ):
        yield shared


def _attribution(
    shared: Shared, plain: Callable, spec: Any, images: Tensor, layers: Sequence[str], *, reference: Any, **options: Any
) -> Attributions:
    mark = (tuple(layers), _mark(images), reference is not None)
    if reference is None and (*mark[:-1], True) in shared.attributions:
        mark = (*mark[:-1], True)
    if mark in shared.attributions:
        found, seconds = shared.attributions[mark]
        shared.seconds += seconds
        return found
    begun = time.perf_counter()
    found = plain(spec, images, layers, reference=reference, **options)
    _keep(shared.attributions, mark, (found, time.perf_counter() - begun))
    return found


def _relevance(shared: Shared, alone: Callable[..., Finding], task: Task, **options: Any) -> Finding:
    """A finding says what it cost, whoever asked for it first."""
    asked = signature(alone).bind(task, **options)
    asked.apply_defaults()
    mark = (_asked(task), tuple((name, value) for name, value in asked.kwargs.items() if name != "progress"))
    if mark not in shared.relevances:
        _keep(shared.relevances, mark, alone(task, **options))
    return shared.relevances[mark]


def _path(shared: Shared, task: Task, removal: Removal) -> Walked:
    mark = (_asked(task), removal)
    if mark not in shared.paths:
        _keep(shared.paths, mark, Walked(task, removal))
    else:
        known = shared.paths[mark]
        task.passes.forward += known.forward
        task.passes.backward += known.backward
        shared.seconds += known.seconds
    return shared.paths[mark]


def _asked(task: Task) -> Hashable:
    """What decides an answer."""
    return task.addresses, _mark(task.concept), _mark(task.reference), task.behaviour, task.ablation, task.seed


def _mark(images: Tensor) -> Hashable:
    return len(images), images.double().sum().item()


def _keep(known: dict[Hashable, Any], mark: Hashable, found: Any) -> None:
    known.clear()
    known[mark] = found
