"""CLIP's two towers on OpenAI's modules, without the work whose result nobody reads.

Values and gradients are those of the modules' own `forward` up to rounding:

- A text is pooled at its end and its tower is causal, so positions after the end change nothing. The layers run on the
  tokens of all texts, packed one text after another; only attention sees them padded to the longest text.
- Both towers pool one position. The last layer computes keys and values for all positions, and the rest for that one.
- A ViT's patches do not overlap, so their convolution is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cliptune.model.architectures import QUICK_GELU, Architecture
from cliptune.runtime.openai_clip import import_clip

RunLayer = Callable[..., Tensor]
"""Called with a layer's function, the layer and the function's other arguments: the hook by which layers are compiled,
checkpointed or sharded."""


def image_tower(backbone: Any, pixels: Tensor, run_layer: RunLayer | None = None) -> Tensor:
    """Run the image tower of OpenAI's `CLIP`.

    Args:
        backbone: a `clip.model.CLIP`.
        pixels: normalised `[B, 3, R, R]`, on the backbone's device.
        run_layer: how each layer is run; None: its function is called.

    Returns:
        `[B, embed_dim]`, not normalised.
    """
    visual = backbone.visual
    if not hasattr(visual, "transformer"):
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return cast(Tensor, visual(pixels)) if run_layer is None else _resnet(visual, pixels, run_layer)
    run_layer = run_layer or _call
    x = _embed_patches(visual, pixels)  # [B, 1 + patches, width]
    layout = _Layout(*x.shape[:2])
    rows = x.flatten(0, 1)  # [B * (1 + patches), width]
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        rows = run_layer(_run_block, block, rows, layout)
    pooled = torch.arange(0, len(rows), layout.length, device=rows.device)  # the class token, first of each image
    rows = run_layer(_run_last_block, last, rows, layout, pooled)  # [B, width]
    return cast(Tensor, _normalise(visual.ln_post, rows) @ visual.proj)


def text_tower(backbone: Any, tokens: Tensor, run_layer: RunLayer | None = None) -> Tensor:
    """Run the text tower of OpenAI's `CLIP`.

    Args:
        backbone: a `clip.model.CLIP`.
        tokens: int `[B, context_length]`; a text ends at its largest token. Best left on the CPU, where their lengths
            are known without waiting for another device.
        run_layer: how each layer is run; None: its function is called.

    Returns:
        `[B, embed_dim]`, not normalised.
    """
    run_layer = run_layer or _call
    # The end-of-text token has the largest id. Texts of 3 and 2 tokens, padded with 0, are packed like this:
    #   tokens    [[s, a, e, 0], [s, e, 0, 0]]  -> lengths [3, 2], length 3
    #   used      [[1, 1, 1], [1, 1, 0]]        -> indices [0, 1, 2, 3, 4] of its flat form
    #   packed    [s, a, e, s, e]               positions [0, 1, 2, 0, 1]   pooled [2, 4] (the two e)
    lengths = tokens.argmax(dim=-1) + 1  # [B]
    length = int(lengths.max())
    used = torch.arange(length, device=tokens.device) < lengths[:, None]  # [B, length]
    indices = used.flatten().nonzero().squeeze(1)  # [N], N tokens in all
    packed, positions, pooled = tokens[:, :length].flatten()[indices], indices % length, lengths.cumsum(0) - 1
    device = backbone.token_embedding.weight.device
    packed, positions, indices, pooled, used = (
        index.to(device, non_blocking=True) for index in (packed, positions, indices, pooled, used)
    )
    layout = _Layout(len(tokens), length, None if len(packed) == len(tokens) * length else indices)
    rows = backbone.token_embedding(packed) + F.embedding(positions, backbone.positional_embedding)  # [N, width]
    *blocks, last = backbone.transformer.resblocks
    for block in blocks:
        rows = run_layer(_run_block, block, rows, layout, causal=True)
    # the end-of-text token comes last, so the causal mask hides nothing from it; only the padding behind must be hidden
    rows = run_layer(_run_last_block, last, rows, layout, pooled, used=used)  # [B, width]
    return cast(Tensor, _normalise(backbone.ln_final, rows) @ backbone.text_projection)


def layers_of(backbone: Any) -> list[nn.Module]:
    """List the layers that `run_layer` runs: residual blocks of transformers and ResNets."""
    visual = backbone.visual
    if hasattr(visual, "transformer"):
        return [*visual.transformer.resblocks, *backbone.transformer.resblocks]
    return [*(layer for stage in _stages(visual) for layer in stage), *backbone.transformer.resblocks]


def compiled_layers(*, dynamic: bool) -> RunLayer:
    """Compile what a layer does; all layers of a tower but the last share the result, made when the first one runs.

    Args:
        dynamic: for a number of rows that changes from batch to batch, as in the text tower.
    """
    compiled = torch.compile(_run_block, dynamic=dynamic)

    def run(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        return (compiled if function is _run_block else function)(*arguments, **options)

    return run


def checkpointed_layers(run_layer: RunLayer | None) -> RunLayer:
    """Keep a layer's input alone, and run the layer again in the backward pass (Chen et al. 2016).

    Random numbers come again as they were, and batch statistics are counted once: gradients are the same.
    """
    inner = run_layer or _call

    def run(function: Callable[..., Tensor], layer: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return inner(function, layer, *arguments, **options)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            # of the forward pass, and of its repetition, which must not move BatchNorm's statistics once more
            return nullcontext(), held_statistics(layer)

        output: Tensor = checkpoint(
            inner, function, layer, *arguments, use_reentrant=False, context_fn=contexts, **options
        )
        return output

    return run


def add_run_methods(layers: Iterable[nn.Module]) -> None:
    """Give each layer a method `run`, for `run_by_method`: around it FSDP gathers and frees the layer's weights."""

    def run(layer: nn.Module, run_layer: RunLayer, *arguments: Any, **options: Any) -> Tensor:
        function, *rest = arguments
        return run_layer(function, layer, *rest, **options)

    for layer in layers:
        layer.run = MethodType(run, layer)  # type: ignore[assignment]


