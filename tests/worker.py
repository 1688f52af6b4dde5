"""What tests run in several processes, and the one they are compared with.

torchrun --nproc_per_node 2 tests/worker.py STEPS FOLDER
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from architectures import ARCHITECTURES
from clip_model import ContrastiveLoss, MultimodalTrainer, build_optimizer
from distributed import is_main, num_processes, process_group, share
from parallel import load_optimizer_state, parallel_model, whole
from runtime import resolve_precision
from tests.test_micro_batches import SMALL_RESNET, SMALL_VIT, make_batch, make_model

CPU = torch.device("cpu")
SIZES = (21, 21, 2)
"""Pairs of the batches, in turn: none of them divides among 2 and 3, and the last leaves some with nothing."""


def train(name: str, how: str, micro_batch_size: int | None, *, steps: int, resume_at: int = -1) -> dict[str, Any]:
    """Train a small model; with `resume_at` another one takes over from the first's whole state before that step."""
    trainer = make_trainer(name, how, micro_batch_size)
    losses: list[float] = []
    for step in range(steps):
        if step == resume_at:
            state = whole(trainer.model.state_dict()), whole(trainer.optimizer.state_dict())
            trainer = make_trainer(name, how, micro_batch_size, weights=state[0])
            load_optimizer_state(trainer.optimizer, state[1])
        images, tokens, ids = make_batch(trainer.model, SIZES[step % len(SIZES)])
        own = share(len(ids))
        result = trainer.train_step(images[own], tokens[own], ids[own])
        assert result is not None
        assert result.num_pairs == len(ids)
        losses.append(result.loss.item())
    model, optimizer = trainer.model, trainer.optimizer
    with torch.no_grad():
        features = model.eval()(*make_batch(model, 3)[:2])
    state_dict = {key: value.clone() for key, value in whole(model.state_dict()).items()}
    return {"losses": losses, "weights": state_dict, "optimizer": whole(optimizer.state_dict()), "features": features}


def make_trainer(
    name: str, how: str, micro_batch_size: int | None, *, weights: dict[str, Tensor] | None = None
) -> MultimodalTrainer:
    model = make_model(name)
    if weights is not None:
        model.load_state_dict(weights)
    parallel = parallel_model(model, how, CPU)
    optimizer = build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=0.3, weight_decay=0.1)
    return MultimodalTrainer(
        model,
        ContrastiveLoss(),
        optimizer,
        precision=resolve_precision("fp32", CPU),
        micro_batch_size=micro_batch_size,
        parallel=parallel,
    )


def main(steps: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for shape in (SMALL_RESNET, SMALL_VIT):
        ARCHITECTURES[shape.name] = shape
    with process_group(CPU):
        assert num_processes() > 1
        for how, size in product(("ddp", "fsdp"), (None, 3)):
            for name in ("ViT-Mini", "RN-Ti") if size else ("ViT-Mini",):
                result = train(name, how, size, steps=steps, resume_at=steps // 2 if size else -1)
                if is_main():
                    torch.save(result, folder / f"{num_processes()}-{name}-{how}-{size}.pt")
        dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
