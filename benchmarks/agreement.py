"""Whether a step on a device, in a precision, compiled, in micro-batches gives the features and gradients it must.

python benchmarks/agreement.py --device cuda

A gradient is compared as a whole: the norm of the difference over the norm. Weights are random and stirred, so that no
bias is zero and no branch ends in nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_data import drawn_captions
from benchmarks.rows import FAILED, SKIPPED, Row, tell
from benchmarks.train_step import make_trainer
from clip_model import CLIPModel, MultimodalTrainer
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.lora import add_lora
from cliptune.model.towers import CLASS_ARGUMENTS
from cliptune.preprocess.tokens import tokenize
from cliptune.preprocess.transforms import normalize
from cliptune.runtime.device import autocast, exact_products, resolve_device, resolve_precision
from cliptune.runtime.openai_clip import import_clip
from cliptune.training.loss import ContrastiveLoss

FEATURES = 2e-6
"""Largest difference of a number of a unit-norm feature in float32; 2e-7 was measured for a ViT-B/32 on an H100."""
EXACT = 1e-4
"""Of a gradient without TF32: other orders of the same sums, through all layers and back."""
AGAINST_CPU = {"fp32": 2e-2, "bf16": 0.1, "fp16": 2e-2}
"""Of a step's gradient to the CPU's in float32. A factor has 10 bits in TF32 and fp16, and 7 in bf16."""
AGAINST_ITSELF = {"fp32": 2e-2, "bf16": 0.06, "fp16": 2e-2}
"""Of a step's gradient to the same in other pieces, or by other kernels: the rounding of both, and no more.

On an H100 8e-4 (TF32) and 2.5e-3 (bf16) were measured of a ViT-B/32 that is not stirred. Stirred, a CPU's bf16 gives
0.02 of a ViT and 0.04 of a ResNet, as much as it is from float32. A pair that is lost or counted twice is 0.1 and more.
"""

SIZE = 16
MICRO = 5
Gradient = dict[str, Tensor]


def main(argv: list[str] | None = None) -> int:
    """Compare, and tell a row for each comparison; returns the exit code."""
    options = parse(argv)
    device = resolve_device(options.device)
    names = options.models.split(",")
    if "plain" in options.checks:
        for name in names:
            compare(make_model(name), device, options)
        compare_lora(make_model(names[0]), device, options.lower)
        compare_padded(make_model(names[0]), device, options.lower)
    if "compiled" in options.checks:
        # shallow ones: a compiler takes a minute for a large model, and a layer is a layer
        for name, precisions in zip(("ViT-Ti/32", *names[1:]), (options.precisions, "bf16"), strict=False):
            compare_compiled(make_model(make_shallow(name)), device, precisions.split(","))
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precisions", default="fp32,bf16,fp16")
    parser.add_argument("--checks", nargs="*", choices=["plain", "compiled"], default=["plain", "compiled"])
    parser.add_argument("--models", default="ViT-B/32,RN50")
    parser.add_argument(
        "--quick", action="store_true", help="a small ViT alone, bf16 (fp32 on the CPU), nothing compiled"
    )
    parser.set_defaults(lower="bf16")
    options = parser.parse_args(argv)
    if options.quick:
        # a CPU without bf16 takes minutes for what it does in a second in fp32
        options.lower = "fp32" if options.device == "cpu" else "bf16"
        options.models, options.precisions, options.checks = "ViT-Ti/32", options.lower, ["plain"]
    return options


def make_shallow(name: str) -> str:
    """Make an architecture of two layers a tower, or a block of each of a ResNet's stages, known by its name."""
    shape = ARCHITECTURES[name]
    shallow = replace(
        shape, name=f"{name}, shallow", vision_layers=2 if shape.is_vit else (1, 1, 1, 1), transformer_layers=2
    )
    ARCHITECTURES[shallow.name] = shallow
    return shallow.name


