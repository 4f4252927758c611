"""What no intervention reaches is run once, and replayed bit for bit."""

import pytest
import torch
from torch import nn

from viscircuits.hooks import count_hooks, rewrite
from viscircuits.prefix import Prefix


class Skipping(nn.Module):
    """Three convolutions; the first's output is read again after the layer of interest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        early = self.stem(images)
        late = self.late(torch.relu(self.middle(early)))
        return self.head((late + early).mean((2, 3)))


class Chain(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.same, self.late = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3)

    def forward(self, images):
        return self.late(self.same(torch.relu(self.same(images)))).mean((2, 3))


class Writing(nn.Module):
    """Writes into what only a replayed module reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.late = (nn.Conv2d(3, 3, 3) for _ in range(3))

    def forward(self, images):
        return self.late(self.second(torch.relu_(self.first(images)))).mean((2, 3))


IMAGES = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "layer"), [(Skipping, "late"), (Chain, "5"), (Chain, "4:in"), (Twice, "late"), (Writing, "late")]
)
def test_replaying_gives_the_networks_outputs_bit_for_bit(make, layer):
    model = make().eval()
    prefix = Prefix(model, [layer], IMAGES, batch_size=3)
    with torch.no_grad():
        whole = model(IMAGES[3:])
        with prefix.replay([3, 4, 5]) as images:
            assert torch.equal(model(images), whole)


def test_what_comes_before_the_layer_does_not_run_again_and_what_comes_after_does():
    model, runs = Chain().eval(), []
    prefix = Prefix(model, ["5"], IMAGES)
    for name, module in model.named_children():  # an instance's own forward, so that calls can be counted
        module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    inner = []
    original = nn.Conv2d._conv_forward
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.Conv2d, "_conv_forward", lambda self, *a: inner.append(self) or original(self, *a))
        with prefix.replay([0]) as images:
            model(images)
    assert inner == []  # all three convolutions come before the layer
    assert runs == [name for name, _ in model.named_children()]


def test_only_what_is_read_is_kept_for_every_image():
    assert set(Prefix(Chain().eval(), ["5"], IMAGES).unread) == {"0", "1", "2", "3"}
    skipping = Prefix(Skipping().eval(), ["late"], IMAGES)
    assert skipping.unread == frozenset()  # the stem is read again after the layer
    assert len(skipping.kept["stem"]) == len(IMAGES)


def test_a_module_that_runs_twice_is_not_replayed():
    assert Prefix(Twice().eval(), ["late"], IMAGES).names == ()


def test_interventions_inside_see_the_replayed_values():
    model = Chain().eval()
    prefix = Prefix(model, ["3"], IMAGES)
    with torch.no_grad(), rewrite(model, {"3": torch.zeros_like}):
        whole = model(IMAGES)
        with prefix.replay(range(6)) as images:
            assert torch.equal(model(images), whole)


def test_afterwards_the_network_runs_as_before_also_after_an_exception():
    model = Chain().train()
    with pytest.raises(RuntimeError, match="no reason"), Prefix(model, ["5"], IMAGES).replay([0]):
        raise RuntimeError("no reason")
    assert not any("forward" in vars(module) for module in model.modules())
    assert count_hooks(model) == 0
    assert model.training


def test_a_forward_of_ones_own_comes_back():
    model = Chain().eval()
    own = model[0].forward
    model[0].forward = lambda images: 2 * own(images)
    with torch.no_grad():
        whole = model(IMAGES)
        with Prefix(model, ["5"], IMAGES).replay(range(6)) as images:
            assert torch.equal(model(images), whole)
        assert torch.equal(model(IMAGES), whole)
