"""What is measured: functions of tensors and of circuits, with no model in sight.

1. *Behaviour*: `accuracy`, `kl_divergence`, `cosine_distance` set the network's outputs before
   and after an intervention beside each other.
2. *Explanation*: `faithfulness`, `completeness`, `minimality`, `selectivity` sum up what a circuit does,
   `transfer` what is left of it on other images, and `area_between`, `selectivity_area`, `cpr`, `cmd` a
   curve of such numbers.
3. *Agreement*: `pearson` and `spearman` compare two scores of the same units, `auroc` and
   `precision_recall` a score with a known circuit; `jaccard`, `overlap` and `overlap_together` compare
   circuits, always beside what chance would give.
4. *Certainty*: `bootstrap` puts an interval around any of them by resampling images; `stability` says how
   often each unit is chosen when images are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from viscircuits.circuit import Circuit
from viscircuits.errors import ViscircuitsError

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Interval:
    """A statistic with the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerOverlap:
    """How far two circuits agree in one layer, beside what chance would give.

    `chance` is the expected Jaccard index of two random sets of these sizes, `p_value` the
    probability that they share at least `shared` units.
    """

    layer: str
    n_units: int
    size_a: int
    size_b: int
    shared: int
    jaccard: float
    chance: float
    p_value: float


# --------------------------------------------------------------------- behaviour


def correct(logits: Float[Tensor, "image output"], labels: Int[Tensor, " image"]) -> Float[Tensor, " image"]:
    """Return 1 for each image whose largest logit is its label's, else 0."""
    return (logits.argmax(1) == labels.to(logits.device)).double()


def accuracy(logits: Float[Tensor, "image output"], labels: Int[Tensor, " image"]) -> float:
    """Share of images whose largest logit is their label's.

    Raises
    ------
    ViscircuitsError
        If there is no image.
    """
    return _mean("accuracy", correct(logits, labels))


def kl_divergence(
    full_logits: Float[Tensor, "image output"], edited_logits: Float[Tensor, "image output"]
) -> Float[Tensor, " image"]:
    """How far each image's class probabilities move under an edit, in nats: 0 not at all.

    ``KL(full ‖ edited) = Σ_y p(y) (log p(y) − log q(y))`` with p of the whole network, q of the
    edited one, computed in float64.

    References
    ----------
    Conmy et al. 2023, arXiv:2304.14997 (the metric of ACDC).
    """
    full = torch.log_softmax(full_logits.double(), dim=1)
    edited = torch.log_softmax(edited_logits.double(), dim=1)
    return (full.exp() * (full - edited)).sum(1).clamp(min=0)  # (image,)


def cosine_distance(
    full: Float[Tensor, "image feature"], edited: Float[Tensor, "image feature"]
) -> Float[Tensor, " image"]:
    """How far each image's embedding turns under an edit: 0 not at all, 1 right angle, 2 opposite.

    The length of an embedding plays no part. A zero embedding has no direction and counts as 1.
    """
    return 1 - torch.nn.functional.cosine_similarity(full.double(), edited.double(), dim=1)


# ------------------------------------------------------------------- explanation


def faithfulness(full: Float[Tensor, " image"], kept: Float[Tensor, " image"], empty: Float[Tensor, " image"]) -> float:
    """Share of the model's behaviour that the circuit alone recovers: 1 all of it, 0 none.

    (kept − empty) / (full − empty), each averaged over images first, so that one easy image
    cannot divide by nearly zero. May leave [0, 1]: a circuit can overshoot.

    Parameters
    ----------
    full, kept, empty
        The task metric with nothing, all but the circuit, and everything ablated.

    Raises
    ------
    ViscircuitsError
        If ablating everything changes nothing: the ratio has no meaning.

    References
    ----------
    Marks et al. 2024, arXiv:2403.19647.
    """
    floor = _mean("faithfulness", empty)
    behaviour = _mean("faithfulness", full) - floor
    if behaviour == 0:
        raise ViscircuitsError(
            f"faithfulness has no meaning here: the metric is {floor:g} with everything ablated and the same with "
            "nothing ablated; choose a metric that the layers influence"
        )
    return (_mean("faithfulness", kept) - floor) / behaviour


