"""What people write about units stays what they wrote, whoever else writes meanwhile."""

from __future__ import annotations

import json
import threading

import pytest

from viscircuits.circuit import Circuit
from viscircuits.errors import FileFormatError, ViscircuitsError
from viscircuits.notes import LONGEST, load_notes, merge, save_notes, saying, write_note

CIRCUIT = Circuit({"a:in": (1, 2), "b": (0,)}, {"a:in": 4, "b": 2})


def note(text: str, when: str) -> dict:
    return {"name": "", "text": text, "by": "me", "when": when}


def test_a_note_is_read_back_and_an_empty_one_takes_it_away(tmp_path):
    assert load_notes(tmp_path) == {}
    written = write_note(tmp_path, CIRCUIT, "a:in:2", name=" eye ", text="fires at eyes </script>", by="Ä")
    assert load_notes(tmp_path) == written
    kept = written["a:in:2"]
    assert (kept["name"], kept["text"], kept["by"]) == ("eye", "fires at eyes </script>", "Ä")
    write_note(tmp_path, CIRCUIT, "", text="the whole")
    assert set(load_notes(tmp_path)) == {"", "a:in:2"}
    assert set(write_note(tmp_path, CIRCUIT, "a:in:2", by="me")) == {""}
    assert write_note(tmp_path, CIRCUIT, "") == load_notes(tmp_path) == {}


def test_a_note_that_was_taken_away_is_not_brought_back_by_an_older_copy_but_by_a_newer_one(tmp_path):
    held = write_note(tmp_path, CIRCUIT, "b:0", text="mine")
    write_note(tmp_path, CIRCUIT, "b:0")
    assert saying(merge(load_notes(tmp_path, taken_away=True), held)) == {}
    newer = {"b:0": note("again", "2999-01-01T00:00:00+00:00")}
    assert saying(merge(load_notes(tmp_path, taken_away=True), newer)) == newer


def test_what_no_xml_can_hold_is_left_out_of_a_note(tmp_path):
    written = write_note(tmp_path, CIRCUIT, "b:0", name="a\x00b\x1b[0m\ufffe", text="one\n\ttwo 😀\x0b")
    assert (written["b:0"]["name"], written["b:0"]["text"]) == ("ab[0m", "one\n\ttwo 😀")


def test_a_unit_of_the_circuits_layers_can_have_a_note_though_it_was_not_chosen(tmp_path):
    assert set(write_note(tmp_path, CIRCUIT, "a:in:3", text="why not?")) == {"a:in:3"}


@pytest.mark.parametrize(
    ("key", "part", "says"),
    [
        ("c:0", {"text": "x"}, "no such layer; it has a:in, b"),
        ("b:2", {"text": "x"}, "units 0 to 1"),
        ("b", {"text": "x"}, "layer:index"),
        ("b:-1", {"text": "x"}, "layer:index"),
        ("b:00", {"text": "x"}, "layer:index"),
        ("b:٠", {"text": "x"}, "layer:index"),
        ("b:" + "1" * 5000, {"text": "x"}, "layer:index"),
        ("../b:0", {"text": "x"}, "no such layer"),
        ("b:0", {"text": "x" * (LONGEST["text"] + 1)}, "4001 characters; shorten it to 4000"),
        ("b:0", {"name": "x" * 81}, "81 characters; shorten it to 80"),
    ],
)
def test_a_note_that_fits_nothing_is_refused_and_leaves_the_others(tmp_path, key, part, says):
    before = write_note(tmp_path, CIRCUIT, "b:0", text="mine")
    with pytest.raises(ViscircuitsError, match=says):
        write_note(tmp_path, CIRCUIT, key, **part)
    assert load_notes(tmp_path) == before


def test_of_two_notes_on_the_same_unit_the_later_stays():
    mine = {"b:0": note("old", "2024-01-01T10:00:00+00:00"), "b:1": note("new", "2024-01-03T00:00:00+00:00")}
    theirs = {"b:0": note("new", "2024-01-01T11:30:00+02:00"), "b:1": note("old", "2024-01-02")}
    assert {key: each["text"] for key, each in merge(mine, theirs).items()} == {"b:0": "old", "b:1": "new"}
    assert merge(mine, theirs) == merge(theirs, mine)
    assert merge({}, theirs) == merge(theirs, {}) == theirs


def test_two_who_write_at_once_lose_nothing(tmp_path):
    keys = [f"a:in:{i}" for i in range(4)] * 5
    threads = [threading.Thread(target=write_note, args=(tmp_path, CIRCUIT, key), kwargs={"text": key}) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: each["text"] for key, each in load_notes(tmp_path).items()} == {key: key for key in keys}


def test_half_a_character_is_no_reason_to_lose_a_note(tmp_path):
    write_note(tmp_path, CIRCUIT, "b:0", text="x\ud800y")
    assert load_notes(tmp_path)["b:0"]["text"] == "x?y"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"schema": "other"}', json.dumps({"schema": "viscircuits/notes", "version": 1, "notes": [1]})],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "notes.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"notes\.json"):
        load_notes(tmp_path)


def test_keys_with_noughts_before_their_index_are_read_as_they_are_written_now(tmp_path):
    write_note(tmp_path, CIRCUIT, "b:1", text="mine")
    path = tmp_path / "notes.json"
    path.write_text(path.read_text().replace('"b:1"', '"b:001"'))
    assert load_notes(tmp_path)["b:1"]["text"] == "mine"


def test_notes_nested_beyond_reading_are_damaged(tmp_path):
    (tmp_path / "notes.json").write_text("[" * 100_000)
    with pytest.raises(FileFormatError, match=r"notes\.json"):
        load_notes(tmp_path)


def test_saving_no_notes_leaves_no_file(tmp_path):
    save_notes(tmp_path, {"": note("x", "2024-01-01T00:00:00+00:00")})
    save_notes(tmp_path, {})
    assert not (tmp_path / "notes.json").exists()
