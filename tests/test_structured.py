"""The structured engine gives the plain loop's numbers, whatever lies between two layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from viscircuits import attribute
from viscircuits.families import FAMILIES
from viscircuits.hooks import activations, evaluating
from viscircuits.layers import Layer
from viscircuits.models import load_model
from viscircuits.scores import loop, structured
from viscircuits.scores.formulas import SCORES, SUMMARIES
from viscircuits.scores.structured import winograd
from viscircuits.tracing import resolve, trace

FEW = [("cla", "norm"), ("grad-x-act", "mean"), ("signed", "max")]
EVERY = [(score, summary) for score in SCORES for summary in SUMMARIES]


def seeded(model_of, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_of().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
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


def assert_engines_agree(
    pair: tuple, kinds=FEW, rows: Tensor | None = None, bound: float = 1e-4, **options
) -> set[str]:
    """Scores and signed contributions of both engines, to 1e-4 of the largest; returns what was left to autograd."""
    left: set[str] = set()
    for score, summary in kinds:
        kind = (SCORES[score], SUMMARIES[summary], rows)
        fast = together(structured.blocks(*pair, *kind, left=left, **options))
        slow = together(loop.blocks(*pair, *kind))
        assert torch.equal(fast[0], slow[0])
        for got, expected in zip(fast[1:], slow[1:], strict=True):
            assert torch.isfinite(got).all()
            error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-20)
            assert error < bound, f"{score} of {summary}: {error:.1e}"
    return left


def together(blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, scores and contributions of all blocks."""
    rows, values, contributions = zip(*blocks, strict=True)
    return torch.cat(rows), torch.cat(values, 1), torch.cat(contributions, 1)


def whole(blocks, n_targets: int) -> tuple[Tensor, Tensor]:
    rows, values, contributions = zip(*blocks, strict=True)
    assert torch.cat(rows).tolist() == list(range(n_targets))
    return torch.cat(values, 1), torch.cat(contributions, 1)


def between(make, *, size: int = 9, channels: int = 6) -> tuple:
    """The pair that surrounds a piece: its input, and what it makes of it."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Identity(), make()))
    return recorded(net, noise(2, 3, size, size), "1", "2")


def between_tokens(make, n_images: int = 2) -> tuple:
    """The pair that surrounds a piece which takes ten tokens of six units."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 6), nn.Identity(), make()))
    source, target, *layers = recorded(net, noise(n_images, 10, 3), "1", "2")
    return source, target, *(replace(layer, unit_axis=2) for layer in layers)


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
    "scaled": lambda: then(Function(lambda x: 2 * x)),
    "height mean": lambda: then(Function(lambda x: x.mean(2, keepdim=True))),
    "rows joined": lambda: then(Concatenated(nn.Identity(), nn.ReLU(), dim=2)),
    "split": lambda: then(Function(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))),
    "part of a split": lambda: nn.Sequential(Function(lambda x: x.split([2, 3, 1], 1)[1]), nn.Conv2d(3, 5, 1)),
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
    assert assert_engines_agree(between(PIECES[piece])) == set()  # nothing was left to autograd


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
    assert max(len(each[0]) for each in blocks) <= 8


# ------------------------------------------------------------------ pieces of transformers


class Lambda(Function):
    """A function of the tokens (image, token, unit)."""


