"""Attribution equals its definition, obeys the identities it must, and says what is wrong with its input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import oracles
from viscircuits import attribute, open_images, wrap
from viscircuits.errors import ImageError, LayerError, ModelError, ViscircuitsError
from viscircuits.hooks import activations, count_hooks
from viscircuits.matrices import CONTRASTS
from viscircuits.running import poisson_weights
from viscircuits.scores.formulas import SCORES, SUMMARIES

EVERY = [(score, summary) for score in SCORES for summary in SUMMARIES]


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


def assert_close(got: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Equal to a share of the largest entry: small entries carry the rounding of large ones."""
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    scale = expected.abs().max().clamp(min=1e-30)
    assert (got - expected).abs().max() <= relative * scale, ((got - expected).abs().max() / scale).item()


def matrix(model: nn.Module, images, layers, **options):
    (only,) = attribute(model, images, layers, **options).matrices
    return only


# ------------------------------------------------------------------ the definition


@pytest.mark.parametrize("engine", ["loop", "structured"])
@pytest.mark.parametrize("target", ["2", "3"])  # before and after its activation
def test_every_score_and_summary_equals_its_definition(engine, target, conv_net, photographs):
    images = photographs[:2, :, :8, :8]
    source = activations(conv_net, ["1"], images)["1"]
    derived = oracles.derivatives(conv_net[2 : int(target) + 1], source)
    for score, summary in EVERY:
        found = matrix(conv_net, images, ["1", target], score=score, summary=summary, engine=engine, per_image=True)
        expected = oracles.attribution(derived, score, summary)
        assert_close(found.per_image, expected)
        assert_close(found.values, expected.mean(0))
        assert_close(found.signed, oracles.attribution(derived, "signed", summary).mean(0))


def test_token_streams_are_scored_over_tokens(vit, photographs):
    layers = ["blocks.0.mlp.1", "blocks.0.mlp.2"]
    source = activations(vit, layers[:1], photographs[:2])[layers[0]]  # (image, token, unit)
    derived = oracles.derivatives(vit.blocks[0].mlp[2], source, 2, 2)
    for score, summary in EVERY:
        found = matrix(vit, photographs[:2], layers, score=score, summary=summary)
        assert_close(found.values, oracles.attribution(derived, score, summary).mean(0))


def test_attention_lies_on_the_way_between_the_units_of_two_blocks(vit, photographs):
    values = activations(vit, ["blocks.0:in", "blocks.0.attn", "blocks.0.norm2"], photographs[:1])
    before = (values["blocks.0:in"] + values["blocks.0.attn"]).detach()

    def tail(normed: Tensor) -> Tensor:
        tokens = before + vit.blocks[0].mlp(normed)
        tokens = tokens + vit.blocks[1].attn(vit.blocks[1].norm1(tokens))
        return vit.blocks[1].mlp[:2](vit.blocks[1].norm2(tokens))

    found = matrix(vit, photographs[:1], ["blocks.0.norm2", "blocks.1.mlp.1"])
    expected = oracles.attribution(oracles.derivatives(tail, values["blocks.0.norm2"], 2, 2))
    # the sum before the attention is taken in another order here than in the network
    assert_close(found.values, expected.mean(0), 1e-4)


def test_maps_can_be_the_source_of_vectors(conv_net, photographs):
    found = matrix(conv_net, photographs[:2], ["5", "8"])
    source = activations(conv_net, ["5"], photographs[:2])["5"]
    derived = oracles.derivatives(lambda maps: conv_net[6:](maps)[:, :, None], source)
    assert_close(found.values, oracles.attribution(derived).mean(0))


def test_every_adjacent_pair_has_its_matrix(conv_net, photographs):
    found = attribute(conv_net, photographs, ["5", "1", "3"])  # in any order
    assert [(m.source, m.target) for m in found.matrices] == [("1", "3"), ("3", "5")]
    assert [tuple(m.values.shape) for m in found.matrices] == [(8, 6), (5, 8)]
    alone = matrix(conv_net, photographs, ["3", "5"])
    assert_close(found.matrices[1].values, alone.values)


