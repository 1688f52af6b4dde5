"""What tests run in several processes, and the one they are compared with.

torchrun --nproc_per_node 2 tests/helpers/worker.py TASK FOLDER
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytest import raises
from torch import Tensor

from clip_model import CLIPModel, MultimodalTrainer
from cliptune.cli import run_stage
from cliptune.data.near_duplicates import NearDuplicates
from cliptune.data.pairs import load_pairs
from cliptune.data.repeats import image_kinds
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.table import Strings
from cliptune.features.cache import FeatureCache, View
from cliptune.features.encode import Encoder
from cliptune.features.metrics import merged_ranks
from cliptune.features.ranks import retrieval_ranks
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.lora import add_lora
from cliptune.model.parallel import can_shard, load_optimizer_state, parallel_model, unscale_gradient, whole
from cliptune.runs.copies import main_finds_copies
from cliptune.runtime.device import Precision, resolve_precision
from cliptune.runtime.distributed import (
    all_sum,
    any_rank,
    broadcast,
    gather_rows,
    gather_sizes,
    gather_values,
    is_main,
    main_first,
    process_group,
    rank,
    rank_slice,
    world_size,
)
from cliptune.training.gradcache import GradCache
from cliptune.training.loss import POSITIVES, ContrastiveLoss
from cliptune.training.optim import build_optimizer
from cliptune.training.sigmoid_loss import SigmoidLoss
from data_loader import ImageTextDataset
from tests.helpers.losses import reference_loss
from tests.helpers.models import FP16, FP32, SMALL_RESNET, SMALL_VIT, FullMemory, make_batch, make_model

CPU = torch.device("cpu")
STEPS = 9
LOSSES = list(product(("infonce", "siglip"), POSITIVES))
SIZES = (21, 21, 2)
"""Pairs of the batches, in turn: none of them divides among 2 and 3, and the last leaves some with nothing."""


def train(name: str, how: str, micro_batch_size: int | None, *, resume_at: int = -1) -> dict[str, Any]:
    """Train a small model; with `resume_at` another one takes over from the first's whole state before that step."""
    trainer = make_trainer(name, how, micro_batch_size)
    trainer.grad_cache.backward(*own_batch(trainer, SIZES[0]))
    gradients = whole({key: p.grad.clone() for key, p in trainer.model.named_parameters() if p.grad is not None})
    losses: list[float] = []
    for step in range(STEPS):
        if step == resume_at:
            state = whole(trainer.model.state_dict()), whole(trainer.optimizer.state_dict())
            trainer = make_trainer(name, how, micro_batch_size, weights=state[0])
            load_optimizer_state(trainer.optimizer, state[1])
        losses.append(train_step(trainer, SIZES[step % len(SIZES)]))
    model, optimizer = trainer.model, trainer.optimizer
    with torch.no_grad():
        features = model.eval()(*make_batch(model, 3)[:2])
    state_dict = {key: value.clone() for key, value in whole(model.state_dict()).items()}
    return {
        "gradients": gradients,
        "losses": losses,
        "weights": state_dict,
        "optimizer": whole(optimizer.state_dict()),
        "features": features,
    }


def make_trainer(
    name: str,
    how: str,
    micro_batch_size: int | None,
    *,
    weights: dict[str, Tensor] | None = None,
    precision: Precision = FP32,
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
        precision=precision,
        micro_batch_size=micro_batch_size,
        parallel=parallel,
    )


def own_batch(trainer: MultimodalTrainer, size: int) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, ids = make_batch(trainer.model, size)
    own = rank_slice(size)
    return images[own], tokens[own], ids[own]


def train_step(trainer: MultimodalTrainer, size: int) -> float:
    result = trainer.train_step(*own_batch(trainer, size))
    assert result is not None
    assert result.num_pairs == size
    return result.loss.item()


