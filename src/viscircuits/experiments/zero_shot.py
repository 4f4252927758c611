"""CLIP as a classifier: any `open_clip` model with a head made of class names and prompts.

The image tower's units are those of `load_model("open_clip:…")`; here both towers are loaded, the text tower writes the
captions once, and what remains is a network with an output for each class.

References
----------
Radford et al. 2021, arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from viscircuits.errors import ModelError
from viscircuits.models import ModelSpec, load_clip, wrap

PROMPTS = ("a photo of a {}.", "a blurry photo of a {}.", "a photo of the large {}.", "a photo of the small {}.")


class ZeroShot(nn.Module):
    """An image tower with captions for outputs: (image, 3, height, width) → (image, class)."""

    def __init__(self, visual: nn.Module, captions: Float[Tensor, "class dimension"], scale: float) -> None:
        super().__init__()
        self.visual = visual
        self.captions = nn.Parameter(captions * scale, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits: scaled cosines between images and captions."""
        return normalize(self.visual(images), dim=-1) @ self.captions.T


def zero_shot(
    address: str,
    classes: Sequence[str],
    *,
    weights: str | Path = "default",
    prompts: Sequence[str] = PROMPTS,
) -> ModelSpec:
    """An `open_clip` model that chooses between classes by their names.

    Parameters
    ----------
    address
        ``open_clip:ARCHITECTURE/PRETRAINED``, or without the latter and with a file of weights.
    classes
        Names; an underscore stands for a space.
    weights
        ``default``, ``none`` for random, or a file that holds both towers.
    prompts
        What is said of each class; ``{}`` is its name. A class's caption is the mean over prompts.

    Raises
    ------
    ModelError
        If the address is not of open_clip, or a prompt has no place for the name.
    """
    if not address.startswith("open_clip:"):
        raise ModelError(f"a zero-shot head needs a model with a text tower, open_clip:ARCHITECTURE; got {address!r}")
    lacking = [prompt for prompt in prompts if "{}" not in prompt]
    if lacking or not prompts:
        raise ModelError(f"a prompt has a place {{}} for the class's name; got {lacking[0] if lacking else 'none'!r}")
    clip, spec = load_clip(address, weights=weights)
    captions = torch.stack([_caption(clip, address, name.replace("_", " "), prompts) for name in classes])
    model = ZeroShot(clip.visual, captions, clip.logit_scale.exp().item()).eval()
    layers = [f"visual.{layer}" for layer in spec.layers] if spec.layers is not None else None
    assert spec.transform is not None  # open_clip models have one
    return wrap(
        model, spec.transform, layers, [name.replace("_", " ") for name in classes], address=f"{address}+zero-shot"
    )


def _caption(clip: Any, address: str, name: str, prompts: Sequence[str]) -> Float[Tensor, " dimension"]:
    import open_clip

    tokenizer = open_clip.get_tokenizer(address.removeprefix("open_clip:").split("/")[0])
    with torch.no_grad():
        directions = normalize(clip.encode_text(tokenizer([prompt.format(name) for prompt in prompts])), dim=-1)
    return normalize(directions.mean(0), dim=0)