class Attending(nn.Module):
    """Self-attention written with the fused operation, or out of products and a softmax."""

    def __init__(self, width: int, n_heads: int, fused: bool = True, **options):
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_heads, self.fused, self.options = n_heads, fused, options

    def forward(self, x: Tensor) -> Tensor:
        n_images, n_tokens, width = x.shape
        parts = self.mix(x).reshape(n_images, n_tokens, 3, self.n_heads, width // self.n_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            made = F.scaled_dot_product_attention(q, k, v, **self.options)
        else:
            made = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(made.transpose(1, 2).reshape(x.shape))


class SelfAttention(nn.MultiheadAttention):
    """torch's own module."""

    def __init__(self, width: int, n_heads: int, **options):
        super().__init__(width, n_heads, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, **self.options)[0]


class Sum(nn.Sequential):
    """A residual block without what follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Rotated(nn.Module):
    """What rotary position embeddings do: even and odd numbers change places."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


# ------------------------------------------------------------------ random architectures


class OnTokens(nn.Module):
    """Apply to maps what takes tokens."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


KINDS = [
    "conv", "pointwise", "depthwise", "grouped", "strided", "norm", "act", "pool", "adaptive", "residual", "fire",
    "gate", "product", "attention",
]  # fmt: skip


def norms(width: int) -> list[nn.Module]:
    """Of each kind; beside the identity, because what a norm has made alone may have no gradient."""
    others = (nn.GroupNorm(2, width), nn.InstanceNorm2d(width), OnTokens(nn.LayerNorm(width)))
    return [nn.BatchNorm2d(width), *(Sum(other) for other in others)]


def pools(width: int) -> list[nn.Module]:
    """Of each kind; roots of sums of squares are taken of what is not zero."""
    lp = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReplicationPad2d(1), nn.LPPool2d(2, 3, 1))
    return [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 2, 1), lp]


@st.composite
def pieces(draw, width: int) -> tuple[nn.Module, int]:
    """A piece that takes `width` channels, and how many it gives."""
    kind, out = draw(st.sampled_from(KINDS)), draw(st.sampled_from([2, 4, 6]))
    activation = draw(
        st.sampled_from([nn.ReLU(True), nn.ReLU6(), nn.SiLU(), nn.LeakyReLU(0.1), nn.Hardswish(), nn.GELU()])
    )
    kernel, dilation = draw(st.sampled_from([(3, 1), (3, 2), (5, 1)]))
    same = {"kernel_size": kernel, "dilation": dilation, "padding": dilation * (kernel - 1) // 2}
    adaptive = [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3)]
    made = {
        "conv": (lambda: nn.Conv2d(width, out, **same, bias=False), out),
        "pointwise": (lambda: nn.Conv2d(width, out, 1, stride=draw(st.sampled_from([1, 2]))), out),
        "depthwise": (lambda: nn.Conv2d(width, width, **same, groups=width), width),
        "grouped": (lambda: nn.Conv2d(width, 2 * out, **same, groups=2), 2 * out),
        "strided": (lambda: nn.Conv2d(width, out, **same, stride=2), out),
        "norm": (lambda: draw(st.sampled_from(norms(width))), width),
        "act": (lambda: activation, width),
        "pool": (lambda: draw(st.sampled_from(pools(width))), width),
        "adaptive": (lambda: draw(st.sampled_from(adaptive)), width),
        "residual": (lambda: Residual(nn.Conv2d(width, width, **same), activation), width),
        "fire": (lambda: Concatenated(nn.Conv2d(width, out, 1), nn.Conv2d(width, 2, **same)), out + 2),
        "gate": (lambda: Gated(nn.Conv2d(width, 2, 1), nn.ReLU(), nn.Conv2d(2, width, 1)), width),
        "product": (lambda: Multiplied(nn.Conv2d(width, width, **same)), width),
        "attention": (lambda: OnTokens(Sum(nn.LayerNorm(width), attention_of(width, draw(st.booleans())))), width),
    }  # fmt: skip
    make, given_width = made[kind]
    return make(), given_width


def attention_of(width: int, fused: bool) -> nn.Module:
    return Attending(width, 2) if fused else SelfAttention(width, 2, need_weights=True)


class Multiplied(nn.Sequential):
    """A value times what is made of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)


@st.composite
def networks(draw) -> list[nn.Module]:
    width, parts = 4, []
    for _ in range(draw(st.integers(1, 5))):
        part, width = draw(pieces(width))
        parts.append(part)
    return parts


@st.composite
def transformers(draw) -> list[nn.Module]:
    """Parts that take six units and give six, and a last layer."""
    kinds = {
        "attention": lambda: Sum(nn.LayerNorm(6), Attending(6, 3, fused=draw(st.booleans())), Scale(6)),
        "torch's attention": lambda: Sum(nn.LayerNorm(6), SelfAttention(6, 2, need_weights=draw(st.booleans()))),
        "units": lambda: Sum(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)),
        "norm": lambda: Sum(nn.LayerNorm(6)),
        "gate": lambda: Lambda(lambda x: x * x.mean(1, keepdim=True).sigmoid()),
    }
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4))
    return [*(kinds[name]() for name in names), *draw(st.sampled_from([[], [nn.LayerNorm(6)]])), nn.Linear(6, 5)]


