"""A page on this machine to search with: what it serves, and what it refuses.

Alone here starlette and uvicorn are imported, which the extra `search` brings.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.resources import files
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cliptune.features.encode import Encoder
from cliptune.language.catalogue import language_of
from cliptune.runtime.messages import count, printable
from cliptune.search.gallery import render, thumbnail
from cliptune.search.searcher import Match, Searcher, encode_image, encode_texts

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_QUERY = 1000
"""Characters of a text."""
MAX_UPLOAD = 32_000_000
"""Bytes of an image that is looked for."""
MAX_UPLOAD_PIXELS = 64_000_000
"""A phone's camera gives 50 million; a file of some kilobytes may promise billions."""
MAX_TOP = 500
MAX_DIGITS = 9
"""Of a number in a request."""
MAX_WAITING = 100
"""Requests that wait for the model; more are refused."""
SIDES = {"small": 320, "large": 1600}
NUM_REMEMBERED = 2000
"""Small images that stay in memory, about 20 KB each."""

_CONTENT_TYPES = {"page.js": "text/javascript", "style.css": "text/css", "page.css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # no other page shows these images
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

T = TypeVar("T")


class _Refused(Exception):  # noqa: N818  (an answer, no error)
    """A request that gets another answer than it hoped for: a status and a line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class _Worker:
    """Threads for what would hold up the other requests; how many may wait for them is bounded."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads)
        self._num_waiting = 0

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._num_waiting >= MAX_WAITING:
            raise _Refused(503, "too many requests at once: try again")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Page:
    """Answers to requests.

    Images go by their number alone, so no path comes from a request. All that the model does is done in one thread.
    """

    def __init__(self, encoder: Encoder, searcher: Searcher, *, title: str, top: int, language: str) -> None:
        self._language = language_of(language)
        self._encoder, self._searcher = encoder, searcher
        self._model, self._images = _Worker(1), _Worker(2)
        self._files = {name: files("cliptune.search").joinpath(f"pages/{name}").read_bytes() for name in _CONTENT_TYPES}
        num_images = len(searcher.index.paths)
        self._html = render(
            "page.html", title=printable(title), images=count(num_images, "image"), top=min(top, MAX_TOP),
            max_top=min(MAX_TOP, num_images), max_query=MAX_QUERY, note=searcher.lookup.note, language=language,
        )  # fmt: skip
        self._small = lru_cache(maxsize=NUM_REMEMBERED)(self._render_small)

    def close(self) -> None:
        for worker in (self._model, self._images):
            worker.close()

    async def page(self, _: Request) -> Response:
        return _response(self._html, "text/html")

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise _Refused(404, "there is nothing here")
        return _response(self._files[name], _CONTENT_TYPES[name])

    async def text(self, request: Request) -> Response:
        query, top = request.query_params.get("query", "").strip(), _top_of(request)
        if not 0 < len(query) <= MAX_QUERY:
            raise _Refused(400, f"a text has 1 to {MAX_QUERY} characters")

        def work() -> dict[str, Any]:
            features, num_truncated = encode_texts(self._encoder, [query])
            length = self._encoder.model.architecture.context_length
            note = f"longer than the model's {length} tokens, and cut" if num_truncated else ""
            return {**self._found(self._searcher.nearest(features, top)[0]), "note": self._language.say(note)}

        return _json(await self._model.run(work))

    async def upload(self, request: Request) -> Response:
        top, content = _top_of(request), await _body(request)

        def work() -> dict[str, Any]:
            try:
                features = encode_image(self._encoder, content, max_pixels=MAX_UPLOAD_PIXELS)
            except ValueError as error:
                raise _Refused(400, str(error)) from None
            return self._found(self._searcher.nearest(features, top)[0])

        return _json(await self._model.run(work))

    async def like(self, request: Request) -> Response:
        image, top = self._image_of(request), _top_of(request)
        return _json(await self._model.run(lambda: self._found(self._searcher.like(image, top))))

    async def image(self, request: Request) -> Response:
        image, size = self._image_of(request), request.path_params["size"]
        if size not in SIDES:
            raise _Refused(404, "there is nothing here")
        work = self._small if size == "small" else self._render_large
        try:
            return _response(await self._images.run(work, image), "image/jpeg")
        except (ValueError, OSError):
            raise _Refused(404, "the image cannot be read any more") from None

    def _render_small(self, image: int) -> bytes:
        return thumbnail(self._searcher.index.paths[image], SIDES["small"])

    def _render_large(self, image: int) -> bytes:
        return thumbnail(self._searcher.index.paths[image], SIDES["large"])

    def _image_of(self, request: Request) -> int:
        text = request.path_params["image"]
        if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) >= len(self._searcher.index.paths):
            raise _Refused(404, "there is no such image")
        return int(text)

    def _found(self, matches: list[Match]) -> dict[str, Any]:
        results = [
            {"image": match.image, "path": printable(match.path), "score": round(match.score, 4)} for match in matches
        ]
        return {"results": results}


