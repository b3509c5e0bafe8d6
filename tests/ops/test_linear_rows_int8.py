"""Linear layers of int8 rows by the Triton kernel: exact sums in every shape and tile, the epilogue, plans."""

import pytest
import torch

from dcae_fast import ops
from dcae_fast.ops import _int8_products, _library, _plans
from dcae_fast.ops.linear_rows import _accepts, linear_rows_op, linear_rows_reference

pytest.importorskip("triton")
from dcae_fast.kernels.linear_rows import TILES, launch_linear_rows, tiles_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernel runs in the interpreter
H200 = 132  # multiprocessors
SHAPES = [((1,), 16, 16), ((2, 33), 160, 96), ((3, 1), 32, 272), ((130,), 16, 48), ((5,), 512, 16)]

pytestmark = pytest.mark.skipif(
    not (_library.INTERPRETED or _library.is_hopper(torch.device(DEVICE))), reason="needs Hopper, or the interpreter"
)


def integers(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8).to(DEVICE)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def operands(rows, depth, columns):
    scales = normal(*rows, 1, seed=1).exp(), normal(columns, 1, seed=2).exp() / depth / 64
    return integers(*rows, depth), scales[0], integers(columns, depth, seed=3), scales[1]


@pytest.fixture
def kernel(monkeypatch):
    """Fails if the reference runs in place of the kernel."""
    monkeypatch.setattr(linear_rows_op.kernel, "_reference", None)


@pytest.mark.parametrize("rows, depth, columns", SHAPES, ids=str)
def test_sums_are_exact(rows, depth, columns, kernel):
    x, _, weight, _ = operands(rows, depth, columns)
    ones = torch.ones(*rows, 1, device=DEVICE), torch.ones(columns, 1, device=DEVICE)
    got = ops.linear_rows(x, ones[0], weight, ones[1], dtype=torch.float32)
    assert torch.equal(got, (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("rows, depth, columns", SHAPES[1:3], ids=str)
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 2**-21)])
def test_bias_and_residual(rows, depth, columns, dtype, limit, kernel):
    args = operands(rows, depth, columns)
    for bias_dtype in (torch.float32, dtype):
        bias, residual = normal(columns, dtype=bias_dtype, seed=4), normal(*rows, columns, dtype=dtype, seed=5)
        for epilogue in ((bias, None), (None, residual), (bias, residual)):
            got = ops.linear_rows(*args, *epilogue, dtype)
            want = linear_rows_reference(*args, *epilogue, torch.float32, True)
            assert got.dtype == dtype and got.is_contiguous()
            assert (got - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile):
    """Each program computes several blocks, of which some are cut off."""
    rows, depth, columns = 2 * tile.rows + 3, 144, 2 * tile.columns + 16
    args = *operands((rows,), depth, columns), normal(columns), normal(rows, columns, dtype=torch.float16)
    assert tile in tiles_of(rows, columns, depth, H200)
    want = linear_rows_reference(*args, torch.float32, True)
    assert (launch_linear_rows(*args, torch.float16, tile) - want).abs().max() <= 2**-10 * want.abs().max()


def test_rows_in_other_layouts(kernel):
    x, x_scale, weight, weight_scale = operands((40,), 64, 32)
    want = ops.linear_rows(x[::2].contiguous(), x_scale[::2].contiguous(), weight, weight_scale)
    assert torch.equal(ops.linear_rows(x[::2], x_scale[::2], weight, weight_scale), want)
    transposed = weight.T.contiguous().T
    assert torch.equal(ops.linear_rows(x[::2], x_scale[::2], transposed, weight_scale), want)


