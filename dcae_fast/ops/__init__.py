"""Operators registered with torch.library: each has a reference in PyTorch, kernels for CUDA, and a gradient."""

from ._library import has_kernels, is_ordinary
from ._private import in_transform
from .batch_norm_act import batch_norm_act
from .bias_act import bias_act
from .bounded_mlp import bounded_layer_norm, bounded_linear_gelu, mlp_bounds, multiplies_within_bounds
from .concatenate import concatenate
from .conv2d import conv2d
from .conv2d_int8 import conv2d_int8, upsample_conv2d_int8
from .conv2d_unshuffle import conv2d_unshuffle
from .convolution_weights import channels_last, fold_batch_norm, subpixel_weights, transposed_weights
from .depthwise_glu import depthwise_glu, depthwise_glu_int8
from .feature_distance import feature_distance
from .gated_sum import gated_sum
from .layer_norm import layer_norm
from .linear import linear
from .linear_fp8 import linear_fp8
from .linear_rows import linear_rows
from .mlp import mlp
from .multiscale_qkv import multiscale_qkv
from .norm_attention import norm_attention
from .norm_attention_fp8 import norm_attention_fp8
from .norm_mlp import norm_mlp
from .norm_mlp_fp8 import norm_mlp_fp8
from .packed_attention import is_for_few_tokens, packed_attention
from .quantize import quantize, quantize_weight
from .quantize_rows import concatenate_rows, layer_norm_rows, quantize_rows
from .relu_linear_attention import relu_linear_attention, relu_linear_attention_int8
from .res_block import res_block
from .rms_norm import rms_norm, rms_norm_int8
from .rms_norm_conv2d import rms_norm_conv2d
from .shuffle import (
    duplicate_shuffle_add,
    duplicate_shuffle_add_int8,
    unshuffle_average_add,
    unshuffle_average_add_int8,
)
from .upsample_conv2d import upsample_conv2d

__all__ = [
    "batch_norm_act",
    "bias_act",
    "bounded_layer_norm",
    "bounded_linear_gelu",
    "channels_last",
    "concatenate",
    "concatenate_rows",
    "conv2d",
    "conv2d_int8",
    "conv2d_unshuffle",
    "depthwise_glu",
    "depthwise_glu_int8",
    "duplicate_shuffle_add",
    "duplicate_shuffle_add_int8",
    "feature_distance",
    "fold_batch_norm",
    "gated_sum",
    "has_kernels",
    "in_transform",
    "is_for_few_tokens",
    "is_ordinary",
    "layer_norm",
    "layer_norm_rows",
    "linear",
    "linear_rows",
    "linear_fp8",
    "mlp",
    "mlp_bounds",
    "multiplies_within_bounds",
    "multiscale_qkv",
    "norm_attention",
    "norm_attention_fp8",
    "norm_mlp",
    "norm_mlp_fp8",
    "packed_attention",
    "quantize",
    "quantize_rows",
    "quantize_weight",
    "relu_linear_attention",
    "relu_linear_attention_int8",
    "res_block",
    "rms_norm",
    "rms_norm_conv2d",
    "rms_norm_int8",
    "subpixel_weights",
    "transposed_weights",
    "unshuffle_average_add",
    "unshuffle_average_add_int8",
    "upsample_conv2d",
    "upsample_conv2d_int8",
]
