"""From images to a circuit with its evidence, in one call.

1. Each image set is parted: the first part finds the circuit, the second, never seen, tests it.
2. `attribute` on the first part (taken from the folder if it was computed there before, gone on
   with if it was begun there).
3. `select` the units, and ask the bootstrap draws how sure each is; nothing here needs the network.
4. `evaluate` on the second part, beside the controls.
5. Pictures: what excites each chosen unit (`exemplars`), what its edges are made of (`connect`), what units and outputs
   make of some of the test images (`probe`).
6. Everything into one folder, with its page.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from viscircuits.ablation import ABLATIONS, N_SAMPLES, Statistics, measure
from viscircuits.attribution import attribute, find_layers, versions, what_ran
from viscircuits.budget import ENGINES
from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Unit
from viscircuits.confidence import Stable, confidence
from viscircuits.connecting import connect
from viscircuits.editing import Edited, edit
from viscircuits.errors import FileFormatError, ImageError, ModelError, ViscircuitsError
from viscircuits.evaluation import Evaluation, evaluate
from viscircuits.exemplars import Exemplar, exemplars
from viscircuits.files import write_atomically
from viscircuits.images import ImageSet, Source, batches, open_images, split
from viscircuits.layout import strongest
from viscircuits.matrices import CONTRASTS, Attributions
from viscircuits.models import ModelSpec, as_spec, load_model
from viscircuits.probing import probe
from viscircuits.running import N_DIGEST, Seen
from viscircuits.scores.formulas import SCORES, SUMMARIES, choose
from viscircuits.selection import REFINEMENTS, select, units_per_layer
from viscircuits.suite import evaluate_fully
from viscircuits.trials import LabelSource, find_labels, said_to_show
from viscircuits.workers import is_first, team

FINISHED = "attributions.safetensors"
UNFINISHED = "attributions.unfinished.safetensors"  # of a run that has not come to its end
DRAWS = "attributions.draws.safetensors"  # with the bootstrap draws, which only another choice of units needs
MOST_KEPT = 2**28  # bytes of draws that a finished discovery keeps; more are sooner computed again
CHECKPOINT = "attributions.parts"  # sums of an attribution that has not come to its end
BATCH_SIZE = 8  # images per forward pass, but for attribution
N_CHECKED = 16  # images an edit is compared on
N_PROBES = 8  # test images of each set that are kept with the result
MOST_TO_FIND = 32  # images used to find a circuit unless told otherwise: more changes little, see docs/results.md


def discover(
    model: nn.Module | ModelSpec,
    images: Source,
    out: str | Path | None = None,
    *,
    reference: Source | None = None,
    test: Source | None = None,
    others: Source | None = None,
    find_with: int | None = None,
    layers: Sequence[str] | None = None,
    units: int | float | dict[str, int] = 0.1,
    score: str = "cla",
    summary: str = "norm",
    contrast: str | None = None,
    refine: str = "coordinate",
    ablation: str = "zero",
    labels: LabelSource | None = "auto",
    bootstrap: int = 20,
    until_stable: float | None = None,
    draws: int = 5,
    edge_fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    n_pictures: int = 4,
    n_pictured: int = 12,
    title: str | None = None,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    memory: int | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    strict: bool = False,
    command: str = "",
    progress: bool = False,
) -> Bundle:
    """Find the circuit of a concept, test it on images it has not seen, and save all of it.

    A run that was stopped goes on from its folder when it is started again in the same way.

    Parameters
    ----------
    model
        The network.
    images
        The concept: whatever `open_images` takes.
    out
        Folder for the result; None keeps it in memory.
    reference
        Images without the concept. They give the contrast, the replacement values of every
        ablation but ``zero``, and the "others" of the test.
    test, others
        Images to test on, in place of the held-out part of `images` and `reference`.
    find_with
        How many images of each set find the circuit; by default half, at most 32 unless
        `until_stable` is given.
    layers
        Addresses; by default the network's post-activation layers.
    units
        Units per layer: a number, a fraction, or layer → number.
    score, summary
        As for `attribute`.
    contrast
        ``none``, ``difference`` or ``ratio``; by default ``difference`` if there is a reference.
    refine
        As for `select`.
    ablation
        As for `ablate`.
    labels
        As for `evaluate`.
    bootstrap
        Draws of the images that say how sure each unit and edge is; 0 for none.
    until_stable
        Stop taking in images when circuits from draws of them overlap by this much (`Stable`).
    draws, edge_fractions
        As for `evaluate`.
    n_pictures
        Image regions shown for each unit; 0 for none, and then edges and probes are not looked at either.
    n_pictured
        Units of each layer that get pictures: those with the highest scores.
    title
        The concept's name; by default that of the folder or file.
    engine, dtype, memory
        As for `attribute`.
    batch_size
        Images per forward pass; by default what suits each step.
    seed
        Of every random choice.
    strict
        Stop at the first image that cannot be read.
    command
        The command to show on the page.
    progress
        Show progress bars.

    Returns
    -------
    Bundle
        Circuit, attributions, evaluation, pictures, connections and probes. Under ``torchrun`` every worker but the
        first gets the circuit and its attributions alone, and writes nothing.

    Raises
    ------
    ViscircuitsError
        Whatever the caller can mend: its message says what was given and what to do.
    """
    spec = as_spec(model)
    contrast = contrast or ("none" if reference is None else "difference")
    _check_names(score, summary, refine, contrast, ablation, engine)
    _check_numbers(
        draws=(draws, 1), bootstrap=(bootstrap, 0), pictures=(n_pictures, 0), pictured=(n_pictured, 0),
        batch_size=(BATCH_SIZE if batch_size is None else batch_size, 1),
    )  # fmt: skip
    _check_reference(contrast, ablation, reference)
    stable = _stable(until_stable, bootstrap, units, contrast, refine, seed)
    most = MOST_TO_FIND if stable is None else None
    concept, tested = _part("concept", images, test, find_with, seed, strict, most)
    background, untested = _parts_of_reference(reference, others, find_with, seed, strict, most)
    chain = find_layers(spec, concept, layers)
    units_per_layer({layer.address: layer.n_units for layer in chain}, units)
    _check_labels(spec, tested, untested, labels)
    _check_folder(out)
    attributions = attribute_into(
        out, spec, concept, [layer.address for layer in chain], reference=background, score=score, summary=summary,
        engine=engine, dtype=dtype, memory=memory, batch_size=batch_size, draws=bootstrap, seed=seed, until=stable,
        progress=progress,
    )  # fmt: skip
    circuit = _choose_circuit(attributions, units, contrast, refine, seed)
    attributions = _without_draws(attributions)  # they are large, and have said what they had to say
    sources = _sources(images=images, reference=reference)
    timeless = [{name: way[name] for name in way if name != "seconds"} for way in circuit.provenance["engines"]]
    made = {**circuit.provenance, "engines": timeless, "ablation": ablation, "seed": seed, "sources": sources}
    if stable is not None:  # the images seen are the first of these
        made["find_with"] = find_with
    circuit = replace(circuit, provenance=made)
    title = title or concept_name(images)
    if not is_first():
        return Bundle(circuit, attributions, title=title, command=command)
    per_pass = batch_size or BATCH_SIZE
    evaluation = evaluate(
        spec, circuit, tested, untested, attributions=attributions, labels=labels, ablation=ablation,
        reference=_statistics(spec, background, circuit.layers, ablation, per_pass, progress), draws=draws,
        edge_fractions=edge_fractions, batch_size=per_pass, seed=seed, progress=progress,
    )  # fmt: skip
    axes = {layer.address: layer.unit_axis for layer in chain}
    pictures = _pictures(spec, strongest(circuit, n_pictured), concept, axes, n_pictures, labels, per_pass, progress)
    bundle = Bundle(circuit, attributions, evaluation, pictures, title, command)
    if n_pictures:
        bundle = _looked_into(bundle, spec, concept, tested, untested, per_pass, progress)
    if out is not None:
        bundle.save(out)
        _put_draws_away(Path(out), bootstrap, MOST_KEPT)
    return bundle


def attribute_images(
    model: nn.Module | ModelSpec,
    images: Source,
    out: str | Path,
    *,
    reference: Source | None = None,
    find_with: int | None = None,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    strict: bool = False,
    bootstrap: int = 20,
    **options: Any,
) -> Attributions:
    """Only the attributions of a concept, in a folder from which `discover` goes on.

    `discover` takes them if it is asked for the same: with ``find_with`` the same images find its
    circuit; without, all of them do, which is what it does when it has test images of its own.

    Parameters
    ----------
    model, images, reference, layers, bootstrap, seed, strict
        As for `discover`.
    out
        Folder for ``attributions.safetensors``.
    find_with
        Leave all but so many images of each set for the test, as `discover` does; by default none.
    options
        ``score``, ``summary``, ``engine``, ``dtype``, ``memory``, ``batch_size`` and ``progress`` as for
        `attribute`.

    Raises
    ------
    ViscircuitsError
        As `discover` does.
    """
    _check_numbers(bootstrap=(bootstrap, 0))
    if options.get("batch_size") is not None:
        _check_numbers(batch_size=(options["batch_size"], 1))
    sets: list[ImageSet | None] = []
    for what, source in (("concept", images), ("reference", reference)):
        if source is None:
            sets.append(None)
        elif find_with is None:
            sets.append(open_images(source, strict=strict))
        else:
            sets.append(_part(what, source, None, find_with, seed, strict, None)[0])
    concept, background = sets
    if concept is None:
        raise ImageError("images of the concept are needed")
    found = attribute_into(
        out, model, concept, layers, reference=background, draws=bootstrap, seed=seed, **options
    )  # fmt: skip
    slim = _without_draws(found)
    if is_first():
        slim.save(Path(out) / FINISHED)
        _put_draws_away(Path(out), bootstrap, math.inf)  # for a discovery to come
    return slim


def attribute_into(
    out: str | Path | None,
    model: nn.Module | ModelSpec,
    images: ImageSet,
    layers: Sequence[str] | None = None,
    *,
    reference: ImageSet | None = None,
    score: str = "cla",
    summary: str = "norm",
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    memory: int | str | None = None,
    batch_size: int | None = None,
    draws: int = 0,
    seed: int = 0,
    until: Stable | None = None,
    progress: bool = False,
) -> Attributions:
    """`attribute`, with what a result folder holds of it already: all of it, or the sums of a part.

    Parameters
    ----------
    out
        The folder. A checkpoint is kept there while the work goes on, and the result at its end.
        None keeps nothing.
    layers, reference, score, summary, engine, dtype, memory, batch_size, draws, seed, until, progress
        As for `attribute`.

    Raises
    ------
    ViscircuitsError
        As `attribute` does, and if the reference holds nothing but the concept's own images.
    """
    spec = as_spec(model)
    _check_folder(out)
    addresses = [layer.address for layer in find_layers(spec, images, layers)]
    kind = None if dtype is None else str(dtype).removeprefix("torch.")
    asked = {"score": score, "summary": summary, "layers": addresses, "dtype": kind}
    wanted = _Asked(spec, asked, {"images": images, "reference": reference}, draws, seed, until)
    found = None if out is None else wanted.find(Path(out))
    everyone_has = all(team().gather(found is not None))
    if found is None or not everyone_has:
        found = attribute(
            spec, images, addresses, reference=reference, score=score, summary=summary, engine=engine, dtype=dtype,
            memory=memory, batch_size=batch_size, draws=draws, seed=seed, until=until,
            checkpoint=None if out is None else Path(out) / CHECKPOINT, progress=progress,
            finish=lambda found: _keep_at_once(out, _with_rule(found, until)),
        )  # fmt: skip
        found = _with_rule(found, until)
    _check_apart(found)
    return found


def concept_name(images: Source) -> str:
    """A name for the concept: the folder's or file's own, or the rendered concept's."""
    if isinstance(images, ImageSet):
        images = images.address
    return Path(str(images).split(",")[0]).stem.removeprefix("render:") if isinstance(images, str | Path) else "concept"


