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
from cliptune.runs.evaluation import Candidate
from cliptune.runtime.device import resolve_device, resolve_precision
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import count, printable
from cliptune.search.gallery import Answer, write_gallery
from cliptune.search.index import index_file, read_index
from cliptune.search.lookup import make_lookup
from cliptune.search.searcher import Searcher, encode_image, encode_texts
from data_loader import ImageTextDataset

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Print what queries find and write `results/search.html`, or open a page to ask on; returns the exit code."""
    return run_stage(lambda: _search(argv), name="search.py")


def _search(argv: list[str] | None) -> int:
    settings, _ = parse_settings(SearchSettings, argv, description=str(__doc__))
    setup_logging(settings.log_level)
    # what is wrong with the page is told before the images are encoded, which may take hours
    server = _server() if settings.serve else None
    listener = None if server is None else server.open_port(settings.port)
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
        server.serve(encoder, Searcher(index, lookup), listener, title=settings.images, top=settings.top)
        return 0
    features = _encode_queries(encoder, settings)
    index = read_index(encoder, Path(settings.images), cache_dir=cache_dir)
    found = Searcher(index).nearest(features, settings.top)
    queries = [*((text, False) for text in settings.queries), *((path, True) for path in settings.query_image)]
    answers = [Answer(*query, matches) for query, matches in zip(queries, found, strict=True)]
    if settings.as_json:
        print(json.dumps([_as_json(answer, settings.images) for answer in answers], indent=1))
        return 0
    for answer in answers:
        print(_as_text(answer, settings.images))
    path = Path(settings.output_dir) / "results" / "search.html"
    write_gallery(path, answers, index, folder=settings.images)
    print(f"written: {printable(str(path))}")
    return 0


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


def _encode_queries(encoder: Encoder, settings: SearchSettings) -> torch.Tensor:
    """Return the features of the texts, then of the images, in their order, float32 `[Q, D]`."""
    images = []
    for path in settings.query_image:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--query_image {path}: no such file")
        images.append(encode_image(encoder, path))
    texts, num_truncated = encode_texts(encoder, settings.queries)
    if num_truncated:
        length = encoder.model.architecture.context_length
        logger.warning(
            "%s longer than the model's %d tokens, and cut", count(num_truncated, "text is", "texts are"), length
        )
    return torch.cat([texts, *images])


def _as_json(answer: Answer, folder: str) -> dict[str, object]:
    return {
        "query": answer.query,
        "results": [
            {"path": str(Path(folder, match.path)), "score": round(match.score, 6)} for match in answer.matches
        ],
    }


def _as_text(answer: Answer, folder: str) -> str:
    lines = [f"{match.score:.4f}  {printable(str(Path(folder, match.path)))}" for match in answer.matches]
    return "\n".join([printable(answer.query), *(f"  {line}" for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
