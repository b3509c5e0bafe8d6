"""8-bit convolutions: exact sums in every shape and tile, the epilogue, registration, plans, refusals."""

import contextlib
import importlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dcae_fast import ops
from dcae_fast.ops import _library, _plans
from dcae_fast.ops._tiles import TileCandidates
from dcae_fast.ops.conv2d_int8 import (
    conv2d_int8_op,
    conv2d_int8_reference,
    few_rows,
    upsample_conv2d_int8_op,
    upsample_conv2d_int8_reference,
)

pytest.importorskip("triton")
from dcae_fast.kernels.conv2d_int8 import TILES, tiles_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernels run in the interpreter
NHWC = torch.channels_last
SHAPES = {  # B, C, K, H, W and the side of the window
    "3x3": (2, 48, 80, 5, 18, 3),
    "3x3-many_filters": (1, 32, 272, 3, 5, 3),
    "3x3-many_channels": (1, 144, 16, 2, 3, 3),
    "3x3-one_pixel": (3, 16, 16, 1, 1, 3),
    "3x3-one_column": (1, 16, 32, 35, 1, 3),
    "3x3-empty": (0, 32, 48, 5, 7, 3),
    "3x3-no_kernel": (1, 20, 9, 4, 3, 3),
    "1x1": (2, 48, 80, 7, 19, 1),
    "1x1-one_pixel": (1, 16, 144, 1, 1, 1),
    "1x1-empty": (0, 16, 16, 2, 2, 1),
    "2x2": (2, 48, 80, 5, 17, 2),
    "2x2-many_filters": (1, 16, 288, 2, 3, 2),
    "2x2-one_pixel": (1, 32, 16, 1, 1, 2),
    "2x2-empty": (0, 32, 16, 3, 5, 2),
}
LARGE = (2, 256, 512, 65, 67, 3), (2, 512, 256, 33, 65, 2), (2, 256, 512, 63, 65, 1)
EXACT = ("none", "relu")  # activations that a kernel and PyTorch compute with the same bits


def integers(*shape, seed=0):
    x = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(DEVICE)
    return x.contiguous(memory_format=NHWC)


def operands(b, c, k, h, w, side):
    """x, weight, scale, bias and residual. They are multiples of 2⁻¹⁵, below 2⁹: the epilogue's sums are exact."""
    planes = 4 if side == 2 else 1
    generator = torch.Generator().manual_seed(1)
    scale = 2.0 ** torch.randint(-15, -12, (planes * k,), generator=generator).to(DEVICE)
    bias = torch.randint(-5000, 5000, (k,), generator=generator).to(DEVICE) / 2**8
    residual = integers(planes * b, k, h, w, seed=2).bfloat16() / 4
    return integers(b, c, h, w), integers(planes * k, c, side, side, seed=3), scale, bias, residual


def factors_of(weight):
    """1 / scale of the channels of the result: powers of two, some of which lead to values beyond ±127."""
    return 2.0 ** (torch.arange(filters_of(weight), device=DEVICE) % 3 - 1)


def filters_of(weight):
    return weight.shape[0] // (4 if weight.shape[2] == 2 else 1)


def function_of(weight):
    return ops.upsample_conv2d_int8 if weight.shape[2] == 2 else ops.conv2d_int8


def reference_of(weight):
    return upsample_conv2d_int8_reference if weight.shape[2] == 2 else conv2d_int8_reference


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_are_exact(shape):
    x, weight, *_ = operands(*shape)
    ones = torch.ones(weight.shape[0], device=DEVICE)
    got, none = function_of(weight)(x, weight, ones, dtype=torch.float32)
    (exact,) = reference_of(weight)(x, weight, ones, None, "none", None, torch.float64, None)
    assert none is None and got.dtype == torch.float32 and got.is_contiguous(memory_format=NHWC)
    assert torch.equal(got.double(), exact)


def test_the_reference_is_the_convolution_of_the_upsampled_image():
    """With sums that fit in int8, the four quantised windows compute what a 3×3 convolution does."""
    x, weight = integers(2, 16, 3, 5), integers(16, 16, 3, 3, seed=1) // 5
    parts = ops.subpixel_weights(weight.float()).to(torch.int8)
    got, _ = ops.upsample_conv2d_int8(x, parts, torch.ones(64, device=DEVICE), dtype=torch.float32)
    large = torch.nn.functional.interpolate(x.float(), scale_factor=2.0, mode="nearest")
    exact = torch.nn.functional.conv2d(large.double(), weight.double(), padding=1)
    for plane, (i, j) in zip(got.chunk(4), itertools.product((0, 1), repeat=2), strict=True):
        assert torch.equal(plane.double(), exact[:, :, i::2, j::2])


