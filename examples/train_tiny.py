"""Trains dc-ae-tiny, the bundled demonstration model, from scratch: about seven minutes on one H100.

    python examples/train_tiny.py --out dc-ae-tiny

Needs the photographs in scikit-image and scikit-learn. Writes model.safetensors (float16), config.json and a model
card.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from tiny_photographs import PHOTOGRAPHS, Crops
from tiny_training import device_name, parse_options, train, whole_folder
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from dcae_fast.images import fit, psnr, to_tensor, to_uint8
from dcae_fast.models import checkpoint
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig

BLOCKS = ("ResBlock",) * 3 + ("EViTGLU",) * 3
WIDTHS = (16, 32, 64, 64, 128, 128)
CONFIG = DCAEConfig(
    latent_channels=64,
    encoder=CoderConfig(WIDTHS, (0, 1, 1, 1, 1, 1), BLOCKS, norm=("rms",) * 6, act=("silu",) * 6),
    decoder=CoderConfig(
        WIDTHS,
        (0, 3, 2, 1, 1, 1),
        BLOCKS,
        norm=("batch",) * 3 + ("rms",) * 3,
        act=("relu",) * 3 + ("silu",) * 3,
    ),
)


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean |y - x|, plus the mean absolute difference of four levels of the Laplacian pyramids of y and x."""
    rest = y.float() - x
    total = rest.abs().mean()
    for _ in range(4):
        coarse = F.avg_pool2d(rest, 2)
        total = total + (rest - F.interpolate(coarse, scale_factor=2, mode="bilinear")).abs().mean()
        rest = coarse
    return total


def train_autoencoder(model: DCAE, crops: Crops, batch: int, minutes: float) -> tuple[DCAE, int]:
    """Trains `model` in place for `minutes`; returns the moving average of its weights and the number of steps."""

    def draw_loss() -> torch.Tensor:
        x = crops.draw(batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=crops.device.type == "cuda"):
            y = model(x)
        return reconstruction_loss(y, x)

    return train(model, draw_loss, minutes)


def round_to_float16(model: DCAE) -> None:
    """Rounds weights and running statistics to float16, and stores them as float32."""
    model.half().float()


@torch.no_grad()
def evaluate(model: DCAE) -> tuple[dict[str, tuple[str, float]], float]:
    """Evaluates all photographs, cropped to multiples of 32: name → (size, PSNR in dB), and the rms of seen latents."""
    results, squares, values = {}, 0.0, 0
    for photograph in tqdm(PHOTOGRAPHS, desc="evaluating"):
        x = fit(to_tensor(photograph.open()), model.spatial_compression_ratio, "crop")
        z = model.encode(x)
        quality = psnr(to_uint8(model.decode(z)), to_uint8(x)).item()
        results[photograph.name] = (f"{x.shape[3]}x{x.shape[2]}", quality)
        if photograph.weight:
            squares, values = squares + z.double().square().sum().item(), values + z.numel()
    return results, math.sqrt(squares / values)


CARD = """# dc-ae-tiny

For demonstration only: a DC-AE (arXiv 2410.10733) with {parameters:.2f} M parameters, 32x32 pixels per latent position
with {channels} channels, to try the library without a download. It was trained from scratch by
`examples/train_tiny.py` on {seen} photographs for {minutes:g} minutes ({steps} steps of {batch} crops of {size} px)
on {device}. The released models, with 300 M parameters and more, reconstruct far better.

Weights are stored as float16. PSNR is computed on the whole uint8 photograph, cropped to multiples of 32; the model
runs in float32 on a CPU with the weights as stored. Held-out photographs were not used in training.

| photograph | used | size | PSNR (dB) | by, licence |
|---|---|---|---|---|
{rows}

The photographs come with scikit-image and scikit-learn. Those under CC BY 2.0
(https://creativecommons.org/licenses/by/2.0/) were cropped, resized and recoloured for training.
"""


def card(model: DCAE, results: dict[str, tuple[str, float]], **facts: object) -> str:
    rows = []
    for photograph in PHOTOGRAPHS:
        size, quality = results[photograph.name]
        used = "seen" if photograph.weight else "held out"
        rows.append(f"| {photograph.name} | {used} | {size} | {quality:.2f} | {photograph.credit} |")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    seen = sum(photograph.weight > 0 for photograph in PHOTOGRAPHS)
    channels = model.config.latent_channels
    return CARD.format(parameters=parameters, channels=channels, seen=seen, rows="\n".join(rows), **facts)


def main() -> None:
    options = parse_options(__doc__, minutes=6.5)
    on_cuda = options.device.type == "cuda"
    batch, size = (64, 256) if on_cuda else (4, 128)  # on a CPU, a rehearsal

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    crops = Crops([photograph for photograph in PHOTOGRAPHS if photograph.weight], size, options.device)
    model = DCAE(CONFIG).to(options.device, memory_format=torch.channels_last)
    model, steps = train_autoencoder(model, crops, batch, options.minutes)
    round_to_float16(model)
    update_bn((crops.draw(batch) for _ in tqdm(range(50), desc="batch norm statistics")), model)
    round_to_float16(model)

    model = model.eval().cpu().to(memory_format=torch.contiguous_format)
    results, rms = evaluate(model)
    model.config = replace(model.config, scaling_factor=round(1 / rms, 4))
    facts = {"minutes": options.minutes, "steps": steps, "batch": batch, "size": size}
    text = card(model, results, **facts, device=device_name(options.device))
    with whole_folder(options.out, text) as folder:
        checkpoint.save(model.half(), folder, "original")
    print(text)


if __name__ == "__main__":
    main()
