import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.cost import cost_of
from cliptune.model.towers import CLASS_ARGUMENTS
from cliptune.runtime.openai_clip import import_clip


@pytest.mark.parametrize(
    "name", ["ViT-Ti/32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("RN50", "ViT-L/14"))]
)
def test_parameters_and_operations_are_those_of_openais_model(name: str) -> None:
    architecture = ARCHITECTURES[name]
    side, length = architecture.image_resolution, architecture.context_length
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = import_clip().model.CLIP(**{key: getattr(architecture, key) for key in CLASS_ARGUMENTS})
        model.encode_image(torch.zeros(1, 3, side, side))
        model.encode_text(torch.zeros(1, length, dtype=torch.long))
    found = cost_of(architecture, text_tokens=length)
    assert found.num_parameters == pytest.approx(sum(each.numel() for each in model.parameters()), rel=0.01)
    assert found.pair_flops == pytest.approx(counter.get_total_flops(), rel=0.01)
