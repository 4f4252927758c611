"""Attribution anchored at the answers, on networks whose answer is known beforehand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.methods import find
from viscircuits.methods.anchored import PATHS
from viscircuits.methods.patching import eap_ig
from viscircuits.methods.removing import Answers
from viscircuits.task import make_task


class Linear(nn.Module):
    """Vectors as images: units are entries, the head reads them by hand-written weights."""

    def __init__(self, head, cap=None):
        super().__init__()
        self.units = nn.Identity()
        self.head = nn.Linear(len(head[0]), len(head), bias=False)
        self.head.weight.data = torch.tensor(head)
        self.cap = cap

    def forward(self, images):
        read = self.head(self.units(images.flatten(1)))
        return read if self.cap is None else read.clamp(max=self.cap)


def vectors(*rows):
    return torch.tensor(rows)[:, :, None, None]


def test_what_either_of_two_copies_does_is_found_in_both():
    # T = min(a + b, 1) with a = b = 1: removing one changes nothing, on the way from 0 either would
    model = Linear([[1.0, 1.0, 0.0]], cap=1.0)
    task = make_task(model, ["units"], vectors([1.0, 1.0, 1.0]), vectors([0.0, 0.0, 0.0]))
    one_by_one = find(task, "exact").units["units"]
    along = find(task, "anchored", steps=8).units["units"]
    assert one_by_one.tolist() == [0, 0, 0]
    # half of each way lies below the cap: images, this layer (the only one), all layers (a tenth)
    assert along.tolist() == pytest.approx([1.05, 1.05, 0])


def test_without_protection_it_is_the_sum_of_the_sizes_along_three_paths():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(4, 3)).eval()  # fmt: skip
    task = make_task(model, ["1", "3"], torch.randn(3, 3, 8, 8), torch.randn(4, 3, 8, 8))
    ours = find(task, "anchored", steps=3)
    paths = [(weight, eap_ig(task, path=path, steps=3)) for path, weight in PATHS.items()]
    assert torch.allclose(ours.units["1"], sum(weight * each.units["1"] for weight, each in paths))
    steps = [(at + 0.5) / 3 for at in range(3)]
    alone = torch.stack([effects_at(task, image, at) for image in task.concept for at in steps])
    of_images = alone.unflatten(0, (len(task.concept), 3)).mean(1).abs().mean(0)
    assert (alone.abs().mean(0) > of_images + 1e-4).any()  # points of one image differ in sign too
    by_images = (alone.mean(0).abs() + alone.abs().mean(0)) / 2
    others = sum(weight * each.edges["1", "3"] for weight, each in paths[1:])
    assert torch.allclose(paths[0][1].edges["1", "3"], alone.mean(0).abs(), atol=1e-7)
    assert torch.allclose(ours.edges["1", "3"], by_images + others, atol=1e-7)
    assert ours.passes.backward == sum(each.passes.backward for _, each in paths)


def effects_at(task, image, at):
    """Edges' first-order effects on one image, at one point between it and the mean reference image, by autograd."""
    before, after = task.spec.model[:2], task.spec.model[2:4]
    start = task.reference.mean(0)
    whole = before(image[None]) - task.statistics.mean["1"][:, None, None]
    source = before((start + at * (image - start))[None]).detach().requires_grad_()
    target = after(source)
    label = task.concept_labels[(task.concept == image).flatten(1).all(1).nonzero().item()]
    (slope,) = torch.autograd.grad(task.spec.model[4:](target)[0, label], target, retain_graph=True)
    rows = [torch.autograd.grad((target * slope)[0, n].sum(), source, retain_graph=True)[0] for n in range(4)]
    return torch.stack([(row * whole).sum((0, 2, 3)) for row in rows]).detach().double()


def test_an_edge_that_helps_one_image_and_hurts_another_counts_half_of_its_sizes():
    # T = c · b with b = a: on (a, c) = (1, 1) it raises T by 1, on (1, −1) it lowers it by as much
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
            self.first.weight.data = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
            self.second.weight.data.fill_(1)

        def forward(self, images):
            b = self.second(self.first(images))[:, :, 0, 0]
            return torch.cat([b * images[:, 1:, 0, 0], torch.zeros_like(b)], 1)

    labels = {"concept_labels": torch.tensor([0, 0]), "reference_labels": torch.tensor([0])}
    task = make_task(Signed(), ["first", "second"], vectors([1.0, 1.0], [1.0, -1.0]), vectors([0.0, 0.0]), **labels)
    found = find(task, "anchored", steps=2)
    # along the images c goes from 0 to ±1 too: at the middles of its halves the gradient is ¼ and ¾ of it
    assert found.edges["first", "second"].tolist() == [[pytest.approx(0.25)]]
    assert found.units["first"].tolist() == [pytest.approx(0)]


def test_without_images_of_one_size_the_path_of_images_is_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    task = make_task(model, ["1"], torch.randn(3, 3, 8, 8), torch.randn(4, 3, 6, 6))
    layer, every = (eap_ig(task, path=path, steps=2).units["1"] for path in ("activations", "all"))
    assert torch.allclose(find(task, "anchored", steps=2).units["1"], layer + 0.1 * every)


# Outputs: concept, other. Units: the concept's alone, read by both, the other's alone, read by none.
HEAD = [[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0]]


