"""What concerns a whole call of an encoder or decoder: replaying captured graphs, and bounded memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcae_fast import ops

from . import plan as planning
from .bands import Plan
from .graphs import Graphs, Result
from .layers import Layer, Survey, UnknownModule
from .layout import ImageModule, layout_of
from .module import plain

SHARE = 0.9  # of the memory, which layers may fill; the rest is for what convolutions need besides, and for gaps
SMALL = 512 * 512  # pixels of pictures that are not worth asking how much memory there is
CHANNELS, BYTES = 2**9, 2**14  # more than the largest tensor, and than all that are alive, have for a pixel


@dataclass(frozen=True)
class Options:
    """graphs: of this module, None without CUDA graphs. max_memory: bytes that a call may allocate, None: what is free.

    They hang on a patched coder or transformer as `fast_options` where they are not these.
    """

    graphs: Graphs | None = None
    max_memory: int | None = None


class Coder(ImageModule):
    """Encoder or decoder: a replayed graph if there is one, else in parts if memory is short, else its forward.

    A library's encoder and decoder say what they are made of: `layers` and what comes before and after those, `start`
    and `finish`, which is small enough to run on the whole image.
    """

    fast_options = Options()

    def dispatch(self, *args, **kwargs) -> Result:
        if torch.compiler.is_compiling() or not args or type(args[0]) is not torch.Tensor or ops.in_transform():
            return super().dispatch(*args, **kwargs)
        graphs = None if getattr(self, "_is_replica", False) else self.fast_options.graphs
        result = None if graphs is None else graphs.replay(self, args, kwargs)
        if result is not None:
            return result
        plan = self.plan(*args, **kwargs)
        if plan is not None:
            return self._in_parts(plan, *args, **kwargs)
        if graphs is not None:
            return graphs.run(self, super().dispatch, args, kwargs)
        return super().dispatch(*args, **kwargs)

    def plan(self, x: torch.Tensor, *args, **kwargs) -> Plan | None:
        """How to keep within the memory; None to compute at once: it is enough, or there is no other way.

        There is none where gradients are wanted, where anybody would notice that a module sees a part of the image
        (hooks), where a module is unknown, and for small images unless there is an explicit bound.
        """
        if x.dim() != 4:
            return None
        pixels = x.shape[0] * x.shape[2] * x.shape[3] * self.enlargement() ** 2
        memory = self.fast_options.max_memory
        if memory is None:
            if not x.is_cuda or pixels <= SMALL or torch.cuda.is_current_stream_capturing():
                return None
            memory = planning.free_memory(x.device)
        if pixels * CHANNELS <= planning.MAX_ELEMENTS and pixels * BYTES <= SHARE * memory:
            return None
        gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.parameters()))
        if gradient or not plain(*list(self.modules())[1:]) or not self.has_layers(*args, **kwargs):
            return None
        survey = Survey(x)
        try:
            return planning.plan(self.layers(survey), x.shape, survey.itemsize, SHARE * memory)
        except UnknownModule:
            return None

    def _in_parts(self, plan: Plan, x: torch.Tensor, *args, **kwargs) -> Result:
        return layout_of(self.finish(plan(self.start(x)), *args, **kwargs), x)

    def enlargement(self) -> int:
        """Pixels of the picture for a position of the input, along each side."""
        return 1

    def has_layers(self, *args, **kwargs) -> bool:
        """Whether `layers` and the rest do what forward does with these arguments."""
        return not args and not kwargs

    def layers(self, survey: Survey) -> list[Layer]:
        raise NotImplementedError

    def as_layers_see(self, x: torch.Tensor) -> torch.Tensor:
        """x in the memory format that goes through the layers; not every convolution of PyTorch's keeps to it."""
        inside = self.inside(x) if ops.has_kernels(x) else None
        return x if inside is None else inside

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def finish(self, x: torch.Tensor) -> Result:
        return x


def configure(module: nn.Module, graphs: Graphs | None, max_memory: int | None) -> None:
    """Give a patched coder or transformer its options instead of those that it had."""
    release(module)
    if graphs is not None or max_memory is not None:
        module.fast_options = Options(graphs, max_memory)


def release(module: nn.Module) -> None:
    """Take the options of a module away, and free its graphs."""
    options: Any = vars(module).pop("fast_options", None)
    if options is not None and options.graphs is not None:
        options.graphs.clear()
