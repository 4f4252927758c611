"""How fast attribution is, each way of computing it beside the others, in one run on the same tensors.

    python benchmarks/speed.py [--networks googlenet,resnet18] [--quick] [--repeats 3] [--resume] [--out docs]

1. Each network gets random weights (they do not matter for speed) and seeded noise as images, and is recorded once.
2. For each pair of neighbouring layers every way computes rows of the same matrix, the ways in turn so that noise
   hits all alike. Medians are scaled from the rows computed to the whole matrix; how many were computed is kept.
3. Numbers are compared with the loop's, operations are counted, one pass is profiled, and between pairs the
   speed of a plain matrix product is taken: the peak that the shares refer to.
4. Memory and growth are measured in processes of their own (`memory.py`, `growth.py`).
5. After each network everything is written to `benchmarks.json`, from which `report.py` makes the page and its plots.
   A network that is run again replaces its own entry alone; `--resume` skips those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import growth
import memory
import report
from bound import bound
from viscircuits import AttributionMatrix, Attributions, attribute, load_model, select
from viscircuits.models import ModelSpec
from ways import MAY_FAIL, WAYS, Pair, by_structure, drained, evenly, gathered, reads_only_source, recorded

ROOT = Path(__file__).resolve().parent.parent
FILE, FORMAT = "benchmarks.json", 1
CIRCUIT = 0.10  # share of units in the circuits whose overlap is reported
N_FEW, N_MORE = 12, 48  # rows of the runs that tell how many can be afforded; more where they are quick
PROBE_SECONDS = 0.5
Numbers = tuple[Tensor, Tensor]  # scores and signed contributions, (image, row, source)
PRODUCTS = ("mm", "conv", "linear", "scaled_dot_product")
POOLS = ("pool",)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # not known to the counter


@dataclass(frozen=True)
class Network:
    """A network of the table: its address, and its layers where the default ones are not meant."""

    title: str
    address: str
    layers: tuple[str, ...] | None = None
    batch: int = 1  # images at once: what `attribute` takes by default


INCEPTIONS = tuple(f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"))
NETWORKS = {
    "googlenet": Network("GoogLeNet", "torchvision:googlenet", ("conv1", "conv2", "conv3", *INCEPTIONS, "fc")),
    "squeezenet": Network("SqueezeNet 1.1", "torchvision:squeezenet1_1"),
    "lite0": Network("EfficientNet-Lite0", "timm:tf_efficientnet_lite0"),
    "resnet18": Network("ResNet-18", "torchvision:resnet18"),
    "resnet50": Network("ResNet-50", "torchvision:resnet50"),
    "vit_small": Network("ViT-S/16", "timm:vit_small_patch16_224"),
    "clip_rn50": Network("CLIP RN50, visual tower", "open_clip:RN50"),
}
QUICK = {
    "squeezenet": Network("SqueezeNet 1.1", "torchvision:squeezenet1_1", ("features.3", "features.4", "features.6"), 2),
    "resnet18": Network("ResNet-18", "torchvision:resnet18", ("layer1.0", "layer1.1"), 2),
}


@dataclass(frozen=True)
class Settings:
    """How much is measured. `seconds` is what one way may take on one network, all repeats together."""

    repeats: int = 3
    seconds: float = 45.0
    loop_rows: int = 6
    captum_rows: int = 2
    size: int | None = None  # of the images; None: the network's own
    memory: tuple[str, ...] = tuple(WAYS)


# ------------------------------------------------------------------ one pair of layers


def measure_pair(pair: Pair, settings: Settings, seconds: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is known about a pair afterwards, and the mean matrices of the two precisions."""
    n = pair.n_targets
    rows = affordable(pair, seconds / (3 + settings.repeats))  # counted, profiled, compared; then the repeats
    profile = profiled(pair, rows)
    few = rows[evenly(len(rows), settings.loop_rows)]
    captum = few[evenly(len(few), settings.captum_rows)]
    asked = {"loop": few, "vmap": few, "captum": captum, "float32": rows, "bfloat16": rows}
    asked = {way: asked[way] for way in ways_here(asked)}
    values, failed = first_run(pair, asked)
    asked = {way: each for way, each in asked.items() if way not in failed}
    times: dict[str, list[float]] = {way: [] for way in asked}
    for _ in range(settings.repeats):
        for way, each in asked.items():
            times[way].append(seconds_of(lambda way=way, each=each: drained(WAYS[way], pair, wanted(each, n))))
    entry = {
        "source": pair.source_layer.address,
        "target": pair.target_layer.address,
        "n_sources": pair.source_layer.n_units,
        "n_targets": n,
        "rows": {way: len(each) for way, each in asked.items()},
        "seconds": {way: median(times[way]) * n / len(each) for way, each in asked.items()},
        "error": {way: error_of(way, values, asked) for way in asked if way != "loop"},
        "failed": failed,
        "captum": "module" if reads_only_source(pair) else "network",
        "flops": {
            "loop": operations_of(lambda: drained(WAYS["loop"], pair, few[:1])) * n,
            "float32": profile["flops"] * n / profile["rows"],
            "bound": bound(pair),
        },
        "profile": profile,
        "left": profile["left"],
    }
    matrices = {way: values[way][0].mean(0) for way in ("float32", "bfloat16") if way in values}
    return entry, {"rows": rows, **matrices}


