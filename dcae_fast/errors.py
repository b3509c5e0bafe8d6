"""Errors that end a command with one line. PyTorch is not imported."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be found, read, or loaded into this model."""


class DeviceError(ValueError):
    """A device that is not there, or that cannot compute in the dtype asked for."""


class NotFiniteError(FloatingPointError):
    """A model computed NaN or infinity; the message says in what, and what to do."""
