"""Metrics: each beside the law or the oracle it must obey."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from viscircuits import metrics
from viscircuits.circuit import Circuit
from viscircuits.errors import ViscircuitsError


def circuit(units: dict[str, tuple[int, ...]], width: int = 10) -> Circuit:
    return Circuit(units, dict.fromkeys(units, width))


# --------------------------------------------------------------------- behaviour


def test_accuracy_is_the_share_of_right_answers():
    logits = tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [0.0, 1.0]])
    labels = tensor([0, 1, 1, 1])
    assert metrics.correct(logits, labels).tolist() == [1, 1, 0, 1]
    assert metrics.accuracy(logits, labels) == 0.75


def test_accuracy_of_no_image_is_an_error():
    with pytest.raises(ViscircuitsError, match="accuracy needs at least one image"):
        metrics.accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))


def test_kl_equals_the_entropy_oracle_and_vanishes_for_equal_outputs():
    full, edited = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    oracle = scipy.stats.entropy(scipy.special.softmax(full, 1), scipy.special.softmax(edited, 1), axis=1)
    assert metrics.kl_divergence(full, edited).tolist() == pytest.approx(oracle.tolist())
    assert metrics.kl_divergence(full, full + 3.0).tolist() == pytest.approx([0.0] * 5, abs=1e-12)


def test_kl_is_finite_and_not_negative_for_extreme_float16_logits():
    full = tensor([[6e4, -6e4], [0.1, 0.1]], dtype=torch.float16)
    assert metrics.kl_divergence(full, full.flip(1)).tolist() == pytest.approx([119936.0, 0.0], rel=1e-3)


def test_cosine_distance_equals_the_oracle_and_ignores_length():
    a, b = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    oracle = [scipy.spatial.distance.cosine(x, y) for x, y in zip(a, b, strict=True)]
    assert metrics.cosine_distance(a, b).tolist() == pytest.approx(oracle)
    assert metrics.cosine_distance(a, 7 * a).tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert metrics.cosine_distance(a, -a).tolist() == pytest.approx([2.0] * 4)


# ------------------------------------------------------------------- explanation


def test_faithfulness_is_one_for_the_model_zero_for_nothing_and_linear_between():
    full, empty = tensor([4.0, 8.0]), tensor([1.0, 1.0])
    assert metrics.faithfulness(full, full, empty) == 1
    assert metrics.faithfulness(full, empty, empty) == 0
    assert metrics.faithfulness(full, tensor([2.0, 5.0]), empty) == pytest.approx(0.5)
    assert metrics.faithfulness(full, 2 * full, empty) > 1


def test_faithfulness_does_not_change_with_the_metrics_zero_and_unit():
    full, kept, empty = tensor([4.0, 8.0]), tensor([3.0, 1.0]), tensor([1.0, 0.0])
    changed = [-2 * x + 5 for x in (full, kept, empty)]
    assert metrics.faithfulness(*changed) == pytest.approx(metrics.faithfulness(full, kept, empty))


def test_faithfulness_without_an_effect_says_so():
    with pytest.raises(ViscircuitsError, match="faithfulness has no meaning here"):
        metrics.faithfulness(tensor([1.0, 3.0]), tensor([1.0, 1.0]), tensor([2.0, 2.0]))


def test_completeness_and_faithfulness_sum_to_one_where_units_add_up():
    parts, kept = tensor([1.0, 2.0, 4.0]), tensor([True, False, True])
    full, empty = parts.sum()[None], torch.zeros(1)
    circuit_alone, rest_alone = (parts * kept).sum()[None], (parts * ~kept).sum()[None]
    whole = metrics.faithfulness(full, circuit_alone, empty) + metrics.completeness(full, rest_alone, empty)
    assert whole == pytest.approx(1)


def test_selectivity_is_one_for_a_clean_cut_and_zero_for_equal_harm():
    right, wrong = torch.ones(4), torch.zeros(4)
    assert metrics.selectivity(right, wrong, torch.ones(9), torch.ones(9)) == 1
    assert metrics.selectivity(right, wrong, torch.ones(9), torch.zeros(9)) == 0
    assert metrics.selectivity(right, right, torch.ones(9), torch.zeros(9)) == -1


def test_completeness_is_zero_without_everything_and_one_without_nothing():
    full, empty = tensor([4.0, 8.0]), tensor([1.0, 1.0])
    assert metrics.completeness(full, empty, empty) == 0
    assert metrics.completeness(full, full, empty) == 1


def test_minimality_is_the_least_change_whatever_its_sign():
    full = tensor([4.0, 6.0])
    without = tensor([[1.0, 1.0], [7.0, 7.0], [5.0, 4.5]])  # means 1, 7 (a suppressor), 4.75; the whole has 5
    assert metrics.minimality(full, without) == pytest.approx(0.25)
    assert metrics.minimality(full, without[:2]) == pytest.approx(2)
    assert metrics.minimality(full, torch.stack([full, without[0]])) == 0  # an idle unit


def test_minimality_of_nothing_is_refused():
    with pytest.raises(ViscircuitsError, match="the circuit has none"):
        metrics.minimality(torch.ones(2), torch.ones(0, 2))
    with pytest.raises(ViscircuitsError, match="at least one image"):
        metrics.minimality(torch.ones(0), torch.ones(2, 0))


@given(st.lists(st.integers(0, 1), min_size=8, max_size=8), st.lists(st.integers(0, 1), min_size=8, max_size=8))
def test_selectivity_of_a_share_of_images_lies_between_minus_two_and_two(after, before):
    samples = [torch.tensor(values, dtype=torch.float64) for values in (before[:4], after[:4], before[4:], after[4:])]
    assert -2 <= metrics.selectivity(*samples) <= 2
    turned = metrics.selectivity(*samples[2:], *samples[:2])
    assert turned == pytest.approx(-metrics.selectivity(*samples))


def test_transfer_is_what_selectivity_gains_on_other_images():
    right, wrong = torch.ones(4), torch.zeros(4)
    clean, useless = (right, wrong, right, right), (right, right, right, right)
    half = (right, tensor([1.0, 1.0, 0.0, 0.0]), right, right)
    assert metrics.transfer(clean, clean) == 0
    assert metrics.transfer(clean, useless) == -1
    assert metrics.transfer(half, clean) == 0.5


def test_selectivity_area_of_a_line_is_its_triangle_and_of_equal_harm_zero():
    x = tensor([0.0, 0.5, 1.0])
    falling = tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
    untouched = torch.ones(3, 5)
    assert metrics.selectivity_area(x, falling, untouched) == pytest.approx(0.5)
    assert metrics.selectivity_area(x, untouched, falling) == pytest.approx(-0.5)
    assert metrics.selectivity_area(x, falling, falling) == 0
    assert metrics.selectivity_area(x, falling, 0.3 * untouched) == pytest.approx(0.5)  # each less its own start
    at_once = tensor([[1.0], [0.0], [0.0]])
    assert metrics.selectivity_area(x, at_once, untouched) == pytest.approx(0.75)


def test_area_between_two_lines_is_their_triangle_and_turns_with_their_order():
    x = tensor([0.0, 0.5, 2.0])
    assert metrics.area_between(x, 3 * x, x) == pytest.approx(4.0)
    assert metrics.area_between(x, x, 3 * x) == pytest.approx(-4.0)
    with pytest.raises(ViscircuitsError, match="rising x"):
        metrics.area_between(tensor([0.0, 0.0]), x[:2], x[:2])


def test_cpr_and_cmd_of_a_perfect_and_of_a_proportional_circuit():
    perfect = torch.ones(10, dtype=torch.float64)
    proportional = tensor(metrics.MIB_FRACTIONS, dtype=torch.float64)
    assert metrics.cpr(perfect) == pytest.approx(0.999, abs=1e-12)
    assert metrics.cmd(perfect) == 0
    assert metrics.cmd(proportional) == pytest.approx(0.4990005, abs=1e-12)
    assert metrics.cpr(proportional) + metrics.cmd(proportional) == pytest.approx(0.999)


def test_overshooting_raises_cpr_but_counts_against_cmd():
    sizes = tensor([0.0, 1.0])
    assert metrics.cpr(tensor([1.5, 1.5]), sizes) == pytest.approx(1.5)
    assert metrics.cmd(tensor([1.5, 1.5]), sizes) == pytest.approx(0.5)


def test_cpr_of_another_number_of_sizes_asks_for_them():
    with pytest.raises(ViscircuitsError, match="3 values for the 10 circuit sizes"):
        metrics.cpr(torch.ones(3))


# --------------------------------------------------------------------- agreement


def some_scores(n: int = 8) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-3, 3), min_size=n, max_size=n)


@given(some_scores(), some_scores())
def test_correlations_equal_the_oracles_with_ties_or_say_that_a_score_is_constant(a, b):
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        for statistic in (metrics.pearson, metrics.spearman):
            with pytest.raises(ViscircuitsError, match="all 8 scores are"):
                statistic(x, y)
        return
    assert metrics.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-12)
    assert metrics.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_equal_scores_share_their_mean_rank():
    assert metrics.ranks(tensor([5.0, -1.0, 5.0, 9.0])).tolist() == [2.5, 1, 2.5, 4]


def test_spearman_sees_only_the_order_and_pearson_a_line():
    a = tensor([0.1, 2.0, 0.7, 1.1])
    assert metrics.spearman(a, a.exp()) == pytest.approx(1)
    assert metrics.spearman(a, -(a**3)) == pytest.approx(-1)
    assert metrics.pearson(a, 3 * a - 5) == pytest.approx(1)
    assert metrics.pearson(a, a.exp()) < 0.99


@pytest.mark.parametrize("statistic", [metrics.pearson, metrics.spearman])
def test_correlations_refuse_what_has_none(statistic):
    with pytest.raises(ViscircuitsError, match="two units or more, got 1"):
        statistic(torch.ones(1), torch.ones(1))
    with pytest.raises(ViscircuitsError, match="1 of 2 scores are not finite"):
        statistic(tensor([1.0, float("nan")]), tensor([1.0, 2.0]))


truths = st.lists(st.booleans(), min_size=8, max_size=8).filter(lambda truth: 0 < sum(truth) < 8)


@given(some_scores(), truths)
def test_auroc_is_mann_whitney_with_ties_at_a_half(scores, truth):
    inside = [score for score, true in zip(scores, truth, strict=True) if true]
    outside = [score for score, true in zip(scores, truth, strict=True) if not true]
    expected = scipy.stats.mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))
    assert metrics.auroc(torch.tensor(scores).double(), torch.tensor(truth)) == pytest.approx(expected, abs=1e-12)


@given(some_scores(), truths)
def test_auroc_does_not_change_with_a_rising_map_and_turns_with_the_sign(scores, truth):
    values, true = torch.tensor(scores).double(), torch.tensor(truth)
    found = metrics.auroc(values, true)
    assert metrics.auroc((values / 3).exp() - 7, true) == pytest.approx(found)
    assert metrics.auroc(-values, true) == pytest.approx(1 - found)


def test_a_perfect_score_has_auroc_one_its_negation_zero_and_a_constant_half():
    truth = tensor([True, False, True, False, False])
    assert metrics.auroc(truth.double(), truth) == 1
    assert metrics.auroc(-truth.double(), truth) == 0
    assert metrics.auroc(torch.zeros(5), truth) == 0.5


def test_auroc_without_a_truth_to_find_is_refused():
    for truth in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ViscircuitsError, match="of 3"):
            metrics.auroc(torch.rand(3), truth)
    with pytest.raises(ViscircuitsError, match="not finite"):
        metrics.auroc(tensor([1.0, float("nan")]), tensor([True, False]))


@given(some_scores(), truths)
def test_precision_equals_recall_at_the_true_size(scores, truth):
    precision, recall = metrics.precision_recall(torch.tensor(scores).double(), torch.tensor(truth))
    assert precision == recall


def test_precision_and_recall_by_hand():
    scores, truth = tensor([9.0, 8.0, 7.0, 1.0]), tensor([True, False, True, True])
    assert metrics.precision_recall(scores, truth) == (2 / 3, 2 / 3)
    assert metrics.precision_recall(scores, truth, 1) == (1, 1 / 3)
    assert metrics.precision_recall(scores, truth, 4) == (3 / 4, 1)
    assert metrics.precision_recall(torch.zeros(4), truth, 1) == (1, 1 / 3)  # among equals the lowest index


def test_precision_of_an_impossible_choice_is_refused():
    with pytest.raises(ViscircuitsError, match="nothing to recall"):
        metrics.precision_recall(torch.rand(2), tensor([False, False]))
    with pytest.raises(ViscircuitsError, match="cannot choose 3 of 2"):
        metrics.precision_recall(torch.rand(2), tensor([True, False]), 3)


def test_jaccard_is_shared_over_union():
    assert metrics.jaccard((1, 2, 3), (2, 3, 4, 5)) == pytest.approx(2 / 5)
    assert metrics.jaccard((), ()) == 1
    assert metrics.jaccard((1,), ()) == 0


def sizes_in_a_layer() -> st.SearchStrategy[tuple[int, int, int]]:
    return st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n)))


@given(sizes_in_a_layer(), st.integers(0, 60))
def test_p_value_equals_the_hypergeometric_tail(sizes, shared):
    n, a, b = sizes
    oracle = scipy.stats.hypergeom(n, a, b).sf(shared - 1)
    assert metrics.overlap_p_value(n, a, b, shared) == pytest.approx(oracle, abs=1e-10)


def test_chance_jaccard_equals_the_mean_over_every_pair_of_sets():
    n, a, b = 6, 2, 3
    fixed = set(range(a))
    every = [metrics.jaccard(fixed, other) for other in itertools.combinations(range(n), b)]
    assert metrics.chance_jaccard(n, a, b) == pytest.approx(sum(every) / len(every))


@given(sizes_in_a_layer())
def test_chance_jaccard_is_symmetric_and_exact_at_its_ends(sizes):
    n, a, b = sizes
    assert metrics.chance_jaccard(n, a, b) == pytest.approx(metrics.chance_jaccard(n, b, a))
    assert metrics.chance_jaccard(n, n, b) == pytest.approx(b / n)
    assert metrics.chance_jaccard(n, 0, 0) == 1


def test_chance_jaccard_of_a_wide_layer_stays_near_the_ratio_of_means():
    n, k = 4096, 400
    expected_shared = k * k / n
    assert metrics.chance_jaccard(n, k, k) == pytest.approx(expected_shared / (2 * k - expected_shared), rel=1e-2)


def test_sets_larger_than_the_layer_are_refused():
    with pytest.raises(ViscircuitsError, match="sets of 3 and 7 units do not fit into 5"):
        metrics.chance_jaccard(5, 3, 7)


def test_overlap_reports_each_common_layer_beside_its_chance():
    a = circuit({"x": (0, 1), "y": (3, 4, 5), "z": (1,)})
    b = circuit({"y": (4, 5, 6), "x": (0, 1)})
    x, y = metrics.overlap(a, b)
    assert (x.layer, x.shared, x.jaccard) == ("x", 2, 1.0)
    assert x.p_value == pytest.approx(1 / math.comb(10, 2))
    assert (y.layer, y.n_units, y.size_a, y.size_b, y.shared, y.jaccard) == ("y", 10, 3, 3, 2, 0.5)
    assert y.chance == metrics.chance_jaccard(10, 3, 3)


def test_overlap_of_circuits_that_cannot_be_compared_says_why():
    with pytest.raises(ViscircuitsError, match="no layer in common: one has x, the other y"):
        metrics.overlap(circuit({"x": (1,)}), circuit({"y": (1,)}))
    with pytest.raises(ViscircuitsError, match="layer 'x' has 10 units in one circuit and 12 in the other"):
        metrics.overlap(circuit({"x": (1,)}), circuit({"x": (1,)}, width=12))


def test_overlap_of_all_layers_counts_units_pooled_and_chance_over_every_pair_of_choices():
    a = Circuit({"x": (0, 1), "y": (2,)}, {"x": 4, "y": 3})
    b = Circuit({"x": (1, 3), "y": (2,)}, {"x": 4, "y": 3})
    together = metrics.overlap_together(metrics.overlap(a, b))
    assert (together.n_units, together.size_a, together.size_b, together.shared) == (7, 3, 3, 2)
    assert together.jaccard == 0.5
    shared = [
        len({0, 1} & set(x)) + len({2} & {y}) for x in itertools.combinations(range(4), 2) for y in range(3)
    ]  # fmt: skip
    assert together.chance == pytest.approx(sum(i / (6 - i) for i in shared) / len(shared))
    assert together.p_value == pytest.approx(sum(i >= 2 for i in shared) / len(shared))


def test_overlap_of_one_layer_is_its_own_pool():
    (alone,) = metrics.overlap(circuit({"x": (0, 1)}), circuit({"x": (1, 2, 3)}))
    together = metrics.overlap_together([alone])
    assert (together.jaccard, together.shared) == (alone.jaccard, alone.shared)
    assert (together.chance, together.p_value) == pytest.approx((alone.chance, alone.p_value))
    with pytest.raises(ViscircuitsError, match="no layer"):
        metrics.overlap_together([])


# --------------------------------------------------------------------- certainty


def test_stability_is_the_share_of_draws_that_choose_a_unit():
    drawn = [circuit({"x": chosen, "y": (3,)}, width=4) for chosen in ((0, 1), (1, 2), (1,), (0, 1))]
    found = metrics.stability(drawn)
    assert found["x"].tolist() == [0.5, 1, 0.25, 0]
    assert found["y"].tolist() == [0, 0, 0, 1]
    assert float(sum(shares.sum() for shares in found.values())) == 11 / 4  # the mean size


def test_stability_of_unlike_circuits_or_none_is_refused():
    with pytest.raises(ViscircuitsError, match="got 2 sorts"):
        metrics.stability([circuit({"x": (0,)}), circuit({"x": (0,)}, width=11)])
    with pytest.raises(ViscircuitsError, match="got 0 sorts"):
        metrics.stability([])


def test_bootstrap_interval_of_a_mean_matches_the_normal_one():
    sample = torch.randn(400, generator=torch.Generator().manual_seed(2))
    interval = metrics.bootstrap(lambda x: x.mean(-1), sample, draws=4000, vectorised=True)
    half = 1.96 * sample.std().item() / 20
    assert interval.value == pytest.approx(sample.mean().item())
    assert interval.low == pytest.approx(interval.value - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.1 * half)


def test_bootstrap_of_the_mean_at_once_equals_the_draws_one_by_one():
    sample = torch.rand(30, generator=torch.Generator().manual_seed(3)).double()
    at_once = metrics.bootstrap(
        lambda x: x.mean(-1), sample, draws=50, vectorised=True, generator=torch.Generator().manual_seed(1)
    )
    one_by_one = metrics.bootstrap(lambda x: x.mean(), sample, draws=50, generator=torch.Generator().manual_seed(1))
    assert (at_once.low, at_once.high) == pytest.approx((one_by_one.low, one_by_one.high))


def test_bootstrap_of_a_constant_has_no_width():
    assert metrics.bootstrap(torch.mean, torch.full((5,), 2.0)) == metrics.Interval(2.0, 2.0, 2.0)


def test_pairing_removes_what_two_measurements_share():
    before = torch.randn(100, generator=torch.Generator().manual_seed(4))
    after = before - 1
    paired = metrics.bootstrap(lambda a, b: a.mean() - b.mean(), before, after, paired=True)
    unpaired = metrics.bootstrap(lambda a, b: a.mean() - b.mean(), before, after)
    assert (paired.low, paired.high) == pytest.approx((1, 1), abs=1e-5)
    assert unpaired.high - unpaired.low > 0.3


def test_bootstrap_takes_the_other_metrics_and_samples_of_unlike_length():
    ones = [torch.ones(n) for n in (5, 5, 8, 8)]
    interval = metrics.bootstrap(metrics.selectivity, ones[0], 0 * ones[1], ones[2], ones[3], draws=20)
    assert interval == metrics.Interval(1.0, 1.0, 1.0)


def test_a_wider_level_gives_a_wider_interval():
    sample = torch.rand(50, generator=torch.Generator().manual_seed(5))
    narrow, wide = (metrics.bootstrap(torch.mean, sample, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize(
    ("samples", "options", "told"),
    [
        ((), {}, "at least one image"),
        ((torch.zeros(0),), {}, "at least one image"),
        ((torch.ones(3), torch.ones(4)), {"paired": True}, "same images, got 3, 4"),
        ((torch.ones(3),), {"draws": 0}, "draws >= 1"),
        ((torch.ones(3),), {"level": 95.0}, "level between 0 and 1"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_draw(samples, options, told):
    with pytest.raises(ViscircuitsError, match=told):
        metrics.bootstrap(torch.mean, *samples, **options)


def test_a_share_of_images_has_wilsons_interval_even_where_all_agree():
    from scipy.stats import binomtest

    for hits, n in ((4, 4), (0, 6), (7, 10), (1, 1)):
        outcomes = torch.tensor([1.0] * hits + [0.0] * (n - hits))
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        found = metrics.share_interval(outcomes)
        assert (found.value, found.low, found.high) == pytest.approx((hits / n, expected.low, expected.high), abs=1e-6)


def test_trials_of_an_image_count_by_what_they_add():
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(400, 1, generator=generator) < 0.3).double()
    alone = metrics.share_interval(images)
    assert metrics.share_interval(images.expand(-1, 3)) == alone  # the same three times
    independent = (torch.rand(400, 3, generator=generator) < 0.3).double()
    found, most = metrics.share_interval(independent), metrics.share_interval(independent.reshape(-1, 1))
    assert found.high - found.low == pytest.approx(most.high - most.low, rel=0.06)
    assert found.high - found.low < 0.65 * (alone.high - alone.low)
