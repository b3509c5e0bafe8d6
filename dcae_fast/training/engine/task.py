"""The interface between the engine and a task."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image

from .config import Recipe, Run
from .state import State


class Taken(NamedTuple):
    """The result of a step, as scalars.

    losses: means over this rank's part of the batch, on the device. The log gets their mean over the ranks and over the
    steps since its last line. A loss may be absent from some steps, on all ranks alike.
    numbers: the log gets them as they are, from the steps that write a line.
    """

    losses: dict[str, torch.Tensor]
    numbers: dict[str, torch.Tensor | float]


class Task(ABC):
    """What a training computes; `loop.Training` decides when. Every rank calls every method.

    Training is resumed exactly if a step depends on the state, the recipe and the number of the step only.
    """

    def __init__(self, recipe: Recipe, run: Run, device: torch.device):
        self.recipe, self.run, self.device = recipe, run, device

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Facts about the data that must be the same when a run is resumed: values for JSON, by name."""

    @abstractmethod
    def build(self) -> State:
        """The state before the first step, which the engine may replace by a checkpoint. Called once, first of all.

        The engine counts the steps in it; `take_step` changes everything else.
        """

    @abstractmethod
    def batches(self, steps: range, shards: int) -> Iterator[Any]:
        """This rank's part of the batch of each of these steps, numbered from 0, on the CPU.

        shards: the number of ranks that the run began with, on which the data order may depend.
        """

    @abstractmethod
    def take_step(self, batch: Any, logged: bool) -> Taken:
        """Takes the step after `state.step`. logged: whether the step writes a line of the log."""

    @abstractmethod
    def sample(self) -> Image.Image | None:
        """A picture of samples, the same on all ranks; None if there is nothing to show.

        Called within `state.averaged`, as `evaluate` is.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Numbers for the log that tell how good the averaged weights are; empty if there are none."""