def affordable(pair: Pair, seconds: float) -> Tensor:
    """Rows for our own ways: all if, by an estimate, they fit the time, else as many as do, spread evenly."""
    n = pair.n_targets
    few, more = evenly(n, N_FEW), evenly(n, N_MORE)
    drained(WAYS["float32"], pair, few)  # the first run of a shape pays for its kernels
    fixed, each = 0.0, seconds_of(lambda: drained(WAYS["float32"], pair, few)) / len(few)
    if each * len(more) < PROBE_SECONDS and len(more) > len(few):
        of_more = seconds_of(lambda: drained(WAYS["float32"], pair, more))
        slope = max((of_more - each * len(few)) / (len(more) - len(few)), of_more / len(more) / 4)
        fixed, each = max(0.0, of_more - slope * len(more)), slope
    return evenly(n, n if fixed + each * n <= seconds else max(N_FEW, int((seconds - fixed) / each)))


def wanted(rows: Tensor, n: int) -> Tensor | None:
    """The rows to ask an engine for; None says all."""
    return None if len(rows) == n else rows


def first_run(pair: Pair, asked: dict[str, Tensor]) -> tuple[dict[str, Numbers], dict[str, str]]:
    """Each way once, untimed: its numbers, and for what fails the reason."""
    found = {way: attempted(way, pair, rows) for way, rows in asked.items()}
    values = {way: each for way, each in found.items() if not isinstance(each, str)}
    return values, {way: each for way, each in found.items() if isinstance(each, str)}


def attempted(way: str, pair: Pair, rows: Tensor) -> Numbers | str:
    """A way's numbers, or why it has none: vmap and captum do not take every network."""
    try:
        return gathered(WAYS[way], pair, wanted(rows, pair.n_targets))
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        if way not in MAY_FAIL:
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def error_of(way: str, values: dict[str, Numbers], asked: dict[str, Tensor]) -> float:
    """Largest difference from the loop on rows that both computed, relative to the loop's largest score."""
    which = 1 if way == "captum" else 0  # captum gives contributions alone
    plain = values["loop"][which]
    mine = values[way][which][:, torch.isin(asked[way], asked["loop"])]
    difference = mine - plain[:, torch.isin(asked["loop"], asked[way])]
    return float(difference.abs().max() / plain.abs().max())


