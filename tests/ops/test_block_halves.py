"""`norm_attention` and `norm_mlp` against plain PyTorch: results, gradients, types, registration."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from registration import check_registration
from torch.testing import assert_close

from dcae_fast import ops
from dcae_fast.ops import _block_half, _plans
from dcae_fast.ops._block_half import INPUTS, Half
from dcae_fast.ops._parts import as_kernel
from dcae_fast.ops.norm_attention import NormAttention, norm_attention_op
from dcae_fast.ops.norm_mlp import NormMlp, norm_mlp_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, HEADS, HIDDEN = 1e-5, 2, 48
CASES = {  # half, x's shape, adaLN with a branch, biases, residual
    "attention": ("attention", (2, 5, 16), False, True, True),
    "attention-no_bias": ("attention", (3, 7, 24), False, False, True),
    "attention-branch": ("attention", (2, 5, 16), True, True, False),
    "attention-branch-residual": ("attention", (2, 4, 16), True, True, True),
    "attention-no_images": ("attention", (0, 4, 16), False, True, True),
    "mlp": ("mlp", (2, 5, 16), False, True, True),
    "mlp-no_bias": ("mlp", (3, 7, 24), False, False, True),
    "mlp-branch": ("mlp", (2, 5, 16), True, True, False),
    "mlp-branch-residual": ("mlp", (2, 4, 16), True, True, True),
    "mlp-no_tokens": ("mlp", (2, 0, 16), False, True, True),
}
WIDE = {  # sizes that the CUDA extension takes
    "attention-wide": ("attention", (3, 66, 144), False, True, True),
    "attention-wide-branch": ("attention", (3, 64, 128), True, True, False),
    "mlp-wide": ("mlp", (3, 66, 144), False, True, True),
    "mlp-wide-branch": ("mlp", (3, 64, 128), True, True, False),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def plain(half, residual, x, scale, shift, w1, b1, w2, b2, branch=None, gate=None):
    s = x if branch is None else x + gate[:, None] * branch
    y = F.layer_norm(s, s.shape[-1:], eps=EPS)
    y = y * (1 + scale[:, None]) + shift[:, None] if scale.dim() == 2 else y * scale + shift
    y = F.linear(y.to(w1.dtype), w1, b1)
    if half == "attention":
        q, k, v = y.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
    else:
        y = F.gelu(y)
    y = F.linear(y, w2, b2)
    return s, y + s if residual else y


def ours(half, residual, x, scale, shift, w1, b1, w2, b2, branch=None, gate=None, dtype=None):
    options = {"branch": branch, "gate": gate, "dtype": dtype, "residual": residual}
    if half == "attention":
        return ops.norm_attention(x, scale, shift, EPS, w1, b1, w2, b2, HEADS, **options)
    return ops.norm_mlp(x, scale, shift, EPS, w1, b1, w2, b2, **options)


def make(case, dtype, x_dtype=None, weight_dtype=None):
    half, (images, tokens, width), with_branch, bias, _ = case
    hidden = 3 * width if half == "attention" else HIDDEN
    vector = (images, width) if with_branch else (width,)
    shapes = [(images, tokens, width), vector, vector, (hidden, width), (hidden,) if bias else None]
    shapes += [(width, hidden // 3 if half == "attention" else hidden), (width,) if bias else None]
    shapes += [(images, tokens, width), vector] if with_branch else []
    dtypes = [x_dtype or dtype, *[weight_dtype or dtype] * 6, dtype, dtype]
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for place, (shape, kind) in enumerate(zip(shapes, dtypes, strict=False)):
        if shape is None:
            tensors.append(None)
            continue
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensor /= shape[1] ** 0.5 if place in (3, 5) else 1
        tensors.append(tensor.to(DEVICE, kind).requires_grad_())
    return tensors


def run(function, case, tensors, **options):
    """Both results and all gradients, for random cotangents; s only if there is a branch."""
    half, _, with_branch, _, residual = case
    results = function(half, residual, *tensors, **options)[0 if with_branch else 1 :]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in results]
    return [*results, *torch.autograd.grad(results, [t for t in tensors if t is not None], cotangents)]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@every_case
def test_equals_the_plain_modules(case):
    for dtype, tolerance in ((torch.float64, {}), (torch.float32, {"rtol": 1e-3, "atol": 1e-3})):
        tensors = make(case, dtype)
        assert_close(run(ours, case, tensors), run(plain, case, tensors), **tolerance)
        with torch.no_grad():
            s, out = ours(case[0], case[4], *tensors)
            assert_close((s, out), plain(case[0], case[4], *tensors), **tolerance)
            assert out.is_contiguous()


@every_case
def test_gradients_of_gradients(case):
    tensors = make(case, torch.float64)
    present = [tensor for tensor in tensors if tensor is not None]

    def call(*given):
        given = iter(given)
        s, out = ours(case[0], case[4], *[None if tensor is None else next(given) for tensor in tensors])
        return (s, out) if case[2] else out

    torch.autograd.gradcheck(call, present, fast_mode=True)
    torch.autograd.gradgradcheck(call, present, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["half", "float32"])
@pytest.mark.parametrize("case", [*CASES.values(), *WIDE.values()], ids=[*CASES, *WIDE])
def test_half_precision(case, weights, dtype):
    """x in float32, weights in half precision or float32: as exact as plain modules with half-precision weights."""
    tensors = make(case, dtype, torch.float32, torch.float32 if weights == "float32" else None)
    exact = run(plain, case, [None if t is None else t.detach().double().requires_grad_() for t in tensors])
    eager = run(plain, case, make(case, dtype, torch.float32))
    got = run(ours, case, tensors, dtype=dtype)
    present = [tensor for tensor in tensors if tensor is not None]
    assert [gradient.dtype for gradient in got[-len(present) :]] == [tensor.dtype for tensor in present]
    assert got[-len(present) - 1].dtype == (torch.float32 if case[4] else dtype)
    for mine, theirs, want in zip(got, eager, exact, strict=True):
        assert error(mine, want) <= max(2 * error(theirs, want), 4 * torch.finfo(dtype).eps)


@every_case
def test_registration(case):
    tensors = make(case, torch.float32)

    def train_and_infer():
        run(ours, case, tensors)
        with torch.no_grad():
            ours(case[0], case[4], *tensors)

    check_registration(train_and_infer)


@every_case
def test_compiles_whole(case):
    tensors = make(case, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, case, tensors), run(ours, case, tensors))


@pytest.mark.parametrize("case", [CASES["attention-branch"], CASES["mlp-branch"]], ids=["attention", "mlp"])
def test_only_wanted_gradients_are_computed(case):
    tensors = make(case, torch.float64)
    whole = run(ours, case, tensors)[2:]
    for wanted in range(len(tensors)):
        chosen = [t if place == wanted else t.detach() for place, t in enumerate(tensors)]
        results = ours(case[0], case[4], *chosen)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in results]
        pairs = [(y, dy) for y, dy in zip(results, cotangents, strict=True) if y.requires_grad]
        (got,) = torch.autograd.grad([y for y, _ in pairs], chosen[wanted], [dy for _, dy in pairs])
        assert_close(got, whole[wanted])


@pytest.mark.parametrize("case", [CASES["attention-branch"], CASES["mlp-branch"]], ids=["attention", "mlp"])
def test_either_result_alone_and_another_width(case):
    tensors = make(case, torch.float64)
    narrow = [t[:-4] if place in (5, 6) else t for place, t in enumerate(tensors)]
    for given in (tensors, narrow):
        for result in (0, 1):
            got, want = (
                torch.autograd.grad(
                    function(case[0], False, *given)[result].square().sum(),
                    tensors,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for function in (ours, plain)
            )
            assert_close(got, want)


@pytest.mark.parametrize("case", [CASES["attention-branch"], CASES["mlp-branch-residual"]], ids=["attention", "mlp"])
@pytest.mark.parametrize("frozen, fewer", [((3, 4, 5, 6), 1), ((8,), 2), ((1, 2, 3, 4, 5, 6, 8), 3)], ids=str)
def test_frozen_parts_keep_less(case, frozen, fewer):
    """Only the gradient of the first weight needs y; only the gradient of the gate needs x and branch."""
    whole, tensors = make(case, torch.float64), make(case, torch.float64)
    tensors = [t.detach() if place in frozen else t for place, t in enumerate(tensors)]
    trained = [t for t in tensors if t.requires_grad]

    def kept(given):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
            ours(case[0], case[4], *given)
        return sum(t.nbytes for t in found.values())

    assert kept(whole) - kept(tensors) == fewer * whole[0].nbytes

    def call(*given):
        given = iter(given)
        return ours(case[0], case[4], *[next(given) if t.requires_grad else t for t in tensors])

    torch._dynamo.reset()
    got = [
        torch.autograd.grad(f(*trained)[1].square().sum(), trained)
        for f in (call, torch.compile(call, backend="aot_eager"))
    ]
    want = torch.autograd.grad(plain(case[0], case[4], *tensors)[1].square().sum(), trained)
    assert_close(got, [want, want])
    torch.autograd.gradgradcheck(call, trained, fast_mode=True)


class Extension:
    """The halves of dcae_fast._C, computed by the description. Plans are strings."""

    def __init__(self):
        self.called = []

    def norm_attention(self, *args):
        return self.forward(NormAttention, *args)

    def norm_mlp(self, *args):
        return self.forward(NormMlp, *args)

    def norm_attention_backward(self, dout, y, qkv, attended, lse, *args):
        return self.backward(NormAttention, dout, (None, y, qkv, attended, lse), *args)

    def norm_mlp_backward(self, dout, y, h, *args):
        return self.backward(NormMlp, dout, (None, y, h), *args)

    def forward(self, half, *args):
        *inputs, first, second = args
        self.called.append((half.name, first, second))
        return half(*inputs).forward(as_kernel)

    def backward(self, half, dout, kept, w_in, b_in, w_out, b_out, option, *plans):
        self.called.append((f"{half.name}_backward", *plans))
        layers = dict(zip(("w_in", "b_in", "w_out", "b_out"), (w_in, b_in, w_out, b_out), strict=True))
        inputs = dict.fromkeys(half._fields) | layers | {half._fields[len(INPUTS)]: option}
        wants = dict.fromkeys(half._fields) | {name: layer is not None for name, layer in layers.items()}
        return half(**inputs).backward(as_kernel, dout, half.Kept(*kept), half(**wants))


@every_case
def test_fused_calls(case, monkeypatch):
    half, tensors, extension = case[0], make(case, torch.float32), Extension()
    expected = run(ours, case, tensors)
    module = importlib.import_module(f"dcae_fast.ops.norm_{half}")
    monkeypatch.setattr(module, "cuda_extension", lambda: extension)
    monkeypatch.setattr(module, "fits", lambda *_: True, raising=False)
    monkeypatch.setattr(Half, "forward_plans", lambda *_: ("in", "out"))
    monkeypatch.setattr(Half, "backward_plans", lambda *_: ("in", "w_in", "out", "w_out"))
    assert_close(run(ours, case, tensors), expected, atol=0, rtol=0)
    called = [(f"norm_{half}", "in", "out"), (f"norm_{half}_backward", "in", "w_in", "out", "w_out")]
    assert extension.called == (called if ops.has_kernels(tensors[0]) else [])


@pytest.mark.parametrize("op, case", [(norm_attention_op, "attention-branch"), (norm_mlp_op, "mlp-branch")])
def test_prepared_halves_fuse_as_soon_as_there_are_plans(op, case, monkeypatch):
    tensors, extension, plans = make(CASES[case], torch.float32), Extension(), {}
    x, scale, shift, *layers, branch, gate = (tensor.detach() for tensor in tensors)
    options = (HEADS, False) if op is norm_attention_op else ("gelu", False)
    args = x, scale, shift, EPS, branch, gate, torch.float32, *layers, False, *options
    assert op.kernel._prepare(*args) is None, "the extension does not take float32"
    monkeypatch.setattr(Half, "forward_keys", lambda _: ("in", "out"))
    monkeypatch.setattr(NormAttention, "fuses", lambda _: True)
    monkeypatch.setattr(_plans, "found", plans.get)
    monkeypatch.setattr(_block_half, "cuda_extension", lambda: extension)
    prepared = op.kernel._prepare(*args)
    expected = prepared(*args)
    assert not extension.called
    plans.update({"in": "plan", "out": "another"})
    assert_close(prepared(*args), expected, atol=0, rtol=0)
    assert extension.called == [(op.overload.name().split("::")[1], "plan", "another")]


@pytest.mark.parametrize("half", [NormAttention, NormMlp])
def test_the_extension_takes_the_inputs_in_order(half):
    """The names of the parameters in C++, which are passed by place."""
    source = (Path(__file__).parents[2] / "csrc" / "bindings" / "block_halves.cpp").read_text()

    def parameters(function):
        (declared,) = re.findall(rf"Tensors {function}\(([^{{]*)\) {{", source)
        return [re.sub(r"\W", "", parameter.split()[-1]) for parameter in declared.split(",")]

    assert parameters(half.name) == [*half._fields, "in_plan", "out_plan"]
    option = half._fields[len(INPUTS)]
    operands = ["dout", *half.Kept._fields[1:], "w_in", "b_in", "w_out", "b_out", option]
    assert parameters(f"{half.name}_backward") == [*operands, "in_plan", "w_in_plan", "out_plan", "w_out_plan"]


@pytest.mark.parametrize("half, message", [("attention", "w_qkv"), ("mlp", "bias")])
def test_bad_input_is_refused(half, message):
    x, d, w = torch.randn(2, 3, 8), torch.randn(8), torch.randn(20, 8)
    with pytest.raises(ValueError, match=message):
        ours(half, True, x, d, d, w, d if half == "mlp" else None, w.T, None)
    with pytest.raises(ValueError, match="expected"):
        ours(half, True, x, d[:4], d, w, None, w.T, None)
    with pytest.raises(ValueError, match="act='relu'"):
        ops.norm_mlp(x, d, d, EPS, w, None, w.T, None, act="relu")
