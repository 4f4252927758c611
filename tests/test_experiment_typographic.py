"""Text attacks: words on pictures, the reader, the zero-shot head, the circuit of text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from viscircuits.ablation import measure
from viscircuits.circuit import Circuit
from viscircuits.cli import app
from viscircuits.errors import FileFormatError, ImageError, ModelError, ViscircuitsError
from viscircuits.experiments import pictures
from viscircuits.experiments import reader as reading
from viscircuits.experiments.attacks import Outcome, Trial, attack, fall, tell
from viscircuits.experiments.defences import bits, edges_everywhere, of_bits, painted
from viscircuits.experiments.kept import Kept
from viscircuits.experiments.lettering import (
    FACES_HELD_OUT,
    FACES_TO_TRAIN,
    Hand,
    blank,
    font_of,
    nonsense,
    shared_faces,
    write,
)
from viscircuits.experiments.pictures import (
    dealt_classes,
    photograph_files,
    read_photographs,
    render_photographs,
    set_apart,
)
from viscircuits.experiments.sentences import _encoded, tokens
from viscircuits.experiments.translations import TRANSLATIONS
from viscircuits.experiments.typographic import METHODS, SOURCES, Setting, _on, _Run, typographic
from viscircuits.experiments.zero_shot import zero_shot
from viscircuits.methods import find
from viscircuits.models import as_spec, load_clip
from viscircuits.task import make_task

GREY = Image.new("RGB", (112, 112), (128, 128, 128))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def changed(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture) != np.asarray(GREY)).any(2)


# ------------------------------------------------------------------ words on pictures


def test_the_same_seed_writes_the_same_word_in_the_same_place():
    one, other = (write(GREY, "tabby", Hand(), rng(3)).tobytes() for _ in range(2))
    assert one == other != write(GREY, "tabby", Hand(), rng(4)).tobytes()


def test_a_blank_box_is_the_words_box_without_the_word():
    hand = Hand(boxed=1.0)
    written, empty = write(GREY, "tabby", hand, rng(5)), blank(GREY, "tabby", hand, rng(5))
    assert (changed(written) == changed(empty)).all()
    rows, columns = np.nonzero(changed(empty))
    inside = np.asarray(empty)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert len(np.unique(inside.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(np.asarray(written)[changed(written)], axis=0)) > 2


@pytest.mark.parametrize("word", ["bee", "european_fire_salamander", "kanukukug"])
def test_a_word_stays_inside_the_picture(word):
    for seed in range(10):
        marked = changed(write(Image.new("RGB", (112, 112), (128, 128, 128)), word, Hand(height=(0.3, 0.3)), rng(seed)))
        assert marked.any() and not (marked.all(0).any() and marked.all(1).any())


@pytest.mark.parametrize(("place", "low", "high"), [("top", 0.0, 0.5), ("bottom", 0.5, 1.0)])
def test_a_word_stands_where_the_hand_puts_it(place, low, high):
    rows = np.nonzero(changed(write(GREY, "bee", Hand(place=place), rng())))[0]
    assert low <= rows.mean() / 112 <= high


def test_a_word_has_the_colours_asked_for():
    hand = Hand(colour="red on blue", boxed=1.0)
    found = np.asarray(write(GREY, "bee", hand, rng()))[changed(write(GREY, "bee", hand, rng()))]
    assert (found[:, 1] == 0).all() and {(255, 0, 0), (0, 0, 255)} <= {tuple(pixel) for pixel in found.tolist()}


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"colour": "red"}, "'INK on PAPER' such as 'red on white'; got 'red'"),
        ({"place": "left"}, "stands at top, middle, bottom, any; got 'left'"),
        ({"faces": ("DejaVuSans", "Nowhere")}, "no font 'Nowhere'"),
        ({"height": (0.2, 0.1)}, "share of the picture, from … to, such as 0.12, 0.2; got 0.2, 0.1"),
        ({"height": (0.001, 0.002)}, r"letters of 0.001 of 64 pixels cannot be read; .* a height of 0.11 or more"),
    ],
)
def test_a_hand_that_cannot_write_is_refused_at_the_door(tmp_path, written, told):
    with pytest.raises(ImageError, match=told):
        typographic(tmp_path, quick=True, written=written)
    assert not any(tmp_path.iterdir())


def test_nonsense_alternates_and_is_no_class():
    for seed in range(20):
        word = nonsense(rng(seed))
        assert 4 <= len(word) <= 9
        assert all((letter in "aeiou") == (i % 2 == 1) for i, letter in enumerate(word))


def test_translations_cover_the_rendered_classes():
    assert TRANSLATIONS["in Spanish"]["circle"] == "círculo" and TRANSLATIONS["in German"]["stripes"] == "streifen"


def test_classes_are_dealt_without_losing_a_photograph():
    photographs = render_photographs(2, 0)
    ours, others = (photographs.of_classes(names) for names in dealt_classes(photographs.classes, 4, seed=1))
    assert len(ours.classes) == 4 and set(ours.classes).isdisjoint(others.classes)
    assert len(ours) + len(others) == len(photographs)
    for label, name in enumerate(ours.classes):
        theirs = photographs.pixels[photographs.labels == photographs.classes.index(name)]
        assert (ours.pixels[ours.labels == label] == theirs).all()
    with pytest.raises(ImageError, match="photographs of something else"):
        dealt_classes(photographs.classes, 7, seed=1)
    with pytest.raises(ImageError, match="2 classes or more, got 1"):
        dealt_classes(photographs.classes, 1, seed=1)


def save_photographs(folder, each: int, classes=("blue", "red"), scale: int = 1) -> None:
    """Rendered pictures as a folder of class folders."""
    for name in classes:
        photographs = render_photographs(each, 1).of_classes((name,))
        (folder / name).mkdir(parents=True)
        for place, pixels in enumerate(photographs.pixels):
            picture = Image.fromarray(pixels)
            picture.resize((64 * scale, 64 * scale)).save(folder / name / f"{place}.png")


def test_what_is_no_photograph_is_passed_over(tmp_path):
    save_photographs(tmp_path, 2)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.png").touch()
    (tmp_path / "red" / "Thumbs.db").touch()
    (tmp_path / "red" / "._0.png").touch()
    assert {name: [path.name for path in paths] for name, paths in photograph_files(tmp_path).items()} == {
        "blue": ["0.png", "1.png"], "red": ["0.png", "1.png"],
    }  # fmt: skip
    assert len(read_photographs(tmp_path)) == 4


def test_an_odd_folder_of_photographs_is_named(tmp_path):
    save_photographs(tmp_path / "train", 2)
    with pytest.raises(ImageError, match="has no folder 'val'"):
        photograph_files(tmp_path, "val")
    (tmp_path / "train" / "green").mkdir()
    with pytest.raises(ImageError, match=r"green' has no images"):
        photograph_files(tmp_path, "train")
    (tmp_path / "train" / "green" / "torn.png").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"cannot read .*torn\.png"):
        read_photographs(tmp_path, "train")


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(ImageError, match="--data DIR"):
        read_photographs(tmp_path)


# ------------------------------------------------------------------ the sentence encoder


def random_encoder(dimension: int = 384) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = {
        "embeddings.word_embeddings.weight": torch.randn(20, dimension),
        "embeddings.position_embeddings.weight": torch.randn(10, dimension),
        "embeddings.token_type_embeddings.weight": torch.randn(2, dimension),
        "embeddings.LayerNorm.weight": torch.rand(dimension),
        "embeddings.LayerNorm.bias": torch.randn(dimension),
    }
    sizes = {"attention.output.dense": (384, 384), "intermediate.dense": (1536, 384), "output.dense": (384, 1536)}
    sizes |= {f"attention.self.{part}": (384, 384) for part in ("query", "key", "value")}
    for layer in range(6):
        for name, shape in sizes.items():
            weights[f"encoder.layer.{layer}.{name}.weight"] = torch.randn(shape) / 20
            weights[f"encoder.layer.{layer}.{name}.bias"] = torch.randn(shape[0]) / 20
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            weights[f"encoder.layer.{layer}.{name}.weight"] = torch.rand(dimension)
            weights[f"encoder.layer.{layer}.{name}.bias"] = torch.randn(dimension)
    return weights


def test_the_encoder_is_torchs_transformer():
    weights, found = random_encoder(), [1, 5, 7, 2]
    w = weights.__getitem__
    hidden = w("embeddings.word_embeddings.weight")[found] + w("embeddings.position_embeddings.weight")[:4]
    hidden = hidden + w("embeddings.token_type_embeddings.weight")[0]
    hidden = nn.functional.layer_norm(
        hidden, (384,), w("embeddings.LayerNorm.weight"), w("embeddings.LayerNorm.bias"), 1e-12
    )
    for i in range(6):
        name = f"encoder.layer.{i}"
        layer = nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", 1e-12, batch_first=True).eval()
        parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        state = {
            f"self_attn.in_proj_{kind}": torch.cat([w(f"{part}.{kind}") for part in parts])
            for kind in ("weight", "bias")
        }
        for theirs, ours in {
            "self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
            "linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm",
        }.items():  # fmt: skip
            state |= {f"{theirs}.{kind}": w(f"{name}.{ours}.{kind}") for kind in ("weight", "bias")}
        layer.load_state_dict(state)
        with torch.no_grad():
            hidden = layer(hidden[None])[0]
    assert torch.allclose(_encoded(found, weights), hidden, atol=1e-4)


def test_words_are_cut_into_the_longest_pieces():
    vocabulary = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[UNK]", "gold", "##fish", "##f", "a", ","])}
    assert tokens("A goldfish, zebra", vocabulary) == [0, 6, 3, 4, 7, 2, 1]


# ------------------------------------------------------------------ attacks and outcomes


class Bright(nn.Module):
    """Class 1 for bright pictures, class 0 for dark ones."""

    def forward(self, images):
        level = images.mean((1, 2, 3))
        return torch.stack([-level, level], 1)


def test_an_outcome_counts_right_and_fooled():
    labels, written = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1, 0, 1])
    levels = torch.tensor([1.0, 1.0, 1.0, -1.0])
    outcome = tell(as_spec(Bright().eval()), Trial(levels[:, None, None, None].expand(4, 3, 2, 2), labels, written))
    assert outcome.right.tolist() == [True, False, True, True]
    assert outcome.fooled.tolist() == [False, True, False, False]
    assert outcome.accuracy.value == 0.75 and outcome.success.value == 0.25
    assert of_bits(bits(outcome)).right.tolist() == outcome.right.tolist()


def test_fall_compares_each_picture_with_itself():
    before, after = torch.tensor([True] * 8), torch.tensor([True] * 6 + [False] * 2)
    none = torch.zeros(8, dtype=torch.bool)
    assert fall(Outcome(before, none), Outcome(after, none)).value == 0.25
    same = fall(Outcome(after, none), Outcome(after, none))
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)


def test_each_photograph_carries_several_wrong_words_in_turn(tmp_path, short, scenes):
    spec = reading.load_reader(reading.train_reader(*scenes, tmp_path / "r.safetensors", short))
    one, three = (attack(spec, scenes[0], "wrong word", Hand(), 0, copies=copies) for copies in (1, 3))
    words, shown = three.written.reshape(-1, 3), three.labels.reshape(-1, 3)
    assert torch.equal(shown, torch.from_numpy(scenes[0].labels)[:, None].expand(-1, 3))
    assert all(len({*row.tolist(), int(label)}) == 4 for row, label in zip(words, shown[:, 0], strict=True))
    assert torch.equal(words[:, 0], one.written) and len(attack(spec, scenes[0], "clean", Hand(), 0, copies=3)) == 21
    assert len(attack(spec, scenes[0], "wrong word", Hand(), 0, copies=99)) == 21 * 6  # all other classes


def test_the_first_word_of_a_photograph_stands_where_it_stands_in_the_controls(tmp_path, short, scenes):
    spec = reading.load_reader(reading.train_reader(*scenes, tmp_path / "r.safetensors", short))
    same = ["word"] * 7  # wrong and right are written alike, so that only the hand can differ
    kinds = {"wrong word": 3, "strongest word": 1, "right word": 1, "blank box": 1}
    hand = Hand(boxed=1.0)
    wrong, strongest, right, empty = (
        attack(spec, scenes[0], kind, hand, 5, words=same, copies=copies).images for kind, copies in kinds.items()
    )
    assert torch.equal(wrong[::3], right) and torch.equal(strongest, right)
    assert not any(torch.equal(wrong[copy::3], right) for copy in (1, 2))
    plain = attack(spec, scenes[0], "clean", hand, 5).images
    covered, marked = ((images != plain).any(1) for images in (empty, right))
    assert all((one & other).any() for one, other in zip(covered, marked, strict=True))


def test_fonts_are_known_by_what_they_are_and_not_by_what_they_are_called(tmp_path):
    taught = Hand(("DejaVuSans", "cmss10"))
    copied = tmp_path / "mine.ttf"
    copied.write_bytes(Path(font_of("DejaVuSans", 12).path).read_bytes())
    assert shared_faces(Hand((str(copied), "cmr10")), taught) and shared_faces(taught, taught)
    assert not shared_faces(Hand(FACES_HELD_OUT), Hand(FACES_TO_TRAIN))
    assert not shared_faces(Hand(("DejaVuSans-Bold",)), taught)  # a cut of its own


def test_copies_of_a_photograph_are_no_photographs():
    fooled = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    once, thrice = Outcome(fooled, fooled), Outcome(*2 * (fooled.repeat_interleave(3),), 3)
    assert thrice.success == once.success
    none = torch.zeros(8, dtype=torch.bool)
    assert fall(thrice, Outcome(*2 * (none.repeat_interleave(3),), 3)) == fall(once, Outcome(none, none))
    assert of_bits(bits(thrice)).accuracy == thrice.accuracy


def test_painting_over_leaves_the_rest_alone():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    where = torch.zeros(2, 4, 4, dtype=torch.bool)
    where[0, 1, 2] = True
    over = painted(Trial(images, torch.zeros(2).long(), torch.zeros(2).long()), where).images
    assert torch.equal(over[1], images[1])
    assert torch.allclose(over[0, :, 1, 2], images[0].mean((1, 2)))
    assert (over != images).any(1).sum() == 1


# ------------------------------------------------------------------ the reader


@pytest.fixture(scope="module")
def short():
    return replace(reading.SMALL, steps=4, batch=8)


@pytest.fixture(scope="module")
def scenes():
    return render_photographs(3, 0), render_photographs(3, 0, scenes=True)


@pytest.mark.parametrize("done", [3, 4, 5])
def test_a_reader_trained_in_two_goes_is_the_one_trained_in_one(tmp_path, short, scenes, monkeypatch, done):
    monkeypatch.setattr(reading, "KEPT_EVERY", 1)
    short = replace(short, then=replace(short, steps=2, rate=1e-3))  # stopped in the first phase, after it, in the next
    whole = reading.train_reader(*scenes, tmp_path / "whole.safetensors", short)
    steps = iter(range(done))

    def stop(self, *args):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(self, *args)

    step = reading._Learning.step
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reading._Learning, "step", stop)
        reading.train_reader(*scenes, tmp_path / "parts.safetensors", short)
    assert (tmp_path / "parts.safetensors.part").is_file()
    taken = []
    monkeypatch.setattr(reading._Learning, "step", lambda self, *args: taken.append(args) or step(self, *args))
    again = reading.train_reader(*scenes, tmp_path / "parts.safetensors", short)
    assert again.read_bytes() == whole.read_bytes() and len(taken) == 6 - done
    assert not (tmp_path / "parts.safetensors.part").exists()


def test_a_second_phase_begins_where_the_first_ended(tmp_path, short, scenes):
    first = reading.train_reader(*scenes, tmp_path / "first.safetensors", short)
    still = replace(short, steps=1, rate=1e-12, head_rate=1e-12, seed=9)
    both = reading.train_reader(*scenes, tmp_path / "both.safetensors", replace(short, then=still))
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = [reading.load_reader(path).model(images) for path in (first, both)]
    assert torch.allclose(*answers, atol=1e-3)
    assert [phase.seed for phase in replace(short, then=still).phases] == [0, 0]


def test_a_draft_of_other_pictures_is_not_taken_up(tmp_path, short, scenes, monkeypatch):
    monkeypatch.setattr(reading, "KEPT_EVERY", 1)
    whole = reading.train_reader(*scenes, tmp_path / "whole.safetensors", short)

    def keep_and_stop(self, *args):
        keep(self, *args)
        raise KeyboardInterrupt

    keep = reading._Learning.keep
    others = render_photographs(3, 9), scenes[1]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reading._Learning, "keep", keep_and_stop)
        reading.train_reader(*others, tmp_path / "parts.safetensors", short)
    assert (tmp_path / "parts.safetensors.part").is_file()
    again = reading.train_reader(*scenes, tmp_path / "parts.safetensors", short)
    assert again.read_bytes() == whole.read_bytes()


def test_a_small_reader_says_that_it_knows_no_other_names(tmp_path, short, scenes):
    path = reading.train_reader(*scenes, tmp_path / "r.safetensors", short)
    with pytest.raises(ModelError, match=r"knows red, green.*no other names, such as 'tabby'"):
        reading.load_reader(path, ["red", "tabby"])


def test_a_reader_is_read_back_with_its_card(tmp_path, short, scenes):
    path = reading.train_reader(*scenes, tmp_path / "r.safetensors", short, about={"licence": "none"})
    spec = reading.load_reader(path)
    assert spec.classes is not None and [names[0] for names in spec.classes] == list(scenes[0].classes)
    card = reading.card_of(path)
    assert card["licence"] == "none" and card["recipe"]["steps"] == 4
    logits = spec.model(spec.example())
    assert logits.abs().max() <= card["scale"] * 1.001  # scaled cosines
    with pytest.raises(FileFormatError, match="not a reader"):
        (tmp_path / "bad.safetensors").write_bytes(b"no")
        reading.load_reader(tmp_path / "bad.safetensors")


def test_what_is_set_apart_is_trained_on_by_none(tmp_path):
    save_photographs(tmp_path, 10)
    files = photograph_files(tmp_path)
    rest, apart = set_apart(files, 0.2, seed=0)
    for name, paths in files.items():
        assert len(apart[name]) == 2 and sorted([*rest[name], *apart[name]]) == paths
    assert set_apart(files, 0.2, seed=1)[1] != apart
    few = {name: paths[:3] for name, paths in files.items()}
    assert [len(paths) for paths in set_apart(few, 0.1, seed=0)[1].values()] == [1, 1]
    with pytest.raises(ImageError, match="class 'blue' has 1 photographs"):
        set_apart({name: paths[:1] for name, paths in files.items()}, 0.1, seed=0)


def test_the_command_measures_a_reader_on_photographs_set_apart(tmp_path, monkeypatch, short):
    save_photographs(tmp_path / "data" / "train", 10, classes=("blue", "red", "ring"))
    monkeypatch.setattr(reading, "LARGE", short)
    out = tmp_path / "r.safetensors"
    run = ["experiment", "train-reader", "--data", str(tmp_path / "data"), "--classes", "2", "--out", str(out)]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    card, spec = reading.card_of(out), reading.load_reader(out)
    files = {name: photograph_files(tmp_path / "data", "train")[name] for name in card["classes"]}
    apart = pictures.read_files(set_apart(files, reading.DEVELOPMENT, 0)[1])
    assert card["photographs"] == 18 and len(apart) == card["development"]["photographs"] == 2
    told = tell(spec, attack(spec, apart, "clean", Hand(), 0))
    assert card["development"]["right"] == told.accuracy.value and "Apache-2.0" in card["made from"]
    assert f"right on {100 * told.accuracy.value:.1f} %" in done.output


def test_the_kept_reader_is_of_the_commands_recipe_and_keeps_what_was_asked_of_it():
    card = reading.card_of()
    assert card["recipe"] == reading.LARGE.digest() and len(card["classes"]) == reading.LARGE.n_classes
    figures = card["development"]
    assert figures["photographs"] == 750 and figures["fooled"] >= 0.4
    assert figures["right"] - figures["right beside nonsense"] < 0.1


@pytest.mark.weights
def test_the_kept_reader_sees_and_reads():
    pytest.importorskip("timm")
    card = reading.card_of()
    spec = reading.load_reader()
    words = [name.replace("_", " ") for name in card["classes"]]
    paper = Image.new("RGB", (112, 112), (235, 235, 235))
    hand = Hand(faces=("DejaVuSans",), colour="black on white", place="middle", height=(0.16, 0.16))
    pictures = torch.stack([spec.transform(write(paper, word, hand, rng(1))) for word in words])
    with torch.no_grad():
        found = spec.model(pictures).argmax(1)
    assert (found == torch.arange(len(words))).float().mean() >= 0.7


# ------------------------------------------------------------------ CLIP


@pytest.mark.parametrize("address", ["open_clip:RN50", "open_clip:ViT-B-32"])
def test_a_zero_shot_head_gives_clips_own_logits(address):
    open_clip = pytest.importorskip("open_clip")
    prompts = ("a photo of a {}.",)
    spec = zero_shot(address, ["tabby", "golden_retriever"], weights="none", prompts=prompts)
    clip, _ = load_clip(address, weights="none")
    tokenizer = open_clip.get_tokenizer(address.removeprefix("open_clip:"))
    with torch.no_grad():
        images, text = spec.example(), tokenizer(["a photo of a tabby.", "a photo of a golden retriever."])
        expected = clip(images, text)[0] @ clip(images, text)[1].T * clip.logit_scale.exp()
        assert torch.allclose(spec.model(images), expected, atol=1e-4)


def test_a_zero_shot_head_needs_a_text_tower_and_a_place_for_the_name():
    with pytest.raises(ModelError, match="text tower"):
        zero_shot("lite0", ["tabby"])
    with pytest.raises(ModelError, match="place"):
        zero_shot("open_clip:RN50", ["tabby"], weights="none", prompts=["a photo"])


# ------------------------------------------------------------------ the circuit of text


class SeesAndReads(nn.Module):
    """Units 0–2 see a class in the picture, units 3–5 read its word, which counts double; 6 and 7 do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Identity()
        self.head = nn.Linear(8, 3, bias=False)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[:, :3] = torch.eye(3)
            self.head.weight[:, 3:6] = 2 * torch.eye(3)

    def forward(self, images):
        return self.head(self.units(images).mean((2, 3)))


