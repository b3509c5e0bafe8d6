"""Casts of weights under autocast; for CUDA graphs, copies that are cast again for each call or each sampling."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dcae_fast.ops._library import cuda_extension
from dcae_fast.ops._private import CAST_OPERATOR, TorchDispatchMode, copy_each


def cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight in this dtype. Autocast keeps the cast of a float32 parameter that requires a gradient until autocast
    ends, as it does for PyTorch's own layers, or the parameter changes. During the capture of a graph, which may live
    longer, and on streams other than the default one nothing is kept.
    """
    if weight.dtype == dtype:
        return weight
    if torch.compiler.is_compiling() or not weight.is_cuda:
        return weight.to(dtype)
    extension = cuda_extension()
    return weight.to(dtype) if extension is None else extension.autocast_cast(weight, dtype)


@contextlib.contextmanager
def without_cache(device: torch.device) -> Iterator[None]:
    """Autocast with the settings of the surrounding code, but without its cache."""
    kind = device.type
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        yield


class Casts:
    """Copies of a module's weights in other dtypes, which all graphs of the module read.

    Autocast's own cache lives until the outermost autocast ends, and all threads share it. A graph that reads from that
    cache or writes to it would be wrong afterwards.
    """

    def __init__(self, module: nn.Module):
        self._weights = {id(weight): weight for weight in module.parameters()}
        self._copies: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    @contextlib.contextmanager
    def once(self, device: torch.device) -> Iterator[None]:
        """Autocast with the settings of the surrounding code, and with these copies instead of its cache."""
        with (
            without_cache(device),
            _Taking(self) if torch.is_autocast_enabled(device.type) else contextlib.nullcontext(),
        ):
            yield

    def take(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The copy of a weight; None for any other tensor."""
        if self._weights.get(id(weight)) is not weight:
            return None
        key = id(weight), dtype
        if key not in self._copies:
            self._copies[key] = weight.detach().to(dtype)
        return self._copies[key]

    def refresh(self) -> None:
        """Cast the present weights into the copies."""
        if self._copies:
            weights = [self._weights[name].detach() for name, _ in self._copies]
            copy_each(list(self._copies.values()), weights)


class _Taking(TorchDispatchMode):
    def __init__(self, casts: Casts):
        super().__init__()
        self._casts = casts

    def __torch_dispatch__(self, func, types, args=(), kwargs: dict[str, Any] | None = None):
        kwargs = kwargs or {}
        copy = None
        if func is CAST_OPERATOR and set(kwargs) == {"dtype"}:
            if not (torch.is_grad_enabled() and args[0].requires_grad):
                copy = self._casts.take(args[0], kwargs["dtype"])
        return func(*args, **kwargs) if copy is None else copy
