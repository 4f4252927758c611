"""Make pictures that maximise objectives, by gradient ascent from noise.

1. Each objective gets a group of `n` pictures; each picture's noise and transforms come from a generator of its own,
   made of the seed, the objective and its place in the group, so that its neighbours in a batch do not matter.
2. Groups that look at the same layers run together, `batch_size` pictures at a time: decode, transform, normalise, run
   the network as far as the layers go, step (Adam). The network is frozen meanwhile and put back afterwards.
3. Where a whole picture is silent at an activation, or saturated, what would get it out is let through
   (`viscircuits.clipping.Redirected`): a dead unit has no other gradient to start from.
4. The picture is rounded to eight bits, and what is reported is measured on that: whole, upright, without transforms.
5. With a cache, each group is kept on disk under a digest of everything it depends on, batch by batch, so that a run
   that was stopped resumes and ends with the same pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from viscircuits.clipping import Redirected
from viscircuits.errors import LayerError, ModelError, ViscircuitsError, closest
from viscircuits.exemplars import colour_map
from viscircuits.featurevis.image import BASES, DISTILL, N_DRAWS, STILL, Eye, Robustness, sampled
from viscircuits.featurevis.objectives import Objective
from viscircuits.files import write_atomically
from viscircuits.hooks import activations, evaluating, frozen, submodule
from viscircuits.layers import Layer, parse_address
from viscircuits.models import ModelSpec, as_spec, digest_weights
from viscircuits.tracing import trace

VERSION = 1  # of what is computed: pictures of another version are not taken from a cache
SIZE = 128
MIN_SIDE = 16
N_NOISE = 4


@dataclass(frozen=True)
class Rendered:
    """The pictures of one objective, with what was measured on them; one entry a picture.

    Parameters
    ----------
    objective
        What they maximise.
    images
        The pictures.
    started, reached
        The objective on the picture as it was at first and as it is now, without transforms.
    traces
        The objective at each step on what the network saw, with transforms.
    peaks
        For each picture the largest activation over positions of each unit that the objective names, as
        ``layer:index`` → activation.
    """

    objective: Objective
    images: tuple[Image.Image, ...]
    started: tuple[float, ...]
    reached: tuple[float, ...]
    traces: tuple[tuple[float, ...], ...]
    peaks: tuple[Mapping[str, float], ...]


def render(
    model: nn.Module | ModelSpec,
    objectives: Objective | Sequence[Objective],
    *,
    size: int = SIZE,
    steps: int = 64,
    n: int = 1,
    basis: str = "fourier",
    transforms: Robustness | None = DISTILL,
    rate: int | float | None = None,
    seed: int = 0,
    batch_size: int = 12,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    cache: str | Path | None = None,
) -> list[Rendered]:
    """Pictures that maximise each objective, in the order of the objectives.

    Device and dtype are the network's. On a processor the same arguments give the same bytes; with another
    `batch_size` pictures may differ as rounding does.

    Parameters
    ----------
    model
        A spec, or a bare network that takes colours from 0 to 1.
    size
        Side of the pictures in pixels. The network sees them at this size where it can, else at its own.
    steps
        Of gradient ascent.
    n
        Pictures for each objective. They start from different noise; `diversity` keeps them apart.
    basis
        ``fourier`` (decorrelated), ``pixel``, or ``maco`` (magnitudes of natural images, only phases are found).
    transforms
        How the picture moves, scales and turns at each step; None: not at all.
    rate
        Step size; None takes the basis's.
    batch_size
        Pictures that are made together; a group of more is not parted.
    progress
        Wraps the stream of steps, as `tqdm` does; its length is known.
    cache
        A folder, made if need be.

    Raises
    ------
    LayerError
        If a layer, unit or position does not exist.
    ModelError
        If the network cannot run on such pictures.
    ImageError
        If the model's transform is not a fixed map of colours.
    """
    wanted = [objectives] if isinstance(objectives, Objective) else list(objectives)
    _check(wanted, size, steps, n, batch_size, basis)
    spec = as_spec(model)
    with evaluating(spec.model), frozen(spec.model), torch.enable_grad():
        scene = _Scene.of(spec, dict.fromkeys(layer for objective in wanted for layer in objective.layers), size)
        for objective in wanted:
            objective.check(scene.layers)
        recipe = _Recipe(size, steps, n, basis, transforms or STILL, float(rate or BASES[basis].rate), seed)
        shelf = _Shelf(None if cache is None else Path(cache), scene, recipe)
        chunks = [chunk for chunk in _chunks(wanted, max(1, batch_size // n)) if not shelf.has_all(chunk)]
        ticks = iter((progress or iter)(range(len(chunks) * steps)))
        for chunk in chunks:
            shelf.put(_optimise(scene, chunk, recipe, ticks))
        next(ticks, None)  # a progress bar closes when it is read to its end
        return [shelf.get(objective) for objective in wanted]


def on_noise(
    model: nn.Module | ModelSpec, layers: Iterable[str], *, size: int = SIZE, seed: int = 0
) -> dict[str, Float[Tensor, "image unit *position"]]:
    """What each layer makes of the noise that pictures start from: says on which scale its activations are."""
    spec, layers = as_spec(model), list(dict.fromkeys(layers))
    with evaluating(spec.model), torch.no_grad():
        scene, basis = _Scene.of(spec, layers, size), BASES["fourier"]
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.stack([basis.start(size, generator) for _ in range(N_NOISE)]).to(_device(spec.model))
        return scene.maps(scene.still(basis.decode(numbers, size)), layers)


@dataclass(frozen=True)
class _Recipe:
    """All that a picture depends on beside network and objective."""

    size: int
    steps: int
    n: int
    basis: str
    transforms: Robustness
    rate: float
    seed: int


@dataclass(frozen=True)
class _Scene:
    """The network as pictures meet it: its colours, the side it sees, its layers with their unit axes."""

    model: nn.Module
    eye: Eye
    own_side: int | None  # None: takes pictures of any size
    layers: Mapping[str, Layer]

    @classmethod
    def of(cls, spec: ModelSpec, addresses: Iterable[str], size: int) -> _Scene:
        for address in addresses:
            submodule(spec.model, parse_address(address))
        eye = network_eye(spec)
        example = torch.full((1, 3, size, size), 0.5)
        own_side = None if _takes(spec.model, addresses, eye(example)) else _own_side(spec, size)
        if own_side is not None:
            example = torch.full((1, 3, own_side, own_side), 0.5)
        traced = trace(spec.model, eye(example))
        return cls(spec.model, eye, own_side, {address: traced.layer(address) for address in addresses})

    def still(self, colours: Tensor) -> Tensor:
        """Pictures as they are, enlarged if the network needs it."""
        if self.own_side is None:
            return colours
        return sampled(colours, STILL.maps(torch.full((len(colours), N_DRAWS), 0.5), colours.shape[3]), self.own_side)

    def maps(self, pictures: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """What each layer makes of normalised pictures: (image, unit, *position)."""
        found = activations(self.model, layers, self.eye(pictures))
        return {layer: values.movedim(self.layers[layer].unit_axis, 1).float() for layer, values in found.items()}


def _optimise(scene: _Scene, chunk: Sequence[Objective], recipe: _Recipe, ticks: Iterator[Any]) -> list[Rendered]:
    basis, layers = BASES[recipe.basis], chunk[0].layers
    generators = [_generator(recipe.seed, objective, i) for objective in chunk for i in range(recipe.n)]
    numbers = torch.stack([basis.start(recipe.size, generator) for generator in generators])
    draws = torch.stack([torch.rand(recipe.steps, N_DRAWS, generator=generator) for generator in generators])
    numbers = numbers.to(_device(scene.model)).requires_grad_()
    side = scene.own_side or recipe.size + 2 * recipe.transforms.pad
    optimiser = torch.optim.Adam([numbers], lr=recipe.rate)
    before = _finished(numbers, recipe)
    trace = []
    for step in range(recipe.steps):
        next(ticks, None)
        seen = sampled(basis.decode(numbers, recipe.size), recipe.transforms.maps(draws[:, step], recipe.size), side)
        with Redirected():
            maps = scene.maps(seen, layers)
        values = _values(chunk, maps, recipe.n)
        (gradient,) = torch.autograd.grad(-values.sum(), numbers)
        numbers.grad = _levelled(gradient)
        optimiser.step()
        trace.append(values.detach())
    traces = torch.stack(trace, 1).cpu() if trace else torch.zeros(len(generators), 0)
    return _measured(scene, chunk, recipe, before, _finished(numbers, recipe), traces)


def _values(chunk: Sequence[Objective], maps: Mapping[str, Tensor], n: int) -> Float[Tensor, " image"]:
    groups = [
        objective.values({layer: maps[layer][i * n : (i + 1) * n] for layer in objective.layers})
        for i, objective in enumerate(chunk)
    ]
    return torch.cat(groups)


def _levelled(gradient: Tensor) -> Tensor:
    """Each picture's gradient at the same size, so that no objective is too faint for Adam's arithmetic."""
    size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient / size.view(-1, *[1] * (gradient.ndim - 1))


def _finished(numbers: Tensor, recipe: _Recipe) -> Tensor:
    """The pictures as they are saved: (image, height, width, 3) in eight bits."""
    colours = BASES[recipe.basis].decode(numbers.detach(), recipe.size)
    return (colours * 255).round().clamp(0, 255).byte().movedim(1, 3).cpu()


def _measured(
    scene: _Scene, chunk: Sequence[Objective], recipe: _Recipe, before: Tensor, after: Tensor, traces: Tensor
) -> list[Rendered]:
    (started, _), (reached, maps) = (_looked_at(scene, chunk, recipe, pictures) for pictures in (before, after))
    found = []
    for i, objective in enumerate(chunk):
        mine = range(i * recipe.n, (i + 1) * recipe.n)
        peaks = [{f"{layer}:{i}": float(maps[layer][row, i].max()) for layer, i in objective.units} for row in mine]
        found.append(
            Rendered(
                objective,
                tuple(Image.fromarray(after[row].numpy()) for row in mine),
                tuple(started[row] for row in mine),
                tuple(reached[row] for row in mine),
                tuple(tuple(traces[row].tolist()) for row in mine),
                tuple(peaks),
            )
        )
    return found


def _looked_at(
    scene: _Scene, chunk: Sequence[Objective], recipe: _Recipe, pictures: Tensor
) -> tuple[list[float], dict[str, Tensor]]:
    """The objective and the layers' maps on pictures that stand still."""
    colours = pictures.to(_device(scene.model)).movedim(3, 1) / 255
    with torch.no_grad():
        maps = scene.maps(scene.still(colours), chunk[0].layers)
        return _values(chunk, maps, recipe.n).tolist(), maps


