"""A run that is stopped, however, goes on where it was and ends with the same numbers, or says what differs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from viscircuits import attribute, checkpoint, open_images, wrap
from viscircuits.checkpoint import CheckpointError, Done
from viscircuits.errors import ImageError, ModelError, ViscircuitsError
from viscircuits.matrices import Attributions

LAYERS = ["1", "3", "5"]


def assert_identical(a: Attributions, b: Attributions) -> None:
    for mine, other in zip(a.matrices, b.matrices, strict=True):
        for name in ("values", "signed", "variance", "draws", "per_image"):
            one, two = getattr(mine, name), getattr(other, name)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two), name
    assert all(torch.equal(a.activity[layer], b.activity[layer]) for layer in a.layers)
    assert a.provenance["images"] == b.provenance["images"]


def by_hand() -> None:
    raise KeyboardInterrupt


class Interrupting(nn.Module):
    """A network that stops the program at its n-th forward pass."""

    def __init__(self, inner: nn.Sequential, n: int, how=by_hand):
        super().__init__()
        self.inner, self.left, self.how = inner, n, how

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.how()
        return self.inner(images)


INNER = ["inner.1", "inner.3", "inner.5"]


def attempt(net: nn.Sequential, n: int, images, folder: Path | None, **options) -> Attributions:
    """Attribution in a network that is interrupted at its n-th pass; two come before the first batch."""
    return attribute(Interrupting(net, n), images, INNER, checkpoint=folder, **options)


# ------------------------------------------------------------------ stopping and going on


@pytest.mark.slow
def test_killed_at_twenty_moments_the_result_is_identical(tmp_path):
    script = Path(__file__).with_name("interrupted.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes["killed"] == 20 and outcomes["resumed"] >= 1
    assert (outcomes["failed"], outcomes["different"], outcomes["left"]) == (0, 0, 0)


@pytest.mark.parametrize("at", [3, 4, 6, 7])
@pytest.mark.parametrize("seconds", [0, 60])  # written all the time, or on the way out only
def test_interrupted_by_hand_it_says_how_to_go_on_and_does(at, seconds, conv_net, photographs, tmp_path):
    options = {
        "draws": 2,
        "batch_size": 1,
        "per_image": True,
        "reference": photographs[:2],
        "checkpoint_seconds": seconds,
    }
    expected = attempt(conv_net, 0, photographs, None, **options)
    with pytest.raises(KeyboardInterrupt) as stopped:
        attempt(conv_net, at, photographs, tmp_path / "parts", **options)
    if at > 4:  # something was done
        assert "the same call goes on from there" in str(stopped.value)
    calls = Interrupting(conv_net, 0)
    found = attribute(calls, photographs, INNER, checkpoint=tmp_path / "parts", **options)
    assert_identical(found, expected)
    assert_identical(found.reference, expected.reference)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_trouble_while_the_result_is_saved_loses_nothing(trouble, conv_net, photographs, tmp_path):
    def finish(found) -> None:
        raise trouble

    expected = attempt(conv_net, 0, photographs, None, draws=2)
    with pytest.raises(type(trouble)):
        attempt(conv_net, 0, photographs, tmp_path / "parts", draws=2, finish=finish)
    calls = Interrupting(conv_net, 0)
    found = attribute(calls, photographs, INNER, checkpoint=tmp_path / "parts", draws=2)
    assert_identical(found, expected)
    assert not (tmp_path / "parts").exists()


def test_another_rule_of_when_to_stop_is_refused_at_the_door(conv_net, photographs, tmp_path):
    class Rule:
        def __init__(self, overlap: float):
            self.rule = {"overlap": overlap}

        def __call__(self, found) -> bool:
            return False

    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 6, photographs, tmp_path, draws=2, until=Rule(0.9), batch_size=1)
    with pytest.raises(ViscircuitsError, match=r"until.*0\.9.*0\.5"):
        attempt(conv_net, 0, photographs, tmp_path, draws=2, until=Rule(0.5), batch_size=1)


def test_what_was_done_is_not_done_again(conv_net, photographs, tmp_path):
    fresh, resumed = Interrupting(conv_net, 0), Interrupting(conv_net, 0)
    attribute(fresh, photographs, INNER, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 7, photographs, tmp_path, batch_size=1)
    attribute(resumed, photographs, INNER, batch_size=1, checkpoint=tmp_path)
    assert -fresh.left - -resumed.left >= 3  # forward passes saved


def test_a_request_to_end_is_a_stop_with_a_clear_line(conv_net, photographs, tmp_path):
    net = Interrupting(conv_net, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match=r"stopped\. What was done is kept in .*the same call goes on"):
        attribute(net, photographs, INNER, batch_size=1, checkpoint=tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    found = attribute(Interrupting(conv_net, 0), photographs, INNER, batch_size=1, checkpoint=tmp_path)
    assert_identical(found, attempt(conv_net, 0, photographs, None, batch_size=1))


def test_until_goes_on_with_what_it_remembers(conv_net, tmp_path):
    images = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    class Third:
        state = 0

        def __call__(self, attributions: Attributions) -> bool:
            self.state += 1
            return self.state == 3

        def restore(self, state: int) -> None:
            self.state = state

    expected = attempt(conv_net, 0, images, None, until=Third(), batch_size=4)
    assert expected.provenance["stopped"] == {"looks": [8, 12, 18], "at": 18, "stable": True}
    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 7, images, tmp_path, until=Third(), batch_size=4)
    found = attempt(conv_net, 0, images, tmp_path, until=Third(), batch_size=4)
    assert found.provenance["stopped"] == expected.provenance["stopped"]
    assert_identical(found, expected)


# ------------------------------------------------------------------ what must not go together


CHANGES = {
    "score": ({"score": "signed"}, 'score: "cla" → "signed"'),
    "layers": ({"layers": INNER[:2]}, r"layers: \[.*\] → \[.*\]"),
    "batch size": ({"batch_size": 2}, "batch_size: 1 → 2"),
    "draws": ({"draws": 5}, "draws: 0 → 5"),
    "targets": ({"targets": {"inner.3": [1]}}, r'targets: nothing → \{"inner.3": \[1\]\}'),
    "engine": ({"engine": "loop"}, 'engine: "auto" → "loop"'),
    "memory": ({"memory": "2G"}, "memory: nothing → 2147483648"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_option_is_refused_with_what_differs(what, conv_net, photographs, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 6, photographs, tmp_path, batch_size=1)
    before = [path.read_bytes() for path in tmp_path.iterdir()]
    options, words = CHANGES[what]
    with pytest.raises(CheckpointError, match=rf"of another run .*{words}.*Go back .*or delete"):
        attribute(
            Interrupting(conv_net, 0), photographs, **{"layers": INNER, "batch_size": 1, **options}, checkpoint=tmp_path
        )
    assert [path.read_bytes() for path in tmp_path.iterdir()] == before


def test_another_network_or_other_images_are_refused(conv_net, photographs, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 6, photographs, tmp_path, batch_size=1)
    with pytest.raises(CheckpointError, match=r"concept images: .*5 images, .* → .*4 images"):
        attempt(conv_net, 0, photographs[:4], tmp_path, batch_size=1)
    with pytest.raises(CheckpointError, match="reference images: nothing → "):
        attempt(conv_net, 0, photographs, tmp_path, batch_size=1, reference=photographs)
    conv_net[0].bias.data += 1
    with pytest.raises(CheckpointError, match="weights: "):
        attempt(conv_net, 0, photographs, tmp_path, batch_size=1)


def test_other_versions_only_warn(conv_net, photographs, tmp_path, monkeypatch):
    from viscircuits import attribution

    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 6, photographs, tmp_path, batch_size=1)
    monkeypatch.setattr(attribution, "versions", lambda: {"torch": "99"})
    with pytest.warns(UserWarning, match=r"begun with other versions .*torch .* → 99"):
        attempt(conv_net, 0, photographs, tmp_path, batch_size=1)


def test_a_damaged_file_is_refused(conv_net, photographs, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 6, photographs, tmp_path, batch_size=1)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*delete its folder"):
        attempt(conv_net, 0, photographs, tmp_path, batch_size=1)


# ------------------------------------------------------------------ trouble on the way


def test_a_full_disk_warns_once_and_keeps_the_old_file(conv_net, photographs, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        attempt(conv_net, 5, photographs, tmp_path, batch_size=1)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "put_tensors", full)
        with (
            pytest.warns(UserWarning, match=r"cannot write the checkpoint .*No space left") as warned,
            pytest.raises(KeyboardInterrupt, match="goes on from there"),
        ):
            attempt(conv_net, 4, photographs, tmp_path, batch_size=1, checkpoint_seconds=0)
        assert len([w for w in warned if "cannot write" in str(w.message)]) == 1
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
        with pytest.warns(UserWarning, match="cannot write the checkpoint"):
            found = attempt(conv_net, 0, photographs, tmp_path, batch_size=1, checkpoint_seconds=0)
    assert_identical(found, attempt(conv_net, 0, photographs, None, batch_size=1))


def pictures(folder: Path, n: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (16, 16), (9 * i, 10, 40)).save(folder / f"{i:02d}.png")
    return folder


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((16, 16)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(16, 16, 3).permute(2, 0, 1) / 255


def test_a_vanished_folder_loses_nothing(conv_net, tmp_path):
    folder, away = pictures(tmp_path / "images", 12), tmp_path / "away"
    expected = attribute(wrap(conv_net, to_tensor, LAYERS), open_images(folder), batch_size=2)

    def vanishing(image: Image.Image) -> Tensor:
        if image.getpixel((0, 0))[0] == 9 * 7:
            shutil.move(folder, away)
        return to_tensor(image)

    spec = wrap(conv_net, vanishing, LAYERS)
    with pytest.raises(ImageError, match=r"has vanished since it was opened.*What was done is kept in"):
        attribute(spec, open_images(folder), batch_size=2, checkpoint=tmp_path / "parts")
    shutil.move(away, folder)
    spec = wrap(conv_net, to_tensor, LAYERS)
    found = attribute(spec, open_images(folder), batch_size=2, checkpoint=tmp_path / "parts")
    assert_identical(found, expected)


def test_a_single_lost_image_is_skipped_and_named(conv_net, tmp_path):
    folder = pictures(tmp_path / "images", 12)
    images = open_images(folder)
    for lost in ("03.png", "04.png"):
        (folder / lost).unlink()
    found = attribute(wrap(conv_net, to_tensor, LAYERS), images, batch_size=2)
    assert found.n_images == 10
    assert [name for name, _ in found.provenance["images"]["skipped"]] == ["03.png", "04.png"]


def test_an_error_before_anything_was_done_leaves_no_file(conv_net, photographs, tmp_path):
    with pytest.raises(ModelError) as error:
        attribute(conv_net, photographs[:, :1], LAYERS, checkpoint=tmp_path / "parts")
    assert "kept" not in str(error.value) and not (tmp_path / "parts").exists()


# ------------------------------------------------------------------ which portions are done


def test_a_worker_has_done_its_own_portions_up_to_a_number():
    done = Done([[0, 0]])
    for portion in (0, 2):  # of worker 0
        done.close(portion)
    assert [done.has(portion) for portion in range(5)] == [True, False, True, False, False]


def test_portions_of_all_workers_are_known_to_another_team():
    one, two = Done([[0, 0]]), Done([[0, 0]])
    one.close(0)
    one.step(2, 1, 3)
    two.close(1)
    two.close(3)
    one.merge(two)
    one.join(3)
    assert [portion for portion in range(7) if not one.has(portion)] == [2, 4, 5, 6]
    assert one.opened == {2: (1, 3)}
    one.close(2)  # by worker 2 of three
    assert one.has(2) and not one.has(5) and one.opened == {}
    assert Done.from_state(json.loads(json.dumps(one.state()))) == one
