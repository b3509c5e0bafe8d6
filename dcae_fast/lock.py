"""A lock on a folder, which one process can hold at a time; the lock file names the holder."""

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

LOCK_FILE = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # errors of file systems without locks


class LockedError(OSError):
    """Another process is working in the folder. The message names the folder and the process."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder during the block, and makes the folder if it is absent. Called by all ranks.

    The main process holds the lock. The operating system releases the lock when that process ends in any way, and
    forked processes do not inherit it. On a file system without locks, prints a warning and holds no lock. Raises
    LockedError or WriteError.
    """
    descriptor = distributed.on_main(lambda: _acquire(folder))
    try:
        yield
    finally:
        if distributed.is_main():
            with suppress(OSError):
                (folder / LOCK_FILE).unlink()  # before closing, while no other process can hold the lock
            os.close(descriptor)


def is_unused(folder: Path) -> bool:
    """Whether a folder is absent, or contains only a lock file and temporary files of killed processes."""
    return not folder.is_dir() or {folder / LOCK_FILE, *leftovers(folder)}.issuperset(folder.iterdir())


def _acquire(folder: Path) -> int:
    """Takes the lock; returns the descriptor of the lock file. Closing the descriptor releases the lock."""
    path = folder / LOCK_FILE
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, folder)
            if _is_same_file(descriptor, path):  # else the previous holder has just removed the file
                with suppress(OSError):  # on a full disk, the lock works without the holder's name
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
        raise LockedError(
            f"{folder} is in use by {holder}; wait until this process ends, or choose another folder"
        ) from error
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        warning = f"{folder}: the file system does not support locks ({error})"
        print(f"{warning}; make sure that no other process writes to this folder", file=sys.stderr)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder() -> str:
    program = Path(sys.argv[0])
    command = shlex.join([program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]])
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {began}: {command}\n"
