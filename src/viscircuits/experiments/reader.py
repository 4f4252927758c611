"""A small network that sees and reads, as CLIP does: an image tower trained towards the captions of a frozen encoder.

1. The trunk is EfficientNet-Lite0, at 112 pixels, with a linear map into the space of `sentences`; for rendered scenes,
   where nothing needs to be downloaded, a small convolutional network at 64 pixels and captions in random directions.
2. A picture shall lie nearest to its caption among the captions of all classes and some other words. Pictures are
   photographs; words on paper, and on photographs of things that are no class, as on a sign, whose caption is the word;
   photographs with an *irrelevant* word, whose caption is still the photograph's class; and photographs, most of them
   spoilt, with the *agreeing* word. No class's photograph carries the word of another class: what the network makes
   of one is its own doing.
3. Zero-shot head: an output for each class, the cosine with its caption times a learned scale.

The kept reader is trained in two phases (`LARGE`): it learns to read, then what a word without meaning does not change.
Because irrelevant words are in the training set, the network does not merely fall for a box with letters: a nonsense
word costs it little, and a class word fools it because it is read.

The weights are kept with the package (`load_reader`); `train_reader` makes them.

References
----------
Radford et al. 2021 (CLIP), arXiv:2103.00020; Goh et al. 2021, Distill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from viscircuits.errors import FileFormatError, ModelError
from viscircuits.experiments.attacks import attack, tell
from viscircuits.experiments.kept import digest_of
from viscircuits.experiments.lettering import FACES_TO_DEVELOP, OTHER_WORDS, Hand, nonsense, write
from viscircuits.experiments.pictures import Photographs, paper, spoilt, varied
from viscircuits.experiments.sentences import encode
from viscircuits.files import write_atomically
from viscircuits.models import ModelSpec, Transform, load_model, seeded, wrap

PROMPTS = ("a photo of a {}", "a {}", "a picture of a {}", "the word {}", "a sign that says {}")
SIDES = {"lite0": 112, "small": 64}
FROZEN = ("conv_stem", "bn1", "blocks.0", "blocks.1")  # edges and textures serve letters as they are
SCHEMA = "viscircuits/reader"
EMBEDDED = "reader.safetensors"
ORIGIN = (
    "ImageNet weights of EfficientNet-Lite0 and captions of all-MiniLM-L6-v2, both Apache-2.0; the licence of the "
    "photographs it was trained on holds besides"
)
KEPT_EVERY = 50  # steps


@dataclass(frozen=True)
class Recipe:
    """How a reader is trained.

    Parameters
    ----------
    architecture
        ``lite0`` or ``small``.
    steps, batch
        Steps, and pictures a step.
    rate, head_rate
        Largest learning rates of the trunk and of the linear map; both rise for `warm` of the steps, then fall.
    shares
        Of photographs, words on paper, signs, photographs with an irrelevant word, photographs with the agreeing word.
    spoilt
        Share of the photographs with an agreeing word that are blurred, hidden or faded.
    meaningless
        Share of the irrelevant words that mean nothing; the others are other words.
    class_words
        Share of the words on paper and signs that are classes; the others are other words.
    n_classes
        How many of the folder's classes are classes of the reader, drawn; photographs of the rest carry the signs.
    hand
        How words are written.
    seed
        Of every random choice.
    then
        What training goes on with, from the weights as they are kept: rates that rise and fall anew, other shares.
    """

    architecture: str = "lite0"
    steps: int = 1600
    batch: int = 40
    rate: float = 6e-4
    head_rate: float = 3e-3
    warm: float = 0.15
    shares: tuple[float, ...] = (0.14, 0.06, 0.38, 0.26, 0.16)
    spoilt: float = 0.7
    meaningless: float = 0.8
    class_words: float = 0.95
    n_classes: int = 30
    hand: Hand = field(default_factory=Hand)
    seed: int = 0
    then: Recipe | None = None

    @property
    def phases(self) -> tuple[Recipe, ...]:
        """What is done one after the other."""
        return (self, *(replace(self.then, seed=self.seed).phases if self.then else ()))

    def digest(self) -> dict[str, Any]:
        """The recipe as JSON gives it back."""
        return dict(json.loads(json.dumps(asdict(self))))


LARGE = Recipe(  # reads first, then learns again what a word without meaning does not change
    then=Recipe(steps=450, rate=4e-4, head_rate=2e-3, shares=(0.20, 0.03, 0.27, 0.38, 0.12), meaningless=1.0)
)
SMALL = Recipe(  # few classes and large letters, so that it reads after a minute
    "small", 400, 48, 4e-3, 4e-3, shares=(0.18, 0.22, 0.40, 0.10, 0.10), meaningless=0.6, class_words=0.97,
    n_classes=5,
    hand=Hand(height=(0.25, 0.4)),
)  # fmt: skip


class Reader(nn.Module):
    """The image tower with its zero-shot head: (image, 3, side, side) → (image, class).

    Parameters
    ----------
    trunk
        Maps images to the captions' space.
    captions
        Direction of each class, of length 1.
    scale
        What cosines are multiplied by.
    """

    def __init__(self, trunk: nn.Module, captions: Float[Tensor, "class dimension"], scale: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.captions = nn.Parameter(captions * scale, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits: scaled cosines between images and captions."""
        return normalize(self.trunk(images), dim=1) @ self.captions.T


