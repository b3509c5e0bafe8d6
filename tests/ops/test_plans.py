"""Plans of libraries, mainly cuDNN: right, found once, remembered in a file that may be absent or broken."""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dcae_fast import ops
from dcae_fast.ops import _convolution_plans, _plans
from dcae_fast.ops.conv2d import _convolve_then_add, _epilogue, _launch, _prepare, conv2d_reference
from dcae_fast.ops.upsample_conv2d import _launch as upsample_conv2d
from dcae_fast.ops.upsample_conv2d import _prepare as prepare_upsample_conv2d
from dcae_fast.ops.upsample_conv2d import upsample_conv2d_reference

DEVICE, NHWC = "cuda" if torch.cuda.is_available() else "cpu", torch.channels_last


NO_PLACES = ["", "{", "[1]", "NaN", "[" * 100_000, '{"c": NaN}', '{"c": 1.5, "d": true, "e": null, "f": [1]}']


@pytest.mark.parametrize("content", [None, *NO_PLACES, '{"a": 1, "b": "x"}'])
def test_a_broken_file_is_an_empty_one(tmp_path, content):
    file = tmp_path / "cache" / "plans.json"
    if content is not None:
        file.parent.mkdir()
        file.write_text(content)
    assert _plans._read(file) == ({"a": 1} if content and '"a"' in content else {})
    _plans._write(file, "c", 2)
    assert _plans._read(file)["c"] == 2
    assert [path.name for path in file.parent.iterdir()] == ["plans.json"]


def test_a_file_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").touch()
    _plans._write(tmp_path / "file" / "plans.json", "a", 1)


@dataclass(frozen=True)
class Plan:
    place: int
    workspace_size: int = 0


class Candidates:
    """Four candidates, of which 1 cannot be built and 3 needs too much memory."""

    def __len__(self):
        return 4

    def build(self, candidate):
        if candidate == 1:
            raise RuntimeError("not for this shape")
        return Plan(candidate, _plans.MOST_WORKSPACE + 1 if candidate == 3 else 0)


@pytest.fixture
def no_gpu(monkeypatch):
    """Answers what `find` asks a GPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


@pytest.mark.parametrize("takes_first", [False, True])
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("is_capturing", [False, True])
def test_what_is_taken_without_a_search(is_capturing, is_large, takes_first, empty_cache, no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    searches, runs = [], []
    monkeypatch.setattr(_plans, "_search", lambda *args: (searches.append(args), (2, Plan(2), True))[1])
    library, device = _plans.Library("Library", "works", lambda: 1, takes_first), torch.device("cuda", 0)
    find = lambda: _plans.find(library, (8, 8), device, is_large, Candidates, runs.append, None)  # noqa: E731
    searched = is_large and not is_capturing
    assert find() == find() == (Plan(2) if searched else Plan(0) if takes_first else None)
    assert len(searches) == searched
    assert len(runs) == (takes_first and not is_capturing and not searched), "what is taken is tried once"
    assert bool(_plans._plans) == (not is_capturing and (is_large or takes_first))
    if searched:
        assert json.loads((empty_cache / "works-a_GPU-library1.json").read_text()) == {"(8, 8)": 2}
        _plans._plans.clear()
        assert find() == Plan(2) and len(searches) == 1


def test_a_library_that_cannot_is_asked_once(empty_cache, no_gpu):
    def refuse():
        raise RuntimeError("no such product")

    library, device = _plans.Library("Library", "works", lambda: 1, True), torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="no such product"):
        assert _plans.find(library, (8, 8), device, False, refuse, None, None) is None
    assert _plans.find(library, (8, 8), device, False, refuse, None, None) is None


def test_without_candidates_the_fallback_is_taken(empty_cache, no_gpu):
    library, device = _plans.Library("Library", "works", lambda: 1, True), torch.device("cuda", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _plans.find(library, (8, 8), device, False, list, None, None) is None
    assert list(_plans._plans.values()) == [None]


TIMES = {_plans.NO_PLAN: 3.0, 0: 2.0, 2: 1.0}
WAITING = 1.11, 1.19  # times of calls that wait for the GPU
NO_MEMORY = torch.OutOfMemoryError("out of memory")


@pytest.fixture
def search(empty_cache, no_gpu, monkeypatch):
    """search(times): the place that a new process finds. times: place → the time of a call, or its exception."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(_plans, "_record", lambda call, calls=1: call())
    monkeypatch.setattr(_plans, "_elapsed", lambda time: time)
    monkeypatch.setattr(_plans, "_milliseconds", lambda call: call())
    monkeypatch.setattr(_plans, "_waits_for_gpu", lambda call: call() in WAITING)
    monkeypatch.setattr(_plans, "PAUSE", 0.0)
    device = torch.device("cuda", 0)

    def find(times, make=Candidates, **options):
        library = _plans.Library("Library", "works", lambda: 1, **options)

        def run(place):
            time = next(times[place]) if isinstance(times[place], Iterator) else times[place]
            if isinstance(time, Exception):
                raise time
            return time

        _plans._plans.clear()
        calls = make, lambda plan: run(plan.place), lambda: run(_plans.NO_PLAN)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = _plans.find(library, (8, 8), device, True, *calls)
        return _plans.NO_PLAN if plan is None else plan.place

    return find


