"""The losses of our training beside those of a plain float32 loop on OpenAI's own modules, step by step.

python benchmarks/train_losses.py --data_dir ./data --json losses.json

Both start from the same weights and see the same batches. The plain loop runs OpenAI's `forward` over all 77 positions
and AdamW as PyTorch writes it out; ours is `MultimodalTrainer` as `train.py` uses it, in float32, at a constant rate.
"""

from __future__ import annotations

import argparse
import copy
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import machine, print_table, write_json
from clip_model import MAX_LOGIT_SCALE, CLIPModel, MultimodalTrainer
from cliptune.data.loaders import Batch, TrainLoader
from cliptune.preprocess.transforms import clip_transform, normalize
from cliptune.runtime.device import resolve_device, resolve_precision
from cliptune.runtime.openai_clip import import_clip
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.optim import build_optimizer
from data_loader import ImageTextDataset

DECAY = 0.01
CLIP_NORM = 1.0


def main(argv: list[str] | None = None) -> int:
    """Train both, print the largest difference; returns the exit code."""
    options = parse(argv)
    device = resolve_device(options.device)
    rows = [["rate", "steps", "first loss", "last loss", "largest difference"]]
    runs = []
    for rate, steps in zip(options.rates, options.steps, strict=True):
        ours, plain = losses(options, rate=rate, steps=steps, device=device)
        largest = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
        rows.append([f"{rate:g}", str(steps), f"{plain[0]:.6f}", f"{plain[-1]:.6f}", f"{largest:.1e}"])
        runs.append({"rate": rate, "ours": ours, "plain": plain, "largest_difference": largest})
    print_table(f"{options.model}, batch {options.batch_size}, fp32, {machine(options.device)}", rows)
    write_json(options.json, {"machine": machine(options.device), "options": vars(options), "runs": runs})
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_dir", default="./data", help="data set whose pairs are trained on")
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-5, 1e-4])
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 20], help="steps at each rate")
    parser.add_argument("--quick", action="store_true", help="under a minute: a small model, 10 and 5 steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(argv)
    if options.quick:
        options.model, options.steps = "ViT-Ti/32", [10, 5]
    return options


def losses(options: Namespace, *, rate: float, steps: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Return the losses of ours and of the plain loop, in nats, a number a step."""
    torch.manual_seed(0)
    model = CLIPModel(options.model, pretrained="none").to(device)
    plain = Plain(copy.deepcopy(model))
    optimizer = build_optimizer(model, learning_rate=rate, backbone_lr_scale=1.0, weight_decay=DECAY)
    trainer = MultimodalTrainer(
        model, ContrastiveLoss(), optimizer, precision=resolve_precision("fp32", device), gradient_clip_norm=CLIP_NORM
    )
    plain_optimizer = plain.build_optimizer(rate)
    found: tuple[list[float], list[float]] = ([], [])
    for batch in tqdm(first_batches(options, steps, model.image_resolution), total=steps, disable=None):
        result = trainer.train_step(batch.images, batch.tokens, batch.image_ids)
        assert result is not None
        found[0].append(result.loss.item())
        found[1].append(plain.train_step(normalize(batch.images.to(device)), batch.tokens.to(device), plain_optimizer))
    return found


def first_batches(options: Namespace, steps: int, resolution: int) -> Iterator[Batch]:
    """Yield the first batches of training, epoch after epoch."""
    dataset = ImageTextDataset(options.data_dir, split="train", transform=clip_transform(resolution))
    loader = TrainLoader(dataset, batch_size=options.batch_size, num_workers=0, device=torch.device("cpu"))
    done = epoch = 0
    while done < steps:
        epoch += 1
        for batch in loader.epoch(epoch):
            if done < steps:
                yield batch
            done += 1


class Plain(nn.Module):
    """The usual loop: OpenAI's forward, two linear layers, cross-entropy both ways."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model
        backbone: Any = model.backbone
        for block in backbone.transformer.resblocks:
            block.attn_mask = backbone.build_attention_mask().to(model.device)
        for module in backbone.modules():
            if hasattr(module, "mlp"):
                module.mlp.gelu = import_clip().model.QuickGELU()

    def build_optimizer(self, rate: float) -> torch.optim.AdamW:
        """AdamW, no decay on vectors and scalars, nothing fused."""
        matrices = [parameter for parameter in self.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in self.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6, foreach=False)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch over all positions."""
        backbone: Any = self.model.backbone
        x = (backbone.token_embedding(tokens) + backbone.positional_embedding).permute(1, 0, 2)
        x = backbone.ln_final(backbone.transformer(x).permute(1, 0, 2))
        texts = x[torch.arange(len(tokens), device=tokens.device), tokens.argmax(-1)] @ backbone.text_projection
        images = self.model.image_projection(backbone.visual(images))
        return F.normalize(images, dim=-1), F.normalize(self.model.text_projection(texts), dim=-1)

    def train_step(self, images: Tensor, tokens: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Take one step; return its loss."""
        optimizer.zero_grad()
        image_features, text_features = self(images, tokens)
        logits = self.model.logit_scale.exp() * image_features @ text_features.T
        labels = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP_NORM)
        optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return loss.item()


if __name__ == "__main__":
    sys.exit(main())
