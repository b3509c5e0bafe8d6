"""`linear` and `mlp` against PyTorch's own layers: results, gradients, types, registration; and through cuBLASLt."""

import importlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accuracy import CEILING, allowed, relative_error
from registration import check_registration
from torch.testing import assert_close

from dcae_fast import ops
from dcae_fast.ops import _plans, _products

linear, mlp = (importlib.import_module(f"dcae_fast.ops.{name}") for name in ("linear", "mlp"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}
HALVES = (torch.bfloat16, torch.float16)


def plain_linear(x, weight, bias=None, residual=None, act="none"):
    y = F.linear(x, weight, bias)
    y = y if act == "none" else F.gelu(y, approximate=APPROXIMATION[act])
    return y if residual is None else y + residual


def plain_mlp(x, w1, b1, w2, b2, residual=None, act="gelu"):
    return plain_linear(plain_linear(x, w1, b1, act=act), w2, b2, residual)


def case(function, rows, widths, bias=True, residual=False, act="none"):
    """The function of ops, the same in plain PyTorch, the shapes of their arguments (None: absent), the activation."""
    layers = [shape for k, m in itertools.pairwise(widths) for shape in ((m, k), (m,) if bias else None)]
    plain = {ops.linear: plain_linear, ops.mlp: plain_mlp}[function]
    return function, plain, [(*rows, widths[0]), *layers, (*rows, widths[-1]) if residual else None], act


CASES = {
    "linear": case(ops.linear, (7,), (8, 16)),
    "linear-no_bias": case(ops.linear, (2, 5), (16, 24), bias=False),
    "linear-residual": case(ops.linear, (2, 3, 4), (8, 24), residual=True),
    "linear-residual-no_bias": case(ops.linear, (5,), (8, 8), bias=False, residual=True),
    "linear-gelu": case(ops.linear, (2, 5), (16, 24), act="gelu"),
    "linear-gelu-no_bias": case(ops.linear, (3,), (8, 16), bias=False, act="gelu_tanh"),
    "linear-gelu-residual": case(ops.linear, (3,), (8, 16), residual=True, act="gelu"),
    "linear-vector": case(ops.linear, (), (8, 16), residual=True),
    "linear-odd": case(ops.linear, (3,), (7, 5), residual=True),
    "linear-one_row": case(ops.linear, (1,), (32, 8)),
    "linear-empty": case(ops.linear, (2, 0), (8, 16), residual=True),
    "mlp": case(ops.mlp, (2, 5), (8, 32, 16), act="gelu"),
    "mlp-residual": case(ops.mlp, (2, 5), (8, 32, 8), residual=True, act="gelu"),
    "mlp-tanh": case(ops.mlp, (7,), (16, 24, 8), act="gelu_tanh"),
    "mlp-no_bias": case(ops.mlp, (7,), (16, 24, 8), bias=False, residual=True, act="gelu"),
    "mlp-odd": case(ops.mlp, (3,), (7, 9, 5), residual=True, act="gelu"),
    "mlp-empty": case(ops.mlp, (0, 3), (8, 16, 8), residual=True, act="gelu"),
}
every_case = pytest.mark.parametrize("function, plain, shapes, act", CASES.values(), ids=CASES)


def make(shapes, dtype, residual_dtype=None, device=DEVICE):
    """A tensor for each shape, None for None; the last is the residual. Weights are scaled to keep the variance."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for place, shape in enumerate(shapes):
        if shape is None:
            tensors.append(None)
            continue
        is_weight = len(shape) == 2 and 0 < place < len(shapes) - 1
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64) / (shape[1] ** 0.5 if is_weight else 1)
        own_dtype = residual_dtype if residual_dtype and place == len(shapes) - 1 else dtype
        tensors.append(tensor.to(device, own_dtype).requires_grad_())
    return tensors


def run(function, tensors, act):
    """The result and the gradients of all tensors that are not None, for a fixed cotangent."""
    y = function(*tensors, act=act)
    generator = torch.Generator().manual_seed(1)  # random: sums that cancel would show the rounding of dy alone
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad(y, [tensor for tensor in tensors if tensor is not None], dy)]


def check_errors(got, eager, exact, ceiling):
    """On a GPU the products are kernels and stay below the ceiling; on a CPU they are as exact as in PyTorch."""
    for mine, theirs, want in zip(got, eager, exact, strict=True):
        limit = ceiling if DEVICE == "cuda" else allowed(relative_error(theirs, want), mine.dtype, by_kernel=False)
        assert relative_error(mine, want) <= limit


def double(tensors):
    return [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]


@every_case
def test_equals_the_plain_layers(function, plain, shapes, act):
    tensors = make(shapes, torch.float64)
    assert_close(run(function, tensors, act), run(plain, tensors, act))
    with torch.no_grad():
        y = function(*tensors, act=act)
        assert_close(y, plain(*tensors, act=act))
        assert y.is_contiguous()


@every_case
def test_strides_do_not_matter(function, plain, shapes, act):
    tensors = make(shapes, torch.float64)
    strided = [
        None if tensor is None else tensor.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
        for tensor in tensors
    ]
    assert_close(run(function, strided, act), run(function, tensors, act))


@every_case
def test_results_can_be_changed_in_place(function, plain, shapes, act):
    tensors = make(shapes, torch.float32)
    present = [tensor for tensor in tensors if tensor is not None]
    want = torch.autograd.grad((2 * function(*tensors, act=act)).sum(), present)
    assert_close(torch.autograd.grad(function(*tensors, act=act).mul_(2).sum(), present), want)


@every_case
def test_gradients_of_gradients(function, plain, shapes, act):
    tensors = make(shapes, torch.float64, device="cpu")
    present = [tensor for tensor in tensors if tensor is not None]

    def call(*given):
        given = iter(given)
        return function(*[None if tensor is None else next(given) for tensor in tensors], act=act)

    torch.autograd.gradcheck(call, present, fast_mode=True)
    torch.autograd.gradgradcheck(call, present, fast_mode=True)


@every_case
def test_registration(function, plain, shapes, act):
    tensors = make(shapes, KERNEL_DTYPE)

    def train_and_infer():
        run(function, tensors, act)
        with torch.no_grad():
            function(*tensors, act=act)

    check_registration(train_and_infer)


@every_case
def test_compiles_whole(function, plain, shapes, act):
    tensors = make(shapes, KERNEL_DTYPE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: function(*args, act=act), fullgraph=True, backend="aot_eager")
    assert_close(run(lambda *args, act: compiled(*args), tensors, act), run(function, tensors, act))


@pytest.mark.parametrize("name", ["linear-residual", "mlp-residual", "linear-odd"])
def test_a_residual_of_higher_precision(name):
    function, plain, shapes, act = CASES[name]
    tensors = make(shapes, torch.bfloat16, residual_dtype=torch.float32)
    y, *gradients = run(function, tensors, act)
    assert y.dtype == torch.float32
    present = [tensor for tensor in tensors if tensor is not None]
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in present]
    exact = run(plain, double(tensors), act)
    check_errors([y, *gradients], run(plain, tensors, act), exact, CEILING[torch.bfloat16])


def test_biases_of_higher_precision():
    x, w1, b1, w2, b2, _ = make(CASES["mlp"][2], torch.bfloat16)
    b1, b2 = (bias.detach().float().requires_grad_() for bias in (b1, b2))
    y = ops.mlp(x, w1, b1, w2, b2)
    y.float().sum().backward()
    assert y.dtype == ops.linear(x, w1, b1).dtype == torch.bfloat16
    assert b1.grad.dtype == b2.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "linear-odd", "linear-gelu", "mlp-residual", "mlp-no_bias"])
def test_weights_of_higher_precision(name):
    """Float32 weights beside half-precision x are rounded."""
    function, plain, shapes, act = CASES[name]
    tensors = make(shapes, torch.bfloat16)
    for place in (place for place, shape in enumerate(shapes[:-1]) if place and shape and len(shape) == 2):
        tensors[place] = tensors[place].detach().float().requires_grad_()
    y, *gradients = run(function, tensors, act)
    assert y.dtype == torch.bfloat16
    present = [tensor for tensor in tensors if tensor is not None]
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in present]
    rounded = [None if t is None else t.detach().to(torch.bfloat16).requires_grad_() for t in tensors]
    exact = run(plain, double(tensors), act)
    check_errors([y, *gradients], run(plain, rounded, act), exact, CEILING[torch.bfloat16])
    with torch.no_grad():
        assert torch.equal(function(*tensors, act=act), function(*rounded, act=act))


LONG = (3001, 768), (1152, 768), (1152,)


@pytest.mark.parametrize(
    "shapes", [CASES["linear"][2], CASES["linear-odd"][2], LONG if DEVICE == "cuda" else ((3001, 24), (16, 24), (16,))]
)
def test_gradients_of_float32_weights_are_not_rounded(shapes):
    x, weight, bias = make(shapes[:3], torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    dy = torch.randn_like(y := ops.linear(x, weight, bias))
    (got,) = torch.autograd.grad(y, weight, dy)
    exact, eager = (dy.to(dtype).T @ x.to(dtype) for dtype in (torch.float64, torch.float32))
    check_errors([got], [eager], [exact], 1e-5)


@pytest.mark.parametrize("act", APPROXIMATION)
@pytest.mark.parametrize("weights", ["trained", "frozen"])
def test_gradients_of_biases_are_not_rounded(weights, act):
    """The gradients are sums in float32 of the half-precision gradients of the layers' results."""
    x, w1, b1, w2, b2, _ = make(CASES["mlp"][2], torch.bfloat16)
    w1, b1, w2, b2 = (tensor.detach().float().requires_grad_() for tensor in (w1, b1, w2, b2))
    if weights == "frozen":
        w1, w2 = w1.detach(), w2.detach()
    y = ops.mlp(x.detach(), w1, b1, w2, b2, act=act)
    dy = torch.randn_like(y)
    db1, db2 = torch.autograd.grad(y, [b1, b2], dy)
    with torch.no_grad():
        _, h = mlp.mlp_op(x, w1, b1, w2, b2, None, act)
        dh, _, of_columns = mlp.gelu_backward_op(linear.linear_backward_input_op(dy, w2), h, act, False)
    for got, summed in ((db1, dh), (of_columns, dh), (db2, dy)):
        check_sum(got, summed)
    (dbias,) = torch.autograd.grad(ops.linear(x.detach(), w1, b1), b1, dh)
    check_sum(dbias, dh)


def check_sum(got, summed):
    """Checks that the result is as exact as a sum in float32."""
    assert got.dtype == torch.float32
    rows = summed.flatten(0, 1)
    check_errors([got], [rows.float().sum(0)], [rows.double().sum(0)], 1e-6)


def test_autocast_changes_nothing():
    function, _, shapes, act = CASES["mlp-residual"]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = make(shapes, dtype)
        expected = run(function, tensors, act)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_close(run(function, tensors, act), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["linear", "linear-residual", "mlp-residual"])
def test_a_frozen_weight_keeps_no_input(name):
    function, _, shapes, act = CASES[name]
    x, weight, *others = make(shapes, torch.float64)

    def keeps_x(weight):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
            function(x, weight, *others, act=act)
        return x.data_ptr() in kept

    assert keeps_x(weight) and not keeps_x(weight.detach())
    tensors = [x, *others]
    torch.autograd.gradgradcheck(lambda x, *others: function(x, weight.detach(), *others, act=act), tensors)


@pytest.mark.parametrize("act", APPROXIMATION)
def test_gelu_is_computed_again_for_a_second_weight_alone(act, monkeypatch):
    x, w1, b1, w2, b2, _ = make(CASES["mlp"][2], KERNEL_DTYPE)
    first, sizes, gelu_backward_op = [x, w1, b1], [], mlp.gelu_backward_op

    def record(*args):
        dh, g, db1 = gelu_backward_op(*args)
        sizes.append(g.numel())
        return dh, g, db1

    monkeypatch.setattr(mlp, "gelu_backward_op", record)
    whole = torch.autograd.grad(ops.mlp(*first, w2, b2, act=act).sum(), first)
    frozen = torch.autograd.grad(ops.mlp(*first, w2.detach(), b2, act=act).sum(), first)
    assert_close(frozen, whole, atol=0, rtol=0)
    assert sizes == [x[..., 0].numel() * w1.shape[0], 0]
    check_registration(lambda: torch.autograd.grad(ops.mlp(*first, w2.detach(), b2, act=act).sum(), first))


def test_only_wanted_gradients_are_computed():
    x, w1, b1, w2, b2, _ = make(CASES["mlp"][2], torch.float64)
    frozen = [tensor.detach() for tensor in (x, w1, b1)]
    whole = torch.autograd.grad(ops.mlp(x, w1, b1, w2, b2).sum(), [x, w2, b2])
    assert_close(torch.autograd.grad(ops.mlp(*frozen, w2, b2).sum(), [w2, b2]), whole[1:])
    assert_close(torch.autograd.grad(ops.mlp(x, *frozen[1:], w2.detach(), b2).sum(), [x, b2]), (whole[0], whole[2]))
    (dx,) = torch.autograd.grad(ops.linear(x, frozen[1], frozen[2]).sum(), x)
    assert_close(dx, w1.sum(0).expand_as(x))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: ops.linear(x, x[:, :3]), "expected"),
        (lambda x: ops.linear(x, x.double()), "one type"),
        (lambda x: ops.linear(x[0, 0], x), "expected"),
        (lambda x: ops.linear(x, x, x[0, :3]), "bias"),
        (lambda x: ops.linear(x, x, None, x[:3]), "residual"),
        (lambda x: ops.linear(x, x, act="relu"), "relu"),
        (lambda x: ops.mlp(x, x, None, x, None, act="none"), "none"),
        (lambda x: ops.mlp(x, x[:4], None, x, None), "expected"),
        (lambda x: ops.mlp(x, x, None, x, None, x[:3]), "residual"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_input_is_refused(call, message, training):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(8, 8, requires_grad=training))


