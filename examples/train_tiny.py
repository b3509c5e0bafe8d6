"""Trains dc-ae-tiny, the bundled demonstration model, from nothing: about seven minutes on one H100.

    python examples/train_tiny.py --out dc-ae-tiny

Needs scikit-image and scikit-learn for their photographs. Writes model.safetensors (float16), config.json and a card.
"""

import argparse
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_photographs import PHOTOGRAPHS, Crops
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
LEARNING_RATE = 1e-3
WARM_UP = 0.05  # of the time
EMA_DECAY = 0.999


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean |y - x| plus the mean absolute difference of each of four octaves (Laplacian pyramid) of y and x."""
    rest = y.float() - x
    total = rest.abs().mean()
    for _ in range(4):
        coarse = F.avg_pool2d(rest, 2)
        total = total + (rest - F.interpolate(coarse, scale_factor=2, mode="bilinear")).abs().mean()
        rest = coarse
    return total


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; progress from 0 to 1."""
    return LEARNING_RATE * min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))


def clock(seconds: float) -> Iterator[float]:
    """Fractions of `seconds` that have passed, until it is over, with a progress bar."""
    start = time.perf_counter()
    with tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} s{postfix}") as bar:
        while (passed := time.perf_counter() - start) < seconds:
            if int(passed) > bar.n:
                bar.update(int(passed) - bar.n)
            yield passed / seconds


def train(model: DCAE, crops: Crops, batch: int, minutes: float) -> tuple[DCAE, int]:
    """Trains `model` in place for that long; returns the moving average of its weights and the number of steps."""
    average = copy.deepcopy(model)
    weights, average_weights = list(model.parameters()), list(average.parameters())
    on_cuda = crops.device.type == "cuda"
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.9, 0.99), fused=on_cuda)
    step = 0
    for progress in clock(60 * minutes):
        optimizer.param_groups[0]["lr"] = learning_rate(progress)
        x = crops.draw(batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=on_cuda):
            y = model(x)
        loss = reconstruction_loss(y, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            torch._foreach_lerp_(average_weights, weights, 1 - decay)
        if step % 100 == 1 and not math.isfinite(value := loss.item()):
            raise RuntimeError(f"training diverged: the loss is {value} at step {step}")
        elif step % 100 == 1:
            tqdm.write(f"step {step}: loss {value:.4f}")
    return average, step


def round_to_float16(model: DCAE) -> None:
    """Weights and running statistics to the nearest float16, kept as float32."""
    model.half().float()


@torch.no_grad()
def evaluate(model: DCAE) -> tuple[dict[str, tuple[str, float]], float]:
    """Every photograph, cropped to multiples of 32: name → (size, PSNR in dB); and the rms of seen latents."""
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

A demonstration, not for use: a DC-AE (arXiv 2410.10733) of {parameters:.2f} M parameters, 32x32 pixels to one position
of {channels} channels, so that the library can be tried without a download. It was trained from nothing by
`examples/train_tiny.py` on {seen} photographs for {minutes:g} minutes ({steps} steps of {batch} crops of {size} px)
on {device}. The released models, of 300 M parameters and more, reconstruct far better.

Weights are stored as float16. PSNR is of the whole photograph at its own size, cropped to multiples of 32, on uint8,
computed in float32 on a CPU with the weights as stored. Training never saw the held-out photographs.

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


def save(model: DCAE, text: str, out: Path) -> None:
    """The folder appears whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    checkpoint.save(model.half(), part, "original")
    (part / "README.md").write_text(text, encoding="utf-8")
    part.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--minutes", type=float, default=6.5, help="time to train")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists already")
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    on_cuda = options.device.type == "cuda"
    batch, size = (64, 256) if on_cuda else (4, 128)  # on a CPU it is a rehearsal
    device_name = torch.cuda.get_device_name(options.device) if on_cuda else "a CPU"

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    crops = Crops([photograph for photograph in PHOTOGRAPHS if photograph.weight], size, options.device)
    model = DCAE(CONFIG).to(options.device, memory_format=torch.channels_last)
    model, steps = train(model, crops, batch, options.minutes)
    round_to_float16(model)
    update_bn((crops.draw(batch) for _ in tqdm(range(50), desc="batch norm statistics")), model)
    round_to_float16(model)

    model = model.eval().cpu().to(memory_format=torch.contiguous_format)
    results, rms = evaluate(model)
    model.config = replace(model.config, scaling_factor=round(1 / rms, 4))
    text = card(model, results, minutes=options.minutes, steps=steps, batch=batch, size=size, device=device_name)
    save(model, text, options.out)
    print(text)


if __name__ == "__main__":
    main()