def completeness(
    full: Float[Tensor, " image"], without: Float[Tensor, " image"], empty: Float[Tensor, " image"]
) -> float:
    """Share of the behaviour that is left when the circuit is removed: 0 is a complete circuit.

    The `faithfulness` of everything but the circuit.

    Parameters
    ----------
    full, without, empty
        The task metric with nothing, only the circuit, and everything ablated.

    References
    ----------
    Marks et al. 2024, arXiv:2403.19647.
    """
    return faithfulness(full, without, empty)


def minimality(full: Float[Tensor, " image"], without: Float[Tensor, "unit image"]) -> float:
    """Least change that removing a single unit of the circuit makes: 0 if some unit could as well be left out.

    ``min over units of │mean(full) − mean(without the unit)│``, in the task metric's own unit. The
    change counts whatever its sign: a suppressor is no idle unit.

    Parameters
    ----------
    full
        The task metric with nothing removed.
    without
        The task metric with each unit of the circuit removed alone.

    Raises
    ------
    ViscircuitsError
        If the circuit has no unit or there is no image.

    References
    ----------
    Wang et al. 2022, arXiv:2211.00593 (minimality of the IOI circuit, there with the best set removed besides).
    """
    if len(without) == 0:
        raise ViscircuitsError("minimality is the least over a circuit's units, and the circuit has none")
    if without.shape[1] == 0:
        raise ViscircuitsError("minimality needs at least one image, got none")
    return (full.double().mean() - without.double().mean(1)).abs().min().item()


def selectivity(
    concept_before: Float[Tensor, " concept"],
    concept_after: Float[Tensor, " concept"],
    others_before: Float[Tensor, " other"],
    others_after: Float[Tensor, " other"],
) -> float:
    """How much more an edit hurts the concept than everything else: 1 at best, 0 no difference.

    (fall on the concept's images) − (fall on the other images), of a per-image behaviour such
    as `correct`.

    References
    ----------
    Rajaram et al. 2023, arXiv:2404.14349 (the two curves; their difference is ours).
    """
    fall = _mean("selectivity", concept_before) - _mean("selectivity", concept_after)
    fall_of_others = _mean("selectivity", others_before) - _mean("selectivity", others_after)
    return fall - fall_of_others


Samples = tuple[Float[Tensor, " concept"], Float[Tensor, " concept"], Float[Tensor, " other"], Float[Tensor, " other"]]


def transfer(here: Samples, there: Samples) -> float:
    """Selectivity on other images less selectivity here: 0 carries over whole, below 0 something is lost.

    Parameters
    ----------
    here, there
        The four samples of `selectivity`, on either pair of image sets.
    """
    return selectivity(*there) - selectivity(*here)


def selectivity_area(
    x: Float[Tensor, " point"], concept: Float[Tensor, "point image"], others: Float[Tensor, "point other"]
) -> float:
    """Area between the concept's and the others' curves over the fraction pruned, each less its own start.

    ``∫ selectivity(x) dx`` by the trapezoid rule: over x from 0 to 1 the mean selectivity on the way, at most 1
    for a behaviour between 0 and 1.

    Parameters
    ----------
    x
        Fractions pruned, rising; the first one is the untouched network.
    concept, others
        The behaviour at each fraction, one number for each image.

    Raises
    ------
    ViscircuitsError
        As `area_between`, and if there is no image.

    References
    ----------
    Rajaram et al. 2023, arXiv:2404.14349 (the curves; the area is ours).
    """
    if 0 in (concept.shape[1], others.shape[1]):
        raise ViscircuitsError("the area between the curves needs at least one image of either kind")
    falls = [curve.double().mean(1) for curve in (concept, others)]
    return area_between(x, falls[0][0] - falls[0], falls[1][0] - falls[1])


