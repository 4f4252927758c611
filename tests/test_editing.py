"""An edit is the ablation, in ordinary weights; what weights cannot say goes into gates or is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from viscircuits import editing
from viscircuits.ablation import ablate, measure
from viscircuits.circuit import Circuit
from viscircuits.editing import Edited, edit
from viscircuits.errors import LayerError, ModelError, ViscircuitsError
from viscircuits.gates import UnitGate, insert_gates
from viscircuits.hooks import activations, count_hooks
from viscircuits.models import load_state


def seeded(make, seed: int = 0) -> nn.Module:
    """A network with random weights and, where it has batch norms, random statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.data.normal_(1, 0.2)
                module.bias.data.normal_(std=0.2)
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half_of(model: nn.Module, layers: list[str], images: Tensor, axes: dict[str, int] | None = None) -> Circuit:
    """Every second unit of each layer."""
    values = activations(model, layers, images[:1])
    widths = {layer: values[layer].shape[(axes or {}).get(layer, 1)] for layer in layers}
    return Circuit({layer: tuple(range(0, width, 2)) for layer, width in widths.items()}, widths)


@torch.no_grad()
def ablated(model: nn.Module, circuit: Circuit, images: Tensor, ablation: str = "zero", reference=None) -> Tensor:
    with ablate(model, circuit, ablation, reference=reference):
        return model(images)


@torch.no_grad()
def distance(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).abs().max() / expected.abs().max())


