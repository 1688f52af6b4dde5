"""The page in a real browser: no request, readable in light and dark, by keyboard, at any width."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cliptune.report.page import write_report
from tests.helpers.browser import Watched, open_browser
from tests.helpers.reports import make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(tmp_path_factory.mktemp("run"), num_images=30)


@pytest.fixture(scope="module")
def small_address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All sections, of few queries: axe takes a minute for hundreds of images."""
    return write_page(tmp_path_factory.mktemp("run"), num_images=4)


def write_page(
    folder: Path, *, num_images: int, language: str = "en", rsum: tuple[float, float, float] = (6.0, -2.0, 9.0)
) -> str:
    results = make_run(folder, num_images=num_images)
    values = json.loads(results.read_text())
    recalls = {key: [1.0, -0.5, 1.5] for key in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")}
    values["verdict"] = {
        "verdict": "not distinguishable", "rsum": rsum, "recalls": recalls, "split": "val", "epoch": 2,
        "num_evaluations": 3, "num_images": 30, "num_groups": 30,
    }  # fmt: skip
    values["wall_time"] = {"start": 1, "data": 2, "step": 30, "validation": 4, "saving": 5, "rest": 6}
    results.write_text(json.dumps(values))
    return write_report(results, language=language).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_it_is_readable_and_asks_nothing_of_a_network(browser: Any, small_address: str, color_scheme: str) -> None:
    watched = Watched(browser, color_scheme=color_scheme, viewport={"width": 1280, "height": 900})
    watched.page.goto(small_address)
    watched.page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert watched.violations() == []
    assert watched.messages == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [small_address]


def test_the_page_in_chinese_is_as_sound(browser: Any, tmp_path: Path) -> None:
    address = write_page(tmp_path, num_images=4, language="zh")
    watched = Watched(browser, viewport={"width": 320, "height": 640})
    watched.page.goto(address)
    watched.page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert watched.violations() == []
    assert watched.messages == []
    assert watched.width() == 320
    assert [url for url in watched.requests if not url.startswith("data:")] == [address]
    assert watched.page.evaluate("() => document.documentElement.lang") == "zh-CN"
    plot = watched.page.locator(".plot").first
    plot.focus()
    watched.page.keyboard.press("Home")
    assert (plot.get_attribute("aria-valuetext") or "").startswith("第 0 轮：验证")


@pytest.mark.parametrize("rsum", [(382.4, 372.6, 392.3), (-382.4, -392.3, -372.6), (6.0, -2.0, 9.0)])
def test_the_gains_line_holds_its_words(browser: Any, tmp_path: Path, rsum: tuple[float, float, float]) -> None:
    watched = Watched(browser, viewport={"width": 320, "height": 640})
    watched.page.goto(write_page(tmp_path, num_images=4, rsum=rsum))
    line = watched.page.locator("svg.hero")
    words = [box_of(text) for text in line.locator("text").all() if text.inner_html()]
    assert len(words) == 2
    left, right = box_of(line)["x"], box_of(line)["x"] + box_of(line)["width"]
    assert all(left <= each["x"] and each["x"] + each["width"] <= right for each in words)


def test_every_gallery_opens_with_the_keyboard(browser: Any, address: str) -> None:
    watched = Watched(browser)
    watched.page.goto(address)
    galleries = watched.page.locator("details.gallery")
    assert galleries.count() == 11
    for index in range(galleries.count()):
        gallery = galleries.nth(index)
        if not gallery.evaluate("each => each.open"):
            gallery.locator("summary").focus()
            watched.page.keyboard.press("Enter")
        assert gallery.evaluate("each => each.open")
    pictures = watched.page.locator(".tile svg")
    assert pictures.count() > 50
    assert all(box["width"] > 20 and box["height"] > 20 for box in map(box_of, pictures.all()[:20]))


def box_of(locator: Any) -> dict[str, float]:
    box: dict[str, float] = locator.bounding_box()
    return box


def test_a_chart_reads_out_its_values_by_pointer_and_by_keyboard(browser: Any, address: str) -> None:
    watched = Watched(browser)
    watched.page.goto(address)
    figure = watched.page.locator("#curves figure").first
    plot, readout = figure.locator(".plot"), figure.locator(".readout")
    plot.focus()
    watched.page.keyboard.press("Home")
    assert readout.inner_text() == "epoch 0: validation 3"
    watched.page.keyboard.press("ArrowRight")
    assert readout.inner_text() == "epoch 1: training 1.5 · validation 1.5"
    assert plot.get_attribute("aria-valuetext") == readout.inner_text()
    box = box_of(plot)
    watched.page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + 50)
    assert readout.inner_text() == "epoch 3: training 0.75 · validation 0.75"


@pytest.mark.parametrize("width", [320, 768])
def test_nothing_is_wider_than_the_screen(browser: Any, address: str, width: int) -> None:
    watched = Watched(browser, viewport={"width": width, "height": 800})
    watched.page.goto(address)
    watched.page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert watched.width() == width


def test_the_policy_stops_what_is_not_the_pages_own(browser: Any, address: str) -> None:
    watched = Watched(browser)
    watched.page.goto(address)
    watched.page.evaluate(
        "() => { const image = new Image(); image.src = 'https://example.invalid/a.png'; document.body.append(image); }"
    )
    watched.page.wait_for_timeout(200)
    assert any("Content Security Policy" in message for message in watched.messages)
