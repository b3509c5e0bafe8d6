"""Launches Triton kernels in less time than Triton takes to bind their arguments.

A launch takes three steps: a key from the arguments, the compiled version of the kernel for this key, and one call of
Triton's launcher in C with the addresses of the tensors. `run_and_prepare` spares all later calls of an operator the
first two steps.

Only this file depends on how Triton works inside:

    a launch of a triton.jit function returns the compiled kernel
    compiled.run launches that kernel; compiled[three sides of a grid] also runs the hooks of Triton's profilers
    a launch takes addresses in place of tensors
    Triton compiles a kernel again for other constants, and for what `specialisation` returns of other arguments
    the errors by which Triton says that a GPU cannot run a kernel

TRIED lists the versions of Triton that this was tried with: 3.6 on a GPU, 3.9 without one. For a newer Triton, run
tests/kernels, also on a GPU; then extend TRIED and raise the bound in pyproject.toml.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

TRIED = "3.6", "3.9"
OPTIONS = ("num_warps", "num_stages")


class Unfit(RuntimeError):
    """The GPU cannot run a kernel: it has too little shared memory, or Triton cannot compile for it."""


class Kernel:
    """A Triton kernel: kernel[grid](*arguments, **constants, **options), with the constants in their order.

    Decorates the kernel's function in place of triton.jit. In every call, Triton looks for the compiled version that
    fits the arguments, which takes longer than most of these kernels run. This class finds it in a dictionary. All
    tensors must be on the current device. Raises Unfit where the GPU cannot run the kernel; Triton is asked once for
    each version of the kernel.
    """

    def __init__(self, function):
        self.jit = triton.jit(function)
        self._versions = {}

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **named):
        if not torch.cuda.is_initialized():
            return self.jit[grid](*args, **named)
        device, key, values = None, [], []
        for arg in args:  # `specialisation` of tensors is written out, since this runs for every launch
            if isinstance(arg, torch.Tensor):
                device, address = arg.get_device(), arg.data_ptr()
                key += device, arg.dtype, address % 16 == 0
                values.append(address)
            else:
                key.append(specialisation(arg))
                values.append(arg)
        key = (*key, *named.values())
        version = self._versions.get(key)
        if version is None:
            version = self._versions[key] = self._first_launch(key, grid, args, named)
        else:
            version(grid, device, values)
        if _recorded.launches is not None:
            _recorded.launches.append((version, grid, device, args, values))

    def _first_launch(self, key, grid, args, named):
        try:
            return _Version(self.jit[grid](*args, **named), named)
        except (OutOfResources, PTXASError) as error:
            self._versions[key] = _Unfit(str(error))
            message = f"the GPU cannot run the Triton kernel {self.jit.__name__}, so PyTorch computes instead: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            raise Unfit(str(error)) from error


class _Version:
    """A compiled version of a kernel, for one key and so for one device."""

    def __init__(self, compiled, named):
        self._compiled, self._run = compiled, compiled.run
        self._kernel = compiled.function, compiled.packed_metadata
        self._constants = [value for name, value in named.items() if name not in OPTIONS]

    def __call__(self, grid, device, values):
        """values: the arguments of the kernel, with addresses in place of tensors."""
        x, y, z = (*grid, 1, 1)[:3]
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if any(getattr(hook, "calls", hook) for hook in hooks):
            self._compiled[x, y, z](*values, *self._constants)
        else:
            stream = driver.active.get_current_stream(device)
            self._run(x, y, z, stream, *self._kernel, None, None, None, *values, *self._constants)


class _Unfit:
    """Takes the place of a version that the GPU cannot run."""

    def __init__(self, reason: str):
        self._reason = reason

    def __call__(self, grid, device, values):
        raise Unfit(self._reason)


class _Recorded(threading.local):
    """The launches of a thread, while `run_and_prepare` records them."""

    launches: list[tuple] | None = None


_recorded = _Recorded()


def run_and_prepare(launcher: Callable, args: tuple) -> tuple[Any, Callable | None]:
    """launcher(*args), and a function that does the same, faster, for arguments that differ only in what tensors hold.

    The function is None unless the launcher makes one launch of one kernel, which reads tensors among args and writes
    all tensors of the result. A launcher computes by kernels only.
    """
    _recorded.launches = launches = []
    try:
        result = launcher(*args)
    finally:
        _recorded.launches = None
    return result, _prepared(args, result, *launches[0]) if len(launches) == 1 else None


def _prepared(args, result, version, grid, device, given, values):
    """given: the arguments of the kernel; values: the same with addresses in place of tensors."""
    is_tuple = isinstance(result, tuple)
    results = result if is_tuple else (result,)
    if not all(isinstance(value, torch.Tensor) for value in results):
        return None
    tensors = [value for value in (*args, *results) if isinstance(value, torch.Tensor)]
    places = {id(value): place for place, value in enumerate((*args, *results)) if isinstance(value, torch.Tensor)}
    sources = [(i, places.get(id(value))) for i, value in enumerate(given) if isinstance(value, torch.Tensor)]
    known = {place for _, place in sources}
    are_written = all(places[id(value)] in known for value in results if value.numel())
    if len(places) < len(tensors) or None in known or not are_written or any(map(_is_descriptor, given)):
        return None
    layouts = [
        functools.partial(torch.empty_strided, value.shape, value.stride(), dtype=value.dtype, device=value.device)
        for value in results
    ]

    def run(*args):
        made = [layout() for layout in layouts]
        tensors, filled = (*args, *made), values.copy()
        for i, place in sources:
            filled[i] = tensors[place].data_ptr()
        version(grid, device, filled)
        return tuple(made) if is_tuple else made[0]

    return run


def _is_descriptor(arg) -> bool:
    """Whether an argument describes a tensor, of which it holds the address."""
    return isinstance(arg, TensorDescriptor)


def specialisation(arg):
    """Differs for two arguments if Triton compiles a kernel for each of them.

    Tensors: dtype, address divisible by 16. Integers from 0 to 2⁶³ - 1: equal to 1, divisible by 16, more than 31 bits.
    Descriptors: dtype, size of a block. Others, None and floats: type.
    """
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if _is_descriptor(arg):
        return arg.base.dtype, *arg.block_shape
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg.bit_length() > 31
    return type(arg)
