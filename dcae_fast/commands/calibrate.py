"""dcae-fast calibrate: finds the scales with which an autoencoder computes in 8 bit."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

import dcae_fast

from .common import UsageError, make_parent_folder

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from dcae_fast.fast.calibration import Calibration
    from dcae_fast.models.autoencoder import DCAE

ENLARGED = 16  # times, the difference in the picture


def calibrate(
    model: tyro.conf.Positional[str],
    photos: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    out: Path = Path("outputs/scales.safetensors"),
    decoding: float = 45.0,
    encoding: float = 45.0,
    loss: float = 0.05,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
    """Calibrate an autoencoder for 8 bit on a few photographs like those that it will see. Needs a Hopper GPU.

    Writes the scales, for the option --int8 of other commands, and beside them a PNG picture: a photograph as the exact
    and as the 8-bit model reconstruct it, and the difference. Prints for each layer the error if only this layer
    computes in 8 bit, its share of the multiplications, and the time that 8 bit saves on the pictures of one size.

    Args:
        model: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
        photos: picture files or folders, of which eight pictures are taken; without any, the bundled photograph
        out: .safetensors file for the scales
        decoding: least PSNR in dB of decoded exact latents against their exact decoding; layers that would lower it
            stay exact
        encoding: the same, of the exact decoding of 8-bit latents
        loss: most PSNR in dB that either may lose against the photographs
        device: PyTorch device, such as cuda:1; None means CUDA if available, else the CPU
        dtype: dtype of the exact computation; None means bfloat16 on CUDA, else float32
    """
    import torch

    from dcae_fast.fast import pictures, timings
    from dcae_fast.images import save_png
    from dcae_fast.reconstruction import load_model

    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: expected a file name that ends in .safetensors")
    picture = out.with_name(f"{out.stem}-compared.png")
    make_parent_folder(out, "--out")
    network = load_model(model, device, dtype)
    weight = next(network.parameters())
    try:
        found = pictures.load(list(photos) or None, network.spatial_compression_ratio)
        budget = dcae_fast.ErrorBudget(decoding, encoding, loss)
        report = dcae_fast.patch(network, precision="int8", calibration=found, error_budget=budget)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if report.calibration is None:
        raise UsageError(f"calibrate: {report.precision}")
    report.save_scales(out)
    x = found[0].to(weight.device, weight.dtype, memory_format=torch.channels_last)
    save_png(_compared(network, x[:1], model), picture)
    times = timings.saved(network, report.calibration, x) if x.is_cuda else None
    print(_table(report.calibration, times), _about_time(x), report.precision, sep="\n\n")
    print(f"The scales are in {out.resolve()}, the picture is in {picture.resolve()}")
    return 0


def _table(calibration: "Calibration", times: dict[str, float] | None) -> str:
    """A row for each layer. times: saved in 8 bit, in ms; None without a GPU."""
    from dcae_fast.describe import table

    rows = [("layer", "dB from exact", "% of multiplications", "ms saved", "computes")]
    for name, layer in sorted(calibration.layers.items(), key=lambda item: item[1].psnr):
        time = "needs a GPU" if times is None else f"{times[name]:.3f}" if name in times else "-"
        figures = f"{layer.psnr:.1f}", f"{100 * layer.share:.2f}", time
        rows.append((name, *figures, "in 8 bit" if layer.in_int8 else "exactly"))
    return table(rows)


def _about_time(x: "torch.Tensor") -> str:
    """What the times in the table mean. x: the pictures."""
    batch, _, height, width = x.shape
    return (
        f"ms saved: GPU time of the layer's block with this layer exact, less the time with it in 8 bit, for {batch} "
        f"picture{'s' * (batch != 1)} of {width}x{height} pixels."
    )


def _compared(network: "DCAE", x: "torch.Tensor", model: str) -> "Image.Image":
    """A reconstruction by the exact and by the 8-bit model, and their difference, enlarged."""
    import torch

    from dcae_fast import images

    with torch.inference_mode():
        y = network(x).float().clamp(-1, 1)
        with dcae_fast.patched(network):
            exact = network(x).float().clamp(-1, 1)
    psnr = images.psnr(images.to_uint8(y), images.to_uint8(exact)).item()
    difference = (y - exact) * ENLARGED
    captions = "exact", f"8 bit, {psnr:.1f} dB from exact", f"difference, {ENLARGED} times enlarged"
    pictures = [(images.to_image(each), text) for each, text in zip((exact, y, difference), captions, strict=True)]
    return images.side_by_side(pictures, f"{model} in 8 bit, {x.shape[3]}x{x.shape[2]}")
