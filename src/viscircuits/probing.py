"""Probes: run the network on a few pictures, and keep what the circuit's units and its outputs made of them.

1. Each picture is made as small as the network's own transform will take without loss of its input's detail, and
   that smaller picture is the probe: it is kept, and it is what the network runs on.
2. One forward pass gives each unit's largest value over positions, and the strongest outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from viscircuits.ablation import describe_layers
from viscircuits.circuit import Circuit, Unit
from viscircuits.contract import Answer
from viscircuits.errors import ImageError, ModelError
from viscircuits.hooks import evaluating, forward, record
from viscircuits.images import ImageSet, Picture, batches, open_images
from viscircuits.layers import Layer, by_unit
from viscircuits.models import ModelSpec
from viscircuits.probes import Probes

N_ANSWERS = 5
SPARE = 1.3  # transforms resize to a little more than the network's input, then crop


def probe(
    model: ModelSpec, circuit: Circuit, images: Mapping[str, Iterable[Picture]], *, most: int = 8, batch_size: int = 8
) -> Probes:
    """What the circuit's units and the network's outputs make of some pictures.

    Parameters
    ----------
    model
        The network, with its transform.
    circuit
        Whose units are watched.
    images
        Kind, such as ``concept`` or ``reference`` → pictures; an image set, for one.
    most
        How many of each kind are taken, from the first on.
    batch_size
        Pictures per forward pass.

    Raises
    ------
    ModelError
        If the model has no transform.
    ImageError
        If there is no picture.
    """
    if model.transform is None or model.input_size is None:
        raise ModelError("probes are pictures, and need the model's transform: viscircuits.wrap(model, transform)")
    names, kinds, pictures = [], [], []
    for kind, source in images.items():
        for picture in islice(source, most):
            names.append(picture.name)
            kinds.append(kind)
            pictures.append(reduced(picture.image, model.input_size))
    if not pictures:
        raise ImageError("there is no picture to probe the network with")
    units = tuple(circuit)
    shown: ImageSet = open_images(pictures)
    activations, answers = [], []
    layers: list[Layer] = []
    for batch in batches(shown, model.transform, batch_size):
        layers = layers or describe_layers(model, batch.images, circuit.layers)
        values, found = respond(model, batch.images, units, layers)
        activations.append(values)
        answers += found
    return Probes(tuple(names), tuple(kinds), tuple(pictures), units, np.concatenate(activations), tuple(answers))


def respond(
    model: ModelSpec,
    images: Float[Tensor, "image channel height width"],
    units: Sequence[Unit],
    layers: Sequence[Layer],
) -> tuple[Float[np.ndarray, "image unit"], list[tuple[Answer, ...]]]:
    """Each unit's largest value over positions, and the network's answers, on images already transformed.

    Parameters
    ----------
    layers
        Descriptions of the layers the units lie in (`viscircuits.ablation.describe_layers`).
    """
    with evaluating(model.model), torch.no_grad(), record(model.model, [layer.address for layer in layers]) as values:
        outputs = forward(model.model, images)
    peaks = {layer.address: by_unit(values[layer.address], layer.unit_axis).amax(2) for layer in layers}
    found = torch.stack([peaks[unit.layer][:, unit.index] for unit in units], dim=1)  # (image, unit)
    return found.float().cpu().numpy(), [answers_of(model, row) for row in outputs]


def answers_of(model: ModelSpec, output: Float[Tensor, "..."], n: int = N_ANSWERS) -> tuple[Answer, ...]:
    """The strongest of one image's outputs with their probabilities; none for a network that gives embeddings."""
    if model.outputs == "embedding" or output.ndim != 1:
        return ()
    probabilities = output.detach().float().softmax(0).cpu()
    best = probabilities.topk(min(n, len(probabilities)))
    labels = model.classes
    return tuple(
        {
            "index": index,
            "label": labels[index][0] if labels is not None and index < len(labels) else f"output {index}",
            "probability": float(f"{probability:.6g}"),
        }
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def reduced(image: Image.Image, input_size: tuple[int, int]) -> Image.Image:
    """The picture, no larger than is of use: its shorter side a little more than the network's input."""
    wanted = math.ceil(SPARE * max(input_size))
    if min(image.size) <= wanted:
        return image.convert("RGB")
    share = wanted / min(image.size)
    width, height = (max(1, round(side * share)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
