"""SANA's diffusion transformer as NVlabs/Sana has it: the blocks SanaMSBlock and the last layer of SanaMS.

They compute what the blocks of diffusers do (sana.py), with other modules: LiteLA is the linear attention on one packed
projection, whose epsilon is 1e-8, and GLUMBConv takes tokens. The network keeps its own forward, of which whole calls
are captured as CUDA graphs.
"""

import functools
import inspect
import sys

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._private import unobserved

from .. import operands, rows8
from ..call import Network
from ..fusion import autocasts, compute_dtype, conv_norm_act, is_depthwise3x3
from ..module import FastModule, kind, original_class
from ..registry import register
from .sana import (
    attend,
    clipped,
    dtype_of_queries,
    feed_forward_in_8_bit,
    image,
    is_linear,
    linear,
    modulation,
    packed_heads,
    product_of,
    tokens,
)
from .uvit_dit import input_dtype

CROSS_ATTENTION = ("MultiHeadCrossAttention", "MultiHeadCrossVallinaAttention")  # the second in float32


class SanaMS(Network):
    """The network, also with the few steps of Sprint (SanaMSCM). Only calls for a prediction, by the usual arguments,
    are captured.
    """

    only_for_graphs = True
    attributes = ("x_embedder", "t_embedder", "t_block", "y_embedder", "blocks", "final_layer")
    optional = ("cfg_embedder", "attention_y_norm", "logvar_linear")
    written = ("h", "w")

    @staticmethod
    def reason_not_fast(network: nn.Module) -> str:
        if getattr(network, "use_pe", False):
            return "not captured as CUDA graphs: it makes positions on the CPU, for one size at a time"
        if getattr(sys.modules.get(original_class(network).__module__), "_xformers_available", False):
            return "not captured as CUDA graphs: for xformers it reads the lengths of texts on the CPU"
        return ""

    def dispatch(self, *args, **kwargs):
        """All arguments by position, as graphs expect them. The network reads cfg_scale only if it embeds the scale."""
        given = dict(zip(_parameters(original_class(self)), args, strict=False)) | kwargs
        known = given.keys() <= {*INPUTS, "mask", "data_info", *OPTIONS} and given.keys() >= {*INPUTS}
        if not known or any(given.get(name) for name in OPTIONS):
            return super().eager(*args, **kwargs)
        scale, info = None, given.get("data_info")
        if self._modules.get("cfg_embedder") is not None:
            if not isinstance(info, dict) or "cfg_scale" not in info:
                return super().eager(*args, **kwargs)
            scale = info["cfg_scale"]
        return super().dispatch(*(given[name] for name in INPUTS), given.get("mask"), scale)

    def eager(self, x, timestep, y, mask, scale):
        info = None if scale is None else {"cfg_scale": scale}
        return super().eager(x, timestep, y, data_info=info, mask=mask)


INPUTS = ("x", "timestep", "y")
OPTIONS = ("return_logvar", "jvp")


@functools.cache
def _parameters(network: type[nn.Module]) -> list[str]:
    """The names of the parameters of a network's forward, which differ between versions."""
    return list(inspect.signature(network.forward).parameters)[1:]


