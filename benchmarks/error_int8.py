"""TRITON_INTERPRET=1 python -m benchmarks.error_int8 PHOTOS: how much 8 bit changes an autoencoder, in fp32 on a CPU.

Prints the calibration and, for each photograph, how far the reconstruction is from exact with encoder and decoder in
8 bit. The operators run their references, which sum in fp32 here instead of in exact integers: a tenth of the time.
On a Hopper GPU, without TRITON_INTERPRET, the kernels compute, and the exact model computes in bf16.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import dcae_fast
from dcae_fast.fast import int8, pictures
from dcae_fast.fast.calibration import psnrs
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.ops import _library
from dcae_fast.ops.conv2d_int8 import conv2d_int8_op, epilogue, upsample_conv2d_int8_op
from dcae_fast.ops.upsample_conv2d import upsample_conv2d_reference


def conv2d_in_fp32(x, weight, scale, *rest):
    return epilogue(F.conv2d(x.float(), weight.float(), padding=weight.shape[2] // 2), scale.view(-1, 1, 1), *rest)


def upsample_conv2d_in_fp32(x, weight, scale, *rest):
    total = upsample_conv2d_reference(x.float(), weight.float())
    scales = scale.view(4, 1, -1).expand(-1, x.shape[0], -1).reshape(*total.shape[:2], 1, 1)
    return epilogue(total, scales, *rest)


def use_references() -> None:
    """Lets all operators compute by their references, instead of Triton's interpreter."""
    conv2d_int8_op.reference, upsample_conv2d_int8_op.reference = conv2d_in_fp32, upsample_conv2d_in_fp32
    _library.Operator.__call__ = lambda self, *args: _library.as_channels_last(self.reference(*args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="+", type=Path, help="picture files; at most 512 x 512 pixels of each")
    parser.add_argument("--model", default="dc-ae-tiny")
    parser.add_argument("--calibrate", nargs="*", help="picture files; by default the bundled photograph")
    parser.add_argument("--budget", type=float, default=45.0, help="dB, of decoding and of encoding")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not int8.runs_on(device):
        sys.exit("8 bit needs a Hopper GPU, or TRITON_INTERPRET=1 in the environment")
    if device.type == "cpu":
        use_references()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = DCAE.from_pretrained(options.model).eval().to(device, dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        report(model, options.photos, options.calibrate, dcae_fast.ErrorBudget(options.budget, options.budget))


def report(model: DCAE, photos: list[Path], source: list[str] | None, budget: dcae_fast.ErrorBudget) -> None:
    weight = next(model.parameters())
    xs = [pictures.load(photo, model.spatial_compression_ratio)[0] for photo in photos]
    xs = [x.to(weight.device, weight.dtype, memory_format=torch.channels_last) for x in xs]
    with dcae_fast.patched(model, cuda_graphs=False):
        exact = [model(x) for x in xs]
    print(dcae_fast.patch(model, precision="int8", calibration=source, error_budget=budget).calibration)
    found = psnrs([model(x) for x in xs], exact), psnrs(exact, xs), psnrs([model(x) for x in xs], xs)
    for photo, from_exact, before, after in zip(photos, *found, strict=True):
        print(f"{photo.stem}: {from_exact:.1f} dB from exact, {before - after:.3f} dB of PSNR lost of {before:.1f} dB")


if __name__ == "__main__":
    main()
