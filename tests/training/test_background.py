"""Checkpoints that a thread writes, which are those that are written in place."""

import contextlib
import errno
import os
import random
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from clip_model import MultimodalTrainer, add_self_test, self_tester
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.model.lora import add_lora
from cliptune.training.background import BackgroundThread, HostCopies, no_forks
from cliptune.training.checkpoint import CheckpointWriter, RunFiles
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.optim import build_optimizer
from cliptune.training.saver import Saver
from cliptune.training.state import RunState
from tests.helpers.models import FP32, make_batch, make_model, small_architectures
from tests.helpers.runs import assert_same

__all__ = ["small_architectures"]

State = dict[str, Any]


def state_of(step: int, weights: torch.Tensor, **more: Any) -> State:
    tensors = {"w": weights, **more}
    return {
        "model_state_dict": tensors, "architecture": {}, "self_test": {}, "epoch": step, "global_step": step,
    }  # fmt: skip


class Gate:
    """Completes states in the thread, once it is opened."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.written: list[int] = []

    def __call__(self, _: State) -> Callable[[State], State]:
        return self.complete

    def complete(self, state: State) -> State:
        self.entered.set()
        assert threading.current_thread() is threading.main_thread() or self.opened.wait(30)
        self.written.append(state["global_step"])
        return state


def trainer_of(name: str = "ViT-Mini", *, lora: bool = False, ema: float | None = None) -> MultimodalTrainer:
    model = make_model(name)
    if lora:
        add_lora(model, 2)
    optimizer = build_optimizer(model, learning_rate=1e-2, backbone_lr_scale=1.0, weight_decay=0.1)
    return MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32, ema=ema, seed=3)


def run_of(folder: Path, background: Callable[[State], Any] | None, **options: Any) -> RunFiles:
    """Train for three steps, each of which is saved and at once followed by the next."""
    trainer, files, state = trainer_of(**options), RunFiles(folder), RunState(history=[{"epoch": 0}])
    saver = Saver(
        files, trainer, about={"run_id": "a", "config": {}}, keep=3, complete=add_self_test, background=background
    )
    batch = make_batch(trainer.model, 4)
    with saver.of_run(state):
        saver.save(state, best=True)
        state.begin_epoch(trainer.model.device)
        for step in trainer.steps([batch] * 3):
            state.add(step)
            saver.save(state, best=step.result is not None and step.result.global_step == 2)
    return files


def sizes_of_tensors(path: Path) -> list[int]:
    with zipfile.ZipFile(path) as file:
        return sorted(part.file_size for part in file.infolist() if "/data/" in part.filename)


def tensors_and_metadata(path: Path) -> State:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | {"metadata": file.metadata()}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"lora": True},
        {},
        {"name": "RN-Ti", "ema": 0.9},
    ],
    ids=str,
)
def test_the_files_are_those_that_are_written_in_place(options: State, tmp_path: Path) -> None:
    plain, beside = (run_of(tmp_path / name, how, **options) for name, how in (("a", None), ("b", self_tester)))
    names = [path.name for path in plain.states()]
    assert names == ["last_model.pth", "step_00000002.pth", "step_00000001.pth"]
    assert sorted(path.name for path in beside.last.parent.iterdir()) == sorted(
        path.name for path in plain.last.parent.iterdir()
    )
    for name in [*names, "best_model.pth", "loaded_model.pth"]:
        got, want = (load_checkpoint(files.last.with_name(name)) for files in (beside, plain))
        for content in (got, want):
            content.get("run_state", {}).pop("started_at", None)
        assert_same(got, want, name)
        sizes = [sizes_of_tensors(files.last.with_name(name)) for files in (beside, plain)]
        assert sizes[0] == sizes[1]  # what tensors share, they share in the file
    assert plain.adapter.exists() == ("lora" in options)
    if plain.adapter.exists():
        assert_same(tensors_and_metadata(beside.adapter), tensors_and_metadata(plain.adapter))


def test_a_state_is_as_it_was_when_it_was_saved(tmp_path: Path) -> None:
    gate, weights, files = Gate(), torch.zeros(3), RunFiles(tmp_path)
    writer = CheckpointWriter(files, background=gate)
    writer.save({files.last: state_of(1, weights, same=weights)})
    weights += 1
    assert gate.entered.wait(30)
    assert not files.last.exists()
    gate.opened.set()
    writer.flush()
    assert load_checkpoint(files.last)["model_state_dict"]["w"].tolist() == [0, 0, 0]


def test_what_comes_while_the_thread_works_waits_and_the_newest_is_written(tmp_path: Path) -> None:
    gate, weights, files = Gate(), torch.zeros(3), RunFiles(tmp_path)
    writer = CheckpointWriter(files, background=gate)
    for step in range(1, 6):  # nobody waits for the gate
        best = {files.best: state_of(step, weights)} if step == 3 else {}
        writer.save({files.last: state_of(step, weights), **best})
        weights += 1
    gate.opened.set()
    for _ in range(1000):  # steps
        writer.check()
        if len(gate.written) == 3:
            break
        time.sleep(0.01)
    assert gate.written == [1, 3, 5]  # without a flush
    writer.flush()
    assert load_checkpoint(files.best)["model_state_dict"]["w"].tolist() == [2, 2, 2]
    assert load_checkpoint(files.last)["model_state_dict"]["w"].tolist() == [4, 4, 4]


def test_where_several_states_are_kept_each_is_written(tmp_path: Path) -> None:
    gate, files = Gate(), RunFiles(tmp_path)
    gate.opened.set()
    writer = CheckpointWriter(files, keep=3, background=gate)
    for step in range(1, 6):
        writer.save({files.last: state_of(step, torch.zeros(3))})
    writer.flush()
    assert gate.written == [1, 2, 3, 4, 5]
    assert [load_checkpoint(path)["global_step"] for path in files.states()] == [5, 4, 3]


def test_models_that_are_one_are_one_file(tmp_path: Path) -> None:
    gate, files = Gate(), RunFiles(tmp_path)
    gate.opened.set()
    writer = CheckpointWriter(files, background=gate)
    model = state_of(0, torch.zeros(3))
    writer.save({files.loaded: model, files.last: {**model}, files.best: model})
    writer.flush()
    assert gate.written == [0]  # one self-test for all
    assert files.loaded.stat().st_ino == files.best.stat().st_ino != files.last.stat().st_ino


def test_an_error_of_the_thread_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, files = Gate(), RunFiles(tmp_path)
    gate.opened.set()
    trainer = trainer_of()
    saver = Saver(files, trainer, about={}, background=gate)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object, **__: object) -> None:
        raise full

    state = RunState(history=[{"epoch": 0}])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as raised:
        patch.setattr("cliptune.training.checkpoint.save_checkpoint", fail)
        saver.save(state)
        for _ in range(1000):  # steps
            assert not saver.is_due(1)
            time.sleep(0.01)
    assert raised.value is full
    assert not files.last.exists()
    with saver.of_run(state):  # what is left is tried again when the run ends
        pass
    assert files.last.exists()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"), saver.of_run(state):
        patch.setattr("cliptune.training.checkpoint.save_checkpoint", fail)
        saver.save(state)


def test_where_most_is_fixed_states_wait_for_the_thread_and_nobody_for_them(tmp_path: Path) -> None:
    gate, files, fixed, moving = Gate(), RunFiles(tmp_path), torch.zeros(3), torch.zeros(3)
    now = [0.0]
    writer = CheckpointWriter(files, fixed=["fixed"], background=gate, clock=lambda: now[0])
    for step in (1, 2, 3):  # the first is written; two come while it is
        best = {files.best: state_of(step, moving, fixed=fixed)} if step == 2 else {}
        writer.save({files.last: state_of(step, moving, fixed=fixed), **best})
        moving += 1
    gate.opened.set()
    writer.flush()
    assert gate.written == [1, 2, 3]
    assert load_checkpoint(files.best)["model_state_dict"]["w"].tolist() == [1, 1, 1]
    assert load_checkpoint(files.last)["model_state_dict"]["w"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("why", ["no room", "no pinned memory"])
def test_without_memory_for_a_copy_states_are_written_in_place(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("cliptune.training.background.free_memory", lambda _: 0 if why == "no room" else 2**40)
    monkeypatch.setattr(HostCopies, "take", fail)
    gate, files = Gate(), RunFiles(tmp_path)  # closed: a thread would wait
    writer = CheckpointWriter(files, background=gate)
    for step in (1, 2):
        writer.save({files.last: state_of(step, torch.zeros(3))})
        assert load_checkpoint(files.last)["global_step"] == step
    assert caplog.text.count("checkpoints are written between the steps") == 1


def test_the_self_test_beside_training_leaves_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("RN-Ti")
    content = {"model_state_dict": trainer.model_state(), "architecture": trainer.model.architecture.to_dict()}
    want = add_self_test(content)
    complete = self_tester(content)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a setting of the process")

    for name in (
        "set_float32_matmul_precision", "set_num_threads", "manual_seed", "set_rng_state", "clear_autocast_cache",
        "utils._device.DeviceContext.__enter__",
    ):  # fmt: skip
        monkeypatch.setattr(f"torch.{name}", refuse)
    random_states = random.getstate(), torch.get_rng_state()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    thread = BackgroundThread("test")
    found: list[State] = []
    thread.start(lambda: found.append(complete(content)))
    thread.wait()
    assert random.getstate() == random_states[0]
    assert torch.equal(torch.get_rng_state(), random_states[1])
    assert_same(trainer.model.state_dict(), before)
    assert_same(found[0], want)


@pytest.mark.slow
def test_the_self_test_beside_a_compiler_disturbs_neither() -> None:
    model = make_model("ViT-Mini")
    content = {"model_state_dict": model.state_dict(), "architecture": model.architecture.to_dict()}
    complete, want = self_tester(content), add_self_test(content)["self_test"]
    images, _, _ = make_batch(model, 6)
    thread, ended = BackgroundThread("test"), threading.Event()

    def compute() -> list[State]:
        found = []
        while not ended.is_set():
            found.append(complete(content)["self_test"])
        return found

    found: list[State] = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: model.project_image(model.run_image_tower(x)), backend="aot_eager")
    thread.start(lambda: found.extend(compute()))
    for _ in range(3):
        compiled(images).sum().backward()
    ended.set()
    thread.wait()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # while something compiles, modules take the way of programs that are recorded, which rounds otherwise
    for name in ("image_features", "text_features"):
        assert all(torch.allclose(each[name], want[name], rtol=0, atol=1e-6) for each in found), name


def test_a_process_is_not_forked_in_the_middle_of_a_product() -> None:
    order: list[str] = []
    inside = threading.Event()

    def compute() -> None:
        with no_forks():
            inside.set()
            time.sleep(0.2)
            order.append("computed")

    thread = BackgroundThread("test")
    thread.start(compute)
    assert inside.wait(30)
    if (child := os.fork()) == 0:
        with no_forks():  # the child may compute as well
            os._exit(0)
    order.append("forked")
    assert os.waitpid(child, 0)[1] == 0
    thread.wait()
    assert order == ["computed", "forked"]


def test_the_thread_waits_on_the_gpu_that_is_copied_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with the first GPU, where CUDA would take memory for it."""
    entered: list[Any] = []

    @contextlib.contextmanager
    def device(name: Any) -> Iterator[None]:
        entered.append(name)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    copies = HostCopies()
    copies.wait()  # nothing was copied from a GPU
    assert entered == []
    copies._event = SimpleNamespace(device="cuda:1", synchronize=lambda: entered.append("waited"))  # type: ignore[assignment]
    copies.wait()
    assert entered == ["cuda:1", "waited", "left"]
