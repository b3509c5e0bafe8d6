"""SANA's diffusion transformer as NVlabs/Sana has it: the blocks SanaMSBlock and the last layer of SanaMS.

They compute what the blocks of diffusers do (sana.py), with other modules: LiteLA is the linear attention on one packed
projection, whose epsilon is 1e-8, and GLUMBConv takes tokens. The network itself keeps its own forward.
"""

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._private import unobserved

from .. import operands
from ..fusion import autocasts, compute_dtype, conv_norm_act, is_depthwise3x3
from ..module import FastModule, kind
from ..registry import register
from .sana import (
    attend,
    clipped,
    dtype_of_queries,
    image,
    is_linear,
    linear,
    modulation,
    packed_heads,
    tokens,
)
from .uvit_dit import input_dtype


class SanaMSBlock(FastModule):
    dims = 3
    operators = ("depthwise_glu", "gated_sum", "layer_norm", "linear", "relu_linear_attention")
    attributes = ("norm1", "attn", "cross_attn", "norm2", "mlp", "drop_path", "scale_shift_table")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        modules = block._modules
        for name, known in {"attn": "LiteLA", "cross_attn": "MultiHeadCrossAttention", "mlp": "GLUMBConv"}.items():
            if kind(modules[name]) != known:
                return f"{name} is {type(modules[name]).__name__}"
        if type(modules["drop_path"]) is not nn.Identity:
            return "it drops paths"
        if not all(type(norm) is nn.LayerNorm and not norm.elementwise_affine for norm in (block.norm1, block.norm2)):
            return "a norm is not a LayerNorm without weights"
        return unknown_feed_forward(modules["mlp"])

    def dispatch(self, *args, use_reentrant: bool = False, **kwargs):
        """SanaMS also passes an argument of checkpoint, which the block ignores."""
        return super().dispatch(*args, **kwargs)

    def fast_forward(self, x, text, time, mask=None, size=None, rotary=None):
        if not self.fuses(x, time, size, rotary):
            return self.eager(x, text, time, mask, size, rotary)
        norm1, attn, cross, norm2, mlp = map(self._modules.get, ("norm1", "attn", "cross_attn", "norm2", "mlp"))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.scale_shift_table, time)
        x, y = ops.layer_norm(x.contiguous(), scale1, shift1, norm1.eps, dtype=dtype_of_queries((attn.qkv,), x))
        x = ops.gated_sum(x, gate1, linear_attention(attn, y, *size))
        x = text_attention(cross, x, text, mask)
        x, y = ops.layer_norm(x, scale2, shift2, norm2.eps, dtype=compute_dtype(x))
        return ops.gated_sum(x, gate2, feed_forward(mlp, y, *size))

    def fuses(self, x, time, size, rotary) -> bool:
        """Whether the block may compute its submodules without calling them, and these inputs have the usual form."""
        if rotary is not None or size is None or len(size) != 2 or self.reason_not_fast(self):
            return False
        attn, cross, mlp = map(self._modules.get, ("attn", "cross_attn", "mlp"))
        inner = (*mlp._modules.values(), *(layer for conv in mlp._modules.values() for layer in conv._modules.values()))
        known = unobserved(self.norm1, self.norm2, self.drop_path, attn, attn.kernel_func, cross, mlp, *inner)
        return known and (x.dtype == time.dtype == self.scale_shift_table.dtype or autocasts(x))


class T2IFinalLayer(FastModule):
    """The last norm with its modulation by the time in one pass, and the last linear layer."""

    dims = 3
    operators = ("layer_norm", "linear")
    attributes = ("norm_final", "linear", "scale_shift_table")

    @staticmethod
    def reason_not_fast(layer: nn.Module) -> str:
        known = type(layer.norm_final) is nn.LayerNorm and not layer.norm_final.elementwise_affine
        return "" if known else "its norm is not a LayerNorm without weights"

    def fast_forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        if self.reason_not_fast(self) or not unobserved(self.norm_final) or not (x.dtype == time.dtype or autocasts(x)):
            return self.eager(x, time)
        shift, scale = modulation(self.scale_shift_table, time)
        y = ops.layer_norm(x.contiguous(), scale, shift, self.norm_final.eps, dtype=input_dtype(self.linear, x))[1]
        return linear(self.linear, y)


def unknown_feed_forward(mlp: nn.Module) -> str:
    """How a GLUMBConv differs from SANA's; empty if it does not."""
    layers = [mlp._modules[name] for name in ("inverted_conv", "depth_conv", "point_conv")]
    acts = *(layer._modules.get("act") for layer in layers), mlp._modules["glu_act"]
    if [type(act) for act in acts] != [nn.SiLU, type(None), type(None), nn.SiLU]:
        return "mlp has other activations"
    if any(layer._modules.get("norm") is not None or getattr(layer, "dropout", None) is not None for layer in layers):
        return "mlp has norms or dropout"
    return "" if is_depthwise3x3(layers[1].conv) else "mlp has another depthwise convolution"


def linear_attention(attn: nn.Module, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What LiteLA adds to the tokens, before its gate."""
    q_norm, k_norm = attn.q_norm, attn.k_norm
    if type(q_norm) is type(k_norm) is nn.Identity and unobserved(q_norm, k_norm) and is_linear(attn.qkv, x):
        dtype = compute_dtype(x)
        qkv = ops.linear(x.to(dtype), *operands.of_packed_layer(attn.qkv, dtype, 3, attn.heads))
    else:
        q, k, v = linear(attn.qkv, x).chunk(3, dim=2)
        qkv = packed_heads(q_norm(q), k_norm(k), v, attn.heads)
    y = ops.relu_linear_attention([image(qkv, height, width)], attn.dim, attn.eps)
    return clipped(linear(attn.proj, tokens(y)), x)


def text_attention(attn: nn.Module, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x + attn(x, text, mask). text: [B, 1, T, C]; mask: [B, T], 1 for tokens and 0 for padding.

    Where xformers is installed, texts are packed one behind the other, and the mask is the list of their lengths: the
    module itself attends to them.
    """
    proj, drop = attn._modules["proj"], attn._modules["proj_drop"]
    is_padded = text.shape[0] == x.shape[0] and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2))
    if not is_padded or (drop.training and drop.p):
        return x + attn(x, text, mask)
    q, kv = linear(attn.q_linear, x), linear(attn.kv_linear, text.flatten(1, -2))
    k, v = kv.chunk(2, dim=2)
    added = None if mask is None else ((1 - mask.to(q.dtype)) * -10000.0)[:, None, None]
    return linear(proj, attend(attn.q_norm(q), attn.k_norm(k), v, attn.num_heads, added), residual=x)


def feed_forward(mlp: nn.Module, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """mlp(x) of tokens, without copies between tokens and images."""
    inverted, depth, point = (mlp._modules[name].conv for name in ("inverted_conv", "depth_conv", "point_conv"))
    y = conv_norm_act(inverted, None, "silu", image(x, height, width))
    return tokens(conv_norm_act(point, None, "none", ops.depthwise_glu(y, depth.weight, depth.bias)))


register("nets.sana_multi_scale", {"SanaMSBlock": SanaMSBlock}, {"SanaMS": None})
register("nets.sana_blocks", {"T2IFinalLayer": T2IFinalLayer})
register("nets.basic_modules", {}, {"ConvLayer": None, "GLUMBConv": None})
