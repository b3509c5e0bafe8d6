"""Operators that write their result as int8 too: the bits of the operator without int8, then exactly quantised.

And operators that write only int8: the formula in float64, quantised.
"""

import pytest
import torch

from dcae_fast import ops
from dcae_fast.ops.depthwise_glu import depthwise_glu_int8_op
from dcae_fast.ops.relu_linear_attention import relu_linear_attention_int8_op
from dcae_fast.ops.rms_norm import rms_norm_int8_op
from dcae_fast.ops.shuffle import duplicate_shuffle_add_int8_op, unshuffle_average_add_int8_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the Triton kernels run in the interpreter
SCALE = 0.02


def factors(channels):
    """1 / scale of channels whose scales differ."""
    return 1 / (SCALE * 2 ** torch.linspace(-2, 2, channels, device=DEVICE))


def random(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def norm_case(b, c, h, w, act="none", residual=True):
    def plain(x, weight, bias, *rest):
        return ops.rms_norm(x, weight, bias, 1e-5, act, *rest)

    def with_int8(x, weight, bias, *rest):
        return ops.rms_norm_int8(x, weight, bias, factors(c), 1e-5, act, *rest)

    def in_float32(x, weight, bias, *rest):
        return ops.rms_norm(x, weight, bias, 1e-5, act, *rest, dtype=torch.float32)

    return plain, with_int8, in_float32, [(b, c, h, w), (c,), (c,)] + [(b, c, h, w)] * residual


def shuffle_case(name, x, main, factor=2):
    plain, with_int8 = getattr(ops, name), getattr(ops, f"{name}_int8")
    tensors = (lambda x, main, bias: (x, main, bias)) if x else (lambda main, bias: (None, main, bias))
    at_output = x is not None and (main[2:] != x[2:] or main[0] != x[0])
    out = main[1] if at_output else main[1] * factor**2 if "average" in name else main[1] // factor**2
    return (
        lambda *args: plain(*tensors(*args), factor),
        lambda *args: with_int8(*tensors(*args), factors(out), factor),
        lambda *args: plain(*tensors(*[arg.float() for arg in args]), factor),
        [shape for shape in (x, main, main[1:2]) if shape],
    )


CASES = {
    "rms_norm": norm_case(2, 64, 5, 7),
    "rms_norm-relu-no_residual": norm_case(1, 130, 3, 3, "relu", residual=False),
    "rms_norm-empty": norm_case(0, 16, 2, 2),
    "average": shuffle_case("unshuffle_average_add", (2, 32, 6, 10), (2, 16, 6, 10)),
    "average-main_at_output": shuffle_case("unshuffle_average_add", (1, 96, 2, 14), (1, 48, 1, 7)),
    "average-without_x": shuffle_case("unshuffle_average_add", None, (1, 12, 6, 4)),
    "average-factor_1": shuffle_case("unshuffle_average_add", (2, 64, 3, 5), (2, 16, 3, 5), factor=1),
    "average-empty": shuffle_case("unshuffle_average_add", (0, 32, 6, 10), (0, 16, 6, 10)),
    "duplicate": shuffle_case("duplicate_shuffle_add", (2, 32, 3, 5), (2, 64, 3, 5)),
    "duplicate-planes": shuffle_case("duplicate_shuffle_add", (2, 16, 3, 5), (8, 8, 3, 5)),
    "duplicate-without_x": shuffle_case("duplicate_shuffle_add", None, (1, 12, 3, 2)),
    "duplicate-factor_1": shuffle_case("duplicate_shuffle_add", (2, 16, 3, 5), (2, 64, 3, 5), factor=1),
}


def glu_case(b, m, h, w):
    return ops.depthwise_glu, lambda *args: ops.depthwise_glu_int8(*args, factors(m)), [
        (b, 2 * m, h, w), (2 * m, 1, 3, 3), (2 * m,)
    ]  # fmt: skip


def attention_case(b, heads, h, w, scales=1):
    return (
        lambda *qkvs: ops.relu_linear_attention(list(qkvs)),
        lambda *qkvs: ops.relu_linear_attention_int8(list(qkvs), factors(32 * heads * scales)),
        [(b, 96 * heads, h, w)] * scales,
    )


ONLY_INT8 = {  # the CUDA extension takes M in multiples of 8
    "glu": glu_case(2, 40, 5, 19),
    "glu-odd_channels": glu_case(1, 21, 9, 5),
    "glu-one_pixel": glu_case(3, 8, 1, 1),
    "glu-empty": glu_case(0, 8, 4, 4),
    "attention": attention_case(2, 1, 9, 11),
    "attention-two_scales": attention_case(1, 2, 13, 7, 2),
    "attention-empty": attention_case(0, 2, 5, 7),
}
FIRST = ("rms_norm", "average", "duplicate-planes")


def make(shapes):
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("plain, with_int8, in_float32, shapes", CASES.values(), ids=CASES)
def test_the_bits_of_the_plain_operator_exactly_quantised(plain, with_int8, in_float32, shapes):
    tensors = make(shapes)
    y, q = with_int8(*tensors)
    exact = in_float32(*tensors)
    assert exact.dtype == torch.float32 and y.dtype == torch.bfloat16 and torch.equal(y, plain(*tensors))
    assert q.dtype == torch.int8 and q.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(q, ops.quantize(exact, factors(q.shape[1])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plain, int8, shapes", ONLY_INT8.values(), ids=ONLY_INT8)
def test_the_formula_quantised(plain, int8, shapes, dtype):
    """Half of a unit is lost by rounding to int8, and at most a quarter before."""
    tensors = [tensor.to(dtype) for tensor in make(shapes)]
    q, exact = int8(*tensors), plain(*[tensor.double() for tensor in tensors])
    assert q.dtype == torch.int8 and q.shape == exact.shape and q.is_contiguous(memory_format=torch.channels_last)
    exact = (exact * factors(q.shape[1]).view(-1, 1, 1)).clamp(-127, 127)
    assert ((q - exact).abs() <= 0.75).all()


@pytest.mark.parametrize("name", FIRST)
def test_the_reference(name, monkeypatch):
    """The kernel's q differs from the reference's where sums in another order change the rounding."""
    with_int8, shapes = CASES[name][1], CASES[name][3]
    tensors = make(shapes)
    _, q = with_int8(*tensors)
    _, want = with_int8(*[tensor.double() for tensor in tensors])  # no kernel takes float64
    assert (q.int() - want.int()).abs().max() <= 1 and (q != want).float().mean() < 0.01


@pytest.mark.parametrize("name", FIRST)
def test_compiles_whole(name):
    with_int8, shapes = CASES[name][1], CASES[name][3]
    tensors = make(shapes)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: with_int8(*args), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*tensors), with_int8(*tensors), strict=True):
        assert torch.equal(got, want)


def test_registration():
    x, weight, bias, planes = random(1, 16, 2, 3), random(16), random(16), random(4, 8, 2, 3)
    qkv, taps = random(1, 96, 2, 2), random(16, 1, 3, 3)
    torch.library.opcheck(depthwise_glu_int8_op.overload, (x, taps, bias, factors(8)))
    torch.library.opcheck(relu_linear_attention_int8_op.overload, ([qkv], 32, 1e-15, factors(32)))
    torch.library.opcheck(rms_norm_int8_op.overload, (x, weight, bias, 1e-5, "relu", x, torch.bfloat16, factors(16)))
    torch.library.opcheck(unshuffle_average_add_int8_op.overload, (x, x, bias, 16, 1, 1.0, factors(16)))
    torch.library.opcheck(duplicate_shuffle_add_int8_op.overload, (x, planes, weight[:8], 8, 2, 1.0, factors(8)))


@pytest.mark.parametrize("name", (*FIRST, "glu", "attention"))
def test_refusals(name, monkeypatch):
    _, with_int8, *_, shapes = (CASES | ONLY_INT8)[name]
    with pytest.raises(RuntimeError, match="no gradients"):
        with_int8(*[tensor.requires_grad_() for tensor in make(shapes)])
    for wrong in (torch.ones(1, device=DEVICE), torch.ones(8, dtype=torch.float64, device=DEVICE)):
        monkeypatch.setitem(globals(), "factors", lambda channels, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=r"out_factor is \[\d\] torch.float\d\d; expected \[\d+\] torch.float32"):
            with_int8(*make(shapes))
