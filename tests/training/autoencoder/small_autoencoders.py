"""A training that takes a second: a small autoencoder on crops of the bundled photograph."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from trainings import run_until

from dcae_fast.images import demo_photograph
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.config import CoderConfig, DCAEConfig
from dcae_fast.training.autoencoder.config import RECIPES, Adversarial, AutoencoderRecipe, AutoencoderRun
from dcae_fast.training.autoencoder.task import AutoencoderTask
from dcae_fast.training.engine.loop import Training
from dcae_fast.training.engine.state import State

CPU = torch.device("cpu")
BLOCKS = ("ResBlock", "ResBlock", "EViTGLU")
CODER = CoderConfig((8, 16, 32), (0, 1, 1), BLOCKS, norm=("rms",) * 3, act=("silu",) * 3)
CONFIG = DCAEConfig(8, CODER, CODER, scaling_factor=0.5)
WITH_BATCH_NORM = replace(CONFIG, decoder=replace(CODER, depth=(0, 2, 1), norm=("rms", "batch", "rms")))
ADAPTIVE = replace(
    CONFIG, encoder=replace(CODER, shortcut=False), decoder=replace(CODER, shortcut=False), adaptive=True
)
MODELS = {"model": CONFIG, "batch-norm": WITH_BATCH_NORM, "adaptive": ADAPTIVE}
PICTURES, SIZE = 10, 40
SHORT = {"resolution": 32, "batch": 4, "steps": 6, "perceptual": "none", "lr": 1e-3, "precision": "float32"}
GAN = Adversarial(gan_weight=0.5, gan_start=2, r1=0.1, lecam=0.1, discriminator_width=4, discriminator_norm="spectral")


def prepare(folder: Path) -> None:
    """Writes the models with random weights, and crops of the bundled photograph."""
    for name, config in MODELS.items():
        torch.manual_seed(0)
        DCAE(config).save_pretrained(folder / name)
    (folder / "pictures").mkdir()
    with Image.open(demo_photograph()) as photograph:
        for number in range(PICTURES):
            left = 30 * number
            photograph.crop((left, 100, left + SIZE, 100 + SIZE)).save(folder / "pictures" / f"{number}.png")


def recipe(folder: Path, name: str = "local-refinement", model: str = "model", **options) -> AutoencoderRecipe:
    if RECIPES[name].gan.gan_weight:
        options = {"gan": GAN} | options
    return replace(RECIPES[name], source=str(folder / model), **SHORT | options)


def run_in(folder: Path, **options) -> AutoencoderRun:
    """A run with the pictures beside its folder; not patched, as kernels are slow without a GPU."""
    defaults = {"device": "cpu", "patch": False, "workers": 0}
    defaults |= {"log_steps": 2, "save_steps": 2, "sample_steps": 0, "eval_steps": 100}
    return AutoencoderRun(data=folder.parent / "pictures", out=folder, **defaults | options)


def train_until(step: int, recipe: AutoencoderRecipe, run: AutoencoderRun) -> State:
    return run_until(step, Training(AutoencoderTask(recipe, run, CPU)))
