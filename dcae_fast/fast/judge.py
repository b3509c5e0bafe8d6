"""Decides which calls are worth a CUDA graph, for `patch(model, cuda_graphs="auto")`. Does not import PyTorch."""

import enum
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

SHORT = 1.5  # a graph is worth its memory up to this GPU time, in units of the host time
KINDS = 64  # kinds of calls that are remembered; a kind that is forgotten starts over
PATIENCE = 16  # calls of a refused kind before it is considered again; twice as many each further time,
LONGEST = 1024  # but no more than these


class Step(enum.Enum):
    """What to do with a call."""

    RUN, TIME, CAPTURE = range(3)


class Event(Protocol):
    """A recorded torch.cuda.Event(enable_timing=True)."""

    def query(self) -> bool: ...
    def elapsed_time(self, end: "Event", /) -> float: ...


class Timing:
    """GPU time and host time of one call, measured without waiting for the GPU.

    The GPU time runs from the start of the call on the GPU to its end. It includes the time that the GPU waits for the
    host, so that it equals the host time if the host decides. Create a Timing before the call, `finish` it after.

    record: returns an event that it has recorded.
    """

    def __init__(self, record: Callable[[], Event]):
        self._record, self._start, self._began = record, record(), time.perf_counter()

    def finish(self) -> None:
        self._host = time.perf_counter() - self._began
        self._end = self._record()
        self.is_late = not self._start.query()  # other work kept the GPU busy all the time: the call waited for no host

    def ratio(self) -> float | None:
        """GPU time / host time; None while the GPU computes."""
        return self._start.elapsed_time(self._end) / (1e3 * self._host) if self._end.query() else None


@dataclass
class Kind:
    """A kind of call. calls: since the kind has started over, which was in the call number `since` of the module."""

    since: int
    last_use: int = 0
    calls: int = 0
    needed: int = 1  # calls before a call is timed or captured
    timing: Timing | None = None
    is_short: bool | None = None
    is_refused: bool = False
    is_crowded: bool = False  # did not fit into the memory beside other graphs


class Judge:
    """Decides which kinds of calls of one module are captured.

    The first call of a kind compiles kernels, the second is timed. A later call is captured if the timed call was
    short. A call that starts behind much other work on the GPU is not judged; a later one is timed instead.

    A kind that got no graph is considered again after PATIENCE more calls of it, then after twice as many, and so on,
    up to LONGEST. If weights or modules change, all kinds start over and need twice as many calls. So captures are rare
    in a module whose weights move often or whose shapes keep changing.
    """

    def __init__(self):
        self._kinds: OrderedDict[Hashable, Kind] = OrderedDict()
        self._now = 0

    def knows(self, key: Hashable) -> bool:
        return key in self._kinds

    def consider(self, key: Hashable) -> Step:
        kind = self._kinds.get(key)
        if kind is None or kind.calls < kind.needed:
            return Step.RUN
        if kind.is_short is None:
            if kind.timing is None:
                return Step.TIME
            ratio = kind.timing.ratio()
            if ratio is None:
                return Step.RUN
            kind.is_short, kind.timing = ratio <= SHORT, None
        return Step.CAPTURE if kind.is_short else Step.RUN

    def note(self, key: Hashable, timing: Timing | None = None) -> None:
        """A call has run without a graph. timing: if it was to be timed."""
        kind = self._touch(key)
        kind.calls += 1
        if timing is not None and timing.is_late:
            kind.calls, kind.needed = 0, min(2 * kind.needed, LONGEST)
        elif timing is not None:
            kind.timing = timing

    def replayed(self, key: Hashable) -> None:
        self._touch(key).last_use = self._now

    def refuse(self, key: Hashable, is_crowded: bool = False) -> None:
        """The kind gets no graph now."""
        kind = self._touch(key)
        kind.needed, kind.calls, kind.since = min(max(PATIENCE, 2 * kind.needed), LONGEST), 0, self._now
        kind.is_refused, kind.is_crowded = True, is_crowded or kind.is_crowded

    def reject(self, key: Hashable) -> None:
        """The kind never gets a graph."""
        self._touch(key).is_short = False

    def start_over(self) -> None:
        """Weights or modules have changed."""
        for key, kind in self._kinds.items():
            self._kinds[key] = Kind(self._now, needed=min(2 * kind.needed, LONGEST))

    def gives_way(self, captured: Hashable, key: Hashable) -> bool:
        """Whether a graph may be dropped for another kind: one that was refused, and has waited longer than the graph
        was in use.
        """
        last_use = self._kinds[captured].last_use if captured in self._kinds else 0
        return self._kinds[key].is_refused and last_use < self._kinds[key].since

    def is_crowded(self, key: Hashable) -> bool:
        return self._kinds[key].is_crowded

    def _touch(self, key: Hashable) -> Kind:
        self._now += 1
        kind = self._kinds.setdefault(key, Kind(self._now))
        self._kinds.move_to_end(key)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return kind


class Budget:
    """Bytes that the graphs of several modules may hold together. A copy has the same limit and holds nothing."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._sizes: weakref.WeakKeyDictionary[object, float] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return Budget, (self.limit,)

    def hold(self, holder: object, size: float) -> None:
        with self._lock:
            self._sizes[holder] = size

    def held(self) -> float:
        with self._lock:
            return sum(self._sizes.values())
