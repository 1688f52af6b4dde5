import asyncio
import io
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from starlette.applications import Starlette
from starlette.testclient import TestClient

from cliptune.features.encode import Encoder
from cliptune.search import server
from cliptune.search.index import ImageIndex, read_index
from cliptune.search.searcher import Searcher, encode_image, encode_texts
from tests.helpers.datasets import make_images, png_bytes

ADDRESS = "http://127.0.0.1:8000"
NUM_IMAGES = 12


@pytest.fixture(scope="module")
def index(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("served")
    make_images(folder / "images", *(f"{number:02} <b>&.png" for number in range(NUM_IMAGES)))
    (folder / "secret.txt").write_text("secret")
    return read_index(encoder, folder / "images", cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def app(encoder: Encoder, index: ImageIndex) -> Iterator[Starlette]:
    app = server.make_app(encoder, Searcher(index), title="my <images>", top=5)
    yield app
    app.state.close()


@pytest.fixture
def client(app: Starlette) -> Iterator[TestClient]:
    with TestClient(app, base_url=ADDRESS) as client:
        yield client


def test_the_page_asks_nothing_of_another_place(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert "my &lt;images&gt;" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    for name in ("page.js", "page.css", "style.css"):
        assert client.get(f"/page/{name}").status_code == 200


def test_a_text_finds_what_the_model_finds(client: TestClient, encoder: Encoder, index: ImageIndex) -> None:
    answer = client.get("/search", params={"query": "a red heart", "top": "4"}).json()
    features, _ = encode_texts(encoder, ["a red heart"])
    (wanted,) = Searcher(index).nearest(features, 4)
    assert [(found["image"], found["path"]) for found in answer["results"]] == [
        (each.image, each.path) for each in wanted
    ]
    assert answer["results"][0]["score"] == pytest.approx(wanted[0].score, abs=1e-4)
    assert answer["note"] == ""


def test_a_text_that_is_cut_is_said(client: TestClient) -> None:
    assert "77 tokens" in client.get("/search", params={"query": "heart " * 90}).json()["note"]


def test_an_upload_finds_itself_and_more_like_it_does_not(
    client: TestClient, encoder: Encoder, index: ImageIndex
) -> None:
    content = Path(index.paths[3]).read_bytes()
    (best, *_) = client.post("/search?top=3", content=content).json()["results"]
    assert (best["image"], best["score"]) == (3, pytest.approx(1, abs=1e-4))
    like = client.get("/like/3", params={"top": "500"}).json()["results"]
    (wanted,) = Searcher(index).nearest(encode_image(encoder, content), NUM_IMAGES)
    scores = {match.image: match.score for match in wanted if match.image != 3}
    assert {found["image"]: pytest.approx(found["score"], abs=1e-4) for found in like} == scores
    assert [found["score"] for found in like] == sorted((found["score"] for found in like), reverse=True)


def test_images_are_jpegs_of_bounded_size_without_metadata(client: TestClient, index: ImageIndex) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.new("RGB", (3000, 20), "blue").save(index.paths[5], exif=exif)
    for size, side in (("small", 320), ("large", 1600)):
        answer = client.get(f"/images/5/{size}")
        assert answer.headers["content-type"] == "image/jpeg"
        assert b"where I live" not in answer.content
        assert max(Image.open(io.BytesIO(answer.content)).size) == side


def test_an_image_that_is_gone_is_said(client: TestClient, index: ImageIndex) -> None:
    Path(index.paths[6]).write_text("no image")
    answer = client.get("/images/6/large")
    assert (answer.status_code, answer.json()) == (404, {"error": "the image cannot be read any more"})


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ({}, True),
        ({"host": "localhost:9000"}, True),  # as a tunnel has it
        ({"host": "evil.example"}, False),
        ({"host": "127.0.0.1.evil.example"}, False),
        ({"host": ""}, False),
        ({"origin": ADDRESS}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"origin": "null"}, False),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),
    ],
)
def test_other_sites_are_refused(client: TestClient, headers: dict[str, str], is_allowed: bool) -> None:
    for answer in (
        client.get("/search?query=a", headers=headers),
        client.post("/search", content=png_bytes(1), headers=headers),
        client.get("/images/1/small", headers=headers),
        client.get("/like/1", headers=headers),
    ):
        assert answer.status_code == (200 if is_allowed else 403), answer.text
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers


def test_a_link_of_another_site_leads_to_the_page(client: TestClient) -> None:
    assert client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200
    assert client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}).status_code == 403


