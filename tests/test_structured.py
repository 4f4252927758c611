"""The structured engine gives the plain loop's numbers, or says that it cannot."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from viscircuits import attribute, attribution
from viscircuits.errors import LayerError
from viscircuits.hooks import activations
from viscircuits.layers import Layer
from viscircuits.scores import loop, structured
from viscircuits.scores.formulas import SCORES, SUMMARIES

FEW = [("cla", "norm"), ("grad-x-act", "mean"), ("signed", "max")]
EVERY = [(score, summary) for score in SCORES for summary in SUMMARIES]


def seeded(model_of, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_of().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.data.normal_()
                    module.bias.data.normal_(std=0.2)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def recorded(model: nn.Module, images: Tensor, source: str, target: str) -> tuple:
    """Tensors and layers of a pair, as an engine wants them."""
    with torch.enable_grad():
        values = activations(model, [source, target], images)
    layers = [Layer(address, "", tuple(values[address].shape[1:]), 1) for address in (source, target)]
    return values[source], values[target], *layers


def assert_engines_agree(pair: tuple, kinds=FEW, n_checked: int | None = None, **options) -> None:
    """Scores and signed contributions of both engines, to 1e-4 of the largest; the loop may stop early."""
    for score, summary in kinds:
        n_targets = pair[3].n_units
        fast = whole(structured.blocks(*pair, SCORES[score], SUMMARIES[summary], **options), n_targets)
        n_slow = n_targets if n_checked is None else min(n_checked, n_targets)
        slow = first(loop.blocks(*pair, SCORES[score], SUMMARIES[summary]), n_slow)
        for got, expected in zip(fast, slow, strict=True):
            assert torch.isfinite(got).all()
            error = (got[:, :n_slow] - expected).abs().max() / expected.abs().max().clamp(min=1e-20)
            assert error < 1e-4, f"{score} of {summary}: {error:.1e}"


def whole(blocks, n_targets: int) -> tuple[Tensor, Tensor]:
    slices, values, contributions = zip(*blocks, strict=True)
    assert [i for each in slices for i in range(each.start, each.stop)] == list(range(n_targets))
    return torch.cat(values, 1), torch.cat(contributions, 1)


def first(blocks, n: int) -> tuple[Tensor, Tensor]:
    rows = [next(blocks) for _ in range(n)]
    return torch.cat([row[1] for row in rows], 1), torch.cat([row[2] for row in rows], 1)


def between(make, *, size: int = 9, channels: int = 6) -> tuple:
    """The pair that surrounds a piece: its input, and what it makes of it."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Identity(), make()))
    return recorded(net, noise(2, 3, size, size), "1", "2")


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x + super().forward(x))


class Concatenated(nn.Module):
    def __init__(self, *branches: nn.Module, dim: int = 1):
        super().__init__()
        self.branches, self.dim = nn.ModuleList(branches), dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], self.dim)


class Gated(nn.Sequential):
    """Squeeze and excite: a gate for each channel, made from their means."""

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x.mean((2, 3), keepdim=True)).sigmoid()


