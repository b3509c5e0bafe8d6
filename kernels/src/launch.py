"""Launching Triton kernels in less time than Triton takes to bind their arguments."""

import functools

import torch
import triton

OPTIONS = ("num_warps", "num_stages")


class Kernel:
    """A Triton kernel, launched as one: kernel[grid](*arguments, **constants, **options), constants in their order.

    Triton finds out at each call which of its compiled versions fits the arguments, which takes longer than most of
    these kernels run. Here that is looked up by what it depends on. Decorates the function in place of triton.jit.
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
            self._compiled[key] = self.jit[grid](*args, **named)
        else:
            constants = [value for name, value in named.items() if name not in OPTIONS]
            compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _specialisation(arg):
    """What Triton compiles a kernel for anew: type, ones, alignment to 16 bytes, divisibility by 16, 64 bits."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg.bit_length() > 31
    return type(arg)
