"""Times the candidates of a library, once for each shape, and remembers the fastest in memory and on disk.

cuDNN's first suggestion can be 20 % slower than the best candidate of its list. One small JSON file for each GPU and
version of the library holds the places of the winners in the list. The file lies in $DCAE_FAST_CACHE, else in
$XDG_CACHE_HOME/dcae_fast, else in ~/.cache/dcae_fast. If the file cannot be read or written, or names a plan that does
not work, the search is repeated.

If PyTorch was told to be deterministic, nothing is timed and no file is read: the first candidate that works is taken,
so that all processes on GPUs of one model compute the same bits. All candidates are deterministic.
"""

import contextlib
import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dcae_fast.files import written_atomically

from ._private import is_cudnn_deterministic, sleep_on_gpu, uses_deterministic_algorithms

MOST_CANDIDATES = 24
MOST_WORKSPACE = 2**28  # bytes
HOPELESS = 1.5  # candidates slower than the best so far by this factor are not timed again
FINALISTS, ROUNDS = 5, 5
BURST, PAUSE = 3.0, 0.008  # milliseconds of work, then seconds of rest
LAUNCH = 200_000  # clock cycles: more than one launch from Python takes
WAITING = 0.05  # milliseconds for which the GPU idles behind a call that waits for it
COMPILERS = 8  # threads
NO_PLAN = -1  # written as the place of the winner if the fallback is the fastest

_plans: dict[tuple, object | None] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """A library that makes plans.

    work: what the plans compute, in the plural, part of the file's name. version: of the library. takes_first_untimed:
    whether the first candidate rather than the fallback is used where timing is impossible or not worthwhile.
    fallback_call: milliseconds that a call of the fallback takes longer than a call of a plan. The fallback is chosen
    only if it is faster than the plan by this time, or by a tenth if that is less.
    """

    name: str
    work: str
    version: Callable[[], object]
    takes_first_untimed: bool = False
    fallback_call: float = 0.0


def is_deterministic() -> bool:
    """Whether PyTorch must be deterministic, by torch.use_deterministic_algorithms or by cuDNN's flag."""
    return uses_deterministic_algorithms() or is_cudnn_deterministic()


def key_of(library: Library, shape: tuple, device: torch.device) -> tuple:
    """The key of a plan, see `find`; it also depends on whether PyTorch must be deterministic."""
    return library.work, device.index, is_deterministic(), *shape


def found(key: tuple) -> object | None:
    """The plan that `find` found for a key; None if it found none yet, or if the fallback is faster."""
    return _plans.get(key)


def find(
    library: Library,
    shape: tuple,
    device: torch.device,
    is_worth_a_search: bool,
    make: Callable[[], object],
    run: Callable[[object], object],
    fallback: Callable[[], object],
):
    """The plan for a shape; None if `fallback` does the same work faster.

    shape: everything that the choice depends on besides the GPU. make: makes the candidates, an object with a length
    and `build(place)`. run: calls a plan. A new shape starts a search, which takes up to some seconds, unless a CUDA
    graph is being captured.
    """
    key = key_of(library, shape, device)
    if key in _plans:
        return _plans[key]
    is_capturing = torch.cuda.is_current_stream_capturing()
    is_timed = is_worth_a_search and not is_capturing
    if not (is_timed or library.takes_first_untimed):
        return None
    with _lock, torch.cuda.device(device), torch.no_grad():
        if key in _plans:
            return _plans[key]
        try:
            if is_timed and not is_deterministic():
                plan = _find(library, repr(shape), make, run, fallback)
            else:
                plan = _first(make(), (lambda plan: None) if is_capturing else run)
        except torch.OutOfMemoryError:
            return None  # the next call searches again
        except RuntimeError as error:
            warnings.warn(f"{library.name} cannot compute one of the {library.work}, {shape}: {error}", stacklevel=2)
            plan = None
        if not is_capturing:
            _plans[key] = plan
    return plan


def _first(candidates, run: Callable):
    """The plan of the first candidate that works; None if none does."""
    plans = (_working_plan(candidates, place, run) for place in range(min(len(candidates), MOST_CANDIDATES)))
    return next((plan for plan in plans if plan is not None), None)


def _find(library: Library, name: str, make: Callable, run: Callable, fallback: Callable):
    """The plan that the cache file names, if that plan works; else the result of a search.

    The result's place is written to the file, unless the search ran out of memory with some candidates.
    """
    file = _cache_file(library)
    candidate, candidates = _read(file).get(name), make()
    if candidate == NO_PLAN:
        return None
    plan = _working_plan(candidates, candidate, run)
    if plan is None:
        candidate, plan, is_final = _search(library, candidates, run, fallback)
        if is_final:
            _write(file, name, candidate)
    return plan


