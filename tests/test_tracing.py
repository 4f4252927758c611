"""One execution tells the order of layers, the axis of their units, and which of them to look at."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from viscircuits.errors import LayerError, ModelError
from viscircuits.hooks import count_hooks, record
from viscircuits.layers import along_units, by_unit, parse_address
from viscircuits.tracing import list_layers, resolve, trace

torchvision = pytest.importorskip("torchvision")
vision = torchvision.models


class Net(nn.Module):
    """Modules given by name, and a function that runs them."""

    def __init__(self, run, **parts: nn.Module):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, images: Tensor):
        return self.run(self, images)


def traced(model: nn.Module, size: int = 16):
    return trace(model.eval(), torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))


def timm_model(name: str, **options) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=5, **options)


def units_of(model: nn.Module, *addresses: str, size: int = 16) -> list[tuple[int, int]]:
    """Unit axis and number of units of each layer."""
    found = traced(model, size)
    layers = [found.layer(address) for address in addresses]
    return [(layer.unit_axis, layer.n_units) for layer in layers]


def assert_each_feeds_the_next(model: nn.Module, addresses, size: int) -> None:
    """Checked by running: gradients flow from each of the first ten layers to the one before it."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.enable_grad(), record(model, addresses) as values:
        model(images)
    for source, target in pairwise(addresses[:10]):
        (gradient,) = torch.autograd.grad(values[target].square().sum(), values[source], retain_graph=True)
        assert gradient.abs().sum() > 0, f"{source} does not reach {target}"


# ------------------------------------------------------------------ order, shape and unit axis


def test_layers_stand_in_the_order_in_which_they_run(conv_net):
    layers = traced(conv_net).layers()
    assert [layer.address for layer in layers] == [str(i) for i in range(9)]
    assert [layer.kind for layer in layers[:3]] == ["Conv2d", "ReLU", "Conv2d"]
    assert [layer.shape for layer in layers[:3]] == [(6, 16, 16), (6, 16, 16), (8, 8, 8)]


def test_order_is_that_of_execution_not_of_definition():
    model = Net(lambda net, x: net.last(net.first(x)), last=nn.Conv2d(4, 2, 1), first=nn.Conv2d(3, 4, 1))
    assert [layer.address for layer in traced(model).layers()] == ["first", "last"]


def test_counts_of_units_and_positions(vit):
    found = traced(vit)
    tokens, patches, head = found.layer("blocks.0.mlp.1"), found.layer("patch_embed"), found.layer("head")
    assert tokens.n_units == 8
    assert patches.n_units == 6
    assert head.n_units == 4


def test_channels_of_convolutions_come_first_and_features_of_tokens_last(vit):
    names = ("patch_embed", "blocks.0.norm1", "blocks.0.attn", "blocks.0.mlp.1", "blocks.0", "blocks.1", "norm", "head")
    assert units_of(vit, *names) == [(1, 6), (2, 6), (2, 6), (2, 8), (2, 6), (2, 6), (2, 6), (1, 4)]


def test_patches_keep_their_unit_axis_when_they_become_tokens():
    model = Net(
        lambda net, x: net.mix(net.join(net.drop(net.proj(x).flatten(2).transpose(1, 2)))),
        proj=nn.Conv2d(3, 12, 4, stride=4), drop=nn.Identity(), join=nn.Identity(), mix=nn.Identity(),
    )  # fmt: skip
    assert units_of(model, "drop", "join", "mix") == [(2, 12)] * 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.flatten(2), (1, 6)),
        (lambda x: x.mean((2, 3)), (1, 6)),
        (lambda x: x.mean((2, 3), keepdim=True), (1, 6)),
        (lambda x: x.mean(3), (1, 6)),
        (lambda x: x.mean((2, 3))[:, :, None, None], (1, 6)),
        (lambda x: x.permute(0, 2, 3, 1), (3, 6)),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2), (2, 6)),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)[:, 0], (1, 6)),
        (lambda x: x.permute(0, 2, 3, 1).reshape(2, 2, 8, 16, 6).permute(0, 2, 1, 3, 4), (4, 6)),
        (lambda x: x.movedim(1, -1).movedim(-1, 1), (1, 6)),
        (lambda x: x.unflatten(1, (2, 3)), (2, 3)),
        (lambda x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), (1, 6)),
        (lambda x: torch.cat([x, x], 1), (1, 12)),
        (lambda x: x.chunk(2, dim=1)[0], (1, 3)),
        (lambda x: x.flatten(1), (1, 6 * 256)),
        (lambda x: F.pixel_shuffle(torch.cat([x, x], 1), 2), (1, 3)),
    ],
)
def test_the_unit_axis_is_followed_through_changes_of_shape(change, expected):
    model = Net(lambda net, x: net.mark(change(net.conv(x))), conv=nn.Conv2d(3, 6, 1), mark=nn.Identity())
    assert units_of(model, "mark") == [expected]