def written(folder):
    return {name: place for file in folder.glob("*.json") for name, place in json.loads(file.read_text()).items()}


def test_the_fastest_is_found_and_written(search, empty_cache):
    assert search(TIMES) == 2 and written(empty_cache) == {"(8, 8)": 2}
    assert search({2: 1.0}) == 2, "not read from the file"


@pytest.mark.parametrize("call, time, place", [(0.01, 1.02, 0), (0.01, 1.05, -1), (9.0, 1.09, 0), (9.0, 1.11, -1)])
def test_the_fallback_must_make_up_for_its_calls(call, time, place, search):
    """By the time of three calls, which are a burst here, or by a tenth of its time."""
    assert search({_plans.NO_PLAN: 1.0, 0: time, 2: 1.4}, fallback_call=call) == place


@pytest.mark.parametrize("waiting, other, place", [(1.11, 1.25, 2), (1.11, 1.27, 0), (1.11, 1.19, 0)])
def test_a_call_that_waits_for_the_gpu_counts_as_slower(waiting, other, place, search):
    """By the time for which the GPU idles, here in a burst of three calls."""
    assert search({_plans.NO_PLAN: 9.0, 0: waiting, 2: other}) == place


def test_a_search_without_candidates(search, empty_cache):
    assert search(TIMES, make=list) == _plans.NO_PLAN


@pytest.mark.parametrize("calls", [0, 1, 2, 4, 7])  # 7: when asked whether it waits for the GPU
def test_a_candidate_that_fails_when_run_is_left_out(calls, search, empty_cache):
    failing = iter([1.0] * calls + [RuntimeError("no execution plan")] * 9)
    assert search(TIMES | {2: failing}) == 0 and written(empty_cache) == {"(8, 8)": 0}


def test_a_search_in_too_little_memory_is_not_written(search, empty_cache):
    assert search(TIMES | {2: NO_MEMORY}) == 0
    assert _plans._plans and not written(empty_cache)


def test_a_fallback_in_too_little_memory_leaves_no_trace(search, empty_cache):
    assert search(TIMES | {_plans.NO_PLAN: NO_MEMORY}) == _plans.NO_PLAN
    assert not _plans._plans and not written(empty_cache)


@pytest.mark.parametrize("place", [1, 3, 4, -2, 10**30, True, 0.0, float("nan"), None, "0", [0]])
def test_a_place_that_is_no_plan_is_corrected(place, search, empty_cache):
    (empty_cache / "works-a_GPU-library1.json").write_text(json.dumps({"(8, 8)": place, "other": 5}))
    assert search(TIMES) == 2 and written(empty_cache) == {"(8, 8)": 2, "other": 5}


@pytest.mark.parametrize("content", NO_PLACES)
def test_a_broken_file_is_searched_anew(content, search, empty_cache):
    (empty_cache / "works-a_GPU-library1.json").write_text(content)
    assert search(TIMES) == 2 and written(empty_cache) == {"(8, 8)": 2}


@pytest.mark.parametrize("failure", [RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), NO_MEMORY])
def test_a_place_whose_plan_fails_when_run_is_corrected(failure, search, empty_cache):
    """The file may come from another driver, or from a GPU of the same name with more memory."""
    (empty_cache / "works-a_GPU-library1.json").write_text(json.dumps({"(8, 8)": 2}))
    assert search(TIMES | {2: failure}) == 0
    assert written(empty_cache) == {"(8, 8)": 2 if failure is NO_MEMORY else 0}


