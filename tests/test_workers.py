"""Workers under torchrun share the images and find what one finds; what a dead one had done is not lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from viscircuits import workers
from viscircuits.matrices import Attributions

SCRIPT = Path(__file__).with_name("shared.py")


def play(folder: Path, *orders: tuple[int, dict]) -> tuple[list[dict], str]:
    """What became of each order, a number of workers with their options, and what was said."""
    orders = [(n, {"draws": 3, "batch_size": 2, **options}) for n, options in orders]
    ended = start(str(SCRIPT), str(folder), json.dumps(orders))
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr


def start(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def result(folder: Path, i: int) -> Attributions:
    return Attributions.load(folder / f"result-{i}.safetensors")


def assert_close(a: Attributions, b: Attributions, relative: float = 1e-6) -> None:
    for mine, other in zip(a.matrices, b.matrices, strict=True):
        for name in ("values", "signed", "variance", "draws"):
            one, two = getattr(mine, name), getattr(other, name)
            assert (one - two).abs().max() <= relative * two.abs().max(), name
    assert a.n_images == b.n_images
    assert a.provenance["images"] == b.provenance["images"]


def picture(i: int) -> bytes:
    buffer = io.BytesIO()
    colours = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
    Image.fromarray(colours.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of different sizes, and the same pictures as files."""
    i = 0
    (tmp_path / "pictures").mkdir()
    for shard, count in enumerate((5, 9, 3)):
        with tarfile.open(tmp_path / f"s{shard}.tar", "w") as tar:
            for _ in range(count):
                data = picture(i) if i != 6 else b"not a picture"
                info = tarfile.TarInfo(f"{i:03d}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                (tmp_path / "pictures" / f"{i:03d}.png").write_bytes(data)
                i += 1
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tensor", "shards", "cut", "folder"])
def test_two_workers_find_what_one_finds(what, folder):
    outcomes, said = play(folder, (1, {"what": what}), (2, {"what": what}))
    assert [outcome["files"] for outcome in outcomes] == [1, 2], said
    assert outcomes[1]["same"]  # all workers return the same
    assert_close(result(folder, 1), result(folder, 0))


@pytest.mark.slow
def test_two_workers_stop_together(folder):
    options = {"what": "tensor", "until": 12}
    outcomes, said = play(folder, (1, options), (2, options))
    assert [outcome["files"] for outcome in outcomes] == [1, 2], said
    one, two = (result(folder, i) for i in (0, 1))
    assert_close(two, one)
    assert two.provenance["stopped"] == one.provenance["stopped"] == {"looks": [8, 12], "at": 12, "stable": True}


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "then"), [(1, 1), (0, 2), (1, 3)])
def test_a_worker_that_dies_leaves_a_checkpoint_any_number_can_go_on_from(killed, then, folder):
    options = {"what": "tensor", "checkpoint": str(folder / "parts"), "checkpoint_seconds": 0}
    (alone, died, resumed), said = play(
        folder, (1, {"what": "tensor"}), (2, {**options, "kill": killed}), (then, options)
    )
    assert alone["good"] and not died["good"] and died["files"] == 0
    assert "the same call goes on from there" in said
    assert sorted(died["parts"]) == ["0000-of-0002.safetensors", "0001-of-0002.safetensors"]
    assert resumed == {"good": True, "files": then, "same": True, "parts": []}, said
    assert_close(result(folder, 2), result(folder, 0))


@pytest.mark.slow
def test_torchrun_starts_them(folder):
    options = json.dumps({"what": "shards", "draws": 3, "batch_size": 2})
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ended = start(*run, str(SCRIPT), str(folder), options)
    assert ended.returncode == 0, ended.stderr
    one, two = (Attributions.load(folder / f"found-{rank}.safetensors") for rank in (0, 1))
    assert_close(one, two, 0)
    play(folder, (1, {"what": "shards"}))
    assert_close(result(folder, 0), two)


def test_without_torchrun_there_is_one_worker(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    team = workers.team()
    assert (workers.rank(), workers.size(), workers.is_first()) == (0, 1, True)
    tensor = torch.ones(2)
    team.add_up(tensor)
    assert team.agree("x") == "x" and team.gather(3) == [3] and tensor.tolist() == [1, 1]
    assert all(team.owns(portion) for portion in range(5))
