"""SANA's diffusion transformer as diffusers has it: SanaTransformer2DModel, and the same blocks in SanaControlNetModel.

    s = x + gate1 · attn1(norm1(x)),    s' = s + attn2(s, text),    result = s' + gate2 · ff(norm2(s'))

x: [B, N, C], the tokens of an image, row by row. Each norm includes its modulation by the time. attn1 is ReLU linear
attention, attn2 softmax attention to the text. ff is a GLUMBConv (autoencoder_dc.py): tokens are a channels-last image.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._private import unobserved

from .. import operands, rows8
from ..call import Network
from ..fusion import activation_name, autocasts, compute_dtype, is_depthwise3x3
from ..module import FastModule, kind, plain
from ..registry import register
from . import uvit_dit
from .autoencoder_dc import GLUMBConv

EPS = 1e-15  # of the linear attention
LARGEST_HALF = 65504  # float16; the linear attention is clipped to it
PROCESSORS = {"attn1": "SanaLinearAttnProcessor2_0", "attn2": "SanaAttnProcessor2_0"}

# Parameters of the network's forward, with their defaults; the first three have none.
REQUIRED = ("hidden_states", "encoder_hidden_states", "timestep")
PARAMETERS: dict[str, Any] = dict.fromkeys(REQUIRED) | {
    "guidance": None,
    "encoder_attention_mask": None,
    "attention_mask": None,
    "attention_kwargs": None,
    "controlnet_block_samples": None,
    "return_dict": True,
}


class SanaTransformer2DModel(Network):
    """The network, whose calls are captured as CUDA graphs. Calls with attention_kwargs or with samples of a ControlNet
    are not. Everything outside of the blocks and of the last norm is computed by the network's own forward.
    """

    only_for_graphs = True
    attributes = (
        *("patch_embed", "time_embed", "caption_projection", "caption_norm", "transformer_blocks"),
        *("norm_out", "proj_out"),
    )

    def dispatch(self, *args, **kwargs):
        """All arguments by position, as graphs expect them. Wrong arguments raise the error of the network itself."""
        names = list(PARAMETERS)[len(args) :]
        missing = [name for name in names if name in REQUIRED and name not in kwargs]
        if len(args) > len(PARAMETERS) or missing or not kwargs.keys() <= set(names):
            return super().eager(*args, **kwargs)
        return super().dispatch(*args, *(kwargs.get(name, PARAMETERS[name]) for name in names))

    def eager(self, *args):
        """diffusers reads the scale of LoRA from `attention_kwargs` only if they are passed by name."""
        return super().eager(**dict(zip(PARAMETERS, args, strict=True)))


class SanaTransformerBlock(FastModule):
    dims = 3
    operators = ("gated_sum", "layer_norm", "linear", "relu_linear_attention", "rms_norm")
    attributes = ("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        modules = block._modules
        for name, processor in PROCESSORS.items():
            attn = modules[name]
            if kind(attn) != "Attention":
                return f"{name} is {type(attn).__name__}"
            found = type(attn.processor).__name__
            if found != processor:
                return f"{name} has the processor {found}"
            if attn.rescale_output_factor != 1:
                return f"{name} scales its result"
        norm1, norm2 = modules["norm1"], modules["norm2"]
        if type(norm1) is not nn.LayerNorm or type(norm2) is not nn.LayerNorm:
            return "a norm is not a LayerNorm"
        return "norm1 has weights" if norm1.elementwise_affine else ""

    def fast_forward(self, x, mask, text=None, text_mask=None, timestep=None, height=None, width=None):
        if not self.fuses(x, text, text_mask, timestep):
            return self.eager(x, mask, text, text_mask, timestep, height, width)
        norm1, attn1, norm2, attn2, ff = map(self._modules.get, ("norm1", "attn1", "norm2", "attn2", "ff"))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.scale_shift_table, timestep)
        x = x.contiguous()
        x = ops.gated_sum(x, gate1, linear_attention(attn1, x, scale1, shift1, norm1.eps, height, width))
        x = text_attention(attn2, x, text, text_mask)
        if norm2.elementwise_affine:
            scale2, shift2 = with_affine(norm2, scale2, shift2)
        return ops.gated_sum(x, gate2, feed_forward(ff, x, scale2, shift2, norm2.eps, height, width))

    def rows8_layers(self) -> tuple[nn.Module | None, ...]:
        attn1, attn2, ff = map(self._modules.get, ("attn1", "attn2", "ff"))
        projections = [layer for attn in (attn1, attn2) for layer in (*queries_of(attn), attn.to_out[0])]
        return *projections, *((ff.conv_inverted, ff.conv_point) if computes_tokens(ff) else ())

    def fuses(self, x, text, text_mask, timestep) -> bool:
        """Whether the block may compute its submodules without calling them, and these inputs have the usual form."""
        if text is None or timestep is None or self.reason_not_fast(self):
            return False
        modules = self._modules
        attn1, attn2, norm2 = modules["attn1"], modules["attn2"], modules["norm2"]
        known = unobserved(attn1, attn1.to_out, attn2, attn2.to_out, modules["norm1"]) and plain(norm2)
        of_text = text_mask is None or (text_mask.dim() == 3 and text_mask.shape[::2] == text.shape[:2])
        same_types = x.dtype == timestep.dtype == self.scale_shift_table.dtype
        return known and of_text and (same_types or autocasts(x))


class SanaModulatedNorm(FastModule):
    """The last norm, and its modulation by the time, in one pass."""

    dims = 3
    operators = ("layer_norm",)
    attributes = ("norm",)

    @staticmethod
    def reason_not_fast(module: nn.Module) -> str:
        known = type(module.norm) is nn.LayerNorm and not module.norm.elementwise_affine
        return "" if known else "its norm is not a LayerNorm without weights"

    def fast_forward(self, x: torch.Tensor, time: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if self.reason_not_fast(self) or not unobserved(self.norm):
            return self.eager(x, time, table)
        shift, scale = modulation(table, time)
        of_norm = torch.float32 if autocasts(x) else x.dtype
        return ops.layer_norm(x, scale, shift, self.norm.eps, dtype=torch.promote_types(of_norm, scale.dtype))[1]


def modulation(table: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of table + time, each [B, C]. table: [rows, C]; time: [B, rows * C], or [B, C] for all rows."""
    rows = time.reshape(time.shape[0], -1, table.shape[1]).expand(-1, table.shape[0], -1)
    return (table[:, None] + rows.transpose(0, 1)).contiguous().unbind(0)


