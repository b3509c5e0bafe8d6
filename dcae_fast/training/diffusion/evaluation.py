"""Evaluations during a training: samples, the loss on held-out latents, and a comparison with real pictures."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

import dcae_fast
from dcae_fast import distributed, images
from dcae_fast import sample as sampling
from dcae_fast.data.latents import LatentDataset
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.evaluation import networks
from dcae_fast.evaluation.generation import References, SampleFolder, Settings, figures, generate
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.models.dit import DiT
from dcae_fast.models.uvit import UViT
from dcae_fast.models.weights import CheckpointError
from dcae_fast.training.engine.config import TrainingError
from dcae_fast.training.engine.state import autocast

from .config import DiffusionRecipe, DiffusionRun
from .draws import draw
from .step import batch_loss

EVALUATED_AT_ONCE = 32  # samples per rank, as in the original


def build_model(config: DiffusionConfig, network: UViT | DiT, dtype: torch.dtype, patch: bool) -> DCAEDiffusion:
    """The network with its autoencoder, on the same device and in this dtype.

    patch: whether the autoencoder uses the fast operators. TrainingError if there is no autoencoder, or no solver to
    sample with.
    """
    if config.eval_scheduler == "ODE_dopri5" and find_spec("torchdiffeq") is None:
        raise TrainingError("samples by ODE_dopri5 need torchdiffeq: pip install 'dcae_fast[ode]'")
    try:
        autoencoder = DCAE.from_pretrained(config.autoencoder)
    except CheckpointError as error:
        reason = "no autoencoder to decode samples with (without evaluations of samples, sample_steps=0 needs none)"
        raise TrainingError(f"{reason}: {error}") from error
    autoencoder.to(next(network.parameters()).device, dtype, memory_format=torch.channels_last)
    if patch:
        dcae_fast.patch(autoencoder)
    return DCAEDiffusion(config, network, autoencoder)


def draw_samples(model: DCAEDiffusion, cfg: float) -> Image.Image:
    """Sixteen samples in one picture, from the same noise and labels each time. cfg: guidance scale."""
    config = model.config
    labels = sampling.default_labels(config.network.num_classes)
    request = sampling.Request(labels, cfg, 0, config.eval_scheduler, config.num_inference_steps)
    return images.grid(sampling.decode(model, sampling.sample(model, request)), request.columns)


class HeldOut:
    """The mean objective over held-out latents, as many whole batches as there are, with the same draws each time.

    like: the latents of the training. Raises DataError, and ValueError unless the held-out latents have their shape and
    classes.
    """

    def __init__(self, folder: Path, config: DiffusionConfig, recipe: DiffusionRecipe, like: LatentDataset):
        self.data, self.config, self.recipe = LatentDataset(folder), config, recipe
        if self.data.shape != like.shape:
            raise ValueError(f"eval_data={folder}: latents of {list(self.data.shape)}; expected {list(like.shape)}")
        if self.data.classes != like.classes:
            raise ValueError(f"eval_data={folder}: other classes; expected the classes of {like.folder}")
        if len(self.data) < recipe.batch:
            raise ValueError(
                f"eval_data={folder}: {len(self.data)} latents; expected a batch of {recipe.batch} or more"
            )

    def loss(self, network: UViT | DiT) -> float:
        """The loss with the network's present weights. Called by all ranks."""
        batch, batches = self.recipe.batch, len(self.data) // self.recipe.batch
        device, share = next(network.parameters()).device, distributed.share(batch)
        total = torch.zeros((), device=device)
        for number in range(batches):
            latents, classes = zip(*(self.data[number * batch + i] for i in share), strict=True)
            z, labels = torch.stack(latents).to(device), torch.tensor(classes, device=device)
            draws = draw(self.config, batch, share, self.recipe.seed, number, device)
            with autocast(device, self.recipe.autocast):
                total += batch_loss(self.config, network, z, labels, draws)
        return distributed.all_sum(total).item() / (batches * distributed.world_size())


class Comparison:
    """Compares samples with real pictures, as `eval-diffusion` does: the `evaluate` of a `DiffusionTask`.

    Noise and classes are the same each time. The features of the samples are stored in the output folder until they are
    compared. Raises TrainingError if a network is missing, and DataError if a reference does not fit.
    """

    def __init__(self, references: References, samples: int, run: DiffusionRun, device: torch.device):
        self.references, self.samples, self.run, self.device = references, samples, run, device
        self.networks, missing = networks.load_all(references.networks, device)
        if missing:
            raise TrainingError("\n".join(["the networks that evaluate samples are missing", *missing.values()]))
        references.check(self.networks, device, samples, prefix="eval-")

    def __call__(self, model: DCAEDiffusion, step: int) -> dict[str, float]:
        """The figures by name. Called by all ranks, each of which computes a part of the samples."""
        config, weight = model.config, next(model.autoencoder.parameters())
        settings = Settings(
            model=str(self.run.out),
            weights=f"after step {step}",
            dtype=str(weight.dtype).removeprefix("torch."),
            patch=self.run.patch,
            samples=self.samples,
            batch=EVALUATED_AT_ONCE,
            cfg=self.run.sample_cfg,
            sampler=config.eval_scheduler,
            steps=config.num_inference_steps,
            seed=0,
            class_seed=0,
        )
        folder = SampleFolder(self.run.out / "evaluation", settings, config.network.num_classes, "none")
        if distributed.is_main():
            shutil.rmtree(folder.folder, ignore_errors=True)  # left by a run that was ended
        generate(model, folder, self.networks)
        numbers = distributed.on_main(lambda: figures(folder, self.references, set(self.networks), self.device))
        if distributed.is_main():
            shutil.rmtree(folder.folder)
        return numbers
