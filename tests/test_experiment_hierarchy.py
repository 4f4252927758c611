"""A hierarchy of circuits: the tree, the tests by permutation, and the experiment from end to end."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import poisson
from typer.testing import CliRunner

from viscircuits.circuit import Circuit
from viscircuits.cli import app
from viscircuits.errors import ImageError, ModelError, ViscircuitsError
from viscircuits.experiments import hierarchy as rooms
from viscircuits.experiments.hierarchy import ALL, LATER, hierarchy
from viscircuits.experiments.hierarchy_analysis import Shared, in_most_by_chance, overlaps_of
from viscircuits.experiments.kept import Kept
from viscircuits.experiments.permuting import (
    beyond,
    concept_means,
    concepts_drawn,
    falling,
    holm,
    interval,
    mantel,
    own_more,
    pair_means,
    related_more,
)
from viscircuits.experiments.trees import RENDERED, WORDNET, distances, labels, open_tree, rendered_tree, siblings
from viscircuits.metrics import spearman
from viscircuits.models import wrap

PLACES = [("animal", "dog", "terrier"), ("animal", "dog", "hound"), ("animal", "cat"), ("car",)]
STEPS = torch.tensor([[0, 2, 3, 4], [2, 0, 3, 4], [3, 3, 0, 3], [4, 4, 3, 0]], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    values = torch.rand(n, n, generator=seeded(seed), dtype=torch.float64)
    return values + values.T


# ------------------------------------------------------------------ trees


def test_distance_is_the_steps_up_and_down():
    assert torch.equal(distances(PLACES), STEPS)


def test_siblings_have_the_same_parent_else_are_the_nearest():
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert torch.equal(siblings(PLACES), expected)
    nearest = [("a", "b", "x"), ("a", "c", "y"), ("d", "e", "z")]
    assert siblings(nearest).nonzero().tolist() == [[0, 1], [1, 0]]


def test_labels_say_more_where_one_step_names_two():
    assert labels([("fine", "lying"), ("coarse", "lying"), ("red",)]) == ["fine, lying", "coarse, lying", "red"]


def save_images(folder, n: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (20, 20), (i, 10, 10)).save(folder / f"{i}.png")


def test_folders_are_a_tree_and_small_ones_are_left_out(tmp_path):
    for path, n in {"animal/dog": 9, "animal/cat": 8, "car": 30, "boat": 8, "animal/few": 7}.items():
        save_images(tmp_path / path, n)
    tree = open_tree(tmp_path, 5, seed=0)
    assert {c.key: (len(c.first), len(c.second)) for c in tree} == {
        "animal/dog": (4, 5), "animal/cat": (4, 4), "car": (5, 5), "boat": (4, 4),
    }  # fmt: skip
    for concept in tree:  # no image is in both halves
        names = [{entry.read()[1] for entry in half.entries} for half in (concept.first, concept.second)]
        assert not names[0] & names[1]


def four_kinds(folder) -> None:
    for path in ("animal/dog", "animal/cat", "car", "boat"):
        save_images(folder / path, 8)


def test_what_is_no_image_is_passed_over_and_a_torn_one_is_named(tmp_path):
    four_kinds(tmp_path)
    for stray in ("car/._0.png", "car/Thumbs.db", "note.txt", "stray.png"):
        (tmp_path / stray).write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    tree = open_tree(tmp_path, 9, seed=0)
    assert [(c.key, len(c.first) + len(c.second)) for c in tree] == [
        ("animal/cat", 8), ("animal/dog", 8), ("boat", 8), ("car", 8),
    ]  # fmt: skip
    (tmp_path / "car" / "3.png").write_bytes(b"torn")
    with pytest.raises(ImageError, match=r"cannot read image '3\.png'"):
        hierarchy(tmp_path / "out", data=tmp_path, model="trained", quick=True)


@pytest.mark.parametrize("groups", [[], {"a": 3}, {"a": [3]}])
def test_groups_are_lists_of_file_names(tmp_path, groups):
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    with pytest.raises(ImageError, match="must hold the files of each group"):
        open_tree(tmp_path, 4, seed=0)


def test_groups_take_their_places_in_wordnet_and_share_no_photograph(tmp_path):
    names = [f"{number:03d}_x.jpg" for number in range(1000)]
    groups = {
        "dog": names[151:269], "cat": names[281:294], "car": names[800:812], "land_vehicle": names[800:824],
        "mine": names[900:910],
    }  # fmt: skip
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    for name in set(itertools.chain(*groups.values())):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    tree = {c.place: c for c in open_tree(tmp_path, 100, seed=0)}
    found = {place[-1]: len(c.first) + len(c.second) for place, c in tree.items()}
    assert found == {
        "hound": 20, "terrier": 26, "sporting dog": 17, "working dog": 29, "toy dog": 8, "feline": 13, "car": 12,
        "other land vehicle": 12, "mine": 10,
    }  # fmt: skip
    assert ("mine",) in tree and all("/".join(place) in WORDNET for place in tree if place != ("mine",))


def test_a_tree_without_depth_is_refused(tmp_path):
    for name in "abcd":
        save_images(tmp_path / name, 8)
    with pytest.raises(ImageError, match=r"all 4 concepts .* equally far apart.*nest the folders"):
        open_tree(tmp_path, 4, seed=0)
    with pytest.raises(ImageError, match="four concepts or more, got 0"):
        open_tree(tmp_path / "a", 4, seed=0)


def test_rendered_halves_hold_different_images_of_every_concept():
    tree = rendered_tree(2, seed=3)
    assert [c.key for c in tree] == list(RENDERED)
    for concept in tree:
        digests = [entry.read()[1] for half in (concept.first, concept.second) for entry in half.entries]
        assert len(set(digests)) == 4


def test_rendered_siblings_share_no_more_than_their_place():
    tree = {concept.place[-1]: concept for concept in rendered_tree(2, seed=0)}
    corners = [[entry.read()[0].getpixel((0, 0)) for entry in tree[name].first.entries] for name in ("disc", "ring")]
    assert max(abs(a - b) for one, other in zip(*corners, strict=True) for a, b in zip(one, other, strict=True)) > 30


# ------------------------------------------------------------------ permutation


def test_mantel_is_spearman_over_pairs_and_its_p_that_of_all_orders():
    values = symmetric(5)
    steps = symmetric(5, 1)
    row, column = torch.triu_indices(5, 5, 1)
    drawn = []
    for order in itertools.permutations(range(5)):
        moved = steps[list(order)][:, list(order)]
        drawn.append(spearman(values[row, column], moved[row, column]))
    tested = mantel(values, steps, 4000, seeded())
    assert tested.value == pytest.approx(drawn[0])
    assert tested.p == pytest.approx(np.mean(np.array(drawn) <= drawn[0] + 1e-9), abs=0.03)


def test_mantel_finds_overlap_that_falls_with_distance_and_nothing_in_equal_values():
    assert mantel(-distances(PLACES * 2), distances(PLACES * 2), 999, seeded()).p < 0.01
    assert mantel(torch.ones(4, 4, dtype=torch.float64), STEPS, 99, seeded()).p == 1


def test_p_is_uniform_where_there_is_nothing():
    steps = symmetric(8, 99)
    found = [mantel(symmetric(8, seed), steps, 199, seeded(seed)).p for seed in range(200)]
    assert 0.02 <= np.mean(np.array(found) <= 0.1) <= 0.18


def test_related_pairs_overlap_more_only_where_they_do():
    related = siblings([("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "x"), ("c", "y")])
    values = symmetric(6)[None]
    tested = related_more(values + 2 * related, related, 999, seeded())
    apart = ~torch.eye(6, dtype=torch.bool) & ~related
    assert tested.value == pytest.approx(float(2 + values[0][related].mean() - values[0][apart].mean()))
    assert tested.p < 0.1  # one of the fifteen ways to pair six
    assert related_more(values - 2 * related, related, 999, seeded()).p > 0.9


def test_numbers_that_fall_with_their_order():
    assert falling(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), 999, seeded()).value == pytest.approx(-1)
    assert falling(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), 999, seeded()).p < 0.01
    assert falling(torch.arange(6.0), 999, seeded()).p > 0.9


def test_beyond_leaves_nothing_of_rows_and_columns_and_all_of_the_diagonal():
    rows, columns = torch.rand(6, 1, generator=seeded()).double(), torch.rand(6, generator=seeded(1)).double()
    extra = torch.diag(torch.arange(1.0, 7.0)).double()
    assert torch.allclose(beyond(rows + columns + extra), extra, atol=1e-9)


def test_own_is_not_what_a_row_or_a_column_adds():
    rows, columns = 10 * torch.rand(8, 1, generator=seeded()).double(), torch.rand(8, generator=seeded(1)).double()
    noise = 0.1 * torch.randn(8, 8, generator=seeded(2), dtype=torch.float64)
    assert own_more(rows + columns + noise, 999, seeded()).p > 0.05
    tested = own_more(rows + columns + noise + torch.eye(8).double(), 999, seeded())
    assert tested.p < 0.01 and tested.value == pytest.approx(1, abs=0.15)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]


# ------------------------------------------------------------------ intervals


def test_pairs_count_as_often_as_both_their_concepts():
    values = symmetric(3)[None]
    which = ~torch.eye(3, dtype=torch.bool)
    drawn = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    means = pair_means(values, which, drawn)[:, 0]
    assert means[0] == pytest.approx(float(values[0][which].mean()))
    assert means[1] == pytest.approx(float(values[0, 0, 1]))
    assert means[2].isnan()
    assert concept_means(torch.tensor([[1.0, 4.0, 9.0]]), drawn)[1, 0] == pytest.approx(2)


def test_an_interval_holds_the_value_and_passes_over_draws_without_pairs():
    drawn = concepts_drawn(6, 500, seeded())
    assert torch.equal(drawn[0], torch.ones(6, dtype=torch.float64)) and torch.equal(
        drawn.sum(1), drawn[0].sum().expand(501)
    )
    few = torch.zeros(6, 6, dtype=torch.bool)
    few[0, 1] = few[1, 0] = True
    values = pair_means(symmetric(6)[None], few, drawn)[:, 0]
    found = interval(values)
    assert values.isnan().any() and found.low == pytest.approx(found.value) == pytest.approx(found.high)


# ------------------------------------------------------------------ circuits


def test_overlaps_by_hand():
    first = [Circuit({"a": (0, 1)}, {"a": 4}), Circuit({"a": (1, 2)}, {"a": 4})]
    second = [Circuit({"a": (0, 1)}, {"a": 4}), Circuit({"a": (0, 3)}, {"a": 4})]
    found = overlaps_of(first, second)
    assert found.jaccard[0].tolist() == [[1, pytest.approx(1 / 3)], [pytest.approx(1 / 3), 1]]
    assert found.itself.tolist() == [[1, 0]]
    assert float(found.chance) == pytest.approx(1 / 6 + 4 / 6 / 3)  # of six pairs one equal, four share one


def test_chance_of_a_backbone_is_what_random_circuits_share():
    rng, widths, sizes = np.random.default_rng(0), {"a": 10, "b": 20}, {"a": 5, "b": 8}
    seen = []
    for _ in range(3000):
        counts = {layer: np.zeros(width) for layer, width in widths.items()}
        for layer, size in sizes.items():
            for _ in range(5):
                counts[layer][rng.permutation(widths[layer])[:size]] += 1
        seen.append(sum((each >= 4).sum() for each in counts.values()))
    expected = in_most_by_chance(widths, sizes, 5, 4)
    assert expected == pytest.approx(np.mean(seen), rel=0.05)
    for n in (6, 8):  # p is that of the permutations, and too small in none of those that count
        p = Shared(n, (n, 0, 0), 0, expected).p
        assert p - 0.1 < np.mean(np.array(seen) >= n) < p
    assert Shared(3, (1, 1, 1), 0, 2.0).p == pytest.approx(1 - 5 * np.exp(-2))
    assert Shared(0, (0, 0, 0), 0, 2.0).p == 1


def test_the_tail_of_many_expected_units_is_that_of_poissons_distribution():
    for n, mean in ((900, 850.0), (2000, 2100.0), (3, 1e-5)):
        assert Shared(n, (n, 0, 0), 0, mean).p == pytest.approx(float(poisson.sf(n - 1, mean)), rel=1e-6)


# ------------------------------------------------------------------ the experiment


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("hierarchy")
    return hierarchy(out, quick=True, units=0.25), out


def test_the_quick_run_ends_with_everything_and_leaves_no_matrices(made):
    report, out = made
    report.save(out)
    data = json.loads((out / "results.json").read_text())
    assert len(data["concepts"]) == 8 and set(data["divergence"]) == {ALL, LATER}
    assert np.shape(data["overlap"]["CLA"]) == (5, 8, 8) == np.shape(data["overlap"]["random"])
    assert {table.title for table in report.tables} >= {"The claims", "Who is hurt by whom", "Shared backbone"}
    assert not (out / "attributions").exists()
    page = (out / "index.html").read_text()
    assert page.count("<svg") == len(report.figures) and "seed 0" in page
    verdict = "(holds|does not hold|not shown)"
    assert all(re.match(rf"\*\*.+: ([a-z ]+ )?{verdict}[^*]*\.\*\*", sentence) for sentence in report.said)


def test_random_circuits_overlap_as_chance_says_and_hurt_nobody_in_particular(made):
    data = made[0].data
    above = np.array(data["overlap"]["random"]) - np.array(data["chance"])[:, None, None]
    apart = ~np.eye(8, dtype=bool)
    assert abs(above[:, apart].mean()) < 0.03
    assert data["own"][ALL]["random"][1] > 0.01


def test_the_backbone_is_that_of_the_circuits_kept(made):
    report, out = made
    lines = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    circuits = [line["entry"]["CLA"] for line in lines if line["key"].startswith("circuits/first/")]
    counted = {
        layer: [sum(unit in c[layer] for c in circuits) for unit in range(len(n))]
        for layer, n in report.data["backbone"]["counts"]["CLA"].items()
    }
    assert counted == report.data["backbone"]["counts"]["CLA"]


def test_a_stopped_run_goes_on_and_says_the_same(made, tmp_path, monkeypatch):
    report, out = made
    found = []
    lines = (out / "parts.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "hurt/later half/CLA/" not in line]
    (tmp_path / "parts.jsonl").write_text("".join(kept) + lines[0][:40])  # killed while it wrote a line
    removed = []
    monkeypatch.setattr(rooms, "attribute", None)  # what is chosen is not attributed again
    once = rooms._Run._removed
    monkeypatch.setattr(rooms._Run, "_removed", lambda self, *which: removed.append(which) or once(self, *which))
    monkeypatch.setattr(rooms, "report_of", lambda numbers, *_, **__: found.append(numbers) or report)
    hierarchy(tmp_path, quick=True, units=0.25)
    assert len(removed) == 8
    before, after = report.data["divergence"], found[0]["hurt"]
    assert np.allclose(before[LATER]["CLA"], after[LATER]["CLA"], atol=1e-6) and before[ALL] == after[ALL]


def test_replaying_the_early_half_changes_nothing(tmp_path):
    """The same units removed with what precedes them run again, and handed out."""
    concepts = rendered_tree(2, 0)[:2]
    spec = rooms.train_small(RENDERED, each=4, steps=2)
    chain = tuple(rooms.find_layers(spec, concepts[0].first, None))
    run = rooms._Run(rooms.Setting(spec, chain, tuple(concepts), 0.25, 0), Kept(tmp_path / "x", {}), tmp_path, False)
    late = run.parts[LATER][0]
    circuit = Circuit({late: (0, 1, 2)}, run.setting.widths)
    with rooms.ablate(spec, circuit, "mean", reference=run._statistics):
        whole = run._answers(ALL)
    _ = run._untouched
    with rooms.ablate(spec, circuit, "mean", reference=run._statistics):
        assert torch.equal(run._answers(LATER), whole)


def test_the_most_active_others_never_come_from_the_backbone(tmp_path):
    concepts = rendered_tree(2, 0)[:2]
    spec = rooms.train_small(RENDERED, each=4, steps=2)
    chain = tuple(rooms.find_layers(spec, concepts[0].first, None))
    run = rooms._Run(rooms.Setting(spec, chain, tuple(concepts), 0.7, 0), Kept(tmp_path / "x", {}), tmp_path, False)
    layer, width = run.setting.addresses[0], run.setting.widths[run.setting.addresses[0]]
    most = list(range(width * 3 // 4))
    assert sorted(run._as_active({layer: most})[layer]) == list(range(width * 3 // 4, width))


@pytest.mark.parametrize("units", [0.5, 0.99])
def test_circuits_of_most_units_come_to_an_end(tmp_path, units):
    report = hierarchy(tmp_path, quick=True, units=units)
    counts = report.data["backbone"]["counts"]["CLA"]
    assert sum(map(sum, counts.values())) == sum(8 * int(units * len(each) + 0.5) for each in counts.values())


def test_an_image_of_the_same_name_is_not_taken_for_another(tmp_path):
    four_kinds(tmp_path)
    before = [rooms._named(concept) for concept in open_tree(tmp_path, 4, seed=0)]
    Image.new("RGB", (20, 20), (0, 200, 0)).save(tmp_path / "car" / "0.png")
    after = [rooms._named(concept) for concept in open_tree(tmp_path, 4, seed=0)]
    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 1


def test_weights_that_do_not_fit_are_an_error_and_no_reason_to_take_another_network(tmp_path):
    with pytest.raises(ModelError, match=r"none\.safetensors"):
        hierarchy(tmp_path, weights=tmp_path / "none.safetensors")
    with pytest.raises(ViscircuitsError, match="is trained here and takes no weights"):
        hierarchy(tmp_path, weights="none", quick=True)


def test_what_others_put_into_the_folder_stays(tmp_path):
    (tmp_path / "attributions").mkdir()
    (tmp_path / "attributions" / "mine.txt").write_text("mine")
    hierarchy(tmp_path, quick=True, units=0.25)
    assert [path.name for path in (tmp_path / "attributions").iterdir()] == ["mine.txt"]


def test_a_network_of_embeddings_is_refused(tmp_path, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Flatten()).eval()
    spec = wrap(net, lambda picture: torch.zeros(3, 4, 4), outputs="embedding")
    monkeypatch.setattr(rooms, "load_model", lambda address, weights: spec)
    with pytest.raises(ViscircuitsError, match=r"gives embeddings.*take a classifier"):
        hierarchy(tmp_path, model="mine")
    with pytest.raises(ViscircuitsError, match=r"between 0 and 1, such as 0.1, not 1"):
        hierarchy(tmp_path, units=1.0)


def test_the_command_says_what_is_wrong_with_the_folder(tmp_path):
    run = ["experiment", "hierarchy", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 2 and "there is no folder" in done.output
