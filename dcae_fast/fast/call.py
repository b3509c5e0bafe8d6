"""Whole calls of an encoder, decoder or transformer: as a CUDA graph, in parts if memory is short, or directly.

A call of the patched model that `patch` was asked for enters here; blocks inside it do not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcae_fast import ops

from . import plan as planning
from .bands import Plan
from .graphs import Graphs, NetworkGraphs, Result
from .judge import Budget
from .layers import Layer, Survey, UnknownModule
from .layout import ImageModule, layout_of
from .module import FastModule, plain

SHARE = 0.9  # of the memory is for layers; the rest is for workspaces of convolutions and for fragmentation
SMALL = 512 * 512  # pixels of pictures for which the free memory is not looked up
CHANNELS, BYTES = 2**9, 2**14  # per pixel: more than the largest tensor has, and than all live tensors take


@dataclass(frozen=True)
class Options:
    """graphs: the module's CUDA graphs, None without. max_memory: bytes that a call may allocate, None: what is free.

    A patched module holds its options as the attribute `fast_options`, unless they are the default.
    """

    graphs: Graphs | None = None
    max_memory: int | None = None


class WholeCall(FastModule):
    """A module whose calls can be captured as CUDA graphs, by `graphs_class`.

    only_for_graphs: without CUDA graphs the module keeps its own class, because only its parts become fast. So does a
    component of a pipeline unless cuda_graphs=True, because diffusers' `from_pipe` compares exact classes.
    written: names of attributes that forward writes before it reads them. Graphs do not depend on them.
    """

    only_for_graphs = False
    written: tuple[str, ...] = ()
    fast_options = Options()
    graphs_class: type[Graphs]

    def dispatch(self, *args, **kwargs) -> Result:
        if torch.compiler.is_compiling() or not args or type(args[0]) is not torch.Tensor or ops.in_transform():
            return super().dispatch(*args, **kwargs)
        graphs = self.fast_options.graphs
        if graphs is not None and not graphs.inside:
            result = graphs.replay(self, args, kwargs)
            if result is not None:
                return result
        plan = self.plan(*args, **kwargs)
        if plan is not None:
            return self.in_parts(plan, *args, **kwargs)
        if graphs is not None and not graphs.inside:
            return graphs.run(self, super().dispatch, args, kwargs)
        return super().dispatch(*args, **kwargs)

    def plan(self, *args, **kwargs) -> Plan | None:
        """How to stay within the memory; None to compute everything at once."""
        return None

    def _apply(self, *args, **kwargs):
        """`to` and the like also drop the graphs if they move weights: a model on a CPU holds no memory of a GPU."""
        result = super()._apply(*args, **kwargs)
        if self.fast_options.graphs is not None:
            self.fast_options.graphs.clear_if_moved(self)
        return result


class Network(WholeCall):
    """A diffusion transformer (x, t, y) → x."""

    graphs_class = NetworkGraphs

    def fast_forward(self, *args, **kwargs) -> torch.Tensor:
        return self.eager(*args, **kwargs)


class Coder(WholeCall, ImageModule):
    """An encoder or decoder.

    A family says what its coders are made of: `layers`, and what runs on the whole image before and after the layers,
    `start` and `finish`. ends: names of the first and the last module, which never compute in 8 bit.
    """

    graphs_class = Graphs
    ends: tuple[str, ...] = ()

    def plan(self, x: torch.Tensor, *args, **kwargs) -> Plan | None:
        """How to stay within the memory; None to compute at once.

        None if the memory is enough, and also if gradients are wanted, if a module has hooks (they would see parts of
        the image), if a module is unknown, and for small images without an explicit bound.
        """
        memory = self.fast_options.max_memory
        if x.dim() != 4 or (memory is None and not x.is_cuda):
            return None
        pixels = x.shape[0] * x.shape[2] * x.shape[3] * self.enlargement() ** 2
        if memory is None:
            if pixels <= SMALL or torch.cuda.is_current_stream_capturing():
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

    def in_parts(self, plan: Plan, x: torch.Tensor, *args, **kwargs) -> Result:
        return layout_of(self.finish(plan(self.start(x)), *args, **kwargs), x)

    def enlargement(self) -> int:
        """Pixels of the picture for a position of the input, along each side."""
        return 1

    def has_layers(self, *args, **kwargs) -> bool:
        """Whether `start`, `layers` and `finish` do what forward does with these arguments."""
        return not args and not kwargs

    def layers(self, survey: Survey) -> list[Layer]:
        raise NotImplementedError

    def as_layers_see(self, x: torch.Tensor) -> torch.Tensor:
        """x in the memory format of the layers; some of PyTorch's convolutions do not preserve the format."""
        inside = self.inside(x) if ops.has_kernels(x) else None
        return x if inside is None else inside

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def finish(self, x: torch.Tensor) -> Result:
        return x


def configure(module: WholeCall, cuda_graphs: bool | str, max_memory: int | None, budget: Budget) -> None:
    """Replace the options of a patched module. max_memory counts for encoders and decoders.

    budget: memory of graphs, if cuda_graphs is "auto".
    """
    release(module)
    bound = max_memory if isinstance(module, Coder) else None
    if cuda_graphs or bound is not None:
        graphs = module.graphs_class(budget if cuda_graphs == "auto" else None) if cuda_graphs else None
        module.fast_options = Options(graphs, bound)


def release(module: nn.Module) -> None:
    """Remove the options of a module, and free its graphs."""
    options: Any = vars(module).pop("fast_options", None)
    if options is not None and options.graphs is not None:
        options.graphs.clear()


def step_graphs(module: nn.Module) -> Graphs | None:
    """The graphs of a patched transformer, for functions that call it; None if a hook would miss such a call."""
    options = vars(module).get("fast_options")
    if options is None or options.graphs is None or not plain(module):
        return None
    return options.graphs if isinstance(module, Network) else None
