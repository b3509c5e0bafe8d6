"""The result of a training: weights in two layouts, the scaling factor, a model card, and examples."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import dcae_fast
from dcae_fast import distributed, images
from dcae_fast.evaluation.autoencoder import COLUMNS, Result
from dcae_fast.files import writing, written_atomically
from dcae_fast.models import checkpoint
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.config import SCALES

from .network import begins_with, load_source

if TYPE_CHECKING:
    from .task import AutoencoderTask

HEADINGS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID"}
STATISTICS = {"mean": "latent mean", "rms": "latent rms", "std": "latent std"}

CARD = """---
license: {licence}
---
# Autoencoder trained with dcae-fast train-autoencoder

A DC-AE (arXiv 2410.10733) with {parameters:.2f} M parameters: {ratio}x{ratio} pixels become one latent position with
{channels} channels. Scaling factor: {scaling}.

| training | |
|---|---|
| data | photographs in `{data}`: {pictures} |
| started from | {source} |
| trained | {trained} |
| steps | {steps} of {batch} crops of {resolution} px |
| losses | {losses} |
| optimizer | AdamW, learning rate {lr}, betas {betas}, weight decay {weight_decay:g}; average {ema} |
| precision | {precision} |

Measured in {precision} on centre crops of {resolution} px of {measured}:

{metrics}

The best, the median and the worst picture are in examples.png.{discriminator}
"""


def finish(task: "AutoencoderTask", folder: Path) -> None:
    """Measures the model in a folder, sets its scaling factor, and writes all files of the result.

    The folder gets the original layout, README.md and examples.png; the folder with "-diffusers" appended to its name
    gets the layout of diffusers, if it can describe the model. Called by all ranks.
    """
    model = DCAE.from_pretrained(folder)
    models = {"trained": _on_device(task, model)}
    if task.recipe.source is not None:
        models = {"before": _on_device(task, load_source(task.recipe).eval())} | models
    results = task.held_out.results(models)
    config = replace(model.config, scaling_factor=_scaling_factor(task, model, results))
    distributed.on_main(lambda: _write(task, folder, models, results, config.scaling_factor))
    distributed.barrier()


def _on_device(task: "AutoencoderTask", model: DCAE) -> DCAE:
    model.to(task.device, memory_format=torch.channels_last)
    if task.run.patch:
        dcae_fast.patch(model)
    return model


def _scaling_factor(task: "AutoencoderTask", model: DCAE, results: dict[str, Result]) -> float | None:
    """1 / rms of the latents if the encoder trained or the factor was unknown; else the former factor."""
    changed = any(begins_with(name, "encoder") for name, p in task.network.named_parameters() if p.requires_grad)
    if model.scaling_factor is not None and not changed:
        return model.scaling_factor
    rms = results["trained"].figures.get("rms", 0.0) if results else 0.0
    factor = float(f"{1 / rms:.4g}") if rms > 0 and math.isfinite(rms) else 0.0
    return factor if SCALES[0] <= factor <= SCALES[1] else model.scaling_factor


def _write(
    task: "AutoencoderTask", folder: Path, models: dict[str, DCAE], results: dict[str, Result], scaling: float | None
) -> None:
    if results:
        with writing(folder / "examples.png"):
            images.save_png(task.held_out.examples(models, results), folder / "examples.png")
    model = models["trained"].to("cpu", memory_format=torch.contiguous_format)
    model.config = replace(model.config, scaling_factor=scaling)
    checkpoint.save(model, folder, "original")
    text = card(task, model, results)
    with written_atomically(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    other = folder.with_name(f"{folder.name}-diffusers")
    try:
        checkpoint.save(model, other, "diffusers")
    except ValueError as error:
        print(f"not saved in the layout of diffusers: {error}", flush=True)


def card(task: "AutoencoderTask", model: DCAE, results: dict[str, Result]) -> str:
    """The text of the model card."""
    recipe, run = task.recipe, task.run
    kept = "\nThe discriminator is in the checkpoints of the training, not here." if recipe.gan.gan_weight else ""
    return CARD.format(
        licence=run.licence,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        ratio=model.spatial_compression_ratio,
        channels=model.config.latent_channels,
        scaling=model.scaling_factor or "unknown",
        pictures=len(task.pictures.items),
        data=run.data.name,
        source=recipe.source or f"random weights of {recipe.model}",
        trained=", ".join(f"`{prefix}`" for prefix in recipe.train),
        steps=recipe.steps,
        batch=recipe.batch,
        resolution=recipe.resolution,
        losses=_losses(task),
        lr=f"{recipe.lr:g}{', along a cosine to 0' if recipe.lr_decay else ''}",
        betas=f"{recipe.betas[0]:g} and {recipe.betas[1]:g}",
        weight_decay=recipe.weight_decay,
        ema=recipe.ema_decay or "none",
        precision=recipe.precision,
        measured=_measured(task, results),
        metrics=_metrics(results),
        discriminator=kept,
    )


def _losses(task: "AutoencoderTask") -> str:
    recipe, losses = task.recipe, [{"l1": "L1", "l2": "L2", "charbonnier": "Charbonnier"}[task.recipe.pixel]]
    if recipe.perceptual == "lpips":
        losses.append(f"{recipe.perceptual_weight:g} LPIPS")
    if recipe.gan.gan_weight:
        adaptive = ", adaptive" if recipe.gan.gan_adaptive else ""
        losses.append(f"{recipe.gan.gan_weight:g} adversarial ({recipe.gan.gan_loss}{adaptive})")
    return " + ".join(losses)


def _measured(task: "AutoencoderTask", results: dict[str, Result]) -> str:
    count = len(results["trained"].psnr) if results else 0
    source = "held-out photographs" if task.held_out.is_held_out else "photographs of the training"
    return f"{source} ({count})"


def _metrics(results: dict[str, Result]) -> str:
    """A table with a row for each model."""
    names = {name: title for name, title in (HEADINGS | STATISTICS).items() if name in COLUMNS}
    lines = [" | ".join(["| model", *names.values()]) + " |", "|---" * (len(names) + 1) + "|"]
    for model, result in results.items():
        figures = [f"{result.figures[name]:.4f}" if name in result.figures else "-" for name in names]
        lines.append(" | ".join([f"| {model}", *figures]) + " |")
    return "\n".join(lines)
