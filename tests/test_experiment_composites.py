"""Composites: the generator, training on pairs, pruning edges, and the experiment from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from viscircuits.ablation import measure
from viscircuits.circuit import Circuit
from viscircuits.cli import app
from viscircuits.errors import FileFormatError, ImageError, LayerError, ModelError, ViscircuitsError
from viscircuits.experiments import composites as rooms
from viscircuits.experiments.composites import OneSeed, Options, composites, draw_sets, made_composites
from viscircuits.experiments.composites_report import Analysis, over_seeds
from viscircuits.experiments.edges import Link, Pruner, Running, kernel, layers_of, links_of
from viscircuits.experiments.pairs import Canvas, Composites, choose_pairs, mean_colour, open_parts, random_spots
from viscircuits.experiments.rankings import ORDERS, ROWS, Plain, Ranking, Reading
from viscircuits.experiments.training import (
    Pictures,
    SmallNet,
    _Training,
    begin,
    build,
    fit_linear,
    lighten,
    outputs_of,
    recipe_for,
    train,
    transformed,
)
from viscircuits.hooks import forward
from viscircuits.images import open_images
from viscircuits.models import wrap
from viscircuits.prefix import Prefix

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
SMALL = Canvas(side=32, tile=12, ground=(9, 9, 9))
SHORT = replace(recipe_for("small"), size=32, each=6, epochs=2, batch=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Plain colours as classes, training and held-out photographs apart by a shade."""
    root = tmp_path_factory.mktemp("colours")
    for part, shade in (("train", 0), ("val", 20)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                dimmed = tuple(max(0, value - shade - i) for value in colour)
                Image.new("RGB", (20 + i, 16), dimmed).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def parts(folder):
    return open_parts(folder, "train")


# ------------------------------------------------------------------ pairs


@pytest.mark.parametrize(("n_parts", "per_part"), [(20, 5), (7, 3), (12, 5), (3, 1)])
def test_every_part_has_about_as_many_partners(n_parts, per_part):
    pairs = choose_pairs(n_parts, per_part, 3)
    counts = np.bincount(np.array(pairs).ravel(), minlength=n_parts)
    assert len(set(pairs)) == len(pairs) == -(-n_parts * per_part // 2)
    assert counts.min() >= 1 and counts.max() <= per_part + 1 and abs(counts - per_part).max() <= 1


def test_there_are_not_more_partners_than_parts():
    with pytest.raises(ViscircuitsError, match=r"each of 4 parts can have 1 to 3 partners, got 4 .--pairs"):
        choose_pairs(4, 4, 0)


def test_tiles_never_overlap_and_every_place_is_as_likely():
    rng, seen = np.random.default_rng(0), []
    for _ in range(4000):
        (x1, y1), (x2, y2) = random_spots(rng, 3, 2, 2)
        assert abs(x1 - x2) >= 2 or abs(y1 - y2) >= 2
        assert max(x1, y1, x2, y2) <= 3
        seen.append((x1, y1, x2, y2))
    places = [(x, y) for x in range(4) for y in range(4)]
    ways = [(*a, *b) for a in places for b in places if abs(a[0] - b[0]) >= 2 or abs(a[1] - b[1]) >= 2]
    expected = 4000 / len(ways)
    counts = [seen.count(way) for way in ways]
    assert sum(counts) == 4000
    assert sum((n - expected) ** 2 / expected for n in counts) < len(ways) + 4 * (2 * len(ways)) ** 0.5  # chi squared


def test_a_composite_shows_both_parts_on_the_ground(parts):
    drawn = Composites(parts, [(0, 1)], 5, SMALL, seed=1)
    names = list(parts)
    for i in range(5):
        pixels = np.asarray(drawn.draw(i)).reshape(-1, 3).astype(int)
        for name in names[:2]:
            assert (np.abs(pixels - COLOURS[name]).max(1) < 5).sum() == 12 * 12
        assert (pixels == 9).all(1).sum() == 32 * 32 - 2 * 12 * 12


def test_a_composite_depends_on_the_seed_and_its_number_alone(parts):
    one, two = (Composites(parts, [(0, 1), (1, 2)], 3, SMALL, seed=2) for _ in range(2))
    assert one.draw(4).tobytes() == two.draw(4).tobytes()  # whatever was asked for before
    assert one.digest() == two.digest() != Composites(parts, [(0, 1), (1, 2)], 3, SMALL, seed=3).digest()
    assert one.labels.tolist() == [0, 0, 0, 1, 1, 1] == [one[i][1] for i in range(6)]
    assert one.holds(2).tolist() == [False] * 3 + [True] * 3


def test_held_out_composites_stand_at_places_of_their_own(folder):
    drawn = draw_sets(Options(folder, SHORT, n_parts=4, pairs=2, canvas=SMALL, held_out=SHORT.each), 0)
    shown = [[np.asarray(each.draw(i)) != 9 for i in range(len(each))] for each in (drawn.to_train, drawn.held_out)]
    assert drawn.to_train.groups == drawn.held_out.groups and len(shown[0]) == len(shown[1])
    assert not any(np.array_equal(one, two) for one, two in zip(*shown, strict=True))


def test_the_ground_is_the_mean_colour_unless_it_is_given(parts):
    assert mean_colour({"red": parts["red"], "blue": parts["blue"]}) == (127, 0, 127)
    beside = Composites(parts, [(0, 1)], 1, Canvas(32, 12, placement="beside")).draw(0)
    assert beside.getpixel((0, 0)) == mean_colour(parts)
    beside = Composites(parts, [(0, 1)], 1, Canvas(32, 12, (1, 2, 3), "beside")).draw(0)
    assert beside.getpixel((0, 0)) == (1, 2, 3)
    assert beside.getpixel((8, 16)) != (1, 2, 3) != beside.getpixel((24, 16))


@pytest.mark.parametrize(
    ("canvas", "said"),
    [
        ({"side": 10, "tile": 11}, "tile of 11 pixels does not fit on a canvas of 10"),
        ({"placement": "left"}, "no placement 'left'; choose random or beside"),
        ({"ground": (1, 2)}, "ground is three numbers from 0 to 255"),
    ],
)
def test_a_canvas_says_what_it_takes(canvas, said):
    with pytest.raises(ViscircuitsError, match=said):
        Canvas(**canvas)


def test_two_tiles_need_room(parts):
    with pytest.raises(ViscircuitsError, match="two tiles of 20 pixels overlap on a canvas of 32; it takes 40"):
        Composites(parts, [(0, 1)], 1, Canvas(32, 20))


def test_composites_are_written_and_read_back(parts, tmp_path):
    drawn = Composites(parts, [(0, 1), (2, 3)], 2, SMALL)
    drawn.write(tmp_path)
    images = open_images(tmp_path)
    assert len(images) == 4
    name = "-".join(list(parts)[:2])
    assert np.array_equal(np.asarray(Image.open(tmp_path / name / "0001.png")), np.asarray(drawn.draw(1)))
    made = json.loads((tmp_path / "composites.json").read_text(encoding="utf-8"))
    assert made["seed"] == 0 and made["canvas"]["ground"] == [9, 9, 9]


def test_two_sets_are_not_mixed_in_one_folder(parts, tmp_path):
    drawn = Composites(parts, [(0, 1)], 2, SMALL)
    before = drawn.write(tmp_path).read_text()
    assert drawn.write(tmp_path).read_text() == before  # the same again may be
    with pytest.raises(ViscircuitsError, match="holds other composites; give another folder"):
        Composites(parts, [(2, 3)], 2, SMALL, seed=1).write(tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_pairs_of_one_name_are_refused(parts):
    one, two, three, four = parts.values()
    with pytest.raises(ViscircuitsError, match="two groups are called 'a-b-c'"):
        Composites({"a-b": one, "c": two, "a": three, "b-c": four}, [(0, 1), (2, 3)], 1, SMALL)


def test_composites_are_written_by_a_command(folder, tmp_path):
    options = ["--parts", "4", "--pairs", "1", "--each", "2", "--canvas", "40", "--tile", "16", "--ground", "1,2,3"]
    ran = CliRunner().invoke(
        app, ["experiment", "make-composites", "--data", str(folder), "--out", str(tmp_path), *options]
    )
    assert ran.exit_code == 0, ran.output
    pictures = sorted(tmp_path.rglob("*.png"))
    assert len(pictures) == 4 and Image.open(pictures[0]).size == (40, 40)
    held = made_composites(folder, n_parts=4, pairs=1, each=2, held_out=True, canvas=Canvas(40, 16, (1, 2, 3)))
    assert Image.open(pictures[0]).tobytes() != held.draw(0).tobytes()  # those are held-out photographs


def test_classes_that_are_not_there_are_named(folder, tmp_path):
    with pytest.raises(ImageError, match=r"no class 'gren'.*green"):
        open_parts(folder, "train", ["gren"])
    with pytest.raises(ImageError, match="no folders of images"):
        open_parts(tmp_path)
    with pytest.raises(ViscircuitsError, match=r"there are 4 classes; 20 parts cannot be drawn.*--parts"):
        draw_sets(Options(folder, SHORT), 0)


# ------------------------------------------------------------------ training


def sets(parts):
    pairs = [(0, 1), (0, 2), (1, 3)]
    return Composites(parts, pairs, SHORT.each, SMALL), Composites(parts, [(i,) for i in range(4)], 2, SMALL)


def test_a_stopped_training_goes_on_and_gives_the_same(parts, tmp_path):
    drawn, plain = sets(parts)
    whole = train(SHORT, drawn, plain, tmp_path / "whole.safetensors")
    train(SHORT, drawn, plain, tmp_path / "stopped.safetensors", until=lambda step: step == 3)
    assert not (tmp_path / "stopped.safetensors").exists()
    again = train(SHORT, drawn, plain, tmp_path / "stopped.safetensors")
    read = train(SHORT, drawn, plain, tmp_path / "stopped.safetensors")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]) and torch.equal(value, read.model.state_dict()[name])
    assert not list(tmp_path.glob("*.part"))


def test_weights_of_another_recipe_are_not_taken_for_this_ones(parts, tmp_path):
    drawn, plain = sets(parts)
    train(SHORT, drawn, plain, tmp_path / "n.safetensors")
    with pytest.raises(FileFormatError, match="another recipe or on other composites"):
        train(replace(SHORT, rate=1e-4), drawn, plain, tmp_path / "n.safetensors")


def test_weights_trained_on_pictures_of_the_same_names_but_other_pixels_are_refused(folder, tmp_path):
    train(SHORT, *sets(open_parts(folder, "train")), tmp_path / "n.safetensors")
    (tmp_path / "other").mkdir()
    for name in COLOURS:
        (tmp_path / "other" / name).mkdir()
        for i in range(4):
            Image.new("RGB", (20 + i, 16), (1, 2, 3)).save(tmp_path / "other" / name / f"{i}.png")
    with pytest.raises(FileFormatError, match="another recipe or on other composites"):
        train(SHORT, *sets(open_parts(tmp_path / "other")), tmp_path / "n.safetensors")


def test_what_the_network_drops_by_itself_depends_on_the_seed_alone(parts, tmp_path):
    drawn, _ = sets(parts)
    images, found = torch.rand(len(drawn), 3, 8, 8, generator=seeded()), []
    for state in (1, 2):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3)).eval()
        nn.init.constant_(model[2].weight, 0.01)
        nn.init.zeros_(model[2].bias)
        run = _Training(wrap(model, lambda picture: torch.zeros(3, 8, 8), ()), SHORT, tmp_path / "n.part", "")
        with torch.random.fork_rng():
            torch.manual_seed(state)
            run.walk(Pictures(images), drawn.labels, None, progress=False)
        found.append(model[2].weight.detach())
    assert torch.equal(*found)


