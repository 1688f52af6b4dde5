import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_model import CLIPModel, MultimodalTrainer
from cliptune.data.loaders import Batch, TrainLoader
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.data.row_store import RowStore
from cliptune.data.sample_data import create_sample_dataset
from cliptune.features import cache as feature_cache
from cliptune.features.cache import FeatureCache, FeatureLoader, View, tower_key
from cliptune.features.encode import Encoder, encode_pairs
from cliptune.model.architectures import ARCHITECTURES
from cliptune.preprocess.transforms import train_transform
from cliptune.runtime.device import resolve_precision
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.optim import build_optimizer
from data_loader import ImageTextDataset
from evaluation import evaluate
from tests.helpers.models import SMALL_VIT

CPU = torch.device("cpu")
FP32, BF16 = resolve_precision("fp32", CPU), resolve_precision("bf16", CPU)


SMALL = replace(SMALL_VIT, name="ViT-Mini of 224", embed_dim=256, image_resolution=224)


@pytest.fixture(autouse=True)
def small_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, SMALL.name, SMALL)


def small_model(**frozen: object) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(SMALL.name, **frozen)  # type: ignore[arg-type]


def encoder_of(model: CLIPModel) -> Encoder:
    return Encoder(model, ImageTextDataset, precision=FP32, batch_size=16, num_workers=0)


def cache_of(model: CLIPModel, folder: Path) -> FeatureCache:
    return FeatureCache(encoder_of(model), folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: beside other work, threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counted:
    """Counts what a model's towers are given."""

    def __init__(self, model: CLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.texts = 0
        run_image_tower, run_text_tower = model.run_image_tower, model.run_text_tower

        def image_tower(images: torch.Tensor) -> torch.Tensor:
            self.images += len(images)
            return run_image_tower(images)

        def text_tower(tokens: torch.Tensor) -> torch.Tensor:
            self.texts += len(tokens)
            return run_text_tower(tokens)

        monkeypatch.setattr(model, "run_image_tower", image_tower)
        monkeypatch.setattr(model, "run_text_tower", text_tower)

    def since(self) -> tuple[int, int]:
        counts = self.images, self.texts
        self.images = self.texts = 0
        return counts


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    create_sample_dataset(tmp_path / "data", 30)
    return load_pairs(tmp_path / "data")


def test_a_full_disk_is_said_before_writing(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**4))
    cache = cache_of(small_model(freeze_tower="image"), tmp_path / "c")
    with pytest.raises(OSError, match=r"no room for 30 cached tower outputs: .*Try another --cache_dir"):
        cache.images(pairs, View())
    assert all(file.stat().st_size == 0 for file in (tmp_path / "c").iterdir())


@pytest.mark.slow
def test_a_damaged_output_is_computed_again_alone(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(freeze_tower="image")
    first = cache_of(model, tmp_path / "c").images(pairs, View())
    assert first is not None
    expected = first[np.arange(30)]
    (file,) = (tmp_path / "c").glob("*.rows")
    content = bytearray(file.read_bytes())
    content[5 * 4 * 256 + 9] ^= 1
    file.write_bytes(content)
    counted = Counted(model, monkeypatch)
    again = cache_of(model, tmp_path / "c").images(pairs, View())
    assert counted.since() == (1, 0)
    assert again is not None
    assert torch.allclose(again[np.arange(30)], expected, atol=1e-5)


LOADER_CASES = [
    ({"freeze_backbone": True}, "none", 1, "random"),
    ({"freeze_backbone": True}, "none", 1, "all"),
    ({"freeze_backbone": True}, "color", 2, "random"),
    ({"freeze_backbone": True}, "crop", 2, "all"),
    ({"freeze_tower": "image"}, "none", 1, "random"),
    ({"freeze_tower": "image"}, "crop", 1, "random"),
    ({"freeze_tower": "text"}, "none", 0, "random"),
    ({"freeze_tower": "text"}, "crop", 0, "random"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "augment", "num_views", "captions"), LOADER_CASES)
def test_training_goes_the_same_way_with_and_without_cached_outputs(
    pairs: Pairs, tmp_path: Path, frozen: dict[str, object], augment: str, num_views: int, captions: str
) -> None:
    def run(cached: bool) -> tuple[list[torch.Tensor], CLIPModel]:
        model = small_model(**frozen)
        dataset = ImageTextDataset(pairs, transform=train_transform(224, augment), captions=captions, seed=3)
        dataset.num_views = num_views
        loader = plain = TrainLoader(dataset, batch_size=8, num_workers=0, device=CPU)
        if cached:
            cache = cache_of(model, tmp_path / "cache")
            loader = FeatureLoader(plain, cache, augment=augment, num_epochs=3)  # type: ignore[assignment]
        optimizer = build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=0.01, weight_decay=0.01)
        trainer = MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32)
        model.train()
        losses = []
        assert len(loader) == len(plain)
        for epoch in (1, 2, 3):
            for images, tokens, ids, *_ in loader.epoch(epoch):
                assert not (cached and images.ndim == 4 and "image" in model.frozen_towers)
                result = trainer.train_step(images, tokens, ids)
                assert result is not None
                losses.append(result.loss)
        return losses, model

    plain_losses, plain_model = run(False)
    losses, model = run(True)
    assert torch.allclose(torch.stack(losses), torch.stack(plain_losses), rtol=1e-5, atol=0)
    start = small_model(**frozen).state_dict()
    for name in ("image_projection.weight", "text_projection.weight", "logit_scale"):
        value, expected = model.state_dict()[name], plain_model.state_dict()[name]
        moved = (expected - start[name]).norm()
        assert moved > 0
        assert (value - expected).norm() <= 1e-5 * expected.norm(), name
        assert (value - expected).norm() <= 1e-3 * moved, name
    for tower in model.frozen_towers:
        assert all(parameter.grad is None for parameter in model.tower_state(tower).values())


