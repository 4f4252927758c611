"""The house keeps its own rules: quiet imports, documented doors, hooks in one room, nothing left lying about."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

import viscircuits

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "viscircuits").rglob("*.py"))
HEAVY = {"torchvision", "timm", "open_clip", "typer", "tqdm.auto", "matplotlib", "scipy", "pandas", "onnx", "captum"}
SECTIONS = [
    "Parameters",
    "Returns",
    "Yields",
    "Attributes",
    "Raises",
    "Warns",
    "See Also",
    "Notes",
    "References",
    "Examples",
]


def test_import_is_quick_and_quiet():
    program = (
        "import json, sys, time, torch, PIL.Image, safetensors.torch\n"
        "start = time.process_time()\n"
        "import viscircuits\n"
        "for name in viscircuits.__all__: getattr(viscircuits, name)\n"
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)  # one line: nothing else was printed
    assert not done.stderr
    assert not HEAVY & set(modules)
    assert seconds < 2


def test_import_changes_no_global_state():
    program = (
        "import torch, random, warnings\n"
        "state = lambda: (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),\n"
        "                 torch.initial_seed(), random.getstate(), warnings.filters[:])\n"
        "before = state()\n"
        "import viscircuits\n"
        "assert state() == before"
    )
    subprocess.run([sys.executable, "-W", "default", "-c", program], check=True)


def modules() -> list:
    names = [name for _, name, _ in pkgutil.walk_packages(viscircuits.__path__, "viscircuits.")]
    return [viscircuits, *map(importlib.import_module, names)]


def public_objects() -> dict[str, object]:
    """Every public function, class and method defined in the package, by its full name."""
    found: dict[str, object] = {}
    for module in modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if not (inspect.isfunction(thing) or inspect.isclass(thing)) or is_choice(thing):
                continue
            found[f"{module.__name__}.{name}"] = thing
            for method, inner in vars(thing).items() if inspect.isclass(thing) else ():
                inner = getattr(inner, "__func__", getattr(inner, "fget", inner))
                if inspect.isfunction(inner) and not method.startswith("_"):
                    found[f"{module.__name__}.{name}.{method}"] = inner
    return found


def is_choice(thing: object) -> bool:
    """Whether this is a list of an option's values, which the option's help explains."""
    return inspect.isclass(thing) and issubclass(thing, Enum)


def test_every_name_offered_exists_and_explains_itself():
    for name in viscircuits.__all__:
        assert inspect.getdoc(getattr(viscircuits, name)), f"viscircuits.{name} has no docstring"


def test_every_module_says_what_it_is_for():
    assert [module.__name__ for module in modules() if not inspect.getdoc(module)] == []


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_docstring_is_numpydoc(name):
    thing = public_objects()[name]
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert doc.splitlines()[0].rstrip().endswith((".", ":", "?", ";")), f"{name}: the first line is one sentence"
    headings = re.findall(r"^(\w[\w ]*)\n-{3,}$", doc, re.M)
    assert [heading for heading in headings if heading not in SECTIONS] == [], f"{name}: no such section"
    assert headings == sorted(headings, key=SECTIONS.index), f"{name}: sections stand in numpydoc's order"
    assert set(documented(doc)) <= set(parameters(thing)), f"{name} documents parameters it does not have"


def documented(doc: str) -> list[str]:
    """Names that the docstring's Parameters section explains, `a, b` together counting as two."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-{3,}$|\Z)", doc, re.M | re.S)
    lines = re.findall(r"^(\S.*)$", section[1], re.M) if section else []
    return [name.strip(" *") for line in lines for name in line.split(" : ")[0].split(",")]


def parameters(thing: object) -> list[str]:
    try:
        return list(inspect.signature(thing).parameters)
    except ValueError:  # an exception class has none to show
        return []


def test_documented_parameters_are_read_from_the_docstring():
    doc = "Do it.\n\nParameters\n----------\na, b\n    Two.\n*rest\n    More.\n\nRaises\n------\nValueError\n    No."
    assert documented(doc) == ["a", "b", "rest"]


def test_hooks_live_in_one_room():
    hooking = [path.name for path in SOURCES if re.search(r"\.register_\w*hook\(", path.read_text(encoding="utf-8"))]
    assert hooking == ["hooks.py"]


def test_nobody_seeds_the_world_or_unpickles():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"torch\.(cuda\.)?manual_seed\(|(np|numpy)\.random\.seed\(|\brandom\.seed\(", text), path
        assert ".cuda()" not in text, path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def test_heavy_packages_are_imported_where_they_are_used():
    for path in SOURCES:
        if path.name in ("cli.py", "commands.py"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & HEAVY, f"{path.name} imports {names} at the top"


def tracked() -> list[Path]:
    """Text files that are, or are about to be, in the repository."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def test_nothing_is_left_lying_about():
    left = re.compile(r"/(?:home|root|Users|work|mnt|opt|tmp)/\w|\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|<{7} |>{7} ")
    for path in tracked():
        if path.name == "LICENSE":
            continue
        found = left.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]!r}" if found else ""


def test_no_tracked_file_is_heavy():
    assert {path.name: path.stat().st_size for path in tracked() if path.stat().st_size > 1_000_000} == {}


def test_one_version_everywhere():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert viscircuits.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_command_reference_is_up_to_date():
    script = ROOT / "tools" / "cli_reference.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_command_reference_holds_every_argument_and_option():
    typer = pytest.importorskip("typer")
    app = typer.Typer()

    @app.command()
    def find(
        model: str,
        images: list[Path],
        units: str = typer.Option("10%", metavar="K|10%", help="how many"),
        strict: bool = typer.Option(False, "--strict"),
    ) -> None:
        """Find it.

        \b
        Example:
          viscircuits find net folder
        """

    app.command()(lambda: None)  # with a second command Typer makes a group
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools" / "cli_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.reference(app)
    assert "    viscircuits find MODEL IMAGES... [OPTIONS]\n\nFind it.\n" in text
    assert "```text\nExample:\n  viscircuits find net folder\n```" in text
    assert "| `--units K\\|10%` | how many | `10%` |" in text
    assert "| `--strict` |  |  |" in text


def test_every_command_shows_an_example():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = {section.split("\n", 1)[0]: section for section in page.split("\n## ")[1:]}
    assert {"layers", "discover", "evaluate", "edit", "view", "compare", "demo"} <= set(sections)
    without = [name for name, text in sections.items() if text.count(f"viscircuits {name}") < 2]  # usage, and example
    assert without == []


def test_imports_only_point_down_the_floors():
    pytest.importorskip("importlinter", reason="import-linter is not installed: pip install 'viscircuits[dev]'")
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["venv", "demo", "test", "lint", "types", "docs", "bench", "ci"])
def test_make_knows_what_to_do(target):
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-n", "-C", str(ROOT), target], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
