"""SIGTERM and Ctrl-C: a command ends cleanly, and a training saves before it ends."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 1.0  # seconds in which a signal comes twice: from the terminal, and passed on by torchrun


class Interrupted(KeyboardInterrupt):
    """The process was asked to end by the signal `signum`; the message says what it did about it."""

    def __init__(self, signum: int, message: str = "interrupted"):
        super().__init__(message)
        self.signum = signum


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In the block, SIGTERM raises Interrupted, as Ctrl-C raises KeyboardInterrupt, so that nothing half written stays.

    Not under torchrun: there a rank may wait for others in a library, which only a signal that kills ends at once.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    if "RANK" in os.environ:
        yield
        return
    with _handled((signal.SIGTERM,), interrupt):
        yield


class Interruption:
    """Notes the first SIGTERM or Ctrl-C in its block as `signum`, 0 until then; the next one raises Interrupted.

    message: printed, if any, when the first one comes.
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
        if os.getpid() != self.process:  # a worker that has just been forked
            return
        if not self.signum:
            self.signum, self.came = signum, time.monotonic()
            os.write(2, self.message)  # print might be in the middle of another message
        elif time.monotonic() - self.came > SAME_REQUEST:
            raise Interrupted(signum)


def ignore_interruptions(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: only its parent ends a worker, not a signal to all processes of a training."""
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
    """Python handles signals in the main thread only; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former or signal.SIG_DFL)
