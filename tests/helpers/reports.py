"""A small run to write a report of: results, what its queries found, images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.recorded import training_values

HOSTILE = [
    "<script>alert('a')</script><img src=x onerror=alert(1)>",
    "quotes \" ' and & </title></svg>",
    "一只黑狗在草地上奔跑",
    "كلب أسود يركض على العشب",
    "long " * 2000,
    "{{ 7 * 7 }}{% raw %}",
]


def make_run(folder: Path, *, num_images: int = 8, captions: Sequence[str] = HOSTILE, best: int = 2) -> Path:
    """Write results, retrieval.npz and images; return the results file. Image i has the captions 2i and 2i + 1."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    results = folder / "results" / "training_results.json"
    results.parent.mkdir()
    paths = [str(folder / "data" / f"photo {index}.png") for index in range(num_images)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    owners = np.repeat(np.arange(num_images), 2)
    texts = [captions[index % len(captions)] for index in range(len(owners))]
    sizes = {"i2t": num_images, "t2i": len(owners)}
    values: dict[str, Any] = {
        "run_id": "a", "version": 1, "begun_at": 0, "lacks": "",
        "epochs": np.arange(4.0), "steps": np.arange(4) * 10, "groups": np.arange(num_images),
        "text_to_image": owners, "caption_ids": np.unique(texts, return_inverse=True)[1].astype(np.uint64),
        **_packed("image_paths", "image_path_ends", paths), **_packed("captions", "caption_ends", texts),
        **{way: rng.integers(1, 9, (4, size)).astype(np.float32) for way, size in sizes.items()},
    }  # fmt: skip
    for model, step in (("loaded", 0), ("best", best * 10)):
        values[f"{model}_step"] = step
        for way, other in (("i2t", "t2i"), ("t2i", "i2t")):
            ids = np.array([rng.permutation(sizes[other])[:6] for _ in range(sizes[way])])
            values[f"{model}_{way}_ids"] = ids.astype(np.int32)
            values[f"{model}_{way}_scores"] = -np.sort(-rng.random(ids.shape), axis=1)
        values[f"{model}_image_features"] = rng.normal(size=(num_images, 8)).astype(np.float16)
        values[f"{model}_text_features"] = rng.normal(size=(len(owners), 8)).astype(np.float16)
    np.savez(results.with_name("retrieval.npz"), **values)
    recorded = training_values(3, best) | {"run_id": "a", "finished_at": "2026-01-01T11:00:00"}
    results.write_text(json.dumps(recorded), encoding="utf-8")
    return results


def _packed(name: str, ends: str, texts: Sequence[str]) -> dict[str, Any]:
    parts = [text.encode() for text in texts]
    return {name: np.frombuffer(b"".join(parts), dtype=np.uint8), ends: np.cumsum([len(part) for part in parts])}