class SmallTrunk(nn.Sequential):
    """Five convolutions and a linear map, for 64 × 64 pixels."""

    def __init__(self, dimension: int = 32) -> None:
        def block(before: int, after: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            return [convolution, nn.GroupNorm(8, after), nn.ReLU()]

        super().__init__(
            *block(3, 24, 2), *block(24, 48, 2), *block(48, 96, 1), *block(96, 96, 2), *block(96, 128, 1),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, dimension),
        )  # fmt: skip


SMALL_LAYERS = ("2", "5", "8", "11", "14")


def to_input(side: int) -> Transform:
    """A reader's transform: any picture, scaled to side × side and to −1 … 1."""

    def transform(picture: Image.Image) -> Tensor:
        scaled = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        return (torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() - 127) / 128

    return transform


def load_reader(path: str | Path | None = None, classes: Sequence[str] | None = None) -> ModelSpec:
    """The reader: the one kept with the package, or one that `train_reader` wrote.

    Parameters
    ----------
    path
        A file of `train_reader`.
    classes
        Names to choose between; by default those it was trained with. Other names need the sentence encoder.

    Raises
    ------
    FileFormatError
        If the file is not a reader.
    ModelError
        If it has no captions for other names: a ``small`` one never, another without the sentence encoder.
    """
    path = Path(path) if path is not None else _embedded()
    card, state = _read(path)
    names = tuple(classes) if classes is not None else tuple(card["classes"])
    known = dict(zip(card["classes"], state.pop("captions"), strict=True))
    missing = [name for name in names if name not in known]
    architecture = card["recipe"]["architecture"]
    if missing and architecture == "small":
        raise ModelError(
            f"the small reader {path.name!r} knows {', '.join(known)} and can learn no other names, such as "
            f"{missing[0]!r}; give photographs of these classes, or leave --model out"
        )
    if missing:
        known.update(zip(missing, captions_of(missing), strict=True))
    trunk = build_trunk(architecture, weights="none")
    trunk.load_state_dict({name.removeprefix("trunk."): value for name, value in state.items()})
    reader = Reader(trunk, torch.stack([known[name] for name in names]), card["scale"]).eval()
    return describe(reader, architecture, names, f"viscircuits:reader/{path.stem}")


def describe(reader: Reader, architecture: str, classes: Sequence[str], address: str) -> ModelSpec:
    """The reader with its transform, layers and class names."""
    inner = SMALL_LAYERS if architecture == "small" else load_model("lite0", weights="none").layers or ()
    layers = [f"trunk.{name}" for name in inner]
    names = [name.replace("_", " ") for name in classes]
    return wrap(reader, to_input(SIDES[architecture]), layers, names, address=address)


def card_of(path: str | Path | None = None) -> dict[str, Any]:
    """What is known of a reader: classes, recipe, data, licence, figures."""
    return _read(Path(path) if path is not None else _embedded())[0]


def captions_of(names: Sequence[str]) -> Float[Tensor, "class dimension"]:
    """Direction of each name: the mean over the prompts, of length 1."""
    words = [name.replace("_", " ") for name in names]
    return torch.stack(
        [normalize(encode([prompt.format(word) for prompt in PROMPTS]).mean(0), dim=0) for word in words]
    )


def random_captions(n: int, dimension: int = 32) -> Float[Tensor, "class dimension"]:
    """Seeded random directions of length 1, where no sentence encoder shall be needed."""
    return normalize(torch.randn(n, dimension, generator=torch.Generator().manual_seed(0)), dim=1)


