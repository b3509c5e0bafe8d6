"""Errors that end a command with one line. PyTorch is not imported."""


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
