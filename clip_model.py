"""CLIP with projection layers on both towers, the contrastive loss, and the trainer.

model = CLIPModel.from_checkpoint("model-checkpoint/best_model.pth")
cosines = model.encode_image(["cat.jpg"]) @ model.encode_text(["a cat", "a dog"]).T
model.classify("cat.jpg", ["cat", "dog"])
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliptune.model.architectures import ARCHITECTURES, DEFAULT_MODEL_NAME, known_architecture
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.model.inputs import AT_ONCE, ImageInput, TextInput, image_batches, to_tokens
from cliptune.model.lora import LoRA, load_adapter
from cliptune.model.positions import resize_weights, resized
from cliptune.model.self_test import check_self_test, compute_self_test, describe_preprocessing
from cliptune.model.state_dicts import extra_state, read_extra_state
from cliptune.model.towers import apply_settings, build_backbone, layers_of, set_compiled, shared_projection
from cliptune.model.weights import Weights, find_weights, own_weights
from cliptune.model.zero_shot import class_probabilities, logits_of
from cliptune.preprocess.tokens import tokenize
from cliptune.preprocess.transforms import clip_transform, normalize
from cliptune.runtime.device import to_device
from cliptune.runtime.messages import count, shown
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.sigmoid_loss import INITIAL_BIAS, SigmoidLoss
from cliptune.training.trainer import MAX_LOGIT_SCALE, MultimodalTrainer

logger = logging.getLogger(__name__)

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # as in section 2.5 of CLIP's paper
TOWERS = ("image", "text")


class CLIPModel(nn.Module):
    """OpenAI's CLIP, float32, with a projection layer on each tower and one learned temperature.

    Args:
        model_name: `RN50`, `RN101`, `ViT-B/32`, `ViT-B/16`, `ViT-L/14`, ..., or the small `ViT-Ti/32`. None: what a
            weights file holds, else `ViT-B/32`.
        projection_dim: size of the shared space. None or the backbone's own size: the layers start as the identity, so
            the features are the backbone's, bit for bit. A smaller size starts from the leading right singular vectors
            of both towers' stacked output projections, a larger one from a rotation into it.
        freeze_backbone: train only the projection layers and the temperature; normalisation statistics are held too.
        pretrained: `auto` (OpenAI's weights where published), `openai`, `none` (random), a file or hub folder, or
            weights already read, which become the model's.
        activation: `quick_gelu`, `gelu` or `gelu_tanh`, for weights files that do not tell.
        freeze_tower: `image` or `text`: hold that tower as `freeze_backbone` holds both.
        context_length: tokens of a text; None: the weights' own. Positions are cut, or interpolated behind the 20th.
        image_resolution: sides of the input in pixels; None: the weights' own. Positions are interpolated.

    Attributes:
        logit_bias: what `SigmoidLoss` adds to all logits, if the weights have it or `learn_bias` has made it; features
            do not depend on it.
        has_new_bias: `learn_bias` has made it, and no batch has told where it should begin.
        frozen_towers: which of `image` and `text` are held. Their outputs can be computed once and given to `forward`.
        lora: how its towers are adapted, see `cliptune.model.lora.add_lora`; None: not at all.
        trained_part: says what of its towers is trained, where that is not all or nothing.

    Raises:
        ValueError: an unknown model name, weights that do not fit, a checkpoint that does not give the features that
            it was saved with, `projection_dim` below 2, or `freeze_tower` beside `freeze_backbone`.
        OSError: weights that cannot be had; says how to get them.
    """

    def __init__(
        self,
        model_name: str | None = None,
        projection_dim: int | None = None,
        freeze_backbone: bool = False,
        pretrained: str | Path | Weights = "auto",
        *,
        activation: str | None = None,
        freeze_tower: str | None = None,
        context_length: int | None = None,
        image_resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.frozen_towers = _frozen_towers(freeze_backbone, freeze_tower)
        self._wants_compiled = False
        self.lora: LoRA | None = None
        self.trained_part = ""
        weights = find_weights(model_name, pretrained, activation=activation)
        # random BatchNorm statistics must be learned, loaded ones are better than those of a small data set
        self.starts_random = weights is None
        self.holds_batchnorm = weights is not None
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.logit_bias: nn.Parameter | None = None
        self.has_new_bias = False
        sizes = {"context_length": context_length, "image_resolution": image_resolution}
        if weights is None:
            architecture = resized(known_architecture(model_name or DEFAULT_MODEL_NAME), **sizes)
            self.architecture = replace(architecture, activation=activation or architecture.activation)
            self.backbone = build_backbone(self.architecture)
        else:
            self.architecture = weights.architecture
            self.backbone = build_backbone(self.architecture, weights.tensors, source=weights.source)
            self.logit_scale.data.copy_(weights.tensors["logit_scale"])
            self._take_bias(weights.tensors.get("logit_bias"))
            if weights.self_test is not None:  # of the model as it was saved, whatever is asked for
                self._make_projections(None, weights)
                check_self_test(self, weights.self_test, source=weights.source)
            self.architecture, tensors = resize_weights(weights.architecture, weights.tensors, **sizes)
            if tensors is not weights.tensors:
                self.backbone = build_backbone(self.architecture, tensors, source=weights.source)
        self._make_projections(projection_dim, weights)
        for tower in self.frozen_towers:
            for parameter in self.tower_state(tower).values():
                parameter.requires_grad_(False)
        self.float().train()  # whatever type is the default where it is made

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str | torch.device = "cpu") -> CLIPModel:
        """Build the model that a checkpoint holds, in evaluation mode; nothing is downloaded.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, not a checkpoint of this toolkit, or the model does not give the features that it was
                saved with.
        """
        return cls(pretrained=own_weights(load_checkpoint(path), path)).to(device).eval()

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Load a checkpoint's weights into this model.

        Returns:
            The checkpoint's content (`epoch`, `config`, `metrics`, ...).

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, of another architecture than this model's, or the model in it does not give the
                features that it was saved with. This model is then as it was.
        """
        content = load_checkpoint(path)
        stored = own_weights(content, path)
        stored_dim = len(stored.projections["image_projection.weight"])
        if not (stored.architecture.same_tensors(self.architecture) and stored_dim == self.projection_dim):
            raise ValueError(
                f"{path} holds a {stored.architecture.name} with projection_dim {stored_dim}, "
                f"this model is a {self.architecture.name} with {self.projection_dim}; "
                "CLIPModel.from_checkpoint(path) builds the right one"
            )
        before, bias = {name: value.clone() for name, value in self.state_dict().items()}, self.logit_bias
        self.load_state_dict(content["model_state_dict"])
        try:
            check_self_test(self, stored.self_test, source=stored.source)
        except ValueError:
            self.logit_bias = bias
            self.load_state_dict(before)
            raise
        self.holds_batchnorm = True
        self.train(self.training)
        return content

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """Load weights as PyTorch does; a `logit_bias` is taken if they have one, and stays if they have none."""
        self._take_bias(state_dict.get("logit_bias"))
        if self.logit_bias is not None and "logit_bias" not in state_dict:
            state_dict = {**state_dict, "logit_bias": self.logit_bias}
        return super().load_state_dict(state_dict, *arguments, **options)

    def learn_bias(self) -> None:
        """Have a `logit_bias` and train it, as `SigmoidLoss` needs; before the optimiser is made."""
        self.has_new_bias = self.logit_bias is None
        self._take_bias(torch.tensor(INITIAL_BIAS))
        assert self.logit_bias is not None
        self.logit_bias.requires_grad_()

    def load_adapter(self, path: str | Path) -> None:
        """Merge the `adapter.safetensors` of a run with LoRA into this model, which is as that run loaded it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an adapter of this toolkit, damaged, or trained on other weights than this model's.
        """
        load_adapter(self, path)

    def __repr__(self) -> str:
        """Say which model it is in a few lines; those of `print(model.backbone)` are its layers."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        side, length = self.image_resolution, self.architecture.context_length
        return (
            f"CLIPModel {shown(self.architecture.name)}\n"
            f"  {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained\n"
            f"  images of {side} x {side} pixels, texts of up to {length} tokens\n"
            f"  projection {self.image_projection.in_features} -> {self.projection_dim}\n"
            f"  on {self.device}, in {'training' if self.training else 'evaluation'} mode"
        )

    @property
    def is_compiled(self) -> bool:
        """Whether its towers are compiled in training; no longer once the compiler has failed on them."""
        return self._wants_compiled and not self.backbone.compiler.has_failed

    @property
    def projection_dim(self) -> int:
        """Size of the shared space."""
        return self.image_projection.out_features

    @property
    def image_resolution(self) -> int:
        """Height and width of the input, in pixels."""
        return self.architecture.image_resolution

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.logit_scale.device

    def encode_image(self, images: ImageInput) -> Tensor:
        """Encode images.

        Args:
            images: pixels `[B, 3, R, R]` or `[3, R, R]`, uint8, or float and normalised; or one or several Pillow
                images, paths, files' bytes, open binary files, or uint8 arrays `[H, W, 3]`, which go through the
                model's own preprocessing, and out of training run 64 at once, however many they are (under
                `torch.no_grad()`: else what the gradient needs of all of them stays in memory); see `inputs`.

        Returns:
            Unit-norm features, float32 `[B, projection_dim]`.

        Raises:
            ValueError: pixels of another type or size, or what is no image.
            FileNotFoundError: no such file.
        """
        batches = image_batches(images, clip_transform(self.image_resolution), size=self._at_once)  # [b, 3, R, R] each
        return _joined([self.project_image(self.run_image_tower(pixels)) for pixels in batches])

    def encode_text(self, texts: TextInput) -> Tensor:
        """Encode texts.

        Args:
            texts: one or several strings, truncated to the model's context, 64 at once as images are; or tokens, int
                `[B, L]` or `[L]`, or what a tokenizer returns, see `inputs.to_tokens`.

        Returns:
            Unit-norm features, float32 `[B, projection_dim]`.

        Raises:
            ValueError: what are no texts, ids that the model has not, or more tokens than its context.
        """
        shape = self.architecture
        tokens = to_tokens(
            texts, self._tokenize, context_length=shape.context_length, vocab_size=shape.vocab_size
        )  # [B, L]
        # a tensor is a batch already: a trace keeps it, and under FSDP every rank must run it as often as the others
        is_batch = isinstance(texts, Tensor) or self._at_once is None
        batches = [tokens] if is_batch else tokens.split(AT_ONCE)
        return _joined([self.project_text(self.run_text_tower(batch)) for batch in batches])

    @torch.no_grad()
    def similarity(self, images: ImageInput, texts: TextInput) -> Tensor:
        """Compare every image with every text, on the model's own scale: its logits.

        Args:
            images: N of them, as `encode_image` takes them.
            texts: M of them, as `encode_text` takes them.

        Returns:
            `exp(logit_scale) * cosine`, and `logit_bias` added if the model has one; float32 `[N, M]`. A softmax over
            texts gives the probability of each one for an image, if one of them is right.
        """
        return logits_of(self, self.encode_image(images), self.encode_text(texts))

    @torch.no_grad()
    def classify(
        self, images: ImageInput, names: Sequence[str], *, templates: str | Sequence[str] = "a photo of a {}"
    ) -> list[dict[str, float]]:
        """Tell which of some names each image shows, without training on them.

        Args:
            images: as `encode_image` takes them.
            names: of the classes, each once.
            templates: a text, or several, in which `{}` stands for a name; a class is the mean of its texts (Radford
                et al. 2021, section 3.1.4).

        Returns:
            For each image the probability of each name, the most likely first; they add up to 1. Of one image
            `[{"cat": 0.9, "dog": 0.1}]`.

        Raises:
            ValueError: no names or templates, a name that occurs twice, a template without `{}`.
        """
        return class_probabilities(self, images, names, templates)

    def compile_towers(self) -> None:
        """Use `torch.compile` for both towers in training, see `towers.set_compiled`; the first step takes longer."""
        self._wants_compiled = True
        self.train(self.training)

    def checkpoint_gradients(self) -> None:
        """Keep the input alone of each layer for the backward pass, which runs the layer again: the same gradient."""
        for layer in layers_of(self.backbone):
            layer.checkpointed = True  # type: ignore[assignment]

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch of pairs.

        Args:
            images: pixels `[B, 3, R, R]`, uint8, or float and normalised; or the image tower's output `[B, embed_dim]`.
            tokens: int `[B, L]`, or what the text tower makes of them, float `[B, embed_dim]`.

        Returns:
            `(image_features [B, D], text_features [B, D])`, both unit-norm float32.
        """
        # a frozen tower's output may come in place of its input: pixels have 4 dimensions, tokens are integers
        is_image_output = isinstance(images, Tensor) and images.ndim == 2
        is_text_output = isinstance(tokens, Tensor) and tokens.is_floating_point()
        image_features = self.project_image(images) if is_image_output else self.encode_image(images)
        text_features = self.project_text(tokens) if is_text_output else self.encode_text(tokens)
        return image_features, text_features

    def run_image_tower(self, images: Tensor) -> Tensor:
        """Turn pixels `[B, 3, R, R]` (uint8, or float and normalised) into the tower's output `[B, embed_dim]`."""
        # batches from the image cache have their channels last; a compiled tower is compiled for one order
        images = to_device(images, self.device).contiguous()
        pixels = normalize(images, self.architecture.mean, self.architecture.std)
        output: Tensor = self.backbone.encode_image(pixels)
        return output

    def run_text_tower(self, tokens: Tensor) -> Tensor:
        """Turn tokens, int `[B, L]`, into the text tower's output `[B, embed_dim]`."""
        output: Tensor = self.backbone.encode_text(tokens)
        return output

    def project_image(self, tower_output: Tensor) -> Tensor:
        """Take the image tower's output `[B, embed_dim]` into the shared space: unit-norm float32 `[B, D]`."""
        return F.normalize(self.image_projection(self._as_own(tower_output)).float(), dim=-1)

    def project_text(self, tower_output: Tensor) -> Tensor:
        """Take the text tower's output `[B, embed_dim]` into the shared space: unit-norm float32 `[B, D]`."""
        return F.normalize(self.text_projection(self._as_own(tower_output)).float(), dim=-1)

    def tower_state(self, tower: str) -> dict[str, Tensor]:
        """Return one tower's own parameters and buffers by name; `tower` is `image` or `text`."""
        state = self.backbone.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name.startswith("visual.") == (tower == "image")}

    def train(self, mode: bool = True) -> CLIPModel:
        """Set training mode; frozen towers, and the BatchNorm statistics of loaded weights, stay held."""
        super().train(mode)
        set_compiled(self.backbone, self.is_compiled and mode)
        if "image" in self.frozen_towers:
            self.backbone.visual.eval()
        if "text" in self.frozen_towers:
            self.backbone.transformer.eval()
        if self.holds_batchnorm:  # eval mode does not hold gradients back: scale and shift of BatchNorm still train
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Put what features depend on and no tensor shows into the state dict: the wrong one is silent."""
        return extra_state(self.architecture)

    def set_extra_state(self, state: Tensor) -> None:
        """Take what loaded weights were made with; a ValueError if it cannot be read."""
        before, self.architecture = self.architecture, self.architecture.with_unseen(read_extra_state(state))
        if self.architecture != before:
            apply_settings(self.backbone, self.architecture)

    @property
    def _at_once(self) -> int | None:
        """Images or texts of a list that are run at once; in training a batch is a batch, for BatchNorm's sake."""
        return None if self.training else AT_ONCE

    def _as_own(self, tower_output: Tensor) -> Tensor:
        """Bring a tower's output, which may be a cached one, to where the weights are, and to their type."""
        return to_device(tower_output, self.device, self.logit_scale.dtype)

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        tokens, truncated = tokenize(texts, self.architecture.context_length)
        if truncated:
            logger.warning("%s truncated to %d tokens", count(truncated, "text"), tokens.shape[1])
        return tokens

    def _take_bias(self, value: Tensor | None) -> None:
        """Make room for a bias where there is none; only `learn_bias` lets it be trained."""
        if value is not None and self.logit_bias is None:
            self.logit_bias = nn.Parameter(value.detach().clone().to(self.device), requires_grad=False)

    def _make_projections(self, projection_dim: int | None, weights: Weights | None) -> None:
        stored = weights.projections if weights else {}
        size = projection_dim or (len(stored["image_projection.weight"]) if stored else self.architecture.embed_dim)
        self.image_projection = nn.Linear(self.architecture.embed_dim, size, bias=False)
        self.text_projection = nn.Linear(self.architecture.embed_dim, size, bias=False)
        if stored and len(stored["image_projection.weight"]) == size:  # a checkpoint goes on with its own
            self.image_projection.weight.data.copy_(stored["image_projection.weight"])
            self.text_projection.weight.data.copy_(stored["text_projection.weight"])
            return
        shared = shared_projection(self.backbone, size)
        self.image_projection.weight.data.copy_(shared)
        self.text_projection.weight.data.copy_(shared)
        if size < self.architecture.embed_dim and weights is not None:
            message = "projection_dim %d is smaller than the backbone's %d: zero-shot quality is reduced"
            logger.warning(message, size, self.architecture.embed_dim)