def area_between(x: Float[Tensor, " point"], a: Float[Tensor, " point"], b: Float[Tensor, " point"]) -> float:
    """Area by which curve `a` lies above curve `b`, negative where it lies below.

    ``∫ (a − b) dx`` by the trapezoid rule.

    Raises
    ------
    ViscircuitsError
        If there are fewer than two points or `x` does not rise.
    """
    if len(x) < 2 or not bool((x.diff() > 0).all()):
        raise ViscircuitsError(f"the area under a curve needs two or more rising x, got {x.tolist()}")
    return torch.trapezoid(a.double() - b.double(), x.double()).item()


def cpr(faithfulness: Float[Tensor, " fraction"], fractions: Float[Tensor, " fraction"] | None = None) -> float:
    """Circuit performance ratio: the area under faithfulness against circuit size, more is better.

    ``∫ f dk`` by the trapezoid rule on a linear axis. A circuit that recovers everything at every
    size has .999 on the default sizes.

    Parameters
    ----------
    faithfulness
        One value for each circuit size.
    fractions
        Share of the network in the circuit; by default the ten sizes of MIB, .001 to 1.

    References
    ----------
    Mueller et al. 2025, MIB, arXiv:2504.13151.
    """
    return area_between(_sizes(faithfulness, fractions), faithfulness, torch.zeros_like(faithfulness))


def cmd(faithfulness: Float[Tensor, " fraction"], fractions: Float[Tensor, " fraction"] | None = None) -> float:
    """Circuit–model distance: the area between faithfulness and 1 against circuit size, 0 is best.

    ``∫ |1 − f| dk``, with the parameters and reference of `cpr`. Unlike `cpr` it also counts
    overshooting against a circuit.
    """
    distance = (1 - faithfulness).abs()
    return area_between(_sizes(faithfulness, fractions), distance, torch.zeros_like(distance))


def _sizes(faithfulness: Tensor, fractions: Tensor | None) -> Tensor:
    if fractions is not None:
        return fractions
    if len(faithfulness) != len(MIB_FRACTIONS):
        raise ViscircuitsError(
            f"{len(faithfulness)} values for the {len(MIB_FRACTIONS)} circuit sizes of MIB; "
            "give the sizes they were measured at as fractions"
        )
    return torch.tensor(MIB_FRACTIONS, dtype=torch.float64)


def _mean(name: str, values: Tensor) -> float:
    if len(values) == 0:
        raise ViscircuitsError(f"{name} needs at least one image, got none")
    return values.double().mean().item()


# --------------------------------------------------------------------- agreement