needs_cublaslt = pytest.mark.skipif(not _products.available(), reason="dcae_fast._C was not built with cuBLASLt")
LARGE = {  # worth a search
    "linear": case(ops.linear, (3001,), (768, 1152)),
    "linear-no_bias": case(ops.linear, (3001,), (768, 1152), bias=False),
    "linear-residual": case(ops.linear, (3001,), (1152, 768), residual=True),
    "linear-residual-no_bias": case(ops.linear, (3001,), (1152, 768), bias=False, residual=True),
    "linear-gelu": case(ops.linear, (3001,), (768, 1536), act="gelu"),
    "mlp": case(ops.mlp, (3, 1001), (768, 1536, 768), residual=True, act="gelu"),
    "mlp-no_bias": case(ops.mlp, (3, 1001), (768, 1536, 768), bias=False, act="gelu_tanh"),
}


def check_against_double(function, plain, tensors, act, dtype):
    exact = run(plain, double(tensors), act)
    for got, eager, want in zip(run(function, tensors, act), run(plain, tensors, act), exact, strict=True):
        assert got.dtype == eager.dtype
        assert relative_error(got, want) <= allowed(relative_error(eager, want), dtype)
    with torch.no_grad():
        assert relative_error(function(*tensors, act=act), exact[0]) <= CEILING[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "function, plain, shapes, act", [*CASES.values(), *LARGE.values()], ids=[*CASES, *map("large-{}".format, LARGE)]
)
def test_in_half_precision(function, plain, shapes, act, dtype, residual_dtype, empty_cache):
    check_against_double(function, plain, make(shapes, dtype, residual_dtype), act, dtype)


