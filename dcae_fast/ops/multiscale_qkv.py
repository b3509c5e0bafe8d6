"""A further scale of q, k and v for multi-scale attention: depthwise k×k, then grouped 1×1 convolution, in one pass.

    z[o] = Σ_{c in the group of o} grouped[o, c] · (depthwise[c] ∗ x[c])

x, z: [B, C, H, W] channels-last, x padded by k // 2 with zeros; depthwise: [C, 1, k, k], k odd; grouped: [C, D, 1, 1],
groups of D channels. No biases. Sums in fp32; z has the type of x. Source: EfficientViT (arXiv 2205.14756), SANA's
DC-AE.
"""

import torch
import torch.nn.functional as F

from ._library import KERNEL_DTYPES, as_x_or_float32, define, differentiable, differentiable_as, halves_on_hopper

GROUPS = (16, 32, 64)  # the kernels take these numbers of channels in a group
MOST_TAPS = 5  # of a row of the window, for the gradient's kernels


def _depthwise_convolution(x, depthwise):
    return F.conv2d(x, depthwise.to(x.dtype), padding=depthwise.shape[2] // 2, groups=x.shape[1])


def multiscale_qkv_reference(x, depthwise, grouped):
    x = _depthwise_convolution(x, depthwise)
    return F.conv2d(x, grouped.to(x.dtype), groups=x.shape[1] // grouped.shape[1])


def multiscale_qkv_backward_reference(dout, x, depthwise, grouped, parameters):
    channels, padding = x.shape[1], depthwise.shape[2] // 2
    mask = [True, parameters, False]

    def backward(dy, x, weight, padding, groups):
        return torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), None, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, mask
        )

    y = _depthwise_convolution(x, depthwise)
    dy, dgrouped, _ = backward(dout, y, grouped, 0, channels // grouped.shape[1])
    dx, ddepthwise, _ = backward(dy, x, depthwise, padding, channels)
    if not parameters:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, ddepthwise.to(depthwise.dtype), dgrouped.to(grouped.dtype)


def _accepts(x, depthwise, grouped):
    return all(tensor.dtype in KERNEL_DTYPES for tensor in (x, depthwise, grouped)) and grouped.shape[1] in GROUPS


def _cuda_accepts(x, depthwise, grouped, *gradient):
    """The kernels of the CUDA extension take 5×5 windows and groups of 32 channels."""
    sizes = depthwise.shape[2] == 5 and grouped.shape[1] == 32
    return sizes and halves_on_hopper(x, *gradient) and as_x_or_float32(x, depthwise, grouped)


multiscale_qkv_op = define(
    "multiscale_qkv(Tensor x, Tensor depthwise, Tensor grouped) -> Tensor",
    multiscale_qkv_reference,
    _accepts,
    "multiscale_qkv",
    _cuda_accepts,
)
multiscale_qkv_backward_op = define(
    "multiscale_qkv_backward(Tensor dout, Tensor x, Tensor depthwise, Tensor grouped, bool parameters)"
    " -> (Tensor, Tensor, Tensor)",
    multiscale_qkv_backward_reference,
    lambda dout, x, depthwise, grouped, _: _accepts(x, depthwise, grouped) and depthwise.shape[2] <= MOST_TAPS,
    "multiscale_qkv",
    lambda dout, x, depthwise, grouped, _: _cuda_accepts(x, depthwise, grouped, dout),
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    wants_parameters = any(ctx.needs_input_grad[1:])
    dx, *of_parameters = multiscale_qkv_backward_op(dout, *ctx.saved_tensors, wants_parameters)
    return dx, *(of_parameters if wants_parameters else (None, None))


differentiable(multiscale_qkv_op, _backward, _setup_context)
differentiable_as(multiscale_qkv_backward_op, multiscale_qkv_backward_reference)


def multiscale_qkv(x: torch.Tensor, depthwise: torch.Tensor, grouped: torch.Tensor) -> torch.Tensor:
    """Grouped 1×1 convolution of the depthwise k×k convolution of x; see the head of this file.

    x: [B, C, H, W]; depthwise: [C, 1, k, k], k odd; grouped: [C, D, 1, 1]. Returns [B, C, H, W] channels-last, in the
    type of x. Raises ValueError on other shapes.
    """
    channels = x.shape[1] if x.dim() == 4 else -1
    size, dim = depthwise.shape[-1], grouped.shape[1]
    fits = depthwise.shape == (channels, 1, size, size) and size % 2 == 1
    if not fits or grouped.shape != (channels, dim, 1, 1) or channels % dim:
        raise ValueError(
            f"x {list(x.shape)}, depthwise {list(depthwise.shape)}, grouped {list(grouped.shape)}:"
            " expected [B, C, H, W], [C, 1, k, k] with k odd, and [C, D, 1, 1] with C a multiple of D"
        )
    return multiscale_qkv_op(x, depthwise, grouped)
