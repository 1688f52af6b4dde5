"""A real HTTP server on this machine, for tests of what servers do."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[[Any, int], None]


class Server:
    """What a test sees of its server."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.url = f"{self.base}/w.pt"
        self.requests: list[tuple[str, str]] = []


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    """Run a server that answers its n-th request (from 0) with `answer(handler, n)`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append((self.command, self.path))
            answer(self, len(server.requests) - 1)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        server = Server(web.server_port)
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        web.shutdown()


def send(handler: Any, body: bytes = b"", *, status: int = 200, **headers: Any) -> None:
    """Answer; `Content_Length=None` leaves that header out."""
    handler.send_response(status)
    for name, value in {"Content_Length": len(body), **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)
