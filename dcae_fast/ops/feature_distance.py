"""The distance of LPIPS between two feature maps, in one pass.

    distance = mean over b, h, w of Σ_c head[c] (â[c] - b̂[c])²,   x̂ = x * rsqrt(Σ_c x² + eps)

a, b: [B, C, H, W] channels-last; head: [C]. The distance is a scalar in fp32. Source: LPIPS (arXiv 1801.03924), with
the epsilon within the root as in torchmetrics.
"""

import torch

from dcae_fast.models import functional

from ._library import KERNEL_DTYPES, define, differentiable, differentiable_as

MAX_CHANNELS = 8192


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _normalised(x, eps):
    """x with length 1 in each position, and the factor that makes it so."""
    rstd = torch.rsqrt(_wide(x).square().sum(1, keepdim=True) + eps)
    return _wide(x) * rstd, rstd


feature_distance_reference = functional.feature_distance


def feature_distance_backward_reference(ddistance, a, b, head, eps):
    (unit_a, rstd), (unit_b, _) = _normalised(a, eps), _normalised(b, eps)
    du = (2 / (a.numel() // a.shape[1])) * _wide(ddistance) * _wide(head).view(1, -1, 1, 1) * (unit_a - unit_b)
    return ((du - unit_a * (du * unit_a).sum(1, keepdim=True)) * rstd).to(a.dtype)


def _accepts(a, b, head, _):
    return {a.dtype, b.dtype, head.dtype} <= set(KERNEL_DTYPES) and a.numel() > 0 and a.shape[1] <= MAX_CHANNELS


feature_distance_op = define(
    "feature_distance(Tensor a, Tensor b, Tensor head, float eps) -> Tensor",
    feature_distance_reference,
    _accepts,
    "feature_distance",
)
feature_distance_backward_op = define(
    "feature_distance_backward(Tensor ddistance, Tensor a, Tensor b, Tensor head, float eps) -> Tensor",
    feature_distance_backward_reference,
    lambda ddistance, *args: _accepts(*args),
    "feature_distance",
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, ddistance):
    a, b, head = ctx.saved_tensors
    wants_a, wants_b, wants_head, _ = ctx.needs_input_grad
    da = feature_distance_backward_op(ddistance, a, b, head, ctx.eps) if wants_a else None
    db = feature_distance_backward_op(ddistance, b, a, head, ctx.eps) if wants_b else None
    dhead = None
    if wants_head:  # seldom: the published heads are frozen
        squares = (_normalised(a, ctx.eps)[0] - _normalised(b, ctx.eps)[0]).square().mean((0, 2, 3))
        dhead = (ddistance * squares).to(head.dtype)
    return da, db, dhead, None


differentiable(feature_distance_op, _backward, _setup_context)
differentiable_as(feature_distance_backward_op, feature_distance_backward_reference)


def feature_distance(a: torch.Tensor, b: torch.Tensor, head: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """The mean over positions of Σ_c head[c] (â[c] - b̂[c])²; see the head of this file.

    a, b: [B, C, H, W]; head: [C]. Returns a scalar in float32 (float64 for float64). Raises ValueError on other shapes.
    """
    if a.dim() != 4 or a.shape != b.shape or head.shape != a.shape[1:2]:
        raise ValueError(
            f"a is {list(a.shape)}, b {list(b.shape)}, head {list(head.shape)}: expected [B, C, H, W], the same, [C]"
        )
    return feature_distance_op(a, b, head, eps)