def test_a_linear_fit_separates_what_can_be_separated():
    labels = torch.arange(3).repeat(20)
    features = nn.functional.one_hot(labels, 3).float() + 0.1 * torch.randn(60, 3, generator=seeded())
    weight, bias = fit_linear(features, labels, 3)
    assert ((features @ weight.T + bias).argmax(1) == labels).all()


@pytest.mark.parametrize("address", ["lite0", "torchvision:googlenet"])
def test_a_photograph_network_is_trained_from_a_late_module_on(address, parts, tmp_path):
    """Random weights: the way that pretrained ones go too."""
    if address.startswith("torchvision"):
        pytest.importorskip("torchvision")
    known = recipe_for(address)
    assert recipe_for(address, "none").first is None  # all of it, where nothing was learnt
    recipe = replace(known, weights="none", size=64, each=2, plain=2, epochs=1, batch=2)
    drawn, plain = sets(parts)
    drawn = Composites(parts, drawn.groups, 2, SMALL)
    before = {name: value.clone() for name, value in build(recipe, drawn.names).model.state_dict().items()}
    spec = train(recipe, drawn, plain, tmp_path / "n.safetensors")
    after = spec.model.state_dict()
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    late = ("blocks.5", "blocks.6", "conv_head", "bn2", "classifier", "inception5", "fc")
    assert moved and all(name.startswith(late) for name in moved)
    assert forward(spec.model, transformed(drawn, spec.transform)).shape == (6, 3)


