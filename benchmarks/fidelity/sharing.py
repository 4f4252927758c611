"""What methods of one job share: cross-layer attribution, relevance, the path of removal, activity.

What is known of single images is kept for all folds, whose reference is the same. Each method is told to have cost
what it would have cost alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any
from unittest.mock import patch

from torch import Tensor

from viscircuits.matrices import Attributions
from viscircuits.methods import METHODS, anchored, controls, cross_layer, relevance, relp_anchored
from viscircuits.methods.removing import Removal, Removing
from viscircuits.task import Finding, Passes, Task


@dataclass
class Shared:
    """What sharing saved: seconds that belong to the method now running too."""

    seconds: float = 0.0
    attributions: dict[Hashable, tuple[Attributions, float]] = field(default_factory=dict)
    relevances: dict[Hashable, Finding] = field(default_factory=dict)
    paths: dict[Hashable, Walked] = field(default_factory=dict)
    measured: dict[Hashable, tuple[Any, Passes, float]] = field(default_factory=dict)  # of images, whoever asks
    rules: Hashable = None  # of the relevance that is being found

    def once(self, task: Task, mark: Hashable, measure: Callable[[], Any]) -> Any:
        """What was measured before, or now, with what it cost."""
        if mark not in self.measured:
            begun, before = time.perf_counter(), replace(task.passes)
            found = measure()
            spent = Passes(task.passes.forward - before.forward, task.passes.backward - before.backward)
            self.measured[mark] = found, spent, time.perf_counter() - begun
            return found
        found, spent, seconds = self.measured[mark]
        task.passes.add(spent)
        self.seconds += seconds
        return found


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
    looked = partial(_relevance, shared, relp_anchored.relp_difference)
    with (
        patch.object(cross_layer, "attribute", partial(_attribution, shared, cross_layer.attribute)),
        patch.object(relp_anchored, "relp_difference", looked),
        patch.dict(METHODS, {"relp-difference": looked}),
        patch.object(relevance, "_of_images", partial(_relevance_of_images, shared, relevance._of_images)),
        patch.object(controls, "_measured", partial(_activity, shared, controls._measured)),
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
    chosen = tuple((name, value) for name, value in asked.kwargs.items() if name != "progress")
    mark = (_asked(task), chosen)
    if mark not in shared.relevances:
        shared.rules, before = chosen, shared.seconds
        found = alone(task, **options)
        found.passes.seconds += shared.seconds - before
        shared.seconds = before
        _keep(shared.relevances, mark, found)
    return shared.relevances[mark]


def _relevance_of_images(shared: Shared, alone: Callable, task: Task, images: Tensor, labels: Tensor) -> Any:
    mark = ("relevance", shared.rules, _settings(task), _mark(images), tuple(labels.tolist()))
    return shared.once(task, mark, partial(alone, task, images, labels))


def _activity(shared: Shared, alone: Callable, task: Task, which: str, run: bool) -> Any:
    images = task.concept if which == "concept" else task.reference
    mark = ("activity", run, _settings(task), _mark(images))
    return shared.once(task, mark, partial(alone, task, which, run))


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
    return _settings(task), _mark(task.concept), _mark(task.reference), task.seed


def _settings(task: Task) -> Hashable:
    """The same but for the images: what a job's tasks have in common is its network and its reference's mean."""
    return task.addresses, task.behaviour, task.ablation


def _mark(images: Tensor) -> Hashable:
    return len(images), images.double().sum().item()


def _keep(known: dict[Hashable, Any], mark: Hashable, found: Any) -> None:
    known.clear()
    known[mark] = found
