"""Where the units of known architectures live: default layers as data.

Default layers hold *units after the activation*: the value that the next layer reads. Removing a
unit there removes what it says, and little else. Each row of `FAMILIES` says for one family of
networks which modules those are; a new architecture is a new row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from viscircuits.gates import ungated


@dataclass(frozen=True)
class Family:
    """Networks whose units live at the same places.

    Parameters
    ----------
    name
        What people call them.
    address
        Regular expression for the whole of ``library:ARCHITECTURE``.
    layers
        Regular expressions for whole names of modules. ``:in`` behind one takes what goes into
        the module instead of what comes out. A group names the block that the module belongs
        to: of each block only the last module counts.
    units
        What the units are, for people.
    example
        The smallest member; the tests check the row on it.
    kind
        Regular expression for the class of the module, or of its block where there is one.
    """

    name: str
    address: str
    layers: tuple[str, ...]
    units: str
    example: str
    kind: str = ".*"


FAMILIES = (
    Family(
        "GoogLeNet",
        r"torchvision:googlenet",
        (r"inception\d[a-e]",),
        "outputs of the Inception blocks: four branches, each after its ReLU",
        "torchvision:googlenet",
    ),
    Family(
        "Inception v3",
        r"(torchvision|timm):inception_v3",
        (r"Mixed_\d[a-e]",),
        "outputs of the Inception blocks: branches, each after its ReLU",
        "torchvision:inception_v3",
    ),
    Family(
        "SqueezeNet",
        r"torchvision:squeezenet1_[01]",
        (r"features\.\d+",),
        "outputs of the Fire modules: two branches, each after its ReLU",
        "torchvision:squeezenet1_1",
        kind="Fire",
    ),
    Family(
        "ResNet, ResNeXt, Wide ResNet",
        r"torchvision:(resnet|resnext|wide_resnet)\d+.*",
        (r"layer\d\.\d+",),
        "outputs of the residual blocks, after the last ReLU",
        "torchvision:resnet18",
    ),
    Family(
        "ResNet and kin (timm)",
        r"timm:(legacy_)?(se|eca|sk|gc)?(resnet|resnext|resnest|wide_resnet|res2net|res2next)(?!v2).*",
        (r"layer\d\.\d+",),
        "outputs of the residual blocks, after the last activation",
        "timm:resnet10t",
    ),
    Family(
        "CLIP ResNet",
        r"open_clip:RN\d+.*",
        (r"layer\d\.\d+",),
        "outputs of the residual blocks, after the last ReLU",
        "open_clip:RN50",
    ),
    Family(
        "AlexNet, VGG",
        r"torchvision:(alexnet|vgg\d+(_bn)?)",
        (r"(?:features|classifier)\.\d+",),
        "outputs of the ReLUs",
        "torchvision:alexnet",
        kind="ReLU",
    ),
    Family(
        "VGG (timm)",
        r"timm:vgg\d+(_bn)?",
        (r"features\.\d+|pre_logits\.act\d",),
        "outputs of the ReLUs",
        "timm:vgg11",
        kind="ReLU",
    ),
    Family(
        "MobileNet v2",
        r"torchvision:mobilenet_v2",
        (r"features\.1\.conv\.0", r"features\.(?:[2-9]|1\d)\.conv\.1"),
        "expanded units after ReLU6, which each block's projection reads",
        "torchvision:mobilenet_v2",
    ),
    Family(
        "MobileNet v3",
        r"torchvision:mobilenet_v3_.*",
        (r"(features\.\d+\.block)\.\d+\.0:in",),
        "expanded units after activation and squeeze-excite, which each block's projection reads",
        "torchvision:mobilenet_v3_small",
    ),
    Family(
        "MNASNet",
        r"torchvision:mnasnet.*",
        (r"layers\.(?:[89]|1\d)\.\d+\.layers\.5",),
        "expanded units after ReLU, which each block's projection reads",
        "torchvision:mnasnet0_5",
    ),
    Family(
        "EfficientNet",
        r"torchvision:efficientnet_b\d",
        (r"(features\.\d+\.\d+\.block)\.\d+\.0:in",),
        "expanded units after SiLU and squeeze-excite, which each block's projection reads",
        "torchvision:efficientnet_b0",
    ),
    Family(
        "EfficientNet v2",
        r"torchvision:efficientnet_v2_.*",
        (r"(features\.[2-9]\.\d+\.block)\.\d+\.0:in",),
        "expanded units after SiLU (and squeeze-excite); the first stage does not expand",
        "torchvision:efficientnet_v2_s",
    ),
    Family(
        "EfficientNet-Lite, MobileNet v2 (timm)",
        r"timm:(?:(?:tf_)?efficientnet_lite\d|mobilenetv2_.*)",
        (r"blocks\.0\.\d+\.bn1", r"blocks\.[1-9]\.\d+\.bn2"),
        "expanded units after ReLU6, which each block's projection reads",
        "timm:tf_efficientnet_lite0",
    ),
    Family(
        "EfficientNet, MobileNet v3 and kin (timm)",
        r"timm:(tf_)?(efficientnet|mobilenetv3|mobilenet_edgetpu|(se)?mnasnet|mixnet|fbnetc|spnasnet|tinynet|lcnet_).*",
        (r"(blocks\.\d+\.\d+)\.conv_pwl?:in",),
        "expanded units after activation and squeeze-excite, which each block's projection reads",
        "timm:mobilenetv3_small_050",
    ),
    Family(
        "RegNet",
        r"torchvision:regnet_.*",
        (r"trunk_output\.block\d\.block\d-\d+",),
        "outputs of the residual blocks, after the last ReLU",
        "torchvision:regnet_x_400mf",
    ),
    Family(
        "DenseNet",
        r"torchvision:densenet\d+",
        (r"features\.transition\d\.relu", r"classifier:in"),
        "everything a dense block hands on, after ReLU; the last one after pooling",
        "torchvision:densenet121",
    ),
    Family(
        "DenseNet (timm)",
        r"timm:densenet\d+.*",
        (r"features\.(?:transition\d\.norm|norm5)",),
        "everything a dense block hands on, after ReLU",
        "timm:densenet121",
    ),
    Family(
        "ConvNeXt",
        r"torchvision:convnext_.*",
        (r"features\.\d+\.\d+\.block\.4",),
        "expanded units after GELU",
        "torchvision:convnext_tiny",
    ),
    Family(
        "ConvNeXt (timm)",
        r"timm:convnext.*",
        (r"stages\.\d\.blocks\.\d+\.mlp\.act",),
        "expanded units after GELU",
        "timm:convnext_atto",
    ),
    Family(
        "Vision transformer",
        r"torchvision:vit_.*",
        (r"encoder\.layers\.encoder_layer_\d+\.mlp\.1",),
        "MLP units after GELU",
        "torchvision:vit_b_32",
    ),
    Family(
        "Swin transformer",
        r"torchvision:swin_.*",
        (r"features\.\d+\.\d+\.mlp\.1",),
        "MLP units after GELU",
        "torchvision:swin_t",
    ),
    Family(
        "Swin transformer (timm)",
        r"timm:swin.*",
        (r"layers\.\d\.blocks\.\d+\.mlp\.act",),
        "MLP units after GELU",
        "timm:swin_tiny_patch4_window7_224",
    ),
    Family(
        "Gated transformers (timm)",
        r"timm:(vit|vitamin|eva02)_.*",
        (r"(blocks\.\d+\.mlp)\.fc2:in",),
        "MLP units: activated gate times value, as the projection reads them",
        "timm:eva02_tiny_patch14_224",
        kind=r".*Glu.*|.*GLU.*",
    ),
    Family(
        "ViT, DeiT, BEiT, EVA, CaiT, XCiT (timm)",
        r"timm:(vit|flexivit|deit3?|beit|beitv2|eva|eva02|cait|xcit)_.*",
        (r"blocks\.\d+\.mlp\.act",),
        "MLP units after the activation",
        "timm:vit_tiny_patch16_224",
    ),
    Family(
        "Gated CLIP transformers",
        r"open_clip:(EVA02|ViTamin).*",
        (r"(trunk\.blocks\.\d+\.mlp)\.fc2:in",),
        "MLP units: activated gate times value, as the projection reads them",
        "open_clip:EVA02-B-16",
        kind=r".*Glu.*|.*GLU.*",
    ),
    Family(
        "CLIP vision transformer",
        r"open_clip:.*",
        (r"transformer\.resblocks\.\d+\.mlp\.gelu", r"trunk\.blocks\.\d+\.mlp\.act"),
        "MLP units after GELU or QuickGELU",
        "open_clip:ViT-S-32",
    ),
    Family(
        "CLIP ConvNeXt",
        r"open_clip:convnext.*",
        (r"trunk\.stages\.\d\.blocks\.\d+\.mlp\.act",),
        "expanded units after GELU",
        "open_clip:convnext_tiny",
    ),
)


def default_layers(address: str, model: nn.Module) -> tuple[str, ...] | None:
    """Layers of a known architecture that hold its units, or None when it is not in `FAMILIES`.

    Parameters
    ----------
    address
        The architecture as ``library:NAME``.
    model
        The network whose modules are looked up; it is not run.
    """
    for family in FAMILIES:
        if re.fullmatch(family.address, address):
            layers = _layers_of(family, model)
            if layers:
                return layers
    return None


def _layers_of(family: Family, model: nn.Module) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    found: dict[str, str] = {}  # block, or the module itself → address; a later module of a block replaces an earlier
    for name in modules:
        for layer in family.layers:
            match = re.fullmatch(layer.removesuffix(":in"), name)
            if match is None:
                continue
            block = match.group(1) if match.re.groups else name
            if re.fullmatch(family.kind, type(ungated(modules[block])).__name__):
                found[block] = name + (":in" if layer.endswith(":in") else "")
    return tuple(found.values())
