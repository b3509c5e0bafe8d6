"""Every operator of images against its formula in float64: results, gradients, layouts, odd and empty sizes."""

import functools
import importlib
import sys

import pytest
import torch
from accuracy import CEILING, allowed, relative_error
from image_cases import CASES
from registration import check_registration
from torch.utils._python_dispatch import TorchDispatchMode

from dcae_fast import ops
from dcae_fast.ops._library import Operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the Triton kernels run in the interpreter
NHWC, NCHW = torch.channels_last, torch.contiguous_format

case = pytest.mark.parametrize("op, shapes", CASES.values(), ids=CASES)
FIRST = {name.split("-")[0]: name for name in reversed(CASES)}.values()  # a case of each operator


def has_library_convolutions(name):
    """Whether PyTorch, whose rounding differs between machines, computes a convolution or its gradient."""
    return "conv2d" in name or "multiscale" in name


def dtypes_of(name):
    """All types on a GPU. In the interpreter a type changes only the casts: float16 once for each operator."""
    return [dtype for dtype in CEILING if DEVICE == "cuda" or dtype != torch.float16 or name in FIRST]


def make(shapes, dtype, memory_format=NHWC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in shapes:
        tensor = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        tensor = tensor.contiguous(memory_format=memory_format) if len(shape) == 4 else tensor
        tensors.append(tensor.requires_grad_())
    return tensors


def run(op, tensors):
    """Result and gradients for a fixed cotangent."""
    y = op(*tensors)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, tensors, dy)]


def eager_errors(op, tensors, exact, monkeypatch):
    """Errors of the plain PyTorch reference in the same dtype."""
    modules = [module for name, module in sys.modules.items() if name.startswith("dcae_fast.ops.")]
    with monkeypatch.context() as patch:
        for module in modules:
            for attribute, value in list(vars(module).items()):
                if isinstance(value, Operator):
                    eager = functools.partial(value.reference)
                    eager.reference = eager  # for operators that consist of others
                    patch.setattr(module, attribute, eager)
        return [relative_error(got, want) for got, want in zip(run(op, tensors), exact, strict=True)]


