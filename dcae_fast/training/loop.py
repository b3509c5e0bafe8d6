"""A training from its beginning, or from the newest checkpoint of its folder, to its last step."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from dcae_fast import distributed
from dcae_fast.data.latents import LatentDataset
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.errors import NotFiniteError
from dcae_fast.interruption import Interrupted, Interruption
from dcae_fast.lock import locked

from .batches import BatchOrder, Draws, draw, load_batches
from .checkpoint import Checkpoints, export
from .config import Recipe, Run, TrainingError
from .evaluation import HeldOut, averaged, build_model, draw_samples
from .log import Log
from .settings import shards_of
from .state import initial_state, take_step
from .stopwatch import Stopwatch

Evaluate = Callable[[DCAEDiffusion, int], dict[str, float]]


def train(recipe: Recipe, run: Run, device: torch.device, evaluate: Evaluate | None = None) -> Path:
    """Trains up to `recipe.steps`; the result is for `DCAEDiffusion.from_pretrained`, with the average's weights.

    Called by all ranks, within `distributed.process_group`. evaluate: called by all ranks every `run.eval_steps` with
    the model, which has the average for weights, and the step; the numbers that it returns are logged. Ranks may call
    the network as often as they like, with FSDP too: each has all weights then. `evaluation.Comparison` is such a one.

    SIGTERM and Ctrl-C raise Interrupted, a KeyboardInterrupt, after the step and a checkpoint. Another process that
    trains in the folder raises LockedError, a full disk WriteError; else DataError, TrainingError or ValueError.
    """
    with locked(run.out):
        training = Training(recipe, run, device, evaluate)
        try:
            training.run_all()
        finally:
            training.log.close()
        state, out = training.state, run.out / "model"
        export(state.config, state.network.state_dict() if state.average is None else state.average.average, out)
    return out


class Training:
    """A training that is ready to continue after `state.step`."""

    def __init__(self, recipe: Recipe, run: Run, device: torch.device, evaluate: Evaluate | None = None):
        self.recipe, self.run, self.evaluate = recipe, run, evaluate
        ranks, rank = distributed.world_size(), distributed.rank()
        recipe.part(ranks, run.accumulate)  # raises if there is none
        self.data = LatentDataset(run.data)
        config = recipe.diffusion_config(self.data)
        self.checkpoints = Checkpoints(run.out / "checkpoints", run.keep)
        has_begun = distributed.on_main(lambda: bool(self.checkpoints.newest_first()))
        shards = shards_of(run.out, recipe, self.data, has_begun)
        if 0 < len(self.data.classes) < recipe.network.num_classes:
            distributed.print_main(
                f"The latents have {len(self.data.classes)} classes, the network has {recipe.network.num_classes}, and "
                "samples are of all of these; see --num-classes",
                error=True,
            )
        self.state = initial_state(config, recipe, run, device)
        newest = self.checkpoints.load_newest(self.state)
        if newest is not None:
            distributed.print_main(f"Going on after step {self.state.step}, from {newest}")
        if self.state.step > recipe.steps:
            raise TrainingError(f"steps={recipe.steps}; expected at least {self.state.step}, which {run.out} has taken")
        steps = range(self.state.step, recipe.steps)
        self.order = BatchOrder(len(self.data), recipe.batch, shards, recipe.seed, steps, rank, ranks)
        self.model = build_model(self.state, recipe, run) if run.sample_steps or evaluate else None
        self.held_out = HeldOut(run.eval_data, recipe, self.data) if run.eval_data else None
        self.log = Log(run, self.state.step, recipe.steps, asdict(recipe))
        self.watch = Stopwatch(device)
        self.losses: list[torch.Tensor] = []
        self.asked_to_end = distributed.LateMaximum(device)

    def run_all(self) -> None:
        """Takes the steps that are left. SIGTERM and Ctrl-C raise Interrupted after a checkpoint."""
        message = "Finishing the step, then saving; once more ends at once." if distributed.is_main() else ""
        with Interruption(message) as interruption:
            for z, labels in load_batches(self.data, self.order, self.run.workers, self.state.device):
                self._take_step(z, labels)
                signum = self.asked_to_end(interruption.signum)
                if signum and self.state.step < self.recipe.steps:
                    self._end(signum)
                if any(map(self._due, (self.run.save_steps, self.run.sample_steps, self.run.eval_steps))):
                    with self.watch.paused():
                        self._pause()

    def _take_step(self, z: torch.Tensor, labels: torch.Tensor) -> None:
        self.watch.mark()
        logged = self._due(self.run.log_steps, self.state.step + 1)
        loss, norm = take_step(self.state, self.recipe, self._parts(z, labels), want_norm=logged)
        self.watch.mark()
        self.losses.append(loss)
        self.log.step_taken()
        if logged:
            self._report(norm)

    def _due(self, every: int, step: int | None = None) -> bool:
        """Whether something is done after the step, this one by default: every so many, 0 for never, and at the end."""
        step = self.state.step if step is None else step
        return every > 0 and (step % every == 0 or step == self.recipe.steps)

    def _parts(self, z: torch.Tensor, labels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, Draws]]:
        """This rank's share of a batch on its device, with its draws, in `accumulate` parts."""
        state, recipe, device = self.state, self.recipe, self.state.device
        z, labels = z.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        draws = draw(state.config, recipe.batch, self.order.part, recipe.seed, state.step, device)
        split = [x.chunk(self.run.accumulate) for x in (z, labels, *draws)]
        return [(z, labels, Draws(*draws)) for z, labels, *draws in zip(*split, strict=True)]

    def _report(self, norm: torch.Tensor) -> None:
        """A line of the log about the steps since the last one. TrainingError if their loss is not finite."""
        loss = self._loss()
        seconds, waited = self.watch.read()
        self.log.numbers(
            self.state.step,
            loss=loss,
            lr=self.state.optimizer.param_groups[0]["lr"],
            grad_norm=norm.item(),
            images_per_second=len(self.losses) * self.recipe.batch / seconds,
            waited=waited,
        )
        self._check(loss)
        self.losses = []
        self.watch.restart()

    def _loss(self) -> float:
        """Of the steps since the last line of the log, all ranks'."""
        return distributed.all_sum(torch.stack(self.losses).mean()).item() / distributed.world_size()

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} in the steps up to {self.state.step}")

    def _pause(self) -> None:
        """Draws, evaluates and saves what is due: a run that is ended before it has saved does all of it again."""
        if self._due(self.run.sample_steps) or self._due(self.run.eval_steps):
            with averaged(self.state):
                self._look()
        if self._due(self.run.save_steps):
            self._save()

    def _save(self) -> Path:
        if self.losses:  # before a checkpoint of no use takes the place of another
            self._check(self._loss())
        return self.checkpoints.save(self.state)

    def _end(self, signum: int) -> None:
        """Saves, and leaves out what else is due, which may take longer than one is given."""
        folder = self._save()
        raise Interrupted(signum, f"ended after step {self.state.step} of {self.recipe.steps}; saved in {folder}")

    def _look(self) -> None:
        state, run, numbers = self.state, self.run, {}
        if self._due(run.eval_steps) and self.held_out is not None:
            numbers["held_out_loss"] = self.held_out.loss(state)
        try:
            if self._due(run.sample_steps):
                file = run.out / "samples" / f"{state.step:09d}.png"
                self.log.picture(state.step, "samples", draw_samples(self.model, run.sample_cfg, file))
            if self._due(run.eval_steps) and self.evaluate is not None:
                numbers |= self.evaluate(self.model, state.step)
        except NotFiniteError:  # on all ranks; the training itself may be sound
            distributed.print_main(f"The samples after step {state.step} hold NaN or infinity", error=True)
        if numbers:
            self.log.numbers(state.step, **numbers)
