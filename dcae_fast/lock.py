"""One process at a time in a folder: a lock file that names its holder."""

import errno
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import distributed
from .files import leftovers, writing

FILE = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # from a file system without locks


class LockedError(OSError):
    """A folder that another process is working in; the message names both."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if it is absent, for the block. Called by all ranks.

    The main process holds the lock. The operating system drops it when that process ends, however it ends, and forked
    processes do not inherit it. A file system without locks gets a warning. Raises LockedError or WriteError.
    """
    descriptor = distributed.on_main(lambda: _acquire(folder))
    try:
        yield
    finally:
        if distributed.is_main():
            with suppress(OSError):
                (folder / FILE).unlink()  # before it is closed: nobody else may hold the lock yet
            os.close(descriptor)


def is_unused(folder: Path) -> bool:
    """Whether a folder is absent, or holds nothing but a lock and what killed processes left half written."""
    return not folder.is_dir() or {folder / FILE, *leftovers(folder)}.issuperset(folder.iterdir())


def _acquire(folder: Path) -> int:
    """The descriptor of the folder's lock file, whose closing gives the lock back."""
    path = folder / FILE
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, folder)
            if _is_file(descriptor, path):  # and not one that its holder removed in the meantime
                with suppress(OSError):  # on a full disk the lock has no name; it holds all the same
                    os.truncate(descriptor, 0)
                    os.write(descriptor, _holder().encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "another process"
        raise LockedError(f"{folder} is in use by {holder}; wait until it ends, or take another folder") from error
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        print(f"{folder}: cannot be locked here ({error}); let no other process write to it", file=sys.stderr)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder() -> str:
    program = Path(sys.argv[0])
    command = shlex.join([program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]])
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {began}: {command}\n"