def evaluate_again(
    folder: str | Path,
    images: Source,
    *,
    others: Source | None = None,
    reference: Source | None = None,
    ablation: str | Sequence[str] | None = None,
    suite: str = "basic",
    transfer: Source | None = None,
    checked_units: int = 64,
    checked_images: int = 16,
    labels: LabelSource | None = "auto",
    weights: str | Path | None = None,
    draws: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    command: str = "",
    progress: bool = False,
) -> Bundle:
    """Test the circuit of a result folder on other images or under another ablation; renew the folder.

    Parameters
    ----------
    folder
        What `discover` wrote.
    images, others
        Images with and without the concept.
    reference
        Where ``mean``, ``resample`` and ``noise`` take their values from; by default the reference
        images the circuit was found with.
    ablation
        By default the circuit's own. The full suite takes several, by default ``zero`` and ``mean`` besides, if
        there is a reference.
    suite
        ``basic``, or ``full`` for everything that `evaluate_fully` measures.
    transfer, checked_units, checked_images
        As for `evaluate_fully`; for the full suite alone.
    weights
        Where the model's weights are, if not where they were.
    command
        The command to show on the page beside that which found the circuit.
    labels, draws, batch_size, seed, progress
        As for `evaluate`.

    Raises
    ------
    ImageError
        If every image was used to find the circuit and so cannot test it.
    """
    bundle = Bundle.load(folder)
    spec = model_of(bundle.circuit, weights)
    tested = open_images(images)
    background = None if others is None else open_images(others)
    ablations = _ablations(ablation, bundle.circuit, suite, reference is not None)
    needs = [each for each in ablations if each != "zero"]
    source = _reference_of(bundle.circuit, needs[0], reference) if needs else None
    if suite == "basic" and transfer is not None:
        raise ViscircuitsError("images for transfer are tested on by the full suite alone; add --suite full")
    shared: dict[str, Any] = {
        "attributions": bundle.attributions, "labels": labels, "reference": source, "draws": draws,
        "batch_size": batch_size, "seed": seed, "progress": progress,
    }  # fmt: skip
    if suite == "basic":
        evaluation = evaluate(spec, bundle.circuit, tested, background, ablation=ablations[0], **shared)
    else:
        spec.model.to(memory_format=torch.channels_last)  # halves the time of many short passes on a CPU
        evaluation = evaluate_fully(
            spec, bundle.circuit, tested, background, ablations=ablations, found_with=_found_sets(bundle.circuit),
            transfer=None if transfer is None else (open_images(transfer), None), checked_units=checked_units,
            checked_images=checked_images, **shared,
        )  # fmt: skip
    evaluation = Evaluation({**evaluation.data, "command": command})
    bundle = replace(bundle, evaluation=evaluation)
    bundle.save(folder)
    return bundle


