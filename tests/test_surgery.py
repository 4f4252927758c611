"""Surgery: what the network does under an edit is what `ablate` and `prune_edges` do, and nothing is left behind."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn

from test_discovery import tiny, to_tensor
from viscircuits import evaluation
from viscircuits.ablation import ABLATIONS, ablate, measure, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.connecting import connect
from viscircuits.errors import ImageError, LayerError, ModelError, ViscircuitsError
from viscircuits.evaluation import evaluate
from viscircuits.hooks import count_hooks
from viscircuits.images import open_images
from viscircuits.models import ModelSpec, wrap
from viscircuits.probing import answers_of
from viscircuits.surgery import N_BEGUN, Edit, Surgery

WIDTHS = {"1": 6, "3": 8, "5": 5}
CIRCUIT = Circuit(
    {"1": (0, 3), "3": (2, 5, 7), "5": (1, 4)}, WIDTHS, {"1": (1.0, 2.0), "3": (3.0, 1.0, 2.0), "5": (2.0, 1.0)}
)
CONCEPT, OTHERS = "render:grating,size=32,n=6", "render:colour,size=32,n=7"
UNITS = (Unit("1", 0), Unit("3", 5), Unit("5", 2))  # the last one is of a layer of the circuit, not of the circuit
EDGES = (
    (Unit("1", 3), Unit("3", 2)),
    (Unit("1", 0), Unit("5", 1)),  # past a layer
    (Unit("3", 7), Unit("5", 1)),
    (Unit("1", 4), Unit("3", 5)),  # into a unit that is removed as well
)


@pytest.fixture
def spec() -> ModelSpec:
    return tiny()


@pytest.fixture
def surgery(spec) -> Surgery:
    sets = {"concept": open_images(CONCEPT), "others": open_images(OTHERS)}
    return Surgery(spec, CIRCUIT, reference=open_images(OTHERS), tests=sets, looked_at=open_images(CONCEPT))


def picture(seed: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def nested(spec: ModelSpec, edit: Edit, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: output and activations under the two contexts, one inside the other, as anyone writes them."""
    units = {layer: tuple(sorted(u.index for u in edit.units if u.layer == layer)) for layer in WIDTHS}
    edges = [Edge(source, target, 0.0, 0.0) for source, target in edit.edges]
    reference = measure(spec, open_images(OTHERS), list(WIDTHS))
    seen: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        ablate(spec, Circuit(units, WIDTHS), edit.ablation, reference=reference),
        prune_edges(spec, edges, edit.ablation, reference=reference),
    ):
        handles = [
            spec.model.get_submodule(layer).register_forward_hook(
                lambda module, args, out, layer=layer: seen.update({layer: out.clone()})
            )
            for layer in WIDTHS
        ]
        output = spec.model(image)
        for handle in handles:
            handle.remove()
    return output, seen


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("edges", [(), EDGES])
@pytest.mark.parametrize("units", [(), UNITS])
def test_an_edit_does_to_the_bit_what_the_nested_contexts_do(spec, surgery, units, edges, ablation):
    edit = Edit(units, edges, ablation)
    probe = surgery.probe(picture(), "noise", "uploaded")
    found = surgery.operate(probe, edit)
    output, seen = nested(spec, edit, probe.image)
    assert found.answers == answers_of(spec, output[0])
    assert found.activations.tolist() == [seen[unit.layer][0, unit.index].max().item() for unit in CIRCUIT]
    with torch.no_grad(), surgery.under(edit):
        assert torch.equal(spec.model(probe.image), output)
    assert bool(edit) == (found.answers != probe.answers)


def test_an_answer_does_not_depend_on_what_was_asked_before(surgery):
    probes = [surgery.probe(picture(seed), str(seed), "uploaded") for seed in range(N_BEGUN + 2)]
    edit = Edit(UNITS, EDGES, "resample")
    first = [surgery.operate(probe, edit) for probe in probes]
    surgery.operate(probes[0], Edit(UNITS[:1], (), "noise"))
    again = [surgery.operate(probe, edit) for probe in reversed(probes)][::-1]
    for one, other in zip(first, again, strict=True):
        assert one.answers == other.answers
        assert one.activations.tolist() == other.activations.tolist()


def test_accuracy_of_an_edit_is_what_an_evaluation_finds(spec, surgery, monkeypatch):
    edit = Edit(tuple(CIRCUIT), (), "mean")
    *progress, last = surgery.accuracy(edit)
    monkeypatch.setattr(evaluation, "N_BOOTSTRAP", 50)
    sets = open_images(CONCEPT), open_images(OTHERS)
    whole = evaluate(spec, CIRCUIT, *sets, ablation="mean", reference=open_images(OTHERS), draws=1).data
    removed = whole["circuits"][0]
    for what in ("concept", "others"):
        assert last["before"][what] == whole["baseline"][what][last["measure"]]
        assert last["after"][what] == removed[what][last["measure"]]
    assert last["selectivity"]["value"] == removed["selectivity"]["value"]
    assert progress == [{"done": done, "of": 13} for done in (0, 4, 6, 10, 13)]