def test_what_has_no_kernel():
    """Other channels than multiples of 16, sums that may not fit in int32, and more rows than 32 bits count."""

    def accepted(rows, depth, columns):
        number, scale = torch.empty(16, dtype=torch.int8, device=DEVICE)[:1], torch.ones(1, 1, device=DEVICE)
        x, weight = number.expand(rows, depth), number.expand(columns, depth)
        scales = scale.expand(rows, 1), scale.expand(columns, 1)
        return _accepts(x, scales[0], weight, scales[1], None, None, torch.bfloat16, True)

    assert accepted(5, 32, 16) and accepted(2**31 - 2**11, 32, 16) and accepted(5, 2**17 - 16, 16)
    for refused in ((5, 24, 16), (5, 32, 20), (5, 2**17, 16), (2**31, 32, 16), (0, 32, 16), (5, 32, 0)):
        assert not accepted(*refused)


def test_the_tile_of_calls_that_are_not_timed():
    """Large tiles for many rows; for few rows so many small ones that each multiprocessor has work."""
    assert tiles_of(135168, 4608, 1152, H200)[0] == TILES[0] and len(tiles_of(135168, 4608, 1152, H200)) == len(TILES)
    assert tiles_of(2112, 1152, 1152, H200)[0][:2] == (128, 128)
    assert tiles_of(66, 1152, 4608, H200)[0][:2] == (64, 32)
    assert {tile[:3] for tile in tiles_of(1, 16, 16, H200)} == {(64, 32, 32)}


def test_the_search_asks_for_the_real_product(monkeypatch):
    """The plan's shape has everything that the fastest tile depends on, and few rows compile the same kernel."""
    asked, launched = [], []

    def find(library, shape, device, is_worth_a_search, make, run, fallback):
        asked.append((shape, is_worth_a_search))
        candidates = make()
        return [candidates.build(place) for place in range(len(candidates))][1]

    class OnGpu(torch.Tensor):
        is_cuda = True

    def launch(x, *args):
        launched.append((x.shape[:-1].numel(), args[-1]))
        return x

    names = {"tiles_of": lambda *shape: (TILES[0], TILES[1]), "launch_linear_rows": launch}
    monkeypatch.setattr(_plans, "find", find)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(_int8_products, "launcher", lambda file, name: names[name])
    x, *others = operands((5, 100), 64, 32)
    _int8_products.product(x.as_subclass(OnGpu), *others, normal(32), None, torch.float16)
    assert asked == [((500, 32, 64, torch.float16, torch.float32, False), False)]
    assert launched == [(20, TILES[0]), (20, TILES[1]), (500, TILES[1])]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(_plans, "_plans", {})
    monkeypatch.setenv("DCAE_FAST_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.gpu
def test_a_search_finds_a_tile_once(empty_cache):
    args = *operands((2112,), 1152, 576), normal(576), normal(2112, 576)
    want = linear_rows_reference(*args, torch.float32, True)
    for _ in range(2):
        got = ops.linear_rows(*args, torch.float32)
        assert (got - want).abs().max() <= 2**-20 * want.abs().max()
    assert len(_plans._plans) == 1 and [path.name[:13] for path in empty_cache.iterdir()] == ["int8-products"]


@pytest.mark.gpu
def test_in_a_cuda_graph(empty_cache):
    x, *others = operands((300,), 1152, 576)
    bias = normal(576)
    run = lambda: ops.linear_rows(x, *others, bias, dtype=torch.float16)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    x.copy_(integers(*x.shape, seed=9))
    graph.replay()
    assert torch.equal(result, run())


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(empty_cache):
    """The last rows of x, of the residual and of the result lie beyond 2³¹ elements."""
    rows, depth, columns = 2**26 + 40, 32, 48
    x = torch.randint(-127, 128, (rows, depth), dtype=torch.int8, device=DEVICE)
    x_scale, residual = torch.rand(rows, 1, device=DEVICE), torch.randn(rows, columns, device=DEVICE).bfloat16()
    _, _, *weight = operands((1,), depth, columns)
    assert x.numel() > 2**31
    got = ops.linear_rows(x, x_scale, *weight, None, residual)
    want = linear_rows_reference(x[-99:], x_scale[-99:], *weight, None, residual[-99:], torch.float32, True)
    assert (got[-99:] - want).abs().max() <= 2**-7 * want.abs().max()
