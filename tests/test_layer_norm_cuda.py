"""dcae_fast._C.layer_norm and layer_norm_backward against the formula in float64."""

from functools import partial

import pytest
import torch
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, random, relative_error
from registration import check_registration

from dcae_fast import ops
from dcae_fast.ops.layer_norm import (
    CUDA_BACKWARD_WIDTHS,
    CUDA_MOST_CHANNELS,
    layer_norm_backward_reference,
    layer_norm_reference,
)

pytestmark = NEEDED

EPS = 1e-6
FORMS = ["parameters", "of_image", "branch"]
NAMES = "dx", "dscale", "dshift", "dbranch", "dgate"
WIDTH = max(CUDA_BACKWARD_WIDTHS)
WIDTHS = [8, 104, 512, 768, 1152, CUDA_MOST_CHANNELS]


@pytest.fixture
def forward():
    """(x, scale, shift, eps, branch, gate, dtype) -> (sum with the branch, norm of it)."""
    from dcae_fast import _C

    return _C.layer_norm


@pytest.fixture
def backward():
    """(dy, dsum, total, scale, branch, gate, eps, dtype) -> the gradients of NAMES."""
    from dcae_fast import _C

    return _C.layer_norm_backward


def make_norm(form, images, tokens, half, tokens_dtype, scale_dtype=None, width=WIDTH):
    """x, scale, shift, eps, branch, gate: with parameters, with an image's own scale and shift, or with a branch."""
    shape = images, tokens, width
    of = shape[2:] if form == "parameters" else (images, width)
    scale, shift = (random((scale_dtype or half) if form == "parameters" else half, *of) for _ in range(2))
    branch, gate = (random(half, *shape), random(half, *of)) if form == "branch" else (None, None)
    return [random(tokens_dtype, *shape), scale, shift, EPS, branch, gate]


def make(form, images, tokens, half, tokens_dtype, scale_dtype=None, dsum=True, width=WIDTH):
    """dy, dsum, and total, scale, branch, gate, eps."""
    total, scale, _, eps, branch, gate = make_norm(form, images, tokens, half, tokens_dtype, scale_dtype, width)
    dsum = random(tokens_dtype, *total.shape) if dsum else None
    return [random(half, *total.shape), dsum, total, scale, branch, gate, eps]


def check(function, reference, names, arguments, dtype, half):
    """The error is at most that of the formula in torch on the same tensors, or one rounding."""
    exact = reference(*(a.double() if torch.is_tensor(a) else a for a in arguments), torch.float64)
    eager = reference(*arguments, dtype)
    for name, got, plain, want in zip(names, function(*arguments, dtype), eager, exact, strict=True):
        assert got.dtype == plain.dtype and got.shape == plain.shape and got.is_contiguous(), name
        if got.numel():
            limit = max(2 * relative_error(plain, want), 4 * torch.finfo(got.dtype).eps)
            assert relative_error(got, want) <= min(limit, CEILINGS[half]), name


def check_refused(function, arguments, error, message, place, value):
    """Replacing an argument by another value raises this error."""
    with pytest.raises(error, match=message):
        function(*arguments[:place], value, *arguments[place + 1 :])


def check_forward(forward, arguments, half):
    check(forward, layer_norm_reference, ("total", "y"), arguments, half, half)


def check_backward(backward, arguments):
    check(backward, layer_norm_backward_reference, NAMES, arguments, arguments[2].dtype, arguments[0].dtype)


