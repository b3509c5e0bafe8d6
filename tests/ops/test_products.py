"""How layers ask cuBLASLt for their products, and which arguments the products refuse."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dcae_fast.ops import _plans, _products

linear, mlp = (importlib.import_module(f"dcae_fast.ops.{name}") for name in ("linear", "mlp"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class ProductInTorch:
    """Product of dcae_fast._C, in PyTorch: it has one candidate and is its own plan."""

    def __init__(self, left, right, left_transposed, right_transposed, out_in_float32, epilogue):
        self.transposed, self.epilogue = (left_transposed, right_transposed), epilogue
        self.out_dtype = torch.float32 if out_in_float32 else left.dtype

    def __len__(self):
        return 1

    def build(self, candidate):
        return self

    def __call__(self, left, right, bias, residual):
        left, right = (
            (x.T if turned else x).double() for x, turned in zip((left, right), self.transposed, strict=True)
        )
        y = left @ right + (0 if residual is None else residual.double()) + (0 if bias is None else bias.double())
        assert ("bias" in self.epilogue) == (bias is not None)
        results = [y]
        if self.epilogue.startswith("gelu"):
            results = [F.gelu(y, approximate="tanh"), *[y] * ("aux" in self.epilogue)]
        if self.epilogue == "bgrad":
            results = [y, left.sum(1)]
        return [result.to(self.out_dtype) for result in results]


@pytest.fixture
def extension(monkeypatch):
    """Replaces the CUDA extension by ProductInTorch, and takes its plan without a search."""

    class Extension:
        Product = ProductInTorch

    monkeypatch.setattr(_products, "cuda_extension", lambda: Extension)
    monkeypatch.setattr(_plans, "find", lambda library, shape, device, worth, make, run, fallback: make().build(0))


def launches():
    """name → (launch, the same in plain PyTorch, arguments)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (10, 8), (32, 8), (32,), (8, 32), (8,), (10, 8)
    x, w1, b1, w2, b2, residual = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    w1, w2 = w1 / 8**0.5, w2 / 32**0.5
    h = F.linear(x, w1)
    backward_input = linear._launch_linear_backward_input, linear.linear_backward_input_reference
    backward_weight = linear._launch_linear_backward_weight, linear.linear_backward_weight_reference
    return {
        "linear": (linear.launch_linear, linear.linear_reference, [x, w1, b1, None]),
        "linear-residual": (linear.launch_linear, linear.linear_reference, [h, w2, b2, residual]),
        "linear-no_bias": (linear.launch_linear, linear.linear_reference, [h, w2, None, residual]),
        "gelu": (linear._launch_linear_gelu, linear.linear_gelu_reference, [x, w1, b1, "gelu_tanh"]),
        "gelu-no_bias": (linear._launch_linear_gelu, linear.linear_gelu_reference, [x, w1, None, "gelu_tanh"]),
        "backward_input": (*backward_input, [residual, w2]),
        "backward_weight": (*backward_weight, [h, x, True, h.dtype]),
        "backward_weight-no_bias": (*backward_weight, [h, x, False, h.dtype]),
        "mlp": (mlp._launch, mlp.mlp_reference, [x, w1, b1, w2, b2, residual, "gelu_tanh"]),
        "mlp-no_bias": (mlp._launch, mlp.mlp_reference, [x, w1, None, w2, None, None, "gelu_tanh"]),
    }


@pytest.mark.parametrize("name", launches())
def test_products_are_asked_for_in_the_right_way(name, extension):
    launch, reference, args = launches()[name]
    assert_close(launch(*args), reference(*args))


@pytest.mark.parametrize("name", launches())
def test_without_the_extension_pytorch_computes_the_same(name, monkeypatch):
    monkeypatch.setattr(_products, "cuda_extension", lambda: None)
    launch, reference, args = launches()[name]
    if name == "gelu" and DEVICE == "cpu":  # PyTorch's product with GELU takes the exact one there
        reference = lambda *args: linear.linear_gelu_reference(*args[:3], "gelu")  # noqa: E731
    assert_close(launch(*args), reference(*args))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_found_plans_are_those_that_products_ask_for(bias, residual, weight_dtype, monkeypatch):
    """Both use the same keys; otherwise the halves of a block would never find a plan."""
    asked, found, dtype = [], [], torch.bfloat16
    monkeypatch.setattr(_products, "available", lambda: True)
    monkeypatch.setattr(_plans, "find", lambda library, key, *_: asked.append(key))
    monkeypatch.setattr(_plans, "found", lambda key: found.append(key[3:]))
    y, dy = torch.randn(2, 3, 16, dtype=dtype), torch.randn(2, 3, 40, dtype=dtype)
    w1, w2 = torch.randn(40, 16, dtype=weight_dtype), torch.randn(16, 40, dtype=weight_dtype)
    b1, b2 = (torch.randn(40), torch.randn(16)) if bias else (None, None)
    added = None if residual is None else torch.randn(2, 3, 16, dtype=residual)

    mlp._launch(y, w1, b1, w2, b2, added, "gelu")
    linear._launch_linear_gelu(y, w1, b1, "gelu")
    for act in ("gelu_aux", "gelu"):
        found.append(_products.key_of_layer(dtype, 6, w1, _products.epilogue(act, b1))[3:])
        if act == "gelu_aux":
            found.append(_products.key_of_layer(dtype, 6, w2, _products.epilogue("", b2), residual)[3:])
    linear._launch_linear_backward_input(dy, w1)
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))  # CUDA's
    linear._launch_linear_backward_weight(dy, y, bias, weight_dtype)
    _products.found_gradients(dtype, 6, w1, bias)
    assert asked == found and len({*asked}) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not _products.available(), reason="dcae_fast._C was not built with cuBLASLt")
def test_what_the_extension_refuses():
    extension, x = importlib.import_module("dcae_fast._C"), torch.randn(16, 8, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="fit together"):
        extension.Product(x, x, False, False, False, "none")
    with pytest.raises(ValueError, match="unknown epilogue"):
        extension.Product(x, x, False, True, False, "relu")
    plan = extension.Product(x, x, False, True, False, "bias").build(0)
    with pytest.raises(ValueError, match="bias is missing"):
        plan(x, x)
    with pytest.raises(ValueError, match="left must have shape"):
        plan(x[:8], x, x[:, 0].contiguous())
    with pytest.raises(TypeError, match="bias must be"):
        plan(x, x, x[:, 0].float())
