"""Running sums of attribution over the images of one set.

1. Everything kept is a sum over images: scores, their squares, signed contributions, activity, bootstrap
   replicates. Sums of two halves of a set add up to those of the whole, so batches, restarts and workers
   only ever add.
2. Sums are float64: a million images change the last digits of a float32 result, not the first. The variance
   comes from the sum of squares; in float64 it loses at most as many of sixteen digits as the mean has
   digits more than the spread, and unlike Welford's recurrence it merges by plain addition.
3. A bootstrap replicate counts each image Poisson(1) times. The counts depend on the seed, the set and the
   image's place in it alone, so they are the same however the images are batched or shared out. The
   replicates are float32, because there are many of them.

Nothing is kept of an image but its name and the beginning of its digest, and these only up to `MOST_NAMES`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from viscircuits.images import Batch, Skipped
from viscircuits.layers import Layer, by_unit
from viscircuits.matrices import AttributionMatrix

N_DIGEST = 16  # hexadecimal digits that tell one image from another in a result
MOST_NAMES = 100_000  # images named in a result; beyond, only their number and digests
_MODULUS = 2**256
# P(count ≤ k) for Poisson(1), written out so that no library's sampler decides the numbers
_POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(20)])

Sums = dict[str, Tensor]


def poisson_weights(seed: int, set_number: int, places: Sequence[int], n_draws: int) -> Int[Tensor, "image draw"]:
    """How often each image counts in each bootstrap draw: Poisson(1), from the seed and the image's place alone."""
    uniform = [np.random.default_rng((seed, set_number, place)).random(n_draws) for place in places]
    return torch.from_numpy(np.searchsorted(_POISSON, np.array(uniform), side="right").astype(np.int64))


