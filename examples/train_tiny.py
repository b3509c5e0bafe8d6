"""Trains dc-ae-tiny, the bundled demonstration model, from scratch: about six minutes on one H200.

    python examples/train_tiny.py --out dc-ae-tiny

Draws pictures from the photographs in scikit-image and scikit-learn, which must be installed, and trains on them with
`dcae-fast train-autoencoder`, one phase after another. The result is the phase that reconstructs the held-out
photographs best: model.safetensors (float16), config.json and a model card. Pictures and runs are in
dc-ae-tiny-training beside the folder; the same command resumes an interrupted training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tiny_photographs import PHOTOGRAPHS, write_held_out, write_pictures
from tiny_training import device_name, parse_options, whole_folder
from tqdm import tqdm

from dcae_fast import cli
from dcae_fast.images import fit, psnr, to_tensor, to_uint8
from dcae_fast.models import DCAE, checkpoint

MODEL = "dc-ae-tiny"  # whose architecture is trained
MARGIN = 1.25  # side of a picture / side of its crops
COMMON = "--perceptual none --clip-grad 1 --lr-decay cosine --log-steps 100 --save-steps 4000"


@dataclass(frozen=True)
class Phase:
    """A recipe of train-autoencoder. The number of its steps is `share` times that of the first phase.

    resolution: of the crops, in pixels. pictures: how many are drawn for them.
    """

    recipe: str
    share: float
    resolution: int
    pictures: int
    batch: int
    options: str

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return round(MARGIN * self.resolution)


PHASES = (
    Phase("full", 1, 256, 16384, 32, "--lr 1e-3 --betas 0.9 0.99 --weight-decay 0.01 --warmup-steps 500"),
    Phase("latent-adaptation", 0.05, 512, 2048, 16, "--lr 2e-4"),
    Phase("local-refinement", 0.05, 256, 16384, 32, "--lr 1e-4 --weight-decay 0.01 --gan-weight 0.02"),
)


def rehearsed(phase: Phase) -> Phase:
    """The phase in small, to rehearse the program on a CPU."""
    options = f"{phase.options} --precision float32 --no-patch"
    return replace(phase, resolution=phase.resolution // 4, pictures=24, batch=4, options=options)


def run(phase: Phase, steps: int, source: Path | None, folder: Path, device: torch.device) -> Path:
    """Trains a phase, from random weights or from the output folder of another phase; returns its output folder."""
    pictures, out = folder / f"pictures-{phase.side}", folder / phase.recipe
    if not pictures.is_dir():
        write_pictures(pictures, phase.side, phase.pictures, device)
    start = ["--model", MODEL] if source is None else ["--from", source]
    crops = ["--resolution", phase.resolution, "--crop-scale", 1 / MARGIN, 1 / MARGIN, "--batch", phase.batch]
    places = ["--data", pictures, "--eval-data", folder / "held-out", "--out", out, "--device", device]
    length = ["--steps", max(1, round(phase.share * steps))]
    options = [*start, *crops, *places, *length, *COMMON.split(), *phase.options.split()]
    options += ["--cuda-graphs"] if device.type == "cuda" else []
    status = cli.main(["train-autoencoder", phase.recipe, *map(str, options)])
    if status:
        raise SystemExit(status)
    return out


@dataclass(frozen=True)
class Result:
    """A model and its figures: name of a photograph → (size, PSNR in dB), and the rms of the seen latents."""

    phase: Phase
    model: DCAE
    photographs: dict[str, tuple[str, float]]
    rms: float

    def mean_psnr(self, held_out: bool) -> float:
        values = [self.photographs[p.name][1] for p in PHOTOGRAPHS if p.is_held_out == held_out]
        return sum(values) / len(values)


@torch.no_grad()
def evaluate(phase: Phase, model: DCAE) -> Result:
    """Evaluates a model, rounded to float16, on all photographs, cropped to multiples of 32."""
    model, photographs, squares, values = model.half().float().eval(), {}, 0.0, 0
    for photograph in tqdm(PHOTOGRAPHS, desc="evaluating"):
        x = fit(to_tensor(photograph.open()), model.spatial_compression_ratio, "crop")
        z = model.encode(x)
        quality = psnr(to_uint8(model.decode(z)), to_uint8(x)).item()
        photographs[photograph.name] = (f"{x.shape[3]}x{x.shape[2]}", quality)
        if not photograph.is_held_out:
            squares, values = squares + z.double().square().sum().item(), values + z.numel()
    return Result(phase, model, photographs, math.sqrt(squares / values))


CARD = """# dc-ae-tiny

For demonstration only: a DC-AE (arXiv 2410.10733) with {parameters:.2f} M parameters, 32x32 pixels per latent position
with {channels} channels, to try the library without a download. It was trained from scratch by
`examples/train_tiny.py` on {device}, on augmented crops of {seen} photographs, with the phases of
`dcae-fast train-autoencoder`. The released models, with 300 M parameters and more, reconstruct far better.

Weights are stored as float16. PSNR is computed on the whole uint8 photograph, cropped to multiples of 32; the model
runs in float32 on a CPU with the weights as stored. Held-out photographs were not used in training, but they chose the
phase: the weights are those after {chosen}.

| after | steps | crops | PSNR of held-out photographs (dB) | of seen photographs |
|---|---|---|---|---|
{phases}

| photograph | used | size | PSNR (dB) | by, licence |
|---|---|---|---|---|
{photographs}

The photographs come with scikit-image and scikit-learn. Those under CC BY 2.0
(https://creativecommons.org/licenses/by/2.0/) were cropped, resized and recoloured for training.
"""


def card(results: Sequence[Result], chosen: Result, steps: int, device: torch.device) -> str:
    """The model card. steps: of the first phase."""
    phases, photographs = [], []
    for result in results:
        phase = result.phase
        crops = f"{phase.batch} of {phase.resolution} px"
        means = " | ".join(f"{result.mean_psnr(held_out):.2f}" for held_out in (True, False))
        phases.append(f"| {phase.recipe} | {max(1, round(phase.share * steps))} | {crops} | {means} |")
    for photograph in PHOTOGRAPHS:
        size, quality = chosen.photographs[photograph.name]
        used = "held out" if photograph.is_held_out else "seen"
        photographs.append(f"| {photograph.name} | {used} | {size} | {quality:.2f} | {photograph.credit} |")
    return CARD.format(
        parameters=sum(p.numel() for p in chosen.model.parameters()) / 1e6,
        channels=chosen.model.config.latent_channels,
        device=device_name(device),
        seen=sum(not photograph.is_held_out for photograph in PHOTOGRAPHS),
        chosen=chosen.phase.recipe,
        phases="\n".join(phases),
        photographs="\n".join(photographs),
    )


def main() -> None:
    options = parse_options(__doc__, "steps", 24000, "steps of the first phase")
    phases = PHASES if options.device.type == "cuda" else [rehearsed(phase) for phase in PHASES]
    folder = options.out.with_name(f"{options.out.name}-training")
    write_held_out(folder / "held-out")
    results, source = [], None
    for phase in phases:
        source = run(phase, options.steps, source, folder, options.device)
        results.append(evaluate(phase, DCAE.from_pretrained(source / "model")))
    chosen = max(results, key=lambda result: result.mean_psnr(held_out=True))
    model = chosen.model
    model.config = replace(model.config, scaling_factor=round(1 / chosen.rms, 4))
    text = card(results, chosen, options.steps, options.device)
    with whole_folder(options.out) as part:
        checkpoint.save(model.half(), part, "original")
        (part / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
