"""Put the result of an experiment into a page of the documentation.

``python tools/experiment_page.py FOLDER PAGE MARK [WITHOUT …]`` takes what ``viscircuits experiment … --out FOLDER``
wrote, copies its figures to ``docs/img/NAME-MARK.svg``, and writes its report between ``<!-- MARK: begin -->`` and
``<!-- MARK: end -->`` of the page. Figures named after that are left out: those that show photographs of others.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path


def put(folder: Path, page: Path, mark: str, without: list[str]) -> None:
    """Write a folder's report between two marks of a page, its figures beside it."""
    report = (folder / "report.md").read_text(encoding="utf-8").split("\n", 1)[1].strip()  # the page has its own title
    for name in without:
        report = re.sub(rf"\n\*\*[^\n]+\*\*\n\n!\[[^\n]*\]\(figures/{name}\.svg\)\n", "", report)
    for figure in sorted((folder / "figures").glob("*.svg")):
        if figure.stem in without:
            continue
        shutil.copyfile(figure, page.parent / "img" / f"{figure.stem}-{mark}.svg")
    report = re.sub(r"\(figures/([\w-]+)\.svg\)", rf"(img/\1-{mark}.svg)", report)
    text = page.read_text(encoding="utf-8")
    marks = rf"(<!-- {mark}: begin -->\n).*?(<!-- {mark}: end -->)"
    written, n = re.subn(marks, lambda found: f"{found[1]}{report}\n{found[2]}", text, flags=re.S)
    if n != 1:
        raise SystemExit(
            f"{page} holds {n} places marked <!-- {mark}: begin --> … <!-- {mark}: end -->; one was expected"
        )
    page.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    put(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
