"""Data and models that several tests share; made once, without a download."""

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cliptune.data.sample_data import create_sample_dataset
from cliptune.language.catalogue import Language, language_of
from cliptune.model.architectures import ARCHITECTURES
from tests.helpers.models import TRAINED_VIT
from tests.helpers.runs import small_runs
from tests.helpers.texts import english


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long form of tests take its time."""
    if os.environ.get("CLIP_TOOLKIT_LONG_TESTS"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session", autouse=True)
def _all_that_is_printed_can_be_said() -> Iterator[None]:
    """Whatever a stage prints in a test is looked up in Chinese as well: none of it may be left in English."""
    say_lines = Language.say_lines

    def also_in_chinese(self: Language, text: str) -> str:
        left = english(say_lines(language_of("zh"), text)) if self.name == "en" else []
        assert left == [], f"no file of cliptune/language/zh has {left}, which a stage has printed"
        return say_lines(self, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Language, "say_lines", also_in_chinese)
        yield


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    create_sample_dataset(folder, 60)
    return folder


@pytest.fixture(scope="session")
def trained_dir(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole run of two epochs of the small model, with figures and a report."""
    from train import main  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("run")
    flags = ["--data_dir", str(sample_dir), "--model_name", TRAINED_VIT.name, "--num_epochs", "2", "--batch_size", "18"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, TRAINED_VIT.name, TRAINED_VIT)
        assert main([*flags, "--learning_rate", "1e-3", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def documented_dir(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of one epoch of the model that the documentation's examples name, without figures."""
    from train import main  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("documented")
    flags = ["--data_dir", str(sample_dir), "--model_name", "ViT-Ti/32", "--num_epochs", "1", "--batch_size", "18"]
    with small_runs():
        assert main([*flags, "--learning_rate", "1e-3", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("CLIP_TOOLKIT_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CLIP_TOOLKIT_TEST_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute as the processes that a test starts do: sums of two threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """Let `train.main` know the small model."""
    with small_runs() as patch:
        yield patch


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask servers of this machine directly, whatever proxy its other connections need."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    urllib.request.install_opener(None)  # the next one reads the environment again