class Clock(TorchDispatchMode):
    """Seconds inside products and convolutions, and inside pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = {"products": 0.0, "pooling": 0.0}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        kind = "products" if _has(name, PRODUCTS) else "pooling" if _has(name, POOLS) else None
        if kind:
            self.spent[kind] += time.perf_counter() - start
        return result


def _has(name: str, words: Iterable[str]) -> bool:
    return any(word in name for word in words)


def profiled(pair: Pair, rows: Tensor) -> dict[str, Any]:
    """Where our float32 time goes: seconds of products and convolutions, of pooling, of the rest.

    Also the operations of these rows, and those of the network that had no rule and were left to autograd.
    """
    asked, left = wanted(rows, pair.n_targets), set[str]()
    with Clock() as clock:
        whole = seconds_of(lambda: drained(WAYS["float32"], pair, asked))
    flops = operations_of(lambda: drained(partial(by_structure, left=left), pair, asked))
    rest = whole - sum(clock.spent.values())
    return {**clock.spent, "rest": rest, "flops": flops, "rows": len(rows), "left": sorted(left)}


def operations_of(work: Callable[[], Any]) -> int:
    """Floating-point operations of products and convolutions, two a multiply-add."""
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: _attention_backward}) as counter:
        work()
    return counter.get_total_flops()


def _attention_backward(grad_shape: Any, query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


# ------------------------------------------------------------------ one network


def measure(network: Network, settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    spec = load_model(network.address, weights="none")
    open_blocks(spec.model)
    images = noise(spec, network.batch, settings)
    pairs = recorded(spec, images, network.layers)
    entries, found, peaks = [], [], []
    for pair in pairs:
        peaks.append(peak())
        entry, matrices = measure_pair(pair, settings, settings.seconds / len(pairs))
        entries.append(entry)
        found.append(matrices)
        say(line_of(entry))
    per_image = sum(entry["seconds"]["float32"] for entry in entries) / network.batch
    return {
        "title": network.title,
        "address": network.address,
        "batch": network.batch,
        "settings": asdict(settings),
        "image": list(images.shape[1:]),
        "machine": machine(),
        "peak": {name: median(each[name] for each in peaks) for name in peaks[0]},
        "pairs": entries,
        "overlap": overlap(pairs, found),
        "public": through_attribute(spec, images, network.layers, per_image),
        "memory": memory.of(network.address, network.layers, len(pairs) // 2, images.shape, ways_here(settings.memory)),
    }


def open_blocks(model: nn.Module) -> None:
    """Some networks are born with the last norm of each residual block at zero, through which nothing would flow."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and not module.weight.any():
            nn.init.ones_(module.weight)


def ways_here(ways: Iterable[str]) -> list[str]:
    return [way for way in ways if way != "bfloat16" or has_bfloat16()]


def noise(spec: ModelSpec, batch: int, settings: Settings) -> Tensor:
    size = (settings.size, settings.size) if settings.size else spec.example().shape[-2:]
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def overlap(pairs: list[Pair], found: list[dict[str, Tensor]]) -> dict[str, Any] | None:
    """Jaccard index of the circuits selected from the two precisions, among the rows that were computed."""
    if not all("bfloat16" in each for each in found):
        return None
    chosen = {}
    for dtype in ("float32", "bfloat16"):
        matrices, sources = [], torch.arange(pairs[0].source_layer.n_units)
        for pair, each in zip(pairs, found, strict=True):
            values = each[dtype][:, sources]
            matrices.append(
                AttributionMatrix(pair.source_layer.address, pair.target_layer.address, values, values.clone())
            )
            sources = each["rows"]
        circuit = select(Attributions(tuple(matrices), {}, 1), CIRCUIT, bound_steps=1)
        chosen[dtype] = set(circuit.units)
    both = chosen["float32"] & chosen["bfloat16"]
    units = sum(len(each["rows"]) for each in found), sum(pair.n_targets for pair in pairs)
    return {"jaccard": len(both) / len(chosen["float32"] | chosen["bfloat16"]), "rows": units[0], "of": units[1]}


