"""Cross-layer attribution over a set of images.

1. Trace the network once to know its layers, and put the chosen ones in execution order.
2. Try each pair of adjacent layers on one image: which engine carries it, and how much memory it takes.
3. Walk over the image set in portions; a worker takes its own and passes over the others'. For each batch run
   the network just far enough to reach the last layer, and score every connection, image by image.
4. Add the scores up (`viscircuits.running`); nothing of a batch outlives it, unless per-image scores are asked for.
5. Every so often write the sums and the place reached to a checkpoint, so that the same call goes on from there.
6. At the end add up the workers' sums, and divide.

The sums are kept in float64 and image by image, so batch size and image order change nothing beyond the rounding of
the network itself.
"""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from viscircuits import workers
from viscircuits.budget import ENGINES, Layout, Scoring, bytes_of, lay_out
from viscircuits.checkpoint import Checkpoint, State
from viscircuits.errors import ImageError, LayerError, ModelError, ViscircuitsError, closest
from viscircuits.hooks import activations, evaluating
from viscircuits.images import Batch, ImageSet, Portion, batches, fingerprint, portions
from viscircuits.layers import Layer
from viscircuits.matrices import Attributions
from viscircuits.models import ModelSpec, as_spec
from viscircuits.running import N_DIGEST as N_DIGEST
from viscircuits.running import Running, poisson_weights
from viscircuits.running import Seen as Seen
from viscircuits.scores.formulas import SCORES, SUMMARIES, choose
from viscircuits.tracing import resolve, trace

Images = ImageSet | Tensor | Iterable[Tensor]
Until = Callable[[Attributions], bool]

SETS = ("concept", "reference")
PORTION = 8  # images that one worker takes at a time, unless a batch holds more
FIRST_LOOK = 8


