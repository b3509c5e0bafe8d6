"""Shared by the commands that train."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dcae_fast.memory import out_of_memory_as
from dcae_fast.training.engine.config import Run, TrainingError

from .common import UsageError

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def training_process(run: Run, precision: str) -> Iterator["torch.device"]:
    """This process as one of those that train, on its device. Errors that a user can mend become UsageError."""
    import torch

    from dcae_fast import distributed
    from dcae_fast.errors import DataError
    from dcae_fast.reconstruction import choose_device

    advice = "try --accumulate, --checkpoint-activations or, on several GPUs, --parallel fsdp"
    too_large = UsageError(f"a part of the batch does not fit in memory; {advice}")
    try:
        place, _ = choose_device(run.device, precision)
        with out_of_memory_as(too_large), distributed.process_group(place) as device:
            torch.set_float32_matmul_precision("high")  # as the original: TF32 for products outside autocast
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nobody changes its result in place
            yield device
    except (DataError, TrainingError, ValueError) as error:
        raise UsageError(str(error)) from error
