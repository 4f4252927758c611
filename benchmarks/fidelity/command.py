"""Does a method find the circuit that is really the cause? Writes docs/fidelity.md, fidelity.json and plots.

    make bench-fidelity
    make bench-fidelity FIDELITY_ARGS='--only planted --methods anchored,eap'

What was measured before is not measured again, as long as the method's source is the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fidelity import agreement, closer, page, photographs, planted, removal, roster
from fidelity.roster import AGAINST, RECOMMENDED
from fidelity.store import DIGITS, Entry, Work
from fidelity.summary import of_concept, over_concepts
from viscircuits.methods import METHODS
from viscircuits.planted import PLANTED

ROOT = Path(__file__).resolve().parents[2]
FILE, FORMAT = "fidelity.json", 1
PARTS = ("planted", "real")
QUICK_NETWORKS = ("circle", "suppressor", "copies")


class Job(Protocol):
    """A file of cells: what it holds, and how to fill it."""

    @property
    def name(self) -> str: ...

    def wanted(self) -> dict[str, str]: ...

    def run(self, work: Work) -> None: ...


@dataclass(frozen=True)
class Preparing:
    """Photographs transformed, and classes that the network knows, before anything is asked about them."""

    network: str
    n_classes: int
    cache: Path

    def run(self) -> None:
        photographs.prepare(self.network, self.cache)
        photographs.chosen_classes(self.network, self.n_classes, self.cache, 0)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.page:
        page.write(json.loads((options.out / FILE).read_text(encoding="utf-8")), options.out)
        return
    results, failures = _looked_closer(options) if options.closer else _whole(options)
    write(results, options.out)
    print(f"written to {options.out.name}/fidelity.md", flush=True)
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


def _whole(options: argparse.Namespace) -> tuple[Entry, list[str]]:
    """All that was asked for, and what failed."""
    work, begun = Work(options.work), time.perf_counter()
    if not options.quick and "real" in options.only:
        ready = [Preparing(name, options.classes, options.work) for name in options.networks]
        drained(ready, _prepare, options.jobs, "preparing")
    jobs = jobs_of(options)
    anew = not any(work.cells(job.name, job.wanted()).known for job in jobs)
    failures = drained([(job, work) for job in jobs], _run, options.jobs, "fidelity")
    results = gathered(jobs, work, options)
    whole = anew and not failures
    results |= _closer_before(options.out / FILE, options.work)
    results |= {"clock": time.perf_counter() - begun} if whole else _clock_before(results, options.out / FILE)
    return results, failures


def _looked_closer(options: argparse.Namespace) -> tuple[Entry, list[str]]:
    """What is known of the rest with a closer look, where nothing failed in it, in place of the one before."""
    work = Work(options.work)
    drained([Preparing(closer.NETWORK, 0, options.work)], _prepare, 1, "preparing")
    jobs = closer.jobs(options.work)
    failures = drained([(job, work) for job in jobs], _run, options.jobs, "a closer look")
    results = _before(options.out / FILE)
    if not failures:
        cells = [cell for job in jobs for cell in work.cells(job.name, job.wanted()).known.values()]
        results["closer"] = {
            "digest": closer.digest(jobs),
            "seconds": sum(cell["took"] for cell in cells),
            "planted": [_brief(cell) for cell in cells if "family" in cell],
            "removal": removals([cell for cell in cells if "concept" in cell]),
        }
    return results, failures


def _closer_before(path: Path, cache: Path) -> Entry:
    """The closer look that was taken before, while nothing that decides its numbers has changed."""
    before = _before(path).get("closer")
    if not before:
        return {}
    if before["digest"] == closer.digest(closer.jobs(cache)):
        return {"closer": before}
    print("what a closer look depends on has changed: it is left out until --closer is run again", flush=True)
    return {}


def _before(path: Path) -> Entry:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _clock_before(results: Entry, path: Path) -> Entry:
    """The time that the whole took, where it was measured in one go and nothing has been measured since."""
    before = _before(path)
    same = all(before.get(name) == rounded(results[name]) for name in ("seconds", "jobs", "machine"))
    return {"clock": before["clock"]} if same and "clock" in before else {}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def some(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few planted networks, a network of random weights")
    parser.add_argument("--only", type=some, default=list(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--methods", type=some, help="some of " + ",".join(METHODS))
    parser.add_argument("--planted", type=some, help="some of " + ",".join(PLANTED))
    parser.add_argument("--networks", type=some, help="some of " + ",".join(photographs.NETWORKS))
    parser.add_argument("--groups", type=some, help="of photographs; by default " + ",".join(photographs.GROUPS))
    parser.add_argument("--classes", type=int, default=2, help="how many classes of tiny-imagenet a network")
    parser.add_argument(
        "--found-under", choices=("mean", "each"), default="mean", help="ablation under which circuits are found"
    )
    parser.add_argument(
        "--closer", action="store_true",
        help="a closer look at trained networks and at groups in EfficientNet-Lite0, half an hour, added to the page",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help="of each planted network (3; 1 if quick)")
    parser.add_argument("--dear", action="store_true", help="remove circuits of methods that take hours, too")
    parser.add_argument("--jobs", type=int, help="processes at once (2; 1 if quick)")
    parser.add_argument("--page", action="store_true", help="write the page anew from fidelity.json")
    parser.add_argument("--out", type=Path, help="folder of fidelity.json, .md and img/ (docs; build if quick)")
    parser.add_argument("--work", type=Path, help="folder of what is known already (build/fidelity)")
    options = parser.parse_args(arguments)
    _check_closer(parser, options)
    _complete(options)
    _check(parser, options)
    return options


def _complete(options: argparse.Namespace) -> None:
    quick = options.quick
    options.out = options.out or ROOT / ("build" if quick else "docs")
    options.work = options.work or ROOT / "build" / ("fidelity-quick" if quick else "fidelity")
    options.planted = options.planted or list(QUICK_NETWORKS if quick else PLANTED)
    options.networks = options.networks or list(photographs.NETWORKS)
    options.groups = options.groups or list(photographs.GROUPS)
    options.seeds = options.seeds or (1 if quick else 3)
    options.jobs = options.jobs or (1 if quick else 2)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    known = {"only": PARTS, "planted": PLANTED, "networks": photographs.NETWORKS}
    titles = [each.title for each in (*roster.of_planted(None), *roster.of_removal(None))]
    for name, names in {**known, "methods": [*METHODS, *titles]}.items():
        if unknown := set(getattr(options, name) or ()) - set(names):
            parser.error(f"no --{name} {', '.join(sorted(unknown))}; choose from {', '.join(dict.fromkeys(names))}")


def _check_closer(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """A closer look is always the same, and added to results that are there."""
    if not options.closer:
        return
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    if unused := sorted(set(given) - {"closer", "jobs", "out", "work"}):
        parser.error(f"--closer takes no {', '.join('--' + name.replace('_', '-') for name in unused)}")
    out = options.out or ROOT / "docs"
    if not (out / FILE).is_file():
        parser.error(f"no {FILE} in {out.name} to add a closer look to; run the benchmark without --closer first")


# ------------------------------------------------------------------ jobs


def jobs_of(options: argparse.Namespace) -> list[Any]:
    """All jobs of a run, those that take longest first."""
    found: list[Any] = []
    if "real" in options.only:
        found += _of_photographs(options)
    if "planted" in options.only:
        contenders = roster.of_planted(options.methods, quick=options.quick)
        sizes = ["small"] if options.quick else list(planted.SIZES)
        found += planted.jobs(options.planted, options.seeds, contenders, sizes)
    return found


def _of_photographs(options: argparse.Namespace) -> Iterator[Any]:
    contenders = roster.of_removal(options.methods, dear=options.dear)
    if options.quick:
        yield from removal.jobs(photographs.QUICK, "groups", ["noise"], contenders, options.work, options.found_under)
        return
    for network in options.networks:
        yield from removal.jobs(network, "groups", options.groups, contenders, options.work, options.found_under)
        classes = photographs.chosen_classes(network, options.classes, options.work, 0)
        yield from removal.jobs(network, "classes", classes, contenders, options.work, options.found_under)
        yield agreement.Job(network, tuple(roster.of_agreement(options.methods)), options.work)


def drained(items: Sequence[Any], run: Any, n_processes: int, what: str) -> list[str]:
    """Run all items, several at once; returns what failed and why."""
    bar = tqdm(total=len(items), desc=what, unit="job", disable=None)
    with bar:
        if n_processes == 1:
            return _noted(map(run, items), bar)
        os.environ["OMP_NUM_THREADS"] = "1"  # before the processes import torch
        with multiprocessing.get_context("spawn").Pool(n_processes) as pool:
            return _noted(pool.imap_unordered(run, items), bar)


def _noted(outcomes: Iterable[str | None], bar: tqdm) -> list[str]:
    failures = []
    for outcome in outcomes:
        bar.update()
        if outcome is not None:
            failures.append(outcome)
            bar.write(outcome, file=sys.stderr)
    return failures


def _run(item: tuple[Job, Work]) -> str | None:
    """One job; other jobs go on when it fails."""
    job, work = item
    torch.set_num_threads(1)
    try:
        job.run(work)
    except Exception as error:
        return f"{job.name}: {type(error).__name__}: {error}"
    return None


def _prepare(ready: Preparing) -> str | None:
    torch.set_num_threads(1)
    ready.run()
    return None


# ------------------------------------------------------------------ results


def gathered(jobs: Sequence[Job], work: Work, options: argparse.Namespace) -> Entry:
    """All that the page is written from."""
    cells = {job.name: list(work.cells(job.name, job.wanted()).known.values()) for job in jobs}
    of_part = {
        part: [cell for name, each in cells.items() if name.startswith(part) for cell in each]
        for part in ("planted", "agreement", "removal")
    }
    return {
        "format": FORMAT,
        "machine": machine(),
        "jobs": options.jobs,
        "seconds": sum(cell["took"] for each in cells.values() for cell in each),
        "seeds": options.seeds,
        "found_under": options.found_under,
        "planted": [_brief(cell) for cell in of_part["planted"]],
        "agreement": [_without(cell, "scores", "took") for cell in of_part["agreement"]],
        "removal": removals(of_part["removal"]),
        "cost": _costs([cell for cell in of_part["removal"] if "passes" in cell and cell["fold"] != removal.BOUND]),
        "left_out": {"removal": roster.REMOVAL_LEAVES_OUT, "agreement": roster.AGREEMENT_LEAVES_OUT},
        "reasons": {
            f"{part} {cell['network']} {cell['method']}": cell["reason"]
            for part, each in of_part.items()
            for cell in each
            if "reason" in cell
        },
    }


def _costs(cells: Sequence[Entry]) -> list[Entry]:
    """Medians over the circuits of each method."""
    return [
        {
            "method": method,
            "passes": {
                name: median(cell["passes"][name] for cell in cells if cell["method"] == method)
                for name in ("forward", "backward", "seconds")
            },
        }
        for method in dict.fromkeys(cell["method"] for cell in cells)
    ]


def removals(cells: Sequence[Entry]) -> Entry:
    """Network → source → concepts and their mean."""
    found: Entry = {}
    for network in dict.fromkeys(cell["network"] for cell in cells):
        for source in dict.fromkeys(cell["source"] for cell in cells if cell["network"] == network):
            mine = [cell for cell in cells if (cell["network"], cell["source"]) == (network, source)]
            concepts = {name: _concept(mine, name) for name in dict.fromkeys(cell["concept"] for cell in mine)}
            known = {name: each for name, each in concepts.items() if each}
            if known:
                mean = over_concepts(list(known.values()), AGAINST)
                plain = {
                    name: {**_without(each, "draws"), "after": _lean(each["after"])} for name, each in known.items()
                }
                found.setdefault(network, {})[source] = {"concepts": plain, "mean": _lean(mean)}
    return found


def _lean(found: Entry) -> Entry:
    """Ablation → size → method → entry; its difference from the control only where the page tells of it, and ``apart``
    only where it holds."""
    told = (roster.REMOVER, roster.RECOMMENDED)

    def kept(name: str, each: Entry) -> Entry:
        each = each if name in told else _without(each, "difference")
        return each if each.get("apart") else _without(each, "apart")

    return {
        ablation: {size: {name: kept(name, each) for name, each in entries.items()} for size, entries in sizes.items()}
        for ablation, sizes in found.items()
    }


def _concept(cells: Sequence[Entry], concept: str) -> Entry:
    mine = [cell for cell in cells if cell["concept"] == concept]
    found = of_concept([cell for cell in mine if cell["fold"] != removal.BOUND], AGAINST)
    bound = of_concept([cell for cell in mine if cell["fold"] == removal.BOUND], AGAINST)
    if found and bound:
        found["bound"] = {
            ablation: {size: each[RECOMMENDED] for size, each in sizes.items() if RECOMMENDED in each}
            for ablation, sizes in bound["after"].items()
        }
    return found


def _brief(cell: Entry) -> Entry:
    """A planted cell without its scores, the reason that is told once for all, and recall, which is precision."""
    kept = _without(cell, "scores", "took", "reason")
    return {**kept, **{part: _without(kept[part], "recall") for part in ("units", "edges") if kept.get(part)}}


def _without(entry: Entry, *keys: str) -> Entry:
    return {name: value for name, value in entry.items() if name not in keys}


def machine() -> Entry:
    """The machine in words: what decides speed, and nothing that names it."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [capability] if capability != "DEFAULT" else [],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def rounded(value: Any) -> Any:
    """The same with floats to `DIGITS` decimals: seventeen would double the file and say nothing."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def write(results: Entry, folder: Path) -> None:
    """`fidelity.json`, then the page from it."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / (FILE + ".part")
    text = json.dumps(rounded(results), separators=(",", ":"), ensure_ascii=False)
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(folder / FILE)
    page.write(json.loads((folder / FILE).read_text(encoding="utf-8")), folder)