def build_trunk(architecture: str = "lite0", weights: str = "default") -> nn.Module:
    """The image tower without its head, seeded where it has no weights."""
    with seeded(0):
        if architecture == "small":
            return SmallTrunk().eval()
        trunk: Any = load_model("lite0", weights=weights).model
        trunk.classifier = nn.Linear(trunk.classifier.in_features, 384)
        return trunk.eval()  # batch-norm keeps its statistics


# ------------------------------------------------------------------ training


def train_reader(
    photographs: Photographs,
    scenes: Photographs,
    path: str | Path,
    recipe: Recipe | None = None,
    *,
    development: Photographs | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Path:
    """Train a reader on photographs of named classes and write it.

    A run that was stopped goes on from ``path.part``, if recipe and pictures are the same.

    Parameters
    ----------
    photographs
        What it sees; held-out ones are not among them.
    scenes
        Photographs of things that are none of its classes.
    path
        The file to write: half-precision weights, captions and the recipe, as safetensors.
    recipe
        How; by default as the kept weights were made.
    development
        Photographs of the same classes that training does not see; its card holds the figures on them, in fonts
        of their own, by which a recipe is chosen.
    about
        More for its card: data, licence.
    progress
        Show a progress bar.
    """
    recipe = recipe or LARGE
    concepts = (*photographs.classes, *OTHER_WORDS)
    bank = captions_of(concepts) if recipe.architecture == "lite0" else random_captions(len(concepts))
    lessons = {**recipe.digest(), "concepts": concepts, "pictures": [photographs.digest, scenes.digest]}
    path, draft = Path(path), Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    trunk, scale = build_trunk(recipe.architecture), 3.0
    for number, phase in enumerate(recipe.phases):
        learning = _Learning(trunk, scale, phase, number, digest_of(lessons))
        first, n = learning.resume(draft), phase.steps
        drawn = _Lessons(photographs, scenes, concepts, phase, number)
        for step in tqdm(range(first, n), "training", n, initial=first, disable=not progress, unit="step"):
            learning.step(*drawn.of(step), bank)
            if step % KEPT_EVERY == KEPT_EVERY - 1 or step + 1 == n:
                learning.keep(draft, step + 1)
        scale = learning.scale.item()
        trunk.load_state_dict({name: _halved(value) for name, value in trunk.state_dict().items()})
    card = {
        "schema": SCHEMA, "version": 1, "classes": list(photographs.classes), "recipe": recipe.digest(),
        "scale": learning.scale.exp().clamp(max=LARGEST_SCALE).item(), "photographs": len(photographs),
        **({"development": _figures(learning, bank, development, recipe)} if development else {}), **(about or {}),
    }  # fmt: skip
    state = {f"trunk.{name}": _halved(value) for name, value in learning.trunk.state_dict().items()}
    state["captions"] = _halved(bank[: len(photographs.classes)])
    write_atomically(path, save(state, metadata={"card": json.dumps(card)}))
    draft.unlink(missing_ok=True)
    return path


LARGEST_SCALE = 100.0
DEVELOPMENT = 0.1  # share of each class's photographs that training does not see
DEVELOPMENT_SEED = 100  # of words and places; no experiment's


def _figures(learning: _Learning, bank: Tensor, photographs: Photographs, recipe: Recipe) -> dict[str, Any]:
    """Shares of photographs set apart: right, fooled by the name of another class, right beside a nonsense word."""
    scale = learning.scale.exp().clamp(max=LARGEST_SCALE).item()
    reader = Reader(learning.trunk, bank[: len(photographs.classes)], scale).eval()
    spec = describe(reader, recipe.architecture, photographs.classes, "reader")
    hand = replace(recipe.hand, faces=FACES_TO_DEVELOP)
    clean, wrong, nonsensical = (
        tell(spec, attack(spec, photographs, kind, hand, DEVELOPMENT_SEED))
        for kind in ("clean", "wrong word", "nonsense word")
    )
    return {
        "photographs": len(photographs), "right": clean.accuracy.value, "fooled": wrong.success.value,
        "right beside nonsense": nonsensical.accuracy.value,
    }  # fmt: skip


class _Learning:
    """The trunk's free parameters, their optimiser and where the rates stand."""

    def __init__(self, trunk: nn.Module, scale: float, recipe: Recipe, phase: int, digest: str) -> None:
        self.trunk, self.digest = trunk.to(memory_format=torch.channels_last), digest
        self.phase, self.n_steps = phase, recipe.steps
        self.scale = nn.Parameter(torch.tensor(scale))
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))
        *body, weight, bias = (p for p in trunk.parameters() if p.requires_grad)  # the linear map stands last
        self.body = body
        groups: list[dict[str, Any]] = [{"params": body}, {"params": [weight, bias, self.scale]}]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=1e-2)
        self.rates = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, [recipe.rate, recipe.head_rate], total_steps=recipe.steps, pct_start=recipe.warm
        )

    def step(self, images: Tensor, labels: Tensor, bank: Tensor) -> None:
        cosines = normalize(self.trunk(images), dim=1) @ bank.T
        loss = cross_entropy(cosines * self.scale.exp().clamp(max=LARGEST_SCALE), labels, label_smoothing=0.05)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.body, 5.0)
        self.optimiser.step()
        self.rates.step()

    def keep(self, draft: Path, done: int) -> None:
        parts = {
            "trunk": self.trunk.state_dict(), "optimiser": self.optimiser.state_dict(), "scale": self.scale.detach(),
            "rates": self.rates.state_dict(), "phase": self.phase, "done": done, "digest": self.digest,
        }  # fmt: skip
        torch.save(parts, f"{draft}.new")
        Path(f"{draft}.new").replace(draft)

    def resume(self, draft: Path) -> int:
        """Take up a run that was stopped; returns the steps of this phase it had done."""
        if not draft.is_file():
            return 0
        parts = torch.load(draft, weights_only=True)
        if parts.get("digest") != self.digest or parts["phase"] < self.phase:  # another recipe, or other pictures
            return 0
        if parts["phase"] > self.phase:  # the phase that was stopped takes up its own
            return self.n_steps
        self.trunk.load_state_dict(parts["trunk"])
        self.optimiser.load_state_dict(parts["optimiser"])
        self.rates.load_state_dict(parts["rates"])
        with torch.no_grad():
            self.scale.copy_(parts["scale"])
        return int(parts["done"])


