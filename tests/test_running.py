"""Running sums add up whatever way they are parted, and the replicates are what a Poisson bootstrap is."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viscircuits import running
from viscircuits.images import Batch, Skipped
from viscircuits.layers import Layer
from viscircuits.running import Running, Seen, poisson_weights

CHAIN = [Layer("a", "ReLU", (2, 3, 3), 1), Layer("b", "ReLU", (4, 3, 3), 1)]


def batch(places: list[int]) -> Batch:
    images = torch.stack([torch.full((1, 2, 2), float(place)) for place in places])
    names, digests = (tuple(f"{what}{place}" for place in places) for what in ("name", "digest"))
    return Batch(images, names, (None,) * len(places), digests, tuple(places))


def added(running_: Running, places: list[int]) -> Running:
    """The sums with images whose scores are drawn from their place."""
    each = [torch.randn(4, 2, generator=torch.Generator().manual_seed(place)) for place in places]
    maps = {layer.address: torch.ones(len(places), *layer.shape) for layer in CHAIN}
    weights = poisson_weights(0, 0, places, running_.n_draws)
    running_.begin(batch(places), maps, weights)
    running_.add(0, torch.stack(each), torch.stack(each).double().sum(0), weights)
    running_.keep(0, torch.stack(each), places)
    return running_


@settings(max_examples=20)
@given(st.permutations(range(9)), st.integers(1, 8))
def test_two_halves_add_up_to_the_whole_in_any_order(order, cut):
    whole = added(Running.empty(CHAIN, 3), list(range(9)))
    one, two = (added(Running.empty(CHAIN, 3), part) for part in (order[:cut], order[cut:]))
    one.merge(two)
    mine, expected = (each.matrix(0, None, last=False) for each in (one, whole))
    for name in ("values", "signed", "variance", "draws"):
        assert torch.allclose(getattr(mine, name), getattr(expected, name), atol=1e-6)
    assert torch.equal(mine.per_image, expected.per_image)
    assert one.seen.describe(None) == whole.seen.describe(None)


def test_mean_and_variance_are_those_of_the_scores():
    sums = added(Running.empty(CHAIN), [3, 1, 4])
    scores = torch.stack([torch.randn(4, 2, generator=torch.Generator().manual_seed(place)) for place in (3, 1, 4)])
    found = sums.matrix(0, None, last=True)
    assert torch.allclose(found.values, scores.mean(0)) and torch.allclose(found.variance, scores.var(0), atol=1e-6)
    assert sums.activity()["a"].tolist() == [3, 3]  # the norm of nine ones
    assert found.draws is None


def test_a_large_mean_does_not_swallow_the_variance():
    sums = Running.empty(CHAIN)
    for value in (1e4, 1e4 + 1):
        sums.begin(
            batch([0]), {layer.address: torch.ones(1, *layer.shape) for layer in CHAIN}, torch.zeros(1, 0).long()
        )
        sums.add(0, torch.full((1, 4, 2), value), torch.zeros(4, 2).double(), torch.zeros(1, 0).long())
    assert sums.matrix(0, None, last=True).variance.flatten().tolist() == pytest.approx([0.5] * 8, rel=1e-4)


def test_sums_come_back_from_their_state():
    sums = added(Running.empty(CHAIN, 2), [5, 6])
    sums.ways[0].engines.add("loop")
    sums.seen.skip([Skipped("x", "broken")], 7)
    tensors, plain = sums.state()
    back = Running.from_state(CHAIN, tensors, json.loads(json.dumps(plain)))
    assert back.seen == sums.seen and back.ways == sums.ways and back.places == [5, 6]
    for name in ("values", "draws", "per_image"):
        assert torch.equal(
            getattr(back.matrix(0, None, last=False), name), getattr(sums.matrix(0, None, last=False), name)
        )


def test_weights_depend_on_seed_set_and_place_alone_and_are_poisson():
    weights = poisson_weights(3, 0, range(4000), 5)
    assert torch.equal(weights[100:103], poisson_weights(3, 0, [100, 101, 102], 5))
    assert torch.equal(weights[:, :2], poisson_weights(3, 0, range(4000), 2))
    assert not torch.equal(weights, poisson_weights(3, 1, range(4000), 5))
    assert not torch.equal(weights, poisson_weights(4, 0, range(4000), 5))
    counts = weights.flatten().double()
    assert counts.mean().item() == pytest.approx(1, abs=0.03) and counts.var().item() == pytest.approx(1, abs=0.06)
    assert (counts == 0).double().mean().item() == pytest.approx(0.3679, abs=0.015)


def test_a_replicate_that_drew_no_image_is_the_plain_mean():
    sums = Running.empty(CHAIN, 1)
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    sums.begin(batch([0]), {layer.address: torch.ones(1, *layer.shape) for layer in CHAIN}, nothing)
    sums.add(0, torch.full((1, 4, 2), 3.0), torch.zeros(4, 2).double(), nothing)
    assert sums.matrix(0, None, last=True).draws.unique().tolist() == [3]


def test_beyond_a_limit_only_number_and_digests_are_kept(monkeypatch):
    monkeypatch.setattr(running, "MOST_NAMES", 3)
    few, many, parts = Seen(), Seen(), [Seen(), Seen()]
    few.add(batch([0, 1, 2]))
    many.add(batch([0, 1, 2, 3]))
    parts[0].add(batch([3, 1]))
    parts[1].add(batch([0, 2]))
    parts[0].merge(parts[1])
    assert few.describe(None)["names"] == ["name0", "name1", "name2"]
    assert many.describe(None) == parts[0].describe(None)
    assert (many.describe(None)["names"], many.n) == ([], 4)
    assert many.describe(None)["digest"] != few.describe(None)["digest"]
