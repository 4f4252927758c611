"""Recorded values are the true ones, rewriting is exact, and the network is left as it was found."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viscircuits.errors import LayerError, ModelError
from viscircuits.hooks import (
    activations,
    count_hooks,
    evaluating,
    forward,
    record,
    rewrite,
    submodule,
    watch_calls,
)
from viscircuits.layers import parse_address

Pair = namedtuple("Pair", ["map", "gate"])


class Returning(nn.Module):
    """Two convolutions whose outputs a part returns in some container, which the network adds up."""

    def __init__(self, pack, unpack):
        super().__init__()
        self.part = Part(pack)
        self.unpack = unpack

    def forward(self, images: Tensor) -> Tensor:
        a, b = self.unpack(self.part(images))
        return (a + b).mean((2, 3))


class Part(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.pack = pack

    def forward(self, images: Tensor):
        return self.pack(self.a(images), self.b(images))


class FunctionalNet(nn.Module):
    """Activations without modules: one in place, one not."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.head = nn.Conv2d(6, 4, 3), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu_(self.bn(self.conv1(images)))
        x = F.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


class Reused(nn.Module):
    """One ReLU that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(images)))).mean((2, 3))


class Wrapped(nn.Module):
    """A network whose part is called with `call`, for what a part may return."""

    def __init__(self, part: nn.Module, call=lambda part, images: part(images)):
        super().__init__()
        self.part, self.call = part, call

    def forward(self, images: Tensor):
        return self.call(self.part, images)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor):
        return self.function(images)


def seeded(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
    return model


def recorded(model: nn.Module, addresses, images: Tensor) -> dict[str, Tensor]:
    with record(model, addresses) as values:
        model(images)
    return values


def snapshot(model: nn.Module) -> tuple:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return (
        state,
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        count_hooks(model),
    )


def assert_as_found(model: nn.Module, before: tuple) -> None:
    state, *rest = before
    assert snapshot(model)[1:] == tuple(rest)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


# ------------------------------------------------------------------ recording


@pytest.mark.parametrize("grad", [True, False])
def test_a_value_followed_by_an_in_place_module_is_the_true_one(photographs, grad):
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3))
    )
    with torch.set_grad_enabled(grad):
        values = recorded(model, ["0", "1", "2"], photographs)
        conv = F.conv2d(photographs, model[0].weight, model[0].bias)
        norm = F.batch_norm(conv, model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias)
    assert (norm < 0).any()
    torch.testing.assert_close(values["0"], conv)
    torch.testing.assert_close(values["1"], norm)
    torch.testing.assert_close(values["2"], norm.clamp(min=0))


def test_a_value_followed_by_an_in_place_function_is_the_true_one(photographs):
    model = seeded(FunctionalNet)
    values = recorded(model, ["conv1", "bn", "conv2:in"], photographs)
    assert (values["bn"] < 0).any() and (values["conv2:in"] >= 0).all()
    assert torch.equal(values["conv2:in"], values["bn"].clamp(min=0))


def test_a_functional_activation_is_the_next_modules_input(photographs):
    model = seeded(FunctionalNet)
    values = recorded(model, ["conv2", "head:in"], photographs)
    torch.testing.assert_close(values["head:in"], values["conv2"].clamp(min=0).mean((2, 3)))


def test_the_input_of_a_module_called_by_keyword_is_found(photographs):
    model = Wrapped(nn.Conv2d(3, 4, 1), lambda part, images: part(input=images).mean((2, 3)))
    assert torch.equal(recorded(model, ["part:in"], photographs)["part:in"], photographs)
    with rewrite(model, {"part:in": torch.zeros_like}):
        torch.testing.assert_close(model(photographs), model.part.bias.expand(5, 4))


def test_recording_leaves_the_output_bit_for_bit(photographs, conv_net):
    before = conv_net(photographs)
    with record(conv_net, ["0", "1", "3", "5:in"]):
        assert torch.equal(conv_net(photographs), before)


def test_gradients_with_respect_to_recorded_values_are_the_true_ones(photographs, conv_net):
    values = recorded(conv_net, ["1", "3"], photographs)
    (gradient,) = torch.autograd.grad(values["3"].sum(), values["1"])
    direct = values["1"].detach().requires_grad_()
    (expected,) = torch.autograd.grad(conv_net[3](conv_net[2](direct)).sum(), direct)
    torch.testing.assert_close(gradient, expected)


def test_a_frozen_network_gets_its_graph_from_the_first_recorded_layer_on(photographs, conv_net):
    conv_net.requires_grad_(False)
    values = recorded(conv_net, ["1", "3"], photographs)
    assert values["1"].is_leaf and values["3"].grad_fn is not None
    assert torch.autograd.grad(values["3"].sum(), values["1"])[0].abs().sum() > 0
    assert not any(p.requires_grad for p in conv_net.parameters())


def test_without_gradients_there_is_no_graph(photographs, conv_net):
    with torch.no_grad():
        assert not recorded(conv_net, ["1"], photographs)["1"].requires_grad
    with torch.inference_mode():
        assert recorded(conv_net, ["1"], photographs)["1"].is_inference()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_keep_the_networks_precision(photographs, conv_net, dtype):
    conv_net.to(dtype)
    values = recorded(conv_net, ["0", "1"], photographs.to(dtype))
    assert values["0"].dtype == dtype
    assert torch.equal(values["1"], values["0"].clamp(min=0))
    assert torch.equal(
        activations(conv_net, ["1"], photographs)["1"], values["1"]
    )  # moves images to the network's type


def test_stopping_early_gives_the_same_values_as_running_to_the_end(photographs, conv_net):
    whole, part = recorded(conv_net, ["1", "3"], photographs), activations(conv_net, ["1", "3"], photographs)
    assert all(torch.equal(whole[address], part[address]) for address in ("1", "3"))
    late = []
    conv_net[4].register_forward_hook(lambda *_: late.append(1))
    activations(conv_net, ["1", "3"], photographs)
    assert late == []


def test_a_second_forward_pass_overwrites_the_first(photographs, conv_net):
    with record(conv_net, ["1"]) as values:
        conv_net(photographs)
        conv_net(photographs[:2])
    assert torch.equal(values["1"], recorded(conv_net, ["1"], photographs[:2])["1"])


# ------------------------------------------------------------------ modules that run twice


def test_a_module_used_twice_has_to_be_told_apart(photographs):
    model = seeded(Reused)
    with pytest.raises(LayerError, match=r"'relu' runs more than once in a forward pass; say which: relu@0, relu@1"):
        recorded(model, ["relu"], photographs)
    values = recorded(model, ["conv1", "relu@0", "conv2", "relu@1"], photographs)
    assert torch.equal(values["relu@0"], values["conv1"].clamp(min=0))
    assert torch.equal(values["relu@1"], values["conv2"].clamp(min=0))
    assert torch.equal(recorded(model, ["relu@1:in"], photographs)["relu@1:in"], values["conv2"])


def test_a_call_that_does_not_happen_is_named(photographs):
    with pytest.raises(LayerError, match=r"'relu' runs 2 times, so there is no 'relu@2'"):
        recorded(seeded(Reused), ["relu@2"], photographs)


def test_only_the_call_that_was_meant_is_rewritten(photographs):
    model = seeded(Reused)
    with rewrite(model, {"relu@0": torch.zeros_like}):
        expected = model.conv2.bias.clamp(min=0).expand(5, 4)
        torch.testing.assert_close(model(photographs), expected)


def test_two_passes_in_one_context_are_counted_apart(photographs):
    model = seeded(Reused)
    with record(model, ["relu@1"]) as values:
        model(photographs)
        model(photographs)
    assert values["relu@1"].shape[1] == 4


# ------------------------------------------------------------------ several outputs

CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda out: out, ("0", "1")),
    "list": (lambda a, b: [a, b], lambda out: out, ("0", "1")),
    "namedtuple": (Pair, lambda out: (out.map, out.gate), ("0", "1")),
    "dict": (lambda a, b: {"x": a, "y": b}, lambda out: (out["x"], out["y"]), ("x", "y")),
    "ordered": (lambda a, b: OrderedDict(x=a, y=b), lambda out: (out["x"], out["y"]), ("x", "y")),
    "with a number": (lambda a, b: (a, 3, b), lambda out: (out[0], out[2]), ("0", "2")),
    "int keys": (lambda a, b: {0: a, 1: b}, lambda out: (out[0], out[1]), ("0", "1")),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_each_element_of_a_container_is_recorded_and_rewritten(kind, photographs):
    pack, unpack, (first, second) = CONTAINERS[kind]
    model = seeded(partial(Returning, pack, unpack))
    a, b = model.part.a(photographs), model.part.b(photographs)
    values = recorded(model, [f"part[{first}]", f"part[{second}]"], photographs)
    assert torch.equal(values[f"part[{first}]"], a) and torch.equal(values[f"part[{second}]"], b)
    with rewrite(model, {f"part[{second}]": torch.zeros_like}):
        torch.testing.assert_close(model(photographs), a.mean((2, 3)))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_of_several_tensors_asks_which(kind, photographs):
    pack, unpack, (first, second) = CONTAINERS[kind]
    model = seeded(partial(Returning, pack, unpack))
    with pytest.raises(LayerError, match=rf"returns 2 tensors; say which: part\[{first}\], part\[{second}\]"):
        recorded(model, ["part"], photographs)
    with pytest.raises(LayerError, match=rf"returns {first}, .*there is no element 'z'"):
        recorded(model, ["part[z]"], photographs)


def test_a_container_of_one_tensor_needs_no_element(photographs):
    model = Wrapped(Function(lambda x: (x.mean((2, 3)), None)), lambda part, images: part(images)[0])
    torch.testing.assert_close(recorded(model, ["part"], photographs)["part"], photographs.mean((2, 3)))


def test_an_input_has_no_elements():
    with pytest.raises(LayerError, match=r"'conv:in\[1\]' is not a layer address"):
        parse_address("conv:in[1]")


# ------------------------------------------------------------------ what cannot be recorded


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        (lambda x: x.argmax(1), r"holds torch.int64, not floats"),
        (lambda x: x.sum(), r"has shape \(\): no axis for units"),
        (lambda x: x.mean((1, 2, 3)), r"has shape \(5,\): no axis for units"),
        (lambda x: "label", r"gives a str, not a tensor"),
        (lambda x: None, r"gives a NoneType, not a tensor"),
        (lambda x: (1, 2), r"returns 0 tensors"),
    ],
)
def test_an_output_without_units_is_an_error_that_says_why(function, wrong, photographs, conv_net):
    model = Wrapped(Function(function), lambda part, images: (part(images), conv_net(images))[1])
    with pytest.raises(LayerError, match=wrong):
        recorded(model, ["part"], photographs)


def test_an_unknown_layer_names_the_closest(photographs, vit):
    with pytest.raises(LayerError, match=r"no layer 'blocks.1.mlp.act' in TinyViT. Did you mean 'blocks.1.mlp.\d'\?"):
        recorded(vit, ["blocks.1.mlp.act"], photographs)
    with pytest.raises(LayerError, match="viscircuits layers MODEL"):
        submodule(vit, parse_address("zzz"))


@pytest.mark.parametrize("text", ["a@", "a@x", "a[", "a[]", "a:out", "a@1@2", "a:in:in"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(LayerError, match="is not a layer address; write NAME"):
        parse_address(text)


def test_fused_attention_says_that_its_projection_never_runs():
    vision = pytest.importorskip("torchvision.models")
    model = vision.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=3).eval()
    name = "encoder.layers.encoder_layer_0.self_attention.out_proj"
    with pytest.raises(LayerError, match=rf"'{name}' never runs: .*fused attention"):
        recorded(model, [name], torch.randn(2, 3, 16, 16))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_compiled_networks_are_refused(photographs, conv_net):
    in_place = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    in_place.compile(backend="eager")
    compiled = {
        "0": torch.jit.trace(conv_net, photographs),
        "_orig_mod.0": torch.compile(conv_net, backend="eager"),
        "0.0": nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), nn.ReLU()),
        "part._orig_mod.1": Wrapped(torch.compile(conv_net, backend="eager")),
        "1": in_place,
    }
    for address, model in compiled.items():
        with pytest.raises(ModelError, match="compiled, so its layers cannot be watched; pass the plain module"):
            recorded(model, [address], photographs)
        with pytest.raises(ModelError, match="compiled"), watch_calls(model, print, print):
            pass


# ------------------------------------------------------------------ rewriting


@pytest.mark.parametrize("same", [lambda t: t, torch.clone, lambda t: t * 1])
def test_rewriting_with_the_same_values_changes_no_bit(same, photographs, conv_net, vit):
    for model, addresses in ((conv_net, ("0", "1", "2:in", "6")), (vit, ("blocks.0.mlp.1", "patch_embed", "norm:in"))):
        before = model(photographs)
        with rewrite(model, dict.fromkeys(addresses, same)):
            assert torch.equal(model(photographs), before)


def test_rewriting_reaches_what_follows_and_nothing_else(photographs, conv_net):
    with rewrite(conv_net, {"3": lambda t: t * 0}), record(conv_net, ["1", "5"]) as values:
        conv_net(photographs)
    assert torch.equal(values["1"], recorded(conv_net, ["1"], photographs)["1"])
    expected = conv_net[4].bias.clamp(min=0)[None, :, None, None].expand_as(values["5"])
    torch.testing.assert_close(values["5"], expected)


def test_a_replacement_of_another_shape_is_refused(photographs, conv_net):
    with (
        pytest.raises(LayerError, match=r"for layer '1' has shape \(5, 6\), the layer has \(5, 6, 16, 16\)"),
        rewrite(conv_net, {"1": lambda t: t.mean((2, 3))}),
    ):
        conv_net(photographs)


def test_before_is_told_the_arguments_of_each_pass(photographs, conv_net):
    seen = []
    with rewrite(conv_net, {"1": torch.clone}, before=lambda args, kwargs: seen.append(len(args[0]))):
        conv_net(photographs)
        conv_net(photographs[:2])
    assert seen == [5, 2]


# ------------------------------------------------------------------ running


def test_the_main_output_is_the_logits(photographs):
    a, b = photographs.mean((2, 3)), photographs.amax((2, 3))
    for pack in (
        lambda: a,
        lambda: (a, b),
        lambda: {"aux": b, "logits": a},
        lambda: {"out": a, "aux": b},
        lambda: [a, b],
    ):
        assert forward(Function(lambda x, pack=pack: pack()), photographs) is a
    Output = namedtuple("Output", ["aux", "logits"])
    assert forward(Function(lambda x: Output(b, a)), photographs) is a


@pytest.mark.parametrize(
    "function", [lambda x: x.sum(), lambda x: x.mean((1, 2, 3)), lambda x: x, lambda x: x.argmax(1)]
)
def test_outputs_of_any_shape_and_type_pass_through(function, photographs):
    assert torch.equal(forward(Function(function), photographs), function(photographs))


def test_images_that_do_not_fit_are_the_callers_to_mend(photographs, conv_net):
    with pytest.raises(ModelError, match=r"Sequential cannot run on images of shape 5×1×16×16: .*channels"):
        forward(conv_net, photographs[:, :1])
    with pytest.raises(ModelError, match="returns a str; a tensor of outputs was expected"):
        forward(Function(lambda x: "dog"), photographs)


def test_a_network_that_asserts_its_image_size_says_so():
    vision = pytest.importorskip("torchvision.models")
    model = vision.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=3).eval()
    with pytest.raises(ModelError, match=r"cannot run on images of shape 2×3×32×32: Wrong image height"):
        forward(model, torch.randn(2, 3, 32, 32))


def test_evaluation_mode_is_undone_module_by_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), nn.ReLU())).train()
    model[1].eval()  # a frozen batch norm, as in fine-tuning
    flags = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == flags
    assert flags == [True, True, False, True, True, True]


def test_calls_are_told_in_order_with_their_nesting(photographs):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU()))
    told: list[str] = []
    with watch_calls(model, lambda name, *_: told.append(f"+{name}"), lambda name, *_: told.append(f"-{name}")):
        model(photographs)
    assert told == ["+", "+0", "-0", "+1", "+1.0", "-1.0", "-1", "-"]


# ------------------------------------------------------------------ nothing outlasts a context

CONTEXTS = {
    "record": lambda model: record(model, ["0", "2:in"]),
    "rewrite": lambda model: rewrite(model, {"1": torch.zeros_like}),
    "evaluating": evaluating,
    "watch_calls": lambda model: watch_calls(model, lambda *_: None, lambda *_: None),
}


def half_trained() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout())
    model[1].eval()
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_leaves_the_network_as_it_found_it(name, photographs):
    model = half_trained()
    before = snapshot(model)
    with CONTEXTS[name](model):
        assert snapshot(model)[1:] != before[1:]  # it does something
        model(photographs)
    assert_as_found(model, before)


@pytest.mark.parametrize("name", CONTEXTS)
def test_so_it_does_after_an_exception_inside(name, photographs):
    model = half_trained()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), CONTEXTS[name](model):
        model(photographs)
        raise KeyboardInterrupt
    assert_as_found(model, before)


@pytest.mark.parametrize("name", CONTEXTS)
def test_so_it_does_after_an_exception_in_the_forward_pass(name, photographs):
    model = half_trained()
    before = snapshot(model)
    with pytest.raises(RuntimeError), CONTEXTS[name](model):
        model(photographs[:, :1])
    assert_as_found(model, before)


def test_a_context_that_cannot_open_leaves_no_hook(photographs, conv_net):
    before = snapshot(conv_net)
    for broken in (
        lambda: record(conv_net, ["0", "nowhere"]),
        lambda: rewrite(conv_net, {"0": torch.clone, "9": torch.clone}),
    ):
        with pytest.raises(LayerError), broken():
            pass
    assert_as_found(conv_net, before)


def test_an_exception_in_a_tap_or_on_the_way_leaves_no_hook(photographs, conv_net):
    before = snapshot(conv_net)
    with pytest.raises(ZeroDivisionError), rewrite(conv_net, {"1": lambda t: t / (1 // 0)}):
        conv_net(photographs)
    with pytest.raises(ModelError):
        activations(conv_net, ["1"], photographs[:, :1])
    activations(conv_net, ["1"], photographs)
    assert_as_found(conv_net, before)


def test_the_callers_own_hooks_stay(photographs, conv_net):
    told = []
    conv_net[0].register_forward_hook(lambda *_: told.append(1))
    recorded(conv_net, ["0"], photographs)
    conv_net(photographs)
    assert told == [1, 1] and count_hooks(conv_net) == 1