@pytest.mark.slow
def test_views_repeat_and_differ(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(freeze_backbone=True)
    counted = Counted(model, monkeypatch)
    dataset = ImageTextDataset(pairs, transform=train_transform(224, "crop"), seed=3)
    dataset.num_views = 2
    loader = FeatureLoader(
        TrainLoader(dataset, batch_size=8, num_workers=0, device=CPU),
        cache_of(model, tmp_path), augment="crop", num_epochs=4,
    )  # fmt: skip
    seen = []
    for epoch, num_computed in ((1, 30), (2, 30), (3, 0), (4, 0)):
        batches = list(loader.epoch(epoch))
        order = torch.cat([batch.image_ids for batch in batches]).argsort()
        seen.append(torch.cat([batch.images for batch in batches])[order])
        assert counted.since()[0] == num_computed
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.isclose(seen[0], seen[1]).all(1).any()


@pytest.mark.slow
def test_what_is_computed_again_is_what_changed(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(freeze_backbone=True)
    counted = Counted(model, monkeypatch)
    first = cache_of(model, tmp_path / "c").of_pairs(pairs)
    assert counted.since() == (30, len(set(pairs.captions)))
    again = cache_of(model, tmp_path / "c").of_pairs(pairs)
    assert counted.since() == (0, 0)
    everything = np.arange(30)
    assert first.images is not None
    assert again.images is not None
    assert torch.equal(first.images[everything], again.images[everything])
    Image.new("RGB", (50, 40), (200, 10, 10)).save(pairs.paths[7])
    changed = cache_of(model, tmp_path / "c").images(pairs, View())
    assert counted.since() == (1, 0)
    assert changed is not None
    same = torch.isclose(changed[everything], first.images[everything], rtol=1e-4).all(1)
    assert torch.equal(same, torch.arange(30) != 7)
    cache = cache_of(model, tmp_path / "c")
    for view in (View("crop"), View("crop", 1), View("crop", 1, 1), View("color", 1, 1)):
        cache.images(pairs, view)
        assert counted.since() == (30, 0), view
    cache.images(pairs, View("crop", 1))
    assert counted.since() == (0, 0)
    with torch.no_grad():
        model.backbone.visual.ln_post.bias[0] += 1
    cache_of(model, tmp_path / "c").of_pairs(pairs)
    assert counted.since() == (30, 0)


@pytest.mark.slow
def test_a_towers_key_is_what_its_output_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(freeze_backbone=True)
    image, text = (tower_key(model, tower, FP32) for tower in ("image", "text"))
    with torch.no_grad():
        model.backbone.transformer.resblocks[0].ln_1.bias[0] += 1
        model.image_projection.weight[0, 0] += 1
    assert tower_key(model, "image", FP32) == image
    assert tower_key(model, "text", FP32) != text
    assert tower_key(model, "image", BF16) != image
    model.set_extra_state(torch.tensor(False))  # another activation
    assert tower_key(model, "image", FP32) != image
    model.set_extra_state(torch.tensor(True))
    assert tower_key(model, "image", FP32) == image
    for change in ({"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}, {"vision_eps": 1e-3}, {"context_length": 9}):
        changed = copy(model)
        changed.architecture = replace(model.architecture, **change)
        assert tower_key(changed, "image", FP32) != image
    monkeypatch.setattr(feature_cache, "PREPROCESSING_VERSION", feature_cache.PREPROCESSING_VERSION + 1)
    assert tower_key(model, "image", FP32) != image


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(freeze_tower="image")
    tower, batches = model.run_image_tower, iter(range(100))

    def dies_in_its_second_batch(images: torch.Tensor) -> torch.Tensor:
        if next(batches) == 1:
            raise OSError("the power is out")
        return tower(images)

    monkeypatch.setattr(model, "run_image_tower", dies_in_its_second_batch)
    with pytest.raises(OSError, match="the power is out"):
        cache_of(model, tmp_path / "c").images(pairs, View())
    monkeypatch.undo()
    counted = Counted(model, monkeypatch)
    cached = cache_of(model, tmp_path / "c").images(pairs, View())
    assert counted.since() == (14, 0)
    assert cached is not None
    expected, *_ = encode_pairs(encoder_of(model), pairs)
    with torch.no_grad():
        assert torch.allclose(model.project_image(cached[np.arange(30)]), expected, atol=1e-6)


@pytest.mark.slow
def test_images_that_cannot_be_read_leave_their_batches_as_without_a_cache(pairs: Pairs, tmp_path: Path) -> None:
    Path(pairs.paths[3]).write_text("broken")
    Path(pairs.paths[8]).unlink()
    model = small_model(freeze_backbone=True)
    plain = TrainLoader(ImageTextDataset(pairs), batch_size=4, num_workers=0, device=CPU)
    cached = FeatureLoader(plain, cache_of(model, tmp_path / "c"), augment="none", num_epochs=2)
    for epoch in (1, 2):
        expected = list(plain.epoch(epoch))
        for got, want in zip(list(cached.epoch(epoch)), expected, strict=True):
            assert got.image_ids.tolist() == want.image_ids.tolist()
            assert got.caption_ids.tolist() == want.caption_ids.tolist()
            assert got.issues == want.issues
            assert got.images.shape == got.tokens.shape == (len(want.images), 256)
        assert sum(len(batch.issues) for batch in expected) == 2


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [{"freeze_backbone": True}, {"freeze_tower": "image"}, {"freeze_tower": "text"}])
def test_an_epoch_goes_on_from_a_batch(pairs: Pairs, tmp_path: Path, frozen: dict[str, object]) -> None:
    plain = TrainLoader(ImageTextDataset(pairs), batch_size=8, num_workers=0, device=CPU)
    loader = FeatureLoader(plain, cache_of(small_model(**frozen), tmp_path / "c"), augment="none", num_epochs=1)
    whole, rest = list(loader.epoch(1)), list(loader.epoch(1, start=1))
    assert len(whole) == len(rest) + 1 == 4
    for got, want in zip(rest, whole[1:], strict=True):
        assert torch.equal(got.images, want.images)
        assert torch.equal(got.tokens, want.tokens)


def test_only_captions_that_the_run_uses_are_computed(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(freeze_tower="text")
    counted = Counted(model, monkeypatch)
    cache = cache_of(model, tmp_path / "c")
    texts = cache.texts(pairs, np.array([0, 5]))
    assert counted.since() == (0, 2)
    assert texts is not None
    assert texts[np.array([5, 0, 5])].shape == (3, 256)
    with pytest.raises(IndexError, match="no tower output is cached for index 4"):
        texts[np.array([5, 4])]
    dataset = ImageTextDataset(pairs)
    loader = FeatureLoader(
        TrainLoader(dataset, batch_size=8, num_workers=0, device=CPU), cache, augment="none", num_epochs=1
    )
    list(loader.epoch(1))
    used = {pairs.captions[index] for index in dataset.choose(np.arange(30))[1].tolist()}
    assert counted.since() == (0, len(used - {pairs.captions[0], pairs.captions[5]}))


@pytest.mark.parametrize(
    "frozen",
    [
        {"freeze_backbone": True},
        pytest.param({"freeze_tower": "image"}, marks=pytest.mark.slow),
        pytest.param({"freeze_tower": "text"}, marks=pytest.mark.slow),
    ],
)
def test_evaluation_gives_the_same_with_cached_outputs(
    pairs: Pairs, tmp_path: Path, frozen: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(pairs.paths[3]).write_text("broken")
    model = small_model(**frozen)
    expected = evaluate(encoder_of(model), pairs, loss_batch_size=8)
    cached = cache_of(model, tmp_path / "c").of_pairs(pairs)
    counted = Counted(model, monkeypatch)
    got = evaluate(encoder_of(model), pairs, loss_batch_size=8, cached=cached)
    assert counted.since() == (0 if cached.images else 29, 0 if cached.texts else 58)
    assert got.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-6)
    assert (got.num_images, got.num_texts, got.chance) == (29, 58, expected.chance)
    assert model.training


@pytest.mark.slow
def test_a_million_epochs_are_not_gone_through_before_the_first(pairs: Pairs, tmp_path: Path) -> None:
    dataset = ImageTextDataset(pairs)
    choices = []
    choose = dataset.choose
    dataset.choose = lambda items: choices.append(0) or choose(items)  # type: ignore[func-returns-value, method-assign]
    loader = FeatureLoader(
        TrainLoader(dataset, batch_size=8, num_workers=0, device=CPU),
        cache_of(small_model(freeze_tower="text"), tmp_path / "c"), augment="none", num_epochs=1_000_000,
    )  # fmt: skip
    assert len(list(loader.epoch(1))) == 4
    assert loader._texts is not None
    assert (loader._texts.rows >= 0).all()
    assert len(choices) < 1000


def noise(rows: np.ndarray) -> None:
    rows[:] = np.random.default_rng(0).standard_normal(rows.shape).astype("<f4")


def nan(rows: np.ndarray) -> None:
    rows[:] = np.nan


def overwrite(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    for path in folder.glob("*.rows"):
        rows = np.fromfile(path, dtype="<f4")
        change(rows)
        rows.tofile(path)


@pytest.mark.slow
@pytest.mark.parametrize("change", [noise, nan])
def test_an_overwritten_cache_is_computed_anew_before_a_run(
    pairs: Pairs, tmp_path: Path, change: Callable[[np.ndarray], None], caplog: pytest.LogCaptureFixture
) -> None:
    model, everything = small_model(freeze_backbone=True), np.arange(30)
    want = cache_of(model, tmp_path / "c").of_pairs(pairs).images
    assert want is not None
    expected = want[everything]
    overwrite(tmp_path / "c", change)
    got = cache_of(model, tmp_path / "c").of_pairs(pairs).images
    assert got is not None
    assert torch.equal(got[everything], expected)
    assert caplog.text.count("30 rows are damaged, computed anew") == 1


@pytest.mark.slow
def test_an_output_that_is_not_finite_is_computed_anew_whatever_its_checksum(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(freeze_tower="image")
    cached = cache_of(model, tmp_path / "c").images(pairs, View())
    assert cached is not None
    cached.put(np.array([3, 4]), torch.full((2, 256), torch.nan))
    counted = Counted(model, monkeypatch)
    again = cache_of(model, tmp_path / "c").images(pairs, View())
    assert counted.since() == (2, 0)
    assert again is not None
    assert again[np.arange(30)].isfinite().all()


def remove(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)


def empty(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")


def fill_disk(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(RowStore, "write", write)
    overwrite(folder, nan)


def fail(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise OSError(5, "Input/output error")

    patch.setattr(RowStore, "read", read)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [noise, nan, remove, empty, fill_disk, fail])
def test_what_becomes_of_the_cache_in_a_run_changes_no_batch(
    pairs: Pairs, tmp_path: Path, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(folder: Path) -> Iterator[Iterator[Batch]]:
        dataset = ImageTextDataset(pairs, transform=train_transform(224, "crop"), seed=3)
        dataset.num_views = 2
        plain = TrainLoader(dataset, batch_size=8, num_workers=0, device=CPU)
        cache = cache_of(small_model(freeze_backbone=True), folder)
        loader = FeatureLoader(plain, cache, augment="crop", num_epochs=4)
        return (loader.epoch(epoch) for epoch in (1, 2, 1, 2))

    want, got = batches(tmp_path / "a"), batches(tmp_path / "b")
    for number, (epoch, expected) in enumerate(zip(got, want, strict=True)):
        whole = list(expected)
        found = [next(epoch)]
        if number in {0, 2}:
            if fault in {noise, nan}:
                overwrite(tmp_path / "b", fault)
            else:
                with pytest.MonkeyPatch.context() as patch:
                    fault(tmp_path / "b", patch)
                    found += epoch
        found += epoch
        for one, two in zip(found, whole, strict=True):
            assert torch.allclose(one.images, two.images, rtol=1e-4, atol=1e-5)
            assert torch.allclose(one.tokens, two.tokens, rtol=1e-4, atol=1e-5)
            assert torch.equal(one.image_ids, two.image_ids)


@pytest.mark.slow
def test_a_full_disk_costs_no_second_computation(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(freeze_tower="image")
    expected = cache_of(model, tmp_path / "a").images(pairs, View())
    with monkeypatch.context() as patch:
        fill_disk(tmp_path / "a", patch)
        cached = cache_of(model, tmp_path / "b").images(pairs, View())
        counted = Counted(model, monkeypatch)
        assert cached is not None
        for _ in range(2):
            outputs = cached[np.arange(30)]
    assert counted.since() == (0, 0)
    assert caplog.text.count("held in memory: [Errno 28] No space left on device") == 1
    assert expected is not None
    assert torch.allclose(outputs, expected[np.arange(30)], atol=1e-5)


@pytest.mark.slow
def test_an_output_that_cannot_be_computed_anew_is_an_error_that_names_the_image(pairs: Pairs, tmp_path: Path) -> None:
    cached = cache_of(small_model(freeze_tower="image"), tmp_path / "c").images(pairs, View())
    assert cached is not None
    Path(pairs.paths[4]).unlink()
    overwrite(tmp_path / "c", noise)
    with pytest.raises(OSError, match=r"scene_00004\.png: No such file"):
        cached[np.array([3, 4])]


@pytest.mark.slow
def test_a_file_that_was_replaced_is_computed_anew_and_one_that_was_copied_is_not(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their times say: `cp -p` and `rsync -t` keep them, `touch` and `cp` do not."""
    paths = [Path(path) for path in pairs.paths]
    for path, color in zip(paths[:2], ("red", "blue"), strict=True):
        Image.new("RGB", (40, 40), color).save(path, format="BMP")
    model = small_model(freeze_tower="image")
    cache_of(model, tmp_path / "c").images(pairs, View())
    status = [path.stat() for path in paths[:2]]
    red, blue = (path.read_bytes() for path in paths[:2])
    for path, content, times in zip(paths[:2], (blue, red), status, strict=True):
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    paths[2].touch()
    shutil.copy(paths[3], tmp_path / "copy")
    (tmp_path / "copy").replace(paths[3])
    counted = Counted(model, monkeypatch)
    cache_of(model, tmp_path / "c").images(pairs, View())
    assert counted.since() == (2, 0)


@pytest.mark.slow
def test_views_take_no_more_files_the_more_there_are(pairs: Pairs, tmp_path: Path) -> None:
    cache = cache_of(small_model(freeze_backbone=True), tmp_path / "c")
    few = pairs.select(range(2))
    held = [cache.images(few, View("crop", 1, 0))]
    assert held[0] is not None
    held[0][np.arange(2)]
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    for index in range(1, 20):
        held.append(cache.images(few, View("crop", 1, index)))
        assert held[-1] is not None
        held[-1][np.arange(2)]
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208
    assert len(list((tmp_path / "c").iterdir())) == 2
