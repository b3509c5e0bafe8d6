"""NaN and infinity in what a model computed: checked wherever a result is shown or saved.

Once a result is quantised to pixels, nothing tells them from black.
"""

from collections.abc import Sequence

import torch

from .errors import NotFiniteError

ADVICE = {
    torch.float16: "try --dtype bfloat16 or --dtype float32",
    torch.bfloat16: "try --dtype float32",
}
NAMED = 4  # at most, in a message


def finite_rows(x: torch.Tensor) -> list[bool]:
    """Whether each of x [B, ...] holds neither NaN nor infinity; waits for the device."""
    return x.isfinite().flatten(1).all(1).tolist()


def not_finite(names: Sequence[str], dtype: torch.dtype) -> str:
    """The message about these results, which were computed in dtype."""
    some = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    advice = ADVICE.get(dtype, "the weights of the model may be damaged")
    return f"NaN or infinity in {some}, computed in {str(dtype).removeprefix('torch.')}; {advice}"


def check_finite(x: torch.Tensor, names: Sequence[str], dtype: torch.dtype) -> None:
    """Raises NotFiniteError if x [B, ...], computed in dtype, is not finite; names: of the B results."""
    bad = [name for name, finite in zip(names, finite_rows(x), strict=True) if not finite]
    if bad:
        raise NotFiniteError(not_finite(bad, dtype))