def test_activity_is_the_mean_norm_of_each_units_map(conv_net, photographs):
    found = attribute(conv_net, photographs, ["1", "3"], batch_size=2)
    for layer, values in activations(conv_net, ["1", "3"], photographs).items():
        assert_close(found.activity[layer], values.detach().flatten(2).norm(dim=2).mean(0))


# ------------------------------------------------------------------ captum, on networks people use


def torchvision_vit() -> nn.Module:
    vision = pytest.importorskip("torchvision.models")
    return vision.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)


def clip_tower() -> nn.Module:
    part = pytest.importorskip("open_clip.modified_resnet", reason="open_clip is not installed")
    return part.ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=2, image_size=64, width=8)


def clip_transformer() -> nn.Module:
    part = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    return part.VisionTransformer(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8)


def torchvision(name: str, **options):
    return lambda: getattr(pytest.importorskip("torchvision.models"), name)(weights=None, **options)


googlenet = torchvision("googlenet", init_weights=False, aux_logits=False)

NETWORKS = {  # network, image size, source, target, axis of units
    "googlenet": (googlenet, 32, "inception5a", "inception5b.branch4", 1),
    "googlenet, in place": (googlenet, 32, "inception3a", "inception3b.branch3.0.bn", 1),
    "resnet18": (torchvision("resnet18"), 32, "layer1.0", "layer1.1", 1),
    "resnet18, in place": (torchvision("resnet18"), 32, "layer1.0.bn1", "layer1.0.conv2", 1),
    "squeezenet1_1": (torchvision("squeezenet1_1"), 48, "features.6", "features.7.squeeze_activation", 1),
    "squeezenet1_1, in place": (torchvision("squeezenet1_1"), 48, "features.3.squeeze", "features.3.expand3x3", 1),
    "vit": (
        torchvision_vit, 32, "encoder.layers.encoder_layer_0.mlp.1", "encoder.layers.encoder_layer_1.mlp.1", 2,
    ),
    "clip resnet": (clip_tower, 64, "layer2.0.act1", "layer2.0.act2", 1),
    "clip transformer": (
        clip_transformer, 32, "transformer.resblocks.0.mlp.gelu", "transformer.resblocks.1.mlp.gelu", 2,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("name", NETWORKS)
def test_attribution_equals_captums_neuron_gradients(name):
    pytest.importorskip("captum", reason="captum is not installed: pip install 'viscircuits[oracle]'")
    make, size, source, target, axis = NETWORKS[name]
    model, image = seeded(make), noise(1, 3, size, size)
    found = matrix(model, image, [source, target], engine="loop")
    for n in sorted({0, found.values.shape[0] // 2, int(found.values.sum(1).argmax())}):
        activation, gradient = (
            t.movedim(axis, 1)[0].flatten(1)
            for t in oracles.captum_gradient(model, image, source, target, n, unit_axis=axis)
        )
        assert_close(found.values[n], activation.norm(dim=1) * gradient.norm(dim=1))
        assert_close(found.signed[n], (activation * gradient).sum(1))


# ------------------------------------------------------------------ identities


def bias_free(*widths: int) -> nn.Sequential:
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("engine", ["loop", "structured"])
def test_signed_scores_of_a_bias_free_network_add_up_to_the_target(engine):
    model, images = seeded(lambda: bias_free(3, 6, 7, 5)), noise(3, 3, 9, 9)
    for source, target in (("1", "3"), ("1", "5"), ("3", "5")):
        found = matrix(model, images, [source, target], score="signed", summary="sum", engine=engine)
        sums = activations(model, [target], images)[target].detach().sum((2, 3)).mean(0)
        assert_close(found.values.sum(1), sums)


def test_signed_scores_of_a_linear_network_are_what_removing_the_connection_takes():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 7, 3), nn.AvgPool2d(2), nn.Conv2d(7, 5, 1)))
    images = noise(3, 3, 10, 10)
    for summary in ("sum", "mean"):
        found = matrix(model, images, ["0", "3"], score="signed", summary=summary, per_image=True)
        source = activations(model, ["0"], images)["0"].detach()
        assert_close(found.per_image, oracles.removal_effect(model[1:], source, summary))


@settings(max_examples=5)
@given(st.permutations(range(6)), st.permutations(range(8)))
def test_permuting_units_permutes_the_matrix(sources, targets):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()))
    before = matrix(model, noise(2, 3, 7, 7), ["1", "3"]).values
    for tensor in (model[0].weight, model[0].bias):
        tensor.data = tensor.data[sources]
    model[2].weight.data = model[2].weight.data[targets][:, sources]
    model[2].bias.data = model[2].bias.data[targets]
    assert_close(matrix(model, noise(2, 3, 7, 7), ["1", "3"]).values, before[targets][:, sources])


