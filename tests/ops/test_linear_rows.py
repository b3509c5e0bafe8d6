"""Linear layers of rows in 8 bit."""

import importlib

import pytest
import torch

from dcae_fast import ops
from dcae_fast.ops import _plans, _scaled_products
from dcae_fast.ops.linear_rows import linear_rows_op, linear_rows_reference

module = importlib.import_module("dcae_fast.ops.linear_rows")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SUMS = 2**-10  # error of sums of float8 in the matrix units, which keep about 14 bits of the largest product


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def operands(rows, depth, columns, x_dtype=E4M3, weight_dtype=E4M3):
    x, weight = normal(*rows, depth), normal(columns, depth, seed=1) / depth**0.5
    return *ops.quantize_rows(x, dtype=x_dtype), *ops.quantize_rows(weight, dtype=weight_dtype)


def exact(x, x_scale, weight, weight_scale):
    return (x.double() * x_scale) @ (weight.double() * weight_scale).T


@pytest.mark.parametrize(
    "rows, depth, columns", [((2, 5), 64, 48), ((7,), 32, 16), ((3, 2, 2), 16, 32), ((4,), 24, 10)]
)
@pytest.mark.parametrize("types", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (torch.int8, torch.int8)], ids=str)
def test_bias_and_residual(rows, depth, columns, types):
    args = operands(rows, depth, columns, *types)
    bias, residual = normal(columns, seed=2), normal(*rows, columns, seed=3)
    of_float32 = SUMS if DEVICE == "cuda" and types[0] != torch.int8 else 1e-5
    for dtype, limit in ((torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float32, of_float32)):
        plain = ops.linear_rows(*args, dtype=dtype, fast=False)
        assert plain.dtype == dtype and plain.shape == residual.shape and plain.is_contiguous()
        assert (plain.double() - exact(*args)).norm() <= limit * exact(*args).norm()
        full = ops.linear_rows(*args, bias, residual.to(dtype), dtype, fast=False)
        want = exact(*args) + bias + residual.to(dtype)
        assert (full.double() - want).norm() <= (limit if DEVICE == "cpu" else 2 * limit) * want.norm()


def test_sums_of_int8_are_exact():
    """More products than fp32 can count: 127² · 4096 needs 26 bits."""
    x = torch.full((1, 4096), 127, dtype=torch.int8, device=DEVICE)
    weight = torch.full((1, 4096), 127, dtype=torch.int8, device=DEVICE)
    weight[0, 0], ones = 126, torch.ones(1, 1, device=DEVICE)
    difference = linear_rows_reference(x, ones, weight, ones, None, None, torch.float32, True)
    assert difference.item() == torch.tensor(127.0 * 127 * 4096 - 127).item()


def test_the_error_of_a_layer_is_that_of_its_operands():
    x, weight = normal(64, 512), normal(256, 512, seed=1)
    y = ops.linear_rows(*ops.quantize_rows(x), *ops.quantize_rows(weight), dtype=torch.float32, fast=False)
    error = (y - x @ weight.T).norm() / (x @ weight.T).norm()
    assert 0.01 < error < 0.05


def test_rows_that_are_not_finite_stay_so():
    x = normal(4, 64)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    y = ops.linear_rows(*ops.quantize_rows(x), *ops.quantize_rows(normal(32, 64, seed=1)))
    assert y.isfinite().all(1).tolist() == [True, False, False, True] and not y[1:3].isfinite().any()


@pytest.mark.parametrize("rows, columns", [((0,), 16), ((2, 0), 16), ((3,), 0)])
def test_empty(rows, columns):
    y = ops.linear_rows(*operands(rows, 32, 16))[..., :columns]
    assert y.shape == (*rows, columns)


def test_one_row_without_dimensions():
    x, x_scale, *weight = operands((), 32, 16)
    y = ops.linear_rows(x, x_scale, *weight)
    assert y.shape == (16,) and torch.equal(y, ops.linear_rows(x[None], x_scale[None], *weight)[0])


def test_registration():
    args = (*operands((2, 3), 32, 16), normal(16), normal(2, 3, 16), torch.float32, True)
    in_int8 = (*operands((2, 3), 32, 16, torch.int8, torch.int8), *args[4:])  # opcheck cannot compare float8
    torch.library.opcheck(linear_rows_op.overload, in_int8)
    torch.library.opcheck(linear_rows_op.overload, args, test_utils="test_faketensor")
    compiled = torch.compile(lambda *args: ops.linear_rows(*args), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), ops.linear_rows(*args))