class Residual(nn.Module):
    """One residual block between two convolutions, with a ReLU behind the sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).relu()
        return self.head(self.act(maps + self.inner(maps)).mean((2, 3)))


# ------------------------------------------------------------------ the edit is the ablation


def resnet18():
    from torchvision.models import resnet18

    return resnet18(weights=None, num_classes=10)


def squeezenet():
    from torchvision.models import squeezenet1_1

    return squeezenet1_1(weights=None, num_classes=10)


def small_vit():
    from torchvision.models import VisionTransformer

    vit = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)  # torchvision's head starts at zero
    return vit


def timm_model(name: str):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'viscircuits[timm]'")
    return timm.create_model(name, pretrained=False, num_classes=10)


MLP = "encoder.layers.encoder_layer_0.mlp.1"
FOLDS, GATES = (False, False), (True, True)
# network, image side, layer → whether it takes a gate under zero and under mean, unit axes that are not 1
NETWORKS = {
    "batch norm and ReLU6 of inverted bottlenecks": (
        lambda: timm_model("tf_efficientnet_lite0"), 32, {"blocks.1.0.bn2": FOLDS, "blocks.3.1.bn2": FOLDS}, {},
    ),
    "concatenated branches": (squeezenet, 64, {"features.3": FOLDS, "features.10": FOLDS}, {}),
    "a residual block and the inside of one": (resnet18, 32, {"layer1.0": GATES, "layer3.1.relu@0": FOLDS}, {}),
    "MLP units of a transformer": (small_vit, 32, {MLP: (False, True)}, {MLP: 2}),
    "gated units of squeeze and excite": (
        lambda: timm_model("efficientnet_b0"), 32, {f"blocks.{i}.conv_pwl:in": GATES for i in ("1.0", "4.1")}, {},
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_an_edited_network_equals_the_ablated_one_on_new_images_and_the_original_is_untouched(name):
    make, side, gated, axes = NETWORKS[name]
    model, images, new = seeded(make), noise(2, 3, side, side), noise(2, 3, side, side, seed=2)
    layers = list(gated)
    circuit, statistics = half_of(model, layers, images, axes), measure(model, images, layers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untouched = model(new)
    for i, ablation in enumerate(("zero", "mean")):
        edited = edit(model, circuit, images, ablation=ablation, reference=statistics)
        expected = ablated(model, circuit, new, ablation, statistics)
        assert distance(edited.model(new), expected) < 1e-4
        assert distance(untouched, expected) > 1e-3  # or the edit would have been nothing
        assert edited.folded == tuple(layer for layer in layers if not gated[layer][i])
        assert list(edited.gates) == [layer for layer in layers if gated[layer][i]]
        assert not edited.model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(new), untouched)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_a_fold_leaves_the_architecture_and_every_other_weight(conv_net, photographs, ablation):
    statistics = measure(conv_net, photographs, ["3"])
    edited = edit(conv_net, Circuit({"3": (1, 4)}, {"3": 8}), photographs, ablation=ablation, reference=statistics)
    before, after = conv_net.state_dict(), edited.model.state_dict()
    assert list(before) == list(after)
    others = [0, 2, 3, 5, 6, 7]
    for name, value in after.items():
        changed = name in ("2.weight", "2.bias")
        assert torch.equal(value[others] if changed else value, before[name][others] if changed else before[name])
    assert not after["2.weight"][[1, 4]].any()
    assert torch.equal(after["2.bias"][[1, 4]], statistics.mean["3"][[1, 4]] * (ablation == "mean"))


def test_removing_no_unit_is_a_copy(conv_net, photographs):
    edited = edit(conv_net, Circuit({"3": ()}, {"3": 8}), photographs)
    assert torch.equal(edited.model(photographs), conv_net(photographs))
    assert edited.model is not conv_net
    assert edited.folded == () and not edited.gates


def test_a_network_in_training_mode_is_edited_as_it_evaluates_and_stays_in_training_mode(photographs):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten()))
    circuit = Circuit({"2": (0, 3)}, {"2": 4})
    expected = ablated(model, circuit, photographs)
    edited = edit(model.train(), circuit, photographs)
    assert model.training and model[3].training
    assert torch.allclose(edited.model(photographs), expected, atol=1e-6)


def test_a_gate_scales_and_shifts_its_unit():
    gate = UnitGate(3, 1)
    maps = noise(2, 3, 4, 4)
    assert torch.equal(gate(maps), maps)  # open at first
    with torch.no_grad():
        gate.scale[1], gate.shift[1] = 0.0, 7.0
    gated = gate(maps)
    assert (gated[:, 1] == 7).all()
    assert torch.equal(gated[:, [0, 2]], maps[:, [0, 2]])


def test_gates_sit_on_modules_within_modules_and_on_inputs_and_outputs_alike(conv_net, photographs):
    model = nn.Sequential(conv_net[:4], conv_net[4:])
    circuit = Circuit({"0": (1,), "1": (2,), "1:in": (0,)}, {"0": 8, "1": 4, "1:in": 8})
    gates = insert_gates(model, {
        "0.1": {"n_units": 6, "unit_axis": 1}, "0": {"n_units": 8, "unit_axis": 1},
        "1": {"n_units": 4, "unit_axis": 1}, "1:in": {"n_units": 8, "unit_axis": 1},
    })  # fmt: skip
    expected = conv_net(photographs)
    assert torch.equal(model(photographs), expected)
    with torch.no_grad():
        for layer, (unit,) in circuit.units.items():
            gates[layer].scale[unit] = 0
    maps = conv_net[:4](photographs)
    maps[:, [0, 1]] = 0
    expected = conv_net[4:](maps)
    expected[:, 2] = 0
    assert torch.allclose(model(photographs), expected, atol=1e-6)


# ------------------------------------------------------------------ where folding would be wrong


class Shared(nn.Module):
    """The same filters make two layers; seen as such, or hidden behind a view of the weights."""

    def __init__(self, hidden: bool):
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.ReLU(), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(self.conv(images))
        weight = self.conv.weight.flatten(1)[:, :, None, None] if self.hidden else self.conv.weight
        return self.second(nn.functional.conv2d(maps, weight)).mean((2, 3))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_weight_that_makes_two_layers_is_left_alone(hidden, photographs):
    model, circuit = seeded(lambda: Shared(hidden)), Circuit({"first": (1,)}, {"first": 3})
    edited = edit(model, circuit, photographs)
    assert edited.folded == ()
    assert set(edited.gates) == {"first"}
    assert torch.equal(edited.model.conv.weight, model.conv.weight)
    assert torch.allclose(edited.model(photographs), ablated(model, circuit, photographs), atol=1e-6)


def test_a_map_that_is_read_before_its_activation_too_is_gated(photographs):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            maps = self.conv(images)
            return (self.act(maps) + maps.sigmoid()).mean((2, 3))

    model, circuit = seeded(Twice), Circuit({"act": (0, 2)}, {"act": 4})
    edited = edit(model, circuit, photographs)
    assert (edited.folded, set(edited.gates)) == ((), {"act"})
    assert torch.allclose(edited.model(photographs), ablated(model, circuit, photographs), atol=1e-6)


def test_maps_joined_along_another_axis_than_the_units_are_gated(photographs):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.upper, self.lower, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            return self.join(torch.cat([self.upper(images), self.lower(images)], dim=2)).mean((2, 3))

    model, circuit = seeded(Stacked), Circuit({"join": (1,)}, {"join": 4})
    edited = edit(model, circuit, photographs)
    assert (edited.folded, set(edited.gates)) == ((), {"join"})
    assert torch.allclose(edited.model(photographs), ablated(model, circuit, photographs), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_bias_zero_folds_and_a_mean_needs_a_gate(photographs, bias):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Flatten()))
    circuit, statistics = Circuit({"1": (2,)}, {"1": 4}), measure(model, photographs, ["1"])
    assert edit(model, circuit, photographs).folded == ("1",)
    assert edit(model, circuit, photographs, ablation="mean", reference=statistics).folded == (("1",) if bias else ())


@pytest.mark.parametrize("alias", [False, True])
def test_filters_held_by_the_network_itself_or_under_two_names_fold(photographs, alias):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            if alias:
                self.conv = nn.Conv2d(3, 4, 1)
                self.again = self.conv
            else:
                self.weight, self.bias = nn.Parameter(noise(4, 3, 1, 1)), nn.Parameter(noise(4))

        def forward(self, images: Tensor) -> Tensor:
            maps = self.again(images) if alias else nn.functional.conv2d(images, self.weight, self.bias)
            return self.act(maps).mean((2, 3))

    model, circuit = seeded(Bare), Circuit({"act": (0, 2)}, {"act": 4})
    edited = edit(model, circuit, photographs)
    assert edited.folded == ("act",)
    assert torch.allclose(edited.model(photographs), ablated(model, circuit, photographs), atol=1e-6)


def test_a_gated_module_still_takes_all_its_arguments(photographs):
    class Scaled(nn.Module):
        def forward(self, maps: Tensor, by: Tensor, *, plus: float = 0.0) -> Tensor:
            return maps * by + plus

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scaled, self.after = nn.Conv2d(3, 4, 1), Scaled(), Scaled()

        def forward(self, images: Tensor) -> Tensor:
            maps = self.scaled(self.conv(images), images.mean(), plus=1.0)
            return self.after(maps, by=images.std()).mean((2, 3))

    model = seeded(Net)
    circuit = Circuit({"scaled": (1,), "after:in": (0,)}, {"scaled": 4, "after:in": 4})
    statistics = measure(model, photographs, ["scaled"])
    only = circuit.restrict(("scaled",))
    edited = edit(model, only, photographs, ablation="mean", reference=statistics)
    expected = ablated(model, only, photographs, "mean", statistics)
    assert torch.allclose(edited.model(photographs), expected, atol=1e-6)
    before_it = circuit.restrict(("after:in",))
    edited = edit(model, before_it, photographs)
    assert torch.allclose(edited.model(photographs), ablated(model, before_it, photographs), atol=1e-6)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("ablation", ["resample", "noise", "median"])
def test_only_constants_can_be_edited_in(conv_net, photographs, ablation):
    statistics = measure(conv_net, photographs, ["3"])
    with pytest.raises(ViscircuitsError, match=rf"'{ablation}'.*zero"):
        edit(conv_net, Circuit({"3": (1,)}, {"3": 8}), photographs, ablation=ablation, reference=statistics)


def test_a_mean_needs_a_reference(conv_net, photographs):
    with pytest.raises(ViscircuitsError, match="reference"):
        edit(conv_net, Circuit({"3": (1,)}, {"3": 8}), photographs, ablation="mean")


class Several(nn.Module):
    """A convolution that runs twice, and a module that returns two maps."""

    def __init__(self):
        super().__init__()
        self.conv, self.pair = nn.Conv2d(3, 3, 1), Pair()

    def forward(self, images: Tensor) -> Tensor:
        one, two = self.pair(self.conv(self.conv(images).relu()))
        return (one * two).mean((2, 3))


class Pair(nn.Module):
    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return maps.sigmoid(), maps.tanh()


@pytest.mark.parametrize("layer", ["conv@0", "pair[1]"])
def test_one_call_of_several_or_one_element_of_a_tuple_is_refused_with_the_reason(layer, photographs):
    model = seeded(Several)
    with pytest.raises(LayerError, match="module that runs once") as error:
        edit(model, Circuit({layer: (1,)}, {layer: 3}), photographs, ablation="zero")
    assert repr(layer) in str(error.value)
    assert count_hooks(model) == 0


def test_an_edit_that_is_not_the_ablation_is_not_returned(conv_net, photographs, monkeypatch):
    monkeypatch.setattr(editing, "_make_constant", lambda *_: None)
    monkeypatch.setattr(editing, "insert_gates", lambda *_: {})
    with pytest.raises(ModelError, match="differs from the ablated one"):
        edit(conv_net, Circuit({"3": (1, 3, 5)}, {"3": 8}), photographs)


# ------------------------------------------------------------------ files


def test_saved_weights_are_the_same_bytes_twice_name_the_gates_and_load_back(tmp_path, photographs):
    model, circuit = seeded(Residual), Circuit({"act": (1, 3)}, {"act": 4})
    edited = edit(model, circuit, photographs)
    assert isinstance(edited, Edited)
    paths = [edit(model, circuit, photographs).save(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with safe_open(paths[0], framework="pt") as file:
        header = json.loads(file.metadata()["viscircuits"])
    assert header == {
        "gates": {"act": {"n_units": 4, "unit_axis": 1}},
        "ablation": "zero", "model": "Residual", "units": {"act": [1, 3]},
    }  # fmt: skip
    loaded = load_state(seeded(Residual, seed=5), paths[0]).eval()
    assert torch.equal(loaded(photographs), edited.model(photographs))


def test_a_folded_edit_loads_into_the_plain_architecture(tmp_path, conv_net, photographs):
    edited = edit(conv_net, Circuit({"3": (1, 4)}, {"3": 8}), photographs)
    path = edited.save(tmp_path / "edited.safetensors")
    assert torch.equal(load_state(conv_net, path)(photographs), edited.model(photographs))


@pytest.mark.parametrize("n_images", [1, 3])
def test_an_exported_edit_gives_the_networks_outputs_for_any_number_of_images(tmp_path, photographs, n_images):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'viscircuits[onnx]'")
    import onnxruntime

    edited = edit(seeded(Residual), Circuit({"act": (1, 3)}, {"act": 4}), photographs)
    assert edited.gates
    path = tmp_path / "new" / "edited.onnx"
    assert edited.export_onnx(path, photographs[:n_images]) < 1e-5
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (5, 1):
        (given,) = session.run(None, {"images": photographs[:n].numpy()})
        assert torch.allclose(torch.from_numpy(given), edited.model(photographs[:n]), atol=1e-6)


def test_a_network_that_cannot_be_exported_says_so_and_writes_nothing(tmp_path, photographs):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'viscircuits[onnx]'")

    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            maps = self.act(images)
            return (maps if maps.sum().item() > 0 else -maps).mean((2, 3))  # depends on values, not on shapes

    edited = edit(Fickle().eval(), Circuit({"act": (1,)}, {"act": 3}), photographs)
    with pytest.raises(ModelError, match="Fickle as ONNX"):
        edited.export_onnx(tmp_path / "edited.onnx", photographs)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_an_export_says_what_to_install(tmp_path, conv_net, photographs, monkeypatch):
    edited = edit(conv_net, Circuit({"3": (1,)}, {"3": 8}), photographs)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ViscircuitsError, match=r"onnxruntime.*viscircuits\[onnx\]"):
        edited.export_onnx(tmp_path / "edited.onnx", photographs)
    assert not list(tmp_path.iterdir())