@pytest.mark.parametrize("engine", ["loop", "structured"])
def test_batch_size_and_order_of_images_change_nothing(engine, conv_net, photographs):
    one = attribute(conv_net, photographs, ["1", "3", "5"], batch_size=5, engine=engine)
    for other in (
        attribute(conv_net, photographs, ["1", "3", "5"], batch_size=1, engine=engine),
        attribute(conv_net, photographs, ["1", "3", "5"], batch_size=2, engine=engine),
        attribute(conv_net, photographs.flip(0), ["1", "3", "5"], batch_size=3, engine=engine),
        attribute(conv_net, list(photographs), ["1", "3", "5"], engine=engine),
        attribute(conv_net, photographs.split(2), ["1", "3", "5"], engine=engine),
    ):
        for a, b in zip(one.matrices, other.matrices, strict=True):
            assert_close(b.values, a.values, 1e-6)
            assert_close(b.signed, a.signed, 1e-6)


def test_scores_of_images_average_to_the_score_in_their_order(conv_net, photographs):
    found = matrix(conv_net, photographs, ["1", "3"], per_image=True, batch_size=2)
    assert found.per_image.shape == (5, 8, 6)
    assert_close(found.per_image.mean(0), found.values, 1e-6)
    for i, image in enumerate(photographs):
        assert_close(matrix(conv_net, image[None], ["1", "3"]).values, found.per_image[i], 1e-6)


def test_a_score_is_homogeneous_in_the_images_of_a_bias_free_network():
    model, images = seeded(lambda: bias_free(3, 4, 5)), noise(2, 3, 6, 6)
    once, thrice = (matrix(model, factor * images, ["1", "3"]).values for factor in (1, 3))
    assert_close(thrice, 3 * once)


@pytest.mark.parametrize("engine", ["loop", "structured"])
@pytest.mark.parametrize(("score", "summary"), EVERY)
def test_a_silent_target_scores_zero_never_nan(score, summary, engine, conv_net, photographs):
    conv_net[2].bias.data[3] = -1e4  # its ReLU never opens
    found = matrix(conv_net, photographs, ["1", "3"], score=score, summary=summary, engine=engine)
    assert found.values[3].abs().max() == 0 and found.signed[3].abs().max() == 0
    assert found.values.abs().sum() > 0 and torch.isfinite(found.values).all()


def test_a_silent_source_scores_zero_unless_only_gradients_count(conv_net, photographs):
    conv_net[0].bias.data[2] = -1e4
    for score in ("cla", "grad-x-act", "signed"):
        assert matrix(conv_net, photographs, ["1", "3"], score=score).values[:, 2].abs().max() == 0
    assert matrix(conv_net, photographs, ["1", "3"], score="gradient").values[:, 2].max() > 0


def test_unsigned_scores_are_never_negative_and_cla_bounds_the_others(conv_net, photographs):
    of = {score: matrix(conv_net, photographs, ["1", "3"], score=score).values for score in SCORES}
    assert min(of[score].min() for score in ("cla", "grad-x-act", "gradient")) >= 0 > of["signed"].min()
    assert (of["signed"].abs() <= of["grad-x-act"] + 1e-6).all()
    assert (of["grad-x-act"] <= of["cla"] + 1e-6).all()  # Cauchy and Schwarz


