"""dcae_fast._C.gelu_backward against the formula in float64."""

import pytest
import torch
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, random, relative_error
from torch.testing import assert_close

from dcae_fast.ops.mlp import gelu_backward_op, gelu_backward_reference

pytestmark = NEEDED

ACTS = ["gelu", "gelu_tanh"]
SIZES = [(1, 8), (3, 264), (7, 2, 512), (66, 4608), (5000, 248), (33000, 16)]


@pytest.fixture
def gelu_backward():
    """(dg, h, act, wants_g) -> (dh, g, sums of dh)."""
    from dcae_fast import _C

    return _C.gelu_backward


@pytest.mark.parametrize("half", CEILINGS, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_float64(gelu_backward, sizes, act, half):
    torch.manual_seed(0)
    dg, h = random(half, *sizes), 3 * random(half, *sizes)
    exact = gelu_backward_reference(dg.double(), h.double(), act, True)
    eager = gelu_backward_reference(dg, h, act, True)
    got = gelu_backward(dg, h, act, True)
    for mine, plain, want in zip(got, eager, exact, strict=True):
        assert mine.dtype == plain.dtype and mine.shape == plain.shape and mine.is_contiguous()
        limit = max(2 * relative_error(plain, want), 4 * torch.finfo(mine.dtype).eps)
        assert relative_error(mine, want) <= min(limit, CEILINGS[half])
    alone = gelu_backward(dg, h, act, False)
    assert torch.equal(alone[0], got[0]) and alone[1].numel() == 0 and torch.equal(alone[2], got[2])
    assert all(map(torch.equal, gelu_backward_op(dg, h, act, True), got))


@pytest.mark.parametrize("act", ACTS)
def test_far_from_zero(gelu_backward, act):
    """Arguments whose exponentials overflow or underflow."""
    h = torch.tensor([-3e38, -1e4, -100.0, -10.0, 10.0, 100.0, 1e4, 3e38], device="cuda").bfloat16()
    dh, g, sums = gelu_backward(torch.ones_like(h), h, act, True)
    finite = h.abs() < 1e18  # h³ of larger values overflows float32
    expected = (h > 0).to(h)
    for got, want in ((dh, expected), (g, h * expected), (sums, expected.float())):
        assert_close(got[finite], want[finite], rtol=0, atol=1e-6)


@pytest.mark.parametrize("act", ACTS)
def test_nan_stays_in_its_element_and_column(gelu_backward, act):
    dg, h = random(torch.bfloat16, 50, 264), random(torch.bfloat16, 50, 264)
    h[7, 5] = float("nan")
    dh, g, sums = gelu_backward(dg, h, act, True)
    assert dh.isnan().nonzero().tolist() == [[7, 5]] == g.isnan().nonzero().tolist()
    assert sums.isnan().nonzero().tolist() == [[5]]


def test_the_same_twice(gelu_backward):
    dg, h = random(torch.bfloat16, 4224, 2048), random(torch.bfloat16, 4224, 2048)
    first = gelu_backward(dg, h, "gelu", True)
    for _ in range(3):
        assert all(map(torch.equal, gelu_backward(dg, h, "gelu", True), first))


def test_nothing(gelu_backward):
    empty = torch.empty(0, 16, dtype=torch.float16, device="cuda")
    dh, g, sums = gelu_backward(empty, empty, "gelu", True)
    assert dh.shape == g.shape == (0, 16) and torch.equal(sums, torch.zeros(16, device="cuda"))
    assert [tensor.shape for tensor in gelu_backward_op(empty.T[:3, :0], empty.T[:3, :0], "gelu", True)] == [
        (3, 0),
        (3, 0),
        (0,),
    ]


def test_more_than_2_to_the_31_elements(gelu_backward):
    dg, h = (random(torch.bfloat16, 1000, 4608) for _ in range(2))
    times = 2**31 // h.numel() + 2
    dh = gelu_backward(dg.repeat(times, 1), h.repeat(times, 1), "gelu", False)[0]
    assert torch.equal(dh[-1000:], gelu_backward(dg, h, "gelu", False)[0])


def test_runs_in_a_graph(gelu_backward):
    dg, h = random(torch.bfloat16, 132, 256), random(torch.bfloat16, 132, 256)
    for place in range(3):
        check_in_a_graph(lambda place=place: gelu_backward(dg, h, "gelu", True)[place])


def test_errors_name_the_argument(gelu_backward):
    dg, h = random(torch.bfloat16, 4, 16), random(torch.bfloat16, 4, 16)
    for error, message, arguments in (
        (TypeError, "h must be float16 or bfloat16", (dg, h.float(), "gelu")),
        (TypeError, "dg must be BFloat16", (dg.half(), h, "gelu")),
        (ValueError, "dg must have shape", (dg[:2], h, "gelu")),
        (ValueError, "h must be contiguous", (dg, h.T.contiguous().T, "gelu")),
        (ValueError, "h must have a positive multiple of 8 columns", (dg.view(16, 4), h.view(16, 4), "gelu")),
        (ValueError, "act must be gelu or gelu_tanh", (dg, h, "relu")),
    ):
        with pytest.raises(error, match=message):
            gelu_backward(*arguments, True)
