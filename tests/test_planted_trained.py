"""Planted networks that were trained: merged classifiers, merged transformers, and holders of a causal graph."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from viscircuits.ablation import ablate, measure, prune_edges
from viscircuits.circuit import Circuit, Edge
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.metrics import auroc
from viscircuits.planted import PLANTED, Planted, families, merged, plant, trained, vit
from viscircuits.planted.checks import Check, check
from viscircuits.planted.composed import QUESTIONS, Pictures, letters_on_gratings, two_figures
from viscircuits.planted.learning import (
    WEIGHTS,
    Kept,
    Shares,
    accuracy,
    copy_units,
    drop_idle,
    everything,
    fit,
    initialise,
    relus,
    shares,
    silence,
    stages,
    weighted,
)
from viscircuits.task import outcomes

FAMILIES = ("merged", "merged with cross-talk", "trained", "merged ViT")
NAMES = [name for family in FAMILIES for name in families()[family]]
EXACT = [*families()["merged"], *families()["merged ViT"]]
N_IMAGES = 8


@lru_cache
def small(name: str, seed: int = 0) -> Planted:
    return plant(name, seed, n_images=16)


@lru_cache
def checked(name: str) -> Check:
    return check(plant(name))


def pooled(scores: dict, truth: dict) -> tuple[Tensor, Tensor]:
    return torch.cat([scores[key].flatten() for key in truth]), torch.cat([true.flatten() for true in truth.values()])


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the truth holds


@pytest.mark.parametrize("name", ["two-networks", "cross-talk-middle", "trained-and", "trained-xor"])
def test_the_stated_truth_is_what_exact_removal_finds(name: str) -> None:
    assert checked(name).problems == ()


def test_without_cross_talk_exact_removal_ranks_perfectly() -> None:
    found, planted = checked("two-networks"), small("two-networks")
    assert found.stray_unit == found.stray_edge == found.others == 0  # zero weights: not even rounding
    assert auroc(*pooled(found.units, planted.units)) == auroc(*pooled(found.edges, planted.edges)) == 1


@pytest.mark.parametrize("name", EXACT)
def test_removing_all_that_is_not_in_the_circuit_changes_nothing(name: str) -> None:
    planted = small(name)
    task = planted.task()
    images, labels = task.concept[:N_IMAGES], task.concept_labels[:N_IMAGES]
    others = [Edge(source, target, 0.0, 0.0) for source, target in planted.false_edges()]
    full = outcomes(task, images, labels)
    with (
        ablate(task.spec, planted.truth(), task.ablation, reference=task.statistics, keep=True),
        prune_edges(task.spec, others, task.ablation, reference=task.statistics),
    ):
        assert torch.equal(outcomes(task, images, labels), full)


def test_each_unit_of_a_transformers_circuit_counts_alone() -> None:
    planted = small("two-transformers")
    task = planted.task()
    full = outcomes(task, task.concept, task.concept_labels).mean()
    for unit in planted.truth():
        alone = Circuit({unit.layer: (unit.index,)}, planted.widths)
        with ablate(task.spec, alone, task.ablation, reference=task.statistics):
            assert abs(outcomes(task, task.concept, task.concept_labels).mean() - full) > 1e-5


@pytest.mark.parametrize("name", ["three-networks", "trained-and", "trained-xor"])
def test_units_outside_the_circuit_are_as_active_as_those_in_it(name: str) -> None:
    planted = plant(name, n_images=64)
    everywhere = measure(planted.model, torch.cat([planted.concept, planted.reference]), planted.layers)
    assert all(bool((each > 0).all()) for each in everywhere.variance.values())  # none is dead
    seen = measure(planted.model, planted.concept, planted.layers)
    activity = {layer: seen.variance[layer].sqrt() + seen.mean[layer].abs() for layer in planted.layers}
    assert auroc(*pooled(activity, planted.units)) < 0.9  # so what is active does not tell


@pytest.mark.parametrize("name", NAMES)
def test_a_builder_is_named_as_it_is_registered(name: str) -> None:
    planted = small(name)
    assert (planted.name, planted.family) == (name, PLANTED[name].family)
    assert not planted.model.training and count_hooks(planted.model) == 0


@pytest.mark.parametrize("name", ["two-networks", "trained-xor", "two-transformers"])
def test_the_seed_decides_everything(name: str) -> None:
    first, again, other = plant(name, 1, n_images=4), plant(name, 1, n_images=4), plant(name, 3, n_images=4)
    assert torch.equal(first.concept, again.concept) and not torch.equal(first.concept, other.concept)
    assert not torch.equal(first.concept, first.test_concept)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert first.names != other.names


# ---------------------------------------------------------------- weights that are kept


def plant_tool():
    path = Path(__file__).resolve().parent.parent / "tools" / "plant.py"
    spec = importlib.util.spec_from_file_location("plant", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_every_kept_network_has_what_makes_it_and_is_small() -> None:
    kept = {path.stem: path.stat().st_size for path in WEIGHTS.glob("*.safetensors")}
    assert set(kept) == set(plant_tool().networks())
    assert max(kept.values()) < 200_000


def test_every_kept_classifier_answers_its_question() -> None:
    pictures = letters_on_gratings(500, [999])
    for question in QUESTIONS:
        for variant in range(merged.N_VARIANTS):
            assert accuracy(merged.load_part(question, variant).network, pictures, question) >= 0.95
    for question in ("letters", "gratings"):
        for variant in range(vit.N_VARIANTS):
            assert accuracy(vit.load_part(question, variant), pictures, question) >= 0.95


# ---------------------------------------------------------------- merged networks


@pytest.mark.parametrize("parts", [("letters", "gratings"), ("colours", "gratings", "letters")])
def test_a_merged_network_answers_as_its_parts_do(parts: tuple[str, ...]) -> None:
    planted = merged.merged(0, parts=parts, n_images=4)
    alone = [merged.load_part(question, 0).network(planted.concept) for question in parts]
    torch.testing.assert_close(planted.model(planted.concept), torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_a_merged_transformer_answers_as_its_parts_do() -> None:
    planted = small("two-transformers")
    alone = [vit.load_part(question, 0)(planted.concept) for question in ("letters", "gratings")]
    torch.testing.assert_close(planted.model(planted.concept), torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_the_circuit_is_the_part_that_answers_the_concepts_question() -> None:
    planted = merged.merged(0, concept="gratings", n_images=4)
    for layer, true in planted.units.items():
        assert [name.startswith("gratings") for name in planted.names[layer]] == true.tolist()
    assert set(planted.concept_labels.tolist()) == {4}  # the second part's first answer
    assert set(planted.reference_labels.tolist()) <= {5, 6, 7}


@pytest.mark.parametrize("cross_talk", [0.0, 0.5])
def test_cross_talk_is_the_norm_between_parts_over_that_within(cross_talk: float) -> None:
    networks = [merged.load_part(question, 0).network for question in QUESTIONS]
    whole, origins = merged.merge(networks, cross_talk, drawn(0))
    outputs = merged.in_order([4, 4, 4])
    for layer, (source, target) in zip(weighted(whole)[1:], pairwise([*origins, outputs]), strict=True):
        same = target.part[:, None] == source.part
        ratio = layer.weight.detach()[~same].norm() / layer.weight.detach()[same].norm()
        assert float(ratio) == pytest.approx(cross_talk)


def test_parts_are_normalised_by_themselves() -> None:
    tokens = torch.randn(2, 5, 8, generator=drawn(0))
    norm, one = vit.PartNorm(2, 4), nn.LayerNorm(4, elementwise_affine=False)
    torch.testing.assert_close(norm(tokens), torch.cat([one(tokens[..., :4]), one(tokens[..., 4:])], -1))


def test_a_concept_that_no_part_answers_is_refused() -> None:
    with pytest.raises(ViscircuitsError, match="'colours' is none of letters, gratings"):
        merged.merged(0, concept="colours")


def test_weights_that_are_missing_say_how_to_make_them() -> None:
    with pytest.raises(ViscircuitsError, match=r"run tools/plant\.py"):
        merged.load_part("letters", 99)


# ---------------------------------------------------------------- networks that hold a causal graph


def test_the_graph_says_what_its_truth_table_says() -> None:
    left, right = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    given = {trained.LEFT: left, trained.RIGHT: right, trained.BARS: left}
    assert trained.answers("and", given)[trained.BOTH].tolist() == [0, 0, 0, 1]
    assert trained.answers("xor", given)[trained.BOTH].tolist() == [0, 1, 1, 0]


@lru_cache
def figures() -> Pictures:
    return two_figures(1000, [54321])


@pytest.mark.parametrize("rule", ["and", "xor"])
@pytest.mark.parametrize("variant", [0, 1])
def test_exchanging_a_group_exchanges_its_variable(rule: str, variant: int) -> None:
    holder, pictures = trained.load_holder(rule, variant), figures()
    interchange = trained.Interchange(holder.network, holder.groups, rule, pictures, drawn(0))
    order, parts = torch.randperm(1000, generator=drawn(1)), stages(holder.network)
    own = {each: values for each, values in interchange.variables.items() if each != trained.BOTH}
    for layer, group in enumerate(holder.groups):
        below = nn.Sequential(*parts[: layer + 1])(pictures.images)
        for variable in group.unique().tolist():
            new = below.clone()
            new[:, group == variable] = below[order][:, group == variable]
            outputs = nn.Sequential(*parts[layer + 1 :])(new)
            said = trained.answers(rule, {**own, variable: interchange.variables[variable][order]})
            for each, outputs_of in trained.OUTPUTS.items():
                right = (outputs[:, outputs_of].argmax(1) == said[each]).float().mean()
                assert right >= 0.95, (layer, variable, each)


# ---------------------------------------------------------------- training


@lru_cache
def untrained() -> nn.Sequential:
    network = merged.classifier((3, 4, 3))
    initialise(network, drawn(0))
    return network.eval()


def test_shares_are_those_that_the_check_finds() -> None:
    network, pictures = untrained(), letters_on_gratings(12, [7])
    labels, layers = torch.zeros(4, dtype=torch.long), relus(network)
    images = {"concept": pictures.images[:4], "reference": pictures.images[4:]}
    images |= {f"{each}_labels": torch.zeros(len(images[each]), dtype=torch.long) for each in images}
    kept = everything(network)
    slow = check(
        Planted(
            name="alone", family="merged", model=network, layers=layers, **images,
            **{f"test_{each}": value for each, value in images.items()},
            units=dict(zip(layers, kept.units, strict=True)),
            edges=dict(zip(pairwise(layers), kept.edges, strict=True)),
        )
    )  # fmt: skip
    fast = shares(network, images["concept"], labels, images["reference"])
    signed = slow.size / abs(_full_less_empty(network, images))  # the check divides by the mean of the sizes
    for layer, found in zip(layers, fast.units, strict=True):
        torch.testing.assert_close(found.abs().double(), slow.units[layer] * signed, atol=1e-4, rtol=1e-3)
    for pair, found in zip(pairwise(layers), fast.edges, strict=True):
        torch.testing.assert_close(found.abs().double(), slow.edges[pair] * signed, atol=1e-4, rtol=1e-3)


def _full_less_empty(network: nn.Sequential, images: dict[str, Tensor]) -> float:
    last = nn.Sequential(*stages(network)[:-1])
    means = last(images["reference"]).mean((0, 2, 3))
    full, empty = network(images["concept"])[:, 0], network.head(means)[0]
    return (full - empty).mean().item()


def all_of(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_what_is_idle_goes_with_its_edges_and_an_edgeless_unit_goes_too() -> None:
    kept = Kept([all_of(2), all_of(2)], [all_of(2, 2)])
    found = Shares((torch.tensor([0.5, -0.5]), torch.tensor([0.3, 0.001])), (torch.tensor([[0.0, -0.2], [0.2, 0.2]]),))
    assert drop_idle(kept, found, (0.01, 0.01)) == 5  # unit 1 above, 3 edges, and unit 0 below that has none left
    assert [units.tolist() for units in kept.units] == [[False, True], [True, False]]
    assert kept.edges[0].tolist() == [[False, True], [False, False]]


def test_the_idlest_go_first() -> None:
    kept = Kept([all_of(4)], [])
    found = Shares((torch.tensor([0.003, 0.001, 0.5, -0.002]),), ())
    assert drop_idle(kept, found, (0.01, 0.01), at_most=0.5) == 2
    assert kept.units[0].tolist() == [True, False, True, False]


def test_what_is_silenced_has_no_share() -> None:
    network = merged.classifier((3, 4, 3))
    network.load_state_dict(untrained().state_dict())
    kept, pictures = everything(network), letters_on_gratings(8, [7])
    kept.units[1][2] = False
    kept.edges[0][2] = kept.edges[1][:, 2] = kept.edges[0][0, 1] = False
    silence(network, kept)
    found = shares(network, pictures.images[:4], torch.zeros(4, dtype=torch.long), pictures.images[4:])
    assert found.units[1][2] == found.edges[0][0, 1] == 0
    assert found.edges[0][2].abs().max() == found.edges[1][:, 2].abs().max() == 0
    assert (found.edges[0][0, [0, 2]] != 0).all()


def test_reordering_units_changes_no_answer() -> None:
    old, new = trained.network_of((3, 4, 3, 5)), trained.network_of((3, 4, 3, 5))
    initialise(old, drawn(0))
    copy_units(old, new, [torch.randperm(n, generator=drawn(n)) for n in (3, 4, 3, 5)])
    images = two_figures(4, [3]).images
    assert not torch.equal(old.conv2.weight, new.conv2.weight)
    torch.testing.assert_close(new(images), old(images), atol=1e-5, rtol=1e-5)


def test_training_repeats_itself_to_the_last_bit() -> None:
    pictures = letters_on_gratings(40, [5])

    def after_training() -> Tensor:
        network, generator = merged.classifier((3, 4, 3)), drawn(1)
        initialise(network, generator)
        answers = pictures.answers["gratings"]

        def loss(batch: Tensor) -> Tensor:
            return nn.functional.cross_entropy(network(pictures.images[batch]), answers[batch])

        fit(network, 40, loss, epochs=2, rate=1e-2, generator=generator, batch_size=20)
        return network.head.weight.detach()

    assert torch.equal(after_training(), after_training())


def test_training_that_leaves_something_idle_says_so() -> None:
    with pytest.raises(ViscircuitsError, match="still has idle units after 0 rounds"):
        merged.train_part("colours", n_images=50, epochs=1, rounds=0)


# ---------------------------------------------------------------- pictures


def test_a_picture_depends_on_its_place_and_the_seed_alone() -> None:
    few, more, other = letters_on_gratings(2, [1]), letters_on_gratings(4, [1]), letters_on_gratings(2, [2])
    assert torch.equal(few.images, more.images[:2]) and not torch.equal(few.images, other.images)
    assert torch.equal(two_figures(2, [1]).images, two_figures(3, [1]).images[:2])


def test_answers_can_be_given_and_excluded() -> None:
    assert set(letters_on_gratings(20, [1], given={"colours": 2}).answers["colours"].tolist()) == {2}
    assert set(letters_on_gratings(40, [1], excluded={"letters": 3}).answers["letters"].tolist()) == {0, 1, 2}


def test_the_questions_are_independent_of_one_another() -> None:
    answers = letters_on_gratings(200, [1]).answers
    for first, second in (("letters", "gratings"), ("letters", "colours"), ("gratings", "colours")):
        table = torch.zeros(4, 4)
        table.index_put_((answers[first], answers[second]), torch.ones(200), accumulate=True)
        chi_square = ((table - 12.5) ** 2 / 12.5).sum()
        assert chi_square < 40  # 15 degrees of freedom: more is one chance in two thousand