def run_by_method(run_layer: RunLayer | None) -> RunLayer:
    """Run each layer by the method that `add_run_methods` gave it."""
    inner = run_layer or _call

    def run(function: Callable[..., Tensor], layer: Any, *arguments: Any, **options: Any) -> Tensor:
        return cast(Tensor, layer.run(inner, function, *arguments, **options))

    return run


class StatisticsSnapshot:
    """A copy of a module's running statistics, to put back."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [(buffer, buffer.clone()) for buffer in running_statistics(module)]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Put them back; `where` is a boolean scalar on their device: only if it is true, which is not waited for."""
        for buffer, before in self._before:
            buffer.copy_(before if where is None else torch.where(where, before, buffer))


@contextmanager
def held_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are, whatever runs inside."""
    before = StatisticsSnapshot(module)
    try:
        yield
    finally:
        before.restore()


def running_statistics(module: nn.Module) -> list[Tensor]:
    """List the buffers that running the module changes: those of BatchNorm in training."""
    kind = nn.modules.batchnorm._BatchNorm  # the base of all its forms
    norms = (layer for layer in module.modules() if isinstance(layer, kind) and layer.training)
    return [buffer for norm in norms for buffer in norm.buffers()]


class QuickGELU(nn.Module):
    """OpenAI's activation, x * sigmoid(1.702 x); keeps one tensor for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every element."""
        if torch.compiler.is_compiling():  # which makes one loop of it by itself
            return x * torch.sigmoid(1.702 * x)
        return cast(Tensor, _QuickGELU.apply(x))


