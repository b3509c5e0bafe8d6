"""CUDA graphs of whole calls of a module: captured once for each kind of call, then replayed with one launch."""

import contextlib
import copy
import functools
import itertools
import math
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._private import (
    SETTINGS,
    DeviceContext,
    abandon_capture,
    attention_order,
    clear_cublas_workspaces,
    count_dispatch_modes,
    function_modes,
    tree_flatten,
    tree_unflatten,
)

from . import operands
from .casts import Casts, without_cache
from .events import Event, recorded_event
from .judge import Budget, Judge, Step, Timing
from .layout import is_indifferent, layout_of
from .module import plain
from .plan import free_memory
from .watch import Places, Watch, wants_gradient

Result = torch.Tensor | list[torch.Tensor]
LIMIT = 8  # graphs of one module
_CAPTURING = threading.Lock()  # PyTorch captures one graph at a time
_dropped: list["tuple[Pool, OrderedDict[Hashable, Captured], Casts]"] = []  # and not yet freed


class Graphs:
    """The graphs of one module, which share their memory. Of more than LIMIT graphs the least recently used is dropped.

    The first call of a kind runs normally, the second is captured. A graph reads weights in place, so that it uses what
    optimizers, load_state_dict and `.data` write there. Any other change that could alter a result and that `Watch`
    detects drops the graphs. Copies and pickles of a module start without graphs.

    This class is for encoders and decoders: their inputs are made channels-last if nothing in them depends on the
    memory format, and calls under autocast are not captured.

    budget: if given, a `Judge` decides which kinds of calls are captured, and graphs hold no more memory than this.
    """

    of_network = False
    under_autocast = False

    def __init__(self, budget: Budget | None = None):
        self._lock, self._thread = threading.RLock(), threading.local()
        self._budget, self._judge = budget, None if budget is None else Judge()
        self._places: Places | None = None  # of the last call that was timed
        self._forget()

    def _forget(self) -> None:
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._called: deque[Hashable] = deque(maxlen=LIMIT)
        self._failed: set[Hashable] = set()
        self._watch: Watch | None = None
        self._pool: Pool | None = None
        self._casts: Casts | None = None
        if self._budget is not None:
            self._budget.hold(self, 0)

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return type(self)(copy.deepcopy(self._budget, memo))

    def __reduce__(self):
        return type(self), (self._budget,)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def inside(self) -> bool:
        """Whether this thread is computing a call of the module: calls inside that call are not captured."""
        return getattr(self._thread, "inside", False)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        self._thread.inside = True
        try:
            yield
        finally:
            self._thread.inside = False

    def clear(self, wait: bool = True) -> None:
        """Drop all graphs as soon as the GPU has finished with them.

        wait: for the GPU. During a capture nothing may be waited for or freed. Graphs that are not freed now are freed
        when graphs are next dropped.
        """
        with self._lock:
            if self._pool is not None:
                _dropped.append((self._pool, self._graphs, self._casts))
            self._forget()
        if _dropped and not torch.cuda.is_current_stream_capturing():
            _free_dropped(wait)

    def clear_if_moved(self, module: nn.Module) -> None:
        """Drop all graphs if tensors of the module have moved or were replaced."""
        with self._lock:
            if self._watch is not None and not self._watch.same_addresses(module):
                self.clear(wait=False)
                if self._judge is not None:
                    self._judge.start_over()

    def key(self, args: tuple, kwargs: dict[str, Any], name: Hashable = ()) -> Hashable | None:
        key = call_key(args, kwargs, self.of_network, self.under_autocast)
        return None if key is None else (name, *key)

    def replay(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], name: Hashable = (), cast: bool = True
    ) -> Result | None:
        """The result of the call; None if there is no graph for it. Half of the checks run while the GPU works.

        name: distinguishes functions that take the same arguments. cast: whether to cast weights again that autocast
        casts.
        """
        key = self.key(args, kwargs, name)
        with self._lock, self._computing():
            graph = self._graphs.get(key)
            if graph is None or not self._watch.same_addresses(module) or self._watch.wants_gradient(*tensors(args)):
                return None
            self._graphs.move_to_end(key)
            if self._judge is not None:
                self._judge.replayed(key)
            result = graph.replay(args, cast)
            return result if self._watch.same_otherwise(module) else None

    def run(
        self,
        module: nn.Module,
        function: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        name: Hashable = (),
    ) -> Result:
        """function(*args, **kwargs), which calls the module. The second call of a kind is captured."""
        if self._judge is not None:
            return self._run_judged(self._judge, module, function, args, kwargs, name)
        key, to_be_captured = self.key(args, kwargs, name), False
        with self._lock, self._computing():
            if key is None:
                if self._watch is not None and not self._watch.same_addresses(module):
                    self.clear()  # since the weights have moved
            elif self._may_capture(module, args) and key not in self._failed:
                if key in self._called:
                    graph = self._graphs.get(key) or self._capture(module, key, function, args, kwargs)
                    if graph is not None:
                        return graph.replay(args, cast=True)
                else:
                    to_be_captured = True
        # casts that autocast keeps from before the capture would take memory beside the graphs' own casts
        with self._computing(), without_cache(args[0].device) if to_be_captured else contextlib.nullcontext():
            result = function(*args, **kwargs)
        if to_be_captured:
            with self._lock:  # the present key: the first attention chooses the order of PyTorch's backends
                self._called.append(self.key(args, kwargs, name))
        return result

    def _run_judged(
        self, judge: Judge, module: nn.Module, function: Callable, args: tuple, kwargs: dict[str, Any], name: Hashable
    ) -> Result:
        """As `run`, but the judge decides which calls are captured."""
        key, timing = self.key(args, kwargs, name), None
        with self._lock, self._computing():
            watch = self._watch
            if watch is not None and not (
                watch.same_addresses(module) and (key is None or watch.same_otherwise(module))
            ):
                self.clear(wait=False)
                judge.start_over()
            elif _dropped and key is not None:
                _free_dropped(wait=False)
            step = Step.RUN if key is None else judge.consider(key)
            if step is not Step.RUN and wants_gradient(itertools.chain(tensors(args), module.parameters())):
                judge.refuse(key)
            elif step is Step.CAPTURE:
                graph = self._graphs.get(key) or self._capture_judged(judge, module, key, function, args, kwargs)
                if graph is not None:
                    return graph.replay(args, cast=True)
            elif step is Step.TIME:
                self._places = Places(module)
                timing = Timing(functools.partial(recorded_event, args[0].device))
        with self._computing():
            result = function(*args, **kwargs)
        if timing is not None:
            timing.finish()
        with self._lock:
            if key is not None and not judge.knows(key):
                key = self.key(args, kwargs, name)  # the first attention chooses the order of PyTorch's backends
            if key is not None:
                judge.note(key, timing)
        return result

    def _capture_judged(
        self, judge: Judge, module: nn.Module, key: Hashable, function: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> "Captured | None":
        """The graph of a kind that is worth one; None if it must not be captured now."""
        if self._places is None or not self._places.same(module):
            judge.start_over()
            return None
        if not self._has_room(judge, key) or not self._may_capture(module, args):
            judge.refuse(key)
            if not self._graphs:
                self._watch = None  # which would keep weights alive that are moved to a CPU
            return None
        limit = min(self._budget.limit, self._budget.held() + free_memory(args[0].device) // 2)
        graph = self._capture(module, key, function, args, kwargs)
        if graph is None:
            self._watch = None
            judge.reject(key)
            return None
        size, alone = self._pool.reserved() + sum(each.size for each in self._graphs.values()), len(self._graphs) == 1
        self._budget.hold(self, size)
        if self._budget.held() <= limit:
            return graph
        self.clear()  # the graphs of a pool return their memory together
        if alone and size > self._budget.limit:
            judge.reject(key)
        else:
            judge.refuse(key, is_crowded=True)
        return None

    def _has_room(self, judge: Judge, key: Hashable) -> bool:
        """Whether another graph may be captured. Drops all graphs if they leave too little memory and are not used."""
        if judge.is_crowded(key):
            if not all(judge.gives_way(other, key) for other in self._graphs):
                return False
            self.clear()
        return len(self._graphs) < LIMIT or judge.gives_way(next(iter(self._graphs)), key)

    def _may_capture(self, module: nn.Module, args: tuple) -> bool:
        watch = self._watch
        if watch is None or not (watch.same_addresses(module) and watch.same_otherwise(module)):
            self.clear()
            self._watch = watch = Watch(module)
        return watch.device == args[0].device and not watch.wants_gradient(*tensors(args))

    def _capture(
        self, module: nn.Module, key: Hashable, function: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> "Captured | None":
        if self._pool is None:
            self._pool, self._casts = Pool(args[0].device), Casts(module)
        try:
            graph = Captured(self._pool, self._casts, self._layout(module), function, args, kwargs)
            graph.operands = operands.kept_by(module.modules())
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

    def _layout(self, module: nn.Module) -> torch.memory_format:
        """The memory format of the graph's inputs."""
        if self.of_network:
            return torch.preserve_format
        return torch.channels_last if is_indifferent(module) else torch.contiguous_format


def _free_dropped(wait: bool) -> None:
    """Free dropped graphs. Without wait, graphs that the GPU still uses are kept for the next time."""
    in_use = []
    with contextlib.suppress(IndexError):  # other threads may do the same
        while True:
            pool, *of_pool = _dropped.pop()
            if wait:
                pool.wait()
            elif not pool.is_done():
                in_use.append((pool, *of_pool))
            of_pool.clear()
    _dropped.extend(in_use)


class NetworkGraphs(Graphs):
    """The graphs of a diffusion transformer: inputs keep their strides, and calls under autocast are captured."""

    of_network = True
    under_autocast = True


class Pool:
    """What the graphs of a module share: memory, the stream of captures, and the end of the last replay."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.replayed = Event()
        self.memory = torch.cuda.graph_pool_handle()

    def wait(self) -> None:
        """Wait until the GPU has finished the last replay."""
        self.replayed.synchronize()

    def is_done(self) -> bool:
        """Whether the GPU has finished the last replay."""
        return self.replayed.query()

    def reserved(self) -> float:
        """Bytes of the memory that the graphs share; infinity for an allocator that does not say."""
        try:
            segments = torch.cuda.memory_snapshot()
        except RuntimeError:
            return math.inf
        return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] == self.memory)

    def abandon(self) -> None:
        """After a failed capture: PyTorch may not have noticed that it is over, and would keep its memory."""
        abandon_capture(self.stream.device_index, self.memory)


class Captured:
    """A call as a CUDA graph with its own inputs and output. Raises what the call or its capture raises.

    layout: memory format of the inputs. Unless it is torch.preserve_format, the result gets the memory format of x.
    size: bytes of the inputs.
    operands: tensors kept by frozen layers that the graph reads; they live as long as the graph.
    """

    operands: list[torch.Tensor] | None = None

    def __init__(
        self,
        pool: Pool,
        casts: Casts,
        layout: torch.memory_format,
        function: Callable,
        args: tuple,
        kwargs: dict[str, Any],
    ):
        device, self._layout = args[0].device, layout
        self._pool, self._casts, self._graph = pool, casts, torch.cuda.CUDAGraph()
        current, grad = torch.cuda.current_stream(device), torch.is_grad_enabled()
        pool.stream.wait_stream(current)
        with _CAPTURING, torch.inference_mode(False), torch.set_grad_enabled(grad), torch.cuda.stream(pool.stream):
            own = [torch.empty_like(x, memory_format=layout).copy_(x) if is_tensor(x) else x for x in args]
            self._inputs = tensors(own)
            self.size = sum(x.nbytes for x in self._inputs)
            with casts.once(device):
                function(*own, **kwargs)  # compiles kernels, chooses convolution algorithms, casts weights
                clear_cublas_workspaces()  # so that the graph gets its own
                try:
                    with torch.cuda.graph(self._graph, pool.memory, pool.stream, capture_error_mode="thread_local"):
                        self._results, self._structure = tree_flatten(function(*own, **kwargs))
                except Exception:
                    pool.abandon()
                    raise
                finally:
                    clear_cublas_workspaces()
        current.wait_stream(pool.stream)

    def replay(self, args: tuple, cast: bool) -> Result:
        """The result for these arguments, in new memory."""
        x = args[0]
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self._pool.replayed)  # the graphs of a pool take turns
        if cast:
            self._casts.refresh()
        for own, given in zip(self._inputs, tensors(args), strict=True):
            own.copy_(given)
        try:
            self._graph.replay()
            results = [self._copy(out, x) for out in self._results]
        finally:  # also if there is no memory for the results: the GPU computes
            self._pool.replayed.record(stream)
        return tree_unflatten(results, self._structure)

    def _copy(self, out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        y = out if self._layout is torch.preserve_format else layout_of(out, like)
        return y.clone() if y is out else y


def call_key(args: tuple, kwargs: dict[str, Any], network: bool, under_autocast: bool) -> Hashable | None:
    """The kind of a call: calls with equal keys may share a graph. None if a call must not be captured or replayed:

    - there is no GPU, or the operators have no kernels for x;
    - autocast is on, unless under_autocast;
    - another capture or a trace is active;
    - global module hooks or a mode, such as a FLOP counter, would observe the call;
    - an argument after the first is neither an integer nor a list of integers; a network may also take tensors.
    """
    modes = count_dispatch_modes() > 0 or any(type(mode) is not DeviceContext for mode in function_modes())
    x, *rest = args
    if modes or torch.jit.is_tracing() or not plain() or not can_graph(x):
        return None
    given = tensors(rest) if network else []
    others = [value for value in rest if not (network and is_tensor(value))]
    if not all(map(_integers, (*others, *kwargs.values()))) or any(tensor.device != x.device for tensor in given):
        return None
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    if autocast and not under_autocast:
        return None
    return (
        (x.shape, x.dtype, x.device, repr(others), repr(kwargs), autocast),
        (x.stride() if network else None, *((tensor.shape, tensor.dtype, tensor.stride()) for tensor in given)),
        (torch.is_grad_enabled(), *(setting() for setting in SETTINGS), *attention_order()),
    )


def can_graph(x: torch.Tensor) -> bool:
    """Whether x is on a GPU, the operators have kernels for it, and no capture is active."""
    return x.is_cuda and x.numel() > 0 and ops.has_kernels(x) and not torch.cuda.is_current_stream_capturing()


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def tensors(args: Iterable[Any]) -> list[torch.Tensor]:
    return list(filter(is_tensor, args))


def _integers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, int) for item in value)
    return value is None or isinstance(value, int)
