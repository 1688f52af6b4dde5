"""Results files as stages write them, made up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cliptune.results import RECALL_KEYS

STEPS_PER_EPOCH = 10


def metrics(scale: float) -> dict[str, float]:
    recalls = {key: scale * (index + 1) for index, key in enumerate(RECALL_KEYS)}
    ranks = {f"{direction}_{kind}_rank": 3.0 for kind in ("mean", "median") for direction in ("i2t", "t2i")}
    cosines = {"positive_similarity": scale / 50, "negative_similarity": scale / 100, "similarity_gap": scale / 100}
    between = {"image_cosine": 0.5, "text_cosine": 0.6}
    return {**recalls, "rsum": sum(recalls.values()), **ranks, **cosines, **between, "val_loss": 3.0 / scale}


def histograms(center: float) -> dict[str, list[Any]]:
    edges = np.linspace(-1, 1, 101)
    middles = (edges[:-1] + edges[1:]) / 2
    matched, unmatched = (
        np.round(1000 * np.exp(-(((middles - at) / 0.05) ** 2))).astype(int) for at in (center, center - 0.2)
    )
    return {"bin_edges": edges.tolist(), "positive": matched.tolist(), "negative": unmatched.tolist()}


def record(epoch: int) -> dict[str, Any]:
    trained = {"train_loss": 3.0 / (epoch + 1), "train_accuracy": 20.0 * epoch / (epoch + 1)}
    rates = {"learning_rate": 1e-4 / (epoch + 1), "backbone_learning_rate": 1e-6 / (epoch + 1) if epoch else None}
    measured = trained if epoch else dict.fromkeys(trained)
    return {"epoch": epoch, "step": STEPS_PER_EPOCH * epoch, **measured, **rates, **metrics(epoch + 1.0)}


def schedule(epochs: int) -> list[list[float]]:
    """Warm-up over a tenth, then a cosine to 0, as of 1e-4 and towers at a hundredth of it."""
    total = epochs * STEPS_PER_EPOCH
    warmup = max(total // 10, 1)
    points = []
    for step in range(0, total + 1, max(total // 500, 1)):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
        rate = 1e-4 * (min((step + 1) / 10, 1.0) if step < warmup else cosine)
        points.append([step, rate, rate / 100])
    return points


def run() -> dict[str, Any]:
    return {
        "versions": {"torch": "2.4.0"},
        "python": "3.11.7",
        "system": "Linux",
        "commit": None,
        "command": "train.py --data_dir ./data",
        "device": "cpu",
        "device_name": "a processor",
        "precision": "fp32",
        "world_size": 1,
        "model_name": "ViT-B/32",
        "model_settings": {"embed_dim": 512},
    }


def training_values(epochs: int = 3, best: int = 2) -> dict[str, Any]:
    chance = {**dict.fromkeys(RECALL_KEYS, 0.5), "rsum": 3.0, "val_loss": math.log(32)}
    return {
        "started_at": "2026-01-01T10:00:00",
        "finished_at": None,
        "run": run(),
        "best_epoch": best,
        "metrics": metrics(best + 1.0),
        "baseline": metrics(1.0),
        "chance": chance,
        "num_images": 1000,
        "num_texts": 5000,
        "histograms": {"baseline": histograms(0.3), "best": histograms(0.5)},
        "peak_memory_gb": {"process": 1.5},
        "config": {"model": {"name": "ViT-B/32"}, "training": {"batch_size": 32, "seed": 42}},
        "history": [record(epoch) for epoch in range(epochs + 1)],
        "schedule": schedule(epochs),
    }


def evaluation_values() -> dict[str, Any]:
    values = {key: training_values()[key] for key in ("run", "metrics", "num_images", "num_texts")}
    del values["metrics"]["val_loss"]
    return {
        "checkpoint": "model-checkpoint/best.pt",
        "data": "./data",
        "split": "test",
        **values,
        "chance": {**dict.fromkeys(RECALL_KEYS, 0.5), "rsum": 3.0},
        "histograms": histograms(0.4),
        "throughput": {"images_per_second": 10.0, "texts_per_second": 20.0},
    }
