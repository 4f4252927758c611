"""Peak memory, each measured in a process of its own that starts without anything allocated before.

A small server process imports torch once and forks a fresh child for every measurement. Where Linux lets a process
reset its high-water mark, the figure is the rise of resident memory over what stood before the work; elsewhere it is
the rise of the lifetime maximum, which is less if the network's own forward pass needed more.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from viscircuits import load_model
from ways import MAY_FAIL, WAYS, drained, evenly, recorded

N_ROWS = {"loop": 6, "vmap": 6, "captum": 1}  # as they are timed
N_OURS = 128
IMPORTED = ["torchvision", "timm", "open_clip", "captum.attr", "matplotlib.figure", "viscircuits.attribution"]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of(
    address: str, layers: tuple[str, ...] | None, index: int, shape: Sequence[int], ways: list[str]
) -> dict[str, Any]:
    """Bytes that each way takes at its peak on top of the recorded network, on one pair of layers."""
    return {way: isolated(_of_way, way, address, layers, index, shape) for way in ways}


def _of_way(way: str, address: str, layers: tuple[str, ...] | None, index: int, shape: Sequence[int]) -> int | None:
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    pair = recorded(load_model(address, weights="none"), images, layers)[index]
    rows = evenly(pair.n_targets, N_ROWS.get(way, N_OURS))
    try:
        return rise(lambda: drained(WAYS[way], pair, rows))
    except (RuntimeError, NotImplementedError, AssertionError):
        if way not in MAY_FAIL:
            raise
        return None


def isolated(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    pool = context.Pool(1, maxtasksperchild=1)
    try:
        return pool.apply(work, arguments)
    finally:
        pool.close()
        pool.join()


def rise(work: Callable[[], Any]) -> int:
    """Bytes by which this process's peak memory rises during the work."""
    before = _reset()
    work()
    return max(0, _highest() - before)


def _reset() -> int:
    with suppress(OSError):
        RESET.write_text("5")
    return _highest()


def _highest() -> int:
    if STATUS.is_file():
        line = STATUS.read_text(encoding="utf-8").partition("VmHWM:")[2]
        return int(line.split()[0]) * 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
