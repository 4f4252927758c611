"""What every test may ask for: small seeded networks, and the data beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from browser import browser, open_live, open_page, open_served, page  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")
torch.set_num_threads(1)  # tiny networks gain nothing from more, and a busy machine loses much


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The photographs kept beside the checkout, never in it."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "imagenet-sample").is_dir():
        pytest.skip("no ../shared/data/imagenet-sample beside the repository: photographs are not committed")
    return folder


@pytest.fixture
def conv_net() -> nn.Sequential:
    """A seeded convolutional classifier: three ReLU maps of 6, 8 and 5 units, four classes, 16×16 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 5, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 4),
        )
    return net.eval()


@pytest.fixture
def vit() -> nn.Module:
    """A seeded vision transformer: two blocks over sixteen patches and a class token, eight MLP units each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TinyViT(width=6, hidden=8, n_blocks=2, n_classes=4)
    return net.eval()


@pytest.fixture
def photographs() -> Tensor:
    """Five seeded images, (5, 3, 16, 16), as a model's transform would give them."""
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Single-head self-attention, written with functions so that no submodule sees its insides."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value))


class Block(nn.Module):
    """A pre-norm transformer block whose MLP units live after `mlp.1`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class TinyViT(nn.Module):
    """Patches of 4×4 pixels, a class token in front, a linear head on it."""

    def __init__(self, width: int, hidden: int, n_blocks: int, n_classes: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*[Block(width, hidden) for _ in range(n_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (image, token, width)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])