@dataclass
class Running:
    """Sums over the images of one set so far; two of them add up.

    Parameters
    ----------
    chain
        The layers, in execution order.
    sums
        Name → sum. Every one is additive, so merging is addition.
    ways
        For each pair of layers the engines that were used, and the operations they left to autograd.
    kept
        For each pair of layers the scores of single images, where they were asked for.
    places
        Places of the images in `kept`.
    seen
        Which images these are.
    """

    chain: Sequence[Layer]
    sums: Sums
    ways: list[Way]
    kept: list[list[Tensor]]
    places: list[int]
    seen: Seen

    @classmethod
    def empty(cls, chain: Sequence[Layer], n_draws: int = 0) -> Running:
        """Sums over no image."""
        n_pairs = len(chain) - 1
        sums: Sums = {
            "weights": torch.zeros(n_draws, dtype=torch.int64),
            "seconds": torch.zeros(n_pairs, dtype=torch.float64),
        }
        for i, (source, target) in enumerate(pairwise(chain)):
            shape = (target.n_units, source.n_units)
            for name in ("values", "squares", "signed"):
                sums[f"{i}.{name}"] = torch.zeros(shape, dtype=torch.float64)
            if n_draws:
                sums[f"{i}.draws"] = torch.zeros((n_draws, *shape), dtype=torch.float32)
        for i, layer in enumerate(chain):
            sums[f"{i}.activity"] = torch.zeros(layer.n_units, dtype=torch.float64)
        return cls(chain, sums, [Way() for _ in range(n_pairs)], [[] for _ in range(n_pairs)], [], Seen())

    @property
    def n_images(self) -> int:
        """How many images were added."""
        return self.seen.n

    @property
    def n_draws(self) -> int:
        """How many bootstrap replicates are kept."""
        return len(self.sums["weights"])

    def begin(self, batch: Batch, values: Mapping[str, Tensor], weights: Int[Tensor, "image draw"]) -> None:
        """Add a batch's images, and the activity of every layer; its pairs follow."""
        for i, layer in enumerate(self.chain):
            norms = torch.linalg.vector_norm(by_unit(values[layer.address].detach(), layer.unit_axis).float(), dim=2)
            self.sums[f"{i}.activity"] += norms.double().sum(0).cpu()
        self.sums["weights"] += weights.sum(0)
        self.seen.add(batch)

    def add(
        self,
        i: int,
        scores: Float[Tensor, "image target source"],
        signed: Float[Tensor, "target source"],
        weights: Int[Tensor, "image draw"],
    ) -> None:
        """Add a batch's scores of pair `i`, and its signed contributions, summed over images."""
        sums = self.sums
        sums[f"{i}.signed"] += signed
        for score, counts in zip(scores, weights.tolist(), strict=True):
            exact = score.double()
            sums[f"{i}.values"] += exact
            sums[f"{i}.squares"] += exact.square_()
            for draw, count in enumerate(counts):
                if count:
                    sums[f"{i}.draws"][draw].add_(score, alpha=count)

    def keep(self, i: int, scores: Float[Tensor, "image target source"], places: Sequence[int]) -> None:
        """Keep a batch's scores of pair `i` image by image."""
        self.kept[i].append(scores)
        if i == 0:
            self.places += places

    def merge(self, other: Running) -> None:
        """Add the sums over other images."""
        for name, tensor in other.sums.items():
            self.sums[name] += tensor
        self.merge_lists(other)

    def merge_lists(self, other: Running) -> None:
        """Add what is known of other images, but not their sums."""
        for way, theirs in zip(self.ways, other.ways, strict=True):
            way.merge(theirs)
        for mine, others in zip(self.kept, other.kept, strict=True):
            mine += others
        self.places += other.places
        self.seen.merge(other.seen)

    def lists(self) -> Running:
        """The same without its sums."""
        return replace(self, sums={})

    def copy(self) -> Running:
        """The same again, to be changed without changing this one."""
        tensors, plain = self.state()
        return Running.from_state(self.chain, {name: tensor.clone() for name, tensor in tensors.items()}, plain)

    def matrix(self, i: int, rows: Tensor | None, *, last: bool) -> AttributionMatrix:
        """Averages of pair `i`; with `last` its sums are used up, which saves a copy of the replicates."""
        source, target = self.chain[i], self.chain[i + 1]
        n = self.n_images
        mean = self.sums[f"{i}.values"] / n
        matrix = AttributionMatrix(
            source.address,
            target.address,
            mean.float(),
            (self.sums[f"{i}.signed"] / n).float(),
            self._image_by_image(i),
            self._variance(i, mean),
            self._replicates(i, mean, last) if self.n_draws else None,
        )
        if rows is not None:
            _blank_others(matrix, rows)
        return matrix

    def activity(self) -> dict[str, Tensor]:
        """Mean over images of the L2 norm of each unit's map, for each layer."""
        return {
            layer.address: (self.sums[f"{i}.activity"] / self.n_images).float() for i, layer in enumerate(self.chain)
        }

    def _variance(self, i: int, mean: Tensor) -> Tensor | None:
        n = self.n_images
        if n < 2:
            return None
        squares = self.sums[f"{i}.squares"]
        return ((squares - n * mean.square()) / (n - 1)).clamp_(min=0).float()

    def _replicates(self, i: int, mean: Tensor, last: bool) -> Tensor:
        draws = self.sums[f"{i}.draws"] if last else self.sums[f"{i}.draws"].clone()
        for draw, total in zip(draws, self.sums["weights"].tolist(), strict=True):
            if total:
                draw /= total
            else:  # a draw that drew no image says nothing: the plain mean stands in
                draw.copy_(mean)
        return draws

    def _image_by_image(self, i: int) -> Tensor | None:
        if not self.kept[i]:
            return None
        order = torch.tensor(self.places).argsort()
        return torch.cat(self.kept[i])[order]

    def state(self) -> tuple[Sums, dict[str, Any]]:
        """Tensors and plain data from which `from_state` makes the same sums again."""
        kept = {f"{i}.kept": torch.cat(each) for i, each in enumerate(self.kept) if each}
        ways = [way.state() for way in self.ways]
        return {**self.sums, **kept}, {"ways": ways, "places": self.places, "seen": self.seen.state()}

    @classmethod
    def from_state(cls, chain: Sequence[Layer], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Running:
        """What `state` was taken of."""
        kept = [[tensors[f"{i}.kept"]] if f"{i}.kept" in tensors else [] for i in range(len(chain) - 1)]
        sums = {name: tensor for name, tensor in tensors.items() if not name.endswith(".kept")}
        ways = [Way.from_state(way) for way in plain["ways"]]
        return cls(chain, sums, ways, kept, list(plain["places"]), Seen.from_state(plain["seen"]))


def _blank_others(matrix: AttributionMatrix, rows: Tensor) -> None:
    others = torch.ones(matrix.values.shape[0], dtype=torch.bool)
    others[rows] = False
    for tensor in (matrix.values, matrix.signed, matrix.per_image, matrix.variance, matrix.draws):
        if tensor is not None:
            tensor[..., others, :] = math.nan


@dataclass
class Way:
    """How a pair's matrix was computed: by which engines, and which operations these left to autograd."""

    engines: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)

    def merge(self, other: Way) -> None:
        """Add how it was computed for other images."""
        self.engines |= other.engines
        self.left |= other.left

    def state(self) -> dict[str, list[str]]:
        """Plain data from which `from_state` makes the same again."""
        return {"engines": sorted(self.engines), "left": sorted(self.left)}

    @classmethod
    def from_state(cls, state: Mapping[str, list[str]]) -> Way:
        """What `state` was taken of."""
        return cls(set(state["engines"]), set(state["left"]))


