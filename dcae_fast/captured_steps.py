"""Sampler steps of a patched transformer as CUDA graphs: one replay runs network, guidance and update."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .fast.call import step_graphs
from .sampling import guided
from .sampling.arguments import Model, Network
from .sampling.steps import Step, run


@dataclass
class CapturedSteps:
    """A drop-in for `sampling.steps.run` that replays CUDA graphs, with bit-identical results. One object per sampling.

    The network is `guided(call, labels, null_labels, scale, interval)`. A step is captured when a step with the same
    function and shapes runs for the second time; times and numbers are inputs of the graph. A step runs without a graph
    if the guidance scale changes within it, if `model` has no graphs, or if the caller is capturing a graph.

    model: the patched transformer. call: calls `model` with converted dtypes, without reporting progress. progress: is
    called once for each network call inside a replayed graph. weights_are_cast: a graph of this sampling has already
    cast the weights.
    """

    model: nn.Module
    call: Model
    labels: torch.Tensor
    null_labels: torch.Tensor
    scale: float
    interval: tuple[float, float] | None
    progress: Callable[[], object] | None
    weights_are_cast: bool = False

    def __call__(self, network: Network, step: Step, x: torch.Tensor, *noise: torch.Tensor) -> torch.Tensor:
        graphs, scales = step_graphs(self.model), {self._scale_at(t) for t in step.times}
        # in a graph that the caller captures, `times` would be freed too early
        is_capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if graphs is None or len(scales) > 1 or is_capturing:
            return run(network, step, x, *noise)
        (scale,) = scales

        def function(
            x: torch.Tensor,
            times: torch.Tensor,
            numbers: torch.Tensor,
            labels: torch.Tensor,
            null_labels: torch.Tensor,
            *noise: torch.Tensor,
        ) -> torch.Tensor:
            return step.function(guided(self.call, labels, null_labels, scale), x, times.unbind(), numbers, *noise)

        times = torch.tensor(step.times, dtype=x.dtype, device="cpu")
        times = times.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else times  # does not wait for the GPU
        args, name = (x, times, step.numbers, self.labels, self.null_labels, *noise), (step.function, scale)
        out = graphs.replay(self.model, args, {}, name, cast=not self.weights_are_cast)
        if out is None:
            out = graphs.run(self.model, function, args, {}, name)
        else:
            self.weights_are_cast = True
        for _ in step.times if self.progress else ():
            self.progress()
        return out

    def _scale_at(self, t: float) -> float:
        inside = self.interval is None or self.interval[0] <= t <= self.interval[1]
        return self.scale if inside else 1.0
