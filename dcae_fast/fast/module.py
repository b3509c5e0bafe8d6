"""How a module becomes fast: its class is swapped for a subclass made of a mixin and its own class."""

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from dcae_fast import ops

PACKAGES = (
    "dcae_fast",
    "dc_gen",
    "diffusers",
    "efficientvit",
    "timm",
    "torch",
)  # whose classes are known by their names


class FastModule:
    """Mixin with a `fast_forward`, never state: parameters, buffers and hooks stay as they are.

    operators: names of the operators it calls. Where they have no kernel for the input's device or type, the module's
    own forward runs; `eager` calls it too, for what a fast forward cannot do. dims: dimensions of the input.
    """

    operators: tuple[str, ...] = ()
    dims = 4

    def forward(self, *args, **kwargs):
        if not isinstance(self, FastModule):  # a wrapper kept this forward, and the module is patched no more
            return type(self).forward(self, *args, **kwargs)
        return self.dispatch(*args, **kwargs)

    def dispatch(self, *args, **kwargs):
        """Takes the fast way, or the module's own."""
        if not args or args[0].dim() != self.dims or not ops.has_kernels(args[0]) or in_transform():
            return self.eager(*args, **kwargs)
        return self.fast_forward(*args, **kwargs)

    def eager(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickled as (mixin, original class): the combined class is made at run time and has no importable name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, type(self).__bases__, *state


@functools.cache
def fast_class(mixin: type[FastModule], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that runs `mixin`'s forward."""
    return type("Fast" + base.__name__, (mixin, base), {"__module__": mixin.__module__})


def _new(mixin: type[FastModule], base: type[nn.Module]) -> nn.Module:
    cls = fast_class(mixin, base)
    return cls.__new__(cls)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was patched."""
    return without_mixin(type(module))


def without_mixin(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.__bases__[1] if _is_fast_class(cls) else cls


def is_fast(module: nn.Module) -> bool:
    return _is_fast_class(type(module))


def _is_fast_class(cls: type[nn.Module]) -> bool:
    return len(cls.__bases__) == 2 and issubclass(cls.__bases__[0], FastModule)


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """A module's class; if fully_shard (FSDP2) has made that, the one that it was made of."""
    cls = type(module)
    names = ((base.__module__, base.__name__) for base in cls.__mro__)
    is_sharded = any(name == "FSDPModule" and package.startswith("torch.distributed.") for package, name in names)
    return cls.__bases__[1] if is_sharded else cls


def kind(module: nn.Module) -> str:
    """Name of a module's original class, without its package; empty if the package is none of PACKAGES."""
    cls = original_class(module)
    return cls.__name__ if cls.__module__.split(".")[0] in PACKAGES else ""


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work, which custom operators take no part in."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, without the second that it takes to import Dynamo. Dynamo compiles
# anew for another stack of transforms or level of forward-mode AD.
in_transform._dynamo_marked_constant = True


def plain(*modules: nn.Module | None) -> bool:
    """Whether nobody would notice if these modules were computed without being called: no hooks, no forward of their
    own, not compiled in place.
    """
    if _has_any_global_hook():
        return False
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        for module in modules
        if module is not None
    )
