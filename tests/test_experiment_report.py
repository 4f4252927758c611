"""The common ground of the experiments: parts that are kept, and reports."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from viscircuits.cli import app
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.experiments.composites import made_composites
from viscircuits.experiments.kept import Kept
from viscircuits.experiments.report import Figure, Report, Table, check_folder, draw, show
from viscircuits.experiments.seeds import LARGEST
from viscircuits.experiments.trees import rendered_tree
from viscircuits.metrics import Interval


def test_a_part_is_computed_once(tmp_path):
    calls = []
    for _ in range(2):
        kept = Kept(tmp_path / "parts.jsonl", {"seed": 0})
        assert kept.of("a", lambda: calls.append(1) or {"x": 0.1}) == {"x": 0.1}
    assert calls == [1]


def test_other_settings_start_anew_and_a_torn_line_is_passed_over(tmp_path):
    path = tmp_path / "parts.jsonl"
    Kept(path, {"seed": 0}).of("a", lambda: {"x": 1})
    assert "a" not in Kept(path, {"seed": 1})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "b", "dig')
    kept = Kept(path, {"seed": 0})
    assert "a" in kept and "b" not in kept
    kept.of("b", lambda: {"x": 2})
    assert Kept(path, {"seed": 0}).known == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_line_cut_off_inside_a_character_is_passed_over(tmp_path):
    path = tmp_path / "parts.jsonl"
    Kept(path, {"seed": 0}).of("a", lambda: {"x": "a\u2028b"})
    with path.open("ab") as file:
        file.write('{"key": "é'.encode()[:-1])
    kept = Kept(path, {"seed": 0})
    assert kept.known == {"a": {"x": "a\u2028b"}}
    kept.of("b", lambda: {"x": 2})
    assert set(Kept(path, {"seed": 0}).known) == {"a", "b"}


def report() -> Report:
    table = Table("Falls", ("part", "fall"), (("a|b", Interval(0.5, 0.25, 0.75)), ("<c>", None)), "Of 8.")
    figure = Figure("A line", "line", draw(lambda drawing: drawing.subplots().plot([0, 1])), "a rising line")
    return Report("demo", "A demo", ("It **falls** by half.",), (table,), (figure,), {"falls": [0.5]}, {"seed": 0})


def test_a_report_says_the_same_on_page_and_in_text(tmp_path):
    page = report().save(tmp_path).read_text(encoding="utf-8")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown, report().text()):
        assert "0.50 [0.25, 0.75]" in text and "by half" in text and "Of 8." in text
    assert "&lt;c&gt;" in page and "<c>" not in page.replace("&lt;c&gt;", "") and "a\\|b" in markdown
    assert 'aria-label="a rising line"' in page and "default-src 'none'" in page
    assert "https://" not in page.split("<svg")[0]
    numbers = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert numbers["falls"] == [0.5] and numbers["made"] == {"seed": 0}


@pytest.mark.parametrize("name", ["composites", "hierarchy", "typographic"])
def test_no_experiment_replaces_the_result_of_another(tmp_path, name):
    report().save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ran = CliRunner().invoke(app, ["experiment", name, "--quick", "--out", str(tmp_path)])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 2 and "result of experiment 'demo'" in said and "--out" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_experiment_may_replace_its_own_result_and_nothing_else(tmp_path):
    check_folder(tmp_path / "new", "demo")
    report().save(tmp_path)
    check_folder(tmp_path, "demo")
    for text in ('{"falls": 1}', "[]", "torn {"):
        (tmp_path / "results.json").write_text(text, encoding="utf-8")
        with pytest.raises(FileFormatError, match=r"a results\.json that no experiment wrote.*--out"):
            check_folder(tmp_path, "demo")


SEEDED = {"composites": "--seeds"} | dict.fromkeys(
    ("hierarchy", "typographic", "make-composites", "train-reader"), "--seed"
)


@pytest.mark.parametrize("seed", [-1, LARGEST + 1])
def test_a_seed_out_of_range_is_refused_with_its_option_and_the_range(tmp_path, seed):
    for name, option in SEEDED.items():
        data = ["--data", str(tmp_path)] if name == "train-reader" else []
        ran = CliRunner().invoke(app, ["experiment", name, "--out", str(tmp_path / "out"), f"{option}={seed}", *data])
        assert ran.exit_code == 2
        assert f"from 0 to {LARGEST}, got {seed} ({option})" in " ".join(ran.output.split())
    assert list(tmp_path.iterdir()) == []


def test_the_largest_seed_draws_pictures():
    assert len(rendered_tree(1, LARGEST)) > 1
    assert len(made_composites(None, n_parts=4, pairs=2, each=1, seed=LARGEST)) == 4


def test_the_same_drawing_gives_the_same_bytes():
    assert report().figures[0].svg == report().figures[0].svg


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ViscircuitsError, match="2 columns, a row has 1"):
        Table("t", ("a", "b"), (("x",),))


def test_cells_are_short():
    assert show(None) == "–" and show(0.123456) == "0.123" and show(Interval(-0.001, -0.2, 0.1)) == "0.00 [-0.20, 0.10]"