def with_affine(norm: nn.LayerNorm, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift [B, C] that also apply the weight and bias of the norm, in float32."""
    weight, bias = norm.weight.float(), norm.bias.float()
    factor = 1 + scale.float()
    return weight * factor - 1, bias * factor + shift.float()


def image(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens [B, H * W, C] as a channels-last image [B, C, H, W], without a copy."""
    return x.unflatten(1, (height, width)).movedim(-1, 1)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """A channels-last image [B, C, H, W] as tokens [B, H * W, C], without a copy."""
    return x.movedim(1, -1).flatten(1, 2)


def linear_attention(
    attn: nn.Module, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, height: int, width: int
) -> torch.Tensor:
    """What the self-attention adds to the tokens, before its gate. It reads the modulated norm of x."""
    to_out, dropout = attn.to_out
    layers = queries_of(attn)
    dtype = dtype_of_queries(layers, x)
    if all(rows8.infers(layer, x, dtype) for layer in layers) and have_like_biases(layers):
        y = rows8.norm(layers[0], x, scale, shift, eps, None, None, dtype)[1]
    else:
        y = ops.layer_norm(x, scale, shift, eps, dtype=dtype)[1]
    qkv = packed_by_heads(attn, y, dtype)
    y = ops.relu_linear_attention([image(qkv, height, width)], qkv.shape[2] // (3 * attn.heads), EPS)
    return clipped(dropout(linear(to_out, tokens(y))), x)


def clipped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y without infinity, if x is in float16."""
    return y.clip(-LARGEST_HALF, LARGEST_HALF) if x.dtype == torch.float16 else y


def packed_by_heads(attn: nn.Module, x: torch.Tensor | rows8.Rows, dtype: torch.dtype) -> torch.Tensor:
    """Queries, keys and values [B, N, heads * 3 * D], from one product if the three layers allow it.

    x: tokens, or 8-bit rows if the layers compute in 8 bit; dtype: of the result of such layers.
    """
    layers, norms, in_8_bit = queries_of(attn), (attn.norm_q, attn.norm_k), isinstance(x, tuple)
    if norms == (None, None) and in_8_bit:
        return rows8.joined(layers, x, dtype, attn.heads)
    if norms == (None, None) and can_be_joined(layers, x):
        dtype = compute_dtype(x)
        weight, bias = operands.of_joined_layers(layers, dtype, attn.heads)
        precisions = {rows8.trains(layer, x, dtype) for layer in layers}
        return product_of(x.to(dtype), weight, bias, precisions.pop() if len(precisions) == 1 else None)
    q, k, v = (rows8.linear(layer, x, dtype) if in_8_bit else linear(layer, x) for layer in layers)
    return packed_heads(normalised(attn.norm_q, q, v.dtype), normalised(attn.norm_k, k, v.dtype), v, attn.heads)


def product_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, precision: str | None) -> torch.Tensor:
    """x weightᵀ + bias. precision: of training in 8 bit, None for that of x."""
    if precision is None:
        return ops.linear(x, weight, bias)
    return ops.linear_fp8(x, weight, bias, None, precision == rows8.EVERYTHING)


def queries_of(attn: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The layers of queries, keys and values."""
    return attn.to_q, attn.to_k, attn.to_v


def packed_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, heads * D] each, as [B, N, heads * 3 * D]."""
    return torch.stack([part.unflatten(2, (heads, -1)) for part in (q, k, v)], dim=3).flatten(2)


def text_attention(attn: nn.Module, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x + attn(x, text). text: [B, T, C]; mask: [B, 1, T], added to the scores."""
    to_out, dropout = attn.to_out
    to_q, *of_text = queries_of(attn)
    dtype = compute_dtype(text)
    if all(rows8.infers(layer, text, dtype) for layer in of_text):
        rows = ops.quantize_rows(text, dtype=rows8.type_of(of_text[0]))
        k, v = (rows8.linear(layer, rows, dtype) for layer in of_text)
    else:
        k, v = (linear(layer, text) for layer in of_text)
    q = linear(to_q, x)
    q, k = normalised(attn.norm_q, q, v.dtype), normalised(attn.norm_k, k, v.dtype)
    y = attend(q, k, v, attn.heads, None if mask is None else mask[:, None])
    if dropout.training and dropout.p:
        return dropout(linear(to_out, y)) + x
    return linear(to_out, y, residual=x)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention of q [B, N, heads * D] to k, v [B, T, heads * D]; mask: [B, 1, 1, T], added to the scores."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def feed_forward(
    ff: nn.Module, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, height: int, width: int
) -> torch.Tensor:
    """What the GLUMBConv adds to the tokens, before its gate. It reads the modulated norm of x."""
    dtype = dtype_of_branch(ff, x)
    layers = (ff.conv_inverted, ff.conv_point) if computes_tokens(ff) else ()
    if not any(rows8.precision_of(layer, x, dtype) for layer in layers):
        y = ops.layer_norm(x, scale, shift, eps, dtype=dtype)[1]
        return tokens(ff(image(y, height, width)))
    return feed_forward_in_8_bit(ff.conv_inverted, ff.conv_depth, ff.conv_point, x, scale, shift, eps, height, width)


