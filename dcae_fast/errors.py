"""Errors that end a command with one line. PyTorch is not imported."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be found, read, or loaded into this model."""


class NotDownloadedError(CheckpointError):
    """Files of a repository that are neither in the local cache nor to be downloaded."""


class OtherKindError(CheckpointError):
    """An autoencoder where a diffusion model is expected, or the other way round."""


class DeviceError(ValueError):
    """A device that is not there, or that cannot compute in the dtype asked for."""


class NotFiniteError(FloatingPointError):
    """A model computed NaN or infinity; the message says in what, and what to do."""


def print_failure(message: str) -> None:
    """Prints to stderr why this process ends; under torchrun only in the main one, and see `report_failure`."""
    report_failure(message)
    if "TORCHELASTIC_ERROR_FILE" not in os.environ or os.environ.get("RANK") == "0":
        print(message, file=sys.stderr, flush=True)


def report_failure(message: str) -> None:
    """Has torchrun show why this process ends, in the report that it prints after all others."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": content}))
