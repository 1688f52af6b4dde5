"""What an export is refused for; libraries are stood in for by a small program, so that this is fast."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_model import CLIPModel
from cliptune.export import verify as verifying
from cliptune.export.verify import Differences, verify
from cliptune.model.self_test import compute_self_test
from cliptune.preprocess.transforms import clip_transform, normalize
from tests.helpers.models import make_model, small_architectures

__all__ = ["small_architectures"]

Check = Callable[[str], Differences]

STAND_IN = """
import sys
import numpy as np
from PIL import Image
form, folder, given, taken = sys.argv[1:5]
answers = dict(np.load(folder + "/answers.npz"))
given = np.load(given)
sizes = [given[name].shape for name in given.files if name.startswith("image_")]
assert not [name for name in sys.modules if name.split(".")[0] in {"cliptune", "clip_model", "torch"}]
exec(open(folder + "/change.py").read())
np.savez(taken, **answers)
"""


@pytest.fixture
def model() -> CLIPModel:
    return make_model("ViT-Mini").eval()


@pytest.fixture
def check(model: CLIPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Verify an export whose library gives the right answers but for some code."""
    self_test = compute_self_test(model)
    side = model.image_resolution
    drawn = [pixels.permute(1, 2, 0).numpy() for pixels in self_test["pixels"]]
    drawn += [verifying._draw(size) for size in (*verifying.SIZES, (side + 3, side))]
    pixels = torch.stack([clip_transform(side)(Image.fromarray(image)) for image in drawn])
    with torch.no_grad():
        texts = model.encode_text([*self_test["texts"], *verifying.MORE_TEXTS])
    answers = {
        "preprocessed": normalize(pixels).numpy(),
        "image_features": self_test["image_features"].numpy(),
        "text_features": texts.numpy(),
    }
    np.savez(tmp_path / "answers.npz", **answers)
    (tmp_path / "probe.py").write_text(STAND_IN)
    monkeypatch.setattr(verifying, "PROBE", tmp_path / "probe.py")

    def run(change: str) -> Differences:
        (tmp_path / "change.py").write_text(change)
        return verify("open_clip", tmp_path, model, self_test, tolerance=1e-5)

    return run


def test_the_right_answers_pass(check: Check) -> None:
    found = check("")
    assert max(found.images, found.texts) < 1e-6
    assert (found.pixels < 1e-6, found.is_shifted) == (True, False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("answers['image_features'][1] += 1e-3", "images 8.0e-03, texts"),
        ("answers['text_features'][4] += 1e-3", "texts 8.0e-03, pixels"),
        ("answers['text_features'][0, 0] = np.nan", "texts nan"),
        ("answers['image_features'] = answers['image_features'][:, :5]", "images nan"),
        ("answers['preprocessed'][3] += 0.1", "pixels 7"),
        ("answers['preprocessed'][3, 0, 0, 0] = np.nan", "pixels nan"),
        ("answers['preprocessed'] = answers['preprocessed'][:, :, :-1]", "pixels nan"),
        ("answers['preprocessed'] = answers['preprocessed'][:, ::-1]", "pixels"),
    ],
)
def test_other_answers_are_refused_with_the_numbers(check: Check, change: str, says: str) -> None:
    with pytest.raises(ValueError, match="does not give what the checkpoint gives") as error:
        check(change)
    assert says in str(error.value)
    assert "is removed" in str(error.value)


def test_a_crop_that_rounds_down_is_told_and_not_refused(check: Check) -> None:
    """Of 67 columns the library takes the first 64 from column 1, CLIP from column 2."""
    change = """
image = given[f"image_{len(sizes) - 1}"]
assert image.shape == (64, 67, 3)
mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
answers["preprocessed"][-1] = ((image[:, 1:65] / 255 - mean) / std).transpose(2, 0, 1)
"""
    found = check(change)
    assert found.is_shifted
    assert found.pixels < 1e-5


def test_a_library_that_fails_is_quoted(check: Check) -> None:
    with pytest.raises(ValueError, match="cannot be loaded by its library, and is removed: KeyError: 'weights'"):
        check("raise KeyError('weights')")
