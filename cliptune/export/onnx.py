"""An export as ONNX, for programs without PyTorch: towers as graphs, with tokenizer, preprocessing and a runner."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliptune.export.transformers import write_processor, write_tokenizer
from cliptune.model.architectures import Architecture
from cliptune.preprocess.transforms import normalize
from cliptune.runtime.files import write_json
from cliptune.runtime.messages import count

GRAPHS = {"two": ("image", "text"), "one": ("model",)}
"""Files of the graphs, without their suffix."""
OPSET = 18
MAX_FILE_BYTES = 1_900_000_000
"""Of weights in a graph's own file, whose format ends at 2 GB; more lie in a file beside it, `.onnx.data`."""
FEW_IMAGES = 50
"""Of validation, below which one that is found or not is more than 2 points of a recall."""
RUNNER = Path(__file__).with_name("clip_onnx.py")
"""Loads the graphs with Pillow, numpy, tokenizers and onnxruntime alone; it travels with them."""


def write(model: Any, folder: Path, *, files: str = "two") -> None:
    """Write the graphs of a `CLIPModel` in evaluation mode, each with a free batch size, and what goes before them.

    Args:
        model: on the CPU; its projection layers may be there or not.
        folder: of the export.
        files: `two`, an image and a text graph; `one`, both towers in one graph.
    """
    shape = model.architecture
    pixels = torch.zeros(2, 3, shape.image_resolution, shape.image_resolution)
    tokens = torch.zeros(2, shape.context_length, dtype=torch.int64)
    inputs = {"pixel_values": pixels, "input_ids": tokens}
    towers = {"pixel_values": "image_features", "input_ids": "text_features"}
    for name in GRAPHS[files]:
        taken = {"image": ["pixel_values"], "text": ["input_ids"]}.get(name, list(inputs))
        given = [towers[key] for key in taken]
        _write_graph(_Towers(model, given), [inputs[key] for key in taken], folder / f"{name}.onnx", taken, given)
    _write_what_goes_before(shape, folder, scale=model.logit_scale.exp().item())


def quantize(folder: Path, *, files: str = "two") -> None:
    """Write graphs beside those of an export whose matrix products are of 8-bit integers, `..._int8.onnx`.

    Weights are rounded once, each layer's inputs when it runs (onnxruntime's dynamic quantisation). Convolutions stay
    as they are: of a ViT they are one layer, and onnxruntime has no such kernel for all processors.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  (an extra)

    for name in GRAPHS[files]:
        with _quiet():  # it advises everyone to preprocess
            quantize_dynamic(
                folder / f"{name}.onnx", folder / f"{name}_int8.onnx", per_channel=True,
                weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
                use_external_data_format=(folder / f"{name}.onnx.data").exists(),
            )  # fmt: skip


def cost_of_rounding(exact: float, rounded: float, *, num_images: int) -> list[str]:
    """Say what quantised graphs cost, RSum on validation images, and if these are too few to go by."""
    notes = [
        f"Quantised graphs (`*_int8.onnx`): RSum {rounded:.1f} instead of {exact:.1f} ({rounded - exact:+.1f}) on "
        f"{count(num_images, 'validation image')}."
    ]
    if num_images < FEW_IMAGES:
        notes.append(
            f"Quantised graphs: fewer than {FEW_IMAGES} images tell little of what they cost: compare them with the "
            "others on images of your own (`CLIP(folder, int8=True)`)."
        )
    return notes


class QuantizedModel:
    """The towers of quantised graphs in the place of a `CLIPModel`, for an encoder.

    Args:
        model: whose graphs they are.
        folder: of the export.
    """

    training = False
    frozen_towers: tuple[str, ...] = ()

    def __init__(self, model: Any, folder: Path) -> None:
        import onnxruntime  # noqa: PLC0415  (an extra)

        paths = sorted(folder.glob("*_int8.onnx"))
        self._sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths]
        self.architecture: Architecture = model.architecture
        self.logit_scale: Tensor = model.logit_scale
        self.logit_bias: Tensor | None = model.logit_bias
        self.image_resolution: int = model.image_resolution
        self.projection_dim: int = model.projection_dim
        self.device = torch.device("cpu")

    def encode_image(self, images: Tensor) -> Tensor:
        """Pixels `[B, 3, R, R]`, uint8 or normalised, to unit-norm `[B, D]`."""
        return self._run("image_features", normalize(images, self.architecture.mean, self.architecture.std))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, L]` to unit-norm `[B, D]`."""
        return self._run("text_features", tokens)

    run_image_tower = encode_image
    run_text_tower = encode_text

    def project_image(self, features: Tensor) -> Tensor:
        """Return them: a graph gives features."""
        return features

    project_text = project_image

    def tower_state(self, tower: str) -> dict[str, Tensor]:
        """Return no weights: nothing of it is cached."""
        return {}

    def eval(self) -> None:
        """Do nothing: it is no other in training."""

    def train(self, mode: bool) -> None:
        """Do nothing."""

    def _run(self, output: str, inputs: Tensor) -> Tensor:
        shape = self.architecture
        given = {"pixel_values" if output == "image_features" else "input_ids": inputs.numpy()}
        session = next(each for each in self._sessions if output in {one.name for one in each.get_outputs()})
        for one in session.get_inputs():  # a graph of both towers wants one of the other kind
            if one.name == "pixel_values":
                given.setdefault(one.name, torch.zeros(1, 3, *[shape.image_resolution] * 2).numpy())
            else:
                given.setdefault(one.name, torch.zeros(1, shape.context_length, dtype=torch.int64).numpy())
        return torch.from_numpy(session.run([output], given)[0])


class _Towers(nn.Module):
    """One tower, or both, from what goes in to unit-norm features."""

    def __init__(self, model: Any, outputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        runs = {
            "image_features": lambda pixels: model.project_image(model.run_image_tower(pixels)),
            "text_features": lambda tokens: model.project_text(model.run_text_tower(tokens)),
        }
        return tuple(runs[name](values) for name, values in zip(self.outputs, inputs, strict=True))


def _write_graph(towers: nn.Module, example: list[Tensor], path: Path, inputs: list[str], outputs: list[str]) -> None:
    # each input has a batch size of its own, also in a graph of both towers
    is_large = sum(parameter.nbytes for parameter in towers.parameters()) > MAX_FILE_BYTES
    sizes = tuple({0: torch.export.Dim(f"num_{name}", max=2**20)} for name in inputs)
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            towers.eval(), tuple(example), path, input_names=inputs, output_names=outputs, dynamo=True,
            dynamic_shapes=(sizes,), opset_version=OPSET, external_data=is_large, verbose=False,
        )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave away what libraries say of graphs on the way."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_what_goes_before(shape: Architecture, folder: Path, *, scale: float) -> None:
    """Write the tokenizer as one file, the preprocessing, the scale of the logits, and a program that takes them."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (an extra)

    write_processor(shape, folder)
    write_tokenizer(shape, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    tokenizer.enable_truncation(shape.context_length)
    tokenizer.enable_padding(length=shape.context_length, pad_id=0, pad_token="!")
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    write_json(folder / "logits.json", {"scale": scale})
    shutil.copy(RUNNER, folder / RUNNER.name)