def png_that_promises(width: int, height: int) -> bytes:
    """A PNG of a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


HOSTILE: list[tuple[str, str, Any, int]] = [
    ("GET", "/images/../../../../etc/passwd", None, 404),
    ("GET", "/images/..%2f..%2fsecret.txt/small", None, 404),
    ("GET", "/page/..%2f..%2fserver.py", None, 404),
    ("GET", "/page/gallery.html", None, 404),
    ("GET", "/images/%00/small", None, 404),
    ("GET", "/images/-1/small", None, 404),
    ("GET", f"/images/{NUM_IMAGES}/small", None, 404),
    ("GET", f"/images/{'9' * 5000}/small", None, 404),
    ("GET", "/images/%D9%A3/small", None, 200),  # an Arabic three is one
    ("GET", "/images/%C2%B2/small", None, 404),  # ², which is no number to count with
    ("GET", "/images/1/huge", None, 404),
    ("GET", "/like/1?top=0", None, 400),
    ("GET", "/like/1?top=501", None, 400),
    ("GET", f"/like/1?top={'9' * 5000}", None, 400),
    ("GET", "/like/1?top=1e3", None, 400),
    ("GET", "/search", None, 400),
    ("GET", "/search?query=%20%20", None, 400),
    ("GET", f"/search?query={'a' * 1001}", None, 400),
    ("GET", "/search?query=%00%ff%fe%ed%a0%80", None, 200),
    ("GET", "/search?query=%F0%9F%98%80%E2%80%AE&query=b", None, 200),
    ("GET", "/search?query=<script>&top=1", None, 200),
    ("POST", "/search", b"", 400),
    ("POST", "/search", b"no image", 400),
    ("POST", "/search", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400),
    ("POST", "/search", png_bytes(1)[:40], 400),
    ("POST", "/search", png_that_promises(100_000, 100_000), 400),
    ("POST", "/search", png_that_promises(9000, 9000), 400),
    ("PUT", "/search", b"x", 405),
    ("DELETE", "/images/1/small", None, 405),
    ("POST", "/", b"x", 405),
    ("OPTIONS", "/search", None, 405),
    ("TRACE", "/search", None, 405),
    ("GET", "/nothing", None, 404),
]


@pytest.mark.parametrize(("method", "path", "content", "status"), HOSTILE, ids=lambda value: repr(value)[:40])
def test_hostile_requests_get_an_answer(
    client: TestClient, method: str, path: str, content: bytes | None, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        answer = client.request(method, ADDRESS + path, content=content)
    assert answer.status_code == status, answer.text
    assert "secret" not in answer.text
    assert "Traceback" not in caplog.text
    if status >= 400:
        assert answer.json()["error"]


@pytest.mark.parametrize("is_told", [True, False])
def test_an_upload_that_is_too_large_is_refused(client: TestClient, is_told: bool) -> None:
    if is_told:
        answer = client.post("/search", content=b"", headers={"content-length": "99999999999"})
    else:
        answer = client.post("/search", content=(bytes(10**6) for _ in range(40)))
    assert answer.status_code == 413
    assert "32 MB" in answer.json()["error"]


def test_fifty_requests_at_once(app: Starlette, index: ImageIndex, caplog: pytest.LogCaptureFixture) -> None:
    """Each gets the answer that it gets alone, though many are hostile."""
    requests: list[tuple[str, str, bytes | None]] = [
        ("GET", f"/search?query=number+{number}", None) for number in range(20)
    ]
    requests += [("POST", f"/search?top={1 + number}", png_bytes(number)) for number in range(10)]
    requests += [(method, path, content) for method, path, content, _ in HOSTILE[:20]]

    async def ask(at_once: bool) -> list[tuple[int, bytes]]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
            coming = [client.request(method, ADDRESS + path, content=content) for method, path, content in requests]
            answers = await asyncio.gather(*coming) if at_once else [await each for each in coming]
        return [(answer.status_code, answer.content) for answer in answers]

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(ask(at_once=True)) == asyncio.run(ask(at_once=False))
    assert "Traceback" not in caplog.text


def test_more_requests_than_may_wait_are_refused(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_WAITING", 3)

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ADDRESS) as client:
            answers = await asyncio.gather(*(client.get("/search?query=a") for _ in range(8)))
        return sorted(answer.status_code for answer in answers)

    found = asyncio.run(ask())
    assert found[:3] == [200] * 3
    assert found[-1] == 503


def test_a_name_that_is_no_unicode_is_shown(encoder: Encoder, tmp_path: Path) -> None:
    try:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "\udcff.png").write_bytes(png_bytes(1))
    except OSError:
        pytest.skip("this disk takes Unicode alone")
    index = read_index(encoder, tmp_path / "images", cache_dir=tmp_path)
    app = server.make_app(encoder, Searcher(index), title="\udcff", top=5)
    with TestClient(app, base_url=ADDRESS) as client:
        assert client.get("/").status_code == 200
        (found,) = json.loads(client.get("/search?query=a").content)["results"]
        assert found["path"] == "\\udcff.png"
        assert client.get("/images/0/small").status_code == 200
    app.state.close()