def attribute(
    model: nn.Module | ModelSpec,
    images: Images,
    layers: Sequence[str] | None = None,
    *,
    reference: Images | None = None,
    targets: Mapping[str, Sequence[int]] | None = None,
    score: str = "cla",
    summary: str = "norm",
    per_image: bool = False,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    memory: int | str | None = None,
    batch_size: int | None = None,
    draws: int = 0,
    seed: int = 0,
    until: Until | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: int | float = 60.0,
    finish: Callable[[Attributions], object] | None = None,
    progress: bool = False,
) -> Attributions:
    """How much each unit contributes to each unit of the next layer, averaged over images.

    With the defaults this is the paper's score `‖A_m‖₂ · ‖∂‖A_n‖₂/∂A_m‖₂`, taken per image and
    then averaged. The network is run in evaluation mode and left as it was found. Under `torchrun`
    the workers share the images, and all return the same.

    Parameters
    ----------
    model
        A network, or a `ModelSpec` (which also knows its transform and default layers).
    images
        The concept: an image set, or a tensor of shape (image, channel, height, width), already
        transformed, or an iterable of such tensors.
    layers
        Addresses, in any order; by default the network's post-activation layers.
    reference
        Images to set the concept against. They are scored in the same way and kept in
        `Attributions.reference`; `Attributions.contrast` combines the two.
    targets
        Layer → the target units wanted there; only these are computed, the other rows are NaN. Layers that
        are not named are computed in full.
    score
        ``cla``, ``grad-x-act``, ``signed`` or ``gradient``.
    summary
        What a target's map is summed up in before the gradient: ``norm``, ``mean``, ``sum``, ``max``.
    per_image
        Keep the scores of each image as well (images × targets × sources numbers a pair).
    engine
        ``loop`` takes one backward pass a target; ``structured`` uses what the network's structure
        allows and gives the same numbers (see `viscircuits.scores.structured`); ``auto`` takes
        ``structured`` wherever it can.
    dtype
        Of the structured engine's dense work, such as ``torch.bfloat16``; by default the network's own.
    memory
        What may be allocated beyond libraries and network: bytes, or a text such as ``512M`` or ``2G``.
    batch_size
        Images per forward pass. Changes speed and memory, not the result. By default 1 where the structured
        engine carries everything, else 8; fewer, if `memory` asks for it.
    draws
        How many bootstrap replicates to keep: averages in which each image counts Poisson(1) times.
    seed
        Of the replicates.
    until
        Called on what is known after 8, 12, 18, 27, … images of each set; True is enough. It may have ``state`` and
        ``restore``, plain data that a checkpoint keeps.
    checkpoint
        A folder for the sums of an unfinished run. If it holds some, the run goes on from there; it is deleted at the
        end. All workers need the same one.
    checkpoint_seconds
        Time between two checkpoints.
    finish
        Called with the result by the first worker before the checkpoint is deleted: the place to save it.
    progress
        Show a progress bar with the time left.

    Returns
    -------
    Attributions
        One matrix for each pair of adjacent layers, rows targets, columns sources.

    Raises
    ------
    LayerError
        If a layer does not exist, holds no units, or does not feed the next one.
    ImageError
        If there are no images, or their folder vanishes.
    ModelError
        If the network cannot run on the images or its gradients are not finite.
    CheckpointError
        If the checkpoint is of another run; the message says what differs.
    ViscircuitsError
        If an option is not possible, the memory is too little, or another worker died.

    References
    ----------
    Rajaram et al. 2023, arXiv:2404.14349.
    """
    spec = as_spec(model)
    formulas = choose(SCORES, score, "score"), choose(SUMMARIES, summary, "summary")
    engines = choose(ENGINES, engine, "engine")
    budget = bytes_of(memory)
    _check_numbers(batch_size, draws, seed, dtype)
    sets = {what: each for what, each in zip(SETS, (images, reference), strict=True) if each is not None}
    _refuse_iterators(*sets.values())
    chain = find_layers(spec, images, layers)
    scoring = Scoring(chain, *formulas, _rows_asked(chain, targets), engines, dtype)
    options = {"score": score, "summary": summary, "layers": [layer.address for layer in chain]}
    if dtype is not None:
        options["dtype"] = str(dtype).removeprefix("torch.")
    team = workers.team()
    kept = None
    if checkpoint is not None:
        made_of = {
            **what_ran(spec), **options, "engine": engine, "targets": _written_rows(targets), "per_image": per_image,
            "memory": budget, "batch_size": batch_size, "draws": draws, "seed": seed, "until": _rule_of(until),
            **{f"{what} images": fingerprint(each) for what, each in sets.items()},
        }  # fmt: skip
        kept = Checkpoint(Path(checkpoint), made_of, versions(), checkpoint_seconds, team.rank, team.size)
    with evaluating(spec.model), torch.inference_mode(False), torch.enable_grad():
        state = _begin(kept, team, list(sets), chain, draws)
        if not state.plan:
            state.plan = team.agree(
                lay_out(
                    spec.model, scoring, next(batches(images, spec.transform, 1)).images,
                    memory=budget, batch_size=batch_size, n_sets=len(sets), n_draws=draws,
                ).state()
            )  # fmt: skip
        run = _Run(spec, sets, scoring, Layout.from_state(state.plan), state, team, kept, per_image, seed, until)
        with _resumable(run), run.bars(progress and team.rank == 0):
            run.walk()
            found = run.results(options)
            if finish is not None and team.rank == 0:
                finish(found)
    if kept is not None:
        team.wait()
        if team.rank == 0:
            kept.remove()
    return found


def find_layers(spec: ModelSpec, images: Images, layers: Sequence[str] | None = None) -> list[Layer]:
    """Describe the layers to use, in execution order: those named, else the network's default ones."""
    first = next(batches(images, spec.transform, 1))  # an empty set is an error there
    traced = trace(spec.model, first.images)
    addresses = layers or spec.layers or traced.default_layers()
    chain = resolve(spec.model, traced, addresses)
    if len(chain) < 2:
        raise LayerError(f"attribution needs at least two layers, got {', '.join(addresses)}")
    return chain


# ------------------------------------------------------------------ what was asked for


def _check_numbers(batch_size: int | None, draws: int, seed: int, dtype: torch.dtype | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ViscircuitsError(f"batch size must be at least 1, got {batch_size}")
    if draws < 0 or seed < 0:
        raise ViscircuitsError(f"draws and seed are whole numbers from 0, got {draws} and {seed}")
    if dtype is not None and not dtype.is_floating_point:
        raise ViscircuitsError(f"dtype must be a floating-point type such as torch.bfloat16, got {dtype}")


def _refuse_iterators(*sets: Images) -> None:
    for images in sets:
        if isinstance(images, Iterator):
            raise ImageError(
                f"a {type(images).__name__} can be read only once, and layers have to be found first; "
                "give a list of tensors or an image set"
            )


def _rows_asked(chain: Sequence[Layer], targets: Mapping[str, Sequence[int]] | None) -> list[Tensor | None]:
    """For each pair the target rows wanted, in order and once each; None for all."""
    targets = targets or {}
    possible = {layer.address: layer.n_units for layer in chain[1:]}
    for layer, rows in targets.items():
        if layer not in possible:
            raise LayerError(
                f"targets are wanted in {layer!r}, which is no target layer here.{closest(layer, possible)} "
                f"There are {', '.join(possible)}."
            )
        wrong = [row for row in rows if not 0 <= row < possible[layer]]
        if wrong or not len(rows):
            given = f"unit {wrong[0]}" if wrong else "no unit"
            raise LayerError(f"targets name {given} of {layer!r}, which has units 0 to {possible[layer] - 1}")
    asked = [targets.get(layer.address) for layer in chain[1:]]
    return [None if rows is None else torch.tensor(sorted(set(rows))) for rows in asked]


def _written_rows(targets: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]] | None:
    return None if targets is None else {layer: sorted({int(row) for row in rows}) for layer, rows in targets.items()}