@pytest.mark.parametrize("shape", [SHAPES["3x3-many_filters"], SHAPES["1x1"], SHAPES["2x2"]], ids=str)
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("dtype, quantises", [(torch.bfloat16, False), (None, True), (torch.float32, True)])
def test_epilogue(shape, act, dtype, quantises):
    """With every result: the type of y, q with ties and values beyond ±127."""
    x, weight, scale, bias, residual = operands(*shape)
    out_factor = factors_of(weight) if quantises else None
    bias = None if act == "none" else bias
    residual = None if act == "silu" else residual
    got = function_of(weight)(x, weight, scale, bias, act, residual, dtype, out_factor)
    exact = reference_of(weight)(x, weight, scale, bias, act, residual, dtype, out_factor)
    assert [result is not None for result in got] == [dtype is not None, quantises]
    for result, want in zip([result for result in got if result is not None], exact, strict=True):
        assert result.dtype == want.dtype and result.is_contiguous(memory_format=NHWC)
        if act in EXACT and (DEVICE == "cuda" or want.dtype != torch.bfloat16):
            assert torch.equal(result, want)
        elif want.dtype == torch.int8:  # the exponential may differ in its last bits
            assert (result.int() - want.int()).abs().max() <= 1 and (result != want).float().mean() < 1e-3
        else:  # the interpreter truncates to bfloat16
            torch.testing.assert_close(result, want, rtol=2**-7 if want.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_every_tile(tile):
    """The image has several tiles for each program, of which some are cut off."""
    from dcae_fast.kernels.conv2d_int8 import launch_conv2d_int8

    x, weight, scale, bias, residual = operands(1, 48, 272, 9, 18, 3)
    assert tile in tiles_of(torch.empty(512, 512, 3, 3)) and len(tiles_of(weight)) == len(TILES)
    args = x, weight, scale, bias, "relu", residual, torch.float16, factors_of(weight)
    for got, want in zip(launch_conv2d_int8(*args, tile), conv2d_int8_reference(*args), strict=True):
        assert torch.equal(got, want)


def test_layout_in_does_not_matter():
    x, weight, scale, bias, residual = operands(*SHAPES["3x3"])
    expected = ops.conv2d_int8(x, weight, scale, bias, "relu", residual, torch.float32)[0]
    nchw = [tensor.contiguous() for tensor in (x, weight, residual)]
    strided = [tensor.repeat_interleave(2, dim=-1)[..., ::2] for tensor in nchw]
    for x, weight, residual in (nchw, strided):
        assert torch.equal(ops.conv2d_int8(x, weight, scale, bias, "relu", residual, torch.float32)[0], expected)


@pytest.mark.parametrize("name, op", [("1x1-one_pixel", conv2d_int8_op), ("2x2-one_pixel", upsample_conv2d_int8_op)])
def test_registration(name, op):
    x, weight, scale, bias, residual = operands(*SHAPES[name])
    args = x, weight, scale, bias, "relu", residual
    torch.library.opcheck(op.overload, (*args, torch.bfloat16, factors_of(weight)))
    torch.library.opcheck(op.overload, (*args, None, factors_of(weight)), test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole():
    """Two convolutions, the first of which writes the operand of the second and the residual."""
    x, weight, scale, bias, residual = operands(*SHAPES["3x3-one_pixel"])
    parts = integers(64, 16, 2, 2)

    def run(x, residual):
        y, q = ops.conv2d_int8(x, weight, scale, bias, "relu", residual, torch.float32, factors_of(weight))
        return *ops.conv2d_int8(q, weight, scale, bias, residual=y), *ops.upsample_conv2d_int8(q, parts, scale.tile(4))

    expected = run(x, residual)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(x, residual), expected, strict=True):
        assert got is want is None or torch.equal(got, want)


def test_other_gpus_compute_the_reference(monkeypatch):
    module = importlib.import_module("dcae_fast.ops.conv2d_int8")  # the package has the function of this name
    monkeypatch.setattr(_library, "INTERPRETED", False)
    monkeypatch.setattr(module, "is_hopper", lambda device: False)
    monkeypatch.setattr(module, "launcher", None)
    monkeypatch.setattr(module.conv2d_int8_op.kernel, "_ready", {})  # the choice of earlier calls
    x, weight, scale, bias, residual = operands(*SHAPES["1x1"])
    got, _ = ops.conv2d_int8(x, weight, scale, bias, "relu", residual)
    assert torch.equal(got, conv2d_int8_reference(x, weight, scale, bias, "relu", residual, torch.bfloat16, None)[0])


def test_sums_that_do_not_fit_in_int32_are_left_to_the_reference():
    x, weight = (torch.full((1, 14576, 3, 3), -128, dtype=torch.int8, device=DEVICE) for _ in range(2))
    weight = weight.expand(16, -1, -1, -1)
    got, _ = ops.conv2d_int8(x, weight, torch.ones(16, device=DEVICE), dtype=torch.float32)
    assert got[0, 0, 1, 1] == 9 * 14576 * 128**2 > 2**31


def test_refusals():
    x, weight, scale, bias, residual = operands(*SHAPES["1x1"])
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\] and \[K, C, 1, 1\] or"):
        ops.conv2d_int8(x, weight[:, :16], scale)
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\] and \[4 K, C, 2, 2\]"):
        ops.upsample_conv2d_int8(x, weight, scale)
    with pytest.raises(ValueError, match="expected int8, int8 and float32; got x torch.float32"):
        ops.conv2d_int8(x.float(), weight, scale)
    with pytest.raises(ValueError, match=r"scale is \[1\]"):
        ops.conv2d_int8(x, weight, scale[:1])
    with pytest.raises(ValueError, match=r"bias is \[1\]"):
        ops.conv2d_int8(x, weight, scale, bias[:1])
    with pytest.raises(ValueError, match=r"residual is \[1, 80"):
        ops.conv2d_int8(x, weight, scale, residual=residual[:1])
    with pytest.raises(ValueError, match="act='gelu'"):
        ops.conv2d_int8(x, weight, scale, act="gelu")
    with pytest.raises(ValueError, match="at least one result"):
        ops.conv2d_int8(x, weight, scale, dtype=None)
    with pytest.raises(ValueError, match=r"out_factor is \[79\] torch.float32; expected \[80\]"):
        ops.conv2d_int8(x, weight, scale, out_factor=scale[1:])
    with pytest.raises(ValueError, match=r"out_factor is \[80\] torch.float64"):
        ops.conv2d_int8(x, weight, scale, out_factor=scale.double())
    with pytest.raises(RuntimeError, match="no gradients"):
        ops.conv2d_int8(x, weight, scale, residual=residual.requires_grad_())
    with torch.no_grad():
        ops.conv2d_int8(x, weight, scale, residual=residual)


