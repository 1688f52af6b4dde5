"""Downloads from a real server on this machine that drops, lies, stalls, redirects and refuses."""

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cliptune.model import published as downloads
from cliptune.model.published import Patience, UnavailableError, download
from tests.helpers.local_server import Answer, send, serving

pytestmark = pytest.mark.usefixtures("no_proxy")

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = 150_000
ROOT = Path(downloads.__file__).parent
ETAG = '"v1"'
QUICK = Patience(answer=5, silence=0.3, pause=0.01, retries=2)


def send_range(handler: Any, *, stop: int | None = None, content: bytes = CONTENT, etag: str | None = ETAG) -> None:
    """Answer as a good server does, but end the connection before byte `stop`."""
    asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
    start = int(asked[len("bytes=") : -1]) if asked and condition in {None, etag} else 0
    if start >= len(content):
        return send(handler, status=416)
    told = {"Content_Length": len(content) - start, "ETag": etag}
    if start:
        told["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return send(handler, content[start:stop], status=206 if start else 200, **told)


def fetch(url: str, folder: Path, *, patience: Patience = QUICK) -> bytes:
    download(url, folder / "cache" / "w.pt", sha256=SHA256, patience=patience)
    return (folder / "cache" / "w.pt").read_bytes()


def refusal(url: str, folder: Path, *, patience: Patience = QUICK) -> str:
    """Return why there is no file; also check that none is in place and that the reason is one line."""
    with pytest.raises(UnavailableError) as caught:
        fetch(url, folder, patience=patience)
    assert not (folder / "cache" / "w.pt").exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def part_of(folder: Path) -> Path:
    return folder / "cache" / "w.pt.part"


def leave_part(folder: Path, content: bytes) -> None:
    part_of(folder).parent.mkdir()
    part_of(folder).write_bytes(content)


def test_a_file_arrives_and_nothing_else_is_left(tmp_path: Path) -> None:
    with serving(lambda handler, n: send_range(handler)) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"w.pt", ".w.pt.lock"}
        assert fetch(server.url, tmp_path) == CONTENT
        assert len(server.requests) == 1


@pytest.mark.parametrize("length", [None, len(CONTENT)])
def test_a_length_need_not_be_told(length: int | None, tmp_path: Path) -> None:
    with serving(lambda handler, n: send(handler, CONTENT, Content_Length=length)) as server:
        assert fetch(server.url, tmp_path) == CONTENT


@pytest.mark.parametrize(("etag", "condition"), [(ETAG, ETAG), ('W/"v1"', None), (None, None)])
def test_a_broken_connection_is_resumed(etag: str | None, condition: str | None, tmp_path: Path) -> None:
    with serving(lambda handler, n: send_range(handler, stop=HALF if n == 0 else None, etag=etag)) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert server.ranges == [(None, None), (f"bytes={HALF}-", condition)]


def test_any_number_of_breaks_is_survived_while_bytes_come(tmp_path: Path) -> None:
    with serving(lambda handler, n: send_range(handler, stop=(n + 1) * 30_000)) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert len(server.requests) == 10


