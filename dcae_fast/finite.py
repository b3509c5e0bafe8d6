"""Checks for NaN and infinity in model outputs, run before a result is shown or saved.

After quantisation to pixels, NaN would look like black.
"""

from collections.abc import Sequence

import torch

from .errors import NotFiniteError

ADVICE = {
    torch.float16: "try --dtype bfloat16 or --dtype float32",
    torch.bfloat16: "try --dtype float32",
}
MAX_NAMES_PRINTED = 4


def finite_rows(x: torch.Tensor) -> list[bool]:
    """For each of the B rows of x [B, ...], whether all values are finite. Waits for the device."""
    return x.isfinite().flatten(1).all(1).tolist()


def not_finite_message(names: Sequence[str], dtype: torch.dtype) -> str:
    """The error message for results, given by name, that were computed in dtype and are not finite."""
    hidden = len(names) - MAX_NAMES_PRINTED
    some = ", ".join(names[:MAX_NAMES_PRINTED]) + (f" and {hidden} more" if hidden > 0 else "")
    advice = ADVICE.get(dtype, "the weights of the model may be damaged")
    return f"NaN or infinity in {some}, computed in {str(dtype).removeprefix('torch.')}; {advice}"


def check_finite(x: torch.Tensor, names: Sequence[str], dtype: torch.dtype) -> None:
    """Raises NotFiniteError if x [B, ...], computed in dtype, is not finite. names: one for each of the B results."""
    bad = [name for name, finite in zip(names, finite_rows(x), strict=True) if not finite]
    if bad:
        raise NotFiniteError(not_finite_message(bad, dtype))
