"""Convolution with an epilogue in one kernel: cuDNN's where that is the fastest, a Triton kernel for few channels.

    y = act(conv(x, weight) + bias) + residual

x: [B, C, H, W] channels-last; weight: [K, C, R, S]; bias: [K]; residual and y: [B, K, P, Q]. Sums in fp32; nothing is
rounded between the convolution and y. `fold_batch_norm` makes weight and bias of a convolution with a batch norm. The
gradient of SiLU runs the convolution again; in training a convolution and `bias_act` are faster.
"""

import torch
import torch.nn.functional as F

from . import _convolution_plans, _plans
from ._elementwise import ACTIVATIONS, activate_backward, check_activation, check_filters, sum_to_channels
from ._library import HALVES, KERNEL_DTYPES, define, differentiable, launcher
from ._plans import is_deterministic
from .bias_act import bias_act_reference

FEW_CHANNELS, MOST_TAPS = 4, 7  # the most input channels and the largest window that the Triton kernel takes


def conv2d_reference(x, weight, bias, act, residual, stride, padding):
    top, left, bottom, right = padding
    if (top, left) == (bottom, right):
        y = F.conv2d(x, weight, None, stride, (top, left))
    else:
        y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride)
    if bias is not None:
        return bias_act_reference(y, bias, act, None, None, None, 0.0, residual, x.dtype)
    y = y if act == "none" else getattr(F, act)(y)
    return y if residual is None else y + residual


def has_few_channels(x, weight, bias, residual=None):
    """Whether the Triton kernel takes this convolution, for which cuDNN uses little of the memory bandwidth."""
    return (
        residual is None
        and 0 < x.shape[1] <= FEW_CHANNELS
        and max(weight.shape[2:]) <= MOST_TAPS
        and weight.dtype == x.dtype
        and x.dtype in KERNEL_DTYPES
        and (bias is None or bias.dtype in KERNEL_DTYPES)
    )


def _accepts(x, weight, bias, act, residual, stride, padding):
    """Whether a kernel takes these."""
    return has_few_channels(x, weight, bias, residual) or _fits_plans(x, weight, bias, residual)


def _fits_plans(x, weight, bias=None, residual=None):
    """Whether plans of cuDNN take these: one dtype of half precision on a GPU, addresses aligned to 16 bytes."""
    if not x.is_cuda or x.dtype not in HALVES or x.numel() == 0:
        return False
    for tensor in (x, weight, bias, residual):  # a loop, since this is asked before each convolution
        if tensor is not None and (tensor.dtype != x.dtype or tensor.data_ptr() % 16):
            return False
    return True


def _launch(x, weight, bias, act, residual, stride, padding):
    if has_few_channels(x, weight, bias, residual):
        return launcher("conv2d", "launch_conv2d")(x, weight, bias, act, stride, padding)

    def fallback():
        return _convolve_then_add(x, weight, bias, act, residual, stride, padding)

    if not _convolution_plans.available():
        return fallback()
    epilogue = _epilogue(bias, act, residual)
    plan = _convolution_plans.find(x, weight, stride, tuple(padding), epilogue, fallback)
    if plan is None:
        return fallback()
    return plan(x, weight, [operand for _, operand in epilogue if operand is not None])


def _prepare(x, weight, bias, act, residual, stride, padding):
    """Runs the plan that is known by then for this shape, without looking at the arguments again."""
    if has_few_channels(x, weight, bias, residual) or not _convolution_plans.available():
        return None
    epilogue = _epilogue(bias, act, residual)
    shape = _convolution_plans.shape_of(x, weight, stride, tuple(padding), epilogue)
    key = _plans.key_of(_convolution_plans.CUDNN, shape, x.device)
    has_bias_first = act != "none"

    def run(x, weight, bias, act, residual, stride, padding):
        plan = _plans.found(key)
        if plan is None:
            return _launch(x, weight, bias, act, residual, stride, padding)
        operands = (bias, residual) if has_bias_first else (residual, bias)
        return plan(x, weight, [operand for operand in operands if operand is not None])

    return run


def _epilogue(bias, act, residual):
    """Pairs (step, operand) in order. cuDNN has kernels that add a residual before the bias; after it, it compiles."""
    biased = [("bias", bias)] if bias is not None else []
    activated = [(act, None)] if act != "none" else []
    added = [("residual", residual)] if residual is not None else []
    return biased + activated + added if activated else added + biased


