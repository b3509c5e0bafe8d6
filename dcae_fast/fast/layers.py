"""The layers of an encoder or decoder: how many rows of the image each one reads, and how much memory it takes.

Each family describes its modules with the functions here (`describe` of a mixin, or a function that is registered).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from dcae_fast import ops

from .fusion import activation_name, autocasts, can_fuse_conv, can_fuse_norm, is_batch_norm
from .module import is_fast, kind
from .registry import describe_of


class UnknownModule(Exception):
    """A module that no family describes."""


@dataclass(frozen=True)
class Layer:
    """One step of an encoder or decoder, `run`.

    channels: of the output. up, down: rows of the output for one row of the input, and the reverse.
    before, after: rows that the layer reads above and below a row, at the resolution of the input and of the output.
    before is None if every row depends on the whole image.
    widest, peak: channels of the largest tensor, and of all tensors that are alive at the same time, input and output
    included. They are counted at the input's resolution: peak * rows * columns * bytes per element is memory.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    channels: int
    widest: float
    peak: float
    up: int = 1
    down: int = 1
    before: int | None = 0
    after: int = 0

    def spoilt(self, rows: int) -> int:
        """The number of wrong rows at an edge of the output if that many rows at the edge of the input are wrong."""
        return -(-(rows + self.before) * self.up // self.down) + self.after


class Survey:
    """Describes the modules of the registered families; raises UnknownModule for any other module.

    The peaks are those of the fast forwards if the operators have kernels for tensors like x, else those of the
    modules' own forwards. There a norm needs `wide` times the memory of its input: three copies in at least fp32.
    """

    def __init__(self, x: torch.Tensor):
        self.x, self.kernels = x, ops.has_kernels(x)
        self.itemsize = max(4, x.element_size()) if autocasts(x) else x.element_size()
        self.wide = 3 * max(4, self.itemsize) / self.itemsize

    def blocks(self, modules: Iterable[nn.Module]) -> list[Layer]:
        """The layers of modules that run one after the other."""
        return [layer for module in modules for layer in self._block(module)]

    def _block(self, module: nn.Module) -> list[Layer]:
        if kind(module) == "Sequential":
            return self.blocks(module)
        describe = describe_of(module)
        if describe is None:
            raise UnknownModule(type(module).__name__)
        return describe(module, self)

    def is_lean(self, *modules: nn.Module) -> bool:
        """Whether all of these take their fast forwards."""
        return self.kernels and all(map(is_fast, modules))

    def res_block(self, block, first, second, act, norm, *inner) -> Layer:
        """Alive at the end: input, activation, convolution, and the result or the norm's copies."""
        known(act, norm)
        width = first.in_channels
        peak = (4 if self.is_lean(block, *inner) else 3 + self.wide) * width
        return Layer(block, second.out_channels, width, peak, before=reach(first) + reach(second))

    def gated(self, block, inverted, depth, point, act, norm, *inner) -> Layer:
        """Alive at the peak: the input, and the hidden channels before and after the gate."""
        known(act, norm)
        width, hidden = inverted.in_channels, inverted.out_channels
        end = hidden / 2 + (2 if self.is_lean(block, *inner) else 1 + self.wide) * width
        peak = width + max(2 * hidden, end)
        return Layer(block, point.out_channels, hidden, peak, before=sum(map(reach, (inverted, depth, point))))

    def attention(self, block, channels: int, width: int, scales: int, lean: bool) -> Layer:
        """Alive: the input, qkv of each scale, and the next scale or the result; in plain PyTorch also fp32 copies."""
        qkv = 3 * width * (1 + scales)
        rest = max(3 * width if scales else 0, qkv / 3) if lean else qkv * (1 + self.wide)
        return Layer(block, channels, qkv, channels + qkv + rest, before=None)

    def sampler(self, resampling: "Resampling", block: nn.Module, run: Callable | None = None) -> Layer:
        """A convolution that may change the resolution, with the shortcut that `block` adds.

        run: replaces block as the step. Alive: the input, the enlarged input if there is one, the convolution and the
        result; in plain PyTorch also the shortcut.
        """
        conv, how, factor = resampling
        up, down = (factor, 1) if how in ("shuffle", "nearest") else (1, factor)
        rows = reach(conv, stride=factor if how == "stride" else 1)
        channels = conv.out_channels * down**2 // up**2 if "shuffle" in how else conv.out_channels
        planes = self.is_lean(block) and can_fuse_conv(conv, self.x, any_shape=True)  # instead of an enlarged image
        enlarged = conv.in_channels * up**2 if how == "nearest" and not planes else 0
        out = channels * up**2 / down**2
        peak = conv.in_channels + enlarged + 2 * out
        if not self.is_lean(block):
            peak += conv.in_channels + out
        before, after = (0, rows) if how == "nearest" else (rows, 0)
        return Layer(run or block, channels, max(conv.in_channels, enlarged, out), peak, up, down, before, after)

    def head(
        self, run: Callable, block: nn.Module, norm: nn.Module, act: nn.Module, last: "Resampling", sampler: nn.Module
    ) -> Layer:
        """Norm, activation and last convolution, in the forward of `block`; sampler: the module of the convolution."""
        known(act, norm)
        layer = self.sampler(last, sampler, run)
        width = norm.weight.shape[0]
        if self.is_lean(block):
            peak = width + layer.peak
        else:
            peak = width + max((1 + self.wide) * width, width + layer.peak)
        return replace(layer, widest=max(width, layer.widest), peak=peak)


Resampling = tuple[nn.Conv2d, str, int]
"""A convolution, how it changes the resolution ("stride", "unshuffle", "shuffle" or "nearest"), and by what factor."""


def known(act: nn.Module | None, norm: nn.Module | None) -> None:
    """Raises UnknownModule unless activation and norm work on each position separately."""
    if activation_name(act) is None or not can_fuse_norm(norm) or (is_batch_norm(norm) and norm.training):
        raise UnknownModule(f"{type(act).__name__} or {type(norm).__name__}")


def reach(conv: nn.Module, stride: int = 1) -> int:
    """Rows above and below a row that a convolution reads, which must keep the size or divide it by the stride."""
    if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.stride == (stride, stride):
        same = tuple(dilation * (size - 1) / 2 for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True))
        if conv.padding == same:
            return conv.padding[0]
    raise UnknownModule(str(conv))
