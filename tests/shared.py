"""Attribution by several workers, as test_workers starts it.

`shared.py FOLDER OPTIONS` is one worker, for torchrun to start. `shared.py FOLDER SCENARIOS` plays torchrun itself: it
imports everything once and forks the workers, which saves most of the time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from viscircuits import attribute, open_images, workers, wrap
from viscircuits.errors import ViscircuitsError

LAYERS = ["1", "3", "5"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 5, 3),
        nn.ReLU(),
    ]
    return nn.Sequential(*convolutions).eval()


class Deadly(nn.Module):
    """The network in a worker that is killed at some forward pass."""

    def __init__(self, inner: nn.Module, at: int):
        super().__init__()
        self.inner, self.left = inner, at

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(images)


def to_tensor(image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((16, 16)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(16, 16, 3).permute(2, 0, 1) / 255


def work(folder: Path, options: dict) -> None:
    torch.set_num_threads(1)
    signal.alarm(50)  # no worker may outlive the test
    what, kill, until = (options.pop(each, None) for each in ("what", "kill", "until"))
    images = {
        "tensor": lambda: torch.randn(21, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "shards": lambda: open_images(str(folder / "*.tar")),
        "cut": lambda: open_images(str(folder / "*.tar"), limit=11),
        "folder": lambda: open_images(folder / "pictures"),
    }[what]()
    at = 5 if kill is not None and workers.rank() == kill else 0
    spec = wrap(Deadly(network(), at).eval(), to_tensor, [f"inner.{layer}" for layer in LAYERS])
    if until is not None:
        options["until"] = lambda attributions: attributions.n_images >= until
    try:
        found = attribute(spec, images, **options)
    except ViscircuitsError as error:
        print(f"worker {workers.rank()}: {error}", file=sys.stderr)
        sys.exit(2)
    found.save(folder / f"found-{workers.rank()}.safetensors")


def fork(folder: Path, rank: int, size: int, port: int, options: dict) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if size > 1:
            places = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in places.items()})
        work(folder, options)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(f"worker {rank}: {end.code}", file=sys.stderr)
    finally:
        if workers._joined():
            workers.dist.destroy_process_group()
        sys.stderr.flush()
        os._exit(code)


def play(folder: Path, size: int, options: dict) -> bool:
    """Start the workers; when one dies, ask the others to end, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {fork(folder, rank, size, port, dict(options)) for rank in range(size)}
    good = True
    while children:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            children.discard(child)
            if status and good:
                good = False
                for other in children:
                    os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    return good


def main(folder: Path, given: str) -> None:
    orders = json.loads(given)
    if isinstance(orders, dict):
        work(folder, orders)
        return
    for n_workers, options in orders:
        good = play(folder, n_workers, options)
        files = sorted(folder.glob("found-*"))
        same = len({file.read_bytes() for file in files}) == 1
        if files:
            files[0].rename(folder / f"result-{orders.index([n_workers, options])}.safetensors")
        for file in files[1:]:
            file.unlink()
        parts = [path.name for path in folder.glob("parts/*")]
        print(json.dumps({"good": good, "files": len(files), "same": same, "parts": parts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
