"""Write a small checkpoint in the format of today; run it when `FORMAT_VERSION` changes, and leave the older files.

python -m tests.model.checkpoints.make
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import torch

from clip_model import CLIPModel, add_self_test
from cliptune.model.architectures import ARCHITECTURES, Architecture
from cliptune.model.checkpoint_file import FORMAT_VERSION, save_checkpoint
from cliptune.preprocess.tokens import tokenize

TINY = Architecture(
    "ViT-Tiny", embed_dim=8, image_resolution=16, vision_layers=1, vision_width=64, vision_patch_size=8, vision_heads=2,
    context_length=77, vocab_size=49408, transformer_width=8, transformer_heads=2, transformer_layers=1,
)  # fmt: skip


def make() -> Path:
    """Train the tiny model for one step, and write its checkpoint; returns the file."""
    torch.manual_seed(0)
    ARCHITECTURES[TINY.name] = TINY
    model = CLIPModel(TINY.name, projection_dim=6)
    with torch.no_grad():
        model.backbone.token_embedding.weight.zero_()  # a million zeros, which gzip makes small
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    images, (tokens, _) = torch.randn(4, 3, 16, 16), tokenize(["a dog", "a cat", "a red boat", "people by a river"])
    image_features, text_features = model(images, tokens)
    logits = model.logit_scale.exp() * image_features @ text_features.T
    labels = torch.arange(4)
    (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)).backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # zeros in half of the bits, for gzip again
    state = {"model_state_dict": model.state_dict(), "architecture": TINY.to_dict(), "epoch": 1, "global_step": 1}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "x.pth", add_self_test(state))
        content = (Path(folder) / "x.pth").read_bytes()
    path = Path(__file__).parent / f"format_{FORMAT_VERSION}.pth.gz"
    path.write_bytes(gzip.compress(content, mtime=0))
    return path


if __name__ == "__main__":
    print(make())
