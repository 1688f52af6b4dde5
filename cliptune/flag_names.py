"""Which flag is meant by a name that is none."""

from __future__ import annotations

import difflib

from cliptune.runtime.messages import shorten

RENAMED = {
    "warmup_share": "warmup_fraction",
    "max_bad_share": "max_skipped_fraction",
    "on_bad_image": "on_unreadable_image",
    "batch_size": "encode_batch_size",  # of evaluation.py alone: train.py has a batch_size
}
MEANT = {
    "lr": "learning_rate", "bs": "batch_size", "batch": "batch_size", "wd": "weight_decay", "arch": "model_name",
    "data": "data_dir", "train_data": "data_dir", "images": "image_dir", "workers": "num_workers",
    "out": "output_dir", "save_dir": "output_dir", "logs": "output_dir", "checkpoint": "resume",
    "checkpoint_path": "checkpoint", "ckpt": "checkpoint", "weights": "pretrained", "freeze": "freeze_backbone",
    "grad_clip": "gradient_clip_norm", "grad_clip_norm": "gradient_clip_norm", "amp": "precision", "gpu": "device",
    "grad_checkpointing": "gradient_checkpointing", "torchcompile": "compile", "resume_from": "resume",
    "debug": "log_level", "verbose": "log_level", "image_size": "image_resolution", "resolution": "image_resolution",
    "max_length": "context_length", "llrd": "layer_decay", "lora_r": "lora_rank", "lora": "lora_rank",
    "ema_decay": "ema", "k": "top", "topk": "top", "top_k": "top", "num_results": "top", "image": "query_image",
}  # fmt: skip
"""What flags are called elsewhere, and here. Whole words of just one flag (`--epochs`) need no line."""


def meant_flag(name: str, known: dict[str, str]) -> str:
    """Say which of the known names is meant, as it is shown; nothing where that would be a guess."""
    name = shorten(name).lower().replace("-", "_")
    if RENAMED.get(name) in known:
        return f"; it is now {known[RENAMED[name]]}"
    meant = MEANT.get(name, name)
    words = set(name.split("_"))
    # `epochs` is in num_epochs alone, so that is meant; `size` is in batch_size and in shard_size, so nobody knows
    same_words = [flag for flag in known if words <= set(flag.split("_"))]
    likely = [
        *(flag for flag in (meant, MEANT.get(meant), RENAMED.get(meant)) if flag in known),
        *(same_words if len(same_words) == 1 else []),
        *difflib.get_close_matches(name, known, n=1, cutoff=0.75),
    ]
    return f"; did you mean {known[likely[0]]}?" if likely else ""