@pytest.mark.parametrize("n_edges", [1, 40])
def test_accuracy_under_pruned_edges_counts_images_whose_answer_stays(spec, surgery, n_edges):
    edges = tuple((Unit("1", i), Unit("3", j)) for i in range(6) for j in range(8))[-n_edges:]
    *_, last = surgery.accuracy(Edit((), edges))
    images = torch.stack([to_tensor(each.image) for each in open_images(CONCEPT)])
    with torch.no_grad():
        before = spec.model(images).argmax(1)
        with prune_edges(spec, [Edge(a, b, 0.0, 0.0) for a, b in edges]):
            after = spec.model(images).argmax(1)
    assert last["measure"] == "agreement"
    assert last["after"]["concept"]["value"] == pytest.approx((before == after).float().mean().item())


def test_images_that_found_the_circuit_do_not_test_it(spec):
    whole = open_images(CONCEPT)
    digests = [each.digest[:16] for each in whole]
    found = replace(CIRCUIT, provenance={"images": {"digests": digests[:5]}})
    *_, last = Surgery(spec, found, tests={"concept": whole}).accuracy(Edit(UNITS))
    one = evaluate(spec, CIRCUIT, _only(whole, 5), draws=1).data
    assert last["before"]["concept"] == one["baseline"]["concept"]["agreement"]
    with pytest.raises(ImageError, match="all concept images were used"):
        list(Surgery(spec, _made_of(digests), tests={"concept": whole}).accuracy(Edit(UNITS)))


def _only(images, place: int):
    return open_images([list(images)[place].image])


def _made_of(digests: list[str]) -> Circuit:
    return replace(CIRCUIT, provenance={"images": {"digests": digests}})


