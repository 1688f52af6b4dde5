"""The screenshots of the README: the report of a run, and a search, as a browser shows them.

python benchmarks/screenshots.py --work_dir /tmp/screenshots

All that they show is drawn by this toolkit: a small model learns scenes of one world, and stands for a published one;
it is fine-tuned on another world, and scenes of its own are searched with it. Needs playwright, and Chromium on the
path. What is in --work_dir already is not made again.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.drawn_worlds import write_world
from clip_model import CLIPModel
from cliptune.features.encode import Encoder
from cliptune.runtime.device import resolve_precision
from cliptune.search.index import read_index
from cliptune.search.searcher import Searcher
from cliptune.search.server import make_app
from data_loader import ImageTextDataset
from train import main as train

SEEDS = {"first": 0, "second": 4, "plain": 5}
FIRST_IMAGES, IMAGES, SEARCHED = 8000, 800, 4000
WIDTH, HEIGHT = 1100, 900
"""Pixels of the window."""
NUM_COLOURS = 200
"""Of a screenshot: as a PNG of a palette it is a third as large."""
QUERY = "red shapes on a white background"


def main(argv: list[str] | None = None) -> int:
    """Train, and write both screenshots; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("screenshots"), help="folder for scenes and runs")
    parser.add_argument("--checkpoint", type=Path, help="model to fine-tune; none: one is trained, for half an hour")
    parser.add_argument("--images_dir", type=Path, default=Path("docs/images"), help="folder for the screenshots")
    options = parser.parse_args(argv)
    begun = options.checkpoint or first_model(options.work_dir)
    run = fine_tune(options.work_dir, begun)
    plain = write_world(options.work_dir / "plain", SEARCHED, seed=SEEDS["plain"], shifted=False)
    with open_page() as page:
        page.goto((run / "results" / "report.html").resolve().as_uri())
        head, queries = (page.locator(place).first.bounding_box()["y"] for place in ("#numbers", "#queries h3"))
        save(page, options.images_dir / "report.png", (0, head), (queries, queries + 560))
        with search_page(begun, plain) as address:
            page.goto(address)
            page.get_by_role("searchbox").fill(QUERY)
            page.wait_for_selector("#results img")
            page.wait_for_load_state("networkidle")
            save(page, options.images_dir / "search.png", (0, HEIGHT))
    return 0


def first_model(work_dir: Path) -> Path:
    """Train a small model from random weights."""
    scenes = write_world(work_dir / "first", FIRST_IMAGES, seed=SEEDS["first"], shifted=False)
    flags = "--model_name ViT-Ti/32 --pretrained none --batch_size 128 --learning_rate 1e-3 --weight_decay 0.1"
    return run_once(scenes, work_dir / "first_model", f"{flags} --cache_images --num_epochs 10 --report none")


def fine_tune(work_dir: Path, checkpoint: Path) -> Path:
    """Fine-tune it on the second world; returns the run's folder."""
    scenes = write_world(work_dir / "second", IMAGES, seed=SEEDS["second"], shifted=True)
    flags = "--batch_size 64 --learning_rate 1e-4 --backbone_lr_scale 1 --val_split 0.25 --num_epochs 8"
    best = run_once(scenes, work_dir / "run", f"{flags} --cache_images --pretrained {checkpoint.resolve()}")
    return best.parent.parent


def run_once(data_dir: Path, output_dir: Path, flags: str) -> Path:
    """Run `train.py`, or go on with it; returns its best model."""
    where = ["--data_dir", str(data_dir), "--output_dir", str(output_dir), "--resume"]
    best = output_dir / "model-checkpoint" / "best_model.pth"
    if not (output_dir / "results" / "training_curves.png").exists() and train([*where, *flags.split()]):
        raise RuntimeError(f"{output_dir}: the run has failed")
    return best


@contextmanager
def open_page() -> Iterator[Any]:
    """Start Chromium; give a page of `WIDTH` x `HEIGHT` pixels."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        browser.close()


@contextmanager
def search_page(checkpoint: Path, images: Path) -> Iterator[str]:
    """Serve the page of `search.py --serve`; give its address."""
    model = CLIPModel(pretrained=str(checkpoint), freeze_backbone=True).eval()
    precision = resolve_precision("fp32", model.device)
    encoder = Encoder(model, ImageTextDataset, precision=precision, batch_size=64)
    index = read_index(encoder, images, cache_dir=images / "cache")
    app = make_app(encoder, Searcher(index), title="scenes", top=10)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    app.state.close()


def save(page: Any, path: Path, *parts: tuple[float, float]) -> None:
    """Write what a page shows between some heights, one part below the other, as a PNG of a palette."""
    screenshot, top = Image.new("RGB", (WIDTH, round(sum(end - start for start, end in parts))), "white"), 0
    for start, end in parts:
        clip = {"x": 0, "y": start, "width": WIDTH, "height": end - start}
        with Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))) as image:
            screenshot.paste(image.convert("RGB"), (0, top))
            top += image.height
    path.parent.mkdir(parents=True, exist_ok=True)
    screenshot.quantize(NUM_COLOURS).save(path, optimize=True)
    print(f"written: {path}, {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    sys.exit(main())