def edit_from(
    folder: str | Path,
    out: str | Path,
    *,
    onnx: str | Path | None = None,
    images: Source | None = None,
    reference: Source | None = None,
    circuit: str | Path | None = None,
    ablation: str | None = None,
    weights: str | Path | None = None,
) -> tuple[Edited, float | None]:
    """Write the network without the circuit of a result folder, as safetensors and perhaps as ONNX.

    Parameters
    ----------
    folder
        What `discover` wrote.
    out
        Where the weights go.
    onnx
        Where the ONNX file goes, if there shall be one.
    images, reference
        To check on, and to take means from; by default the images the circuit was found with.
    circuit
        A file with other units of the same network, to remove in place of the folder's circuit.
    ablation
        By default the circuit's own.
    weights
        Where the model's weights are, if not where they were.

    Returns
    -------
    tuple
        The edited network, and how far the ONNX file differs from it (None without one).
    """
    if Path(out).suffix != ".safetensors":
        raise ViscircuitsError(f"edited weights are safetensors: name the file so, not {str(out)!r}")
    bundle = Bundle.load(folder)
    provenance = bundle.circuit.provenance
    spec = model_of(bundle.circuit, weights)
    removed = bundle.circuit if circuit is None else _of_same_network(Circuit.load(circuit), provenance)
    ablation = ablation or provenance.get("ablation", "zero")
    statistics = None
    if ablation != "zero":
        background = _reference_of(bundle.circuit, ablation, reference)
        statistics = measure(spec, background, removed.layers, n_samples=0)
    checked = open_images(images, limit=N_CHECKED) if images is not None else found_with(provenance, "images")
    batch = next(iter(batches(checked, spec.transform, N_CHECKED)), None)
    if batch is None:
        raise ImageError("no image could be read to check the edit on; give some (--images IMAGES)")
    edited = edit(spec, removed, batch.images, ablation=ablation, reference=statistics)
    edited.save(out)
    return edited, None if onnx is None else edited.export_onnx(onnx, batch.images)


