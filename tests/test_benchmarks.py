"""The speed benchmark runs, its ways agree, and its page says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("captum", reason="the benchmark compares with captum")
pytest.importorskip("matplotlib", reason="the benchmark draws with matplotlib")


@pytest.fixture
def benchmark(root, monkeypatch):
    """A module of `benchmarks/` by its name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("speed", "ways", "bound", "growth", "memory", "report"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_quick_run_writes_the_page_and_stays_within_the_error(benchmark, tmp_path):
    benchmark("speed").main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    pairs = [pair for entry in results["networks"].values() for pair in entry["pairs"]]
    assert len(pairs) == 3
    for pair in pairs:
        assert pair["failed"] == {}
        assert pair["error"]["float32"] <= 1e-4
        assert max(pair["error"][way] for way in ("vmap", "captum")) <= 1e-4
        assert 0 < pair["flops"]["bound"] < pair["flops"]["loop"]
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "`features.3` → `features.4`" in page
    for name in ("bench-images", "bench-size", "bench-width"):
        assert f"(img/{name}.svg)" in page
        assert "</svg>" in (tmp_path / "img" / f"{name}.svg").read_text(encoding="utf-8")
    assert page.count("<!--") == 1  # every place for a table is filled; the mark of the command is left


def test_resumed_run_measures_nothing_again(benchmark, tmp_path, monkeypatch):
    speed = benchmark("speed")
    kept = {
        "format": speed.FORMAT,
        "networks": {name: {"title": name} for name in speed.QUICK},
        "growth": {"images": []},
    }
    (tmp_path / "benchmarks.json").write_text(json.dumps(kept), encoding="utf-8")
    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(speed.growth, "measure", lambda *_: pytest.fail("measured again"))
    speed.main(["--quick", "--resume", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8")) == kept


def test_unknown_network_is_refused(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark("speed").main(["--networks", "resnet19", "--out", str(tmp_path)])
    assert "choose from googlenet" in capsys.readouterr().err


@pytest.mark.parametrize(("way", "which"), [("vmap", 0), ("vmap", 1), ("captum", 1), ("float32", 0), ("float32", 1)])
def test_every_way_gives_the_loop_s_rows(benchmark, way, which):
    ways = benchmark("ways")
    pair = recorded_pair(benchmark, nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1))
    rows = ways.evenly(10, 4)
    plain, mine = (ways.gathered(ways.WAYS[each], pair, rows)[which] for each in ("loop", way))
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_bound_counts_what_a_reader_counts(benchmark):
    """4×4 maps of two images: ten targets fan out for nothing in the 1×1, then pass a 3×3 of 8 to 6 channels whole."""
    pair = recorded_pair(benchmark, nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1))
    assert benchmark("bound").bound(pair) == 10 * 2 * (2 * 4 * 4) * 8 * 6 * 9


def test_bound_of_a_linear_bottleneck_has_no_positions(benchmark):
    """The second 1×1 only changes ten rows of five numbers into ten rows of six."""
    pair = recorded_pair(benchmark, nn.Conv2d(6, 5, 1), nn.Conv2d(5, 10, 1))
    assert benchmark("bound").bound(pair) == 10 * 2 * 5 * 6


def test_bound_of_a_3x3_fans_out_from_one_channel(benchmark):
    pair = recorded_pair(benchmark, nn.Conv2d(6, 10, 3, padding=1))
    assert benchmark("bound").bound(pair) == 10 * 2 * (2 * 4 * 4) * 6 * 9


def test_rows_are_spread_from_the_first_to_the_last(benchmark):
    evenly = benchmark("ways").evenly
    assert evenly(11, 3).tolist() == [0, 5, 10]
    assert evenly(3, 8).tolist() == [0, 1, 2]


def recorded_pair(benchmark, *modules: nn.Module):
    """Six maps of 4×4 after a ReLU, then these modules and a ReLU, on two seeded images."""
    from viscircuits.models import as_spec

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), *modules, nn.ReLU())
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
    images: Tensor = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    (pair,) = benchmark("ways").recorded(as_spec(net.eval()), images, ("1", str(len(net) - 1)))
    return pair