def test_a_single_unit_is_still_a_unit():
    model = Net(lambda net, x: net.mark(net.conv(x).flatten(2)), conv=nn.Conv2d(3, 1, 1), mark=nn.Identity())
    assert units_of(model, "mark") == [(1, 1)]


def test_units_of_channel_last_networks():
    names = ("features.1.0.block.0", "features.1.0.block.2", "features.1.0.block.4", "features.1.0")
    assert units_of(small_convnext(), *names, size=32) == [(1, 8), (3, 8), (3, 32), (1, 8)]


def test_units_of_swin_and_the_error_for_its_windows():
    found = traced(swin(), 56)
    for address in ("patch_embed", "layers.0.blocks.0.drop_path1", "layers.0.blocks.0"):
        assert (found.layer(address).unit_axis, found.layer(address).n_units) == (3, 12), address
    assert found.layer("layers.0.blocks.0.mlp.act").unit_axis == 2
    with pytest.raises(
        LayerError, match=r"attn.qkv' has shape \(8, 49, 36\) for 2 images: the first axis is not the images"
    ):
        found.layer("layers.0.blocks.0.attn.qkv")
    assert "layers.0.blocks.0.attn.qkv" not in [layer.address for layer in found.layers()]


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=2), st.data())
def test_by_unit_and_along_units_agree_with_indexing(n_images, n_units, positions, data):
    axis = data.draw(st.integers(1, len(positions) + 1))
    shape = [n_images, *positions]
    shape.insert(axis, n_units)
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    units = by_unit(values, axis)
    for unit in range(n_units):
        assert torch.equal(units[:, unit], values.select(axis, unit).reshape(n_images, -1))
    scaled = by_unit(values * along_units(torch.arange(float(n_units)), values, axis), axis)
    torch.testing.assert_close(scaled, units * torch.arange(float(n_units))[None, :, None])


# ------------------------------------------------------------------ addresses


def test_addresses_are_parsed_into_their_parts():
    a = parse_address("layer1.0.relu@1:in")
    assert (a.name, a.call, a.input, a.item) == ("layer1.0.relu", 1, True, None)
    b = parse_address("encoder[last_hidden_state]")
    assert (b.name, b.call, b.input, b.item) == ("encoder", None, False, "last_hidden_state")


def two_relus() -> nn.Module:
    return Net(
        lambda net, x: net.relu(net.conv2(net.relu(net.conv1(x)))),
        conv1=nn.Conv2d(3, 4, 1), conv2=nn.Conv2d(4, 5, 1), relu=nn.ReLU(inplace=True),
    )  # fmt: skip


def test_a_module_used_twice_is_listed_once_for_each_call():
    found = traced(two_relus())
    assert [layer.address for layer in found.layers()] == ["conv1", "relu@0", "conv2", "relu@1"]
    assert found.layer("relu@1").n_units == 5
    with pytest.raises(LayerError, match=r"'relu' runs 2 times in a forward pass; say which: relu@0, relu@1"):
        found.value("relu")
    with pytest.raises(LayerError, match=r"'relu' runs 2 times, so there is no 'relu@2'"):
        found.value("relu@2")


def test_a_module_under_two_names_answers_to_the_first():
    shared = nn.Conv2d(3, 3, 1)
    model = Net(lambda net, x: net.b(F.relu(net.a(x))), a=shared, b=shared)
    found = traced(model)
    assert [layer.address for layer in found.layers()] == ["a@0", "a@1"]
    with pytest.raises(LayerError, match="'b' is the module 'a'; call it by that name"):
        resolve(model, found, ["a@0", "b"])
    assert len(resolve(model, found, ["a@0", "a@1"])) == 2