def model_of(circuit: Circuit, weights: str | Path | None = None) -> ModelSpec:
    """Load the model a circuit was found in, and check that it is the same one.

    Raises
    ------
    ModelError
        If the model was not loaded by address, or has other weights now.
    """
    provenance = circuit.provenance
    try:
        spec = load_model(provenance["model"], weights=weights or provenance.get("weights_from", "default"))
    except KeyError as error:
        raise ModelError("the circuit does not say which model it is from") from error
    if spec.weights_digest() != provenance["weights"]:
        raise ModelError(
            f"the weights of {provenance['model']!r} are not those the circuit was found in; "
            "pass the file they were in (--weights FILE)"
        )
    return spec


def found_with(provenance: Mapping[str, Any], what: str) -> ImageSet:
    """The very images of a set, ``images`` or ``reference``, that a circuit was found with, opened again.

    Raises
    ------
    ImageError
        If they are gone, or nothing says where they were.
    """
    if what not in provenance.get("sources", {}):
        raise ImageError(f"the circuit does not say which images it was found with; name some (--{what} IMAGES)")
    try:
        images = open_images(provenance["sources"][what])
    except ImageError as error:
        raise ImageError(f"the images of the circuit are gone: {error} Or name any (--{what} IMAGES).") from error
    names = provenance[what]["names"]
    if callable(images.entries):  # a stream: found again by its place
        held = split(images, provenance.get("find_with") or len(names), provenance["seed"])[0].entries
        return ImageSet(images.address, lambda: islice(held() if callable(held) else held, len(names)))
    part = ImageSet(images.address, [entry for entry in images.entries if entry.name in set(names)])
    same = {picture.digest[:N_DIGEST] for picture in part}.intersection(provenance[what]["digests"])
    if len(same) != len(set(provenance[what]["digests"])):
        raise ImageError(
            f"{images.address!r} holds {len(same)} of the {len(names)} images the circuit was found with; "
            f"name some (--{what} IMAGES)"
        )
    return part