def ranks(values: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """Place of each value among all, from 1 for the least; equal values share the mean of their places."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[inverse].double()


def pearson(a: Float[Tensor, " unit"], b: Float[Tensor, " unit"]) -> float:
    """Linear correlation of two scores of the same units: 1 where one is a rising line of the other.

    Raises
    ------
    ViscircuitsError
        If there are fewer than two units, either score is the same for all, or one is not finite.
    """
    _check_scores("a correlation", a, b)
    centred = [score.double() - score.double().mean() for score in (a, b)]
    norms = [torch.linalg.vector_norm(each) for each in centred]
    return float((centred[0] @ centred[1] / (norms[0] * norms[1])).clamp(-1, 1))


def spearman(a: Float[Tensor, " unit"], b: Float[Tensor, " unit"]) -> float:
    """Correlation of two scores' ranks: 1 where they put the units in the same order.

    Equal scores share their mean rank. With `pearson` the agreement of an approximate score with exact
    ablation.

    Raises
    ------
    ViscircuitsError
        As `pearson`.

    References
    ----------
    Spearman 1904, doi:10.2307/1412159; RelP 2025, arXiv:2508.21258 (as a measure of attribution).
    """
    _check_scores("a correlation", a, b)
    return pearson(ranks(a), ranks(b))


def auroc(scores: Float[Tensor, " unit"], truth: Bool[Tensor, " unit"]) -> float:
    """Probability that a unit of the true circuit scores above one that is not in it; ties count half.

    The area under the ROC curve, which is the Mann–Whitney statistic over the number of pairs: 1 for a
    perfect score, ½ for one that knows nothing.

    Raises
    ------
    ViscircuitsError
        If the true circuit holds no unit or all of them, or a score is not a number.

    References
    ----------
    Mann, Whitney 1947, doi:10.1214/aoms/1177730491; Conmy et al. 2023, arXiv:2304.14997 (for circuits).
    """
    n_true, n = int(truth.sum()), len(truth)
    if not 0 < n_true < n:
        raise ViscircuitsError(f"AUROC compares units in the true circuit with others, got {n_true} in it of {n}")
    _check_numbers(scores)
    above = ranks(scores)[truth].sum().item() - n_true * (n_true + 1) / 2  # pairs in the right order
    return above / (n_true * (n - n_true))


def precision_recall(
    scores: Float[Tensor, " unit"], truth: Bool[Tensor, " unit"], size: int | None = None
) -> tuple[float, float]:
    """Share of the chosen units that are in the true circuit, and share of the true circuit that is chosen.

    Parameters
    ----------
    scores
        One for each unit; the highest are chosen, among equals those of lowest index.
    truth
        Whether each unit is in the true circuit.
    size
        How many are chosen; by default as many as the true circuit has: then both shares are the same.

    Raises
    ------
    ViscircuitsError
        If the true circuit is empty, `size` does not fit, or a score is not a number.
    """
    n_true = int(truth.sum())
    size = n_true if size is None else size
    if not n_true:
        raise ViscircuitsError("the true circuit has no units: there is nothing to recall")
    if not 1 <= size <= len(truth):
        raise ViscircuitsError(f"cannot choose {size} of {len(truth)} units")
    _check_numbers(scores)
    chosen = torch.sort(scores, descending=True, stable=True).indices[:size]
    hits = int(truth[chosen].sum())
    return hits / size, hits / n_true


def _check_scores(what: str, a: Tensor, b: Tensor) -> None:
    if len(a) < 2:
        raise ViscircuitsError(f"{what} needs two units or more, got {len(a)}")
    for scores in (a, b):
        _check_numbers(scores)
        if bool((scores == scores[0]).all()):
            raise ViscircuitsError(f"{what} has no meaning here: all {len(a)} scores are {float(scores[0]):g}")


def _check_numbers(scores: Tensor) -> None:
    if not bool(scores.isfinite().all()):
        raise ViscircuitsError(f"{int((~scores.isfinite()).sum())} of {len(scores)} scores are not finite")


def jaccard(a: Collection[int], b: Collection[int]) -> float:
    """Share of the units in either set that are in both: 1 equal, 0 disjoint; two empty sets are equal.

    References
    ----------
    Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x.
    """
    union = len(set(a) | set(b))
    return len(set(a) & set(b)) / union if union else 1.0


def chance_jaccard(n: int, a: int, b: int) -> float:
    """Expected `jaccard` of two independent random sets of `a` and `b` out of `n` units.

    ``Σ_i P(i) · i / (a + b − i)``, where i, the number shared, is hypergeometric.
    """
    if a == b == 0:
        return 1.0
    return math.fsum(p * shared / (a + b - shared) for shared, p in _shared_distribution(n, a, b))


def overlap_p_value(n: int, a: int, b: int, shared: int) -> float:
    """Probability that two independent random sets of `a` and `b` out of `n` units share `shared` or more.

    The upper tail of the hypergeometric distribution (Fisher's exact test, one-sided).
    """
    return min(1.0, math.fsum(p for i, p in _shared_distribution(n, a, b) if i >= shared))


def overlap(a: Circuit, b: Circuit) -> list[LayerOverlap]:
    """Agreement of two circuits in each layer that both have, in the order of the first.

    Raises
    ------
    ViscircuitsError
        If they have no layer in common, or a common layer of different width.
    """
    common = [layer for layer in a.layers if layer in b.units]
    if not common:
        raise ViscircuitsError(
            f"the circuits have no layer in common: one has {', '.join(a.layers)}, the other {', '.join(b.layers)}"
        )
    return [_layer_overlap(layer, a, b) for layer in common]


def overlap_together(layers: Sequence[LayerOverlap]) -> LayerOverlap:
    """The agreement of all layers as one, by units pooled; chance draws at random in each layer on its own.

    The number shared by chance is a sum of hypergeometric numbers, one a layer; its distribution is taken exactly.

    Raises
    ------
    ViscircuitsError
        If there are no layers.
    """
    if not layers:
        raise ViscircuitsError("there is no layer to pool")
    by_chance = torch.ones(1, dtype=torch.float64)  # P(shared = i)
    for each in layers:
        of_layer = torch.zeros(min(each.size_a, each.size_b) + 1, dtype=torch.float64)
        for shared, p in _shared_distribution(each.n_units, each.size_a, each.size_b):
            of_layer[shared] = p
        by_chance = _convolved(by_chance, of_layer)
    size_a, size_b, shared = (sum(getattr(each, name) for each in layers) for name in ("size_a", "size_b", "shared"))
    either = size_a + size_b - torch.arange(len(by_chance), dtype=torch.float64)
    jaccards = torch.where(either > 0, torch.arange(len(by_chance)) / either.clamp(min=1), 1.0)
    return LayerOverlap(
        layer="all layers",
        n_units=sum(each.n_units for each in layers),
        size_a=size_a,
        size_b=size_b,
        shared=shared,
        jaccard=float(jaccards[shared]),
        chance=float(by_chance @ jaccards),
        p_value=min(1.0, float(by_chance[shared:].sum())),
    )


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    """Distribution of the sum of two independent counts."""
    padded = torch.nn.functional.conv1d(a[None, None], b.flip(0)[None, None], padding=len(b) - 1)
    return padded[0, 0]


def _layer_overlap(layer: str, a: Circuit, b: Circuit) -> LayerOverlap:
    n = a.widths[layer]
    if n != b.widths[layer]:
        raise ViscircuitsError(
            f"layer {layer!r} has {n} units in one circuit and {b.widths[layer]} in the other; "
            "compare circuits of the same network"
        )
    size_a, size_b = len(a.units[layer]), len(b.units[layer])
    shared = len(set(a.units[layer]) & set(b.units[layer]))
    return LayerOverlap(
        layer=layer,
        n_units=n,
        size_a=size_a,
        size_b=size_b,
        shared=shared,
        jaccard=jaccard(a.units[layer], b.units[layer]),
        chance=chance_jaccard(n, size_a, size_b),
        p_value=overlap_p_value(n, size_a, size_b, shared),
    )


def _shared_distribution(n: int, a: int, b: int) -> list[tuple[int, float]]:
    """Each number of units that random sets of `a` and `b` out of `n` can share, with its probability."""
    if not (0 <= a <= n and 0 <= b <= n):
        raise ViscircuitsError(f"sets of {a} and {b} units do not fit into {n} units")
    total = _log_choose(n, b)
    return [
        (shared, math.exp(_log_choose(a, shared) + _log_choose(n - a, b - shared) - total))
        for shared in range(max(0, a + b - n), min(a, b) + 1)
    ]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# --------------------------------------------------------------------- certainty


def stability(drawn: Sequence[Circuit]) -> dict[str, Float[Tensor, " _unit"]]:
    """For every unit of each layer, the share of circuits that choose it: 1 in all of them, 0 in none.

    Parameters
    ----------
    drawn
        Circuits of the same layers, each chosen from another bootstrap draw of the images.

    Raises
    ------
    ViscircuitsError
        If there are none, or their layers differ.

    References
    ----------
    Efron 1979, doi:10.1214/aos/1176344552; Certified Circuits 2026, arXiv:2602.22968 (asks it of circuits).
    """
    shapes = {tuple((layer, each.widths[layer]) for layer in each.layers) for each in drawn}
    if len(shapes) != 1:
        raise ViscircuitsError(f"stability compares circuits of the same layers, got {len(shapes)} sorts of circuit")
    counts = {layer: torch.zeros(width) for layer, width in shapes.pop()}
    for circuit in drawn:
        for layer, chosen in circuit.units.items():
            counts[layer][list(chosen)] += 1
    return {layer: count / len(drawn) for layer, count in counts.items()}


def share_interval(outcomes: Float[Tensor, "image *trial"], level: float = 0.95) -> Interval:
    """Put Wilson's interval around a share of images, for outcomes that are 0 or 1.

    Unlike the bootstrap's it has a width where all outcomes agree: four of four is not certainty. Several trials of an
    image count as many independent ones as have the spread that is seen between images: as one where they agree.

    References
    ----------
    Wilson 1927, doi:10.1080/01621459.1927.10502953; for several trials Korn and Graubard 1998, Survey Methodology 24.
    """
    n, share = _independent(outcomes), float(outcomes.mean())
    z = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def _independent(outcomes: Float[Tensor, "image *trial"]) -> float:
    """How many independent outcomes these are worth: between the number of images and that of all trials."""
    n, share = float(len(outcomes)), float(outcomes.mean())
    spread = float(outcomes.flatten(1).mean(1).var()) if outcomes.ndim > 1 and n > 1 else 0.0
    if spread == 0:
        return n
    return min(max(share * (1 - share) * n / spread, n), float(outcomes.numel()))


def bootstrap(
    statistic: Callable[..., float | Tensor],
    *samples: Float[Tensor, "..."],
    draws: int = 1000,
    level: float = 0.95,
    paired: bool = False,
    vectorised: bool = False,
    generator: torch.Generator | None = None,
) -> Interval:
    """Put a percentile interval around a statistic by drawing images again, with replacement.

    Parameters
    ----------
    statistic
        Takes the samples and returns one number.
    samples
        Tensors whose first axis is the image.
    draws
        How many times to draw.
    level
        Share of the draws inside the interval.
    paired
        Whether the samples are measurements of the same images: then one draw serves them all.
    vectorised
        Whether `statistic` reduces the last axis of one-dimensional samples whatever stands
        before it: then all draws are computed at once.
    generator
        Source of randomness, on the CPU; by default one seeded with 0.

    Raises
    ------
    ViscircuitsError
        If a sample is empty, paired samples differ in length, or `draws` or `level` make no sense.

    References
    ----------
    Efron 1979, doi:10.1214/aos/1176344552.
    """
    _check_bootstrap(samples, draws, level, paired)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    picks = [_draw(len(sample), draws, generator) for sample in (samples[:1] if paired else samples)]
    picks = picks * len(samples) if paired else picks
    if vectorised:
        drawn = (sample.double()[pick] for sample, pick in zip(samples, picks, strict=True))  # (draw, image)
        values = torch.as_tensor(statistic(*drawn))  # (draw,)
    else:
        values = torch.tensor(
            [
                float(statistic(*(sample[pick[i]] for sample, pick in zip(samples, picks, strict=True))))
                for i in range(draws)
            ],
            dtype=torch.float64,
        )
    low, high = torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(value=float(statistic(*samples)), low=low, high=high)


def _draw(n_images: int, draws: int, generator: torch.Generator) -> Int[Tensor, "draw image"]:
    return torch.randint(n_images, (draws, n_images), generator=generator)


def _check_bootstrap(samples: tuple[Tensor, ...], draws: int, level: float, paired: bool) -> None:
    lengths = [len(sample) for sample in samples]
    if not lengths or min(lengths) == 0:
        raise ViscircuitsError("bootstrap draws images again and needs samples with at least one image each")
    if paired and len(set(lengths)) > 1:
        raise ViscircuitsError(
            f"paired samples must measure the same images, got {', '.join(map(str, lengths))} of them; "
            "use paired=False for different images"
        )
    if draws < 1 or not 0 < level < 1:
        raise ViscircuitsError(f"bootstrap needs draws >= 1 and a level between 0 and 1, got {draws} and {level}")
