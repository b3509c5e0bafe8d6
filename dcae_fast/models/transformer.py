"""Parts shared by UViT and DiT: input checks, embeddings, attention. Attribute names as in the originals.

Tokens are [B, N, D]. Attention runs in the dtype of its projection's output: that of the weights or of autocast.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .config import TransformerConfig


def check_inputs(
    config: TransformerConfig, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, fewest_channels: int
) -> None:
    """Raise TypeError or ValueError unless x, t, y are a batch for this configuration. Reads no values."""
    size, most = config.input_size, config.in_channels
    for name, value in (("x", x), ("t", t), ("y", y)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is of type {type(value).__name__}; expected a tensor")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating point tensor")
    if x.dim() != 4 or not fewest_channels <= x.shape[1] <= most or x.shape[2:] != (size, size):
        channels = most if fewest_channels == most else f"{fewest_channels} to {most}"
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, {channels}, {size}, {size}]")
    for name, value in (("t", t), ("y", y)):
        if value.shape != x.shape[:1]:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [{x.shape[0]}], one for each latent of x")
    if y.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"y is {y.dtype}; expected integers from 0 to {config.num_classes}, which means no class")


def sinusoidal_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Times [B], of any real dtype and scale → [B, dim], in float32 or wider.

    [cos(t · ω), sin(t · ω)],    ω_j = 10000^(-j / half),    j = 0 ... half - 1,    half = dim / 2
    """
    half = dim // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedder(nn.Module):
    """Labels [B] → [B, D]: a table with one additional row, `num_classes`, for the null label.

    In training mode each label becomes the null label with probability `dropout_prob`.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """[B, C, h, w] → tokens [B, N, D], one per patch of p × p pixels, row by row."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, N, p · p · C], the tokens of a square → [B, C, √N · p, √N · p]."""
    batch, tokens, width = x.shape
    side, channels = math.isqrt(tokens), width // patch_size**2
    x = x.reshape(batch, side, side, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, side * patch_size, side * patch_size)


class Attention(nn.Module):
    """Multi-head softmax attention. The channels of qkv are [q, k, v], each [heads, dim]."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, dim]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Linear to 4D, GELU, linear back to D. approximate: as in `torch.nn.GELU`, "none" or "tanh"."""

    def __init__(self, hidden_size: int, approximate: str):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))
