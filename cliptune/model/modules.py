"""OpenAI's modules with forward methods of ours, which leave out the work whose result nobody reads.

Values and gradients are those of OpenAI's own `forward` up to rounding:

- A text is pooled at its end and its tower is causal, so positions after the end change nothing. The layers run on the
  tokens of all texts, packed one text after another; only attention sees them padded to the longest text.
- Both towers pool one position. The last layer computes keys and values for all positions, and the rest for that one.
- A ViT's patches do not overlap, so their convolution is one matrix product.

A tower that holds what somebody else put there (hooks, an adapter, another module) runs plainly instead, since that
expects what OpenAI's modules see: sequences `[L, B, width]` of all positions. So does one that is traced or exported,
since packing depends on the example, and one under a transform of `torch.func`.

Importing this imports OpenAI's `clip`, which reads its vocabulary: only a model that is built needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cliptune.model.attention import (
    GPU_LENGTH_MULTIPLE,
    Attention,
    Layout,
    QuickGELU,
    attend,
    can_attend_packed,
)
from cliptune.model.batchnorm import held_statistics
from cliptune.model.programs import Compiler, backward_at_once
from cliptune.runtime.device import to_device
from cliptune.runtime.openai_clip import import_clip
from cliptune.runtime.recording import is_recorded

import_clip()  # first of all, since it needs help
from clip import model as openai  # noqa: E402


class Backbone(openai.CLIP):
    """OpenAI's `CLIP`: both towers, not normalised, without its `logit_scale`."""

    text_pooling = "largest"
    end_token: int | None = None
    """As `Architecture` has them; `causal` is what its transformer's mask says."""
    compiled = False
    """Whether each tower runs as one compiled program."""
    compiler: Compiler
    """The same as its transformers'."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Run the image tower on normalised pixels `[B, 3, R, R]`: `[B, embed_dim]`."""
        visual, is_vit = self.visual, isinstance(self.visual, VisionTransformer)
        if not is_vit:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        pixels = pixels.to(getattr(visual.conv1, "weight", pixels).dtype)
        is_plain = runs_plainly(pixels) or is_touched(visual) or (is_vit and not visual._is_as_built())
        if is_plain or not self._is_compiled_for(pixels):
            return cast(Tensor, visual(pixels))
        return self.compiler.run_tower(_run_vit if is_vit else _run_resnet, visual, pixels)

    def encode_text(self, tokens: Tensor, *, length_multiple: int | None = None) -> Tensor:
        """Run the text tower.

        Args:
            tokens: int `[B, L]`, L at most the context length. Best left on the CPU, where the texts' lengths are known
                without waiting for another device.
            length_multiple: of what attention sees the texts padded to; None: as the device likes it.

        Returns:
            `[B, embed_dim]`.
        """
        causal, context, device = (
            self.transformer.attn_mask is not None,
            self.context_length,
            self.text_projection.device,
        )
        if not causal or self.text_pooling == "last":  # padding counts, too
            tokens = F.pad(tokens, (0, context - tokens.shape[1]))
        ends = self._ends(tokens)  # [B]
        if runs_plainly(tokens) or not self._is_text_as_built():
            tokens, ends = tokens.to(device), ends.to(device)
            x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # [B, L, width]
            x = self.ln_final(self.transformer(x.transpose(0, 1)).transpose(0, 1))
            pooled = x[torch.arange(x.shape[0], device=device), ends]  # a shape, not `len`: a trace keeps that
        else:
            if length_multiple is None:
                length_multiple = GPU_LENGTH_MULTIPLE if device.type == "cuda" else 1
                length_multiple = None if causal and self._attends_packed() else length_multiple
            packed, positions, layout = pack(tokens, ends, device, causal=causal, length_multiple=length_multiple)
            if self._is_compiled_for(tokens):
                return self.compiler.run_tower(_run_texts, self, packed, positions, *_parts_of(layout))
            return self.run_packed(packed, positions, layout)
        return cast(Tensor, pooled @ self.text_projection)

    def run_packed(self, packed: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Run the text tower on what `pack` returns: `[B, embed_dim]`."""
        rows = self.token_embedding(packed) + F.embedding(positions, self.positional_embedding)  # [N, width]
        return cast(Tensor, self.ln_final(self.transformer(rows, layout)) @ self.text_projection)

    def _is_compiled_for(self, batch: Tensor) -> bool:
        is_left = not self.compiled or self.compiler.has_failed
        return not is_left and len(batch) > 1  # one sample would be a program by itself: a size of 1 is special

    def _ends(self, tokens: Tensor) -> Tensor:
        """Return the position that each text is pooled at."""
        if self.end_token is not None:  # pooling "end"
            return tokens.eq(self.end_token).int().argmax(dim=-1)
        if self.text_pooling == "largest":  # the end-of-text token has the largest id
            return tokens.argmax(dim=-1)
        return tokens.new_full(tokens.shape[:1], 0 if self.text_pooling == "first" else self.context_length - 1)

    def _attends_packed(self) -> bool:
        weight = self.text_projection
        kind = weight.device.type
        is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_cast else weight.dtype
        return can_attend_packed(weight.device, dtype, self.transformer.resblocks[0].attn.head_dim)

    def _is_text_as_built(self) -> bool:
        embedding, norm = self.token_embedding, self.ln_final
        parts_are_own = type(embedding) is nn.Embedding and isinstance(norm, LayerNorm)
        return parts_are_own and not (is_touched(embedding) or is_touched(norm)) and self.transformer.is_as_built()


class VisionTransformer(openai.VisionTransformer):
    """OpenAI's ViT."""

    pooling = "class"
    """One of `IMAGE_POOLINGS`."""

    def forward(self, x: Tensor) -> Tensor:
        """Turn normalised pixels `[B, 3, R, R]` into `[B, output_dim]`."""
        if runs_plainly(x) or not self._is_as_built():
            x = self._start(self.conv1(x).flatten(2).transpose(1, 2))
            return self._finish(self.transformer(x.transpose(0, 1)).transpose(0, 1))
        return self.run_rows(x)

    def run_rows(self, x: Tensor) -> Tensor:
        """Do the same where nothing needs to see whole sequences."""
        x = self._start(self._patches(x))  # [B, 1 + patches, width]
        batch, length = x.shape[:2]
        # the class token is the first of each image
        pooled = torch.arange(0, batch * length, length, device=x.device) if self.pooling == "class" else None
        rows = self.transformer(
            x.flatten(0, 1), Layout(batch, length, pooled=pooled)
        )  # [B * length, width] or [B, width]
        return self._finish(rows.unflatten(0, (batch, -1)))

    def _patches(self, pixels: Tensor) -> Tensor:
        """Do as `conv1` does: `[B, patches, width]`."""
        batch, channels, height, _ = pixels.shape
        size = self.conv1.kernel_size[0]
        grid = height // size
        # a convolution whose stride is its size multiplies each patch, as a vector, with the same matrix
        cut = pixels[:, :, : grid * size, : grid * size].reshape(batch, channels, grid, size, grid, size)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, -1)  # [B, patches, channels * size * size]
        return F.linear(patches, self.conv1.weight.flatten(1))

    def _start(self, patches: Tensor) -> Tensor:
        """Put the class token before the patches, and add the positions."""
        start = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([start, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return cast(Tensor, self.ln_pre(x))

    def _finish(self, x: Tensor) -> Tensor:
        """Pool sequences `[B, L, width]`, of which `class` needs the first position alone."""
        if self.pooling == "class":
            x = self.ln_post(x[:, 0])
        elif self.pooling == "average":
            x = self.ln_post(x[:, 1:].mean(1))
        else:
            x = self.ln_post(x[:, 1:]).mean(1)
        return cast(Tensor, x @ self.proj)

    def _is_as_built(self) -> bool:
        norms = self.ln_pre, self.ln_post
        parts_are_own = type(self.conv1) is nn.Conv2d and all(isinstance(norm, LayerNorm) for norm in norms)
        return parts_are_own and not any(map(is_touched, (self.conv1, *norms))) and self.transformer.is_as_built()


class Transformer(openai.Transformer):
    """A stack of blocks, which takes sequences `[L, B, width]`, or packed rows with their layout."""

    attn_mask: Tensor | None = None
    """That all its blocks are built with."""
    compiled = False
    """Whether each block is a compiled program."""
    compiler: Compiler

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Run all blocks; with a layout the last one runs for its pooled rows alone."""
        if layout is None:
            return cast(Tensor, super().forward(x))
        *blocks, last = self.resblocks
        all_rows = layout._replace(pooled=None, used=None)
        compiler = self.compiler if self.compiled and layout.batch > 1 else None  # 1 would be a program by itself
        with nullcontext() if compiler is None else backward_at_once():
            for block in blocks:
                x = block(x, all_rows, compiler)
        return cast(Tensor, last(x, layout))

    def is_as_built(self) -> bool:
        """Tell whether nothing in it needs to see whole sequences."""
        if is_touched(self) or is_touched(self.resblocks) or type(self.resblocks) is not nn.Sequential:
            return False
        blocks = cast(Any, self.resblocks)
        return all(type(block).forward is Block.forward and block.is_as_built(self.attn_mask) for block in blocks)


class Block(openai.ResidualAttentionBlock):
    """Attention and an MLP, each after a LayerNorm and beside the sum of what was."""

    attn: Attention
    checkpointed = False

    def forward(self, x: Tensor, layout: Layout | None = None, compiler: Compiler | None = None) -> Tensor:
        """Take sequences `[L, B, width]`, or packed rows `[N, width]` with their layout."""
        if layout is None:
            return _checkpointed(self, super().forward, x)
        # of texts, whose number of rows changes from batch to batch, `dynamic` makes one program for all
        dynamic = layout.causal or x.is_cuda
        run = _run_block if compiler is None else compiler.of_block(_run_block, dynamic=dynamic)
        return _checkpointed(self, run, self, x, layout)

    def attention(self, x: Tensor) -> Tensor:
        """Attend within sequences `[L, B, width]`, without putting another mask in the place of its own.

        OpenAI's repository keeps the mask as `x` needs it, which is another tensor on a GPU or in half precision.
        """
        mask, length = self.attn_mask, x.shape[0]  # a shape, not `len`: a trace keeps that
        if mask is not None:
            mask = mask[:length, :length].to(x)
        return cast(Tensor, self.attn(x, x, x, need_weights=False, attn_mask=mask)[0])

    def is_as_built(self, attn_mask: Tensor | None) -> bool:
        """Tell whether nothing in it needs to see whole sequences."""
        attn = self.attn
        return (
            self._modules.keys() == _PARTS_OF_BLOCK
            and type(attn).forward is Attention.forward
            and self.attn_mask is attn_mask
            and "attention" not in vars(self)
            and attn._modules.keys() == {"out_proj"}
            and not (is_touched(self) or is_touched(attn))
            and all(map(is_row_wise, (attn.out_proj, self.ln_1, self.mlp, self.ln_2)))
        )


_PARTS_OF_BLOCK = {"attn", "ln_1", "mlp", "ln_2"}


def _run_block(block: Block, rows: Tensor, layout: Layout) -> Tensor:
    mixed, _ = block.attn(block.ln_1(rows), layout=layout)
    rows = (rows if layout.pooled is None else rows[layout.pooled]) + mixed
    return cast(Tensor, rows + block.mlp(block.ln_2(rows)))


class LayerNorm(openai.LayerNorm):
    """LayerNorm that gives the type it is given, whatever autocast computes it in."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class Bottleneck(openai.Bottleneck):
    """A layer of a ResNet, which can be checkpointed."""

    checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return _checkpointed(self, super().forward, x)


class AttentionPool2d(openai.AttentionPool2d):
    """Attention from the mean of all positions; its four layers are called, so that adapters of theirs take part."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool `[B, C, H, W]` to `[B, output_dim]`."""
        x = x.flatten(2).transpose(1, 2)  # [B, H * W, C]
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        query, key, value = (
            project(part).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, positions, d]
            for project, part in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return cast(Tensor, self.c_proj(attend(query, key, value).flatten(1)))


def _run_vit(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    return visual.run_rows(pixels)


def _run_resnet(visual: openai.ModifiedResNet, pixels: Tensor) -> Tensor:
    return cast(Tensor, visual(pixels))


def _run_texts(
    backbone: Backbone,
    packed: Tensor,
    positions: Tensor,
    pooled: Tensor,
    indices: Tensor | None,
    used: Tensor | None,
    starts: Tensor | None,
    length: int | None,
) -> Tensor:
    """Do as `Backbone.run_packed`; whatever changes from batch to batch is a tensor's size."""
    length = used.shape[1] if length is None and used is not None else length
    causal = backbone.transformer.attn_mask is not None
    layout = Layout(pooled.shape[0], cast(int, length), indices, causal, pooled, used, starts)
    return backbone.run_packed(packed, positions, layout)


def _parts_of(layout: Layout) -> tuple[Any, ...]:
    """Return a layout as `_run_texts` takes it: as the same kinds of values for all batches of a model."""
    pooled, starts = cast(Tensor, layout.pooled), layout.starts
    if starts is not None or not layout.causal:  # whose length is the same for all batches
        return pooled, None, None, starts, layout.length
    indices, used = layout.indices, layout.used
    if indices is None:  # texts that happen to be equally long
        indices = torch.arange(layout.batch * layout.length, device=pooled.device)
        used = torch.ones(layout.batch, layout.length, dtype=torch.bool, device=pooled.device)
    return pooled, indices, used, None, None


OWN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    openai.CLIP: Backbone,
    openai.VisionTransformer: VisionTransformer,
    openai.Transformer: Transformer,
    openai.ResidualAttentionBlock: Block,
    openai.LayerNorm: LayerNorm,
    openai.Bottleneck: Bottleneck,
    openai.AttentionPool2d: AttentionPool2d,
    nn.MultiheadAttention: Attention,
}
"""What each of OpenAI's classes becomes; parameters have the same names."""


def pack(
    tokens: Tensor, ends: Tensor, device: torch.device, *, causal: bool, length_multiple: int | None
) -> tuple[Tensor, Tensor, Layout]:
    """Put the tokens of texts, up to the position that each is pooled at, one after another.

    Args:
        tokens: int `[B, L]`.
        ends: positions, `[B]`.
        device: where the result is wanted.
        causal: whether what stands behind a position changes nothing there; else all tokens are needed.
        length_multiple: of what attention pads them to; None: it sees them packed.

    Returns:
        Ids and positions, `[N]` each, and their layout.
    """
    # Texts of 3 and 2 tokens, padded with 0, are packed like this:
    #   tokens    [[s, a, e, 0], [s, e, 0, 0]]  -> lengths [3, 2], length 3
    #   used      [[1, 1, 1], [1, 1, 0]]        -> indices [0, 1, 2, 3, 4] of its flat form
    #   packed    [s, a, e, s, e]               positions [0, 1, 2, 0, 1]   pooled [2, 4] (the two e)
    lengths = ends + 1 if causal else torch.full_like(ends, tokens.shape[1])  # [B]
    if length_multiple is None:
        return _pack_causal(tokens, lengths, device)
    length = min(-(-int(lengths.max()) // length_multiple) * length_multiple, tokens.shape[1])
    used = torch.arange(length, device=tokens.device) < lengths[:, None]  # [B, length]
    indices = used.flatten().nonzero().squeeze(1)  # [N], N tokens in all
    packed, positions = tokens[:, :length].flatten()[indices], indices % length
    pooled = lengths.cumsum(0) - lengths + ends
    packed, positions, indices, pooled, used = (
        to_device(index, device) for index in (packed, positions, indices, pooled, used)
    )
    is_full = len(packed) == len(tokens) * length
    # a causal text's pooled row comes last, so the causal mask hides nothing from it: only the padding must be hidden
    layout = Layout(len(tokens), length, None if is_full else indices, causal, pooled, None if is_full else used)
    return packed, positions, layout


def _pack_causal(tokens: Tensor, lengths: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Layout]:
    """Pack causal texts, which are pooled at their last token, for attention that needs no padding."""
    used = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [B, L]
    starts = F.pad(lengths.cumsum(0), (1, 0))  # [B + 1]
    indices = used.flatten().nonzero().squeeze(1)  # [N]
    packed, positions, starts, pooled = (
        to_device(index, device) for index in (tokens[used], indices % tokens.shape[1], starts.int(), starts[1:] - 1)
    )
    # the length is that of the tokens, not of these texts: kernels go by it, and so there is one shape for all batches
    return packed, positions, Layout(len(tokens), tokens.shape[1], None, True, pooled, None, starts)


def runs_plainly(x: Tensor) -> bool:
    """Tell whether packing is out of place, whatever a tower holds."""
    return is_recorded() or not x.shape[0] or any(map(_are_foreign, _HOOKS_OF_ALL))


def is_touched(module: nn.Module) -> bool:
    """Tell whether a module has hooks of others, or a `forward` that was put on it."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return any(_are_foreign(own[name]) for name in _HOOKS)
    return "forward" in own


def _are_foreign(hooks: dict[int, Any]) -> bool:
    """Tell whether hooks may want to see positions: FSDP's gather and free weights, PyTorch's own trackers count."""
    return bool(hooks) and not all(
        str(getattr(hook, "__module__", "")).startswith(("torch.distributed.", "torch.utils."))
        for hook in hooks.values()
    )


# of one module, and of all there are; private names, used here alone
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]


def is_row_wise(module: nn.Module) -> bool:
    """Tell whether a module is known to treat each row by itself, so that it may see packed ones."""
    if is_touched(module):
        return False
    # an adapter around a linear layer, as peft builds it, is made of linear layers
    is_adapter = isinstance(module._modules.get("base_layer"), nn.Linear)
    return (is_adapter or _is_row_wise_kind(type(module))) and all(map(is_row_wise, module._modules.values()))  # type: ignore[arg-type]


@cache
def _is_row_wise_kind(kind: type[nn.Module]) -> bool:
    if issubclass(kind, nn.Linear):
        return True
    is_known = kind.__module__.split(".")[0] in {"torch", "clip", "cliptune"}
    return is_known and (issubclass(kind, _ROW_WISE) or kind.__name__ in _QUANTIZED)


_ROW_WISE = (
    nn.LayerNorm, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
    nn.Dropout, nn.Identity, QuickGELU, openai.QuickGELU, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid,
)  # fmt: skip

_QUANTIZED = {"Linear", "LinearPackedParams"}
"""PyTorch's linear layers of integers, which are in another module in every version."""


def _checkpointed(layer: Any, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Keep a layer's input alone, and run the layer again in the backward pass (Chen et al. 2016).

    Random numbers come again as they were, and batch statistics are counted once: gradients are the same.
    """
    if not layer.checkpointed or not torch.is_grad_enabled() or is_recorded():
        return run(*arguments)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # of the forward pass, and of its repetition, which must not move BatchNorm's statistics once more
        return nullcontext(), held_statistics(layer)

    output: Tensor = checkpoint(run, *arguments, use_reentrant=False, context_fn=contexts)
    return output
