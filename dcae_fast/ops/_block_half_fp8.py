"""The common part of `norm_attention_fp8` and `norm_mlp_fp8`: halves of a transformer block that train in 8 bit."""

from ._block_half import Half
from .linear_fp8 import FORMAT
from .quantize_rows import layer_norm_and_rows_op, layer_norm_rows_op


class HalfFp8(Half):
    """A half whose inputs end with `everything`, see linear_fp8.py. Among the kept tensors are y and y_scale: the 8-bit
    rows of y with everything, else y in half precision, and an empty tensor.
    """

    __slots__ = ()
    differentiable_twice = False

    def fuses(self):
        return False

    def norm_rows(self, via):
        """s, total, y and y_scale to keep, and the 8-bit rows of y with their scales."""
        x, branch = self.x, self.branch
        norm = x, self.scale, self.shift, self.eps, branch, self.gate
        if self.everything:
            total, *rows = via(layer_norm_rows_op)(*norm, FORMAT)
            kept = rows
        else:
            total, y, *rows = via(layer_norm_and_rows_op)(*norm, self.dtype, FORMAT)
            kept = y, y.new_empty(0)
        return x if branch is None else total, total, kept, rows

    def operands_of_w_in(self, y, y_scale):
        """y in half precision and as 8-bit rows, the other one None, from the kept tensors."""
        return (None, (y, y_scale)) if self.everything else (y, None)
