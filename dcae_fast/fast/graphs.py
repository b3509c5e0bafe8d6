"""CUDA graphs of whole calls of a coder: captured once for each kind of call, replayed for the price of one launch."""

import contextlib
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dcae_fast import ops

from .fusion import layout_of
from .module import plain
from .watch import Watch

Result = torch.Tensor | list[torch.Tensor]
LIMIT = 8  # graphs of one coder
_CAPTURING = threading.Lock()  # PyTorch captures one graph at a time


class Graphs:
    """The graphs of one coder, which share their memory; of more than LIMIT the least recently used is dropped.

    The first call of a kind runs as it is, the second is captured. A graph reads the weights where they lie, so
    whatever writes to them in place is seen: optimizers, load_state_dict, `.data`. Anything else that could change a
    result, as far as `Watch` sees it, drops the graphs. Copies and pickles of a coder start with none.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._called: deque[Hashable] = deque(maxlen=LIMIT)
        self._failed: set[Hashable] = set()
        self._watch: Watch | None = None
        self._pool: Pool | None = None

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return Graphs()

    def __reduce__(self):
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs, as soon as the GPU has finished with them."""
        with self._lock:
            if self._pool is not None:
                self._pool.wait()
            self._forget()

    def replay(self, coder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Result | None:
        """The call's result, None if there is no graph for it. Half of the checks are made while the GPU works."""
        key = call_key(args, kwargs)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None or not self._watch.same_addresses(coder) or self._watch.wants_gradient(args[0]):
                return None
            self._graphs.move_to_end(key)
            result = graph.replay(args[0])
            return result if self._watch.same_otherwise(coder) else None

    def run(self, coder: nn.Module, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Result:
        """function(*args, **kwargs), the coder's forward; captured when it is called like this for the second time."""
        key = call_key(args, kwargs)
        with self._lock:
            if key is not None and self._may_capture(coder, args[0]) and key not in self._failed:
                if key in self._called:
                    graph = self._graphs.get(key) or self._capture(key, function, args, kwargs)
                    if graph is not None:
                        return graph.replay(args[0])
                else:
                    self._called.append(key)
        return function(*args, **kwargs)

    def _may_capture(self, coder: nn.Module, x: torch.Tensor) -> bool:
        watch = self._watch
        if watch is None or not (watch.same_addresses(coder) and watch.same_otherwise(coder)):
            self.clear()
            self._watch = watch = Watch(coder)
        return watch.device == x.device and not watch.wants_gradient(x)

    def _capture(self, key: Hashable, function: Callable, args: tuple, kwargs: dict[str, Any]) -> "Captured | None":
        if self._pool is None:
            self._pool = Pool(args[0].device)
        try:
            graph = Captured(self._pool, function, args, kwargs)
        except Exception as error:
            watch, failed = self._watch, self._failed | {key}
            self.clear()
            self._watch, self._failed = watch, failed
            reason = str(error.__context__ or error).partition("\n")[0]
            message = f"no CUDA graph for an input of shape {list(args[0].shape)}: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return None
        if len(self._graphs) == LIMIT:
            self._pool.wait()
            self._graphs.popitem(last=False)
        self._graphs[key] = graph
        return graph


class Pool:
    """What the graphs of a coder share: memory, the stream they are captured on, and the end of the last replay."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.replayed = torch.cuda.Event()
        self.memory = torch.cuda.graph_pool_handle()

    def wait(self) -> None:
        """Until the GPU has finished the last replay."""
        self.replayed.synchronize()

    def abandon(self) -> None:
        """After a failed capture: PyTorch may not have noticed that it is over, and would keep its memory."""
        with contextlib.suppress(RuntimeError):  # it has
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.memory)
            torch._C._cuda_releasePool(self.stream.device_index, self.memory)


class Captured:
    """A call as a CUDA graph with an input and an output of its own. Raises what the call or its capture raises."""

    def __init__(self, pool: Pool, function: Callable, args: tuple, kwargs: dict[str, Any]):
        x, *rest = args
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()
        current, grad = torch.cuda.current_stream(x.device), torch.is_grad_enabled()
        pool.stream.wait_stream(current)
        with _CAPTURING, torch.inference_mode(False), torch.set_grad_enabled(grad), torch.cuda.stream(pool.stream):
            self._x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
            function(self._x, *rest, **kwargs)  # compiles kernels and chooses convolution algorithms
            torch._C._cuda_clearCublasWorkspaces()  # so that the graph gets one of its own
            try:
                with torch.cuda.graph(self._graph, pool.memory, pool.stream, capture_error_mode="thread_local"):
                    self._out = function(self._x, *rest, **kwargs)
            except Exception:
                pool.abandon()
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(pool.stream)

    def replay(self, x: torch.Tensor) -> Result:
        """The result for x, in memory of its own and in x's memory format."""
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self._pool.replayed)  # the graphs of a pool take turns
        self._x.copy_(x)
        self._graph.replay()
        single = isinstance(self._out, torch.Tensor)
        results = [_copy(out, x) for out in ([self._out] if single else self._out)]
        self._pool.replayed.record(stream)
        return results[0] if single else results


def _copy(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    y = layout_of(out, like)
    return y.clone() if y is out else y


def call_key(args: tuple, kwargs: dict[str, Any]) -> Hashable | None:
    """What kind of call this is: equal calls may share a graph. None if it must not be captured or replayed.

    That is so without a GPU or kernels, with autocast, while somebody else captures, where hooks of all modules or a
    mode (a FLOP counter, for one) would see what runs, and with other arguments than integers or lists of them.
    """
    modes = torch._C._len_torch_dispatch_stack() > 0 or any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )
    x, *rest = args
    if modes or not plain() or not can_graph(x) or not all(map(_integers, (*rest, *kwargs.values()))):
        return None
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return (
        (x.shape, x.dtype, x.device, repr(rest), repr(kwargs)),
        (torch.is_grad_enabled(), torch.get_deterministic_debug_mode(), cuda.preferred_blas_library()),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision, cudnn.fp32_precision),
        (cuda.matmul.fp32_precision, torch.backends.fp32_precision, cuda.matmul.allow_bf16_reduced_precision_reduction),
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_fp16_accumulation),
    )


def can_graph(x: torch.Tensor) -> bool:
    """Whether there are a GPU to capture on and kernels for x, and nobody else captures."""
    on_gpu = x.is_cuda and x.numel() > 0 and ops.has_kernels(x)
    return on_gpu and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()


def _integers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, int) for item in value)
    return value is None or isinstance(value, int)
