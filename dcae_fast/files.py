"""Atomic writing: a file is either complete or absent."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TEMPORARY = re.compile(r"(?s)\..*\.part|\.tmp\w{6}")  # names made by `written_atomically` and by safetensors


class WriteError(OSError):
    """A file or folder could not be written. The message gives its path and the reason."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write in the block, by the system or by a library, into a WriteError that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WriteError(f"{path}: not written: {reason}") from error


def _reason(error: Exception) -> str | None:
    """The reason why a write failed; None if the error is not a failed write."""
    if isinstance(error, OSError):
        return error.strerror or f"{error} (is the disk full?)"
    text = str(error)
    if number := re.search(r"\(os error (\d+)\)", text):  # from a Rust library, such as safetensors
        return os.strerror(int(number[1]))
    if "inline_container.cc" in text:  # torch.save
        return "PyTorch could not write the whole file (is the disk full?)"
    return None


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` if the block ends without an error.

    Raises WriteError.
    """
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.part")  # file systems allow 255 bytes
    with writing(path):
        temporary.touch()
        try:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # some writers, such as safetensors, create private files
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def save_npy(path: Path, array: "np.ndarray") -> None:
    """Writes an .npy file atomically. Raises WriteError.

    numpy writes to a Python file object through C's buffered I/O, and ignores an error of the last flush. Hence numpy
    gets an object that is not a file, which it writes to through Python.
    """
    import numpy as np

    with written_atomically(path) as temporary, temporary.open("wb") as file:
        np.save(SimpleNamespace(write=file.write), array)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file. If this fails, the file is unchanged and WriteError is raised."""
    with writing(path), path.open("ab") as file:
        end = file.tell()
        try:
            file.write(f"{line}\n".encode())
            file.flush()
        except OSError:
            with suppress(OSError):
                file.close()  # closing tries to write the rest
            os.truncate(path, end)
            raise


def check_regular(path: Path) -> None:
    """Raises OSError if `path` is absent, or not a regular file: opening a pipe would wait for a writer."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def leftovers(folder: Path) -> list[Path]:
    """Temporary files below a folder, left by killed processes."""
    return [path for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name) and path.is_file()]


def fsync(*paths: Path) -> None:
    """Flushes files, and the directory entries of folders, to the disk. Raises WriteError."""
    for path in paths:
        with writing(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