class _QuickGELU(torch.autograd.Function):
    """The same as silu(1.702 x) / 1.702, whose derivative is that of silu at 1.702 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # x * sigmoid(1.702 x) as autograd takes it keeps x, the sigmoid and the product: this keeps one of the three
        scaled = x * 1.702
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.aten.silu_backward(gradients[0], *ctx.saved_tensors))


_CLASS_ARGUMENTS = (
    "embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size", "context_length",
    "vocab_size", "transformer_width", "transformer_heads", "transformer_layers",
)  # fmt: skip


def build_backbone(
    architecture: Architecture, tensors: Mapping[str, Tensor] | None = None, *, source: str = "given tensors"
) -> Any:
    """Build OpenAI's `CLIP`, float32, without its `logit_scale`, which is `CLIPModel`'s.

    Args:
        architecture: its sizes and activation.
        tensors: weights in OpenAI's names, which become the backbone's without a copy; None: random ones.
        source: where they come from.

    Raises:
        ValueError: weights that do not fit.
    """
    clip_class = import_clip().model.CLIP
    sizes = {key: getattr(architecture, key) for key in _CLASS_ARGUMENTS}
    with torch.device("cpu" if tensors is None else "meta"):  # no random weights where they are given
        backbone = clip_class(**sizes)
    del backbone.logit_scale
    if tensors is not None:
        try:
            _take_in(backbone, tensors)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise ValueError(f"{source}: weights that do not fit a {architecture.name}: {reason[:300]}") from None
    if not architecture.is_vit:
        backbone.visual.to(memory_format=torch.channels_last)  # what convolutions are fastest in
    apply_settings(backbone, architecture)
    return backbone.float()


def _take_in(backbone: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make tensors the weights of a backbone that was built on the `meta` device."""
    backbone.load_state_dict({name: value for name, value in tensors.items() if name != "logit_scale"}, assign=True)
    mask = backbone.build_attention_mask()  # no weight, but on `meta`, too
    for block in backbone.transformer.resblocks:
        block.attn_mask = mask


def apply_settings(backbone: Any, architecture: Architecture) -> None:
    """Put what the features depend on and no tensor shows (`Architecture.unseen`) into a backbone, new or in use."""
    if architecture.is_vit:
        for block in backbone.visual.transformer.resblocks:
            block.attn.num_heads = architecture.vision_heads
            block.attn.head_dim = architecture.vision_width // architecture.vision_heads
    make = QuickGELU if architecture.activation == QUICK_GELU else nn.GELU
    for module in backbone.modules():
        if hasattr(module, "mlp") and hasattr(module.mlp, "gelu"):
            module.mlp.gelu = make()


def shared_projection(backbone: Any, size: int) -> Tensor:
    """Return the common start of the projection layers on both towers, `[size, embed_dim]`.

    Both layers start as the same map P, so that similarities start as the backbone's: (P x) . (P y) = x . y where P's
    columns are orthonormal, which needs a size of at least embed_dim. A smaller space keeps the directions in which
    both towers' outputs can differ most.

    Raises:
        ValueError: a size below 2.
    """
    if size < 2:
        raise ValueError(f"projection_dim {size}: a unit vector of one number is 1 or -1, and tells nothing")
    visual = backbone.visual
    image_map = visual.proj if hasattr(visual, "proj") else visual.attnpool.c_proj.weight.T  # [width, embed_dim]
    embed_dim = image_map.shape[1]
    if size == embed_dim:
        return torch.eye(embed_dim)
    if size > embed_dim:
        generator = torch.Generator().manual_seed(0)
        return cast(Tensor, torch.linalg.qr(torch.randn(size, embed_dim, generator=generator)).Q)
    stacked = torch.cat([image_map, backbone.text_projection]).detach().float()
    return cast(Tensor, torch.linalg.svd(stacked, full_matrices=False).Vh[:size])


def _call(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    return function(*arguments, **options)


class _Layout(NamedTuple):
    """Where packed rows `[N, width]` belong in a padded batch of sequences `[batch, length, width]`."""

    batch: int
    length: int
    indices: Tensor | None = None
    """Index of each row in the flat batch, `[N]`; None: the rows fill it."""

    def pad(self, rows: Tensor) -> Tensor:
        if self.indices is not None:
            empty = rows.new_zeros(self.batch * self.length, rows.shape[1])
            rows = empty.index_copy(0, self.indices, rows)
        return rows.view(self.batch, self.length, -1)  # [batch, length, width]

    def unpad(self, x: Tensor) -> Tensor:
        rows = x.reshape(self.batch * self.length, -1)
        return rows if self.indices is None else rows.index_select(0, self.indices)  # [N, width]


def _resnet(visual: Any, pixels: Tensor, run_layer: RunLayer) -> Tensor:
    """Run a `ModifiedResNet`: a stem of three convolutions, four stages of layers, attention pooling."""
    x = pixels
    for i in (1, 2, 3):
        convolution, norm = getattr(visual, f"conv{i}"), getattr(visual, f"bn{i}")
        x = getattr(visual, f"relu{i}")(norm(convolution(x)))
    x = visual.avgpool(x)
    for stage in _stages(visual):
        for layer in stage:
            x = run_layer(_run_bottleneck, layer, x)
    return cast(Tensor, visual.attnpool(x))


def _stages(resnet: Any) -> tuple[Any, ...]:
    return resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4


def _run_bottleneck(layer: Any, x: Tensor) -> Tensor:
    return cast(Tensor, layer.forward(x))


def _embed_patches(visual: Any, pixels: Tensor) -> Tensor:
    """Turn pixels into the sequence of class token and patches, `[B, 1 + patches, width]`."""
    batch, channels, height, _ = pixels.shape
    size = visual.conv1.kernel_size[0]
    grid = height // size
    # a convolution whose stride is its size multiplies each patch, as a vector, with the same matrix
    cut = pixels[:, :, : grid * size, : grid * size].reshape(batch, channels, grid, size, grid, size)
    patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, -1)  # [B, patches, channels * size * size]
    x = F.linear(patches, visual.conv1.weight.flatten(1))  # [B, patches, width]
    start = visual.class_embedding.to(x.dtype).expand(batch, 1, -1)
    x = torch.cat([start, x], dim=1) + visual.positional_embedding.to(x.dtype)
    return _normalise(visual.ln_pre, x)


