"""Which of cuDNN's candidates runs a convolution the fastest: timed once for each shape, kept in memory and on disk.

cuDNN's first suggestion can be 20 % slower than the best of its list. The winners' places in the list are kept in one
small JSON file for each GPU and version of cuDNN, in $DCAE_FAST_CACHE, else $XDG_CACHE_HOME/dcae_fast, else
~/.cache/dcae_fast. A file that cannot be read or written costs no more than the time of another search.
"""

import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dcae_fast.files import written_atomically

from ._library import cuda_extension

MOST_CANDIDATES = 24
MOST_WORKSPACE = 2**28  # bytes
HOPELESS = 1.5  # times the best so far: not timed again
FINALISTS, ROUNDS = 5, 5
BURST, PAUSE = 3.0, 0.008  # milliseconds of work, seconds without
LAUNCH = 200_000  # clock cycles, more than a launch from Python takes
COMPILERS = 8  # threads
WORTH_A_SEARCH = 5e7  # multiplications; the smallest convolution of the released models at 512 pixels has 7.5e7
NO_PLAN = -1  # in the place of a candidate: the fallback is the fastest

Epilogue = list[tuple[str, torch.Tensor | None]]

_plans: dict[tuple, object | None] = {}
_lock = threading.Lock()


def available() -> bool:
    """Whether the CUDA extension was built with cuDNN, and torch may use cuDNN."""
    return hasattr(cuda_extension(), "Convolution") and torch.backends.cudnn.enabled


def find(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    padding: tuple[int, int, int, int],
    epilogue: Epilogue,
    fallback: Callable[[], torch.Tensor],
):
    """The ConvolutionPlan for tensors like these; None if `fallback` does the same work faster.

    epilogue: (step, its operand or None) in order, as in csrc/convolution.h. A new shape is searched for, which takes
    up to some seconds; None is also the answer for a new shape while a CUDA graph is captured, and for tiny ones.
    """
    steps = tuple((step, None if operand is None else operand.dtype) for step, operand in epilogue)
    key = (x.device.index, x.dtype, tuple(x.shape), tuple(weight.shape), stride, padding, steps)
    if key in _plans:
        return _plans[key]
    if torch.cuda.is_current_stream_capturing() or _products(x, weight, stride) < WORTH_A_SEARCH:
        return None
    with _lock, torch.cuda.device(x.device), torch.no_grad():
        if key not in _plans:
            _plans[key] = _find(repr(key[1:]), x, weight, stride, padding, epilogue, fallback)
    return _plans[key]


def _products(x: torch.Tensor, weight: torch.Tensor, stride: int) -> float:
    """About how many multiplications a convolution takes."""
    return x.numel() // x.shape[1] * weight.numel() / stride**2


def _find(name, x, weight, stride, padding, epilogue, fallback):
    """The plan that the cache file names; else that of a search, and its place is written there."""
    file = _cache_file()
    candidate = _read(file).get(name)
    try:
        convolution = cuda_extension().Convolution(x, weight, stride, padding, epilogue)
        if candidate is not None and NO_PLAN <= candidate < len(convolution):
            return None if candidate == NO_PLAN else convolution.build(candidate)
        operands = [operand for _, operand in epilogue if operand is not None]
        candidate, plan = _search(convolution, lambda plan: plan(x, weight, operands), fallback)
    except RuntimeError as error:
        warnings.warn(f"cuDNN cannot fuse the convolution {name}: {error}", stacklevel=2)
        return None
    _write(file, name, candidate)
    return plan


def _search(convolution, run: Callable, fallback: Callable):
    """The fastest candidate and its plan.

    Every candidate is timed once, the best of them and the fallback in short bursts with pauses: after some 50 ms
    without one the GPU comes to its power limit and slows down, whatever runs then. cuDNN compiles a candidate no more
    than once, so plans are kept.
    """
    with ThreadPoolExecutor(COMPILERS) as pool:
        candidates = range(min(len(convolution), MOST_CANDIDATES))
        built = list(pool.map(lambda candidate: _build(convolution, candidate), candidates))
    plans = {candidate: plan for candidate, plan in enumerate(built) if plan is not None}
    runs = {NO_PLAN: fallback} | {candidate: lambda plan=plan: run(plan) for candidate, plan in plans.items()}
    once = {}
    for candidate, call in runs.items():
        once[candidate] = _milliseconds(call)  # with what the first call of a kernel costs
        if once[candidate] < HOPELESS * min(once.values()):
            once[candidate] = _milliseconds(call)
    bursts = {candidate: [] for candidate in (NO_PLAN, *sorted(once, key=once.get)[:FINALISTS])}
    calls = min(max(round(BURST / min(once.values())), 2), 20)
    for _ in range(ROUNDS):
        for candidate, events in bursts.items():
            events.append(_record(runs[candidate], calls))
            time.sleep(PAUSE)
    torch.cuda.synchronize()
    best = min(bursts, key=lambda candidate: statistics.median(map(_elapsed, bursts[candidate])))
    return best, plans.get(best)


def _build(convolution, candidate: int):
    """The candidate's plan, None if it is not for this GPU or shape, or needs much memory."""
    try:
        plan = convolution.build(candidate)
    except RuntimeError:
        return None
    return plan if plan.workspace_size <= MOST_WORKSPACE else None


def _record(call: Callable, calls: int = 1) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LAUNCH * calls)  # so that launching takes none of the time between the events
    start.record()
    for _ in range(calls):
        call()
    end.record()
    return start, end


def _elapsed(events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
    return events[0].elapsed_time(events[1])


def _milliseconds(call: Callable) -> float:
    events = _record(call)
    events[1].synchronize()
    return _elapsed(events)


def _cache_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("DCAE_FAST_CACHE") or Path(cache, "dcae_fast")
    gpu = torch.cuda.get_device_name().replace(" ", "_")
    return Path(folder, f"convolutions-{gpu}-cudnn{torch.backends.cudnn.version()}.json")


def _read(file: Path) -> dict[str, int]:
    try:
        places = json.loads(file.read_text())
        return {name: place for name, place in places.items() if isinstance(place, int)}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(file: Path, name: str, candidate: int) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(file) as part:
            part.write_text(json.dumps(_read(file) | {name: candidate}, indent=0))
    except OSError:
        pass
