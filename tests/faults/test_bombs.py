"""A file that would run code when it is unpickled, or fill the memory: refused at every entrance, before it does."""

import io
import os
import pickle
import shutil
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import evaluation
from clip_model import CLIPModel
from cliptune.cli import load_config
from cliptune.data.row_store import ImageCache, RowStore, as_keys, digest
from cliptune.model.checkpoint_file import load_checkpoint, load_tensors
from cliptune.model.weights import read_weights
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.openai_clip import import_clip
from train import main

MARK = "bomb-went-off"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(MARK),)


class LateBomb(dict[str, Any]):
    """Unpickles as a dictionary whose items are fine; the code is in the state that is set at the end."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('pathlib').Path({MARK!r}).touch()",)


@pytest.fixture(autouse=True)
def nothing_goes_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(MARK).exists()


def test_the_bomb_is_one() -> None:
    for bomb in (Bomb(), LateBomb()):
        pickle.loads(pickle.dumps(bomb))
        Path(MARK).unlink()


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model_state_dict": Bomb(), "architecture": {}}))


def torch_file(path: Path) -> None:
    torch.save({"model_state_dict": {"x": Bomb()}, "architecture": {}, "format_version": 2}, path)


def legacy_torch_file(path: Path) -> None:
    torch.save({"state_dict": LateBomb()}, path, _use_new_zipfile_serialization=False)


def torchscript_archive(path: Path) -> None:
    """An archive as `torch.jit.save` writes it, with a bomb where its tensors are described."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("archive/code/__torch__.py", f"open({MARK!r}, 'w')")


def torchscript_constants(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(Bomb()))
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def working_torchscript(path: Path) -> None:
    """A real archive whose program would run when it is loaded as one: only its tensors are wanted, and it has none."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


FORMS = [plain_pickle, torch_file, legacy_torch_file, torchscript_archive, torchscript_constants, working_torchscript]
REFUSED = "bomb"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("make", FORMS)
def test_every_function_that_reads_a_file_refuses_it(make: Callable[[Path], None], ending: str) -> None:
    path = Path(REFUSED + ending)
    make(path)
    for read in (load_checkpoint, CLIPModel.from_checkpoint, read_weights):
        with pytest.raises(ValueError, match=REFUSED):
            read(path)
    if make not in (working_torchscript, torchscript_constants):
        with pytest.raises(ValueError, match=REFUSED):
            load_tensors(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", FORMS)
def test_every_stage_refuses_it_in_one_line(
    make: Callable[[Path], None], sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path("bomb.pth"))
    data = ["--data_dir", str(sample_dir), "--model_name", "ViT-Ti/32"]
    for run in (
        lambda: main([*data, "--pretrained", "bomb.pth"]),
        lambda: main([*data, "--resume", "bomb.pth"]),
        lambda: evaluation.main(["--checkpoint", "bomb.pth", "--data_dir", str(sample_dir)]),
    ):
        assert run() == 2
        error = capsys.readouterr().err
        assert "bomb.pth" in error
        assert len(error.splitlines()) == 1
    Path("model-checkpoint").mkdir()
    shutil.copy("bomb.pth", "model-checkpoint/last_model.pth")
    assert main([*data, "--resume"]) == 2
    assert "last_model.pth" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "model.safetensors"])
def test_a_hub_folder_with_a_bomb(name: str, sample_dir: Path) -> None:
    folder = Path("bomb-folder")
    folder.mkdir()
    torch_file(folder / name)
    with pytest.raises(ValueError, match=name):
        CLIPModel(pretrained=folder)
    assert main(["--data_dir", str(sample_dir), "--pretrained", str(folder)]) == 2


def test_safetensors_that_carry_a_bomb_are_tensors() -> None:
    save_file({"x": torch.frombuffer(bytearray(pickle.dumps(Bomb())), dtype=torch.uint8)}, "bomb.safetensors")
    with pytest.raises(ValueError, match="not the weights of a CLIP"):
        read_weights(Path("bomb.safetensors"), activation="gelu")


def test_cached_rows_are_numbers_whatever_is_in_their_files() -> None:
    bomb = pickle.dumps([Bomb()] * 9)
    Path("cached").mkdir()
    np.save(Path("cached/a.npy"), np.array([Bomb()], dtype=object), allow_pickle=True)
    for content in (bomb * 20, Path("cached/a.npy").read_bytes()):
        for ending in (".rows", ".keys"):
            Path(f"cached/a{ending}").write_bytes(content)
        store, keys = RowStore(Path("cached/a"), 16), as_keys(digest(index) for index in range(10))
        rows = store.announce(keys, what="row", way_out="")
        assert rows.min() > 0
        assert not store.holds(rows, keys).any()
        assert not store.read(rows, keys)[1].any()


def test_cached_images_are_decoded_again_whatever_is_in_their_files(sample_dir: Path) -> None:
    path, transform = str(sample_dir / "images" / "scene_00000.png"), clip_transform(32)
    expected, _ = ImageCache(Path("cached"), [path], transform).load(path)
    for file in Path("cached").iterdir():
        file.write_bytes((pickle.dumps(Bomb()) * 200)[: file.stat().st_size] if file.suffix == ".rows" else b"")
    for content in (b"", pickle.dumps(Bomb()) * 9):
        for file in Path("cached").glob("*.keys"):
            file.write_bytes(content)
        pixels, _ = ImageCache(Path("cached"), [path], transform).load(path)
        assert np.array_equal(pixels, expected)


def test_settings_are_json_and_nothing_else() -> None:
    Path("config.json").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_config([], description="")
    assert main([]) == 2


def deflated(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(10**7)}, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))


def deflated_description(path: Path) -> None:
    """A TorchScript archive of 20 kB with 20 MB of empty lists in it, which Python makes 1 GB of."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", b"\x80\x02(" + b"]" * 20_000_000 + b"l.")