class SamePadded(nn.Conv2d):
    """TensorFlow's padding: one more row and column at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def then(*parts: nn.Module) -> nn.Sequential:
    """Some pieces and a convolution, so that no piece is the last."""
    return nn.Sequential(*parts, nn.Conv2d(6, 5, 1))


PIECES = {
    "conv": lambda: nn.Conv2d(6, 5, 3),
    "pointwise": lambda: nn.Conv2d(6, 5, 1),
    "chain": lambda: nn.Sequential(nn.Conv2d(6, 7, 3), nn.ReLU(True), nn.Conv2d(7, 5, 3), nn.ReLU(True)),
    "linear chain": lambda: nn.Sequential(nn.Conv2d(6, 7, 1), nn.Conv2d(7, 8, 1), nn.Conv2d(8, 5, 3)),
    "strided": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "strided, rest": lambda: nn.Conv2d(6, 5, 2, stride=3),
    "dilated": lambda: nn.Conv2d(6, 5, 3, dilation=2, padding=2),
    "rectangular": lambda: nn.Sequential(nn.Conv2d(6, 7, (1, 3), padding=(0, 1)), nn.Conv2d(7, 5, (3, 1), 2)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 6, 1, groups=3)),
    "depthwise": lambda: then(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()),
    "depthwise multiplied": lambda: nn.Conv2d(6, 12, 3, groups=6, stride=2),
    "depthwise last": lambda: nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, groups=4)),
    "batch norm": lambda: then(nn.BatchNorm2d(6)),
    "batch norm last": lambda: nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)),
    "plain batch norm": lambda: then(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)),
    "max pool": lambda: then(nn.Conv2d(6, 6, 3), nn.MaxPool2d(3, 2, ceil_mode=True)),
    "max pool last": lambda: nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)),
    "average pool": lambda: then(nn.Conv2d(6, 6, 3), nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)),
    "average pool last": lambda: nn.Sequential(nn.Conv2d(6, 5, 3), nn.AvgPool2d(2)),
    "global pool": lambda: then(nn.AdaptiveAvgPool2d(1)),
    "global mean": lambda: then(Function(lambda x: x.mean((-2, -1), keepdim=True))),
    "residual": lambda: Residual(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(True), nn.Conv2d(6, 6, 3, padding=1)),
    "residuals": lambda: nn.Sequential(Residual(nn.Conv2d(6, 6, 1)), Residual(nn.Conv2d(6, 6, 3, padding=1))),
    "weighted sum": lambda: then(Function(lambda x: torch.add(x, x.relu(), alpha=-0.5))),
    "concatenation": lambda: Concatenated(nn.Conv2d(6, 3, 1), nn.Conv2d(6, 2, 3, padding=1), nn.Identity()),
    "nested": lambda: then(
        Concatenated(nn.Conv2d(6, 2, 1), Concatenated(nn.MaxPool2d(3, 1, 1), nn.ReLU())), nn.Conv2d(14, 6, 1),
    ),
    "negative axis": lambda: Concatenated(nn.Conv2d(6, 3, 1), nn.ReLU(), dim=-3),
    "same padding": lambda: nn.Sequential(SamePadded(6, 6, 3, stride=2, groups=6), SamePadded(6, 5, 3)),
    "gate": lambda: then(Gated(nn.Conv2d(6, 2, 1), nn.SiLU(), nn.Conv2d(2, 6, 1))),
    "product": lambda: then(Function(lambda x: x * x.sigmoid())),
    "square": lambda: then(Function(lambda x: x * x)),
    "dense": lambda: Concatenated(
        nn.Identity(), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    ),
    "inverted bottleneck": lambda: nn.Sequential(
        nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8),
        nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(True),
    ),
    "dropout": lambda: then(nn.Dropout(), nn.Identity()),
}  # fmt: skip

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.ReLU6(True), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(True),
    nn.Hardswish(), nn.Hardswish(True), nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, True), nn.ELU(), nn.ELU(inplace=True),
    nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Mish(), nn.Softplus(),
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_gives_the_loops_numbers(piece):
    assert_engines_agree(between(PIECES[piece]))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_each_activation_gives_the_loops_numbers(activation):
    """In all three forms of a cotangent: one channel, a spread one, a dense one."""
    for before in ((), (nn.Conv2d(6, 6, 1),), (nn.Conv2d(6, 6, 3),)):
        parts = [*before, activation, nn.Conv2d(6, 5, 1)]
        assert_engines_agree(between(lambda parts=parts: nn.Sequential(*parts)), [("cla", "norm")])


@pytest.mark.parametrize("piece", ["depthwise last", "linear chain", "chain", "concatenation", "residual"])
def test_every_score_and_summary_in_every_form(piece):
    assert_engines_agree(between(PIECES[piece], size=6), EVERY)


@pytest.mark.parametrize("piece", ["chain", "concatenation", "inverted bottleneck", "residuals", "nested"])
def test_the_size_of_chunks_does_not_change_the_numbers(piece):
    pair = between(PIECES[piece])
    kind = (SCORES["cla"], SUMMARIES["norm"])
    n = pair[3].n_units
    at_once = whole(structured.blocks(*pair, *kind), n)
    for chunk_bytes in (1, 20_000):
        blocks = list(structured.blocks(*pair, *kind, chunk_bytes=chunk_bytes))
        assert len(blocks) > 1 or chunk_bytes > 1
        for got, expected in zip(whole(blocks, n), at_once, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_memory_is_measured_on_every_branch():
    """A chunk holds no more than it was allowed, although the first branch needs next to nothing."""
    pair = between(lambda: Concatenated(nn.Conv2d(6, 2, 1), nn.Conv2d(6, 30, 3, padding=1)))
    dense_row = 3 * 2 * 6 * 9 * 9 * 4  # (image, source, position) floats, with room for two more
    blocks = structured.blocks(*pair, SCORES["cla"], SUMMARIES["norm"], chunk_bytes=8 * dense_row)
    assert max(each[0].stop - each[0].start for each in blocks) <= 8


# ------------------------------------------------------------------ random architectures


@st.composite
def pieces(draw, width: int) -> tuple[nn.Module, int]:
    """A piece that takes `width` channels and keeps 5 by 5 maps or more, and how many it gives."""
    kind = draw(
        st.sampled_from(
            ["conv", "pointwise", "depthwise", "grouped", "norm", "act", "pool", "residual", "fire", "gate"]
        )
    )
    out = draw(st.sampled_from([2, 4, 6]))
    activation = draw(
        st.sampled_from([nn.ReLU(True), nn.ReLU6(), nn.SiLU(), nn.LeakyReLU(0.1), nn.Hardswish(), nn.GELU()])
    )
    kernel, dilation = draw(st.sampled_from([(3, 1), (3, 2), (5, 1)]))
    same = {"kernel_size": kernel, "dilation": dilation, "padding": dilation * (kernel - 1) // 2}
    made = {
        "conv": (lambda: nn.Conv2d(width, out, **same, bias=False), out),
        "pointwise": (lambda: nn.Conv2d(width, out, 1), out),
        "depthwise": (lambda: nn.Conv2d(width, width, **same, groups=width), width),
        "grouped": (lambda: nn.Conv2d(width, 2 * out, **same, groups=2), 2 * out),
        "norm": (lambda: nn.BatchNorm2d(width), width),
        "act": (lambda: activation, width),
        "pool": (lambda: draw(st.sampled_from([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)])), width),
        "residual": (lambda: Residual(nn.Conv2d(width, width, **same), activation), width),
        "fire": (lambda: Concatenated(nn.Conv2d(width, out, 1), nn.Conv2d(width, 2, **same)), out + 2),
        "gate": (lambda: Gated(nn.Conv2d(width, 2, 1), nn.ReLU(), nn.Conv2d(2, width, 1)), width),
    }  # fmt: skip
    make, given_width = made[kind]
    return make(), given_width


@st.composite
def networks(draw) -> list[nn.Module]:
    width, parts = 4, []
    for _ in range(draw(st.integers(1, 5))):
        part, width = draw(pieces(width))
        parts.append(part)
    return parts


@settings(max_examples=25)
@given(networks(), st.sampled_from(EVERY))
def test_random_architectures_give_the_loops_numbers(parts, kind):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Identity(), nn.Sequential(*parts)))
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(list(module.parameters())))
                module.reset_parameters()
    assert_engines_agree(recorded(net, noise(2, 3, 7, 7), "1", "2"), [kind])


# ------------------------------------------------------------------ networks people use


def torchvision(name: str, **options):
    return lambda: getattr(pytest.importorskip("torchvision.models"), name)(weights=None, **options)


def timm(name: str):
    return lambda: pytest.importorskip("timm").create_model(name)


def small_resnext() -> nn.Module:
    vision = pytest.importorskip("torchvision.models")
    return vision.ResNet(vision.resnet.Bottleneck, [2, 1, 1, 1], groups=32, width_per_group=4, num_classes=5)


NETWORKS = {
    "squeezenet": (torchvision("squeezenet1_1"), 48, [("features.3", "features.4"), ("features.4", "features.6")]),
    "resnet18": (torchvision("resnet18"), 48, [("layer1.0", "layer1.1"), ("layer1.1", "layer2.0")]),
    "resnext": (small_resnext, 48, [("layer1.0", "layer1.1")]),
    "googlenet": (
        torchvision("googlenet", init_weights=False, aux_logits=False), 48,
        [("inception3a", "inception3b"), ("inception3b", "inception4a")],
    ),
    "densenet": (
        torchvision("densenet121"), 32,
        [("features.denseblock1.denselayer1.relu2", "features.denseblock1.denselayer3.relu2"),
         ("features.denseblock1.denselayer6.relu2", "features.denseblock2.denselayer1.relu2")],
    ),
    "lite0, TF-same padding": (
        timm("tf_efficientnet_lite0"), 48, [("blocks.1.0.bn2", "blocks.1.1.bn2"), ("blocks.1.1.bn2", "blocks.2.0.bn2")],
    ),
    "efficientnet_b0, after the gates": (
        timm("efficientnet_b0"), 48,
        [("blocks.1.0.conv_pwl:in", "blocks.1.1.conv_pwl:in"), ("blocks.1.1.conv_pwl:in", "blocks.2.0.conv_pwl:in")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_known_networks_give_the_loops_numbers(name):
    make, size, pairs = NETWORKS[name]
    model, images = seeded(make), noise(1, 3, size, size)
    for source, target in pairs:
        assert_engines_agree(recorded(model, images, source, target), [("cla", "norm")], n_checked=5)


def test_targets_of_every_branch_of_an_inception_block_agree():
    model = seeded(NETWORKS["googlenet"][0])
    pair = recorded(model, noise(1, 3, 32, 32), "inception3a.branch2.0.bn", "inception3b.branch2")
    assert_engines_agree(pair, [("cla", "norm")], n_checked=3)
    source, target, *layers = recorded(model, noise(1, 3, 32, 32), "inception4a", "inception4b")
    kind = (SCORES["cla"], SUMMARIES["norm"])
    fast = whole(structured.blocks(source, target, *layers, *kind), layers[1].n_units)[0]
    for n in (0, 159, 160, 383, 384, 447, 448, 511):  # first and last of each branch: 160, 224, 64, 64
        (gradient,) = torch.autograd.grad(target[:, n].norm(), source, retain_graph=True)
        expected = source.detach().flatten(2).norm(dim=2) * gradient.flatten(2).norm(dim=2)
        torch.testing.assert_close(fast[:, n], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


# ------------------------------------------------------------------ what it does not know


UNKNOWN = {
    "instance norm": lambda: nn.InstanceNorm2d(6),
    "interpolation": lambda: nn.Upsample(scale_factor=2),
    "reflection": lambda: nn.ReflectionPad2d(1),
    "transposed": lambda: nn.ConvTranspose2d(6, 6, 2),
    "softmax": lambda: nn.Softmax2d(),
    "scaled": lambda: Function(lambda x: 2 * x),
    "height mean": lambda: Function(lambda x: x.mean(2, keepdim=True)),
    "broadcast": lambda: Function(lambda x: x + x.mean((2, 3), keepdim=True)),
    "rows joined": lambda: Concatenated(nn.Identity(), nn.ReLU(), dim=2),
    "split": lambda: Function(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "cropped": lambda: Function(lambda x: F.pad(x, (-1, -1, 0, 0))),
}


class Named(nn.Module):
    """A network whose layers `source` and `target` surround a piece."""

    def __init__(self, piece: nn.Module):
        super().__init__()
        self.source, self.piece, self.target = nn.Conv2d(3, 6, 1), piece, nn.Conv2d(6, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.target(self.piece(self.source(images))).mean((2, 3))


def attributed(model: nn.Module, **options):
    return attribute(model, noise(3, 3, 7, 7), ["source", "target"], **options)


@pytest.mark.parametrize("piece", UNKNOWN)
def test_an_unknown_operation_falls_back_to_the_loop_or_is_named(piece):
    model = seeded(lambda: Named(UNKNOWN[piece]()))
    plain, automatic = attributed(model, engine="loop"), attributed(model, engine="auto", batch_size=2)
    torch.testing.assert_close(automatic.matrices[0].values, plain.matrices[0].values)
    assert automatic.provenance["engines"] == ["loop"]
    with pytest.raises(LayerError, match=r"has no rule for .* between 'source' and 'target'; use engine 'auto'"):
        attributed(model, engine="structured")


def test_each_pair_names_the_engine_it_took(vit, conv_net, photographs):
    assert attributed(seeded(lambda: Named(nn.ReLU()))).provenance["engines"] == ["structured"]
    mixed = attribute(conv_net, photographs, ["1", "3", "5", "8"])
    assert mixed.provenance["engines"] == ["structured", "structured", "loop"]
    assert attribute(vit, photographs).provenance["engines"] == ["loop"]


def test_an_unknown_operation_in_a_late_branch_is_found_before_the_first_block(monkeypatch):
    """Else what was added up before it was met would be counted twice."""
    model = seeded(lambda: Named(nn.Identity()))
    model.target = Concatenated(nn.Conv2d(6, 21, 1), nn.Sequential(nn.Conv2d(6, 1, 1), nn.InstanceNorm2d(1)))
    plain = attributed(model, engine="loop")
    one_by_one = partial(structured.blocks, chunk_bytes=1)
    monkeypatch.setitem(attribution.ENGINE_BLOCKS, "structured", one_by_one)
    automatic = attributed(model)
    assert automatic.provenance["engines"] == ["loop"]
    torch.testing.assert_close(automatic.matrices[0].values, plain.matrices[0].values)


class Changing(Named):
    """Small batches go through an operation that only the loop knows."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.source(images)
        x = 2 * x if len(images) == 1 else x + x
        return self.target(x).mean((2, 3))


def test_a_network_that_changes_its_way_between_batches_loses_no_image():
    model = seeded(lambda: Changing(nn.Identity()))
    plain = attributed(model, engine="loop", batch_size=2)
    torch.testing.assert_close(attributed(model, batch_size=2).matrices[0].values, plain.matrices[0].values)


def test_training_mode_batch_norm_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6).train(), nn.Conv2d(6, 5, 1))
    with pytest.raises(structured.Unsupported, match="batch norm in training mode"):
        assert_engines_agree(recorded(net, noise(2, 3, 7, 7), "0", "2"))


def test_the_graph_survives_for_the_loop(conv_net, photographs):
    pair = recorded(conv_net, photographs, "1", "5")
    kind = (SCORES["cla"], SUMMARIES["norm"])
    before = whole(loop.blocks(*pair, *kind), 5)
    whole(structured.blocks(*pair, *kind), 5)
    for got, expected in zip(whole(loop.blocks(*pair, *kind), 5), before, strict=True):
        assert torch.equal(got, expected)
