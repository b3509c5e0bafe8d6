"""Evaluations during a training: figures of the reconstructions, and pictures beside their reconstructions."""

import math
from dataclasses import replace

import torch
from PIL import Image

from dcae_fast import distributed, images
from dcae_fast.data.pictures import Pictures, collate
from dcae_fast.evaluation import networks
from dcae_fast.evaluation.autoencoder import Result, evaluate, examples, reconstruct
from dcae_fast.evaluation.pictures import FolderBatches
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.training.engine.state import autocast

from .config import AutoencoderRecipe, AutoencoderRun
from .pictures import find, max_pixels_of, print_notes

NETWORKS = ("ssim", "lpips", "fid")
SHOWN = 8  # pictures of a grid
AT_ONCE = 16  # pictures per rank
MOST = 1000  # of the training pictures, if no others are held out
NAMES = {"mean": "latent_mean", "rms": "latent_rms", "std": "latent_std"}


class HeldOut:
    """Centre crops of the pictures in `run.eval_data`, or else of some that the autoencoder trains on.

    Prints which metrics lack their network. Raises DataError. Called by all ranks, as all methods are.
    """

    def __init__(self, recipe: AutoencoderRecipe, run: AutoencoderRun, trained_on: Pictures, device: torch.device):
        self.recipe, self.device = recipe, device
        self.is_held_out = run.eval_data is not None
        pictures = find(run.eval_data) if self.is_held_out else _some(trained_on)
        self.batches = FolderBatches(pictures, recipe.resolution, AT_ONCE, run.workers, max_pixels_of(run))
        self.named: set[str] = set()
        found, missing = networks.load_all(NETWORKS, device, recipe.resolution)
        self.networks = {name: _in_float32(network, device) for name, network in found.items()}
        for reason in missing.values():
            distributed.print_main(f"not measured: {reason}", error=True)

    def results(self, models: dict[str, DCAE]) -> dict[str, Result]:
        """Each model's result, by model name; empty if no picture could be measured.

        Names the pictures that could not be measured, each once.
        """
        self.batches.failed = []
        with autocast(self.device, self.recipe.precision):
            results = evaluate(self.batches, models, self.networks, None)
        failed = dict(each for part in distributed.all_gather(self.batches.failed) for each in part)
        print_notes("not measured", [(name, failed[name]) for name in failed if name not in self.named])
        self.named |= failed.keys()
        return results

    def figures(self, model: DCAE) -> dict[str, float]:
        """The figures of one model, for the log. Figures that are not finite are left out."""
        results = self.results({"model": model})
        figures = results["model"].figures if results else {}
        return {NAMES.get(name, name): value for name, value in figures.items() if math.isfinite(value)}

    def examples(self, models: dict[str, DCAE], results: dict[str, Result]) -> Image.Image:
        """A sheet with the pictures of best, median and worst PSNR of the last model."""
        with autocast(self.device, self.recipe.precision):
            return examples(self.batches, models, list(results.values())[-1].psnr)

    def reconstructions(self, model: DCAE) -> tuple[torch.Tensor, torch.Tensor]:
        """The first few pictures and their reconstructions, uint8 [n, 3, H, W] on the CPU."""
        crops = self.batches.crops(range(min(SHOWN, self.batches.count)))
        batch = collate([crops[position] for position in range(len(crops))])
        if not batch.indices:  # none can be read
            none = torch.zeros(0, 3, self.recipe.resolution, self.recipe.resolution, dtype=torch.uint8)
            return none, none
        with autocast(self.device, self.recipe.precision):
            result = reconstruct(model, batch.pixels)
        return result.x.cpu(), result.y.cpu()


def _in_float32(network: networks.Network, device: torch.device) -> networks.Network:
    """The network of a metric, which computes in float32 also while the autoencoder runs under autocast."""
    return torch.autocast(device.type, enabled=False)(network)


def _some(pictures: Pictures) -> Pictures:
    """At most `MOST` pictures, evenly spaced."""
    return replace(pictures, items=pictures.items[:: -(-len(pictures.items) // MOST)], failed=[])


def comparison(rows: list[torch.Tensor]) -> Image.Image | None:
    """Rows of pictures uint8 [n, 3, H, W], one below another; None without pictures."""
    count = len(rows[0])
    return images.grid(torch.cat(rows), count) if count else None
