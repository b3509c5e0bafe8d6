"""The formulas of DC-AE in plain PyTorch, for any device. Kernels are tested against them."""

import torch
import torch.nn.functional as F


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Channel RMS norm.

        y = x * rsqrt(mean_c(x²) + eps) * weight + bias

    x: [B, C, H, W]; weight, bias: [C]. Statistics and affine in fp32 or wider; returns x.dtype.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    y = y * weight.view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1)
    return y.to(x.dtype)


def feature_distance(a: torch.Tensor, b: torch.Tensor, head: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """The distance of LPIPS (arXiv 1801.03924) between two feature maps, a scalar in fp32 or wider.

        mean over b, h, w of Σ_c head[c] (â[c] - b̂[c])²,    x̂ = x * rsqrt(Σ_c x² + eps)

    a, b: [B, C, H, W]; head: [C]. As in torchmetrics, the epsilon is within the root, where it keeps the gradient of
    zero features finite.
    """

    def normalised(x: torch.Tensor) -> torch.Tensor:
        wide = _at_least_float32(x)
        return wide * torch.rsqrt(wide.square().sum(dim=1, keepdim=True) + eps)

    return ((normalised(a) - normalised(b)).square() * head.view(1, -1, 1, 1)).sum(dim=1).mean()


def relu_linear_attention(qkv: torch.Tensor, head_dim: int, eps: float) -> torch.Tensor:
    """ReLU linear attention over the positions of an image (EfficientViT, arXiv 2205.14756; DC-AE, arXiv 2410.10733).

        out_i = Σ_j v_j (k_j · q_i) / (Σ_j k_j · q_i + eps),    q, k = relu(q), relu(k)

    qkv: [B, heads * 3 * head_dim, H, W], channels grouped per head as q, k, v; returns [B, heads * head_dim, H, W] in
    qkv.dtype. With more than head_dim positions this computes (V Kᵀ) Q, otherwise V (Kᵀ Q), which is mathematically the
    same. For a symbolic number of positions, as torch.export has with dynamic shapes, it computes the first form for
    all sizes. As in the original implementation, float16 becomes float32 in the first form, and the division is always
    in float32 or wider.
    """
    batch, channels, height, width = qkv.shape
    positions = height * width
    with torch.autocast("cpu" if qkv.is_meta else qkv.device.type, enabled=False):  # the meta device has no autocast
        q, k, v = qkv.reshape(batch, channels // (3 * head_dim), 3, head_dim, positions).unbind(2)
        q, k = F.relu(q), F.relu(k)
        if isinstance(positions, torch.SymInt) or positions > head_dim:
            if qkv.dtype == torch.float16:
                q, k, v = q.float(), k.float(), v.float()
            out = (F.pad(v, (0, 0, 0, 1), value=1) @ k.transpose(-1, -2)) @ q  # the last row is the denominator
            out = _at_least_float32(out)
            out = out[:, :, :-1] / (out[:, :, -1:] + eps)
        else:
            scores = _at_least_float32(k.transpose(-1, -2) @ q)
            scores = scores / (scores.sum(dim=2, keepdim=True) + eps)
            out = v @ scores.to(v.dtype)
        return out.reshape(batch, channels // 3, height, width).to(qkv.dtype)


def pixel_unshuffle(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Like torch.nn.functional.pixel_unshuffle, which returns an empty batch unchanged (torch 2.13); also for that."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // factor, factor, width // factor, factor).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * factor**2, height // factor, width // factor)


def unshuffle_average(x: torch.Tensor, out_channels: int, factor: int) -> torch.Tensor:
    """Space to channel, then the mean of consecutive channels: the shortcut of a down-sampling block.

    u = pixel_unshuffle(x, factor) has factor² * C channels; y[o] = mean of u[o * g ... (o + 1) * g - 1] with
    g = factor² * C / out_channels. x: [B, C, H, W]; returns [B, out_channels, H / factor, W / factor].
    """
    u = pixel_unshuffle(x, factor)
    batch, channels, height, width = u.shape
    return u.reshape(batch, out_channels, channels // out_channels, height, width).mean(dim=2)


def duplicate_shuffle(x: torch.Tensor, out_channels: int, factor: int) -> torch.Tensor:
    """Each channel repeated in place, then channel to space: the shortcut of an up-sampling block.

    y = pixel_shuffle(repeat_interleave(x, r), factor) with r = factor² * out_channels / C repeats.
    x: [B, C, H, W]; returns [B, out_channels, H * factor, W * factor].
    """
    repeats = factor**2 * out_channels // x.shape[1]
    return F.pixel_shuffle(x.repeat_interleave(repeats, dim=1), factor)