def feed_forward_in_8_bit(
    inverted: nn.Conv2d,
    depth: nn.Conv2d,
    point: nn.Conv2d,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    height: int,
    width: int,
) -> torch.Tensor:
    """`feed_forward` by the three convolutions of a GLUMBConv, of which at least one 1×1 convolution is in 8 bit."""
    dtype, of_depth = compute_dtype(x), depth._parameters
    y = rows8.norm(inverted, x, scale, shift, eps, None, None, dtype)[1]
    y = F.silu(pointwise(inverted, y, dtype), inplace=not torch.is_grad_enabled())
    y = ops.depthwise_glu(image(y, height, width), of_depth["weight"], of_depth["bias"])
    return pointwise(point, tokens(y), dtype)


def computes_tokens(ff: nn.Module) -> bool:
    """Whether this is a fast GLUMBConv without norm and residual, whose layers may be computed without calling it."""
    return (
        isinstance(ff, GLUMBConv)
        and plain(ff, ff.conv_inverted, ff.conv_point)
        and rows8.is_product(ff.conv_inverted)
        and rows8.is_product(ff.conv_point)
        and ff.norm is None
        and not ff.residual_connection
        and is_depthwise3x3(ff.conv_depth)
        and activation_name(ff.nonlinearity) == "silu"
    )