def make_model(name: str) -> CLIPModel:
    """Make a model whose every parameter has a part in its features."""
    torch.manual_seed(0)
    model = CLIPModel(name, pretrained="none")
    model.holds_batchnorm = True  # statistics of a batch are not those of its micro-batches
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def make_batch(model: CLIPModel, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Make images of noise, uint8 `[B, 3, R, R]`, tokens of captions `[B, L]` and ids."""
    generator = torch.Generator().manual_seed(1)
    shape = (size, 3, model.image_resolution, model.image_resolution)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return images, tokenize(drawn_captions(size))[0], torch.arange(size)


def compare(model: CLIPModel, device: torch.device, options: Namespace) -> None:
    """Compare the device with the CPU, and a step with itself in other pieces, in every precision."""
    name, batch = model.architecture.name, make_batch(model)
    with exact_products():
        features, gradient = plain_gradient(model, batch)
        found, exact = plain_gradient(copied(model, device), batch)
        check(f"{name}: features, fp32, against the CPU", largest(found, features), FEATURES)
        check(f"{name}: gradient, fp32 without TF32, against the CPU", distance(exact, gradient), EXACT)
    for precision in options.precisions.split(","):
        if precision == "fp16" and device.type != "cuda":
            tell(Row(f"{name}: fp16", state=SKIPPED, note="needs CUDA"))
            continue
        whole = step_gradient(model, batch, device, precision)
        check(
            f"{name}: a step's gradient, {precision}, against the CPU",
            distance(whole, gradient),
            AGAINST_CPU[precision],
        )
        parts = step_gradient(model, batch, device, precision, micro_batch_size=MICRO)
        bound = AGAINST_ITSELF[precision]
        check(f"{name}: micro-batches of {MICRO} against {SIZE} pairs, {precision}", distance(parts, whole), bound)
        again = step_gradient(model, batch, device, precision, gradient_checkpointing=True)
        check(f"{name}: with gradient checkpointing, {precision}", distance(again, whole), EXACT)
        if model.architecture.is_vit:
            again = step_gradient(model, batch, device, precision)
            check(f"{name}: the same step twice, {precision}", distance(again, whole), 0.0)


def compare_lora(model: CLIPModel, device: torch.device, precision: str) -> None:
    """Compare the gradient of LoRA's adapters in a precision with the CPU's in float32."""
    add_lora(model, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):  # it begins as zero, and lora_A then has no gradient
                parameter.normal_(std=0.02)
    batch = make_batch(model)
    with exact_products():
        _, gradient = plain_gradient(model, batch)
    found = step_gradient(model, batch, device, precision)
    check(f"LoRA: a step's gradient, {precision}, against the CPU", distance(found, gradient), AGAINST_CPU[precision])
    parts = step_gradient(model, batch, device, precision, micro_batch_size=MICRO)
    bound = AGAINST_ITSELF[precision]
    check(f"LoRA: micro-batches of {MICRO} against {SIZE} pairs, {precision}", distance(parts, found), bound)


def compare_padded(model: CLIPModel, device: torch.device, lower: str) -> None:
    """Compare texts up to their ends with OpenAI's own forward over all positions, in fp32 and a lower precision."""
    _, tokens, _ = make_batch(model, 64)
    model = copied(model, device)
    plain = openai_model(model)
    tokens = tokens.to(device)
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(len(tokens), model.architecture.embed_dim, generator=generator).to(device)
    bounds = {"fp32": (2e-5, EXACT), "bf16": (2e-2, 2 * AGAINST_ITSELF["bf16"])}
    for precision in dict.fromkeys(("fp32", lower)):
        bound, gradient_bound = bounds[precision]
        outputs, gradients = [], []
        for encoder in (model.backbone, plain):
            encoder.zero_grad()
            with exact_products(), autocast(device, resolve_precision(precision, device)):
                output = encoder.encode_text(tokens).float()
                (output * target).sum().backward()
            outputs.append(F.normalize(output.detach(), dim=-1))
            gradients.append(gradients_of(encoder.named_parameters()))
        check(f"texts up to their ends against 77 positions, {precision}: features", largest(*outputs), bound)
        apart = distance(gradients[0], {name: gradients[1][name] for name in gradients[0]})
        check(f"texts up to their ends against 77 positions, {precision}: gradient", apart, gradient_bound)


def compare_compiled(model: CLIPModel, device: torch.device, precisions: Iterable[str]) -> None:
    """Compare a compiled step with an eager one."""
    batch, name = make_batch(model), model.architecture.name
    for precision in precisions:
        if precision == "fp16" and device.type != "cuda":
            continue
        eager = step_gradient(model, batch, device, precision, compile=False)
        trainer = step_trainer(model, batch, device, precision, compile=True)
        compiled = finite_gradient(trainer, batch)
        if not trainer.model.is_compiled:  # two that are eager agree
            tell(Row(f"{name}: compiled, {precision}", state=FAILED, note="it was not, as the log says"))
            continue
        check(f"{name}: compiled against eager, {precision}", distance(compiled, eager), AGAINST_ITSELF[precision])


def copied(model: CLIPModel, device: torch.device) -> CLIPModel:
    """Return a copy of a model on a device."""
    return copy.deepcopy(model).to(device)


def plain_gradient(model: CLIPModel, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Gradient]:
    """Return features `[2 B, D]` and gradients of the loss by plain autograd in float32, on the CPU."""
    model.zero_grad()
    images, tokens, ids = (each.to(model.device) for each in batch)
    features = model(normalize(images), tokens)
    ContrastiveLoss()(*features, model.logit_scale, image_ids=ids).backward()
    return torch.cat(features).detach().cpu(), gradients_of(model.named_parameters())


def step_gradient(
    model: CLIPModel, batch: tuple[Tensor, Tensor, Tensor], device: torch.device, precision: str, **training: Any
) -> Gradient:
    """Return the gradients that a step of `train.py` finds, on the CPU and without the scaler's factor."""
    return finite_gradient(step_trainer(model, batch, device, precision, **training), batch)


def step_trainer(
    model: CLIPModel, batch: tuple[Tensor, Tensor, Tensor], device: torch.device, precision: str, **training: Any
) -> MultimodalTrainer:
    """Make what trains a copy of a model on whole batches, not compiled, if nothing else is said."""
    settings = {"batch_size": len(batch[1]), "micro_batch_size": len(batch[1]), "compile": False} | training
    return make_trainer(copy.deepcopy(model), device, precision=precision, **settings)


def finite_gradient(trainer: MultimodalTrainer, batch: tuple[Tensor, Tensor, Tensor]) -> Gradient:
    """Return the gradients that a trainer finds, without the factor of its scaler, which is lowered until it fits."""
    while True:
        trainer.grad_cache.backward(*batch)
        scale, found = trainer.scaler.get_scale(), gradients_of(trainer.model.named_parameters())
        if scale <= 1 or all(value.isfinite().all() for value in found.values()):
            return {name: value / scale for name, value in found.items()}
        trainer.scaler.update(scale / 4)


def gradients_of(parameters: Iterable[tuple[str, Tensor]]) -> Gradient:
    """Return the gradients that there are."""
    # a compiled module's parameters have another name
    named = ((name.replace("_orig_mod.", ""), parameter.grad) for name, parameter in parameters)
    return {name: gradient.detach().clone() for name, gradient in named if gradient is not None}


def openai_model(model: CLIPModel) -> Any:
    """Return OpenAI's own CLIP with a model's weights, on its device."""
    sizes = {key: getattr(model.architecture, key) for key in CLASS_ARGUMENTS}
    plain = import_clip().model.CLIP(**sizes).float().to(model.device)
    missing = plain.load_state_dict(model.backbone.state_dict(), strict=False)
    assert missing.missing_keys == ["logit_scale"] and not missing.unexpected_keys
    return plain


def distance(found: Gradient, expected: Gradient) -> float:
    """Return the norm of the difference over the norm; infinite where a gradient lacks."""
    if found.keys() != expected.keys():
        return float("inf")
    apart = torch.stack([(value - expected[name].to(value.device)).double().norm() for name, value in found.items()])
    whole = torch.stack([value.double().norm() for value in expected.values()])
    return float(apart.norm()) / float(whole.norm())


def largest(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two numbers."""
    return float((found.cpu() - expected.cpu()).abs().max())


def check(name: str, value: float, limit: float) -> None:
    """Tell a difference beside its limit."""
    tell(Row(name, value, must=limit, higher=False, check=True))


if __name__ == "__main__":
    sys.exit(main())
