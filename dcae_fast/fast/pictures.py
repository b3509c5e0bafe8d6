"""The pictures of a calibration."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dcae_fast.images import demo_photograph, fit, picture_suffixes, read_photograph

MOST_PICTURES = 8  # of a folder, and in a batch
MOST_PIXELS = 512  # along a side
LARGEST = 2.0  # |value|; interpolation may leave [-1, 1] a little


def load(source: "torch.Tensor | str | Path | Sequence | None", ratio: int) -> list[torch.Tensor]:
    """Batches of pictures [B, 3, H, W] in [-1, 1], cropped to multiples of `ratio`. Pictures of one size are together.

    source: a batch of pictures, a picture file, a folder, a list of these, or None for the bundled photograph. Of a
    folder, at most MOST_PICTURES are taken, evenly over the sorted names; of a file, at most MOST_PIXELS a side from
    the centre. Raises ValueError if there is no picture, or one that is too small, not finite, of another shape or far
    outside of [-1, 1].
    """
    sources = source if isinstance(source, (list, tuple)) else [demo_photograph() if source is None else source]
    by_size: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for each in sources:
        for picture in _load(each, ratio):
            by_size.setdefault(tuple(picture.shape), []).append(picture)
    if not by_size:
        raise ValueError(f"calibration={source!r}: holds no picture")
    return [batch for pictures in by_size.values() for batch in torch.cat(pictures).split(MOST_PICTURES)]


def _load(source: torch.Tensor | str | Path, ratio: int) -> list[torch.Tensor]:
    if isinstance(source, torch.Tensor):
        x = (source if source.dim() == 4 else source[None]).cpu()
        if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point() or not (x.abs() <= LARGEST).all():
            raise ValueError(
                f"calibration: {source.dtype} {list(source.shape)}; expected finite pictures [B, 3, H, W] in [-1, 1]"
            )
        return [_cropped(x[index : index + 1], ratio, "calibration") for index in range(len(x))]
    if not isinstance(source, (str, Path)):
        raise TypeError(f"calibration is of type {type(source).__name__}; expected pictures, paths or a file of scales")
    paths = [Path(source)]
    if paths[0].suffix.lower() == ".safetensors":
        raise ValueError(
            f"{source}: a file of scales stands for the whole calibration, not beside pictures or in a list"
        )
    if paths[0].is_dir():
        folder = paths[0]
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in picture_suffixes())
        if not paths:
            raise ValueError(f"{folder}: holds no picture")
        count = min(len(paths), MOST_PICTURES)
        paths = [paths[index * len(paths) // count] for index in range(count)]
    return [_centre(_cropped(read_photograph(path), ratio, str(path)), ratio) for path in paths]


def _cropped(x: torch.Tensor, ratio: int, name: str) -> torch.Tensor:
    """Cropped to multiples of `ratio`. name: of the picture, for the error."""
    height, width = x.shape[2:]
    if min(height, width) < ratio:
        raise ValueError(f"{name}: {width}x{height} pixels; expected at least {ratio}x{ratio}")
    return fit(x, ratio, "crop")


def _centre(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """At most MOST_PIXELS of each side."""
    most = max(MOST_PIXELS // ratio, 1) * ratio
    top, left = (max(0, side - most) // 2 for side in x.shape[2:])
    return x[..., top : top + most, left : left + most]
