"""Writing files that are either whole or absent."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TEMPORARY = re.compile(r"(?s)\..*\.part|\.tmp\w{6}")  # `written_atomically`'s, and safetensors' own


class WriteError(OSError):
    """A file or folder that could not be written; the message names it and says why."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A write in the block that fails, in the system or in a library, raises a WriteError that names `path`."""
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
    """Why a write failed; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or f"{error} (is the disk full?)"
    text = str(error)
    if number := re.search(r"\(os error (\d+)\)", text):  # a library in Rust, such as safetensors
        return os.strerror(int(number[1]))
    if "inline_container.cc" in text:  # torch.save
        return "PyTorch could not write all of it (is the disk full?)"
    return None


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place if the block ends without an error.

    Raises WriteError.
    """
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.part")  # 255 bytes at most
    with writing(path):
        temporary.touch()
        try:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # some writers, safetensors among them, make private files
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def save_npy(path: Path, array: "np.ndarray") -> None:
    """Writes an .npy file that is either whole or absent. Raises WriteError.

    numpy writes to one of Python's files through C's buffer, and overlooks an error when that is emptied at the end. To
    any other object it writes through Python.
    """
    import numpy as np

    with written_atomically(path) as temporary, temporary.open("wb") as file:
        np.save(SimpleNamespace(write=file.write), array)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file; where it cannot be written, the file is as before. Raises WriteError."""
    with writing(path), path.open("ab") as file:
        end = file.tell()
        try:
            file.write(f"{line}\n".encode())
            file.flush()
        except OSError:
            with suppress(OSError):
                file.close()  # which tries to write the rest
            os.truncate(path, end)
            raise


def leftovers(folder: Path) -> list[Path]:
    """Files under a folder that killed processes left half written."""
    return [path for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name) and path.is_file()]


def fsync(*paths: Path) -> None:
    """Returns when these files, and the names in these folders, would survive a loss of power. Raises WriteError."""
    for path in paths:
        with writing(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