def train_every_way(folder: Path) -> None:
    for how, size in product(("ddp", "fsdp") if can_shard() else ("ddp",), (None, 3)):
        for name in ("ViT-Mini", "RN-Ti") if size else ("ViT-Mini",):
            result = train(name, how, size, resume_at=STEPS // 2 if size else -1)
            if is_main():
                torch.save(result, folder / f"{world_size()}-{name}-{how}-{size}.pt")


def train_adapted(name: str, how: str, micro_batch_size: int | None) -> dict[str, Tensor]:
    """Train adapters with rates by layer and, but for shards, an average; returns the model that comes of it."""
    model = make_model(name)
    torch.manual_seed(rank())  # the adapters' start, which differs until the ranks take over that of the first
    add_lora(model, 2)
    parallel = parallel_model(model, how, CPU)
    rates = {"learning_rate": 1e-2, "backbone_lr_scale": 1.0, "layer_decay": 0.7}
    optimizer = build_optimizer(model, weight_decay=0.1, **rates)
    trainer = MultimodalTrainer(
        model, ContrastiveLoss(), optimizer, precision=resolve_precision("fp32", CPU),
        micro_batch_size=micro_batch_size, parallel=parallel, ema=None if how == "fsdp" else 0.5,
    )  # fmt: skip
    for step in range(STEPS):
        train_step(trainer, SIZES[step % len(SIZES)])
    saved = trainer.state_dict()["weights_state_dict"]
    assert "backbone.transformer.resblocks.0.mlp.c_fc.lora_A" in saved
    return {key: value.clone() for key, value in trainer.model_state().items()}


def train_adapted_every_way(folder: Path) -> None:
    for how in ("ddp", "fsdp") if can_shard() else ("ddp",):
        state = train_adapted("ViT-Mini", how, 3)
        if is_main():
            torch.save(state, folder / f"{how}.pt")


def fill_the_memory_of_one(folder: Path) -> None:
    """All processes go on with the smaller micro-batch, as if they had from that step on.

    Also where the others' forward pass was the one whose backward pass adds up the gradients: a batch in one piece.
    """
    for size, smaller, at in ((4, 2, 7), (None, 5, 1)):  # it fails in the second step
        weights = []
        for fails in (True, False):
            trainer = make_trainer("ViT-Mini", "ddp", size)
            if fails and rank() == 1:
                FullMemory(trainer.model, pairs=smaller, at=at)
            for step in range(4):
                if not fails and step == 1:
                    trainer.grad_cache.size = smaller
                train_step(trainer, 21)
            assert trainer.grad_cache.size == smaller
            weights.append(trainer.model.state_dict())
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        assert len(set(gather_values(weights[0]["image_projection.weight"].sum().item()))) == 1


def scale_losses(folder: Path) -> None:
    """Steps in float16 under DDP and FSDP2, and one whose gradient overflows in a shard of one rank alone."""
    norms = []
    for how in ("ddp", "fsdp") if can_shard() else ("ddp",):
        trainer = make_trainer("ViT-Mini", how, 3, precision=FP16)
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 256.0})
        result = trainer.train_step(*own_batch(trainer, 8))
        assert result is not None
        assert result.values.isfinite().all()
        norms.append(result.values[2].item())
        assert trainer.grad_cache.backward(*own_batch(trainer, 8)) is not None
        gradient: Any = trainer.model.image_projection.weight.grad
        if rank() == 1 or how == "ddp":
            (gradient.to_local() if how == "fsdp" else gradient).fill_(torch.inf)
        unscale_gradient(trainer.scaler, trainer.optimizer)
        trainer.scaler.update()
        assert trainer.scaler.get_scale() == 128
    assert max(norms) <= 1.01 * min(norms)


