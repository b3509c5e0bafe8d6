"""Launching kernels, also on GPUs with less shared memory than Hopper: smaller tiles, or PyTorch."""

import itertools
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

pytest.importorskip("triton")
import triton
from dcae_fast.kernels import common, launch, rms_norm
from dcae_fast.kernels.launch import Kernel, specialisation
from triton.runtime.errors import OutOfResources, PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

from dcae_fast import ops
from dcae_fast.ops import _library
from dcae_fast.ops.conv2d import conv2d_reference
from dcae_fast.ops.relu_linear_attention import relu_linear_attention_backward_reference
from dcae_fast.ops.rms_norm import rms_norm_op, rms_norm_reference
from dcae_fast.ops.rms_norm_conv2d import rms_norm_conv2d_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURING, ADA = common.TURING, common.ADA
HOPPER = ADA._replace(shared_memory=227 * 1024)


def random(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def assert_as_accurate(got, reference, *args):
    """The error against float64 is at most twice PyTorch's."""
    exact = reference(*tree_map_only(torch.Tensor, torch.Tensor.double, args))
    pairs = zip(*map(tree_leaves, (got, reference(*args), exact)), strict=True)
    for tensor, eager, exactly in pairs:
        assert (tensor.double() - exactly).norm() <= 2 * (eager.double() - exactly).norm()


@pytest.mark.parametrize("chip, sides", [(TURING, (32, 32)), (ADA, (64, 32)), (HOPPER, (128, 32))])
def test_tiles_are_halved_until_they_fit(chip, sides, monkeypatch):
    monkeypatch.setattr(common, "chips", lambda x: (chip,))
    x, limit = torch.empty(1), chip.shared_memory
    assert common.fitting(x, 2, (128, 32), lambda size, a, b: 1000 * (a + b)) == sides
    assert common.fitting(x, 2, (128, 32), lambda size, a, b: limit) == (128, 32)
    assert common.fitting(x, 2, (128, 32), lambda size, a, b: limit + a * b - 16 * 16) == (16, 16)
    assert common.fitting(x, 2, (128, 32), lambda size, a, b: limit + 1) is None
    for itemsize, element in ((2, chip.half), (4, chip.single)):
        assert common.fitting(x, itemsize, (16,), lambda size, a, element=element: limit + size - element) == (16,)


def test_without_a_gpu_tiles_fit_into_every_gpu():
    """Tiles are chosen for the GPU that needs more memory: Turing in half precision, later GPUs in single."""
    x = torch.empty(1)
    assert common.fitting(x, 2, (128,), lambda size, a: 512 * size * a) == (32,)
    assert common.fitting(x, 4, (128,), lambda size, a: 512 * size * a) == (16,)


@pytest.mark.parametrize("chip", [TURING._replace(shared_memory=16), TURING._replace(shared_memory=40_000), HOPPER])
@pytest.mark.parametrize("channels", [24, 72])
@torch.no_grad()
def test_norm_and_convolution_with_little_shared_memory(channels, chip, monkeypatch):
    monkeypatch.setattr(common, "chips", lambda x: (chip,))
    x, weight, bias = (t.half() for t in (random(1, channels, 3, 5), random(3, channels, 3, 3) / 20, random(3)))
    args = x, random(channels, seed=1), random(channels, seed=2), 1e-5, "silu", weight, bias
    got = ops.rms_norm_conv2d(*args[:3], weight, bias, act="silu")
    assert got.dtype == x.dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(got, rms_norm_conv2d_reference, *args)


@torch.no_grad()
def test_wide_window_with_little_shared_memory(monkeypatch):
    monkeypatch.setattr(common, "chips", lambda x: (TURING,))
    x, weight, bias = random(1, 3, 9, 10), random(40, 3, 7, 7, seed=1) / 12, random(40, seed=2)
    got = ops.conv2d(x, weight, bias, "silu", stride=2, padding=3)
    assert_as_accurate(got, conv2d_reference, x, weight, bias, "silu", None, 2, [3] * 4)


def test_gradient_of_attention_with_little_shared_memory(monkeypatch):
    chip = TURING._replace(shared_memory=8 * 1024)  # for half of the positions of a tile
    monkeypatch.setattr(common, "chips", lambda x: (chip,))
    qkv, dout = random(1, 48, 5, 8).requires_grad_(), random(1, 16, 5, 8, seed=1)
    ops.relu_linear_attention([qkv], 16).backward(dout)
    assert_as_accurate([qkv.grad], relu_linear_attention_backward_reference, dout, [qkv.detach()], 16, 1e-15)


@pytest.mark.parametrize("error", [OutOfResources(2, 1, "shared memory"), PTXASError("no such architecture")], ids=str)
def test_what_a_gpu_cannot_run_is_computed_by_pytorch(error, monkeypatch):
    """Triton is asked once, and one warning says so."""
    tries = []

    class Refused:
        __name__ = "_rms_norm_forward_kernel"

        def __getitem__(self, grid):
            def launch(*args, **named):
                tries.append(args)
                raise error

            return launch

    kernel = Kernel.__new__(Kernel)
    kernel.jit, kernel._versions = Refused(), {}
    monkeypatch.setattr(rms_norm, "_rms_norm_forward_kernel", kernel)
    monkeypatch.setattr(rms_norm_op.kernel, "_ready", {})  # else the choice of the first case is kept for the second
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    args = random(1, 8, 2, 3), random(8, seed=1), random(8, seed=2), 1e-5
    exact = rms_norm_reference(*args, "silu", None, torch.float32)
    with pytest.warns(RuntimeWarning, match="cannot run the Triton kernel _rms_norm_forward_kernel"):
        assert torch.equal(ops.rms_norm(*args, act="silu"), exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.rms_norm(*args, act="silu"), exact)
    assert len(tries) == 1


@pytest.mark.parametrize("capability, has", [((6, 1), False), ((7, 0), False), ((7, 5), True), ((12, 0), True)])
def test_gpus_that_triton_does_not_compile_for(capability, has, monkeypatch):
    monkeypatch.setattr(_library, "INTERPRETED", False)
    monkeypatch.setattr(_library, "_CAPABILITIES", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, device=torch.device("cuda", 0))
    assert ops.has_kernels(x) == has


def test_versions_of_triton_tried():
    oldest, installed, newest = map(version, (launch.TRIED[0], triton.__version__, launch.TRIED[-1]))
    assert oldest <= installed, f"triton {triton.__version__} is older than {launch.TRIED[0]}, the oldest supported"
    assert installed <= newest, (
        f"triton {triton.__version__} is newer than {launch.TRIED[-1]}, the newest that kernels/src/launch.py was "
        "tried with: run tests/kernels and tests/ops, also on a GPU; when they pass, extend TRIED in "
        "kernels/src/launch.py and raise the upper bound of triton in pyproject.toml"
    )


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


def test_only_one_file_knows_how_triton_works():
    folder = Path(launch.__file__).parent
    inside = re.compile(r"triton\.(runtime|compiler|backends|_C|knobs)|do_not_specialize|\.run\(|tt\.divisibility")
    for path in sorted(folder.glob("*.py")):
        assert path.name == "launch.py" or not inside.search(path.read_text()), path.name


ARGUMENTS = [
    *(0, 1, 2, 15, 16, 17, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**63 - 1),
    *(None, 0.0, 1.0, 16.0),
    *(torch.zeros(17, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)),
    *(torch.zeros(17, dtype=dtype)[1:] for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(
        TensorDescriptor(torch.zeros(32, 32, dtype=dtype), [32, 32], [32, 1], block)
        for dtype in (torch.int8, torch.bfloat16)
        for block in ([16, 16], [16, 32])
    ),
]


def test_specialisation_is_as_fine_as_tritons():
    """Two arguments for which Triton compiles a kernel twice have different keys."""
    libtriton = pytest.importorskip("triton._C.libtriton")
    backend = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend

    def of_triton(arg):
        return libtriton.native_specialize_impl(backend, arg, False, True, True)  # not const, by value and alignment

    for a, b in itertools.combinations(ARGUMENTS, 2):
        assert of_triton(a) == of_triton(b) or specialisation(a) != specialisation(b), (a, b)
