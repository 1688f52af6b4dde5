"""What a step takes of a GPU's memory: how much `--micro_batch_size auto` uses, whether a step that ran out is right.

python benchmarks/gpu_memory.py
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.agreement import AGAINST_ITSELF, check, distance, finite_gradient, gradients_of, make_model
from benchmarks.gpu_data import drawn_captions
from benchmarks.rows import FAILED, Row, tell
from benchmarks.train_step import make_trainer
from clip_model import CLIPModel
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.device import resolve_device

LIMIT = 0.6
"""Of what a whole batch takes beside the model: it then runs out, and half of it fits."""


def main(argv: list[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    options = parse(argv)
    device = resolve_device(options.device)
    tell_fraction(options, device)
    model = make_model(options.model)
    for precision in options.precisions.split(","):
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        tell_repeated(model, precision, options, device)
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--precisions", default="bf16,fp16,fp32")
    parser.add_argument("--pairs", type=int, default=16384, help="of the batch that does not fit as a whole")
    parser.add_argument("--repeated_pairs", type=int, default=256, help="of the batch that is made not to fit")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(argv)


def tell_fraction(options: Namespace, device: torch.device) -> None:
    """Take two steps of a batch in the micro-batches that were chosen; tell what they take of the card."""
    tokens, ids = tokenize(drawn_captions(options.pairs))[0], torch.arange(options.pairs)
    trainer = make_trainer(
        options.model, device, precision="bf16", batch_size=options.pairs, micro_batch_size="auto", texts=tokens[:4096]
    )
    side = trainer.model.image_resolution
    images = torch.zeros(options.pairs, 3, side, side, dtype=torch.uint8, pin_memory=True)
    chosen = trainer.grad_cache.size
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what was tried before is not what is used
    for _ in range(2):
        trainer.train_step(images, tokens, ids)
    fraction = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(device).total_memory
    found = trainer.grad_cache.size
    note = f"micro-batches of {found or options.pairs}" + ("" if found == chosen else f"; {chosen} did not fit")
    tell(Row("micro-batches by themselves: memory used", 100 * fraction, "%", must=70, note=note))


def tell_repeated(model: CLIPModel, precision: str, options: Namespace, device: torch.device) -> None:
    """Take a step whole, and again where memory does not suffice; tell how far apart the gradients are."""
    size, side = options.repeated_pairs, model.image_resolution
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    batch = images, tokenize(drawn_captions(size))[0], torch.arange(size)
    trainer = make_trainer(model, device, precision=precision, batch_size=size, micro_batch_size=size, compile=False)
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = {name: value.cpu() for name, value in finite_gradient(trainer, batch).items()}
    peak, scale = torch.cuda.max_memory_allocated(), trainer.scaler.get_scale()
    trainer.model.zero_grad()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((base + LIMIT * (peak - base)) / total)
    trainer.grad_cache.backward(*batch)
    name = f"out of memory, repeated, {precision}"
    if trainer.grad_cache.size == size:
        tell(Row(name, state=FAILED, note="memory did not run out"))
        return
    again = {key: value / scale for key, value in gradients_of(trainer.model.named_parameters()).items()}
    check(f"{name}: gradient against the whole's", distance(again, whole), AGAINST_ITSELF[precision])
    check(f"{name}: change of the loss's scale", abs(trainer.scaler.get_scale() / scale - 1), 0.0)


if __name__ == "__main__":
    sys.exit(main())
