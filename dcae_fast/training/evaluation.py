"""What is looked at now and then during a training: samples, and the loss on held-out latents, of the average."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch.distributed.fsdp import FSDPModule

import dcae_fast
from dcae_fast import distributed, images
from dcae_fast import sample as sampling
from dcae_fast.data.latents import LatentDataset
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.weights import CheckpointError
from dcae_fast.reconstruction import DTYPES

from .batches import draw
from .config import Recipe, Run, TrainingError
from .state import State, autocast, batch_loss


@contextlib.contextmanager
def averaged(state: State) -> Iterator[None]:
    """The network in evaluation mode, without gradients and not compiled, with the average for weights."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if state.average is not None:
            stack.enter_context(state.average.in_place_of_weights(state.network))
        state.network.eval()
        try:
            yield
        finally:
            state.network.train()
            if isinstance(state.network, FSDPModule):
                state.network.reshard()  # without a backward pass it keeps whole weights


class Samples:
    """A grid of sixteen in samples/<step>.png, from the same noise and labels each time. TrainingError without decoder.

    To be made and drawn by all ranks, which compute the same.
    """

    def __init__(self, state: State, recipe: Recipe, run: Run):
        config = state.config
        if config.eval_scheduler == "ODE_dopri5" and find_spec("torchdiffeq") is None:
            raise TrainingError("samples by ODE_dopri5 need torchdiffeq: pip install 'dcae_fast[ode]'")
        try:
            autoencoder = DCAE.from_pretrained(config.autoencoder)
        except CheckpointError as error:
            reason = "no autoencoder to decode samples with (sample_steps=0 trains without)"
            raise TrainingError(f"{reason}: {error}") from error
        autoencoder.to(state.device, DTYPES[recipe.precision], memory_format=torch.channels_last)
        if run.patch:
            dcae_fast.patch(autoencoder)
        self.state, self.folder = state, run.out / "samples"
        self.model = DCAEDiffusion(config, state.network, autoencoder)
        labels = sampling.default_labels(config.network.num_classes)
        steps = config.num_inference_steps
        self.request = sampling.Request(labels, run.sample_cfg, 0, config.eval_scheduler, steps)

    def draw(self) -> Image.Image:
        with averaged(self.state):
            z = sampling.sample(self.model, self.request)
            grid = images.grid(sampling.decode(self.model, z), self.request.columns)
        if distributed.is_main():
            self.folder.mkdir(exist_ok=True)
            images.save_png(grid, self.folder / f"{self.state.step:09d}.png")
        return grid


def held_out_loss(state: State, recipe: Recipe, folder: Path) -> float:
    """The mean objective over as many whole batches of a folder's latents as there are; the same draws each time.

    Called by all ranks. Raises DataError or ValueError.
    """
    data = LatentDataset(folder)
    batches, ranks, rank = len(data) // recipe.batch, distributed.world_size(), distributed.rank()
    if batches == 0:
        raise ValueError(f"eval_data={folder}: {len(data)} latents; expected at least a batch, {recipe.batch}")
    part = range(recipe.batch * rank // ranks, recipe.batch * (rank + 1) // ranks)
    total = torch.zeros((), device=state.device)
    with averaged(state), autocast(state.device, recipe.precision):
        for number in range(batches):
            items = [data[number * recipe.batch + i] for i in part]
            z = torch.stack([latent for latent, _ in items]).to(state.device)
            labels = torch.tensor([label for _, label in items], device=state.device)
            draws = draw(state.config, recipe.batch, part, recipe.seed, number, state.device)
            total += batch_loss(state.config, state.network, z, labels, draws)
    return distributed.all_sum(total).item() / (batches * ranks)
