"""Runs a training from its beginning, or from the newest checkpoint of its folder, to its last step."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dcae_fast import distributed, images
from dcae_fast.files import writing
from dcae_fast.interruption import Interrupted, Interruption
from dcae_fast.lock import locked

from .checkpoint import Checkpoints, export
from .config import TrainingError
from .log import Log
from .settings import shards_of
from .state import averaged
from .stopwatch import Stopwatch
from .task import Task


def train(task: Task) -> Path:
    """Trains up to `task.recipe.steps`; returns the folder `model` in `task.run.out`, with the exported network.

    Called by all ranks, within `distributed.process_group`.

    SIGTERM and Ctrl-C raise Interrupted, a KeyboardInterrupt, after the step in progress and a checkpoint. Raises
    LockedError if another process trains in the folder, WriteError if the disk is full, and DataError, TrainingError or
    ValueError otherwise.
    """
    out = task.run.out
    with locked(out):
        training = Training(task)
        try:
            training.run_all()
        finally:
            training.log.close()
        export(training.state, out / "model")
    return out / "model"


class Training:
    """A training that is ready to take the step after `state.step`."""

    def __init__(self, task: Task):
        self.task, self.recipe, self.run = task, task.recipe, task.run
        self.checkpoints = Checkpoints(self.run.out / "checkpoints", self.run.keep)
        has_begun = distributed.on_main(lambda: bool(self.checkpoints.newest_first()))
        recipe = asdict(self.recipe)
        self.shards = shards_of(self.run.out, task.facts() | {"recipe": recipe}, has_begun)
        self.state = task.build()
        newest = self.checkpoints.load_newest(self.state)
        if newest is not None:
            distributed.print_main(f"Resuming after step {self.state.step}, from {newest}")
        if self.state.step > self.recipe.steps:
            raise TrainingError(
                f"steps={self.recipe.steps}; expected at least {self.state.step}, the steps that the training in "
                f"{self.run.out} has taken"
            )
        self.steps = range(self.state.step, self.recipe.steps)
        self.log = Log(self.run, self.state.step, self.recipe.steps, recipe)
        self.watch = Stopwatch(task.device)
        self.losses: list[dict[str, torch.Tensor]] = []  # of the steps since the last line of the log
        self.asked_to_end = distributed.LateMaximum(task.device)

    def run_all(self) -> None:
        """Takes the remaining steps. SIGTERM and Ctrl-C raise Interrupted after a checkpoint."""
        message = "Finishing the step, then saving. Interrupt again to end at once." if distributed.is_main() else ""
        with Interruption(message) as interruption:
            for batch in self.task.batches(self.steps, self.shards):
                self._take_step(batch)
                signum = self.asked_to_end(interruption.signum)
                if signum and self.state.step < self.recipe.steps:
                    self._end(signum)
                if any(map(self._due, (self.run.save_steps, self.run.sample_steps, self.run.eval_steps))):
                    with self.watch.paused():
                        self._pause()

    def _take_step(self, batch: Any) -> None:
        self.watch.mark()
        logged = self._due(self.run.log_steps, self.state.step + 1)
        losses, numbers = self.task.take_step(batch, logged)
        self.state.step += 1
        self.watch.mark()
        self.losses.append(losses)
        self.log.step_taken()
        if logged:
            self._report(numbers)

    def _due(self, every: int, step: int | None = None) -> bool:
        """Whether something is due after this step, by default the last one taken.

        It is due after every `every` steps, 0 for never, and after the last step of the training.
        """
        step = self.state.step if step is None else step
        return every > 0 and (step % every == 0 or step == self.recipe.steps)

    def _report(self, numbers: dict[str, torch.Tensor | float]) -> None:
        """Logs the steps since the last line. TrainingError if a loss is not finite."""
        losses = self._mean_losses()
        seconds, waited = self.watch.read()
        self.log.numbers(
            self.state.step,
            **losses,
            **{name: float(number) for name, number in numbers.items()},
            images_per_second=len(self.losses) * self.recipe.batch / seconds,
            waited=waited,
        )
        self._check(losses)
        self.losses = []
        self.watch.restart()

    def _mean_losses(self) -> dict[str, float]:
        """The mean of each loss over the steps since the last line of the log, and over the ranks."""
        names = dict.fromkeys(name for losses in self.losses for name in losses)
        means = [torch.stack([losses[name] for losses in self.losses if name in losses]).mean() for name in names]
        sums = distributed.all_sum(torch.stack(means)).tolist()
        return {name: value / distributed.world_size() for name, value in zip(names, sums, strict=True)}

    def _check(self, losses: dict[str, float]) -> None:
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise TrainingError(f"{name} is {loss} in the steps up to {self.state.step}; expected a finite number")

    def _pause(self) -> None:
        """Does everything that is due. It saves last: a run that ends before it has saved does everything again."""
        if self._due(self.run.sample_steps) or self._due(self.run.eval_steps):
            with averaged(self.state):
                self._evaluate()
        if self._due(self.run.save_steps):
            self._save()

    def _evaluate(self) -> None:
        step = self.state.step
        if self._due(self.run.sample_steps):
            picture = self.task.sample()
            if picture is not None:
                distributed.on_main(lambda: self._save_picture(picture))
                self.log.picture(step, "samples", picture)
        if self._due(self.run.eval_steps):
            numbers = self.task.evaluate()
            if numbers:
                self.log.numbers(step, **numbers)

    def _save_picture(self, picture: Image.Image) -> None:
        file = self.run.out / "samples" / f"{self.state.step:09d}.png"
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            images.save_png(picture, file)

    def _save(self) -> Path:
        if self.losses:  # a checkpoint with a loss that is not finite must not take the place of a good one
            self._check(self._mean_losses())
        return self.checkpoints.save(self.state)

    def _end(self, signum: int) -> None:
        """Saves, and leaves out everything else that is due: there may be little time before the process is killed."""
        folder = self._save()
        raise Interrupted(signum, f"ended after step {self.state.step} of {self.recipe.steps}; saved in {folder}")
