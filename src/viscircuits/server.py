"""`viscircuits view DIR --serve`: the page with the network behind it.

1. `Explorer` answers: each method is one address of the page's API (`viscircuits.contract` has the shapes). It keeps
   the images that were uploaded, the latest few, and nothing of any edit.
2. The network runs in one thread, a question after the other in the order in which they came; accuracy over many
   images queues anew for each batch, so that a second tab waits for one batch at most.
3. `viscircuits.door` stands before it. No address leads to a file: the page's scripts are read when the server
   starts, and everything else is computed.

Needs the packages starlette and uvicorn (``pip install 'viscircuits[serve]'``).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import json
import logging
import math
import re
import secrets
import socket
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import torch
from PIL import Image

from viscircuits.bundle import Bundle, circuits_beside
from viscircuits.circuit import Unit
from viscircuits.comparing import elsewhere
from viscircuits.discovery import DRAWS, FINISHED, found_with, model_of, tested_on
from viscircuits.door import Application, Door
from viscircuits.errors import ImageError, ViscircuitsError
from viscircuits.images import ImageSet, Source, Unreadable, decode, open_images
from viscircuits.models import ModelSpec
from viscircuits.notes import load_notes, write_note
from viscircuits.probing import reduced
from viscircuits.recipes import as_command, as_python
from viscircuits.surgery import Edit, Probe, Surgery, unit_from_json
from viscircuits.trials import LabelSource

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response

ADDRESS = "127.0.0.1"
KINDS = ("PNG", "JPEG", "WEBP")
UPLOAD_BYTES = 32 * 2**20
UPLOAD_PIXELS = 50_000_000
LONGEST = 20  # times as long as wide: the network's transform would enlarge a thread of an image beyond measure
JSON_BYTES = 4 * 2**20
N_UPLOADED = 32
N_READING = 4  # uploads that are in memory at once
N_ASKED = 32  # probes in one question
PICTURE = 224  # pixels a side of the picture that an upload is answered with
SLOWEST = 60.0  # seconds that an upload may take
PATIENCE = 0.2  # seconds after which a waiting question looks whether anybody still wants its answer
LIMITS = {"upload_bytes": UPLOAD_BYTES, "upload_pixels": UPLOAD_PIXELS}
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
GONE = 499  # nobody reads this: the connection is closed
HEAVY = {FINISHED, DRAWS}  # at the top of the folder, never shown; may lie on another disk

logger = logging.getLogger(__name__)


class Refused(ViscircuitsError):
    """A request that is answered with another status than 400."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


# ------------------------------------------------------------------ doors


def serve(
    folder: str | Path,
    *,
    port: int = 0,
    ready: Callable[[str, str], None] = lambda address, once: None,
    progress: bool = False,
    **options: Any,
) -> None:
    """Answer the page of a result folder until somebody presses Ctrl-C.

    Parameters
    ----------
    folder
        What `discover` wrote.
    port
        Where to listen; 0 takes a free one.
    ready
        Is given the address to open, once the server listens, and another that opens the page a single time: for a
        browser's command line, which others can read.
    progress
        Show progress bars.
    options
        As for `explore`.

    Raises
    ------
    ViscircuitsError
        If the port is taken, the folder holds no circuit or its network cannot be loaded, or the packages that
        serve are not installed.
    """
    _check_installed()
    with _listening(port) as listening:  # before the work: a taken port shows at once
        port = listening.getsockname()[1]
        explorer = explore(folder, progress=progress, **options)
        token, once = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        server = _server(explorer, port, token, once)
        ready(_address(port, token), _address(port, once))
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # the way to end it; uvicorn hands it on once all is closed
            pass
        finally:
            explorer.close()