def tested_on(circuit: Circuit, evaluation: Evaluation | None, what: str) -> ImageSet:
    """The images of a set, ``concept`` or ``others``, that a circuit was tested on, opened again.

    Without an evaluation they are all that did not find it.

    Raises
    ------
    ImageError
        If they are gone, nothing says where they were, or the test had images of its own.
    """
    made, source = circuit.provenance, {"concept": "images", "others": "reference"}[what]
    option = {"concept": "--images IMAGES", "others": "--others IMAGES"}[what]
    described = {} if evaluation is None else evaluation.data["images"].get(what, {})
    if source not in made.get("sources", {}) or (evaluation is not None and not described):
        raise ImageError(f"nothing says which {what} images the circuit was tested on; name some ({option})")
    try:
        images = open_images(made["sources"][source])
    except ImageError as error:
        raise ImageError(f"the {what} images of the test are gone: {error} Or name any ({option}).") from error
    found = set(made[source]["names"])
    if callable(images.entries):  # a stream: its rest, as far as it was read
        rest = split(images, made.get("find_with") or len(found), made["seed"])[1]
        return open_images(rest, limit=described.get("n"))
    tested = set(described.get("names", (entry.name for entry in images.entries))) - found
    part = ImageSet(images.address, [entry for entry in images.entries if entry.name in tested])
    if not len(part) or (described and len(part) != described["n"]):
        raise ImageError(
            f"{images.address!r} holds {len(part)} of the {described.get('n', 'some')} {what} images of the test; "
            f"name some ({option})"
        )
    return part


def _of_same_network(circuit: Circuit, provenance: Mapping[str, Any]) -> Circuit:
    """The circuit, unless it says that it was found in other weights."""
    if circuit.provenance.get("weights", provenance["weights"]) != provenance["weights"]:
        raise ViscircuitsError(
            "the units to remove (--circuit FILE) are of a network with other weights than the folder's circuit; "
            "give a circuit of the same network"
        )
    return circuit


