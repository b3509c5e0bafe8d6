"""PatchGAN discriminator (pix2pix, arXiv 1611.07004; as in taming-transformers, arXiv 2012.09841)."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

NORMS = ("batch", "spectral")
SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of pictures: x [B, in_channels, H, W] → logits [B, 1, H', W'], large for real.

    Convolutions with kernel 4 and padding 1:

        stride 2: in_channels → width
        stride 2: layers - 1 times, to min(2^n, 8) * width channels, n = 1 .. layers - 1
        stride 1: to min(2^layers, 8) * width channels
        stride 1: to 1 channel

    H' = floor(H / 2^layers) - 2. A logit sees 70 pixels with 3 layers, 142 with 4, and 286 with 5. LeakyReLU with slope
    0.2 follows each convolution but the last.

    layers: 3 to 5. norm: "batch" puts a batch norm after each convolution but the first and the last; the convolution
    before a batch norm has no bias. "spectral" divides the weight of each convolution by its largest singular value
    (arXiv 1802.05957), and all convolutions have a bias. Initial weights are N(0, 0.02²), those of norms N(1, 0.02²).

    With norm="batch", parameters and buffers have the names of NLayerDiscriminator in taming-transformers, so its
    checkpoints load. Each rank computes the statistics of its own part of the batch.
    """

    def __init__(self, layers: int = 3, width: int = 64, norm: str = "batch", in_channels: int = 3):
        super().__init__()
        for name, value, low, high in (("layers", layers, 3, 5), ("width", width, 1, None),
                                       ("in_channels", in_channels, 1, None)):  # fmt: skip
            if type(value) is not int:
                raise TypeError(f"{name}={value!r}; expected an integer")
            if value < low or (high and value > high):
                raise ValueError(f"{name}={value}; expected {f'{low} to {high}' if high else f'at least {low}'}")
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}; expected one of {', '.join(NORMS)}")
        self.smallest = 3 * 2**layers
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        main = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE, inplace=True)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            main.append(nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=norm != "batch"))
            if norm == "batch":
                main.append(nn.BatchNorm2d(widths[n]))
            main.append(nn.LeakyReLU(SLOPE, inplace=True))
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self._initialize()
        if norm == "spectral":
            for module in self.main:
                if isinstance(module, nn.Conv2d):
                    spectral_norm(module)

    def _initialize(self) -> None:
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raises ValueError if the pictures are smaller than `smallest` pixels, which gives no logit."""
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(f"pictures of {x.shape[-2]} x {x.shape[-1]} pixels; expected at least {self.smallest}")
        return self.main(x)
