"""Images found by texts or other images. Features of the images are cached, so only new and changed ones are encoded:

python search.py --checkpoint model-checkpoint/best_model.pth --images ./data "a red heart" "a blue circle"
python search.py --images ./data --query_image heart.png --top 50 --json
python search.py --images ./data --serve
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import importlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.stage_settings import SearchSettings

if __name__ == "__main__":
    check_command_line(SearchSettings, str(__doc__))

import torch

from clip_model import CLIPModel
from cliptune.features.drift import generic_texts
from cliptune.features.encode import Encoder
from cliptune.language.catalogue import language_of
from cliptune.model.mode import evaluating
from cliptune.runs.evaluation import Candidate
from cliptune.runtime.device import resolve_device, resolve_precision
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import count, printable
from cliptune.search.found import Found
from cliptune.search.gallery import Answer, write_gallery
from cliptune.search.index import index_file, read_index, require_images
from cliptune.search.lookup import make_lookup
from cliptune.search.searcher import Searcher, encode_image, encode_texts
from data_loader import ImageTextDataset

logger = logging.getLogger(__name__)

ENCODE_BATCH_SIZE = 64
"""Images encoded at once where no setting says it."""


def main(argv: list[str] | None = None) -> int:
    """Print what queries find and write `results/search.html`, or open a page to ask on; returns the exit code."""
    return run_stage(lambda: _search(argv), name="search.py", argv=argv)


def _search(argv: list[str] | None) -> int:
    settings, _ = parse_settings(SearchSettings, argv, description=str(__doc__))
    setup_logging(settings.log_level)
    # what is wrong with the page or a path is told before weights are downloaded and images encoded, which takes hours
    server = _server() if settings.serve else None
    listener = None if server is None else server.open_port(settings.port)
    require_images(Path(settings.images))
    _require_files(settings.query_image)
    cache_dir = Path(settings.output_dir) / "cache" if settings.cache_dir is None else Path(settings.cache_dir)
    encoder = _load(settings)
    if server is not None:
        index = read_index(encoder, Path(settings.images), cache_dir=cache_dir)
        encode_texts(encoder, ["the first text takes longer than all others"])
        lookup = make_lookup(
            index.features,
            sample=lambda: encode_texts(encoder, generic_texts())[0],
            cache_prefix=index_file(Path(settings.images), cache_dir),
        )
        server.serve(
            encoder, Searcher(index, lookup), listener,
            title=settings.images, top=settings.top, language=settings.language,
        )  # fmt: skip
        return 0
    found = _find(
        encoder, Path(settings.images), settings.queries, settings.query_image, top=settings.top, cache_dir=cache_dir
    )
    if settings.as_json:
        print(json.dumps(found.to_dicts(), indent=1))
        return 0
    print(found)
    path = Path(settings.output_dir) / "results" / "search.html"
    write_gallery(path, found.answers, found.index, folder=settings.images, language=settings.language)
    print(language_of(settings.language).say(f"written: {printable(str(path))}"))
    return 0


def search(
    model: CLIPModel,
    folder: str | Path,
    texts: str | Sequence[str] = (),
    *,
    images: str | Path | Sequence[str | Path] = (),
    top: int = 10,
    cache_dir: str | Path = "cache",
) -> Found:
    """Find images of a folder by texts, by other images, or both; a notebook shows what it returns as a table.

    Args:
        model: comes back in the mode it came in.
        folder: its images, and those below it, are looked through.
        texts: one or several.
        images: paths of one or several images to find others by.
        top: images that each query gets.
        cache_dir: gets the images' features, so that the next search encodes new and changed ones alone.

    Raises:
        ValueError: no query, an empty text, `top` below 1, a query that is no image, or no image that can be read.
        FileNotFoundError: no such folder or image.
        OSError: not enough space on the disk.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    paths = [str(path) for path in ([images] if isinstance(images, str | Path) else images)]
    if not (texts or paths):
        raise ValueError('nothing to look for: give a text ("a red heart") or images')
    if not all(text.strip() for text in texts):
        raise ValueError("an empty text finds nothing: omit it")
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    _require_files(paths)
    encoder = Encoder(
        model, ImageTextDataset, precision=resolve_precision("auto", model.device), batch_size=ENCODE_BATCH_SIZE
    )
    with evaluating(model):
        return _find(encoder, Path(folder), texts, paths, top=top, cache_dir=Path(cache_dir))


def _find(
    encoder: Encoder, folder: Path, texts: Sequence[str], images: Sequence[str], *, top: int, cache_dir: Path
) -> Found:
    features = _encode_queries(encoder, texts, images)  # what is wrong with them is told before the folder is read
    index = read_index(encoder, folder, cache_dir=cache_dir)
    queries = [*((text, False) for text in texts), *((path, True) for path in images)]
    matches = Searcher(index).nearest(features, top)
    return Found([Answer(*query, own) for query, own in zip(queries, matches, strict=True)], index, str(folder))


def _load(settings: SearchSettings) -> Encoder:
    candidate = Candidate(settings.checkpoint, activation=settings.activation)
    candidate.fetch()
    device = resolve_device(settings.device)
    stored = "auto" if candidate.config is None else candidate.config.training.precision
    model = CLIPModel(pretrained=candidate.take_weights(), freeze_backbone=True).to(device).eval()
    return Encoder(
        model, ImageTextDataset, precision=resolve_precision(settings.precision or stored, device),
        batch_size=settings.encode_batch_size, num_workers=settings.num_workers,
    )  # fmt: skip


def _server() -> ModuleType:
    """Import what serves the page, which needs packages that nothing else does."""
    try:
        return importlib.import_module("cliptune.search.server")
    except ImportError as error:
        raise ImportError(f"--serve needs {error.name}: pip install starlette uvicorn") from None


def _require_files(images: Sequence[str]) -> None:
    for path in images:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--query_image {path}: no such file")


def _encode_queries(encoder: Encoder, texts: Sequence[str], images: Sequence[str]) -> torch.Tensor:
    """Return the features of the texts, then of the images, in their order, float32 `[Q, D]`."""
    of_images = [encode_image(encoder, path) for path in images]
    of_texts, num_truncated = encode_texts(encoder, texts)
    if num_truncated:
        length = encoder.model.architecture.context_length
        logger.warning(
            "%s longer than the model's %d tokens, and cut", count(num_truncated, "text is", "texts are"), length
        )
    return torch.cat([of_texts, *of_images])


if __name__ == "__main__":
    sys.exit(main())
