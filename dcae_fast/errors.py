"""Errors that end a command with a one-line message. This module does not import PyTorch."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, read, or loaded into the model."""


class NotDownloadedError(CheckpointError):
    """Files of a repository are not in the local cache and cannot be downloaded."""


class OtherKindError(CheckpointError):
    """The checkpoint is an autoencoder where a diffusion model is expected, or the other way round."""


class DeviceError(ValueError):
    """A device does not exist, or cannot compute in the requested dtype, or several cannot work together."""


class DataError(ValueError):
    """Files on disk, such as pictures or latents, are invalid. The message names the files."""


class NotFiniteError(FloatingPointError):
    """A model computed NaN or infinity. The message names the results and gives advice."""


def print_failure(message: str) -> None:
    """Prints the reason why this process ends to stderr (under torchrun only on rank 0), and calls `report_failure`."""
    report_failure(message)
    if "TORCHELASTIC_ERROR_FILE" not in os.environ or os.environ.get("RANK") == "0":
        print(message, file=sys.stderr, flush=True)


def report_failure(message: str) -> None:
    """Passes the reason why this process ends to torchrun, which prints the reason in its final report."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": content}))