class _Guard:
    """Lets a request through that a person at this machine can have made, and none that another site's page has.

    A name that leads to this machine (DNS rebinding) shows in the Host header, another site in Origin or
    Sec-Fetch-Site, which browsers set and pages cannot.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        answer = self._app if _is_own(scope) else _json({"error": "refused: not from this machine's page"}, 403)
        await answer(scope, receive, send_guarded)


def make_app(encoder: Encoder, searcher: Searcher, *, title: str, top: int, language: str = "en") -> Starlette:
    """Return the page's application.

    Args:
        encoder: what the index was made with.
        searcher: of the index.
        title: what the folder was called.
        top: images that a query gets at first.
        language: of the page and of what it answers.
    """
    said = language_of(language)

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, _Refused)
        return _json({"error": said.say(error.reason)}, error.status)

    async def is_gone(_: Request, __: Exception) -> Response:
        return _json({"error": said.say("the upload was broken off")}, 400)

    async def refuse_plainly(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json({"error": error.detail}, error.status_code, error.headers)

    page = _Page(encoder, searcher, title=title, top=top, language=language)
    routes = [
        Route("/", page.page),
        Route("/page/{name}", page.file),
        Route("/search", page.text),
        Route("/search", page.upload, methods=["POST"]),
        Route("/like/{image}", page.like),
        Route("/images/{image}/{size}", page.image),
    ]
    handlers = {_Refused: refuse, HTTPException: refuse_plainly, ClientDisconnect: is_gone}
    app = Starlette(routes=routes, middleware=[Middleware(_Guard)], exception_handlers=handlers)
    app.state.close = page.close
    return app


def open_port(port: int) -> socket.socket:
    """Listen at a port of this machine, which no other machine can reach; 0: any that is free.

    Raises:
        OSError: the port is taken, or not for everyone.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise OSError(f"--port {port}: {error.strerror}; try another one, or 0 for any that is free") from None
    return listener


def serve(
    encoder: Encoder, searcher: Searcher, listener: socket.socket, *, title: str, top: int, language: str = "en"
) -> None:
    """Serve the page until a signal ends it; see `make_app` and `open_port`."""
    app = make_app(encoder, searcher, title=title, top=top, language=language)
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_level="warning", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    ends = language_of(language).say("(Ctrl-C ends it)")
    print(f"http://{HOST}:{listener.getsockname()[1]}/  {ends}", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        app.state.close()


def _is_own(scope: Scope) -> bool:
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, []).append(value)
    hosts = headers.get(b"host", [])
    if len(hosts) != 1 or hosts[0].partition(b":")[0] not in {b"127.0.0.1", b"localhost"}:
        return False
    if any(origin != b"http://" + hosts[0] for origin in headers.get(b"origin", [])):
        return False
    # a link on another page may lead here, but nothing else of it
    is_link = scope["path"] == "/" and headers.get(b"sec-fetch-mode") == [b"navigate"]
    sites = headers.get(b"sec-fetch-site", [b"none"])
    return is_link or all(site in {b"same-origin", b"none"} for site in sites)


def _top_of(request: Request) -> int:
    text = request.query_params.get("top", "10")
    if not (text.isdecimal() and len(text) <= MAX_DIGITS and 0 < int(text) <= MAX_TOP):
        raise _Refused(400, f"top is a number from 1 to {MAX_TOP}")
    return int(text)


async def _body(request: Request) -> bytes:
    """Read an upload, as far as it is not too large."""
    too_large = _Refused(413, f"an image of at most {MAX_UPLOAD // 10**6} MB can be looked for")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > MAX_UPLOAD:
        raise too_large
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_UPLOAD:
            raise too_large
    if not content:
        raise _Refused(400, "the request holds no image")
    return bytes(content)


def _response(content: str | bytes, content_type: str) -> Response:
    # a name of a file need not be Unicode
    content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    return Response(content, media_type=content_type)


def _json(values: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    return Response(json.dumps(values), status, headers=headers, media_type="application/json")
