"""Benchmarks each operator at shapes of the released models; the floor follows from its memory traffic and FLOPs."""

from collections.abc import Callable, Iterator

import torch

from .autoencoder import relative_error
from .ceilings import Ceilings
from .operator_cases import Case, Shape, case
from .timing import graphed, measure

CALLS = 10  # per captured graph
MAX_ERROR = 1e-2  # relative L2 error of bf16 against fp32; an operator with a larger error is wrong and not timed

# Name, and (B, C, H, W) of the main input, which does not fit in the L2 cache. For transformer layers, B·H·W tokens.
SHAPES: list[tuple[str, Shape]] = [
    ("conv3x3 + bias + silu", (8, 256, 256, 256)),
    ("conv3x3 + bias + silu", (8, 512, 128, 128)),
    ("conv3x3 + bias + silu", (1, 512, 128, 128)),
    ("conv3x3 + bias + residual", (8, 256, 256, 256)),
    ("conv3x3 + bias + residual", (8, 512, 128, 128)),
    ("int8 conv3x3 + bias + silu", (8, 256, 256, 256)),
    ("int8 conv3x3 + bias + silu", (8, 512, 128, 128)),
    ("int8 conv3x3 + bias + silu", (8, 1024, 64, 64)),
    ("int8 conv3x3 + bias + silu", (32, 128, 256, 256)),
    ("int8 conv3x3 + bias + silu", (1, 256, 256, 256)),
    ("int8 conv3x3 + bias + silu", (1, 512, 128, 128)),
    ("int8 conv3x3 + bias + residual", (8, 512, 128, 128)),
    ("int8 conv1x1 to 8C + bias + silu", (8, 512, 64, 64)),
    ("int8 conv1x1 to 8C + bias + silu", (8, 1024, 32, 32)),
    ("int8 upsample_conv2d", (8, 512, 128, 128)),
    ("upsample_conv2d", (8, 512, 128, 128)),
    ("conv2d_unshuffle", (8, 3, 512, 512)),
    ("rms_norm_conv2d", (8, 256, 256, 256)),
    ("rms_norm", (8, 256, 256, 256)),
    ("rms_norm", (8, 512, 128, 128)),
    ("rms_norm", (32, 1024, 32, 32)),
    ("quantize", (8, 256, 256, 256)),
    ("int8 rms_norm", (8, 512, 128, 128)),
    ("int8 relu_linear_attention", (8, 1536, 64, 64)),
    ("int8 depthwise_glu", (8, 4096, 64, 64)),
    ("int8 unshuffle_average_add", (8, 256, 256, 256)),
    ("int8 duplicate_shuffle_add", (8, 512, 128, 128)),
    ("bias_act", (8, 256, 256, 256)),
    ("bias_act", (8, 4096, 64, 64)),
    ("bias_act gradient", (16, 256, 128, 128)),
    ("batch_norm_act + residual", (16, 256, 128, 128)),
    ("batch_norm_act gradient", (16, 256, 128, 128)),
    ("feature_distance", (16, 64, 256, 256)),
    ("feature_distance gradient", (16, 64, 256, 256)),
    ("relu_linear_attention", (8, 1536, 64, 64)),
    ("relu_linear_attention", (32, 3072, 32, 32)),
    ("multiscale_qkv", (8, 1536, 64, 64)),
    ("multiscale_qkv", (8, 3072, 32, 32)),
    ("multiscale_qkv", (8, 3072, 16, 16)),
    ("multiscale_qkv gradient", (16, 1536, 32, 32)),
    ("depthwise_glu", (8, 4096, 64, 64)),
    ("depthwise_glu", (8, 8192, 32, 32)),
    ("unshuffle_average_add", (8, 256, 256, 256)),
    ("duplicate_shuffle_add", (8, 512, 128, 128)),
    ("linear to q, k, v", (128, 1152, 32, 32)),
    ("linear + residual", (128, 1152, 32, 32)),
    ("linear to 4C + gelu", (128, 1152, 32, 32)),
    ("linear from 4C + residual", (128, 4608, 32, 32)),
    ("mlp + residual", (128, 1152, 32, 32)),
    ("concatenate", (2048, 1152, 66, 1)),
    ("layer_norm gradient", (2048, 1152, 66, 1)),
    ("gated_sum", (8, 2240, 64, 64)),
    *[
        (name, shape)  # H = tokens: UViT-H and DiT-XL on f64 and f32 latents
        for name in ("packed_attention", "packed_attention + gradient")
        for shape in [(2048, 3456, 66, 1), (2048, 3456, 64, 1), (512, 3456, 258, 1), (512, 3456, 256, 1)]
    ],
]


def shapes(device: torch.device) -> list[tuple[str, Shape]]:
    """`SHAPES`; on a CPU, smaller images for a rehearsal."""
    if device.type == "cuda":
        return SHAPES
    return [(name, (1, c, max(h // 32, 4), max(w // 32, 4))) for name, (_, c, h, w) in SHAPES]


@torch.no_grad()
def error_of(case: Case) -> float:
    """The relative L2 error of the operator against its reference in fp32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return relative_error(case.op(*case.tensors), case.reference(*[tensor.float() for tensor in case.tensors]))


def repeated(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Callable[[], object]:
    """A function that makes `CALLS` calls, without launch overhead."""
    return graphed(torch.inference_mode()(lambda: function(*tensors)), CALLS)


def benchmark(device: torch.device, ceilings: Ceilings, only: Callable[[str], bool]) -> Iterator[dict]:
    """Yields a record with error, ms, eager_ms and floor_ms for each operator and shape whose name `only` accepts."""
    for name, shape in shapes(device):
        if not only(name):
            continue
        this = case(name, shape, device)
        moved = sum(tensor.nbytes for tensor in (*this.tensors, this.op(*this.tensors)))
        record = {"operator": name, "shape": shape, "bytes": moved, "flops": this.flops, "error": error_of(this)}
        if record["error"] <= MAX_ERROR:
            runs = {"ours": repeated(this.op, this.tensors), "eager": repeated(this.reference, this.tensors)}
            times = measure(runs, seconds=0.05)
            record |= {"ms": times["ours"].median / CALLS, "eager_ms": times["eager"].median / CALLS}
            record["floor_ms"] = ceilings.floor(this.flops / this.peak, moved)
        yield record