def _chunks(objectives: Iterable[Objective], most: int) -> list[list[Objective]]:
    """Different objectives by the layers they look at, at most so many together."""
    by_layers: dict[tuple[str, ...], list[Objective]] = {}
    for objective in dict.fromkeys(objectives):
        by_layers.setdefault(objective.layers, []).append(objective)
    return [same[i : i + most] for same in by_layers.values() for i in range(0, len(same), most)]


def _generator(seed: int, objective: Objective, place: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {place} {objective}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ------------------------------------------------------------------ below: the network


def network_eye(spec: ModelSpec) -> Eye:
    """What the model's own transform does to colours; for a bare network nothing."""
    if spec.transform is None:
        return Eye(torch.eye(3), torch.zeros(3))
    height, width = spec.input_size or (256, 256)
    matrix, offset = colour_map(spec.transform, (width, height))
    return Eye(torch.from_numpy(matrix).float(), torch.from_numpy(offset).float())


def _takes(model: nn.Module, addresses: Iterable[str], images: Tensor) -> bool:
    try:
        with torch.no_grad():
            activations(model, addresses, images)
    except ModelError:
        return False
    except LayerError:
        pass  # said better by the trace
    return True


def _own_side(spec: ModelSpec, size: int) -> int:
    if spec.input_size is None or spec.input_size[0] != spec.input_size[1]:
        raise ModelError(
            f"{type(spec.model).__name__} cannot run on pictures of {size}×{size} pixels, and no square size of its "
            "own is known; choose another size, or describe the model with viscircuits.wrap(model, transform)"
        )
    return spec.input_size[0]


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check(objectives: Sequence[Objective], size: int, steps: int, n: int, batch_size: int, basis: str) -> None:
    for objective in objectives:
        if not isinstance(objective, Objective) or not objective.terms:
            raise ViscircuitsError(
                f"there is nothing to maximise in {objective}; give channel(LAYER, INDEX) or the like"
            )
    least = {"size": MIN_SIDE, "steps": 0, "n": 1, "batch_size": 1}
    for name, number in {"size": size, "steps": steps, "n": n, "batch_size": batch_size}.items():
        if number < least[name]:
            raise ViscircuitsError(f"{name} is a number from {least[name]}, got {number}")
    if basis not in BASES:
        raise ViscircuitsError(f"no basis {basis!r}; there are {', '.join(BASES)}.{closest(basis, BASES)}")


# ------------------------------------------------------------------ below: what is kept


class _Shelf:
    """Finished groups, in memory and, with a folder, on disk."""

    def __init__(self, folder: Path | None, scene: _Scene, recipe: _Recipe) -> None:
        self.folder = folder
        self.made: dict[Objective, Rendered] = {}
        self.about = "" if folder is None else _description(scene, recipe)

    def has_all(self, chunk: Sequence[Objective]) -> bool:
        """Whether a whole batch is there; one that is there in part is made anew, so that rounding stays the same."""
        return all(self._find(objective) for objective in chunk)

    def put(self, made: Iterable[Rendered]) -> None:
        for each in made:
            self.made[each.objective] = each
            if self.folder is not None:
                write_atomically(self._path(each.objective), _packed(each))

    def get(self, objective: Objective) -> Rendered:
        return self.made[objective]

    def _find(self, objective: Objective) -> bool:
        if self.folder is not None and objective not in self.made:
            found = _unpacked(self._path(objective), objective)
            if found is not None:
                self.made[objective] = found
        return objective in self.made

    def _path(self, objective: Objective) -> Path:
        key = hashlib.sha256(f"{self.about}\n{objective}".encode()).hexdigest()
        return Path(self.folder or ".") / f"{key[:32]}.safetensors"


def _description(scene: _Scene, recipe: _Recipe) -> str:
    network = {
        "weights": digest_weights(scene.model),
        "structure": hashlib.sha256(repr(scene.model).encode()).hexdigest(),
        "colours": [scene.eye.matrix.tolist(), scene.eye.offset.tolist()],
        "side": scene.own_side,
        "dtype": str(next((each.dtype for each in scene.model.parameters()), None)),
    }
    return json.dumps({"version": VERSION, **network, **asdict(recipe)}, sort_keys=True)


def _packed(each: Rendered) -> bytes:
    """Pictures and traces as tensors; the exact numbers as JSON beside them."""
    tensors = {
        "images": torch.from_numpy(np.stack([np.asarray(image) for image in each.images])),
        "traces": torch.tensor(each.traces, dtype=torch.float64),
    }
    numbers = {"started": each.started, "reached": each.reached, "peaks": [dict(peaks) for peaks in each.peaks]}
    return save(tensors, {"objective": str(each.objective), "numbers": json.dumps(numbers)})


def _unpacked(path: Path, objective: Objective) -> Rendered | None:
    """What `_packed` wrote; None if it is not there or is damaged, which costs the time to make it again."""
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
        return Rendered(
            objective,
            tuple(Image.fromarray(image.numpy()) for image in tensors["images"]),
            tuple(numbers["started"]),
            tuple(numbers["reached"]),
            tuple(map(tuple, tensors["traces"].tolist())),
            tuple(numbers["peaks"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
