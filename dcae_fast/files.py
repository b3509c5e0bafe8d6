"""Writing files that are either whole or absent."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # some writers, safetensors among them, make private files
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(*paths: Path) -> None:
    """Returns when these files, and the names in these folders, would survive a loss of power."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
