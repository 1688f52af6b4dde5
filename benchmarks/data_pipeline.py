"""Image loading against torchvision's usual pipeline, on one core, turn by turn:

python benchmarks/data_pipeline.py --json data_pipeline.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Timing, machine, print_table, ratio, take_turns, write_json
from clip_model import CLIPModel
from cliptune.cli import parse_settings, run_stage
from cliptune.data.cached_loader import CachedLoader
from cliptune.data.loaders import TrainLoader
from cliptune.data.row_store import ImageCache
from cliptune.preprocess.moments import CLIP_MEAN, CLIP_STD
from cliptune.preprocess.transforms import (
    PixelTransform,
    clip_transform,
    normalize,
    train_transform,
)
from cliptune.runtime.device import resolve_device
from cliptune.settings import DEFAULT_MODEL_NAME, PositiveInt, Settings
from data_loader import ImageTextDataset

BASE = "torchvision"
EXACT = "ours"
ITEM_BY_ITEM, BATCH_AT_ONCE = "image by image", "a batch at once"
CAPTIONS = 16  # of an image, each an item of the epoch
FIDELITY = ("mean_levels", "max_levels", "mean_cosine", "min_cosine")
COLUMNS = ["", "images/s", "spread", "times as fast", "as"]


class BenchmarkSettings(Settings):
    """Settings of the benchmark."""

    images: str | None = Field(None, description="folder with JPEG files; none: images are generated")
    num_large: PositiveInt = Field(6, description="generated images of 12 megapixels")
    num_small: PositiveInt = Field(60, description="generated images of Flickr's size, 500 x 375")
    large_width: PositiveInt = Field(4000, description="width of the large images, in pixels")
    repeats: PositiveInt = Field(7, description="times that each way is run")
    model_name: str = Field(DEFAULT_MODEL_NAME, description="random-weight model whose features are compared")
    device: str = Field("cpu", description="where pixels end: cpu, cuda, cuda:1, mps")
    quick: bool = Field(False, description="fewer images and repeats: under a minute")
    json_path: str | None = Field(None, description="file for the figures", json_schema_extra={"flag": "json"})


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables; returns the exit code."""
    return run_stage(lambda: _benchmark(argv), name="data_pipeline.py")


def _benchmark(argv: list[str] | None) -> int:
    settings, _ = parse_settings(BenchmarkSettings, argv, description=str(__doc__).splitlines()[0])
    device = resolve_device(settings.device)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = CLIPModel(settings.model_name, pretrained="none").to(device).eval()
        with tempfile.TemporaryDirectory() as folder:
            results = [
                measure(name, paths, model, cache_dir=Path(folder) / "cache" / str(index), repeats=_repeats(settings))
                for index, (name, paths) in enumerate(_image_sets(settings, Path(folder)).items())
            ]
    finally:
        torch.set_num_threads(num_threads)
    figures = {"machine": machine(settings.device), "model": settings.model_name, "sets": results}
    write_json(settings.json_path, figures)
    return 0


