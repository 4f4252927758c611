"""The served page's API over real HTTP: what it answers, and each thing that it must refuse."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import resource
import shlex
import signal
import socket
import threading
import time
import warnings
import webbrowser
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn
from typer.testing import CliRunner

import viscircuits
from test_discovery import tiny, to_tensor
from viscircuits import discovery, evaluation, server
from viscircuits.ablation import ablate
from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Unit
from viscircuits.cli import app
from viscircuits.contract import AccuracyData, Answer, NetworkData, OperatedProbe, SurgeryData, UploadedData
from viscircuits.discovery import discover
from viscircuits.errors import ModelError, ViscircuitsError
from viscircuits.hooks import count_hooks
from viscircuits.images import open_images, to_rgb
from viscircuits.models import ModelSpec
from viscircuits.notes import load_notes
from viscircuits.probes import Probes
from viscircuits.surgery import Edit, Surgery

httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install 'viscircuits[test]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'viscircuits[serve]'")

CONCEPT, OTHERS = "render:grating,size=32,n=8", "render:colour,size=32,n=8"
LAYERS = ("1", "3", "5")


@dataclass(frozen=True)
class Served:
    """A server that runs, and what it was made of."""

    url: str
    folder: Path
    spec: ModelSpec

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    @property
    def token(self) -> str:
        return self.url.partition("?token=")[2]

    @property
    def circuit(self) -> Circuit:
        return Circuit.load(self.folder)

    def client(self, **headers: str) -> Any:
        given = {"Authorization": f"Bearer {self.token}", "X-Viscircuits": "1", **headers}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=given, timeout=30)

    def raw(self, lines: str, body: bytes = b"", *, token: bool = True, host: str | None = None) -> tuple[int, bytes]:
        """Status and body for a request as it stands, path and all untouched by any library."""
        head = [lines, f"Host: {host or f'127.0.0.1:{self.port}'}", "Connection: close"]
        head += [f"Authorization: Bearer {self.token}"] if token else []
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as link:
            link.sendall("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
            received = b"".join(iter(lambda: link.recv(65536), b""))
        return int(received.split(b" ", 2)[1]), received.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "N_BOOTSTRAP", 20)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec]:
    """A result folder and its network."""
    spec, folder = tiny(), tmp_path_factory.mktemp("served") / "grating"
    discover(
        spec, CONCEPT, folder, reference=OTHERS, units=3, draws=1, bootstrap=0, n_pictures=1, edge_fractions=(1.0,)
    )
    return folder, spec


@pytest.fixture(scope="module")
def served(made: tuple[Path, ModelSpec]) -> Iterator[Served]:
    folder, spec = made
    with server.serving(folder, spec) as url:
        yield Served(url, folder, spec)


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with served.client() as opened:
        yield opened


@pytest.fixture(autouse=True)
def untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test asks of the server, the network is afterwards what it was."""
    if "served" not in request.fixturenames:
        yield
        return
    net = request.getfixturevalue("served").spec.model
    before = {name: value.clone() for name, value in net.state_dict().items()}
    yield
    assert count_hooks(net) == 0
    assert not any("forward" in vars(module) for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def units(served: Served, n: int) -> list[list]:
    return [[unit.layer, unit.index] for unit in list(served.circuit)[:n]]


def edges(served: Served, n: int) -> list[list]:
    return [[[e.source.layer, e.source.index], [e.target.layer, e.target.index]] for e in served.circuit.edges[:n]]


def edit_of(served: Served, n_units: int = 2, n_edges: int = 0, ablation: str = "zero") -> dict[str, Any]:
    return {"units": units(served, n_units), "edges": edges(served, n_edges), "ablation": ablation}


def png(size: tuple[int, int] = (40, 30), seed: int = 0, kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def keys(shape: Any) -> set[str]:
    return set(shape.__annotations__) | {key for base in getattr(shape, "__orig_bases__", ()) for key in keys(base)}


# ------------------------------------------------------------------ what it answers


def test_the_page_comes_with_its_scripts_and_may_run_no_other(served, client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert 'id="data"' in page.text
    policy = page.headers["content-security-policy"]
    scripts = re.search(r"script-src ([^;]*)", policy)[1]
    assert "unsafe" not in scripts
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    module = client.get("/web/remote.js")
    assert module.headers["content-type"] == "text/javascript; charset=utf-8"
    assert module.text == (Path(viscircuits.__file__).parent / "web" / "remote.js").read_text(encoding="utf-8")
    assert client.get("/web/style.css").headers["content-type"] == "text/css; charset=utf-8"


def test_the_network_says_what_can_be_asked(served, client):
    said = client.get("/api/network").json()
    assert set(said) == keys(NetworkData)
    assert said["layers"] == [{"name": layer, "width": width} for layer, width in served.circuit.widths.items()]
    assert said["ablations"] == ["zero", "mean", "resample", "noise"]
    assert said["evaluated_on"] == {"concept": 4, "others": 4}  # the half of each that did not find the circuit
    assert said["limits"] == {"upload_bytes": server.UPLOAD_BYTES, "upload_pixels": server.UPLOAD_PIXELS}


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample", "noise"])
def test_surgery_answers_what_the_contexts_give_in_python(served, client, ablation):
    asked = {"edit": edit_of(served, 3, 4, ablation), "probes": ["kept:0", "kept:5"]}
    said = client.post("/api/surgery", json=asked).json()
    assert set(said) == keys(SurgeryData)
    found = discovery.found_with(served.circuit.provenance, "reference")
    surgery, kept = Surgery(served.spec, served.circuit, reference=found), Probes.load(served.folder)
    for place, answered in zip((0, 5), said["probes"], strict=True):
        probe = surgery.probe(kept.pictures[place], "any", "kept")
        expected = surgery.operate(probe, Edit.from_json(asked["edit"]))
        assert set(answered) == keys(OperatedProbe)
        assert answered["id"] == f"kept:{place}"
        assert answered["before"] == [dict(each) for each in kept.answers[place]]
        assert answered["after"] == [dict(each) for each in expected.answers] != answered["before"]
        assert answered["activations"] == pytest.approx(expected.activations.tolist(), rel=1e-5)
        assert set(answered["after"][0]) == keys(Answer)
    assert 0 < said["milliseconds"]["forward"] <= said["milliseconds"]["all"]


def test_nothing_removed_changes_nothing(served, client):
    edit = {"units": [], "edges": [], "ablation": "zero"}
    (probe,) = client.post("/api/surgery", json={"edit": edit, "probes": ["kept:1"]}).json()["probes"]
    assert probe["after"] == probe["before"]


def test_an_uploaded_image_is_a_probe_from_then_on(served, client):
    given = png((64, 48))
    said = client.post("/api/probe", content=given, headers={"X-Name": "my%20cat%2F..%2Fmug%00.png"}).json()
    assert set(said) == keys(UploadedData) | keys(UploadedData.__mro__[0]) | {
        "name", "kind", "answers", "activations", "id", "picture",
    }  # fmt: skip
    assert (said["name"], said["kind"]) == ("mug.png", "uploaded")
    picture = Image.open(io.BytesIO(base64.b64decode(said["picture"].partition(",")[2])))
    assert max(picture.size) <= 224
    surgery = Surgery(served.spec, served.circuit)
    probe = surgery.probe(Image.open(io.BytesIO(given)), "any", "any")
    assert said["activations"] == pytest.approx(probe.activations.tolist(), rel=1e-5)
    assert said["answers"] == [dict(each) for each in probe.answers]
    assert client.get(f"/api/probe/{said['id']}").json() == said
    assert client.get("/api/probe/kept:0").status_code == 404
    edit = edit_of(served, 3)
    (answered,) = client.post("/api/surgery", json={"edit": edit, "probes": [said["id"]]}).json()["probes"]
    after = surgery.operate(probe, Edit.from_json(edit)).answers
    assert answered["after"] == [dict(each) for each in after]


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": True})])
def test_images_are_known_by_their_content_and_not_their_name(client, kind, options):
    said = client.post("/api/probe", content=png(kind=kind, **options), headers={"X-Name": "page.svg"})
    assert (said.status_code, said.json()["name"]) == (200, "page.svg")


def test_an_image_that_was_taken_on_its_side_stands_upright(client):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 36, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    said = client.post("/api/probe", content=buffer.getvalue()).json()
    shown = Image.open(io.BytesIO(base64.b64decode(said["picture"].partition(",")[2]))).convert("RGB")
    expected = to_rgb(Image.open(buffer))
    assert (shown.size, shown.tobytes()) == ((20, 36), expected.tobytes())


def test_only_the_latest_uploads_are_kept(served, client, monkeypatch):
    monkeypatch.setattr(server, "N_UPLOADED", 2)
    first, *others = [client.post("/api/probe", content=png(seed=seed)).json()["id"] for seed in (10, 11, 12)]
    gone = client.post("/api/surgery", json={"edit": edit_of(served), "probes": [first]})
    assert gone.status_code == 404
    assert "give the image again" in gone.json()["error"]
    assert client.post("/api/surgery", json={"edit": edit_of(served), "probes": others}).status_code == 200


def test_accuracy_comes_line_by_line_and_is_what_python_finds(served, client):
    edit = edit_of(served, 9, ablation="mean")
    with client.stream("POST", "/api/accuracy", json={"edit": edit}) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        *progress, last = [json.loads(line) for line in answer.iter_lines()]
    assert progress == [{"done": done, "of": 8} for done in (0, 4, 8)]
    assert set(last) == keys(AccuracyData)
    evaluated = json.loads((served.folder / "evaluation.json").read_text())
    for what in ("concept", "others"):  # the very images of the folder's own test
        assert last["before"][what] == evaluated["baseline"][what]["agreement"]
    zero = client.post("/api/accuracy", json={"edit": {**edit, "ablation": "zero"}}).text.splitlines()[-1]
    circuit = evaluated["circuits"][0]  # the folder's test removed the whole circuit by zero
    assert json.loads(zero)["after"]["concept"] == circuit["concept"]["agreement"]
    assert json.loads(zero)["selectivity"]["value"] == pytest.approx(circuit["selectivity"]["value"])


class Slow(nn.Module):
    """Takes its time, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, maps: Tensor) -> Tensor:
        self.passes += 1
        time.sleep(0.02)
        return maps


def test_accuracy_ends_when_nobody_listens_and_a_second_tab_waits_for_one_batch(made):
    folder, spec = made
    slow = Slow()
    net = nn.Sequential(*spec.model, slow).eval()
    images = {"images": "render:grating,size=32,n=400", "others": OTHERS}
    with server.serving(folder, replace(spec, model=net), **images) as url:
        mine = Served(url, folder, spec)
        with mine.client() as client, client.stream("POST", "/api/accuracy", json={"edit": edit_of(mine)}) as answer:
            lines = answer.iter_lines()
            assert [json.loads(next(lines))["of"] for _ in range(3)] == [408] * 3
            began = time.monotonic()
            other = client.post("/api/surgery", json={"edit": edit_of(mine), "probes": ["kept:0"]})
            assert (other.status_code, time.monotonic() - began < 2) == (200, True)  # the whole takes four seconds
        time.sleep(0.5)
        ended = slow.passes
        time.sleep(0.5)
        assert slow.passes == ended < 150
    assert count_hooks(net) == 0


def test_ending_waits_for_no_long_answer(made, caplog):
    folder, spec = made
    net = nn.Sequential(*spec.model, Slow()).eval()
    said: list[str] = []

    def ask(mine: Served, started: threading.Event) -> None:
        with mine.client() as client, client.stream("POST", "/api/accuracy", json={"edit": edit_of(mine)}) as answer:
            for line in answer.iter_lines():
                said.append(line)
                started.set()

    with server.serving(folder, replace(spec, model=net), images="render:grating,size=32,n=400") as url:
        started = threading.Event()
        asking = threading.Thread(target=ask, args=(Served(url, folder, spec), started))
        asking.start()
        assert started.wait(10)
        began = time.monotonic()
    asking.join(10)
    assert time.monotonic() - began < 3
    assert json.loads(said[-1]) == {"error": "the server is ending; nothing was changed"}
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_an_edge_and_a_heat_map_are_made_on_demand(served, client):
    (edge,) = edges(served, 1)
    said = client.post("/api/edge", json={"source": edge[0], "target": edge[1]}).json()
    surgery = Surgery(served.spec, served.circuit, looked_at=discovery.found_with(served.circuit.provenance, "images"))
    expected = surgery.connection(*(Unit(*end) for end in edge))
    assert (said["kernel"]["side"], len(said["kernel"]["values"])) == (7, 49)
    assert said["kernel"]["values"] == pytest.approx(expected.kernels[0].ravel().tolist(), rel=1e-4, abs=1e-9)
    assert [each["name"] for each in said["contributions"]] == list(expected.images)
    own = client.post("/api/edge", json={"source": edge[0], "target": edge[1], "probes": ["kept:0"]}).json()
    assert [each["name"] for each in own["contributions"]] == [Probes.load(served.folder).names[0]]
    layer, index = units(served, 1)[0]
    heat = client.get("/api/heat", params={"layer": layer, "index": index, "probe": "kept:0"})
    assert heat.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(heat.content)).size == (24, 24)


def test_notes_are_kept_in_the_folder_and_on_the_page(served, client):
    key = ":".join(map(str, units(served, 1)[0]))
    said = client.put("/api/notes", json={"key": key, "name": "stripes", "text": "</script>", "by": "Ada"}).json()
    assert said == client.get("/api/notes").json() == load_notes(served.folder)
    assert (said[key]["name"], said[key]["text"]) == ("stripes", "</script>")
    with_note = client.get("/").text
    assert with_note.count("</script>") == client.get("/").text.count("<script")
    assert client.put("/api/notes", json={"key": key, "name": "", "text": "", "by": ""}).json() == {}
    assert client.put("/api/notes", json={"key": "1:999", "name": "x"}).status_code == 400
    assert client.put("/api/notes", json={"key": key, "name": 3}).status_code == 400


@pytest.mark.parametrize("index", ["003", "1" * 5000, "٣", "-1", "1e3", "10000000", ""])
def test_a_note_on_what_is_no_unit_is_a_mistake_of_the_one_who_asks(served, client, index):
    layer = units(served, 1)[0][0]
    answer = client.put("/api/notes", json={"key": f"{layer}:{index}", "text": "x"})
    assert answer.status_code == 400 and "a note" in answer.json()["error"]


@pytest.mark.parametrize("ablation", ["zero", "mean", "noise"])
def test_the_exported_script_does_what_the_page_showed(served, client, monkeypatch, ablation):
    edit = edit_of(served, 3, 4, ablation)
    script = client.post("/api/export", json={"edit": edit, "kind": "python"})
    assert script.headers["content-type"].startswith("text/plain")
    monkeypatch.setattr(viscircuits, "load_model", lambda address, weights: served.spec, raising=False)
    ran: dict[str, Any] = {"__name__": "exported"}
    exec(compile(script.text, "exported.py", "exec"), ran)
    found = discovery.found_with(served.circuit.provenance, "reference")
    surgery = Surgery(served.spec, served.circuit, reference=found)
    image = to_tensor(Image.open(io.BytesIO(png())))[None]
    with torch.no_grad():
        with ran["edited"]():
            given = served.spec.model(image)
        with surgery.under(Edit.from_json(edit)):
            expected = served.spec.model(image)
    assert torch.equal(given, expected)
    assert not torch.equal(given, served.spec.model(image))


def test_the_exported_script_names_what_images_become_and_writes_weights(served, client, monkeypatch, tmp_path, capsys):
    script = client.post("/api/export", json={"edit": edit_of(served, 3), "kind": "python"}).text
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(viscircuits, "load_model", lambda address, weights: served.spec, raising=False)
    monkeypatch.setattr("sys.argv", ["exported.py", str(tmp_path / "a.png")])
    ran: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script, "exported.py", "exec"), ran)
    assert re.fullmatch(r"a\.png: output \d before, output \d after\n", capsys.readouterr().out)
    ran["save"](tmp_path / "edited.safetensors", to_tensor(Image.open(tmp_path / "a.png"))[None])
    weights = client.post("/api/export", json={"edit": edit_of(served, 3), "kind": "weights"}).content
    one, other = load((tmp_path / "edited.safetensors").read_bytes()), load(weights)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_exported_weights_and_the_exported_command_make_the_same_network(served, client, monkeypatch, tmp_path):
    asked = {"edit": edit_of(served, 3, ablation="mean")}
    weights = client.post("/api/export", json={**asked, "kind": "weights"})
    assert weights.headers["content-disposition"] == 'attachment; filename="grating-edited.safetensors"'
    text = client.post("/api/export", json={**asked, "kind": "command"}).text
    written, command = re.fullmatch(r"cat > edit\.json <<'END'\n(.*)\nEND\n(.*)\n", text, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(discovery, "model_of", lambda circuit, weights: served.spec)
    Path("edit.json").write_text(written)
    name, *words = shlex.split(command)
    ran = CliRunner().invoke(app, words)
    assert (name, ran.exit_code) == ("viscircuits", 0), ran.output
    given, expected = load(Path("edited.safetensors").read_bytes()), load(weights.content)
    assert all(torch.equal(given[name], value) for name, value in expected.items())
    network, image = tiny(seed=3).model, torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    network.load_state_dict(given)
    removed = Circuit({"1": tuple(i for _, i in asked["edit"]["units"])}, {"1": 6})
    found = discovery.found_with(served.circuit.provenance, "reference")
    reference = Surgery(served.spec, served.circuit, reference=found).statistics
    with torch.no_grad(), ablate(served.spec, removed, "mean", reference=reference):
        assert torch.allclose(network(image), served.spec.model(image), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "n_edges", "ablation", "says"),
    [
        ("weights", 1, "zero", "export the edit as Python, or take the edges out"),
        ("command", 1, "zero", "export the edit as Python, or take the edges out"),
        ("command", 0, "noise", "use zero or mean"),
        ("weights", 0, "resample", "use zero or mean"),
        ("onnx", 0, "zero", "python, command or weights"),
    ],
)
def test_what_cannot_be_exported_says_what_to_do(served, client, kind, n_edges, ablation, says):
    said = client.post("/api/export", json={"edit": edit_of(served, 2, n_edges, ablation), "kind": kind})
    assert said.status_code == 400
    assert says in said.json()["error"]


# ------------------------------------------------------------------ who may ask


def test_it_listens_on_this_machine_alone(served):
    inodes = re.findall(rf"^ *\d+: ([0-9A-F]+):{served.port:04X} \S+ 0A ", Path("/proc/net/tcp").read_text(), re.M)
    assert inodes == ["0100007F"]  # 127.0.0.1
    everywhere = Path("/proc/net/tcp6")
    if everywhere.exists():
        assert not re.search(rf":{served.port:04X} \S+ 0A ", everywhere.read_text())


def test_each_start_has_a_long_token_of_its_own(served, made):
    folder, spec = made
    with server.serving(folder, spec) as url:
        assert url.partition("token=")[2] != served.token
    assert len(base64.urlsafe_b64decode(served.token + "==")) == 32


def test_the_token_becomes_a_cookie_that_no_script_reads(served):
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}") as client:
        led = client.get(f"/?token={served.token}")
        assert (led.status_code, led.headers["location"]) == (303, "/")
        cookie = led.headers["set-cookie"]
        assert cookie.startswith(f"viscircuits-{served.port}=")
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
        assert client.get("/").status_code == 200
        assert client.get("/api/network").status_code == 200


PATHS = ["/", "/web/style.css", "/api/network", "/api/notes", "/api/heat?layer=1&index=0&probe=kept:0", "/nowhere"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Cookie": "viscircuits-{port}=wrong"},
        {"Cookie": "viscircuits-1={token}"},
        {"Authorization": "Basic {token}"},
    ],
)
def test_without_the_token_nothing_is_said(served, path, headers):
    filled = {name: value.format(port=served.port, token=served.token) for name, value in headers.items()}
    said = httpx.get(f"http://127.0.0.1:{served.port}{path}", headers=filled)
    assert said.status_code == 403
    assert "token" in said.json()["error"]


@pytest.mark.parametrize("given", ["wrong", "", "%00", "é", "%ff", "%ed%a0%80", "{token}x"])
def test_a_wrong_token_opens_nothing(served, given):
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}") as client:
        said = client.get(f"/?token={given.format(token=served.token)}")
        assert (said.status_code, said.headers.get("set-cookie")) == (403, None)


def test_a_right_token_beside_a_wrong_one_opens_nothing(served):
    assert httpx.get(f"{served.url}&token=wrong").status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", "[::1]:{port}"]
)
def test_a_foreign_host_is_refused_even_with_the_token(served, host):
    status, body = served.raw("GET /api/network HTTP/1.1", host=host.format(port=served.port))
    assert status == 421
    assert b"layers" not in body


def test_two_hosts_or_none_are_refused(served):
    twice = "GET /api/network HTTP/1.1\r\nHost: evil.example"
    assert served.raw(twice)[0] in (400, 421)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as link:
        link.sendall(f"GET /api/network HTTP/1.0\r\nAuthorization: Bearer {served.token}\r\n\r\n".encode())
        assert link.recv(4096).split(b" ")[1] == b"421"


def test_localhost_is_this_machine_as_well(served):
    assert served.raw("GET /api/network HTTP/1.1", host=f"localhost:{served.port}")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_foreign_page_may_not_ask(served, origin, method):
    with served.client(Origin=origin.format(port=served.port)) as client:
        said = client.request(method, "/api/network" if method == "GET" else "/api/surgery", content=b"{}")
    assert said.status_code == 403
    assert "another page" in said.json()["error"]


def test_the_page_itself_may_ask(served):
    with served.client(Origin=f"http://127.0.0.1:{served.port}") as client:
        assert client.get("/api/network").status_code == 200


@pytest.mark.parametrize("path", ["probe", "surgery", "accuracy", "edge", "export", "notes"])
def test_a_form_cannot_change_anything(served, path):
    given = {"Authorization": f"Bearer {served.token}", "Content-Type": "text/plain"}
    method = "PUT" if path == "notes" else "POST"
    said = httpx.request(method, f"http://127.0.0.1:{served.port}/api/{path}", headers=given, content=b"{}")
    assert said.status_code == 403
    assert "X-Viscircuits" in said.json()["error"]


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(served, client, method):
    assert client.request(method, "/api/surgery").status_code == 405


HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@pytest.mark.parametrize(
    ("path", "status", "headers"),
    [
        ("/", 200, {}),
        ("/web/style.css", 200, {}),
        ("/api/network", 200, {}),
        ("/nowhere", 404, {}),
        ("/api/surgery", 405, {}),
        ("/api/heat", 400, {}),
        ("/", 403, {"Authorization": "none"}),
        ("/", 421, {"Host": "evil.example"}),
        ("/?token={token}", 303, {}),
    ],
)
def test_every_answer_says_what_a_browser_must_not_do(served, path, status, headers):
    with served.client(**headers) as client:
        said = client.get(path.format(token=served.token))
    assert said.status_code == status
    assert {name: said.headers.get(name) for name in HEADERS} == HEADERS
    assert "frame-ancestors 'none'" in said.headers["content-security-policy"]
    assert "default-src 'none'" in said.headers["content-security-policy"]
    assert "server" not in said.headers


# ------------------------------------------------------------------ what is never served


@pytest.mark.parametrize(
    "path",
    [
        "/web/../page.py",
        "/web/../../../../../../etc/passwd",
        "/web/%2e%2e%2fpage.py",
        "/web/%2e%2e/page.py",
        "/web/..%5cpage.py",
        "/web/%252e%252e%252fpage.py",
        "/web//etc/passwd",
        "/web/%2fetc%2fpasswd",
        "/../../etc/passwd",
        "//etc/passwd",
        "/etc/passwd",
        "/web/style.css%00.js",
        "/web/%00",
        "/web/index.html",
        "/web/",
        "/web",
        "/circuit.json",
        "/pictures/pictures.json",
        "/api/../circuit.json",
        "/web/outside.js",
        "/outside.js",
        "/link/secret.txt",
    ],
)
def test_no_path_leads_to_a_file(served, tmp_path, path):
    (tmp_path / "secret.txt").write_text("a secret of somebody's")
    links = served.folder / "outside.js", served.folder / "link"
    links[0].symlink_to(tmp_path / "secret.txt")
    links[1].symlink_to(tmp_path)
    try:
        status, body = served.raw(f"GET {path} HTTP/1.1")
    finally:
        for link in links:
            link.unlink()
    assert status == 404
    assert set(json.loads(body)) == {"error"}
    assert not any(secret in body for secret in (b"root:", b"a secret", b"def page", b"schema"))


@pytest.mark.parametrize(
    "target", [b"GET /web/\0 HTTP/1.1", b"GET /web/\xff HTTP/1.1", b"GET /a b HTTP/1.1", b"\x16\x03\x01"]
)
def test_a_line_that_is_no_request_gets_no_answer(served, target):
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as link:
        link.sendall(target + f"\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode())
        received = link.recv(65536)
    assert received.split(b" ")[1:2] in ([b"400"], [b"403"], [b"404"])


@pytest.mark.parametrize("name", ["pictures/leak.png", "pictures/attributions-x.png", "notes.json", "probes"])
def test_a_link_in_the_folder_that_leads_outside_is_refused_at_the_start(made, tmp_path, name):
    folder, spec = made
    copied = Bundle.load(folder).save(tmp_path / "copy")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.png").write_bytes(png())
    link = copied / name
    if link.is_dir():
        link.rename(tmp_path / "away")
    link.symlink_to(tmp_path / "secret" / "x.png" if link.suffix else tmp_path / "secret")
    with pytest.raises(ViscircuitsError, match="leads out of its folder"), server.serving(copied, spec):
        pass


def test_large_matrices_may_lie_elsewhere_and_links_within_are_fine(made, tmp_path):
    folder, spec = made
    copied = Bundle.load(folder).save(tmp_path / "copy")
    (copied / "attributions.safetensors").rename(tmp_path / "big.safetensors")
    (copied / "attributions.safetensors").symlink_to(tmp_path / "big.safetensors")
    (copied / "same.html").symlink_to("index.html")
    with server.serving(copied, spec) as url, Served(url, copied, spec).client() as client:
        assert client.get("/api/network").status_code == 200


# ------------------------------------------------------------------ uploads


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour: little to send, much to decode."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    pixels = b"".join(rows.compress(line * 100) for _ in range(height // 100)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def huge_canvas() -> bytes:
    """An animated WebP whose header claims 16383 × 16383 pixels."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(buffer.getvalue())
    at = data.index(b"VP8X") + 8 + 4
    data[at : at + 6] = (16382).to_bytes(3, "little") * 2
    return bytes(data)


@pytest.mark.parametrize(
    "make", [lambda: bomb(30_000, 30_000), lambda: bomb(12_000, 12_000), lambda: bomb(10_000, 6_000), huge_canvas],
    ids=["900 million", "144 million", "60 million", "webp"],
)  # fmt: skip
def test_a_decompression_bomb_is_refused_before_it_is_decoded(client, make):
    given = make()
    assert len(given) < 2**20
    client.post("/api/probe", content=png())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        said = client.post("/api/probe", content=given)
    assert said.status_code == 415
    assert "pixels" in said.json()["error"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (SVG, "not an image"),
        (b"\x89PNG\r\n\x1a\n" + SVG, "cannot be used"),
        (png(kind="GIF"), "PNG, JPEG or WebP"),
        (png(kind="BMP"), "PNG, JPEG or WebP"),
        (png(kind="TIFF"), "PNG, JPEG or WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "PNG, JPEG or WebP"),
        (png()[:200], "cannot be used"),
        (png(kind="JPEG")[:-300], "cannot be used"),
        (png(kind="WEBP")[:-300], "cannot be used"),
        (b"", "empty"),
        (b"GET / HTTP/1.1", "not an image"),
        (png((900, 20)), "20 times as long as wide"),
    ],
)
def test_what_is_no_whole_png_jpeg_or_webp_is_refused(client, given, says):
    said = client.post("/api/probe", content=given, headers={"Content-Type": "image/png", "X-Name": "a.png"})
    assert said.status_code == 415
    assert says in said.json()["error"]
    assert "Traceback" not in said.text


def send_until_stopped(served: Served, head: str, parts: Iterator[bytes]) -> tuple[int, bytes]:
    """How much of a body the server took, and what it said."""
    sent = 0
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as link:
        link.sendall(
            f"POST /api/probe HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Viscircuits: 1\r\n"
            f"Authorization: Bearer {served.token}\r\n{head}\r\n\r\n".encode()
        )
        try:
            for part in parts:
                link.sendall(part)
                sent += len(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            return sent, link.recv(65536)
        except ConnectionResetError:
            return sent, b""


def test_an_upload_of_a_gigabyte_is_cut_off_early_and_not_held(served):
    part = bytes(2**20)
    chunked = (f"{len(part):x}\r\n".encode() + part + b"\r\n" for _ in range(2**10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent, said = send_until_stopped(served, "Transfer-Encoding: chunked", chunked)
    assert server.UPLOAD_BYTES <= sent < server.UPLOAD_BYTES + 16 * 2**20  # what lies in sockets' buffers
    assert said.split(b" ")[1] == b"413"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


def test_a_length_that_says_too_much_is_refused_before_anything_is_sent(served):
    sent, said = send_until_stopped(served, f"Content-Length: {2**30}", iter(()))
    assert (sent, said.split(b" ")[1]) == (0, b"413")


def test_a_length_that_says_too_little_gives_a_truncated_image(served):
    whole = png((64, 64))
    _, said = send_until_stopped(served, "Content-Length: 300", iter([whole]))
    assert said.split(b" ")[1] == b"415"


def test_whoever_hangs_up_in_the_middle_harms_nobody(served, client):
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as link:
        link.sendall(
            f"POST /api/probe HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Viscircuits: 1\r\n"
            f"Authorization: Bearer {served.token}\r\nContent-Length: 90000\r\n\r\n".encode()
            + bytes(1000)
        )
    assert client.post("/api/probe", content=png()).status_code == 200


def test_an_upload_that_comes_too_slowly_is_given_up(served, client, monkeypatch):
    monkeypatch.setattr(server, "SLOWEST", 0.2)
    _, said = send_until_stopped(served, "Content-Length: 90000", iter([bytes(1000)]))
    assert said.split(b" ")[1] == b"408"
    monkeypatch.undo()
    assert client.post("/api/probe", content=png()).status_code == 200


# ------------------------------------------------------------------ what is asked wrongly


@pytest.mark.parametrize("path", ["surgery", "accuracy", "edge", "export"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"NaN", b'{"edit": {}}'],
    ids=lambda body: body[:12].decode("latin-1"),
)
def test_malformed_json_gets_a_sentence(client, path, body):
    said = client.post(f"/api/{path}", content=body)
    assert said.status_code == 400
    assert len(said.json()["error"]) > 10
    assert "Traceback" not in said.text


def test_huge_json_is_refused_while_it_comes_in(client):
    said = client.post("/api/surgery", content=(b" " * 2**16 for _ in range(1000)))
    assert said.status_code == 413


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"units": [["9", 0]]}, "no layer '9' in the circuit"),
        ({"units": [["1", 6]]}, "units 0 to 5"),
        ({"units": [["1", -1]]}, "units 0 to 5"),
        ({"units": [["1", 10**30]]}, "units 0 to 5"),
        ({"units": [["1", "0"]]}, "[layer, index]"),
        ({"units": [["__class__", 0]]}, "no layer"),
        ({"edges": [[["3", 0], ["1", 0]]]}, "does not run later"),
        ({"ablation": "median"}, "no ablation 'median'"),
        ({"ablation": None}, "no ablation"),
    ],
)
def test_an_edit_that_cannot_be_made_gets_a_sentence(served, client, changed, says):
    edit = {**edit_of(served), **changed}
    for path, more in (("surgery", {"probes": ["kept:0"]}), ("accuracy", {}), ("export", {"kind": "weights"})):
        said = client.post(f"/api/{path}", json={"edit": edit, **more})
        assert said.status_code == 400
        assert says in said.json()["error"]


@pytest.mark.parametrize(
    ("probes", "status"),
    [(["kept:99"], 404), (["kept:-1"], 404), (["kept:٣"], 404), (["../x"], 404), ("kept:0", 400), ([3], 400),
     (["kept:0"] * 33, 400), (None, 400)],
)  # fmt: skip
def test_a_probe_that_is_not_there_gets_a_sentence(served, client, probes, status):
    said = client.post("/api/surgery", json={"edit": edit_of(served), "probes": probes})
    assert (said.status_code, set(said.json())) == (status, {"error"})


@pytest.mark.parametrize(
    "query", ["", "layer=1&index=x&probe=kept:0", "layer=1&index=6&probe=kept:0", "layer=9&index=0&probe=kept:0"]
)
def test_a_heat_map_of_nothing_gets_a_sentence(client, query):
    said = client.get(f"/api/heat?{query}")
    assert (said.status_code, set(said.json())) == (400, {"error"})


class Faulty(nn.Module):
    """A network's part with a fault of its own, when told."""

    fails = False

    def forward(self, maps: Tensor) -> Tensor:
        if self.fails:
            raise KeyError("somewhere/secret.py")
        return maps


def test_a_fault_of_ours_tells_no_insides_and_harms_nothing(made):
    folder, spec = made
    net = nn.Sequential(*spec.model, Faulty()).eval()
    with server.serving(folder, replace(spec, model=net)) as url, Served(url, folder, spec).client() as client:
        asked = {"edit": edit_of(Served(url, folder, spec), 2, 3, "mean"), "probes": ["kept:0"]}
        before = client.post("/api/surgery", json=asked).json()
        Faulty.fails = True
        try:
            said = client.post("/api/surgery", json=asked)
            lines = client.post("/api/accuracy", json=asked).text.splitlines()
        finally:
            Faulty.fails = False
        assert said.status_code == 500
        for text in (said.text, lines[-1]):
            assert set(json.loads(text)) == {"error"}
            assert not re.search(r"Traceback|secret|KeyError|\.py", text)
        assert count_hooks(net) == 0
        assert client.post("/api/surgery", json=asked).json()["probes"] == before["probes"]


def test_a_hundred_requests_at_once_are_all_answered_right(served):
    surgery = Surgery(
        served.spec, served.circuit, reference=discovery.found_with(served.circuit.provenance, "reference")
    )
    kept, names = Probes.load(served.folder), ("zero", "mean", "resample", "noise")
    edits = [edit_of(served, 1 + i % 9, i % 5, names[i % 4]) for i in range(10)]
    probes = [surgery.probe(kept.pictures[place], "any", "any") for place in range(2)]
    expected = [
        [[dict(each) for each in surgery.operate(probe, Edit.from_json(edit)).answers] for probe in probes]
        for edit in edits
    ]
    with served.client() as client, ThreadPoolExecutor(100) as crowd:

        def ask(i: int) -> tuple[int, Any]:
            if i % 10 == 9:  # some of them upload, some go wrong
                return client.post("/api/probe", content=png(seed=i)).status_code, None
            if i % 10 == 8:
                return client.post("/api/surgery", json={"edit": edits[0], "probes": ["gone"]}).status_code, None
            said = client.post("/api/surgery", json={"edit": edits[i % 10], "probes": [f"kept:{i % 2}"]})
            return said.status_code, said.json()["probes"][0]["after"]

        found = list(crowd.map(ask, range(100)))
    assert [status for status, _ in found] == [{9: 200, 8: 404}.get(i % 10, 200) for i in range(100)]
    for i, (_, answers) in enumerate(found):
        assert answers is None or answers == expected[i % 10][i % 2]


# ------------------------------------------------------------------ starting and ending


def test_a_bundle_in_memory_is_served_as_well(made):
    folder, spec = made
    with server.serving(Bundle.load(folder), spec) as url, Served(url, folder, spec).client() as client:
        assert client.put("/api/notes", json={"key": "", "name": "stripes"}).json()[""]["name"] == "stripes"
    assert load_notes(folder) == {}
    with (
        pytest.raises(OSError, match="refused"),
        socket.create_connection(("127.0.0.1", int(url.split(":")[2][:5].rstrip("/")))),
    ):
        pass


def test_what_the_folder_names_and_is_gone_is_done_without(made, tmp_path):
    folder, spec = made
    bundle = Bundle.load(folder)
    nowhere = {**bundle.circuit.provenance, "sources": {"images": "nowhere", "reference": "nowhere"}}
    lost = replace(bundle, circuit=replace(bundle.circuit, provenance=nowhere), attributions=None)
    with (
        pytest.warns(UserWarning, match="without") as warned,
        server.serving(lost, spec) as url,
        Served(url, folder, spec).client() as client,
    ):
        said = client.get("/api/network").json()
        refused = client.post("/api/accuracy", json={"edit": edit_of(Served(url, folder, spec))})
        edge = edges(Served(url, folder, spec), 1)[0]
        looked = client.post("/api/edge", json={"source": edge[0], "target": edge[1]}).json()
    for missing in ("zero is the only ablation", "the concept images of the test"):
        assert any(missing in str(each.message) for each in warned)
    assert (said["ablations"], said["evaluated_on"]) == (["zero"], {})
    assert "--images IMAGES" in refused.json()["error"]
    assert len(looked["contributions"]) == len(bundle.probes)  # the kept probes stand in


@pytest.mark.parametrize("kept", [True, False])
def test_without_the_images_that_found_the_circuit_weights_are_checked_on_probes(made, kept):
    folder, spec = made
    bundle = Bundle.load(folder)
    nowhere = {**bundle.circuit.provenance, "sources": {"images": "nowhere", "reference": "nowhere"}}
    lost = replace(bundle, circuit=replace(bundle.circuit, provenance=nowhere), attributions=None)
    lost = lost if kept else replace(lost, probes=None)
    with (
        pytest.warns(UserWarning, match="without"),
        server.serving(lost, spec) as url,
        Served(url, folder, spec).client() as client,
    ):
        assert client.get("/api/network").json()["images_to_look_at"] is False
        asked = {"edit": edit_of(Served(url, folder, spec), 3), "kind": "weights"}
        bare = client.post("/api/export", json=asked)
        id_ = client.post("/api/probe", content=png()).json()["id"]
        given = client.post("/api/export", json={**asked, "probes": [id_]})
    assert (bare.status_code, given.status_code) == (200 if kept else 400, 200)
    assert kept or "add a probe" in bare.json()["error"]
    assert load(given.content).keys() == spec.model.state_dict().keys()


def test_exports_name_the_reference_images_that_were_given(made, monkeypatch, tmp_path):
    folder, spec = made
    for i, each in enumerate(open_images("render:circle,size=32,n=3")):
        each.image.save(tmp_path / f"circle {i}.png")
    with server.serving(folder, spec, reference=tmp_path) as url, Served(url, folder, spec).client() as client:
        asked = {"edit": edit_of(Served(url, folder, spec), 3, ablation="mean")}
        python, command, weights = (
            client.post("/api/export", json={**asked, "kind": kind}) for kind in ("python", "command", "weights")
        )
    monkeypatch.setattr(viscircuits, "load_model", lambda address, weights: spec, raising=False)
    ran: dict[str, Any] = {"__name__": "exported"}
    exec(compile(python.text, "exported.py", "exec"), ran)
    means = viscircuits.measure(spec, open_images(tmp_path), ["1"]).mean["1"]
    assert torch.allclose(ran["reference"].mean["1"], means)
    assert shlex.split(command.text.splitlines()[-1])[-4:-2] == ["--reference", str(tmp_path)]
    ran["save"](tmp_path / "edited.safetensors", torch.rand(2, 3, 32, 32))
    saved = load((tmp_path / "edited.safetensors").read_bytes())
    assert all(torch.allclose(value, saved[name]) for name, value in load(weights.content).items())


def test_other_images_may_be_given(made, tmp_path):
    folder, spec = made
    given = {"images": "render:circle,size=32,n=5", "reference": "render:circle,size=32,n=3", "labels": None}
    with server.serving(folder, spec, **given) as url, Served(url, folder, spec).client() as client:
        said = client.get("/api/network").json()
        last = json.loads(
            client.post("/api/accuracy", json={"edit": edit_of(Served(url, folder, spec))}).text.splitlines()[-1]
        )
    assert said["evaluated_on"] == {"concept": 5}
    assert last["selectivity"] is None
    for options, says in (({"others": OTHERS}, "name these too"), ({"reference": "nowhere"}, "nowhere")):
        with pytest.raises(ViscircuitsError, match=says), server.serving(folder, spec, **options):
            pass


def test_accuracy_is_of_the_classes_that_the_test_was_told(tmp_path):
    """Labels given as a table are nowhere but in the evaluation."""
    plain, folders = tiny(), {}
    spec = replace(plain, classes=tuple((name,) for name in ("cat", "dog", "ant", "bee")))
    for what, kind in (("a", "grating"), ("b", "colour")):
        folders[what] = tmp_path / what
        folders[what].mkdir()
        for i, each in enumerate(open_images(f"render:{kind},size=32,n=4")):
            each.image.save(folders[what] / f"{what}{i}.png")
    with torch.no_grad():
        answers = {
            each.name: int(spec.model(to_tensor(each.image)[None]).argmax())
            for folder in folders.values()
            for each in open_images(folder)
        }
    labels = {name: str((answer + (name == "a0.png")) % 4) for name, answer in answers.items()}  # one is wrong
    discover(
        spec, folders["a"], tmp_path / "out", reference=folders["b"], labels=labels, units=2, draws=1, bootstrap=0,
        n_pictures=0, edge_fractions=(1.0,),
    )  # fmt: skip
    with server.serving(tmp_path / "out", spec) as url, Served(url, tmp_path / "out", spec).client() as client:
        edit = {"units": [], "edges": [], "ablation": "zero"}
        last = json.loads(client.post("/api/accuracy", json={"edit": edit}).text.splitlines()[-1])
    evaluated = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert last["measure"] == evaluated["measure"] == "accuracy"
    for what in ("concept", "others"):
        assert last["before"][what] == evaluated["baseline"][what]["accuracy"]
    tested = evaluated["images"]["concept"]
    assert tested["classes"] == [int(labels[name]) for name in tested["names"]]
    for folder in folders.values():  # and when the images are gone the rest goes on
        folder.rename(folder.with_name(f"{folder.name}-moved"))
    with (
        pytest.warns(UserWarning, match="going on without"),
        server.serving(tmp_path / "out", spec) as url,
        Served(url, tmp_path / "out", spec).client() as client,
    ):
        assert client.get("/api/network").json()["evaluated_on"] == {}


def test_a_network_with_other_weights_is_refused(made, monkeypatch):
    monkeypatch.setattr(discovery, "load_model", lambda address, weights: tiny(seed=4))
    with pytest.raises(ModelError, match="--weights FILE"), server.serving(made[0]):
        pass


def test_view_serve_prints_where_opens_it_and_ends_on_ctrl_c(made, monkeypatch):
    folder, spec = made
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread alone")
    monkeypatch.setattr(server, "model_of", lambda circuit, weights: spec)
    before = signal.getsignal(signal.SIGINT)
    opened: list[str] = []
    statuses: list[int] = []

    def press(address: str) -> None:
        with httpx.Client(timeout=20) as client:  # the socket listens already: the answer comes once the server is up
            statuses.append(client.get(address, follow_redirects=True).status_code)
        with httpx.Client(timeout=20) as another:
            statuses.append(another.get(address, follow_redirects=True).status_code)
        os.kill(os.getpid(), signal.SIGINT)

    def browse(address: str) -> None:
        opened.append(address)
        threading.Thread(target=press, args=(address,), daemon=True).start()

    monkeypatch.setattr(webbrowser, "open", browse)
    ran = CliRunner().invoke(app, ["view", str(folder), "--serve"])
    assert (ran.exit_code, statuses) == (0, [200, 403]), ran.output
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", ran.stdout.strip())
    assert opened != [ran.stdout.strip()]  # a browser's command line can be read by others, so it holds no token
    assert signal.getsignal(signal.SIGINT) is before


def test_a_busy_port_says_so_before_the_work(made):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = CliRunner().invoke(app, ["view", str(made[0]), "--serve", "--no-browser", "--port", str(port)])
    assert ran.exit_code == 2
    assert f"cannot listen on port {port}" in ran.stderr
    assert "--port N" in ran.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--port", "80"), "--port is for a served page; add --serve"),
        (("--images", "x"), "--images is for a served page"),
        (("--serve", "--with", "x"), "shows one circuit"),
        (("--serve", "--port", "70000"), "65535"),
    ],
)
def test_options_that_do_not_go_together_are_named(made, words, says):
    ran = CliRunner().invoke(app, ["view", str(made[0]), "--no-browser", *words])
    assert ran.exit_code == 2
    assert says in ran.stderr


