"""Layers on parts of a batch: on a few images at a time, or on bands of rows of one image.

A band is computed from its rows and from a halo of rows above and below. Band and halo are cut out of the whole image,
so that zero padding happens only at the borders of the image. Rows that lack neighbours because of a cut lie within the
halo and are discarded. The result equals that of the whole image, up to the rounding of other convolution algorithms.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .layers import Layer
from .layout import layout_of


@dataclass(frozen=True)
class Bands:
    """Runs a sequence of local layers on one image in bands of rows.

    Rows are counted at the lowest resolution among the layers. size: rows of a band with its halos. halos[k]: rows on
    each side that layer k and the layers after it need.
    """

    layers: Sequence[Layer]
    size: int
    halos: Sequence[int]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The result of the layers for x: [1, C, H, W], in new memory."""
        rows, out = x.shape[2] // coarsest(self.layers), None
        for top, bottom in bands(rows, self.size, self.halos[0]):
            y = self._band(x, top, bottom, rows)
            scale = y.shape[2] // (bottom - top)
            if out is None:
                out = empty_like(y, 2, rows * scale)
            out[:, :, top * scale : bottom * scale] = y
            del y
        return out

    def _band(self, x: torch.Tensor, top: int, bottom: int, rows: int) -> torch.Tensor:
        """Rows top ... bottom of the result. Where the resolution changes, unneeded rows are cut off."""
        scale, first = coarsest(self.layers), 0
        for k, (layer, halo) in enumerate(zip(self.layers, self.halos, strict=True)):
            if k == 0 or layer.up != layer.down:
                start, end = max(0, top - halo), min(rows, bottom + halo)
                x, first = layout_of(x[:, :, (start - first) * scale : (end - first) * scale], x), start
            x = layer.run(x)
            scale = scale * layer.up // layer.down
        return x[:, :, (top - first) * scale : (bottom - first) * scale]


@dataclass(frozen=True)
class Plan:
    """How to compute a batch: `images` images at a time, by `steps`."""

    images: int
    steps: Sequence[Callable[[torch.Tensor], torch.Tensor]]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = None
        for first in range(0, x.shape[0], self.images):
            y = x[first : first + self.images]
            for step in self.steps:
                y = step(y)
            if len(y) == x.shape[0]:
                return y
            if out is None:
                out = empty_like(y, 0, x.shape[0])
            out[first : first + self.images] = y
            del y
        return out


def bands(rows: int, size: int, halo: int) -> Iterator[tuple[int, int]]:
    """First row and end of each band, without halos. With the halos inside the image, each band has `size` rows.

    The last two bands may overlap. Therefore the convolutions see few different shapes for any number of bands.
    """
    edge, inner = size - halo, size - 2 * halo
    yield 0, edge
    for top in range(edge, rows - edge, inner):
        yield top, top + inner
    yield rows - edge, rows


def coarsest(layers: Sequence[Layer]) -> int:
    """Rows of the first layer's input for one row at the lowest resolution."""
    return math.prod(layer.down for layer in layers)


def halos(layers: Sequence[Layer]) -> tuple[int, ...]:
    """For each layer: the rows above and below a row of the result that this layer and the layers after it need.

    Rows are counted at the lowest resolution, since cuts are aligned to it.
    """
    scale, needed = math.prod(layer.up for layer in layers), []
    for k in range(len(layers)):
        rows = 0
        for layer in layers[k:]:
            rows = layer.spoilt(rows)
        needed.append(math.ceil(rows / scale))
    return tuple(needed)


def empty_like(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """An uninitialised tensor with x's dtype and memory format, and with x's shape except for one dimension."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    shape = [size if d == dim else n for d, n in enumerate(x.shape)]
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