def _run_block(block: Any, rows: Tensor, layout: _Layout, *, causal: bool = False) -> Tensor:
    """Run a `ResidualAttentionBlock` on rows `[N, width]`."""
    attention = block.attn
    qkv = layout.pad(F.linear(_normalise(block.ln_1, rows), attention.in_proj_weight, attention.in_proj_bias))
    query, key, value = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, d] each
    # Causal is enough for padded texts: padding stands behind a text, where none of its tokens looks. What padding
    # itself gets there is thrown away by `unpad`.
    mixed = _attend(query, key, value, causal=causal)  # [B, heads, L, d]
    rows = rows + attention.out_proj(layout.unpad(mixed.transpose(1, 2)))  # [N, width]
    return cast(Tensor, rows + block.mlp(_normalise(block.ln_2, rows)))


def _attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Attention `[B, heads, L, d]`; over short sequences on the CPU as two plain products.

    There PyTorch's blockwise kernel is the faster one forwards, but several times slower backwards.
    """
    length, size = query.shape[-2:]
    longest = 128 if query.dtype == torch.float32 else 320  # measured: beyond, the blockwise kernel wins
    if query.device.type != "cpu" or length > longest or not query.requires_grad:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    scores = (query * size**-0.5) @ key.transpose(-1, -2)  # [B, heads, L, L]
    if causal:
        # row i is the query's position: it sees columns 0 to i
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
        scores = scores.masked_fill_(later, -math.inf)
    mixed: Tensor = scores.softmax(-1) @ value
    return mixed


def _run_last_block(block: Any, rows: Tensor, layout: _Layout, pooled: Tensor, *, used: Tensor | None = None) -> Tensor:
    """Run a `ResidualAttentionBlock` for one row of each sequence.

    Its query and its MLP are needed for the pooled row alone; its attention needs keys and values of every row. That
    leaves a sixth of the block's work per row: 2 of the 12 products of width x width.

    Args:
        block: the tower's last.
        rows: `[N, width]`.
        layout: where they stand.
        pooled: indices of the rows wanted, `[batch]`.
        used: which positions of the padded batch hold a row that the pooled one may see, `[batch, length]`; None: all.
    """
    attention, width = block.attn, rows.shape[1]
    weights = attention.in_proj_weight.split((width, 2 * width))  # of the query; of key and value
    biases = attention.in_proj_bias.split((width, 2 * width))
    normal = _normalise(block.ln_1, rows)  # [N, width]
    heads = (attention.num_heads, -1)
    query = F.linear(normal[pooled], weights[0], biases[0]).unflatten(1, heads).unsqueeze(2)  # [B, heads, 1, d]
    key, value = layout.pad(F.linear(normal, weights[1], biases[1])).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
    mask = None if used is None else used[:, None, None, :]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # [B, heads, 1, d]
    rows = rows[pooled] + attention.out_proj(mixed.flatten(1))  # [B, width]
    return cast(Tensor, rows + block.mlp(_normalise(block.ln_2, rows)))


def _normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply LayerNorm, computed in float32; the result has the type of `x`."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