def test_elements_of_a_tuple_are_layers_of_their_own():
    part = Net(lambda net, x: (net.a(x), net.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 5, 1))
    model = Net(lambda net, x: net.part(x)[1], part=part)
    found = traced(model)
    assert [layer.n_units for layer in (found.layer("part[0]"), found.layer("part[1]"))] == [4, 5]
    assert found.value("part[0]") == found.value("part.a")
    with pytest.raises(LayerError, match=r"'part' gives 2 tensors, not one. It has: part\[0\], part\[1\]"):
        found.value("part")


def test_an_in_place_activation_makes_a_new_value():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    found = traced(model)
    assert found.value("0") < found.value("1") == found.value("2:in")


def test_a_layer_that_never_runs_says_why():
    model = Net(lambda net, x: net.a(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    with pytest.raises(LayerError, match=r"'b' never runs: .*fused attention does.* or leaves it out"):
        traced(model).layer("b")


# ------------------------------------------------------------------ resolve


def test_resolve_puts_layers_in_order_and_describes_them(conv_net):
    layers = resolve(conv_net, traced(conv_net), ["5", "1", "3"])
    assert [(layer.address, layer.n_units) for layer in layers] == [("1", 6), ("3", 8), ("5", 5)]


def branches() -> nn.Module:
    return Net(
        lambda net, x: net.join(torch.cat([net.left(x), net.right(x)], 1)),
        left=nn.Conv2d(3, 4, 1), right=nn.Conv2d(3, 4, 1), join=nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def test_layers_without_a_path_are_refused():
    model = branches()
    with pytest.raises(LayerError, match="no path leads from layer 'left' to layer 'right'"):
        resolve(model, traced(model), ["left", "right", "join"])
    assert len(resolve(model, traced(model), ["right", "join"])) == 2


def test_the_same_tensor_twice_is_refused(conv_net):
    for pair in (["1", "2:in"], ["1", "1"]):
        with pytest.raises(LayerError, match=rf"layers '1' and '{pair[1]}' are the same tensor; leave one of them out"):
            resolve(conv_net, traced(conv_net), pair)


def test_resolve_names_the_closest_layer(vit):
    with pytest.raises(LayerError, match=r"Did you mean 'blocks.0.mlp.1'"):
        resolve(vit, traced(vit), ["block.0.mlp.1"])


@pytest.mark.parametrize("function", [lambda x: x.sum((1, 2, 3)), lambda x: x.sum()])
def test_a_layer_without_units_is_refused(function):
    model = Net(lambda net, x: net.mark(function(net.conv(x))), conv=nn.Conv2d(3, 4, 1), mark=nn.Identity())
    with pytest.raises(LayerError, match=r"'mark' has shape \(2?,?\) for 2 images"):
        resolve(model, traced(model), ["conv", "mark"])


# ------------------------------------------------------------------ default layers


def test_default_layers_of_a_plain_network_are_its_activations(conv_net, vit):
    assert traced(conv_net).default_layers() == ("1", "3", "5")
    assert traced(vit).default_layers() == ("blocks.0.mlp.1", "blocks.1.mlp.1")


def test_functional_activations_are_found_as_the_next_modules_input():
    def run(net, x):
        return net.pool(F.relu_(net.conv2(F.relu(net.conv1(x)))))

    model = Net(run, conv1=nn.Conv2d(3, 4, 1), conv2=nn.Conv2d(4, 5, 1), pool=nn.AdaptiveAvgPool2d(1))
    assert traced(model).default_layers() == ("conv2:in", "pool:in")


def test_concatenated_activations_are_one_layer():
    found = traced(vision.squeezenet1_1(num_classes=5), 48)
    assert {"features.3", "features.4"} <= set(found.default_layers())
    assert not any("expand" in name for name in found.default_layers())
    assert found.layer("features.3").n_units == 128  # 64 of 1×1 and 64 of 3×3


def test_squeeze_and_excite_gates_are_left_out():
    chosen = traced(timm_model("efficientnet_b0"), 64).default_layers()
    assert {"blocks.1.0.bn1", "blocks.1.0.bn2", "blocks.1.1.bn2", "blocks.2.0.bn2"} <= set(chosen)
    assert not any(".se" in name for name in chosen)


def test_a_network_without_activations_asks_for_layers():
    with pytest.raises(LayerError, match=r"fewer than two outputs of non-linearities .*--layers A,B"):
        traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))).default_layers()


def mixer() -> nn.Module:
    mlp_mixer = pytest.importorskip("timm.models.mlp_mixer")
    return mlp_mixer.MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)


def swin() -> nn.Module:
    sizes = {"img_size": 56, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 2)}
    return timm_model("swin_tiny_patch4_window7_224", **sizes)