@dataclass
class Seen:
    """Which images were run: names, digests of their files, and one digest of what the network was given.

    The digests of the whole are sums of SHA-256 modulo 2²⁵⁶: they do not depend on order, and those of two
    halves add up. Beyond `MOST_NAMES` images only the number and the two digests are kept.
    """

    n: int = 0
    n_skipped: int = 0
    images: list[tuple[int, str, str]] = field(default_factory=list)  # place, name, digest
    skipped: list[tuple[int, str, str]] = field(default_factory=list)  # place, name, reason
    files: int = 0
    inputs: int = 0

    @property
    def names(self) -> list[str]:
        """Names of the images, in the order of the set; none if there are too many."""
        return [name for _, name, _ in sorted(self.images)]

    def add(self, batch: Batch) -> None:
        """Add a batch; how images are batched does not matter."""
        places = batch.places or range(self.n, self.n + len(batch))
        for image, digest in zip(batch.images, batch.digests, strict=True):
            self.inputs = (self.inputs + _sha(_bytes(image))) % _MODULUS
            self.files = (self.files + _sha(digest.encode())) % _MODULUS
        short = (digest[:N_DIGEST] for digest in batch.digests)
        self.images += zip(places, batch.names, short, strict=True)
        self.n += len(batch)
        self.forget_if_many(self.n)

    def skip(self, skipped: Iterable[Skipped], first: int = 0) -> None:
        """Add images that could not be read, of a portion whose first image has the place `first`."""
        new = [(first, each.name, each.reason) for each in skipped]
        self.skipped += new
        self.n_skipped += len(new)
        self.forget_if_many(self.n)

    def merge(self, other: Seen) -> None:
        """Add other images."""
        self.n += other.n
        self.n_skipped += other.n_skipped
        self.files = (self.files + other.files) % _MODULUS
        self.inputs = (self.inputs + other.inputs) % _MODULUS
        self.images += other.images
        self.skipped += other.skipped
        self.forget_if_many(self.n)

    def describe(self, images: object) -> dict[str, Any]:
        """What a result says about an image set: address, count, digests, names, and what was skipped."""
        known = sorted(self.images)
        skipped = [[name, reason] for _, name, reason in sorted(self.skipped, key=lambda each: each[0])]
        if not self.n_skipped:
            skipped = [[each.name, each.reason] for each in getattr(images, "skipped", ())]
        return {
            "address": getattr(images, "address", type(images).__name__),
            "n": self.n,
            "digest": f"{self.files:064x}",
            "inputs": f"{self.inputs:064x}"[:N_DIGEST],
            "names": [name for _, name, _ in known],
            "digests": [digest for _, _, digest in known],
            "skipped": skipped,
            **({} if len(skipped) >= self.n_skipped else {"n_skipped": self.n_skipped}),
        }

    def forget_if_many(self, n: int) -> None:
        """Let go of the names if `n` images are too many to be named."""
        if n > MOST_NAMES:
            self.images = []
        if self.n_skipped > MOST_NAMES:
            self.skipped = []

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes the same again."""
        return {**vars(self), "files": f"{self.files:x}", "inputs": f"{self.inputs:x}"}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Seen:
        """What `state` was taken of."""
        images, skipped = ([(p, a, b) for p, a, b in state[each]] for each in ("images", "skipped"))
        files, inputs = (int(state[each], 16) for each in ("files", "inputs"))
        return cls(state["n"], state["n_skipped"], images, skipped, files, inputs)


def _sha(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest(), "big")


def _bytes(image: Tensor) -> bytes:
    return image.detach().cpu().float().contiguous().numpy().tobytes()
