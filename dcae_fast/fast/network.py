"""What concerns a whole call of a diffusion transformer: replaying captured graphs."""

import torch
from torch import nn

from dcae_fast import ops

from .coder import Options
from .graphs import Graphs
from .module import FastModule, plain


class Network(FastModule):
    """A transformer (x, t, y) → x: a replayed graph if there is one, else its forward."""

    fast_options = Options()

    def dispatch(self, *args, **kwargs) -> torch.Tensor:
        if torch.compiler.is_compiling() or not args or type(args[0]) is not torch.Tensor or ops.in_transform():
            return super().dispatch(*args, **kwargs)
        graphs = None if getattr(self, "_is_replica", False) else self.fast_options.graphs
        if graphs is None or graphs.inside:
            return super().dispatch(*args, **kwargs)
        result = graphs.replay(self, args, kwargs)
        return graphs.run(self, super().dispatch, args, kwargs) if result is None else result

    def fast_forward(self, *args, **kwargs) -> torch.Tensor:
        return self.eager(*args, **kwargs)


def step_graphs(module: nn.Module) -> Graphs | None:
    """The graphs of a patched transformer, for functions that call it; None if somebody would notice such a call."""
    options = vars(module).get("fast_options")
    if options is None or options.graphs is None or not plain(module):
        return None
    return options.graphs if isinstance(module, Network) else None