def pointwise(conv: nn.Conv2d, x: torch.Tensor | rows8.Rows, dtype: torch.dtype) -> torch.Tensor:
    """A 1×1 convolution of tokens [B, N, C] of this dtype, in 8 bit if it computes so."""
    if isinstance(x, tuple) or rows8.infers(conv, x, dtype):
        return rows8.linear(conv, x, dtype)
    weight, bias = operands.of_layer(conv, dtype)
    return product_of(x.to(dtype), weight.flatten(1), bias, rows8.trains(conv, x, dtype))


def normalised(norm: nn.Module | None, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """norm(x) in this dtype, for the norm of queries or keys [B, N, C]; x without a norm."""
    if norm is None:
        return x.to(dtype)
    if kind(norm) != "RMSNorm" or norm.weight is None or norm.bias is not None or not plain(norm):
        return norm(x).to(dtype)
    y = ops.rms_norm(image(x, 1, x.shape[1]), norm.weight, torch.zeros_like(norm.weight), norm.eps, dtype=dtype)
    return tokens(y)


def is_linear(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the product of this layer can be computed without calling it."""
    return uvit_dit.is_linear(layer, x) and unobserved(layer)


def linear(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """layer(x) + residual. A layer with hooks, or one that is not a plain linear layer, such as LoRA's, is called."""
    if is_linear(layer, x):
        return uvit_dit.linear_of(layer, x, compute_dtype(x), residual)
    y = layer(x)
    return y if residual is None else y + residual


def can_be_joined(layers: tuple[nn.Module, ...], x: torch.Tensor) -> bool:
    """Whether one product computes these layers of x."""
    return all(is_linear(layer, x) for layer in layers) and have_like_biases(layers)


def have_like_biases(layers: tuple[nn.Module, ...]) -> bool:
    """Whether all of these linear layers have biases, or none of them."""
    return len({layer.bias is None for layer in layers}) == 1


def dtype_of_queries(layers: tuple[nn.Module, ...], x: torch.Tensor) -> torch.dtype:
    """The dtype that the norm passes to these layers of the self-attention. Layers that are called get that of x."""
    known = autocasts(x) and all(is_linear(layer, x) for layer in layers)
    return compute_dtype(x) if known else x.dtype


def dtype_of_branch(ff: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype that the norm passes to the GLUMBConv."""
    if isinstance(ff, GLUMBConv) and plain(ff):
        return compute_dtype(x)
    return torch.float32 if autocasts(x) else x.dtype


register(
    "models.transformers.sana_transformer",
    {
        "SanaModulatedNorm": SanaModulatedNorm,
        "SanaTransformer2DModel": SanaTransformer2DModel,
        "SanaTransformerBlock": SanaTransformerBlock,
    },
)
register("models.controlnets.controlnet_sana", {}, {"SanaControlNetModel": None})