def test_edit_refuses_units_of_another_network(made, monkeypatch, tmp_path):
    folder, spec = made
    monkeypatch.setattr(discovery, "model_of", lambda circuit, weights: spec)
    other = Circuit({"1": (0,)}, {"1": 6}, provenance={"weights": "others"})
    other.save(tmp_path / "edit.json")
    words = ["edit", str(folder), "--circuit", str(tmp_path / "edit.json"), "--out", str(tmp_path / "x.safetensors")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 2
    assert "other weights" in ran.stderr


# ------------------------------------------------------------------ in a browser
# last, because Playwright keeps this thread's event loop


@pytest.mark.browser
def test_a_person_sees_on_the_page_what_ablate_gives_in_python(served, browser, tmp_path):
    (tmp_path / "mug.png").write_bytes(png((48, 48), seed=7))
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(15_000)
    complaints: list[str] = []
    tab = context.new_page()
    tab.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(served.url)
    tab.wait_for_selector("html[data-ready], html[data-error]", state="attached")
    assert "token" not in tab.url
    assert served.token not in tab.evaluate("document.cookie + document.documentElement.outerHTML")
    tab.get_by_role("tab", name="Probe").click()
    tab.set_input_files("#probe-file", tmp_path / "mug.png")
    tab.get_by_text("mug.png").first.wait_for()
    tab.get_by_role("tab", name="Surgery").click()
    tab.get_by_role("button", name="Select the whole circuit").click()
    tab.wait_for_selector(".operated .seen")
    shown = tab.locator(".operated").inner_text()
    kind = tab.locator('[data-key="ablation"]').input_value()
    tab.get_by_role("button", name="Measure accuracy").click()
    tab.get_by_role("button", name="Measure again").wait_for()
    context.close()
    reference = discovery.found_with(served.circuit.provenance, "reference")
    surgery = Surgery(served.spec, served.circuit, reference=reference)
    probe = surgery.probe(Image.open(tmp_path / "mug.png"), "mug", "mug")
    after = surgery.operate(probe, Edit(tuple(served.circuit), (), kind)).answers
    for answer in (probe.answers[0], after[0]):
        assert answer["label"] in shown
        assert f"{100 * answer['probability']:.2f}" in shown
    assert complaints == []