def _ablations(asked: str | Sequence[str] | None, circuit: Circuit, suite: str, has_reference: bool) -> tuple[str, ...]:
    """Under which ablations to evaluate, the first one foremost."""
    choose({"basic": evaluate, "full": evaluate_fully}, suite, "suite")
    own = circuit.provenance.get("ablation", "zero")
    if asked is None:
        more = ("zero", "mean") if suite == "full" and (has_reference or "reference" in circuit.provenance) else ()
        return tuple(dict.fromkeys((own, *more)))
    named = (asked,) if isinstance(asked, str) else tuple(asked)
    for name in named:
        choose(ABLATIONS, name, "ablation")
    if suite == "basic" and len(named) != 1:
        raise ViscircuitsError(f"the basic suite takes one ablation, got {', '.join(named)}; several with --suite full")
    return named


def _found_sets(circuit: Circuit) -> tuple[ImageSet, ImageSet | None] | None:
    """The images that the circuit was found with, as far as they can still be opened."""
    try:
        concept = found_with(circuit.provenance, "images")
        return concept, found_with(circuit.provenance, "reference") if "reference" in circuit.provenance else None
    except ImageError:
        return None


def _sources(**given: Source | None) -> dict[str, Any]:
    """What must be opened to have the image sets again, as far as it can be written down."""
    written = {what: _written(source) for what, source in given.items()}
    return {what: source for what, source in written.items() if source is not None}


def _written(source: Source | None) -> str | list[Any] | None:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, list | tuple):
        parts = [_written(part) for part in source]
        return None if None in parts else parts
    return None


def _reference_of(circuit: Circuit, ablation: str, given: Source | None) -> ImageSet:
    """The reference images to use: those given, else those the circuit was found with."""
    if given is not None:
        return open_images(given)
    if "reference" not in circuit.provenance:
        raise ViscircuitsError(f"ablation {ablation!r} needs reference images (--reference IMAGES), or use 'zero'")
    return found_with(circuit.provenance, "reference")


def _check_numbers(**given: tuple[int, int]) -> None:
    for name, (number, least) in given.items():
        if number < least:
            raise ViscircuitsError(f"{name.replace('_', ' ')} must be at least {least}, got {number}")


def _check_folder(out: str | Path | None) -> None:
    """Make the folder now, so that a place that cannot be written to shows before the work."""
    if out is None:
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise ViscircuitsError(f"{str(out)!r} is a file; give a folder for the result (--out DIR)")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        if is_first():
            write_atomically(Path(out) / UNFINISHED.replace("attributions", "trial"), b"").unlink()
    except OSError as error:
        raise ViscircuitsError(f"cannot write to {str(out)!r} ({error.strerror}); give another (--out DIR)") from error


def _check_apart(attributions: Attributions) -> None:
    """The reference is there to differ from the concept."""
    if attributions.reference is None:
        return
    concept, reference = (set(attributions.provenance[what]["digests"]) for what in ("images", "reference"))
    if not concept or not reference:  # too many to be named one by one
        return
    if concept <= reference or reference <= concept:
        raise ImageError(
            f"{len(concept & reference)} of the {len(reference)} reference images are the concept's own; "
            "give images without the concept (--reference IMAGES)"
        )
    if concept & reference:
        warnings.warn(f"{len(concept & reference)} images are in the concept and in the reference", stacklevel=3)


def _check_reference(contrast: str, ablation: str, reference: Source | None) -> None:
    if reference is None and contrast != "none":
        raise ViscircuitsError(f"contrast {contrast!r} needs reference images (--reference IMAGES)")
    if reference is None and ablation != "zero":
        raise ViscircuitsError(f"ablation {ablation!r} needs reference images (--reference IMAGES), or use 'zero'")


def _check_names(score: str, summary: str, refine: str, contrast: str, ablation: str, engine: str) -> None:
    for registry, name, what in (
        (SCORES, score, "score"), (SUMMARIES, summary, "summary"), (REFINEMENTS, refine, "refinement"),
        (CONTRASTS, contrast, "contrast"), (ABLATIONS, ablation, "ablation"), (ENGINES, engine, "engine"),
    ):  # fmt: skip
        choose(registry, name, what)