def small_convnext() -> nn.Module:
    return vision.ConvNeXt([vision.convnext.CNBlockConfig(8, None, 2)], num_classes=5)


def small_resnet(*n_blocks: int) -> nn.Module:
    return vision.ResNet(vision.resnet.BasicBlock, list(n_blocks), num_classes=5)


NETWORKS = {
    "torchvision resnet": (lambda: small_resnet(1, 1, 1, 1), 32),
    "torchvision mobilenet_v3": (lambda: vision.mobilenet_v3_small(width_mult=0.2), 32),
    "torchvision shufflenet": (lambda: vision.ShuffleNetV2([2, 1, 1], [8, 16, 24, 32, 64]), 32),
    "torchvision squeezenet": (lambda: vision.squeezenet1_1(num_classes=5), 48),
    "torchvision densenet": (lambda: vision.DenseNet(4, (2, 2), 8, num_classes=5), 32),
    "torchvision vit": (lambda: vision.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5), 32),
    "torchvision convnext": (small_convnext, 32),
    "timm efficientnet_lite0": (lambda: timm_model("tf_efficientnet_lite0"), 32),
    "timm convnext_atto": (lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 32),
    "timm vit_tiny": (lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24), 32),
    "timm mixer": (mixer, 32),
    "timm resnetv2": (lambda: timm_model("resnetv2_50", layers=(1, 1), channels=(32, 64)), 32),
    "timm swin": (swin, 56),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_default_layers_are_activations_each_of_which_feeds_the_next(name):
    make, size = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    found = traced(model, size)
    chosen = found.default_layers()
    assert len(chosen) >= 2
    assert {found.value(address) for address in chosen} <= found.nonlinear
    resolve(model, found, chosen)  # in execution order, of distinct tensors, all with a path
    assert_each_feeds_the_next(model, list(chosen), size)


def test_blocks_of_a_residual_network_end_after_their_activation():
    chosen = traced(small_resnet(2, 1, 1, 1), 32).default_layers()
    assert {"layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"} <= set(chosen)


def test_blocks_of_an_inception_network_are_concatenated_activations():
    chosen = traced(vision.googlenet(init_weights=False, aux_logits=False), 32).default_layers()
    assert {f"inception{block}" for block in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")} <= set(chosen)
    assert not any("branch1" in name or "branch4" in name for name in chosen)  # parts of a concatenation


def test_listing_marks_the_default_layers_and_shows_inputs_before_their_module():
    model = vision.squeezenet1_1(num_classes=5).eval()
    images = torch.randn(1, 3, 48, 48)
    listed, chosen = list_layers(model, images, None)
    assert chosen <= {layer.address for layer in listed}
    listed, chosen = list_layers(model, images, ["features.3", "features.4:in", "classifier.1:in"])
    names = [layer.address for layer in listed]
    assert names.index("classifier.1:in") < names.index("classifier.1")
    assert chosen == {"features.3", "features.4:in", "classifier.1:in"}


# ------------------------------------------------------------------ the network is left alone


def test_tracing_leaves_the_network_as_it_found_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout()).train()
    model[3].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, torch.randn(1, 3, 8, 8))
    assert [m.training for m in model.modules()] == [True, True, True, True, False]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert count_hooks(model) == 0 and torch.is_grad_enabled()


def test_an_exception_while_tracing_leaves_no_hook(conv_net):
    with pytest.raises(ModelError, match="cannot run on images of shape 2×1×8×8"):
        trace(conv_net, torch.randn(1, 1, 8, 8))
    assert count_hooks(conv_net) == 0
    assert traced(conv_net).default_layers() == ("1", "3", "5")  # and nothing watches functions any more


def test_tracing_does_not_depend_on_the_images_or_their_number(conv_net):
    a = trace(conv_net, torch.zeros(1, 3, 16, 16)).layers()
    assert a == trace(conv_net, torch.randn(5, 3, 16, 16)).layers()


def test_numbers_inside_a_network_are_no_layers():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x):
            x = self.a(x).relu()
            x = x / x.max().clamp(min=1e-3) if bool(x.sum() > 0) else x
            return self.b(x).relu().mean((2, 3))

    torch.manual_seed(0)
    found = trace(Scaled().eval(), torch.randn(1, 3, 8, 8))
    assert [(layer.address, layer.n_units) for layer in found.layers()] == [("a", 4), ("b", 5)]
