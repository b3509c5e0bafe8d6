"""Prepared launches of kernels under Triton's interpreter, with addresses turned back into tensors."""

import ctypes

import pytest
import torch

pytest.importorskip("triton")
from dcae_fast.kernels import launch
from dcae_fast.kernels.launch import run_and_prepare

from dcae_fast.ops._library import INTERPRETED, launcher

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="without TRITON_INTERPRET=1, see test_kept_choices.py")

IMAGE, SMALL, CHANNELS, WEIGHT = (2, 8, 4, 6), (2, 8, 2, 3), (8,), (8, 4, 3, 3)
TOKENS, OF_IMAGE = (2, 3, 8), (2, 8)
FLOAT, HALF = torch.float32, torch.bfloat16
# kernel: its file and arguments; a tuple stands for a tensor of this shape
LAUNCHES = {
    "rms_norm": ("rms_norm", IMAGE, CHANNELS, CHANNELS, 1e-5, "silu", IMAGE, HALF),
    "rms_norm_int8": ("rms_norm", IMAGE, CHANNELS, CHANNELS, 1e-5, "none", None, FLOAT, CHANNELS),
    "bias_act": ("bias_act", IMAGE, CHANNELS, "relu", CHANNELS, CHANNELS, CHANNELS, 1e-5, IMAGE, FLOAT),
    "fold_batch_norm": ("bias_act", WEIGHT, *[CHANNELS] * 4, 1e-5, HALF),
    "concatenate": ("concatenate", TOKENS, TOKENS, HALF),
    "concatenate_backward": ("concatenate", TOKENS, FLOAT, HALF),
    "conv2d_unshuffle": ("conv2d", (1, 3, 4, 4), (8, 3, 3, 3), CHANNELS),
    "duplicate_shuffle_add": ("duplicate_shuffle_add", None, IMAGE, (2,), 2, 2, 1.0),
    "duplicate_shuffle_add_int8": ("duplicate_shuffle_add", SMALL, IMAGE, None, 8, 2, 1.0, CHANNELS),
    "flip_weight": ("flip_weight", WEIGHT, FLOAT),
    "gated_sum": ("gated_sum", TOKENS, OF_IMAGE, TOKENS),
    "layer_norm": ("layer_norm", TOKENS, CHANNELS, CHANNELS, 1e-5, None, None, HALF),
    "layer_norm-branch": ("layer_norm", TOKENS, OF_IMAGE, OF_IMAGE, 1e-5, TOKENS, OF_IMAGE, FLOAT),
    "quantize": ("quantize", IMAGE, CHANNELS),
    "subpixel_weights": ("upsample_conv2d", WEIGHT, HALF),
    "transposed_weights": ("upsample_conv2d", WEIGHT, FLOAT),
    "unshuffle_average_add": ("unshuffle_average_add", IMAGE, SMALL, CHANNELS, 8, 2, 0.25),
    "weight_layout": ("weight_layout", WEIGHT),
}


def tensor_at(address, like):
    """The tensor of this shape, type and strides that begins at an address."""
    if not like.numel():
        return like
    memory = (ctypes.c_char * like.untyped_storage().nbytes()).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.fixture
def repeated(monkeypatch):
    """Kernels record their launches, as on a GPU. The list gets the kernel of each repeated launch."""
    repeated = []

    def launch_and_record(kernel, grid, *args, **named):
        def version(grid, device, values):
            repeated.append(kernel)
            pairs = zip(args, values, strict=True)
            kernel.jit[grid](*(tensor_at(v, a) if isinstance(a, torch.Tensor) else v for a, v in pairs), **named)

        kernel.jit[grid](*args, **named)
        constants = [name for name in named if name not in launch.OPTIONS]
        assert kernel.jit.arg_names[len(args) :] == constants, "Triton's launcher takes the constants in this order"
        values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        launch._recorded.launches.append((version, grid, None, args, values))

    monkeypatch.setattr(launch.Kernel, "_launch", launch_and_record)
    return repeated


def tensors_in(arguments):
    for shape in arguments:
        if isinstance(shape, tuple):
            shape = torch.randn(shape).abs()
            shape = shape.contiguous(memory_format=torch.channels_last) if shape.dim() == 4 else shape
        yield shape


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_repeated_kernel_computes_the_same_bits(name, repeated):
    file, *arguments = LAUNCHES[name]
    function = launcher(file, f"launch_{name.split('-')[0]}")
    torch.manual_seed(0)
    _, prepared = run_and_prepare(function, tuple(tensors_in(arguments)))
    others = tuple(tensors_in(arguments))
    expected, _ = run_and_prepare(function, others)
    got = prepared(*others)
    assert len(repeated) == 1 and type(got) is type(expected)
    for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, expected)), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
