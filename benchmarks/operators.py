"""Each operator at shapes of the released models: GB/s of the bytes it must move, against its plain PyTorch form."""

from collections.abc import Callable, Iterator

import torch

from dcae_fast import ops
from dcae_fast.ops.bias_act import bias_act_reference
from dcae_fast.ops.depthwise_glu import depthwise_glu_reference
from dcae_fast.ops.relu_linear_attention import relu_linear_attention_reference
from dcae_fast.ops.rms_norm import rms_norm_reference
from dcae_fast.ops.shuffle import duplicate_shuffle_add_reference, unshuffle_average_add_reference

from .ceilings import Ceilings
from .timing import graphed, measure

CALLS = 10  # in one captured graph

# name, (B, C, H, W) of the main input; large enough not to stay in the cache
SHAPES = [
    ("rms_norm", (8, 256, 256, 256)),
    ("rms_norm", (8, 512, 128, 128)),
    ("rms_norm", (32, 1024, 32, 32)),
    ("bias_act", (8, 256, 256, 256)),
    ("bias_act", (8, 4096, 64, 64)),
    ("relu_linear_attention", (8, 1536, 64, 64)),
    ("relu_linear_attention", (32, 3072, 32, 32)),
    ("depthwise_glu", (8, 4096, 64, 64)),
    ("depthwise_glu", (8, 8192, 32, 32)),
    ("unshuffle_average_add", (8, 256, 256, 256)),
    ("duplicate_shuffle_add", (8, 512, 128, 128)),
]


def case(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
    """(operator, reference, tensors): the first two take the tensors."""

    def random(*size: int) -> torch.Tensor:
        x = torch.randn(size, device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 else x

    batch, c, h, w = shape
    x = random(*shape)
    if name == "rms_norm":
        return (
            lambda x, w, b, r: ops.rms_norm(x, w, b, residual=r),
            lambda x, w, b, r: rms_norm_reference(x, w, b, 1e-5, "none", r, dtype),
            [x, random(c), random(c), random(*shape)],
        )
    if name == "bias_act":
        reference = lambda x, b: bias_act_reference(x, b, "silu", None, None, None, 0.0, None, dtype)  # noqa: E731
        return lambda x, b: ops.bias_act(x, b, "silu"), reference, [x, random(c)]
    if name == "relu_linear_attention":
        reference = lambda x: relu_linear_attention_reference([x], 32, 1e-15)  # noqa: E731
        return lambda x: ops.relu_linear_attention([x]), reference, [x]
    if name == "depthwise_glu":
        return ops.depthwise_glu, depthwise_glu_reference, [x, random(c, 1, 3, 3), random(c)]
    if name == "unshuffle_average_add":
        reference = lambda x, m, b: unshuffle_average_add_reference(x, m, b, 2 * c, 2, 0.5)  # noqa: E731
        return ops.unshuffle_average_add, reference, [x, random(batch, c // 2, h, w), random(c // 2)]
    reference = lambda x, m, b: duplicate_shuffle_add_reference(x, m, b, c // 2, 2, 1.0)  # noqa: E731
    return ops.duplicate_shuffle_add, reference, [x, random(batch, 2 * c, h, w), random(2 * c)]


def inference(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return torch.inference_mode()(run)


def benchmark(device: torch.device, ceilings: Ceilings, shrink: int = 1) -> Iterator[dict]:
    """One row for each operator and shape. shrink: divides the sides, for a rehearsal on a CPU."""
    for name, (batch, c, h, w) in SHAPES:
        op, reference, tensors = case(name, (batch, c, h // shrink, w // shrink), device, torch.bfloat16)
        out = op(*tensors)
        exact = reference(*[tensor.float() for tensor in tensors])
        error = ((out.float() - exact).norm() / exact.norm()).item()
        moved = sum(tensor.nbytes for tensor in (*tensors, out))
        row = {"operator": name, "shape": [batch, c, h // shrink, w // shrink], "error": error, "bytes": moved}
        if error < 1e-2:
            runs = {
                "ours": graphed(inference(lambda op=op, tensors=tensors: op(*tensors)), CALLS),
                "eager": graphed(inference(lambda reference=reference, tensors=tensors: reference(*tensors)), CALLS),
            }
            times = measure(runs, rounds=4, seconds=0.05)
            ms, eager_ms = times["ours"].median / CALLS, times["eager"].median / CALLS
            gb_per_s = moved / ms / 1e6
            row |= {"ms": ms, "eager_ms": eager_ms, "gb_per_s": gb_per_s, "of_copy": gb_per_s / 1e3 / ceilings.copy}
        yield row
