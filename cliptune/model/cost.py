"""What training a model takes of arithmetic and memory, estimated from its architecture."""

from __future__ import annotations

from typing import NamedTuple

from cliptune.model.architectures import Architecture

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments, in float32."""
VALUES_PER_TOKEN = 20
"""That a layer keeps for the backward pass, in units of its width: inputs and outputs of its parts."""


class Cost(NamedTuple):
    """What a model takes.

    Attributes:
        num_parameters: of both towers and projections.
        image_flops: operations of the forward pass of an image; the backward pass has twice as many.
        text_flops: the same of a text.
        pair_values: numbers that are kept of a pair for the backward pass.
    """

    num_parameters: int
    image_flops: float
    text_flops: float
    pair_values: float

    @property
    def pair_flops(self) -> float:
        """Operations of the forward pass of an image and a text."""
        return self.image_flops + self.text_flops

    @property
    def state_bytes(self) -> int:
        """Memory that is taken whatever the batch."""
        return BYTES_PER_PARAMETER * self.num_parameters


def cost_of(architecture: Architecture, *, text_tokens: float) -> Cost:
    """Estimate what a model takes: a matrix of n x m numbers costs 2nm operations a row, attention 4 T^2 w a layer.

    Args:
        architecture: of the model.
        text_tokens: of a text, on average; padding costs nothing.
    """
    width, layers = architecture.transformer_width, architecture.transformer_layers
    text, image = _transformer(width, layers, text_tokens), _image(architecture)
    embeddings = (architecture.vocab_size + architecture.context_length) * width + width * architecture.embed_dim
    return Cost(int(text[0] + image[0] + embeddings), image[1], text[1], text[2] + image[2])


Parts = tuple[float, float, float]


def _transformer(width: int, layers: int, tokens: float) -> Parts:
    """Return parameters, operations and values kept: a layer has 4 w^2 numbers for attention and 8 w^2 for its MLP."""
    matrices = 12 * width**2 * layers
    return matrices, 2 * tokens * matrices + 4 * tokens**2 * width * layers, VALUES_PER_TOKEN * tokens * width * layers


def _image(architecture: Architecture) -> Parts:
    if architecture.vision_patch_size is None:
        return _resnet(architecture)
    assert isinstance(architecture.vision_layers, int)
    width, num_patches = (
        architecture.vision_width,
        (architecture.image_resolution // architecture.vision_patch_size) ** 2,
    )
    patches = 3 * architecture.vision_patch_size**2 * width
    parameters, flops, values = _transformer(width, architecture.vision_layers, num_patches + 1)
    return parameters + patches + width * architecture.embed_dim, flops + 2 * num_patches * patches, values


def _resnet(architecture: Architecture) -> Parts:
    """Go through the convolutions of OpenAI's ResNet: pooled before the last 1 x 1, attention in place of the mean."""
    assert isinstance(architecture.vision_layers, tuple)
    width, side = architecture.vision_width, architecture.image_resolution // 2
    half = width // 2
    # inputs, outputs, side of the kernel and of the output
    convolutions = [(3, half, 3, side), (half, half, 3, side), (half, width, 3, side)]
    side, channels = side // 2, width
    for stage, num_blocks in enumerate(architecture.vision_layers):
        planes = width * 2**stage
        for block in range(num_blocks):
            out = side // 2 if stage and not block else side
            convolutions += [(channels, planes, 1, side), (planes, planes, 3, side), (planes, 4 * planes, 1, out)]
            convolutions += [] if block else [(channels, 4 * planes, 1, out)]
            side, channels = out, 4 * planes
    pooling = channels * (3 * channels + architecture.embed_dim)
    parameters = sum(inputs * outputs * kernel**2 for inputs, outputs, kernel, _ in convolutions)
    flops = sum(2 * inputs * outputs * (kernel * place) ** 2 for inputs, outputs, kernel, place in convolutions)
    values = 2 * sum(outputs * place**2 for _, outputs, _, place in convolutions)  # of each and of its BatchNorm
    return parameters + pooling, flops + 2 * (side**2 + 1) * 2 * channels**2, values
