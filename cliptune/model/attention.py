"""Attention over padded sequences, or over packed rows that know where they stand in them; and OpenAI's activation."""

from __future__ import annotations

import inspect
import logging
import math
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cliptune.runtime.messages import one_line
from cliptune.runtime.recording import is_recorded, is_transformed

logger = logging.getLogger(__name__)

GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which PyTorch prefers on newer GPUs, and which takes about a second for every new shape."""
GPU_LENGTH_MULTIPLE = 8
"""Texts are padded to a multiple of this on a GPU: ten shapes up to 77 positions, which allocator and kernels reuse."""


class Layout(NamedTuple):
    """Where packed rows `[N, width]` belong in a padded batch of sequences `[batch, length, width]`."""

    batch: int
    length: int
    indices: Tensor | None = None
    """Index of each row in the flat batch, `[N]`; None: the rows fill it."""
    causal: bool = False
    """Whether a row sees only those before it in its sequence."""
    pooled: Tensor | None = None
    """Indices of the rows that the last layer is wanted for, `[batch]`; None: all."""
    used: Tensor | None = None
    """Which positions of the padded batch hold a row that the pooled one may see, `[batch, length]`; None: all."""
    starts: Tensor | None = None
    """Index of each sequence's first row, and N: int32 `[batch + 1]`. With it attention sees the rows themselves, of
    sequences of at most `length`; without it they are padded."""

    def pad(self, rows: Tensor) -> Tensor:
        """Return `[batch, length, width]`, 0 where there is no row."""
        if self.indices is not None:
            empty = rows.new_zeros(self.batch * self.length, rows.shape[1])
            rows = empty.index_copy(0, self.indices, rows)
        return rows.view(self.batch, self.length, -1)

    def unpad(self, x: Tensor) -> Tensor:
        """Return the rows `[N, width]` of `[batch, length, ...]`."""
        rows = x.reshape(self.batch * self.length, -1)
        return rows if self.indices is None else rows.index_select(0, self.indices)


class Attention(nn.MultiheadAttention):
    """PyTorch's self-attention, which also takes packed rows, and calls its `out_proj` as the module that it is.

    PyTorch's own reads the weight of `out_proj` alone, so that an adapter or a hook there would have no part in it.
    """

    def forward(  # noqa: PLR0913  (PyTorch's arguments)
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention`; with a `layout` to the rows `[N, width]` of `query` by themselves."""
        if layout is not None:
            mixed = self._pooled(query, layout) if layout.pooled is not None else self._packed(query, layout)
            return self.out_proj(mixed), None
        is_plain = query is key is value and query.ndim == 3 and key_padding_mask is None and not self.batch_first
        if not is_plain or self.dropout or is_causal or (attn_mask is not None and attn_mask.ndim != 2):
            given = cast(Tensor, key), cast(Tensor, value), key_padding_mask, need_weights, attn_mask
            return self._attend_otherwise(query, *given, average_attn_weights, is_causal)
        projected = self._adapt(F.linear(query, self.in_proj_weight, self.in_proj_bias), query)
        projected = projected.unflatten(2, (3, self.num_heads, -1))
        heads = projected.permute(2, 1, 3, 0, 4).unbind()  # [L, B, 3, heads, d] -> three of [B, heads, L, d]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # true is hidden in PyTorch's modules, and seen in its functions
        mixed = attend(*heads, mask=attn_mask)  # [B, heads, L, d]
        weights = attention_weights(heads[0], heads[1], mask=attn_mask) if need_weights else None  # [B, heads, L, L]
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return self.out_proj(mixed.permute(2, 0, 1, 3).flatten(2)), weights

    def _attend_otherwise(self, *given: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*given)

    def _adapt(self, projected: Tensor, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Change what `x` was projected to by some rows of `in_proj_weight`; nothing without an adapter."""
        return projected

    def _packed(self, rows: Tensor, layout: Layout) -> Tensor:
        projected = self._adapt(F.linear(rows, self.in_proj_weight, self.in_proj_bias), rows)  # [N, 3 * width]
        if layout.starts is not None:
            parts = projected.unflatten(1, (3, self.num_heads, -1)).unbind(1)  # three of [N, heads, d]
            ends = (layout.starts, layout.starts, layout.length, layout.length)
            window = (-1, 0) if layout.causal else (-1, -1)
            return cast(Tensor, _varlen_attn(*parts, *ends, window_size=window)).flatten(1)
        qkv = layout.pad(projected)
        heads = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # three of [B, heads, L, d]
        # Causal is enough for padded texts: padding stands behind a text, where none of its tokens looks. What padding
        # itself gets there is thrown away by `unpad`.
        mixed = attend(*heads, causal=layout.causal)
        return layout.unpad(mixed.transpose(1, 2))  # [N, width]

    def _pooled(self, rows: Tensor, layout: Layout) -> Tensor:
        """Attend from one row of each sequence: a query for it alone, keys and values of every row."""
        width = rows.shape[1]
        weights = self.in_proj_weight.split((width, 2 * width))  # of the query; of key and value
        biases = self.in_proj_bias.split((width, 2 * width))
        split = (self.num_heads, -1)
        pooled = rows[layout.pooled]
        query = self._adapt(F.linear(pooled, weights[0], biases[0]), pooled, slice(None, width))
        pairs = self._adapt(F.linear(rows, weights[1], biases[1]), rows, slice(width, None))  # [N, 2 * width]
        if layout.starts is not None:
            key, value = pairs.unflatten(1, (2, *split)).unbind(1)  # [N, heads, d] each
            # sequences of one query each, which sees all keys of its own: it stands last in it, or nothing is hidden
            each = torch.arange(len(pooled) + 1, dtype=torch.int32, device=rows.device)
            ends = (each, layout.starts, 1, layout.length)
            return cast(Tensor, _varlen_attn(query.unflatten(1, split), key, value, *ends)).flatten(1)
        query = query.unflatten(1, split).unsqueeze(2)  # [B, heads, 1, d]
        key, value = (
            layout.pad(pairs).unflatten(2, (2, *split)).permute(2, 0, 3, 1, 4).unbind()
        )  # [B, heads, L, d] each
        mask = None if layout.used is None else layout.used[:, None, None, :]
        return attend(query, key, value, mask=mask).flatten(1)  # [B, width]


@cache
def can_attend_packed(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether attention runs on packed rows here; tries it once, forwards and backwards.

    Args:
        device: where the rows are.
        dtype: that attention computes in.
        head_dim: width of a head.
    """
    # what FlashAttention 2 takes: it asks for a multiple of 8, and beyond 128 its backward pass depends on the card
    if device.type != "cuda" or dtype not in {torch.float16, torch.bfloat16} or head_dim % 8 or head_dim > 128:
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _load_varlen_attn()
        is_right = try_packed_attention(device, dtype, head_dim)
        reason = "it gives other numbers than the plain product"
    except Exception as error:  # of a kernel that is not there, in many forms
        is_right, reason = False, one_line(error)
    if not is_right:
        logger.info("texts are padded for attention: packed attention does not work here (%s)", reason)
    return is_right


_varlen_attn: Any = None
"""`torch.nn.attention.varlen.varlen_attn`, once it is known to work."""


def _load_varlen_attn() -> None:
    found: Any = None
    with suppress(ModuleNotFoundError):
        # it imports the compiler, which takes a second
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

        found = varlen_attn
    # PyTorch 2.10's takes no window, and what it is causal by instead is gone in 2.11
    if found is None or "window_size" not in inspect.signature(found).parameters:
        raise NotImplementedError(f"it needs PyTorch 2.11 or later, this is {torch.__version__}")
    global _varlen_attn  # noqa: PLW0603
    _varlen_attn = found


def try_packed_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether packed attention and its gradients are the plain product's, on two short sequences."""
    lengths, heads = [3, 2], 2
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        starts = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)  # is kept for the backward pass, too
        # no random numbers, which a run counts on
        values = torch.arange(5 * 3 * heads * head_dim, dtype=torch.float32, device=device).sin()
        packed, plain = (values.to(dtype).view(5, 3, heads, head_dim).requires_grad_() for _ in range(2))
        found = _varlen_attn(*packed.unbind(1), starts, starts, 8, 8, window_size=(-1, 0))  # [5, heads, d]
        wanted = []
        for sequence in plain.float().split(lengths):  # [length, 3, heads, d]
            query, key, value = sequence.permute(1, 2, 0, 3).unbind()  # [heads, length, d] each
            seen = torch.ones(len(sequence), len(sequence), dtype=torch.bool, device=device).tril()
            wanted.append((attention_weights(query, key, mask=seen) @ value).transpose(0, 1))
        outputs = found.float(), torch.cat(wanted)
        gradients = [
            torch.autograd.grad(output.square().sum(), given)[0].float()
            for output, given in zip(outputs, (packed, plain), strict=True)
        ]
    return all(torch.allclose(got, want, rtol=0.02, atol=0.02) for got, want in (outputs, gradients))


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Attention `[B, heads, L, d]`; over short sequences on the CPU as two plain products.

    There PyTorch's blockwise kernel is the faster one forwards, but several times slower backwards, and it has no
    second derivative. `mask` is true where a key is seen, or is added to the scores.
    """
    if query.device.type == "cuda" and not is_transformed():
        with sdpa_kernel(GPU_KERNELS):
            return _blockwise(query, key, value, causal=causal, mask=mask)
    longest = 128 if query.dtype == torch.float32 else 320  # measured: beyond, the blockwise kernel wins
    is_short = query.device.type == "cpu" and query.shape[-2] <= longest and query.requires_grad
    if not (is_short or is_transformed()):
        return _blockwise(query, key, value, causal=causal, mask=mask)
    if causal:
        # row i is the query's position: it sees columns 0 to i
        length = query.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    mixed: Tensor = attention_weights(query, key, mask=mask) @ value
    return mixed


def attention_weights(query: Tensor, key: Tensor, *, mask: Tensor | None) -> Tensor:
    """Return what each query takes of each key, `[B, heads, L, L]`; each row adds up to 1."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    weights: Tensor = scores.softmax(-1)
    return weights