def measure(name: str, paths: Sequence[Path], model: CLIPModel, *, cache_dir: Path, repeats: int) -> dict[str, Any]:
    """Time every way to load `paths`, print the tables and return the figures."""
    resolution, device = model.image_resolution, model.device
    exact, fast = clip_transform(resolution), train_transform(resolution, "none", fast_decode=True)
    crop = train_transform(resolution, "crop")
    cases: dict[str, Callable[[], Tensor]] = {
        BASE: partial(load_usually, paths, _usual_steps(resolution), device),
        EXACT: partial(load_ours, paths, exact, device),
        "ours, --fast_decode": partial(load_ours, paths, fast, device),
        "ours, --cache_images, later epochs": _cached(paths, exact, device, cache_dir),
        f"{BASE}, random crops": partial(load_usually, paths, _usual_crops(resolution), device),
        f"{EXACT}, random crops": partial(load_ours, paths, crop, device),
        "ours, random crops, --cache_images": _cached(paths, crop, device, cache_dir),
    }
    timings = take_turns(cases, repeats=repeats, device=device.type)
    size = "x".join(str(side) for side in Image.open(paths[0]).size)
    megabytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e6
    title = f"{name}: {len(paths)} JPEG files, the first {size}, {megabytes:.2f} MB on average; to {device}"
    print_table(title, [COLUMNS, *(_row(case, timings, len(paths)) for case in cases)])
    decoders = take_turns(_decoders(paths), repeats=repeats)
    print_table("decoding alone", [COLUMNS[:3], *(_row(case, decoders, len(paths))[:3] for case in decoders)])
    feeds = take_turns(_feeds(paths, resolution, cache_dir), repeats=repeats)
    feed_rows = [_row(case, feeds, CAPTIONS * len(paths))[:3] for case in feeds]
    print_table("batches of images and tokens from the image cache", [COLUMNS[:3], *feed_rows])
    print(f"a batch at once is {ratio(feeds, BATCH_AT_ONCE, ITEM_BY_ITEM):.1f} times as fast as image by image")
    fidelity = _fidelity(cases, model)
    print(f"\npixels as torchvision's: {'every bit' if fidelity['exact_is_equal'] else 'NO'}")
    mean, largest, cosine, lowest = (fidelity[f"fast_{key}"] for key in FIDELITY)
    print(f"--fast_decode: pixels off by {mean:.2f} of 255 on average, {largest:.0f} at most")
    print(f"--fast_decode: feature cosine {cosine:.6f} on average, {lowest:.6f} at least")
    seconds = {case: timing.seconds for case, timing in {**timings, **decoders, **feeds}.items()}
    return {"name": name, "num_images": len(paths), "megabytes": megabytes, "seconds": seconds, **fidelity}


def load_usually(paths: Sequence[Path], steps: Callable[[Image.Image], Tensor], device: torch.device) -> Tensor:
    """Load a batch as most code does: float pixels from Pillow and torchvision."""
    return torch.stack([steps(Image.open(path).convert("RGB")) for path in paths]).to(device)


def load_ours(paths: Sequence[Path], transform: PixelTransform, device: torch.device) -> Tensor:
    """Load a batch as training does: uint8 pixels, normalised on the device."""
    return normalize(torch.stack([transform(transform.load(path)) for path in paths]).to(device))


def _cached(
    paths: Sequence[Path], transform: PixelTransform, device: torch.device, folder: Path
) -> Callable[[], Tensor]:
    cache = ImageCache(folder, map(str, paths), transform)

    def load() -> Tensor:
        pixels = [transform.finish(*cache.load(str(path))) for path in paths]
        return normalize(torch.stack(pixels).to(device))

    load()  # the first epoch
    return load


