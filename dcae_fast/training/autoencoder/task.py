"""Training an autoencoder on photographs, as a task of the engine."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dcae_fast import distributed
from dcae_fast.data.manifest import weights_hash
from dcae_fast.training.engine import loop
from dcae_fast.training.engine.batches import generator_of, load_batches
from dcae_fast.training.engine.graphs import StepGraphs
from dcae_fast.training.engine.state import State
from dcae_fast.training.engine.task import Taken, Task

from .config import AutoencoderRecipe, AutoencoderRun
from .evaluation import HeldOut, comparison
from .network import allowed_channels, draw_channels, load_source
from .pictures import CropOrder, RandomCrops, max_pixels_of, print_notes, usable_pictures
from .result import finish
from .step import Compute, Objective, initial_state, last_weight, take_step, update_networks


def train(recipe: AutoencoderRecipe, run: AutoencoderRun, device: torch.device) -> Path:
    """`loop.train` of an `AutoencoderTask`, then `result.finish`. Returns the folder for `DCAE.from_pretrained`.

    While it trains, cuDNN chooses the fastest convolutions by timing them.
    """
    task = AutoencoderTask(recipe, run, device)
    with _timed_convolutions():
        folder = loop.train(task)
    finish(task, folder)
    return folder


class AutoencoderTask(Task):
    """Training an autoencoder on the photographs in `run.data`.

    Raises CheckpointError, DataError, TrainingError, and ValueError if the options do not fit.
    """

    def __init__(self, recipe: AutoencoderRecipe, run: AutoencoderRun, device: torch.device):
        super().__init__(recipe, run, device)
        recipe.part(distributed.world_size(), run.accumulate)  # raises if the batch cannot be divided
        self.network = load_source(recipe)
        self.source_weights = weights_hash(self.network) if recipe.source is not None else None
        self.channels = allowed_channels(recipe, self.network)
        _check_graphs(recipe, run, device)
        _check_discriminator(recipe, last_weight(self.network).requires_grad)
        self.pictures, skipped = usable_pictures(recipe, run)
        print_notes("skipped", skipped)
        count = len(self.pictures.items)
        if count < recipe.batch:
            found = "1 picture" if count == 1 else f"{count} pictures"
            distributed.print_main(f"{run.data}: {found} for a batch of {recipe.batch}; a batch repeats pictures")

    def facts(self) -> dict[str, Any]:
        names = hashlib.sha256("\n".join(picture.name for picture in self.pictures.items).encode()).hexdigest()
        return {
            "photographs": len(self.pictures.items),
            "photographs_names": names,
            "source_weights": self.source_weights,
        }

    def build(self) -> State:
        """Raises TrainingError if the weights of the perceptual loss are missing."""
        self.objective = Objective(self.recipe, self.device, self.run.patch)
        self.held_out = HeldOut(self.recipe, self.run, self.pictures, self.device)
        with_fsdp = distributed.is_distributed() and self.run.parallel == "fsdp"  # which needs contiguous weights
        layout = torch.contiguous_format if with_fsdp else torch.channels_last
        self.network.to(self.device, memory_format=layout)
        self.before = self._rows() if self.run.sample_steps else []
        self.state = initial_state(self.network, self.recipe, self.run, self.device)
        self.compute: Compute = partial(update_networks, self.state, self.objective, self.recipe, self.run.accumulate)
        if self.run.cuda_graphs:
            optimizers = [trained.optimizer for trained in self.state.networks.values()]
            self.compute = StepGraphs(self.compute, optimizers, self.device)
        return self.state

    def _rows(self) -> list[torch.Tensor]:
        """Some pictures and, unless the weights are random, their reconstructions before the training."""
        self.network.eval()
        originals, made = self.held_out.reconstructions(self.network)
        self.network.train()
        return [originals, made] if self.recipe.source is not None else [originals]

    def batches(self, steps: range, shards: int) -> Iterator[torch.Tensor]:
        """Of pixels, uint8 [b, H, W, 3]."""
        recipe, ranks, rank = self.recipe, distributed.world_size(), distributed.rank()
        order = CropOrder(len(self.pictures.items), recipe.batch, shards, recipe.seed, steps, rank, ranks)
        crops = RandomCrops(self.pictures, recipe, max_pixels_of(self.run))
        return load_batches(crops, order, self.run.workers, self.device)

    def take_step(self, batch: torch.Tensor, logged: bool) -> Taken:
        want_norm = (
            logged or self.run.cuda_graphs
        )  # one graph for steps that write a line of the log and those that do not
        return take_step(self.state, self.recipe, self.compute, batch, self._draw_channels(), want_norm)

    def _draw_channels(self) -> tuple[int, ...]:
        """The numbers of latent channels that this step trains; none unless the model is adaptive."""
        if not self.channels:
            return ()
        generator = generator_of(torch.device("cpu"), self.recipe.seed, self.state.step)
        return draw_channels(self.channels, self.recipe.num_sample_latent_channels, generator)

    def sample(self) -> Image.Image | None:
        """Pictures above their reconstructions: before the training, if the weights are not random, and now."""
        return comparison([*self.before, self.held_out.reconstructions(self.state.exported)[1]])

    def evaluate(self) -> dict[str, float]:
        return self.held_out.figures(self.state.exported)


def _check_graphs(recipe: AutoencoderRecipe, run: AutoencoderRun, device: torch.device) -> None:
    ranks = distributed.world_size()
    if run.cuda_graphs and (device.type != "cuda" or ranks > 1 or recipe.precision == "float16"):
        raise ValueError(
            "cuda_graphs: expected one process on a GPU, and precision bfloat16 or float32; found "
            f"{ranks if ranks > 1 else 'one'} on {device}, and {recipe.precision}"
        )


def _check_discriminator(recipe: AutoencoderRecipe, last_trains: bool) -> None:
    if not recipe.gan.gan_weight:
        return
    smallest = 3 * 2**recipe.gan.discriminator_layers
    if recipe.resolution < smallest:
        raise ValueError(
            f"resolution={recipe.resolution}; expected at least {smallest} for a discriminator of "
            f"{recipe.gan.discriminator_layers} layers"
        )
    if recipe.gan.gan_adaptive and not last_trains:
        raise ValueError(
            "gan_adaptive: expected that decoder.project_out trains; see --train, or use --no-gan-adaptive"
        )


@contextmanager
def _timed_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