# Deterministic algorithms: the same bits each time, and in all processes.


@contextlib.contextmanager
def same_bits(flag):
    """Sets one of PyTorch's flags for deterministic algorithms."""
    if flag == "cudnn":
        with torch.backends.cudnn.flags(deterministic=True):
            yield
    else:
        torch._C._set_deterministic_algorithms(True, warn_only=flag == "warn_only")  # without Inductor's import
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(False)


SAME_BITS = pytest.mark.parametrize("flag", ["all", "warn_only", "cudnn"])


@SAME_BITS
def test_the_same_plan_whatever_the_clock_and_the_file_say(flag, search, empty_cache):
    (empty_cache / "works-a_GPU-library1.json").write_text(json.dumps({"(8, 8)": 2}))
    fails = RuntimeError("no execution plan")
    with same_bits(flag):
        assert search(TIMES) == search(TIMES | {_plans.NO_PLAN: 0.1}) == 0
        assert search(TIMES | {0: fails}) == 2
        assert search(TIMES | {0: fails, 2: fails}) == _plans.NO_PLAN
    assert written(empty_cache) == {"(8, 8)": 2}


@SAME_BITS
def test_plans_by_the_clock_and_by_rule_are_kept_apart(flag, empty_cache, no_gpu, monkeypatch):
    monkeypatch.setattr(_plans, "_search", lambda *args: (2, Plan(2), True))
    library, device = _plans.Library("Library", "works", lambda: 1), torch.device("cuda", 0)
    find = lambda: _plans.find(library, (8, 8), device, True, Candidates, id, None)  # noqa: E731
    for _ in range(2):
        assert find() == _plans.found(_plans.key_of(library, (8, 8), device)) == Plan(2)
        with same_bits(flag):
            assert find() == _plans.found(_plans.key_of(library, (8, 8), device)) == Plan(0)


@pytest.mark.parametrize("flag", [None, "all", "cudnn", "disabled"])
def test_flags_of_cudnn_hold_for_torchs_convolution_with_relu(flag, monkeypatch):
    """cudnn_convolution_relu itself respects neither the flag that disables cuDNN nor the flags for determinism."""
    calls = []
    fused = lambda x, weight, bias, *_: (calls.append(x), F.relu(F.conv2d(x, weight, bias, padding=1)))[1]  # noqa: E731
    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    x, weight, bias = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3), torch.randn(8)
    x, weight = (tensor.to(DEVICE).contiguous(memory_format=NHWC) for tensor in (x, weight))
    args = [x, weight, bias.to(DEVICE), "relu", None, 1, [1, 1, 1, 1]]
    with torch.backends.cudnn.flags(enabled=flag != "disabled", allow_tf32=False):
        with same_bits(flag) if flag in ("all", "cudnn") else contextlib.nullcontext():
            got = _convolve_then_add(*args)
    torch.testing.assert_close(got, conv2d_reference(*args), atol=1e-4, rtol=1e-4)
    assert len(calls) == (flag is None)


def test_no_plans_where_cudnn_is_disabled(monkeypatch):
    class Extension:
        Convolution = None

    monkeypatch.setattr(_convolution_plans, "cuda_extension", lambda: Extension)
    with torch.backends.cudnn.flags(enabled=False):
        assert not _convolution_plans.available()
    with torch.backends.cudnn.flags(enabled=True):
        assert _convolution_plans.available()