class Bypass(nn.Module):
    """Half of the target's units come from the source, the others straight from the images."""

    def __init__(self):
        super().__init__()
        self.source, self.after, self.around = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(3, 3, 1)
        self.target = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.target(torch.cat([self.after(self.source(images)), self.around(images)], 1)).mean((2, 3))


@pytest.mark.parametrize("engine", ["loop", "structured"])
def test_targets_that_bypass_the_source_get_zeros(engine):
    found = matrix(seeded(Bypass), noise(2, 3, 5, 5), ["source", "target"], engine=engine)
    assert found.values[:2].min() > 0 and found.values[2:].abs().max() == 0


# ------------------------------------------------------------------ the state of the network


def test_the_network_is_left_as_it_was_found(conv_net, photographs):
    conv_net.train()
    conv_net[4].eval()
    state = {name: value.clone() for name, value in conv_net.state_dict().items()}
    flags = [module.training for module in conv_net.modules()]
    attribute(conv_net, photographs, ["1", "3"])
    with pytest.raises(LayerError):
        attribute(conv_net, photographs, ["1", "nowhere"])
    assert [module.training for module in conv_net.modules()] == flags
    assert all(torch.equal(conv_net.state_dict()[name], value) for name, value in state.items())
    assert count_hooks(conv_net) == 0
    assert all(p.grad is None for p in conv_net.parameters())


def test_surroundings_do_not_matter(photographs):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(), nn.Conv2d(4, 5, 3))

    plain = matrix(seeded(make), photographs, ["2", "4"]).values
    frozen = seeded(make).requires_grad_(False)
    for engine in ("loop", "structured"):
        assert_close(matrix(frozen, photographs, ["2", "4"], engine=engine).values, plain, 1e-6)
    assert torch.equal(matrix(seeded(make).train(), photographs, ["2", "4"]).values, plain)
    with torch.no_grad():
        assert torch.equal(matrix(seeded(make), photographs, ["2", "4"]).values, plain)
    model = seeded(make)
    with torch.inference_mode():
        assert torch.equal(matrix(model, photographs.clone(), ["2", "4"]).values, plain)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_other_precisions_give_the_same_numbers_to_their_precision(dtype, relative, engine, conv_net, photographs):
    expected = matrix(conv_net, photographs, ["1", "3"]).values
    assert_close(matrix(conv_net.to(dtype), photographs, ["1", "3"], engine=engine).values, expected, relative)


def test_a_value_changed_in_place_afterwards_is_scored_as_it_was(photographs):
    def make(inplace: bool):
        return lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 5, 3), nn.ReLU(inplace))

    for layers in (["0", "2"], ["0", "3"], ["1", "2"]):
        in_place, plain = (matrix(seeded(make(flag)), photographs, layers).values for flag in (True, False))
        assert torch.equal(in_place, plain)


# ------------------------------------------------------------------ reference and contrast


def test_the_reference_is_scored_as_the_concept_is(conv_net, photographs):
    others = noise(3, 3, 16, 16, seed=2)
    found = attribute(conv_net, photographs, ["1", "3"], reference=others, per_image=True)
    alone = attribute(conv_net, others, ["1", "3"], per_image=True)
    assert torch.equal(found.reference.matrices[0].per_image, alone.matrices[0].per_image)
    assert torch.equal(found.matrices[0].values, matrix(conv_net, photographs, ["1", "3"]).values)
    assert (found.n_images, found.reference.n_images) == (5, 3)
    assert found.provenance["reference"]["n"] == 3
    difference = found.contrast("difference").matrices[0].values
    assert torch.equal(difference, found.matrices[0].values - alone.matrices[0].values)
    ratio = found.contrast("ratio").matrices[0].values
    other = alone.matrices[0].values
    assert_close(ratio, found.matrices[0].values / (other + other.mean()))


# ------------------------------------------------------------------ rows, spread and replicates