def test_labels_make_it_accuracy(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture(i).save(tmp_path / name / f"{i}.png")
    plain = tiny()
    spec = wrap(plain.model, to_tensor, ("1", "3", "5"), ["cat", "dog", "ant", "bee"])
    *_, last = Surgery(spec, CIRCUIT, tests={"concept": open_images(tmp_path)}).accuracy(Edit(UNITS))
    with torch.no_grad():
        answers = spec.model(torch.stack([to_tensor(picture(i)) for i in (0, 1, 0, 1)])).argmax(1)
    right = (answers == torch.tensor([0, 0, 1, 1])).float().mean().item()
    assert (last["measure"], last["before"]["concept"]["value"]) == ("accuracy", right)


def test_an_edge_is_looked_into_as_connect_does(spec, surgery):
    found = surgery.connection(*EDGES[0])
    expected = connect(spec, CIRCUIT, open_images(CONCEPT), [EDGES[0]], n_images=16)
    assert found.kernels.tolist() == expected.kernels.tolist()
    assert found.contributions.tolist() == expected.contributions.tolist()
    probes = [surgery.probe(picture(seed), str(seed), "uploaded") for seed in range(2)]
    assert surgery.connection(*EDGES[0], probes).contributions.shape == (1, 2)


def test_weights_hold_the_edit(spec, surgery):
    edit = Edit(UNITS, (), "mean")
    other = tiny(seed=5)
    other.model.load_state_dict(load(surgery.weights(edit)))
    probe = surgery.probe(picture(), "noise", "uploaded")
    with torch.no_grad():
        assert torch.allclose(other.model(probe.image), nested(spec, edit, probe.image)[0], atol=1e-5)


def test_heat_lights_the_place_where_the_unit_is_active(surgery):
    half = Image.new("RGB", (24, 24), "black")
    half.paste(picture(3, (12, 24)), (12, 0))
    probe = surgery.probe(half, "half", "uploaded")
    with torch.no_grad():
        maps = surgery.model.model[:2](probe.image)[0]  # (unit, height, width)
    unit = next(i for i in range(6) if maps[i, :, 14:].mean() > 2 * maps[i, :, :10].mean())
    shown = torch.tensor(np.asarray(surgery.heat(probe, Unit("1", unit)).convert("L"))).float()
    assert shown[:, 14:].mean() > shown[:, :10].mean() + 20


MISTAKES = [
    (Edit((Unit("9", 0),)), "no layer '9' in the circuit"),
    (Edit((Unit("3", 8),)), "units 0 to 7"),
    (Edit((Unit("3", -1),)), "no unit 3:-1"),
    (Edit((), ((Unit("3", 0), Unit("1", 0)),)), "does not run later"),
    (Edit((), ((Unit("3", 0), Unit("3", 1)),)), "does not run later"),
    (Edit((Unit("3", 0),), (), "median"), "no ablation 'median'"),
]


@pytest.mark.parametrize(("edit", "says"), MISTAKES)
def test_mistakes_are_named_before_the_network_runs(surgery, edit, says):
    probe = surgery.probe(picture(), "noise", "uploaded")
    for ask in (lambda: surgery.operate(probe, edit), lambda: surgery.accuracy(edit), lambda: surgery.weights(edit)):
        with pytest.raises(ViscircuitsError, match=says):
            ask()
    assert count_hooks(surgery.model.model) == 0


def test_without_reference_images_zero_alone_is_offered(spec):
    surgery = Surgery(spec, CIRCUIT)
    assert surgery.ablations == ("zero",)
    with pytest.raises(ViscircuitsError, match="needs reference images"):
        surgery.check(Edit(UNITS, (), "mean"))
    with pytest.raises(ImageError, match="no images to measure accuracy on"):
        surgery.accuracy(Edit(UNITS))
    with pytest.raises(ImageError, match="no image to look at"):
        surgery.connection(*EDGES[0])


def test_what_weights_cannot_say_is_said(surgery):
    with pytest.raises(ViscircuitsError, match="weights cannot say that an edge is gone"):
        surgery.weights(Edit((), EDGES))
    with pytest.raises(ViscircuitsError, match="use zero or mean"):
        surgery.weights(Edit(UNITS, (), "noise"))


def test_another_network_or_one_without_a_transform_is_refused(spec):
    with pytest.raises(LayerError, match="9 in the circuit"):
        Surgery(spec, Circuit({"3": (0,)}, {"3": 9}))
    with pytest.raises(ModelError, match="transform"):
        Surgery(replace(spec, transform=None), CIRCUIT)


class Touchy(nn.Module):
    """Hands its input on, unless it was told to fail."""

    fails = False

    def forward(self, maps: Tensor) -> Tensor:
        if self.fails:
            raise KeyError("a fault of the network's own")
        return maps


def test_a_failure_inside_leaves_the_network_as_it_was(spec, surgery):
    net = spec.model
    net[6] = nn.Sequential(Touchy(), net[6])  # behind every layer of the circuit: hooks are in place when it fails
    probe = surgery.probe(picture(), "noise", "uploaded")
    edit = Edit(UNITS, EDGES, "mean")
    expected = surgery.operate(probe, edit)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    Touchy.fails = True
    try:
        for ask in (lambda: surgery.operate(probe, edit), lambda: list(surgery.accuracy(edit))):
            with pytest.raises(KeyError, match="own"):
                ask()
    finally:
        Touchy.fails = False
    assert count_hooks(net) == 0
    assert not any("forward" in vars(module) for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert surgery.operate(probe, edit).answers == expected.answers  # nobody waits for a lock that was not given back


def test_accuracy_lets_others_in_between_and_ends_when_nobody_asks_on(surgery):
    steps = surgery.accuracy(Edit(tuple(CIRCUIT), EDGES))
    next(steps), next(steps)
    asking = threading.Thread(target=surgery.probe, args=(picture(), "noise", "uploaded"))
    asking.start()
    asking.join(5)
    assert not asking.is_alive()
    steps.close()
    assert count_hooks(surgery.model.model) == 0


def test_threads_do_not_disturb_each_other(surgery):
    probes = [surgery.probe(picture(seed), str(seed), "uploaded") for seed in range(2)]
    edits = [Edit(UNITS[i % 3 :], EDGES[i % 4 :], list(ABLATIONS)[i % 4]) for i in range(6)]
    expected = [[surgery.operate(probe, edit).answers for probe in probes] for edit in edits]
    found: dict[int, list] = {}

    def ask(i: int) -> None:
        found[i] = [surgery.operate(probe, edits[i]).answers for probe in probes]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(edits))] == expected


def test_an_edit_comes_back_from_json():
    edit = Edit(UNITS, EDGES, "mean")
    assert Edit.from_json(edit.to_json()) == edit
    assert Edit.from_json({"units": [["1", 0], ["1", 0]], "edges": [], "ablation": "zero"}) == Edit((Unit("1", 0),))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"units": [], "edges": []},
        {"units": 3, "edges": [], "ablation": "zero"},
        {"units": [["1", True]], "edges": [], "ablation": "zero"},
        {"units": [["1", 0.5]], "edges": [], "ablation": "zero"},
        {"units": [[1, 1]], "edges": [], "ablation": "zero"},
        {"units": [["1"]], "edges": [], "ablation": "zero"},
        {"units": [], "edges": [[["1", 0]]], "ablation": "zero"},
        {"units": [], "edges": [["1", 0]], "ablation": "zero"},
    ],
)
def test_what_is_no_edit_is_refused_with_an_example(data):
    with pytest.raises(ViscircuitsError, match=r"\[layer, index\]"):
        Edit.from_json(data)


def test_what_is_uploaded_is_kept_small(surgery):
    probe = surgery.probe(picture(0, (400, 300)), "large", "uploaded")
    assert min(probe.picture.size) == 32  # the network takes 24 pixels, transforms crop from a little more
    assert torch.equal(probe.image[0], to_tensor(probe.picture))
