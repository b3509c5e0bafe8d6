"""Training a diffusion transformer on a folder of latents, as a task of the engine."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dcae_fast import distributed
from dcae_fast.data.latents import LatentDataset
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.errors import NotFiniteError
from dcae_fast.fast import rows8
from dcae_fast.training.engine import loop
from dcae_fast.training.engine.batches import BatchOrder, load_batches
from dcae_fast.training.engine.state import State
from dcae_fast.training.engine.task import Taken, Task

from .config import FP8, DiffusionRecipe, DiffusionRun
from .draws import Draws, draw
from .evaluation import HeldOut, build_model, draw_samples
from .step import NAME, Part, initial_state, take_step

Batch = tuple[torch.Tensor, torch.Tensor]  # latents [b, c, h, w] float32, labels [b]
Evaluate = Callable[[DCAEDiffusion, int], dict[str, float]]


def train(recipe: DiffusionRecipe, run: DiffusionRun, device: torch.device, evaluate: Evaluate | None = None) -> Path:
    """`loop.train` of a `DiffusionTask`: returns the folder of the model, for `DCAEDiffusion.from_pretrained`."""
    return loop.train(DiffusionTask(recipe, run, device, evaluate))


class DiffusionTask(Task):
    """Training a diffusion transformer on the latents in `run.data`.

    evaluate: called by all ranks every `run.eval_steps` with the model, whose weights are the average, and the number
    of steps taken; returns numbers for the log. `evaluation.Comparison` is one. Each rank has all weights, also with
    FSDP, so that it may call the network as often as it likes.

    Raises DataError, and ValueError if the recipe does not fit the data or the number of ranks.
    """

    def __init__(
        self, recipe: DiffusionRecipe, run: DiffusionRun, device: torch.device, evaluate: Evaluate | None = None
    ):
        super().__init__(recipe, run, device)
        recipe.part(distributed.world_size(), run.accumulate)  # raises if the batch cannot be divided
        if recipe.precision in FP8 and not run.patch:
            raise ValueError(f"precision={recipe.precision!r}: expected together with patch")
        self.data = LatentDataset(run.data)
        self.config = recipe.diffusion_config(self.data)
        self.evaluate_model = evaluate

    def facts(self) -> dict[str, Any]:
        names = hashlib.sha256("\n".join(self.data.classes).encode()).hexdigest()
        facts = {"items": len(self.data), "shape": self.data.shape, "classes": names}
        if self.data.manifest is not None:
            settings = self.data.manifest.settings
            facts |= {"scaling_factor": settings.scaling_factor, "weights": settings.weights}
        if self.recipe.precision in FP8:
            facts["products"] = "in 8 bit" if rows8.runs_on(self.device) else "in bfloat16"
        return facts

    def build(self) -> State:
        """Raises TrainingError if samples are due and the autoencoder or the solver for them is missing."""
        recipe, run, classes = self.recipe, self.run, self.recipe.network.num_classes
        if 0 < len(self.data.classes) < classes:
            distributed.print_main(
                f"The latents have {len(self.data.classes)} classes and the network has {classes}. Samples will be of "
                "all classes of the network; see --num-classes",
                error=True,
            )
        if self.recipe.precision in FP8 and not rows8.runs_on(self.device):
            distributed.print_main(
                f"{recipe.precision} needs a Hopper GPU: on this device the training computes in bfloat16", error=True
            )
        self.state = initial_state(self.config, recipe, run, self.device)
        self.model = None
        if run.sample_steps or self.evaluate_model:
            network, dtype = self.state.exported, torch.float32 if recipe.precision == "float32" else torch.bfloat16
            self.model = build_model(self.config, network, dtype, run.patch)
        self.held_out = HeldOut(run.eval_data, self.config, recipe, self.data) if run.eval_data else None
        return self.state

    def batches(self, steps: range, shards: int) -> Iterator[Batch]:
        ranks, rank = distributed.world_size(), distributed.rank()
        order = BatchOrder(len(self.data), self.recipe.batch, shards, self.recipe.seed, steps, rank, ranks)
        return load_batches(self.data, order, self.run.workers, self.device)

    def take_step(self, batch: Batch, logged: bool) -> Taken:
        loss, lr, norm = take_step(self.state, self.config, self.recipe, self._parts(batch), want_norm=logged)
        return Taken({"loss": loss}, {"lr": lr, "grad_norm": norm} if logged else {})

    def _parts(self, batch: Batch) -> list[Part]:
        """A batch on the device, with its draws, in `accumulate` parts."""
        z, labels = (x.to(self.device, non_blocking=True) for x in batch)
        share = distributed.share(self.recipe.batch)
        draws = draw(self.config, self.recipe.batch, share, self.recipe.seed, self.state.step, self.device)
        split = [x.chunk(self.run.accumulate) for x in (z, labels, *draws)]
        return [(z, labels, Draws(*draws)) for z, labels, *draws in zip(*split, strict=True)]

    def sample(self) -> Image.Image | None:
        try:
            return draw_samples(self.model, self.run.sample_cfg)
        except NotFiniteError:  # on all ranks; the training itself may be sound
            self._report_not_finite()
            return None

    def evaluate(self) -> dict[str, float]:
        numbers = {}
        if self.held_out is not None:
            numbers["held_out_loss"] = self.held_out.loss(self.state.networks[NAME].network)
        if self.evaluate_model is not None:
            try:
                numbers |= self.evaluate_model(self.model, self.state.step)
            except NotFiniteError:
                self._report_not_finite()
        return numbers

    def _report_not_finite(self) -> None:
        distributed.print_main(f"The samples after step {self.state.step} contain NaN or infinity", error=True)