@pytest.mark.parametrize("engine", ["loop", "structured"])
def test_only_the_rows_asked_for_are_computed(engine, conv_net, photographs):
    options = {"engine": engine, "per_image": True, "draws": 2, "batch_size": 2}
    whole = attribute(conv_net, photographs, ["1", "3", "5"], **options).matrices
    part = attribute(conv_net, photographs, ["1", "3", "5"], targets={"3": [6, 1, 6]}, **options).matrices
    rows, others = [1, 6], [0, 2, 3, 4, 5, 7]
    for name in ("values", "signed", "variance", "per_image", "draws"):
        assert_close(getattr(part[0], name)[..., rows, :], getattr(whole[0], name)[..., rows, :], 1e-6)
        assert getattr(part[0], name)[..., others, :].isnan().all()
        assert_close(getattr(part[1], name), getattr(whole[1], name), 1e-6)


def test_the_variance_is_that_of_the_scores_of_single_images(conv_net, photographs):
    found = matrix(conv_net, photographs, ["1", "3"], per_image=True)
    assert_close(found.variance, found.per_image.var(0))
    assert matrix(conv_net, photographs[:1], ["1", "3"]).variance is None


def test_a_replicate_counts_images_by_poisson_weights(conv_net, photographs):
    found = matrix(conv_net, photographs, ["1", "3"], per_image=True, draws=4, seed=7, batch_size=2)
    weights = poisson_weights(7, 0, range(5), 4).T.float()  # (draw, image)
    expected = torch.einsum("di,its->dts", weights, found.per_image) / weights.sum(1)[:, None, None]
    assert_close(found.draws, expected)
    for other in (1, 5):
        assert_close(matrix(conv_net, photographs, ["1", "3"], draws=4, seed=7, batch_size=other).draws, found.draws)
    assert not torch.equal(matrix(conv_net, photographs, ["1", "3"], draws=4, seed=8).draws, found.draws)


def test_a_replicate_has_its_own_contrast(conv_net, photographs):
    found = attribute(conv_net, photographs, ["1", "3"], reference=noise(3, 3, 16, 16, seed=2), draws=3)
    assert found.n_draws == 3 and found.draw(0).n_draws == 0
    for how in ("none", "difference", "ratio"):
        for i in range(3):
            one = found.draw(i).contrast(how).matrices[0].values
            draws = (part.matrices[0].draws[i] for part in (found, found.reference))
            assert torch.equal(one, CONTRASTS[how](*draws))
        assert found.contrast(how).n_draws == (3 if how == "none" else 0)
    with pytest.raises(ViscircuitsError, match="no bootstrap draw 3: there are 3"):
        found.draw(3)


def test_looking_stops_as_soon_as_it_is_enough(conv_net):
    images, others = noise(40, 3, 16, 16), noise(10, 3, 16, 16, seed=2)
    seen = []

    def until(known) -> bool:
        seen.append((known.n_images, known.reference.n_images))
        return known.n_images >= 18

    found = attribute(conv_net, images, ["1", "3"], reference=others, until=until)
    assert seen == [(8, 8), (12, 10), (18, 10)]
    assert found.provenance["stopped"] == {"looks": [8, 12, 18], "at": 18, "stable": True}
    expected = attribute(conv_net, images[:18], ["1", "3"], reference=others)
    assert_close(found.matrices[0].values, expected.matrices[0].values, 1e-6)
    never = attribute(conv_net, images[:10], ["1", "3"], until=lambda known: False)
    assert never.provenance["stopped"] == {"looks": [8, 10], "at": 10, "stable": False}


def test_a_memory_budget_changes_nothing_but_the_memory(conv_net, photographs):
    plain = matrix(conv_net, photographs, ["1", "3"]).values
    assert_close(matrix(conv_net, photographs, ["1", "3"], memory="512M").values, plain, 1e-6)
    with pytest.raises(ViscircuitsError, match=r"budget of 10M cannot hold the sums .* give at least \d+M"):
        attribute(conv_net, photographs, ["1", "3"], memory=10 * 2**20)


# ------------------------------------------------------------------ what made it


