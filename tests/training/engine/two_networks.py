"""A small task: a generator, averaged and exported, against a discriminator that begins two steps later."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from trainings import run_until

from dcae_fast.training.engine.batches import BatchOrder, generator_of, load_batches
from dcae_fast.training.engine.config import Recipe, Run
from dcae_fast.training.engine.ema import MovingAverage
from dcae_fast.training.engine.loop import Training
from dcae_fast.training.engine.optimizer import build_optimizer, learning_rate
from dcae_fast.training.engine.state import Export, State, Trained
from dcae_fast.training.engine.task import Taken, Task

CPU = torch.device("cpu")
ITEMS, WIDTH = 20, 8
RECIPE = Recipe(batch=4, steps=12)
BEGINS = 2  # the steps that the generator takes without the discriminator
FILE, PREFIX = "weights.safetensors", "generator."


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)
    (folder / "config.json").write_text(json.dumps({"width": WIDTH}))


def perceptron(outputs: int) -> nn.Module:
    """With buffers, the statistics of a batch norm."""
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, outputs))


class TwoNetworks(Task):
    """The generator reconstructs vectors from noisy ones."""

    def __init__(self, recipe: Recipe, run: Run, items: int = ITEMS):
        super().__init__(recipe, run, CPU)
        self.data = torch.randn(items, WIDTH, generator=torch.Generator().manual_seed(1))

    def facts(self) -> dict:
        return {"items": len(self.data)}

    def build(self) -> State:
        torch.manual_seed(self.recipe.seed)
        networks = {"generator": self._trained(perceptron(WIDTH)), "discriminator": self._trained(perceptron(1))}
        average = MovingAverage(networks["generator"].network, 0.9)
        self.state = State(networks, Export("generator", save, FILE, PREFIX), average)
        return self.state

    def _trained(self, network: nn.Module) -> Trained:
        """With a scale that doubles every three steps."""
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        return Trained(network, network, build_optimizer(network, 1e-2, (0.9, 0.99), 0.1), scaler)

    def batches(self, steps: range, shards: int):
        order = BatchOrder(len(self.data), self.recipe.batch, shards, self.recipe.seed, steps, 0, 1)
        return load_batches(self.data, order, self.run.workers, CPU)

    def take_step(self, batch: torch.Tensor, logged: bool) -> Taken:
        step = self.state.step + 1
        lr = learning_rate(step, 1e-2, 5, 1e-3)
        generator, discriminator = self.state.networks.values()
        noise = torch.randn(batch.shape, generator=generator_of(CPU, self.recipe.seed, step))
        made = generator.called(batch + 0.1 * noise)
        losses = {"reconstruction": F.mse_loss(made, batch)}
        if step > BEGINS:
            discriminator.network.requires_grad_(False)
            losses["adversarial"] = -discriminator.called(made).mean()
            discriminator.network.requires_grad_(True)
        generator.backward(sum(losses.values()))
        norm = generator.update(lr, clip_grad=1.0, want_norm=logged)
        self.state.average.update(generator.network, step)
        if step > BEGINS:
            real, fake = discriminator.called(batch), discriminator.called(made.detach())
            losses["discriminator"] = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            discriminator.backward(losses["discriminator"])
            discriminator.update(lr)
        return Taken({name: loss.detach() for name, loss in losses.items()}, {"grad_norm": norm})

    def sample(self) -> Image.Image | None:
        return Image.new("RGB", (8, 8)) if self.state.step > 6 else None

    def evaluate(self) -> dict[str, float]:
        generator = self.state.networks["generator"].network
        assert not generator.training and not torch.is_grad_enabled()
        return {"distance": F.mse_loss(generator(self.data), self.data).item()}


def run_in(folder: Path, **options) -> Run:
    defaults = {"workers": 0, "log_steps": 4, "save_steps": 4, "sample_steps": 0, "eval_steps": 100}
    return Run(out=folder, **defaults | options)


def train_until(step: int, folder: Path, **options) -> State:
    return run_until(step, Training(TwoNetworks(RECIPE, run_in(folder, **options))))


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / FILE).items()}