@pytest.mark.parametrize("name, dtype", [(name, dtype) for name in CASES for dtype in dtypes_of(name)], ids=str)
def test_matches_the_formula_in_float64(name, dtype, monkeypatch):
    op, shapes = CASES[name]
    by_kernel = DEVICE == "cuda" or not has_library_convolutions(name)
    tensors = make(shapes, dtype)
    exact = run(op, [t.detach().double().requires_grad_() for t in tensors])
    empty = exact[0].numel() == 0  # PyTorch's own pixel shuffles fail backward on empty batches
    eager = [0.0] * len(exact) if empty else eager_errors(op, tensors, exact, monkeypatch)
    for got, want, eager_error in zip(run(op, tensors), exact, eager, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        assert relative_error(got, want) <= allowed(eager_error, dtype, by_kernel)


@case
def test_layout_in_does_not_matter_and_layout_out_is_channels_last(op, shapes, request):
    is_close = has_library_convolutions(request.node.callspec.id)
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if is_close else {"atol": 0, "rtol": 0}
    nhwc, nchw = make(shapes, torch.float32), make(shapes, torch.float32, NCHW)
    strided = [t.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for t in nchw]
    expected = run(op, nhwc)
    assert expected[0].is_contiguous(memory_format=NHWC)
    for tensors in (nchw, strided):
        for got, want in zip(run(op, tensors), expected, strict=True):
            torch.testing.assert_close(got, want, **tolerance)


@case
def test_registration(op, shapes):
    check_registration(lambda: run(op, make(shapes, torch.float32)))


@case
def test_compiles_whole(op, shapes):
    tensors = make(shapes, torch.float32)
    expected = run(op, tensors)
    torch._dynamo.reset()
    got = run(torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager"), tensors)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want)


BIG = ("wide", "many", "one_pixel", "rms_norm-silu")
SMALL = [name for name in CASES if not any(word in name for word in BIG)]


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_the_reference(name):
    op, shapes = CASES[name]
    shapes = [tuple(min(size, 4) if i > 1 and len(shape) == 4 and shape[2:] != (3, 3) else size
                    for i, size in enumerate(shape)) for shape in shapes]  # fmt: skip
    if any(word in name for word in ("average", "duplicate", "multiscale")):
        shapes = CASES[name][1]
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    torch.autograd.gradcheck(op, tensors, fast_mode=True)
    torch.autograd.gradgradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("name", SMALL)
def test_only_one_gradient(name):
    """The gradient of one tensor equals that of a call in which all have one, and can be differentiated again."""
    op, shapes = CASES[name]
    whole = run(op, make(shapes, torch.float32))[1:]
    for wanted, expected in enumerate(whole):
        tensors = [t.requires_grad_(place == wanted) for place, t in enumerate(make(shapes, torch.float32))]
        y = op(*tensors)
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
        torch.testing.assert_close(torch.autograd.grad(y, tensors[wanted], dy, retain_graph=True)[0], expected)
        if "res_block" in name and wanted != 1:
            with pytest.raises(RuntimeError, match="keeps no input"):
                torch.autograd.grad(y, tensors[wanted], dy, create_graph=True)
            continue
        (again,) = torch.autograd.grad(y, tensors[wanted], dy, create_graph=True)
        torch.testing.assert_close(again, expected)
        if again.requires_grad:
            torch.autograd.grad(again.sum(), tensors[wanted], allow_unused=True)


@pytest.mark.parametrize(
    "name",
    [
        "rms_norm-relu-no_residual",
        "bias_act-relu-residual",
        "batch_norm_act-relu",
        "attention-two_scales",
        "rms_norm_conv2d",
    ],
)
def test_relu_keeps_nan(name):
    """NaN must not become a number, in results or gradients. The convolutions of cuDNN may spread NaN further."""
    op, shapes = CASES[name]
    tensors = make(shapes, torch.float32)
    with torch.no_grad():
        tensors[0][-1, 0, 0, 0] = float("nan")
    got = run(op, tensors)
    expected = run(op, [tensor.detach().double().requires_grad_() for tensor in tensors])
    assert got[0].isnan().any()
    for value, want in zip(got, expected, strict=True):
        spreads = name == "rms_norm_conv2d" and DEVICE == "cuda"
        assert value[want.isnan()].isnan().all() and (spreads or torch.equal(value.isnan(), want.isnan()))


class Calls(TorchDispatchMode):
    """Records (name, arguments) of all operators that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.name(), args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["conv2d-relu", "conv2d_unshuffle", "upsample_conv2d"])
def test_no_gradient_of_a_frozen_weight_is_computed(name):
    op, shapes = CASES[name]
    x, *weights = make(shapes, torch.float32)
    y = op(x, *[weight.detach() for weight in weights]).sum()
    with Calls() as calls:
        y.backward()
    masks = [args[-1] for name, args in calls.seen if name == "aten::convolution_backward"]
    assert masks and not any(of_weight or of_bias for _, of_weight, of_bias in masks)


@pytest.mark.parametrize("name", ["average-unshuffled_main", "duplicate-planes", "duplicate-main_alone"])
def test_no_gradient_of_a_frozen_bias_is_summed(name):
    op, shapes = CASES[name]
    tensors = make(shapes, torch.float32)
    sums = []
    for given in (tensors, [*tensors[:-1], tensors[-1].detach()]):
        y = op(*given)
        with Calls() as calls:
            torch.autograd.grad(y, tensors[0], torch.ones_like(y))
        sums.append(sum(name == "dcae_fast::sum_to_channels" for name, _ in calls.seen))
    assert sums == [1, 0]


@pytest.mark.parametrize("name, kernel", [("depthwise_glu", "weight"), ("multiscale_qkv", "taps")])
def test_no_kernel_runs_for_frozen_parameters(name, kernel, monkeypatch):
    op, shapes = CASES[name]
    x, weight, bias = make(shapes, torch.float32)
    y = op(x, weight, bias)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kernels = importlib.import_module(f"dcae_fast.kernels.{name}")
    monkeypatch.setattr(kernels, f"_{name}_{kernel}_backward_kernel", None)
    for again in (False, True):
        y = op(x, weight.detach(), bias.detach())
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=again)
        torch.testing.assert_close(dx, expected, atol=0, rtol=0)
    assert dx.requires_grad

    def backward(function=op):
        return torch.autograd.grad(function(x, weight.detach(), bias.detach()).sum(), x)

    check_registration(backward)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(backward(compiled), backward(), atol=0, rtol=0)
    y = op(x.detach(), weight.detach(), bias)
    with pytest.raises(TypeError):
        torch.autograd.grad(y, bias, torch.ones_like(y))


def test_a_tensor_in_two_places():
    x, weight = make([(1, 4, 5, 5), (4, 4, 3, 3)], torch.float64)
    torch.autograd.gradgradcheck(lambda x, weight: ops.conv2d(x, weight, residual=x, padding=1), [x, weight])
    y = ops.conv2d(x, weight, residual=x, padding=1).sum()
    (once,), (again,) = (torch.autograd.grad(y, x, retain_graph=True, create_graph=create) for create in (False, True))
    torch.testing.assert_close(again, once)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_statistics_of_a_batch(mean):
    """A mean that is large beside the deviation costs no digits of the variance."""
    x = (torch.randn(5, 24, 13, 19, generator=torch.Generator().manual_seed(0)) + mean).to(DEVICE)
    _, got_mean, got_variance = ops.batch_norm_act(x, x[0, :, 0, 0], x[0, :, 0, 0])
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(got_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_variance.double(), variance, rtol=1e-5, atol=0)


def test_batch_norm_of_constants():
    x = torch.full((2, 8, 3, 3), 7.0, device=DEVICE, requires_grad=True)
    y, mean, variance = ops.batch_norm_act(x, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE))
    y.square().sum().backward()
    assert not y.any() and (mean == 7).all() and not variance.any() and not x.grad.any()
    assert not mean.requires_grad and not variance.requires_grad


def test_batch_norm_of_nothing():
    x = torch.empty(0, 8, 3, 3, device=DEVICE, requires_grad=True)
    y, mean, variance = ops.batch_norm_act(x, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and mean.isnan().all() and variance.isnan().all()


@pytest.mark.parametrize("value", [0.0, 1e-4, 1e4])
def test_extreme_values(value):
    x = torch.full((1, 64, 7, 9), value, device=DEVICE)
    weight = torch.ones(64, device=DEVICE)
    norm = ops.rms_norm(x, weight, 0 * weight)
    torch.testing.assert_close(norm, x / (x.square() + 1e-5).sqrt())
    qkv = x.repeat(1, 3, 1, 1).requires_grad_()
    out = ops.relu_linear_attention([qkv])
    torch.testing.assert_close(out.detach(), x if value else torch.zeros_like(x))
    out.sum().backward()
    assert qkv.grad.isfinite().all()


def test_mixed_precision_sums_are_promoted():
    half = torch.randn(1, 32, 4, 4, device=DEVICE).bfloat16()
    single, ones = torch.randn(1, 32, 4, 4, device=DEVICE), torch.ones(32, device=DEVICE)
    for y in (
        ops.rms_norm(half, ones, ones, residual=single),
        ops.rms_norm(half, ones, ones, dtype=torch.float32),
        ops.bias_act(half, ones, residual=single),
        ops.batch_norm_act(half, ones, ones, residual=single)[0],
        ops.unshuffle_average_add(single, half[:, :8]),
        ops.duplicate_shuffle_add(single, half),
    ):
        assert y.dtype == torch.float32
    assert ops.rms_norm(half, ones, ones).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["batch_norm_act-relu", "depthwise_glu", "multiscale_qkv"])
def test_gradients_of_float32_weights_are_float32(name, dtype, monkeypatch):
    """As in training under autocast: x has half precision."""
    op, shapes = CASES[name]
    x, *weights = make(shapes, torch.float32)
    tensors = [x.detach().to(dtype).requires_grad_(), *weights]
    exact = run(op, [tensor.detach().double().requires_grad_() for tensor in tensors])
    eager = eager_errors(op, tensors, exact, monkeypatch)
    got = run(op, tensors)
    assert [value.dtype for value in got] == [dtype, dtype, torch.float32, torch.float32]
    for value, want, eager_error in zip(got, exact, eager, strict=True):
        assert relative_error(value, want) <= allowed(eager_error, dtype)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: ops.rms_norm(x, x[0, :3, 0, 0], x[0, :, 0, 0]), "expected"),
        (lambda x: ops.rms_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], act="gelu"), "gelu"),
        (lambda x: ops.rms_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], residual=x[:, :, :2]), "residual"),
        (lambda x: ops.bias_act(x, x[0, :4, 0, 0]), "expected"),
        (lambda x: ops.bias_act(x, x[0, :, 0, 0], scale=x[0, :, 0, 0]), "all of them or none"),
        (lambda x: ops.batch_norm_act(x, x[0, :4, 0, 0], x[0, :, 0, 0]), "expected"),
        (lambda x: ops.batch_norm_act(x, x[0, :, 0, 0], x[0, :, 0, 0], act="gelu"), "gelu"),
        (lambda x: ops.conv2d(x, x[:, :3]), "expected"),
        (lambda x: ops.fold_batch_norm(x, *[x[:, 0, 0, 0]] * 2, x[0], x[:, 0, 0, 0], 0.0), "mean is"),
        (lambda x: ops.fold_batch_norm(x[0], *[x[:, 0, 0, 0]] * 4, 0.0), "weight is"),
        (lambda x: ops.subpixel_weights(x), "weight is"),
        (lambda x: ops.transposed_weights(x), "weight is"),
        (lambda x: ops.conv2d(x, x, x[0, :, 0, 0]), "bias"),
        (lambda x: ops.conv2d_unshuffle(x[:, :, 1:], x[:, :, :3, :3].expand(24, -1, -1, -1)), "even"),
        (lambda x: ops.conv2d_unshuffle(x, x[:, :, 1:, 1:], x[0, :3, 0, 0]), "bias"),
        (lambda x: ops.rms_norm_conv2d(x, x[0, :3, 0, 0], x[0, :, 0, 0], x[:, :, 1:, 1:]), "expected"),
        (lambda x: ops.rms_norm_conv2d(x, x[0, :, 0, 0], x[0, :, 0, 0], x), "expected"),
        (lambda x: ops.upsample_conv2d(x, x), "expected"),
        (lambda x: ops.multiscale_qkv(x, x, x), "expected"),
        (lambda x: ops.relu_linear_attention([]), "empty"),
        (lambda x: ops.relu_linear_attention([x]), "multiple of 96"),
        (lambda x: ops.relu_linear_attention([x, x.double()], 8), "float"),
        (lambda x: ops.depthwise_glu(x, x[0, :, :1, :1], x[0, :, 0, 0]), "expected"),
        (lambda x: ops.unshuffle_average_add(x, x[:, :, :2]), "size must be"),
        (lambda x: ops.unshuffle_average_add(x[..., :3], x[..., :3]), "not a multiple of factor=2"),
        (lambda x: ops.duplicate_shuffle_add(x, x[:, :22]), "not a multiple"),
        (lambda x: ops.duplicate_shuffle_add(x, x, x[0, :3, 0, 0]), "bias"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 24, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op",
    [
        "rms_norm",
        "bias_act",
        "depthwise_glu",
        "average",
        "duplicate",
        "attention",
        "multiscale_qkv",
        "conv2d",
        "conv2d_unshuffle",
        "rms_norm_conv2d",
    ],
)
def test_more_than_2_to_the_31_elements(op):
    """The last image of a batch that crosses 2³¹ elements equals the same image alone."""
    big = torch.randn(2**31 // (96 * 512 * 512) + 2, 96, 512, 512, device="cuda", dtype=torch.bfloat16)
    big = big.contiguous(memory_format=NHWC)
    channel = torch.randn(96, device="cuda", dtype=torch.bfloat16)
    call = {
        "rms_norm": lambda x: ops.rms_norm(x, channel, channel),
        "bias_act": lambda x: ops.bias_act(x, channel, "silu"),
        "depthwise_glu": lambda x: ops.depthwise_glu(x, channel.view(96, 1, 1, 1).expand(96, 1, 3, 3), channel),
        "average": lambda x: ops.unshuffle_average_add(None, x, channel),
        "duplicate": lambda x: ops.duplicate_shuffle_add(None, x, channel),
        "attention": lambda x: ops.relu_linear_attention([x]),
        "multiscale_qkv": lambda x: ops.multiscale_qkv(x, x.new_ones(96, 1, 5, 5), x.new_ones(96, 32, 1, 1)),
        "conv2d": lambda x: ops.conv2d(x[:, :3], big[0, :, :9, :3].reshape(96, 3, 3, 3), channel, padding=1),
        "conv2d_unshuffle": lambda x: ops.conv2d_unshuffle(x[:, :3], big[0, :, :9, :3].reshape(96, 3, 3, 3), channel),
        "rms_norm_conv2d": lambda x: ops.rms_norm_conv2d(x, channel, channel, big[0, :, :9, :9].reshape(9, 96, 3, 3)),
    }[op]
    whole, alone = call(big)[-1:], call(big[-1:].clone(memory_format=NHWC))
    torch.testing.assert_close(whole, alone, atol=2e-2 if op == "attention" else 0, rtol=0)


@torch.no_grad()
def test_a_chain_of_residuals_compiles_in_time():
    """Inductor of torch 2.11 describes all arguments of an operator that it meets first, here the last one."""

    def chain(x, weight, bias):
        for _ in range(14):
            x = ops.conv2d(ops.conv2d(x, weight, bias, "silu", padding=1), weight, bias, residual=x, padding=1)
        return ops.bias_act(x, bias, "silu")

    tensors = [tensor.detach() for tensor in make([(1, 8, 4, 4), (8, 8, 3, 3), (8,)], torch.float32)]
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(chain, fullgraph=True)(*tensors), chain(*tensors))
