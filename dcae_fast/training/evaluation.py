"""What is looked at now and then during a training: samples, and the loss on held-out latents, of the average."""

import contextlib
import shutil
from collections.abc import Iterator
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
from dcae_fast.files import writing
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.weights import CheckpointError

from .batches import draw
from .config import Recipe, Run, TrainingError
from .parallel import gathered
from .state import State, autocast, batch_loss

EVALUATED_AT_ONCE = 32  # samples of a rank, as in the original


@contextlib.contextmanager
def averaged(state: State) -> Iterator[None]:
    """The network in evaluation mode, whole, without gradients and not compiled, with the average for weights."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if state.average is not None:
            stack.enter_context(state.average.in_place_of_weights(state.network))
        stack.enter_context(gathered(state.network))
        state.network.eval()
        try:
            yield
        finally:
            state.network.train()


def build_model(state: State, recipe: Recipe, run: Run) -> DCAEDiffusion:
    """The network in training with its autoencoder, in bfloat16 unless all is in float32.

    TrainingError if there is no autoencoder, or no solver to sample with.
    """
    config = state.config
    if config.eval_scheduler == "ODE_dopri5" and find_spec("torchdiffeq") is None:
        raise TrainingError("samples by ODE_dopri5 need torchdiffeq: pip install 'dcae_fast[ode]'")
    try:
        autoencoder = DCAE.from_pretrained(config.autoencoder)
    except CheckpointError as error:
        reason = "no autoencoder to decode samples with (sample_steps=0 trains without, where none are evaluated)"
        raise TrainingError(f"{reason}: {error}") from error
    dtype = torch.float32 if recipe.precision == "float32" else torch.bfloat16
    autoencoder.to(state.device, dtype, memory_format=torch.channels_last)
    if run.patch:
        dcae_fast.patch(autoencoder)
    return DCAEDiffusion(config, state.network, autoencoder)


def draw_samples(model: DCAEDiffusion, cfg: float, file: Path) -> Image.Image:
    """Sixteen pictures, from the same noise and labels each time, in one, which the main process saves."""
    config = model.config
    labels = sampling.default_labels(config.network.num_classes)
    request = sampling.Request(labels, cfg, 0, config.eval_scheduler, config.num_inference_steps)
    picture = images.grid(sampling.decode(model, sampling.sample(model, request)), request.columns)

    def save() -> None:
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            images.save_png(picture, file)

    distributed.on_main(save)
    return picture


class HeldOut:
    """The mean objective over as many whole batches of other latents as there are, with the same draws each time.

    Raises DataError, and ValueError unless they are like the ones trained on.
    """

    def __init__(self, folder: Path, recipe: Recipe, like: LatentDataset):
        self.data, self.recipe = LatentDataset(folder), recipe
        if self.data.shape != like.shape:
            raise ValueError(f"eval_data={folder}: latents of {list(self.data.shape)}; expected {list(like.shape)}")
        if self.data.classes != like.classes:
            raise ValueError(f"eval_data={folder}: other classes than those of {like.folder}")
        if len(self.data) < recipe.batch:
            raise ValueError(
                f"eval_data={folder}: {len(self.data)} latents; expected a batch of {recipe.batch} or more"
            )

    def loss(self, state: State) -> float:
        """Of the weights that the network has. Called by all ranks."""
        batch, batches = self.recipe.batch, len(self.data) // self.recipe.batch
        ranks, rank = distributed.world_size(), distributed.rank()
        part = range(batch * rank // ranks, batch * (rank + 1) // ranks)
        total = torch.zeros((), device=state.device)
        for number in range(batches):
            latents, classes = zip(*(self.data[number * batch + i] for i in part), strict=True)
            z, labels = torch.stack(latents).to(state.device), torch.tensor(classes, device=state.device)
            draws = draw(state.config, batch, part, self.recipe.seed, number, state.device)
            with autocast(state.device, self.recipe.precision):
                total += batch_loss(state.config, state.network, z, labels, draws)
        return distributed.all_sum(total).item() / (batches * ranks)


class Comparison:
    """How close samples are to real pictures, as `eval-diffusion` computes it: what `train` takes as `evaluate`.

    Noise and classes are the same each time. The samples' features lie in the run's folder until they are compared.
    Raises TrainingError where a network is missing, and DataError where a reference does not fit.
    """

    def __init__(self, references: References, samples: int, run: Run, device: torch.device):
        self.references, self.samples, self.run, self.device = references, samples, run, device
        self.networks, missing = networks.load_all(references.networks, device)
        if missing:
            raise TrainingError("\n".join(["networks are missing that evaluate samples", *missing.values()]))
        references.check(self.networks, device, samples, prefix="eval-")

    def __call__(self, model: DCAEDiffusion, step: int) -> dict[str, float]:
        """Called by all ranks, each of which computes a part of the samples."""
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
            shutil.rmtree(folder.folder, ignore_errors=True)  # of a run that was ended
        generate(model, folder, self.networks)
        numbers = distributed.on_main(lambda: figures(folder, self.references, set(self.networks), self.device))
        if distributed.is_main():
            shutil.rmtree(folder.folder)
        return numbers