def _check_labels(spec: ModelSpec, tested: ImageSet, untested: ImageSet | None, labels: LabelSource | None) -> None:
    """A mistake in the labels shows before the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `evaluate` will say it
        find_labels(spec, [tested] if untested is None else [tested, untested], labels)


def _stable(
    overlap: float | None,
    bootstrap: int,
    units: int | float | dict[str, int],
    contrast: str,
    refine: str,
    seed: int,
) -> Stable | None:
    if overlap is None:
        return None
    if bootstrap < 2:
        raise ViscircuitsError(
            f"whether a circuit is stable is asked of bootstrap draws: at least 2 (--bootstrap 20), got {bootstrap}"
        )
    return Stable(units, contrast, refine, overlap, seed=seed)


def _parts_of_reference(
    reference: Source | None, others: Source | None, find_with: int | None, seed: int, strict: bool, most: int | None
) -> tuple[ImageSet | None, ImageSet | None]:
    """The images to set the concept against, and those without it to test on."""
    if reference is not None:
        return _part("reference", reference, others, find_with, seed, strict, most)
    return None, None if others is None else open_images(others, strict=strict)


def _part(
    what: str, source: Source, test: Source | None, find_with: int | None, seed: int, strict: bool, most: int | None
) -> tuple[ImageSet, ImageSet]:
    """The images that find the circuit and those that test it."""
    images = open_images(source, strict=strict)
    if test is not None:
        return images, open_images(test, strict=strict)
    count = images.count
    if find_with is None and count is None:
        raise ImageError(f"the {what} set is a stream of unknown length; say how many of it to use (--find-with N)")
    if count is not None and count < 2:
        raise ImageError(
            f"the {what} set {images.address!r} has {count} image; at least 2 are needed, "
            "to find with one and test on the other. Give test images of their own (--test IMAGES), or more images."
        )
    half = (count or 0) // 2
    n = find_with if find_with is not None else half if most is None else min(most, half)
    if n < 1 or (count is not None and n >= count):
        raise ImageError(f"cannot find a circuit with {n} of {count} {what} images and test it on the rest")
    return split(images, n, seed)


def _choose_circuit(
    attributions: Attributions, units: int | float | dict[str, int], contrast: str, refine: str, seed: int
) -> Circuit:
    """The circuit, with what the bootstrap draws say of it if there are any."""
    generator = torch.Generator().manual_seed(seed)
    circuit = select(attributions.contrast(contrast), units, refine=refine, generator=generator)
    if not attributions.n_draws:
        return circuit
    asked = confidence(attributions, circuit, contrast)
    return replace(asked.circuit, selection={**circuit.selection, "confidence": asked.summary()})


def _statistics(
    spec: ModelSpec, background: ImageSet | None, layers: Sequence[str], ablation: str, batch_size: int, progress: bool
) -> Statistics | None:
    """What removed values become, where the reference decides it."""
    if background is None or ablation == "zero":
        return None
    n_samples = N_SAMPLES if ablation == "resample" else 0
    return measure(spec, background, list(layers), n_samples=n_samples, batch_size=batch_size, progress=progress)


# ------------------------------------------------------------------ attributions of an earlier run


def _without_draws(attributions: Attributions) -> Attributions:
    matrices = tuple(replace(matrix, draws=None) for matrix in attributions.matrices)
    reference = attributions.reference
    return replace(attributions, matrices=matrices, reference=reference and _without_draws(reference))


def _put_draws_away(out: Path, bootstrap: int, most: int | float) -> None:
    """Keep the bootstrap draws beside the result, if they are no more than `most` bytes.

    With them another circuit can be selected from the folder; they are `bootstrap` times as large as the matrices.
    """
    unfinished = out / UNFINISHED
    if not unfinished.exists():
        return
    if bootstrap and unfinished.stat().st_size <= most:
        os.replace(unfinished, out / DRAWS)
    else:
        unfinished.unlink()
        (out / DRAWS).unlink(missing_ok=True)  # of something else


def _keep_at_once(out: str | Path | None, attributions: Attributions) -> None:
    """Save what takes the time, while the checkpoint is still there."""
    if out is not None and is_first():
        attributions.save(Path(out) / UNFINISHED)


def _with_rule(attributions: Attributions, until: Stable | None) -> Attributions:
    """The attributions, saying which rule ended them; provenance in the order of a file's header."""
    made = dict(attributions.provenance)
    if until is not None:
        looks = [list(look) for look in until.history]
        made["stopped"] = {**made.get("stopped", {}), "stable": until.reached, "rule": until.rule, "overlaps": looks}
    return replace(attributions, provenance=json.loads(json.dumps(made, sort_keys=True)))