@contextmanager
def serving(
    given: str | Path | Bundle, model: ModelSpec | None = None, *, port: int = 0, **options: Any
) -> Iterator[str]:
    """The address, token and all, of a server that runs in a thread for as long as the context is open.

    Parameters
    ----------
    given
        A result folder, or a bundle in memory, which is put into a temporary one.
    model
        The network, if it is not to be loaded by the circuit's own address.
    port
        As for `serve`.
    options
        As for `explore`.

    Raises
    ------
    ViscircuitsError
        As `serve`.
    """
    _check_installed()
    with tempfile.TemporaryDirectory() as temporary, _listening(port) as listening:
        folder = given.save(temporary) if isinstance(given, Bundle) else Path(given)
        port = listening.getsockname()[1]
        explorer = explore(folder, model=model, **options)
        token = secrets.token_urlsafe(32)
        server = _server(explorer, port, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            yield _address(port, token)
        finally:
            server.should_exit = True
            thread.join()
            explorer.close()


def explore(
    folder: str | Path,
    *,
    model: ModelSpec | None = None,
    weights: str | Path | None = None,
    images: Source | None = None,
    others: Source | None = None,
    reference: Source | None = None,
    labels: LabelSource | None = "as before",
    progress: bool = False,
) -> Explorer:
    """Everything that answering the page of a result folder takes.

    What the folder names and is no longer there is done without, with a warning: without reference images ``zero`` is
    the only ablation, without the images of the test no accuracy can be measured.

    Parameters
    ----------
    folder
        What `discover` wrote.
    model
        The network, if it is not to be loaded by the circuit's own address.
    weights
        Where the model's weights are, if not where they were.
    images, others
        Images with and without the concept to measure accuracy on; by default those the circuit was tested on.
    reference
        Where ``mean``, ``resample`` and ``noise`` take their values from; by default the reference images the circuit
        was found with.
    labels
        As for `evaluate`; by default as in the evaluation of the folder, so far as names say it.
    progress
        Show progress bars.

    Raises
    ------
    ViscircuitsError
        If the folder holds no circuit, a link in it leads outside, or the network cannot be loaded.
    """
    folder = Path(folder)
    _check_links(folder)
    bundle = replace(Bundle.load(folder), attributions=None)  # they are large, and nothing here asks for them
    circuit = bundle.circuit
    spec = model or model_of(circuit, weights)
    if reference is not None:
        background: ImageSet | None = open_images(reference)
    else:
        missing = "reference images, so that zero is the only ablation" if "reference" in circuit.provenance else ""
        background = _or_without(lambda: found_with(circuit.provenance, "reference"), missing)
    if labels == "as before":
        labels = _labels_as_before(bundle, images is None)
    surgery = Surgery(
        spec, circuit, reference=background, tests=_tests(bundle, images, others), labels=labels,
        looked_at=_or_without(lambda: found_with(circuit.provenance, "images"), ""), progress=progress,
    )  # fmt: skip
    said = None if reference is None or background is None else background.address
    return Explorer(folder, bundle, surgery, None if weights is None else str(weights), said)


# ------------------------------------------------------------------ answering


Answering = Callable[["Explorer", "Request"], Awaitable["Response"]]


def _answers(method: Answering) -> Answering:
    """Turn whatever goes wrong into a sentence; what is our fault goes to the terminal as well."""

    @functools.wraps(method)
    async def answering(self: Explorer, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        try:
            return await method(self, request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception as error:
            status, why = _explained(error)
            return _json({"error": why}, status)

    return answering


class Explorer:
    """What the page of one result can ask.

    Parameters
    ----------
    folder
        The result folder, where notes are kept.
    bundle
        What it holds.
    surgery
        The network, ready to be asked.
    weights
        Where the weights were said to be, for exports.
    reference
        Address of the reference images, likewise.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        surgery: Surgery,
        weights: str | None = None,
        reference: str | None = None,
    ) -> None:
        self.folder, self.bundle, self.surgery = folder, bundle, surgery
        self.given = {"weights": weights, "reference": reference}
        self._uploaded: OrderedDict[str, Probe] = OrderedDict()
        self._kept: dict[str, Probe] = {}
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._drawing = threading.Lock()
        self._elsewhere = elsewhere(bundle.circuit, circuits_beside(folder, bundle.circuit))
        self._drawn: tuple[Mapping[str, Any], str] | None = None  # notes, and the page that shows them
        self._web = _scripts()
        self._ending = threading.Event()
        self._reading, self._decoding = asyncio.Semaphore(N_READING), asyncio.Semaphore(1)

    def application(self) -> Application:
        """The routes, as an ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        async def nothing(request: Request, error: Exception) -> Response:
            status = error.status_code if isinstance(error, HTTPException) else 404
            return _json({"error": f"there is no {request.method} {request.url.path} here"}, status)

        routes = [
            Route("/", self.page),
            Route("/web/{name}", self.script),
            Route("/favicon.ico", self.icon),
            Route("/api/network", self.network),
            Route("/api/probe", self.upload, methods=["POST"]),
            Route("/api/probe/{id}", self.uploaded),
            Route("/api/surgery", self.operate, methods=["POST"]),
            Route("/api/accuracy", self.accuracy, methods=["POST"]),
            Route("/api/edge", self.edge, methods=["POST"]),
            Route("/api/heat", self.heat),
            Route("/api/notes", self.notes, methods=["GET", "PUT"]),
            Route("/api/export", self.export, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: nothing})

    def end(self) -> None:
        """Answer nobody any more who waits, or whose answer takes several steps."""
        self._ending.set()

    def close(self) -> None:
        """Let the question that is being answered end, and drop those that wait."""
        self.end()
        self._network.shutdown(wait=True, cancel_futures=True)

    # -------------------------------------------------------------- the page

    @_answers
    async def page(self, request: Request) -> Response:
        """The page itself, with the notes as they are now."""
        from starlette.responses import HTMLResponse

        html = await asyncio.to_thread(self._page)
        return HTMLResponse(html, headers={"Content-Security-Policy": _policy(html)})

    def _page(self) -> str:
        with self._drawing:
            notes = load_notes(self.folder)
            if self._drawn is None or self._drawn[0] != notes:
                self._drawn = notes, replace(self.bundle, notes=notes).page(elsewhere=self._elsewhere, served=True)
            return self._drawn[1]

    @_answers
    async def script(self, request: Request) -> Response:
        """One of the page's own scripts or style sheets."""
        from starlette.responses import Response

        name = request.path_params["name"]
        if name not in self._web:
            raise Refused(404, f"there is no {request.url.path} here")
        return Response(self._web[name], headers={"Content-Type": TYPES[Path(name).suffix]})

    @_answers
    async def icon(self, request: Request) -> Response:
        """Nothing: browsers ask for it, and complain where there is no answer."""
        from starlette.responses import Response

        return Response(status_code=204)

    @_answers
    async def network(self, request: Request) -> Response:
        """What can be asked."""
        surgery = self.surgery
        return _json(
            {
                "model": surgery.model.address,
                "layers": [{"name": layer.address, "width": layer.n_units} for layer in surgery.layers],
                "ablations": list(surgery.ablations),
                "classes": surgery.model.outputs != "embedding",
                "evaluated_on": surgery.evaluated_on,
                "images_to_look_at": surgery.looked_at is not None,
                "limits": LIMITS,
            }
        )

    # -------------------------------------------------------------- one image

    @_answers
    async def upload(self, request: Request) -> Response:
        """Take in an image, and say what the network makes of it."""
        async with self._reading:
            try:
                data = await asyncio.wait_for(_body(request, UPLOAD_BYTES), SLOWEST)
            except asyncio.TimeoutError as error:
                raise Refused(408, f"the image did not arrive within {SLOWEST:g} seconds; try again") from error
            async with self._decoding:
                picture = await asyncio.to_thread(self._decoded, data)
        name = _name(request.headers.get("x-name", ""))
        id_ = hashlib.sha256(data + name.encode()).hexdigest()[:16]
        del data
        probe = await self._asked(request, self.surgery.probe, picture, name, "uploaded")
        self._uploaded[id_] = probe
        self._uploaded.move_to_end(id_)
        while len(self._uploaded) > N_UPLOADED:
            self._uploaded.popitem(last=False)
        return _json(_told(id_, probe))

    @_answers
    async def uploaded(self, request: Request) -> Response:
        """An image that was taken in before, for a page that was loaded anew."""
        id_ = request.path_params["id"]
        if id_ not in self._uploaded:
            raise Refused(404, _gone(id_))
        return _json(_told(id_, self._uploaded[id_]))

    def _decoded(self, data: bytes) -> Image.Image:
        """The picture that was uploaded, made as small as is of use before anything else is done with it."""
        try:
            picture, _ = decode(data, formats=KINDS, max_pixels=UPLOAD_PIXELS)
        except Unreadable as error:
            raise Refused(
                415,
                f"this image cannot be used: {error}. Give a PNG, JPEG or WebP of at most "
                f"{UPLOAD_PIXELS // 10**6} million pixels.",
            ) from error
        width, height = picture.size
        if max(width, height) > LONGEST * min(width, height):
            raise Refused(
                415,
                f"this image is {width}×{height} pixels; give one that is at most {LONGEST} times as long as wide",
            )
        return reduced(picture, self.surgery.input_size)

    @_answers
    async def operate(self, request: Request) -> Response:
        """What the network under an edit makes of some probes."""
        began = time.perf_counter()
        data = await _read_json(request)
        edit = Edit.from_json(data.get("edit"))
        self.surgery.check(edit)
        answered, seconds = [], 0.0
        for id_, probe in (await self._probes(request, data.get("probes"))).items():
            found = await self._asked(request, self.surgery.operate, probe, edit)
            seconds += found.seconds
            answers = {"before": probe.answers, "after": found.answers}
            answered.append({"id": id_, **answers, "activations": _numbers(found.activations)})
        taken = {"forward": 1e3 * seconds, "all": 1e3 * (time.perf_counter() - began)}
        return _json({"probes": answered, "milliseconds": {name: round(ms, 1) for name, ms in taken.items()}})

    @_answers
    async def heat(self, request: Request) -> Response:
        """Where on a probe a unit is active, as a PNG."""
        from starlette.responses import Response

        asked = request.query_params
        index = asked.get("index", "")
        if not re.fullmatch(r"\d{1,9}", index, re.ASCII):
            raise ViscircuitsError(f"a unit's index is a number from 0, got {index[:40]!r}")
        unit = Unit(asked.get("layer", ""), int(index))
        self.surgery.check_unit(unit)
        (probe,) = (await self._probes(request, [asked.get("probe", "")])).values()
        picture = await self._asked(request, self.surgery.heat, probe, unit)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    async def _probes(self, request: Request, ids: Any) -> dict[str, Probe]:
        """The probes of these names; those kept with the result are looked at when first asked for."""
        if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids) or len(ids) > N_ASKED:
            raise ViscircuitsError(f'probes are named by a list of at most {N_ASKED} names, such as ["kept:0"]')
        found: dict[str, Probe] = {}
        for id_ in ids:
            if id_ in self._uploaded:
                self._uploaded.move_to_end(id_)
                found[id_] = self._uploaded[id_]
            else:
                found[id_] = self._kept.get(id_) or await self._look_at(request, id_)
        return found

    async def _look_at(self, request: Request, id_: str) -> Probe:
        probes = self.bundle.probes
        place = re.fullmatch(r"kept:(\d{1,6})", id_, re.ASCII)
        if probes is None or place is None or int(place[1]) >= len(probes):
            raise Refused(404, _gone(id_))
        n = int(place[1])
        probe = await self._asked(request, self.surgery.probe, probes.pictures[n], probes.names[n], probes.kinds[n])
        return self._kept.setdefault(id_, probe)

    # -------------------------------------------------------------- many images

    @_answers
    async def accuracy(self, request: Request) -> Response:
        """How often the network is right with and without an edit, line by line while it is measured."""
        from starlette.responses import StreamingResponse

        data = await _read_json(request)
        steps = self.surgery.accuracy(Edit.from_json(data.get("edit")))
        return StreamingResponse(self._lines(steps), media_type="application/x-ndjson")

    async def _lines(self, steps: Iterator[Any]) -> AsyncIterator[str]:
        """Each step as a line. When nobody listens any more this is called off, and no further step is taken."""
        loop = asyncio.get_running_loop()
        try:
            while (step := await loop.run_in_executor(self._network, next, steps, None)) is not None:
                yield _text(step) + "\n"
                self._check_going_on()
        except Exception as error:
            yield _text({"error": _explained(error)[1]}) + "\n"

    @_answers
    async def edge(self, request: Request) -> Response:
        """What an edge is made of."""
        data = await _read_json(request)
        source, target = (unit_from_json(data.get(end)) for end in ("source", "target"))
        looked_at = await self._to_look_at(request, data)
        found = await self._asked(request, self.surgery.connection, source, target, looked_at)
        names = [probe.name for probe in looked_at] or found.images
        contributions = [
            {"name": name, "value": value} for name, value in zip(names, _numbers(found.contributions[0]), strict=True)
        ]
        kernel = {"side": found.side, "values": _numbers(found.kernels[0].ravel())}
        return _json({"kernel": kernel, "contributions": contributions})

    async def _to_look_at(self, request: Request, data: Mapping[str, Any]) -> list[Probe]:
        """The probes a question names; if it names none and the images that found the circuit are gone, those kept."""
        asked = data.get("probes", [])
        if not asked and self.surgery.looked_at is None:
            asked = [f"kept:{i}" for i in range(min(N_ASKED, len(self.bundle.probes or ())))]
        return list((await self._probes(request, asked)).values())

    # -------------------------------------------------------------- what is kept

    @_answers
    async def notes(self, request: Request) -> Response:
        """All notes, after one was perhaps written."""
        if request.method != "PUT":
            return _json(await asyncio.to_thread(load_notes, self.folder))
        data = await _read_json(request)
        given = {part: data.get(part, "") for part in ("key", "name", "text", "by")}
        wrong = next((part for part, value in given.items() if not isinstance(value, str)), None)
        if wrong is not None:
            raise ViscircuitsError(f"the {wrong} of a note is text, got {type(given[wrong]).__name__}")
        key = given.pop("key")
        writing = functools.partial(write_note, self.folder, self.bundle.circuit, key, **given)
        try:
            return _json(await asyncio.to_thread(writing))
        except OSError as error:
            raise Refused(500, f"the note cannot be kept: {error.strerror or error}") from error

    @_answers
    async def export(self, request: Request) -> Response:
        """An edit as a script, as commands, or as weights."""
        from starlette.responses import PlainTextResponse, Response

        data = await _read_json(request)
        edit, kind = Edit.from_json(data.get("edit")), data.get("kind")
        self.surgery.check(edit)
        removed = self.surgery.removed(edit)
        if kind == "python":
            return PlainTextResponse(as_python(edit, removed, self.folder, title=self.bundle.title, **self.given))
        if kind == "command":
            return PlainTextResponse(as_command(edit, removed, self.folder, **self.given))
        if kind != "weights":
            raise ViscircuitsError(f"an edit is exported as python, command or weights, not as {str(kind)[:40]!r}")
        probes = await self._to_look_at(request, data)
        folded = await self._asked(request, self.surgery.weights, edit, probes)
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.bundle.title).strip("-") or "circuit"
        headers = {"Content-Disposition": f'attachment; filename="{name}-edited.safetensors"'}
        return Response(folded, media_type="application/octet-stream", headers=headers)

    async def _asked(self, request: Request, question: Callable[..., Any], *about: Any) -> Any:
        """The network's answer once it is its turn, unless whoever asked is gone by then."""
        from starlette.requests import ClientDisconnect

        waiting = asyncio.get_running_loop().run_in_executor(self._network, question, *about)
        try:
            while not (await asyncio.wait([waiting], timeout=PATIENCE))[0]:
                self._check_going_on()
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            waiting.cancel()  # of no effect once it runs, or is done
        return waiting.result()

    def _check_going_on(self) -> None:
        if self._ending.is_set():
            raise Refused(503, "the server is ending; nothing was changed")


def _told(id_: str, probe: Probe) -> dict[str, Any]:
    said = {"id": id_, "name": probe.name, "kind": probe.kind, "picture": _data_uri(probe.picture)}
    return {**said, "answers": probe.answers, "activations": _numbers(probe.activations)}


def _gone(id_: str) -> str:
    return f"no probe {id_[:40]!r}: the server keeps the latest {N_UPLOADED} images; give the image again"


# ------------------------------------------------------------------ below: opening and listening


def _check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ViscircuitsError(f"serving needs the package {error.name}: pip install 'viscircuits[serve]'") from error


def _check_links(folder: Path) -> None:
    """No file of the folder may be one of elsewhere: what is in it is shown to a browser."""
    inside, never_shown = folder.resolve(), {folder / name for name in HEAVY}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path not in never_shown and not path.resolve().is_relative_to(inside):
            raise ViscircuitsError(
                f"{str(path)!r} is a link that leads out of its folder, and only what lies in the folder is shown; "
                "put the file itself there, or take the link away"
            )


def _or_without(opening: Callable[[], ImageSet], missing: str) -> ImageSet | None:
    """The images, or None with a warning that says what is missing."""
    try:
        return opening()
    except ImageError as error:
        if missing:
            warnings.warn(f"going on without {missing}: {error}", stacklevel=3)
        return None


def _tests(bundle: Bundle, images: Source | None, others: Source | None) -> dict[str, ImageSet]:
    """The images to measure accuracy on: those given, else those of the folder's own test."""
    given = {"concept": images, "others": others}
    if images is None and others is not None:
        raise ViscircuitsError("images without the concept are set against images with it; name these too (--images)")
    if images is not None:
        return {what: open_images(source) for what, source in given.items() if source is not None}
    found: dict[str, ImageSet] = {}
    for what in given:
        wanted = what == "concept" or (bundle.evaluation is not None and what in bundle.evaluation.data["images"])
        opened = _or_without(
            lambda what=what: tested_on(bundle.circuit, bundle.evaluation, what),  # type: ignore[misc]
            f"the {what} images of the test" if wanted else "",
        )
        if opened is None:
            break
        found[what] = opened
    return found


def _labels_as_before(bundle: Bundle, same_images: bool) -> LabelSource | None:
    """Where the classes of the test's images are read: as its result says, else from names."""
    if bundle.evaluation is None:
        return "auto"
    if not bundle.evaluation.data.get("labelled"):
        return None
    sets = bundle.evaluation.data["images"].values()
    pairs = {pair for each in sets for pair in zip(each["names"], each.get("classes", ()), strict=False)}
    table = {name: str(class_) for name, class_ in pairs}
    is_clear = len(table) == len(pairs)  # and not the same name in two folders
    return table if same_images and table and is_clear else "auto"


def _scripts() -> dict[str, bytes]:
    """The page's scripts and style sheets, by name."""
    folder = files("viscircuits") / "web"
    return {each.name: each.read_bytes() for each in folder.iterdir() if Path(each.name).suffix in TYPES}


def _listening(port: int) -> socket.socket:
    """A socket that listens on this machine alone."""
    # asyncio sends small answers at once where the protocol is named, and holds them back for 40 ms where it is not
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((ADDRESS, port))
        listening.listen()  # from now on whoever comes waits, and is not turned away
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ViscircuitsError(
            f"cannot listen on port {port} ({why}); choose another (--port N), or 0 for any that is free"
        ) from error
    return listening


def _server(explorer: Explorer, port: int, token: str, once: str | None = None) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """Tells the explorer when it ends, so that nobody is waited for."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            explorer.end()
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            Door(explorer.application(), port, token, once), http="h11", ws="none", loop="asyncio", lifespan="off",
            interface="asgi3", log_config=None, access_log=False, proxy_headers=False, server_header=False,
            date_header=False, timeout_graceful_shutdown=10,
        )
    )  # fmt: skip


def _address(port: int, token: str) -> str:
    return f"http://{ADDRESS}:{port}/?token={token}"


# ------------------------------------------------------------------ below: reading and writing


async def _body(request: Request, most: int) -> bytes:
    """The body, counted while it comes in: what the request says of its length is not trusted."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > most:
        raise Refused(413, _too_large(most))
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Refused(413, _too_large(most))
        parts.append(part)
    return b"".join(parts)


def _too_large(most: int) -> str:
    return f"this is more than the {most // 2**20} MiB that are taken; make it smaller"


async def _read_json(request: Request) -> dict[str, Any]:
    body = await _body(request, JSON_BYTES)
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ViscircuitsError(f"the request holds no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ViscircuitsError(f"the request is a JSON object, got {type(data).__name__}")
    return data


def _name(given: str) -> str:
    """A file's name as the page sends it, percent-encoded, without folders and what no line can show."""
    name = re.split(r"[/\\]", unquote(given, errors="replace"))[-1]
    return "".join(each for each in name if each.isprintable()).strip()[:120] or "image"


def _explained(error: Exception) -> tuple[int, str]:
    """Status and sentence for what went wrong."""
    if isinstance(error, Refused):
        return error.status, str(error)
    if isinstance(error, ViscircuitsError):
        return 400, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return 503, "the machine has not enough memory for this; ask for less. Nothing was changed."
    logger.error("a request failed", exc_info=error)
    return 500, "the server failed at this; its terminal says why. Nothing was changed."


def _json(data: Any, status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(_text(data), status, media_type="application/json")


def _text(data: Any) -> str:
    return json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    """The same with None for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _data_uri(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _policy(html: str) -> str:
    """What the page may do: run the server's scripts and the very ones that stand in it, and ask this server alone."""
    inline = [
        match[2]
        for match in re.finditer(r"<script\b([^>]*)>(.*?)</script>", html, re.DOTALL | re.IGNORECASE)
        if "application/json" not in match[1] and "src=" not in match[1]
    ]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in inline]
    scripts = " ".join(["'self'", *(f"'sha256-{digest}'" for digest in digests)])
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
