"""SIGTERM and Ctrl-C: a command ends cleanly, and a training run saves a checkpoint first."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 1.0  # seconds; one Ctrl-C may arrive twice, from the terminal and forwarded by torchrun


class Interrupted(KeyboardInterrupt):
    """The signal `signum` asked the process to end. The message says what the process did before ending."""

    def __init__(self, signum: int, message: str = "interrupted"):
        super().__init__(message)
        self.signum = signum


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In the block, SIGTERM raises Interrupted, as Ctrl-C raises KeyboardInterrupt, so that cleanup code runs.

    Under torchrun, SIGTERM keeps its default action, which kills the process: a Python exception could not end a rank
    that waits for other ranks inside a library.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    if "RANK" in os.environ:
        yield
        return
    with _handled((signal.SIGTERM,), interrupt):
        yield


class Interruption:
    """Stores the first SIGTERM or Ctrl-C of its block in `signum`, 0 before. The next signal raises Interrupted.

    message: printed at the first signal, unless empty.
    """

    def __init__(self, message: str = ""):
        self.message = f"\n{message}\n".encode() if message else b""
        self.signum, self.came, self.process = 0, 0.0, os.getpid()

    def __enter__(self) -> "Interruption":
        self.handled = _handled(SIGNALS, self._note)
        self.handled.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.handled.__exit__(None, None, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked worker
            return
        if not self.signum:
            self.signum, self.came = signum, time.monotonic()
            os.write(2, self.message)  # print could interrupt another print
        elif time.monotonic() - self.came > SAME_REQUEST:
            raise Interrupted(signum)


def ignore_interruptions(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a worker ignores signals to its process group and ends only with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def _handled(signals: tuple[int, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles signals in the block. In other threads than the main thread, Python cannot set handlers: does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous or signal.SIG_DFL)