def test_few_rows_have_the_same_kernel():
    """Triton compiles a kernel for integers that are 1 or multiples of 16, and for others: here heights and, in a 1×1
    convolution, numbers of positions.
    """
    for height in range(1, 70):
        x = torch.arange(3 * 2 * height * 5, dtype=torch.float32).view(3, 2, height, 5)
        few = few_rows(x)
        rows = few.shape[2]
        assert torch.equal(few, x[:, :, :rows]) and few.is_contiguous(memory_format=torch.channels_last)
        assert rows < 32 and rows % 16 == height % 16 and (rows == 1) == (height == 1)


def test_candidates_are_built_in_several_threads(monkeypatch):
    """As `_plans` builds them, so that Triton compiles tiles at the same time."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    together = threading.Barrier(3, timeout=60)
    candidates = TileCandidates(["a", "b", "c"], lambda tile: together.wait(), torch.device("cuda", 0))
    with ThreadPoolExecutor(3) as pool:
        assert [plan.tile for plan in pool.map(candidates.build, range(len(candidates)))] == ["a", "b", "c"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(2, 256, 512, 65, 67, 3), (2, 512, 256, 33, 65, 2), (2, 256, 512, 63, 65, 1)], ids=str
)
def test_a_search_finds_a_tile_once(shape, empty_cache):
    x, weight, scale, bias, residual = operands(*shape)
    run = lambda: function_of(weight)(x, weight, scale, bias, "relu", residual, torch.float16, factors_of(weight))  # noqa: E731
    exact = reference_of(weight)(x, weight, scale, bias, "relu", residual, torch.float16, factors_of(weight))
    for _ in range(2):
        for got, want in zip(run(), exact, strict=True):
            assert torch.equal(got, want)
    function_of(weight)(
        x, weight, scale, None, "none", None, None, factors_of(weight)
    )  # another epilogue has the same tile
    assert len(_plans._plans) == 1 and [path.name[:16] for path in empty_cache.iterdir()] == ["int8-convolution"]


@pytest.mark.gpu
def test_in_a_cuda_graph(empty_cache):
    x, weight, scale, bias, residual = operands(1, 128, 128, 33, 31, 3)
    run = lambda: ops.conv2d_int8(x, weight, scale, bias, "relu", residual, torch.bfloat16, factors_of(weight))  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    x.copy_(integers(*x.shape, seed=9))
    graph.replay()
    for got, want in zip(results, run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [1, 2, 3])
def test_more_than_2_to_the_31_elements(side, empty_cache):
    """The last rows of the last image, of x and of the results, lie beyond 2³¹ elements."""
    h, w, filters = 8193, 8191, 16
    planes = 4 if side == 2 else 1
    x = torch.randint(-127, 128, (3, h, w, 16), dtype=torch.int8, device=DEVICE).permute(0, 3, 1, 2)
    weight = integers(planes * filters, 16, side, side)
    assert x.numel() > 2**31
    scale = torch.full((planes * filters,), 2.0**-6, device=DEVICE)
    out_factor = factors_of(weight) / 32
    got, q = function_of(weight)(x, weight, scale, dtype=torch.float16, out_factor=out_factor)
    exact = reference_of(weight)(x[-1:, :, -5:], weight, scale, None, "none", None, torch.float16, out_factor)
    last = slice(-3, None)  # the rows that the reference computes from whole windows
    for result, want in zip((got, q), exact, strict=True):
        for plane in range(1, planes + 1):
            assert torch.equal(result[3 * plane - 1, :, last], want[plane - 1, :, last])
