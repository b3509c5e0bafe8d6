"""Compile every Triton kernel for sm_90, without a GPU, as its launcher would; print name, registers and stack bytes.

The launchers run on CPU tensors of real channel counts, with JITFunction.run replaced by a compilation.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from dcae_fast.kernels import common
from dcae_fast.kernels.launch import OPTIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

FLOATS = torch.float32, torch.bfloat16, torch.float16
NAME = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8"}
NAME |= {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.int32: "i32"}
SHARED_MEMORY = 227 * 1024  # bytes that a program can have
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(kernel, args, named):
    """What Triton compiles for a launch with these arguments, and its options."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    assert [*named] == kernel.arg_names[len(args) :], f"{kernel.__name__}: constants in another order"
    bound = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{NAME[value.base.dtype]}{value.block_shape}>"
        else:
            signature[parameter.name] = f"*{NAME[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, hints), options


def compile_instead(kernel, *args, grid, warmup, **named):
    code, options = source(kernel, args, named)
    compiled = triton.compile(code, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY, f"{kernel.__name__}: {compiled.metadata.shared} bytes of shared"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    print(kernel.__name__, registers, stack, flush=True)


def main():
    from dcae_fast.kernels.batch_norm_act import launch_batch_norm_act, launch_batch_norm_act_backward
    from dcae_fast.kernels.bias_act import launch_bias_act, launch_bias_act_backward, launch_fold_batch_norm
    from dcae_fast.kernels.concatenate import launch_concatenate, launch_concatenate_backward
    from dcae_fast.kernels.conv2d import launch_conv2d, launch_conv2d_unshuffle
    from dcae_fast.kernels.conv2d_int8 import launch_conv2d_int8, tiles_of
    from dcae_fast.kernels.depthwise_glu import launch_depthwise_glu, launch_depthwise_glu_backward
    from dcae_fast.kernels.duplicate_shuffle_add import launch_duplicate_shuffle_add, launch_duplicate_shuffle_add_int8
    from dcae_fast.kernels.feature_distance import launch_feature_distance, launch_feature_distance_backward
    from dcae_fast.kernels.flip_weight import launch_flip_weight
    from dcae_fast.kernels.gated_sum import launch_gated_sum, launch_gated_sum_backward
    from dcae_fast.kernels.gelu_backward import launch_gelu_backward
    from dcae_fast.kernels.gelu_backward_rows import launch_gelu_backward_rows
    from dcae_fast.kernels.gradient_rows import launch_gradient_rows
    from dcae_fast.kernels.layer_norm import launch_layer_norm, launch_layer_norm_backward
    from dcae_fast.kernels.layer_norm_rows import (
        launch_bounded_layer_norm,
        launch_layer_norm_and_rows,
        launch_layer_norm_rows,
    )
    from dcae_fast.kernels.linear_rows import TILES, launch_linear_rows
    from dcae_fast.kernels.multiscale_qkv import launch_multiscale_qkv, launch_multiscale_qkv_backward
    from dcae_fast.kernels.quantize import launch_quantize
    from dcae_fast.kernels.quantize_columns import launch_quantize_columns, launch_transpose_rows
    from dcae_fast.kernels.quantize_rows import launch_concatenate_rows, launch_quantize_rows
    from dcae_fast.kernels.relu_linear_attention import (
        launch_relu_linear_attention,
        launch_relu_linear_attention_backward,
    )
    from dcae_fast.kernels.rms_norm import launch_rms_norm_backward, launch_rms_norm_int8
    from dcae_fast.kernels.rms_norm_conv2d import launch_rms_norm_conv2d
    from dcae_fast.kernels.sum_to_channels import launch_sum_to_channels
    from dcae_fast.kernels.unshuffle_average_add import launch_unshuffle_average_add_int8
    from dcae_fast.kernels.upsample_conv2d import (
        launch_subpixel_weights,
        launch_transposed_weights,
        launch_transposed_weights_backward,
    )
    from dcae_fast.kernels.weight_layout import launch_weight_layout

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype)

    JITFunction.run = compile_instead
    common.chips = lambda x: (common.ADA._replace(shared_memory=SHARED_MEMORY),)
    for channels in (128, 256, 512, 1024, 2048):
        x, c = tensor(2, channels, 8, 8), tensor(channels)
        launch_rms_norm_int8(x, c, c, 1e-5, "none", x, x.dtype, c.float())
        launch_rms_norm_backward(x, x, c, c, 1e-5, "none")
        launch_feature_distance(x, x, c, 1e-8)
        launch_feature_distance_backward(torch.empty(()), x, x, c, 1e-8)
    for channels in (256, 8192):
        x, c = tensor(2, channels, 8, 8), tensor(channels)
        launch_bias_act(x, c, "silu", None, None, None, 0.0, None, x.dtype)
        launch_bias_act(x, c, "none", c, c, c, 1e-5, x, x.dtype)
        launch_bias_act_backward(x, x, c, "silu", c, c, c, 1e-5)
        launch_batch_norm_act(x, c, c, 1e-5, "relu", x, x.dtype)
        launch_batch_norm_act_backward(x, x, c, c, c.float(), c.float(), 1e-5, "silu")
        launch_sum_to_channels(x, torch.float32)
        launch_fold_batch_norm(tensor(channels, 64, 3, 3), c, c, c, c, 1e-5, torch.bfloat16)
    for dtype in FLOATS:
        qkv, dout = tensor(2, 1536, 16, 16, dtype=dtype), tensor(2, 512, 16, 16, dtype=dtype)
        launch_relu_linear_attention([qkv], 32, 1e-15)
        launch_relu_linear_attention_backward(dout, [qkv], 32, 1e-15)
        weights = tensor(1536, 1, 5, 5, dtype=dtype), tensor(1536, 32, 1, 1, dtype=dtype)
        launch_multiscale_qkv(qkv, *weights)
        launch_multiscale_qkv_backward(qkv, qkv, *weights, True)
        launch_multiscale_qkv_backward(qkv, qkv, tensor(1536, 1, 5, 5), tensor(1536, 32, 1, 1), False)
        x, weight, bias = tensor(2, 256, 16, 16, dtype=dtype), tensor(256, 1, 3, 3), tensor(256)
        launch_depthwise_glu(x, weight, bias)
        launch_depthwise_glu_backward(x[:, :128], x, weight, bias, True)
    for dtype in FLOATS:
        x, weight, bias = tensor(2, 3, 64, 64, dtype=dtype), tensor(128, 3, 3, 3, dtype=dtype), tensor(128, dtype=dtype)
        launch_conv2d(x, weight, bias, "none", 1, (1, 1, 1, 1))
        launch_conv2d(x, weight, None, "silu", 2, (1, 1, 1, 1))
        launch_conv2d_unshuffle(x, weight[:64], bias[:64])
    for channels, filters, dtype in (
        (128, 3, torch.bfloat16),
        (256, 3, torch.float16),
        (256, 12, torch.bfloat16),
        (1024, 16, torch.bfloat16),
        (1024, 16, torch.float16),
    ):
        x, weight = tensor(2, channels, 64, 64, dtype=dtype), tensor(filters, channels, 3, 3, dtype=dtype)
        launch_rms_norm_conv2d(x, tensor(channels), tensor(channels), 1e-5, "silu", weight, tensor(filters))
    x, k, residual = tensor(2, 512, 64, 64, dtype=torch.int8), tensor(512, dtype=torch.float32), tensor(2, 512, 64, 64)
    for tile in tiles_of(tensor(512, 512, 3, 3)):  # with the epilogue that takes the most registers
        weight = tensor(512, 512, 3, 3, dtype=torch.int8)
        launch_conv2d_int8(x, weight, k, k, "silu", residual, torch.bfloat16, k, tile)
    for weight in (tensor(512, 512, 1, 1, dtype=torch.int8), tensor(2048, 512, 2, 2, dtype=torch.int8)):
        launch_conv2d_int8(x, weight, k, None, "none", None, torch.bfloat16, None, tiles_of(weight)[0])
    launch_quantize(residual, k)
    for width, dtype in ((512, torch.bfloat16), (1152, torch.float32), (2048, torch.float16)):
        x, d, of_image = tensor(2, 66, width, dtype=dtype), tensor(width), tensor(2, width)
        half = torch.bfloat16 if dtype == torch.float32 else dtype
        y = tensor(2, 66, width, dtype=half)
        launch_layer_norm(x, d, d, 1e-5, None, None, half)
        launch_layer_norm(x, of_image, of_image, 1e-6, y, of_image, half)
        launch_layer_norm_backward(y, x, x, d, None, None, 1e-5, dtype)
        launch_layer_norm_backward(y, x, x, of_image, y, of_image, 1e-6, dtype)
        launch_gated_sum(x, of_image, y)
        launch_gated_sum_backward(x, of_image, y)
        launch_concatenate(x, x, half)
        launch_concatenate_backward(y, dtype, dtype)
        for act in ("gelu", "gelu_tanh"):
            launch_gelu_backward(y.flatten(0, 1), y.flatten(0, 1), act, True)
        launch_layer_norm_rows(x, d, d, 1e-5, None, None, torch.float8_e4m3fn)
        launch_layer_norm_rows(x, of_image, of_image, 1e-6, y, of_image, torch.float8_e4m3fn)
        launch_bounded_layer_norm(x, d, d, 1e-5, tensor(1, dtype=torch.float32))
        launch_concatenate_rows(x, x, torch.float8_e4m3fn)
        launch_quantize_rows(x, "none", torch.float8_e5m2)
        launch_quantize_rows(tensor(2, 66, 4 * width, dtype=dtype), "gelu", torch.float8_e4m3fn)
        h, wide = tensor(66, 4 * width, dtype=half), tensor(66, 11200, dtype=half)
        for act, everything in (("gelu", False), ("gelu_tanh", True)):
            launch_gelu_backward_rows(h, h, act, torch.float8_e4m3fn, everything, True)
            launch_gelu_backward_rows(wide, wide, act, torch.float8_e4m3fn, everything, True)
        launch_gradient_rows(x, half, torch.float8_e4m3fn, True, False)
        launch_gradient_rows(h, half, torch.float8_e4m3fn, False, True)
        launch_gradient_rows(tensor(66, 11200, dtype=dtype), half, torch.float8_e4m3fn, True, True)
        launch_layer_norm_and_rows(x, d, d, 1e-5, None, None, half, torch.float8_e4m3fn)
        launch_layer_norm_and_rows(x, of_image, of_image, 1e-6, y, of_image, half, torch.float8_e4m3fn)
        launch_quantize_columns(tensor(4 * width, width, dtype=dtype), torch.float8_e4m3fn)
        launch_transpose_rows(tensor(66, width, dtype=torch.float8_e5m2), tensor(66, 1, dtype=torch.float32))
    launch_layer_norm_rows(x, of_image, of_image, 1e-6, y, of_image, torch.int8)
    launch_concatenate_rows(x, x, torch.int8)
    launch_quantize_rows(tensor(2, 66, 4 * width, dtype=dtype), "gelu", torch.int8)
    x, weight, scale = tensor(2, 66, 1152, dtype=torch.int8), tensor(512, 1152, dtype=torch.int8), torch.empty(512, 1)
    for tile in TILES:  # with the epilogue that takes the most registers
        launch_linear_rows(x, scale[:132], weight, scale, scale, tensor(2, 66, 512), torch.bfloat16, tile)
    launch_linear_rows(x, scale[:132], weight, scale, None, None, torch.float32, TILES[0])
    launch_unshuffle_average_add_int8(tensor(2, 256, 64, 64), tensor(2, 128, 64, 64), tensor(128), 512, 2, 0.5, k)
    launch_duplicate_shuffle_add(tensor(2, 512, 32, 32), tensor(2, 1024, 32, 32), tensor(1024), 256, 2, 1.0)
    launch_duplicate_shuffle_add_int8(tensor(2, 512, 32, 32), tensor(8, 256, 32, 32), tensor(256), 256, 2, 1.0, k[:256])
    launch_subpixel_weights(tensor(256, 512, 3, 3, dtype=torch.float32), torch.bfloat16)
    launch_transposed_weights(tensor(256, 512, 3, 3, dtype=torch.float32), torch.bfloat16)
    launch_transposed_weights_backward(tensor(512, 256, 4, 4), torch.float32)
    launch_weight_layout(tensor(256, 512, 3, 3))
    for dtype in FLOATS:
        launch_flip_weight(tensor(256, 512, 3, 3, dtype=dtype), torch.bfloat16)


if __name__ == "__main__":
    main()
