"""Photographs: reading, fitting to a model's ratio, quantisation, PSNR, comparison sheets and saving.

Images are float tensors [B, 3, H, W] in [-1, 1] or, once quantised, uint8 tensors of the same shape.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .files import written_atomically

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # per picture; Pillow refuses to open larger pictures
HEADERS_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG"}  # formats whose pixels Pillow cannot decode


class PhotographError(ValueError):
    """A file cannot be read as a photograph. The message gives its path and the reason."""


def demo_photograph() -> Path:
    """The bundled photograph, Chelsea the cat by Stéfan van der Walt (CC0). No bundled model was trained on it."""
    return Path(__file__).parent / "assets" / "photographs" / "chelsea.png"


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of all picture formats that Pillow and its plugins can read."""
    suffixes = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"} - HEADERS_ONLY  # MPO is opened as JPEG
    return frozenset(suffix for suffix, file_format in suffixes.items() if file_format in readable)


@contextmanager
def opened(file: str | Path | IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    """Opens a picture, which must be decoded within the block.

    Raises ValueError if the file is not a picture, or has more than `max_pixels` pixels.
    """
    if isinstance(file, str | Path) and Path(file).exists() and not Path(file).is_file():
        raise ValueError("not a regular file")  # opening a pipe would wait for a writer
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            # Pillow warns above the limit, and raises an error above twice the limit
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a picture that Pillow can read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"has more than {max_pixels} pixels; --max-pixels raises the limit") from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_photograph(path: str | Path, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Reads a photograph of any mode, converted by `as_seen`: [1, 3, H, W] float32 in [-1, 1].

    Raises PhotographError if the file is missing or broken or has more than `max_pixels` pixels, and MemoryError.
    """
    try:
        with opened(path, max_pixels) as image:
            return to_tensor(as_seen(image))
    except MemoryError:
        raise
    except Exception as error:  # for a broken file, Pillow may raise any exception
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise PhotographError(f"{path}: cannot be read as a photograph: {reason}") from error


def as_seen(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode to what a viewer shows: mode RGB, or F with values up to 255 for 16-bit grey.

    Applies the EXIF rotation, composites transparency on white, and takes the first of several frames. Ignores colour
    profiles. Raises ValueError for floating-point pixels, whose range is not defined.
    """
    image = ImageOps.exif_transpose(image)
    grey = grey_of_16_bits(image)
    if grey is not None:
        return Image.fromarray(255 * grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_of_16_bits(image: Image.Image) -> np.ndarray | None:
    """16-bit grey pixels as [H, W] float32 in [0, 1]; None for 8-bit images.

    Raises ValueError for floating point, and for integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("has floating-point pixels, whose range is not defined; expected integer pixels")
    if not image.mode.startswith("I"):  # Pillow opens some 16-bit files in a 32-bit mode
        return None
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 65535:
        raise ValueError(f"has pixels from {low} to {high}; expected 0 to 65535")
    return pixels.astype(np.float32) / 65535


def pixels_of(image: Image.Image) -> np.ndarray:
    """Pixels [H, W, 3]: uint8 from mode RGB; float32 in [0, 255] with three equal channels from mode F."""
    if image.mode != "F":
        return np.array(image.convert("RGB"))
    return np.asarray(image).clip(0, 255)[..., None].repeat(3, axis=-1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image in mode RGB or F as [1, 3, H, W] float32: pixel / 127.5 - 1."""
    pixels = torch.from_numpy(pixels_of(image))
    return pixels.permute(2, 0, 1)[None].float().contiguous() / 255 * 2 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] → 0 … 255: 255 (x / 2 + 1/2) + 1/2 in float32, clamped and truncated. Any shape."""
    return (255 * (x.float() * 0.5 + 0.5) + 0.5).clamp(0, 255).to(torch.uint8)


def to_image(x: torch.Tensor) -> Image.Image:
    """A float [1, 3, H, W] or uint8 tensor of that shape as a Pillow image."""
    pixels = x if x.dtype == torch.uint8 else to_uint8(x)
    return Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy())


def psnr(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each of B uint8 pictures in dB: 10 log10(255² / mean squared error), [B] float64.

    Infinite for equal pictures. Raises ValueError unless both are uint8 of one shape [B, 3, H, W].
    """
    if image.dtype != torch.uint8 or reference.dtype != torch.uint8 or image.shape != reference.shape:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)} and reference {reference.dtype} {list(reference.shape)}; "
            "expected two uint8 tensors of one shape [B, 3, H, W]"
        )
    error = (image.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def fit(x: torch.Tensor, ratio: int, how: str) -> torch.Tensor:
    """Crops or pads x [B, 3, H, W] so that both sides are multiples of `ratio`.

    how: "crop" keeps the centre; "pad" repeats the last column and row on the right and at the bottom, so that
    `[..., :H, :W]` removes the padding. Raises ValueError for another `how`, and if a side is too short to crop.
    """
    height, width = x.shape[-2:]
    if how == "pad":
        return F.pad(x, (0, -width % ratio, 0, -height % ratio), mode="replicate")
    if how != "crop":
        raise ValueError(f'how={how!r}; expected "crop" or "pad"')
    if height < ratio or width < ratio:
        raise ValueError(f"{width}x{height} pixels; cropping needs at least {ratio}x{ratio}; pad instead (--fit pad)")
    top, left = height % ratio // 2, width % ratio // 2
    return x[..., top : top + height // ratio * ratio, left : left + width // ratio * ratio]


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes and crops an image to its centre of exactly height x width, as ADM, DiT and DC-AE prepare their data.

    Halves the image with a box filter while both sides are at least twice the target, resizes it (bicubic, also
    upwards) until one side fits, then crops. Raises ValueError if the resized image would exceed Pillow's pixel limit.
    """
    if image.size == (width, height):
        return image
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and math.prod(size) > Image.MAX_IMAGE_PIXELS:
        resize = "resizing {}x{} pixels to {}x{} before cropping".format(*image.size, *size)
        raise ValueError(f"{resize} gives more than {Image.MAX_IMAGE_PIXELS} pixels; --max-pixels raises the limit")
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def side_by_side(pictures: list[tuple[Image.Image, str]], title: str) -> Image.Image:
    """Pictures of equal size in a row, with a title above and a caption below each picture."""
    font, title_font = ImageFont.load_default(size=16), ImageFont.load_default(size=18)
    gap, band = 12, 32
    width, height = pictures[0][0].size
    widest = max(width, *(int(font.getlength(caption)) + 1 for _, caption in pictures))
    total = max(len(pictures) * (widest + gap) + gap, int(title_font.getlength(title)) + 2 * gap + 1)
    sheet = Image.new("RGB", (total, height + 2 * band), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, band / 2), title, "black", title_font, anchor="lm")
    for index, (picture, caption) in enumerate(pictures):
        left = gap + index * (widest + gap)
        sheet.paste(picture, (left, band))
        draw.text((left, height + 1.5 * band), caption, "black", font, anchor="lm")
    return sheet


def grid(x: torch.Tensor, columns: int) -> Image.Image:
    """Arranges pictures, uint8 [B, 3, H, W], row by row with 2 white pixels between them."""
    gap, (count, _, height, width) = 2, x.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index in range(count):
        row, column = divmod(index, columns)
        sheet.paste(to_image(x[index : index + 1]), (column * (width + gap), row * (height + gap)))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG file atomically. Raises `files.WriteError`."""
    with written_atomically(path) as temporary:
        image.save(temporary, format="PNG")


def is_whole_png(path: Path) -> bool:
    """Whether `path` is a PNG file with correct checksums."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):  # Pillow raises SyntaxError for a broken PNG file
        return False
    return True
