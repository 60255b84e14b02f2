"""nn.MultiheadAttention with an inner width of its own: PyTorch's ties embed_dim to heads times head dims."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd_fast.adapters.registry import register_adapter


# the fast paths of MultiheadAttention and TransformerEncoderLayer read embed_dim, unless this is False
@register_adapter(nn.MultiheadAttention, _qkv_same_embed_dim=False)
def multihead_attention(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention.forward`` computes; sizes from the tensors, the scale from ``head_dim``.

    Raises:
        RuntimeError: If ``is_causal`` comes without a mask.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("MultiheadAttention: is_causal=True needs attn_mask, got None; pass the causal mask")
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not self.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = _project(self, query, key, value)  # (N, L or S, inner)
    if self.bias_k is not None and self.bias_v is not None:
        k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
        v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
    q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    if self.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
    mask = _mask(self, q, k, key_padding_mask, attn_mask)
    scale, dropout = self.head_dim**-0.5, self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        scores = q * scale @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout, self.training)
        y = weights @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    y = F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        return y.squeeze(0), None if weights is None else weights.squeeze(0)
    return (y if self.batch_first else y.transpose(0, 1)), weights


def _project(self: nn.MultiheadAttention, *inputs: Tensor) -> list[Tensor]:
    """Queries, keys and values."""
    biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    if self.in_proj_weight is not None:
        weights = self.in_proj_weight.chunk(3)
    else:
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight  # type: ignore[assignment]
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _mask(
    self: nn.MultiheadAttention, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None
) -> Tensor | None:
    """One additive mask that broadcasts to (N, heads, L, S), from both of PyTorch's."""
    total = None
    for mask, shape in ((attention, (-1, self.num_heads)), (padding, None)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        if shape is None:
            mask = mask[:, None, None]
        elif mask.dim() == 3:
            mask = mask.unflatten(0, shape)
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # bias_k and add_zero_attn attend everywhere
        total = mask if total is None else total + mask
    return total