@pytest.mark.gpu
@needs_cublaslt
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("function, plain, shapes, act", LARGE.values(), ids=LARGE)
def test_every_candidate_is_right_and_deterministic(function, plain, shapes, act, residual_dtype, empty_cache):
    tensors = make(shapes, torch.bfloat16, residual_dtype)
    check_against_double(function, plain, tensors, act, torch.bfloat16)
    (file,) = empty_cache.iterdir()
    names = list(json.loads(file.read_text()))
    assert len(names) == len(_plans._plans)
    for candidate in range(_plans.NO_PLAN, 12):
        _plans._plans.clear()
        file.write_text(json.dumps(dict.fromkeys(names, candidate)))
        check_against_double(function, plain, tensors, act, torch.bfloat16)
        for first, second in zip(run(function, tensors, act), run(function, tensors, act), strict=True):
            assert torch.equal(first, second)


@pytest.mark.gpu
@needs_cublaslt
@pytest.mark.parametrize("function, plain, shapes, act", LARGE.values(), ids=LARGE)
def test_cublaslt_takes_every_product(function, plain, shapes, act, empty_cache, recwarn):
    run(function, make(shapes, torch.bfloat16), act)
    if shapes[-1] is not None:
        run(function, make(shapes, torch.bfloat16, torch.float32), act)
    assert _plans._plans and not [str(warning.message) for warning in recwarn if "cuBLASLt" in str(warning.message)]


