"""Labels find the right class, or say why they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from viscircuits.errors import ViscircuitsError
from viscircuits.labels import find_class, match_labels, read_labels
from viscircuits.models import imagenet_classes

CLASSES = (
    ("tabby", "tabby cat", "n02123045"),
    ("yellow lady's slipper", "n12057211"),
    ("Labrador retriever", "n02099712"),
    ("crane bird", "crane", "n02012849"),
    ("crane", "n03126707"),
    ("harp", "n03495258"),
    ("harmonica", "mouth organ", "harp", "n03494278"),
    ("beach wagon", "wagon", "n02814533"),
    ("police van", "wagon", "n03977966"),
    ("sunglass", "n04355933"),
    ("sunglasses", "n04356056"),
)


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("tabby", 0),
        ("Tabby_Cat", 0),
        ("tabbies", 0),
        ("tabby, tabby cat", 0),
        ("n02123045", 0),
        ("n02123045_123", 0),
        ("yellow_lady's_slipper", 1),
        ("yellow-ladys-slippers", 1),
        ("labrador retrievers", 2),
        ("harp", 5),  # a usual name beats another class's synonym
        ("mouth organ", 6),
        ("sunglass", 9),  # as it stands before its plural
        ("sunglasses", 10),
        ("3_crane", 3),
        ("4_crane", 4),
        ("0_tabby_17", 0),
        ("1_tabby", None),  # the number and the name disagree
        ("0", None),  # a number alone may count anything
        ("99_tabby", None),
        ("dog", None),
        ("", None),
    ],
)
def test_a_label_names_one_class_or_none(label, index):
    assert find_class(label, CLASSES) == index


@pytest.mark.parametrize(("label", "listed"), [("crane", ("3", "4")), ("wagon", ("7", "8"))])
def test_a_label_of_several_classes_lists_them_and_asks_for_the_index(label, listed):
    with pytest.raises(ViscircuitsError, match="several classes") as error:
        find_class(label, CLASSES)
    assert all(f"{index} (" in str(error.value) for index in listed)
    assert f"'{listed[0]}_{label}'" in str(error.value)


def test_a_leading_index_is_believed_when_told():
    assert find_class("2_dog", CLASSES, leading_index=True) == 2
    assert find_class("7", CLASSES, leading_index=True) == 7
    assert find_class("70", CLASSES, leading_index=True) is None


def test_label_comes_before_folder_before_file_name():
    found = match_labels(
        ["a.jpg", "tabby/b.jpg", "x/y/5_harp.jpg", "q/tabby.jpg"], ["harp", None, None, None], CLASSES, partly=True
    )
    assert found.indices == (5, 0, 5, None)
    assert (found.origin, found.n_matched, found.unmatched) == (
        "labels and folders and file names",
        3,
        ("q/tabby.jpg",),
    )


def test_the_inner_folder_is_asked_when_the_outer_names_no_class():
    assert match_labels(["val/n02123045/1.jpg"], ["val"], CLASSES).indices == (0,)


def test_a_file_name_settles_which_crane_a_folder_means():
    assert match_labels(["crane/3_crane.jpg", "crane/4_crane.jpg"], ["crane", "crane"], CLASSES).indices == (3, 4)


def test_a_number_is_an_index_unless_it_is_a_folder():
    assert match_labels(["shard.tar/00017.jpg"], ["7"], CLASSES).indices == (7,)
    assert match_labels(["7/00017.jpg"], ["7"], CLASSES).indices == (None,)


def test_pictures_whose_labels_fit_nothing_are_simply_unknown():
    found = match_labels(["1.jpg", "2.jpg"], [None, "dogs"], CLASSES)
    assert (found.indices, found.origin, found.n_matched) == ((None, None), "none", 0)
    assert match_labels(["tabby/1.jpg"], ["tabby"], None).indices == (None,)


def test_some_but_not_all_is_an_error_that_names_the_others():
    names, labels = ["tabby/1.jpg", "dog/2.jpg", "3.jpg"], ["tabby", "dog", None]
    with pytest.raises(ViscircuitsError, match=r"2 of 3 pictures .*'dog/2.jpg' \(label 'dog'\), '3.jpg'"):
        match_labels(names, labels, CLASSES)
    assert match_labels(names, labels, CLASSES, partly=True).indices == (0, None, None)


def test_one_label_for_each_picture():
    with pytest.raises(ViscircuitsError, match="got 1 for 2 pictures"):
        match_labels(["a.jpg", "b.jpg"], [None], CLASSES)


@pytest.mark.parametrize(("suffix", "comma"), [(".csv", ","), (".tsv", "\t")])
def test_a_table_gives_names_or_indices(tmp_path, suffix, comma):
    table = tmp_path / f"labels{suffix}"
    table.write_text(f"path{comma}label\na.jpg{comma}tabby\nin/b.jpg{comma}5\n\nunused.jpg{comma}harmonica\n")
    found = match_labels(["a.jpg", "deep/in/b.jpg"], ["harp", None], CLASSES, table=table)
    assert (found.indices, found.origin) == ((0, 5), "table")


def test_indices_need_no_class_names():
    assert match_labels(["a.jpg"], [None], None, table={"a.jpg": "1234"}).indices == (1234,)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"a.jpg": "11"}, "outside the model's classes, 0 to 10"),
        ({"a.jpg": "tabbie cat"}, "no label of the table .*Did you mean 'tabby cat'"),
        ({"a.jpg": "wagon"}, "several classes"),
        ({"z.jpg": "tabby"}, "names none of the 2 pictures: it has 'z.jpg', the pictures are called 'a.jpg'"),
        ({"a.jpg": "tabby"}, r"1 of 2 pictures .*'b.jpg' \(not in the table\)"),
        ({"a.jpg": "tabby", "b.jpg": "dog"}, r"1 of 2 pictures .*'b.jpg' \(label 'dog'\)"),
    ],
)
def test_a_table_that_does_not_fit_says_where(table, said):
    with pytest.raises(ViscircuitsError, match=said):
        match_labels(["a.jpg", "b.jpg"], [None, None], CLASSES, table=table)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a.jpg\n", "line 1 of .* is not path,label"),
        (b"a.jpg,1\nb.jpg,\n", "line 2"),
        (b"", "holds no labels"),
        (b"path,label\n", "holds no labels"),
        (b"a.jpg,1\na.jpg,2\n", "two labels, '1' and '2'"),
        (b"\xff\xfe\x00a,1\n", "is not a table"),
    ],
)
def test_a_broken_table_names_the_line(tmp_path, content, said):
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ViscircuitsError, match=said):
        read_labels(tmp_path / "labels.csv")


def test_a_missing_table_says_what_was_expected(tmp_path):
    with pytest.raises(ViscircuitsError, match=r"no table of labels .*path,label"):
        read_labels(tmp_path / "labels.csv")


def test_every_usual_imagenet_name_finds_its_class_and_the_three_namesakes_are_refused():
    pytest.importorskip("timm", reason="WordNet's names come with timm")
    classes = imagenet_classes()
    usual = [names[0] for names in classes]
    namesakes = {264, 474, 517, 638}  # Cardigan, cardigan, crane, maillot
    known = [i for i in range(1000) if i not in namesakes]
    # names without index or folder, told to be labels
    assert match_labels(["?"] * 996, [usual[i] for i in known], classes).indices == tuple(known)
    for index in namesakes:
        with pytest.raises(ViscircuitsError, match="several classes"):
            find_class(usual[index], classes)


def test_tiny_imagenet_folders_find_their_classes(shared_data: Path):
    pytest.importorskip("timm", reason="WordNet ids come with timm")
    given = json.loads((shared_data / "tiny-imagenet" / "classes.json").read_text())
    folders = sorted(folder.name for folder in (shared_data / "tiny-imagenet" / "val").iterdir())
    found = match_labels([f"{f}/0.jpg" for f in folders], folders, imagenet_classes())
    assert len(folders) == found.n_matched == 50
    assert all(given[f]["wnid"] in imagenet_classes()[i] for f, i in zip(folders, found.indices, strict=True))


def test_imagenet_sample_files_find_their_classes(shared_data: Path):
    names = sorted(file.name for file in (shared_data / "imagenet-sample").glob("*.jpg"))
    found = match_labels(names, [None] * len(names), imagenet_classes())
    assert found.indices == tuple(int(name[:3]) for name in names)
    assert (found.n_matched, found.origin) == (len(names), "file names")