def test_provenance_is_complete_and_plain(conv_net, photographs):
    found = attribute(conv_net, photographs, ["1", "3"], score="signed", summary="mean", reference=photographs[:2])
    provenance = json.loads(json.dumps(found.provenance))
    assert provenance == found.provenance  # no tuple, no tensor
    assert provenance["model"] == "Sequential"
    assert (provenance["score"], provenance["summary"], provenance["layers"]) == ("signed", "mean", ["1", "3"])
    (engine,) = provenance["engines"]
    assert engine.pop("seconds") > 0
    assert engine == {"source": "1", "target": "3", "engine": "structured", "left": []}
    assert provenance["images"]["n"] == 5 and len(provenance["images"]["names"]) == 5
    assert set(provenance["versions"]) >= {"viscircuits", "torch", "torchvision", "python"}


def test_digests_tell_weights_and_images_apart(conv_net, photographs):
    def digests():
        p = attribute(conv_net, photographs, ["1", "3"]).provenance
        return p["weights"], p["images"]["digest"]

    before = digests()
    assert digests() == before
    photographs[0, 0, 0, 0] += 1
    assert digests()[0] == before[0] and digests()[1] != before[1]
    conv_net[0].bias.data += 1
    assert digests()[0] != before[0]


def test_pictures_go_through_the_models_transform(conv_net, tmp_path):
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 10, 40)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")

    def transform(image: Image.Image) -> Tensor:
        pixels = torch.frombuffer(bytearray(image.resize((16, 16)).tobytes()), dtype=torch.uint8)
        return pixels.reshape(16, 16, 3).permute(2, 0, 1) / 255

    spec = wrap(conv_net, transform, ["1", "3"], address="mine")
    found = attribute(spec, open_images(tmp_path))
    colours = torch.stack([torch.tensor([80.0 * i, 10, 40]) for i in range(3)]) / 255
    expected = matrix(conv_net, colours[:, :, None, None].expand(-1, -1, 16, 16), ["1", "3"])
    assert_close(found.matrices[0].values, expected.values)
    assert found.layers == ("1", "3") and found.n_images == 3
    assert found.provenance["model"] == "mine"
    assert found.provenance["images"]["names"] == ["0.png", "1.png", "2.png"]
    assert [name for name, _ in found.provenance["images"]["skipped"]] == ["broken.png"]


def test_progress_is_shown_only_when_asked_for(conv_net, photographs, capsys, monkeypatch):
    from viscircuits import attribution

    shown = []
    quick = attribution.tqdm
    monkeypatch.setattr(attribution, "tqdm", lambda **o: shown.append(o) or quick(**{**o, "delay": 0}))
    attribute(conv_net, photographs, ["1", "3"])
    assert [options["disable"] for options in shown] == [True]
    assert capsys.readouterr() == ("", "")
    attribute(conv_net, photographs, ["1", "3"], progress=True)
    assert shown[1]["total"] == 5 * 8
    captured = capsys.readouterr()
    assert captured.out == "" and "attribution, concept" in captured.err and "40.0/40.0" in captured.err
    attribute(conv_net, list(photographs), ["1", "3"], progress=True)
    assert shown[2]["total"] is None  # a list may hold batches


# ------------------------------------------------------------------ what cannot be attributed


class Detached(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), how

    def forward(self, images: Tensor) -> Tensor:
        return self.b(self.how(self.a, images))


def without_gradients(part: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return part(images)


@pytest.mark.parametrize("engine", ["loop", "structured", "auto"])
@pytest.mark.parametrize("how", [without_gradients, lambda part, images: part(images).detach()])
def test_a_path_without_gradients_is_an_error_not_zeros(how, engine, photographs):
    with pytest.raises(LayerError, match="no gradient"):
        attribute(seeded(lambda: Detached(how)), photographs, ["a", "b"], engine=engine)


def test_layers_without_a_path_are_an_error(photographs):
    with pytest.raises(LayerError, match="no path leads from layer 'after' to layer 'around'"):
        attribute(seeded(Bypass), photographs, ["after", "around"])


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"layers": ["1"]}, "at least two layers, got 1"),
        ({"layers": ["1", "nowhere"]}, "no layer 'nowhere' in Sequential"),
        ({"layers": ["1", "1"]}, "are the same tensor"),
        ({"score": "cross-layer"}, "no score 'cross-layer'. Choose one of cla, grad-x-act, signed, gradient"),
        ({"summary": "men"}, "no summary 'men'. Did you mean 'mean'"),
        ({"engine": "fast"}, "no engine 'fast'..*Choose one of auto, loop, structured"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"draws": -1}, "draws and seed are whole numbers from 0, got -1"),
        ({"dtype": torch.int8}, "dtype must be a floating-point type .*got torch.int8"),
        ({"memory": "much"}, "a number of bytes, or a text such as 512M or 2G; got 'much'"),
        ({"targets": {"1": [0]}}, "targets are wanted in '1', which is no target layer here.*There are 3"),
        ({"targets": {"3": [8]}}, "targets name unit 8 of '3', which has units 0 to 7"),
    ],
)
def test_wrong_options_are_named(options, wrong, conv_net, photographs):
    with pytest.raises(ViscircuitsError, match=wrong.replace("[", r"\[")):
        attribute(conv_net, photographs, **{"layers": ["1", "3"], **options})


