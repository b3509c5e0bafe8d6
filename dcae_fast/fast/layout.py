"""Memory formats: channels-last inside fast modules; for everybody else, what they would see without them."""

import torch
from torch import nn

from dcae_fast.ops._private import WRAPPERS, constant_in_compile, has_global_hooks, is_observed

from .module import FastModule, has_ordinary_weights, kind
from .registry import is_plain

# Modules of PyTorch: its layers, and what it wraps around others.
TORCH = ("torch.nn.modules.", *WRAPPERS)


class ImageModule(FastModule):
    """A fast module of images [B, C, H, W], whose `fast_forward` sees channels-last ones and returns such.

    Outside, its result has the memory format of its input, and so has its gradient. Where something inside it might
    depend on the memory format, its own forward runs, and the fast modules among its children decide for themselves.
    """

    def fast_call(self, x: torch.Tensor, *args):
        inside = self.inside(x)
        if inside is None:
            return self.eager(x, *args)
        out = self.fast_forward(inside, *args)
        return out if inside is x else layout_of(out, x)

    def fast_forward(self, x: torch.Tensor, *args):
        return self.eager(x, *args)

    def inside(self, x: torch.Tensor) -> torch.Tensor | None:
        """x as `fast_forward` sees it; None where the module's own forward is to run."""
        if is_channels_last(x):
            return x
        return to_channels_last(x) if is_indifferent(self) else None


class Part(ImageModule):
    """A part of an encoder or decoder, fast on the channels-last tensors that these hand on."""


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether PyTorch's layers take x for channels-last, by its strides: it need not be dense."""
    _, channels, height, width = x.shape
    of_image, of_channel, of_row, of_column = x.stride()
    return of_channel == 1 and channels <= of_column and width * of_column <= of_row and height * of_row <= of_image


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """A channels-last copy of an x that is not; the gradient of x is contiguous, as PyTorch's layers would make it."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.jit.is_tracing():  # which records no Python
        return _ToChannelsLast.apply(x)
    return x.to(memory_format=torch.channels_last)


class _ToChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.to(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, dx):
        return dx.contiguous()


def layout_of(out: torch.Tensor | list[torch.Tensor], like: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """One image tensor or several in the memory format of `like`: channels-last, or else contiguous."""
    if not isinstance(out, torch.Tensor):
        return [layout_of(part, like) for part in out]
    return out.contiguous(memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format)


def is_indifferent(module: nn.Module) -> bool:
    """Whether nothing inside a module could tell in which memory format images go through it: modules that are fast or
    known, with weights of their own, and nobody who looks on.
    """
    if has_global_hooks():
        return False
    parents = [module]
    for parent in parents:  # the list grows meanwhile: a loop takes a fraction of a recursion's time
        for child in parent._modules.values():
            if child is None:
                continue
            if not (isinstance(child, FastModule) or _is_of_torch(type(child)) or _is_known(child)):
                return False
            if is_observed(child):
                return False
            if (child._parameters or child._buffers) and not has_ordinary_weights(child):
                return False
            if child._modules:
                parents.append(child)
    return True


@constant_in_compile
def _is_of_torch(cls: type[nn.Module]) -> bool:
    if cls not in _OF_TORCH:
        _OF_TORCH[cls] = cls.__module__.startswith(TORCH)
    return _OF_TORCH[cls]


_OF_TORCH: dict[type[nn.Module], bool] = {}


def _is_known(module: nn.Module) -> bool:
    """Whether a module that is not fast is made of PyTorch's functions and its children."""
    if is_plain(type(module)):
        return True
    # OpSequential is left as it is where none of its operations are fast
    return kind(module) == "OpSequential" and not any(isinstance(op, FastModule) for op in module.modules())