def test_a_network_without_a_linear_map_is_refused():
    with pytest.raises(ModelError, match="does not end in a linear map"):
        from viscircuits.experiments.training import head_of

        head_of(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_what_is_replayed_is_what_the_network_gives(parts):
    drawn, _ = sets(parts)
    spec = build(SHORT, drawn.names)
    images = transformed(drawn, spec.transform)
    begun = begin(spec, "relu4", drawn)
    assert begun.images.shape[2:] == (1, 1)  # lightened
    with torch.no_grad():
        expected = spec.model(images)
    assert torch.allclose(outputs_of(spec.model, begun, len(drawn)), expected, atol=1e-5)
    assert torch.equal(outputs_of(spec.model, begin(spec, None, drawn), len(drawn)), expected)


class Sized(nn.Module):
    """Reads the image's size after its first layer of interest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.second(self.first(images)).mean((2, 3)) * images.shape[-1])


def test_nothing_is_lightened_whose_shape_is_read():
    model, images = Sized().eval(), torch.rand(2, 3, 8, 8, generator=seeded())
    begun = Prefix(model, ["second"], images)
    lighten(begun)
    assert begun.images.shape == images.shape
    with torch.no_grad():
        assert torch.allclose(outputs_of(model, begun, 2), model(images))


# ------------------------------------------------------------------ pruning


@pytest.fixture(scope="module")
def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallNet(5, widths=(4, 5, 6, 7, 8)).eval()
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.4)
    return wrap(model, lambda picture: torch.zeros(3, 32, 32), address="small")


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def random_masks(spec, links, share=0.3):
    shapes = {link.source: kernel(spec.model, link).shape[:2] for link in links}
    return {layer: torch.rand(shape, generator=seeded(2)) < share for layer, shape in shapes.items()}


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("n_links", [1, 2])
def test_pruning_in_one_pass_is_pruning_edge_by_edge(small, ablation, n_links):
    links = links_of(small.model, "small")[-n_links:]
    layers = layers_of(links)
    statistics = measure(small, IMAGES, layers)
    masks = random_masks(small, links)
    answers = [each.without_edges(masks) for each in pruners(small, links, layers, ablation, statistics)]
    with torch.no_grad():
        whole = small.model(IMAGES)
    assert torch.allclose(*answers, atol=1e-5) and not torch.allclose(answers[0], whole, atol=1e-3)
    circuit = Circuit(dict.fromkeys(layers, (0, 2)), {layer: statistics.layers[layer].n_units for layer in layers})
    removed = [each.without_units(circuit) for each in pruners(small, links, layers, ablation, statistics)]
    assert torch.allclose(*removed, atol=1e-5)


def pruners(spec, links, layers, ablation, statistics):
    return Pruner(spec, links, IMAGES, ablation, statistics), Running(spec, layers, IMAGES, ablation, statistics)


def test_pruning_nothing_is_the_network(small):
    links = links_of(small.model, "small")
    with torch.no_grad():
        expected = small.model(IMAGES)
    for each in pruners(small, links, layers_of(links), "zero", measure(small, IMAGES, layers_of(links))):
        assert torch.allclose(each.without_edges({}), expected, atol=1e-6)


def test_links_of_lite0_are_pruned_exactly():
    spec = build(replace(recipe_for("lite0"), weights="none"), [str(i) for i in range(4)])
    links = links_of(spec.model, "lite0")[-2:]
    images = torch.randn(2, 3, 64, 64, generator=seeded())
    masks = {
        link.source: torch.zeros(kernel(spec.model, link).shape[:2], dtype=torch.bool).index_put_(
            (torch.arange(4), torch.arange(4) % 2), torch.tensor(True)
        )
        for link in links
    }
    statistics = measure(spec, images, layers_of(links))
    first = Pruner(spec, links, images, "mean", statistics).without_edges(masks)
    assert torch.allclose(
        first, Running(spec, layers_of(links), images, "mean", statistics).without_edges(masks), atol=1e-4
    )


def test_a_broken_chain_and_a_strided_link_are_refused(small):
    one, two = links_of(small.model, "small")
    with pytest.raises(LayerError, match="chain is broken between 'relu5' and 'relu3'"):
        layers_of([two, one])
    with pytest.raises(LayerError, match="no plain convolutions of stride 1"):
        kernel(small.model, Link("relu1", "relu2", ("conv2", "norm2"), "relu2:in"))


# ------------------------------------------------------------------ rankings


@pytest.fixture(scope="module")
def plain(parts):
    """A network that tells pairs of four colours, and plain images of each."""
    drawn, _ = sets(parts)
    spec = build(SHORT, drawn.names)
    images = Composites(parts, [(i,) for i in range(4)], 3, SMALL)
    links = links_of(spec.model, "small")
    from viscircuits.experiments.edges import weights_of

    return Plain(
        spec, layers_of(links), drawn.groups, begin(spec, links[0].source, images), 3, size=0.1,
        weights=weights_of(spec.model, links),
    )  # fmt: skip


def test_a_reading_adds_up_the_pairs_with_each_part():
    class Fixed(nn.Module):
        def forward(self, images):
            return torch.log(torch.tensor([[0.5, 0.2, 0.3]])).expand(len(images), -1)

    reading = Reading(Fixed(), Pictures(torch.zeros(2, 3, 1, 1)), [(0, 1), (0, 2), (1, 2)])
    found = reading(torch.tensor([0.0, 1.0])[:, None, None, None]).exp()
    assert torch.allclose(found, torch.tensor([[0.7, 0.8, 0.5]]).expand(2, -1))


@pytest.mark.parametrize("row", list(ROWS))
def test_every_row_prunes_only_what_it_may(plain, row):
    ranking, kind = plain.ranking(1, ROWS[row]), ROWS[row]
    circuit, whole = plain.circuit(1, kind.circuit), ranking.masks(1.0)
    allowed = 0
    for matrix in plain.attributions[1].matrices:
        mask = whole[matrix.source]
        inside = torch.zeros_like(mask)
        inside[torch.tensor(circuit.units[matrix.target])[:, None], list(circuit.units[matrix.source])] = True
        if kind.edges != "all":
            assert not (mask & (matrix.signed <= 0)).any()  # none that inhibits
        if kind.edges != "anywhere":
            assert not (mask & ~inside).any()
        allowed += int((inside & (matrix.signed > 0) if kind.edges != "all" else inside).sum())
        assert int(ranking.masks(0.5)[matrix.source].sum()) == round(0.5 * int(mask.sum()))
        assert not (ranking.masks(0.5)[matrix.source] & ~mask).any()
    assert ranking.n_edges == allowed == sum(int(mask.sum()) for mask in whole.values())
    assert not any(mask.any() for mask in ranking.masks(0.0).values())


def test_the_largest_score_goes_first():
    ranking = Ranking({"a": torch.tensor([3, 0, 2])}, {"a": (2, 2)})
    assert ranking.masks(0.34)["a"].tolist() == [[False, False], [False, True]]


def test_the_reference_is_the_mean_of_the_others(plain):
    others = [each for i, each in enumerate(plain.attributions) if i != 2]
    found = plain.others(2)
    for i, matrix in enumerate(found.matrices):
        expected = torch.stack([each.matrices[i].values for each in others]).mean(0)
        assert torch.allclose(matrix.values, expected, rtol=1e-4, atol=1e-7)
        assert torch.allclose(matrix.signed, torch.stack([e.matrices[i].signed for e in others]).mean(0), atol=1e-5)
    layer = plain.layers[0]
    expected = torch.stack([each.activity[layer] for each in others]).mean(0)
    assert torch.allclose(plain.raised(2)[layer], plain.attributions[2].activity[layer] - expected)


def test_a_contrast_is_what_an_edge_brings_its_raised_target_more_than_on_the_others(plain):
    mine, others = plain.attributions[1], [plain.attributions[i] for i in (0, 2, 3)]
    found = ORDERS["contrast"](plain, 1)
    for i, matrix in enumerate(mine.matrices):
        beyond = matrix.signed - sum(each.matrices[i].signed for each in others) / 3
        target = matrix.target
        raised = mine.activity[target] - sum(each.activity[target] for each in others) / 3
        assert torch.allclose(found[matrix.source], beyond * raised.clamp(min=0)[:, None], rtol=1e-3, atol=1e-7)
        assert (found[matrix.source] > 0).any() and (found[matrix.source] < 0).any()


def test_a_row_may_have_a_size_of_its_own(plain):
    half, usual = (plain.circuit(0, "activation-difference", size) for size in (0.5, None))
    assert all(len(half.units[each]) == pytest.approx(5 * len(usual.units[each]), rel=0.2) for each in plain.layers)


def test_accuracy_with_the_part_and_without_it_is_told_apart(plain):
    """Composites 0 and 1 show part 0. Without all edges both are lost, without all units composite 3 is."""
    labels = torch.tensor([0, 0, 1, 1])

    def answered(*right):
        return torch.nn.functional.one_hot(torch.where(torch.tensor(right), labels, 1 - labels), 2).float()

    def without_edges(masks):
        share = sum(float(mask.sum()) for mask in masks.values()) / plain.ranking(0, ROWS["random units"]).n_edges
        return answered(share < 0.9, share < 0.9, True, True)

    held_out = SimpleNamespace(labels=labels, holds=lambda part: torch.tensor([True, True, False, False]))
    seed = object.__new__(OneSeed)
    seed.__dict__ |= {
        "plain": plain, "layers": plain.layers, "drawn": SimpleNamespace(held_out=held_out),
        "whole": answered(True, True, True, True),
        "pruner": SimpleNamespace(
            without_edges=without_edges, without_units=lambda circuit: answered(True, True, True, False)
        ),
    }  # fmt: skip
    found = seed._pruned(0, "random units")
    assert found["subclass"] == [1, 1, 1, 1, 0] and found["complement"] == [1, 1, 1, 1, 1]
    assert found["units removed"] == [1, 0.5]


def test_a_pairs_circuit_is_set_against_the_union_of_two_parts_less_chance():
    def circuit(*units):
        return Circuit({"a": units}, {"a": 6})

    of_parts = [circuit(0, 1), circuit(2), circuit(3), circuit(4, 5)]
    seed = object.__new__(OneSeed)
    seed.__dict__ |= {
        "drawn": SimpleNamespace(pairs=((0, 1), (2, 3))),
        "plain": SimpleNamespace(circuit=lambda part, how: of_parts[part]),
        "_pairs_as_parts": SimpleNamespace(circuit=lambda i, how: (circuit(0, 1, 2), circuit(2, 3, 4))[i]),
    }
    drawn = [set(three) for three in combinations(range(6), 3)]
    chance = float(np.mean([len(each & {0, 1, 2}) / len(each | {0, 1, 2}) for each in drawn]))
    found = seed._shared("cla")
    assert found["chance"] == pytest.approx(chance)
    assert found["parts in common"] == [[2, 0], [0, 2]]
    assert np.array(found["above chance"]) == pytest.approx(np.array([[1, 0], [1 / 5, 2 / 4]]) - chance)


# ------------------------------------------------------------------ from end to end


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("composites")
    return composites(out, quick=True), out


def test_the_quick_run_reports_everything(quick):
    report, out = quick
    page = report.save(out).read_text(encoding="utf-8")
    assert [table.title for table in report.tables] == [
        "The networks", "Without the part's circuit", "Selectivity on the way",
        "Circuits of pairs and of their parts", "Every part",
    ]  # fmt: skip
    assert {row[0] for row in report.tables[1].rows} == set(ROWS)
    assert "<script" not in page and "held-out composites" in page and "Made with" in (out / "report.md").read_text()
    assert report.made["seeds"] == "0"


def test_without_its_circuit_a_part_is_lost_and_others_stay(quick):
    of = Analysis(quick[0].data["seeds"])
    assert quick[0].data["seeds"][0]["network"]["accuracy"] > 0.7
    ours, random = (float(of.selective(row)[..., -1].mean()) for row in ("anchored", "random edges"))
    assert ours > 0.3 and ours > random + 0.3


def test_a_finished_run_computes_nothing_again(quick, monkeypatch):
    report, out = quick
    lines = (out / "parts.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr(rooms, "begin", None)
    monkeypatch.setattr(rooms, "Pruner", None)
    again = composites(out, quick=True)
    assert (out / "parts.jsonl").read_text(encoding="utf-8") == lines
    assert json.dumps(again.data) == json.dumps(report.data)


def test_a_run_with_another_option_starts_anew(quick, monkeypatch):
    _, out = quick
    monkeypatch.setattr(rooms, "begin", None)
    with pytest.raises(TypeError):
        composites(out, quick=True, size=0.3)


def test_a_network_of_which_no_link_is_known_is_pruned_all_the_same(folder, tmp_path):
    pytest.importorskip("torchvision")
    recipe = replace(recipe_for("torchvision:googlenet", "none"), size=64, each=2, epochs=1, batch=2)
    options = Options(
        folder, recipe, n_parts=4, pairs=1, canvas=SMALL, held_out=1, plain=2, composed=2, size=0.01,
        rows=("CLA", "weight norm"),
    )  # fmt: skip
    found = OneSeed(options, 0, tmp_path).measured()
    assert found["layers"] == ("inception5a", "inception5b")
    for part in found["parts"].values():
        assert set(part) == {"CLA"}  # no weights are known
        assert len(part["CLA"]["subclass"]) == len(rooms.FRACTIONS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": ()}, "one seed or more, each once"),
        ({"seeds": (1, 1)}, "one seed or more, each once"),
        ({"seeds": (-1,)}, "from 0 to 1000000000, got -1 .--seeds"),
        ({"seeds": (0, 99999999999999)}, "from 0 to 1000000000, got 99999999999999 .--seeds"),
        ({"n_parts": 3, "pairs": 1}, "one shares a part with all others.*take more parts"),
        ({"size": 0.0}, "a share of each layer, above 0 and at most 1; got 0.0 .--size"),
        ({"ablation": "noise"}, "'zero' or 'mean', got 'noise'"),
        ({"n_parts": 2}, "2 parts cannot be drawn: give 3 to 12"),
        ({"links": 3}, "small has 2 links, got 3 .--links"),
        ({"weights": "mine.safetensors"}, "'small' .* takes no weights, got 'mine.safetensors' .--weights.*--model"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, said):
    with pytest.raises(ViscircuitsError, match=said):
        composites(tmp_path, quick=True, **options)
    assert list(tmp_path.iterdir()) == []  # before anything is trained


def test_the_command_refuses_seeds_that_are_no_numbers(tmp_path):
    ran = CliRunner().invoke(app, ["experiment", "composites", "--quick", "--out", str(tmp_path), "--seeds", "a"])
    assert ran.exit_code and "--seeds takes whole numbers" in ran.output


# ------------------------------------------------------------------ what is said


def entry(subclass, complement, units):
    fractions = [0.0, 0.5, 1.0]
    return {
        "fractions": fractions, "subclass": subclass, "complement": complement, "units removed": units, "edges": 7,
    }  # fmt: skip


def test_selectivity_and_area_by_hand():
    part = entry([0.8, 0.5, 0.1], [0.7, 0.7, 0.6], [0.2, 0.7])
    of = Analysis({0: {"parts": {"tabby": {"anchored": part}}, "shared": {}}})
    assert of.selective("anchored")[0, 0].tolist() == pytest.approx([0, 0.3, 0.6])
    assert of.area("anchored").item() == pytest.approx((0 + 0.3) / 4 + (0.3 + 0.6) / 4)
    assert of.units("anchored").item() == pytest.approx(0.6)
    assert of.fall("anchored", "complement").item() == pytest.approx(0.1)


def test_an_interval_is_wider_where_seeds_differ_than_where_parts_do():
    by_part = torch.tensor([[0.0, 1.0] * 10] * 3)
    by_seed = torch.tensor([[0.0] * 20, [1.0] * 20, [0.5] * 20])
    narrow, wide = over_seeds(by_part), over_seeds(by_seed)
    assert narrow.value == wide.value == 0.5
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low) > 0
    assert over_seeds(torch.full((1, 4), 0.3)).low == pytest.approx(0.3)


def test_a_pairs_own_union_is_told_from_unrelated_ones():
    common = [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 2, 1], [0, 0, 1, 2]]
    above = [[0.3 * n for n in row] for row in common]
    shared = {"cla": {"above chance": above, "parts in common": common, "chance": 0.1}}
    of = Analysis({0: {"parts": {"tabby": {"anchored": entry([1, 1, 1], [1, 1, 1], [1, 1])}}, "shared": shared}})
    spans, more, p = of.kinship("cla")
    assert [round(spans[kin].value, 6) for kin in (2, 1, 0)] == [0.6, 0.3, 0.0]
    assert more.value == pytest.approx(0.6) and p == pytest.approx(1 / 24, abs=0.02)  # 4! orders