def removal_task(seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = lambda n: 0.1 * torch.rand(n, 4, 1, 1, generator=generator)  # noqa: E731
    concept = torch.tensor([1.0, 1.0, 0.0, 1.0])[None, :, None, None] + noise(12)
    reference = torch.tensor([0.0, 1.0, 1.0, 1.0])[None, :, None, None] + noise(16)
    return make_task(Linear(HEAD), ["units"], concept, reference, seed=seed)


def test_what_only_the_concept_needs_is_removed_first_and_what_others_need_last():
    ranks = find(removal_task(), "anchored", protect=1.0, sizes=(0.25,)).units["units"]
    assert ranks.argmax() == 0
    assert ranks.argmin() == 2


def test_the_circuit_of_a_size_is_what_was_removed_at_that_size():
    finding = find(removal_task(), "anchored", protect=1.0, sizes=(0.25, 0.5))
    sooner = finding.units["units"].floor()
    assert sorted(sooner.tolist()) == [0, 0, 1, 2]  # one unit at the first size, another at the second
    assert finding.circuit(0.25).units["units"] == (int(sooner.argmax()),)
    assert set(finding.circuit(0.5).units["units"]) == set(torch.nonzero(sooner).flatten().tolist())


def test_a_seed_says_which_images_are_drawn():
    task = removal_task()
    few = {"protect": 1.0, "sizes": (0.5,), "images_a_step": (2, 2), "steps_a_size": 2}
    once, again = (find(task, "anchored", **few).units["units"] for _ in range(2))
    assert torch.equal(once, again)


def test_the_concepts_answers_are_those_it_raises_and_those_of_its_images():
    reference = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 3.0]])  # spread 0, 0, √2, √2
    reference[:, :2] += torch.tensor([[0.0], [1.0]])  # spread √½
    concept = torch.tensor([[4.0, 3.0, 1.0, 0.0]])  # raised by 3.5, 2.5, 0, −2 over √½, √½, √2, √2
    answers = Answers.of(concept, reference, torch.tensor([2]), torch.tensor([3, 3]))
    raised = torch.tensor([3.5 / 0.5**0.5 - 1, 2.5 / 0.5**0.5 - 1, 0.1, 0.0])
    assert torch.allclose(answers.weights, raised / raised.sum())


def test_margins_of_a_whole_answer_are_halves_of_the_anchor():
    answers = Answers(torch.tensor([1.0, 0.0]), scale=2.0)
    even, ahead = torch.tensor([[3.0, 3.0]]), torch.tensor([[5.0, 3.0]])
    own = torch.tensor([0])
    assert answers.of_concept(even, own).tolist() == [0.5]
    assert answers.of_concept(ahead, own).item() == pytest.approx(1 / (1 + torch.e**-1))
    assert answers.of_reference(ahead, own).item() == pytest.approx(1 / (1 + torch.e**-1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"protect": -1.0}, "0 or more"),
        ({"protect": float("nan")}, "0 or more"),
        ({"protect": float("inf")}, "0 or more"),
        ({"protect": 1.0, "caution": -1.0}, "0 or more"),
        ({"protect": 1.0, "sizes": (0.2, 0.1)}, "rising"),
        ({"protect": 1.0, "sizes": ()}, "rising"),
        ({"protect": 1.0, "sizes": (0.5, 1.5)}, "rising"),
        ({"protect": 1.0, "steps_a_size": 0}, "1 step"),
        ({"protect": 1.0, "images_a_step": (0, 4)}, "1 image"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, reason):
    task = removal_task()
    with pytest.raises(ViscircuitsError, match=reason):
        find(task, "anchored", **options)
    assert count_hooks(task.spec.model) == 0


def test_a_network_with_one_output_has_nothing_to_protect():
    task = make_task(Linear([[1.0, 2.0]]), ["units"], vectors([1.0, 1.0]), vectors([0.0, 0.0], [0.0, 1.0]))
    with pytest.raises(ViscircuitsError, match="nothing to protect"):
        find(task, "anchored", protect=1.0)


def test_a_way_to_judge_answers_is_checked_even_where_nothing_is_protected():
    task = make_task(Linear([[1.0, 1.0, 0.0]]), ["units"], vectors([1.0, 1.0, 1.0]), vectors([0.0, 0.0, 0.0]))
    for protect in (0.0, 1.0):
        with pytest.raises(ViscircuitsError, match="typo"):
            find(task, "anchored", protect=protect, answers="typo")


def test_a_concept_that_every_output_answers_leaves_nothing_to_protect():
    task = removal_task()
    both = replace(task, concept_labels=torch.arange(len(task.concept)) % 2)
    with pytest.raises(ViscircuitsError, match="every one of the network's 2 outputs"):
        find(both, "anchored", protect=1.0)


def test_one_reference_image_has_no_spread():
    task = make_task(Linear(HEAD), ["units"], torch.rand(3, 4, 1, 1), torch.rand(1, 4, 1, 1))
    with pytest.raises(ViscircuitsError, match="2 or more"):
        find(task, "anchored", protect=1.0)


def test_what_is_run_once_to_be_replayed_is_counted():
    passes = find(
        removal_task(), "anchored", protect=1.0, sizes=(0.5,), steps_a_size=3, images_a_step=(2, 4), edges=False
    ).passes
    assert passes.backward == 3 * 6
    assert passes.forward == 2 * 28 + 3 * 6  # kept for replay, looked at once, and the steps