def reset(net: nn.Module) -> nn.Module:
    """The same weights whenever hypothesis draws the same network."""
    for module in net.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(len(list(module.parameters())))
                    getattr(module, name)()
    for module in net.modules():
        if isinstance(module, Scale):
            module.scale.data = torch.linspace(0.5, 1.5, len(module.scale))
    return net


@settings(max_examples=30)
@given(networks(), st.sampled_from(EVERY))
def test_random_architectures_give_the_loops_numbers(parts, kind):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Identity(), nn.Sequential(*parts)))
    assert_engines_agree(recorded(reset(net), noise(2, 3, 7, 7), "1", "2"), [kind])


@settings(max_examples=20)
@given(transformers(), st.sampled_from(EVERY), st.integers(1, 3))
def test_random_transformers_give_the_loops_numbers(parts, kind, n_images):
    assert_engines_agree(between_tokens(lambda: reset(nn.Sequential(*parts)), n_images), [kind])


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
        assert_engines_agree(recorded(model, images, source, target), [("cla", "norm")], torch.arange(5))


def pair_of_default_layers(address: str) -> tuple:
    """Two adjacent default layers in the middle of a network with random weights."""
    pytest.importorskip(address.split(":")[0])
    spec = load_model(address, weights="none")
    images = noise(1, 3, *spec.input_size)
    with evaluating(spec.model), torch.enable_grad():
        layers = resolve(spec.model, trace(spec.model, images), spec.layers)
        source, target = layers[len(layers) // 2 - 1 :][:2]
        values = activations(spec.model, [source.address, target.address], images)
    return values[source.address], values[target.address], source, target


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_gives_the_loops_numbers(family):
    pair = pair_of_default_layers(family.example)
    rows = torch.tensor([0, pair[3].n_units // 2, pair[3].n_units - 1])
    assert_engines_agree(pair, [("cla", "norm")], rows)


def test_targets_of_every_branch_of_an_inception_block_agree():
    model = seeded(NETWORKS["googlenet"][0])
    pair = recorded(model, noise(1, 3, 32, 32), "inception3a.branch2.0.bn", "inception3b.branch2")
    assert_engines_agree(pair, [("cla", "norm")], torch.arange(3))
    source, target, *layers = recorded(model, noise(1, 3, 32, 32), "inception4a", "inception4b")
    kind = (SCORES["cla"], SUMMARIES["norm"])
    fast = whole(structured.blocks(source, target, *layers, *kind), layers[1].n_units)[0]
    for n in (0, 159, 160, 383, 384, 447, 448, 511):  # first and last of each branch: 160, 224, 64, 64
        (gradient,) = torch.autograd.grad(target[:, n].norm(), source, retain_graph=True)
        expected = source.detach().flatten(2).norm(dim=2) * gradient.flatten(2).norm(dim=2)
        torch.testing.assert_close(fast[:, n], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


# ------------------------------------------------------------------ tokens


def block(attention: nn.Module) -> nn.Module:
    """What lies between the MLP units of two blocks of a vision transformer."""
    return nn.Sequential(nn.Linear(6, 8), Sum(nn.LayerNorm(8), attention), nn.LayerNorm(8), nn.Linear(8, 7), nn.GELU())


def gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return gate.sigmoid() * value


TOKENS = {
    "linear": lambda: nn.Linear(6, 5),
    "linears": lambda: nn.Sequential(nn.Linear(6, 7, bias=False), nn.GELU(), nn.Linear(7, 5)),
    "linear chain": lambda: nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 5)),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)),
    "layer norm last": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)),
    "plain layer norm": lambda: nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.ReLU(), nn.Linear(6, 5)),
    "layer norm of the sum": lambda: nn.Sequential(Sum(nn.Linear(6, 6), nn.ReLU()), nn.LayerNorm(6), nn.Linear(6, 5)),
    "norm over two axes": lambda: nn.Sequential(nn.LayerNorm((10, 6)), nn.Linear(6, 5)),
    "layer scale": lambda: nn.Sequential(
        Sum(nn.LayerNorm(6), nn.Linear(6, 6), Scale(6)), nn.LayerNorm(6), nn.Linear(6, 5),
    ),
    "scaled factors": lambda: nn.Sequential(nn.Linear(6, 6), Scale(6), nn.LayerNorm(6), Scale(6), nn.Linear(6, 5)),
    "minus": lambda: nn.Sequential(Lambda(lambda x: x.relu() - 0.5 * x), nn.LayerNorm(6), nn.Linear(6, 5)),
    "block": lambda: block(Attending(8, 2)),
    "block, two halves": lambda: nn.Sequential(block(Attending(8, 2)), nn.Linear(7, 6), block(Attending(8, 4))),
    "block in products": lambda: block(Attending(8, 2, fused=False)),
    "causal block": lambda: block(Attending(8, 2, is_causal=True)),
    "masked block": lambda: block(Attending(8, 2, attn_mask=torch.tril(torch.ones(10, 10)).bool())),
    "weighed block": lambda: block(Attending(8, 2, attn_mask=torch.arange(100.0).reshape(10, 10).cos(), scale=0.3)),
    "attention alone": lambda: Attending(6, 3),
    "torch's attention": lambda: block(SelfAttention(8, 2, need_weights=False)),
    "torch's attention, weights": lambda: block(SelfAttention(8, 2, need_weights=True)),
    "post-norm": lambda: nn.Sequential(Sum(Attending(6, 2)), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU()),
    "gated": lambda: nn.Sequential(nn.Linear(6, 10), Lambda(gated)),
    "rotated": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), Rotated(), nn.Linear(6, 5)),
    "class token": lambda: nn.Sequential(
        Lambda(lambda x: torch.cat([x.mean(1, keepdim=True), x], 1)), nn.LayerNorm(6), nn.Linear(6, 5)
    ),
    "first token": lambda: nn.Sequential(Attending(6, 2), Lambda(lambda x: x[:, :1]), nn.Linear(6, 5)),
    "mean of tokens": lambda: nn.Sequential(Lambda(lambda x: x.mean(1, keepdim=True)), nn.Linear(6, 5)),
    "tokens mixed": lambda: nn.Sequential(Lambda(lambda x: x.mT), nn.Linear(10, 10), Lambda(lambda x: x.mT)),
    "maps": lambda: nn.Sequential(
        Lambda(lambda x: x.transpose(1, 2).reshape(-1, 6, 2, 5)), nn.Conv2d(6, 6, 3, padding=1, groups=6),
        Lambda(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(6), nn.Linear(6, 4), Lambda(lambda x: x.flatten(1, 2)),
    ),
    "windows": lambda: nn.Sequential(
        nn.LayerNorm(6), Lambda(lambda x: F.pad(x, (0, 0, 0, 2)).reshape(-1, 4, 6)), Attending(6, 2),
        Lambda(lambda x: x.reshape(-1, 12, 6)[:, :10]), nn.LayerNorm(6), nn.Linear(6, 5),
    ),
    "rolled": lambda: nn.Sequential(Lambda(lambda x: x.roll(3, 1)), nn.LayerNorm(6), nn.Linear(6, 5)),
    "repeated": lambda: nn.Sequential(
        Lambda(lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1).flatten(1, 2)), nn.Linear(6, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("n_images", [1, 3])
@pytest.mark.parametrize("piece", TOKENS)
def test_each_piece_of_a_transformer_gives_the_loops_numbers(piece, n_images):
    assert_engines_agree(between_tokens(TOKENS[piece], n_images))


@pytest.mark.parametrize("piece", ["block", "block in products", "torch's attention", "layer norm last", "windows"])
def test_every_score_and_summary_of_tokens(piece):
    assert_engines_agree(between_tokens(TOKENS[piece]), EVERY)


KNOWN_TOKENS = set(TOKENS) - {"norm over two axes", "rolled", "minus"}


@pytest.mark.parametrize("piece", sorted(KNOWN_TOKENS))
def test_no_piece_of_a_transformer_is_left_to_autograd(piece):
    assert assert_engines_agree(between_tokens(TOKENS[piece]), [("cla", "norm")]) == set()


# ------------------------------------------------------------------ rows, precision


ANY_PIECE = {
    **{f"maps: {name}": (between, PIECES[name]) for name in ("chain", "residual", "concatenation", "depthwise")},
    **{f"tokens: {name}": (between_tokens, TOKENS[name]) for name in ("linears", "block", "torch's attention")},
}


@pytest.mark.parametrize("rows", [[0], [4, 1], [0, 2, 4]], ids=str)
@pytest.mark.parametrize("piece", ANY_PIECE)
def test_only_the_rows_asked_for_are_computed(piece, rows):
    around, make = ANY_PIECE[piece]
    pair = around(make)
    for chunk_bytes in (1, 2**20):
        assert_engines_agree(pair, [("cla", "norm")], torch.tensor(rows), chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("piece", ANY_PIECE)
def test_bfloat16_gives_the_loops_numbers_to_its_precision(piece):
    around, make = ANY_PIECE[piece]
    assert_engines_agree(around(make), [("cla", "norm")], bound=3e-2, dtype=torch.bfloat16)


# ------------------------------------------------------------------ what it does not know


class Doubled(torch.autograd.Function):
    """An operation that nobody has a rule for."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0].abs()


class Halves(torch.autograd.Function):
    """An operation with two outputs that nobody has a rule for."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return first * x.cos() - second * x.sin()


UNKNOWN = {
    "instance norm": (lambda: Sum(nn.InstanceNorm2d(6)), "NativeBatchNormBackward0"),
    "group norm": (lambda: nn.GroupNorm(2, 6), "NativeGroupNormBackward0"),
    "interpolation": (lambda: nn.Upsample(scale_factor=2), "UpsampleNearest2DBackward0"),
    "reflection": (lambda: nn.ReflectionPad2d(1), "ReflectionPad2DBackward0"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 2), "ConvolutionBackward0"),
    "broadcast": (lambda: Function(lambda x: x + x.mean((2, 3), keepdim=True)), "AddBackward0"),
    "cropped": (lambda: Function(lambda x: F.pad(x, (-1, -1, 0, 0))), "ConstantPadNdBackward0"),
    "lp pool": (lambda: nn.LPPool2d(2, 3), "SignBackward0"),
    "custom": (lambda: Function(Doubled.apply), "DoubledBackward"),
    "two outputs": (lambda: Function(lambda x: torch.cat(Halves.apply(x), 1)[:, :6]), "HalvesBackward"),
    "two outputs, one taken": (lambda: Function(lambda x: Halves.apply(x)[1]), "HalvesBackward"),
    "batch statistics": (lambda: Sum(nn.BatchNorm2d(6, track_running_stats=False)), "NativeBatchNormBackward0"),
}


@pytest.mark.parametrize("after", ["pointwise", "spatial", "nothing"])
@pytest.mark.parametrize("piece", UNKNOWN)
def test_an_unknown_operation_gives_the_loops_numbers_and_is_named(piece, after):
    make, name = UNKNOWN[piece]
    rest = {"pointwise": [nn.Conv2d(6, 5, 1)], "spatial": [nn.Conv2d(6, 5, 2), nn.ReLU()], "nothing": []}[after]
    for chunk_bytes in (1, 2**20):
        left = assert_engines_agree(between(lambda: nn.Sequential(make(), *rest)), chunk_bytes=chunk_bytes)
        assert left == {name}


def test_a_way_that_no_gradient_takes_is_refused():
    for cut in (Function(lambda x: x.detach()), Function(lambda x: x.detach() + nn.Parameter(torch.ones(1)))):
        with pytest.raises(structured.Unsupported, match="a way that no gradient takes"):
            assert_engines_agree(between(lambda cut=cut: cut))


class Named(nn.Module):
    """A network whose layers `source` and `target` surround a piece."""

    def __init__(self, piece: nn.Module):
        super().__init__()
        self.source, self.piece, self.target = nn.Conv2d(3, 6, 1), piece, nn.Conv2d(6, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.target(self.piece(self.source(images))).mean((2, 3))


def attributed(model: nn.Module, **options):
    return attribute(model, noise(3, 3, 7, 7), ["source", "target"], **options)


@pytest.mark.parametrize("piece", ["custom", "two outputs", "group norm"])
def test_both_engines_attribute_alike_through_an_unknown_operation(piece):
    model = seeded(lambda: Named(UNKNOWN[piece][0]()))
    plain, fast = attributed(model, engine="loop"), attributed(model, engine="structured", batch_size=2)
    torch.testing.assert_close(fast.matrices[0].values, plain.matrices[0].values)


class Changing(Named):
    """Small batches go through an operation that has no rule."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.source(images)
        x = Doubled.apply(x) if len(images) == 1 else x * x.abs()
        return self.target(x).mean((2, 3))


def test_a_network_that_changes_its_way_between_batches_loses_no_image():
    model = seeded(lambda: Changing(nn.Identity()))
    plain = attributed(model, engine="loop", batch_size=2)
    torch.testing.assert_close(attributed(model, batch_size=2).matrices[0].values, plain.matrices[0].values)


def test_the_graph_survives_for_the_loop(conv_net, photographs):
    pair = recorded(conv_net, photographs, "1", "5")
    kind = (SCORES["cla"], SUMMARIES["norm"])
    before = whole(loop.blocks(*pair, *kind), 5)
    whole(structured.blocks(*pair, *kind), 5)
    for got, expected in zip(whole(loop.blocks(*pair, *kind), 5), before, strict=True):
        assert torch.equal(got, expected)


# ------------------------------------------------------------------ parts of the engine by themselves


@pytest.mark.parametrize("padding", [(1, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("size", [(7, 7), (8, 13), (4, 6)])
def test_winograds_convolution_is_the_transposed_one(padding, size):
    maps, weight = noise(3, 130, *size), noise(130, 128, 3, 3)
    assert winograd.pays(maps, weight) and not winograd.pays(maps, weight[:, :127])
    expected = F.conv_transpose2d(maps, weight, padding=padding)
    found = winograd.led_back(maps, winograd.transformed(weight), padding)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))


def test_wide_convolutions_take_winograds_way_and_give_the_loops_numbers():
    wide = lambda: nn.Sequential(nn.Conv2d(6, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1))  # noqa: E731
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 128, 3), nn.Identity(), nn.Sequential(nn.Conv2d(128, 6, 1), wide()))
    )
    assert_engines_agree(recorded(net, noise(2, 3, 11, 10), "1", "2"), [("cla", "norm")])


def test_vectors_between_linear_layers():
    parts = [
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(100, 6),
        nn.Identity(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 7),
    ]
    pair = recorded(seeded(lambda: nn.Sequential(*parts)), noise(3, 3, 7, 7), "3", "6")
    assert_engines_agree(pair, EVERY)


@pytest.mark.parametrize("window", [(3, 2), (3, 1), (2, 2), (5, 2)])
def test_pooled_sources_whose_windows_overlap(window):
    """Through a mixing, spread, and dense; at every reach of the windows."""
    for after in (nn.Conv2d(6, 5, 1), nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))):
        pair = between(lambda after=after: nn.Sequential(nn.MaxPool2d(*window), after), size=12)
        assert_engines_agree(pair)


def test_costs_are_found_once_and_part_the_rows():
    pair = between(PIECES["concatenation"])
    costs = structured.Costs()
    kind = SCORES["cla"], SUMMARIES["norm"]
    first_time = whole(structured.blocks(*pair, *kind, costs=costs), pair[3].n_units)
    assert min(costs.found) == 0 and all(cost > 0 for cost in costs.found.values())
    again = whole(structured.blocks(*pair, *kind, costs=costs), pair[3].n_units)
    assert all(map(torch.equal, first_time, again))
    uneven = structured.Costs({0: 1.0, 4: 8.0, 9: 2.0})
    assert [len(chunk) for chunk in uneven.chunks(torch.arange(10), 16.0)] == [2, 2, 2, 2, 2]


class With(nn.Module):
    """A function of the input and a parameter."""

    def __init__(self, function, *shape: int):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.full(shape, 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


REVIEWED = {  # each once gave other numbers than the loop, or none
    "branches with norms before their mixing": lambda: Concatenated(
        *(
            nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 8, 3, padding=1))
            for _ in range(4)
        )
    ),
    "parameter over values": lambda: then(With(lambda x, w: w / (2 + x.abs()), 6, 1, 1)),
    "parameter to the power of values": lambda: then(With(lambda x, w: w**x, 1)),
    "norm after a weight of lower rank": lambda: nn.Sequential(
        nn.Conv2d(6, 9, 3, padding=1), With(lambda x, w: x * w, 9, 1, 1), nn.BatchNorm2d(9), nn.Conv2d(9, 5, 3)
    ),
    "norm after a single number": lambda: nn.Sequential(
        nn.Conv2d(6, 7, 3), With(lambda x, w: x * w), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3)
    ),
    "number in double precision": lambda: nn.Sequential(
        nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, groups=6), Function(lambda x: 2.5 * x)
    ),
    "units and positions changed over": lambda: Function(lambda x: x[..., :6, :6] + x[..., :6, :6].transpose(1, 2)),
    "norm after activation": lambda: nn.Sequential(
        nn.Conv2d(6, 7, 3), nn.ReLU(), nn.BatchNorm2d(7), nn.Conv2d(7, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
    ),
    "gate before the projection": lambda: nn.Sequential(
        Gated(nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1)), nn.Conv2d(6, 5, 1)
    ),
    "linear layer before a convolution": lambda: nn.Sequential(
        Function(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6),
        Function(lambda x: x.permute(0, 3, 1, 2)), nn.Conv2d(6, 5, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("piece", REVIEWED)
def test_what_a_review_found(piece):
    pair = between(REVIEWED[piece])
    left = assert_engines_agree(pair) | assert_engines_agree(pair, [("cla", "norm")], chunk_bytes=4000)
    assert left <= {"SliceBackward0", "TransposeBackward0"}


def test_bfloat16_goes_through_norms_between_mixings():
    pair = between(REVIEWED["norm after activation"])
    kind = SCORES["cla"], SUMMARIES["norm"]
    exact = whole(structured.blocks(*pair, *kind), pair[3].n_units)[0]
    rough = whole(structured.blocks(*pair, *kind, dtype=torch.bfloat16), pair[3].n_units)[0]
    assert (rough - exact).abs().max() < 0.03 * exact.max()


def test_channels_last_maps_under_a_convolution():
    parts = [nn.Conv2d(3, 6, 3), Function(lambda x: x.permute(0, 2, 3, 1)), Function(lambda x: x.permute(0, 3, 1, 2))]
    net = seeded(lambda: nn.Sequential(*parts[:2], nn.Sequential(parts[2], nn.Conv2d(6, 5, 3))))
    source, target, *_ = recorded(net, noise(2, 3, 9, 9), "1", "2")
    layers = Layer("1", "", tuple(source.shape[1:]), 3), Layer("2", "", tuple(target.shape[1:]), 1)
    assert_engines_agree((source, target, *layers), EVERY)


class Silent(torch.autograd.Function):
    """The identity, whose derivative of nothing is None rather than zeros."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient if gradient.any() else None


def whole_of(pair: tuple, kind: tuple, rows: Tensor) -> Tensor:
    return together(loop.blocks(*pair, *kind, rows))[1]


def test_an_operation_that_answers_for_some_targets_only_keeps_their_rows():
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Identity(), nn.Sequential(Function(Silent.apply), nn.Conv2d(6, 5, 1), nn.ReLU())
        )
    )
    net[2][1].bias.data[2] = -100  # a unit that is never active; the loop cannot have its row
    pair, others = recorded(net, noise(2, 3, 7, 7), "1", "2"), torch.tensor([0, 1, 3, 4])
    assert_engines_agree(pair, rows=others)
    kind = SCORES["cla"], SUMMARIES["norm"]
    everything = whole(structured.blocks(*pair, *kind), 5)[0]
    assert not everything[:, 2].any()
    torch.testing.assert_close(everything[:, others], whole_of(pair, kind, others))
