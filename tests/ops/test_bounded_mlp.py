"""The first layer of an MLP in float8 with scales from bounds."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from dcae_fast import ops
from dcae_fast.ops import _plans, _scaled_products
from dcae_fast.ops.bounded_mlp import (
    bounded_layer_norm_op,
    bounded_layer_norm_reference,
    bounded_linear_gelu_op,
    bounded_linear_gelu_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
module = importlib.import_module("dcae_fast.ops.bounded_mlp")


def inputs(tokens=66, width=1152, hidden=576, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x, norm_weight, norm_bias, weight, bias = (
        torch.randn(shape, generator=generator)
        for shape in ((2, tokens, width), (width,), (width,), (hidden, width), (hidden,))
    )
    parameters = 1 + 0.3 * norm_weight, 0.2 * norm_bias, weight / width**0.5, 0.5 * bias
    return (3 * x).to(DEVICE, dtype), *(each.to(DEVICE) for each in parameters)


def exact(x, norm_weight, norm_bias, weight, bias):
    y = F.layer_norm(x.double(), x.shape[2:], norm_weight.double(), norm_bias.double(), 1e-5)
    return y, F.gelu(y @ weight.double().T + (0 if bias is None else bias.double()))


def computed(x, norm_weight, norm_bias, weight, bias):
    y_scale, q_weight, weight_scale, g_scale = ops.mlp_bounds(norm_weight, norm_bias, weight, bias)
    q = ops.bounded_layer_norm(x, norm_weight, norm_bias, 1e-5, 1 / y_scale)
    g = ops.bounded_linear_gelu(q, y_scale, q_weight, weight_scale, bias, 1 / g_scale)
    return q.double() * y_scale, g.double() * g_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(66, 1152, 576), (3, 32, 16), (1, 80, 48)], ids=str)
def test_the_error_is_that_of_8_bit(shape, dtype):
    args = inputs(*shape, dtype)
    for with_bias in (True, False):
        used = args if with_bias else (*args[:4], None)
        for got, want in zip(computed(*used), exact(*used), strict=True):
            assert (got - want).norm() <= 0.06 * want.norm()


def test_a_wide_bound_costs_no_precision():
    """A channel with a hundredfold weight makes the bound of all others a hundred times wider."""
    x, norm_weight, norm_bias, weight, bias = inputs(16)
    errors = []
    for factor in (1, 100):
        gain = norm_weight.clone()
        gain[7], x[..., 7] = factor, 0
        args = x, gain, norm_bias, weight, bias
        errors.append((computed(*args)[1] - exact(*args)[1]).norm() / exact(*args)[1].norm())
    assert errors[1] <= 1.2 * errors[0]


def test_nothing_exceeds_the_bounds():
    """The worst tokens: those along a row of the weight."""
    x, norm_weight, norm_bias, weight, bias = inputs(64, 96, 64, torch.float32)
    bias = bias * (weight @ norm_bias).sign()
    x = (weight * norm_weight).sub((weight * norm_weight).mean(1, keepdim=True))[None].repeat(2, 1, 1) * 1e3
    args = x, norm_weight, norm_bias, weight, bias
    y, h = exact(*args)
    y_scale, _, _, g_scale = ops.mlp_bounds(*args[1:])
    assert y.abs().max() <= 448 * y_scale and 448 * g_scale / 4 < h.abs().max() <= 448 * g_scale
    for got, want in zip(computed(*args), (y, h), strict=True):
        assert ((got - want).abs() <= 0.2 * want.abs() + 0.05 * want.abs().max()).all()


def test_numbers_that_are_not_finite():
    x, *rest = inputs(4, 64, 32)
    x[0, 1, 3], x[1, 2, 0] = torch.inf, torch.nan
    wrong = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
    wrong[0, 1] = wrong[1, 2] = True
    for result in computed(x, *rest):
        assert torch.equal(result.isnan().all(2), wrong) and torch.equal(result.isnan().any(2), wrong)
    rest[2][5, 5] = torch.nan
    assert computed(x, *rest)[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 32), (2, 0, 32)])
def test_empty(shape):
    _, *rest = inputs(1, 32, 16)
    q, g = computed(torch.empty(shape, device=DEVICE), *rest)
    assert q.shape == shape and g.shape == (*shape[:2], 16)


def test_registration():
    x, norm_weight, norm_bias, weight, bias = inputs(3, 32, 16)
    y_scale, q_weight, weight_scale, g_scale = ops.mlp_bounds(norm_weight, norm_bias, weight, bias)
    norm = x, norm_weight, norm_bias, 1e-5, 1 / y_scale
    q = bounded_layer_norm_reference(*norm)
    torch.library.opcheck(bounded_layer_norm_op.overload, norm)
    args = q, y_scale, q_weight, weight_scale, bias, 1 / g_scale
    torch.library.opcheck(bounded_linear_gelu_op.overload, args, test_utils="test_faketensor")
    compiled = torch.compile(lambda *args: ops.bounded_linear_gelu(*args), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args).float(), ops.bounded_linear_gelu(*args).float())
    with pytest.raises(ValueError, match="expected \\[B, N, D\\] and \\[H, D\\]"):
        ops.bounded_linear_gelu(x, *args[1:])
    with pytest.raises(ValueError, match="expected float32 \\[1\\]"):
        ops.bounded_linear_gelu(q, y_scale[0], *args[2:])


def test_what_is_asked_for(monkeypatch):
    """The extension's plan, and without the extension PyTorch's product with a pass behind it."""
    x, norm_weight, norm_bias, weight, bias = inputs(5, 64, 32)
    y_scale, q_weight, weight_scale, g_scale = ops.mlp_bounds(norm_weight, norm_bias, weight, bias)
    args = bounded_layer_norm_reference(x, norm_weight, norm_bias, 1e-5, 1 / y_scale), y_scale, q_weight, weight_scale
    want = bounded_linear_gelu_reference(*args, bias, 1 / g_scale).float()

    class Extension:
        class ScaledProduct:
            def __init__(self, x, weight, dtype, epilogue, is_fast, by_row):
                assert (dtype, epilogue, is_fast, by_row) == (E4M3, "gelu_bias", True, False)

            def build(self, place):
                return self

            def __call__(self, x, x_scale, weight, weight_scale, bias, residual, factor):
                assert bias.dtype == torch.bfloat16 and residual is None
                return bounded_linear_gelu_reference(x, x_scale, weight, weight_scale, bias, factor)

    def product(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.dim() == 2 and scale_a.shape == scale_b.shape == (1,) and bias.dtype == out_dtype
        return ((a.float() @ b.float()) * scale_a * scale_b + bias.float()).to(out_dtype)

    monkeypatch.setattr(_plans, "find", lambda library, shape, device, worth, make, run, fallback: make().build(0))
    monkeypatch.setattr(module, "scaled_product", product)
    for extension in (Extension, None):
        monkeypatch.setattr(_scaled_products, "cuda_extension", lambda extension=extension: extension)
        got = module._launch(*args, bias, 1 / g_scale).float()
        assert (got - want).norm() <= 0.03 * want.norm()
        plan = None if extension is None else extension.ScaledProduct(None, None, E4M3, "gelu_bias", True, False)
        monkeypatch.setattr(_plans, "found", lambda key, plan=plan: plan)
        prepared = module._prepare(*args, bias.to(torch.bfloat16), 1 / g_scale)
        assert (prepared is None) == (extension is None) and module._prepare(*args, bias, 1 / g_scale) is None
        if prepared is not None:
            assert torch.equal(prepared(*args, bias.to(torch.bfloat16), 1 / g_scale).float(), got)


@pytest.mark.gpu
def test_cublaslt():
    if torch.cuda.get_device_capability()[0] != 9 or not _scaled_products.available():
        pytest.skip("needs Hopper and the CUDA extension")
    x, norm_weight, norm_bias, weight, bias = inputs(66, 1152, 4608)
    y_scale, q_weight, weight_scale, g_scale = ops.mlp_bounds(norm_weight, norm_bias, weight, bias)
    q = ops.bounded_layer_norm(x, norm_weight, norm_bias, 1e-5, 1 / y_scale)
    products = _scaled_products.cuda_extension().ScaledProduct(q, q_weight, E4M3, "gelu_bias", True, False)
    assert len(products) > 0, "cuBLASLt offers no product with GELU and a result in float8"
    want = bounded_linear_gelu_reference(q, y_scale, q_weight, weight_scale, bias, 1 / g_scale).float()
    half = bias.to(torch.bfloat16)
    for place in range(len(products)):
        got = products.build(place)(q, y_scale, q_weight, weight_scale, half, None, 1 / g_scale).float()
        assert (got - want).norm() <= 0.02 * want.norm()
