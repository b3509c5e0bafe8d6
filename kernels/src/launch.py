"""Launches Triton kernels in less time than Triton takes to bind their arguments.

Only this file depends on how Triton works inside:

    a launch of a triton.jit function returns the compiled kernel
    compiled[three sides of a grid](*arguments, *constants) launches that kernel
    Triton compiles a kernel again for other constants, and for what `specialisation` returns of other arguments
    the errors by which Triton says that a GPU cannot run a kernel

TRIED lists the versions of Triton that this was tried with: 3.6 on a GPU, 3.9 without one. For a newer Triton, run
tests/kernels, also on a GPU; then extend TRIED and raise the bound in pyproject.toml.
"""

import functools
import warnings

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

TRIED = "3.6", "3.9"
OPTIONS = ("num_warps", "num_stages")


class Unfit(RuntimeError):
    """The GPU cannot run a kernel: it has too little shared memory, or Triton cannot compile for it."""


class Kernel:
    """A Triton kernel: kernel[grid](*arguments, **constants, **options), with the constants in their order.

    Decorates the kernel's function in place of triton.jit. In every call, Triton looks for the compiled version that
    fits the arguments, which takes longer than most of these kernels run. This class finds it in a dictionary.
    Raises Unfit where the GPU cannot run the kernel; Triton is asked once for each version of the kernel.
    """

    def __init__(self, function):
        self.jit = triton.jit(function)
        self._compiled = {}

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **named):
        if not torch.cuda.is_initialized():
            return self.jit[grid](*args, **named)
        key = (torch.cuda.current_device(), *map(specialisation, args), *named.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            try:
                self._compiled[key] = self.jit[grid](*args, **named)
            except (OutOfResources, PTXASError) as error:
                self._compiled[key] = _Unfit(str(error))
                message = (
                    f"the GPU cannot run the Triton kernel {self.jit.__name__}, so PyTorch computes instead: {error}"
                )
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                raise Unfit(str(error)) from error
        else:
            constants = [value for name, value in named.items() if name not in OPTIONS]
            compiled[(*grid, 1, 1)[:3]](*args, *constants)


class _Unfit:
    """Takes the place of a compiled kernel that the GPU cannot run."""

    def __init__(self, reason: str):
        self._reason = reason

    def __getitem__(self, grid):
        raise Unfit(self._reason)


def specialisation(arg):
    """Differs for two arguments if Triton compiles a kernel for each of them.

    Tensors: dtype, address divisible by 16. Integers from 0 to 2⁶³ - 1: equal to 1, divisible by 16, more than 31 bits.
    Descriptors: dtype, size of a block. Others, None and floats: type.
    """
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg.bit_length() > 31
    return type(arg)
