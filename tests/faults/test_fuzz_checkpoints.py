"""Damaged weights files of every form: each is read, or refused by a ValueError that names it; nothing else.

CLIP_TOOLKIT_LONG_TESTS=1 tries 10,000 of each form instead of 200.
"""

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from clip_model import CLIPModel, add_self_test
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_file import FORMAT_VERSION, load_checkpoint, save_checkpoint
from cliptune.model.weights import read_weights
from tests.helpers.models import SMALL_VIT

NUM_EXAMPLES = 10_000 if os.environ.get("CLIP_TOOLKIT_LONG_TESTS") else 200
TINY_VIT = replace(
    SMALL_VIT, name="ViT-Tiny", embed_dim=16, image_resolution=32, vision_width=64, vision_heads=1, vision_layers=1,
    transformer_width=16, transformer_heads=1, transformer_layers=1,
)  # fmt: skip


@cache
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "ViT-Tiny", TINY_VIT)
        model = CLIPModel("ViT-Tiny")
    content = {"model_state_dict": model.state_dict(), "architecture": model.architecture.to_dict()}
    return add_self_test({**content, "epoch": 3, "global_step": 9, "config": {"training": {"precision": "fp32"}}})


@cache
def openai_tensors() -> dict[str, torch.Tensor]:
    tensors = {
        name.removeprefix("backbone."): value.contiguous()
        for name, value in state()["model_state_dict"].items()
        if name.startswith("backbone.") or name == "logit_scale"
    }
    assert len(tensors) > 30
    return tensors


@cache
def checkpoint(folder: Path) -> bytes:
    save_checkpoint(folder / "whole.pth", state())
    return (folder / "whole.pth").read_bytes()


@cache
def legacy_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state()}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def saved(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "state_dict": openai_tensors()}, buffer, **options)
    return buffer.getvalue()


@cache
def archive() -> bytes:
    root = torch.nn.Module()
    for name, value in openai_tensors().items():
        module, (*path, last) = root, name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(root), buffer)
    return buffer.getvalue()


FORMS: dict[str, Callable[[], bytes]] = {
    "torch": cache(saved),
    "legacy": cache(lambda: saved(_use_new_zipfile_serialization=False)),
    "safetensors": cache(lambda: safetensors_bytes(openai_tensors())),
    "archive": archive,
}
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "zero", "double"]), st.sampled_from(["start", "middle", "end"]),
              st.integers(0, 10**9)),
    min_size=1, max_size=3,
)  # fmt: skip


def damage(data: bytes, kinds: list[tuple[str, str, int]]) -> bytes:
    """Cut, flip a bit, zero or double some bytes: anywhere, or near the ends, where formats keep their tables."""
    changed = bytearray(data)
    for kind, where, draw in kinds:
        reach = min(4096, len(changed))
        index = {"start": draw % max(reach, 1), "middle": draw % max(len(changed), 1)}.get(
            where, len(changed) - 1 - draw % max(reach, 1)
        )
        if kind == "cut" or not changed:
            del changed[index:]
        elif kind == "flip":
            changed[index] ^= 1 << draw % 8
        elif kind == "zero":
            changed[index : index + 16] = bytes(len(changed[index : index + 16]))
        else:
            changed[index:index] = changed[index : index + 16]
    return bytes(changed)


def read_or_refused(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what is read, or None if the file is refused by an error that names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read(path)
        except ValueError as error:
            assert path.name in str(error)
            return None


fuzz = settings(
    max_examples=NUM_EXAMPLES, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
@fuzz
@given(kinds=DAMAGE)
def test_a_damaged_checkpoint(
    legacy: bool, kinds: list[tuple[str, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also in PyTorch's older form, which has no CRCs and is refused as a checkpoint of this toolkit."""
    path = tmp_path_factory.getbasetemp() / "x.pth"
    path.write_bytes(damage(legacy_checkpoint() if legacy else checkpoint(path.parent), kinds))
    for read in (CLIPModel.from_checkpoint, read_weights):
        read_or_refused(path, read)
    content = read_or_refused(path, load_checkpoint)
    if content is not None:  # then the damage is harmless
        assert not legacy
        whole = state()["model_state_dict"]
        assert content["model_state_dict"].keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in content["model_state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@fuzz
@given(kinds=DAMAGE)
def test_damaged_weights_of_others(
    form: str, kinds: list[tuple[str, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "x.weights"
    path.write_bytes(damage(FORMS[form](), kinds))
    read_or_refused(path, lambda path: read_weights(path, activation="gelu"))


def test_undamaged_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(checkpoint(tmp_path))
    assert load_checkpoint(tmp_path / "x.pth")["epoch"] == 3
    for form, make in FORMS.items():
        (tmp_path / form).write_bytes(make())
        assert read_weights(tmp_path / form, activation="quick_gelu").tensors.keys() == openai_tensors().keys()
