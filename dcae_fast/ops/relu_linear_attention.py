"""ReLU linear attention on one or more packed qkv tensors, one for each scale.

    out_i = Σ_j v_j (k_j · q_i) / (Σ_j k_j · q_i + eps),    q, k = relu(q), relu(k)

qkv: [B, heads * 3 * D, H, W] channels-last; the channels of a head are q, k, v, D channels each. The outputs of the
scales are concatenated along channels to [B, scales * heads * D, H, W], the input of the projection. Sums in fp32.

For H * W ≤ D the reference computes the H·W × H·W matrix of scores first, as the original does. The kernel always uses
the linear form, which is the same function. Source: EfficientViT (arXiv 2205.14756), DC-AE (arXiv 2410.10733).

`relu_linear_attention_int8` returns the result as int8, the operand of an 8-bit projection. Nothing is rounded before.
"""

import torch

from dcae_fast.models import functional

from ._library import KERNEL_DTYPES, are_aligned, define, differentiable, differentiable_as, halves_on_hopper
from .quantize import check_factor, check_no_gradient, quantize_reference

HEAD_DIMS = (16, 32, 64)


def relu_linear_attention_reference(qkvs, head_dim, eps):
    return functional.relu_linear_attention(torch.cat(qkvs, dim=1), head_dim, eps)


def relu_linear_attention_int8_reference(qkvs, head_dim, eps, out_factor):
    y = relu_linear_attention_reference([qkv.float() for qkv in qkvs], head_dim, eps)
    return quantize_reference(y, out_factor)


def relu_linear_attention_backward_reference(dout, qkvs, head_dim, eps):
    """With S = Σ_j k_j v_jᵀ and z = Σ_j k_j: the quotient rule at each position gives dq, dS and dz; then dk and dv."""
    qkv = torch.cat(qkvs, dim=1)
    batch, channels, height, width = qkv.shape
    heads, positions = channels // (3 * head_dim), height * width
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    q_in, k_in, v = qkv.reshape(batch, heads, 3, head_dim, positions).to(wide).unbind(2)
    q, k = q_in.relu(), k_in.relu()
    dout = dout.reshape(batch, heads, head_dim, positions).to(wide)
    s, z = k @ v.transpose(-1, -2), k.sum(-1, keepdim=True)
    rest = 1 / ((q * z).sum(2, keepdim=True) + eps)
    dnumerator = dout * rest
    ddenominator = -(dout * (s.transpose(-1, -2) @ q)).sum(2, keepdim=True) * rest.square()
    ds, dz = q @ dnumerator.transpose(-1, -2), (q * ddenominator).sum(-1, keepdim=True)
    dq = (s @ dnumerator + z * ddenominator).masked_fill(q_in <= 0, 0)
    dk = (ds @ v + dz).masked_fill(k_in <= 0, 0)
    dv = ds.transpose(-1, -2) @ k
    dqkv = torch.stack([dq, dk, dv], dim=2).reshape(qkv.shape).to(qkv.dtype)
    return list(dqkv.split([part.shape[1] for part in qkvs], dim=1))


def _accepts(qkvs, head_dim, *_):
    return all(qkv.dtype in KERNEL_DTYPES for qkv in qkvs) and head_dim in HEAD_DIMS


def _cuda_accepts(qkvs, head_dim, *_):
    return halves_on_hopper(*qkvs) and head_dim == 32


def _backward_cuda_accepts(dout, qkvs, head_dim, _):
    """The gradient's kernel splits sums into terms in bfloat16; float16 has too small a range."""
    return halves_on_hopper(dout, *qkvs) and dout.dtype == torch.bfloat16 and head_dim == 32


relu_linear_attention_op = define(
    "relu_linear_attention(Tensor[] qkvs, int head_dim, float eps) -> Tensor",
    relu_linear_attention_reference,
    _accepts,
    "relu_linear_attention",
    _cuda_accepts,
)
relu_linear_attention_int8_op = define(
    "relu_linear_attention_int8(Tensor[] qkvs, int head_dim, float eps, Tensor out_factor) -> Tensor",
    relu_linear_attention_int8_reference,
    _accepts,
    "relu_linear_attention",
    lambda qkvs, head_dim, eps, factor: _cuda_accepts(qkvs, head_dim) and are_aligned((factor,), torch.float32),
)
relu_linear_attention_backward_op = define(
    "relu_linear_attention_backward(Tensor dout, Tensor[] qkvs, int head_dim, float eps) -> Tensor[]",
    relu_linear_attention_backward_reference,
    lambda dout, *args: _accepts(*args),
    "relu_linear_attention",
    _backward_cuda_accepts,
)


def _setup_context(ctx, inputs, output):
    qkvs, ctx.head_dim, ctx.eps = inputs
    ctx.save_for_backward(*qkvs)


def _backward(ctx, dout):
    return relu_linear_attention_backward_op(dout, list(ctx.saved_tensors), ctx.head_dim, ctx.eps), None, None


differentiable(relu_linear_attention_op, _backward, _setup_context)
differentiable_as(relu_linear_attention_backward_op, relu_linear_attention_backward_reference)


def relu_linear_attention(qkvs: list[torch.Tensor], head_dim: int = 32, eps: float = 1e-15) -> torch.Tensor:
    """ReLU linear attention of each packed qkv, concatenated along channels; see the head of this file.

    qkvs: each [B, heads * 3 * head_dim, H, W]. Returns [B, Σ heads * head_dim, H, W] channels-last, in the type of the
    qkvs. Raises ValueError unless there is at least one qkv, all have the same type, batch and size, and their channels
    are a multiple of 3 * head_dim.
    """
    _check(qkvs, head_dim)
    return relu_linear_attention_op(qkvs, head_dim, eps)


def relu_linear_attention_int8(
    qkvs: list[torch.Tensor], out_factor: torch.Tensor, head_dim: int = 32, eps: float = 1e-15
) -> torch.Tensor:
    """The result of `relu_linear_attention` times out_factor as int8; for inference.

    out_factor: [Σ heads * head_dim] fp32. Raises ValueError as `relu_linear_attention` does and for other factors,
    RuntimeError if a tensor requires a gradient.
    """
    _check(qkvs, head_dim)
    check_factor("out_factor", out_factor, sum(qkv.shape[1] for qkv in qkvs) // 3)
    check_no_gradient(*qkvs, out_factor)
    return relu_linear_attention_int8_op(qkvs, head_dim, eps, out_factor)


def _check(qkvs, head_dim):
    first = qkvs[0] if qkvs else None
    for qkv in qkvs:
        if qkv.dim() != 4 or qkv.shape[1] % (3 * head_dim) or qkv.dtype != first.dtype:
            raise ValueError(
                f"qkv is {list(qkv.shape)} {qkv.dtype}; expected [B, a multiple of {3 * head_dim}, H, W] {first.dtype}"
            )
        if qkv.shape[0] != first.shape[0] or qkv.shape[2:] != first.shape[2:]:
            raise ValueError(f"qkv tensors differ in batch or size: {list(first.shape)} and {list(qkv.shape)}")
    if first is None:
        raise ValueError("qkvs is empty; expected at least one packed qkv tensor")
