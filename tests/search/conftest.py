"""The small model that the page is tried with."""

from collections.abc import Iterator

import pytest
import torch

from clip_model import CLIPModel
from cliptune.features.encode import Encoder
from cliptune.model.architectures import ARCHITECTURES
from data_loader import ImageTextDataset
from tests.helpers.models import FP32, SMALL_VIT


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, SMALL_VIT.name, SMALL_VIT)
        torch.manual_seed(0)
        model = CLIPModel(SMALL_VIT.name, freeze_backbone=True).eval()
        yield Encoder(model, ImageTextDataset, precision=FP32, batch_size=4, num_workers=0)
