"""Rounding to 8 bit with one scale for each row: activations, concatenations and layer norms."""

import pytest
import torch

from dcae_fast import ops
from dcae_fast.ops.layer_norm import layer_norm_reference
from dcae_fast.ops.quantize_rows import (
    concatenate_rows_op,
    concatenate_rows_reference,
    layer_norm_rows_op,
    layer_norm_rows_reference,
    quantize_rows_op,
    quantize_rows_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernels run in the interpreter
FLOAT8 = torch.float8_e4m3fn, torch.float8_e5m2
TYPES = (*FLOAT8, torch.int8)
MOST = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344, torch.int8: 127}
ROUNDING = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 1 / 254}  # of a row's largest number


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(got, want):
    """Whether all bits of 8-bit rows are equal, but for the sign of NaN, and so are the scales."""
    (q, scale), (other, other_scale) = got, want
    if q.dtype == torch.int8:
        return torch.equal(q, other) and torch.equal(scale.nan_to_num(-1), other_scale.nan_to_num(-1))
    bits, other = (t.float().nan_to_num(-1e9) for t in (q, other))
    return torch.equal(bits, other) and torch.equal(scale.nan_to_num(-1), other_scale.nan_to_num(-1))


def values(q, scale):
    return q.float() * scale


@pytest.mark.parametrize("q_dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1152), (5, 4608), (7,), (3, 1), (0, 16), (2, 0, 48), (1, 2, 3, 40)], ids=str)
def test_equals_the_reference(shape, q_dtype):
    x = normal(*shape) * 10.0 ** torch.arange(shape[-1], device=DEVICE).remainder(5).sub(3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, scale = ops.quantize_rows(x.to(dtype), dtype=q_dtype)
        assert (q.dtype, scale.dtype, q.shape, scale.shape) == (q_dtype, torch.float32, x.shape, (*shape[:-1], 1))
        assert same((q, scale), quantize_rows_reference(x.to(dtype), "none", q_dtype))


@pytest.mark.parametrize("q_dtype", TYPES, ids=str)
def test_the_error_is_a_rounding_at_any_size(q_dtype):
    x = normal(9, 200) * 10.0 ** torch.tensor([-30, -9, -4, -1, 0, 1, 4, 9, 30], device=DEVICE)[:, None]
    q, scale = ops.quantize_rows(x, dtype=q_dtype)
    largest = x.abs().amax(1, keepdim=True)
    assert q.float().abs().amax() <= MOST[q_dtype]
    assert ((values(q, scale) - x).abs() <= 1.0001 * ROUNDING[q_dtype] * largest).all()
    if q_dtype in FLOAT8:
        assert (scale.log2() % 1 == 0).all()
        relative = (values(q, scale) - x).abs() / x.abs()
        assert (relative[x.abs() > largest / 1000] <= ROUNDING[q_dtype]).all()


def test_scales_are_the_smallest_powers_of_two():
    x = torch.tensor([[448.0], [448.5], [-224.0], [225.0], [1e-45], [3e38], [2.0**-118]], device=DEVICE)
    scales = ops.quantize_rows(x)[1].flatten()
    assert scales.tolist() == [1, 2, 0.5, 1, 2.0**-126, 2.0**120, 2.0**-126]


@pytest.mark.parametrize("q_dtype", TYPES, ids=str)
def test_zeros_and_numbers_that_are_not_finite(q_dtype):
    x = normal(5, 70, dtype=torch.bfloat16)
    x[0], x[1, 3], x[2, 69], x[3, 0] = 0, torch.inf, -torch.inf, torch.nan
    for got in (ops.quantize_rows(x, dtype=q_dtype), ops.concatenate_rows(x[None], x[None], q_dtype)):
        scale = got[1].flatten()
        assert (
            scale[0] == (1 if q_dtype == torch.int8 else 2.0**-126) and scale[1:4].isnan().all() and scale[4].isfinite()
        )
    assert (ops.quantize_rows(x, dtype=q_dtype)[0][0].float() == 0).all()


def test_half_to_even():
    x = torch.tensor([[448.0, 17, 19, 21, 2.0**-10, 3 * 2.0**-10]], device=DEVICE)
    assert ops.quantize_rows(x)[0].float().tolist() == [[448, 16, 20, 20, 0, 2.0**-8]]


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_gelu(act):
    x = normal(3, 11, 1536, dtype=torch.bfloat16) * 3
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh" if act == "gelu_tanh" else "none")
    q, scale = ops.quantize_rows(x, act)
    assert (values(q, scale) - exact).norm() / exact.norm() < 0.03
    want, want_scale = quantize_rows_reference(x, act, torch.float8_e4m3fn)
    assert (values(q, scale) - exact).norm() < 1.01 * (values(want, want_scale) - exact).norm()
    assert ((values(q, scale) - exact).abs() <= 2**-4 * exact.abs() + 4e-3).all()


@pytest.mark.parametrize("q_dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 576), (1, 5, 64), (0, 3, 16)], ids=str)
def test_concatenation(shape, q_dtype):
    left, right = normal(*shape, dtype=torch.bfloat16), 7 * normal(*shape, seed=1)
    got = ops.concatenate_rows(left, right.mT.contiguous().mT, q_dtype)
    assert got[0].shape == (*shape[:-1], 2 * shape[-1]) and got[0].is_contiguous()
    assert same(got, concatenate_rows_reference(left, right, q_dtype))


def norm_inputs(shape, dtype, of_image, has_branch):
    vectors = (shape[0], shape[2]) if of_image else shape[2:]
    x = normal(*shape, dtype=dtype) * 2 + 1
    scale, shift = (normal(*vectors, dtype=dtype, seed=seed) for seed in (1, 2))
    branch = normal(*shape, dtype=dtype, seed=3) if has_branch else None
    gate = normal(shape[0], shape[2], dtype=dtype, seed=4) if has_branch else None
    return x, scale, shift, 1e-5, branch, gate


@pytest.mark.parametrize("q_dtype", TYPES, ids=str)
@pytest.mark.parametrize("of_image, has_branch", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(2, 5, 1152), (3, 1, 96), (0, 3, 32)], ids=str)
def test_layer_norm(shape, of_image, has_branch, q_dtype):
    for dtype in (torch.bfloat16, torch.float32):
        args = norm_inputs(shape, dtype, of_image, has_branch)
        total, q, scale = ops.layer_norm_rows(*args, dtype=q_dtype)
        want_total, want, want_scale = layer_norm_rows_reference(*args, q_dtype)
        if has_branch:
            assert torch.equal(total, want_total) or (total - want_total).abs().amax() <= 2**-7 * total.abs().amax()
        else:
            assert total is args[0]
        assert q.shape == shape and scale.shape == (*shape[:2], 1)
        exact = layer_norm_reference(*args, torch.float32)[1]
        error, allowed = ((values(*each) - exact).norm() for each in ((q, scale), (want, want_scale)))
        assert error <= 1.2 * allowed


def test_a_norm_of_numbers_that_are_not_finite():
    x, *rest = norm_inputs((1, 3, 64), torch.bfloat16, False, False)
    x[0, 1, 5] = torch.inf
    assert ops.layer_norm_rows(x, *rest)[2].isnan().flatten().tolist() == [False, True, False]


def test_registration():
    x = normal(2, 3, 32)
    norm = (*norm_inputs((2, 3, 32), torch.float32, True, True), torch.float8_e4m3fn)
    for op, args in (
        (quantize_rows_op, (x, "gelu", torch.float8_e4m3fn)),
        (concatenate_rows_op, (x, x, torch.int8)),
        (layer_norm_rows_op, norm),
    ):
        torch.library.opcheck(op.overload, args)

    def everything(x):
        q, scale = ops.quantize_rows(x[:, :, :16], "gelu")
        whole, whole_scale = ops.concatenate_rows(x, x)
        return q.float() * scale, whole.float() * whole_scale, ops.layer_norm_rows(*norm[:-1])[2]

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x), everything(x)))


def test_refusals():
    x = normal(2, 3, 16)
    with pytest.raises(ValueError, match="act='relu'"):
        ops.quantize_rows(x, "relu")
    with pytest.raises(ValueError, match="dtype=torch.bfloat16; expected one of torch.float8_e4m3fn"):
        ops.quantize_rows(x, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="at least one column"):
        ops.quantize_rows(x[..., :0])
    with pytest.raises(ValueError, match="expected \\[B, N, D\\] twice"):
        ops.concatenate_rows(x, x[:1])
    with pytest.raises(RuntimeError, match="no gradients"):
        ops.quantize_rows(x.requires_grad_())


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.zeros(2**20 + 1, 2048, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.arange(2048)
    q, scale = ops.quantize_rows(x)
    assert scale[-1] == 8 and (q[-2].float() == 0).all() and q[-1, -1].float() == 256
