"""Which kinds of calls are worth a CUDA graph, with a simulated GPU and clock."""

import copy
import pickle

import pytest

from dcae_fast.fast import events, judge
from dcae_fast.fast.judge import KINDS, PATIENCE, Budget, Judge, Step, Timing


class Clock:
    """Time in seconds on the host, and when the GPU becomes free."""

    def __init__(self):
        self.now = self.gpu = 0.0

    def work(self, host: float, gpu: float) -> None:
        """Issue kernels in many small parts."""
        for _ in range(100):
            self.now += host / 100
            self.gpu = max(self.gpu, self.now) + gpu / 100

    def record(self) -> "FakeEvent":
        self.gpu = max(self.gpu, self.now)
        return FakeEvent(self, self.gpu)


class FakeEvent:
    def __init__(self, clock: Clock, at: float):
        self.clock, self.at = clock, at

    def query(self) -> bool:
        return self.clock.now >= self.at

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.query() and end.query(), "PyTorch would raise"
        return 1e3 * (end.at - self.at)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(judge.time, "perf_counter", lambda: clock.now)
    return clock


def call(decides: Judge, clock: Clock, key, host: float = 0.01, gpu: float = 0.001, pause: float = 1.0) -> Step:
    """A call without a graph, and what the judge says of it. The host waits between calls."""
    step = decides.consider(key)
    timing = Timing(clock.record) if step is Step.TIME else None
    clock.work(host, gpu)
    if timing is not None:
        timing.finish()
    decides.note(key, timing)
    clock.now += pause
    return step


def steps(decides: Judge, clock: Clock, keys, **options) -> list[str]:
    return [call(decides, clock, key, **options).name for key in keys]


def test_a_short_call_is_captured_the_third_time(clock):
    assert steps(Judge(), clock, "aaa") == ["RUN", "TIME", "CAPTURE"]


@pytest.mark.parametrize("gpu, step", [(0.005, "CAPTURE"), (0.012, "CAPTURE"), (0.02, "RUN"), (0.1, "RUN")])
def test_a_long_call_is_timed_once(clock, gpu, step):
    assert steps(Judge(), clock, "aaaaa", gpu=gpu) == ["RUN", "TIME", step, step, step]


def test_results_are_awaited_without_waiting(clock):
    decides = Judge()
    call(decides, clock, "a")
    call(decides, clock, "a", pause=0.0, gpu=0.014)
    assert steps(decides, clock, "a", host=0.001, gpu=0.0, pause=0.0) == ["RUN"], "the GPU is still at it"
    clock.now += 1
    assert decides.consider("a") is Step.CAPTURE


def test_calls_behind_other_work_are_not_judged(clock):
    """The GPU is busy during the whole call, so that its time says nothing about a waiting GPU."""
    decides, timed = Judge(), []
    for index in range(20):
        clock.gpu = clock.now + 5
        if call(decides, clock, "a", pause=0.0) is Step.TIME:
            timed.append(index)
    assert timed == [1, 4, 9, 18], "less and less often"
    clock.now += 10
    later = steps(decides, clock, "a" * 20)
    assert later.count("TIME") == 1 and set(later[later.index("TIME") + 1 :]) == {"CAPTURE"}


@pytest.mark.parametrize("repetitions", [1, 2])
def test_many_shapes_once_or_twice(clock, repetitions):
    decides = Judge()
    assert "CAPTURE" not in steps(decides, clock, [shape for shape in range(200) for _ in range(repetitions)])


def test_more_shapes_than_are_remembered(clock):
    decides = Judge()
    assert set(steps(decides, clock, list(range(KINDS + 1)) * 5)) == {"RUN"}
    assert len(decides._kinds) == KINDS


def test_a_refused_kind_waits_longer_each_time(clock):
    decides, waited, count = Judge(), [], 0
    for _ in range(8 * PATIENCE):
        if call(decides, clock, "a") is Step.CAPTURE:
            decides.refuse("a")
            waited, count = [*waited, count], 0
        count += 1
    assert waited[0] == 2 and len(waited) == 4
    assert all(later >= 2 * earlier - 1 for earlier, later in zip(waited[1:], waited[2:], strict=False))


def test_a_rejected_kind_is_never_captured(clock):
    decides = Judge()
    steps(decides, clock, "aaa")
    decides.reject("a")
    assert set(steps(decides, clock, "a" * 100)) == {"RUN"}


def test_weights_that_move_in_every_call(clock):
    """Captures become rare, since each change doubles the number of calls that are needed."""
    decides, captures = Judge(), 0
    for _ in range(1000):
        if call(decides, clock, "a") is Step.CAPTURE:
            captures += 1
            decides.start_over()
    assert 5 <= captures <= 10


def test_a_graph_gives_way_when_it_is_no_longer_used(clock):
    decides = Judge()
    steps(decides, clock, "aaabbb")
    decides.replayed("a")
    assert not decides.gives_way("a", "b"), "b was not refused"
    decides.refuse("b")
    decides.replayed("a")
    assert not decides.gives_way("a", "b")
    decides.refuse("b")
    assert decides.gives_way("a", "b") and decides.gives_way("forgotten", "b")
    assert not decides.is_crowded("b")
    decides.refuse("b", is_crowded=True)
    decides.refuse("b")
    assert decides.is_crowded("b")


class Holder:
    pass


def test_a_budget_is_shared():
    budget, a, b = Budget(100), Holder(), Holder()
    budget.hold(a, 30)
    budget.hold(b, 50)
    assert budget.held() == 80
    budget.hold(b, 0)
    assert budget.held() == 30
    del a
    assert budget.held() == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_a_budget_hold_nothing(duplicate):
    budget, holder = Budget(100), Holder()
    budget.hold(holder, 30)
    a, b = duplicate((budget, budget))
    assert a is b is not budget and a.limit == 100 and a.held() == 0


class Driver:
    """A CUDA driver that has only the mode of captures of one thread."""

    def __init__(self, name: str):
        self.name, self.mode, self.modes = name, 0, []

    def cuThreadExchangeStreamCaptureMode(self, mode) -> int:  # noqa: N802
        self.mode, mode._obj.value = mode._obj.value, self.mode
        self.modes.append(self.mode)
        return 0


def test_queries_are_allowed_during_captures_of_other_threads(monkeypatch):
    driver = Driver("libcuda.so.1")
    monkeypatch.setattr(events.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(events, "_exchange_mode", events._exchange_mode.__wrapped__)
    with pytest.raises(KeyError), events._during_captures():
        assert driver.mode == events.RELAXED
        raise KeyError
    assert driver.modes == [events.RELAXED, 0], "the thread has its former mode again"


def test_without_the_driver_of_nvidia(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(events.ctypes, "CDLL", missing)
    monkeypatch.setattr(events, "_exchange_mode", events._exchange_mode.__wrapped__)
    with events._during_captures():
        pass