def long_description(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", b"\x80\x02(" + b"]" * 20_000_000 + b"l.")


def large_memo(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", b"\x80\x02]r" + struct.pack("<I", 50_000_000) + b".")


def overlapping_parts(path: Path) -> None:
    """An archive whose directory names the same part a thousand times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data/0", bytes(100_000))
        entry = archive.infolist()[0]
        for number in range(1, 1000):
            again = zipfile.ZipInfo(f"archive/data/{number}")
            again.file_size = again.compress_size = entry.file_size
            again.CRC, again.header_offset = entry.CRC, entry.header_offset
            archive.filelist.append(again)
    path.write_bytes(buffer.getvalue())


def stride_0(path: Path) -> None:
    torch.save({"x": torch.zeros(1, dtype=torch.half).expand(3 * 10**9)}, path)


def legacy_stride_0(path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(3 * 10**9)}, path, _use_new_zipfile_serialization=False)


def larger_than_stored(path: Path) -> None:
    """PyTorch enlarges a storage for a tensor that claims more."""
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):
                data = with_another_size(data)
            changed.writestr(name, data)


def legacy_larger_than_stored(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(with_another_size(buffer.getvalue()))


def with_another_size(data: bytes) -> bytes:
    """Let a pickled tensor of 4 numbers claim 100 million."""
    shape = b"K\x04\x85"
    assert shape in data
    return data.replace(shape, b"J" + struct.pack("<i", 10**8) + b"\x85")


def one_storage_for_many(path: Path) -> None:
    torch.save(dict.fromkeys(map(str, range(5000)), torch.zeros(25_000)), path)


def scripted_storage_for_many(path: Path) -> None:
    module, shared = torch.nn.Module(), torch.zeros(25_000)
    for number in range(500):
        module.register_buffer(f"x{number}", shared)
    torch.jit.save(torch.jit.script(module), path)


def lists_of_the_same_list(path: Path) -> None:
    values: list[Any] = [0]
    for _ in range(60):
        values = [values] * 10
    torch.save({"x": values}, path)


def sparse_tensor(path: Path) -> None:
    torch.save({"x": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**9,))}, path)


def holes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 * 10**9)


def holes_in_safetensors(path: Path) -> None:
    size = 40 * 10**9
    head = b'{"x":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (size // 4, size)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + size)


UNFOLDING = [
    deflated, deflated_description, long_description, large_memo, overlapping_parts, stride_0, legacy_stride_0,
    larger_than_stored, legacy_larger_than_stored, one_storage_for_many, scripted_storage_for_many,
    lists_of_the_same_list, sparse_tensor, holes, holes_in_safetensors,
]  # fmt: skip


@pytest.mark.parametrize("make", UNFOLDING, ids=lambda make: make.__name__)
def test_a_small_file_takes_little_memory(make: Callable[[Path], None], sample_dir: Path, capfd: Any) -> None:
    """By name, at every entrance, and before it is in memory."""
    path = Path("small.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(path)
    tracemalloc.start()
    try:
        for read in (read_weights, load_checkpoint):
            with pytest.raises(ValueError, match=r"small\.pth: (?!not the weights|not a checkpoint)"):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
    flags = ["--data_dir", str(sample_dir), "--activation", "gelu", "--pretrained"]
    Path("folder").mkdir()
    path.rename("folder/pytorch_model.bin")
    assert main([*flags, "folder"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_settings_beside_weights_are_small_files(tmp_path: Path) -> None:
    """Neither 40 GB of holes, nor a pipe that nobody writes to, nor endless nesting."""
    state = import_clip().model.CLIP(64, 64, 1, 64, 32, 77, 49408, 64, 1, 1).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    beside = tmp_path / "open_clip_config.json"
    with beside.open("wb") as file:
        file.truncate(40 * 10**9)
    for make in (lambda: None, lambda: os.mkfifo(beside), lambda: beside.write_bytes(b"[" * 10**6)):
        make()
        with pytest.raises(ValueError, match="does not tell its activation"):
            read_weights(tmp_path)
        beside.unlink()