def convolve(x, weight, padding, out):
    """Writes conv(x, weight) with stride 1 to `out`. All tensors are dense and channels-last."""

    def fallback():
        return out.copy_(conv2d_reference(x, weight, None, "none", None, 1, padding))

    plan = None
    if _fits_plans(x, weight) and out.data_ptr() % 16 == 0 and _convolution_plans.available():
        plan = _convolution_plans.find(x, weight, 1, padding, [], fallback)
    return fallback() if plan is None else plan(x, weight, [], out)


def _convolve_then_add(x, weight, bias, act, residual, stride, padding):
    """PyTorch's convolution, then everything else in one pass over its result."""
    if bias is None:
        return conv2d_reference(x, weight, bias, act, residual, stride, padding)
    in_eights = x.shape[1] % 8 == weight.shape[0] % 8 == 0  # cuDNN can then add bias and ReLU
    is_relu = act == "relu" and residual is None and padding[:2] == padding[2:] and in_eights
    # this function ignores the flags that disable cuDNN or make it deterministic
    if is_relu and torch.backends.cudnn.enabled and not is_deterministic():
        return torch.cudnn_convolution_relu(x, weight, bias, [stride] * 2, padding[:2], [1, 1], 1)
    y = conv2d_reference(x, weight, None, "none", None, stride, padding)
    y = y.contiguous(memory_format=torch.channels_last)  # not every implementation in PyTorch preserves the format of x
    return launcher("bias_act", "launch_bias_act")(y, bias, act, None, None, None, 0.0, residual, x.dtype)


conv2d_op = define(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, str act, Tensor? residual, int stride, int[] padding) -> Tensor",
    conv2d_reference,
    _accepts,
    _launch,
    prepare=_prepare,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.act, residual, ctx.stride, ctx.padding = inputs
    ctx.from_y = ctx.act == "none" or (ctx.act == "relu" and residual is None)
    ctx.x_shape, ctx.residual_dtype = x.shape, None if residual is None else residual.dtype
    kept_x = x if ctx.needs_input_grad[1] or not ctx.from_y else None
    ctx.save_for_backward(kept_x, weight, bias, output if ctx.act == "relu" and ctx.from_y else None)


def _backward(ctx, dy):
    """By functions of PyTorch that have gradients themselves. SiLU, and ReLU below a residual, convolve again."""
    x, weight, bias, y = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _, wants_residual, *_ = ctx.needs_input_grad
    dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    if not ctx.from_y:
        wide = torch.promote_types(weight.dtype, torch.float32)
        z = conv2d_reference(x, weight, None, "none", None, ctx.stride, ctx.padding).to(wide)
        dz = activate_backward(z if bias is None else z + bias.view(1, -1, 1, 1), dy.to(wide), ctx.act)
    dbias = sum_to_channels(dz).to(bias.dtype) if wants_bias else None
    dresidual = dy.to(ctx.residual_dtype) if wants_residual else None
    dz = dz.to(weight.dtype)
    x = dz.new_empty(ctx.x_shape) if x is None else x
    dx, dweight = _convolution_backward(dz, x, weight, ctx.stride, ctx.padding, [wants_x, wants_weight, False])
    return dx, dweight, dbias, None, dresidual, None, None


def _convolution_backward(dy, x, weight, stride, padding, wants):
    top, left, bottom, right = padding
    if (top, left) != (bottom, right):
        padded = F.pad(x, (left, right, top, bottom))
        dx, dweight = _convolution_backward(dy, padded, weight, stride, [0] * 4, wants)
        return dx[:, :, top : top + x.shape[2], left : left + x.shape[3]] if wants[0] else None, dweight
    options = [stride] * 2, [top, left], [1, 1], False, [0, 0], 1, wants
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *options)[:2]


differentiable(conv2d_op, _backward, _setup_context)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "none",
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int | tuple[int, int, int, int] = 0,
) -> torch.Tensor:
    """act(conv(x, weight) + bias) + residual; see the head of this file.

    act: "none", "relu" or "silu". padding: with zeros, on all sides or (top, left, bottom, right). Returns
    channels-last, x.dtype. Raises ValueError on other activations, and unless x is [B, C, H, W], weight [K, C, R, S]
    and bias [K].
    """
    if act not in ACTIVATIONS:
        check_activation(act)
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, weight {list(weight.shape)}: expected [B, C, H, W] and [K, C, R, S]")
    if bias is not None and bias.shape != weight.shape[:1]:
        check_filters(weight, bias=bias)
    padding = [padding] * 4 if isinstance(padding, int) else list(padding)
    return conv2d_op(x, weight, bias, act, residual, stride, padding)
