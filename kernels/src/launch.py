"""Launching Triton kernels in less time than Triton takes to bind their arguments."""

import functools
import warnings

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

OPTIONS = ("num_warps", "num_stages")


class Unfit(RuntimeError):
    """The GPU cannot run a kernel: it has too little shared memory, or Triton cannot compile for it."""


class Kernel:
    """A Triton kernel, launched as one: kernel[grid](*arguments, **constants, **options), constants in their order.

    Triton finds out at each call which of its compiled versions fits the arguments, which takes longer than most of
    these kernels run. Here that is looked up by what it depends on. Decorates the function in place of triton.jit.
    Raises Unfit where the GPU cannot run the kernel, which is found out once for each version of it.
    """

    def __init__(self, function):
        self.jit = triton.jit(function)
        self._compiled = {}

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **named):
        if not torch.cuda.is_initialized():
            return self.jit[grid](*args, **named)
        key = (torch.cuda.current_device(), *map(_specialisation, args), *named.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            try:
                self._compiled[key] = self.jit[grid](*args, **named)
            except (OutOfResources, PTXASError) as error:
                self._compiled[key] = _Unfit(str(error))
                message = f"{self.jit.__name__} does not run on this GPU, PyTorch computes instead: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                raise Unfit(str(error)) from error
        else:
            constants = [value for name, value in named.items() if name not in OPTIONS]
            compiled[(*grid, 1, 1)[:3]](*args, *constants)


class _Unfit:
    """In place of a compiled kernel."""

    def __init__(self, reason: str):
        self._reason = reason

    def __getitem__(self, grid):
        raise Unfit(self._reason)


def _specialisation(arg):
    """What Triton compiles a kernel for anew: type, ones, alignment to 16 bytes, divisibility by 16, 64 bits."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg.bit_length() > 31
    return type(arg)
