"""What a coder is made of as far as rows of the image go: how far each layer reaches, and the memory it takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from dcae_fast import ops

from .fusion import activation_name, autocasts, can_fuse_conv_of, can_fuse_norm
from .module import is_fast, kind


class UnknownModule(Exception):
    """A module of which nothing is known here."""


@dataclass(frozen=True)
class Layer:
    """One step of a coder, `run`.

    channels: of its output. up, down: rows of its output for one of its input, and the reverse.
    before, after: rows that it reads above and below, at its input's and at its output's resolution; before is None
    where every row depends on the whole image.
    widest, peak: of its largest tensor, and of all that it holds at its worst moment, its input and output included;
    in channels at its input's resolution, so that peak * rows * columns * bytes of an element is memory.
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
        """How many rows of the output are wrong at an edge where that many of the input are."""
        return -(-(rows + self.before) * self.up // self.down) + self.after


class Survey:
    """Describes the modules of this project, diffusers and the original; raises UnknownModule for any other.

    The peaks are those of the fast forwards where the operators have kernels for tensors like x, else of the modules'
    own forwards. There a norm works on `wide` times its input: three copies, of fp32 at least.
    """

    def __init__(self, x: torch.Tensor):
        self.x, self.kernels = x, ops.has_kernels(x)
        self.itemsize = max(4, x.element_size()) if autocasts(x) else x.element_size()
        self.wide = 3 * max(4, self.itemsize) / self.itemsize

    def blocks(self, modules: Iterable[nn.Module]) -> list[Layer]:
        """The layers of modules that run one after the other."""
        return [layer for module in modules for layer in self._block(module)]

    def _block(self, module: nn.Module) -> list[Layer]:
        match kind(module):
            case "OpSequential":
                return self.blocks(module.op_list)
            case "Sequential":
                return self.blocks(module)
            case "EfficientViTBlock" if hasattr(module, "attn"):
                return self.blocks([module.attn, module.conv_out])
            case "EfficientViTBlock":
                return self.blocks([module.context_module, module.local_module])
            case "ResidualBlock":
                return [self._residual(module)]
            case "ResBlock" if hasattr(module, "nonlinearity"):
                return [self._res_block(module, module.conv1, module.conv2, module.nonlinearity, module.norm)]
            case "GLUMBConv" if hasattr(module, "nonlinearity"):
                convs = module.conv_inverted, module.conv_depth, module.conv_point
                return [self._gated(module, *convs, module.nonlinearity, module.norm)]
            case "SanaMultiscaleLinearAttention":
                width, scales = module.to_q.out_features, len(module.to_qkv_multiscale)
                return [self._attention(module, module.to_out.out_features, width, scales, self._lean(module))]
            case "DCDownBlock2d" | "DCUpBlock2d":
                return [self.sampler(module, module)]
        raise UnknownModule(type(module).__name__)

    def _lean(self, *modules: nn.Module) -> bool:
        return self.kernels and all(map(is_fast, modules))

    def _residual(self, block: nn.Module) -> Layer:
        """main(x) + shortcut(x) of this project and the original."""
        main, shortcut = block.main, block.shortcut
        if getattr(block, "pre_norm", None) is not None or getattr(block, "post_act", None) is not None:
            raise UnknownModule("pre_norm or post_act")
        match kind(main), kind(shortcut):
            case "ResBlock", "Identity" | "IdentityLayer":
                (first, act, _), (second, _, norm) = map(_parts, (main.conv1, main.conv2))
                return self._res_block(block, first, second, act, norm, main)
            case "GLUMBConv", "Identity" | "IdentityLayer":
                convs = [_parts(conv)[0] for conv in (main.inverted_conv, main.depth_conv, main.point_conv)]
                return self._gated(block, *convs, main.glu_act, main.point_conv.norm, main)
            case "LiteMLA", "Identity" | "IdentityLayer":
                width, scales = _parts(main.qkv)[0].out_channels // 3, len(main.aggreg)
                lean = self._lean(block, main) and not getattr(main, "norm_qk", False)
                return self._attention(block, _parts(main.proj)[0].out_channels, width, scales, lean)
            case _, name if "Averaging" in name or "Duplicating" in name:
                layer = self.sampler(main, block)
                if shortcut.factor == (layer.down if "Averaging" in name else layer.up):
                    return layer
        raise UnknownModule(f"{kind(main)} and {kind(shortcut)}")

    def _res_block(self, block, first, second, act, norm, *inner) -> Layer:
        """Alive at its end: input, activation, convolution, result; or the norm's copies instead of the result."""
        _known(act, norm)
        width = first.in_channels
        peak = (4 if self._lean(block, *inner) else 3 + self.wide) * width
        return Layer(block, second.out_channels, width, peak, before=_reach(first) + _reach(second))

    def _gated(self, block, inverted, depth, point, act, norm, *inner) -> Layer:
        """Alive at the worst moment: the input, the hidden channels and what becomes of them, before or after it."""
        _known(act, norm)
        width, hidden = inverted.in_channels, inverted.out_channels
        end = hidden / 2 + (2 if self._lean(block, *inner) else 1 + self.wide) * width
        peak = width + max(2 * hidden, end)
        return Layer(block, point.out_channels, hidden, peak, before=sum(map(_reach, (inverted, depth, point))))

    def _attention(self, block, channels: int, width: int, scales: int, lean: bool) -> Layer:
        """Alive: the input, qkv of each scale, and what makes one more or the result; else all of it again, widened."""
        qkv = 3 * width * (1 + scales)
        rest = max(3 * width if scales else 0, qkv / 3) if lean else qkv * (1 + self.wide)
        return Layer(block, channels, qkv, channels + qkv + rest, before=None)

    def sampler(self, module: nn.Module, block: nn.Module, run: Callable | None = None) -> Layer:
        """A convolution that may change the resolution, with the shortcut that `block` adds; run: instead of block.

        Alive: the input, enlarged too where that is done before the convolution, the convolution and the result; in
        plain PyTorch the shortcut as well.
        """
        conv, how, factor = _resampling(module)
        up, down = (factor, 1) if how in ("shuffle", "nearest") else (1, factor)
        reach = _reach(conv, stride=factor if how == "stride" else 1)
        channels = conv.out_channels * down**2 // up**2 if "shuffle" in how else conv.out_channels
        planes = self._lean(block) and can_fuse_conv_of(conv, self.x)  # instead of an enlarged image
        enlarged = conv.in_channels * up**2 if how == "nearest" and not planes else 0
        out = channels * up**2 / down**2
        peak = conv.in_channels + enlarged + 2 * out
        if not self._lean(block):
            peak += conv.in_channels + out
        before, after = (0, reach) if how == "nearest" else (reach, 0)
        return Layer(run or block, channels, max(conv.in_channels, enlarged, out), peak, up, down, before, after)

    def head(self, run: Callable, block: nn.Module, norm: nn.Module, act: nn.Module, last: nn.Module) -> Layer:
        """Norm, activation and the last convolution, by a forward of `block`."""
        _known(act, norm)
        layer = self.sampler(last, last, run)
        width = norm.weight.shape[0]
        if self._lean(block):
            peak = width + layer.peak
        else:
            peak = width + max((1 + self.wide) * width, width + layer.peak)
        return replace(layer, widest=max(width, layer.widest), peak=peak)


def _known(act: nn.Module | None, norm: nn.Module | None) -> None:
    """Both work on each position by itself."""
    if activation_name(act) is None or not can_fuse_norm(norm):
        raise UnknownModule(f"{type(act).__name__} or {type(norm).__name__}")


def _parts(layer: nn.Module) -> tuple[nn.Conv2d, nn.Module | None, nn.Module | None]:
    """Convolution, activation and norm of a ConvLayer."""
    if kind(layer) != "ConvLayer" or getattr(layer, "dropout", None) is not None:
        raise UnknownModule(type(layer).__name__)
    _known(layer.act, layer.norm)
    return layer.conv, layer.act, layer.norm


def _reach(conv: nn.Module, stride: int = 1) -> int:
    """Rows above and below its own that a convolution reads, which keeps the size or divides it by the stride."""
    if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.stride == (stride, stride):
        same = tuple(dilation * (size - 1) / 2 for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True))
        if conv.padding == same:
            return conv.padding[0]
    raise UnknownModule(str(conv))


def _resampling(module: nn.Module) -> tuple[nn.Conv2d, str, int]:
    """The convolution of a down- or up-sampling layer or of none, how it changes the resolution, and by what factor."""
    match kind(module):
        case "Conv2d":
            return module, "stride", module.stride[0]
        case "ConvLayer":
            conv = _parts(module)[0]
            return conv, "stride", conv.stride[0]
        case "ConvPixelUnshuffleDownSampleLayer":
            return _parts(module.conv)[0], "unshuffle", module.factor
        case "ConvPixelShuffleUpSampleLayer":
            return _parts(module.conv)[0], "shuffle", module.factor
        case "InterpolateConvUpSampleLayer" if getattr(module, "mode", "nearest") == "nearest":
            return _parts(module.conv)[0], "nearest", module.factor
        case "DCDownBlock2d":
            return module.conv, "unshuffle" if module.downsample else "stride", module.factor
        case "DCUpBlock2d" if not module.interpolate:
            return module.conv, "shuffle", module.factor
        case "DCUpBlock2d" if module.interpolation_mode == "nearest":
            return module.conv, "nearest", module.factor
    raise UnknownModule(type(module).__name__)