@pytest.mark.parametrize("engine", ["loop", "structured"])
@pytest.mark.parametrize("where", [0, 2])
def test_nan_weights_are_an_error_that_names_the_layers(where, engine, conv_net, photographs):
    conv_net[where].weight.data[1, 0, 0, 0] = math.nan
    with pytest.raises(ModelError, match=r"from '1' to '3' is not finite .*look for NaN in its weights"):
        attribute(conv_net, photographs, ["1", "3"], engine=engine)


def test_an_empty_set_is_an_error(conv_net, photographs):
    for empty in (photographs[:0], []):
        with pytest.raises(ImageError, match="no image was given"):
            attribute(conv_net, empty, ["1", "3"])
    with pytest.raises(ImageError, match="no image was given"):
        attribute(conv_net, photographs, ["1", "3"], reference=photographs[:0])


def test_images_that_can_be_read_once_are_refused(conv_net, photographs):
    stream = (image for image in photographs)
    with pytest.raises(ImageError, match="generator can be read only once"):
        attribute(conv_net, stream, ["1", "3"])
    assert len(list(stream)) == 5  # and not touched
    again = type("Set", (), {"__iter__": lambda self: iter(photographs)})()
    assert_close(matrix(conv_net, again, ["1", "3"]).values, matrix(conv_net, photographs, ["1", "3"]).values)


def test_images_that_do_not_fit_the_network_are_an_error(conv_net, photographs):
    with pytest.raises(ModelError, match="cannot run on images of shape"):
        attribute(conv_net, photographs[:, :1], ["1", "3"])
    with pytest.raises(ImageError, match=r"an image tensor is \(N, C, H, W\)"):
        attribute(conv_net, photographs[0], ["1", "3"])
    assert count_hooks(conv_net) == 0


# ------------------------------------------------------------------ memory


MEASURE = """
import sys, torch
from torch import nn
from viscircuits import attribute

def status(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 1024

class Stream:
    def __init__(self, n):
        self.n = n
    def __iter__(self):
        g = torch.Generator().manual_seed(0)
        for _ in range(self.n):
            yield torch.randn(3, size, size, generator=g)

torch.set_num_threads(1)
n, size, width, memory = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
wide = [nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), *wide).eval()
with torch.no_grad():
    model(torch.randn(1, 3, size, size))
before = status("VmRSS")
attribute(model, Stream(n), ["1", "3", "5"], memory=None if memory == "-" else memory, batch_size=8, draws=2)
print(before, status("VmHWM"))
"""


def peak(n: int, size: int, width: int, memory: str) -> tuple[float, float]:
    """Mebibytes the process has, and has at most, before and while images are attributed."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here: peak memory is not measured")
    command = [sys.executable, "-c", MEASURE, str(n), str(size), str(width), memory]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    before, most = map(float, ended.stdout.split())
    return before, most


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_images():
    (_, few), (_, many) = peak(50, 16, 12, "-"), peak(1000, 16, 12, "-")
    assert many <= 1.1 * few


@pytest.mark.slow
@pytest.mark.parametrize("budget", [384, 768])
def test_a_memory_budget_is_obeyed(budget):
    before, most = peak(3, 128, 64, f"{budget}M")
    assert most - before <= budget