@dataclass(frozen=True)
class _Asked:
    """What attributions shall be made of."""

    spec: ModelSpec
    options: dict[str, Any]
    images: dict[str, ImageSet | None]
    draws: int
    seed: int
    until: Stable | None

    def find(self, folder: Path) -> Attributions | None:
        """Attributions of an earlier run into the folder, if they were made of the very same things."""
        refused: list[list[str]] = []
        for name in (UNFINISHED, DRAWS, FINISHED):
            with suppress(FileFormatError):
                found = Attributions.load(folder / name)
                refused.append(self.differing(found))
                if not refused[-1]:
                    return found
        if refused:
            nearest: list[str] = min(refused, key=len)
            warnings.warn(
                f"the attributions in {str(folder)!r} are of something else ({', '.join(nearest)}): attributing anew",
                stacklevel=4,
            )
        return None

    def differing(self, found: Attributions) -> list[str]:
        """What the attributions were made of that is not what is asked for."""
        made = found.provenance
        expected = {**what_ran(self.spec), **self.options, "versions": versions()}
        wrong = [name for name, value in expected.items() if made.get(name) != value]
        if "targets" in made:
            wrong.append("targets")
        if self.draws and (found.n_draws, made.get("bootstrap")) != (
            self.draws,
            {"draws": self.draws, "seed": self.seed},
        ):
            wrong.append("bootstrap draws")
        rule = None if self.until is None else json.loads(json.dumps(self.until.rule))
        if made.get("stopped", {}).get("rule") != rule:
            wrong.append("when to stop")
        return wrong or [what for what, images in self.images.items() if not self._same(made, what, images)]

    def _same(self, made: Mapping[str, Any], what: str, images: ImageSet | None) -> bool:
        if images is None or what not in made:
            return images is None and what not in made
        if "stopped" not in made:
            return _described(self.spec, images) == made[what]
        seen = _described(self.spec, images, made[what]["n"])
        return {**seen, "skipped": made[what]["skipped"]} == made[what]  # how far it looked ahead does not matter


def _described(spec: ModelSpec, images: ImageSet, first: int | None = None) -> dict[str, Any]:
    """What a result would say about an image set, or about its first images."""
    seen = Seen()
    for batch in islice(batches(images, spec.transform, 1), first):
        seen.add(batch)
    return json.loads(json.dumps(seen.describe(images)))


def _pictures(
    spec: ModelSpec,
    units: list[Unit],
    images: ImageSet,
    axes: dict[str, int],
    n: int,
    labels: LabelSource | None,
    batch_size: int,
    progress: bool,
) -> dict[Unit, list[Exemplar]]:
    if not n or spec.transform is None:
        return {}

    def watch(stream: Any) -> Any:
        return tqdm(stream, desc="pictures", delay=2, disable=not progress)

    try:
        found = exemplars(
            spec.model, units, images, spec.transform, n=n, batch_size=batch_size, unit_axes=axes, progress=watch
        )
    except ImageError as error:
        warnings.warn(f"the result has no pictures of its units: {error}", stacklevel=3)
        return {}
    classes = said_to_show(spec, images, labels)
    return {unit: [replace(each, shows=classes.get(each.name, "")) for each in mine] for unit, mine in found.items()}


def _looked_into(
    bundle: Bundle,
    spec: ModelSpec,
    found: ImageSet,
    tested: ImageSet,
    untested: ImageSet | None,
    batch_size: int,
    progress: bool,
) -> Bundle:
    """The bundle with its edges looked into on the images that found it, and with probes from those that test it."""
    connections = connect(spec, bundle.circuit, found, progress=progress)
    if spec.transform is None:
        return replace(bundle, connections=connections)
    sets = {"concept": tested} if untested is None else {"concept": tested, "reference": untested}
    probes = probe(spec, bundle.circuit, sets, most=N_PROBES, batch_size=batch_size)
    return replace(bundle, connections=connections, probes=probes)
