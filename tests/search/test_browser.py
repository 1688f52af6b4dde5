"""The page and the gallery in a real browser."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

import uvicorn

from cliptune.data.sample_data import create_sample_dataset
from cliptune.features.encode import Encoder
from cliptune.search.gallery import Answer, write_gallery
from cliptune.search.index import ImageIndex, read_index
from cliptune.search.searcher import Searcher, encode_texts
from cliptune.search.server import make_app
from tests.helpers.browser import Watched, open_browser

pytestmark = pytest.mark.slow

LOOKS = [
    {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    {"viewport": {"width": 320, "height": 640}, "color_scheme": "dark"},
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def index(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("pages")
    create_sample_dataset(folder / "data", 30)
    (folder / "data" / "images" / "scene_00000.png").rename(folder / "data" / "images" / f"{'红' * 70}<b>.png")
    return read_index(encoder, folder / "data", cache_dir=folder / "cache")


@contextmanager
def serving(encoder: Encoder, index: ImageIndex, **options: Any) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(encoder, Searcher(index), title="scenes", top=10, **options)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    app.state.close()


@pytest.fixture(scope="module")
def address(encoder: Encoder, index: ImageIndex) -> Iterator[str]:
    with serving(encoder, index) as address:
        yield address


def test_the_page_in_chinese_is_as_sound(browser: Any, encoder: Encoder, index: ImageIndex) -> None:
    with serving(encoder, index, language="zh") as address:
        watched = Watched(browser, **LOOKS[1])
        watched.page.goto(address)
        watched.page.get_by_label("描述你要找的内容").fill("a red heart")
        watched.page.get_by_role("status").filter(has_text="“a red heart”：10 张图像，用时").wait_for()
        watched.page.locator(".like").first.click()
        watched.page.get_by_role("status").filter(has_text="相似的 10 张图像").wait_for()
        assert watched.violations() == []
        assert watched.messages == []
        assert watched.width() == 320
        watched.context.close()


def best(index: ImageIndex, encoder: Encoder, text: str) -> str:
    (matches,) = Searcher(index).nearest(encode_texts(encoder, [text])[0], 1)
    return matches[0].path


@pytest.fixture(params=LOOKS, ids=["light", "dark and narrow"])
def watched(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """The page as it opens; at the end nothing may have gone wrong, stood out, or been asked of another place."""
    watched = Watched(browser, **request.param)
    watched.page.goto(address)
    yield watched
    assert watched.violations() == []
    assert watched.width() == request.param["viewport"]["width"]
    assert [message for message in watched.messages if "400 (Bad Request)" not in message] == []  # what was no image
    assert all(url.startswith((address, "blob:", "data:")) for url in watched.requests)
    watched.context.close()


def test_a_text_finds_images_and_these_find_more(watched: Watched, index: ImageIndex, encoder: Encoder) -> None:
    page, status, cards = watched.page, watched.page.get_by_role("status"), watched.page.locator(".card")
    # results come as one types, of what stands there at the end
    page.keyboard.type("a red heart", delay=20)
    status.filter(has_text="10 images for “a red heart”").wait_for()
    assert cards.first.locator(".name").text_content() == best(index, encoder, "a red heart")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.card img')].slice(0, 2).every((image) => image.naturalWidth)"
    )
    assert watched.violations() == []

    # more of them, up to all
    page.get_by_role("button", name="Show more").click()
    status.filter(has_text="20 images").wait_for()
    page.get_by_role("button", name="Show more").click()
    status.filter(has_text="30 images").wait_for()
    assert not page.get_by_role("button", name="Show more").is_visible()
    width: int = page.viewport_size["width"]
    assert watched.width() == width  # a very long name is among them

    # more like one
    name = cards.nth(1).locator(".name").text_content()
    cards.nth(1).get_by_role("button").click()
    status.filter(has_text=f"10 images like {name}").wait_for()
    assert name not in cards.locator(".name").all_text_contents()
    assert watched.violations() == []


def test_an_image_that_is_chosen_or_dropped_finds_images(watched: Watched, address: str, index: ImageIndex) -> None:
    page, status, cards = watched.page, watched.page.get_by_role("status"), watched.page.locator(".card")
    # by an image of one's own, which is chosen or dropped
    page.locator("#file").set_input_files(index.paths[7])
    status.filter(has_text=f"10 images like {Path(index.paths[7]).name}").wait_for()
    assert cards.first.locator(".score").text_content() == "1.000"
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    status.filter(has_text="cannot be read as an image").wait_for()
    assert cards.count() == 0
    drop = """async (address) => {
        const blob = await (await fetch(address)).blob(), data = new DataTransfer();
        data.items.add(new File([blob], "dropped.jpg", { type: "image/jpeg" }));
        document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: data }));
    }"""
    page.evaluate(drop, f"{address}images/3/large")
    status.filter(has_text="10 images like dropped.jpg").wait_for()


def test_the_keyboard_is_enough(watched: Watched) -> None:
    page, status, cards = watched.page, watched.page.get_by_role("status"), watched.page.locator(".card")
    page.keyboard.press("Tab")  # away from where one types
    page.keyboard.press("/")
    page.keyboard.type("a blue circle")
    page.keyboard.press("Enter")
    status.filter(has_text="“a blue circle”").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("() => document.activeElement.querySelector('img').alt")
    assert focused == cards.nth(1).locator(".name").text_content()
    page.keyboard.press("Escape")
    assert cards.count() == 0
    assert page.evaluate("() => document.activeElement.id") == "query"


def test_an_answer_that_comes_late_is_dropped(browser: Any, address: str) -> None:
    watched = Watched(browser)
    page = watched.page

    def hold(route: Any) -> None:
        if "slow" in route.request.url:
            time.sleep(1)
        route.continue_()

    page.route("**/search?*", hold)
    page.goto(address)
    page.keyboard.type("slow")
    page.wait_for_timeout(250)
    page.keyboard.press("Control+A")
    page.keyboard.type("quick")
    page.get_by_role("status").filter(has_text="“quick”").wait_for()
    page.wait_for_timeout(1500)
    assert "“quick”" in page.get_by_role("status").text_content()
    assert watched.messages == []
    watched.context.close()


def test_a_server_that_has_ended_is_said(browser: Any, address: str) -> None:
    watched = Watched(browser)
    watched.page.goto(address)
    watched.context.set_offline(True)
    watched.page.keyboard.type("a heart")
    watched.page.get_by_role("status").filter(has_text="is it still running?").wait_for()
    watched.context.close()


@pytest.mark.parametrize("look", LOOKS, ids=["light", "dark and narrow"])
def test_the_gallery(browser: Any, look: dict[str, Any], index: ImageIndex, encoder: Encoder, tmp_path: Path) -> None:
    queries = ["a red heart", "<b>红色</b> " + "x" * 400]
    found = Searcher(index).nearest(encode_texts(encoder, queries)[0], 30)
    answers = [Answer(query, False, matches) for query, matches in zip(queries, found, strict=True)]
    answers.append(Answer(index.paths[2], True, found[0]))
    write_gallery(tmp_path / "search.html", answers, index, folder="scenes")
    watched = Watched(browser, **look)
    watched.page.goto((tmp_path / "search.html").as_uri())
    assert watched.page.locator(".card").count() == 90
    assert watched.page.evaluate("() => [...document.images].filter((image) => image.naturalWidth).length") == 91
    assert watched.violations() == []
    assert watched.width() == look["viewport"]["width"]
    assert watched.messages == []
    assert all(url.startswith(("file:", "data:")) for url in watched.requests)
    watched.context.close()
