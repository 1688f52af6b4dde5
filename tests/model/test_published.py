"""Weights from this machine, and from real servers on it that drop, lie, stall, redirect and refuse."""

import hashlib
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliptune.model import published
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.published import ARCHIVES, HUB_REPOS, archive_source, fetch_first, published_weights
from cliptune.runtime.openai_clip import import_clip
from tests.helpers.local_server import Answer, send, serving

pytestmark = pytest.mark.usefixtures("no_proxy")

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ROOT = Path(published.__file__).parent.parent.parent
NOBODY = "http://127.0.0.1:9"


def test_the_table_is_that_of_openais_package() -> None:
    ours = {name: f"{published.OPENAI_URL}/{archive}" for name, archive in ARCHIVES.items()}
    assert ours == import_clip().clip._MODELS
    assert ARCHIVES.keys() == HUB_REPOS.keys() < ARCHITECTURES.keys()


def test_the_names_on_the_hub_are_those_of_open_clips_table() -> None:
    open_clip = pytest.importorskip("open_clip")
    for name, repo in HUB_REPOS.items():
        told = open_clip.get_pretrained_cfg(re.sub("@336px", "-336", name).replace("/", "-"), "openai")
        assert told["hf_hub"].strip("/") == repo


def set_proxy(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> None:
    for name, address in addresses.items():
        monkeypatch.setenv(name, address)
    urllib.request.install_opener(None)  # the next one reads the environment again


def fetch(url: str, folder: Path) -> bytes:
    path = folder / "cache" / "w.pt"
    assert fetch_first([archive_source(url, path, sha256=SHA256, silence_seconds=0.5)], answer_seconds=5) == path
    assert [file.name for file in path.parent.iterdir()] == ["w.pt"]
    return path.read_bytes()


def refusal(url: str, folder: Path) -> str:
    """Return why there is no file; also check that nothing is left behind and that the reason is one line."""
    with pytest.raises(OSError, match="cannot be had") as caught:
        fetch(url, folder)
    assert not list(folder.rglob("w.pt*"))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("length", [None, len(CONTENT)])
def test_a_file_arrives_and_nothing_else_is_left(length: int | None, tmp_path: Path) -> None:
    with serving(lambda handler, n: send(handler, CONTENT, Content_Length=length)) as server:
        assert fetch(server.url, tmp_path) == CONTENT


def test_redirects_are_followed(tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        if handler.path == "/w.pt":
            send(handler, status=302, Location="/elsewhere")
        else:
            send(handler, CONTENT)

    with serving(answer) as server:
        assert fetch(server.url, tmp_path) == CONTENT
        assert server.requests[-1] == ("GET", "/elsewhere")


def get(answer: Callable[[Any], None]) -> Answer:
    """Answer HEAD as a good server does, and GET otherwise."""
    return lambda handler, n: send(handler) if handler.command == "HEAD" else answer(handler)


FAULTS: dict[str, tuple[Answer, str]] = {
    "drops": (get(lambda handler: send(handler, CONTENT[:150_000], Content_Length=300_000)), "hash|IncompleteRead"),
    "drops at once": (get(lambda handler: None), "without response"),
    "too long a length": (get(lambda handler: send(handler, CONTENT, Content_Length=400_000)), ""),
    "too short a length": (get(lambda handler: send(handler, CONTENT, Content_Length=150_000)), "hash"),
    "another file": (get(lambda handler: send(handler, b"<html>log in</html>")), "invalid hash value"),
    "no HTTP": (lambda handler, n: handler.wfile.write(b"220 mail.example\r\n\r\n"), "220 mail.example"),
    "403": (lambda handler, n: send(handler, status=403), r"\(HTTP 403 Forbidden\)"),
    "404": (lambda handler, n: send(handler, status=404), r"\(HTTP 404 Not Found\)"),
    "503": (lambda handler, n: send(handler, status=503), r"\(HTTP 503 Service Unavailable\)"),
    "redirects for ever": (lambda handler, n: send(handler, status=302, Location=handler.path), "HTTP 302"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_with_a_fault(fault: str, tmp_path: Path) -> None:
    answer, reason = FAULTS[fault]
    with serving(answer) as server:
        if fault == "too long a length":  # all of it came, whatever was told
            assert fetch(server.url, tmp_path) == CONTENT
        else:
            assert re.search(reason, refusal(server.url, tmp_path)), fault


@pytest.mark.slow
def test_a_download_that_stalls_is_given_up(tmp_path: Path) -> None:
    end = threading.Event()

    def stall(handler: Any) -> None:
        send(handler, CONTENT[:150_000], Content_Length=300_000)
        end.wait(20)

    with serving(get(stall)) as server:
        started = time.monotonic()
        assert "timed out" in refusal(server.url, tmp_path)
        assert time.monotonic() - started < 10
        end.set()
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("url", ["weights.example/w.pt", "gopher://weights.example/w.pt", "http:///w.pt"])
def test_an_address_that_is_none(url: str, tmp_path: Path) -> None:
    assert any(part in refusal(url, tmp_path) for part in ("unknown url type", "no host given"))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(lambda handler, n: send(handler, CONTENT)) as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            assert "File too large" in refusal(server.url, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_two_at_once_both_have_the_file(tmp_path: Path) -> None:
    with serving(lambda handler, n: send(handler, CONTENT)) as server:
        found: list[bytes] = []

        def get_it() -> None:
            source = archive_source(server.url, tmp_path / "w.pt", sha256=SHA256)
            found.append(fetch_first([source]).read_bytes())

        threads = [threading.Thread(target=get_it) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    socket.setdefaulttimeout(None)  # which two threads set and put back in any order
    assert found == [CONTENT, CONTENT]
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_a_proxy_is_used_and_no_proxy_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda handler, n: send(handler, CONTENT)) as server:
        set_proxy(monkeypatch, http_proxy=server.base)
        assert fetch("http://weights.example/w.pt", tmp_path) == CONTENT
        assert server.requests[-1] == ("GET", "http://weights.example/w.pt")
        set_proxy(monkeypatch, http_proxy=NOBODY, no_proxy="127.0.0.1")
        assert fetch(server.url, tmp_path / "again") == CONTENT


def test_sources_are_tried_in_order_until_one_has_the_file(tmp_path: Path) -> None:
    def answer(handler: Any, n: int) -> None:
        send(handler, CONTENT if "right" in handler.path else b"wrong")

    with serving(answer) as server:
        names = ("wrong", "right", "right_too")
        sources = [archive_source(f"{server.base}/{name}", tmp_path / name, sha256=SHA256) for name in names]
        assert fetch_first(sources) == tmp_path / "right"
        assert [path for method, path in server.requests if method == "GET"] == ["/wrong", "/right"]


@pytest.mark.slow
def test_sources_that_do_not_answer_share_one_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connects and is silent, one hangs in the look-up of its name, where no library has a time limit."""
    assert published.ANSWER_SECONDS <= 9
    end = threading.Event()
    look_up = socket.getaddrinfo

    def hang(host: str, *rest: Any, **options: Any) -> Any:
        return look_up(host, *rest, **options) if host == "127.0.0.1" else end.wait(60)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/w.pt", *["http://weights.example/w.pt"] * 3]
        started = time.monotonic()
        with pytest.raises(OSError, match=r"(.* cannot be had \((no answer within 0\.5 s|timed out)\)(; )?){4}"):
            fetch_first([archive_source(url, tmp_path / "w", sha256=SHA256) for url in urls], answer_seconds=0.5)
        assert time.monotonic() - started < 10
        with serving(lambda handler, n: send(handler, CONTENT)) as server:  # a later source need not wait for them
            sources = [archive_source(url, tmp_path / "w", sha256=SHA256) for url in (server.url, urls[1])]
            started = time.monotonic()
            assert fetch_first(sources, answer_seconds=60).read_bytes() == CONTENT
            assert time.monotonic() - started < 10
    end.set()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub; no test looks into the real one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_hub_cache(cache: Path, repo: str, name: str, content: bytes) -> Path:
    """Lay a file down as huggingface_hub does; return the blob, whose name is its SHA-256."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    blob, snapshot = folder / "blobs" / hashlib.sha256(content).hexdigest(), folder / "snapshots" / ("1" * 40)
    for directory in (blob.parent, snapshot, folder / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    (folder / "refs" / "main").write_text(snapshot.name)
    (snapshot / name).symlink_to(blob)
    return blob


@pytest.mark.parametrize(
    ("repo", "name"),
    [
        ("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"),
        ("openai/clip-vit-base-patch32", "model.safetensors"),
        ("openai/clip-vit-base-patch32", "pytorch_model.bin"),
    ],
)
def test_weights_in_the_hubs_cache_need_no_network(
    repo: str, name: str, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_proxy(monkeypatch, https_proxy=NOBODY)
    blob = put_into_hub_cache(hub_cache, repo, name, CONTENT)
    assert published_weights("ViT-B/32", cache_dir=tmp_path).read_bytes() == CONTENT
    blob.write_bytes(CONTENT[:-1])
    with pytest.raises(OSError, match="no weights for ViT-B/32"):
        published_weights("ViT-B/32", cache_dir=tmp_path)


def test_the_image_tower_that_timm_keeps_beside_both_is_not_taken(hub_cache: Path, tmp_path: Path) -> None:
    put_into_hub_cache(hub_cache, HUB_REPOS["RN50"], "model.safetensors", CONTENT)
    assert published.cached_weights("RN50") is None


def test_an_archive_on_this_machine_is_taken_and_a_damaged_one_is_not(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_proxy(monkeypatch, https_proxy=NOBODY)
    monkeypatch.setitem(ARCHIVES, "RN50", f"{SHA256}/RN50.pt")
    (tmp_path / "RN50.pt").write_bytes(CONTENT)
    assert published_weights("RN50", cache_dir=tmp_path) == tmp_path / "RN50.pt"
    (tmp_path / "RN50.pt").write_bytes(CONTENT[:-1])
    with serving(lambda handler, n: send(handler, CONTENT)) as server:
        monkeypatch.setenv("CLIP_MIRROR", f"{server.base}/models/")
        assert published_weights("RN50", cache_dir=tmp_path).read_bytes() == CONTENT
        assert server.requests[-1] == ("GET", f"/models/{SHA256}/RN50.pt")
    assert "RN50.pt is damaged" in caplog.text


@pytest.mark.usefixtures("hub_cache")
def test_weights_that_cannot_be_had_name_every_reason_and_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_proxy(monkeypatch, https_proxy=NOBODY)
    with serving(lambda handler, n: send(handler, b"another file")) as server:
        monkeypatch.setenv("CLIP_MIRROR", server.base)
        with pytest.raises(OSError, match="no weights for RN50") as error:
            published_weights("RN50", cache_dir=tmp_path)
    message, archive = str(error.value), ARCHIVES["RN50"]
    for part in (
        f"{server.base}/{archive} cannot be had (invalid hash value",
        f"{published.OPENAI_URL}/{archive} cannot be had (Connection refused)",
        "timm/resnet50_clip.openai on the Hugging Face Hub cannot be had (", f"SHA-256 {archive.split('/')[0]}",
        str(tmp_path / "RN50.pt"), "CLIP_MIRROR", "HF_ENDPOINT", "--pretrained none", "--pretrained FILE",
    ):  # fmt: skip
        assert part in message
    assert len(message.splitlines()) == 1
    with pytest.raises(ValueError, match="ViT-Ti/32 has no published weights"):
        published_weights("ViT-Ti/32")


# The hub is asked in a process of its own, because its library reads the environment once. Its server is of this kind:
REPO = "timm/resnet50_clip.openai"
ETAG = f'"{SHA256}"'


def hub_answer(content: bytes = CONTENT) -> Answer:
    def answer(handler: Any, n: int) -> None:
        headers: dict[str, Any] = {"X_Repo_Commit": "1" * 40, "ETag": ETAG, "Content_Length": len(content)}
        send(handler, content if handler.command == "GET" else b"", **headers)

    return answer


def ask_hub(endpoint: str, cache: Path, *, answer_seconds: int = 60, **environment: str) -> str:
    """Return the path that was found, or the reason that was given."""
    code = f"""
from cliptune.model.published import fetch_first, hub_source
try:
    print(fetch_first([hub_source({REPO!r})], answer_seconds={answer_seconds}))
except OSError as error:
    print(error)
"""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **settings}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done.stdout.strip()


@pytest.mark.slow
def test_a_file_of_the_hub_comes_into_its_cache_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    with serving(hub_answer()) as server:
        found = Path(ask_hub(server.base, tmp_path))
        assert found.read_bytes() == CONTENT
        assert found.parts[-3:] == ("snapshots", "1" * 40, "open_clip_model.safetensors")
        assert ("GET", f"/{REPO}/resolve/main/open_clip_model.safetensors") in server.requests
        found.resolve().write_bytes(CONTENT[:150_000])
        assert ask_hub(server.base, tmp_path) == str(found)
        assert found.read_bytes() == CONTENT


@pytest.mark.slow
def test_a_hub_that_lies_or_refuses_is_not_believed(tmp_path: Path) -> None:
    with serving(hub_answer(bytes(300_000))) as server:
        assert "not the file that the hub describes" in ask_hub(server.base, tmp_path)
    with serving(lambda handler, n: send(handler, status=403)) as server:
        assert f"{REPO} on the Hugging Face Hub cannot be had (HTTP 403)" in ask_hub(server.base, tmp_path / "new")


@pytest.mark.slow
def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "HF_HUB_OFFLINE" in ask_hub(endpoint, tmp_path, HF_HUB_OFFLINE="1")
        assert re.search(r"no answer within 2 s|timed out", ask_hub(endpoint, tmp_path, answer_seconds=2))
    assert "Connection refused" in ask_hub(endpoint, tmp_path)


@pytest.mark.parametrize("home", ["nowhere", "/dev/null", "/proc/1/fdinfo"])
def test_without_a_home_the_way_out_is_told_and_no_folder_is_made(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "CLIP_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setattr(published, "cached_weights", lambda name: None)
    monkeypatch.setattr(published, "fetch_first", lambda sources: sources[0].fetch())
    monkeypatch.setattr(
        published, "archive_source", lambda url, path, sha256: published.Source(url, id, path.parent.mkdir)
    )
    with pytest.raises(OSError, match="--pretrained FILE"):
        published_weights("ViT-B/32")
    assert not list(tmp_path.iterdir())


def test_a_home_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user without an entry in the database of users."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(published, "cached_weights", lambda name: None)
    with pytest.raises(OSError, match=r"no home folder to keep them in .*--pretrained FILE"):
        published_weights("ViT-B/32")


def test_a_cache_that_may_not_be_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "/root/.cache")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", denied)
    assert published.cached_weights("ViT-B/32") is None