def test_a_file_that_changed_meanwhile_is_not_mixed(tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        if n == 0:
            send_range(handler, stop=HALF, content=bytes(300_000), etag='"old"')
        else:
            send_range(handler)

    with serving(answer) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert server.ranges[1] == (f"bytes={HALF}-", '"old"')


def test_the_next_run_goes_on(tmp_path: Path) -> None:
    with serving(lambda handler, n: send_range(handler, stop=HALF)) as server:
        assert "ended after 150000 of 300000 bytes" in refusal(server.url, tmp_path)
        assert len(server.requests) == 1 + QUICK.retries
    assert part_of(tmp_path).read_bytes() == CONTENT[:HALF]
    with serving(lambda handler, n: send_range(handler)) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert server.ranges == [(f"bytes={HALF}-", None)]
    assert not part_of(tmp_path).exists()


def test_a_stalled_connection_is_resumed(tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        if n == 0:
            send(handler, CONTENT[:HALF], Content_Length=len(CONTENT))
            done.wait(5)
        else:
            send_range(handler)

    done = threading.Event()
    with serving(answer) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        done.set()
        assert server.ranges[1][0] == f"bytes={HALF}-"


def test_a_connection_that_ends_before_any_byte_is_not_tried_again(tmp_path: Path) -> None:
    with serving(lambda handler, n: send_range(handler, stop=0)) as server:
        assert "ended after 0 of 300000 bytes" in refusal(server.url, tmp_path)
        assert len(server.requests) == 1
    assert not part_of(tmp_path).exists()


@pytest.mark.parametrize("left", [b"x" * HALF, CONTENT + b"x"], ids=["of another file", "too long"])
def test_what_an_earlier_run_left_may_be_wrong(left: bytes, tmp_path: Path) -> None:
    leave_part(tmp_path, left)
    with serving(lambda handler, n: send_range(handler)) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert [asked for asked, _ in server.ranges] == [f"bytes={len(left)}-", None]


def test_a_whole_part_needs_no_server(tmp_path: Path) -> None:
    leave_part(tmp_path, CONTENT)
    assert fetch("http://127.0.0.1:9/w.pt", tmp_path) == CONTENT


def test_a_server_that_ignores_ranges(tmp_path: Path) -> None:
    leave_part(tmp_path, CONTENT[:HALF])
    with serving(lambda handler, n: send(handler, CONTENT)) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert len(server.requests) == 1


@pytest.mark.parametrize("told", ["bytes 0-299999/300000", "bytes 150001-299999/300000", "bytes */300000", None])
def test_a_server_that_sends_another_range(told: str | None, tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        if n == 1:
            send(handler, CONTENT, status=206, Content_Range=told)
        else:
            send_range(handler, stop=HALF if n == 0 else None)

    with serving(answer) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert [asked for asked, _ in server.ranges] == [None, f"bytes={HALF}-", None]


def test_another_file_is_not_used(tmp_path: Path) -> None:
    page = b"<html>log in</html>"
    with serving(lambda handler, n: send(handler, page, Content_Type="text/html; charset=utf-8")) as server:
        reason = refusal(server.url, tmp_path)
        assert len(server.requests) == 1
    assert "not the file published" in reason
    assert "19 bytes (text/html)" in reason
    assert hashlib.sha256(page).hexdigest() in reason
    assert not part_of(tmp_path).exists()


@pytest.mark.parametrize(
    ("length", "reason"), [(400_000, "ended after 300000 of 400000 bytes"), (HALF, "not the file published")]
)
def test_a_wrong_length(length: int, reason: str, tmp_path: Path) -> None:
    with serving(lambda handler, n: send(handler, CONTENT, Content_Length=length)) as server:
        assert reason in refusal(server.url, tmp_path)


def test_a_part_that_only_lacks_its_move_survives_a_server_that_tells_too_long_a_length(tmp_path: Path) -> None:
    with serving(lambda handler, n: send(handler, CONTENT, Content_Length=400_000)) as server:
        refusal(server.url, tmp_path)
        assert fetch(server.url, tmp_path) == CONTENT


def test_an_answer_that_is_no_http(tmp_path: Path) -> None:
    with serving(lambda handler, n: handler.wfile.write(b"220 mail.example\r\nHELO\r\n\r\n")) as server:
        assert "220 mail.example" in refusal(server.url, tmp_path)
        assert len(server.requests) == 1


def test_redirects_are_followed_with_the_range(tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        if handler.path == "/w.pt":
            send(handler, status=302, Location="/elsewhere")
        else:
            send_range(handler)

    leave_part(tmp_path, CONTENT[:HALF])
    with serving(answer) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert server.ranges[1][0] == f"bytes={HALF}-"


def test_a_redirect_loop_ends(tmp_path: Path) -> None:
    with serving(lambda handler, n: send(handler, status=302, Location=handler.path)) as server:
        reason = refusal(server.url, tmp_path)
    assert "HTTP 302" in reason
    assert "infinite loop" in reason


@pytest.mark.parametrize(("status", "reason"), [(403, "HTTP 403 Forbidden"), (404, "HTTP 404 Not Found")])
def test_a_refusal_is_not_tried_again(status: int, reason: str, tmp_path: Path) -> None:
    with serving(lambda handler, n: send(handler, status=status)) as server:
        assert refusal(server.url, tmp_path) == reason
        assert len(server.requests) == 1


def test_a_server_error_is_tried_again(tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        if n == 0:
            send(handler, status=500)
        else:
            send_range(handler)

    with serving(answer) as server:
        assert fetch(server.url, tmp_path) == CONTENT
    shutil.rmtree(tmp_path / "cache")
    with serving(lambda handler, n: send(handler, status=503)) as server:
        assert refusal(server.url, tmp_path) == "HTTP 503 Service Unavailable"
        assert len(server.requests) == 1 + QUICK.retries


def test_a_refused_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert refusal(f"http://127.0.0.1:{port}/w.pt", tmp_path) == "Connection refused"


@pytest.mark.parametrize("url", ["weights.example/w.pt", "gopher://weights.example/w.pt", "http:///w.pt"])
def test_an_address_that_is_none(url: str, tmp_path: Path) -> None:
    assert any(part in refusal(url, tmp_path) for part in ("unknown url type", "no host given"))


def test_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert refusal("http://weights.example/w.pt", tmp_path) == "Name or service not known"


def test_waiting_for_an_answer_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(answer=0.3, silence=60, pause=60)
    end = threading.Event()
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # further connections are dropped
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        started = time.monotonic()
        for listener in (silent, full):
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/w.pt"
            assert refusal(url, tmp_path, patience=patience) == "no answer within 0.3 s"
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: end.wait(60))
        assert refusal("http://weights.example/w.pt", tmp_path, patience=patience) == "no answer within 0.3 s"
        assert time.monotonic() - started < 30  # far below any of the 60 s
    end.set()


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=299_999))
    with serving(lambda handler, n: send_range(handler)) as server:
        with pytest.raises(OSError, match=r"needs 0\.3 MB more, and 0\.3 MB are free") as caught:
            fetch(server.url, tmp_path)
        assert not isinstance(caught.value, UnavailableError)
        part_of(tmp_path).write_bytes(CONTENT[:HALF])
        assert fetch(server.url, tmp_path) == CONTENT


def test_a_disk_that_is_full_keeps_what_has_arrived(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(lambda handler, n: send_range(handler)) as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"w\.pt\.part: File too large; what has arrived is kept") as caught:
                fetch(server.url, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not isinstance(caught.value, UnavailableError)
        assert part_of(tmp_path).read_bytes() == CONTENT[:100_000]
        assert fetch(server.url, tmp_path) == CONTENT
        assert server.ranges[1][0] == "bytes=100000-"


def test_two_at_once_share_one_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(handler: Any, n: int) -> None:
        second_waits.wait(10)
        send_range(handler)

    second_waits = threading.Event()
    monkeypatch.setattr(downloads.logger, "info", lambda *_: second_waits.set())
    found: list[bytes] = []
    with serving(answer) as server:
        threads = [threading.Thread(target=lambda: found.append(fetch(server.url, tmp_path))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.requests) == 1
    assert found == [CONTENT, CONTENT]
    assert second_waits.is_set()


def test_a_proxy_is_used_and_no_proxy_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda handler, n: send_range(handler)) as server:
        monkeypatch.setenv("http_proxy", server.base)
        assert fetch("http://weights.example/w.pt", tmp_path) == CONTENT
        assert server.requests == [("GET", "http://weights.example/w.pt")]
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert fetch(server.url, tmp_path / "again") == CONTENT


# The hub is asked in a process of its own, because its library reads the environment once. Its server is of this kind:
REPO = "openai/clip-vit-base-patch32"
LOOK_UP = f"cached_hub_model({REPO!r})"
HUB_FILES = {"config.json": b"{}", "model.safetensors": CONTENT}


def hub_answer(files: dict[str, bytes], *, etag: str | None = None) -> Answer:
    def answer(handler: Any, n: int) -> None:
        name = handler.path.rsplit("/", 1)[1]
        if name not in files:
            return send(handler, status=404)
        told = etag or hashlib.sha256(HUB_FILES.get(name, files[name])).hexdigest()
        headers: dict[str, Any] = {"X_Repo_Commit": "1" * 40, "ETag": f'"{told}"', "Content_Length": len(files[name])}
        return send(handler, files[name] if handler.command == "GET" else b"", **headers)

    return answer


def ask_hub(endpoint: str, cache: Path, call: str = f"download_hub_model({REPO!r})", **environment: str) -> str:
    """Return the path that was found, or the reason that was given."""
    code = f"""
from cliptune.model.published import Patience, UnavailableError, cached_hub_model, download_hub_model
try:
    print({call})
except UnavailableError as error:
    print("refused:", error)
"""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **settings}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done.stdout.strip()


def test_the_hub_is_asked_once_and_then_its_cache(tmp_path: Path) -> None:
    with serving(hub_answer(HUB_FILES)) as server:
        found = Path(ask_hub(server.base, tmp_path))
        assert found.read_bytes() == CONTENT
        assert server.requests[0] == ("HEAD", f"/{REPO}/resolve/main/model.safetensors")
        assert found.parts[-3:] == ("snapshots", "1" * 40, "model.safetensors")
        assert json.loads(found.with_name("config.json").read_text()) == {}
        num_requests = len(server.requests)
        assert ask_hub(server.base, tmp_path, LOOK_UP) == str(found)
        assert len(server.requests) == num_requests
        found.with_name("config.json").unlink()
        assert ask_hub(server.base, tmp_path, LOOK_UP) == "None"


def test_a_damaged_file_in_the_hubs_cache_is_replaced(tmp_path: Path) -> None:
    with serving(hub_answer(HUB_FILES)) as server:
        found = Path(ask_hub(server.base, tmp_path))
        found.resolve().write_bytes(CONTENT[:HALF])
        assert ask_hub(server.base, tmp_path, LOOK_UP) == "None"
        assert ask_hub(server.base, tmp_path) == str(found)
        assert found.read_bytes() == CONTENT


def test_the_hubs_second_weights_file(tmp_path: Path) -> None:
    with serving(hub_answer({"config.json": b"{}", "pytorch_model.bin": CONTENT})) as server:
        assert ask_hub(server.base, tmp_path).endswith("pytorch_model.bin")
    with serving(hub_answer({"config.json": b"{}"})) as server:
        assert ask_hub(server.base, tmp_path / "new") == "refused: has no model.safetensors or pytorch_model.bin"


def test_a_hub_that_lies_is_not_believed(tmp_path: Path) -> None:
    with serving(hub_answer({**HUB_FILES, "model.safetensors": bytes(300_000)})) as server:
        assert ask_hub(server.base, tmp_path).startswith("refused: not the file that the hub describes, removed")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(CONTENT)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda handler, n: send(handler, status=403), "refused: HTTP 403"),
        (lambda handler, n: send(handler, status=500), "refused: HTTP 500"),
        (hub_answer(HUB_FILES, etag="v1"), "the answer has no SHA-256"),
    ],
)
def test_a_hub_that_refuses(answer: Answer, reason: str, tmp_path: Path) -> None:
    with serving(answer) as server:
        assert reason in ask_hub(server.base, tmp_path)
        assert len(server.requests) == 1


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "HF_HUB_OFFLINE" in ask_hub(endpoint, tmp_path, HF_HUB_OFFLINE="1")
        quick = f"download_hub_model({REPO!r}, patience=Patience(answer=0.3))"
        assert ask_hub(endpoint, tmp_path, quick) in {"refused: no answer within 0.3 s", "refused: timed out"}
    assert ask_hub(endpoint, tmp_path) == "refused: Connection refused"