def through_attribute(
    spec: ModelSpec, images: Tensor, layers: tuple[str, ...] | None, per_image: float
) -> dict[str, Any] | None:
    """The same network through `viscircuits.attribute`; None where even one image would take a minute."""
    n_images = len(images) if per_image * len(images) < 20 else 1
    if per_image * n_images > 60:
        return None
    seconds = seconds_of(lambda: attribute(spec, images[:n_images], layers))
    return {"seconds": seconds / n_images, "n_images": n_images}


def line_of(entry: dict[str, Any]) -> str:
    times = entry["seconds"]
    each = "  ".join(f"{way} {seconds:.2f}" for way, seconds in times.items())
    ratio, error = times["loop"] / times["float32"], entry["error"]["float32"]
    return f"{entry['source']:>20} → {entry['target']:20} {each}  {ratio:.1f}×  error {error:.0e}"


# ------------------------------------------------------------------ the machine


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak() -> dict[str, float]:
    """Operations a second of a 2048×1024×1024 matrix product, median of nine, in each precision."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        if dtype is torch.float32 or has_bfloat16():
            torch.mm(a, b)
            times = [seconds_of(lambda a=a, b=b: torch.mm(a, b)) for _ in range(9)]
            rates[str(dtype).removeprefix("torch.")] = 2 * 2048 * 1024 * 1024 / median(times)
    return rates


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere it is emulated and says nothing."""
    return bool({"amx_bf16", "avx512_bf16"} & processor_flags())


def processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(text.partition("flags")[2].partition("\n")[0].split())


def machine() -> dict[str, Any]:
    """The machine in words: what decides speed, and nothing that names it."""
    known = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [words for flag, words in known.items() if flag in processor_flags()],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ------------------------------------------------------------------ the run


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    networks = QUICK if options.quick else NETWORKS
    settings = Settings(repeats=options.repeats, seconds=options.seconds)
    if options.quick:
        settings = replace(settings, size=64, seconds=2.0, memory=("loop", "float32"))
    results = read(options.out / FILE)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    for name in options.networks or networks:
        if options.resume and name in results["networks"]:
            continue
        say(networks[name].title)
        results["networks"][name] = measure(networks[name], settings, say)
        write(results, options.out, list(NETWORKS))
    if options.growth and not (options.resume and results["growth"]):
        say("growth")
        results["growth"] = growth.measure(options.quick)
        write(results, options.out, list(NETWORKS))
    say(f"written to {options.out.name}/benchmarks.md")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", help="some of " + ",".join(NETWORKS), type=lambda text: text.split(","))
    parser.add_argument("--quick", action="store_true", help="two small networks, under a minute: does it run?")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way")
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="that one way may take on one network, repeats and all"
    )
    parser.add_argument("--resume", action="store_true", help="skip what benchmarks.json holds already")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="leave the growth curves as they are")
    parser.add_argument("--out", type=Path, help="folder of benchmarks.json, .md and img/ (docs; build if quick)")
    options = parser.parse_args(arguments)
    options.out = options.out or ROOT / ("build" if options.quick else "docs")
    known = QUICK if options.quick else NETWORKS
    if unknown := set(options.networks or ()) - set(known):
        parser.error(f"no network {', '.join(sorted(unknown))} here; choose from {', '.join(known)}")
    return options


def read(path: Path) -> dict[str, Any]:
    """What an earlier run left, unless it was written in another format."""
    empty = {"format": FORMAT, "networks": {}, "growth": {}}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else empty
    return kept if kept.get("format") == FORMAT else empty


def write(results: dict[str, Any], folder: Path, order: list[str]) -> None:
    results["networks"] = {name: results["networks"][name] for name in order if name in results["networks"]}
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / (FILE + ".part")
    draft.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(folder / FILE)
    report.write(results, folder)


if __name__ == "__main__":
    main()