def test_refusals():
    x, x_scale, weight, weight_scale = operands((3,), 32, 16)
    with pytest.raises(ValueError, match="expected int8 twice, or float8 twice"):
        ops.linear_rows(x.to(torch.bfloat16), x_scale, weight, weight_scale)
    with pytest.raises(ValueError, match="at least one of them"):
        ops.linear_rows(x.float().to(E5M2), x_scale, weight.float().to(E5M2), weight_scale)
    with pytest.raises(ValueError, match="expected \\[..., K\\] and \\[M, K\\]"):
        ops.linear_rows(x[:, :16], x_scale, weight, weight_scale)
    with pytest.raises(ValueError, match="x_scale is torch.float32 \\[3\\]; expected float32 \\[3, 1\\]"):
        ops.linear_rows(x, x_scale[:, 0], weight, weight_scale)
    with pytest.raises(ValueError, match="bias is \\[3\\]; expected \\[16\\]"):
        ops.linear_rows(x, x_scale, weight, weight_scale, x_scale[:, 0])
    with pytest.raises(ValueError, match="residual is torch.float32 \\[3, 16\\]; expected torch.bfloat16"):
        ops.linear_rows(x, x_scale, weight, weight_scale, residual=normal(3, 16))
    with pytest.raises(RuntimeError, match="no gradients"):
        ops.linear_rows(x, x_scale, weight, weight_scale, normal(16).requires_grad_())


class ProductInTorch:
    """ScaledProduct of dcae_fast._C, in PyTorch: it has one candidate and is its own plan."""

    def __init__(self, x, weight, dtype, epilogue, is_fast, by_row):
        assert epilogue in ("bias", "none") and by_row
        self.types, self.dtype, self.has_bias = (x.dtype, weight.dtype), dtype, epilogue == "bias"

    def __len__(self):
        return 1

    def build(self, candidate):
        return self

    def __call__(self, x, x_scale, weight, weight_scale, bias, residual, out_factor=None):
        assert out_factor is None
        of_bias = torch.bfloat16 if self.dtype == torch.float32 else self.dtype
        assert (x.dtype, weight.dtype) == self.types and self.has_bias == (bias is not None)
        assert (bias is None or bias.dtype == of_bias) and (residual is None or residual.dtype == self.dtype)
        return linear_rows_reference(x, x_scale, weight, weight_scale, bias, residual, self.dtype, True)


@pytest.fixture
def extension(monkeypatch):
    """Replaces the CUDA extension by ProductInTorch, and takes its plan without a search."""

    class Extension:
        ScaledProduct = ProductInTorch

    monkeypatch.setattr(_scaled_products, "cuda_extension", lambda: Extension)
    monkeypatch.setattr(_plans, "find", lambda library, shape, device, worth, make, run, fallback: make().build(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_the_extension_is_asked_for(extension, dtype):
    residual = normal(2, 3, 16, dtype=dtype)
    for bias in (None, normal(16), normal(16, dtype=torch.bfloat16)):
        for args in ((bias, None), (bias, residual)):
            got = module._launch(*operands((2, 3), 32, 16), *args, dtype, True)
            want = linear_rows_reference(*operands((2, 3), 32, 16), *args, dtype, True)
            assert got.dtype == dtype and (got - want).abs().max() <= 2**-6 * want.abs().max()


def test_what_pytorch_is_asked_for_without_the_extension(monkeypatch):
    def scaled_product(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.dim() == b.dim() == 2 and scale_a.shape == (6, 1) and scale_b.shape == (1, 16)
        assert a.is_contiguous() and b.T.is_contiguous() and (bias is None or bias.dtype == out_dtype)
        return linear_rows_reference(a, scale_a, b.T, scale_b.T, bias, None, out_dtype, use_fast_accum)

    monkeypatch.setattr(module, "scaled_product", scaled_product)
    monkeypatch.setattr(_scaled_products, "available", lambda: False)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        args = *operands((2, 3), 32, 16), normal(16), normal(2, 3, 16, dtype=dtype), dtype, True
        got, want = module._launch(*args), linear_rows_reference(*args)
        assert got.dtype == dtype and (got - want).abs().max() <= 2**-6 * want.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fast", [True, False])
def test_cublaslt(dtype, fast):
    if torch.cuda.get_device_capability()[0] != 9 or not _scaled_products.available():
        pytest.skip("needs Hopper and the CUDA extension")
    args = operands((300,), 1152, 576)
    for bias, residual in ((None, None), (normal(576, dtype=torch.bfloat16), normal(300, 576, dtype=dtype))):
        options = dtype, "none" if bias is None else "bias", fast, True
        count = len(_scaled_products.cuda_extension().ScaledProduct(args[0], args[2], *options))
        assert count > 0, "cuBLASLt offers no product with these scales, bias and type of result"
        got = ops.linear_rows(*args, bias, residual, dtype, fast)
        want = linear_rows_reference(*args, bias, residual, torch.float32, fast)
        assert (got - want).norm() <= 4e-3 * want.norm()
