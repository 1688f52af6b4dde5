"""How many pairs fit: the estimate, and a memory that really is full."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from clip_model import CLIPModel, ContrastiveLoss, SigmoidLoss
from cliptune.model.depth import train_last_layers
from cliptune.model.lora import add_lora
from cliptune.preprocess.tokens import tokenize
from cliptune.training.memory import (
    CARD_FRACTION,
    FREE_MEMORY_FRACTION,
    MAX_TRIALS,
    CudaCard,
    Line,
    LiveTensors,
    _try_step,
    equal_part,
    fitting_on_card,
    fitting_size,
    loss_bytes,
    peak_bytes,
)
from cliptune.training.pair_logits import POSITIVES, SLICE_LOGITS
from tests.helpers.launch import ROOT
from tests.helpers.models import FP32, make_model, small_architectures

__all__ = ["small_architectures"]


def test_live_tensors_are_counted_while_they_live() -> None:
    live = LiveTensors()
    with live:
        first = torch.ones(1000)
        view = first.view(10, 100)
        assert live.peak == 4000
        for _ in range(5):
            first = first + 1  # the next is made while the last one lives, and `view` holds the very first
        del view
        second = torch.zeros(500, dtype=torch.float64)
    assert live.peak == 12000
    assert len(second) == 500


def test_as_many_pairs_fit_as_memory_allows() -> None:
    model, device = make_model("ViT-Mini-64"), torch.device("cpu")
    parameters = 3 * sum(parameter.nbytes for parameter in model.parameters())
    pair_bytes = (peak_bytes(model, FP32, 16) - peak_bytes(model, FP32, 8)) / 8

    def fitting(num_pairs: float, most: int = 64) -> int | None:
        free = int((parameters + num_pairs * pair_bytes) / FREE_MEMORY_FRACTION)
        return fitting_size(model, precision=FP32, most=most, device=device, free_bytes=free)

    state = torch.get_rng_state()
    assert fitting(1e6) is None
    assert [fitting(number) for number in (-1e6, 20, 44)] == [1, 16, 32]
    assert fitting(44, most=40) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    deep = CLIPModel("ViT-Ti/32")
    plain = peak_bytes(deep, FP32, 4)
    deep.checkpoint_gradients()
    assert peak_bytes(deep, FP32, 4) < 0.5 * plain


@pytest.mark.slow
def test_what_is_held_below_adapters_and_last_layers_is_counted_as_it_runs() -> None:
    """Adapters stand in every layer, so the backward pass goes through all; above held layers it ends."""
    sizes = []
    for change in (lambda model: None, lambda model: add_lora(model, 2), lambda model: train_last_layers(model, 1)):
        model = CLIPModel("ViT-Ti/32")
        change(model)
        sizes.append((peak_bytes(model, FP32, 8) - peak_bytes(model, FP32, 4)) / 4)
        assert all(parameter.grad is None for parameter in model.parameters())
    whole, with_lora, last = sizes
    assert 0.5 * whole < with_lora < 1.3 * whole
    assert last < 0.7 * whole


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection goes through all that the other tests hold."""
    monkeypatch.setattr("gc.collect", lambda: 0)


class KnownCard:
    """A GPU on which n pairs take `fixed` + n * `pair` bytes, and which fails beyond its limit."""

    def __init__(self, *, fixed: float, pair: float, limit: float) -> None:
        self.line, self.limit = Line(fixed, pair), int(limit)
        self.highest, self.sizes = 0, []  # type: tuple[int, list[int]]

    def free(self) -> int:
        return self.limit

    def reset_peak(self) -> None:
        self.highest = 0

    def peak(self) -> int:
        return self.highest

    def taken(self, num_pairs: int) -> int:
        return int(self.line.fixed + num_pairs * self.line.pair)

    def try_step(self, num_pairs: int) -> None:
        self.sizes.append(num_pairs)
        self.highest = min(self.taken(num_pairs), self.limit)
        if self.taken(num_pairs) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    def fitting(self, most: int, *, held: float = 0.0, off: float = 1.0, fixed_off: float = 1.0) -> int | None:
        estimate = Line(fixed_off * self.line.fixed, off * self.line.pair)
        return fitting_on_card(self, self.try_step, line=estimate, held_bytes=int(held), most=most)


@pytest.mark.parametrize("fixed", [0.0, 0.01, 0.2])  # of the card
@pytest.mark.parametrize("num_fitting", [40, 1000])
def test_a_trial_step_fills_the_card_whatever_was_estimated(fixed: float, num_fitting: int) -> None:
    limit = 80e9
    for off, fixed_off in itertools.product([0.2, 0.7, 1.0, 1.5, 5.0], [0.0, 1.0, 3.0]):  # estimate over truth
        card = KnownCard(fixed=fixed * limit, pair=(1 - fixed) * limit / num_fitting, limit=limit)
        held = 0.05 * limit
        size = card.fitting(32768, held=held, off=off, fixed_off=fixed_off)
        assert size in card.sizes  # what is chosen was tried
        assert size % 8 == 0
        assert 0.7 * limit <= card.taken(size) + held <= CARD_FRACTION * limit
        assert len(card.sizes) <= MAX_TRIALS


def test_a_batch_that_fits_is_tried_and_left_whole() -> None:
    card = KnownCard(fixed=1e9, pair=1e6, limit=80e9)
    assert card.fitting(512) is None
    assert card.sizes == [512]
    assert card.fitting(512, off=1000) is None  # an estimate that is far too high


