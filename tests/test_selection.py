"""Selection: the objective, the refinements, the bound, and the circuits set beside a circuit."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from viscircuits import selection
from viscircuits.circuit import Circuit, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.matrices import AttributionMatrix, Attributions
from viscircuits.selection import Chosen, Problem, random_like, ranked, relax, same_size, select, shrink

# Initial circuit a0, b0, c0 with S = 3 + 4; backward keeps it; forward prefers b1 (4 > 3), S = 4 + 1; backward returns.
CYCLING = [[[3.0, 2.0], [4.0, 1.0]], [[4.0, 1.0], [2.0, 1.0]]]
# Initial circuit a0, b1, c1 with S = 5 + 4; backward prefers b0 (5 > 4), and a1 for it: S = 1 + 5, and rests there.
FALLING = [[[0.0, 1.0], [5.0, 1.0]], [[0.0, 4.0], [5.0, 4.0]]]


def attributions(*matrices: Tensor, **options) -> Attributions:
    names = "abcdefgh"
    chain = tuple(AttributionMatrix(names[i], names[i + 1], m, -m) for i, m in enumerate(matrices))
    return Attributions(chain, {}, n_images=1, **options)


def random_matrices(widths: list[int], seed: int, signed: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(widths[1:], widths[:-1], strict=True)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return values if signed else [v.exp() for v in values]


def problem_of(matrices: list[Tensor], sizes: list[int]) -> Problem:
    return Problem(tuple(m.double() for m in matrices), tuple(sizes))


def chosen_in(circuit: Circuit) -> Chosen:
    return tuple(torch.tensor(units) for units in circuit.units.values())


def worth(matrices: list[Tensor], chosen: tuple[tuple[int, ...], ...]) -> float:
    """S as the formula reads: two nested sums over chosen units, for each pair of layers."""
    values = [m.tolist() for m in matrices]
    return sum(m[n][s] for i, m in enumerate(values) for s in chosen[i] for n in chosen[i + 1])


def best_of_all(matrices: list[Tensor], sizes: list[int]) -> float:
    """The best S, by dynamic programming over every subset of every layer."""
    widths = [matrices[0].shape[1], *(m.shape[0] for m in matrices)]
    subsets = [list(itertools.combinations(range(w), k)) for w, k in zip(widths, sizes, strict=True)]
    value = dict.fromkeys(subsets[0], 0.0)
    for i in range(len(matrices)):
        value = {
            after: max(value[before] + worth(matrices[i : i + 1], (before, after)) for before in subsets[i])
            for after in subsets[i + 1]
        }
    return max(value.values())


@st.composite
def instances(draw) -> tuple[list[Tensor], list[int]]:
    widths = draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    sizes = [draw(st.integers(1, min(3, width))) for width in widths]
    return random_matrices(widths, draw(st.integers(0, 10**6)), signed=draw(st.booleans())), sizes


# ------------------------------------------------------------------ guarantees


@settings(max_examples=30, deadline=None)
@given(instances())
def test_initial_to_coordinate_to_optimum_to_bound_never_falls(instance):
    matrices, sizes = instance
    data, k = attributions(*matrices), dict(zip("abcd", sizes, strict=False))
    values = {refine: select(data, k, refine=refine, bound_steps=8).selection for refine in selection.REFINEMENTS}
    optimum = best_of_all(matrices, sizes)
    order = [values[refine]["objective"] for refine in ("none", "paper", "coordinate")]
    order += [optimum, values["coordinate"]["upper_bound"]]
    assert all(low <= high + 1e-9 for low, high in itertools.pairwise(order))
    assert values["none"]["upper_bound"] >= optimum - 1e-9


@settings(max_examples=30, deadline=None)
@given(instances(), st.integers(0, 10**6))
def test_coordinate_never_falls_from_any_start_and_comes_to_rest(instance, seed):
    matrices, sizes = instance
    problem = problem_of(matrices, sizes)
    start = selection._perturbed(problem, torch.Generator().manual_seed(seed))
    run = selection._coordinate(problem, start)
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(run.trace))
    assert not run.cycled
    assert run.objective == run.trace[-1]


def test_coordinate_with_restarts_usually_finds_the_optimum():
    n_found = n_found_from_initial_alone = 0
    for seed in range(40):
        matrices = random_matrices([6, 5, 6, 5], seed)
        optimum = best_of_all(matrices, [2, 2, 2, 2])
        several, alone = (select(attributions(*matrices), 2, restarts=n, bound_steps=4).selection for n in (8, 1))
        n_found += several["objective"] > optimum - 1e-5
        n_found_from_initial_alone += alone["objective"] > optimum - 1e-5
    assert n_found >= 38
    assert n_found > n_found_from_initial_alone


@settings(max_examples=30, deadline=None)
@given(instances(), st.integers(0, 10**6))
def test_every_split_of_the_matrices_gives_a_bound(instance, seed):
    matrices, sizes = instance
    problem = problem_of(matrices, sizes)
    generator = torch.Generator().manual_seed(seed)
    halves = [m.double() / 2 + torch.randn(m.shape, generator=generator) for m in matrices]
    bound, _ = selection._relaxed_choice(problem, selection._split(problem, halves))
    assert bound >= best_of_all(matrices, sizes) - 1e-9


@settings(max_examples=30, deadline=None)
@given(instances())
def test_rows_sorted_late_give_the_bound_of_rows_sorted_at_once(instance):
    matrices, sizes = instance
    problem = problem_of(matrices, sizes)
    splits = selection._split(problem, [m.double() / 2 for m in matrices])
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for split, matrix in zip(splits, matrices, strict=True):
            split.move(torch.randperm(matrix.numel())[:3], torch.randn(3, generator=generator).double())
        afresh = selection._split(problem, [split.targets.values.clone() for split in splits])
        late, chosen = selection._relaxed_choice(problem, splits)
        at_once, chosen_at_once = selection._relaxed_choice(problem, afresh)
        assert late == pytest.approx(at_once, abs=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(chosen, chosen_at_once, strict=True))


def test_steps_lower_the_bound_and_never_below_the_optimum():
    matrices = random_matrices([6, 6, 6], seed=4)
    problem, optimum = problem_of(matrices, [2, 2, 2]), best_of_all(matrices, [2, 2, 2])
    bounds = [relax(problem, optimum, steps).bound for steps in (0, 10, 100, 300)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < bounds[0] - 0.1 * abs(optimum)
    assert bounds[-1] >= optimum - 1e-9


def test_steps_that_overshoot_are_taken_back():
    matrices = random_matrices([6, 6, 6], seed=4)
    problem, optimum = problem_of(matrices, [2, 2, 2]), best_of_all(matrices, [2, 2, 2])
    without_a_step = relax(problem, optimum, 0).bound
    assert relax(problem, optimum - 1e3, 4).bound == pytest.approx(without_a_step, rel=1e-9)


def test_bound_proves_the_circuit_when_every_score_is_source_plus_target():
    a, b, c = torch.tensor([3.0, 1, 2, 0]), torch.tensor([1.0, 4, 2]), torch.tensor([0.0, 5, 1])
    circuit = select(attributions(b[:, None] + a, c[:, None] + b), 2)
    assert circuit.units == {"a": (0, 2), "b": (1, 2), "c": (1, 2)}
    assert circuit.selection["gap"] < 1e-9


def test_two_layers_and_one_unit_each_is_the_largest_entry_and_proven():
    matrix = torch.tensor([[1.0, 7.0, 2.0], [3.0, 0.0, 5.0]])
    circuit = select(attributions(matrix), 1)
    assert circuit.units == {"a": (1,), "b": (0,)}
    assert circuit.selection["objective"] == 7.0
    assert circuit.selection["upper_bound"] == pytest.approx(7.0, rel=1e-6)


# ------------------------------------------------------------------ the refinements


def test_initial_is_the_largest_sum_to_both_neighbours():
    matrices = [torch.tensor([[1.0, 0, 0], [0, 0, 3.0]]), torch.tensor([[9.0, 0.0], [0.0, 5.0]])]
    circuit = select(attributions(*matrices), 1, refine="none")
    assert circuit.units == {"a": (2,), "b": (0,), "c": (0,)}  # b0: 1 + 9 over b1: 3 + 5


def test_paper_that_cycles_returns_the_best_circuit_seen_and_says_so():
    circuit = select(attributions(*map(torch.tensor, CYCLING)), 1, refine="paper")
    assert circuit.units == {"a": (0,), "b": (0,), "c": (0,)}
    assert (circuit.selection["objective"], circuit.selection["cycled"]) == (7.0, True)
    run = selection._paper(problem_of(list(map(torch.tensor, CYCLING)), [1, 1, 1]), chosen_in(circuit))
    assert run.trace == (7.0, 7.0, 5.0, 7.0, 5.0)


def test_paper_that_comes_to_rest_below_its_start_returns_the_start():
    matrices = list(map(torch.tensor, FALLING))
    circuit = select(attributions(*matrices), 1, refine="paper")
    assert circuit.units == {"a": (0,), "b": (1,), "c": (1,)}
    assert (circuit.selection["objective"], circuit.selection["cycled"]) == (9.0, False)
    assert selection._paper(problem_of(matrices, [1, 1, 1]), chosen_in(circuit)).trace[-1] == 6.0


def test_paper_on_two_layers_is_power_iteration_that_climbs_to_rest():
    for seed in range(10):
        problem = problem_of(random_matrices([6, 6], seed), [2, 2])
        run = selection._paper(problem, selection.initial(problem))
        assert list(run.trace) == sorted(run.trace)
        assert not run.cycled


def test_coordinate_at_rest_has_the_best_units_for_both_neighbours():
    matrices = random_matrices([8, 9, 7], seed=3)
    a, b, c = select(attributions(*matrices), 3).units.values()
    carried = matrices[0][:, list(a)].sum(1) + matrices[1][list(c)].sum(0)
    assert b == tuple(sorted(carried.topk(3).indices.tolist()))


@pytest.mark.parametrize("refine", sorted(selection.REFINEMENTS))
def test_keeping_every_unit_is_worth_the_whole_matrices(refine):
    matrices = random_matrices([3, 4, 2], seed=0)
    circuit = select(attributions(*matrices), 1.0, refine=refine)
    assert circuit.units == {"a": (0, 1, 2), "b": (0, 1, 2, 3), "c": (0, 1)}
    assert circuit.selection["objective"] == pytest.approx(float(sum(m.sum() for m in matrices)))
    assert circuit.selection["gap"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("refine", sorted(selection.REFINEMENTS))
def test_permuting_a_layer_permutes_the_circuit(refine):
    first, second = random_matrices([9, 8, 7], seed=5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    plain = select(attributions(first, second), 3, refine=refine)
    permuted = select(attributions(first[order], second[:, order]), 3, refine=refine)
    assert sorted(int(order[i]) for i in permuted.units["b"]) == list(plain.units["b"])
    assert (permuted.units["a"], permuted.units["c"]) == (plain.units["a"], plain.units["c"])
    assert permuted.selection["objective"] == pytest.approx(plain.selection["objective"])


@pytest.mark.parametrize("refine", sorted(selection.REFINEMENTS))
@pytest.mark.parametrize("value", [0.0, 0.1, -2.0])
def test_ties_fall_to_the_lowest_indices(refine, value):
    circuit = select(attributions(torch.full((5, 4), value), torch.full((6, 5), value)), 2, refine=refine)
    assert set(circuit.units.values()) == {(0, 1)}


def test_same_seed_same_circuit_and_the_seed_is_told():
    data = attributions(*random_matrices([20, 20, 20], seed=8))
    a, b = (select(data, 4, generator=torch.Generator().manual_seed(11)) for _ in range(2))
    assert a == b
    assert a.selection["seed"] == 11


def test_signed_scores_are_avoided_or_sought_by_absolute_value():
    matrix = torch.tensor([[-9.0, 1.0], [2.0, 0.5]])
    assert select(attributions(matrix), 1).units == {"a": (0,), "b": (1,)}  # 2 is the largest
    absolute = select(attributions(matrix), 1, absolute=True)
    assert absolute.units == {"a": (0,), "b": (0,)}
    assert (absolute.edges[0].score, absolute.edges[0].signed) == (9.0, 9.0)  # `signed` holds −values here
    assert absolute.selection["absolute"] is True


def test_matrices_that_are_negative_throughout_still_have_a_bound_above():
    matrices = [-m for m in random_matrices([5, 5, 5], seed=2)]
    chosen = select(attributions(*matrices), 2).selection
    assert chosen["objective"] < 0 <= chosen["gap"]
    assert chosen["objective"] <= best_of_all(matrices, [2, 2, 2]) + 1e-6 <= chosen["upper_bound"] + 2e-6


# ------------------------------------------------------------------ how many units


def test_a_fraction_is_rounded_half_up_and_at_least_one():
    assert selection.units_per_layer({"a": 4, "b": 25, "c": 35}, 0.1) == {"a": 1, "b": 3, "c": 4}


def test_sizes_by_name_are_kept_for_each_layer():
    circuit = select(attributions(*random_matrices([4, 5, 6], seed=0)), {"c": 3, "a": 1, "b": 2})
    assert {layer: len(units) for layer, units in circuit.units.items()} == {"a": 1, "b": 2, "c": 3}
    assert circuit.selection["k"] == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("k", "told"),
    [
        (5, "cannot choose 5 units of layer 'b': it has 4"),
        (0, "cannot choose 0 units of layer 'a'"),
        (True, "cannot choose True units"),
        (1.5, r"fraction of units must lie in \(0, 1\], got 1.5"),
        (float("nan"), "got nan"),
        ({"a": 1, "b": 2}, "no number of units for layer 'c'"),
        ({"a": 1, "b": 2, "c": 1, "d": 1}, "no attribution for layer 'd'"),
        ({"a": 1, "b": 2.5, "c": 1}, "cannot choose 2.5 units of layer 'b'"),
    ],
)
def test_a_size_that_fits_no_layer_names_it(k, told):
    with pytest.raises(ViscircuitsError, match=told):
        select(attributions(*random_matrices([5, 4, 5], seed=0)), k)


def test_options_out_of_range_say_what_to_give():
    data = attributions(*random_matrices([3, 3], seed=0))
    with pytest.raises(ViscircuitsError, match="Did you mean 'coordinate'"):
        select(data, 1, refine="coordinates")
    with pytest.raises(ViscircuitsError, match="restarts must be 1 or more"):
        select(data, 1, restarts=0)
    with pytest.raises(ViscircuitsError, match="bound_steps must be 0 or more"):
        select(data, 1, bound_steps=-1)


def test_scores_that_are_not_finite_name_their_pair():
    first, second = random_matrices([3, 3, 3], seed=0)
    second[1, 1] = float("nan")
    with pytest.raises(ViscircuitsError, match="1 scores from 'b' to 'c' are not finite"):
        select(attributions(first, second), 1)


def test_matrices_that_do_not_meet_are_refused():
    data = attributions(torch.ones(3, 3), torch.ones(2, 4))
    with pytest.raises(ViscircuitsError, match="do not form a chain: one ends in 'b' with 3"):
        select(data, 1)
    with pytest.raises(ViscircuitsError, match="no attribution matrix"):
        select(dataclasses.replace(data, matrices=()), 1)


# ------------------------------------------------------------------ the circuit that comes out


def test_a_units_score_is_its_attribution_from_and_to_the_chosen():
    matrices = random_matrices([5, 6, 4], seed=1)
    circuit = select(attributions(*matrices), 2)
    a, b, c = circuit.units.values()
    expected = [float(matrices[0][unit, list(a)].sum() + matrices[1][list(c), unit].sum()) for unit in b]
    assert circuit.scores["b"] == pytest.approx(expected)
    inner, ends = sum(circuit.scores["b"]), sum(circuit.scores["a"]) + sum(circuit.scores["c"])
    assert inner == pytest.approx(ends) == pytest.approx(circuit.selection["objective"])


def test_edges_are_the_nonzero_scores_in_falling_order():
    matrix = torch.tensor([[4.0, 0.0, 0.0], [1.0, 4.0, 0.0]])
    circuit = select(attributions(matrix, provenance={"model": "toy"}), {"a": 2, "b": 2})
    ends = [(e.source, e.target, e.score, e.signed) for e in circuit.edges]
    a0, a1, b0, b1 = Unit("a", 0), Unit("a", 1), Unit("b", 0), Unit("b", 1)
    assert ends == [(a0, b0, 4.0, -4.0), (a1, b1, 4.0, -4.0), (a0, b1, 1.0, -1.0)]
    assert circuit.provenance == {"model": "toy"}


def test_edge_scores_sum_to_the_objective_and_survive_json():
    circuit = select(attributions(*random_matrices([7, 6, 5, 6], seed=6, signed=True)), 3)
    assert sum(e.score for e in circuit.edges) == pytest.approx(circuit.selection["objective"])
    assert Circuit.from_json(circuit.to_json()) == circuit


def test_attributions_are_left_as_they_were():
    matrices = random_matrices([6, 6, 6], seed=0)
    matrices[0] = matrices[0].double()  # a float64 matrix is used without a copy
    before = [m.clone() for m in matrices]
    select(attributions(*matrices), 2, absolute=True)
    select(attributions(*matrices), 2)
    assert all(torch.equal(m, b) for m, b in zip(matrices, before, strict=True))


# ------------------------------------------------------------------ circuits beside a circuit


def test_same_size_takes_the_highest_scores_of_each_layer():
    circuit = select(attributions(*random_matrices([4, 4], seed=0)), {"a": 2, "b": 1})
    control = same_size(circuit, {"a": torch.tensor([1.0, 5, 5, 7]), "b": torch.tensor([0.0, 0, 0, 0])})
    assert control.units == {"a": (1, 3), "b": (0,)}
    assert control.scores == {"a": (5.0, 7.0), "b": (0.0,)}
    assert control.edges == ()


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({"a": torch.ones(4)}, "no unit scores for layer 'b'"),
        ({"a": torch.ones(4), "b": torch.ones(3)}, r"layer 'b' has 4 units, its scores have shape \(3,\)"),
        ({"a": torch.full((4,), torch.nan), "b": torch.ones(4)}, "not numbers for 4 units"),
    ],
)
def test_same_size_names_the_layer_whose_scores_do_not_fit(scores, told):
    circuit = select(attributions(*random_matrices([4, 4], seed=0)), 2)
    with pytest.raises(ViscircuitsError, match=told):
        same_size(circuit, scores)


def test_random_like_draws_every_unit_equally_often():
    circuit = select(attributions(*random_matrices([10, 4], seed=0)), {"a": 3, "b": 1})
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(10)
    for _ in range(600):
        drawn = random_like(circuit, generator)
        assert {layer: len(units) for layer, units in drawn.units.items()} == {"a": 3, "b": 1}
        counts[list(drawn.units["a"])] += 1
    assert counts.sub(180).abs().max() < 4.5 * (600 * 0.3 * 0.7) ** 0.5


def test_shrink_keeps_the_best_units_and_nests():
    circuit = select(attributions(*random_matrices([12, 12, 12], seed=9)), {"a": 10, "b": 3, "c": 1})
    half = shrink(circuit, 0.5)
    assert {layer: len(units) for layer, units in half.units.items()} == {"a": 5, "b": 2, "c": 1}
    assert half.units["b"] == tuple(sorted(ranked(circuit)["b"][:2]))
    assert min(half.scores["a"]) >= sorted(circuit.scores["a"])[5]
    assert all(e.source in half and e.target in half for e in half.edges)
    parts = [shrink(circuit, step / 10) for step in range(11)]
    assert all(set(small) <= set(large) for small, large in itertools.pairwise(parts))
    assert [len(part.units["a"]) for part in parts] == list(range(11))
    assert parts[-1].units == circuit.units


def test_shrink_refuses_what_it_cannot_rank():
    circuit = select(attributions(*random_matrices([4, 4], seed=0)), 2)
    with pytest.raises(ViscircuitsError, match=r"between 0 and 1 of a circuit, got 1\.5"):
        shrink(circuit, 1.5)
    with pytest.raises(ViscircuitsError, match="units of layer 'a' have no scores"):
        ranked(dataclasses.replace(circuit, scores={}))