class SanaMSBlock(FastModule):
    dims = 3
    operators = ("depthwise_glu", "gated_sum", "layer_norm", "linear", "relu_linear_attention")
    attributes = ("norm1", "attn", "cross_attn", "norm2", "mlp", "drop_path", "scale_shift_table")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        modules = block._modules
        for name, known in {"attn": ("LiteLA",), "cross_attn": CROSS_ATTENTION, "mlp": ("GLUMBConv",)}.items():
            part = modules.get(name)
            if part is None or kind(part) not in known:
                return f"{name} is {type(part).__name__}"
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
        x = x.contiguous()
        x = ops.gated_sum(x, gate1, linear_attention(attn, x, scale1, shift1, norm1.eps, *size))
        x = text_attention(cross, x, text, mask)
        return ops.gated_sum(x, gate2, feed_forward(mlp, x, scale2, shift2, norm2.eps, *size))

    def rows8_layers(self) -> tuple[nn.Module | None, ...]:
        attn, cross, mlp = map(self._modules.get, ("attn", "cross_attn", "mlp"))
        convolutions = mlp.inverted_conv.conv, mlp.point_conv.conv
        return attn.qkv, attn.proj, cross.q_linear, cross.kv_linear, cross.proj, *convolutions

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
        known = not self.reason_not_fast(self) and unobserved(self.norm_final)
        if not known or time.dim() != 2 or not (x.dtype == time.dtype or autocasts(x)):  # videos have a time per frame
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


def linear_attention(
    attn: nn.Module, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, height: int, width: int
) -> torch.Tensor:
    """What LiteLA adds to the tokens, before its gate. It reads the modulated norm of x."""
    dtype = dtype_of_queries((attn.qkv,), x)
    y = rows8.norm(attn.qkv, x, scale, shift, eps, None, None, dtype)[1]
    y = ops.relu_linear_attention([image(packed_by_heads(attn, y, dtype), height, width)], attn.dim, attn.eps)
    return clipped(linear(attn.proj, tokens(y)), x)


def packed_by_heads(attn: nn.Module, x: torch.Tensor | rows8.Rows, dtype: torch.dtype) -> torch.Tensor:
    """Queries, keys and values [B, N, heads * 3 * D], from one product in their order if they have no norms.

    x: tokens of this dtype, or 8-bit rows if the projection computes in 8 bit.
    """
    layer, norms, in_8_bit = attn.qkv, (attn.q_norm, attn.k_norm), isinstance(x, tuple)
    if all(type(norm) is nn.Identity for norm in norms) and unobserved(*norms):
        if in_8_bit:
            weight, scales, bias = operands.of_packed_rows8(layer, x[0].dtype, dtype, 3, attn.heads)
            return ops.linear_rows(*x, weight, scales, bias, None, dtype)
        if is_linear(layer, x):
            packed = operands.of_packed_layer(layer, compute_dtype(x), 3, attn.heads)
            return product_of(x.to(compute_dtype(x)), *packed, rows8.trains(layer, x, compute_dtype(x)))
    q, k, v = (rows8.linear(layer, x, dtype) if in_8_bit else linear(layer, x)).chunk(3, dim=2)
    return packed_heads(attn.q_norm(q), attn.k_norm(k), v, attn.heads)


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


def feed_forward(
    mlp: nn.Module, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, height: int, width: int
) -> torch.Tensor:
    """What the GLUMBConv adds to the tokens, before its gate, without copies between tokens and images. It reads the
    modulated norm of x.
    """
    inverted, depth, point = (mlp._modules[name].conv for name in ("inverted_conv", "depth_conv", "point_conv"))
    dtype, products = compute_dtype(x), (inverted, point)
    if all(map(rows8.is_product, products)) and any(rows8.precision_of(each, x, dtype) for each in products):
        return feed_forward_in_8_bit(inverted, depth, point, x, scale, shift, eps, height, width)
    y = ops.layer_norm(x, scale, shift, eps, dtype=dtype)[1]
    y = conv_norm_act(inverted, None, "silu", image(y, height, width))
    return tokens(conv_norm_act(point, None, "none", ops.depthwise_glu(y, depth.weight, depth.bias)))


register("nets.sana_multi_scale", {"SanaMS": SanaMS, "SanaMSBlock": SanaMSBlock, "SanaMSCM": SanaMS})
register("nets.sana_blocks", {"T2IFinalLayer": T2IFinalLayer})
register("nets.sana_multi_scale_controlnet", {}, {"SanaMSControlNet": None})
register("nets.basic_modules", {}, {"ConvLayer": None, "GLUMBConv": None})