# ------------------------------------------------------------------ the walk


def _begin(
    kept: Checkpoint | None, team: workers.Team, sets: Sequence[str], chain: Sequence[Layer], n_draws: int
) -> State:
    """Where this worker stands: at the beginning, or where the checkpoint says."""
    fresh = State.fresh(sets, chain, n_draws, team.size)
    if kept is None:
        return fresh
    if team.rank == 0:
        kept.gather(chain)
    team.wait()
    own = kept.load(chain)
    state = own or fresh
    others = [other for other in team.gather(own and own.outline()) if other is not None]
    if own is None and others:
        state.begin_beside(others[0])
    for other in others:
        state.follow(other)
    return state


class _Ahead:
    """Portions of a set, read as far as is asked for."""

    def __init__(self, stream: Iterator[Portion]) -> None:
        self.stream = stream
        self.next = next(stream, None)

    def before(self, end: int | None) -> Iterator[Portion]:
        while self.next is not None and (end is None or self.next.first < end):
            portion, self.next = self.next, None
            yield portion
            del portion
            self.next = next(self.stream, None)


def looks() -> Iterator[int]:
    """How many images of each set have been seen when `until` is asked: half as many more each time."""
    n = FIRST_LOOK
    while True:
        yield n
        n += n // 2


@dataclass
class _Run:
    """One worker's way through the image sets."""

    spec: ModelSpec
    sets: Mapping[str, Images]
    scoring: Scoring
    layout: Layout
    state: State
    team: workers.Team
    kept: Checkpoint | None
    per_image: bool
    seed: int
    until: Until | None
    shown: dict[str, tqdm] = field(default_factory=dict)
    changing: bool = False  # sums and place do not fit together at this moment

    def walk(self) -> None:
        """Add up this worker's portions of every set, looking now and then whether it is enough."""
        if self.until is not None:
            _recall(self.until, self.state.until)
        size = max(PORTION // self.layout.batch_size, 1) * self.layout.batch_size
        alone = self.until is None  # nobody looks before the end
        ahead = {
            what: _Ahead(portions(images, size, () if alone else looks(), by_shard=alone))
            for what, images in self.sets.items()
        }
        for n_looks, end in enumerate([None] if alone else looks()):
            if self.state.stable:
                return
            for what, stream in ahead.items():
                for portion in stream.before(end):
                    if self.team.owns(portion.number) and not self.state.done[what].has(portion.number):
                        self._add_portion(what, portion)
            if self.until is not None and n_looks == len(self.state.looks):
                self._look(self.until)
            if all(stream.next is None for stream in ahead.values()):
                return

    def _add_portion(self, what: str, portion: Portion) -> None:
        sums, done = self.state.sums[what], self.state.done[what]
        begun, steps = done.opened.get(portion.number, (0, 0))
        for n, batch in enumerate(portion.batches(self.spec.transform, self.layout.batch_size)):
            if n >= begun:
                self._add_batch(what, (portion.number, n), batch, steps if n == begun else 0)
        with self._change():
            sums.seen.skip(portion.skipped, portion.first)
            done.close(portion.number)

    def _add_batch(self, what: str, place: tuple[int, int], batch: Batch, first_step: int) -> None:
        """Step 0 adds the images themselves, step i + 1 their scores of pair i."""
        sums, done = self.state.sums[what], self.state.done[what]
        values = activations(self.spec.model, [layer.address for layer in self.scoring.chain], batch.images)
        weights = poisson_weights(self.seed, SETS.index(what), batch.places, sums.n_draws)
        if first_step == 0:
            with self._change():
                sums.begin(batch, values, weights)
                done.step(*place, 1)
        last = len(self.scoring.pairs)
        for step in range(max(first_step, 1), last + 1):
            i = step - 1
            started = time.perf_counter()
            scores, signed = self._scores(what, i, values)
            with self._change():
                sums.add(i, scores, signed, weights)
                sums.sums["seconds"][i] += time.perf_counter() - started
                if self.per_image:
                    sums.keep(i, scores, batch.places)
                done.step(place[0], *((place[1], step + 1) if step < last else (place[1] + 1, 0)))

    def _scores(self, what: str, i: int, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of pair `i` (image, target, source), and signed contributions summed over images."""
        source, target = self.scoring.pairs[i]
        n_images = len(values[source.address])
        scores = torch.zeros(n_images, target.n_units, source.n_units)
        signed = torch.zeros(target.n_units, source.n_units, dtype=torch.float64)
        way = self.state.sums[what].ways[i]

        def note(engine: str, left: set[str]) -> None:
            way.engines.add(engine)
            way.left.update(left)

        rows, chunk = self.scoring.rows[i], self.layout.chunk_bytes
        for targets, block, contributions in self.scoring.blocks(i, values, self.layout.engines[i], rows, chunk, note):
            scores[:, targets] = block.float().cpu()
            signed[targets] = contributions.double().sum(0).cpu()
            self.shown[what].update(n_images * len(targets))
        if not torch.isfinite(scores).all():
            raise ModelError(
                f"the attribution from {source.address!r} to {target.address!r} is not finite "
                f"({values[source.address].dtype}); run the network in float32, or look for NaN in its weights"
            )
        return scores, signed

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Change sums and place together, and write a checkpoint afterwards if it is time."""
        self.changing = True
        yield
        self.changing = False
        if self.kept is not None and self.kept.due:
            self.kept.save(self.state)

    # -------------------------------------------------------------- what is known so far

    def _look(self, until: Until) -> None:
        """Ask whether what all workers have so far is enough."""
        self._meet()
        together = {what: self._together(sums.copy()) for what, sums in self.state.sums.items()}
        stable = False
        if all(sums.n_images for sums in together.values()):
            stable = self.team.agree(bool(until(self._attributions(together, {}, last=False))))
        with self._change():
            self.state.looks.append(together[SETS[0]].n_images)
            self.state.stable, self.state.until = stable, _remembered(until)

    def _meet(self, *, last: bool = False) -> None:
        """Wait for the others; nobody goes on before all have written how far they are."""
        if self.kept is not None and (last or self.team.size > 1):
            self.kept.save(self.state)
        self.team.wait()

    def results(self, options: dict[str, Any]) -> Attributions:
        """The averages over all images of all workers; what they are made from stays until they are saved."""
        self._meet(last=True)
        self.changing = True  # from here on the sums are not this worker's own
        together = {what: self._together(sums) for what, sums in self.state.sums.items()}
        for what, sums in together.items():
            if not sums.n_images:
                raise ImageError(_why_empty(self.sets[what], sums.seen))
        return self._attributions(together, options, last=True)

    def _together(self, sums: Running) -> Running:
        if self.team.size == 1:
            return sums
        sums.seen.forget_if_many(sum(self.team.gather(sums.n_images)))
        for name in sorted(sums.sums):  # sums that came from a file are in another order
            self.team.add_up(sums.sums[name])
        for rank, other in enumerate(self.team.gather(sums.lists())):
            if rank != self.team.rank:
                sums.merge_lists(other)
        return sums

    def _attributions(self, together: Mapping[str, Running], options: dict[str, Any], *, last: bool) -> Attributions:
        concept, *others = (self._averages(what, sums, options, last) for what, sums in together.items())
        if not others:
            return concept
        provenance = {**concept.provenance, "reference": others[0].provenance["images"]}
        return replace(concept, provenance=provenance, reference=others[0])

    def _averages(self, what: str, sums: Running, options: dict[str, Any], last: bool) -> Attributions:
        rows = self.scoring.rows
        matrices = tuple(sums.matrix(i, rows[i], last=last) for i in range(len(rows)))
        provenance = {
            **what_ran(self.spec),
            **options,
            **self._how(sums),
            "images": sums.seen.describe(self.sets[what]),
            "versions": versions(),
        }
        return Attributions(matrices, sums.activity(), sums.n_images, provenance)

    def _how(self, sums: Running) -> dict[str, Any]:
        """What a result says about how it was computed."""
        how: dict[str, Any] = {
            "engines": [
                {
                    "source": source.address,
                    "target": target.address,
                    "engine": ", ".join(sorted(way.engines)),
                    "left": sorted(way.left),
                    "seconds": round(seconds, 3),
                }
                for (source, target), way, seconds in zip(
                    self.scoring.pairs, sums.ways, sums.sums["seconds"].tolist(), strict=True
                )
            ]
        }
        if sums.n_draws:
            how["bootstrap"] = {"draws": sums.n_draws, "seed": self.seed}
        asked = {
            target.address: rows.tolist()
            for (_, target), rows in zip(self.scoring.pairs, self.scoring.rows, strict=True)
            if rows is not None
        }
        if asked:
            how["targets"] = asked
        if self.until is not None:
            at = self.state.looks[-1] if self.state.looks else 0
            how["stopped"] = {"looks": self.state.looks, "at": at, "stable": self.state.stable}
        return how

    # -------------------------------------------------------------- showing and stopping

    @contextmanager
    def bars(self, show: bool) -> Iterator[None]:
        """Progress over images × targets, shown only if the work takes more than two seconds."""
        rows = sum(self.scoring.n_rows)
        for what, images in self.sets.items():
            count = (
                len(images) if isinstance(images, Tensor) else images.count if isinstance(images, ImageSet) else None
            )
            self.shown[what] = tqdm(
                total=None if count is None else -(-count // self.team.size) * rows,
                initial=self._rows_done(what),
                desc=f"attribution, {what}", unit="row", unit_scale=True, delay=2, disable=not show,
            )  # fmt: skip
        try:
            yield
        finally:
            for bar in self.shown.values():
                bar.close()

    def _rows_done(self, what: str) -> int:
        """Images × targets that a checkpoint brought, without those of a batch's pairs still to come."""
        rows = self.scoring.n_rows
        begun = [step for _, step in self.state.done[what].opened.values() if step]
        missing = sum(self.layout.batch_size * sum(rows[step - 1 :]) for step in begun)
        return max(0, self.state.sums[what].n_images * sum(rows) - missing) // self.team.size

    def stop(self) -> bool:
        """Write a checkpoint on the way out; whether there is anything to go on from."""
        if self.kept is None:
            return False
        if not self.changing and any(done.begun for done in self.state.done.values()):
            self.kept.save(self.state)
        return self.kept.path.exists()


class _Stopped(BaseException):
    """The process was asked to end."""


@contextmanager
def _resumable(run: _Run) -> Iterator[None]:
    """Whatever ends the run before its time, keep what was done, and say how to go on."""
    if run.kept is None:
        yield
        return
    advice = f"What was done is kept in {str(run.kept.folder)!r}; the same call goes on from there."
    with _terminable() as ignore:
        try:
            yield
        except BaseException as error:
            ignore()
            if run.stop():
                if isinstance(error, (ViscircuitsError, KeyboardInterrupt)):
                    error.args = (f"{str(error) or 'interrupted'}. {advice}",)
                if isinstance(error, _Stopped):
                    raise SystemExit(f"stopped. {advice}") from None
            if isinstance(error, _Stopped):
                raise SystemExit(128 + signal.SIGTERM) from None
            raise


@contextmanager
def _terminable() -> Iterator[Callable[[], Any]]:
    """Turn a request to end (SIGTERM, as torchrun and clusters send it) into an exception; yields how to ignore it."""
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not usual:
        yield lambda: None
        return

    def stop(*_: Any) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _rule_of(until: Until | None) -> Any:
    """What `until` asks for, as a checkpoint can hold it."""
    return until if until is None else json.loads(json.dumps(getattr(until, "rule", True), sort_keys=True))


def _remembered(until: Until) -> Any:
    state = getattr(until, "state", None)
    return state() if callable(state) else state


def _recall(until: Until, state: Any) -> None:
    if state is not None and hasattr(until, "restore"):
        until.restore(state)


# ------------------------------------------------------------------ what made it


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    known = {"python": platform.python_version()}
    for package in ("viscircuits", "torch", "torchvision", "timm", "open_clip_torch", "pillow"):
        with suppress(PackageNotFoundError):
            known[package] = version(package)
    return known


def what_ran(spec: ModelSpec) -> dict[str, Any]:
    """What a result says about the network: address, weights and structure."""
    return {
        "model": spec.address,
        "weights": spec.weights_digest(),
        "weights_from": spec.weights,
        "structure": hashlib.sha256(repr(spec.model).encode()).hexdigest()[:N_DIGEST],
    }


def _why_empty(images: Images, seen: Seen) -> str:
    if not seen.n_skipped:
        return "no image was given: the tensor or iterable is empty"
    address = getattr(images, "address", type(images).__name__)
    first = min(seen.skipped)
    return f"none of the {seen.n_skipped} images of {address} could be read; {first[1]!r}: {first[2]}"