class QuickGELU(nn.Module):
    """OpenAI's activation, x * sigmoid(1.702 x); keeps one tensor for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every element."""
        # a compiler makes one loop of it by itself; a trace and a transform cannot look into a function of ours
        if is_recorded():
            return x * torch.sigmoid(1.702 * x)
        activated, _ = cast("tuple[Tensor, Tensor]", _QuickGELU.apply(x))
        return activated


class _QuickGELU(torch.autograd.Function):
    """The same as silu(1.702 x) / 1.702, whose derivative is that of silu at 1.702 x; returns 1.702 x as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # x * sigmoid(1.702 x) as autograd takes it keeps x, the sigmoid and the product: this keeps one of the three.
        # It is an output, so that a second derivative finds its way from it back to x.
        scaled = x * 1.702
        ctx.save_for_backward(scaled)
        ctx.set_materialize_grads(False)
        return F.silu(scaled).mul_(1 / 1.702), scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        (scaled,), (of_activated, of_scaled) = ctx.saved_tensors, gradients
        result = None if of_scaled is None else 1.702 * of_scaled
        if of_activated is None:
            return result
        if torch.is_grad_enabled():  # a second derivative is wanted, which the fused kernel has none of
            sigmoid = scaled.sigmoid()
            activated: Tensor = of_activated * (sigmoid * (1 + scaled * (1 - sigmoid)))
        else:
            activated = torch.ops.aten.silu_backward(of_activated, scaled)
        return activated if result is None else activated + result


def _blockwise(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
