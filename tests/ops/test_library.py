"""Properties that every operator has by its registration: marked tensors, devices, transforms."""

import pytest
import torch
from image_cases import CASES
from test_ops import DEVICE, make

from dcae_fast import ops

OPERATORS = [
    "rms_norm-relu-no_residual",
    "bias_act-norm-residual",
    "conv2d-one_channel-pointwise",
    "conv2d_unshuffle",
    "rms_norm_conv2d",
    "upsample_conv2d-odd",
    "multiscale_qkv-odd_groups",
    "attention-one_position",
    "depthwise_glu",
    "average-unshuffled_main",
    "duplicate-shuffled_main",
]
every_operator = pytest.mark.parametrize("name", OPERATORS)
MARKS = {
    "negative": lambda tensor: torch._neg_view(-tensor),
    "zero": lambda tensor: torch._efficientzerotensor(tensor.shape),
}


def materialised(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape) if tensor._is_zerotensor() else tensor.resolve_neg()


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "depthwise_glu"])  # slow when interpreted
@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_marked_tensors(name, mark):
    """A mark may negate a tensor or make it zero, while its memory holds other values: each argument, and dy."""
    op, shapes = CASES[name]
    tensors = [tensor.detach() for tensor in make(shapes, torch.float32)]
    for place, tensor in enumerate(tensors):
        marked = mark(tensor).to(DEVICE)
        with torch.no_grad():
            got, want = (op(*tensors[:place], t, *tensors[place + 1 :]) for t in (marked, materialised(marked)))
        torch.testing.assert_close(got, want)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    y = op(*inputs)
    dy = mark(torch.ones_like(y)).to(DEVICE)
    got, want = (torch.autograd.grad(y, inputs, g, retain_graph=True) for g in (dy, materialised(dy)))
    torch.testing.assert_close(got, want)


@every_operator
def test_results_can_be_changed_in_place(name):
    op, shapes = CASES[name]
    tensors = make(shapes, torch.float32)
    want = torch.autograd.grad((2 * op(*tensors)).sum(), tensors)
    got = torch.autograd.grad(op(*tensors).mul_(2).sum(), tensors)
    torch.testing.assert_close(got, want)


def test_tensors_on_two_devices():
    x, bias = torch.randn(1, 8, 3, 3, device=DEVICE), torch.zeros(8, device="meta")
    with pytest.raises(RuntimeError, match=rf"dcae_fast::bias_act got tensors on \['{DEVICE}.*', 'meta'\]"):
        ops.bias_act(x, bias)
    assert ops.bias_act(x.to("meta"), bias).is_meta


@every_operator
def test_gradients_of_a_batch_of_cotangents(name):
    op, shapes = CASES[name]
    tensors = make(shapes, torch.float32)
    y = op(*tensors)
    dys = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = torch.autograd.grad(y, tensors, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, tensors, dy, retain_graph=True) for dy in dys]
    for of_batch, *of_each in zip(got, *each, strict=True):
        torch.testing.assert_close(of_batch, torch.stack(of_each), atol=1e-4, rtol=1e-4)


@every_operator
def test_transforms(name):
    """The gradient and vmap of torch.func, and forward-mode AD, of an operator."""
    op, shapes = CASES[name]
    tensors = [tensor.detach().double() for tensor in make(shapes, torch.float32)]
    want, pull = torch.func.vjp(op, *tensors)
    got, push = torch.func.jvp(op, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    torch.testing.assert_close(got, want)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(want)
    torch.testing.assert_close((push * dy).sum(), sum(gradient.sum() for gradient in pull(dy)))
    twice = torch.func.vmap(op)(*[torch.stack([tensor, tensor]) for tensor in tensors])
    torch.testing.assert_close(twice, torch.stack([want, want]))