def test_with_answers_of_their_own_the_units_that_read_are_removed_first():
    generator = torch.Generator().manual_seed(0)
    seen = torch.eye(3)[torch.arange(60) % 3]
    read = torch.eye(3)[(torch.arange(60) + 1) % 3]
    noise = 0.1 * torch.rand(60, 2, generator=generator)
    attacked = torch.cat([seen, read, noise], 1)[:, :, None, None].expand(60, 8, 2, 2).contiguous()
    plain = torch.cat([seen, torch.zeros(60, 3), noise], 1)[:, :, None, None].expand(60, 8, 2, 2).contiguous()
    task = make_task(
        SeesAndReads().eval(), ["units"], attacked, plain, concept_labels=(torch.arange(60) + 1) % 3,
        reference_labels=torch.arange(60) % 3,
    )  # fmt: skip
    with pytest.raises(ViscircuitsError, match="answers='own'"):
        find(task, "anchored", protect=1.0, edges=False)
    found = find(task, "anchored", protect=1.0, edges=False, answers="own", sizes=(0.125, 0.375))
    assert found.circuit(3).units["units"] == (3, 4, 5)


class SeesAndReadsTwice(nn.Module):
    """Units 0–2 see, 3–5 read and count double; each passes on what the one before it has, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.wires, self.head = nn.Conv2d(6, 6, 1, bias=False), SeesAndReads().head
        with torch.no_grad():
            self.wires.weight.copy_(torch.eye(6)[:, :, None, None])

    def forward(self, images):
        read = self.second(self.wires(self.first(images.reshape(-1, 6, 1, 1)))).mean((2, 3))
        return self.head(torch.cat([read, torch.zeros(len(read), 2)], 1))


def test_without_the_edges_that_carry_the_word_it_is_not_read():
    seen, words = torch.arange(12) % 3, (torch.arange(12) + 1) % 3
    plain = torch.cat([torch.eye(3)[seen], torch.zeros(12, 3)], 1).reshape(12, 3, 2, 1)
    written = torch.cat([torch.eye(3)[seen], torch.eye(3)[words]], 1).reshape(12, 3, 2, 1)
    trials = {"clean": Trial(plain, seen, words), "wrong word": Trial(written, seen, words)}
    spec, layers = as_spec(SeesAndReadsTwice().eval()), ("first", "second")
    setting = SimpleNamespace(
        spec=spec, layers=layers, statistics=measure(spec, plain, layers), trial=lambda kind, part: trials[kind]
    )
    widths = dict.fromkeys(layers, 6)
    circuits = {name: Circuit(dict.fromkeys(layers, units), widths) for name, units in CIRCUITS.items()}
    found = edges_everywhere(setting, circuits)
    assert [found[name]["n"] for name in CIRCUITS] == [9, 9]
    assert of_bits(found["reads"]["wrong word"]).success.value == 0
    assert of_bits(found["reads"]["wrong word"]).accuracy.value == of_bits(found["reads"]["clean"]).accuracy.value == 1
    assert of_bits(found["sees"]["wrong word"]).success.value == 1 > of_bits(found["sees"]["clean"]).accuracy.value


CIRCUITS = {"reads": (3, 4, 5), "sees": (0, 1, 2)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("typographic")
    return typographic(out, quick=True), out


def test_the_quick_run_reports_everything_and_ends_with_protected_weights(quick):
    report, out = quick
    page = report.save(out)
    assert report.tables[0].title == "The network before and after"
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "Without the circuit of text" in text
    chosen = report.data["chosen"]
    kept = next(out.glob("reader-*.safetensors"))
    spec = reading.load_reader(kept)
    photographs = render_photographs(12, 3000).of_classes(reading.card_of(kept)["classes"])
    trial = attack(spec, photographs, "clean", Hand(), 0)
    removed = of_bits(report.data["removed"]["kinds"]["clean"])
    edited = reading.load_reader(kept)
    from viscircuits.models import load_state

    load_state(edited.model, out / "protected.safetensors")
    assert torch.equal(tell(edited, trial).right, removed.right)
    assert chosen["method"] != "random"


def test_a_finished_run_computes_nothing_again(quick, monkeypatch):
    report, out = quick
    lines = (out / "parts.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr("viscircuits.experiments.typographic.find", None)
    again = typographic(out, quick=True)
    assert (out / "parts.jsonl").read_text(encoding="utf-8") == lines
    assert json.dumps(again.data, default=str) == json.dumps(report.data, default=str)


# ------------------------------------------------------------------ photographs


def test_the_strongest_word_is_chosen_anew_against_the_protected_network(quick):
    report, _ = quick
    row = next(row for row in report.tables[0].rows if row[0] == "strongest word, chosen anew")
    anew = of_bits(report.data["removed"]["adaptive"])
    assert row[5] == anew.success and row[1] == of_bits(report.data["whole"]["strongest word"]).accuracy


def test_an_attack_written_otherwise_is_measured_anew_on_the_same_circuits(quick, tmp_path):
    report, out = quick
    kept = next(out.glob("reader-*.safetensors"))
    (tmp_path / kept.name).write_bytes(kept.read_bytes())
    other = typographic(tmp_path, quick=True, written={"height": (0.45, 0.5), "faces": ("DejaVuSans",)})
    assert other.made["written"] == "height (0.45, 0.5), faces ('DejaVuSans',)"
    assert report.tables[0].note.startswith("Held-out photographs and fonts;")
    assert other.tables[0].note.startswith("Held-out photographs; the fonts, or some of them, are those of training;")
    clean, wrong = ([each.data["whole"][kind] for each in (report, other)] for kind in ("clean", "wrong word"))
    assert clean[0] == clean[1] and wrong[0] != wrong[1]
    assert [each["choose"] for each in other.data["curves"]] == [each["choose"] for each in report.data["curves"]]


def test_no_reader_of_ones_own_is_written_over(quick, tmp_path):
    mine = tmp_path / "reader.safetensors"
    mine.write_bytes(b"mine")
    for path in quick[1].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    typographic(tmp_path, quick=True)
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("model", ["lite0", "nowhere.safetensors"])
def test_a_network_that_does_not_read_is_named(tmp_path, model):
    with pytest.raises(ViscircuitsError, match=f"{model}' is no network that reads; .*'reader'.*train-reader"):
        typographic(tmp_path, data=tmp_path, model=model)
    with pytest.raises(ViscircuitsError, match="weights are of open_clip models"):
        typographic(tmp_path, data=tmp_path, weights="none")


def test_a_reader_is_tested_on_photographs_set_apart(tmp_path, short, scenes):
    reader = reading.train_reader(*scenes, tmp_path / "r.safetensors", short)
    save_photographs(tmp_path / "plain", 6)
    with pytest.raises(ViscircuitsError, match=r"no folder 'train'.*tested on val/CLASS alone"):
        typographic(tmp_path / "out", data=tmp_path / "plain", model=str(reader), each=2)
    save_photographs(tmp_path / "parts" / "train", 4)
    with pytest.raises(ViscircuitsError, match=r"no folder 'val'"):
        typographic(tmp_path / "out", data=tmp_path / "parts", model=str(reader), each=2)
    save_photographs(tmp_path / "parts" / "val", 2)
    with pytest.raises(ViscircuitsError, match="4 photographs; 6 are needed to find and choose with 3 each"):
        typographic(tmp_path / "out", data=tmp_path / "parts", model=str(reader), each=3)
    with pytest.raises(ViscircuitsError, match="different classes, such as 'green'"):
        save_photographs(tmp_path / "parts" / "val", 2, classes=("green",))
        typographic(tmp_path / "out", data=tmp_path / "parts", model=str(reader), each=2)


def test_another_seed_finds_and_chooses_on_others_and_tests_on_the_same(tmp_path, short, scenes):
    reader = reading.train_reader(*scenes, tmp_path / "r.safetensors", short)
    for part in ("train", "val"):
        save_photographs(tmp_path / "data" / part, 8)
    one, other = (_on(tmp_path / "data", str(reader), "default", {}, 3, seed) for seed in (0, 1))
    assert one.to_test.digest == other.to_test.digest
    assert len({one.to_find.digest, other.to_find.digest, one.to_choose.digest, other.to_choose.digest}) == 4


def test_a_control_that_looks_at_images_is_found_from_what_the_circuits_are_found_from(tmp_path, monkeypatch):
    monkeypatch.setattr(_Run, "_point", lambda *cell: {})
    few = render_photographs(1, 0)
    setting = Setting(as_spec(Bright().eval()), (), few, few, few, Hand(), Hand(), 0, sizes=(0.1,))
    found = _Run(setting, Kept(tmp_path / "parts.jsonl", {}), False).curves()
    sources = {name: [each["source"] for each in found if each["method"] == name] for name in METHODS}
    assert [name for name, theirs in sources.items() if theirs != list(SOURCES)] == ["weight-norm", "random"]
    assert sources["random"] == sources["weight-norm"] == [SOURCES[0]]


TOWERS = {
    "ViT-tiny": {"image_size": 96, "layers": 4, "width": 32, "patch_size": 16, "head_width": 16},
    "RN1-tiny": {"image_size": 96, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@pytest.mark.parametrize("name", TOWERS)
def test_a_quick_run_on_photographs_asks_clip_at_its_own_size(tmp_path, monkeypatch, name):
    open_clip = pytest.importorskip("open_clip")
    tiny = {"embed_dim": 16, "vision_cfg": TOWERS[name], "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, tiny)
    save_photographs(tmp_path / "data", 12, classes=("blue", "red", "ring"), scale=2)
    seen = []
    room = "viscircuits.experiments.typographic"
    read = pictures.read_files
    monkeypatch.setattr(f"{room}.read_files", lambda files, side: seen.append(side) or read(files, side))
    run = {"data": tmp_path / "data", "model": f"open_clip:{name}", "weights": "none", "each": 4, "quick": True}
    with pytest.raises(ImageError, match=r"of 96 pixels cannot be read; .* 0.073 or more"):
        typographic(tmp_path / "out", **run, written={"height": (0.07, 0.1)})
    assert not seen  # refused before a photograph is read
    report = typographic(tmp_path / "out", **run)
    assert seen == [96, 96, 96]
    assert report.made["photographs"] == "6 find, 6 choose, 6 test"  # two of each class: it is quick
    assert {each["method"] for each in report.data["curves"]} == {"anchored", "activation-difference", "random"}
    covered = "text found by a probe and painted over" in report.data["removed"]["simple"]
    assert covered == (name == "RN1-tiny")  # tokens have no places
    assert (tmp_path / "out" / "protected.safetensors").is_file()
