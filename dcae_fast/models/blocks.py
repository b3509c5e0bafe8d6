"""The blocks of DC-AE (arXiv 2410.10733): plain PyTorch, NCHW, attribute names as in the original checkpoints."""

import torch
import torch.nn.functional as F
from torch import nn

from . import functional

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class RMSNorm2d(nn.Module):
    """Channel RMS norm with weight and bias: `functional.rms_norm` over dim 1 of [B, C, H, W]."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight, self.bias, self.eps)


NORMS = {"rms": RMSNorm2d, "batch": nn.BatchNorm2d}


class ConvLayer(nn.Module):
    """Convolution, then an optional norm ("rms", "batch"), then an optional activation ("relu", "silu")."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: str | None = None,
        act: str | None = None,
    ):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.norm = NORMS[norm](out_channels) if norm else None
        self.act = ACTIVATIONS[act]() if act else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.act(x) if self.act is not None else x


class AdaptiveOutputConvLayer(ConvLayer):
    """A 3×3 convolution that can compute only its first `out_channels` output channels (DC-AE 1.5)."""

    def forward(self, x: torch.Tensor, out_channels: int | None = None) -> torch.Tensor:
        return F.conv2d(x, self.conv.weight[:out_channels], self.conv.bias[:out_channels], padding=self.conv.padding)


class AdaptiveInputConvLayer(ConvLayer):
    """A 3×3 convolution whose input may have fewer channels than its weight (DC-AE 1.5)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.conv.weight[:, : x.shape[1]], self.conv.bias, padding=self.conv.padding)


class ResBlock(nn.Module):
    """norm(conv3×3(act(conv3×3(x)))): only the branch, without the identity."""

    def __init__(self, channels: int, norm: str, act: str):
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, act=act)
        self.conv2 = ConvLayer(channels, channels, bias=False, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x))


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: 1×1 + SiLU to 2rC channels, depthwise 3×3, value · SiLU(gate), 1×1 to C, RMS norm.

    The first half of the channels is the value, the second half the gate. Only the branch, without the identity.
    """

    def __init__(self, channels: int, expand_ratio: int = 4):
        super().__init__()
        hidden = channels * expand_ratio
        self.inverted_conv = ConvLayer(channels, 2 * hidden, 1, act="silu")
        self.depth_conv = ConvLayer(2 * hidden, 2 * hidden, groups=2 * hidden)
        self.glu_act = nn.SiLU()
        self.point_conv = ConvLayer(hidden, channels, 1, bias=False, norm="rms")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        return self.point_conv(value * self.glu_act(gate))


class LiteMLA(nn.Module):
    """Multi-scale ReLU linear attention: qkv, one more qkv per scale, attention, 1×1 projection, RMS norm.

    For each scale k, a k×k depthwise and a grouped 1×1 convolution compute one more qkv from the first one. All are
    concatenated, which multiplies the number of heads. With `norm_qk` (in no released model) the channels of qkv are
    q, k, v over all heads, and q and k get an RMS norm. Only the branch, without the identity.
    """

    def __init__(self, channels: int, head_dim: int = 32, scales: tuple[int, ...] = (), norm_qk: bool = False):
        super().__init__()
        self.dim, self.eps = head_dim, 1e-15
        self.qkv = ConvLayer(channels, 3 * channels, 1, bias=False)
        self.norm_q = RMSNorm2d(channels) if norm_qk else None
        self.norm_k = RMSNorm2d(channels) if norm_qk else None
        groups = 3 * channels // head_dim
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * channels, 3 * channels, scale, padding=scale // 2, groups=3 * channels, bias=False),
                nn.Conv2d(3 * channels, 3 * channels, 1, groups=groups, bias=False),
            )
            for scale in scales
        )
        self.proj = ConvLayer(channels * (1 + len(scales)), channels, 1, bias=False, norm="rms")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.aggreg)], dim=1)
        if self.norm_q is not None:
            qkv = self.normalise_qk(qkv)
        return self.proj(functional.relu_linear_attention(qkv, self.dim, self.eps))

    def normalise_qk(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.chunk(3, dim=1)
        parts = torch.stack([self.norm_q(q), self.norm_k(k), v], dim=1)  # [B, 3, heads * dim, H, W]
        return parts.unflatten(2, (-1, self.dim)).transpose(1, 2).flatten(1, 3)


class ResidualBlock(nn.Module):
    """main(x) + shortcut(x)."""

    def __init__(self, main: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.shortcut(x)


class EfficientViTBlock(nn.Module):
    """x + attention(x), then x + gated convolution(x)."""

    def __init__(self, channels: int, scales: tuple[int, ...] = ()):
        super().__init__()
        self.context_module = ResidualBlock(LiteMLA(channels, scales=scales), nn.Identity())
        self.local_module = ResidualBlock(GLUMBConv(channels), nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.local_module(self.context_module(x))


class OpSequential(nn.Module):
    """The operations in sequence."""

    def __init__(self, ops: list[nn.Module]):
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class ConvPixelUnshuffleDownSampleLayer(nn.Module):
    """3×3 convolution to out_channels / factor² channels, then pixel-unshuffle."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.conv = ConvLayer(in_channels, out_channels // factor**2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pixel_unshuffle(self.conv(x), self.factor)


class ConvPixelShuffleUpSampleLayer(nn.Module):
    """3×3 convolution to out_channels · factor² channels, then pixel-shuffle."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.conv = ConvLayer(in_channels, out_channels * factor**2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.conv(x), self.factor)


class InterpolateConvUpSampleLayer(nn.Module):
    """Nearest-neighbour up-sampling, then a 3×3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.conv = ConvLayer(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


class PixelUnshuffleChannelAveragingDownSampleLayer(nn.Module):
    """`functional.unshuffle_average`: the shortcut of a down-sampling block, or of the encoder's head (factor 1)."""

    def __init__(self, in_channels: int, out_channels: int, factor: int):
        super().__init__()
        self.in_channels, self.out_channels, self.factor = in_channels, out_channels, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.unshuffle_average(x, self.out_channels, self.factor)


class ChannelDuplicatingPixelShuffleUpSampleLayer(nn.Module):
    """`functional.duplicate_shuffle`: the shortcut of an up-sampling block, or of the decoder's stem (factor 1)."""

    def __init__(self, in_channels: int, out_channels: int, factor: int):
        super().__init__()
        self.in_channels, self.out_channels, self.factor = in_channels, out_channels, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.duplicate_shuffle(x, self.out_channels, self.factor)