def add_self_test(state: dict[str, Any]) -> dict[str, Any]:
    """Complete a checkpoint's state with what its reader checks it by, see `self_test.compute_self_test`.

    The model is built once more on the CPU, around the state's own tensors: a copy only of those on another device.
    """
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(pretrained=own_weights(state, "this checkpoint"))
        return _completed(state, model, compute_self_test(model))


def self_tester(state: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Make what completes a run's states as `add_self_test` does, in a thread beside the one that trains.

    To build a model draws random numbers and changes the default device, which belong to the whole process. So it is
    built here, once, with tensors of its own, and takes each state's weights.
    """
    weights = {name: value.detach().to("cpu", copy=True) for name, value in state["model_state_dict"].items()}
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(pretrained=own_weights({**state, "model_state_dict": weights}, "this checkpoint")).eval()

    def complete(state: dict[str, Any]) -> dict[str, Any]:
        model.load_state_dict(state["model_state_dict"])
        return _completed(state, model, compute_self_test(model, is_alone=False))

    return complete


def _completed(state: dict[str, Any], model: CLIPModel, self_test: dict[str, Any]) -> dict[str, Any]:
    return {
        **state,
        "activation": model.architecture.activation,
        "preprocessing": describe_preprocessing(model.architecture),
        "temperature": math.exp(-model.logit_scale.item()),
        "self_test": self_test,
    }


def _joined(batches: list[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(batches)


def _frozen_towers(freeze_backbone: bool, freeze_tower: str | None) -> tuple[str, ...]:
    if freeze_tower is None:
        return TOWERS if freeze_backbone else ()
    if freeze_tower not in TOWERS:
        raise ValueError(f"freeze_tower must be 'image' or 'text', got {freeze_tower!r}")
    if freeze_backbone:
        raise ValueError(f"freeze_backbone freezes both towers, freeze_tower {freeze_tower!r} only one: choose one")
    return (freeze_tower,)


__all__ = ["ARCHITECTURES", "MAX_LOGIT_SCALE", "CLIPModel", "ContrastiveLoss", "MultimodalTrainer", "SigmoidLoss"]
