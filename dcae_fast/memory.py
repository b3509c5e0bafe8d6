"""What libraries raise where memory does not suffice, on any device. PyTorch is not imported."""

from collections.abc import Iterator
from contextlib import contextmanager

SIGNS = (
    "out of memory",  # CUDA, its drivers, NCCL, Triton
    "can't allocate memory",  # PyTorch's allocator of the CPU
    "not enough memory",  # the same on Windows
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "Storage size calculation overflowed",  # more than can be counted
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory, on a GPU or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def out_of_memory_as(told: Exception) -> Iterator[None]:
    """Raises `told` from an error in the block that means that there is not enough memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise told from error
        raise