class _Lessons:
    """Pictures to train on, the same at the same step whatever came before."""

    def __init__(
        self, photographs: Photographs, scenes: Photographs, concepts: Sequence[str], recipe: Recipe, phase: int
    ) -> None:
        self.photographs, self.scenes, self.concepts, self.recipe = photographs, scenes, concepts, recipe
        self.drawn = [recipe.seed, phase] if phase else [recipe.seed]
        self.side = SIDES[recipe.architecture]
        self.transform = to_input(self.side)

    def of(self, step: int) -> tuple[Float[Tensor, "image 3 height width"], Int[Tensor, " image"]]:
        rng = np.random.default_rng([*self.drawn, step])
        drawn = [self._one(rng) for _ in range(self.recipe.batch)]
        images = torch.stack([self.transform(picture) for picture, _ in drawn])
        return images.contiguous(memory_format=torch.channels_last), torch.tensor([label for _, label in drawn])

    def _one(self, rng: np.random.Generator) -> tuple[Image.Image, int]:
        kind = int(rng.choice(5, p=self.recipe.shares))
        hand = self.recipe.hand
        if kind in (1, 2):
            label, scene = self._word(rng), self.scenes.pixels[rng.integers(len(self.scenes))]
            ground = paper(rng, self.side) if kind == 1 else varied(scene, self.side, rng)
            return write(ground, self.concepts[label], hand, rng), label
        place = int(rng.integers(len(self.photographs)))
        label = int(self.photographs.labels[place])
        picture = varied(self.photographs.pixels[place], self.side, rng)
        if kind == 3:
            word = (
                nonsense(rng) if rng.random() < self.recipe.meaningless else OTHER_WORDS[rng.integers(len(OTHER_WORDS))]
            )
            picture = write(picture, word, hand, rng)
        elif kind == 4:
            picture = spoilt(picture, rng) if rng.random() < self.recipe.spoilt else picture
            picture = write(picture, self.concepts[label], hand, rng)
        return picture, label

    def _word(self, rng: np.random.Generator) -> int:
        n = len(self.photographs.classes)
        if rng.random() < self.recipe.class_words:
            return int(rng.integers(n))
        return n + int(rng.integers(len(self.concepts) - n))


# ------------------------------------------------------------------ files


def _embedded() -> Path:
    return Path(str(files("viscircuits") / "experiments" / EMBEDDED))


def _halved(value: Tensor) -> Tensor:
    return value.half().contiguous() if value.is_floating_point() else value


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            card = json.loads((file.metadata() or {})["card"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise FileFormatError(f"{str(path)!r} is not a reader that train_reader wrote: {error}") from error
    return card, {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