def test_a_user_without_a_home(search, empty_cache, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert search(TIMES) == 2 and written(empty_cache) == {"(8, 8)": 2}
    monkeypatch.delenv("DCAE_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    assert search(TIMES) == 2 and written(empty_cache / "dcae_fast") == {"(8, 8)": 2}
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert search(TIMES) == 2


def plan_in_torch(x, weight, stride, padding, epilogue, fallback):
    """A plan computed by PyTorch, in place of `find`'s; its operands come in the order of the epilogue."""

    def plan(x, weight, operands):
        y, operands = F.conv2d(x, weight, None, stride, padding[:2]), iter(operands)
        for step, _ in epilogue:
            if step == "bias":
                y = y + next(operands).view(1, -1, 1, 1)
            else:
                y = y + next(operands) if step == "residual" else getattr(F, step)(y)
        assert next(operands, None) is None
        return y

    return plan


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("biased", [True, False])
def test_a_plan_and_its_fallback_compute_the_same(biased, act, residual, found, monkeypatch):
    monkeypatch.setattr(_convolution_plans, "available", lambda: True)
    monkeypatch.setattr(_convolution_plans, "find", plan_in_torch if found else lambda *args: None)
    x, weight, vector = torch.randn(2, 12, 5, 6), torch.randn(12, 12, 3, 3) / 10, torch.randn(12)
    x, weight = (tensor.to(DEVICE).contiguous(memory_format=NHWC) for tensor in (x, weight))
    args = [x, weight, vector.to(x.device) if biased else None, act, x * 2 if residual else None, 1, [1, 1, 1, 1]]
    plan = plan_in_torch(x, weight, 1, (1, 1, 1, 1), _epilogue(args[2], act, args[4]), None) if found else None
    monkeypatch.setattr(_plans, "found", lambda key: plan)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for call in (_launch, _prepare(*args)):
            torch.testing.assert_close(call(*args), conv2d_reference(*args), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size, aligned", [(5, [True, False, True, False]), (4, [True] * 4)])
def test_planes_that_begin_between_16_bytes_take_the_fallback(size, aligned, monkeypatch):
    """12 channels of 5×5 pixels in half precision are not a multiple of 16 bytes."""
    planes = []

    def find(x, weight, stride, padding, epilogue, fallback):
        return lambda x, weight, operands, out: (planes.append(out.data_ptr()), fallback())[1]

    monkeypatch.setattr(_convolution_plans, "available", lambda: True)
    monkeypatch.setattr(_convolution_plans, "find", find)
    monkeypatch.setattr(sys.modules["dcae_fast.ops.conv2d"], "_fits_plans", lambda *args: True)
    x, weights = torch.randn(1, 16, size, size), torch.randn(4 * 12, 16, 2, 2) / 8
    x, weights = (tensor.to(DEVICE, torch.bfloat16).contiguous(memory_format=NHWC) for tensor in (x, weights))
    got, exact = upsample_conv2d(x, weights), upsample_conv2d_reference(x.double(), weights.double())
    assert relative_error(got, exact) <= 1e-2
    assert len(planes) == sum(aligned) and all(address % 16 == 0 for address in planes)


def test_images_that_begin_between_16_bytes_have_no_prepared_upsampling(monkeypatch):
    """A plan may be known from another image of the same size."""
    monkeypatch.setattr(_convolution_plans, "available", lambda: True)
    memory = torch.zeros(16 * 4 * 4 + 8, dtype=torch.bfloat16, device=DEVICE)
    weights = torch.zeros(4 * 16, 16, 2, 2, dtype=torch.bfloat16, device=DEVICE).contiguous(memory_format=NHWC)
    for start, is_prepared in ((0, True), (1, False), (8, True)):
        x = memory[start:][: 16 * 4 * 4].view(1, 4, 4, 16).permute(0, 3, 1, 2)
        assert (prepare_upsample_conv2d(x, weights) is not None) == is_prepared


def random(*shape, dtype):
    x = torch.randn(shape, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def arguments(kind, dtype):
    """Arguments of `conv2d_reference`, large enough for a search."""
    x, weight, bias = (
        random(2, 64, 40, 48, dtype=dtype),
        random(96, 64, 3, 3, dtype=dtype) / 24,
        random(96, dtype=dtype),
    )
    residual, ones = random(2, 96, 40, 48, dtype=dtype), [1, [1, 1, 1, 1]]
    return {
        "plain": [x, weight, None, "none", None, *ones],
        "relu": [x, weight, bias, "relu", None, *ones],
        "silu": [x, weight, bias, "silu", None, *ones],
        "silu-residual": [x, weight, bias, "silu", residual, *ones],
        "residual": [x, weight, bias, "none", residual, *ones],
        "stride_2": [x, weight, bias, "silu", None, 2, [1, 1, 1, 1]],
        "pointwise": [
            x,
            random(512, 64, 1, 1, dtype=dtype) / 8,
            random(512, dtype=dtype),
            "silu",
            None,
            1,
            [0] * 4,
        ],
        "padded_on_two_sides": [x, random(96, 64, 2, 2, dtype=dtype) / 16, None, "none", None, 1, [1, 0, 0, 1]],
    }[kind]


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kind",
    ["plain", "relu", "silu", "silu-residual", "residual", "stride_2", "pointwise", "padded_on_two_sides"],
)
@torch.no_grad()
def test_every_candidate_is_right(kind, dtype, empty_cache):
    args = arguments(kind, dtype)
    exact = conv2d_reference(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    eager_error = relative_error(conv2d_reference(*args), exact)
    run = lambda: ops.conv2d(*args)  # noqa: E731
    assert relative_error(run(), exact) <= max(2 * eager_error, 4 * torch.finfo(dtype).eps)
    if not _convolution_plans.available():
        pytest.skip("dcae_fast._C was not built with cuDNN")
    (key,), (file,) = _plans._plans, empty_cache.iterdir()
    (name,) = json.loads(file.read_text())
    for candidate in range(_plans.NO_PLAN, 5):
        _plans._plans.clear()
        file.write_text(json.dumps({name: candidate}))
        got = run()
        assert relative_error(got, exact) <= max(2 * eager_error, 4 * torch.finfo(dtype).eps)
        assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == dtype
        assert torch.equal(run(), got), "not deterministic"
        assert key in _plans._plans


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_planes_of_odd_size(dtype, empty_cache):
    x, weights = random(1, 512, 65, 65, dtype=dtype), random(4 * 12, 512, 2, 2, dtype=dtype) / 45
    exact = upsample_conv2d_reference(x.double(), weights.double())
    eager_error = relative_error(upsample_conv2d_reference(x, weights), exact)
    assert relative_error(ops.upsample_conv2d(x, weights), exact) <= max(2 * eager_error, 4 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@torch.no_grad()
def test_a_new_shape_within_a_capture(empty_cache):
    x, weight, bias = arguments("silu", torch.bfloat16)[:3]
    graph = torch.cuda.CUDAGraph()
    F.conv2d(x, weight, padding=1)
    ops.bias_act(x, bias[:64], "silu")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = ops.conv2d(x, weight, bias, "silu", padding=1)
    graph.replay()
    assert not _plans._plans
    torch.testing.assert_close(got, F.silu(F.conv2d(x, weight, bias, padding=1)), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@SAME_BITS
@torch.no_grad()
def test_the_same_bits_whatever_was_found_before(flag, empty_cache, monkeypatch):
    args = arguments("silu", torch.bfloat16)
    x, weight, bias, act, *_ = args
    matrix, square = random(512, 1024, dtype=torch.bfloat16), random(4096, 1024, dtype=torch.bfloat16) / 32
    run = lambda: [ops.conv2d(x, weight, bias, act, padding=1), ops.linear(matrix, square)]  # noqa: E731
    run()  # by the clock
    with same_bits(flag):
        expected = run()
        monkeypatch.setattr(_plans, "_search", None)
        for _ in range(3):
            _plans._plans.clear()
            assert all(map(torch.equal, run(), expected))
    exact = conv2d_reference(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    eager_error = relative_error(conv2d_reference(*args), exact)
    assert relative_error(expected[0], exact) <= max(2 * eager_error, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.gpu
@torch.no_grad()
def test_a_file_that_names_other_plans(empty_cache):
    """Whatever place the file holds, the result is right."""
    x, weight, bias, act, *_ = args = arguments("relu", torch.bfloat16)
    run = lambda: ops.conv2d(x, weight, bias, act, padding=1)  # noqa: E731
    run()
    if not _convolution_plans.available():
        pytest.skip("dcae_fast._C was not built with cuDNN")
    (file,) = empty_cache.iterdir()
    (name,) = json.loads(file.read_text())
    expected = conv2d_reference(*args)
    for content in ("NaN", json.dumps({name: 10**6}), json.dumps({name: -7}), json.dumps({name: True})):
        _plans._plans.clear()
        file.write_text(content)
        torch.testing.assert_close(run(), expected, atol=2e-2, rtol=2e-2)
        assert json.loads(file.read_text())[name] in range(_plans.NO_PLAN, _plans.MOST_CANDIDATES)