@pytest.mark.gpu
@torch.no_grad()
def test_a_new_shape_within_a_capture(empty_cache):
    function, plain, shapes, act = LARGE["mlp"]
    tensors = make(shapes, torch.bfloat16)
    plain(*tensors, act=act)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = function(*tensors, act=act)
    got.fill_(float("nan"))
    graph.replay()
    assert not _plans._plans
    assert relative_error(got, plain(*double(tensors), act=act)) <= 1e-2


@pytest.mark.gpu
def test_in_several_threads(empty_cache):
    function, _, shapes, act = LARGE["mlp"]
    tensors = make(shapes, torch.bfloat16)
    torch.cuda.synchronize()

    def call(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = run(function, tensors, act)
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(call, range(8))
    for other in others:
        assert all(map(torch.equal, first, other))


class Extension:
    """A stand-in for dcae_fast._C, which counts casts that autocast would keep."""

    Product = object

    def __init__(self):
        self.casts = []

    def autocast_cast(self, weight, dtype, trains):
        self.casts += [] if trains else [weight]
        return weight.to(dtype)


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["half", "residual"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_prepared_products_round_weights(trains, residual, monkeypatch):
    """Only in inference autocast keeps what they round."""
    extension, plans = Extension(), []
    for module in (linear, _products):
        monkeypatch.setattr(module, "cuda_extension", lambda: extension)
    monkeypatch.setattr(_plans, "found", lambda key: plans[0] if plans else None)
    x, weight, bias = torch.randn(3, 8).bfloat16(), torch.randn(16, 8), torch.randn(16)
    added = None if residual is None else torch.randn(3, 16, dtype=residual)
    prepared = linear._prepare_linear(x, weight, bias, added, trains)

    def plan(x, weight, bias, residual):
        assert (weight.dtype, bias.dtype) == (x.dtype, x.dtype if residual is None else residual.dtype)
        return (linear.linear_reference(x, weight, bias, residual),)

    plans.append(plan)
    expected = linear.linear_reference(x, weight, bias, added)
    assert torch.equal(prepared(x, weight, bias, added, trains), expected)
    rounded = [weight, bias] if residual is None else [weight]
    assert [*map(id, extension.casts)] == ([] if trains else [*map(id, rounded)])
    prepared(x, weight.bfloat16(), bias.to(expected.dtype), added, trains)
    assert len(extension.casts) == (0 if trains else len(rounded)), "nothing to round"