def _search(library: Library, candidates, run: Callable, fallback: Callable):
    """The place of the fastest candidate, its plan, and whether memory sufficed for all candidates.

    A candidate that fails when it runs is left out. If the fallback fails, the search fails.

    Every candidate is timed once. The best candidates and the fallback are then timed in short bursts with pauses:
    after about 50 ms without a pause the GPU reaches its power limit and slows down, whatever it runs. cuDNN compiles
    each candidate only once, so the plans are kept during the search. A call that waits for the GPU counts as slower.
    """
    with ThreadPoolExecutor(COMPILERS) as pool:
        places = range(min(len(candidates), MOST_CANDIDATES))
        built = list(pool.map(lambda place: _build(candidates, place), places))
    plans = {candidate: plan for candidate, plan in enumerate(built) if plan is not None}
    runs = {NO_PLAN: fallback} | {candidate: lambda plan=plan: run(plan) for candidate, plan in plans.items()}
    once, failures = {}, []
    for candidate, call in runs.items():
        with _left_out_on_failure(candidate, once, failures):
            once[candidate] = _milliseconds(call)  # includes the extra cost of a first call
            if once[candidate] < HOPELESS * min(once.values()):
                once[candidate] = _milliseconds(call)
    bursts = {candidate: [] for candidate in (NO_PLAN, *sorted(once, key=once.get)[:FINALISTS])}
    calls = min(max(round(BURST / min(once.values())), 2), 20)
    for _ in range(ROUNDS):
        for candidate, events in list(bursts.items()):
            with _left_out_on_failure(candidate, bursts, failures):
                events.append(_record(runs[candidate], calls))
                time.sleep(PAUSE)
    torch.cuda.synchronize()
    times = {candidate: statistics.median(map(_elapsed, events)) for candidate, events in bursts.items()}
    for candidate in list(times):
        with _left_out_on_failure(candidate, times, failures):
            times[candidate] += calls * WAITING * _waits_for_gpu(runs[candidate])
    times[NO_PLAN] += min(calls * library.fallback_call, times[NO_PLAN] / 10)
    best = min(times, key=times.get)
    return best, plans.get(best), torch.OutOfMemoryError not in failures


@contextlib.contextmanager
def _left_out_on_failure(candidate: int, timings: dict, failures: list[type]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if candidate == NO_PLAN:
            raise
        failures.append(type(error))
        timings.pop(candidate, None)


def _build(candidates, place: int | None):
    """A candidate's plan; None if there is no such candidate, if it does not support this GPU or shape, or if it needs
    too much memory.
    """
    if place not in range(len(candidates)):
        return None
    try:
        plan = candidates.build(place)
    except RuntimeError:
        return None
    return plan if plan.workspace_size <= MOST_WORKSPACE else None


def _working_plan(candidates, place: int | None, run: Callable):
    """A candidate's plan, after one run; None if there is no plan or the run fails."""
    plan = _build(candidates, place)
    try:
        if plan is not None:
            run(plan)
    except RuntimeError:
        return None
    return plan


def _record(call: Callable, calls: int = 1) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sleep_on_gpu(LAUNCH * calls)  # so that no launch falls between the events
    start.record()
    for _ in range(calls):
        call()
    end.record()
    return start, end


def _waits_for_gpu(call: Callable) -> bool:
    """Whether a call returns only after the GPU has done its earlier work, so that no launches can run ahead."""
    asleep = torch.cuda.Event()
    sleep_on_gpu(20 * LAUNCH)
    asleep.record()
    call()
    waits = asleep.query()
    torch.cuda.synchronize()
    return waits


def _elapsed(events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
    return events[0].elapsed_time(events[1])


def _milliseconds(call: Callable) -> float:
    events = _record(call)
    events[1].synchronize()
    return _elapsed(events)


def _cache_file(library: Library) -> Path | None:
    """None if the user has no home folder and no variable names another folder."""
    folder = os.environ.get("DCAE_FAST_CACHE")
    try:
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dcae_fast")
    except RuntimeError:
        return None
    gpu = torch.cuda.get_device_name().replace(" ", "_")
    return Path(folder, f"{library.work}-{gpu}-{library.name.lower()}{library.version()}.json")


def _read(file: Path | None) -> dict[str, int]:
    if file is None:
        return {}
    try:
        places = json.loads(file.read_text())
        return {name: place for name, place in places.items() if type(place) is int}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _write(file: Path | None, name: str, candidate: int) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(file) as part:
            part.write_text(json.dumps(_read(file) | {name: candidate}, indent=0))
    except OSError:
        pass