def _feeds(paths: Sequence[Path], resolution: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Load an epoch of training from the cache, image by image as a worker does, and as a full cache allows."""
    words = ["a", "photo", "of", "something", "that", "nobody", "has", "seen", "before", "in", "this", "light"]
    rows = [
        {"image": str(path.resolve()), "captions": [f"{' '.join(words[i % 12 :])} {i}" for i in range(CAPTIONS)]}
        for path in paths
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = ImageTextDataset(folder / "data.json", transform=clip_transform(resolution), captions="all")
    dataset.cache_images(folder)
    options: Any = {"batch_size": 128, "num_workers": 0, "device": torch.device("cpu")}
    plain, cached = TrainLoader(dataset, **options), CachedLoader(dataset, **options)

    def load(loader: TrainLoader) -> None:
        for _ in loader.epoch(1):
            pass

    return {ITEM_BY_ITEM: partial(load, plain), BATCH_AT_ONCE: partial(load, cached)}


def _usual_steps(resolution: int) -> Any:
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.Resize(resolution, interpolation=bicubic),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


def _usual_crops(resolution: int) -> Any:
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(resolution, scale=(0.6, 1.0), interpolation=bicubic),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


def _decoders(paths: Sequence[Path]) -> dict[str, Callable[[], object]]:
    return {
        "Pillow": lambda: [Image.open(path).convert("RGB") for path in paths],
        "simplejpeg": lambda: [simplejpeg.decode_jpeg(path.read_bytes(), "RGBX") for path in paths],
    }


def _fidelity(cases: dict[str, Callable[[], Tensor]], model: CLIPModel) -> dict[str, Any]:
    """Compare our pixels with torchvision's, and the features of exact and fast pixels."""
    usual, exact, fast = cases[BASE](), cases[EXACT](), cases["ours, --fast_decode"]()
    std = torch.tensor(CLIP_STD, device=exact.device).view(3, 1, 1)
    levels = ((exact - fast) * std * 255).abs()
    with torch.inference_mode():
        cosines = (model.encode_image(exact) * model.encode_image(fast)).sum(1)
    values = (levels.mean(), levels.max(), cosines.mean(), cosines.min())
    figures = {f"fast_{key}": value.item() for key, value in zip(FIDELITY, values, strict=True)}
    return {"exact_is_equal": torch.equal(usual, exact), **figures}


def _row(case: str, timings: dict[str, Timing], num_images: int) -> list[str]:
    timing = timings[case]
    rate = f"{num_images / timing.median:.1f}"
    spread = f"{100 * timing.spread:.0f}%"
    if "cache" in case:
        reference = f"{EXACT}, random crops" if "crops" in case else EXACT
    else:
        reference = f"{BASE}, random crops" if "crops" in case else BASE
    if case == reference or reference not in timings:
        return [case, rate, spread, "", ""]
    return [case, rate, spread, f"{ratio(timings, case, reference):.2f}", reference]


def _repeats(settings: BenchmarkSettings) -> int:
    return min(settings.repeats, 3) if settings.quick else settings.repeats


def _image_sets(settings: BenchmarkSettings, folder: Path) -> dict[str, list[Path]]:
    """Find the images to load, or make them."""
    if settings.images is not None:
        found = sorted(path for path in Path(settings.images).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
        if not found:
            raise FileNotFoundError(f"--images: no JPEG file in {settings.images}")
        return {settings.images: found[: settings.num_small]}
    width = settings.large_width
    num_large, num_small = settings.num_large, settings.num_small
    if settings.quick:
        num_large, num_small = min(num_large, 2), min(num_small, 16)
    return {
        f"{width * (width * 3 // 4) / 1e6:.0f} megapixels": [
            make_photo(folder / f"large{index}.jpg", width, width * 3 // 4, seed=index) for index in range(num_large)
        ],
        "Flickr's size": [make_photo(folder / f"small{index}.jpg", 500, 375, seed=index) for index in range(num_small)],
    }


def make_photo(path: Path, width: int, height: int, *, seed: int) -> Path:
    """Save an image with a photo's statistics: amplitude falls with frequency, edges, a sensor's grain."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    cells = 3
    while cells < width // 4:
        shape = (max(cells * height // width, 2), cells, 3)
        grey, color = rng.normal(size=(*shape[:2], 1)), rng.normal(size=shape)
        noise = np.clip((grey + 0.4 * color) * 40 + 128, 0, 255).astype(np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=np.float32) - 128) * (3 / cells) ** 0.5
        cells *= 2
    for _ in range(12):  # things with edges
        x, y = rng.integers(0, width), rng.integers(0, height)
        pixels[y : y + height // 5, x : x + width // 6] += rng.normal(scale=30, size=3).astype(np.float32)
    pixels += rng.normal(scale=2.5, size=(height, width, 1)).astype(np.float32)
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(path, quality=90)
    return path


if __name__ == "__main__":
    sys.exit(main())