@pytest.mark.parametrize("half", CEILINGS, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["half", "float32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_agrees_with_float64(forward, width, form, wide, half):
    torch.manual_seed(0)
    tokens_dtype = torch.float32 if wide else half
    for images, tokens in ((1, 1), (3, 7), (2, 66), (5, 256)):
        check_forward(forward, make_norm(form, images, tokens, half, tokens_dtype, width=width), half)
    if form == "parameters":
        check_forward(forward, make_norm(form, 2, 66, half, tokens_dtype, torch.float32, width), half)


def test_forward_of_a_large_mean(forward):
    arguments = make_norm("parameters", 2, 66, torch.bfloat16, torch.float32)
    arguments[0] += 1e3
    check_forward(forward, arguments, torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_forward_of_nothing(forward, form):
    for images, tokens in ((0, 3), (3, 0)):
        total, y = forward(*make_norm(form, images, tokens, torch.bfloat16, torch.float32), torch.bfloat16)
        assert y.shape == (images, tokens, WIDTH) and total.numel() == 0


def test_forward_keeps_nan_in_its_token(forward):
    for width in WIDTHS:
        arguments = make_norm("branch", 3, 20, torch.bfloat16, torch.float32, width=width)
        arguments[0][1, 7, 3] = float("nan")
        total, y = forward(*arguments, torch.bfloat16)
        assert total.isnan().nonzero().tolist() == [[1, 7, 3]]
        assert y[1, 7].isnan().all() and y.isnan().any(2).nonzero().tolist() == [[1, 7]]


def test_forward_of_more_than_2_to_the_31_elements(forward):
    arguments = make_norm("parameters", 100, 66, torch.bfloat16, torch.bfloat16)
    x, *rest = arguments
    times = 2**31 // x.numel() + 2
    y = forward(x.repeat(times, 1, 1), *rest, torch.bfloat16)[1]
    assert torch.equal(y[-100:], forward(*arguments, torch.bfloat16)[1])


def test_forward_runs_in_a_graph(forward):
    arguments = make_norm("branch", 4, 66, torch.bfloat16, torch.float32)
    for place in range(2):
        check_in_a_graph(lambda place=place: forward(*arguments, torch.bfloat16)[place])


def test_the_operator_runs_the_forward(forward):
    x, scale, shift, eps, branch, gate = make_norm("branch", 66, 4, torch.bfloat16, torch.float32, width=256)
    strided = x.transpose(0, 1), scale[:4], shift[:4], eps, branch.transpose(0, 1), gate[:4], torch.bfloat16
    expected = forward(*(a.contiguous() if torch.is_tensor(a) else a for a in strided))
    for call in (ops.layer_norm, torch.compile(ops.layer_norm, fullgraph=True)):
        assert all(map(torch.equal, call(*strided), expected))


def test_errors_of_the_forward_name_the_argument(forward):
    arguments = [*make_norm("branch", 2, 5, torch.bfloat16, torch.float32), torch.bfloat16]
    refused = partial(check_refused, forward, arguments)
    refused(ValueError, "x must be on a CUDA device", 0, arguments[0].cpu())
    refused(ValueError, r"x must have shape \[B, N, D\]", 0, arguments[0][..., :1148])
    refused(ValueError, "x must be contiguous", 0, arguments[0].transpose(0, 1).contiguous().transpose(0, 1))
    refused(TypeError, "dtype must be float16 or bfloat16", 6, torch.float32)
    refused(TypeError, "scale must be BFloat16", 1, arguments[1].float())
    refused(ValueError, "shift must have shape", 2, arguments[2][:1])
    refused(ValueError, "branch must have shape", 4, arguments[4][:1])
    refused(ValueError, "branch and gate: expected both", 5, None)


@pytest.mark.parametrize("half", CEILINGS, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["half", "float32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", CUDA_BACKWARD_WIDTHS)
def test_agrees_with_float64(backward, width, form, wide, half):
    torch.manual_seed(0)
    tokens_dtype = torch.float32 if wide else half
    for images, tokens in ((1, 1), (3, 7), (2, 66), (5, 256)):
        for dsum in (True, False):
            check_backward(backward, make(form, images, tokens, half, tokens_dtype, dsum=dsum, width=width))
    if form == "parameters":
        check_backward(backward, make(form, 2, 66, half, tokens_dtype, torch.float32, width=width))


@pytest.mark.parametrize("images", [131, 132, 133, 160, 300, 700])
@pytest.mark.parametrize("width", CUDA_BACKWARD_WIDTHS)
def test_agrees_however_images_fill_the_gpu(backward, width, images):
    check_backward(backward, make("branch", images, 66, torch.bfloat16, torch.float32, width=width))


def test_a_large_mean(backward):
    arguments = make("parameters", 2, 66, torch.bfloat16, torch.float32)
    arguments[2] += 1e3
    check_backward(backward, arguments)


def test_nan_stays_in_its_token_and_the_sums(backward):
    arguments = make("branch", 3, 20, torch.bfloat16, torch.float32)
    arguments[0][1, 7, 5] = float("nan")
    dx, dscale, dshift, dbranch, dgate = backward(*arguments, torch.float32)
    expected = torch.zeros(3, 20, dtype=torch.bool, device="cuda")
    expected[1, 7] = True
    for gradient in (dx, dbranch):
        assert torch.equal(gradient.isnan().any(2), expected) and gradient[1, 7].isnan().all()
    assert torch.equal(dgate.isnan().any(1), expected.any(1))
    assert dshift.isnan().nonzero().tolist() == [[1, 5]] == dscale.isnan().nonzero().tolist()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_twice(backward, form):
    arguments = make(form, 64, 66, torch.bfloat16, torch.float32)
    first = backward(*arguments, torch.float32)
    for _ in range(3):
        assert all(map(torch.equal, backward(*arguments, torch.float32), first))


def test_more_than_2_to_the_31_elements(backward):
    arguments = make("parameters", 100, 66, torch.bfloat16, torch.bfloat16)
    dx = backward(*arguments, torch.bfloat16)[0]
    times = 2**31 // dx.numel() + 2
    many = [a.repeat(times, 1, 1) if torch.is_tensor(a) and a.dim() == 3 else a for a in arguments]
    assert torch.equal(backward(*many, torch.bfloat16)[0][-100:], dx)


def test_runs_in_a_graph(backward):
    arguments = make("branch", 4, 66, torch.bfloat16, torch.float32)
    for place in range(len(NAMES)):
        check_in_a_graph(lambda place=place: backward(*arguments, torch.float32)[place])


def test_the_operator_runs_it(backward):
    """The operator agrees through autograd, with strided tensors, compiled and not compiled."""
    dy, _, x, scale, branch, gate, _ = make("branch", 66, 4, torch.bfloat16, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x.transpose(0, 1), scale[:4], branch.transpose(0, 1), gate[:4])]
    shift = torch.zeros_like(leaves[1])

    def norm(x, scale, branch, gate):
        return ops.layer_norm(x, scale, shift, EPS, branch, gate, torch.bfloat16)

    dense = [leaf.detach().contiguous() for leaf in leaves]
    total = norm(*dense)[0]
    expected = backward(dy.transpose(0, 1).contiguous(), None, total, dense[1], *dense[2:], EPS, torch.float32)
    expected = [expected[place] for place in (0, 1, 3, 4)]
    for call in (norm, torch.compile(norm, fullgraph=True)):
        gradients = torch.autograd.grad(call(*leaves)[1], leaves, dy.transpose(0, 1))
        assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("width", CUDA_BACKWARD_WIDTHS)
@pytest.mark.parametrize("form", FORMS)
def test_registration(form, width):
    x, scale, shift, eps, branch, gate = make_norm(form, 2, 5, torch.bfloat16, torch.float32, None, width)
    if form == "parameters":
        scale, shift = scale.float(), shift.float()
    leaves = [tensor.requires_grad_() for tensor in (x, scale, shift, branch, gate) if tensor is not None]

    def train():
        s, y = ops.layer_norm(x, scale, shift, eps, branch, gate, torch.bfloat16)
        torch.autograd.grad((s * y).float().square().mean(), leaves)

    check_registration(train)


def test_errors_name_the_argument(backward):
    arguments = [*make("branch", 2, 5, torch.bfloat16, torch.float32), torch.float32]
    refused = partial(check_refused, backward, arguments)
    refused(TypeError, "dy must be float16 or bfloat16", 0, arguments[0].float())
    refused(ValueError, "dy must have shape", 0, arguments[0][:1])
    refused(ValueError, r"total must have shape \[B, N, 512 or 1152\]", 2, arguments[2][..., :1024])
    refused(TypeError, "total must be BFloat16", 7, torch.bfloat16)
    refused(TypeError, "dtype must be BFloat16 as dy or Float", 7, torch.float16)
    refused(ValueError, "dsum must be contiguous", 1, arguments[1].transpose(0, 1).contiguous().transpose(0, 1))
    refused(TypeError, "scale must be BFloat16", 3, arguments[3].float())
    refused(ValueError, "branch and gate: expected both", 5, None)
