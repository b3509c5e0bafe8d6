"""The common part of `norm_attention_fp8` and `norm_mlp_fp8`: halves of a transformer block that train in 8 bit.

y, the result of the norm, exists only as 8-bit rows. The gradient of w_in in half precision computes y from s again,
which takes less time than to write y and to read it twice.
"""

from ._block_half import Half
from .layer_norm import layer_norm_op
from .linear_fp8 import FORMAT
from .quantize_rows import layer_norm_rows_op


class HalfFp8(Half):
    """A half whose inputs end with `everything`, see linear_fp8.py. Among the kept tensors are y and y_scale: the 8-bit
    rows of y with everything, else empty.
    """

    __slots__ = ()
    differentiable_twice = False

    def fuses(self):
        return False

    def norm_rows(self, via):
        """s, total, and the 8-bit rows of y with their scales."""
        x, branch = self.x, self.branch
        total, *rows = via(layer_norm_rows_op)(x, self.scale, self.shift, self.eps, branch, self.gate, FORMAT)
        return x if branch is None else total, total, tuple(rows)

    def rows_to_keep(self, rows):
        return rows if self.everything else (self.x.new_empty(0), self.x.new_empty(0))

    def y_again(self, via, total):
        """y in half precision; None with everything, where 8-bit rows take its place."""
        if self.everything:
            return None
        s = self.x if self.branch is None else total
        return via(layer_norm_op)(s, self.scale, self.shift, self.eps, None, None, self.dtype)[1]
