"""Detects out-of-memory errors of any library, on any device. This module does not import PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager

SIGNS = (
    "out of memory",  # CUDA, CUDA drivers, NCCL, Triton
    "can't allocate memory",  # PyTorch's CPU allocator
    "not enough memory",  # PyTorch's CPU allocator on Windows
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "Storage size calculation overflowed",  # PyTorch, for sizes beyond 64 bits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that GPU or CPU memory is exhausted."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def out_of_memory_as(replacement: Exception) -> Iterator[None]:
    """Raises `replacement` in place of an out-of-memory error in the block."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise replacement from error
        raise
