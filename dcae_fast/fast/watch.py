"""Detects any change of a module, other than to weight values, that invalidates a captured CUDA graph."""

import itertools
import operator
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dcae_fast.ops._private import hooks_of, version_of

from . import operands
from .module import kind, plain

_LAYOUT = operator.attrgetter("dtype", "shape")


class Watch:
    """A snapshot of everything that a graph depends on: submodules with their classes, attributes and hooks, tensors
    with their addresses, dtypes and layouts. Comparing takes some tens of microseconds. With frozen layers the snapshot
    includes the versions of tensors, since graphs then read kept operands instead of weights.

    device: the device of all tensors; None if nothing may be captured: in training mode, with hooks on submodules, with
    unknown modules or tensor types. The module's own hooks run around its forward and do not matter.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        dicts = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self._module, self._modules = weakref.ref(module), modules[1:]
        self._left_out = {"fast_options", *getattr(module, "written", ())}  # `WholeCall.written`
        self._filled, self._empty = [d for d in dicts if d], [d for d in dicts if not d]
        self._contents = self._read_contents()
        self._tensors = [value for value in self._contents if isinstance(value, torch.Tensor)]
        self._hooks = [hooks for m in self._modules for hooks in hooks_of(m)]
        ordinary = _are_ordinary(self._tensors)
        self._addresses = self._read_addresses() if ordinary else None
        self._versions = None if operands.kept_by(modules) is None else self._read_versions()
        devices = {tensor.device for tensor in self._tensors}
        known = ordinary and all(map(kind, modules)) and plain(*self._modules) and not any(m.training for m in modules)
        self.device = devices.pop() if known and len(devices) == 1 else None
        self._rest, self._hooked = self._read_rest(module), any(self._hooks)

    def same_addresses(self, module: nn.Module) -> bool:
        """Whether submodules and tensors are the same, at the same addresses; with frozen layers, also unwritten."""
        contents = self._read_contents()
        return (
            self._module() is module
            and not any(self._empty)
            and len(contents) == len(self._contents)
            and all(map(operator.is_, contents, self._contents))
            and (self._addresses is None or self._read_addresses() == self._addresses)
            and (self._versions is None or self._read_versions() == self._versions)
        )

    def same_otherwise(self, module: nn.Module) -> bool:
        """Whether everything else is unchanged."""
        try:
            return any(self._hooks) == self._hooked and self._read_rest(module) == self._rest
        except (RuntimeError, ValueError):  # a comparison of attributes has no truth value: they are tensors
            return False

    def wants_gradient(self, *inputs: torch.Tensor) -> bool:
        """Whether the result for these inputs would require a gradient."""
        return wants_gradient((*inputs, *self._tensors))

    def _read_contents(self) -> list[nn.Module | torch.Tensor | None]:
        return list(itertools.chain.from_iterable(map(dict.values, self._filled)))

    def _read_addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))

    def _read_versions(self) -> list[int]:
        """Versions of the tensors that kept operands may come from."""
        return [version_of(tensor) for tensor in self._tensors if not tensor.is_inference()]

    def _read_rest(self, module: nn.Module) -> list[Any]:
        """Everything except what forward writes, and the options: they hold the graphs and thereby this object, and
        would keep them alive.
        """
        own = [value for name, value in vars(module).items() if name not in self._left_out]
        attributes = itertools.chain.from_iterable(map(dict.values, map(vars, self._modules)))
        tensors = [] if self._addresses is None else self._tensors
        layouts = zip(map(_LAYOUT, tensors), map(torch.Tensor.stride, tensors), strict=True)
        return [type(module), *map(type, self._modules), *own, *attributes, *layouts]


class Places:
    """The addresses of a module's tensors, to see whether tensors move or are replaced. Keeps no tensor alive."""

    def __init__(self, module: nn.Module):
        tensors = list(itertools.chain(module.parameters(), module.buffers()))
        self._are_known = _are_ordinary(tensors)
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._addresses = list(map(torch.Tensor.data_ptr, tensors)) if self._are_known else []

    def same(self, module: nn.Module) -> bool:
        if not self._are_known:
            return False
        tensors = list(itertools.chain(module.parameters(), module.buffers()))
        return (
            len(tensors) == len(self._tensors)
            and all(known() is tensor for known, tensor in zip(self._tensors, tensors, strict=True))
            and list(map(torch.Tensor.data_ptr, tensors)) == self._addresses
        )


def wants_gradient(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the result of an operation on these tensors would require a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _are_ordinary(tensors: Iterable[torch.Tensor]) -> bool:
    return {type(tensor) for tensor in tensors} <= {nn.Parameter, torch.Tensor}
