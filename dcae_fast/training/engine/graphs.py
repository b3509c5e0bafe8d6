"""Steps of a training as CUDA graphs: one launch repeats forward pass, backward pass and optimizers."""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

import torch

from dcae_fast.ops._private import clear_cublas_workspaces

WARM_UP = 3  # steps of a kind that run normally; they compile kernels and choose algorithms
MOST = 16  # graphs; steps of further kinds run normally

Scalars = dict[str, torch.Tensor]


class StepGraphs:
    """step(kind, *inputs) → scalars on the device, by name. After three steps of a kind, a CUDA graph repeats the step.

    inputs: numbers, or tensors whose shapes never change. `step` gets them on the device, numbers as scalars in
    float32. So it gets learning rates as tensors, and resuming is exact: all steps, replayed or not, have the same
    inputs.

    step: changes networks, optimizers and buffers in place. It depends only on these, on the kind and on the inputs,
    neither draws random numbers nor waits for the device, and leaves no gradients behind.
    """

    def __init__(self, step: Callable[..., Scalars], optimizers: Sequence[torch.optim.Optimizer], device: torch.device):
        self.step, self.optimizers, self.device, self.recorder = step, optimizers, device, Recorder(device)
        self.inputs: list[torch.Tensor] = []
        self.taken: Counter[Hashable] = Counter()
        self.replays: dict[Hashable, Callable[[], Scalars]] = {}

    def __call__(self, kind: Hashable, *inputs: torch.Tensor | float) -> Scalars:
        self._copy(inputs)
        if kind not in self.replays:
            step = partial(self.step, kind, *self.inputs)
            if self.taken[kind] < WARM_UP or len(self.replays) == MOST:
                self.taken[kind] += 1
                with self._options_kept(capturable=False):
                    return self.recorder.run(step)
            with self._options_kept(capturable=True):
                self.replays[kind] = self.recorder.record(step)
        return self.replays[kind]()

    def _copy(self, inputs: Sequence[torch.Tensor | float]) -> None:
        """Writes the inputs to where the graphs read them."""
        if not self.inputs:
            tensors = (x if isinstance(x, torch.Tensor) else torch.zeros(()) for x in inputs)
            self.inputs = [torch.empty_like(x, device=self.device) for x in tensors]
        for own, given in zip(self.inputs, inputs, strict=True):
            if isinstance(given, torch.Tensor):
                own.copy_(given, non_blocking=True)
            else:
                own.fill_(given)

    @contextlib.contextmanager
    def _options_kept(self, capturable: bool) -> Iterator[None]:
        """Afterwards the options of the optimizers, which checkpoints contain, are as they were without graphs."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        before = [dict(group) for group in groups]
        for group in groups:
            group["capturable"] = capturable
        try:
            yield
        finally:
            for group, options in zip(groups, before, strict=True):
                group.update(options)


class Recorder:
    """Records functions as CUDA graphs, which share memory and must be replayed one after another."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Scalars]) -> Scalars:
        """The result of the function, which runs on the stream of the recordings."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), torch.autograd.set_multithreading_enabled(False):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Scalars]) -> Callable[[], Scalars]:
        """Records the function without computing anything. A call of the result computes, and returns new scalars.

        Other threads, such as those that read data, may use the device meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        clear_cublas_workspaces()  # so that the graph gets its own
        with (
            torch.autograd.set_multithreading_enabled(False),
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            result = function()
            values = torch.stack(list(result.values()))
        clear_cublas_workspaces()
        names = list(result)

        def replay() -> Scalars:
            graph.replay()
            return dict(zip(names, values.clone().unbind(), strict=True))

        return replay