def compute_losses(folder: Path) -> None:
    """Values, gradients and the start of the bias, of a batch that the ranks share and one that leaves some without."""
    for how, (kind, positives), size in product(("ddp", "fsdp") if can_shard() else ("ddp",), LOSSES, (21, 2)):
        plain, model = make_model("ViT-Mini"), make_model("ViT-Mini")
        loss = {"infonce": ContrastiveLoss, "siglip": SigmoidLoss}[kind](positives=positives)
        if loss.needs_bias:
            plain.learn_bias()
            model.learn_bias()
        images, tokens, image_ids = make_batch(plain, size)
        caption_ids = torch.arange(size) % 6  # equal ones lie in other ranks
        features: tuple[Tensor, Tensor] = plain(images, tokens)
        alike = {"image_ids": image_ids, "caption_ids": caption_ids}
        parallel = parallel_model(model, how, CPU)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        steps = GradCache(model, loss, precision=FP32, size=3, parallel=parallel, scaler=scaler)
        own = rank_slice(size)
        batch = [rows[own] for rows in (images, tokens, image_ids, caption_ids)]
        if isinstance(loss, SigmoidLoss):
            parameters = list(model.parameters())
            assert steps.start_bias(*batch)
            now = list(model.parameters())  # of a sharded model the shards, which an optimiser is made of
            assert all(one is other for one, other in zip(parameters, now, strict=True))
            alone = SigmoidLoss(positives=positives, across_ranks=False)
            bias = alone.initial_bias(*features, plain.logit_scale, **alike)
            plain.logit_bias.data.fill_(bias)  # type: ignore[union-attr]
            assert abs(model.logit_bias.item() - bias) < 1e-3  # type: ignore[union-attr]
        expected = reference_loss(kind, positives, *features, plain.logit_scale, plain.logit_bias, **alike)
        expected.backward()
        result = steps.backward(*batch)
        assert result is not None
        assert abs(result.loss.item() - expected.item()) < 1e-5 * abs(expected.item()) + 1e-3 * (kind == "siglip")
        found = whole({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        assert ("logit_bias" in found) == (kind == "siglip")
        assert abs(found.pop("logit_bias", 0.0) - wanted.pop("logit_bias", 0.0)) < 1e-4  # it begins where that is 0
        for name, want in wanted.items():
            assert (found[name] - want).norm() <= 1e-4 * want.norm() + 1e-6, (how, kind, positives, size, name)


def exchange(folder: Path) -> None:
    me, number = rank(), world_size()
    rows = torch.full((me, 2), float(me), requires_grad=True)
    gathered = gather_rows(rows)
    assert gathered[:, 0].tolist() == [float(each) for each in range(number) for _ in range(each)]
    assert not gathered.requires_grad
    assert gather_rows(torch.arange(2 - min(me, 2))).tolist() == [0, 1, 0]
    assert gather_sizes(10 + me) == list(range(10, 10 + number))
    assert any_rank(me == 1)
    assert not any_rank(False)
    assert broadcast({"from": me}) == {"from": 0}
    assert gather_values(f"process {me}") == [f"process {each}" for each in range(number)]
    assert all_sum(torch.tensor(me + 1.0)).item() == number * (number + 1) / 2
    assert sum(len(range(10)[rank_slice(10)]) for _ in [0]) in {10 // number, 10 // number + 1}
    with main_first():
        if is_main():
            (folder / "made").touch()
        assert (folder / "made").exists()
    _take_the_main_ranks_copies()


def _take_the_main_ranks_copies() -> None:
    """Each rank has a cache of its own, and would find another pair."""
    own = NearDuplicates(np.array([[rank(), 5]]), np.array([False]), np.zeros(1, dtype=np.float32))
    paths = Strings.of(f"{i}.png" for i in range(6))
    with main_finds_copies(lambda _: own) as find:
        assert find(paths).pairs.tolist() == [[0, 5]]
    with main_finds_copies(lambda _: own):  # of shards nobody asks
        pass
    with main_finds_copies(lambda _: own) as find:
        if is_main():
            find(paths)
        else:
            with raises(ValueError, match="has 5 images where the main rank has 6"):
                find(paths.take(np.arange(5)))


def cache_features(folder: Path) -> None:
    """Each rank runs the towers for its part; what is found damaged is shared out again."""
    with main_first():
        if is_main():
            create_sample_dataset(folder / "data", 30)
            next((folder / "data" / "images").glob("*3.png")).write_text("broken")
    pairs = load_pairs(folder / "data")
    torch.manual_seed(0)
    model = CLIPModel("ViT-Ti/32", freeze_tower="image")
    run_image_tower, num_run = model.run_image_tower, []
    model.run_image_tower = lambda images: (num_run.append(len(images)), run_image_tower(images))[1]  # type: ignore
    encoder = Encoder(model, ImageTextDataset, precision=resolve_precision("fp32", CPU), batch_size=4, num_workers=0)
    (broken,) = (index for index, path in enumerate(pairs.paths) if Path(path).stat().st_size == len("broken"))
    outputs = []
    for expected in (29, 0):
        num_run.clear()
        found = FeatureCache(encoder, folder / "shared").images(pairs, View())
        assert found is not None
        assert list(found.issues) == [broken]
        outputs.append(found[np.delete(np.arange(30), broken)])
        counts = gather_values(sum(num_run))
        assert sum(counts) == expected
        assert max(counts) - min(counts) <= 1
    assert torch.equal(*outputs)
    # ranks that share no disk compute everything, each for itself
    num_run.clear()
    apart = FeatureCache(encoder, folder / f"apart-{rank()}").images(pairs, View())
    assert apart is not None
    assert sum(num_run) == 29
    assert torch.allclose(apart[np.delete(np.arange(30), broken)], outputs[0], atol=1e-5)


def merge_duplicates(folder: Path) -> None:
    """All ranks rank a part each, of 1,500 images whose texts repeat, and see which files are the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-2, 3, (1500, 6), generator=generator).float()  # small integers: exact products, many ties
    kinds = torch.cat([torch.arange(1200), torch.randint(0, 1200, (1800,), generator=generator)])
    owners, texts = torch.arange(3000) % 1500, torch.randint(-2, 3, (1200, 6), generator=generator).float()
    standard = retrieval_ranks(images, texts[kinds], owners)
    rows = torch.arange(1500)
    merged = merged_ranks(standard, images, texts[kinds], owners, image_kinds=rows, text_kinds=kinds)
    is_match = torch.zeros(1500, 1200, dtype=torch.bool)
    is_match[owners, kinds] = True
    for scores, matches, ranks in (
        (images @ texts.T, is_match, merged.ranks.i2t),
        ((images @ texts.T).T, is_match.T, merged.ranks.t2i[:1200]),  # the first 1,200 texts are all there are
    ):
        lowest = torch.tensor(-99.0)
        best, others = scores.where(matches, lowest).amax(1, keepdim=True), scores.where(~matches, lowest)
        assert torch.equal(ranks, 1 + (others > best).sum(1) + (others == best).sum(1) / 2)
    with main_first():
        if is_main():
            for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("d", b"2"), ("e", b"3")):
                (folder / name).write_bytes(content)
    assert image_kinds(Strings.of(str(folder / name) for name in "abcde")).tolist() == [0, 1, 0, 1, 4]


def fail(folder: Path) -> None:
    if rank() == 1:
        raise ValueError("process one has no data")
    any_rank(False)


TASKS = {
    "losses": compute_losses,
    "train": train_every_way,
    "adapted": train_adapted_every_way,
    "memory": fill_the_memory_of_one,
    "scaled": scale_losses,
    "exchange": exchange,
    "features": cache_features,
    "merge": merge_duplicates,
    "fail": fail,
}


def main(task: str, folder: Path) -> int:
    torch.set_num_threads(1)
    for shape in (SMALL_RESNET, SMALL_VIT):
        ARCHITECTURES[shape.name] = shape
    with process_group(CPU):
        assert world_size() > 1
        TASKS[task](folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_stage(lambda: main(sys.argv[1], Path(sys.argv[2])), name="worker.py"))
