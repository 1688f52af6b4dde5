"""A file that would run code when it is unpickled: refused at every entrance, and its code does not run."""

import pickle
import shutil
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