@pytest.mark.parametrize("pair", [70e9, 79e9, 200e9])
def test_on_a_card_that_is_too_small_a_micro_batch_is_one_pair(pair: float) -> None:
    card = KnownCard(fixed=1e9, pair=pair, limit=80e9)
    assert card.fitting(512, off=1e-3) == 1
    assert len(card.sizes) <= MAX_TRIALS


@pytest.mark.parametrize(
    ("most", "fitting", "size"), [(512, 300, 256), (512, 512, 512), (500, 499, 256), (1000, 260, 256), (1000, 249, 200),
                                  (30, 7, 7), (30, 0, 1), (12, 10, 8)],
)  # fmt: skip
def test_a_batch_is_divided_into_the_least_number_of_equal_parts(most: int, fitting: int, size: int) -> None:
    assert equal_part(most, fitting) == size


def test_the_rank_with_the_least_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptune.training.memory.all_min", lambda values: values.clamp(max=100))
    assert KnownCard(fixed=0, pair=1e8, limit=80e9).fitting(1024) == equal_part(1024, 100)
    assert KnownCard(fixed=0, pair=1e6, limit=80e9).fitting(1024) == equal_part(1024, 100)


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_a_trial_leaves_nothing_behind(name: str) -> None:
    model = make_model(name, holds_batchnorm=False, dropout=True)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    seen: list[bool] = []
    hook = model.logit_scale.register_hook(lambda gradient: seen.append(True))
    first = next(model.backbone.parameters())
    first.register_hook(lambda gradient: seen.append(bool(gradient.abs().sum() > 0)))
    _try_step(model, FP32, 3)
    hook.remove()
    assert seen == [True]  # it went back to the first layer
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trial_has_the_texts_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("ViT-Mini")
    seen: list[torch.Tensor] = []
    encode_text = model.run_text_tower

    def run(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return encode_text(tokens)

    monkeypatch.setattr(model, "run_text_tower", run)
    texts = tokenize(["a long caption of a red dog", "a cat", "two"])[0]
    _try_step(model, FP32, 5, texts)
    _try_step(model, FP32, 2)
    assert torch.equal(seen[0], texts[[0, 1, 2, 0, 1]])
    assert (seen[1] != 0).all()


def test_on_a_gpu_the_size_is_found_by_trial(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The CPU stands in for the device, and a card of a known size for its memory."""
    model = make_model("ViT-Mini")
    card = KnownCard(fixed=0, pair=1e6, limit=100e6)
    monkeypatch.setattr("cliptune.training.memory.CudaCard", lambda device: card)
    tried: list[torch.Tensor | None] = []

    def try_step(_: object, precision: object, size: int, texts: torch.Tensor | None) -> None:
        tried.append(texts)
        card.try_step(size)

    monkeypatch.setattr("cliptune.training.memory._try_step", try_step)
    monkeypatch.setattr("cliptune.training.memory.peak_bytes", lambda model, precision, num_pairs: 1000 * num_pairs)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    caplog.set_level("INFO")
    # as where two data sets were joined: the first one's are short
    texts = torch.ones(400, 77, dtype=torch.int64).tril(3)
    texts[200:, :20] = 1
    texts[399, :30] = 1
    size = fitting_size(model, precision=FP32, most=512, device=torch.device("cuda"), texts=lambda: texts)
    given = tried[0]
    assert given is not None and all(each is given for each in tried)
    lengths = (given != 0).sum(1).float()
    assert lengths.sort().values.tolist() == (texts != 0).sum(1).float().sort().values.tolist()
    assert lengths[0] == lengths.max()
    assert lengths[:64].mean() == pytest.approx(lengths.mean().item(), rel=0.2)
    moments_and_loss = 2 * sum(parameter.nbytes for parameter in model.parameters()) + 16 * 512 * 512
    assert size == equal_part(512, int(90 - moments_and_loss / 1e6))
    assert f"micro-batches of {size} of 512 pairs" in caplog.text


def test_a_card_counts_what_its_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"memory_allocated": 300, "max_memory_reserved": 300}
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: held["memory_allocated"])
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda device: held["max_memory_reserved"])
    calls: list[str] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: calls.append("reset"))
    card = CudaCard(torch.device("cuda"))
    card.reset_peak()
    held.update(memory_allocated=400, max_memory_reserved=1100)
    assert card.peak() == 800
    assert calls == ["emptied", "reset"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the address space")
def test_memory_that_really_is_full_is_recognised() -> None:
    code = """
import resource, torch
from cliptune.runtime.device import is_out_of_memory
resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2**33, -1))
try:
    torch.ones(2**40)
except Exception as error:
    assert is_out_of_memory(error), error
else:
    raise SystemExit("it fits")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slice_logits", [2**16, 2**20])
def test_the_loss_takes_what_is_planned_for_it(slice_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is allocated counts, also within PyTorch's operations, which `LiveTensors` does not see."""
    monkeypatch.setitem(SLICE_LOGITS, "cpu", slice_logits)
    num_pairs = 1024
    planned = loss_bytes(num_pairs, num_pairs, torch.device("cpu"))
    taken = []
    for kind, positives in itertools.product((ContrastiveLoss, SigmoidLoss), POSITIVES):
        features = torch.eye(2).repeat(num_pairs // 2, 1).requires_grad_()
        ids = {"image_ids": torch.arange(num_pairs) // 2, "caption_ids": torch.arange(num_pairs) // 3}
        loss = kind(positives=positives)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            loss(features, features, **ids).backward()
        assert profiled.profiler is not None
        events = profiled.profiler.kineto_results.events()  # in the order of their time
        taken.append(max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")))
    of_vectors = 40 * 4 * num_pairs  # features, sums and ids
    assert 0.75 * planned < max(taken) <= planned + of_vectors
