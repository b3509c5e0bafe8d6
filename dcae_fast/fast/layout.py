"""Memory formats: channels-last inside fast modules; outside, the formats of an unpatched model."""

import torch
from torch import nn

from dcae_fast.ops._private import WRAPPERS, constant_in_compile, has_global_hooks, is_observed

from .module import FastModule, has_ordinary_weights, kind
from .names import cache_by_class
from .registry import is_plain

# Modules of PyTorch: its layers, and what it wraps around others.
TORCH = ("torch.nn.modules.", *WRAPPERS)


class ImageModule(FastModule):
    """A fast module of images [B, C, H, W]. Its `fast_forward` takes and returns channels-last images.

    For callers, the result has the memory format of the input, and so has its gradient. If something inside the module
    may depend on the memory format, the module's own forward runs, and fast modules inside it decide for themselves.
    """

    def dispatch(self, *args, **kwargs):
        if kwargs or not args or not self.takes(*args):
            return self.eager(*args, **kwargs)
        x = args[0]
        if is_channels_last(x):
            return self.fast_forward(*args)
        inside = self.inside(x)
        if inside is None:
            return self.eager(*args)
        out = self.fast_forward(inside, *args[1:])
        return out if inside is x else layout_of(out, x)

    def fast_forward(self, *args):
        return super().forward(*args)

    def inside(self, x: torch.Tensor) -> torch.Tensor | None:
        """x as `fast_forward` takes it; None if the module's own forward must run."""
        if is_channels_last(x):
            return x
        return to_channels_last(x) if is_indifferent(self) else None


class Part(ImageModule):
    """A part of an encoder or decoder, which receives the channels-last tensors of its neighbours."""


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether PyTorch's layers treat x as channels-last, judged by its strides. x need not be dense."""
    _, channels, height, width = x.shape
    of_image, of_channel, of_row, of_column = x.stride()
    return of_channel == 1 and channels <= of_column and width * of_column <= of_row and height * of_row <= of_image


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """A channels-last copy of x. The gradient of x is contiguous, as with PyTorch's layers."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.jit.is_tracing():  # a trace cannot record a Function
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
    """An image tensor, or a list of them, in the memory format of `like`: channels-last or contiguous."""
    if not isinstance(out, torch.Tensor):
        return [layout_of(part, like) for part in out]
    return out.contiguous(memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format)


def is_indifferent(module: nn.Module) -> bool:
    """Whether nothing inside a module can tell in which memory format images pass through it: all submodules are fast
    or known, have ordinary weights, and have no hooks.
    """
    if has_global_hooks():
        return False
    parents = [module]
    for parent in parents:  # the list grows; the loop makes few calls, since it runs in every call
        for child in parent._modules.values():
            if child is None:
                continue
            if not _accepts_any_format(type(child)) and not _is_plain_sequence(child):
                return False
            if is_observed(child):
                return False
            if (child._parameters or child._buffers) and not has_ordinary_weights(child):
                return False
            if child._modules:
                parents.append(child)
    return True


@constant_in_compile
def _accepts_any_format(cls: type[nn.Module]) -> bool:
    """Whether modules of this class are fast, PyTorch's, or known and made of PyTorch's functions."""
    if cls not in _ACCEPTS_ANY_FORMAT:
        _ACCEPTS_ANY_FORMAT[cls] = issubclass(cls, FastModule) or cls.__module__.startswith(TORCH) or is_plain(cls)
    return _ACCEPTS_ANY_FORMAT[cls]


_ACCEPTS_ANY_FORMAT: dict[type[nn.Module], bool] = cache_by_class()


def _is_plain_sequence(module: nn.Module) -> bool:
    """An OpSequential that `patch` skipped because no operation in it is fast."""
    return kind(module) == "OpSequential" and not any(isinstance(op, FastModule) for op in module.modules())
