"""Networks that tell pairs: trained on composites whose label is the pair, so that a part is never a label.

1. A pretrained network gets a new head, an output for each pair. It starts from two part classifiers added up: a
   linear classifier of the parts is fitted to the network's last features of plain training images, and a pair's
   weights are the sum of its parts'.
2. What comes before the first trained module is run once for each training composite and replayed (`Prefix`), so that
   on a processor only the late blocks and the head cost anything. Batch norms keep their statistics, and depthwise
   filters, whose gradients are slow and few, stay as they are.
3. A network without weights is trained as a whole on composites kept as pictures.

A run that was stopped goes on from its checkpoint and gives what it would have given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from viscircuits.errors import FileFormatError, ModelError, ViscircuitsError
from viscircuits.experiments.kept import digest_of
from viscircuits.experiments.pairs import Composites, Group
from viscircuits.files import write_atomically
from viscircuits.hooks import forward, record, rewrite
from viscircuits.models import ModelSpec, Transform, load_model, read_state, seeded, wrap
from viscircuits.prefix import Prefix

PORTION = 128  # composites that are drawn at a time
RUN_AT_ONCE = 4  # as many maps of early layers stay in a processor's cache
SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True)
class Recipe:
    """How a network that tells pairs is trained.

    Parameters
    ----------
    network
        ``lite0``, ``small`` or ``torchvision:NAME``.
    weights
        What it starts from: ``default``, ``none`` or a file, as for `viscircuits.models.load_model`.
    size
        Pixels a side at which the network sees the canvas.
    first
        The first module that is trained; None trains all of the network.
    each
        Training composites of each pair.
    plain
        Plain images of each part that the head starts from; 0 starts it at random.
    epochs, batch
        Times that each composite is seen, and composites a step.
    rate
        Largest learning rate; it rises for 15 % of the steps, then falls.
    decay, dropout, smoothing
        Weight decay, dropout before the head, label smoothing.
    seed
        Of the weights' start, the order and the dropout.
    """

    network: str = "lite0"
    weights: str = "default"
    size: int = 256
    first: str | None = "blocks.5"
    each: int = 60
    plain: int = 40
    epochs: int = 5
    batch: int = 32
    rate: float = 1e-3
    decay: float = 0.01
    dropout: float = 0.2
    smoothing: float = 0.1
    seed: int = 0


SMALL = Recipe("small", "none", size=96, first=None, each=80, plain=0, epochs=4, rate=4e-3, dropout=0.0)
RECIPES = {
    "lite0": Recipe(),
    "small": SMALL,
    "torchvision:googlenet": Recipe("torchvision:googlenet", size=224, first="inception5a"),
}


def recipe_for(network: str, weights: str = "default") -> Recipe:
    """What `RECIPES` says of a network; of one it does not know, all is trained.

    Raises
    ------
    ViscircuitsError
        If ``small`` is given weights: it always starts at random.
    """
    if network == "small" and weights not in ("default", "none"):
        raise ViscircuitsError(
            f"the network 'small' is trained from the start and takes no weights, got {str(weights)!r} (--weights); "
            "name the network they are of (--model), or leave them out"
        )
    known = RECIPES.get(network, Recipe(network, size=224, first=None))
    if weights == "none" and known.first is not None:  # nothing was learnt that could be kept
        known = replace(known, first=None, plain=0)
    return known if network == "small" else replace(known, weights=weights)


class SmallNet(nn.Sequential):
    """Five convolutions and a linear map, for canvases of some hundred pixels."""

    def __init__(self, n_outputs: int, widths: Sequence[int] = (16, 32, 48, 96, 128)) -> None:
        modules: dict[str, nn.Module] = {}
        before = 3
        for number, (width, stride) in enumerate(zip(widths, (2, 2, 2, 1, 1), strict=True), start=1):
            size = 5 if number == 1 else 3
            modules[f"conv{number}"] = nn.Conv2d(before, width, size, stride, size // 2, bias=False)
            modules[f"norm{number}"] = nn.BatchNorm2d(width)
            modules[f"relu{number}"] = nn.ReLU()
            before = width
        modules |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(before, n_outputs)}
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


# ---------------------------------------------------------------- networks


def build(recipe: Recipe, pairs: Sequence[str]) -> ModelSpec:
    """The network with an output for each pair, its head at random.

    Raises
    ------
    ModelError
        If there is no such network, or it does not end in a linear map.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        if recipe.network == "small":
            return wrap(SmallNet(len(pairs)).eval(), _transform(recipe), (), pairs, address="small")
        spec = load_model(recipe.network, weights=recipe.weights)
        name, head = head_of(spec.model)
        parent = spec.model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], nn.Linear(head.in_features, len(pairs)))
    return wrap(spec.model.eval(), _transform(recipe), spec.layers, pairs, address=recipe.network)


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the last linear map.

    Raises
    ------
    ModelError
        If there is none.
    """
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError(f"{type(model).__name__} does not end in a linear map that could tell pairs; take another")
    return linear[-1]


def _transform(recipe: Recipe) -> Transform:
    """The whole canvas at the network's size: nothing of it may be cropped away."""
    mean, spread = torch.tensor([127.0] * 3), torch.tensor([128.0] * 3)
    if recipe.network.startswith("torchvision:"):
        mean, spread = 255 * torch.tensor([0.485, 0.456, 0.406]), 255 * torch.tensor([0.229, 0.224, 0.225])

    def transform(picture: Image.Image) -> Tensor:
        seen = picture.resize((recipe.size, recipe.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1).float()
        return (pixels - mean[:, None, None]) / spread[:, None, None]

    return transform


# ---------------------------------------------------------------- what is run once


class Pictures:
    """Composites as they are, where nothing can be run once; called like a `Prefix`."""

    def __init__(self, images: Float[Tensor, "image 3 height width"]) -> None:
        self.images = images

    @contextmanager
    def replay(self, which: Int[Tensor, " chosen"] | Sequence[int]) -> Iterator[Tensor]:
        """Images of these places."""
        yield self.images[torch.as_tensor(which)]


Begun = Pictures | Prefix


def transformed(composites: Composites, transform: Transform, places: Sequence[int] | None = None) -> Tensor:
    """Composites as a network sees them, all or those of some places."""
    wanted = range(len(composites)) if places is None else places
    return torch.stack([transform(composites.draw(i)) for i in wanted])


def begin(spec: ModelSpec, first: str | None, composites: Composites, progress: bool = False) -> Begun:
    """The composites as far as the network takes them before the module `first` begins."""
    transform = transform_of(spec)
    if first is None:
        return Pictures(transformed(composites, transform))
    parts: list[Prefix] = []
    places = torch.arange(len(composites)).split(PORTION)
    for portion in tqdm(places, desc=f"up to {first}", unit="portion", delay=2, disable=not progress):
        parts.append(Prefix(spec.model, [first], transformed(composites, transform, portion.tolist()), RUN_AT_ONCE))
        parts[-1].images = parts[-1].images[:1]  # no module reads them any more
    whole = parts[0]
    for name in whole.kept.keys() - whole.unread:
        whole.kept[name] = torch.cat([part.kept[name] for part in parts])
    whole.images = whole.images.expand(len(composites), -1, -1, -1)
    lighten(whole)
    return whole


def lighten(begun: Prefix) -> None:
    """Keep one position of what no module reads any more: to hand it out whole takes most of a replay's time."""
    kept, images = dict(begun.kept), begun.images
    before = outputs_of(begun.model, begun, 1)
    begun.images = images[..., :1, :1]
    for name in begun.unread:
        begun.kept[name] = kept[name][..., :1, :1]
    try:
        same = torch.equal(before, outputs_of(begun.model, begun, 1))
    except RuntimeError:  # a shape was read, if not a value
        same = False
    if not same:
        begun.kept, begun.images = kept, images


def outputs_of(model: nn.Module, begun: Begun, n: int, batch: int = 50) -> Float[Tensor, "image output"]:
    """The network's outputs for the first `n` composites."""
    found = []
    for places in torch.arange(n).split(batch):
        with begun.replay(places) as images, torch.no_grad():
            found.append(forward(model, images))
    return torch.cat(found)


def transform_of(spec: ModelSpec) -> Transform:
    """What turns pictures into the network's images.

    Raises
    ------
    ViscircuitsError
        If the network has none.
    """
    if spec.transform is None:
        raise ViscircuitsError("composites are pictures: the network needs a transform (viscircuits.wrap)")
    return spec.transform


# ---------------------------------------------------------------- training


def train(
    recipe: Recipe,
    composites: Composites,
    plain: Composites,
    path: str | Path,
    *,
    until: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> ModelSpec:
    """Train a network to tell pairs and write its weights, or read them if they are written already.

    Parameters
    ----------
    recipe
        How.
    composites, plain
        Training composites, and plain training images of their parts.
    path
        The file, as safetensors; a stopped run goes on from ``path.part``.
    until
        Called with the number of steps done; True stops there and leaves the checkpoint.
    progress
        Show progress bars.

    Raises
    ------
    FileFormatError
        If there is a file of another recipe or other composites.
    """
    path = Path(path)
    spec = build(recipe, composites.names)
    pictures = [composites.digest(), plain.digest() if recipe.plain else None]
    made = digest_of({"recipe": asdict(recipe), "pictures": pictures, "start": spec.weights_digest()})
    if path.is_file():
        if _header(path).get("made") != made:
            raise FileFormatError(
                f"{str(path)!r} was trained by another recipe or on other composites; give another folder (--out)"
            )
        spec.model.load_state_dict(read_state(path))
        return spec
    _free(spec.model, recipe)
    begun = begin(spec, recipe.first, composites, progress)
    if recipe.plain:
        start_head(spec, plain, composites.groups)
    run = _Training(spec, recipe, path.with_name(path.name + ".part"), made)
    if run.walk(begun, composites.labels, until, progress):
        spec.model.eval().requires_grad_(True)
        write_atomically(path, save(_state(spec.model), {"made": made, "recipe": json.dumps(asdict(recipe))}))
        run.checkpoint.unlink(missing_ok=True)
    return spec


def start_head(spec: ModelSpec, plain: Composites, pairs: Sequence[Group]) -> None:
    """Set the head to the sums of two part classifiers, fitted to the last features of plain images."""
    name, head = head_of(spec.model)
    features = []
    for places in torch.arange(len(plain)).split(RUN_AT_ONCE):
        with record(spec.model, [f"{name}:in"]) as seen, torch.no_grad():
            forward(spec.model, transformed(plain, transform_of(spec), places.tolist()))
        features.append(seen[f"{name}:in"].flatten(1))
    weight, bias = fit_linear(torch.cat(features), plain.labels, len(plain.groups))
    held = torch.zeros(len(pairs), len(plain.groups))
    for i, pair in enumerate(pairs):
        held[i, list(pair)] = 1
    with torch.no_grad():
        head.weight.copy_(held @ weight)
        head.bias.copy_(held @ bias)


def fit_linear(
    features: Float[Tensor, "image feature"], labels: Int[Tensor, " image"], n_classes: int, decay: float = 1e-3
) -> tuple[Float[Tensor, "class feature"], Float[Tensor, " class"]]:
    """Weights and biases of a linear classifier with quadratic `decay` of its standardised weights."""
    mean, spread = features.mean(0), features.std(0).mean().clamp(min=1e-6)
    standard = (features - mean) / spread
    weight = torch.zeros(n_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    fitting = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fitting.zero_grad()
        missed = cross_entropy(standard @ weight.T + bias, labels) + decay * weight.square().sum()
        missed.backward()
        return missed

    with torch.enable_grad():
        fitting.step(loss)
    scaled = weight.detach() / spread
    return scaled, bias.detach() - scaled @ mean


def _free(model: nn.Module, recipe: Recipe) -> None:
    """Let only what is trained have gradients."""
    if recipe.first is None:
        return
    model.to(memory_format=torch.channels_last)  # twice as fast on processors
    trained = False
    for name, module in model.named_modules():
        trained = trained or name == recipe.first
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(trained and not depthwise)
    if not trained:
        raise ModelError(f"there is no module {recipe.first!r} in {type(model).__name__} to train from")


class _Training:
    """Steps from the start or a checkpoint to the end; the order of composites depends on seed and step alone."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, checkpoint: Path, made: str) -> None:
        self.model, self.recipe, self.checkpoint, self.made = spec.model, recipe, checkpoint, made
        self.trained = {name: p for name, p in spec.model.named_parameters() if p.requires_grad}
        self.fitting = torch.optim.AdamW(self.trained.values(), lr=recipe.rate, weight_decay=recipe.decay)
        self.done = 0

    def walk(self, begun: Begun, labels: Tensor, until: Callable[[int], bool] | None, progress: bool) -> bool:
        """Take all steps; False if `until` ended it."""
        recipe, a_step = self.recipe, min(self.recipe.batch, len(labels))
        each = len(labels) // a_step
        total, saved = recipe.epochs * each, time.monotonic()
        self._go_on()
        self.model.train(recipe.first is None)
        with tqdm(total=total, initial=self.done, desc="training", unit="step", delay=2, disable=not progress) as bar:
            while self.done < total:
                if until is not None and until(self.done):
                    self._keep()
                    return False
                epoch, at = divmod(self.done, each)
                order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(recipe.seed + epoch))
                self._step(begun, labels, order[at * a_step : (at + 1) * a_step], _pace(self.done / total))
                bar.update()
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self._keep()
                    saved = time.monotonic()
        return True

    def _step(self, begun: Begun, labels: Tensor, places: Tensor, pace: float) -> None:
        recipe = self.recipe
        for group in self.fitting.param_groups:
            group["lr"] = pace * recipe.rate
        number = recipe.seed * 1_000_003 + self.done  # of whatever the network itself drops
        with (
            seeded(number),
            begun.replay(places) as images,
            torch.enable_grad(),
            _dropping(self.model, recipe, self.done),
        ):
            outputs = forward(self.model, images.contiguous())
            missed = cross_entropy(outputs, labels[places], label_smoothing=recipe.smoothing)
            self.fitting.zero_grad()
            missed.backward()
        self.fitting.step()
        self.done += 1

    def _keep(self) -> None:
        tensors = _state(self.model)
        for name, parameter in self.trained.items():
            for what, value in self.fitting.state.get(parameter, {}).items():
                tensors[f"fitting/{what}/{name}"] = value.contiguous()
        write_atomically(self.checkpoint, save(tensors, {"made": self.made, "done": str(self.done)}))

    def _go_on(self) -> None:
        if not self.checkpoint.is_file() or _header(self.checkpoint).get("made") != self.made:
            return
        tensors = load_file(self.checkpoint)
        self.model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("fitting/")})
        for name, parameter in self.trained.items():
            kept = {w: tensors[f"fitting/{w}/{name}"] for w in ("step", "exp_avg", "exp_avg_sq")}
            self.fitting.state[parameter] = kept
        self.done = int(_header(self.checkpoint)["done"])


def _pace(share: float) -> float:
    """Learning rate against its largest: a straight rise, then a cosine."""
    if share < 0.15:
        return 0.05 + 0.95 * share / 0.15
    return 0.5 * (1 + float(np.cos(np.pi * (share - 0.15) / 0.85)))


def _dropping(model: nn.Module, recipe: Recipe, step: int) -> AbstractContextManager[None]:
    """Drop some of what goes into the head."""
    if not recipe.dropout:
        return nullcontext()
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)

    def drop(features: Tensor) -> Tensor:
        kept = torch.rand(features.shape, generator=generator) >= recipe.dropout
        return features * kept / (1 - recipe.dropout)

    return rewrite(model, {f"{head_of(model)[0]}:in": drop})


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
